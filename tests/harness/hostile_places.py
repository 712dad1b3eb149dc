"""The hostile environments, one by one (environments.py has what must hold in each)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import outside
from harness.cgroup import Cgroup
from harness.environments import MIB, NOT, OTHERWISE, PRIMED, Environment, Made, Unavailable
from harness.process import Process, interpreter

HERE = Path(__file__).parent


# There may be another mount below: in a container of its own PID namespace another /proc.
_NONE_AT = "umount -l {0}; while umount -l {0} 2>/dev/null; do :; done"


def namespace(*flags: str, set_up: str = "") -> Callable[[Made, ExitStack], Made]:
    """In namespaces of its own, after a shell has run `set_up`, in which {folder} is ours."""

    def make(made: Made, _: ExitStack) -> Made:
        script = f"set -e; {set_up.format(folder=made.folder, pid=os.getpid()) or ':'}"
        prefix = ("unshare", *flags, "sh", "-c", f'{script}; exec "$@"', "sh")
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"namespaces or mounts are not allowed here: {done.stderr.strip()}")
        return _with(made, wrapper=prefix)

    return make


def memfd_only(setting: int) -> Callable[[Made, ExitStack], Made]:
    """vm.memfd_noexec is one of a PID namespace."""
    enter = namespace("--pid", "--fork", "--mount-proc",
                      set_up=f"echo {setting} > /proc/sys/vm/memfd_noexec")  # fmt: skip

    def make(made: Made, stack: ExitStack) -> Made:
        options = {"backing": "memfd", "keep_profilers": False}
        return _with(enter(made, stack), options=options)

    return make


def store_on(options: str, more: str = "") -> Callable[[Made, ExitStack], Made]:
    """The store on a tmpfs with mount options; `more` comes after."""
    place = "{folder}/store"
    return namespace("--mount", set_up=f"mount -t tmpfs -o {options} none {place}; {more or ':'}")


def limits(*options: str) -> Callable[[Made, ExitStack], Made]:
    def make(made: Made, _: ExitStack) -> Made:
        if shutil.which("prlimit") is None:
            raise Unavailable("no prlimit (util-linux)")
        prefix = ["prlimit", *options]
        if os.geteuid() == 0:  # whom RLIMIT_MEMLOCK does not concern
            prefix += ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
        return _with(made, wrapper=tuple(prefix))

    return make


def _with(made: Made, **changes: Any) -> Made:
    options = {**made.options, **changes.pop("options", {})}
    return Made(**{**made.__dict__, **changes, "options": options})


def cgroup_of(limit: int) -> Callable[[Made, ExitStack], Made]:
    def make(made: Made, stack: ExitStack) -> Made:
        group = stack.enter_context(Cgroup(limit))
        stack.callback(lambda: _no_kills(group))
        return _with(made, wrapper=tuple(group.wrapper))

    return make


def _no_kills(group: Cgroup) -> None:
    assert group.oom_kills == 0


def small_store(made: Made, _: ExitStack) -> Made:
    """Half of what an image of the interpreter takes."""
    path = _code_file(made.python)
    _, loads, _fixed = outside.elf_file(path, os.stat(path).st_mtime_ns)
    size = max(load["p_offset"] + load["p_filesz"] for load in loads)
    return store_on(f"size={size // 2 >> 10}k")(made, _)


def _code_file(python: str) -> str:
    with Process(python) as process:
        return outside.interpreter_file(process.pid)


def images_before(harm: Callable[[Path, int], object]) -> Callable[[Made, ExitStack], Made]:
    """A store with an image that another process has written, and something done to it."""

    def make(made: Made, _: ExitStack) -> Made:
        with Process(made.python) as process:
            core = interpreter(process.prime(**made.options, mlock=False))
        if core["backing"] != "image":
            raise Unavailable("no image on this file system: " + "; ".join(core["notes"]))
        where = Path(core["where"])
        where.chmod(0o755)
        first = core["segments"][0]["start"]
        code = next(one for one in core["segments"] if one["kind"] == "code")
        harm(where, outside.PMD + first % outside.PMD + code["start"] - first)
        where.chmod(0o555)
        return made

    return make


def cut_short(where: Path, _: int) -> None:
    os.truncate(where, 4096)


def flip(where: Path, code: int) -> None:
    """One bit, in the code."""
    with open(where, "r+b") as file:
        file.seek(code + 4321)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def foreign(where: Path, _: int) -> None:
    """Another program's, of the right size."""
    size = where.stat().st_size
    where.write_bytes(Path("/bin/true").read_bytes())
    os.truncate(where, size)


