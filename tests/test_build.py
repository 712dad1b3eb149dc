"""`page-primer build`: an image written in one place and used in another."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import outside
import pytest
from elftools.elf.elffile import ELFFile
from launched import LAUNCHER, check_native, environment
from test_prime import require_huge_files

import page_primer

HOLD = "import sys; print(sys.prefix, flush=True); sys.stdin.read()"


def build(python, directory, **env):
    return subprocess.run(
        [LAUNCHER, "build", "--python", str(python), str(directory)], capture_output=True,
        text=True, env={**os.environ, **env},
    )  # fmt: skip


def tree(directory):
    return sorted(
        (str(path), path.lstat().st_ino, path.lstat().st_size) for path in directory.rglob("*")
    )


def copy_to(root, path):
    """A file, under another inode and with another time, where its path leads."""
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def libraries(path):
    done = subprocess.run(["ldd", path], capture_output=True, text=True)
    return [word for word in done.stdout.split() if word.startswith("/")]


def machine(root, python):
    """A tree for chroot(2) with an interpreter, its standard library and page-primer, as another
    machine of the same distribution has them; the commands to enter it, and to start in it."""
    code = (
        "import sysconfig, sys; print(sysconfig.get_path('stdlib'));"
        "print(sysconfig.get_config_var('LIBDIR'))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    stdlib = done.stdout.splitlines()[0]
    ignore = shutil.ignore_patterns(
        "*-packages", "test", "tests", "config-*", "__pycache__", "idlelib", "ensurepip", "tkinter"
    )
    shutil.copytree(
        stdlib, root / stdlib[1:], ignore=ignore, copy_function=shutil.copy, symlinks=False,
        ignore_dangling_symlinks=True,
    )  # fmt: skip
    modules = [str(path) for path in Path(stdlib, "lib-dynload").glob("*.so")]
    core = next(Path(page_primer.__file__).parent.glob("_core*.so"))
    programs = [python, "/bin/sh", LAUNCHER]
    for path in {lib for one in (*programs, *modules, str(core)) for lib in libraries(one)}:
        copy_to(root, path)
    for path in (python, "/bin/sh"):
        copy_to(root, path)
    shutil.copytree(
        Path(page_primer.__file__).parent, root / "opt/page_primer",
        ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copy,
    )  # fmt: skip
    (root / "opt/bin").mkdir()
    shutil.copy(LAUNCHER, root / "opt/bin/page-primer")
    command = root / "opt/bin/page-primer-cli"
    command.write_text(
        f"#!{python}\nimport sys\nsys.path.insert(0, '/opt')\n"
        "from page_primer.cli import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    for name in ("proc", "sys", "dev", "tmp"):
        (root / name).mkdir(exist_ok=True)
    mounts = (
        f"cd {root} && mount -t proc proc proc && mount --bind /sys sys && "
        "mount --bind /dev dev && mount --bind images images && mount -o remount,bind,ro images"
    )
    return ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root directory")
@pytest.mark.parametrize("user", ["root", "another"])
def test_in_a_fresh_chroot(base, tmp_path, user):
    """As a container's image is: written by root, mounted read-only, used by anybody."""
    require_huge_files(tmp_path)
    base = os.path.realpath(base)
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    done = build(base, tmp_path / "built")
    assert done.returncode == 0, done.stderr
    enter = machine(root, base)
    # As COPY in a Dockerfile does.
    for path in (tmp_path / "built").iterdir():
        shutil.copytree(path, root / "images" / path.name, copy_function=shutil.copy, symlinks=True)
    if subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    before = tree(root)
    ids = ["--userspec", "12345:12345"] if user != "root" else []
    for _ in range(2):
        with subprocess.Popen(
            [*enter, "chroot", *ids, str(root), "/opt/bin/page-primer", "run", "--native", "-v",
             "--", base, "-c", HOLD],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PAGE_PRIMER_IMAGE_DIR": "/images",
                 "PYTHONDONTWRITEBYTECODE": "1"},
        ) as process:  # fmt: skip
            first = process.stdout.readline()
            if not first:
                raise AssertionError(process.stderr.read())
            pid = process.pid
            mapped = outside.text_of(pid).path
            _, said = ("", "") if "-native-" in mapped else process.communicate()
            assert "/images/" in mapped, said
            check_native([pid])
            _, said = process.communicate()
            assert "started from its image in /images" in said
        assert process.returncode == 0
    assert tree(root) == before


