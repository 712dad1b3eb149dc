"""README and docs: every block of commands names the test or target that runs what it says (of a
Dockerfile, the steps, in a container of ours), every quoted line is one that the package writes,
every link leads somewhere, every variable and option exists."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from harness import documents
from harness.documents import DOCUMENTS, ROOT, name_of
from harness.servers import NO_CONTROL_SOCKET, Server, free_port, wait_for

from page_primer import options, reasons

BIN = Path(sys.executable).parent

# What is shown and not run: output.
SHOWN = "shown"
CONTAINER, UNITS = "test_deploy.py::test_container", "test_deploy.py::test_units_are_what"
# Each block of code, by its document and the beginning of its first line: what runs it, a test or a
# `make` target.
RUN_BY = {
    "ARCHITECTURE.md: options ->": SHOWN,
    "README.md: $ gunicorn -c python:": "test_documents.py::test_readme",
    "README.md: make demo ": ("make demo", "make test"),
    "README.md: git clone": "make demo",  # which installs from the clone that it is in
    "README.md: FROM python": CONTAINER,
    "README.md: page-primer status PID": "test_documents.py::test_readme",
    "README.md: page-primer bench": "test_bench.py::test_gunicorn_primed",
    "CONTRIBUTING.md: make .venv/.dev": (
        "make lint", "make test-fast", "make test", "test_repository.py::test_pre_commit",
    ),
    "CONTRIBUTING.md: make changelog": ("make changelog", "make wheel", "make wheel-check"),
    "docs/alignment.md: page-primer align [": "test_align_command.py::test_align_check_undo",
    "docs/alignment.md: FROM python": CONTAINER,
    "docs/alignment.md: FROM debian": CONTAINER,
    "docs/alignment.md: DPkg::Post-Invoke": "test_align_command.py::test_an_upgrade_is_noticed",
    "docs/bench.md: page-primer bench": "test_bench.py::test_gunicorn_primed",
    "docs/bench.md: code+heap: ": SHOWN,
    "docs/cli.md: eval": "test_completion.py::test_words",
    "docs/deploy/containers.md: ": CONTAINER,
    "docs/deploy/kubernetes.md: ": CONTAINER,
    "docs/deploy/systemd.md: ": ("test_deploy.py::test_systemd_with", UNITS),
    "docs/health.md: import json": (
        "test_health.py::test_wsgi_example", "test_health.py::test_asgi_example",
    ),
    "docs/heap.md: PAGE_PRIMER_HEAP=auto gunicorn": (
        "test_heap.py::test_gunicorn_preloaded", "test_freeze.py::test_gunicorn_workers_share",
    ),
    "docs/heap.md: page-primer: heap: ": SHOWN,
    "docs/index.md: pip install": ("make wheel", "test_documents.py::test_readme"),
    "docs/images.md: page-primer build": (
        "test_build.py::test_the_store_that_every", "test_build.py::test_an_application_as",
    ),
    "docs/images.md: RUN pip install": (
        "test_build.py::test_a_container_with", "test_deploy.py::test_systemd_with_a_store",
    ),
    "docs/integrations.md: gunicorn": "test_documents.py::test_readme",
    "docs/integrations.md: PAGE_PRIMER_APP=": "test_documents.py::test_readme",
    "docs/integrations.md: from page_primer.integrations.asgi": "test_documents.py::test_readme",
    "docs/integrations.md: imports = [": "test_celery.py::test_prefork",
    "docs/integrations.md: page-primer run": "test_documents.py::test_readme",
    "docs/integrations.md: import logging": "test_documents.py::test_programs",
    "docs/logging.md: import logging": "test_documents.py::test_programs",
    "docs/logging.md: logconfig_dict": "test_logging.py::test_fields_in_a_json_log",
    "docs/metrics.md: pip install": "make wheel-check",
    "docs/metrics.md: from page_primer.integrations import prometheus": (
        "test_metrics.py::test_prometheus_has", "test_metrics.py::test_prometheus_reads",
    ),
    "docs/metrics.md: page_primer_code_huge_bytes /": "test_examples.py::test_composes_services",
    "docs/metrics.md: from page_primer.integrations import opentel": (
        "test_metrics.py::test_opentelemetry_observes"
    ),
    "docs/supported.md: pip install": "make wheel",
    "docs/troubleshooting.md: page-primer doctor": "test_documents.py::test_readme",
    "docs/warm.md: page-primer warm": (
        "test_warm.py::test_the_python_command_names", "test_warm.py::test_a_command_goes_through",
    ),
    "docs/warm.md: /usr/lib/libpython3.11.so.1.0: ": SHOWN,
    "docs/warm.md: page-primer-warm --hold": "test_warm.py::test_a_holder_keeps_a_file_locked",
    "docs/warm.md: [Service]": UNITS,
    "docs/warm.md: [Unit]": UNITS,
    "docs/warm.md: ENTRYPOINT": CONTAINER,
    "examples/celery/README.md: ": "test_examples.py::test_celery_demo",
    "examples/compose/README.md: docker": "test_examples.py::test_compose_is_valid",
    "examples/compose/README.md: page_primer_code": "test_examples.py::test_composes_services",
    "examples/django/README.md: ": "test_examples.py::test_four_workers",
    "examples/fastapi/README.md: ": "test_examples.py::test_four_workers",
    "examples/gunicorn/README.md: ": "test_examples.py::test_gunicorn_demo",
}  # fmt: skip


def runners(name):
    found = RUN_BY[name]
    return [one for one in ([found] if isinstance(found, str) else found) if one != SHOWN]


def test_every_block_is_run():
    used = set()
    for block in documents.blocks():
        names = [name for name in RUN_BY if str(block).startswith(name)]
        assert names, f"nothing here runs this block: {block}"
        used |= {*names}
    assert RUN_BY.keys() - used == set(), "documents no longer have these"


def test_what_runs_them_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for name in RUN_BY:
        for runner in runners(name):
            if runner.startswith("make "):
                assert is_target(runner.removeprefix("make "), makefile), runner
                continue
            file, _, test = runner.partition("::")
            tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.M)
            assert any(one.startswith(test) for one in tests), runner


def is_target(name, makefile):
    return re.search(rf"^(\S+ )*{re.escape(name)}( \S+)*:(?!=)", makefile, re.MULTILINE)


def commands():
    """Each command in a block or in backticks: its document, and its words."""
    for block in documents.blocks():
        for line in block.lines:
            yield block.document, re.split(r"  +#|   +", line)[0].removeprefix("$ ").split()
    for path in DOCUMENTS:
        for code in documents.codes(path):
            yield name_of(path), code.split()


def test_targets_and_tools_exist():
    makefile, seen = (ROOT / "Makefile").read_text(), set()
    for document, words in commands():
        if words[:1] == ["make"]:
            targets = [word for word in words[1:] if "=" not in word and word != "..."]
            assert all(is_target(one.replace("$(VENV)", ".venv"), makefile) or one == ".venv/.dev"
                       for one in targets), (document, words)  # fmt: skip
            seen.update(targets)
        script = next((word for word in words if re.match(r"(tools|benchmarks)/\w", word)), None)
        if script is None or "*" in script:
            continue
        assert (ROOT / script).exists(), (document, words)
        if words.index(script) <= 1 and (ROOT / script).is_file():
            text = (ROOT / script).read_text()
            if "parse_known_args" in text:  # and passes on the rest
                continue
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                assert f'"{option}"' in text, (document, words)
    assert {"demo", "test", "wheel", "bench", "docs"} - seen <= {"docs"}


@pytest.mark.slow
def test_options_of_the_command_exist():
    """Of each subcommand, as its own help has them."""
    helps = {}
    for document, words in commands():
        if "page-primer" not in words[:4] or words[-1:] == ["page-primer"]:
            continue
        whole, words = words, words[words.index("page-primer") + 1 :]
        if not re.fullmatch(r"[a-z]+", words[0]) or "unknown" in whole:
            continue
        if words[0] not in helps:
            done = subprocess.run(
                [sys.executable, "-m", "page_primer", words[0], "--help"],
                capture_output=True, text=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert done.returncode == 0, f"{document}: page-primer {words[0]}: {done.stderr}"
            helps[words[0]] = done.stdout
        own = words[1 : words.index("--")] if "--" in words else words[1:]
        for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(own)):
            assert re.search(rf"{option}\b(?!-)", helps[words[0]]), f"{document}: {words}"
    assert {"run", "status", "doctor", "align", "warm", "images", "build", "bench"} <= set(helps)


def test_variables_exist():
    sources = (ROOT / "page_primer").rglob("*.[pc]*")
    text = "".join(path.read_text() for path in sources if path.suffix in (".py", ".c"))
    for path in DOCUMENTS:
        for name in set(re.findall(r"\bPAGE_PRIMER_[A-Z_]+\b", path.read_text())):
            assert options.nearest_variable(name) == name or f'"{name}' in text, f"{path}: {name}"


def test_links_lead_somewhere():
    """Also in what is no page of the site, whose links `make docs` checks."""
    for path in DOCUMENTS:
        for link in documents.links(path):
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            target = (path.parent / target).resolve() if target else path
            assert target.exists(), f"{path}: {link}"
            assert not anchor or anchor in documents.anchors(target), f"{path}: {link}"


def test_pictures_have_the_command_that_makes_them():
    for path in DOCUMENTS:
        text = documents.prose(path)
        for picture in re.findall(r"!\[[^\]]*\]\((\S+)\)", text):
            near = text[text.index(picture) :][:900]
            assert re.search(r"`make [a-z-]+", near), f"{path}: {picture}"


def test_figures_have_the_command_that_measures_them():
    """A section with a table of measured numbers names a benchmark, a tool or a target, or the
    sections above it on the page do."""
    pages = 0
    for path in DOCUMENTS:
        sections = re.split(r"^(?=#+ )", documents.prose(path), flags=re.MULTILINE)
        named = False
        for section in sections:
            named |= bool(re.search(r"`(make|benchmarks/|tools/|python -m|page-primer )", section))
            if re.search(r"^\|.*\| ?[\d.,]*\d\.\d", section, re.MULTILINE):
                assert named, f"{path}: {section[:60]}"
                pages += 1
    assert pages >= 8


def test_the_picture_of_the_gain_says_what_the_pages_say():
    found = runpy.run_path(str(ROOT / "benchmarks" / "gain_picture.py"))["figures"]()
    picture = (ROOT / "docs" / "gain.png").read_bytes()
    (described,) = re.findall(rb"tEXtDescription\0(\{.*?\}\})", picture, re.DOTALL)
    assert json.loads(described) == found, "python benchmarks/gain_picture.py draws it again"
    readme = (ROOT / "README.md").read_text()
    first = found["first request"]
    assert f"in {first['unprimed']} ms, primed in {first['page-primer']} " in readme
    without, with_it = (8 * size for size in found["memory"].values())
    assert f"took {without:.1f} MiB without and {with_it:.1f} with it" in readme
    walks = found["page walks"]["page-primer, heap=auto"]
    assert f"needs {min(walks):.2f} to {max(walks):.2f} of the page walks" in readme


# --- what is quoted


def texts_of_functions():
    """The strings of each function of the package, f-strings by their constant parts."""
    for path in [*(ROOT / "page_primer").rglob("*.py"), ROOT / "setup.py"]:
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for node in [*functions, tree]:
            yield [n.value for n in ast.walk(node)
                   if isinstance(n, ast.Constant) and isinstance(n.value, str)]  # fmt: skip
    for path in (ROOT / "page_primer").rglob("*.c"):
        yield [re.sub(r'"\s*"', "", path.read_text())]


# Of more than one function's words, or of Python's: the command that writes them.
COMPOSED = {
    "page-primer: no process ...": (str(BIN / "page-primer"), "status", str(2**22)),
    "No module named 'page_primer'": (sys.executable, "-ISc", "import page_primer"),
}


@pytest.mark.slow
def test_titles_of_troubleshooting_are_lines_that_are_written():
    """A title in backticks: its parts are in one function, or are a reason. The rest are what
    people see without a line."""
    known = [*texts_of_functions()]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    titles = re.findall(r"^### (`+) ?(.*?) ?\1$", page, re.MULTILINE)
    assert len(titles) >= 20
    for _, title in titles:
        if title in COMPOSED:
            continue
        parts = [part.strip() for part in re.split(r"\.\.\.|[(),:;]", title) if part.strip()]
        said = title.partition("nothing done: ")[2] or title.partition("...: ")[2]
        if said.removesuffix(": ...") in reasons.every():
            continue
        assert any(
            all(any(part in text for text in texts) for part in parts) for texts in known
        ), f"no line of the package's: {title}"  # fmt: skip


@pytest.mark.parametrize("title", COMPOSED)
def test_titles_of_troubleshooting_are_written_by_commands(title):
    assert f"### `{title}`" in (ROOT / "docs" / "troubleshooting.md").read_text()
    done = subprocess.run(COMPOSED[title], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert title.removesuffix(" ...") in done.stderr


# --- what is written, run

APP = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""
ASGI_APP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            event = (await receive())["type"]
            await send({"type": event + ".complete"})
            if event == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})
"""