def others(made: Made, _: ExitStack) -> Made:
    if os.geteuid():
        raise Unavailable("only root can give a directory away")
    store = Path(made.options["image_dir"])
    store.mkdir()
    os.chown(store, 4242, 4242)
    return made


def open_to_others(made: Made, _: ExitStack) -> Made:
    os.mkdir(made.options["image_dir"])
    os.chmod(made.options["image_dir"], 0o777)
    return made


def link(made: Made, _: ExitStack) -> Made:
    Path(made.options["image_dir"]).symlink_to("/tmp")
    return made


def own_interpreter(made: Made, _: ExitStack) -> Made:
    """A copy of the interpreter's code in the folder, to be upgraded there."""
    code = _code_file(made.python)
    copy = shutil.copy2(code, made.folder / os.path.basename(code))
    packages = [str(HERE.parents[1]), sysconfig.get_path("purelib")]
    variables = {"PYTHONHOME": f"{sys.base_prefix}:{sys.base_exec_prefix}",
                 "PYTHONPATH": ":".join(packages), "OWN": str(made.folder)}  # fmt: skip
    if "libpython" in os.path.basename(code):
        real = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
        return _with(made, python=real, variables={**variables, "LD_PRELOAD": str(copy)})
    return _with(made, python=str(copy), variables=variables)


def as_nobody(made: Made, _: ExitStack) -> Made:
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    if os.geteuid() or subprocess.run([*prefix, made.python, "-c", ""]).returncode:
        raise Unavailable("only root can become another user, who may not run this interpreter")
    return _with(made, wrapper=prefix)


def raced(made: Made, stack: ExitStack) -> Made:
    """Nine other processes that prime at the same time."""
    code = f"import page_primer; page_primer.prime(**{made.options!r}); input()"
    racers = [subprocess.Popen([made.python, "-c", code], stdin=subprocess.PIPE) for _ in range(9)]

    def end() -> None:
        for racer in racers:
            racer.communicate(b"\n", timeout=60)
        assert {racer.returncode for racer in racers} == {0}

    stack.callback(end)
    return made


def old_map_limit(made: Made, _: ExitStack) -> Made:
    if int(Path("/proc/sys/vm/max_map_count").read_text()) > 1 << 17:
        raise Unavailable("vm.max_map_count is too large to be reached here")
    return made


def with_crowd(made: Made, _: ExitStack) -> Made:
    """A small library to be loaded again and again, and the threads that do."""
    if shutil.which("gcc") is None:
        raise Unavailable("no gcc")
    small, crowd = made.folder / "small.so", made.folder / "crowd.so"
    (made.folder / "small.c").write_text("int small(void) { return 42; }")
    for target, source in ((small, made.folder / "small.c"), (crowd, HERE / "crowd.c")):
        command = ["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-pthread", "-o", str(target)]
        subprocess.run([*command, str(source)], check=True)
    return _with(made, variables={"SMALL": str(small), "CROWD": str(crowd)})


# --------------------------------------------------------------------- statements in the process --


def prctl(*arguments: int) -> str:
    """EINVAL is of kernels that do not have it yet."""
    numbers = ", ".join(map(str, [*arguments, 0, 0, 0][:4]))
    return f"""
import errno
if ctypes.CDLL(None, use_errno=True).prctl({numbers}, 0):
    assert ctypes.get_errno() == errno.EINVAL, os.strerror(ctypes.get_errno())
    unavailable = "this kernel has no such prctl()"
"""


