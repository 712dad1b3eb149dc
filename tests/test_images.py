"""What images take, and when they go."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from harness import outside
from harness.container import OVERLAID, container
from harness.container_runs import restart
from harness.gunicorn_server import CONF, Gunicorn, require_no_failure
from harness.interpreters import is_shared
from harness.kernel import filesystem
from harness.layouts import laid_out
from harness.libraries import build_library, chunks_library
from harness.marks import needs_root
from harness.placement import require_executable, require_one_address
from harness.process import Process, interpreter

from page_primer.images import inventory, locks, trial, trust
from page_primer.images import names as image_names
from page_primer.images.inventory import DIRECTORY
from page_primer.images.layout import Layout
from page_primer.images.room import NO_LIMIT
from page_primer.images.store import Image, Store

MIB = 1 << 20


def names(images: Path) -> set[str]:
    return {entry.name for entry in images.iterdir() if not entry.name.startswith(".")}


# --------------------------------------------------------------------------------- random addresses


@pytest.fixture
def library(tmp_path):
    """A library that is loaded at a random address: the loader aligns those of a disk."""
    if filesystem("/dev/shm") != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    require_executable("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="page-primer-test-", dir="/dev/shm"))
    built = build_library(tmp_path, "libbig.so")
    path = directory / "libbig.so"
    shutil.copy(built, path)
    yield str(path)
    shutil.rmtree(directory)


LOAD = """
import ctypes, os, page_primer
library = ctypes.CDLL({library!r})
report = page_primer.prime(image_dir={images!r})
result = next(obj["where"] for obj in report.as_dict()["objects"] if obj["path"] == {library!r})
assert library.answer() == 42
"""


def load(process, library, images):
    """Load and prime it there; the image's folder. By chance it may be one that comes again."""
    where = process.run(LOAD.format(library=library, images=str(images)))
    assert where is not None
    folder = Path(where).parent
    if folder.name.split("-")[7] == "0":
        pytest.skip("the library was loaded at an aligned address")
    return folder


@pytest.mark.images
def test_an_image_of_a_random_address_goes_with_its_last_user(python, images, library):
    with Process(python) as process:
        folder = load(process, library, images)
        child = process.run(
            "import signal\n"
            "child = os.fork()\n"
            "if child == 0: signal.pause(); os._exit(0)\n"
            "result = child"
        )
        process.restore()
        assert folder.exists()  # the child has it still
        os.kill(child, signal.SIGKILL)
        process.run(f"os.waitpid({child}, 0)")
        folder = load(process, library, images)
        process.restore()
        assert not folder.exists()
        folder = load(process, library, images)
        assert folder.exists()
    assert not folder.exists()  # with the process
    assert names(images)  # the interpreter's comes again


@pytest.mark.images
def test_a_killed_process_leaves_its_image_to_the_next(python, images, library):
    left = []
    for _ in range(3):
        program = LOAD.format(library=library, images=str(images)) + "print(result, flush=True)\n"
        program += "import signal; os.kill(os.getpid(), signal.SIGKILL)"
        done = subprocess.run([python, "-c", program], stdout=subprocess.PIPE, text=True)
        assert done.returncode == -signal.SIGKILL
        left.append(Path(done.stdout.strip()).parent)
        assert left[-1].exists()
    assert [folder.exists() for folder in left if folder != left[-1]] == [False] * (
        len(set(left)) - 1
    )


# ------------------------------------------------------------------------------- without an origin


FULL = """
import errno, os, sys
from pathlib import Path
from harness.layouts import laid_out
from page_primer.images.store import Store
library, mounted = map(Path, sys.argv[1:])
wanted = laid_out(library, 1)
store = Store(str(mounted / "images"))
try:
    with open(mounted / "rest", "wb", buffering=0) as rest:
        while rest.write(bytes(4096)):
            pass
except OSError as error:
    assert error.errno == errno.ENOSPC
try:
    store.get(wanted)
except OSError as error:
    print(error.strerror, os.listdir(store.fd))
"""


