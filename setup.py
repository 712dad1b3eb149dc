"""What is compiled, where page-primer works: CPython on Linux, x86-64 or arm64. Elsewhere the
package installs without a compiler, and its report says "not supported here".

The core is one build for every CPython since 3.10 (the stable ABI), except on free-threaded builds,
which have none. An install without it would be one that does nothing, so it must compile;
page-primer-warm and bench's probe need not. The rest of the metadata is in pyproject.toml."""

import gzip
import io
import os
import sys
import sysconfig
import tarfile
import time

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CCompilerError, CompileError

# isort: split
# Of setuptools, once that is imported.
from distutils.ccompiler import new_compiler
from distutils.command.build_scripts import build_scripts
from distutils.sysconfig import customize_compiler

# As page_primer._unsupported() has it. get_platform() is the target's when cross-compiling.
supported = (
    sysconfig.get_platform() in ("linux-x86_64", "linux-aarch64")
    and sys.implementation.name == "cpython"
    and sys.maxsize > 1 << 32
)
stable_abi = not sysconfig.get_config_var("Py_GIL_DISABLED")

# Executables in C: name -> sources.
PROGRAMS = {
    "page-primer-warm": ["page_primer/launcher/warm.c"],
}
# What page_primer._core is made of.
PARTS = "core support objects memory descriptor area populate dump swap heap alone loader"
CORE = [f"page_primer/_{name}.c" for name in PARTS.split()]
NEEDS = (
    "needs a C compiler, Python's headers and Linux's (Debian: gcc, python3-dev; Alpine: gcc, "
    "musl-dev, python3-dev, linux-headers)"
)
# No path of the build's own in debug information.
REPRODUCIBLE = [f"-ffile-prefix-map={os.getcwd()}=."]
SOURCES = [source for sources in PROGRAMS.values() for source in sources]


class BuildExtensions(build_ext):
    """Extensions; one that does not compile is named with what it needs."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except CCompilerError as error:
            raise CompileError(f"{error}; {ext.name} {NEEDS}") from None


class BuildPrograms(build_scripts):
    """Compile PROGRAMS into the directory of scripts, or say which of them there will not be."""

    def run(self):
        compiler = new_compiler()
        customize_compiler(compiler)
        os.makedirs(self.build_dir, exist_ok=True)
        work = self.get_finalized_command("build").build_temp
        arguments = ["-std=gnu11", "-O2", "-Wall", "-Wextra", *REPRODUCIBLE]
        for name, sources in PROGRAMS.items():
            try:
                objects = compiler.compile(sources, output_dir=work, extra_postargs=arguments)
                compiler.link_executable(objects, name, output_dir=self.build_dir)
            except CCompilerError as error:
                self.warn(f'building program "{name}" failed: {error}; it {NEEDS}')

    def get_source_files(self):
        return SOURCES


class ReproducibleSdist(sdist):
    """The same bytes from the same files, whatever their times, owners and the umask."""

    def make_archive(self, *args, **options):
        path = super().make_archive(*args, **options)
        if path.endswith(".tar.gz"):
            normalize(path)
        return path


def normalize(path):
    """Write a tar.gz anew: members by name, with one time and no owner."""
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    packed = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in sorted(old, key=lambda member: member.name):
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.mtime, member.uid, member.gid = epoch, 0, 0
            member.uname = member.gname = ""
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with open(path, "wb") as file:
        file.write(gzip.compress(packed.getvalue(), mtime=epoch))


def extension(name, sources, compile_args, **options):
    """An extension of the stable ABI, where there is one."""
    return Extension(
        f"page_primer.{name}", sources, py_limited_api=stable_abi,
        extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", *REPRODUCIBLE, *compile_args],
        **options,
    )  # fmt: skip


setup(
    ext_modules=[
        extension(
            "_core",
            CORE,
            ["-Werror=implicit"],
            depends=["page_primer/_core.h"],
            # No lazy binding: looking a symbol up would read the hash tables of the very object
            # that is being put back.
            # Never unloaded: pymalloc may call _heap.c up to the process's end.
            extra_link_args=["-Wl,-z,relro,-z,now", "-Wl,-z,nodelete"],
        ),
        extension("bench._probe", ["page_primer/bench/_probe.c"], ["-O2"], optional=True),
    ]
    if supported
    else [],
    scripts=SOURCES if supported else [],
    cmdclass={
        "build_ext": BuildExtensions,
        "build_scripts": BuildPrograms,
        "sdist": ReproducibleSdist,
    },
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if supported and stable_abi else {},
)
