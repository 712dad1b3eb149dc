"""What doctor says is held against what the kernel and prime() do under the same conditions."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness.privileges import has_images, locks_fit
from harness.service import public

if sys.platform != "linux":
    pytest.skip("page-primer's doctor examines Linux", allow_module_level=True)

from page_primer import _lean as record
from page_primer import doctor, plan, reasons
from page_primer.align import files
from page_primer.cli import tables
from page_primer.doctor import alignment, checks, coverage, directories, facts, findings, locking
from page_primer.doctor.alignment import Alignment
from page_primer.doctor.coverage import Coverage
from page_primer.doctor.facts import Directory, Process, Settings
from page_primer.doctor.probes import Trial
from page_primer.doctor.render import Row
from page_primer.elf.file import PF_R, PF_W, PF_X
from page_primer.elf.objects import Object, Segment
from page_primer.kernel.memory import Memory
from page_primer.kernel.mounts import Mount, mount_of, parse
from page_primer.options import Options
from page_primer.survey import Survey

__all__ = ["public"]

ROOT = os.geteuid() == 0
MIB = 1 << 20
PMD = 2 * MIB

needs_root = pytest.mark.root("give a directory away")

# Every program is run with a private cache directory, and prints the last thing it says as JSON.
PRELUDE = """
import ctypes, json, os, subprocess, sys
from page_primer import doctor, prime
from page_primer.doctor import examination, facts, locking
from page_primer.options import Options

def examine(**values):
    options = Options.load(values)
    checks = doctor.examine(options)
    doctor.render(checks, doctor.interpreter(options), repr)
    return doctor.as_dict(checks)["checks"]

def check(name, **values):
    return next(c for c in examine(**values) if c["name"] == name)

def say(value):
    print(json.dumps(value))
"""


def run(program: str, tmp_path: Path, *prefix: str, **environ: str) -> Any:
    """What a program said, run in a process of its own behind `prefix`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PAGE_PRIMER", "XDG_"))}
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PRELUDE + program],
        env={**clean, "HOME": str(home), **environ},
        stdout=subprocess.PIPE,
        timeout=100,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    return json.loads(done.stdout)


def in_namespace(setup: str) -> list[str]:
    """A prefix that runs `setup` in a mount namespace of its own first, or a skip."""
    unshare = ["unshare", "--mount", *([] if ROOT else ["--map-root-user"])]
    trial = 'mount -t tmpfs tmpfs "$0"'
    tool = shutil.which("unshare")
    if not tool or subprocess.run([*unshare, "sh", "-c", trial, "/mnt"], check=False).returncode:
        pytest.skip("mount namespaces are not permitted here")
    return [*unshare, "sh", "-ec", f'{setup}\nexec "$@"', "sh"]


def limited(memlock: int) -> list[str]:
    """A prefix that lowers RLIMIT_MEMLOCK and takes away what would override it."""
    if not shutil.which("prlimit") or (ROOT and not shutil.which("setpriv")):
        pytest.skip("needs prlimit and setpriv of util-linux")
    limit = ["prlimit", f"--memlock={memlock}:{memlock}"]
    if subprocess.run([*limit, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("the hard limit is too low for this, and not to be raised here")
    drop = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"] if ROOT else []
    return [*limit, *drop]


def works(found: dict[str, Any]) -> bool:
    return bool(found["status"] == "ok")


# ----------------------------------------------------------------------------------- the real thing


def test_leaves_nothing_behind(tmp_path: Path) -> None:
    program = """
def state():
    with open("/proc/self/maps") as maps:
        # But for the interpreter's own writable memory, which comes and goes.
        lines = {line for line in maps if not (" rw-p " in line and " 00:00 " in line)}
    with open("/proc/self/status") as status:
        locked = [line for line in status if line.startswith("VmLck")]
    return sorted(lines), locked, sorted(os.listdir("/proc/self/fd"))
examine()  # loads modules
before = state()
checks = examine()
say([before == state(), state()[1], checks])
"""
    same, locked, checks = run(
        program, tmp_path, PAGE_PRIMER_IMAGE_DIR=str(tmp_path / "there" / "yet")
    )
    assert same
    assert locked[0].split()[1:] == ["0", "kB"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    named = [c for c in checks if c["name"].endswith("/there/yet")]
    assert len(named) == 1
    expected = "in a trial" if has_images() else "its own user is not to be trusted"
    assert expected in named[0]["found"]


def test_leaves_the_default_directories_as_they_were(tmp_path: Path) -> None:
    program = "say([sorted(map(str, examine()[0])), [c['name'] for c in examine()]])"
    _, names = run(program, tmp_path)
    assert (f"image directory {tmp_path}/home/.cache/page-primer" in names) == has_images()
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.images
def test_keeps_images_that_are_there(tmp_path: Path) -> None:
    """A trial next to images in use neither prunes nor replaces them."""
    store = tmp_path / "images"
    program = f"""
report = prime(image_dir={str(store)!r})
before = sorted(os.walk({str(store)!r}))
examine(image_dir={str(store)!r})
say(before == sorted(os.walk({str(store)!r})))
"""
    assert run(program, tmp_path)
    assert store.is_dir()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"merge": False},
        {"keep_profilers": False},
        {"backing": "memfd"},
        {"backing": "memfd", "keep_profilers": False},
        {"backing": "anonymous"},
        {"exclude": ["*python*"]},
    ],
    ids=str,
)
def test_predicts_what_prime_does(values: dict[str, Any], tmp_path: Path) -> None:
    given = {**values, "image_dir": str(tmp_path / "images")}
    program = f"""
layout = doctor.interpreter(Options.load({given}))
checks = examine(**{given})
report = prime(**{given})
core = report.interpreter
say([layout.as_dict(), checks, core.code_bytes, core.code_huge_bytes, core.path])
"""
    layout, checks, code, huge, path = run(program, tmp_path)
    name = values.get("backing", f"image directory {given['image_dir']}")
    trial = next(c for c in checks if c["name"] == name)
    if not works(trial):
        pytest.skip(f"not to be had here: {trial['found']}")
    predicted = layout["memory" if "backing" in values else "image"]
    assert predicted["huge_bytes"] == huge
    assert predicted["share"] == pytest.approx(huge / code)
    assert layout["code_bytes"] == code == predicted["huge_bytes"] + sum(predicted["left"].values())
    assert layout["path"] == path


