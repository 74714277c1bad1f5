# Bare `make` prints the targets.
#
# Everything lives in .venv. PYTHON= names another interpreter that already has the packages: then nothing is installed,
# and megamm is read from this folder.

# Without TORCH= this release, as its CPU build where no NVIDIA GPU is seen. TORCH_INDEX= is one more index to look in.
TORCH_RELEASE := torch==2.13.0
TORCH ?=
TORCH_INDEX ?=
BASE_PYTHON ?= python3
VENV := .venv
PYTHON ?= $(VENV)/bin/python
PYTEST_JOBS ?= 2

ifneq ($(PYTHON),$(VENV)/bin/python)
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/laws:$(PYTHONPATH)
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-real own test faults kills lint format bench bench-kernels compiled gpu \
	gpu-test gpu-bench gpu-train docker laws-alone site install \
	install-test install-bench install-docs browser \
	clean distclean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install  ## built-in data, 41 small runs, fits, report: about a quarter of an hour on two cores
	$(PYTHON) examples/demo.py

demo-real: install  ## the same on documentation and clip art of Debian packages
	PYTHON=$(PYTHON) sh examples/real_data.sh demo-real/data
	$(PYTHON) examples/demo.py --real

# MINUTES= is the time for training.
own: MINUTES ?= 10
own: install  ## the same on your own pages, captions or text: make own DATA="DIR..." ends in own/report/index.html
	@test -n "$(DATA)" || { echo 'make own: name your folders, as in make own DATA="pages captions"' >&2; exit 2; }
	$(PYTHON) tools/start.py $(DATA) --out own --minutes $(MINUTES) --yes

test: install-test browser  ## the whole test suite
	$(PYTHON) -m pytest -n $(PYTEST_JOBS) --dist loadfile --durations 30  # a file has its fixtures once

faults: install-test  ## 283 things that go wrong while training, and what is lost: about 6 minutes on two cores
	$(PYTHON) tests/faults/run.py

# KILLS= and STOPS= are how many of each.
kills: KILLS ?= 20
kills: STOPS ?= 20
kills: install-test  ## a random rank of four killed 20 times, a run stopped 20 times, and what is lost: about 10 minutes
	$(PYTHON) tests/faults/kills.py --kills $(KILLS) --stops $(STOPS)

lint: install-test  ## style, layout, spelling, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m codespell_lib
	$(PYTHON) -m mypy

format: install-test  ## lay out the code
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: install-bench  ## a training step, two processes and generation against Hugging Face
	$(PYTHON) benchmarks/train_step.py
	$(PYTHON) benchmarks/two_processes.py
	$(PYTHON) benchmarks/decode.py

bench-kernels: RESULTS ?= kernels/bench/results
bench-kernels: install-bench  ## every operator against its peers: RESULTS=DIR BENCH_FLAGS=...
	for script in $$(grep -l '^from harness' kernels/bench/*.py); do $(PYTHON) $$script --out $(RESULTS) $(BENCH_FLAGS) || exit; done

compiled: install-test  ## what the compiler makes of every kernel for four GPUs, without one: registers, spills, ...
	env -u TRITON_INTERPRET $(PYTHON) kernels/bench/compiled.py --arch sm_80 sm_90 sm_100 gfx942 \
		--out kernels/bench/results/compiled.csv

# With a python3 that has torch, triton and pytest; nothing is installed.
gpu gpu-test gpu-bench gpu-train: RESULTS ?= benchmarks/results
gpu gpu-test gpu-bench gpu-train: PYTHON = python3
GPU = PYTHONPATH=kernels:laws:.:$$PYTHONPATH $(PYTHON) benchmarks/gpu.py --out $(RESULTS)

gpu:  ## the next three in turn, on a machine with one GPU: under half an hour; installs nothing
	$(GPU)

gpu-test:  ## kernel tests on one GPU, under ten minutes: RESULTS=DIR PYTHON=...
	$(GPU) --part test

gpu-bench:  ## every operator against its peers on one GPU, under ten minutes
	$(GPU) --part bench

gpu-train:  ## a training step against Llama on one GPU, under ten minutes
	$(GPU) --part train

laws-alone:  ## install laws/ in an empty environment, without torch, and fit a published table
	rm -rf build/laws-alone laws/build
	$(BASE_PYTHON) -m venv build/laws-alone
	build/laws-alone/bin/python -m pip install -q ./laws
	cd build/laws-alone && bin/megamm-fit ../../tests/data/chinchilla_runs.csv --out fits
	cd build/laws-alone && ! bin/python -c "import torch" 2>/dev/null

site: install-docs  ## the pages as a site without network: build/site/docs/index.html
	$(PYTHON) -m sphinx -q -W --keep-going -c docs . build/site
	@echo build/site/docs/index.html

# BASE_IMAGE= names another base than NVIDIA's PyTorch image.
docker:  ## build the Docker image
	docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) -t megamm .

install: $(VENV)/.installed  ## .venv for demo and training
install-test: $(VENV)/.installed-test  ## .venv for tests and lint
install-bench: $(VENV)/.installed-bench  ## .venv for benchmarks
install-docs: $(VENV)/.installed-docs  ## .venv for the site

PIP_TORCH = $(VENV)/bin/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) numpy
GPU_SEEN = $(findstring GPU 0,$(shell nvidia-smi -L 2>/dev/null))
# Some indexes and systems have no build named +cpu: the plain one then, which is large on Linux.
INSTALL_TORCH = $(if $(TORCH)$(GPU_SEEN),$(PIP_TORCH) $(or $(TORCH),$(TORCH_RELEASE)),\
	$(PIP_TORCH) $(TORCH_RELEASE)+cpu 2>/dev/null || { \
	echo "pip finds no $(TORCH_RELEASE)+cpu: installing $(TORCH_RELEASE) (TORCH_INDEX= names an index, docs/install.md)"; \
	$(PIP_TORCH) $(TORCH_RELEASE); })

# Stamps of the files they read, so that a second call does nothing.
ifeq ($(PYTHON),$(VENV)/bin/python)
$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	$(INSTALL_TORCH)
	$(VENV)/bin/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e ".[test]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e ".[bench]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e ".[docs]"
	touch $@

# The report's screenshot test needs Chromium; it is skipped where there is none and none can be installed.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || true
else
.PHONY: $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-bench $(VENV)/.installed-docs
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-bench $(VENV)/.installed-docs browser: ;
endif

clean:  ## remove what can be built again; results stay
	rm -rf build kernels/build laws/build *.egg-info kernels/*.egg-info laws/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## also remove .venv and results: demo, demo-real, own, runs
	rm -rf $(VENV) demo demo-real own runs
