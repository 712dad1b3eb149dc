# `page-primer run` puts this directory first on PYTHONPATH, so every Python that starts under it
# imports this file: any version, with or without page-primer installed. It must not fail, nor be
# seen: what the interpreter would have imported without it, it imports here.
import sys


def _start(directory):
    if sys.version_info < (3, 10) or sys.implementation.name != "cpython":
        return
    if "page_primer" in sys.modules:
        package = sys.modules["page_primer"]
    else:
        # From the launcher's own installation; its packages are not put on sys.path. The names are
        # importlib.util's, which takes 3 ms to import.
        import importlib

        home = directory.rpartition("/")[0]
        spec = importlib._bootstrap_external.spec_from_file_location(
            "page_primer", home + "/__init__.py", submodule_search_locations=[home]
        )
        package = importlib._bootstrap.module_from_spec(spec)
        sys.modules["page_primer"] = package
        spec.loader.exec_module(package)
    from page_primer import started

    started.start()


try:
    _start(__file__.rpartition("/")[0])
except Exception as error:
    try:
        if "PAGE_PRIMER_VERBOSE" in __import__("os").environ:
            sys.stderr.write("page-primer: " + type(error).__name__ + ": " + str(error) + "\n")
    except Exception:  # a closed stderr
        pass

# The user's sitecustomize, or the distribution's, takes this one's place. The ImportError where
# there is none is what the importer of this file would have got.
_ours = sys.modules.pop("sitecustomize", None)  # Python 2 clears what nobody refers to
sys.path[:] = [path for path in sys.path if path != __file__.rpartition("/")[0]]
import sitecustomize  # noqa: E402, F401
