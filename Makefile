# Setup, demo, tests and checks. Everything installed stays in the checkout: .uv, .venv, .venv-lowest.

.DEFAULT_GOAL := help
.PHONY: help doctor venv demo test check check-lowest kernels docs lock clean

PYTHON ?= python3
ARGS ?=
LOWEST_TESTS := tests/ir tests/ops tests/passes tests/blocks
LOWEST_COMPILED := tests/blocks/test_oracle.py -k "yarn and not v2"

UV := .uv/bin/uv
BIN := .venv/bin
# one worker a core, a file's tests on one of them, since they share what they build; in the order of tests/conftest.py
SPREAD := --numprocesses auto --dist loadfile --no-loadscope-reorder
PYTEST = $(BIN)/pytest $(SPREAD)
export UV_PYTHON_DOWNLOADS := never
export UV_HTTP_TIMEOUT ?= 120
# behind a proxy with certificates of its own, only the system's store knows them
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= true
endif

# The prompt goes through the environment, unexpanded: quotes, $ and newlines arrive as typed. Only the command line
# counts, since some shells have a variable PROMPT of their own.
ifneq ($(origin PROMPT),command line)
PROMPT := It is a truth universally acknowledged, that
endif
unexport PROMPT
demo: export DEMO_PROMPT := $(value PROMPT)

help: ## List the commands
	@grep -E '^[a-z-]+:.* ## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.* ## (.*)/\1|\2/' \
	| while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

# Python.h and a C++ compiler are for torch.compile, which builds CPU kernels with them.
define check_machine
@lack=''; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || lack="$$lack, Python >= 3.11"; \
$(PYTHON) -m pip --version >/dev/null 2>&1 || lack="$$lack, pip"; \
$(PYTHON) -c 'import os, sysconfig as s; os.stat(os.path.join(s.get_path("include"), "Python.h"))' >/dev/null 2>&1 \
	|| lack="$$lack, Python.h"; \
set -- $${CXX:-g++}; command -v "$$1" >/dev/null 2>&1 || lack="$$lack, $$1"; \
test -z "$$lack" || { \
	echo "deepfuse: this machine lacks: $${lack#, } (looked with PYTHON=$(PYTHON))"; \
	echo "Debian, Ubuntu: apt-get install python3 python3-venv python3-dev python3-pip g++ make git"; \
	exit 1; } >&2
endef

# $(call install,environment,lock)
define install
@echo "Installing $(2) into $(1)"
@$(1)/bin/python -c '' 2>/dev/null \
	|| $(UV) venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(1)
@$(UV) pip sync --python $(1) --require-hashes --no-build --compile-bytecode $(2)
@$(UV) pip install --quiet --python $(1) --offline --no-deps --no-build-isolation --editable .
@touch $(1)/.ready
endef

doctor: ## Check that this machine has what setup needs
	$(check_machine)
	@echo "Nothing is missing."

# a folder of its own, so that it works where the system's Python refuses installs
$(UV): requirements/uv.txt
	$(check_machine)
	@echo "Installing uv into .uv"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --upgrade \
		--require-hashes --only-binary :all: --target .uv --requirement $<
	@touch $@

.venv/.ready: requirements/newest.txt pyproject.toml $(UV)
	$(check_machine)
	$(call install,.venv,$<)

.venv-lowest/.ready: requirements/lowest.txt pyproject.toml $(UV)
	$(check_machine)
	$(call install,.venv-lowest,$<)

venv: .venv/.ready ## Set up .venv from requirements/newest.txt

demo: .venv/.ready ## Generate text with the shipped model: make demo PROMPT="..."
	@$(BIN)/deepfuse generate models/v3-tiny --prompt="$$DEMO_PROMPT" --report

test: .venv/.ready ## Run the tests: make test ARGS="-k rms_norm"
	@$(PYTEST) $(ARGS)

check: .venv/.ready ## Format, lint, types, layers and all tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(PYTEST) $(ARGS)

check-lowest: .venv-lowest/.ready ## Part of the tests with the lowest versions we support
	@.venv-lowest/bin/pytest $(SPREAD) -m "not compile" $(LOWEST_TESTS) $(ARGS)
	@.venv-lowest/bin/pytest -m compile $(LOWEST_COMPILED) $(ARGS)

kernels: .venv/.ready .venv-lowest/.ready ## Write the tables of compiled kernels anew
	@$(BIN)/deepfuse kernels --samples --json benchmarks/results/kernels.json > /dev/null
	@.venv-lowest/bin/deepfuse kernels --samples --json benchmarks/results/kernels_lowest.json > /dev/null

COMPILE := $(UV) --no-config pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

docs: .venv/.ready ## Write the tables of measured figures anew; fails where that changed one
	@$(BIN)/python benchmarks/write_docs.py

lock: $(UV) ## Write requirements/ anew
	@$(COMPILE) --extra test --extra lint --output-file requirements/newest.txt pyproject.toml
	@$(COMPILE) --extra test --resolution lowest-direct --output-file requirements/lowest.txt pyproject.toml
	@echo uv | $(COMPILE) --output-file requirements/uv.txt -

clean: ## Remove environments, caches and build output
	@rm -rf .uv .venv .venv-lowest dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
