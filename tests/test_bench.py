"""`page-primer bench`: its statistics on synthetic data, and the command on real servers."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.schemas import validated
from harness.servers import NO_CONTROL_SOCKET, Server, free_port, wait_for

from page_primer.bench import intervals, variants

HERE = Path(__file__).parent
BENCH = [sys.executable, "-m", "page_primer", "bench"]
SERVER = str(HERE / "harness" / "benchserver.py")


# --- statistics -----------------------------------------------------------------------------------


def rounds_of(count, effect, seed, noise=0.02):
    """Paired values: what slows a round slows both, and each has noise of its own."""
    generator = random.Random(seed)
    baseline, values = [], []
    for _ in range(count):
        machine_now = generator.gauss(0, 0.1)
        baseline.append(math.exp(machine_now + generator.gauss(0, noise)))
        values.append(effect * math.exp(machine_now + generator.gauss(0, noise)))
    return values, baseline


def verdicts(count, effect, seeds):
    ratios = [intervals.ratio(*rounds_of(count, effect, seed)) for seed in seeds]
    return [intervals.verdict(found) for found in ratios]


def test_no_difference_is_called_one_in_nineteen_of_twenty_runs():
    said = verdicts(12, 1.0, range(20))
    assert sum(line.startswith("no measurable difference") for line in said) >= 19, said
    many = verdicts(12, 1.0, range(1000))
    differ = sum(not line.startswith("no measurable difference") for line in many)
    assert 20 <= differ <= 65, differ  # 5 % by construction, 4.2 % with 12 rounds


def test_three_percent_are_seen():
    said = verdicts(40, 1.03, range(20))
    assert all(re.match(r"slower: \d\.\d % more processor time a request \(95 %:", line)
               for line in said), said  # fmt: skip
    said = verdicts(40, 1 / 1.03, range(20))
    assert all(re.match(r"\d\.\d % less processor time a request \(95 %:", line)
               for line in said), said  # fmt: skip


def test_one_percent_is_seen_in_more_rounds():
    assert sum(line.startswith("slower") for line in verdicts(20, 1.01, range(40))) < 30
    assert sum(line.startswith("slower") for line in verdicts(150, 1.01, range(40))) >= 38


def test_rounds_that_are_missing_show_one_percent():
    """As many more as a run without a difference asks for do show 1 %, in four of five cases."""
    asked = [intervals.ratio(*rounds_of(20, 1.0, seed)) for seed in range(100)]
    needed = sorted(20 + found.more_rounds for found in asked)[50]
    seen = verdicts(needed, 1.01, range(1000, 1200))
    assert 0.7 <= sum(line.startswith("slower") for line in seen) / 200 <= 0.95, needed


def test_one_disturbed_round_moves_no_verdict():
    values, baseline = rounds_of(20, 0.97, 1)
    calm = intervals.ratio(values, baseline)
    values[3] *= 5
    disturbed = intervals.ratio(values, baseline)
    assert disturbed.high < 1
    assert disturbed.middle == pytest.approx(calm.middle, abs=0.01)


@pytest.mark.parametrize(
    ("count", "critical"), [(6, 0), (7, 2), (8, 3), (9, 5), (10, 8), (12, 13), (20, 52), (50, 434)]
)
def test_critical_values(count, critical):
    """Of the signed-rank statistic at 2.5 %: tables in textbooks (Hollander, Wolfe, Chicken)."""
    assert intervals._left_aside(count) == critical


def test_exact_and_approximate_critical_values_meet():
    exact = intervals._left_aside(intervals._EXACT_UP_TO)
    following = intervals._left_aside(intervals._EXACT_UP_TO + 1)
    assert 0 < following - exact < 60


def test_verdicts_of_little():
    assert intervals.verdict(intervals.ratio([1.0] * 5, [1.0] * 5)) == (
        "no verdict: 5 of the 6 rounds that one needs"
    )
    assert intervals.verdict(intervals.ratio([], [])) == "no measurement"
    assert intervals.verdict(intervals.ratio([0.0], [1.0])) == "no measurement"
    assert intervals.verdict(intervals.ratio([1.0] * 9, [1.0] * 9)) == (
        "no measurable difference (95 %: 0.0 % less to 0.0 % more)"
    )
    one = intervals.Ratio(1.0, 0.98, 1.02, 20)
    assert intervals.verdict(one) == (
        f"no measurable difference; {one.more_rounds} more rounds would show 1 %"
    )
    assert intervals.verdict(intervals.Ratio(0.979, 0.97, 0.988, 9)) == (
        "2.1 % less processor time a request (95 %: 1.2 to 3.0)"
    )


# --- variants -------------------------------------------------------------------------------------


def test_variants():
    found = variants.parse("code,off,off2,mine:limit=128M:include=a;b,aligned:heap=all,vmtouch")
    assert [one.name for one in found] == ["off", "code", "off2", "mine", "aligned", "vmtouch"]
    by_name = {one.name: one for one in found}
    assert by_name["off"].environment({"PAGE_PRIMER": "1", "A": "b"}) == {
        "PAGE_PRIMER": "0", "A": "b",
    }  # fmt: skip
    assert by_name["mine"].environment({"PAGE_PRIMER": "0"}) == {
        "PAGE_PRIMER_LIMIT": "128M", "PAGE_PRIMER_INCLUDE": "a,b",
    }  # fmt: skip
    assert by_name["off2"].command(["x"]) == by_name["vmtouch"].command(["x"]) == ["x"]
    assert by_name["aligned"].aligned
    assert by_name["aligned"].command(["x"])[-4:] == ["page_primer", "run", "--", "x"]
    assert not variants.parse("aligned")[1].primed


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("cod", "'cod' is none of off, mlock, code"),
        ("off", "nothing to compare"),
        ("code,code", "code is there twice"),
        ("mine:colour=red", "'colour=red' is no option=value of remap, mlock"),
        ("mine:limit=banana", "limit must be a number of bytes"),
        ("off:limit=1", "off has no options"),
        ("a b:limit=1", "'a b' is none of"),
    ],
)
def test_variants_that_are_none(text, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        variants.parse(text)


# --- the command, on real servers -----------------------------------------------------------------


def left_over(mark):
    """Processes with a mark in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(mark).encode() in words and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
    return found


