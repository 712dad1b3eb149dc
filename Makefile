# make demo    a real gunicorn application, unprimed and primed, in numbers, with the report shown
# make demo-celery    a real Celery worker, likewise
# make test    the whole test suite (TESTS=tests/test_plan.py: a part of it)
# make test-fast    without the tests that take long
# make guests  the tests that boot another kernel, in qemu, where there is a runner for them
# make coverage    the suite with coverage of Python and C; build/coverage/report.md names the rest
# make trixie  make demo and make test in a Debian 13 (root; COMMAND=... for something else);
#              make bookworm, make sid: in a Debian 12, in Debian unstable
# make lint    formatting, lint rules, types, layers; C's format and its lint
# make wheel   sdist and wheel in dist/, checked (PYTHON_FOR=...: a wheel for another interpreter,
#              CROSS=aarch64-linux-gnu: by that compiler, for another processor)
# make wheel-check   the wheel in a clean environment of each interpreter here, and some tests on it
# make wheel-debian  the wheel alone in a fresh Debian 12, 13 and unstable, without a compiler (root)
# make changelog     fold the fragments of changelog.d/ into CHANGELOG.md (DRAFT=1: only show)
# make docs    the documentation as a site, in build/docs; a warning is an error
# make bench   in half an hour: how much code is on huge pages, what priming costs and a start under
#              page-primer run (AGAINST=COMMIT: and in another), what workers take of memory, page
#              walks by trace, a request when memory is short (root), processor time of gunicorn,
#              uvicorn and Celery; JSON goes to build/bench (RESULTS=DIR: elsewhere). MGLRU=both: when
#              memory is short, with the multi-generational LRU on and off, where this kernel has it;
#              GUEST=6.12: that without a clock under another kernel, in qemu (half an hour more)
# make bench-pressure    the last but one at length, and for Celery; its picture in docs/ (root)
# make drawing     docs/address-space.svg, of PYTHON
# make environments    hostile ones, each tried (root); writes docs/environments.md (GUEST=7.2: and a
#              kernel that is set to give no huge pages, in qemu, of which it else keeps the rows)
# make sanitize    the C core under sanitizers, and 10,000 cycles of prime() and restore()
# make packages    only what make test and make sanitize install with apt-get (root)
# make fuzz    what reads others' files and text, fuzzed (FUZZ="--seconds 600 align")
# make tools-matrix   every tool on every interpreter and backing; writes docs/tools.md
#              (MATRIX='--shape "CPython 3.11*"': a part of it)
# make kernels Debian's Python and an aligned libpython under other kernels, in qemu, x86-64 and
#              (root) arm64; writes docs/kernels.md (KERNELS="6.12 7.3", ARM64=: a part of it)
#
# Each does all the set-up it needs, in .venv and (as root on Debian) with apt-get.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
# Twice as many as there are processors, since many wait for servers. Tests of a file are in one
# process, and may share servers; which begin first is said in tests/harness/scopes.py.
PARALLEL := $(BIN)/pytest --numprocesses $(shell expr 2 "*" $$(nproc)) --maxprocesses 12 \
    --dist loadfile
