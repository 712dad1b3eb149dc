"""`page-primer warm`: aligned files come onto huge pages, as plain processes that map them later
show in smaps, and whatever the files are, the command is executed."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import outside
from harness.interpreters import KINDS
from harness.kernel import release
from harness.marks import needs_root
from harness.service import public_python

from page_primer.align import files as align
from page_primer.align import memory
from page_primer.launcher import warm

__all__ = ["public_python"]

C_SOURCES = sorted(Path(warm.__file__).parent.glob("*.c"))
SMALL = 32 << 10
WANTED = 2 * outside.PMD  # whole huge pages in the library's code
NOBODY = 65534

# A library of 4.8 MiB of code, linked to be aligned, that a plain Python loads and touches.
LIBRARY = """
    .text
    .globl code_start
code_start:
    ret
    .fill 5000000, 1, 0x90
    .data
    .long 1
    .section .note.GNU-stack,"",%progbits
"""
PLAIN = """
import ctypes, os, sys
library = ctypes.CDLL(sys.argv[1])
start = ctypes.cast(library.code_start, ctypes.c_void_p).value
for at in range(0, 5000000, 4096):
    ctypes.string_at(start + at, 1)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def program() -> str:
    path = memory.program()
    assert path, "page-primer-warm is not installed"
    return path


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Where other users may read, too, which is not so in pytest's own directories."""
    path = Path(tempfile.mkdtemp(prefix="page-primer-warm-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def linked(directory: Path) -> Path:
    """The library, as the linker wrote it."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, to link an aligned library with")
    (directory / "library.S").write_text(LIBRARY)
    subprocess.run(
        ["gcc", "-shared", "-nostdlib", f"-Wl,-z,max-page-size={outside.PMD}",
         "-Wl,-z,noseparate-code", "-o", "linked.so", "library.S"],
        cwd=directory, check=True,
    )  # fmt: skip
    return directory / "linked.so"


def write_small(content: bytes, path: Path) -> Path:
    """Write a file as the unpacking of an image does."""
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(content), SMALL):
            file.write(content[at : at + SMALL])
        os.fsync(file.fileno())
    path.chmod(0o644)
    return path


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.fixture(scope="module")
def capable(directory: Path) -> None:
    """Skip where a file that is first read by an advised mapping gets no huge page."""
    path = directory / "trial"
    path.write_bytes(bytes(outside.PMD))
    child = (
        "import mmap, os, re, sys\n"
        "file, size = open(sys.argv[1], 'rb'), int(sys.argv[2])\n"
        "os.fsync(file.fileno()); os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "m = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)\n"
        "m.madvise(mmap.MADV_HUGEPAGE)\n"
        "for at in range(0, size, 4096): m[at]\n"
        "found = re.findall(r'FilePmdMapped: *(\\d+) kB', open('/proc/self/smaps').read())\n"
        "sys.exit(str(size >> 10) not in found)"
    )
    done = subprocess.run([sys.executable, "-c", child, str(path), str(outside.PMD)], check=False)
    path.unlink()
    if done.returncode:
        pytest.skip(
            f"files in {directory} get no huge pages: ext4 has them since Linux 6.16, xfs since 6.1"
        )


@pytest.fixture
def small(linked: Path, tmp_path: Path, directory: Path, capable: None) -> Iterator[Path]:
    """The library in small pages in the cache, mapped by nobody."""
    path = directory / f"{tmp_path.name}.so"
    yield write_small(linked.read_bytes(), path)
    path.unlink(missing_ok=True)


@contextmanager
def plain(path: Path) -> Iterator[int]:
    """A Python without page-primer that has loaded the library and touched its code; its pid."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PLAIN, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        assert int(process.stdout.readline()) == process.pid
        yield process.pid
        process.stdin.close()


def code_of(pid: int, path: Path) -> outside.Vma:
    return next(
        v for v in outside.smaps(pid)
        if v.path.removesuffix(" (deleted)") == str(path) and v.perms == "r-xp"
    )  # fmt: skip


def huge_in_new_process(path: Path) -> int:
    with plain(path) as pid:
        return code_of(pid, path).huge


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        [str(word) for word in command],
        **{"capture_output": True, "text": True, "timeout": 60, **options},
    )


def test_a_file_in_small_pages_becomes_huge_for_plain_processes(program: str, small: Path) -> None:
    assert huge_in_new_process(small) == 0
    done = run(program, small)
    assert done.stdout == f"{small}: 4096 of 4096 KiB on huge pages, read anew\n"
    assert (done.returncode, done.stderr) == (0, "")
    assert [huge_in_new_process(small) for _ in range(3)] == [WANTED] * 3


def test_an_aligned_interpreter_in_small_pages_becomes_huge(
    program: str, capable: None, directory: Path
) -> None:
    if "static" not in KINDS:
        pytest.skip("no static interpreter here")
    path = directory / "python-aligned"
    shutil.copyfile(os.path.realpath(KINDS["static"]), path)
    path.chmod(0o755)
    align.align(str(path), python=None)
    write_small(path.read_bytes(), path)
    path.chmod(0o755)
    assert huge_code_of_new_process(path) == 0
    done = run(program, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" on huge pages, read anew\n")
    wanted = int(re.findall(r" of (\d+) KiB", done.stdout)[0]) << 10
    assert wanted >= outside.PMD
    assert huge_code_of_new_process(path) == wanted


def huge_code_of_new_process(python: Path) -> int:
    """Of an interpreter that has read all of its code."""
    source = (
        "import re, sys\n"
        "for line in open('/proc/self/maps'):\n"
        "    found = re.match('([0-9a-f]+)-([0-9a-f]+) r-xp', line)\n"
        "    if found and line.rstrip().endswith(sys.argv[1]):\n"
        "        import ctypes\n"
        "        start, end = (int(part, 16) for part in found.groups())\n"
        "        for at in range(start, end, 4096): ctypes.string_at(at, 1)\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [python, "-I", "-c", source, python], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = code_of(process.pid, python).huge
        process.communicate()
        return found


def test_what_is_huge_stays_in_the_cache(program: str, small: Path) -> None:
    run(program, small)
    with small.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    done = run(program, small)
    assert done.stdout == f"{small}: 4096 of 4096 KiB on huge pages\n"
    assert len(pages) == small.stat().st_size


def test_a_file_that_is_not_in_memory_is_read_once(program: str, small: Path) -> None:
    drop(small)
    done = run(program, small)
    assert done.stdout == f"{small}: 4096 of 4096 KiB on huge pages\n"
    assert huge_in_new_process(small) == WANTED


def test_a_file_held_in_small_pages_is_named_and_the_command_runs(
    program: str, small: Path
) -> None:
    if release() >= (7, 2):
        pytest.skip("this kernel collapses the pages in place")
    with plain(small) as pid:
        done = run(program, small)
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout.endswith(": other processes map it in small pages\n")
        done = run(program, small, "--", "sh", "-c", "echo ran; exit 7")
        assert (done.returncode, done.stdout) == (7, "ran\n")
        assert done.stderr.endswith(": other processes map it in small pages\n")
        done = run(program, "-q", small, "--", "echo", "ran")
        assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")
        assert code_of(pid, small).huge == 0


def test_what_lies_in_small_pages_of_a_new_file_is_noted(small: Path) -> None:
    if release() >= (7, 2):
        pytest.skip("this kernel collapses the pages in place")
    with small.open("rb") as file:
        held = mmap.mmap(file.fileno(), outside.PMD, prot=mmap.PROT_READ, offset=outside.PMD)
        for at in range(0, outside.PMD, mmap.PAGESIZE):
            held[at]
        said = "2048 of 4096 KiB on huge pages: other processes map it in small pages"
        assert memory.missing(str(small)) == f"{said}: `page-primer warm` tries again"
        held.close()
    assert memory.missing(str(small)) is None
    assert huge_in_new_process(small) == WANTED


def test_rewrite_gives_new_processes_another_file_of_the_same_name(small: Path) -> None:
    if release() >= (7, 2):
        pytest.skip("this kernel collapses the pages in place")
    small.chmod(0o754)
    if os.geteuid() == 0:
        os.chown(small, 1234, 4321)
    os.setxattr(small, "user.origin", b"an image")
    os.utime(small, ns=(1_000_000_001, 2_000_000_002))
    before, content = small.stat(), small.read_bytes()
    os.utime(small, ns=(1_000_000_001, 2_000_000_002))
    with plain(small) as pid:
        done = page_primer("warm", "--rewrite", small)
        huge = f"{small}: 4096 of 4096 KiB on huge pages\n"
        assert done.stdout == f"{small}: rewritten\n{huge}"
        assert done.returncode == 0
        assert huge_in_new_process(small) == WANTED
        old = code_of(pid, small)
        assert (old.inode, old.huge) == (before.st_ino, 0)
        assert old.path.endswith(" (deleted)")
    after = small.stat()
    for name in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_nlink"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.st_ino != before.st_ino
    assert os.getxattr(small, "user.origin") == b"an image"
    assert small.read_bytes() == content
    assert not [name for name in os.listdir(small.parent) if name.startswith(".page-primer")]


def test_rewrite_goes_through_links_to_the_file(small: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.so"
    link.symlink_to(small)
    with plain(small):
        assert page_primer("warm", "--rewrite", link).returncode == 0
    assert link.is_symlink()
    assert huge_in_new_process(small) == WANTED


def test_a_directorys_default_acl_does_not_open_a_rewritten_file(
    linked: Path, capable: None, directory: Path
) -> None:
    if release() >= (7, 2):
        pytest.skip("this kernel collapses the pages in place")
    home = directory / "acl"
    home.mkdir()
    path = write_small(linked.read_bytes(), home / "private.so")
    path.chmod(0o640)
    # linux/posix_acl_xattr.h: version 2, then tag, permissions, id; the group `daemon` may all.
    entries = [(1, 7, 0), (4, 7, 0), (8, 7, 1), (16, 7, 0), (32, 7, 0)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(home, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"no access control lists in {home}: {error.strerror}")
    with plain(path):
        assert page_primer("warm", "--rewrite", path).stdout.startswith(f"{path}: rewritten\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert "system.posix_acl_access" not in os.listxattr(path)


def second_name(path: Path) -> None:
    os.link(path, f"{path}.second")


def set_user_id(path: Path) -> None:
    path.chmod(0o4755)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(second_name, "several names"), (set_user_id, "setuid or setgid")],
)
def test_a_file_that_would_lose_something_is_not_rewritten(
    small: Path, change: Callable[[Path], None], reason: str
) -> None:
    if release() >= (7, 2):
        pytest.skip("this kernel collapses the pages in place")
    change(small)
    inode = small.stat().st_ino
    with plain(small):
        done = page_primer("warm", "--rewrite", small)
        before_command = page_primer("warm", "--rewrite", small, "--", "echo", "ran")
    Path(f"{small}.second").unlink(missing_ok=True)
    assert done.returncode == 1
    assert f"{small}: not rewritten: " in done.stdout
    assert reason in done.stdout
    assert (before_command.returncode, before_command.stdout) == (0, "ran\n")
    assert reason in before_command.stderr
    assert small.stat().st_ino == inode


def as_nobody(*command: str | Path) -> list[str]:
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv (Debian's util-linux)")
    user = f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"
    return ["setpriv", *user, *map(str, command)]


@pytest.fixture
def readable(program: str, directory: Path) -> str:
    """The program where other users reach it."""
    return shutil.copy(program, str(directory / "page-primer-warm"))


def test_another_user_warms(readable: str, small: Path) -> None:
    done = run(*as_nobody(readable, small))
    assert (done.returncode, done.stderr) == (0, "")
    assert huge_in_new_process(small) == WANTED


@contextmanager
def holder(
    *command: str | Path, preexec_fn: Callable[[], None] | None = None
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, preexec_fn=preexec_fn
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_holder_keeps_a_file_locked(program: str, small: Path) -> None:
    with holder(program, "--hold", small) as process:
        line = process.stdout.readline()
        assert line.startswith(f"{small}: 4096 of 4096 KiB on huge pages, ")
        drop(small)
        assert huge_in_new_process(small) == WANTED
        code = code_of(process.pid, small)
        assert "lo" in code.flags
        assert (code.huge, code.kb["Locked"] << 10) == (WANTED, WANTED)
        others = sum(v.kb["Pss"] << 10 for v in outside.smaps(process.pid)) - code.kb["Pss"] * 1024
        assert others < 1 << 20
        assert process.poll() is None
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM


def test_what_a_limit_does_not_let_be_held_is_named(readable: str, small: Path) -> None:
    limited = as_nobody("prlimit", f"--memlock={64 << 10}", readable, "--hold", small)
    done = run(*limited)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"{small}: 4096 of 4096 KiB on huge pages")
    assert done.stdout.endswith(": not held (RLIMIT_MEMLOCK)\n")


def test_what_can_be_held_is_though_not_all_can(readable: str, linked: Path, small: Path) -> None:
    limited = as_nobody("prlimit", f"--memlock={5 << 20}", readable, "--hold")
    with holder(*limited, "/nonexistent", small, linked) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        held = ["not warmed" in line or "not held" in line for line in lines]
        assert held == [True, False, True], lines
        assert "lo" in code_of(process.pid, small).flags
        assert process.poll() is None


def test_a_holder_ends_on_sigterm_whatever_its_caller_does(program: str, small: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    with holder(program, "--hold", small, preexec_fn=ignore) as process:
        assert process.stdout.readline()
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM


@pytest.mark.root("make a namespace of processes")
def test_a_containers_first_process_ends_on_sigterm(program: str, small: Path) -> None:
    first = ["unshare", "--pid", "--fork", "--kill-child", program, "--hold", str(small)]
    with holder(*first) as process:
        assert process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        assert process.wait(60) == signal.SIGTERM


# --- The command in its place.

# Not SigQ, which counts what is queued for all processes of the user.
STATE = (
    "import os, signal; print(sorted(os.environb.items()), os.getpid(), os.getcwd(),"
    " os.listdir('/proc/self/fd'),"
    " [l for l in open('/proc/self/status') if l[:3] in ('Sig', 'Shd') and l[3] != 'Q'])"
)


def test_the_command_has_the_callers_environment_signals_and_descriptors(
    program: str, linked: Path
) -> None:
    def odd() -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        os.close(0)

    command = [sys.executable, "-I", "-c", STATE]
    options = {"preexec_fn": odd, "env": {"A": "1", "LC_ALL": "C.UTF-8", "PATH": os.defpath}}
    through = [program, str(linked), "--", *command]
    # The pid is what differs.
    plainly, warmed = (
        re.sub(r" \d+ ", " ", run(*words, **options).stdout) for words in (command, through)
    )
    assert plainly == warmed
    assert "LC_ALL" in plainly


def test_the_command_replaces_the_program(program: str, linked: Path) -> None:
    with subprocess.Popen(
        [program, "-q", str(linked), "--", "sh", "-c", "echo $$"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.read()) == process.pid


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM),
        (["/nonexistent"], 127),
        (["page-primer-no-such-command"], 127),
        ([""], 127),
        (["/"], 126),
    ],
)
def test_exit_statuses_are_the_commands(
    program: str, linked: Path, command: Sequence[str], status: int
) -> None:
    assert run(program, "-q", linked, "--", *command).returncode == status


def test_success_is_silent_before_a_command(program: str, small: Path) -> None:
    done = run(program, small, "--", "echo", "ran")
    assert (done.stdout, done.stderr) == ("ran\n", "")


def test_stderr_that_cannot_be_written_does_not_stop_the_command(
    program: str, linked: Path, tmp_path: Path
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    proof = tmp_path / "ran"
    command = [program, str(linked), "/nonexistent", "--", "touch", str(proof)]
    subprocess.run(command, stderr=write_end, check=True, timeout=60)
    proof.unlink()
    with open("/dev/full", "w") as full:
        subprocess.run(command, stderr=full, check=True, timeout=60)
    proof.unlink()
    with open(tmp_path / "log", "w") as log:
        limited = ["prlimit", "--fsize=0", *command]
        subprocess.run(limited, stderr=log, check=True, timeout=60)
    proof.unlink()
    closed = 'exec 2>&- >&- <&-; exec "$@"'
    subprocess.run(["sh", "-c", closed, "sh", *command], check=True, timeout=60)
    assert proof.exists()


# --- Lists.


def test_lists_name_the_files(program: str, small: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "aligned"
    recorded.write_text(f"{small}\n")
    expected = f"{small}: 4096 of 4096 KiB on huge pages"
    environment = {**os.environ, "PAGE_PRIMER_ALIGNED": str(recorded)}
    assert run(program, env=environment).stdout.startswith(expected)
    # Named ones are what is wanted, and nothing else.
    assert run(program, "/nonexistent", env=environment).stdout.count("\n") == 1


@needs_root
def test_the_list_of_a_users_state_directory_is_read(
    program: str, small: Path, directory: Path, public_python: str
) -> None:
    recorded = directory / "state/page-primer/aligned"
    recorded.parent.mkdir(parents=True)
    recorded.write_text(f"{small}\n\0/garbage\n/{'long' * 9999}\n")
    environment = {"XDG_STATE_HOME": str(directory / "state"), "PATH": os.environ["PATH"]}
    beside = shutil.copy(program, Path(public_python).with_name("page-primer-warm"))
    page_primer = as_nobody(public_python, "-m", "page_primer")
    try:
        done = run(*page_primer, "run", "--", "echo", "ran", env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")
        assert huge_in_new_process(small) == WANTED
        expected = f"{small}: 4096 of 4096 KiB on huge pages"
        assert expected in run(*page_primer, "warm", env=environment).stdout
    finally:
        os.unlink(beside)


def test_a_list_of_garbage_is_read_to_its_end(program: str, small: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    with garbage.open("wb") as file:
        file.write(
            os.urandom(1 << 16).replace(b"\n/", b"\n_") + b"\n\0\0\n\n" + b"/" * 9000 + b"\n"
        )
        file.write(os.fsencode(small) + b"\n")
    environment = {**os.environ, "PAGE_PRIMER_ALIGNED": str(garbage)}
    done = run(program, "--", "echo", "ran", env=environment, errors="replace")
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert f"{small}: 4096 of 4096" in run(program, env=environment, errors="replace").stdout


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_list_that_cannot_be_read_is_named(program: str, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    environment = {**os.environ, "PAGE_PRIMER_ALIGNED": str(path)}
    done = run(program, "--", "echo", "ran", env=environment)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert str(path) in done.stderr
    assert run(program, env=environment).returncode == 1


@pytest.mark.parametrize("kind", ["fifo", "/dev/null", "/dev/zero"])
def test_a_list_that_is_no_file_keeps_nobody_waiting(
    program: str, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    environment = {**os.environ, "PAGE_PRIMER_ALIGNED": str(path)}
    done = run(program, "--", "echo", "ran", env=environment)
    assert (done.returncode, done.stdout) == (0, "ran\n")


@pytest.mark.parametrize(
    "words", [["--unknown"], ["--list", "f"], ["-x", "--", "true"], ["--hold", "--", "true"]]
)
def test_unknown_options_are_refused(program: str, words: Sequence[str]) -> None:
    done = run(program, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")


# --- Files of any kind, under the sanitizers.


@pytest.fixture(scope="module")
def sanitized(directory: Path) -> str:
    path = str(directory / "sanitized")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, to build page-primer-warm with sanitizers")
    subprocess.run(
        ["gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o", path,
         *map(str, C_SOURCES)],
        check=True,
    )  # fmt: skip
    return path


def program_headers(content: bytearray) -> list[int]:
    (offset,) = struct.unpack_from("=Q", content, 32)
    (count,) = struct.unpack_from("=H", content, 56)
    return [offset + 56 * index for index in range(count)]


def first_load(content: bytearray, **fields: int) -> bytes:
    offsets = {"p_flags": 4, "p_offset": 8, "p_vaddr": 16, "p_filesz": 32, "p_align": 48}
    for name, value in fields.items():
        kind = "=I" if name == "p_flags" else "=Q"
        struct.pack_into(kind, content, program_headers(content)[0] + offsets[name], value)
    return bytes(content)


def unaligned(content: bytearray, alignment: int = 4096) -> bytes:
    for at in program_headers(content):
        struct.pack_into("=Q", content, at + 48, alignment)
    return bytes(content)


def header(content: bytearray, offset: int, kind: str, value: int) -> bytes:
    struct.pack_into(kind, content, offset, value)
    return bytes(content)


MOST = (1 << 64) - 1
HOSTILE: dict[str, Callable[[bytearray], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"#!/bin/sh\n" * 999,
    "half a header": lambda c: bytes(c[:40]),
    "no program headers": lambda c: bytes(c[:64]),
    "half the code": lambda c: bytes(c[: len(c) // 3]),
    "another class": lambda c: header(c, 4, "=B", 1),
    "headers far away": lambda c: header(c, 32, "=Q", 1 << 62),
    "headers before the file": lambda c: header(c, 32, "=Q", MOST - 8),
    "65535 headers": lambda c: header(c, 56, "=H", 65535),
    "headers of another size": lambda c: header(c, 54, "=H", 1),
    "offset at the end of numbers": lambda c: first_load(c, p_offset=MOST - outside.PMD + 1),
    "size at the end of numbers": lambda c: first_load(c, p_filesz=MOST),
    "no alignment": lambda c: unaligned(c, 0),
    "alignment of a page": unaligned,
    "alignment of 2^63": lambda c: first_load(c, p_align=1 << 63, p_vaddr=0),
    "an address that does not fit": lambda c: first_load(c, p_vaddr=4096),
    "writable code": lambda c: first_load(c, p_flags=7),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_files_are_refused(
    sanitized: str, linked: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "hostile.so"
    path.write_bytes(HOSTILE[name](bytearray(linked.read_bytes())))
    done = run(sanitized, path)
    assert "Sanitizer" not in done.stderr + done.stdout
    assert done.returncode == (0 if name in ("65535 headers", "alignment of 2^63") else 1)
    done = run(sanitized, "-q", path, "--", "echo", "ran")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_a_segment_far_away_does_not_matter(sanitized: str, linked: Path, tmp_path: Path) -> None:
    for shift in (44, 62):
        content = bytearray(linked.read_bytes())
        for at in program_headers(content)[1:]:
            kind, _, _, address = struct.unpack_from("=IIQQ", content, at)
            if kind == 1:
                struct.pack_into("=Q", content, at + 16, address + (1 << shift))
        path = tmp_path / f"far-{shift}.so"
        path.write_bytes(content)
        done = run(sanitized, path)
        assert "of 4096 KiB on huge pages" in done.stdout
        assert "Sanitizer" not in done.stderr


def test_what_is_no_file_is_refused(sanitized: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "fifo", tmp_path, "/dev/null", "/dev/zero", "/dev/tty"):
        done = run(sanitized, path)
        assert done.returncode == 1
        assert done.stdout.startswith(f"{path}: not warmed: ")
    for path in (tmp_path / "none", tmp_path / "loop", Path("/" + "x" * 5000)):
        assert ": not warmed: " in run(sanitized, path).stdout


def test_a_sparse_file_larger_than_memory_is_refused(
    sanitized: str, linked: Path, tmp_path: Path
) -> None:
    path = tmp_path / "sparse.so"
    size = 1 << 42
    path.write_bytes(first_load(bytearray(linked.read_bytes()), p_filesz=size))
    os.truncate(path, size)
    done = run(sanitized, path)
    assert done.returncode == 1
    assert "larger than a quarter of the memory" in done.stdout


def test_a_file_that_is_cut_while_it_is_read_does_no_harm(
    sanitized: str, linked: Path, tmp_path: Path
) -> None:
    path = write_small(linked.read_bytes(), tmp_path / "shrinking.so")
    cutter = (
        "import os, sys\n"
        "content = open(sys.argv[2], 'rb').read()\n"
        "while True:\n"
        "    os.truncate(sys.argv[1], 4096)\n"
        "    with open(sys.argv[1], 'r+b') as file:\n"
        "        file.write(content)\n"
        "    print(flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", cutter, str(path), str(linked)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
            done = run(sanitized, path, path, path, "--", "echo", "ran")
            assert (done.returncode, done.stdout) == (0, "ran\n")
            assert "Sanitizer" not in done.stderr
        assert process.poll() is None, "nothing was cut any more"
        process.kill()


def test_huge_pages_that_a_process_may_not_have_are_named(
    program: str, linked: Path, directory: Path
) -> None:
    def disable() -> None:
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE

    done = run(program, linked, preexec_fn=disable)
    assert done.returncode == 1
    assert done.stdout.endswith(": huge pages are disabled here (PR_SET_THP_DISABLE)\n")


# --- The command in Python.


def page_primer(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return run(Path(memory.program() or "").with_name("page-primer"), *words, **options)


def test_the_python_command_names_an_interpreters_file(base: str) -> None:
    libraries = {v.path for v in maps_of(base) if re.search(r"/libpython3\.\d+\w*\.so", v.path)}
    expected = libraries or {os.path.realpath(base)}
    done = page_primer("warm", "--python", base)
    assert {line.partition(": ")[0] for line in done.stdout.splitlines()} == expected
    assert done.returncode in (0, 1)


def maps_of(python: str) -> list[outside.Vma]:
    with subprocess.Popen(
        [python, "-I", "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        vmas = outside.smaps(process.pid)
        process.communicate()
        return vmas


def test_the_python_command_finds_aligned_libraries(
    small: Path, linked: Path, tmp_path: Path
) -> None:
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    packages = next(home.glob("lib/python3.*/site-packages"))
    (packages / "wheel.libs").mkdir()
    library = packages / "wheel.libs" / "libwheel-1f.so.3"
    shutil.copy(linked, library)
    (packages / "unaligned.so").write_bytes(unaligned(bytearray(linked.read_bytes())))
    (packages / "link.so").symlink_to(library)
    found = warm.targets(str(home / "bin/python"), True)
    assert [path for path in found if path.startswith(str(home))] == [os.path.realpath(library)]


def test_the_python_command_passes_everything_on(small: Path) -> None:
    done = page_primer("warm", small, "--", "sh", "-c", "echo $1; exit 5", "sh", "--")
    assert (done.returncode, done.stdout, done.stderr) == (5, "--\n", "")
    done = page_primer("warm", small)
    assert (done.returncode, done.stdout) == (0, f"{small}: 4096 of 4096 KiB on huge pages\n")
    done = page_primer("warm", "--python", "/nonexistent")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("page-primer: /nonexistent ")
    for wrong in (["--unknown"], ["--hold", "--", "echo", "ran"]):
        done = page_primer("warm", *wrong)
        assert (done.returncode, done.stdout) == (2, "")


def test_a_command_goes_through_warm_where_a_list_is(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = tmp_path / "aligned"
    monkeypatch.setenv("PAGE_PRIMER_ALIGNED", str(recorded))
    assert warm.through_warm(["a", "b"]) == ["a", "b"]
    recorded.write_text("/nonexistent\n")
    through = warm.through_warm(["echo", "ran"])
    assert through == [program, "-q", "--", "echo", "ran"]
    done = run(*through)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_a_program_in_the_working_directory_is_not_taken(tmp_path: Path) -> None:
    trap = tmp_path / "page-primer-warm"
    trap.write_text("#!/bin/sh\necho trapped\n")
    trap.chmod(0o755)
    source = "from page_primer.align import memory; print(memory.program())"
    done = run(sys.executable, "-c", source, cwd=tmp_path)
    assert done.stdout == f"{memory.program()}\n"
