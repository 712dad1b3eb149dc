"""Each example, run as its README says, and looked at in smaps; and what Compose would start."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from harness import outside
from harness.placement import has_random_addresses
from harness.privileges import has_images
from harness.servers import NO_CONTROL_SOCKET, Server, check, children, free_port, get, wait_for

EXAMPLES = Path(__file__).parents[1] / "examples"
BIN = Path(sys.executable).parent


@pytest.fixture
def examples(tmp_path):
    """A copy: servers leave files where they run."""
    return shutil.copytree(EXAMPLES, tmp_path / "examples")


def documented(directory, program):
    """The README's command line that runs a program: variables, arguments."""
    lines = re.findall(r"^    (.*)$", (directory / "README.md").read_text(), re.MULTILINE)
    for line in lines:
        words = shlex.split(line)
        variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
        if words[len(variables)] == program:
            return dict(word.split("=", 1) for word in variables), words[len(variables) + 1 :]
    raise AssertionError(f"{directory}/README.md has no {program}")


def gunicorn(directory, arguments, port, env):
    command = [BIN / "gunicorn", *arguments, *NO_CONTROL_SOCKET, "--bind", f"127.0.0.1:{port}"]
    return Server(directory, port, *command, env=env)


def uvicorn(directory, arguments, port, env):
    return Server(directory, port, BIN / "uvicorn", *arguments, "--port", str(port), env=env)


def python_children(server):
    """The processes that serve: those with the interpreter's code, of the server's children."""
    return [
        pid for pid in children(server.pid)
        if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()
    ]  # fmt: skip


def health(server):
    return json.loads(server.get("/health"))


def wait_for_workers(server, count):
    """Until so many workers have answered; their answers, by process."""
    answers = {}

    def each():
        answer = health(server)
        answers[answer["pid"]] = answer
        return len(answers) >= count

    wait_for(each, f"answers of {count} workers")
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "program", "start", "path", "content"),
    [
        ("django", "gunicorn", gunicorn, "/price/teapot", {"article": "teapot", "price": 12}),
        ("fastapi", "uvicorn", uvicorn, "/celsius/20", {"celsius": 20.0, "fahrenheit": 68.0}),
    ],
)
def test_four_workers(examples, images, name, program, start, path, content):
    pytest.importorskip(name)
    env, arguments = documented(examples / name, program)
    env["PAGE_PRIMER_IMAGE_DIR"] = str(images)
    with start(examples / name, arguments, free_port(), env) as server:
        answers = wait_for_workers(server, 4)
        assert set(answers) == set(python_children(server))
        check(answers)
        for pid, answer in answers.items():
            assert answer["primed"] and answer["reason"] is None, answer
            assert answer["code_huge_bytes"] >= outside.text_of(pid).huge, server.log()
        assert json.loads(server.get(path)) == content
        assert "page-primer: " in server.log()


@pytest.mark.slow
def test_gunicorn_demo(examples, images):
    done = demo(examples / "gunicorn", images)
    assert re.search(r"page-primer: [\d.]+ % of \S+ [\d.]+ MiB of code on huge pages", done)
    assert done.count("400 requests answered") == 2
    # The unprimed server beside the primed one, in numbers.
    rows = dict(re.findall(r"^  (executable|locked|memory)\b.*?  +(\d.*)$", done, re.MULTILINE))
    numbers = {row: [float(n) for n in re.findall(r"\d+\.\d", rows[row])] for row in rows}
    plain_huge, _, primed_huge, code = numbers["executable"]
    assert plain_huge < primed_huge <= code, done
    assert numbers["locked"][0] == 0 < numbers["locked"][1], done
    assert len(numbers["memory"]) == 2, done


@pytest.mark.slow
@pytest.mark.usefixtures("broker")  # the demo starts its own; skipped where there is none
def test_celery_demo(examples, images):
    for package in ("celery", "redis", "numpy", "pandas"):
        pytest.importorskip(package)
    done = demo(examples / "celery", images)
    assert "20 tasks done" in done
    found = importlib.util.find_spec("numpy").submodule_search_locations[0]
    (module,) = Path(found).glob("*core/_multiarray_umath.*.so")
    # At random addresses what is hot of it may lie in no whole huge page.
    name = "(?!libcrypto)" if has_random_addresses(str(module)) else "_multiarray_umath"
    row = rf"^ +{name}\S+ +\S+ +[\d.]+ MiB +[1-9]\S* %"
    assert re.search(row, done.rpartition("$ page-primer status ")[2], re.MULTILINE), done


