"""What tests, benchmarks and tools have in common: processes and servers under test, and a view of
them from outside that is worked out independently of the package.

This is public within the repository: tests import from here and never from each other, and so do
benchmarks and tools, which put `tests/` on their path. Nothing here imports a test.

Of processes: `process` (one that executes statements for us), `launched` (of `page-primer run`),
`servers` and `gunicorn_server`, `cgroup`, `privileges`. Of what they run: `interpreters`,
`debian_python`, `libraries`, `elves`. What is seen: `outside` (smaps), `state` (whether a process
is as before), `kernel`, `faults` (system calls that fail), `probes` (profilers and debuggers).

Programs that prime themselves again and again (`refused`, `leaks`, `cycles`) import neither pytest
nor what brings many shared libraries: those would be primed each time.
"""
