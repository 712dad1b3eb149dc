"""A systemd of the test's own, as PID 1 of its own namespaces: it runs units as they are written,
and changes nothing of the machine. It sees overlays of /etc, /tmp and /var, a /run of its own, and
only the units that it is given."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import pytest

from harness.kernel_log import watch
from harness.servers import wait_for

__all__ = ["Systemd"]

_SYSTEMD = "/usr/lib/systemd/systemd"

# What every unit depends on by default, with nothing of the machine's own in it.
_TARGETS = {
    f"{name}.target": f"[Unit]\nDescription={name}\nDefaultDependencies=no\n"
    for name in ("sysinit", "basic", "network", "shutdown", "default")
}

# As PID 1 it sets kernel.* and fs.* to its taste, for the whole machine: it may not here.
_SCRIPT = """
set -e
home=$1
mount --make-rprivate /
mount --bind "$home" /mnt
for d in etc tmp var; do
    mkdir -p "$home/$d/u" "$home/$d/w"
    [ $d != tmp ] || chmod 1777 "$home/$d/u"
    mount -t overlay overlay -o "lowerdir=/$d,upperdir=$home/$d/u,workdir=$home/$d/w" "/$d"
done
mkdir -p "$home"  # /var/tmp may be a mount of its own
mount --bind /mnt "$home"
rm -rf /var/cache/page-primer  # in the overlay: the machine's own has no part in this
mount -t tmpfs -o mode=755 tmpfs /run
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -o remount,bind,ro /sys
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
[ -n "$2" ] || exit 0
exec env -i container=test PATH="$PATH" SYSTEMD_UNIT_PATH="$home/units" SYSTEMD_LOG_TARGET=console \
    "$2" --system
"""


def _cgroups() -> str:
    with open("/proc/self/mountinfo") as file:
        rows = [line.split() for line in file]
    for row in rows:
        if row[row.index("-") + 1] == "cgroup2":
            return row[4]
    pytest.skip("no cgroup2 is mounted here")


class Systemd:
    """Runs units until the end of the block; where that is not possible the test is skipped.

    Args:
        units: name to text, `NAME.d/FILE.conf` for drop-ins.
    """

    def __init__(self, units: Mapping[str, str]) -> None:
        if not os.access(_SYSTEMD, os.X_OK):
            pytest.skip("no systemd is installed here")
        group = f"{_cgroups()}/page-primer-{uuid.uuid4().hex[:12]}"
        self._home = Path(tempfile.mkdtemp(prefix="page-primer-systemd-", dir="/var/tmp"))
        self._home.chmod(0o755)
        self.log_file = self._home / "log"
        for name, text in {**_TARGETS, **units}.items():
            path = self._home / "units" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self._group = Path(group)
        self._enter = [
            "sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", "unshare", "--mount",
            "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc", "sh", "-c", _SCRIPT,
            "sh", str(self._home),
        ]  # fmt: skip

    def __enter__(self) -> Systemd:
        try:
            self._group.mkdir()
            done = subprocess.run([*self._enter, ""], capture_output=True, text=True)
        except OSError as error:
            self._remove()
            pytest.skip(f"no cgroup can be made here: {error}")
        if done.returncode:
            self._remove()
            pytest.skip(f"no systemd can be run here: {done.stderr.strip()}")
        with open(self.log_file, "wb") as log:
            self._process = subprocess.Popen(
                [*self._enter, _SYSTEMD], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            wait_for(lambda: self.path("/run/systemd/private").exists(), "systemd")
        except AssertionError as error:
            log = self.log()
            self.__exit__(None, None, None)
            pytest.skip(f"systemd does not come up here ({error}): {log[-500:]}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGKILL)  # and PID 1 with it, and all that it has
        self._process.wait(60)
        wait_for(lambda: "populated 0" in (self._group / "cgroup.events").read_text(), "the end")
        self._remove()

    def _remove(self) -> None:
        if self._group.exists():
            for at, _, _ in os.walk(self._group, topdown=False):
                os.rmdir(at)
        shutil.rmtree(self._home)

    @property
    def _init(self) -> int:
        """PID 1, as it is called here."""
        return int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text())

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def start(self, unit: str) -> None:
        """Start a unit, and wait until it is up. Raises AssertionError where it does not start."""
        self._control("start", unit)

    def stop(self, unit: str) -> None:
        self._control("stop", unit)

    def _control(self, *words: str) -> None:
        done = subprocess.run(
            ["nsenter", "--target", str(self._init), "--mount", "--pid", "systemctl", *words],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + self.log()

    def processes(self, unit: str) -> list[int]:
        """The processes of a unit, the first one first."""
        path = self._group / "system.slice" / unit / "cgroup.procs"
        found = [int(line) for line in path.read_text().split()]
        for pid in found:
            watch(pid)
        return found

    def path(self, name: str) -> Path:
        """A file as PID 1 sees it."""
        return Path(f"/proc/{self._init}/root{name}")
