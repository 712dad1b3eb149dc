#!/usr/bin/env python3
"""A file system of FUSE's that says of everything what its user likes, in a mount namespace of its
own, and a command in that (root):

    fuse.py DIRECTORY OPTIONS OWNER COMMAND...

OPTIONS are those of the mount, as fusermount3(1) gives them to the kernel for its user
(`user_id=5000,group_id=5000,allow_other`). There is a directory `images` in it, empty, and a file
`library`, empty as well, and the user OWNER has all of it (fuse(4), linux/fuse.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import struct
import sys
from pathlib import Path

_CLONE_NEWNS, _MS_NOSUID, _MS_NODEV, _MS_PRIVATE = 0x20000, 2, 4, 0x44000  # the latter: MS_REC
_PR_SET_PDEATHSIG = 1
_IN, _OUT = struct.Struct("=IIQQ16x"), struct.Struct("=IiQ")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _STATFS, _RELEASE, _INIT = 1, 2, 3, 14, 17, 18, 26
_OPENDIR, _READDIR, _RELEASEDIR, _ACCESS, _INTERRUPT, _BATCH_FORGET = 27, 28, 29, 34, 36, 42
_ROOT, _IMAGES, _LIBRARY = 1, 2, 3  # nodes
_NODES = {b"images": _IMAGES, b"library": _LIBRARY}


def _attributes(node: int, owner: int) -> bytes:
    mode = (stat.S_IFREG if node == _LIBRARY else stat.S_IFDIR) | 0o755
    return struct.pack("=6Q10I", node, *[0] * 5, *[0] * 3, mode, 2, owner, owner, 0, 4096, 0)


def _answer(operation: int, node: int, rest: bytes, owner: int) -> bytes | None:
    """What is answered; None: it does not exist, or is not implemented."""
    if operation == _INIT:
        return struct.pack("=4I2H2I36x", 7, 31, 0, 0, 12, 9, 4096, 1)
    if operation == _LOOKUP:
        found = _NODES.get(rest.rstrip(b"\0"))
        if found is None:
            return None
        return struct.pack("=4Q2I", found, 0, 0, 0, 0, 0) + _attributes(found, owner)
    if operation == _GETATTR:
        return struct.pack("=Q2I", 0, 0, 0) + _attributes(node, owner)
    if operation in (_OPEN, _OPENDIR):
        return bytes(16)
    if operation == _STATFS:
        return struct.pack("=5Q4I24x", 1 << 20, 1 << 20, 1 << 20, 9, 9, 4096, 255, 4096, 0)
    return b"" if operation in (_READDIR, _RELEASE, _RELEASEDIR, _ACCESS) else None


def _serve(device: int, owner: int) -> None:
    while True:
        try:
            request = os.read(device, 1 << 17)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            raise
        _, operation, unique, node = _IN.unpack_from(request)
        if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            continue
        data = _answer(operation, node, request[_IN.size :], owner)
        missing = -errno.ENOENT if operation == _LOOKUP else -errno.ENOSYS
        size = _OUT.size + len(data or b"")
        head = _OUT.pack(size, missing if data is None else 0, unique)
        os.write(device, head + (data or b""))


def _call(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        sys.exit(f"{name}: {os.strerror(ctypes.get_errno())}")


def main(directory: str, options: str, owner: str, *command: str) -> None:
    _call("unshare", _CLONE_NEWNS)
    _call("mount", None, b"/", None, _MS_PRIVATE, None)
    device = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={device},rootmode=40000,{options}".encode()
    _call("mount", b"what", directory.encode(), b"fuse", _MS_NOSUID | _MS_NODEV, data)
    parent = os.getpid()
    if os.fork():
        os.execvp(command[0], command)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nothing, fd)
    if os.getppid() == parent:
        _serve(device, int(owner))


def mounted(directory: Path, options: str, owner: int) -> list[str]:
    """A prefix that runs a command beside such a file system."""
    return [sys.executable, __file__, str(directory), options, str(owner)]


if __name__ == "__main__":
    main(*sys.argv[1:])
