# `page-primer run` puts this directory first on PYTHONPATH, so every Python that starts under it
# imports this file: any version, with or without page-primer installed. It must not fail, nor be
# seen: what the interpreter would have imported without it, it imports here.
import sys


def _start(directory):
    if sys.version_info < (3, 10) or sys.implementation.name != "cpython":
        return
    # A twentieth of what this costs would be the collector's, which finds nothing in modules. It
    # goes on where other threads run, as a .pth file starts them: it is theirs, too, and would stay
    # off in a child that one of them forks.
    import _thread
    import gc

    rests = gc.isenabled() and _thread._count() == 0
    try:
        if rests:
            gc.disable()
        _prime(directory)
    finally:
        if rests:
            gc.enable()


def _prime(directory):
    if "page_primer" in sys.modules:
        package = sys.modules["page_primer"]
    else:
        # From the launcher's own installation; its packages are not put on sys.path. importlib.util
        # has these names too, but takes 3 ms to import, and importlib alone half of one.
        import _frozen_importlib
        import _frozen_importlib_external

        home = directory.rpartition("/")[0].rpartition("/")[0]
        spec = _frozen_importlib_external.spec_from_file_location(
            "page_primer", home + "/__init__.py", submodule_search_locations=[home]
        )
        package = _frozen_importlib.module_from_spec(spec)
        sys.modules["page_primer"] = package
        spec.loader.exec_module(package)
    from page_primer.launcher import child  # not before the package is found, above

    child.start()


def _is_import_statement():
    # Or whether somebody loads this file by its loader. A spec is "initializing" while an import
    # statement, or load_module() of a module that is not there, executes it.
    spec = globals().get("__spec__")
    if spec is not None and not getattr(spec, "_initializing", False):
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_find_and_load":
        if frame.f_code.co_name == "_load_module_shim":
            return False
        frame = frame.f_back
    return True


def _import_next(directory):
    # The user's sitecustomize, or the distribution's, takes this one's place. Where there is none,
    # an import statement gets the ImportError that it would have got. A tracer whose sitecustomize
    # came before ours and loads it with load_module() (New Relic's) finds its module in place.
    is_import = _is_import_statement()
    here = sys.modules.pop("sitecustomize", None)  # Python 2 clears what nobody refers to
    sys.path[:] = [path for path in sys.path if path != directory]
    try:
        import sitecustomize  # noqa: F401
    except BaseException as error:
        if is_import:
            raise
        if here is not None:
            sys.modules["sitecustomize"] = here
        if not isinstance(error, ImportError) or error.name != "sitecustomize":
            raise


try:
    _start(__file__.rpartition("/")[0])
except Exception as error:
    try:
        import os

        if "PAGE_PRIMER_VERBOSE" in os.environ:
            line = "page-primer: " + type(error).__name__ + ": " + str(error) + "\n"
            # Not to its buffer, which would be flushed again at exit.
            os.write(sys.stderr.fileno(), line.encode())
    except Exception:  # a closed stderr
        pass

_import_next(__file__.rpartition("/")[0])
