"""The store of images: sharing, pruning, and everything an environment can do to it."""

import fcntl
import os
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
from harness import outside
from harness.kernel import filesystem, require_huge_files
from harness.placement import require_one_address
from harness.privileges import IS_ROOT, drop_memlock, locks_fit
from harness.process import Process, interpreter

from page_primer.images import trust


def huge(process):
    text = outside.text_of(process.pid)
    return text.huge == text.attainable > 0


@pytest.mark.images
def test_names_and_modes(python, images):
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images)))
        where = Path(core["where"])
        assert images.stat().st_mode & 0o777 == 0o755
        with open(core["path"], "rb") as original, open(where, "rb") as image:
            mode = trust.mode_for(original.fileno(), image.fileno())
        assert where.stat().st_mode & 0o777 == mode
        assert os.readlink(where.parent / "origin") == core["path"]
        assert {entry.name for entry in where.parent.iterdir()} == {
            "origin", where.name, ".users", ".writer",
        }  # fmt: skip
        for name in (".users", ".writer"):
            assert (where.parent / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.images
def test_a_wrong_image_is_never_mapped_and_is_written_again(python, images):
    require_one_address(python)
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images)))
        where = Path(core["where"])
    for position in (0x200000 + 0x1000, 0x200000 + 0x150000):
        where.chmod(0o755)
        with open(where, "r+b") as file:
            file.seek(position)
            byte = file.read(1)
            file.seek(position)
            file.write(bytes([byte[0] ^ 0xFF]))
        where.chmod(0o555)
        with Process(python) as process:
            core = interpreter(process.prime(image_dir=str(images)))
            assert huge(process)
            assert any("wrong content" in note for note in core["notes"])
            assert core["written_bytes"] > 0
        with Process(python) as process:
            core = interpreter(process.prime(image_dir=str(images)))
            assert (core["written_bytes"], core["notes"]) == (0, [])


@pytest.mark.parametrize("limit", [None, 8 << 20])
@pytest.mark.images
def test_an_image_on_small_pages_is_written_again(python, images, limit):
    """smaps is asked once the image is mapped over the code: then it is put back, and moved to what
    smaps confirms, and is locked there."""
    require_one_address(python)
    require_huge_files(images.parent)
    with Process(python) as process:
        where = Path(interpreter(process.prime(image_dir=str(images)))["where"])
    content = where.read_bytes()
    where.unlink()
    with open(where, "wb", buffering=0) as file:
        for at in range(0, len(content), outside.PAGE):
            file.write(content[at : at + outside.PAGE])
    where.chmod(0o555)
    with Process(python, wrapper=drop_memlock(limit) if limit else ()) as process:
        process.run("import ssl, decimal, sqlite3")
        report = process.prime(image_dir=str(images), mlock=True)
        core = interpreter(report)
        assert huge(process)
        assert outside.text_of(process.pid).locked
        assert (core["path"] in report["moved"], core["backing"]) == (True, "image")
        if limit or locks_fit():
            assert bool(report["lock_refused_bytes"]) == bool(limit)
        if not core["written_bytes"]:
            pytest.skip("this kernel makes a file's small pages huge")
        assert any(note.startswith(f"{where}: 0 of ") for note in core["notes"]), core["notes"]
        process.restore()
        assert not any(str(images) in v.path for v in outside.smaps(process.pid))


@pytest.mark.parametrize("size", [0, 4096, 0x200000 + 4096])
@pytest.mark.images
def test_a_truncated_image_is_written_again(python, images, size):
    """What a crash of the machine can leave behind; reading beyond its end would be a SIGBUS."""
    require_one_address(python)
    with Process(python) as process:
        where = Path(interpreter(process.prime(image_dir=str(images)))["where"])
    where.chmod(0o755)
    os.truncate(where, size)
    where.chmod(0o555)
    with Process(python) as process:
        process.prime(image_dir=str(images))
        assert huge(process)


