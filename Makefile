# Doors: demo | test | bench | wheel | gpu-check. Each sets itself up from an empty checkout and reuses what is there.

VENV := .venv
PYTHON := $(VENV)/bin/python
DEPENDENCIES := $(VENV)/.dependencies
BUILT := $(VENV)/.built
TEST_MODULE := build/native-tests/.built
# The oldest Triton whose machine code is checked, beside that of the development environment.
OLD_TRITON := build/triton-3.6.0
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

# A lane without tests (pytest's exit status 5) is no failure.
pytest_lane = $(PYTHON) -m pytest python_tests -m $(1) || [ $$? -eq 5 ]

.PHONY: setup demo test lint bench wheel gpu-check
.DELETE_ON_ERROR:

setup: $(BUILT)

$(PYTHON):
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed as python3")'
	python3 -m venv $(VENV)

$(DEPENDENCIES): requirements-dev.txt | $(PYTHON)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(BUILT): $(DEPENDENCIES) $(SOURCES)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# The planner, ChaCha20 and the normals as Python functions; for tests and benches only, never shipped.
$(TEST_MODULE): $(BUILT)
	$(PYTHON) csrc/tests/native_internals.py
	touch $@

$(OLD_TRITON)/.installed: | $(DEPENDENCIES)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==3.6.0
	touch $@

demo: $(BUILT)
	$(PYTHON) -m dp_bitfit_kernels.cli demo

lint: $(BUILT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# Test tensors are small: threads that wait for each other cost more than they give. Tests of threading set their own.
test: export OMP_NUM_THREADS ?= 1
test: lint $(TEST_MODULE) $(OLD_TRITON)/.installed wheel
	$(PYTHON) -m pytest python_tests -m "not gpu and not interpreter and not mutation"
	PYTHONPATH=$(OLD_TRITON) $(PYTHON) -c 'import triton; assert triton.__version__ == "3.6.0", triton.__version__'
	PYTHONPATH=$(OLD_TRITON) $(PYTHON) -m pytest python_tests/test_triton_compile.py
	TRITON_INTERPRET=1 $(call pytest_lane,interpreter)
	$(call pytest_lane,mutation)

bench: $(TEST_MODULE)
	$(PYTHON) -m pytest bench -s

wheel: $(BUILT)
	rm -rf build/lib* build/bdist*
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist

# With the machine's own python3, torch and Triton: nothing is installed. OUT=folder redirects the result file.
gpu-check:
	python3 bench/gpu_check.py
