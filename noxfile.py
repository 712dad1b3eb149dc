"""The frameworks' oldest and newest supported versions: nox [-s SESSION]. `make test` runs the
newest only."""

import nox

OLDEST = {
    "gunicorn": ["gunicorn==21.2.0"],
    "uvicorn": ["uvicorn==0.30.0", "uvicorn-worker==0.2.0"],
    "celery": ["celery==5.4.0"],
}
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
        session.install(*OLDEST[framework])
    session.run("pytest", *TESTS[framework], *session.posargs)
