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
        # From the launcher's own installation; its packages are not put on sys.path.
        from importlib.util import module_from_spec, spec_from_file_location

        home = directory.rpartition("/")[0]
        spec = spec_from_file_location(
            "page_primer", home + "/__init__.py", submodule_search_locations=[home]
        )
        package = sys.modules["page_primer"] = module_from_spec(spec)
        spec.loader.exec_module(package)
    from page_primer import started

    started.start()


def _users_own(directory):
    # The user's sitecustomize, or the distribution's, if there is one.
    ours = sys.modules.pop("sitecustomize", None)
    sys.path[:] = [path for path in sys.path if path != directory]
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":  # Python 2 has no name
            raise
    finally:
        if ours is not None:
            sys.modules.setdefault("sitecustomize", ours)


try:
    _start(__file__.rpartition("/")[0])
except Exception as error:
    try:
        if "PAGE_PRIMER_VERBOSE" in __import__("os").environ:
            sys.stderr.write("page-primer: " + type(error).__name__ + ": " + str(error) + "\n")
    except Exception:  # a closed stderr
        pass
_users_own(__file__.rpartition("/")[0])