def test_the_image_is_used(base, tmp_path):
    """And nothing is written to it but the start's record."""
    require_huge_files(tmp_path)
    images = tmp_path / "images"
    done = build(base, images)
    assert (done.returncode, done.stderr) == (0, "")
    path, advice = done.stdout.splitlines()
    assert f"PAGE_PRIMER_IMAGE_DIR={images}" in advice
    before = os.stat(path)
    with subprocess.Popen(
        [LAUNCHER, "run", "--", base, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment(images),
    ) as process:  # fmt: skip
        process.stdout.readline()
        (text,) = check_native([process.pid])
        assert text.path == path
        process.communicate()
    assert os.stat(path).st_ino == before.st_ino
    assert os.stat(path).st_mode & 0o777 == 0o555


def test_the_default_is_this_interpreter(tmp_path):
    done = subprocess.run(
        [LAUNCHER, "build", str(tmp_path / "images")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_file()


def truncated(path, size):
    path.write_bytes(Path(os.path.realpath(sys._base_executable)).read_bytes()[:size])


def for_another_processor(path):
    """The header of an arm64 program, or of an x86-64 one where this is arm64."""
    content = bytearray(Path(os.path.realpath(sys._base_executable)).read_bytes())
    content[18:20] = (62 if content[18] == 183 else 183).to_bytes(2, "little")
    path.write_bytes(content)


def text_file(path):
    path.write_text("Not a program.\n")


INPUTS = {
    "a text file": (text_file, "is not a Python interpreter"),
    "nothing": (lambda path: path.write_bytes(b""), "is not a Python interpreter"),
    "the ELF header alone": (lambda path: truncated(path, 64), ""),
    "half of a program": (lambda path: truncated(path, 4096), ""),
    "a program for another processor": (for_another_processor, "for another kind of processor"),
    "another program": (lambda path: shutil.copy("/bin/true", path), "not a Python interpreter"),
    "a directory": (lambda path: path.mkdir(), ""),
    "a script": (lambda path: path.write_text("#!/bin/sh\n"), "not a Python interpreter"),
}


@pytest.mark.parametrize("what", INPUTS)
def test_refused(tmp_path, what):
    make, said = INPUTS[what]
    name = "true" if what == "another program" else "python3.11"
    make(tmp_path / name)
    (tmp_path / name).chmod(0o755)
    done = build(tmp_path / name, tmp_path / "images")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("page-primer: ") and said in line, line
    assert "Traceback" not in line
    assert not list(tmp_path.glob("images/*/python*"))


@pytest.mark.parametrize(
    ("python", "directory", "said"),
    [
        (sys.executable, "relative", "absolute"),
        (sys.executable, "/proc/images", "/proc/images"),
        (sys.executable, "/etc/passwd", "/etc/passwd"),
        ("/nonexistent", "/tmp/unused", "/nonexistent: No such file"),
        ("no-such-python", "/tmp/unused", "no-such-python: No such file"),
        ("/etc/passwd", "/tmp/unused", "/etc/passwd: Permission denied"),
    ],
)
def test_mistakes(python, directory, said):
    done = build(python, directory)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("page-primer: ") and said in line, line


def test_the_header_is_loadable(base, tmp_path):
    """One r-x PT_LOAD over the read-only span, on a huge page's boundary; the program headers lie
    in it; readers of ELF files have no complaint."""
    done = build(base, tmp_path / "images")
    path = done.stdout.splitlines()[0]
    with open(path, "rb") as file:
        elf = ELFFile(file)
        loads = [segment.header for segment in elf.iter_segments("PT_LOAD")]
        text = elf.get_section_by_name(".text").header
        (code,) = [load for load in loads if load["p_flags"] & 1]
        assert code["p_align"] == outside.PMD
        assert (code["p_vaddr"] - code["p_offset"]) % outside.PMD == 0
        assert code["p_vaddr"] <= text["sh_addr"]
        assert text["sh_addr"] + text["sh_size"] <= code["p_vaddr"] + code["p_memsz"]
        end = elf["e_phoff"] + elf["e_phnum"] * elf["e_phentsize"]
        assert code["p_offset"] <= elf["e_phoff"] < end <= code["p_offset"] + code["p_filesz"]
        assert not any(load["p_flags"] & 3 == 3 for load in loads)
    checked = subprocess.run(["readelf", "-lSW", path], capture_output=True, text=True)
    assert checked.returncode == 0
    assert textwrap.dedent(checked.stderr) == ""