def user(images, **more):
    """A shell of somebody who has installed the package, and knows of nothing else."""
    return {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(images.parent),
            "PAGE_PRIMER_IMAGE_DIR": str(images), **more}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("row", ["gunicorn", "uvicorn", "ASGI, WSGI", "anything, without code"])
def test_readme(row, tmp_path, images):
    """Its table of commands: each as it is written there, but for the port."""
    readme = (ROOT / "README.md").read_text()
    (cell,) = re.findall(rf"^\| {row} \| (.*) \|$", readme, re.MULTILINE)
    command, *more = re.findall(r"`([^`]+)`", cell)
    port = free_port()
    app = ASGI_APP if row in ("uvicorn", "anything, without code") else APP
    place = tmp_path / ("shop/main.py" if row == "uvicorn" else "app.py")
    place.parent.mkdir(exist_ok=True)
    if row == "ASGI, WSGI":
        app = "\n".join([command.replace(".asgi", ".wsgi"), APP, more[1]])
        command = "waitress-serve app:app"
        pytest.importorskip("waitress")
    place.write_text(app)
    bind = {"waitress-serve": f"waitress-serve --listen=127.0.0.1:{port}",
            "gunicorn -c": f"gunicorn {' '.join(NO_CONTROL_SOCKET)} -b 127.0.0.1:{port} -c",
            "uvicorn --factory": f"uvicorn --port {port} --factory",
            "-- hypercorn": f"-v -- hypercorn --bind 127.0.0.1:{port}"}  # fmt: skip
    (found,) = [name for name in bind if name in command]
    line = f"exec env {command.replace(found, bind[found])}"
    with Server(tmp_path, port, "sh", "-c", line, env=user(images)) as server:
        assert server.get() == b"ok"
        wait_for(lambda: "page-primer" in server.log(), "a line in the log")
        if row == "gunicorn":
            look(readme, server, images)
    said = re.search(r"page-primer\S*: (\d[\d.]*) % of \S+ [\d.]+ MiB of code", server.log())
    assert said, server.log()
    assert float(said[1]) > 0, server.log()


