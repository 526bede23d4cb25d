# `make` alone lists what there is to make.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
# A test that hangs fails with its stack, and the others go on. The slowest takes a minute.
HANGS = --timeout 600
# Files of tests at a time. Half of what ranks do is to wait for each other, so two use two cores.
# Files are handed out in the order of tests/conftest.py, the longest first.
WORKERS = --numprocesses 2 --dist loadfile --no-loadscope-reorder
AREA ?=
ARGS ?=

# DeepSpeed's launcher, torchrun and ninja lie beside python, where pip put them.
WITH_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"
WITH_VENV_4 = PATH="$(CURDIR)/.venv-transformers-4/bin:$$PATH"

.PHONY: help
help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12]"
	@grep -hE '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) \
	    | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' \
	    | while IFS=$$'\t' read -r target does; do printf '  %-20s %s\n' "$$target" "$$does"; done

.PHONY: demo
demo: .venv/.installed ## the whole path on real text: teacher, cache, two students, a report (runs/demo)
	@$(WITH_VENV) python tools/demo.py $(ARGS)

.PHONY: test
test: .venv/.installed ## the test suite; ARGS="-k store" picks
	@$(WITH_VENV) python -m pytest -m "not long" $(HANGS) $(WORKERS) $(ARGS) tests

.PHONY: test-long
test-long: .venv/.installed ## the tests that take long; AREA names a marker (text) or a folder of tests/ (blocks)
	@if [ -z "$(AREA)" ] || [ -e "tests/$(AREA)" ]; then
	    $(WITH_VENV) python -m pytest -m long $(ARGS) tests/$(AREA)
	else
	    $(WITH_VENV) python -m pytest -m "long and $(AREA)" $(ARGS) tests
	fi

.PHONY: test-transformers-4
test-transformers-4: .venv-transformers-4/.installed ## what meets transformers, on 4.57, as plain `pip install .` resolves it
	@python=.venv-transformers-4/bin/python
	$$python -c 'import transformers; v = transformers.__version__; assert v.startswith("4."), v'
	$(WITH_VENV_4) $$python -m pytest -m "not long and not launcher" $(HANGS) $(WORKERS) $(ARGS) tests

.PHONY: lint
lint: .venv/.installed ## formatting, lint rules, types, and the direction of imports
	@$(WITH_VENV)
	failed=0
	ruff format --check . || failed=1
	ruff check . || failed=1
	mypy || failed=1
	lint-imports || failed=1
	exit $$failed

.PHONY: format
format: .venv/.installed ## bring the code into shape
	@$(WITH_VENV)
	ruff format .
	ruff check --fix .

.PHONY: venv
venv: .venv/.installed ## the pinned environment, in .venv
	@echo "ready: source .venv/bin/activate"

.PHONY: lock
lock: .venv/.installed ## resolve anew: requirements.lock and tests/transformers-4.lock (keeps torch and uv)
	@export UV_CUSTOM_COMPILE_COMMAND="make lock"
	$(call resolve,requirements.lock,--override overrides.txt)
	$(call resolve,tests/transformers-4.lock,)

.PHONY: clean
clean: ## remove the environments and what tools left behind; runs/ stays
	@rm -rf .venv .venv-transformers-4 build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

# The stamps. Each is written last, so that an interrupted install is taken up again.

.venv/.installed: requirements.lock overrides.txt setup.py
	@$(call install,requirements.lock)

.venv-transformers-4/.installed: tests/transformers-4.lock setup.py
	@$(call install,tests/transformers-4.lock)

# $(1) the lock. pip installs torch: it knows where this machine has its torch (a CPU build, or the
# CUDA build with all that belongs to it). uv installs the rest without resolving: the lock holds
# every package, and an override would replace its pin. uv does not read pip's settings: it trusts
# the machine's certificates, and UV_DEFAULT_INDEX names a mirror.
define install
	venv=$(@D)
	if ! $$venv/bin/python -c '' 2>/dev/null; then
	    if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	        echo "megadistill needs Python 3.11 or newer, and '$(PYTHON)' is not one:" \
	            "name another, for example make PYTHON=python3.12 venv" >&2
	        exit 2
	    fi
	    $(PYTHON) -m venv --clear $$venv
	fi
	echo "installing $(1) into $$venv"
	export PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_PROGRESS=1 UV_SYSTEM_CERTS=$${UV_SYSTEM_CERTS:-1}
	$$venv/bin/python -m pip install --quiet --constraint $(1) torch uv
	$$venv/bin/uv pip install --quiet --python $$venv/bin/python --no-deps --requirement $(1)
	$$venv/bin/uv pip install --quiet --python $$venv/bin/python --no-deps \
	    --config-setting editable_mode=compat --editable .
	touch $@
endef

# torch is pinned without a build's suffix, and what belongs to its CUDA build is left to pip.
define resolve
	grep -E '^(torch|uv)==' $(1) > $(1).pinned
	.venv/bin/uv pip compile --quiet --upgrade --python-version 3.11 --no-annotate \
	    --extra dev $(2) --constraint $(1).pinned setup.py > $(1).new
	grep -vE '^(cuda-|nvidia-|triton=)' $(1).new > $(1)
	rm $(1).pinned $(1).new
endef
