"""Whom an image may come from, and who may read it."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from harness import fuse, outside
from harness.gunicorn_server import Gunicorn
from harness.interpreters import KINDS, python_of
from harness.kernel import require_huge_files
from harness.marks import needs_root
from harness.placement import has_one_address, require_one_address
from harness.privileges import has_images
from harness.process import Process, interpreter
from harness.service import NOBODY, OTHER, USER, become, capable, public, public_python

from page_primer.doctor import coverage
from page_primer.images import places, trust
from page_primer.images.store import Store
from page_primer.kernel import credentials, mounts
from page_primer.options import Options

__all__ = ["public", "public_python"]

MEMORY = ("memfd", "anonymous")
SECURE = "it runs in secure-execution mode"
MAY_CHANGE = "it may change to another user or group"
CAP_NET_ADMIN = 12


def mapped(pid: int, directory: Path) -> list[str]:
    """The mappings of a process that are of images in a directory; an anchor, for tools, holds no
    code."""
    paths = [vma.path for vma in outside.smaps(pid) if vma.path.startswith(f"{directory}/")]
    return [path for path in paths if "-anchor/" not in path]


def require_memory(pid: int, core: dict) -> None:
    """The interpreter was moved, and to memory; where it can be: to its own, a huge page that
    profilers need does not go."""
    text = outside.text_of(pid, core["path"])
    assert core["backing"] in (MEMORY if text.attainable > text.head else (*MEMORY, None)), core


# --------------------------------------------------------------------------------- whose word it is


def read(*wrapper: str, python: str = sys.executable) -> list:
    with Process(python, wrapper=wrapper) as process:
        return process.run(
            "from page_primer.kernel import credentials\n"
            "c = credentials.read()\n"
            "result = [c.user, c.privilege, sorted(c.trusted)]"
        )


def test_credentials_of_this_process():
    found = credentials.read()
    assert found.user == os.geteuid()
    assert 0 in found.trusted


@needs_root
def test_credentials_of_others(public_python):
    python = public_python
    assert read(python=python) == [0, None, [0]]
    assert read(*become(USER), python=python) == [USER, None, [0, USER]]
    assert read(*become(NOBODY), python=python) == [NOBODY, None, [0]]
    assert read(*capable(USER), python=python) == [USER, "it has capabilities", [0]]


@needs_root
def test_fakeroot_is_not_believed(public_python):
    if shutil.which("fakeroot") is None:
        pytest.skip("no fakeroot here")
    with Process(public_python, wrapper=[*become(USER), "fakeroot"]) as process:
        assert process.run("import os; result = os.geteuid()") == 0
        found = process.run(
            "from page_primer.kernel import credentials\nresult = credentials.read().user"
        )
        assert found == USER


def test_a_user_without_a_name_here_trusts_roots_files_alone(python):
    wrapper = ["unshare", "--user"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not permitted here")
    user, _, trusted = read(*wrapper)
    assert trusted == [0]
    assert user == int(Path("/proc/sys/kernel/overflowuid").read_text())


@needs_root
def test_a_process_that_is_not_dumpable(public_python):
    with Process(public_python, wrapper=become(USER)) as process:
        process.run("import ctypes; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)")
        found = process.run(
            "from page_primer.kernel import credentials\n"
            "c = credentials.read(); result = [c.privilege, sorted(c.trusted)]"
        )
        assert found == ["it is not dumpable", [0]]


# How servers and daemons become a user, and what is then said of them.
DROPPED = {
    "gunicorn and uWSGI": (
        f"os.setgid({USER}); os.setgroups([{OTHER}]); os.setuid({USER})",
        "it is not dumpable",
    ),
    "for a while": (f"os.setegid({USER}); os.seteuid({USER})", "it has capabilities"),
    "for a while, without capabilities": (
        f"os.setresgid({USER}, {USER}, {USER}); os.setresuid({OTHER}, {OTHER}, {USER})\n"
        f"os.seteuid({USER})",
        MAY_CHANGE,
    ),
}


@needs_root
@pytest.mark.parametrize("how", DROPPED)
def test_a_process_that_has_become_a_user(public_python, how):
    source, privilege = DROPPED[how]
    with Process(public_python) as process:
        process.run(f"import os\n{source}")
        found = process.run(
            "from page_primer.kernel import credentials\n"
            "c = credentials.read(); result = [c.user, c.privilege, sorted(c.trusted)]"
        )
    assert found == [USER, privilege, [0]]


SAVED = f"""
import ctypes, os
os.setgroups([%s])
os.setresgid({USER}, {USER}, %s)
os.setresuid({USER}, {USER}, %s)
assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0
"""
MEMORY_OF = f"""
import ctypes, os
os.setgroups([])
os.setresgid({USER}, {USER}, {USER})
os.setresuid({USER}, {USER}, {USER})
def is_open(pid):
    try:
        open(f"/proc/{{pid}}/mem", "r+b").close()
    except PermissionError:
        return False
    return True
