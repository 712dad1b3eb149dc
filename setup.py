"""The C core and page-primer-warm: Linux only. The core is one build for every CPython since 3.10
(the stable ABI), except on free-threaded builds, which have none. The rest of the metadata is in
pyproject.toml."""

import os
import sys
import sysconfig

from setuptools import Extension, setup

# isort: split
# Of setuptools, once that is imported.
from distutils.ccompiler import new_compiler
from distutils.command.build_scripts import build_scripts
from distutils.sysconfig import customize_compiler

linux = sys.platform == "linux"
stable_abi = not sysconfig.get_config_var("Py_GIL_DISABLED")

# Executables in C: name -> sources.
PROGRAMS = {
    "page-primer-warm": ["page_primer/launcher/warm.c"],
}
# What page_primer._core is made of.
CORE = [
    f"page_primer/_{name}.c"
    for name in ("core", "support", "objects", "memory", "dump", "swap", "heap", "alone")
]
SOURCES = [source for sources in PROGRAMS.values() for source in sources]


class BuildPrograms(build_scripts):
    """Compile PROGRAMS into the directory of scripts."""

    def run(self):
        compiler = new_compiler()
        customize_compiler(compiler)
        os.makedirs(self.build_dir, exist_ok=True)
        work = self.get_finalized_command("build").build_temp
        arguments = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]
        for name, sources in PROGRAMS.items():
            objects = compiler.compile(sources, output_dir=work, extra_postargs=arguments)
            compiler.link_executable(objects, name, output_dir=self.build_dir)

    def get_source_files(self):
        return SOURCES


setup(
    ext_modules=[
        Extension(
            "page_primer._core",
            CORE,
            depends=["page_primer/_core.h"],
            py_limited_api=stable_abi,
            extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-Werror=implicit"],
            # No lazy binding: looking a symbol up would read the hash tables of the very object
            # that is being put back.
            # Never unloaded: pymalloc may call _heap.c up to the process's end.
            extra_link_args=["-Wl,-z,relro,-z,now", "-Wl,-z,nodelete"],
        ),
        Extension(
            "page_primer.bench._probe",
            ["page_primer/bench/_probe.c"],
            py_limited_api=stable_abi,
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
        ),
    ]
    if linux
    else [],
    scripts=SOURCES if linux else [],
    cmdclass={"build_scripts": BuildPrograms},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if stable_abi else {},
)
