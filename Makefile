# Every command that a person or CI runs here. The environment is made once and again when its two files change.
PYTHON ?= python3.11
PIP := .venv/bin/pip --disable-pip-version-check -q
INSTALL := $(PIP) install -c constraints.txt

.PHONY: setup demo serve test test-all lint bench docs image

setup: .venv/.installed

# torch first, because DeepSpeed is built against it; DeepSpeed without its CUDA kernels, which it compiles where it needs them.
.venv/.installed: pyproject.toml constraints.txt
	@echo "installing scanloom into .venv: several minutes, once" && $(PYTHON) -m venv .venv && $(INSTALL) torch setuptools wheel
	$(INSTALL) -e '.[demo,dev]'
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation deepspeed && touch $@

demo: setup
	.venv/bin/scanloom demo

serve: setup
	.venv/bin/scanloom serve --demo demo

test: setup
	.venv/bin/pytest -m 'not slow'

test-all: setup
	.venv/bin/pytest

lint: setup
	.venv/bin/ruff format --check . && .venv/bin/ruff check .
	.venv/bin/mypy && .venv/bin/pyright
	PYTHONPATH=.:platform .venv/bin/lint-imports

bench: setup
	for bench in tests/benchmarks/bench_*.py; do PYTHONPATH=.:platform .venv/bin/python $$bench || exit 1; done

docs: setup
	.venv/bin/python docs/recipe_schema.py && .venv/bin/python docs/training_memory.py

# For clusters; RAY_IMAGE, PIP_EXTRA_INDEX_URL and IMAGE may be set, too: docs/kubernetes.md.
image:
	@test -n "$(RAY_DIGEST)" || { echo "make image RAY_DIGEST=sha256:... (docs/kubernetes.md says how to find it)"; exit 2; }
	docker build $(foreach arg,RAY_IMAGE RAY_DIGEST PIP_EXTRA_INDEX_URL,$(if $($(arg)),--build-arg $(arg)=$($(arg)))) -t $(or $(IMAGE),scanloom:dev) .
