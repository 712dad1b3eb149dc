"""benchmarks/pressure.py with MGLRU on and off, and in a guest: its options, and what it prints.
What it measures needs memory cgroups and minutes; tests/test_pressure.py has the claims."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import mglru  # noqa: E402
import pressure  # noqa: E402
from pressure_tables import Found, summarise  # noqa: E402


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """The kernel's file, as one of ours."""
    file = tmp_path / "enabled"
    file.write_text("0x0003\n")
    monkeypatch.setattr(mglru, "FILE", file)
    return file


def run(*options, **env):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "pressure.py"), *options],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_switched_and_restored(setting):
    for asked, written in (("both", ["y", "n"]), ("on", ["y"]), ("off", ["n"])):
        with mglru.switch(asked) as switch:
            for mode, text in zip(mglru.MODES[asked], written, strict=True):
                switch(mode)
                assert setting.read_text() == text
        assert setting.read_text() == "0x0003"


def test_left_alone_unless_asked(setting):
    setting.unlink()
    with mglru.switch(None) as switch:
        for mode in mglru.MODES[None]:
            switch(mode)
    assert not setting.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_restored_when_ended(setting, number):
    program = (
        f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r}); import mglru, pathlib\n"
        f"mglru.FILE = pathlib.Path({str(setting)!r})\n"
        "with mglru.switch('off') as switch:\n"
        "    switch('off'); print(flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        process.stdout.readline()
        assert setting.read_text() == "n"
        process.send_signal(number)
        assert process.wait(30) != 0
    assert setting.read_text() == "0x0003"


@pytest.mark.parametrize("there", [False, True])
def test_where_it_cannot_be_switched_one_line_says_so(setting, monkeypatch, there):
    setting.unlink()
    if there:
        setting.mkdir()  # which root cannot write to either
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["pressure.py", "--mglru", "both"])
    with pytest.raises(SystemExit) as ended:
        pressure.main()
    said = str(ended.value)
    assert said.startswith("MGLRU cannot be switched here: ")
    assert str(setting) in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mglru", "often"), "argument --mglru: invalid choice: 'often'"),
        (("--variants", "both,none"), "argument --variants: no variant is named 'none'"),
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--guest", "6.12", "--plot", "x"), "--plot is of times: not with --untimed or --guest"),
        (("--guest", "6.12", "--celery"), "--celery is not for --guest"),
    ],
)
def test_options_that_do_not_fit(options, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pressure.py", *options])
    with pytest.raises(SystemExit) as ended:
        pressure.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"pressure.py: error: {said}")


def test_without_a_clock_there_are_no_times(capsys):
    variants = [
        Found(name, [{"ms": 7.77, "major": n, "outside": n, "resident": kib << 10, "code": 1 << 20}
                     for n in (1, 2, 9)], [(7.77, 7.77)] * 3)
        for name, kib in (("unprimed", 100), ("both", 1024))
    ]  # fmt: skip
    title = "request, MGLRU off"
    result = summarise(variants, title, timed=False)
    printed = capsys.readouterr().out
    assert f"the first {title} after a quiet spell, 3 rounds\n" in printed
    assert "7.77" not in printed + json.dumps(result)
    row = next(row for row in printed.splitlines() if row.startswith("unprimed"))
    assert row.split()[1:] == ["2", "(1", "to", "9)", "2", "-", "100", "of", "1024"]
    assert result["both"]["code_resident"] == [1 << 20] * 3
    result = summarise(variants, title, timed=True)
    assert result["both"]["ms"] == [7.77] * 3
    assert "7.77" in capsys.readouterr().out


@pytest.fixture
def runner(tmp_path):
    """What boots a guest, and qemu, as programs of ours: the environment that names them."""

    def make(text):
        (tmp_path / "bin").mkdir()
        for name, script in (("boot", text), ("qemu-system-x86_64", "exit 1\n")):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}")
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return {"KERNEL_BOOT": str(tmp_path / "bin" / "boot"), "PATH": path}

    return make


def test_what_a_guest_keeps_is_kept_here(runner, tmp_path):
    answer = json.dumps({"machine": {"system": "Linux 6.12"}, "request": {}}, indent=1)
    env = runner(f"echo \"$*\"\ncat <<'end'\n\n{answer}\nend\n")
    result = tmp_path / "found.json"
    options = ["--guest", "6.12", "--mglru", "both", "--rounds", "3", "--variants", "unprimed,both"]
    done = run(*options, "--json", str(result), **env)
    assert done.returncode == 0, done.stderr
    assert "--rounds 3 --variants unprimed,both --mglru both --json /run/" in done.stdout
    assert '"machine"' not in done.stdout
    found = json.loads(result.read_text())
    assert found["command"] == f"benchmarks/pressure.py {' '.join(options)}"
    assert found["machine"] == {"system": "Linux 6.12"}
    assert found["request"] == {}


def test_a_guest_without_a_result_is_an_error(runner, tmp_path):
    done = run("--guest", "6.12", "--json", str(tmp_path / "none"), **runner("exit 125\n"))
    assert done.returncode == 1
    assert done.stderr == "no result from a guest with Linux 6.12: status 125\n"
    assert not (tmp_path / "none").exists()


def test_without_a_runner_one_line_says_so(tmp_path):
    done = run("--guest", "6.12", KERNEL_BOOT=str(tmp_path / "boot"))
    assert done.returncode == 1
    assert done.stderr == f"no runner at {tmp_path / 'boot'}: KERNEL_BOOT may name another\n"