class Run:
    """One run of the command on benchserver.py, which has a mark: its port, or a word."""

    def __init__(self, tmp_path, *options, behaviour=(), port=None, path="/"):
        self.port = port or free_port()  # "{port}": one for each variant
        self.mark = f"mark-{free_port()}" if port == "{port}" else self.port
        self.json = tmp_path / "result.json"
        self.command = [
            *BENCH, "--url", f"http://127.0.0.1:{self.port}{path}", "--json", str(self.json),
            "--variants", "off,mlock", "--requests", "40", "--connections", "4", *options, "--",
            sys.executable, SERVER, str(self.port), *behaviour, str(self.mark),
        ]  # fmt: skip
        self.environ = {**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(tmp_path)}

    def wait(self, seconds=600):
        done = subprocess.run(
            self.command, capture_output=True, text=True, timeout=seconds, env=self.environ,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert left_over(self.mark) == []
        return done

    def start(self):
        return subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environ, stdin=subprocess.DEVNULL,
            # What runs the tests may ignore it (a job in the background), and then we would.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def failure(self):
        """The only line of a run that cannot begin."""
        done = self.wait()
        assert done.returncode == 1, done.stderr
        assert done.stdout == ""
        lines = [line for line in done.stderr.splitlines() if not line.startswith("trying ")]
        assert len(lines) == 1, lines
        return lines[0].removeprefix("page-primer: bench: ")


@pytest.mark.slow
def test_a_slower_variant_is_called_slower(tmp_path):
    """A real server that works thrice as long where an option has a certain value."""
    done = Run(
        tmp_path, "--rounds", "6", "--variants", "off,slow:exclude=slow:mlock=off:remap=off",
        behaviour=["works"],
    ).wait()  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^slow: slower: \d+\.\d % more processor time a request \(95 %: ",
                     done.stdout, re.MULTILINE), done.stdout  # fmt: skip
    result = validated("bench", json.loads((tmp_path / "result.json").read_text()))
    assert len(result["rounds"]) == 6
    assert result["variants"]["slow"]["ratios"]["cpu_ms"]["low"] > 1
    assert {"processor", "cores", "system"} <= result["machine"].keys()
    medians = result["variants"]["off"]["medians"]
    assert medians["cpu_ms"] >= 1
    assert medians["p50_ms"] <= medians["p99_ms"] <= medians["max_ms"]
    assert 0 < medians["private_mib"] <= medians["pss_mib"]
    assert 0 < medians["start_s"] < 60
    assert "minor_faults" in medians
    assert result["settings"]["requests"] == 40
    assert all(row["ratio"] > 0 for row in result["tlb_probe"])
    assert "round 5 of 6: processor ms: " in done.stderr


@pytest.mark.slow
def test_variants_side_by_side(tmp_path):
    """Each has a port of its own, and they take turns; memory is that of one which is alone."""
    variants = "off,slow:exclude=slow:mlock=off:remap=off"
    data = tmp_path / "data"
    data.write_bytes(bytes(32 << 20))
    done = Run(
        tmp_path, "--rounds", "6", "--variants", variants, behaviour=["works", f"maps={data}"],
        port="{port}",
    ).wait()  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 rounds, every variant side by side, in turns; medians" in done.stdout
    assert re.search(r"^slow: slower: \d+\.\d % more processor time a request \(95 %: ",
                     done.stdout, re.MULTILINE), done.stdout  # fmt: skip
    result = validated("bench", json.loads((tmp_path / "result.json").read_text()))
    assert result["side_by_side"]
    for name in ("off", "slow"):
        of_each = [found[name] for found in result["rounds"]]
        assert sum("pss_mib" in found for found in of_each) == 3
        assert all(found["cpu_ms"] >= (1 if name == "off" else 3) for found in of_each)
        medians = result["variants"][name]["medians"]
        assert 32 < medians["private_mib"] <= medians["pss_mib"]
        assert medians["p50_ms"] <= medians["p99_ms"] <= medians["max_ms"]
    assert "pages of files are locked" not in done.stdout
    assert "pss_mib" not in result["variants"]["slow"]["ratios"]


@pytest.mark.slow
def test_daemons_side_by_side(tmp_path):
    """Nobody knows of which variant one is; none is left when a round has ended."""
    run = Run(tmp_path, "--rounds", "5", behaviour=["leaves"], port="{port}")
    process, most = run.start(), 0
    while process.poll() is None:
        most = max(most, sum("time.sleep(600)" in text and str(run.mark) in text
                             for text in all_commands()))  # fmt: skip
        time.sleep(0.05)
    out, _ = process.communicate()
    assert process.returncode == 1
    assert 1 <= most <= 3  # two variants', and for a moment one between fork and exec
    assert left_over(run.mark) == []
    lines = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 3
    assert re.fullmatch(r"left out: round 1, process \d+ of a server made itself a daemon, .*",
                        lines[0]), lines  # fmt: skip


@pytest.mark.slow
def test_gunicorn_primed(tmp_path, images):
    """What the variants obtain is what the kernel says: here of gunicorn's workers."""
    (tmp_path / "app.py").write_text(
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Length', '2')])\n"
        "    return [b'ok']\n"
    )
    done = subprocess.run(
        [*BENCH, "--url", "http://127.0.0.1:{port}/", "--url", "http://127.0.0.1:{port}/other",
         "--variants", "off,mlock,code", "--requests", "200", "--rounds", "1", "--json",
         "result.json", "--plot", "result.svg", "--", sys.executable, "-m", "gunicorn",
         *NO_CONTROL_SOCKET, "-w", "2", "-b", "127.0.0.1:{port}", "app:app"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(images)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = validated("bench", json.loads((tmp_path / "result.json").read_text()))
    obtained = {name: found["obtained"] for name, found in result["variants"].items()}
    assert obtained["off"]["locked_mib"] == 0 < obtained["mlock"]["locked_mib"]
    assert obtained["code"]["code_huge"] > obtained["off"]["code_huge"]
    assert 0 <= obtained["code"]["heap_huge"] <= 1
    assert result["variants"]["off"]["medians"]["workers"] in (1, 2)
    assert "no verdict: 1 of the 6 rounds" in result["variants"]["code"]["verdict"]
    assert "mlock: pages of files are locked for every process" in done.stdout
    assert "<svg" in (tmp_path / "result.svg").read_text()


# --- failures -------------------------------------------------------------------------------------


def test_a_server_that_ends_as_it_starts(tmp_path):
    run = Run(tmp_path, behaviour=["fails"])
    assert run.failure() == (
        "off: the server ended with status 3: this is why, before it answered "
        f"http://127.0.0.1:{run.port}/"
    )


def test_a_server_that_does_not_answer(tmp_path):
    run = Run(tmp_path, "--start-timeout", "1", behaviour=["silent"])
    assert run.failure() == f"off: no answer from http://127.0.0.1:{run.port}/ within 1 s"


def test_a_command_that_does_not_exist(tmp_path):
    run = Run(tmp_path)
    run.command[run.command.index("--") + 1 :] = ["no-such-server"]
    assert run.failure() == "no-such-server: command not found"


@pytest.mark.slow
@pytest.mark.parametrize(("path", "status"), [("/missing", 404), ("/broken", 500)])
def test_a_url_that_fails(tmp_path, path, status):
    run = Run(tmp_path, path=path)
    url = f"http://127.0.0.1:{run.port}{path}"
    assert run.failure() == f"off: {url} is answered with status {status}"


def test_a_port_in_use(tmp_path):
    port = free_port()
    with Server(tmp_path, port, sys.executable, SERVER, str(port)) as other:
        run = Run(tmp_path, port=port)
        done = subprocess.run(run.command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == (
            f"page-primer: bench: off: port {port} of 127.0.0.1 is in use by another process: "
            "stop it, or give this server another port"
        )
        assert other.process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize(("port", "asked"), [(None, "200"), ("{port}", r"\d+")])
def test_a_server_that_dies_under_load(tmp_path, port, asked):
    """The trial's 14 requests pass; every round is cut short, and after three it is over."""
    done = Run(tmp_path, "--requests", "200", behaviour=["dies"], port=port).wait()
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(
            rf"left out: round {number}, (off|mlock): the server ended with status 9: out of luck; "
            rf"\d+ of {asked} requests failed", line,
        ), line  # fmt: skip
    assert "ended early: 3 rounds were cut short" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_prints_what_is_known(tmp_path, number):
    run = Run(tmp_path, "--rounds", "1000", "--requests", "8")
    process = run.start()
    for line in process.stderr:
        if line.startswith("round 2"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "ended early: interrupted" in out
    rounds = len(validated("bench", json.loads(run.json.read_text()))["rounds"])
    assert 2 <= rounds < 1000
    if rounds < 6:  # or more, where this process waits for a processor meanwhile
        assert re.search(rf"^mlock: no verdict: {rounds} of the 6 rounds", out, re.MULTILINE), out
    # But for what CPython prints where the signal came while bench forked.
    ignored = r"^Exception ignored in.*?^KeyboardInterrupt.*?$"
    assert "Traceback" not in re.sub(ignored, "", err, flags=re.MULTILINE | re.DOTALL), err
    assert left_over(run.port) == []


@pytest.mark.slow
def test_an_interrupt_under_load_leaves_nothing(tmp_path):
    """The load generator waits for answers that do not come."""
    run = Run(tmp_path, "--requests", "200", behaviour=["hangs"])
    process = run.start()
    wait_for(lambda: any("hangs" in text for text in commands_of(run.port)), "the server")
    for line in process.stderr:
        if line.startswith("measuring"):
            break
    helper = functools.partial(children_named, process.pid, "h2load", "python")
    wait_for(lambda: helper(), "the load generator")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "ended early: interrupted" in out
    assert left_over(run.port) == []
    assert f":{run.port}/" not in " ".join(all_commands())


@pytest.mark.slow
def test_everything_that_a_server_started_ends(tmp_path):
    """Also what made itself a session of its own and ignores SIGTERM."""
    done = Run(tmp_path, "--rounds", "1", "--variants", "off,off2", behaviour=["stubborn"]).wait()
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--url", "http://127.0.0.1/"], "bench: no command"),
        (["--", "true"], "bench: give one of --url, --celery-task and --command"),
        (["--command", "--url", "http://127.0.0.1/", "--", "true"], "bench: give one of"),
        (["--url", "ftp://127.0.0.1/", "--", "true"], "is no http:// or https:// URL"),
        (["--command", "--variants", "cod", "--", "true"], "'cod' is none of"),
        (["--command", "--minutes", "0", "--", "true"], "--minutes must be above 0"),
        (["--command", "--variants", "vmtouch", "--", "true"], "vmtouch needs a server"),
        (["--celery-task", "t", "--", "true"], "`true` names no application"),
        (
            ["--url", "http://127.0.0.1:{port}/", "--", "true"],
            "--url: http://127.0.0.1:{port}/: {port} is in it, but not in the command",
        ),
        (
            ["--url", "http://127.0.0.1:80/", "--", "true", "{port}"],
            "--url: http://127.0.0.1:80/: {port} is in the command, but not in it",
        ),
        (["--url", "http://127.0.0.1:x/", "--", "true"], "is no http:// or https:// URL"),
        (
            ["--url", "http://127.0.0.1/", "--side-by-side", "--", "true"],
            "--side-by-side is for --command: of a server, write {port} in its command",
        ),
        (
            ["--celery-task", "t", "--", "celery", "-A", "t", "{port}"],
            "{port} in the command is for --url",
        ),
        (
            ["--url", "http://127.0.0.1/", "--", "true", "{queue}"],
            "{queue} in the command is for --celery-task",
        ),
        (
            ["--url", "http://127.0.0.1:1{port}/", "--", "true", "{port}"],
            "'http://127.0.0.1:165535/' is no http:// or https:// URL: Port out of range 0-65535",
        ),
    ],
)
def test_wrong_command_lines(words, line):
    done = subprocess.run([*BENCH, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1


def all_commands():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def commands_of(port):
    return [text for text in all_commands() if f"benchserver.py {port} " in text]


def children_named(pid, *names):
    found = subprocess.run(["ps", "-o", "comm=", "--ppid", str(pid)], capture_output=True,
                           text=True).stdout.split()  # fmt: skip
    return len(found) >= 2 and any(name.startswith(names) for name in found)