@pytest.mark.images
def test_an_image_others_can_write_is_not_used(python, images):
    require_one_address(python)
    with Process(python) as process:
        where = Path(interpreter(process.prime(image_dir=str(images)))["where"])
    where.chmod(0o777)
    before = where.stat().st_ino
    with Process(python) as process:
        process.prime(image_dir=str(images))
        assert where.stat().st_ino != before
        assert not where.stat().st_mode & 0o022


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        pytest.param(
            lambda path: path.mkdir(mode=0o777) or path.chmod(0o777), "not ours alone",
            marks=pytest.mark.images,
        ),
        (lambda path: path.write_text(""), "Not a directory"),
        (lambda path: path.symlink_to("/tmp"), "Not a directory"),
        pytest.param(
            lambda path: (path.mkdir(), shutil.chown(path, 65534, 65534)), "not ours alone",
            marks=pytest.mark.root("give a directory away"),
        ),
    ],
    ids=["world-writable", "file", "symlink", "foreign"],
)  # fmt: skip
def test_a_directory_that_is_not_ours_is_refused(python, images, prepare, reason):
    prepare(images)
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images), backing="image"))
        assert core["backing"] is None
        assert any(reason in note for note in core["notes"]), core["notes"]
    assert not images.is_dir() or images.is_symlink() or not list(images.iterdir())


def as_mount(tmp_path, options):
    """A command prefix: a private mount namespace with a tmpfs at tmp_path/mounted."""
    (tmp_path / "mounted").mkdir()
    script = f'mount -t tmpfs -o {options} none {tmp_path}/mounted && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    return prefix


@pytest.mark.parametrize(
    ("options", "said"),
    [("size=2m", "No space left"), ("size=2m,ro", "Read-only"), ("noexec", "mounted noexec")],
)
def test_a_full_readonly_or_noexec_disk_is_an_outcome(python, tmp_path, options, said):
    with Process(python, wrapper=as_mount(tmp_path, options)) as process:
        directory = tmp_path / "mounted" / "images"
        report = process.prime(image_dir=str(directory))
        core = interpreter(report)
        assert any(said in note for note in core["notes"]), core["notes"]
        assert core["backing"] in ("memfd", "anonymous", None)
        # Nothing half-written stays behind.
        left = process.run(
            f"import glob; result = glob.glob('{directory}/*/.new*') + "
            f"[p for p in glob.glob('{directory}/*/*') if os.path.getsize(p) == 0]"
        )
        assert left == []
        assert process.run("import decimal; result = str(decimal.Decimal(1))") == "1"


@pytest.mark.root("become nobody")
def test_no_permission_is_an_outcome(python, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    wrapper = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*wrapper, python, "-c", "import page_primer"]).returncode:
        pytest.skip("another user may not run this interpreter")
    with Process(python, wrapper=wrapper) as process:
        report = process.prime(image_dir=str(locked / "images"))
        core = interpreter(report)
        assert any("Permission denied" in note for note in core["notes"]), (core, report["memory"])
        assert core["backing"] in ("memfd", "anonymous", None)


