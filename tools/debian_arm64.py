"""Debian's arm64 packages and kernels, fetched by apt with lists of their own, for tools/arm64."""

from __future__ import annotations

import lzma
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "page-primer-arm64"
)
SUITES = {"root": ["trixie"], "kernel": ["trixie", "trixie-backports", "sid"]}
# What a kernel has built in is passed over.
MODULES = ["virtio_mmio", "virtio_blk", "crc32c_generic", "crc32c_cryptoapi", "crc32c", "ext4"]


def die(message: str) -> None:
    print(f"arm64: {message}", file=sys.stderr)
    sys.exit(2)


def say(message: str) -> None:
    print(f"arm64: {message}", file=sys.stderr, flush=True)


def output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


class Packages:
    """Debian's arm64 packages of some suites, with lists of their own: the system's apt stays as it
    is."""

    def __init__(self, name: str) -> None:
        self.folder = CACHE / name
        self.archives, self.downloads = self.folder / "archives", self.folder / "downloads"
        self.config = str(self.folder / "apt.conf")
        if not (self.folder / "complete").exists():
            self._make(SUITES[name])
            (self.folder / "complete").touch()

    def _make(self, suites: list[str]) -> None:
        for part in ("archives/partial", "downloads", "lists/partial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        sources = [f"deb {mirror()} {suite} main\n" for suite in suites]
        (self.folder / "sources").write_text("".join(sources))
        Path(self.config).write_text(f"""
            APT::Architecture "arm64"; #clear APT::Architectures; APT::Architectures {{ "arm64"; }};
            Dir::Etc {{ sourcelist "{self.folder}/sources"; sourceparts "/dev/null";
                        preferencesparts "/dev/null"; }};
            Dir::State::status "{self.folder}/status"; Dir::State::Lists "{self.folder}/lists";
            Dir::Cache "{self.folder}"; Dir::Cache::archives "{self.archives}";
            APT::Sandbox::User "root"; Acquire::Languages "none";
            #clear APT::Update::Post-Invoke-Success; #clear APT::Update::Post-Invoke;
        """)
        self.run("update")

    def run(self, *arguments: str) -> None:
        command = ["apt-get", "-qq", "-c", self.config, *arguments]
        if subprocess.run(command, cwd=self.downloads, stdout=subprocess.DEVNULL).returncode:
            die(f"apt-get {' '.join(arguments)} failed; lists that are old: remove {self.folder}")

    def with_all_they_need(self, names: list[str]) -> list[Path]:
        self.run("install", "-y", "--no-install-recommends", "--download-only", *names)
        return sorted(self.archives.glob("*.deb"))

    def alone(self, name: str) -> Path:
        self.run("download", name)
        return next(self.downloads.glob(f"{name}_*.deb"))

    def names(self, pattern: str) -> list[str]:
        lines = output("apt-cache", "-c", self.config, "search", "-n", pattern).splitlines()
        return [line.split()[0] for line in lines]


def mirror() -> str:
    """Where the system's own packages come from."""
    form = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    for line in output("apt-get", "indextargets", "--format", form, "Created-By: Packages").split():
        uri, release, component = line.split("|")
        if component == "main" and "security" not in release:
            return uri
    die("the system's apt sources name no Debian mirror")
    raise AssertionError


def unpack(deb: Path, folder: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)


def fetch_kernel(start: str) -> Path:
    """The folder with `kernel` and `modules/` of this kernel, made at first use."""
    packages = Packages("kernel")
    pattern = rf"^linux-image-{re.escape(start)}[.+].*[0-9]-arm64$"
    found = sorted(
        packages.names(pattern), key=lambda name: [int(n) for n in re.findall(r"\d+", name)]
    )
    if not found:
        die(f"no kernel {start} for arm64 in {', '.join(SUITES['kernel'])}")
    folder = CACHE / found[-1]
    if not folder.exists():
        say(f"fetching {found[-1]}")
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            tree, made = Path(work, "tree"), Path(work, "made")
            image = packages.alone(found[-1])
            unpack(image, tree)
            # Newer kernels come in several packages; the one with the configuration may be missing.
            release = found[-1].removeprefix("linux-image-")
            depends = output("dpkg-deb", "-f", str(image), "Depends")
            for part in re.findall(rf"linux-(?:binary|modules)-{re.escape(release)}(?= )", depends):
                unpack(packages.alone(part), tree)
            (made / "modules").mkdir(parents=True)
            (made / "kernel").write_bytes(decompress(next(tree.rglob("vmlinuz*")).read_bytes()))
            for name, content in modules(tree).items():
                (made / "modules" / f"{name}.ko").write_bytes(content)
            order = "\n".join(f"{name}.ko" for name in modules(tree))
            (made / "modules/order").write_text(order + "\n")
            made.rename(folder)
    return folder


def decompress(image: bytes) -> bytes:
    """The kernel inside an EFI zboot image, which qemu before 8.2 does not start: "MZ", "zimg", the
    payload's offset and size, and the name of its compression (linux/drivers/firmware/efi/libstub/
    zboot-header.S)."""
    if image[4:8] == b"zimg":
        offset, size = struct.unpack_from("<II", image, 8)
        payload, method = image[offset : offset + size], image[24:56].split(b"\0")[0]
        if method == b"gzip":
            return zlib.decompress(payload, 31)
        if method == b"xzkern":
            return lzma.decompress(payload)
        if method.startswith(b"zstd"):
            # Its last four bytes are the size of the kernel.
            return subprocess.run(
                ["zstd", "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True
            ).stdout
        die(f"a kernel compressed by {method!r}")
    return image


def modules(tree: Path) -> dict[str, bytes]:
    """The modules wanted and those that they need, in the order to load them in."""
    files = {path.name.split(".")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name not in files or name in found:
            return
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        needs = re.search(rb"\0depends=([^\0]*)", content)
        for needed in needs[1].decode().split(",") if needs else []:
            add(needed.replace("-", "_"))
        found[name] = content

    for name in MODULES:
        add(name)
    return found
