"""The C core: Linux only. It is one build for every CPython since 3.10 (the stable ABI), except on
free-threaded builds, which have none. The rest of the metadata is in pyproject.toml."""

import sys
import sysconfig

from setuptools import Extension, setup

linux = sys.platform == "linux"
stable_abi = not sysconfig.get_config_var("Py_GIL_DISABLED")

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
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if stable_abi else {},
)
