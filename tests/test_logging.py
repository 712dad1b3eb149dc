"""Fields of log records: those that docs/logging.md has, in a real server's JSON log."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

from harness.gunicorn_server import CONF, Gunicorn
from harness.privileges import has_images

from page_primer import integrations, logs, reasons
from page_primer._lean import replace
from page_primer.integrations import celery
from page_primer.kernel.memory import Memory
from page_primer.options import Options
from page_primer.outcome import HeapReport, ObjectReport, SegmentReport
from page_primer.report import Report

MIB = 1 << 20
PAGE = Path(__file__).parent.parent / "docs" / "logging.md"

# A formatter as others write them: whatever logging itself does not set is a field.
FORMATTER = """
import json, logging
KNOWN = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
class Json(logging.Formatter):
    def format(self, record):
        more = {key: value for key, value in vars(record).items() if key not in KNOWN}
        return json.dumps({"message": record.getMessage(), "level": record.levelname,
                           "pid": record.process, **more})
"""
CONFIGURATION = """
logconfig_dict = {
    "version": 1,
    "formatters": {"json": {"()": "formatter.Json"}},
    "handlers": {"json": {"class": "logging.FileHandler", "filename": "log.json",
                          "formatter": "json"}},
    "root": {"handlers": ["json"], "level": "DEBUG"},
    "loggers": {"gunicorn.error": {"handlers": ["json"], "level": "DEBUG", "propagate": False}},
}
"""

CORE = ObjectReport(
    path="/usr/lib/libpython3.11.so.1.0", interpreter=True, backing="image",
    where="/var/cache/page-primer/4-x/libpython3.11.so.1.0", code_bytes=2 * MIB,
    code_huge_bytes=MIB, huge_bytes=4 * MIB, locked_bytes=6 * MIB, copied_bytes=6 * MIB,
    written_bytes=0, segments=(), notes=("not written: full",), attainable_bytes=2 * MIB,
    sharing="shared", no_longer_aligned=True,
)  # fmt: skip
PRIMED = Report(
    1, None, (CORE,), lock_wanted_bytes=9 * MIB, lock_refused_bytes=MIB, lock_limit=8 * MIB,
    lock_refusal="over RLIMIT_MEMLOCK", lock_withheld_bytes=MIB, memory_share=0.25,
    memory=Memory(64 * MIB, MIB, "the cgroup's"), unknown_variables=("PAGE_PRIMER_LIMT",),
    heap=HeapReport("auto"),
)  # fmt: skip


def documented():
    """Event -> the fields that the page has for it."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and (event := re.fullmatch(r"`(\w+)`", cells[0])):
            found[event[1]] = set(re.findall(r"`(\w+)`", cells[2]))
    return {event: fields for event, fields in found.items() if event in logs.EVENTS}


def recording(log):
    """The records that a function writes to the logger that it is given."""
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append(record)

    logger = logging.Logger("of a test")
    logger.addHandler(Keep())
    log(logger)
    return found


def records_of(report, since=None):
    return recording(lambda logger: report.log(logger, since=since))


ASKED = replace(PRIMED, warn=(*PRIMED.warn, "mlock"))  # for shortfalls to be lines of their own


def records_of_integrations(monkeypatch):
    """What is no part of a report: a preloaded application, an export that fails, and a child of
    Celery's that is nearly as large as it may be."""
    monkeypatch.setattr(integrations, "on_report", [lambda: open("/dev/null/figures")])
    monkeypatch.setattr(integrations, "_last", None)

    def log(logger):
        integrations.suggest_freeze(logger, "the application is preloaded", Options())
        integrations.announce(ASKED, logger)
        monkeypatch.setattr(celery, "_LOGGER", logger)
        monkeypatch.setattr(celery, "_most_memory", 1)  # KiB
        monkeypatch.setattr(celery, "_prime", lambda: None)
        monkeypatch.setattr(celery, "current_process", lambda: SimpleNamespace(index=0))
        celery._prime_child()

    return recording(log)


