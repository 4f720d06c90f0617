# Everything needs Python 3.10 or newer and nothing else: .venv is made and filled when it is missing or out of date.
# Paths are relative, so that the folder's own name may hold spaces.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: example test pretend gpu slow coverage lint

example: .venv/.package
	$(PY) examples/quickstart.py --accelerator cpu --devices 2

# Two processes run side by side. The second runs the tests for CUDA, on a pretended device if there is no real one, in a
# process of its own because all of torch sees that device (tests/pretend_cuda/README.md), then the folders in BESIDE, whose
# tests compute on one core. Its output comes last.
BESIDE := tests/hardware tests/offload tests/planner tests/workload

test: .venv/.dev
	@log=$$(mktemp); { status=0; \
	$(PY) -m pytest --pretend-cuda -m "gpu and not slow" || status=1; \
	$(PY) -m pytest -m "not slow and not gpu" $(BESIDE) || status=1; \
	exit $$status; } >"$$log" 2>&1 & beside=$$!; \
	$(PY) -m pytest -m "not slow and not gpu" $(addprefix --ignore=,$(BESIDE)); status=$$?; \
	wait $$beside || status=1; cat "$$log"; rm -f "$$log"; exit $$status

pretend: .venv/.dev
	$(PY) -m pytest --pretend-cuda -m gpu

# The checks of a real device, in at most eight minutes, with a Python that has torch and lightning. All other packages come
# from wheels/, which `make wheels` fills beforehand on a machine with network, for the Python and system in WHEELS_FOR.
ON_DEVICE := PYTHONPATH=.gpu:. timeout

gpu:
	rm -rf .gpu
	$(PYTHON) -m pip install --disable-pip-version-check --quiet --no-index --no-deps --target .gpu wheels/*.whl
	@status=0; \
	TORCH_CUDA_SANITIZER=1 $(ON_DEVICE) 60 $(PYTHON) -m pytest -q -m "gpu and not slow" tests/offload tests/hardware || status=1; \
	$(ON_DEVICE) 80 $(PYTHON) -m pytest -q -m "gpu and not slow" || status=1; \
	$(ON_DEVICE) 340 $(PYTHON) benchmarks/on_cuda.py --minutes 5.5 --out benchmarks/results/cuda_$$(date +%F) || status=1; \
	exit $$status

WHEELS := bitsandbytes docstring-parser hypothesis importlib-resources iniconfig jsonargparse markdown-it-py mdurl pluggy \
	psutil pygments pytest rich safetensors sortedcontainers typeshed-client
WHEELS_FOR := --python-version 3.12 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64

wheels:
	$(PYTHON) -m pip download --disable-pip-version-check --quiet --no-deps --only-binary :all: $(WHEELS_FOR) \
		--constraint constraints.txt --dest wheels $(WHEELS)

slow: .venv/.dev
	$(PY) -m pytest -m "slow and not gpu"

# The tests of `make test` except those for CUDA, in one process, then the lines that none of them runs.
coverage: .venv/.dev
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -m "not slow and not gpu"; status=$$?; \
	$(PY) -m coverage combine --quiet; $(PY) -m coverage report; exit $$status

lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed and $(PYTHON) is %d.%d: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@# Debian's python3 comes without ensurepip: then virtualenv, or a pip of its own, if it has one.
	@rm -rf .venv; $(PYTHON) -m venv .venv \
	|| { rm -rf .venv; $(PYTHON) -m virtualenv --quiet .venv; } \
	|| { rm -rf .venv; $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python .venv/bin/python install pip; } \
	|| { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment: install its venv (Debian, Ubuntu: sudo apt install python3-venv) and run make again." >&2; exit 1; }
	@touch $@

.venv/.package: pyproject.toml constraints.txt | .venv/.created
	$(INSTALL) .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/.created
	$(INSTALL) ".[dev]"
	@touch $@ .venv/.package