"""


def restricted() -> bool:
    """Whether Yama keeps a user's processes from each other's memory."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return scope.exists() and scope.read_text().strip() != "0"


@needs_root
@pytest.mark.parametrize(
    ("more", "group", "user"),
    [("", USER, USER), (OTHER, USER, USER), ("", OTHER, USER), ("", USER, OTHER)],
    ids=["none", "supplementary groups", "group", "user"],
)
def test_a_process_that_may_change_back(public_python, more, group, user):
    """It is dumpable, has no capabilities and runs in no special mode, and yet its memory is closed
    to others of its user; not for supplementary groups."""
    with Process(public_python) as process, Process(public_python) as other:
        process.run(SAVED % (more, group, user))
        other.run(MEMORY_OF)
        same = group == user == USER
        if not same or not restricted():
            assert other.run(f"result = is_open({process.pid})") == same
        found = process.run(
            "from page_primer.kernel import credentials\n"
            "c = credentials.read(); result = [c.user, c.privilege, sorted(c.trusted)]"
        )
    assert found == ([USER, None, [0, USER]] if same else [USER, MAY_CHANGE, [0]])


@needs_root
def test_a_program_that_gives_more_than_its_user_has(public, public_python):
    """Set-group-ID: secure-execution mode (AT_SECURE), without a capability."""
    program = set_group_id(public, public_python)
    with Process(program, wrapper=become(USER)) as process:
        assert told(process, public_python) == [USER, SECURE, [0]]


def set_group_id(public: Path, python: str) -> str:
    """A copy of an interpreter that gives whoever runs it another group, and the kernel says so."""
    program = public / "program"
    shutil.copy(os.path.realpath(python), program)
    os.chown(program, 0, OTHER)
    program.chmod(0o2755)
    command = [*become(USER), str(program), "-c", "import os; print(os.getegid())"]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.stdout != f"{OTHER}\n":
        pytest.skip(f"a set-group-ID program does not run here: {said.stderr[-200:]}")
    return str(program)


def told(process: Process, python: str) -> list:
    """What a process that has an interpreter's modules says of its credentials."""
    return process.run(
        f"import sys; sys.path[:] = {path_of(python)!r}\n"
        "from page_primer.kernel import credentials\n"
        "c = credentials.read()\n"
        "result = [c.user, c.privilege, sorted(c.trusted)]"
    )


def path_of(python: str) -> list[str]:
    """An interpreter's sys.path."""
    command = [python, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    return json.loads(subprocess.check_output(command, text=True))


def test_what_the_kernel_does_not_tell_is_not_trusted(monkeypatch):
    def refuse():
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(credentials._core, "credentials", refuse)
    found = credentials.read()
    assert found.trusted == {0}
    assert "Operation not permitted" in found.privilege


# ----------------------------------------------------------------------------------- the directory


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
@pytest.mark.images
def test_a_directory_above_that_others_can_write_to(tmp_path, mode):
    above = tmp_path / "above"
    store = above / "between" / "images"
    store.mkdir(parents=True)
    above.chmod(mode)
    if mode & stat.S_ISVTX:  # where nobody can rename what belongs to others
        Store(str(store)).__exit__()
        return
    with pytest.raises(trust.Unusable, match=rf"others can write to {above} above it") as refused:
        Store(str(store))
    assert refused.value.remedy == f"chmod go-w {above}"
    above.chmod(0o755)
    Store(str(store)).__exit__()


@pytest.mark.images
def test_a_store_in_a_sticky_directory_is_not_one_itself(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images").chmod(0o1777)
    with pytest.raises(trust.Unusable, match="others can write to it"):
        Store(str(tmp_path / "images"))


@needs_root
@pytest.mark.parametrize("sticky", [False, True])
def test_a_directory_above_that_is_somebody_elses(tmp_path, sticky):
    above = tmp_path / "above"
    (above / "images").mkdir(parents=True)
    os.chown(above, OTHER, OTHER)
    if sticky:
        above.chmod(0o1777)
    with pytest.raises(trust.Unusable, match=f"belongs to user {OTHER}") as refused:
        Store(str(above / "images"))
    assert refused.value.remedy == f"chown 0 {above}"
    # Nor is anything made there.
    with pytest.raises(trust.Unusable, match=f"belongs to user {OTHER}"):
        Store(str(above / "more"))
    assert not (above / "more").exists()


@pytest.mark.images
def test_the_way_to_a_store_may_be_anybodys_link(tmp_path):
    """What counts is the directory that was opened, not the name that led to it."""
    (tmp_path / "real" / "images").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    Store(str(tmp_path / "link" / "images")).__exit__()
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(trust.Unusable, match=f"others can write to {tmp_path}/real above it"):
        Store(str(tmp_path / "link" / "images"))


@pytest.mark.images
def test_an_exchanged_directory_is_not_looked_up_again(python, images, tmp_path):
    """The store is moved away between its check and what follows; what is written is in it."""
    with Process(python) as process:
        process.run(
            "import os\n"
            "from page_primer.images import store, trust\n"
            "check = trust.check_directory\n"
            "def exchange(fd, who, above=False):\n"
            "    check(fd, who, above=above)\n"
            f"    if not above and os.path.isdir({str(images)!r}):\n"
            f"        os.rename({str(images)!r}, {str(tmp_path / 'moved')!r})\n"
            "trust.check_directory = exchange"
        )
        process.prime(image_dir=str(images), backing="image")
        moved = tmp_path / "moved"
        assert list(moved.iterdir())
        assert mapped(process.pid, moved)
    # Anchors have folders of their own, which are looked up once more.
    assert not [path for path in images.glob("*") if not path.name.endswith("-anchor")]


@pytest.mark.images
def test_an_images_folder_that_others_can_write_to_is_not_used(python, images):
    require_one_address(python)
    with Process(python) as process:
        where = Path(interpreter(process.prime(image_dir=str(images)))["where"])
    where.parent.chmod(0o777)
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images)))
        require_memory(process.pid, core)
        assert not mapped(process.pid, images)