LIMIT = """
import resource
def limit(which, value):
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
"""
ADDRESS_SPACE = (
    LIMIT
    + """
size = next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmSize"))
limit(resource.RLIMIT_AS, size + {room})
"""
)
DESCRIPTORS = (
    LIMIT
    + """
fds = "/proc/self/fd/"  # of these, the one that lists them is closed by then
highest = max(int(fd) for fd in os.listdir(fds) if os.path.lexists(fds + fd))
limit(resource.RLIMIT_NOFILE, highest + 1 + {left})
"""
)
# Every second page is made inaccessible, which makes a mapping of each.
MAPPINGS = """
import mmap
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
most, page = int(open("/proc/sys/vm/max_map_count").read()), mmap.PAGESIZE
at = libc.mmap(None, page * (most + 8), 1, 0x4022, -1, 0)  # private, anonymous, no reserve
have = sum(1 for _ in open("/proc/self/maps"))
for n in range(1, most - have - {left}, 2):
    if libc.mprotect(at + n * page, page, 0):
        break
"""
UPGRADE = """
def upgrade():
    folder = {folder}
    path = next(l.split()[-1] for l in open("/proc/self/maps") if l.split()[-1].startswith(folder))
    with open(path, "rb") as old, open(path + ".dpkg-new", "wb") as new:
        new.write(old.read())
    os.chmod(path + ".dpkg-new", 0o755)
    os.rename(path + ".dpkg-new", path)
"""
STORM = """
import signal
caught = 0
def handler(*_):
    global caught
    caught += 1
signal.signal(signal.SIGALRM, handler)
"""
IN_STORM = """
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
for _ in range(5):
    page_primer.restore()
    report = page_primer.prime(**options)
signal.setitimer(signal.ITIMER_REAL, 0)
assert caught > 5
"""
FORKS = """
import threading, time
def children():
    ended = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            ok = page_primer.prime(**options).reason is None and json.loads("[1]") == [1]
            os._exit(0 if ok else 1)
        ended.append(os.waitpid(child, 0)[1])
    return ended
"""
DURING_FORKS = """
stop = False
def again():
    while not stop:
        page_primer.prime(**options)
        page_primer.restore()
thread = threading.Thread(target=again)
thread.start()
ended = children()
stop = True
thread.join()
assert ended == [0] * 8, ended
report = page_primer.prime(**options)
"""
THREADS = """
import sys, threading
small = ctypes.c_char_p(os.environ["SMALL"].encode())
crowd_library = ctypes.CDLL(os.environ["CROWD"])
def crowd(rounds):
    stop, wrong = threading.Event(), []
    def work():
        # With pauses: if they never let go of Python's lock, prime() waits for all of them after
        # each of its system calls, and hardly comes to anything that could disturb them. What runs
        # all the time, without that lock, is the 60 others.
        while not stop.wait(0.002):
            try:
                assert sorted(range(50), key=lambda x: -x)[0] == 49
                assert json.loads("[1, 2]") == [1, 2]
            except BaseException as error:
                wrong.append(repr(error))
    threads = [threading.Thread(target=work) for _ in range(4)]
    sys.setswitchinterval(0.0001)  # or each system call waits for all of them
    for thread in threads:
        thread.start()
    assert crowd_library.crowd_start(60, small) == 60
    for _ in range(rounds):
        page_primer.prime(**options)
        page_primer.restore()
    stop.set()
    for thread in threads:
        thread.join()
    assert crowd_library.crowd_stop() > 60, "a thread saw something wrong"
    assert wrong == [], wrong
"""
IN_CROWD = "crowd({rounds})\nreport = page_primer.prime(**options)"

