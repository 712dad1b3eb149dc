"""A seccomp filter that refuses each system call that prime() and restore() make, one at a time."""

import errno
import sys

import pytest
from harness.privileges import has_images
from harness.system_calls import calls_in_use, check, refuse, variants


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The system calls in use, by name."""
    folder = tmp_path_factory.mktemp("calls")
    return calls_in_use(folder, sys.executable)


def test_the_calls_in_use_are_known(calls):
    assert {"mmap", "madvise", "munmap", "openat", "mlock", "prctl"} <= set(calls)


@pytest.fixture(scope="module")
def outcomes(calls, tmp_path_factory):
    """outcomes(backing, late): with EPERM, as filters answer, and with ENOSYS, as older kernels and
    sandboxes do; each tried once."""
    seen = {}

    def attempt(backing, late):
        if (backing, late) not in seen:
            options = variants(tmp_path_factory.mktemp(backing))[backing]
            errors = [errno.EPERM, errno.ENOSYS]
            seen[backing, late] = refuse(sys.executable, calls, options, errors=errors, late=late)
        return seen[backing, late]

    return attempt


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "while primed"])
@pytest.mark.parametrize("backing", ["auto", "image", "memfd", "anonymous"])
def test_each_call_refused_to_each_backing(outcomes, backing, late):
    """In a sandbox from the start, or one that a primed process enters."""
    check(outcomes(backing, late))


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "while primed"])
def test_each_call_refused(outcomes, late):
    """What can be done without, is; what cannot, has a reason that names it."""
    by_name = {one["name"]: one for one in outcomes("auto", late) if one["errno"] == errno.EPERM}
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