# ----------------------------------------------------------------------------- who mounted it

OTHERS = f"user_id={OTHER},group_id={OTHER},allow_other"
BY_OTHER = f"not ours alone: user {OTHER} mounted it (fuse)"


@pytest.fixture
def mountpoint(public: Path) -> Path:
    """A directory for file systems of FUSE's."""
    trial = [*fuse.mounted(public, OTHERS, 0), "true"]
    done = subprocess.run(trial, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file systems of FUSE's here: {done.stderr}")
    (path := public / "mounted").mkdir()
    return path


@needs_root
@pytest.mark.parametrize("where", ["", "/images"], ids=["itself", "a directory in it"])
def test_a_store_in_what_another_user_mounted(mountpoint, public_python, where):
    """All of it is this user's, as the file system says, and can be written by nobody else."""
    store = f"{mountpoint}{where}"
    wrapper = [*fuse.mounted(mountpoint, OTHERS, USER), *become(USER)]
    with Process(public_python, wrapper=wrapper) as process:
        status = process.run(f"import os; s = os.stat({store!r}); result = [s.st_uid, s.st_mode]")
        assert status == [USER, stat.S_IFDIR | 0o755]
        core = interpreter(process.prime(image_dir=store))
        assert core["backing"] in MEMORY
        assert any(f"user {OTHER} mounted it (fuse)" in note for note in core["notes"]), core
        assert not mapped(process.pid, mountpoint)


OPENED = """
from page_primer.images.store import Store
from page_primer.images.trust import Unusable
try:
    Store({!r})
    result = None
except Unusable as error:
    result = [str(error), error.remedy]
"""


@needs_root
@pytest.mark.parametrize(
    ("mounter", "options"),
    [(0, "allow_other"), (USER, "allow_other"), (USER, "default_permissions")],
)
def test_a_store_in_what_root_or_its_own_user_mounted(mountpoint, public_python, mounter, options):
    """As object storage and union file systems are, or a home by sshfs."""
    given = f"user_id={mounter},group_id={mounter},{options}"
    wrapper = [*fuse.mounted(mountpoint, given, USER), *become(USER)]
    with Process(public_python, wrapper=wrapper) as process:
        assert process.run(OPENED.format(f"{mountpoint}/images")) is None


@needs_root
@pytest.mark.parametrize("mounter", [0, USER, OTHER])
def test_who_mounted_a_store_by_another_namespaces_numbers(mountpoint, public_python, mounter):
    """One who is USER outside is called OTHER inside: the mount has the number from outside."""
    if subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not permitted here")
    given = f"user_id={mounter},group_id={mounter},allow_other"
    with Process(public_python, wrapper=fuse.mounted(mountpoint, given, USER)) as process:
        process.run("import ctypes, os; assert ctypes.CDLL(None).unshare(0x10000000) == 0")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text(f"0 0 1\n{OTHER} {USER} 1\n")
        process.run(
            f"os.setresgid({OTHER}, {OTHER}, {OTHER}); os.setresuid({OTHER}, {OTHER}, {OTHER})\n"
            "assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0\n"
            "from page_primer.kernel import credentials\n"
            f"assert credentials.read().trusted == {{0, {OTHER}}}\n"
            f"assert os.stat('{mountpoint}/images').st_uid == {OTHER}"
        )
        said = process.run(OPENED.format(f"{mountpoint}/images"))
    who = f"user {mounter} of this user namespace or one above it"
    why = f"not ours alone: {who} mounted it (fuse)"
    assert said == ([why, trust._ELSEWHERE] if mounter else None)


@needs_root
def test_root_uses_no_store_that_a_user_mounted(mountpoint, public_python):
    with Process(public_python, wrapper=fuse.mounted(mountpoint, OTHERS, 0)) as process:
        said = process.run(OPENED.format(f"{mountpoint}/images"))
        assert said == [BY_OTHER, trust._ELSEWHERE]


@needs_root
def test_a_store_in_what_was_unmounted_since_it_was_opened(mountpoint, public_python):
    """A detached mount is above itself, and /proc/self/mountinfo has it no more."""
    with Process(public_python, wrapper=fuse.mounted(mountpoint, OTHERS, 0)) as process:
        said = process.run(
            "import ctypes, os\n"
            "from page_primer.images import trust\n"
            "from page_primer.kernel import credentials, mounts\n"
            f"fd = os.open({str(mountpoint)!r}, os.O_RDONLY | os.O_DIRECTORY)\n"
            f"assert ctypes.CDLL(None).umount2({os.fsencode(mountpoint)!r}, 2) == 0\n"
            "assert os.path.samestat(os.stat('..', dir_fd=fd), os.fstat(fd))\n"
            "assert mounts.of(fd) is None\n"
            "result = None\n"
            "try: trust.check_directory(fd, credentials.read())\n"
            "except trust.Unusable as error: result = [str(error), error.remedy]"
        )
        why = "perhaps not ours alone: who mounted it cannot be found out"
        assert said == [why, trust._ELSEWHERE]


@pytest.mark.parametrize(
    ("line", "users"),
    [
        ("61 23 0:52 / /srv rw,relatime - virtiofs shared rw", []),
        ("61 23 0:52 / /srv rw,relatime - fuse.gcsfuse b rw,user_id=0,group_id=0,allow_other", [0]),
        ("61 23 0:52 / /srv rw - fuseblk.ntfs /dev/sdb1 rw,user_id=1000,allow_other", [1000]),
        ("61 23 0:52 / /srv/user_id=7 rw - nfs4 server:/user_id=7 rw,vers=4.2", []),
        ("61 23 0:52 / / rw - overlay overlay rw,lowerdir=/l:/user_id=7,upperdir=/u", []),
    ],
)
def test_whose_word_a_mount_is(line, users):
    assert [trust._mounted_by(mount) for mount in mounts.parse(line)] == [users]


@needs_root
def test_who_mounted_what_is_not_fuses_is_not_asked(public, public_python):
    """Whether or not /proc/self/mountinfo has it: a subvolume of btrfs, whose mount is above this
    process's root; here one that was detached."""
    script = 'mount -t tmpfs -o mode=755 none "$0" && cd "$0" && umount -l "$0" && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", script, str(public)]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    with Process(public_python, wrapper=wrapper) as process:
        found = process.run(
            "import os\n"
            "from page_primer.images import trust\n"
            "from page_primer.kernel import credentials, mounts\n"
            "fd = os.open('.', os.O_RDONLY | os.O_DIRECTORY)\n"
            "assert os.fstat(fd).st_dev != os.stat('/').st_dev and mounts.of(fd) is None\n"
            "result = trust.check_directory(fd, credentials.read())"
        )
        assert found is None


FSTATFS = {"x86_64": 138, "aarch64": 44}


@needs_root
@pytest.mark.parametrize("mounter", [0, OTHER])
def test_what_does_not_say_what_it_is_may_be_fuses(mountpoint, public_python, mounter):
    """Where a sandbox refuses fstatfs(2), or the file system's server does."""
    given = f"user_id={mounter},group_id={mounter},allow_other"
    with Process(public_python, wrapper=fuse.mounted(mountpoint, given, 0)) as process:
        process.run(
            f"import errno, os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from harness.refused import refuse\n"
            f"refuse({FSTATFS!r}[os.uname().machine], errno.EPERM)"
        )
        said = process.run(OPENED.format(f"{mountpoint}/images"))
        assert said == ([BY_OTHER, trust._ELSEWHERE] if mounter else None)


# ------------------------------------------------------------------------------------- privileged


@needs_root
def test_capabilities(public, public_python):
    """A service with a capability must not execute what its user can write: another process of that
    user, without any, would do with it what it may not do itself."""
    store = public / "images"
    store.mkdir()
    os.chown(store, USER, USER)
    with Process(public_python, wrapper=become(USER)) as writer:
        where = interpreter(writer.prime(image_dir=str(store)))["where"]
        assert where.startswith(f"{store}/")
        assert os.stat(where).st_uid == USER
        with Process(public_python, wrapper=capable(USER)) as victim:
            effective = victim.run("result = open('/proc/self/status').read()")
            assert f"CapEff:\t{1 << CAP_NET_ADMIN:016x}" in effective
            report = victim.prime(image_dir=str(store))
            core = interpreter(report)
            require_memory(victim.pid, core)
            assert any("it has capabilities" in note for note in core["notes"]), core["notes"]
            executes_nothing_of(USER, victim.pid)
        # By default as well, where nothing is root's but what root built.
        with Process(public_python, wrapper=capable(USER), env={"HOME": str(public)}) as victim:
            core = interpreter(victim.prime())
            if core["backing"] == "image":
                assert os.stat(core["where"]).st_uid == 0
            else:
                require_memory(victim.pid, core)
            executes_nothing_of(USER, victim.pid)


def executes_nothing_of(user: int, pid: int) -> None:
    """No file of a user's is mapped executable."""
    code = [vma for vma in outside.smaps(pid) if "x" in vma.perms and os.path.exists(vma.path)]
    assert code
    for vma in code:
        assert os.stat(vma.path).st_uid != user, vma


@needs_root
def test_secure_execution(public, public_python):
    """A program that gives its user another group must not execute what that user can write: not
    from a store that the environment names either. What root wrote it uses."""
    program, store = set_group_id(public, public_python), public / "images"
    store.mkdir()
    os.chown(store, USER, USER)
    # Who has the group anyway runs it as any program.
    member = ["setpriv", f"--reuid={USER}", f"--regid={OTHER}", "--clear-groups"]
    with Process(program, wrapper=member) as writer:
        assert told(writer, public_python) == [USER, None, [0, USER]]
        where = interpreter(writer.prime(image_dir=str(store)))["where"]
        assert where.startswith(f"{store}/")
        env = {"PAGE_PRIMER_IMAGE_DIR": str(store)}
        with Process(program, wrapper=become(USER), env=env) as victim:
            assert told(victim, public_python) == [USER, SECURE, [0]]
            core = interpreter(victim.prime())
            require_memory(victim.pid, core)
            assert any(SECURE in note for note in core["notes"]), core["notes"]
            executes_nothing_of(USER, victim.pid)
    roots = public / "root's"
    with Process(program) as root, Process(program, wrapper=become(USER)) as process:
        assert told(root, public_python)[0] == 0
        assert told(process, public_python) == [USER, SECURE, [0]]
        where = interpreter(root.prime(image_dir=str(roots)))["where"]
        core = interpreter(process.prime(image_dir=str(roots)))
        if has_one_address(program):
            assert (core["backing"], core["where"]) == ("image", where)


@needs_root
def test_a_root_owned_store_is_for_all(public, public_python):
    store = public / "images"
    with Process(public_python) as root:
        where = interpreter(root.prime(image_dir=str(store)))["where"]
    for wrapper in (become(USER), capable(USER), become(NOBODY)):
        with Process(public_python, wrapper=wrapper) as process:
            core = interpreter(process.prime(image_dir=str(store)))
            assert (core["backing"], core["where"], core["written_bytes"]) == ("image", where, 0)
            assert outside.text_of(process.pid).huge > 0


@needs_root
def test_nobodys_own_files_are_not_trusted(public, public_python):
    """In a namespace, everybody who has no name there is called so."""
    store = public / "images"
    store.mkdir()
    os.chown(store, NOBODY, NOBODY)
    with Process(public_python, wrapper=become(NOBODY)) as process:
        core = interpreter(process.prime(image_dir=str(store)))
        require_memory(process.pid, core)
        assert any("may be anybody" in note or "anybody's name" in note for note in core["notes"])
    assert not list(store.iterdir())


@pytest.fixture
def nobody(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    """An interpreter for that user, and a prefix that becomes it, if that is not who tests."""
    if os.geteuid() not in (0, NOBODY):
        pytest.skip(f"only root can become user {NOBODY}")
    if os.geteuid() == NOBODY:
        return sys.executable, []
    return request.getfixturevalue("public_python"), become(NOBODY)


@pytest.mark.parametrize("named", [False, True], ids=["by default", "a named directory"])
def test_nobodys_code_is_in_memory_files(public, nobody, named):
    """What needs no file is done, and the report says why no more is."""
    options = {"image_dir": str(public / "images")} if named else {}
    python, wrapper = nobody
    with Process(python, wrapper=wrapper, env={"HOME": str(public)}) as process:
        before = outside.file_mappings(process.pid)
        report = process.prime(**options)
        core = interpreter(report)
        text = outside.text_of(process.pid, core["path"])
        # Of the default directories there is the one that root may have filled.
        if text.attainable and (named or not os.path.isdir(places.SYSTEM)):
            assert text.huge in (text.attainable, text.attainable - text.head)
            assert (core["backing"] in MEMORY) == (text.huge > 0)
            why = trust.UNTRUSTED if named else f"user {NOBODY} may be anybody"
            assert any(why in note for note in core["notes"]), core["notes"]
        assert process.run("import decimal; result = str(decimal.Decimal(1) / 4)") == "0.25"
        process.restore()
        assert [m for m in before if m not in outside.file_mappings(process.pid)] == []
    assert not list(public.iterdir())


def test_a_server_of_nobodys(public, nobody):
    """It runs on, in one memory file for all its processes, and says what it does without."""
    python, wrapper = nobody
    if wrapper:
        shutil.chown(public, NOBODY, NOBODY)
    env = {"HOME": str(public), "PAGE_PRIMER_IMAGE_DIR": str(public / "images")}
    with Gunicorn(python, public, "--workers", "2", env=env, wrapper=wrapper) as server:
        server.wait_for_workers(2)
        family = [server.master, *server.workers]
        assert {os.stat(f"/proc/{pid}").st_uid for pid in family} == {NOBODY}
        texts = [outside.text_of(pid) for pid in family]
        for text in texts:
            assert text.huge in (text.attainable, text.attainable - text.head)
        assert len({vma.inode for text in texts for vma in text.moved}) <= 1
        said = [message for _, message in [*server.lines("INFO"), *server.lines("WARNING")]]
        assert any("huge pages" in message for message in said), said
        if any(text.attainable for text in texts):
            assert any(trust.UNTRUSTED in message for message in said), said
        server.wait_until_each_answered()
    assert not (public / "images").exists()


def test_nobody_has_no_directory_for_anchors(monkeypatch, tmp_path):
    """What doctor expects of a move is what prime() will do."""
    assert coverage.has_directory(Options(image_dir=str(tmp_path))) == has_images()
    monkeypatch.setattr(coverage.credentials, "read", lambda: credentials.Credentials(NOBODY))
    assert not coverage.has_directory(Options(image_dir=str(tmp_path)))


# ------------------------------------------------------------------------------- who may read it


def mode_for(original: Path, image: Path) -> int:
    with open(original, "rb") as one, open(image, "wb") as other:
        return trust.mode_for(one.fileno(), other.fileno())


@pytest.mark.parametrize(
    ("original", "image"),
    [
        (0o755, 0o555),
        (0o644, 0o544),
        (0o750, 0o550),
        (0o700, 0o500),
        (0o711, 0o511),
        (0o4755, 0o555),
    ],
)
def test_modes(public, original, image):
    (public / "original").touch()
    (public / "original").chmod(original)
    assert mode_for(public / "original", public / "image") == image


def test_a_file_in_a_directory_that_is_closed_to_others(public):
    (public / "closed" / "below").mkdir(parents=True)
    (public / "closed" / "below" / "original").touch(0o755)
    (public / "closed" / "below" / "original").chmod(0o755)
    assert mode_for(public / "closed" / "below" / "original", public / "image") == 0o555
    (public / "closed").chmod(0o750)
    assert mode_for(public / "closed" / "below" / "original", public / "image") == 0o500


# What it takes to look: a descriptor for each of two directories, and fgetxattr.
CANNOT_LOOK = {
    "one descriptor": "resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(image) + 2, 4096))",
    "no access list": "refuse({'x86_64': 193, 'aarch64': 10}[os.uname().machine], errno.EPERM)",
}


@pytest.mark.parametrize("harm", CANNOT_LOOK.values(), ids=CANNOT_LOOK)
def test_what_cannot_be_looked_at_may_keep_others_away(public, python, harm):
    (public / "original").touch()
    (public / "original").chmod(0o755)
    script = (
        "import errno, os, resource, sys\n"
        "from harness.refused import refuse\n"
        "from page_primer.images import trust\n"
        "original = os.open(sys.argv[1], os.O_RDONLY)\n"
        "image = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)\n"
        "print(oct(trust.mode_for(original, image)))\n"
        f"{harm}\n"
        "print(oct(trust.mode_for(original, image)))\n"
    )
    command = [python, "-c", script, public / "original", public / "image"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if "no seccomp filter" in done.stderr:
        pytest.skip("no seccomp filter can be put up here")
    assert done.stdout.split() == ["0o555", "0o500"], done.stderr


@needs_root
@pytest.mark.parametrize(("options", "mode"), [("", 0o500), (",allow_other", 0o555)])
def test_a_file_in_a_file_system_that_is_closed_to_others(mountpoint, public_python, options, mode):
    """An encrypted directory of FUSE's, for one: the modes in it are not what keeps others out."""
    wrapper = fuse.mounted(mountpoint, f"user_id=0,group_id=0{options}", 0)
    image = mountpoint.parent / "image"
    with Process(public_python, wrapper=wrapper) as process:
        found = process.run(
            "from page_primer.images import trust\n"
            f"one, other = open('{mountpoint}/images/library'), open({str(image)!r}, 'w')\n"
            "result = trust.mode_for(one.fileno(), other.fileno())"
        )
    assert found == mode


@needs_root
def test_the_group_is_the_originals(public):
    (public / "original").touch()
    (public / "original").chmod(0o750)
    os.chown(public / "original", -1, OTHER)
    assert mode_for(public / "original", public / "image") == 0o550
    assert (public / "image").stat().st_gid == OTHER


def test_an_access_list_is_more_than_a_mode_says(public):
    (public / "original").touch()
    (public / "original").chmod(0o755)
    # posix_acl_xattr.h: version 2, then tag, permissions and id: the owner rwx, one user none, the
    # group r-x, the mask r-x, others r-x.
    entries = [(1, 7, -1), (2, 0, USER), (4, 5, -1), (16, 5, -1), (32, 5, -1)]
    value = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little")
        + bits.to_bytes(2, "little")
        + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, bits, who in entries
    )
    try:
        os.setxattr(public / "original", "system.posix_acl_access", value)
    except OSError as error:
        pytest.skip(f"no access lists on this file system: {error}")
    assert mode_for(public / "original", public / "image") == 0o500


@needs_root
def test_an_image_of_a_private_program_is_private(public, public_python):
    """Its symbols, and strings in it, are nobody else's to read."""
    program = public / "program"
    shutil.copy(os.path.realpath(public_python), program)
    program.chmod(0o750)
    packages = ":".join(path_of(public_python))
    store = public / "images"
    with Process(str(program), env={"PYTHONPATH": packages}) as process:
        where = Path(interpreter(process.prime(image_dir=str(store)))["where"])
    if where.name != program.name:
        pytest.skip("the code of this interpreter is in a library")
    assert where.stat().st_mode & 0o777 == 0o550
    read = subprocess.run([*become(USER), "cat", where], capture_output=True)
    assert (read.returncode, read.stdout) == (1, b"")


# ---------------------------------------------------------------------------------- one bit of it


def change_bit(image: Path, at: int) -> None:
    """What a store's owner can do to a file that nobody may write to."""
    image.chmod(0o755)
    with open(image, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    image.chmod(0o555)


@pytest.mark.parametrize("name", ["interpreter", "library"])
@pytest.mark.parametrize("at", ["first", "last"])
def test_one_bit(python, images, name, at):
    """An image that differs in one bit is mapped over no code: a store that cannot be written to is
    passed over, in another the image is written again."""
    with Process(python) as process:
        process.run("import ssl")
        report = process.prime(image_dir=str(images))
        chosen = [
            obj
            for obj in report["objects"]
            if obj["backing"] == "image" and obj["interpreter"] == (name == "interpreter")
        ]
        if not chosen:
            pytest.skip("no library here has room for a huge page")
        path, where = chosen[0]["path"], Path(chosen[0]["where"])
        vmas = [v for v in outside.smaps(process.pid) if v.path == str(where)]
        offset = (
            min(v.offset for v in vmas)
            if at == "first"
            else max(v.offset + v.end - v.start for v in vmas) - outside.PAGE
        )
    if not where.exists() and chosen[0]["sharing"] == "private":
        pytest.skip("an image of a random load address goes with its last process")
    change_bit(where, offset)
    wrong = where.stat().st_ino
    with Process(python) as process:
        process.run("import ssl")
        report = process.prime(image_dir=str(images))
        obj = next(obj for obj in report["objects"] if obj["path"] == path)
        assert any("wrong content" in note for note in obj["notes"]), obj["notes"]
        assert (obj["backing"], obj["written_bytes"] > 0) == ("image", True)
        assert wrong not in {v.inode for v in outside.smaps(process.pid)}
        assert process.run("import ssl; result = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) and 1")


@pytest.mark.images
def test_one_bit_in_a_store_that_cannot_be_written_to(python, images):
    require_one_address(python)
    with Process(python) as process:
        where = Path(interpreter(process.prime(image_dir=str(images)))["where"])
    where.chmod(0o755)
    with open(where, "r+b") as file:
        file.seek(0x200000 + 0x1000)
        byte = file.read(1)[0]
        file.seek(0x200000 + 0x1000)
        file.write(bytes([byte ^ 1]))
    where.chmod(0o555)
    script = f'mount --bind {images} {images} && mount -o remount,ro,bind {images} && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    with Process(python, wrapper=wrapper) as process:
        core = interpreter(process.prime(image_dir=str(images)))
        require_memory(process.pid, core)
        assert not mapped(process.pid, images)


@needs_root
def test_one_bit_of_a_built_image(public, public_python):
    """An image that `page-primer build` wrote, for a user who cannot write there, and for one who
    can."""
    require_huge_files(public)
    store = public / "images"
    command = [public_python, "-m", "page_primer", "build", "--dir", str(store), "--json"]
    built = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["built"]
    with Process(public_python, wrapper=become(USER)) as process:
        core = interpreter(process.prime(image_dir=str(store)))
        if core["where"] not in [one["path"] for one in built]:
            pytest.skip("the interpreter does not lie where the image is for")
        where = Path(core["where"])
        at = max(v.offset for v in outside.smaps(process.pid) if v.path == str(where)) + 0x1234
    change_bit(where, at)
    wrong = where.stat().st_ino
    for wrapper in (become(USER), ()):
        with Process(public_python, wrapper=wrapper) as process:
            core = interpreter(process.prime(image_dir=str(store)))
            assert any("wrong content" in note for note in core["notes"]), core["notes"]
            # Who can write there writes it again.
            assert (core["backing"] == "image") == (not wrapper), core
            assert wrong not in {v.inode for v in outside.smaps(process.pid)}


def test_an_anchor_that_differs_in_one_bit(tmp_path, images):
    if "static" not in KINDS:
        pytest.skip("no static interpreter here")
    python = python_of(tmp_path, KINDS["static"])
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=str(images), backing="memfd"))
        anchors = sorted(images.glob("*-anchor/*"))
        anchors = [path for path in anchors if not path.is_symlink() and path.name[0] != "."]
        if core["backing"] != "memfd" or not anchors:
            pytest.skip("this interpreter needs no anchors")
    before = {}
    for path in anchors:
        before[path] = path.read_bytes()
        path.chmod(0o755)
        path.write_bytes(before[path][:-1] + bytes([before[path][-1] ^ 1]))
        path.chmod(0o555)
    with Process(python) as process:
        process.prime(image_dir=str(images), backing="memfd")
    assert {path: path.read_bytes() for path in anchors} == before


@pytest.mark.images
def test_content_is_on_disk_before_it_is_executed(python, images):
    with Process(python) as process:
        process.run(
            "import os\n"
            "from page_primer import _core\n"
            "calls, sync, swap, move = [], os.fdatasync, _core.swap, os.replace\n"
            "os.fdatasync = lambda fd: calls.append('sync') or sync(fd)\n"
            "os.replace = lambda *a, **k: calls.append('name') or move(*a, **k)\n"
            "_core.swap = lambda *a: calls.append('execute') or swap(*a)"
        )
        process.prime(image_dir=str(images), backing="image")
        calls = process.run("result = calls")
    # An anchor is written after the image, and executed never.
    assert calls[:2] == ["sync", "name"]
    assert "execute" in calls


@pytest.mark.parametrize("name", ["plain-1.2", "with space", "it's", "x;id", "$(id)", "a\nb"])
def test_a_path_in_a_remedy_is_one_word_of_a_shell(tmp_path: Path, name: str) -> None:
    """Whoever may name a directory does not choose what root pastes."""
    directory = tmp_path / name
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(trust.Unusable) as refused, Store(str(directory)):
        pass
    assert shlex.split(refused.value.remedy or "") == ["chmod", "go-w", str(directory)]
