"""A command of ours as another user has it."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Sequence

# How names begin of the variables that another user's process is given.
_KEPT = (
    "PATH", "LANG", "LC_", "TERM", "COLUMNS", "NO_COLOR", "TZ", "PAGE_PRIMER", "PYTHON",
    "LD_LIBRARY_PATH", "KUBERNETES_SERVICE_HOST",
)  # fmt: skip


def run_as(user: str, words: Sequence[str]) -> int:
    """Run `page-primer` as a user, by a process of its own: one that has only changed its user is
    not like those that a service manager starts (it is not dumpable).

    Args:
        user: a name, or a number.
        words: the command line.

    Returns:
        The exit status.
    """
    number = int(user) if user.isascii() and user.isdigit() else None
    try:
        entry = pwd.getpwnam(user) if number is None else pwd.getpwuid(number)
        uid, gid, name, home = entry.pw_uid, entry.pw_gid, entry.pw_name, entry.pw_dir
    except KeyError:
        if number is None:
            raise ValueError(f"no user {user}") from None
        uid, gid, name, home = number, number, user, "/"
    try:
        # Its code must not see what root's environment has.
        kept = {key: value for key, value in os.environ.items() if key.startswith(_KEPT)}
        groups = os.getgrouplist(name, gid) if number is None else [gid]
        return subprocess.run(
            [sys.executable, "-s", "-m", "page_primer", *words],
            env={**kept, "HOME": home, "USER": name, "LOGNAME": name},
            user=uid, group=gid, extra_groups=groups, cwd="/", check=False,
            start_new_session=True,
        ).returncode  # fmt: skip
    except OSError as error:
        print(f"page-primer: as user {user}: {sys.executable}: {error.strerror}", file=sys.stderr)
        return 1
