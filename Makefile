# make demo | make test | make lint | make bench | make bench-kernels | make gpu | make demo-real
#
# Everything lives in .venv; PYTHON= names another interpreter that already has the packages.

TORCH ?= torch==2.13.0
BASE_PYTHON ?= python3
VENV := .venv
PYTHON ?= $(VENV)/bin/python
PYTEST_JOBS ?= 2

.PHONY: demo demo-real test lint bench bench-kernels gpu install install-test install-bench browser clean

demo: install
	$(PYTHON) examples/demo.py

demo-real: install
	PYTHON=$(PYTHON) sh examples/real_data.sh demo-real/data
	$(PYTHON) examples/demo.py --real

test: install-test browser
	$(PYTHON) -m pytest -n $(PYTEST_JOBS) --dist loadgroup

lint: install-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: install-bench
	$(PYTHON) benchmarks/train_step.py

bench-kernels: RESULTS ?= kernels/bench/results
bench-kernels: install-bench
	for script in $$(grep -l __main__ kernels/bench/*.py); do $(PYTHON) $$script --out $(RESULTS) $(BENCH_FLAGS) || exit; done

# On a machine with a GPU, whose python3 has torch, triton and pytest: nothing is installed, no network is needed.
gpu: RESULTS ?= benchmarks/results
gpu: PYTHON = python3
gpu:
	PYTHONPATH=kernels:.:$$PYTHONPATH $(PYTHON) benchmarks/gpu.py --out $(RESULTS)

# The install targets are stamped by the files they read, so a second call does nothing.
install: $(VENV)/.installed
install-test: $(VENV)/.installed-test
install-bench: $(VENV)/.installed-bench

$(VENV)/.installed: pyproject.toml kernels/pyproject.toml
	test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH) numpy
	$(VENV)/bin/python -m pip install -q -e kernels -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e kernels -e ".[test]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e kernels -e ".[bench]"
	touch $@

# The report's screenshot test needs Chromium; it is skipped where there is none and none can be installed.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || true

clean:
	rm -rf $(VENV) demo demo-real build
