# make demo            environment in .venv, then two networks trained on synthetic faces: minutes on two CPU cores
# make test            environment in .venv, then lint, types and tests
# make test PYTHON=…   the same in an environment you have: adds what is missing, never another torch
# make test-oldest     the tests on the oldest supported torch and its Triton, in an environment of its own
# make mutants         breaks the sources in one place at a time: each time a named test must fail
# make sanitize        the CPU kernels under AddressSanitizer and UBSan
VENV := .venv
CONSTRAINTS := constraints.txt
PACKAGES := torch torchvision timm numpy ninja matplotlib tqdm tensorboard pytest pytest-benchmark hypothesis ruff mypy setuptools

ifdef PYTHON
RUN := $(PYTHON)
READY := given
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test test-oldest tests mutants sanitize given
demo: $(READY)
	$(RUN) -m trainer demo

test: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy rebalfer_kernels
	$(RUN) -m pytest

test-oldest:
	$(MAKE) tests VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

tests: $(READY)
	$(RUN) -m pytest

mutants: $(READY)
	$(RUN) tests/mutants.py

sanitize: $(READY)
	$(RUN) -m pytest -v tests/test_sanitizers.py

$(VENV)/.ready: $(CONSTRAINTS)
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c $(CONSTRAINTS) $(PACKAGES)
	touch $@

# The installed torch is a requirement of its own installation, so that nothing replaces it.
given:
	$(PYTHON) -m pip install -q $(PACKAGES) \
	  torch==$$($(PYTHON) -c "import importlib.metadata as m; print(m.version('torch'))")