def fields_of(record):
    prefix = logs.PREFIX
    return {k.removeprefix(prefix): v for k, v in vars(record).items() if k.startswith(prefix)}


def test_each_event_has_the_documented_fields(monkeypatch):
    nothing = Report(1, reasons.SWITCHED_OFF, detail="PAGE_PRIMER=0")
    reports = [(ASKED, None), (nothing, None), (replace(ASKED, pid=2), ASKED)]
    records = [record for report, since in reports for record in records_of(report, since)]
    seen = {}
    for record in [*records, *records_of_integrations(monkeypatch)]:
        fields = fields_of(record)
        assert record.getMessage().startswith("page-primer: ")
        json.dumps(fields)
        seen.setdefault(fields.pop("event"), set()).update(fields)
    assert seen.keys() == set(logs.EVENTS)
    assert seen == documented()


def test_what_nobody_asked_for_by_name_is_in_the_one_line():
    primed, *others = [r for r in records_of(PRIMED, None) if r.levelname == "INFO"]
    assert "not locked" in primed.getMessage()
    fields = fields_of(primed)
    assert fields["event"] == "primed"
    assert fields["lock_refused_bytes"] == PRIMED.lock_refused_bytes > 0
    assert fields["lock_withheld_bytes"] == PRIMED.lock_withheld_bytes > 0
    assert {fields_of(one)["event"] for one in others} <= {"heap"}


def test_a_logger_without_fields_gets_the_text():
    class Plain:
        def __init__(self):
            self.lines = []

        def info(self, message, *values):
            self.lines.append(message % values)

        debug = warning = info

    logger = Plain()
    PRIMED.log(logger)
    assert logger.lines == [record.getMessage() for record in records_of(PRIMED)]


def test_fields_in_a_json_log_of_gunicorn(python, images, tmp_path):
    (tmp_path / "formatter.py").write_text(FORMATTER)
    (tmp_path / "gunicorn.conf.py").write_text(CONFIGURATION)
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images), "PYTHONPATH": str(tmp_path)}
    env["PAGE_PRIMER_LIMT"] = "1"
    with Gunicorn(python, tmp_path, "--workers", "1", conf=CONF, env=env) as server:
        server.wait_for_workers(1)
        lines = [json.loads(line) for line in (tmp_path / "log.json").read_text().splitlines()]
        ours = {
            line.get("page_primer_event"): line for line in lines if line["pid"] == server.master
        }
        primed = ours["primed"]
        assert primed["message"].startswith("page-primer: ")
        assert primed["level"] == "INFO"
        huge = primed["page_primer_interpreter_code_huge_bytes"]
        assert huge > (MIB if has_images() else 0)
        assert primed["page_primer_locked_bytes"] > 0
        assert ours["unknown_variables"]["level"] == "WARNING"
        assert ours["unknown_variables"]["page_primer_variables"] == ["PAGE_PRIMER_LIMT"]


def test_images_in_two_directories_are_both_named():
    other = replace(CORE, interpreter=False, path="/lib/libcrypto.so.3",
                    where="/home/u/.cache/page-primer/4-y/libcrypto.so.3")  # fmt: skip
    one = Report(1, None, (CORE, replace(other, where=CORE.where)))
    assert one.summary().count("/var/cache/page-primer") == 1
    two = Report(1, None, (CORE, other))
    assert "images in /var/cache/page-primer and /home/u/.cache/page-primer" in two.summary()


def test_lines_say_nothing_twice_and_nothing_empty():
    """Objects in memory; and such as restore() leaves, without a reason."""
    segment = SegmentReport(0, 4096, "code", 4096, 0, 0, {})
    moved = replace(CORE, backing="memfd", where="memfd")
    left = replace(CORE, backing=None, where=None, notes=(), code_huge_bytes=0, segments=(segment,))
    lines = [record.getMessage() for record in records_of(Report(1, None, (moved, left)))]
    assert not [line for line in lines if "memfd memfd" in line or ", :" in line], lines
    assert "page-primer: left alone: libpython3.11.so.1.0" in lines
    assert [line for line in lines if line.endswith(", memfd")]
