"""The C core and the launcher: Linux only. The core is one build for every CPython since 3.10 (the
stable ABI), except on free-threaded builds, which have none. The rest of the metadata is in
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

LAUNCHER = "page_primer/launcher.c"


class BuildLauncher(build_scripts):
    """`page-primer` is an executable of its own, since an interpreter takes ten milliseconds to
    start; beside it lies `page-primer-cli`, the command in Python."""

    def run(self):
        compiler = new_compiler()
        customize_compiler(compiler)
        os.makedirs(self.build_dir, exist_ok=True)
        work = self.get_finalized_command("build").build_temp
        arguments = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]
        objects = compiler.compile([LAUNCHER], output_dir=work, extra_postargs=arguments)
        compiler.link_executable(objects, "page-primer", output_dir=self.build_dir)

    def get_source_files(self):
        return [LAUNCHER]


command = "page-primer-cli" if linux else "page-primer"
setup(
    ext_modules=[
        Extension(
            "page_primer._core",
            ["page_primer/_core.c"],
            py_limited_api=stable_abi,
            extra_compile_args=["-std=gnu11", "-Wall", "-Wextra"],
            # No lazy binding: looking a symbol up would read the hash tables of the very object
            # that is being put back.
            extra_link_args=["-Wl,-z,relro,-z,now"],
        )
    ]
    if linux
    else [],
    entry_points={"console_scripts": [f"{command} = page_primer.cli:main"]},
    scripts=[LAUNCHER] if linux else [],
    cmdclass={"build_scripts": BuildLauncher},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if stable_abi else {},
)
