"""`page-primer build`: images that root writes, for users who write nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import outside
from harness.kernel import require_huge_files
from harness.libraries import build_library
from harness.marks import needs_root
from harness.process import Process, interpreter
from harness.service import NOBODY, USER, become, capable, public, public_python

from page_primer.elf.objects import Source
from page_primer.images import names

__all__ = ["public", "public_python"]


def build(python, *arguments, wrapper=(), **environ):
    done = subprocess.run(
        [*wrapper, python, "-m", "page_primer", "build", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environ},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def files(store: Path):
    return {path: path.lstat().st_mtime_ns for path in store.rglob("*") if path.name != ".trial"}


def images_of(report):
    return {obj["path"]: obj for obj in report["objects"] if obj["backing"]}


@needs_root
def test_a_service_user_maps_what_root_has_built(public, public_python):
    """Whatever the user is: one with a capability, and nobody, trust nothing else."""
    require_huge_files(public)
    store = public / "images"
    status, out, error = build(public_python, "--dir", store, "--import", "ssl", "--json")
    assert (status, error) == (0, "")
    found = json.loads(out)
    assert found["path"] == str(store)
    built = {one["object"]: one["path"] for one in found["built"] if one["huge"]}
    assert len(built) > 1
    before = files(store)
    for wrapper in (become(USER), become(NOBODY), capable(USER)):
        with Process(public_python, wrapper=wrapper) as process:
            process.run("import ssl")
            report = process.prime(image_dir=str(store))
            assert interpreter(report)["backing"] == "image"
            for path, obj in images_of(report).items():
                # What lies at another address than the loader's usual one cannot be shared.
                if path in built and obj["backing"] == "image":
                    assert (obj["where"], obj["written_bytes"]) == (built[path], 0)
            assert interpreter(report)["where"] == built[interpreter(report)["path"]]
            text = outside.text_of(process.pid)
            assert text.huge == text.attainable > 0
        assert files(store).keys() == before.keys()
    status, out, error = build(public_python, "--dir", store, "--import", "ssl", "--json")
    assert {one["size"] for one in json.loads(out)["built"]} == {0}  # there already


@needs_root
def test_the_store_that_every_user_looks_into(public, public_python):
    require_huge_files(public)
    (public / "cache").mkdir()
    script = f'mount --bind {public}/cache /var/cache && exec "$@"'
    mount = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    status, out, error = build(public_python, wrapper=mount)
    assert (status, error) == (0, "")
    assert "/var/cache/page-primer: 1 image; every user can read them" in out
    home = public / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    env = {"HOME": str(home), "XDG_CACHE_HOME": ""}
    with Process(public_python, wrapper=[*mount, *become(USER)], env=env) as process:
        core = interpreter(process.prime())
        assert core["backing"] == "image"
        assert core["where"].startswith("/var/cache/page-primer/")
        assert core["notes"] == []
    assert not list(home.iterdir())
    # The doctor says so, and calls nothing unusable beside it.
    done = subprocess.run(
        [*mount, public_python, "-m", "page_primer", "doctor", "--json", "--user", str(USER)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    system = checks["image directory /var/cache/page-primer"]
    assert system["status"] == "ok"
    assert "the interpreter's image is there" in system["found"]
    assert checks["backing"]["status"] == "ok"
    assert "/var/cache/page-primer" in checks["backing"]["found"]
    assert not [check for check in checks.values() if "unusable" in check["found"]]


@needs_root
def test_a_container_with_a_read_only_root(public, public_python):
    require_huge_files(public)
    store = public / "images"
    assert build(public_python, "--dir", store)[0] == 0
    script = f'mount --bind {store} {store} && mount -o remount,ro,bind {store} && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", script, "sh", *become(USER)]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    with Process(public_python, wrapper=wrapper) as process:
        core = interpreter(process.prime(image_dir=str(store)))
        assert (core["backing"], core["written_bytes"]) == ("image", 0)


def test_files_that_were_copied_since(python, public, tmp_path):
    """As layers of a container's image are: other inodes, times in whole seconds."""
    require_huge_files(public)
    store = public / "images"
    library = public / "libbig.so"
    shutil.copy(build_library(tmp_path, "libbig.so"), library)
    os.utime(library, ns=(10**9, 1_700_000_000_123_456_789))
    (public / "loads.py").write_text(f"import ctypes\nlibrary = ctypes.CDLL({str(library)!r})\n")
    status, out, error = build(python, "--dir", store, "--import", "loads", PYTHONPATH=str(public))
    assert (status, error) == (0, "")
    assert f"{library}: " in out
    copy = public / "copy.so"
    shutil.copy(library, copy)
    os.utime(copy, ns=(10**9, 1_700_000_000_000_000_000))
    os.replace(copy, library)
    with Process(python, env={"PYTHONPATH": str(public)}) as process:
        process.run("import loads")
        starts = [vma.start for vma in outside.smaps(process.pid) if vma.path == str(library)]
        if min(starts) % outside.PMD:
            pytest.skip("the loader does not align libraries on this file system")
        report = process.prime(image_dir=str(store))
        mine = images_of(report)[str(library)]
        assert "-built-" in mine["where"]
        assert mine["written_bytes"] == 0
        assert process.run("result = loads.library.answer()") == 42


