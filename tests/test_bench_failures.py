"""`page-primer bench`: what it says where something fails, part by part."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from harness.servers import wait_for

from page_primer.bench import command, counters, load, machine, plot, rounds, server, vmtouch
from page_primer.bench.celery import Task
from page_primer.bench.failures import CutShort, Failure
from page_primer.bench.interpreter import Copy, start_of
from page_primer.bench.intervals import Ratio
from page_primer.bench.progress import Progress
from page_primer.bench.report import Report
from page_primer.bench.rounds import Course, Plan
from page_primer.bench.variants import Variant

BENCH = [sys.executable, "-m", "page_primer", "bench"]
OFF, PRIMED, MINE = Variant("off"), Variant("primed"), Variant("mine")


def program(text, *arguments):
    """Run a program of its own: being a subreaper is a property of a process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments], capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- the command ----------------------------------------------------------------------------------


def test_a_number_below_1(capsys):
    with pytest.raises(SystemExit) as ended:
        command.parser().parse_args(["--rounds", "0"])
    assert ended.value.code == 2
    assert "argument --rounds: 0 is not above 0" in capsys.readouterr().err


def test_an_interrupt_before_the_first_round(tmp_path):
    script = f"echo > {tmp_path}/started; exec sleep 60"
    words = ["--command", "--variants", "off,mlock", "--", "sh", "-c", script]
    with subprocess.Popen([*BENCH, *words], stderr=subprocess.PIPE, text=True) as process:
        wait_for((tmp_path / "started").exists, "the command's start", 60)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=100)
    assert error.splitlines() == [
        "trying off", "page-primer: bench: interrupted before the first round"
    ]  # fmt: skip
    assert process.returncode == 130