@pytest.mark.images
def test_a_folder_that_could_not_be_named_is_removed(tmp_path):
    """The link to a file of a long path takes a block, other files in a folder take none."""
    mounted, deep = tmp_path / "mounted", tmp_path / ("deep" * 40)
    mounted.mkdir()
    deep.mkdir()
    script = f'mount -t tmpfs -o size=64k none {mounted} && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", FULL, chunks_library(deep), mounted],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("No space left on device []\n", "")


@pytest.mark.images
@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("left", [[], [".writer"], [".users", ".writer", ".new-1-0"]])
def test_a_folder_without_an_origin_goes(tmp_path, images, clear, left):
    """Unless somebody is at work in it, or there is what nobody of us makes."""
    wanted = laid_out(chunks_library(tmp_path), 1)
    with Store(str(images)) as store:

        def tidy() -> list[str]:
            if clear:
                assert inventory.clear(store.fd) == 0
            else:
                store.prune()
            return sorted(names(images))

        folder, other = images / wanted.name, images / f"{wanted.name}.0"
        for path in (folder, other):
            path.mkdir()
        (other / "precious").touch()
        for name in left:
            (folder / name).touch()
        if ".users" in left:
            fd = os.open(folder, DIRECTORY)
            user = locks.share(fd)
            assert tidy() == [folder.name, other.name]
            os.close(user)
            os.close(fd)
        assert tidy() == [other.name]
        assert (other / "precious").exists()


# ------------------------------------------------------------------------------------------- limits


def make(images: Path, like: Path, number: int, size: int) -> Path:
    """A folder as of another layout of the same file, used at another time."""
    parts = like.name.split("-")
    folder = images / "-".join([*parts[:8], f"{number:x}000x"])
    folder.mkdir()
    origin = os.readlink(like / "origin")
    (folder / "origin").symlink_to(origin)
    (folder / os.path.basename(origin)).write_bytes(b"x" * size)
    for path in (folder / os.path.basename(origin), folder):
        os.utime(path, (number, number))
    return folder


@pytest.mark.images
def test_the_longest_unused_go_first(python, images):
    require_one_address(python)
    with Process(python) as process:
        used = Path(interpreter(process.prime(image_dir=str(images)))["where"]).parent
        size = sum(entry.lstat().st_blocks * 512 for entry in used.iterdir())
        others = [make(images, used, number, 1 << 20) for number in (1, 2, 3)]
        fd = os.open(images, DIRECTORY)
        try:
            assert inventory.prune(fd, limit=size + (5 << 20)) >= size + (3 << 20)
            assert all(folder.exists() for folder in others)
            inventory.prune(fd, room=1 << 20, limit=size + (3 << 20) + (1 << 19))
            assert [folder.exists() for folder in others] == [False, True, True]
            # What is used stays, even if that is too much.
            assert inventory.prune(fd, limit=0) >= size
            assert [folder.exists() for folder in others] == [False] * 3
            assert used.exists()
        finally:
            os.close(fd)


@pytest.mark.images
def test_store_limit(python, images):
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images), store_limit="1M"))
        assert core["backing"] in ("memfd", "anonymous")
        assert any("more than 1 MiB" in note for note in core["notes"]), core["notes"]
        total = sum(path.lstat().st_blocks * 512 for path in images.rglob("*"))
        assert total < MIB
        process.restore()
        core = interpreter(process.prime(image_dir=str(images), store_limit="512M"))
        assert core["backing"] == "image"


def write(images: Path, wanted: Layout, limit: int) -> Image:
    with Store(str(images), limit=limit) as store:
        return store.get(wanted)