TABLE = (
    Environment("an ordinary process", "nothing is done to it"),
    # By hostile_guests.py: what an image gives there depends on the guest's file system. Addresses
    # are random on it, and so is what there would be beside what profilers need.
    Environment("in a guest", "another kernel", (PRIMED, OTHERWISE), hours=True,
                make=lambda made, _: _with(made, options={"keep_profilers": False})),
    Environment("in a guest without huge pages", "another kernel", (NOT,),
                "no huge pages on this kernel", hours=True),
    # The kernel.
    Environment(
        "no transparent huge pages", "/sys/kernel/mm/transparent_hugepage hidden by a mount",
        (NOT,), "no huge pages on this kernel",
        namespace("--mount", set_up="mount -t tmpfs none /sys/kernel/mm/transparent_hugepage"),
    ),
    Environment(
        "PR_SET_THP_DISABLE", "prctl(2) in the process", (NOT,), "PR_SET_THP_DISABLE",
        before=prctl(41, 1),
    ),
    Environment(
        "PR_SET_THP_DISABLE, except advised", "prctl(2) in the process (Linux 6.18)",
        before=prctl(41, 1, 2),
    ),
    Environment("memory-deny-write-execute", "PR_SET_MDWE (Linux 6.3)", before=prctl(65, 1)),
    Environment(
        "memory-deny-write-execute, anonymous memory", "PR_SET_MDWE (Linux 6.3)", (NOT,),
        "protect: Permission denied", before=prctl(65, 1) + "options['backing'] = 'anonymous'",
    ),
    *(
        Environment(
            f"vm.memfd_noexec={value}", "sysctl in a PID namespace, backing=memfd",
            make=memfd_only(value),
        )
        for value in (1, 2)
    ),
    # Limits.
    Environment(
        "RLIMIT_MEMLOCK=0", "prlimit(1), without CAP_IPC_LOCK", says=r"not locked \([^)]*\)",
        make=limits("--memlock=0:0"),
    ),
    *(
        Environment(
            f"RLIMIT_AS, {room >> 20} MiB left", "setrlimit(2) in the process",
            (PRIMED, OTHERWISE, NOT), before=ADDRESS_SPACE.format(room=room), slow=room != 8 << 20,
            undoes=True,
        )
        for room in (4 << 20, 8 << 20, 16 << 20, 32 << 20)  # less: the interpreter itself has none
    ),
    *(
        Environment(
            f"RLIMIT_FSIZE={size}", "setrlimit(2), SIGXFSZ with its default action",
            (OTHERWISE, NOT), "File too large", before=LIMIT
            + "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
            + f"limit(resource.RLIMIT_FSIZE, {size})", slow=size > 0,
        )
        for size in (0, 1 << 20)
    ),
    *(
        Environment(
            f"RLIMIT_NOFILE, {left} left", "setrlimit(2) in the process",
            (PRIMED, OTHERWISE, NOT), "cannot be read|Too many open files" if left < 3 else "",
            before=DESCRIPTORS.format(left=left), slow=left not in (0, 3),
        )
        for left in range(8)
    ),
    *(
        Environment(
            f"vm.max_map_count, {left} left", "mprotect(2) of every second page of a mapping",
            (PRIMED if left == 3000 else NOT,), "" if left == 3000 else "too many mappings",
            old_map_limit, MAPPINGS.format(left=left), slow=left != 12,
        )
        # Few of them are the interpreter's, for its next arenas.
        for left in (12, 40, 400, 3000)
    ),
    Environment(
        "a memory cgroup with no room", "a limit of 14 MiB", (NOT,),
        "too little memory|to leave memory to others",
        cgroup_of(14 * MIB),
    ),
    # The store.
    Environment(
        "store: missing, its parent too", "a path below nothing", (OTHERWISE,),
        "No such file or directory",
        lambda made, _: _with(made, options={"image_dir": f"{made.folder}/a/b/c/d"}),
    ),
    Environment(
        "store: read-only", "tmpfs mounted ro", (OTHERWISE,), "Read-only file system",
        store_on("size=64m,ro"),
    ),
    Environment(
        "store: noexec", "tmpfs mounted noexec", (OTHERWISE,), "mounted noexec",
        store_on("noexec"),
    ),
    Environment(
        "store: full", "tmpfs of 4 KiB", (OTHERWISE,), "No space left on device",
        store_on("size=4k"),
    ),
    Environment(
        "store: full half-way", "tmpfs of half an image", (OTHERWISE,), "No space left on device",
        small_store,
    ),
    Environment(
        "store: on overlayfs", "an overlay of two directories of a tmpfs", (PRIMED, OTHERWISE), "",
        store_on("size=256m", "cd {folder}/store; mkdir low up work; mount -t overlay overlay -o "
                 "lowerdir=low,upperdir=up,workdir=work {folder}/store"),
    ),
    Environment("store: another's", "chown", (OTHERWISE,), r"belongs to user \d+", others),
    Environment("store: a symbolic link", "to /tmp", (OTHERWISE,), "Not a directory", link),
    Environment(
        "store: open to others", "mode 0777", (OTHERWISE,), "others can write",
        open_to_others,
    ),
    Environment("store: of a user without rights", "uid 65534, a directory of root's",
                (OTHERWISE,), "Permission denied|its own user is not to be trusted", as_nobody),
    Environment("store: raced", "nine other processes prime at the same time", make=raced),
    Environment(
        "image: cut short", "truncate(1)", make=images_before(cut_short),
    ),
    Environment(
        "image: one bit is another", "in the code", says="wrong content, written again",
        make=images_before(flip),
    ),
    Environment(
        "image: foreign", "/bin/true under its name", says="wrong content, written again",
        make=images_before(foreign),
    ),
    # What a process sees.
    Environment(
        "/proc not mounted", "umount", (NOT,), "No such file or directory",
        namespace("--mount", set_up=_NONE_AT.format("/proc")), undoes=True,
    ),
    Environment(
        "/proc with hidden processes", "mounted hidepid=2,subset=pid", (PRIMED, OTHERWISE), "",
        namespace("--mount", set_up="mount -t proc -o hidepid=2,subset=pid proc /proc"),
    ),
    Environment(
        "/sys not mounted", "umount", (NOT,), "no huge pages on this kernel",
        namespace("--mount", set_up=_NONE_AT.format("/sys")),
    ),
    Environment(
        "user namespace, root there", "unshare --map-root-user", (PRIMED, OTHERWISE), "",
        namespace("--user", "--map-root-user"),
    ),
    Environment(
        "user namespace without a mapping", "unshare --user", (PRIMED, OTHERWISE, NOT), "",
        namespace("--user"),
    ),
    # What a host does.
    Environment(
        "interpreter upgraded before", "its file renamed over", (NOT,),
        "file deleted or replaced on disk", own_interpreter,
        "import os\n" + UPGRADE.replace("{folder}", "os.environ['OWN']") + "upgrade()",
    ),
    Environment("fork amid priming", "a thread primes without pause, eight children",
                before=FORKS, during=DURING_FORKS),
    Environment("a storm of signals", "one each 0.2 ms, with a handler", before=STORM,
                during=IN_STORM),
    Environment(
        "64 threads that execute and dlopen",
        "20 times prime() and restore(); 60 without Python's lock",
        make=with_crowd, before=THREADS, during=IN_CROWD.format(rounds=10), slow=True,
        cycles=1,
    ),
    Environment(
        "64 threads that execute and dlopen, long",
        "10,000 times prime() and restore(); 60 without Python's lock",
        make=with_crowd, before=THREADS, during=IN_CROWD.format(rounds=5000), hours=True,
        cycles=1,
    ),
    Environment(
        "warnings are errors", "PYTHONWARNDEFAULTENCODING=1, -W error -X dev -bb",
        make=lambda made, _: _with(made, variables={"PYTHONWARNDEFAULTENCODING": "1"},
                                   flags=("-W", "error", "-X", "dev", "-bb")),
    ),
)  # fmt: skip