def demo(directory, images):
    done = subprocess.run(
        [sys.executable, "demo.py"], cwd=directory, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(images)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- Docker Compose


@pytest.fixture(scope="module")
def compose():
    yaml = pytest.importorskip("ruamel.yaml").YAML(typ="safe")
    return {
        name: yaml.load((EXAMPLES / "compose" / name).read_text())
        for name in ("compose.yaml", "prometheus.yml")
    }


class Service:
    """A service's command, run here: in its directory of the examples, with ports of our own
    instead of those that it has in its container."""

    def __init__(self, examples, name, service, broker, figures, images):
        arguments = shlex.split(service["command"])
        env = {key: str(value) for key, value in service["environment"].items()}
        self.ports = {}  # in the container -> here
        for at, word in enumerate(arguments):
            if found := re.fullmatch(r"(0\.0\.0\.0:|)(8\d\d\d)", word):
                here = self.ports.setdefault(int(found[2]), free_port())
                arguments[at] = f"127.0.0.1:{here}" if found[1] else str(here)
        if "METRICS_PORT" in env:
            here = self.ports[int(env["METRICS_PORT"])] = free_port()
            env["METRICS_PORT"] = str(here)
        if "BROKER" in env:
            assert urllib.parse.urlsplit(env["BROKER"]).hostname == "redis"
            env["BROKER"] = f"{broker}/0"
        assert env["PROMETHEUS_MULTIPROC_DIR"] in [at.split(":")[0] for at in service["tmpfs"]]
        env["PROMETHEUS_MULTIPROC_DIR"] = str(figures / name)
        (figures / name).mkdir(parents=True)
        directory = examples / Path(service["working_dir"]).relative_to("/srv")
        env.update(PAGE_PRIMER_IMAGE_DIR=str(images), C_FORCE_ROOT="1")
        extra = NO_CONTROL_SOCKET if arguments[0] == "gunicorn" else []
        self.server = Server(
            directory, *self.ports.values(), BIN / arguments[0], *arguments[1:], *extra, env=env
        )

    def __enter__(self):
        return self

    def __exit__(self, *stop):
        self.server.__exit__(*stop)

    def scrape(self, target, path):
        """What Prometheus would get: page-primer's figures of each process."""
        from prometheus_client.parser import text_string_to_metric_families

        assert self.server.process.poll() is None, self.server.log()
        text = get(self.ports[target], path).decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("page_primer_"):
                    pid = int(sample.labels["pid"])
                    found.setdefault(pid, {})[sample.name] = sample.value
        return found


def test_compose_is_valid():
    pytest.importorskip("check_jsonschema")
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         EXAMPLES / "compose" / "compose.yaml"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_compose_has_what_its_files_name(compose):
    services = compose["compose.yaml"]["services"]
    targets = [
        target.rpartition(":")[0]
        for job in compose["prometheus.yml"]["scrape_configs"]
        for each in job["static_configs"]
        for target in each["targets"]
    ]
    assert sorted(targets) == sorted(services.keys() - {"redis", "prometheus"})
    (mounted,) = services["prometheus"]["volumes"]
    assert (EXAMPLES / "compose" / mounted.partition(":")[0]).is_file()
    build = compose["compose.yaml"]["x-service"]["build"]
    context = (EXAMPLES / "compose" / build["context"]).resolve()
    assert (context / build["dockerfile"]).is_file()
    assert (context / "setup.py").is_file()
    assert "COPY examples /srv" in (context / build["dockerfile"]).read_text()


@pytest.mark.slow
def test_composes_services_and_what_prometheus_gets(compose, examples, broker, images, tmp_path):
    for package in ("django", "fastapi", "celery", "redis", "prometheus_client"):
        pytest.importorskip(package)
    services = compose["compose.yaml"]["services"]
    jobs = compose["prometheus.yml"]["scrape_configs"]
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(
                Service(examples, name, services[name], broker, tmp_path / "figures", images)
            )
            for name in ("django", "fastapi", "worker")
        }
        for job in jobs:
            ((target,),) = (each["targets"] for each in job["static_configs"])
            name, _, port = target.rpartition(":")
            server = running[name].server

            def all_huge(service=running[name], job=job, port=port, server=server):
                figures = service.scrape(int(port), job["metrics_path"])
                serving = python_children(server)
                got = [figures.get(pid, {}) for pid in serving]
                huge = [each.get("page_primer_code_huge_bytes", 0) for each in got]
                return len(serving) >= 2 and min(huge) > (1 << 20 if has_images() else 0)

            wait_for(all_huge, f"figures of {name}'s processes on huge pages")
            check(python_children(server))
