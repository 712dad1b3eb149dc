"""What tests, benchmarks and tools have in common: processes and servers under test, and a view of
them from outside that is worked out independently of the package.

This is public within the repository: tests import from here and never from each other, and so do
benchmarks and tools, which put `tests/` on their path. Nothing here imports a test.

Of processes: `process` (one that executes statements for us), `launched` (of `page-primer run`),
`servers` and `gunicorn_server`, `cgroup`, `privileges`. Of what they run: `interpreters`,
`debian_python`, `libraries`, `elves`. What is seen: `outside` (smaps), `kernel`, `faults` (system
calls that fail), `probes` (profilers and debuggers).
"""