def look(readme, server, images):
    """The commands that are behind "See that it works", of this server."""
    assert "    page-primer status PID " in readme
    assert "    page-primer doctor " in readme
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert "    page-primer doctor --fix " in page
    answers = [
        subprocess.run(["sh", "-c", command], env=user(images), capture_output=True, text=True)
        for command in (f"page-primer status {server.pid}", "page-primer doctor --fix")
    ]
    assert answers[0].returncode == 0, answers[0].stderr
    assert re.search(r"python3\.\d+\S* +\S+ +[\d.]+ MiB", answers[0].stdout), answers[0].stdout
    assert answers[1].returncode in (0, 1, 2)
    assert answers[1].stderr == ""


@pytest.mark.parametrize("page", ["integrations.md", "logging.md"])
def test_programs(page, images):
    """Python that configures logging for the report, and primes."""
    (block,) = [
        block for block in documents.blocks()
        if block.document == f"docs/{page}" and block.lines[0] == "import logging"
    ]  # fmt: skip
    text = "\n".join(block.lines)
    if "report.log" in text:
        before, after = "import logging; logging.basicConfig(level='INFO')\n", ""
    else:
        before = ""
        after = "\nimport page_primer; page_primer.prime().log(logging.getLogger('page_primer'))"
    done = subprocess.run(
        [sys.executable, "-c", before + text + after], capture_output=True, text=True,
        env={**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(images)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"page-primer: \d[\d.]* % of ", done.stderr), done.stderr