def test_other_content_under_the_name_of_a_built_image(python, public, tmp_path):
    """Two files that differ in nothing that the name tells: what counts is the comparison."""
    require_huge_files(public)
    store = public / "images"
    library = public / "libbig.so"
    shutil.copy(build_library(tmp_path, "libbig.so"), library)
    os.utime(library, ns=(10**9, 10**18))
    (public / "loads.py").write_text(f"import ctypes\nlibrary = ctypes.CDLL({str(library)!r})\n")
    assert build(python, "--dir", store, "--import", "loads", PYTHONPATH=str(public))[0] == 0
    content = bytearray(library.read_bytes())
    at = content.index(b"\xc3", 0x300000) if b"\xc3" in content[0x300000:] else 0x300000
    content[0x300001 if at != 0x300001 else 0x300002] ^= 0xFF  # one of the nops
    library.unlink()
    library.write_bytes(content)
    library.chmod(0o755)
    os.utime(library, ns=(10**9, 10**18))
    with Process(python, env={"PYTHONPATH": str(public)}) as process:
        process.run("import loads")
        report = process.prime(image_dir=str(store))
        mine = next(obj for obj in report["objects"] if obj["path"] == str(library))
        assert not (mine["where"] and "built" in mine["where"])
        if mine["backing"] == "image":
            assert any("wrong content" in note for note in mine["notes"]), mine["notes"]
        assert process.run("result = loads.library.answer()") == 42


@pytest.mark.images
def test_an_application_as_its_server_loads_it(python, public):
    (public / "shop.py").write_text(
        "import ssl\n"
        "class make:\n"
        "    @staticmethod\n"
        "    def app():\n"
        "        open('made', 'w').close()\n"
    )
    store = public / "images"
    command = [python, "-m", "page_primer", "build", "--dir", str(store), "--json"]
    done = subprocess.run(
        [*command, "--app", "shop:make.app()"], cwd=public, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0
    assert (public / "made").exists()
    objects = {os.path.basename(one["object"]) for one in json.loads(done.stdout)["built"]}
    assert any(name.startswith("libcrypto") for name in objects) or len(objects) == 1


@pytest.mark.images
def test_mistakes_are_one_line(python, public, tmp_path):
    status, out, error = build(python, "--dir", public / "images", "--import", "nosuchmodule")
    assert (status, out) == (2, "")
    assert error.startswith("page-primer: cannot import nosuchmodule: ModuleNotFoundError")
    assert error.count("\n") == 1
    status, out, error = build(python, "--dir", public / "images", "--app", "json:nothing")
    assert (status, error.count("\n")) == (2, 1)
    assert "cannot load json:nothing: AttributeError" in error
    status, out, error = build(python, "--dir", "images")
    assert status == 2
    assert "absolute path" in error
    (public / "open").mkdir()
    (public / "open").chmod(0o777)
    status, out, error = build(python, "--dir", public / "open" / "images")
    assert status == 1
    assert "others can write to" in error


@needs_root
def test_only_root_fills_the_store_of_all(public_python):
    status, out, error = build(public_python, wrapper=become(USER))
    assert (status, out) == (1, "")
    assert "is filled by root" in error


def test_names_of_built_images():
    source = Source("/lib/x.so", 1, 2, 3000, 1_700_000_000_999_999_999, 5)
    name = names.of(source, "200000", "0", "0x.400000r")
    built = names.as_built(name, source, b"headers")
    other = Source("/elsewhere/x.so", 7, 8, 3000, 1_700_000_000_000_000_000, 9)
    again = names.of(other, "200000", "0", "0x.400000r")
    assert names.as_built(again, other, b"headers") == built != name
    assert names.as_built(again, other, b"other headers") != built
    for one in (name, built, names.as_libpython(name), names.as_libpython(built)):
        assert names.is_name(one)
        assert not names.is_transient(one)
    whole = names.as_built(name, source, b"headers", whole=True)
    part = names.of(source, "200000", "0", "200000x.400000h")
    assert names.as_built(part, source, b"headers", whole=True) == whole != built
    assert names.is_built(built) and not names.is_built(name)
    assert names.as_built(names.as_libpython(name), source, b"headers") == names.as_libpython(built)
    random = names.of(source, "200000", "3000", "0x.400000r")
    assert names.is_transient(random)
    by_chance = names.of(source, "200000", "200000", "0x.400000r")
    assert names.is_name(by_chance) and names.is_transient(by_chance)
    assert names.as_built(by_chance, source, b"headers") == built
    anchor = names.of(source, "3ff000", names.ANCHOR)
    assert names.is_name(anchor) and not names.is_transient(anchor)
    assert names.is_name(names.as_built(anchor, source, b"headers"))


def test_a_built_image_of_a_changed_file_is_stale(tmp_path):
    path = tmp_path / "x.so"
    path.write_bytes(b"content")
    source = Source.of(str(path), path.stat())
    built = names.as_built(names.of(source, "200000", "0", "0x"), source, b"headers")
    assert names.belongs_to(built, str(path))
    os.utime(path, (1, 1))
    assert not names.belongs_to(built, str(path))


@needs_root
def test_an_image_of_a_file_that_this_user_may_not_see_is_not_called_stale(public_python, public):
    closed = public / "closed"
    closed.mkdir(mode=0o700)
    asked = (
        "import sys; from page_primer.images import names; print(names.belongs_to(*sys.argv[1:]))"
    )
    name = "5-1-2-3-4-5-200000-0-0x"
    for path in (closed / "x.so", public / "x.so"):  # hidden; and not there
        command = [*become(USER), public_python, "-c", asked, name, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout == f"{path.parent == closed}\n", done.stderr


def test_the_command_as_nobody_in_particular(python):
    done = subprocess.run(
        [sys.executable, "-m", "page_primer", "doctor", "--user", "no such user"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "page-primer: no user no such user\n")
