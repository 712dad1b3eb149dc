"""Who this process is, and what it may do, by the kernel's word."""

from __future__ import annotations

from page_primer import _core
from page_primer._lean import Record, ours, suppress

ROOT = 0
_OVERFLOW_UID = 65534  # where /proc does not tell
_ALL = 0, 0, 0xFFFFFFFF  # the last id is none
_names: dict[int, bool] = {}  # whether an id names one user alone, as far as it was asked


class Credentials(Record):
    """Of the calling thread."""

    user: int  # the effective user id; negative where the kernel does not say
    # Why the process may do more than others of its user, who could make it do that by what they
    # can write; None where it may not.
    privilege: str | None = None

    @property
    def trusted(self) -> frozenset[int]:
        """The users whose files may be executed as part of this process: root's, as the
        interpreter's own is, and its own, if nobody else's can look like that."""
        if self.user == ROOT or self.privilege or not _is_one_user(self.user):
            return frozenset({ROOT})
        return frozenset({ROOT, self.user})


def read() -> Credentials:
    """The credentials now: a server changes them in the midst of its life."""
    try:
        user, capabilities, dumpable, secure, one = _core.credentials()
    except ours(OSError) as error:
        return Credentials(-1, f"its credentials are unknown ({error.strerror})")
    if user == ROOT:  # whose files are root's in any case
        return Credentials(user)
    if capabilities:
        return Credentials(user, "it has capabilities")
    if secure:
        return Credentials(user, "it runs in secure-execution mode")
    # To ptrace(2) and /proc/PID/mem all three ids of each kind must be the caller's: so to those of
    # a process that may change them back it is closed, for whoever is not root. (Nor is it open to
    # processes of the user with another group; but which group they have is not known here, and
    # docs/security.md says what follows from that.)
    if not one:
        return Credentials(user, "it may change to another user or group")
    # After a change of user, for one: what root had in memory is nobody else's to see or change,
    # by ptrace(2) or /proc/PID/mem.
    return Credentials(user, None if dumpable else "it is not dumpable")


def _is_one_user(user: int) -> bool:
    """Whether files that show this id are this user's: in a user namespace, and with file systems
    that map ids, every id that has no name here shows as the overflow uid (user_namespaces(7))."""
    if user < 0:
        return False
    if user not in _names:
        overflow = _OVERFLOW_UID
        with suppress(ValueError):
            overflow = int(_text("/proc/sys/kernel/overflowuid"))
        rows = _uid_map()
        mapped = any(first <= user < first + count for first, _, count in rows)
        _names[user] = user != overflow and (mapped or not rows)
    return _names[user]


def has_all_ids() -> bool:
    """Whether a user has the same id here and in each user namespace above this one: it is the
    initial one, or maps every id to itself, which none below another mapping can."""
    return _uid_map() in ([], [_ALL])


def _uid_map() -> list[tuple[int, ...]]:
    """Of each range the first id here, the first in the namespace above, and how many; none where
    the kernel has no such namespaces."""
    rows = [line.split() for line in _text("/proc/self/uid_map").splitlines()]
    return [tuple(map(int, row)) for row in rows if len(row) == 3]


def _text(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8") as file:
        return file.read()
    return ""