def test_a_file_that_cannot_be_written(tmp_path):
    """And of an interpreter with another file's code there is a round all the same."""
    result = tmp_path / "missing" / "result.json"
    words = ["--command", "--variants", "off,aligned", "--rounds", "1", "--json", str(result)]
    done = subprocess.run(
        [*BENCH, *words, "--", sys.executable, "-c", "pass"], capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == (
        f"page-primer: bench: --json: {result}: No such file or directory"
    )
    assert done.returncode == 1
    assert "aligned: no verdict: 1 of the 6 rounds that one needs" in done.stdout


# --- what is measured -----------------------------------------------------------------------------


def test_rounds_end_in_time_and_after_three_that_were_cut_short():
    assert rounds.go([OFF], lambda *_: {}, Plan(5, -1.0)) == Course()

    def cut_short(order, told):
        raise CutShort(f"{order[0].name}: it stopped")

    course = rounds.go([OFF], cut_short, Plan(5))
    assert course.left_out == [f"round {number}, off: it stopped" for number in (1, 2, 3)]
    assert course.ended == "3 rounds were cut short"


def test_what_few_rounds_do_not_say():
    few, many = Ratio(1.1, None, None, 3), Ratio(1.1, 1.05, 1.2, 20)
    assert few.more_rounds == 0
    assert not few.differs and many.differs


def report_of(*measured):
    names = list(measured[0])
    return Report(["true"], {}, names, Course(rounds=list(measured)), "run")


def test_it_began_before_its_first_round():
    course = rounds.go([OFF], lambda *_: {"off": {"cpu_ms": 1.0, "at": time.time()}}, Plan(2))
    assert course.began <= course.rounds[0]["off"]["at"]
    course.began = 86400.0
    assert Report([], {}, ["off"], course, "run").as_dict()["began"] == "1970-01-02T00:00:00Z"


def test_a_number_that_one_variant_lacks(tmp_path):
    """It has no ratio in the table, and no mark in the picture."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    both = {"cpu_ms": 2.0, "wall_ms": 4.0}
    report = report_of({"off": both, "primed": both, "mine": {"cpu_ms": 1.0}})
    rows = {row[0]: row[1:] for row in report._rows()}
    assert rows["wall ms"] == ["4.0", "4.0", ""]
    assert report._rows()[-1] == ["  ratio", "", "1.000", ""]
    plot.write(report, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Failure, match=r"--plot: .*No such file or directory"):
        plot.write(report, str(tmp_path / "missing" / "picture.png"))
    with pytest.raises(Failure, match="--plot: Format 'nothing' is not supported"):
        plot.write(report, str(tmp_path / "picture.nothing"))


def test_a_machine_whose_huge_pages_are_small():
    rows = [{"pages": 512, "small_ns": 9.0, "huge_ns": 3.0, "ratio": 3.0},
            {"pages": 65536, "small_ns": 50.0, "huge_ns": 49.0, "ratio": 50 / 49}]  # fmt: skip
    said = machine.judge(rows)
    assert said.startswith("pointer chase over 256 MiB: 50.0 ns an access on 4 KiB pages, 49.0 on")
    assert "ratio 1.02: huge pages are not huge to this processor" in said


def test_counters_of_a_processor_that_is_not_known(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        counters._perf_event_open(1, 2, os.getpid())


def test_progress_on_a_terminal(monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    master, slave = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    course = Course(rounds=[{}])
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress(Plan(2), 2) as progress:
            progress.note("trying primed")
            progress.told(course, PRIMED, 1)
            assert progress._bar.tasks[0].completed == 0.75  # of the second of two rounds, half
            assert progress._share(1, 0) == 0.5
        with Progress(Plan(1000, 1e-9), 2) as progress:
            assert progress._share(1, 0) > 1  # its time is over
        monkeypatch.undo()
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed: a terminal's end of file
        while part := os.read(master, 1 << 16):
            written += part
    os.close(master)
    assert b"trying primed" in written and b"round 2: primed" in written


# --- processes ------------------------------------------------------------------------------------


def test_a_process_that_is_no_longer_there():
    """Nothing is measured of it, and nothing waited for."""
    assert program("""
        import subprocess
        from page_primer.bench import vmtouch
        from page_primer.bench.tree import Adopted, average
        process = subprocess.Popen(["true"])
        process.wait()
        print(Adopted()._reap(process.pid), average([process.pid]), vmtouch._maps(process.pid))
        """) == ["True None []"]


def test_how_a_server_ended():
    assert program("""
        import os, time
        from page_primer.bench.failures import Failure
        from page_primer.bench.server import Process
        from page_primer.bench.tree import Adopted
        tree = Adopted()
        with Process(["sh", "-c", "echo told; kill -9 $$"], os.environ, tree,
                     alone=True) as process:
            while not process.ended():
                time.sleep(0.01)
            print(process.ended())
        try:
            Process(["/nonexistent/server"], os.environ, tree, alone=True).__enter__()
        except Failure as failure:
            print(failure)
        """) == [
        "ended by SIGKILL: told", "/nonexistent/server: No such file or directory"
    ]  # fmt: skip


def test_a_server_with_a_certificate_that_nobody_knows(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=other", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a?b" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as served:
        served.socket = context.wrap_socket(served.socket, server_side=True)
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            port = served.server_address[1]
            assert server.Address.of(f"https://127.0.0.1:{port}/a?b").get() == 200
        finally:
            served.shutdown()
            thread.join()


# --- load, tasks, vmtouch -------------------------------------------------------------------------


def test_a_load_generator_that_does_not_end(monkeypatch):
    monkeypatch.setattr(load, "_SECONDS", 0.1)
    helpers = set()
    with pytest.raises(CutShort, match="no answer to all requests within 0 s"):
        load.run_helper(["sleep", "100"], helpers)
    assert helpers == set()


@pytest.mark.skipif(not shutil.which(load.H2LOAD), reason="h2load is not installed")
def test_h2load_that_fails():
    with pytest.raises(CutShort, match=r"h2load ended with status \d+: \['.+'\]"):
        load._by_h2load(["nonsense"], 1, 1, set())


def test_aiohttp_that_fails():
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    with pytest.raises(CutShort, match="client ended with status 1: ZeroDivisionError: "):
        load._by_aiohttp([], 1, 1, set())


def test_the_application_of_a_celery_task():
    words = [sys.executable, "-m", "celery", "--app=work", "worker"]
    task = Task.of(["add", "1", '"2"', "three"], words, os.environ)
    assert task == Task(sys.executable, "work", "add", [1, "2", "three"])


def test_a_celery_worker_that_does_not_answer(tmp_path):
    """Nor a driver: one that ends, one that says nothing, and one that never answers."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    assert program(
        """
        import os, sys, time
        from page_primer.bench import celery
        from page_primer.bench.celery import Client, Task
        from page_primer.bench.failures import CutShort, Failure
        from page_primer.bench.server import Process
        from page_primer.bench.tree import Adopted
        task, tree, helpers = Task("/bin/false", "work", "add", []), Adopted(), set()
        with Process(["sh", "-c", "echo told; exit 3"], os.environ, tree, alone=True) as process:
            while not process.ended():
                time.sleep(0.01)
            for seconds, queue in ((100, ""), (0, ""), (0, "mine")):
                with Client(task, queue, helpers) as client:
                    try:
                        client.wait_until_ready(process, seconds)
                    except Failure as failure:
                        print(failure)
        celery._SECONDS = celery._FORGET_SECONDS = 0.2
        for python in ("/bin/false", sys.argv[1]):
            with Client(Task(python, "work", "add", []), "", helpers) as client:
                try:
                    client._ask("send", 1, 1, seconds=0.2)
                except CutShort as failure:
                    print(failure)
                print(client.forget())
        print(helpers, tree.processes())
        """,
        str(python),
    ) == [
        "the worker ended with status 3: told, before it answered",
        "no answer from a worker within 0 s: told",
        "no answer from a worker of queue mine within 0 s: told",
        "sending tasks ended with status 1: no output",
        "False",
        "no answer to all tasks within 0 s",
        "False",
        "set() []",
    ]