@pytest.mark.images
@pytest.mark.parametrize("chunks", [(2,), (0, 5), ()], ids=["one", "two", "all"])
def test_what_an_image_takes_is_known_before(tmp_path, images, chunks):
    """Of a part of a library what is between its pieces takes nothing."""
    wanted = laid_out(chunks_library(tmp_path), *chunks)
    fd = os.open(wanted.object.path, os.O_RDONLY)
    size = wanted.size(fd)
    os.close(fd)
    assert (len(chunks) or 7) * outside.PMD < size < ((len(chunks) or 7) + 1) * outside.PMD
    with pytest.raises(trust.Unusable, match=f"an image of {-(-size // MIB)} MiB is more than"):
        write(images, wanted, size - 1)
    found = write(images, wanted, size + MIB)  # the folder has more than the image
    assert (found.written, os.stat(found.fd).st_size > 7 * outside.PMD) == (size, True)
    found.close()
    with Store(str(images)) as store:
        (entry,) = inventory.read(store.fd)
    # Whole blocks, and the folder with its locks.
    assert -outside.PMD // 2 < entry.size - size < outside.PMD // 2
    assert wanted.content_end > 7 * outside.PMD


@pytest.mark.images
def test_nothing_goes_for_what_finds_no_room_in_any_case(tmp_path, images):
    library = chunks_library(tmp_path)
    limit, written = 8 * MIB, [write(images, laid_out(library, n), NO_LIMIT) for n in (0, 1, 2)]
    there = sorted(image.path for image in written)

    def left() -> list[str]:
        return [path for path in there if os.path.exists(path)]

    written.pop().close()
    with pytest.raises(trust.Unusable, match=r"in use: .* more than 8 MiB") as refused:
        write(images, laid_out(library, 3, 4), limit)
    assert left() == there
    assert refused.value.remedy == "PAGE_PRIMER_STORE_LIMIT=11M"
    for image in written:
        image.close()
    with pytest.raises(trust.Unusable, match="an image of 15 MiB is more than 8 MiB") as refused:
        write(images, laid_out(library), limit)
    assert left() == there
    assert refused.value.remedy == "PAGE_PRIMER_STORE_LIMIT=15M"
    write(images, laid_out(library, 3, 4), limit).close()
    assert len(left()) == 1


