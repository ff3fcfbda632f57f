# make demo, make test: everything they need goes into .venv on the first call.
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint bench clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flexmoe needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: .venv/ready          ## compress, export and evaluate the shipped model, about three minutes
	.venv/bin/flexmoe demo

test: .venv/ready          ## the whole suite on CPU
	.venv/bin/python -m pytest -n auto

lint: .venv/ready          ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/ready         ## measure the observe pass and the export on this machine
	.venv/bin/python bench/observe.py
	.venv/bin/python bench/export.py

clean:
	rm -rf .venv build dist demo src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
