"""The frameworks' oldest and newest supported versions: nox [-s SESSION]. `make test` runs the
newest only."""

import runpy

import nox

TESTED = runpy.run_path("page_primer/integrations/versions.py")["TESTED"]
# What an old framework needs beside it.
WITH_OLDEST = {"uvicorn": ["uvicorn-worker==0.2.0"]}
TESTS = {
    "gunicorn": ["tests/test_gunicorn.py", "tests/test_gunicorn_dirty.py"],
    "uvicorn": ["tests/test_asgi_wsgi.py"],
    "celery": ["tests/test_celery.py"],
}

nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize("framework", list(TESTS))
@nox.parametrize("version", ["oldest", "newest"])
def frameworks(session: nox.Session, framework: str, version: str) -> None:
    session.install(".[test]")
    if version == "oldest":
        oldest, _ = TESTED[framework]
        session.install(f"{framework}=={oldest}", *WITH_OLDEST.get(framework, []))
    session.run("pytest", *TESTS[framework], *session.posargs)