@pytest.mark.images
def test_processes_that_start_together_write_one_image(python, images):
    require_one_address(python)
    code = f"import page_primer; r = page_primer.prime(image_dir={str(images)!r}); "
    code += "core = r.interpreter; "
    code += "print(core.written_bytes, core.where, *core.notes, flush=True); input()"
    started = [
        subprocess.Popen(
            [python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    try:
        answers = [process.stdout.readline().split() for process in started]
        written = [int(answer[0]) for answer in answers]
        assert sum(size > 0 for size in written) == 1, answers
        assert len({answer[1] for answer in answers}) == 1
        texts = [outside.text_of(process.pid) for process in started]
        assert all(text.huge == text.attainable for text in texts)
        outside.require_one_copy(texts)
    finally:
        for process in started:
            process.communicate("\n")


@pytest.mark.images
def test_a_writer_killed_half_way_is_no_obstacle(python, images):
    require_one_address(python)
    code = textwrap.dedent(f"""
        import os, signal, page_primer, page_primer.images.layout as image
        copy, calls = image.copy, []
        def half(*arguments):
            if calls:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(copy(*arguments))
            return calls[0]
        image.copy = half
        page_primer.prime(image_dir={str(images)!r})
    """)
    done = subprocess.run([python, "-c", code])
    assert done.returncode == -signal.SIGKILL
    (draft,) = images.glob("*/.new-*")
    with Process(python) as process:
        assert interpreter(process.prime(image_dir=str(images)))["written_bytes"] > 0
        assert huge(process)
        assert draft.exists()  # in a folder in use; it goes when the folder is pruned
        process.restore()
        process.run(f"from page_primer.images.store import Store; s = Store({str(images)!r})")
        process.run(f"s.remove({draft.parent.name!r})")
        assert not draft.parent.exists()


@pytest.mark.images
def test_a_writer_killed_at_once_leaves_nothing_unseen(python, images):
    """Between making an image's folder and naming its origin, by which the folder is found."""
    code = textwrap.dedent(f"""
        import os, signal, page_primer, page_primer.images.store as store
        store._name_origin = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        page_primer.prime(image_dir={str(images)!r})
    """)
    assert subprocess.run([python, "-c", code]).returncode == -signal.SIGKILL
    (folder,) = (path for path in images.iterdir() if path.is_dir())
    assert not list(folder.iterdir())
    with Process(python) as process:
        process.run(f"from page_primer.images.store import Store; s = Store({str(images)!r})")
        process.run("s.prune()")
        assert not folder.exists()
        folder.mkdir()
        core = interpreter(process.prime(image_dir=str(images)))
        assert os.readlink(Path(core["where"]).parent / "origin") == core["path"]


@pytest.mark.images
def test_pruning_removes_what_nobody_uses(python, images):
    """Images of a changed file go, images in use stay, and a few spare ones of each file stay."""
    require_one_address(python)
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images)))
        where = Path(core["where"])
        kept = where.parent

        # Folders as if of an earlier content of the same file, and of other layouts.
        parts = kept.name.split("-")
        stale = images / "-".join([*parts[:3], "1", *parts[4:]])
        used = images / "-".join([*parts[:3], "2", *parts[4:]])
        spare = [images / "-".join([*parts[:7], "0", f"{n:x}000x"]) for n in range(1, 9)]
        phases = [images / "-".join([*parts[:7], f"{n:x}000", parts[8]]) for n in range(1, 3)]
        for number, folder in enumerate((stale, used, *spare, *phases)):
            folder.mkdir()
            os.symlink(core["path"], folder / "origin")
            shutil.copy(where, folder / where.name)
            os.utime(folder / where.name, (number + 1, number + 1))
            os.utime(folder, (number + 1, number + 1))
        (stale / ".new-1-0").write_text("half")
        foreign = images / "something-else"
        foreign.mkdir()
        (foreign / "upstream.tar").write_text("precious")
        (foreign / "origin").symlink_to("upstream.tar")
        with open(used / ".users", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            process.run(f"from page_primer.images.store import Store; s = Store({str(images)!r})")
            process.run("s.prune()")
            assert not stale.exists()
            assert used.exists()
            assert kept.exists()
            assert sum(folder.exists() for folder in spare) == 3  # with `kept` four of this file
            assert spare[-1].exists()
            assert not any(folder.exists() for folder in phases)  # none will be asked for again
            assert (foreign / "upstream.tar").exists()
        process.run("s.prune()")
        assert not used.exists()
        assert huge(process)


@pytest.mark.images
def test_a_forked_child_holds_the_image_too(python, images):
    """The parent restores and ends; its child runs on with the image, which must stay."""
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images)))
        child = process.run(
            "import os, signal\n"
            "child = os.fork()\n"
            "if child == 0: signal.pause(); os._exit(0)\n"
            "result = child"
        )
        try:
            process.restore()
            folder = Path(core["where"]).parent
            process.run(f"from page_primer.images.store import Store; s = Store({str(images)!r})")
            process.run(f"s.remove({folder.name!r})")
            assert folder.exists()
        finally:
            process.run(f"os.kill({child}, 9); os.waitpid({child}, 0)")
        process.run(f"s.remove({folder.name!r})")
        assert not folder.exists()