def test_vmtouch_that_is_missing_or_locks_nothing(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Failure, match="vmtouch: command not found"):
        vmtouch.check()
    monkeypatch.undo()
    monkeypatch.setattr(vmtouch, "_LOCK_SECONDS", 0.05)
    process = subprocess.Popen(["sleep", "100"], text=True)
    try:
        with pytest.raises(Failure, match="it locked nothing"):
            vmtouch._wait_for_locks(process)
    finally:
        process.kill()
        process.wait()


# --- aligned interpreters -------------------------------------------------------------------------


def test_a_command_that_cannot_be_read(tmp_path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(tmp_path / "server"))
        (tmp_path / "server").chmod(0o755)
        with pytest.raises(Failure, match="/server: No such device or address"):
            start_of([str(tmp_path / "server")], os.environ)


def fail_to_copy(*words):
    """The failure; the copy's directory is gone."""
    copy = Copy(words, os.environ)
    with pytest.raises(Failure) as failed:
        copy.__enter__()
    assert not os.path.exists(copy._directory.name)
    return str(failed.value)


def test_what_cannot_be_copied_and_aligned(tmp_path):
    why = f"aligned: {shutil.which('true')} does not answer as a Python interpreter"
    assert fail_to_copy("true").startswith(why)
    # An interpreter whose code is in a file of another kind, as far as it says itself.
    code, python = tmp_path / "code", tmp_path / "python"
    code.write_text("text")
    python.write_text(f'#!/bin/sh\necho \'["/bin/sh", "{code}", []]\'\n')
    python.chmod(0o755)
    script = tmp_path / "script"
    script.write_text(f"#!{python}\n")
    script.chmod(0o755)
    assert fail_to_copy(str(script)) == f"aligned: {code}: not an ELF file"


def test_an_interpreter_that_loads_another_file(tmp_path):
    copy = str(tmp_path / "libpython3.so")
    with pytest.raises(Failure, match=r"does not load the aligned copy \(DT_RPATH\?\)"):
        Copy([], os.environ)._check(sys.executable, {}, copy)
