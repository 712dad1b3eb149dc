"""The sdist and the wheel: complete, the same bytes anywhere, and installable where nothing can be
compiled."""

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MACHINE = os.uname().machine
# A system that the package does not support.
OTHER_MACHINE = ["setarch", "i686" if MACHINE == "x86_64" else "armv8l"]
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)
COMPILED = ("page_primer/_core.*.so", "page_primer/bench/_probe.*.so", "*/scripts/page-primer-warm")


@pytest.fixture(scope="module")
def tracked():
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a clone: what belongs to the project is known by git")
    return [name for name in names.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def clone(tracked, tmp_path_factory):
    """A copy of the project to build in."""
    return copy_of(tracked, tmp_path_factory.mktemp("clone"), 0o755)


def copy_of(names, directory, mode):
    """The project's files, with times and modes of their own."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, directory / name)
        (directory / name).chmod(mode if os.access(ROOT / name, os.X_OK) else mode & 0o666)
    return directory


def attempt(folder, kind, *prefix, **env):
    """Build an "sdist" or a "wheel" in a folder, with this interpreter's setuptools."""
    out = folder / "dist"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", BUILD, f"build_{kind}", str(out)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, umask=0o022,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", **env},
    )  # fmt: skip
    return done, out


def build(folder, kind, *prefix, **env):
    done, out = attempt(folder, kind, *prefix, **env)
    assert done.returncode == 0, done.stdout
    (built,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built, done.stdout


def unpacked(sdist, directory):
    subprocess.run(["tar", "-xzmf", sdist, "-C", directory], check=True)
    return directory / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def sdist(clone):
    return build(clone, "sdist")[0]


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    return build(unpacked(sdist, tmp_path_factory.mktemp("wheel")), "wheel")[0]


@pytest.mark.slow
def test_the_sdist_is_complete(tracked, sdist, tmp_path):
    """All of the project but what is about its repository."""
    tree = unpacked(sdist, tmp_path)
    there = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    wanted = {name for name in tracked if not name.startswith(".")}
    assert wanted - there == set()
    made = {name for name in there - wanted if "egg-info/" not in name}
    assert made == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_the_wheel_is_complete(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    for part in (*COMPILED, "page_primer/py.typed", "page_primer/_core.pyi"):
        assert fnmatch.filter(names, part), part
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "\nLicense-Expression: MIT OR Apache-2.0\n" in text
    assert text.count("\nLicense-File: ") == 2
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "page_primer").rglob("*.py")}
    assert sources - {*names} == set()


@pytest.mark.slow
def test_the_same_bytes_from_another_folder(tracked, sdist, wheel, tmp_path):
    """Other paths and times, and file modes that another umask gives."""
    other = build(copy_of(tracked, tmp_path / "a folder elsewhere", 0o700), "sdist")[0]
    assert digest(other) == digest(sdist), f"{other} and {sdist}"
    another = build(unpacked(other, tmp_path), "wheel")[0]
    assert another.name == wheel.name
    assert digest(another) == digest(wheel), f"{another} and {wheel}"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(wheel, directory):
    """A directory for PYTHONPATH."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}


def ask(question, env, *prefix):
    return subprocess.run(
        [*prefix, sys.executable, "-c", question], env=env, capture_output=True, text=True,
        check=True, cwd="/",
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_an_unsupported_system_needs_no_compiler(sdist, tmp_path):
    if shutil.which("setarch") is None:
        pytest.skip("no setarch (util-linux)")
    seen = subprocess.run([*OTHER_MACHINE, "uname", "-m"], capture_output=True, text=True)
    if seen.stdout.strip() in (MACHINE, ""):
        pytest.skip(f"this kernel has no other machine name: {seen.stderr or seen.stdout}")
    tree = unpacked(sdist, tmp_path)
    built, _ = build(tree, "wheel", *OTHER_MACHINE, CC="/nonexistent/cc")
    assert built.name.endswith("-py3-none-any.whl")
    env = install(built, tmp_path / "installed")
    question = "import page_primer; print(page_primer.__file__, page_primer.prime().reason)"
    file, reason = ask(question, env, *OTHER_MACHINE).split(maxsplit=1)
    assert file.startswith(str(tmp_path))
    assert reason == "not supported here\n"


def test_a_supported_system_without_a_compiler_says_what_it_needs(sdist, tmp_path):
    tree = unpacked(sdist, tmp_path)
    done, _ = attempt(tree, "wheel", CC="/nonexistent/cc")
    assert done.returncode != 0
    assert "page_primer._core needs a C compiler, Python's headers and Linux's" in done.stdout


@pytest.mark.slow
def test_what_does_not_compile_and_can_be_missing_is_named(sdist, tmp_path):
    if (gcc := shutil.which("gcc")) is None:
        pytest.skip("no gcc")
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *warm.c*|*_probe.c*) echo refused >&2; exit 1;; esac\n'
        f'exec {gcc} "$@"\n'
    )
    compiler.chmod(0o755)
    tree = unpacked(sdist, tmp_path)
    built, said = build(tree, "wheel", CC=str(compiler))
    assert 'building extension "page_primer.bench._probe" failed' in said
    assert 'building program "page-primer-warm" failed' in said
    names = zipfile.ZipFile(built).namelist()
    found = [bool(fnmatch.filter(names, part)) for part in COMPILED]
    assert found == [True, False, False]
    env = install(built, tmp_path / "installed")
    env["PAGE_PRIMER_IMAGE_DIR"] = str(tmp_path / "images")
    question = (
        "import page_primer, page_primer.bench.machine as machine; "
        "print(page_primer.__file__, page_primer.prime().reason, machine.probe())"
    )
    answer = ask(question, env)
    assert answer == f"{tmp_path}/installed/page_primer/__init__.py None []\n"


def test_cibuildwheel_builds_each():
    pytest.importorskip("cibuildwheel")
    done = subprocess.run(
        [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--archs", "x86_64,aarch64",
         "--print-build-identifiers"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = {
        f"cp{version}-{libc}_{machine}"
        for version in ("310", "311", "312", "313", "314", "314t")
        for libc in ("manylinux", "musllinux")
        for machine in ("x86_64", "aarch64")
    }
    assert set(done.stdout.split()) == wanted


def test_the_changelogs_draft_has_each_fragment(tmp_path):
    pytest.importorskip("towncrier")
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    fragments = shutil.copytree(ROOT / "changelog.d", tmp_path / "changelog.d")
    (fragments / "made-by-a-test.fixed.md").write_text("Something.\nMore of it.\n")
    command = [sys.executable, "-m", "towncrier", "build", "--version", "next"]
    draft = subprocess.run([*command, "--draft"], cwd=tmp_path, capture_output=True, text=True)
    assert draft.returncode == 0, draft.stderr
    assert "\n- Something.\n  More of it.\n" in draft.stdout
    for fragment in fragments.glob("*.md"):
        if fragment.name != "template.md":
            assert f"- {fragment.read_text().splitlines()[0]}\n" in draft.stdout, fragment.name
    subprocess.run([*command, "--yes"], cwd=tmp_path, check=True, capture_output=True)
    before = (ROOT / "CHANGELOG.md").read_text()
    after = (tmp_path / "CHANGELOG.md").read_text()
    head, marker, tail = before.partition("<!-- make changelog -->\n")
    assert after.startswith(head + marker)
    assert after.endswith(tail)
    assert "\n- Something.\n" in after