def places(process):
    return process.run(
        "from page_primer.images import places\n"
        "result = [(p.path, p.in_memory, p.limit) for p in places.candidates(1 << 28)]"
    )


@pytest.mark.images
def test_default_directories(python, tmp_path):
    """Disks before memory, of which most is left to the application."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_RUNTIME_DIR": "/dev/shm/none"}
    with Process(python, env=env) as process:
        found = places(process)
    paths = [path for path, _, _ in found]
    assert f"{tmp_path}/cache/page-primer" in paths
    system = "/var/cache/page-primer"
    assert (paths[0] == system) == (IS_ROOT or os.path.isdir(system))
    assert [in_memory for _, in_memory, _ in found] == sorted(bool(m) for _, m, _ in found)
    if filesystem("/dev/shm") == "tmpfs":
        size = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
        for path, in_memory, limit in found:
            if path.startswith("/dev/shm/"):
                assert (in_memory, limit) == (True, min(1 << 28, size // 8))
        assert paths[-1] == f"/dev/shm/page-primer-{os.geteuid()}"


def test_what_others_do_to_the_system_is_not_ours_to_repair(python, tmp_path):
    """Neither /var/cache nor somebody else's ~/.cache is created; what we create has our modes."""
    if not IS_ROOT:
        pytest.skip("only root can give a directory away")
    home = tmp_path / "alice"
    home.mkdir()
    os.chown(home, 65534, 65534)
    with Process(python) as process:
        cache = f"{home}/.cache/page-primer"
        core = interpreter(process.prime(image_dir=cache, backing="image"))
        assert core["backing"] is None
        assert not list(home.iterdir())
    with Process(python, env={"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}) as process:
        directory = tmp_path / ".cache" / "page-primer"
        core = interpreter(process.run(
            "import os; os.umask(0o077); import page_primer\n"
            f"result = page_primer.prime(image_dir={str(directory)!r}).as_dict()"
        ))  # fmt: skip
        where = Path(core["where"])
        assert [p.stat().st_mode & 0o777 for p in (where.parent, directory)] == [0o755, 0o755]
        deep = tmp_path / "none" / "such" / "images"
        core = interpreter(process.run(
            "page_primer.restore()\n"
            f"result = page_primer.prime(image_dir={str(deep)!r}).as_dict()"
        ))  # fmt: skip
        assert not (tmp_path / "none").exists()
        assert core["backing"] != "image"


@pytest.mark.images
def test_other_users_cannot_lock_what_we_lock(python, images):
    """Everybody can open an image; whoever can open a file can lock it."""
    require_one_address(python)
    with Process(python) as process:
        where = Path(interpreter(process.prime(image_dir=str(images)))["where"])
    locks = [open(path, "rb") for path in (where, where.parent / "origin")]
    folder = os.open(where.parent, os.O_RDONLY)
    try:
        for number in (*(lock.fileno() for lock in locks), folder):
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with Process(python) as process:
            core = interpreter(process.prime(image_dir=str(images)))
            assert (core["backing"], core["written_bytes"]) == ("image", 0)
    finally:
        os.close(folder)
        for lock in locks:
            lock.close()


@pytest.mark.images
def test_a_read_only_store_can_be_used(python, images, tmp_path):
    """Images that are baked into a container."""
    require_one_address(python)
    with Process(python) as process:
        where = interpreter(process.prime(image_dir=str(images)))["where"]
    script = f'mount --bind {images} {images} && mount -o remount,ro,bind {images} && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    with Process(python, wrapper=wrapper) as process:
        core = interpreter(process.prime(image_dir=str(images)))
        assert (core["backing"], core["where"], core["written_bytes"]) == ("image", where, 0)
