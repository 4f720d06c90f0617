# Everything needs Python 3.10 or newer and nothing else: .venv is made and filled when it is missing or out of date.
# Paths are relative, so that the folder's own name may hold spaces.
PYTHON ?= python3
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: example test pretend slow coverage lint

example: .venv/.package
	$(PY) examples/quickstart.py --accelerator cpu --devices 2

test: .venv/.dev
	$(PY) -m pytest -m "not slow and not gpu"

# What needs a CUDA device, on one that is pretended where there is none: tests/pretend_cuda/README.md. In a process of
# its own, since all of torch sees the device.
pretend: .venv/.dev
	$(PY) -m pytest --pretend-cuda -m gpu

slow: .venv/.dev
	$(PY) -m pytest -m "slow and not gpu"

# The same tests, slower, and then the lines that none of them runs.
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