@pytest.mark.images
def test_nothing_goes_for_a_file_that_would_be_too_large(tmp_path, images):
    """RLIMIT_FSIZE, of the process."""
    wanted = laid_out(chunks_library(tmp_path))
    write(images, laid_out(Path(wanted.object.path), 1), NO_LIMIT).close()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(images, wanted, 16 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(names(images)) == 1


def test_memory_is_left_to_the_application(python, tmp_path):
    """A tmpfs among the default directories is used only with eight times the room."""
    program = textwrap.dedent("""
        from page_primer.images import places
        place = places._place({path!r}, 1 << 30, places.mounts.read())
        import page_primer.backing.image as backing
        backing.directories = lambda options: [place]
        import page_primer.apply.process
        report = page_primer.prime(backing="image").as_dict()
        core = next(obj for obj in report["objects"] if obj["interpreter"])
        result = [place.in_memory, place.limit, core["backing"], core["notes"]]
    """)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for size, used in ((20, False), (1024, True)):
        script = f'mount -t tmpfs -o size={size}m none {mounted} && exec "$@"'
        wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"]
        if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        with Process(python, wrapper=wrapper) as process:
            path = str(mounted / "images")
            found = process.run("import page_primer\n" + program.format(path=path))
            assert found[:2] == [True, size * MIB // 8]
            assert (found[2] == "image") == used, found[3]
            if not used:
                assert any("left to the application" in note for note in found[3])
                left = process.run(
                    f"import os; result = sum(len(files) for *_, files in os.walk({path!r}))"
                )
                assert left <= 1  # the answer of the trial


# ------------------------------------------------------------------------------------------- trials


def test_a_trial_is_remembered(python, images, monkeypatch):
    images.mkdir(mode=0o755)
    fd = os.open(images, DIRECTORY)
    try:
        none = [0] * trial._TRIES
        answers = iter([*none, 4 * MIB, *none])
        monkeypatch.setattr(trial, "measure", lambda *_: next(answers))
        assert not trial.gives_huge_pages(fd, 2 * MIB)
        assert not trial.gives_huge_pages(fd, 2 * MIB)  # remembered
        os.utime(images / ".trial", (1, 1))  # memory may have been fragmented
        assert trial.gives_huge_pages(fd, 2 * MIB)
        os.utime(images / ".trial", (1, 1))
        assert trial.gives_huge_pages(fd, 2 * MIB)  # for good
        text = (images / ".trial").read_text()
        assert text == f"{os.uname().release} 200000 yes\n"
        (images / ".trial").write_text("0.0 200000 yes\n")  # another kernel
        assert not trial.gives_huge_pages(fd, 2 * MIB)
    finally:
        os.close(fd)


def test_a_trial_tells_what_smaps_shows_and_leaves_nothing(python, images):
    images.mkdir(mode=0o755)
    with Process(python) as process:
        huge = process.run(
            "import os\n"
            "from page_primer.images import trial\n"
            f"fd = os.open({str(images)!r}, os.O_RDONLY)\n"
            f"result = trial.measure(fd, {outside.PMD})\n"
            "os.close(fd)"
        )
        assert huge in (0, outside.PMD, 2 * outside.PMD)
        assert not any(str(images) in vma.path for vma in outside.smaps(process.pid))
    assert not list(images.iterdir())


# ---------------------------------------------------------------------------------------- container


START = """
import json, os, sys
from multiprocessing import shared_memory
import numpy, page_primer
report = page_primer.prime()
child = os.fork()
if child == 0:
    page_primer.prime()
    memory = shared_memory.SharedMemory(create=True, size=32 << 20)
    memory.buf[:] = bytes(32 << 20)
    memory.close()
    memory.unlink()
    os._exit(0)
status = os.waitpid(child, 0)[1]
shm = os.statvfs("/dev/shm")
used = (shm.f_blocks - shm.f_bfree) * shm.f_frsize + len(os.listdir("/dev/shm"))
core = report.interpreter
sizes = [os.lstat(os.path.join(at, name)).st_blocks * 512
         for at, _, files in os.walk(os.environ["HOME"]) for name in files]
print(json.dumps([status, used, core.backing, core.where, core.code_huge_bytes, sum(sizes)]))
"""


@pytest.mark.slow
@needs_root
def test_small_shm(tmp_path):
    """The case small-shm: in a container, /dev/shm is the application's, the store is bounded and
    does not grow, whatever the load addresses."""
    pytest.importorskip("numpy")
    upper = Path(tempfile.mkdtemp(prefix="page-primer-test-", dir="/srv"))
    try:
        wrapper = container(upper)
        with Process(sys.executable, wrapper=wrapper, env={"HOME": "/var/tmp/home"}) as process:
            process.run("import os; os.mkdir('/var/tmp/home')")
            seen = []
            for _ in range(3):
                program = (
                    "import subprocess, sys\n"
                    f"command = [sys.executable, '-c', {START!r}]\n"
                    "result = subprocess.check_output(command, text=True)"
                )
                seen.append(json.loads(process.run(program)))
                left = process.run(
                    "result = sum(os.lstat(os.path.join(at, n)).st_blocks * 512 "
                    "for at, _, files in os.walk('/var/tmp/home') for n in files)"
                )
                seen[-1].append(left)
    finally:
        shutil.rmtree(upper)
    for status, used, backing, where, huge, size, _ in seen:
        assert status == 0  # no SIGBUS
        assert used == 0
        assert (backing, huge > 0) == ("image", True)
        assert where.startswith("/var/tmp/home/.cache/page-primer/")
        assert size < 32 * MIB
    lefts = [left for *_, left in seen]
    assert lefts[2] <= lefts[0] + MIB


ARRAYS = """
import os, sys
from multiprocessing import shared_memory
sys.modules["pyarrow"] = None  # pandas takes it, of 46 MiB, where it is there
import numpy, pandas
def app(environ, start_response):
    memory = shared_memory.SharedMemory(create=True, size=32 << 20)
    memory.buf[:] = bytes(32 << 20)
    memory.close()
    memory.unlink()
    start_response("200 OK", [])
    return [str(os.getpid()).encode()]
"""
WORKERS = 4
MOST = 5 * MIB  # a worker


@pytest.mark.slow
@needs_root
def test_what_a_worker_takes_in_a_container():
    """The case small-shm as it is, with gunicorn: each worker has its shared memory, and priming
    takes five mebibytes of memory a worker at most."""
    pytest.importorskip("pandas")
    place = Path(tempfile.mkdtemp(prefix="page-primer-test-", dir="/srv"))
    place.chmod(0o755)
    try:
        plain, primed = (
            memory_of_a_server(place / name, conf)
            for name, conf in (("plain", None), ("primed", CONF))
        )
    finally:
        shutil.rmtree(place)
    most = MOST
    if numpy_is_overlaid():  # then it is at random addresses, too: a huge page more or less
        most += 2 * outside.PMD
    assert 0 < primed - plain <= WORKERS * most, (plain, primed)


def numpy_is_overlaid():
    return Path(importlib.util.find_spec("numpy").origin).parts[1] in OVERLAID


def memory_of_a_server(directory, conf):
    """Bytes that a server takes of the machine, whose image it may be alone to map."""
    directory.mkdir()
    directory.chmod(0o777)
    (directory / "upper").mkdir()
    env = {"HOME": "/var/tmp/home", "XDG_CACHE_HOME": "", "OPENBLAS_NUM_THREADS": "1"}
    wrapper = [
        "prlimit", f"--memlock={8 * MIB}:{8 * MIB}", *container(directory / "upper"),
        "sh", "-c", 'mkdir "$HOME" && exec "$@"', "sh",
    ]  # fmt: skip
    with Gunicorn(
        sys.executable, directory, "--workers", str(WORKERS), conf=conf, app=ARRAYS, env=env,
        wrapper=wrapper,
    ) as server:  # fmt: skip
        server.wait_for_workers(WORKERS)
        server.wait_until_each_answered()
        require_no_failure(server)
        family = [server.master, *server.workers]
        if conf:
            for pid in family:
                assert any("/.cache/page-primer/" in vma.path for vma in outside.smaps(pid))
        return taken_by(family)


def taken_by(family):
    """Bytes of memory that processes which share some of it take together. Of a file it is what one
    of them has most of, since PSS is less where others of the machine map the file."""
    own, files = 0, {}
    for pid in family:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n")[1:-1]
        shares = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in rollup}
        own += shares["Pss_Anon"] + shares["Pss_Shmem"]
        here = {}
        for vma in outside.smaps(pid):
            if vma.inode and not vma.path.startswith(("/memfd:", "/dev/")):
                size = (vma.kb["Rss"] - vma.kb["Anonymous"]) << 10
                here[vma.device, vma.inode] = here.get((vma.device, vma.inode), 0) + size
        for file, size in here.items():
            files[file] = max(files.get(file, 0), size)
    return own + sum(files.values())


@needs_root
def test_a_container_with_a_read_only_root_and_nothing_built(tmp_path):
    """Then memory without a name is used, and /dev/shm still left alone."""
    upper = Path(tempfile.mkdtemp(prefix="page-primer-test-", dir="/srv"))
    try:
        wrapper = container(upper, read_only=True)
        env = {"HOME": "/nonexistent", "PAGE_PRIMER_KEEP_PROFILERS": "0"}
        with Process(sys.executable, wrapper=wrapper, env=env) as process:
            report = process.run("import page_primer; result = page_primer.prime().as_dict()")
            core = interpreter(report)
            assert core["backing"] == "memfd"
            assert any("mounted noexec" in note for note in core["notes"]), core["notes"]
            assert process.run("import os; result = os.listdir('/dev/shm')") == []
    finally:
        shutil.rmtree(upper)


@pytest.mark.slow
@needs_root
def test_restarts_leave_nothing_more(tmp_path):
    """At random load addresses no image is used again; every fifth service is killed.
    tools/container_check does it 500 times."""
    upper = Path(tempfile.mkdtemp(prefix="page-primer-test-", dir="/srv"))
    try:
        seen = list(restart(15, container(upper)))
    finally:
        shutil.rmtree(upper)
    assert {one.backing for one in seen} == {"image"}
    assert seen[2].images  # after it was killed, until another one writes
    for one in (seen[4], seen[-1]):
        if is_shared(sys.executable):
            assert one.size < MIB // 8, seen
        assert one.images <= 2, seen
    # A program that is linked for one address has an image that all its starts use.
    assert seen[-1].size == pytest.approx(seen[4].size, abs=MIB // 8), seen


# What mmap(2) gives a library is random by a seed that is switched off, and by where the stack may
# grow to, which is chosen.
_AT_PHASE_0 = """
import resource, subprocess, sys
stack = 256 << 20
def run(source):
    limits = stack, resource.RLIM_INFINITY
    done = subprocess.run(
        ["setarch", "-R", sys.executable, "-c", source], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, limits))
    assert not done.returncode, done.stderr
    return done.stdout
phase = ("from page_primer import survey; found = survey.take()\\n"
         "print(*(o.start %% found.pmd_size for o in found.objects if o.interpreter))")
stack += int(run(phase))
result = run(phase).strip(), run(%r)
"""
_SERVED = """
import os, page_primer
core = page_primer.prime().interpreter
print(core.backing, core.sharing, *os.listdir(os.path.dirname(os.path.dirname(core.where))))
"""


@needs_root
def test_an_image_at_phase_0_by_chance_goes_with_its_last_user(tmp_path):
    """Where the file system has load addresses random, one start in 512 has that one."""
    if not is_shared(sys.executable):
        pytest.skip(
            "this interpreter is no library, and a program's own address is chosen otherwise"
        )
    upper = Path(tempfile.mkdtemp(prefix="page-primer-test-", dir="/srv"))
    try:
        env = {"HOME": "/var/tmp/home", "XDG_CACHE_HOME": ""}
        with Process(sys.executable, wrapper=container(upper), env=env) as process:
            process.run("import os; os.mkdir('/var/tmp/home')")
            phase, said = process.run(_AT_PHASE_0 % _SERVED)
            assert phase == "0"
            assert said.startswith("image private "), said
            (image,) = filter(image_names.is_name, said.split()[2:])
            assert image_names.is_transient(image)
            left = process.run("import os; result = [*os.walk(os.environ['HOME'])]")
            assert not [at for at, _, _ in left if image_names.is_name(os.path.basename(at))], left
    finally:
        shutil.rmtree(upper)


# ------------------------------------------------------------------------------------------ command


def command(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "page_primer", "images", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.images
def test_the_command_lists_prunes_and_clears(python, images):
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images)))
        where = Path(core["where"])
        other = make(images, where.parent, 1, MIB)
        status, out, _ = command("--dir", str(images), "--json")
        assert status == 0
        (store,) = json.loads(out)
        found = {image["path"]: image for image in store["images"] if not image["anchor"]}
        assert set(found) == {str(where), str(other / where.name)}
        mine = found[str(where)]
        assert (mine["object"], mine["users"], mine["locked"]) == (
            core["path"],
            [process.pid],
            True,
        )
        assert mine["size"] >= where.stat().st_blocks * 512
        assert abs(mine["last_use"] - where.stat().st_mtime) < 1
        theirs = found[str(other / where.name)]
        assert (theirs["users"], theirs["locked"]) == ([], False)

        status, out, _ = command("--dir", str(images))
        assert status == 0
        assert f"{core['path']} " in out and str(where) in out and "users" in out

        status, out, _ = command("prune", "--dir", str(images))
        assert (status, other.exists()) == (0, True)
        status, out, _ = command("clear", "--dir", str(images))
        assert "1 image removed" in out
        assert (status, other.exists(), where.exists()) == (0, False, True)
    status, out, _ = command("clear", "--dir", str(images), "--json")
    (store,) = json.loads(out)
    assert (store["images"], where.parent.name in store["removed"]) == ([], True)


@pytest.mark.images
def test_the_command_refuses_what_prime_refuses(images):
    status, _, error = command("--dir", str(images))
    assert (status, error) == (1, f"page-primer: no directory {images}\n")
    images.mkdir()
    images.chmod(0o777)
    status, _, error = command("--dir", str(images))
    assert status == 1
    assert "not ours alone: others can write to it" in error
    status, _, error = command("--dir", "relative")
    assert status == 2
    assert "absolute path" in error
