# Targets are called by CI as they are. `make` alone lists them.
PYTHON ?= python3

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
FLAGS ?= # more options for pytest
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
SOUND := -c 'import sys; sys.exit(sys.version_info < (3, 11) or sys.prefix == sys.base_prefix)'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test test-integration test-slow test-all coverage lint format lock toy clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed ## render a few small videos on this machine into outputs/demo
	$(BIN)/pyramid-render demo --output outputs/demo

serve: .venv/.installed ## answer the Videos API on this machine with the bundled model
	$(BIN)/pyramid-render serve

test: .venv/.test-installed ## the default tests, 3 minutes on 2 cores
	$(PYTEST) $(FLAGS)

test-integration: .venv/.test-installed ## tests with Ray, servers, databases and browsers, 20 minutes on 2 cores
	$(PYTEST) -m "integration and not slow" $(FLAGS)

test-slow: .venv/.test-installed ## tests that take minutes each
	$(BIN)/python -m pytest -m slow $(FLAGS)

test-all: test test-integration test-slow ## every test

# Processes that tests start are measured through PYTHONPATH and tests/process_coverage.py.
COVERAGE := outputs/coverage
coverage: .venv/.test-installed ## coverage of the default tests, and with the integration tests
	@mkdir -p $(COVERAGE)
	PYTHONPATH=$(CURDIR) COVERAGE_FILE=$(COVERAGE)/default $(PYTEST) --cov --cov-context=test --cov-report=
	PYTHONPATH=$(CURDIR) COVERAGE_FILE=$(COVERAGE)/integration $(PYTEST) -m "integration and not slow" \
		--cov --cov-context=test --cov-report=
	$(BIN)/coverage combine --keep --data-file=$(COVERAGE)/both $(COVERAGE)/default $(COVERAGE)/integration
	$(BIN)/coverage report --data-file=$(COVERAGE)/default --skip-covered
	$(BIN)/coverage report --data-file=$(COVERAGE)/both --skip-covered

lint: .venv/.test-installed ## ruff and mypy, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.test-installed ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Versions and hashes of the image's packages, wheels only. torch and its CUDA libraries have a file of their own, as an
# image without GPUs takes another build of torch.
LOCK := docs/deploy
lock: .venv/.installed ## the newest versions of the image's packages, with hashes, into docs/deploy/*.lock
	$(PIP) install --quiet 'uv>=0.13'
	@mkdir -p outputs
	$(BIN)/uv --no-config --no-python-downloads pip compile --quiet --no-header --no-annotate --generate-hashes \
		--only-binary :all: --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
		--extra c2pa --extra postgres --extra s3 --extra train --output-file outputs/full.lock --upgrade \
		pyproject.toml $(LOCK)/requirements.in
	awk '/^[a-z]/ { gpu = /^(torch|triton|nvidia-|cuda-)/ } { print > ("$(LOCK)/" (gpu ? "torch" : "requirements") ".lock") }' \
		outputs/full.lock

# Every step goes on where it was stopped. Hours on 2 cores; the weights in the package were made this way.
TOY := outputs/toy
toy: $(TOY)/transformer/model/pyramid.json ## train the bundled model

$(TOY)/blank/pyramid.json: | .venv/.test-installed
	$(BIN)/python -m pyramid_flow.toy.blank $(@D)

WORLD := $(BIN)/pyramid-render dataset world --side 64 --sizes medium --sizes large

$(TOY)/images.parquet: | .venv/.test-installed
	$(WORLD) --output $@ --count 20000 --num-frames 1 --seed 1

$(TOY)/clips.parquet: | .venv/.test-installed
	$(WORLD) --output $@ --count 3000 --num-frames 33 --seed 0

$(TOY)/vae/model/pyramid.json: jobs/toy/vae.yaml $(TOY)/blank/pyramid.json $(addprefix $(TOY)/,images.parquet clips.parquet)
	$(BIN)/pyramid-render train --config $<

$(TOY)/scenes.parquet: | .venv/.test-installed
	$(WORLD) --output $@ --count 8000 --num-frames 33 --seed 2

$(TOY)/latents/part-000000.parquet: $(TOY)/vae/model/pyramid.json $(TOY)/scenes.parquet
	$(BIN)/pyramid-render dataset encode --input $(TOY)/scenes.parquet --output $(@D) --model $(<D) \
		--dtype bfloat16 --workers 2

$(TOY)/transformer/model/pyramid.json: jobs/toy/transformer.yaml $(TOY)/latents/part-000000.parquet
	$(BIN)/pyramid-render train --config $<

clean: ## remove the virtual environment, caches and outputs/demo
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache dist outputs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment that cannot run, or whose last installation was cut off (.installing is left), is made anew;
# a sound one is kept, also one that was not made here.
.venv/.installed: pyproject.toml
	@if [ -e .venv/.installing ] || ! $(BIN)/python $(SOUND) 2>/dev/null; then \
		$(PYTHON) $(NEW_ENOUGH) 2>/dev/null || { \
			echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; \
			exit 1; \
		}; \
		rm -rf .venv && $(PYTHON) -m venv .venv; \
	fi
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	@rm -f .venv/.installed .venv/.test-installed && touch .venv/.installing
	$(PIP) install --editable . || { rm -f .venv/.installing; exit 1; }
	@rm -f .venv/.installing && touch $@

.venv/.test-installed: .venv/.installed
	@touch .venv/.installing
	$(PIP) install --editable '.[test]' || { rm -f .venv/.installing; exit 1; }
	@rm -f .venv/.installing && touch $@