SOURCES := pyproject.toml setup.py $(wildcard page_primer/*.[ch] page_primer/launcher/*.[ch])

.PHONY: demo demo-celery test test-fast guests coverage bookworm trixie sid lint wheel wheel-check wheel-debian changelog docs bench bench-pressure environments drawing sanitize fuzz packages tools-matrix kernels clean

demo: $(VENV)/.demo
	$(BIN)/python examples/gunicorn/demo.py

demo-celery: $(VENV)/.demo-celery
	tools/system-packages redis-server:redis-server
	$(BIN)/python examples/celery/demo.py

test: $(VENV)/.test
	tools/system-packages $(TEST_PACKAGES)
	$(PARALLEL) -m "not guest" $(TESTS)

test-fast: $(VENV)/.test
	$(PARALLEL) -m "not slow" $(TESTS)

guests: $(VENV)/.test
	tools/system-packages $(GUEST_PACKAGES)
	$(BIN)/python -m pytest -m guest

coverage: $(VENV)/.dev
	$(BIN)/python tools/coverage_report.py

bookworm trixie sid:
	tools/system-packages debootstrap:debootstrap unshare:util-linux git:git
	tools/debian $@ $(if $(COMMAND),'$(COMMAND)')

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/stubtest --mypy-config-file pyproject.toml page_primer._core
	$(BIN)/lint-imports --no-cache
	tools/limits
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files "*.c")
	$(BIN)/clang-tidy --quiet $$(git ls-files "page_primer/*.c") -- -std=gnu11 -D_GNU_SOURCE \
	    -isystem "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')"

wheel: $(VENV)/.release
	$(if $(CROSS),_PYTHON_HOST_PLATFORM=linux-$(CROSS:%-linux-gnu=%) CC=$(CROSS)-gcc \
	    LDSHARED="$(CROSS)-gcc -shared" )$(BIN)/python tools/wheel \
	    $(if $(PYTHON_FOR),--python "$(PYTHON_FOR)")

# Of the suite, what shows that the wheel has all its parts.
WHEEL_TESTS = tests/test_core.py tests/test_status.py \
    tests/test_prime.py::test_memory_backings \
    tests/test_gunicorn.py::test_every_process_is_huge_and_locked
wheel-check: $(VENV)/.release
	$(BIN)/python tools/wheel-check --gunicorn
	$(BIN)/python tools/wheel-check --tests -- -m "not slow" $(WHEEL_TESTS)

wheel-debian: wheel
	tools/system-packages debootstrap:debootstrap unshare:util-linux git:git
	for suite in bookworm trixie sid; do tools/debian $$suite "tools/system-packages \
	    pip3:python3-pip && ! which cc && \
	    python3 tools/wheel-check --gunicorn /usr/bin/python3" || exit 1; done

changelog: $(VENV)/.release
	$(BIN)/towncrier build $(if $(DRAFT),--draft,--yes) --version next

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/docs

drawing: $(VENV)/.test
	$(BIN)/python tools/address_space --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

RESULTS = build/bench
bench: $(VENV)/.test
	tools/system-packages h2load:nghttp2-client qemu-x86_64:qemu-user redis-server:redis-server \
	    vmtouch:vmtouch perf:linux-perf
	$(BIN)/python benchmarks/huge_code.py --json $(RESULTS)/huge-code.json
	$(BIN)/python benchmarks/prime_cost.py --json $(RESULTS)/prime-cost.json
	$(BIN)/python benchmarks/start_cost.py --json $(RESULTS)/start-cost.json
	$(if $(AGAINST),$(BIN)/python benchmarks/against.py $(AGAINST))
	for application in small arrays; do \
	    $(BIN)/python benchmarks/memory.py --code --application $$application --workers 4 \
	    --requests 20 --json $(RESULTS)/memory-$$application.json || exit 1; done
	for work in flask django dataframe sklearn; do \
	    $(BIN)/python benchmarks/page_walks.py --work $$work --loops 4 \
	    --json $(RESULTS)/page-walks-$$work.json || exit 1; done
	test $$(id -u) != 0 || \
	    $(BIN)/python benchmarks/pressure.py --rounds 12 $(if $(MGLRU),--mglru $(MGLRU)) \
	    --json $(RESULTS)/pressure.json
	test -z "$(GUEST)" || { tools/system-packages $(GUEST_PACKAGES) \
	    mkfs.xfs:xfsprogs && $(BIN)/python benchmarks/pressure.py --guest $(GUEST) --mglru both \
	    --variants unprimed,both --rounds 8 --json $(RESULTS)/pressure-mglru-$(GUEST).json; }
	$(BIN)/python benchmarks/throughput.py --minutes 6 --json $(RESULTS)

bench-pressure: $(VENV)/.test
	tools/system-packages vmtouch:vmtouch perf:linux-perf redis-server:redis-server
	$(BIN)/python benchmarks/pressure.py --celery --plot docs/pressure

environments: $(VENV)/.test
	tools/system-packages gcc:build-essential unshare:util-linux
	$(BIN)/python tools/environments --slow $(if $(GUEST),--guest $(GUEST))

sanitize: $(VENV)/.test
	tools/system-packages $(SANITIZE_PACKAGES)
	$(BIN)/python tools/sanitize

fuzz: $(VENV)/.test
	-$(PIP_INSTALL) atheris  # has wheels for some versions only; tools/fuzz does without
	$(BIN)/python tools/fuzz $(FUZZ)

# What the tests build a position-independent static interpreter from: Debian's own Python as an
# archive (a file:package that is named by its version), and the libraries that it needs.
DEBIAN = $(notdir $(realpath /usr/bin/python3))
ARCHIVE = $(DEBIAN:python%=config-%)-$(shell uname -m)-linux-gnu/lib$(DEBIAN)-pic.a
PIE = $(if $(DEBIAN),/usr/lib/$(DEBIAN)/$(ARCHIVE):lib$(DEBIAN)-dev)

GUEST_PACKAGES = qemu-system-x86_64:qemu-system-x86 zstd:zstd
TEST_PACKAGES = gdb:gdb ps:procps setpriv:util-linux readelf:binutils \
    redis-server:redis-server perf:linux-perf valgrind:valgrind nsenter:util-linux $(PIE) \
    ld.lld:lld ld.gold:binutils-gold mold:mold musl-gcc:musl-tools eu-addr2line:elfutils \
    fakeroot:fakeroot chattr:e2fsprogs h2load:nghttp2-client vmtouch:vmtouch git:git
SANITIZE_PACKAGES = gcc:build-essential setarch:util-linux python3-dbg:python3-dbg
packages:
	tools/system-packages $(TEST_PACKAGES) $(SANITIZE_PACKAGES)

tools-matrix: $(VENV)/.test
	tools/system-packages gdb:gdb perf:linux-perf valgrind:valgrind nsenter:util-linux \
	    debootstrap:debootstrap needrestart:needrestart eu-stack:elfutils lldb:lldb $(PIE) \
	    /usr/share/gdb/auto-load/usr/bin/$(DEBIAN)-gdb.py:$(DEBIAN)-dbg
	$(BIN)/python tools/matrix.py $(MATRIX)

# Of Debian's own Python, whatever $(PYTHON) is; the runner is named by KERNEL_BOOT.
ARM64 = 6.12 7.2 7.3
kernels:
	tools/system-packages $(GUEST_PACKAGES) mkfs.xfs:xfsprogs $(PIE) \
	    qemu-system-aarch64:qemu-system-arm aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu
	$(MAKE) PYTHON=/usr/bin/python3 VENV=.venv-debian .venv-debian/.demo
	tools/kernels --python .venv-debian/bin/python --write docs/kernels.md $(KERNELS)
	$(if $(strip $(ARM64)),tools/arm64 --write docs/kernels.md $(ARM64))

$(VENV)/.created:
	tools/system-packages gcc:build-essential
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	    tools/system-packages /usr/share/doc/python3-venv:python3-venv
	@test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	    tools/system-packages /usr/include/none/Python.h:python3-dev
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.created $(SOURCES)
	$(PIP_INSTALL) -e ".[gunicorn,cli]" flask
	touch $@

$(VENV)/.demo-celery: $(VENV)/.created $(SOURCES)
	$(PIP_INSTALL) -e ".[celery,cli]" "celery[redis]" numpy pandas
	touch $@

$(VENV)/.docs: $(VENV)/.created $(SOURCES)
	$(PIP_INSTALL) -e ".[docs]"
	touch $@

$(VENV)/.release: $(VENV)/.dev
	$(PIP_INSTALL) -e ".[dev,release]"
	touch $@

# Nearly half of what there would be to compile: others' tests, and what no test of ours imports, or
# pytest alone, which has copies of its own.
NONE_IMPORTS = fontTools|hypothesis|rich|textual
NOT_IMPORTED = /site-packages/(.*/tests|$(NONE_IMPORTS)|$(PARTS))/
PARTS = django/(conf/locale|contrib)|newrelic/hooks|numpy/(distutils|f2py)|pygments/lexers
# Of uWSGI there are no wheels: it is built for this very interpreter, as fast as may be, and where
# it can be, while pip, one process, has the other packages. pip would also compile their 9,000
# modules one after the other; and each process of pytest rewrite the asserts of all tests.
$(VENV)/.test: $(VENV)/.created $(SOURCES)
	test -e $(BIN)/uwsgi || CFLAGS=-O0 UWSGI_PROFILE=buildconf/pyonly.ini $(BIN)/pip wheel \
	    --no-deps --use-pep517 --no-cache-dir --wheel-dir $(VENV)/uwsgi uwsgi \
	    >$(VENV)/uwsgi.log 2>&1 & \
	    $(PIP_INSTALL) --no-compile -e ".[test]" && wait && \
	    { $(BIN)/python -m compileall -qq -j 0 -x '$(NOT_IMPORTED)' $(VENV)/lib & \
	    $(BIN)/pytest --collect-only -qq >/dev/null 2>&1 & \
	    test -e $(BIN)/uwsgi || $(PIP_INSTALL) $(VENV)/uwsgi/*.whl >>$(VENV)/uwsgi.log 2>&1 || \
	    echo "make: uWSGI is not built, its tests are skipped; why: $(VENV)/uwsgi.log" >&2; wait; }
	touch $@

# Linters take 200 MB, and no test needs them.
$(VENV)/.dev: $(VENV)/.test
	$(PIP_INSTALL) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-debian .venv-tools build dist *.egg-info page_primer/*.so