def test_describes_this_interpreter(tmp_path: Path) -> None:
    program = """
import ctypes
address = ctypes.cast(ctypes.pythonapi.PyObject_GetAttr, ctypes.c_void_p).value
with open("/proc/self/maps") as maps:
    lines = [line.split() for line in maps]
say([doctor.interpreter(Options.load()).as_dict(), address, lines])
"""
    layout, address, lines = run(program, tmp_path)
    code = [s for s in layout["segments"] if s["kind"] == "code"]
    assert any(s["address"] <= address < s["address"] + s["size"] for s in code)
    ours = [line for line in lines if line[5:] == [layout["path"]]]
    start = int(ours[0][0].split("-")[0], 16)
    assert layout["phase"] == start % layout["pmd_size"]
    assert layout["span"][0] == start
    with open(layout["path"], "rb") as file:
        executable = file.read(18)[16] == 2  # ET_EXEC
    assert (layout["kind"] == "static, ET_EXEC") == executable
    assert (layout["kind"] == "shared libpython") == ("libpython" in layout["path"])
    low = -(-layout["span"][0] // layout["pmd_size"])
    assert layout["huge_pages"] == max(layout["span"][1] // layout["pmd_size"] - low, 0)


def test_knows_that_it_has_been_primed(tmp_path: Path) -> None:
    program = """
report = prime()
say([report.interpreter.code_huge_bytes, check("interpreter")])
"""
    huge, found = run(program, tmp_path)
    if not huge:
        pytest.skip("no backing works here")
    assert found["status"] == "info"
    assert "moved already" in found["found"]


def test_thp_disabled_and_the_line_that_allows_it_again(tmp_path: Path) -> None:
    program = """
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
before = examine(backing="anonymous")
huge = prime(backing="anonymous").interpreter.code_huge_bytes
fix = next(c for c in before if c["name"] == "THP of this process")["fix"]
eval(fix.rpartition("before prime(): ")[2])
say([before, huge, examine(backing="anonymous")])
"""
    before, huge, after = run(program, tmp_path)
    old, new = ({c["name"]: c for c in checks} for checks in (before, after))
    assert huge == 0
    for name in ("THP of this process", "anonymous", "backing", "interpreter"):
        assert old[name]["status"] == "problem", name
    assert "PR_SET_THP_DISABLE" in old["anonymous"]["found"]
    assert works(new["THP of this process"])
    assert "PR_SET_THP_DISABLE" not in new["anonymous"]["found"]


def test_write_execute_denied(tmp_path: Path) -> None:
    program = """
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    say(None)
else:
    say([examine(), examine(backing="anonymous")])
"""
    said = run(program, tmp_path)
    if said is None:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    auto, anonymous = ({c["name"]: c for c in checks} for checks in said)
    assert works(auto["write-execute"])
    assert "not available" in auto["anonymous"]["found"]  # and not needed
    assert auto["anonymous"]["fix"] == "MemoryDenyWriteExecute=no"
    assert anonymous["write-execute"]["status"] == "problem"
    assert anonymous["backing"]["status"] == "problem"


LOCKING = """
found = check("locking")
report = prime(remap=False)
say([found, report.lock_refused_bytes, report.interpreter.locked_bytes, report.lock_wanted_bytes])
"""


def test_memory_lock_limit(tmp_path: Path) -> None:
    # Of the interpreter alone, so that what is to be locked is below the usual hard limit.
    only = {"PAGE_PRIMER_INCLUDE": "*python3*"}
    found, refused, _, _ = run(LOCKING, tmp_path, *limited(64 << 10), **only)
    assert found["status"] == "problem"
    assert "not even the code fits" in found["found"]
    assert "RLIMIT_MEMLOCK is 0.1 MiB" in found["found"]
    assert "CAP_IPC_LOCK" not in found["found"]
    assert refused > 0
    number = int(found["fix"].partition("memlock=")[2].split()[0])
    assert f"LimitMEMLOCK={number >> 20}M" in found["fix"]
    assert f"ulimit -l {number >> 10}" in found["fix"]
    # With that limit everything is locked; and with what is wanted alone it is not.
    found, refused, locked, wanted = run(LOCKING, tmp_path, *limited(number), **only)
    assert found["status"] == "ok"
    assert refused == 0
    assert locked > 0
    found, refused, _, _ = run(LOCKING, tmp_path, *limited(wanted + (256 << 10)), **only)
    assert found["status"] != "ok"
    assert refused > 0


def test_memory_lock_limit_that_holds_the_code_alone(tmp_path: Path) -> None:
    sizes = "say(locking.lock_sizes(*examination.Examination(Options()).seen(), Options()))"
    code, everything = run(sizes, tmp_path)
    assert 0 < code < everything
    found, refused, locked, _ = run(LOCKING, tmp_path, *limited(code + MIB))
    assert found["status"] == "warning"
    assert "the code fits, everything does not" in found["found"]
    assert refused > 0
    assert locked > 0


@pytest.mark.root("have CAP_IPC_LOCK")
def test_capability_overrides_the_limit(tmp_path: Path) -> None:
    found, refused, _, _ = run(LOCKING, tmp_path, "prlimit", "--memlock=4096:4096")
    if "CAP_IPC_LOCK" not in found["found"]:
        pytest.skip("root is without CAP_IPC_LOCK here")
    assert (found["status"] == "ok") == (refused == 0)


def test_lock_sizes_are_those_that_prime_locks(tmp_path: Path) -> None:
    program = """
options = Options.load()
sizes = locking.lock_sizes(*examination.Examination(options).seen(), options)
report = prime(options)
core = report.interpreter
code = 0
start, end = core.segments[0].start, core.segments[-1].end
with open("/proc/self/maps") as maps:
    for line in maps:
        low, high = (int(n, 16) for n in line.split()[0].split("-"))
        if low < end and start < high and line.split()[1][:3] == "r-x":
            code += high - low
say([sizes, code, report.lock_wanted_bytes, core.backing])
"""
    (code, everything), really, wanted, backing = run(program, tmp_path)
    if backing is None:
        pytest.skip("no backing works here")
    # Other memory than an image takes less of the span.
    assert code == really if backing == "image" else code >= really
    # prime() loads a module or two itself, which it locks as well.
    assert everything <= wanted <= everything + 4 * MIB


# A test of a directory runs the fix it is given and looks again.
DIRECTORY = """
path = sys.argv[1] if len(sys.argv) > 1 else os.environ["DIRECTORY"]
before = check("image directory " + path, image_dir=path)
facts.read_container = lambda: ("made up", "overlay")
inside = check("image directory " + path, image_dir=path)
facts.read_container = lambda: (None, "ext4")
fix = check("image directory " + path, image_dir=path)["fix"]
if fix:
    subprocess.run(fix, shell=True, check=True)
say([inside, fix, before, check("image directory " + path, image_dir=path),
     sorted(os.listdir(os.environ["MOUNT"]))])
"""


def directory_trial(tmp_path: Path, setup: str, inside: str = "") -> list[Any]:
    if not ROOT:
        pytest.skip("in a user namespace /tmp is nobody's, who may be anybody")
    mount = tmp_path / "mount"
    mount.mkdir()
    path = f"{mount}/{inside}".rstrip("/")
    prefix = in_namespace(setup.replace("MOUNT", shlex.quote(str(mount))))
    said = run(DIRECTORY, tmp_path, *prefix, DIRECTORY=path, MOUNT=str(mount))
    assert said[2]["status"] == "problem"
    return list(said)


def test_noexec_directory(tmp_path: Path) -> None:
    inside, fix, before, after, left = directory_trial(
        tmp_path, "mount -t tmpfs -o noexec,mode=0755 tmpfs MOUNT", "images"
    )
    assert f"{tmp_path}/mount is mounted noexec" in before["found"]
    assert fix == f"mount -o remount,exec {tmp_path}/mount"
    assert inside["fix"].startswith(f"--tmpfs {tmp_path}/mount/images:exec")
    assert "unusable" not in after["found"]
    assert left == []


def test_read_only_directory(tmp_path: Path) -> None:
    inside, fix, before, after, left = directory_trial(
        tmp_path, "mount -t tmpfs -o ro,mode=0755 tmpfs MOUNT", "images"
    )
    assert f"read-only: {tmp_path}/mount is mounted ro" in before["found"]
    assert fix == f"mount -o remount,rw {tmp_path}/mount"
    assert inside["fix"].startswith("--tmpfs ")
    assert "unusable" not in after["found"]
    assert left == []


def test_full_directory(tmp_path: Path) -> None:
    _, fix, before, after, left = directory_trial(
        tmp_path, "mount -t tmpfs -o size=1m,mode=0755 tmpfs MOUNT", "images"
    )
    assert "only 1.0 MiB free" in before["found"]
    assert os.strerror(errno.ENOSPC) in before["found"]
    assert fix.startswith("mount -o remount,size=")
    assert "unusable" not in after["found"]
    assert left == []


def test_directory_with_room_for_the_trial_alone(tmp_path: Path) -> None:
    """Docker's /dev/shm has 64 MiB, and another process may have taken most of them."""
    _, fix, before, after, _ = directory_trial(
        tmp_path, "mount -t tmpfs -o size=4100k,mode=0755 tmpfs MOUNT"
    )
    if "in a trial" in before["found"]:
        pytest.skip("tmpfs has no huge pages here")
    assert "4.0 MiB free: the interpreter's image takes" in before["found"]
    assert fix.startswith("mount -o remount,size=")
    assert after["status"] == "ok"


@needs_root
def test_directory_of_another_user(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, 65534, 65534)
    _, fix, before, after, left = run(DIRECTORY, tmp_path, DIRECTORY=str(theirs), MOUNT=str(theirs))
    assert before["status"] == "problem"
    assert "belongs to user 65534, this process runs as 0" in before["found"]
    assert fix == f"chown 0 {theirs}"
    assert "in a trial" in after["found"]
    assert left == []


@pytest.mark.images
def test_directory_that_others_can_write_to(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    _, fix, before, after, _ = run(DIRECTORY, tmp_path, DIRECTORY=str(shared), MOUNT=str(shared))
    assert before["status"] == "problem"
    assert "others can write to it (mode 0777)" in before["found"]
    assert fix == f"chmod go-w {shared}"
    assert "in a trial" in after["found"]


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    found = run(
        "path = os.environ['FILE']\nsay(check('image directory ' + path, image_dir=path))",
        tmp_path,
        FILE=str(tmp_path / "file"),
    )
    assert found["status"] == "problem"
    assert os.strerror(errno.ENOTDIR) in found["found"]
    assert (tmp_path / "file").read_text() == "kept"


def test_without_proc_and_sys(tmp_path: Path) -> None:
    prefix = in_namespace("mount -t tmpfs tmpfs /proc; mount -t tmpfs tmpfs /sys")
    checks = run("say(examine())", tmp_path, *prefix)
    found = {c["name"]: c for c in checks}
    assert found["transparent huge pages"]["status"] == "problem"
    assert found["interpreter"]["status"] == "problem"
    assert "not examined" in found["interpreter"]["found"]


@pytest.mark.parametrize("limit", ["fsize=1048576", "nofile=12", "as=300000000"])
def test_resource_limits_are_outcomes(limit: str, tmp_path: Path) -> None:
    if not shutil.which("prlimit"):
        pytest.skip("needs prlimit of util-linux")
    path = tmp_path / "images"
    program = "path = os.environ['DIRECTORY']\nsay(check('image directory ' + path))"
    environ = {"DIRECTORY": str(path), "PAGE_PRIMER_IMAGE_DIR": str(path)}
    found = run(program, tmp_path, "prlimit", f"--{limit}", **environ)
    if limit.startswith("fsize") and has_images():
        assert found["status"] == "problem"
        assert os.strerror(errno.EFBIG) in found["found"]
    assert not path.exists()


def test_switches(tmp_path: Path) -> None:
    off = run("say(check('switch'))", tmp_path, PAGE_PRIMER="0")
    assert (off["status"], off["fix"]) == ("problem", "unset PAGE_PRIMER")
    checks = run("say(examine(remap=False, mlock=False))", tmp_path)
    found = {c["name"]: c for c in checks}
    assert {found[n]["status"] for n in ("switch", "interpreter", "backing", "locking")} == {"info"}
    assert not [name for name in found if name.startswith("image directory")]


def test_without_the_core() -> None:
    program = """
import sys
sys.modules["page_primer._core"] = None
from page_primer import doctor
from page_primer.options import Options
(only,) = doctor.examine(Options())
assert (only.name, only.status) == ("platform", "problem"), only
assert "_core" in only.found, only
assert doctor.interpreter(Options()) is None
assert doctor.render((only,), None, lambda *table: "").endswith("0 warnings, 1 problem")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --------------------------------------------------------------------------------- made-up facts

PLAIN = Settings(
    kernel=(6, 18), pmd=PMD, thp="madvise", thp_of_size="inherit", shmem="never",
    shmem_of_size="inherit", memfd_noexec=0, pool=0,
)  # fmt: skip
FREE = Process(thp_disabled=False, mdwe=0, soft=8 * MIB, hard=8 * MIB, capable=False, locked=0)


@pytest.mark.parametrize(
    ("version", "status", "ext4", "xfs"),
    [
        ((5, 10), "warning", False, False),
        ((6, 1), "ok", False, True),
        ((6, 12), "ok", False, True),
        ((6, 16), "ok", True, True),
        ((7, 2), "ok", True, True),
    ],
)
def test_kernel(version: tuple[int, int], status: str, ext4: bool, xfs: bool) -> None:
    found = checks.judge_kernel(version)
    assert found.status == status
    assert found.found.startswith(f"Linux {version[0]}.{version[1]}: ")
    assert ("images on ext4" in found.found) == ext4
    assert ("xfs" in found.found) == xfs


@pytest.mark.parametrize(
    ("kernel", "shmem", "of_size", "fix"),
    [
        ((6, 18), "never", "inherit", None),
        ((6, 18), "deny", "inherit", "shmem_enabled"),
        ((6, 18), "never", "never", "hugepages-2048kB/shmem_enabled"),
        ((7, 2), "never", "never", None),
        ((7, 2), "deny", "never", "shmem_enabled"),
        ((5, 10), "never", "", "shmem_enabled"),
        ((5, 10), "advise", "", None),
        ((6, 1), "never", "", None),
    ],
)
def test_shmem(kernel: tuple[int, int], shmem: str, of_size: str, fix: str | None) -> None:
    settings = replace(PLAIN, kernel=kernel, shmem=shmem, shmem_of_size=of_size)
    found = checks.judge_shmem(settings)
    assert found.status == ("warning" if fix else "ok")
    if fix is None:
        assert found.fix is None
    else:
        assert found.fix is not None
        assert found.fix.endswith(f"> /sys/kernel/mm/transparent_hugepage/{fix}")
    # What a failed trial of a memfd is put down to.
    failed = directories.judge_memory(Trial("memfd", "memfd", 2 * PMD, 0), settings, FREE)
    assert ("shmem_enabled" in failed.found) == (fix is not None)


def test_thp() -> None:
    assert checks.judge_thp(PLAIN).status == "ok"
    assert checks.judge_thp(replace(PLAIN, pmd=0)).status == "problem"
    assert checks.judge_thp(replace(PLAIN, pmd=512 * MIB)).status == "problem"
    never = replace(PLAIN, thp="never")
    assert checks.judge_thp(never).status == "ok"  # MADV_COLLAPSE does not ask
    old = checks.judge_thp(replace(never, kernel=(5, 10), thp_of_size=""))
    assert old.status == "warning"
    assert old.fix == "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    assert checks.judge_thp(replace(never, kernel=(5, 10), thp_of_size="always")).status == "ok"


def test_mount_of() -> None:
    mountinfo = (
        "22 1 0:21 / / rw,relatime - overlay overlay rw,lowerdir=/l\n"
        "23 22 0:22 / /mnt/a\\040b rw,noexec,nosuid shared:7 - tmpfs tmpfs rw,size=64k\n"
        "24 22 8:1 / /mnt/a ro,relatime master:1 - ext4 /dev/sda1 rw\n"
        "25 22 8:2 / /mnt/a rw - xfs /dev/sda2 ro\n"
        "garbage\n"
    )
    mounts = list(parse(mountinfo))
    assert [*parse(mountinfo, "xfs")] == [mounts[-1]]
    assert mount_of("/mnt/ab", mounts).point == "/"
    assert mount_of("/", mounts).filesystem == "overlay"
    blank = mount_of("/mnt/a b/c", mounts)
    assert (blank.point, blank.filesystem) == ("/mnt/a b", "tmpfs")
    assert "noexec" in blank.options
    later = mount_of("/mnt/a", mounts)  # hides the earlier one
    assert later.filesystem == "xfs"
    assert "ro" in later.options
    assert mount_of("/mnt", []) == Mount("", "")


def test_mount_of_agrees_with_the_kernel(tmp_path: Path) -> None:
    mounts = list(parse(Path("/proc/self/mountinfo").read_text()))
    for path in ("/", "/proc", "/sys/kernel", str(tmp_path.resolve())):
        mount = mount_of(path, mounts)
        assert os.stat(path).st_dev == os.stat(mount.point).st_dev, path
    assert mount_of("/proc/self", mounts).filesystem == "proc"


@pytest.mark.parametrize(
    ("files", "environment", "cgroup", "sign"),
    [
        ((), "", "0::/init.scope\n", None),
        (("/.dockerenv",), "", "", "/.dockerenv"),
        ((), "PATH=/bin\0container=podman\0A=b", "", "container=podman"),
        ((), "mycontainer=podman\0container=\0", "", None),
        ((), "", "0::/kubepods/burstable/pod1/abc\n", "cgroup of kubepods"),
    ],
)
def test_container_sign(
    files: tuple[str, ...], environment: str, cgroup: str, sign: str | None
) -> None:
    assert facts.container_sign(files, environment, cgroup) == sign


def test_container() -> None:
    assert checks.judge_container(None, "ext4").status == "ok"
    found = checks.judge_container(None, "overlay")
    assert found.status == "info"
    assert "unaligned" in found.found


def test_locking() -> None:
    code, everything = 4 * MIB, 20 * MIB
    fits = locking.judge_locking(replace(FREE, soft=None, hard=None), code, everything, None, None)
    assert fits.status == "ok"
    assert "unlimited" in fits.found

    some = locking.judge_locking(FREE, code, everything, None, "no")
    assert some.status == "warning"
    assert some.fix == (
        "LimitMEMLOCK=256M (systemd), --ulimit memlock=268435456 (Docker) or ulimit -l 262144"
    )
    easy = locking.judge_locking(replace(FREE, hard=256 * MIB), code, everything, None, "no")
    assert easy.fix == f"{some.fix}, which needs no privilege here"

    used = locking.judge_locking(replace(FREE, locked=8 * MIB), code, everything, "no", "no")
    assert used.status == "problem"
    assert used.fix == some.fix, "one number, whatever is wanted"
    huge = locking.judge_locking(FREE, code, 200 * MIB, None, "no")
    assert huge.fix is not None
    assert huge.fix.startswith("LimitMEMLOCK=512M ")
    near = locking.judge_locking(replace(FREE, soft=everything + MIB), code, everything, None, "no")
    assert near.status == "warning", "a part of the limit is the application's"

    # No limit explains it, so none is to be raised: a sandbox.
    odd = locking.judge_locking(replace(FREE, soft=None), code, everything, "no", "no")
    assert (odd.status, odd.fix) == ("problem", None)


def test_pool() -> None:
    asked = Options(backing="hugetlb")
    assert checks.judge_pool(PLAIN, Options(), 2).status == "info"
    short = checks.judge_pool(replace(PLAIN, pool=5, pool_free=1), asked, 2)
    assert (short.status, short.fix) == ("problem", "sysctl vm.nr_hugepages=6")
    assert checks.judge_pool(replace(PLAIN, pool=5, pool_free=2), asked, 2).status == "ok"
    none = checks.judge_pool(replace(PLAIN, pool=None), asked, 2)
    assert (none.status, none.fix) == ("problem", "sysctl vm.nr_hugepages=2")


def judge(filesystem: str, kernel: tuple[int, int], huge: int, **values: Any) -> doctor.Check:
    directory = Directory("/i", Mount("/", filesystem), user=1000, free=1 << 30)
    trial = Trial("image", "/i", 2 * PMD, huge)
    settings = replace(PLAIN, kernel=kernel)
    return directories.judge_directory(trial, directory, settings, needed=8 * MIB, **values)


def test_directory_that_is_not_huge() -> None:
    assert judge("ext4", (6, 18), 2 * PMD).status == "ok"
    old = judge("ext4", (6, 12), 0)
    assert old.status == "warning"
    assert "from Linux 6.16 on" in old.found
    assert judge("ext4", (6, 12), 0, named=True).status == "problem"
    assert judge("ext4", (6, 12), 0, needless=True).status == "info"
    assert old.fix == "PAGE_PRIMER_IMAGE_DIR=/a/directory/on/xfs/or/tmpfs"
    assert judge("xfs", (5, 10), 0).fix == "boot Linux 6.1 or newer"
    assert "btrfs gives none" in judge("btrfs", (6, 18), 0).found
    partly = judge("xfs", (6, 18), PMD)
    assert partly.status == "warning"
    assert "2.0 MiB of 4.0 MiB" in partly.found
    assert partly.fix == "echo 1 > /proc/sys/vm/compact_memory"


def test_directory_in_memory_that_is_too_small() -> None:
    def fix(filesystem: str, point: str, container: bool) -> str | None:
        directory = Directory("/d", Mount(point, filesystem), user=1000, free=MIB)
        return directories.judge_directory(
            Trial("image", "/d", 2 * PMD, 2 * PMD), directory, PLAIN, needed=40 * MIB,
            container=container,
        ).fix  # fmt: skip

    assert fix("ext4", "/", False) is None
    assert fix("tmpfs", "/dev/shm", True) == "--shm-size=256m"
    assert fix("tmpfs", "/dev/shm", False) == "mount -o remount,size=256m /dev/shm"


def test_directory_in_memory_that_is_not_huge() -> None:
    directory = Directory("/d", Mount("/dev/shm", "tmpfs"), user=1000, free=1 << 30)
    settings = replace(PLAIN, shmem="deny")
    trial = Trial("image", "/d", 2 * PMD, 0)
    found = directories.judge_directory(trial, directory, settings, needed=8 * MIB)
    assert "shmem_enabled forbids it" in found.found and found.fix


def test_roots_store_without_an_image() -> None:
    found = directories.judge_system("/var/cache/page-primer")
    assert found.status == "info" and found.fix and found.fix.endswith(", as root")


def test_memory_that_is_refused_or_small() -> None:
    refused = Trial("hugetlb", "hugetlb", refused="Cannot allocate memory")
    found = directories.judge_memory(refused, replace(PLAIN, pool=3), FREE)
    assert found.fix == "sysctl vm.nr_hugepages=5"
    old = replace(PLAIN, kernel=(5, 10), thp="never", thp_of_size="")
    small = directories.judge_memory(Trial("anonymous", "anonymous", 2 * PMD, 0), old, FREE)
    assert "THP is never" in small.found


@pytest.mark.parametrize("value", [1, 2])
def test_memfds_that_are_sealed(value: int) -> None:
    (found,) = checks.judge_memfd_noexec(replace(PLAIN, memfd_noexec=value))
    assert found.status == "ok" and f"vm.memfd_noexec={value}" in found.found


def test_available_memory_that_is_unknown_or_short() -> None:
    assert locking.judge_available(None, 0.5, MIB).code == "memory-unknown"
    short = locking.judge_available(Memory(MIB, 1 << 30, "/proc/meminfo"), 0.5, 8 * MIB)
    assert short.fix == "give the machine more memory, or end other processes"


def test_directory_that_may_not_be_made() -> None:
    directory = Directory("/srv/i", Mount("/", "ext4", frozenset({"rw"})), user=1000)
    trial = Trial("image", "/srv/i", refused="Permission denied", number=errno.EACCES)
    found = directories.judge_directory(trial, directory, PLAIN, needed=8 * MIB)
    assert found.fix == "install -d -m 0755 -o 1000 /srv/i"


def made_up(phase: int, *, fixed: bool = False) -> Object:
    """An object like libpython3.11: a header, 2.2 MiB of code, read-only data, and data."""
    base = 0 if fixed else 0x7F0000000000 + phase
    at = base + (0x400000 if fixed else 0)
    segments = []
    for size, flags in (
        (0xF5000, PF_R),
        (0x23C000, PF_R | PF_X),
        (0xE4000, PF_R),
        (0x9000, PF_R | PF_W),
    ):
        segments.append(Segment(at, at + size, at + size, at - base, flags, at, size - 0x123))
        at += size
    return Object("", "/lib/libpython3.11.so", base, b"", tuple(segments),
                  main=fixed, interpreter=True)  # fmt: skip


def test_anchors_need_a_directory_that_is_ours_alone(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    options = Options(image_dir=str(directory))
    assert coverage.has_directory(options) == has_images()  # it can be made
    directory.symlink_to(tmp_path / "nothing")
    assert not coverage.has_directory(options)
    directory.unlink()
    directory.mkdir()
    for mode, usable in ((0o755, True), (0o777, False)):
        directory.chmod(mode)
        assert coverage.has_directory(options) == (usable and has_images())


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_coverage_of_made_up_layouts(merge: bool, keep: bool) -> None:
    options = Options(merge=merge, keep_profilers=keep)
    seen = set()
    for phase in range(0, PMD, 0x3B000 // 0x1000 * 0x1000):
        obj = made_up(phase)
        survey = Survey((obj,), PMD, False, 1, (1, 0))
        layout = coverage.describe(survey, plan.make(survey, options))
        code = next(s for s in obj.segments if s.code)
        low, high = -(-obj.start // PMD) * PMD, obj.segments[2].end // PMD * PMD
        if not merge:
            low, high = -(-code.start // PMD) * PMD, code.end // PMD * PMD
        expected = max(min(high, code.address + code.size) - max(low, code.start), 0)
        assert layout.image.huge_bytes == expected, hex(phase)
        assert layout.phase == phase
        for share in (layout.image, layout.memory):
            assert share.huge_bytes + sum(share.left.values()) == layout.code_bytes
        heads = {obj.start // PMD, code.start // PMD} if keep else set()
        in_memory = sum(
            max(min(chunk * PMD + PMD, code.address + code.size) - max(chunk * PMD, code.start), 0)
            for chunk in range(low // PMD, high // PMD)
            if chunk not in heads
        )
        assert layout.memory.huge_bytes == in_memory, hex(phase)
        found = coverage.judge_interpreter(layout, options)
        seen.add(found.status)
        if not expected:
            assert found.status == "problem"
            assert (found.fix == "PAGE_PRIMER_MERGE=1") == (not merge)
        if merge and phase and layout.image.share < 0.9:
            assert "not 2.0 MiB aligned" in found.found
    assert "problem" in seen or merge
    assert "ok" in seen or not merge


def test_interpreter_that_cannot_be_moved() -> None:
    obj = record.replace(made_up(0, fixed=True), problem="file deleted or replaced on disk")
    survey = Survey((obj,), PMD, False, 1, (1, 0))
    layout = coverage.describe(survey, plan.make(survey, Options()))
    assert layout.kind == "static, ET_EXEC"
    found = coverage.judge_interpreter(layout, Options())
    assert (found.status, found.fix) == ("problem", "restart this process")


def test_backing() -> None:
    survey = Survey((made_up(0),), PMD, False, 1, (1, 0))
    layout = coverage.describe(survey, plan.make(survey, Options()))
    image, memfd = Trial("image", "/i", 4, 4), Trial("memfd", "memfd", 4, 4)
    failed = Trial("image", "/i", 4, 2)

    found = coverage.judge_backing([failed, image, memfd], layout, Options(), (6, 18))
    assert found.status == "ok"
    assert found.found.startswith("image in /i, with 100 %")

    found = coverage.judge_backing([failed, memfd], layout, Options(), (6, 18))
    assert found.status == "warning"
    assert "profilers lose" in found.found
    named = coverage.judge_backing([memfd], layout, Options(backing="memfd"), (6, 18))
    assert named.status == "ok"
    old = coverage.judge_backing([memfd], layout, Options(), (5, 10))
    assert old.fix == "boot Linux 6.1 or newer"

    assert coverage.judge_backing([failed], layout, Options(), (6, 18)).status == "problem"
    nothing = replace(layout, memory=Coverage(0, 0.0, {reasons.PROFILERS_HEAD: layout.code_bytes}))
    found = coverage.judge_backing([memfd], nothing, Options(), (6, 18))
    assert (found.status, found.fix) == ("problem", "PAGE_PRIMER_KEEP_PROFILERS=0")


UNALIGNED = Alignment("/lib/libpython3.11.so.1.0", files.CAN_BE, chunks=2, share=0.98, libc="glibc",
                      version=(2, 41))  # fmt: skip


def judge_file(found: Alignment, kernel: tuple[int, int] = (6, 18), share: float = 1.0) -> Any:
    return alignment.judge_alignment(found, kernel, PMD, share)


def test_alignment() -> None:
    found = judge_file(UNALIGNED)
    assert (found.status, found.fix) == ("info", "page-primer align")
    assert "it has 2 huge pages of 2.0 MiB with code" in found.found
    assert judge_file(UNALIGNED, share=0.5).status == "warning"
    small = replace(UNALIGNED, chunks=1, share=0.77)  # as much as with a copy
    assert judge_file(small, share=0.77).status == "info"
    assert "it has 1 huge page of" in judge_file(small).found
    other = judge_file(replace(UNALIGNED, path="/usr/lib/embedded.so"))
    assert other.fix == "page-primer align /usr/lib/embedded.so"
    others = replace(UNALIGNED, by="root")
    assert judge_file(others).fix == "page-primer align  # as root"
    again = judge_file(replace(others, listed=True))
    assert again.fix == "page-primer align --again  # as root"
    assert alignment.judge_alignment(UNALIGNED, (6, 18), 0, 1.0).fix is None

    replaced = judge_file(replace(UNALIGNED, listed=True))
    assert (replaced.status, replaced.fix) == ("warning", "page-primer align --again")
    assert "no longer aligned" in replaced.found

    small = judge_file(replace(UNALIGNED, state=files.ALIGNED, listed=True))
    assert (small.status, small.fix) == ("ok", "page-primer warm")
    assert "in memory on small pages" in small.found
    huge = judge_file(replace(UNALIGNED, state=files.ALIGNED, listed=True, huge=True))
    assert (huge.status, huge.fix) == ("ok", None)
    assert "its pages are huge now" in huge.found
    placed = judge_file(replace(UNALIGNED, huge=True))  # by glibc.elf.thp, or arm64 as shipped
    assert placed.status == "ok"
    assert "placed on a huge page boundary" in placed.found

    refused = judge_file(replace(UNALIGNED, state=files.REFUSED, reason="has text relocations"))
    assert (refused.status, refused.fix) == ("info", None)
    assert "cannot be aligned: has text relocations" in refused.found


def test_alignment_by_kernel_and_c_library() -> None:
    assert "in place" not in judge_file(UNALIGNED).found
    assert "huge in place, on every file system" in judge_file(UNALIGNED, (7, 2)).found
    new = replace(UNALIGNED, version=(2, 44))
    assert judge_file(new).found.endswith("GLIBC_TUNABLES=glibc.elf.thp=1")
    assert "TUNABLES" not in judge_file(UNALIGNED).found
    old = replace(UNALIGNED, version=(2, 31))
    assert "glibc 2.31 does not align libraries" in judge_file(old).found
    assert "2.31" not in judge_file(replace(old, program=True)).found
    musl = judge_file(replace(UNALIGNED, libc="musl", version=(0, 0)), share=0.0)
    assert (musl.status, musl.fix) == ("info", None)
    assert "musl's loader does not align" in musl.found
    assert alignment._libc(["/usr/bin/python3", "/lib/ld-musl-x86_64.so.1"])[0] == "musl"


@needs_root
def test_who_may_align_a_file(tmp_path: Path) -> None:
    (path := tmp_path / "libpython3.so").write_bytes(b"")
    assert alignment._by(str(path)) == alignment._by(str(tmp_path / "missing")) == ""
    os.chown(path, 4002, 4002)
    assert alignment._by(str(path)) == "its owner"
    found = judge_file(replace(UNALIGNED, by="its owner"))
    assert found.fix == "page-primer align  # as its owner"
    os.chown(path, 0, 0)
    os.setresuid(4002, 4002, 0)
    try:
        assert alignment._by("/bin/sh") == "root"
    finally:
        os.setresuid(0, 0, 0)


@needs_root
@pytest.mark.parametrize("user", [0, 4002])
def test_what_comes_before_root_aligns_a_file(public: Path, user: int) -> None:
    """No command that root refuses, whoever asks."""
    (below := public / "lib").mkdir()
    path = Path(shutil.copy2("/bin/sh", below / "libpython3.so"))

    def read() -> Alignment:
        os.setresuid(user, user, 0)
        try:
            return alignment.read(str(path), [], huge=False, program=False, merge=True)
        finally:
            os.setresuid(0, 0, 0)

    assert read().first == ""
    os.chown(public, 4002, 4002)
    first = f"`chown 0 {public}`, then `page-primer ...` as root; or `chown -R 4002:4002 {public}`"
    assert read().first.startswith(first)
    for listed in (False, True):
        found = judge_file(replace(UNALIGNED, by="root", first=first, listed=listed), share=0.5)
        assert (found.status, found.fix) == ("warning", None)
        assert found.found.endswith(f"; to align it: {first}")


def test_alignment_of_this_interpreter(tmp_path: Path) -> None:
    """Recorded as aligned, which it is not."""
    program = "say([doctor.interpreter(Options()).path, check('alignment')])"
    path, found = run(program, tmp_path, PAGE_PRIMER_ALIGNED=str(tmp_path / "none"))
    if "not aligned" not in found["found"]:
        pytest.skip(f"this interpreter is of another kind: {found['found']}")
    as_root = os.geteuid() != 0 and not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK)
    assert found["fix"] == "page-primer align" + "  # as root" * as_root
    (tmp_path / "list").write_text(f"{os.path.realpath(path)}\n")
    _, found = run(program, tmp_path, PAGE_PRIMER_ALIGNED=str(tmp_path / "list"))
    fix = "page-primer align --again" + "  # as root" * as_root
    assert (found["status"], found["fix"]) == ("warning", fix)


@pytest.fixture
def shared(tmp_path: Path) -> tuple[str, Path]:
    """An interpreter, and a copy of its libpython on the temporary directory's file system."""
    from harness.elves import copy_of_libpython, huge_files_here
    from harness.interpreters import KINDS, python_of

    if "shared" not in KINDS:
        pytest.skip("no CPython with a shared libpython here")
    if why := huge_files_here(tmp_path):
        pytest.skip(why)
    python = python_of(tmp_path, KINDS["shared"])
    (tmp_path / "lib").mkdir()
    copy = copy_of_libpython(python, tmp_path / "lib")
    assert copy is not None
    return python, copy


@pytest.mark.slow
def test_aligned_interpreter(shared: tuple[str, Path], tmp_path: Path) -> None:  # Longer: a story
    """The doctor knows an aligned file, and that there is nothing left to do; and after an upgrade
    the log and the doctor say what is to be done."""
    python, libpython = shared
    original = libpython.read_bytes()
    environ = {
        "PAGE_PRIMER_ALIGNED": str(tmp_path / "list"), "LD_LIBRARY_PATH": str(libpython.parent),
        "PAGE_PRIMER_IMAGE_DIR": str(tmp_path / "images"), "HOME": str(tmp_path),
    }  # fmt: skip
    program = (
        PRELUDE
        + """
import logging
checks = {name: check(name) for name in ("alignment", "interpreter", "backing")}
in_place = {name: check(name, backing="in_place") for name in ("interpreter", "backing")}
lines = []
class Logger:
    debug = info = lambda *_: None
    def warning(self, text, *values): lines.append(text % values)
report = prime()
report.log(Logger())
report.log(Logger(), since=report)
say([checks, in_place, report.interpreter.backing, lines, report.interpreter.no_longer_aligned])
"""
    )

    def look() -> Any:
        done = subprocess.run([python, "-c", program], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    command = [python, "-m", "page_primer", "align", str(libpython)]
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
    checks, in_place, backing, lines, replaced = look()
    assert checks["alignment"]["status"] == "ok"
    assert "libpython" in checks["alignment"]["found"]
    assert (lines, replaced) == ([], False)
    if backing == "already":
        assert "its pages are huge now" in checks["alignment"]["found"]
        assert "% of it is on huge pages of its own file already" in checks["interpreter"]["found"]
        assert checks["backing"]["found"].startswith("already: ")
        assert {found["status"] for found in (*checks.values(), *in_place.values())} == {"ok"}
    else:
        assert checks["alignment"]["fix"] == "page-primer warm"
        assert checks["backing"]["found"].startswith("in place first")

    libpython.unlink()
    libpython.write_bytes(original)
    checks, in_place, backing, lines, replaced = look()
    assert (checks["alignment"]["status"], checks["alignment"]["fix"]) == (
        "warning", "page-primer align --again",
    )  # fmt: skip
    assert replaced
    assert lines == [
        f"page-primer: {libpython.name} is no longer aligned (replaced by an upgrade?); "
        "run `page-primer align --again`"
    ]
    again = [python, "-m", "page_primer", "align", "--again"]
    subprocess.run(again, env=environ, check=True, stdout=subprocess.DEVNULL)
    checks, _, _, lines, replaced = look()
    assert checks["alignment"]["status"] == "ok"
    assert (lines, replaced) == ([], False)


def test_in_place_alone_where_nothing_is_aligned() -> None:
    options = Options(backing="in_place")
    survey = Survey((made_up(0),), PMD, False, 1, (1, 0))
    layout = coverage.describe(survey, plan.make(survey, options))
    for found in (
        coverage.judge_interpreter(layout, options),
        coverage.judge_backing([], layout, options, (6, 18)),
    ):
        assert (found.status, found.fix) == ("problem", "page-primer align")
    copied = coverage.describe(survey, plan.make(survey, Options())).image
    fits = replace(layout, in_place=copied, aligned=True, filesystem="ext4")
    assert coverage.judge_interpreter(fits, options).status == "ok"
    old = coverage.judge_backing([], fits, options, (6, 18))
    assert (old.status, old.fix) == ("warning", "page-primer warm")
    assert coverage.judge_backing([], fits, options, (7, 2)).status == "ok"
    memory = replace(fits, filesystem="tmpfs")
    assert coverage.judge_backing([], memory, options, (6, 1)).status == "ok"


def lay_out(rows: Any) -> str:
    columns = tuple(tables.Column("", left=True, wraps=last) for last in (False, False, True))
    cells = tuple((row.status, row.name, row.found) for row in rows)
    headings = tuple(row.section for row in rows)
    return tables.fit(tables.Table(columns, cells, tuple(r.note for r in rows), headings), 60)


def test_render() -> None:
    fix = "echo " + " ".join(["something"] * 40)
    found = (
        doctor.Check("a", "problem", "2.0 MiB of many words " * 10, fix),
        doctor.Check("b", "ok", "well"),
        doctor.Check("c", "warning", "not so well"),
        doctor.Check("d", "warning", "neither"),
    )
    survey = Survey((made_up(0x1000),), PMD, False, 1, (1, 0))
    layout = coverage.describe(survey, plan.make(survey, Options()))
    text = doctor.render(found, layout, lay_out)
    lines = text.splitlines()
    start = lines[1].index("2.0 MiB")
    assert lines[0] == "Other"
    assert lines[1].startswith("  problem  a  2.0 MiB of many words 2.0 MiB")
    assert f"{' ' * start}fix: {fix}" in lines
    table = lines[: lines.index("")]
    assert all(len(line) <= 60 for line in table if "fix:" not in line)
    assert not [line for line in table if line.endswith("2.0")], "a number parted from its unit"
    assert lines[-1] == "Cannot do all that is asked of it: 1 ok, 2 warnings, 1 problem"
    assert "load address is 0x1000 modulo" in text
    assert json.loads(json.dumps(doctor.as_dict(found, layout)))["checks"][1]["found"] == "well"


def test_sections_have_every_check_once() -> None:
    names = [
        "kernel",
        "image directory /b",
        "switch",
        "locking",
        "image directory /a",
        "new",
        "memfd",
    ]
    found = [doctor.Check(name, "ok", "well") for name in names]
    shown: list[Row] = []

    def keep(rows: Any) -> str:
        shown.extend(rows)
        return ""

    doctor.render(found, None, keep)
    assert [(row.section, row.name) for row in shown] == [
        ("This machine", "kernel"), ("This process", "switch"), ("Where copies can be", "/b"),
        (None, "/a"), (None, "memfd"), ("Memory", "locking"), ("Other", "new"),
    ]  # fmt: skip


def test_exit_status_and_lines_that_mend() -> None:
    ok, info = doctor.Check("a", "ok", "well", "never"), doctor.Check("b", "info", "well", "try")
    short = doctor.Check("c", "warning", "short", "this, or that", "x", ("this  # here", "that"))
    pools = [doctor.Check("d", "problem", "no", f"sysctl vm.nr_hugepages={n}") for n in (2, 11, 9)]
    for given, status, lines in (
        ([ok, info], 0, ()),
        ([ok, short, info, short], 1, ("this  # here", "that")),
        ([short, *pools], 2, ("this  # here", "that", "sysctl vm.nr_hugepages=11")),
        ([doctor.Check("e", "problem", "no")], 2, ()),
    ):
        assert doctor.exit_status(given) == status
        assert doctor.fix_lines(given) == lines


def calls_of_check() -> Iterator[tuple[str, ast.Call]]:
    """Each place of the code that makes a Check."""
    for path in Path(doctor.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Check", "_check"):
                yield f"{path.name}:{node.lineno}", node


def test_every_finding_has_a_code_and_a_section_of_the_page() -> None:
    used = set()
    for where, call in calls_of_check():
        first = 0 if getattr(call.func, "id", "") == "_check" else 1
        named = {word.arg: word.value for word in call.keywords}
        code = call.args[first + 3] if len(call.args) > first + 3 else named.get("code")
        if ast.unparse(call.args[first]) == "OK" and code is None:
            continue
        assert code is not None, f"{where} has no code"
        used |= {n.value for n in ast.walk(code) if isinstance(n, ast.Constant)} - {None}
    page = Path(__file__).parent.parent / "docs" / "doctor.md"
    sections = re.findall(r"^### (\S+)\n\n(.{20,})", page.read_text(), re.MULTILINE)
    assert used == set(findings.CODES)
    assert sorted(code for code, _ in sections) == sorted(findings.CODES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "status"),
    [({"PAGE_PRIMER_REMAP": "0", "PAGE_PRIMER_MLOCK": "0"}, 0), ({"PAGE_PRIMER": "0"}, 2)],
)
def test_the_command(environ: dict[str, str], status: int, tmp_path: Path) -> None:
    """Its exit status; and with --fix the lines that the screen has behind "fix:", alone."""
    command = [sys.executable, "-m", "page_primer", "doctor"]
    given = {**os.environ, "COLUMNS": "4000", **environ}
    said = {
        flags: subprocess.run(
            [*command, *flags], env=given, cwd=tmp_path, capture_output=True, text=True
        )
        for flags in ((), ("--fix",), ("--json",))
    }
    text, fix = said[()].stdout, said["--fix",].stdout.splitlines()
    problems = [c for c in json.loads(said["--json",].stdout)["checks"] if c["status"] == "problem"]
    if status == 0 and " warning" in text.rpartition("\n\n")[0]:
        pytest.skip("memory is short here")
    assert {one.returncode for one in said.values()} == {status}, text
    assert [problem["code"] for problem in problems] == ["switched-off"] * (status == 2)
    if not locks_fit():  # there is advice about that, too, whose lines the screen joins
        assert ("unset PAGE_PRIMER" in fix) == (status == 2)
        return
    assert fix == ["unset PAGE_PRIMER"] * (status == 2)
    assert [ln.strip() for ln in text.splitlines() if "fix:" in ln] == [f"fix: {ln}" for ln in fix]
