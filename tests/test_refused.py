"""A seccomp filter that refuses each system call that prime(), status() and restore() make, one at
a time."""

import sys
from errno import ENOSYS, EPERM

import pytest
from harness.interpreters import KINDS, python_of
from harness.privileges import has_images
from harness.system_calls import VARIANTS, calls_in_use, check, refuse, variants


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The system calls in use, by name."""
    folder = tmp_path_factory.mktemp("calls")
    return calls_in_use(folder, sys.executable)


def test_the_calls_in_use_are_known(calls):
    assert {"mmap", "madvise", "munmap", "openat", "mlock", "prctl"} <= set(calls)
    if has_images():
        assert {"fchmod", "fdatasync", "flock", "mkdirat", "pwrite64", "renameat"} <= set(calls)


@pytest.fixture(scope="module")
def outcomes(calls, tmp_path_factory):
    """outcomes(variant, late, errors): with EPERM, as filters answer, and with ENOSYS, as older
    kernels and sandboxes do; each tried once."""
    seen = {}

    def attempt(variant, late, errors=(EPERM, ENOSYS)):
        if (variant, late) not in seen:
            options = variants(tmp_path_factory.mktemp("refused"))[variant]
            seen[variant, late] = refuse(sys.executable, calls, options, errors=errors, late=late)
        return seen[variant, late]

    return attempt


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "while primed"])
@pytest.mark.parametrize("backing", VARIANTS[:4])
def test_each_call_refused_to_each_backing(outcomes, backing, late):
    """In a sandbox from the start, or one that a primed process enters."""
    both = backing == "auto"  # which tries the others' calls
    check(outcomes(backing, late, *(() if both else [[ENOSYS if late else EPERM]])))


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "while primed"])
@pytest.mark.parametrize("variant", VARIANTS[4:])
def test_each_call_refused_with_all_options(outcomes, variant, late):
    """Where the heap, a perf map, anchors or the kernel's pool of huge pages are asked for."""
    check(outcomes(variant, late, [ENOSYS if late else EPERM]))


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "while primed"])
def test_each_call_refused_to_a_program(tmp_path, late):
    """One without a libpython: where it is linked for one address it has anchors, too."""
    if "static" not in KINDS:
        pytest.skip("no static interpreter here")
    python = python_of(tmp_path, KINDS["static"])
    used, options = calls_in_use(tmp_path, python), variants(tmp_path)["anonymous, all else"]
    check(refuse(python, used, options, errors=[EPERM if late else ENOSYS], late=late))


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "while primed"])
def test_each_call_refused(outcomes, late):
    """What can be done without, is; what cannot, has a reason that names it."""
    by_name = {one["name"]: one for one in outcomes("auto", late) if one["errno"] == EPERM}
    names = ["geteuid", "prctl", "uname", "rt_sigprocmask", "mlock", "prlimit64"]
    for name in [*names, "flock"] if has_images() else names:  # of an image
        assert by_name[name]["huge"], by_name[name]
    assert "mlock" not in by_name or "not permitted" in by_name["mlock"]["lock_refusal"]
    assert "/proc/self/" in by_name["openat"]["reason"] or "page_primer" in str(by_name["openat"])
    if late:
        assert "not put back: reserve: Operation not permitted" in by_name["mmap"]["notes"]
        assert "/proc/self/" in by_name["read"]["reason"]
    else:
        assert "failed to map segment" in by_name["mmap"]["reason"]
