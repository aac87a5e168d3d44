# make demo            environment in .venv, then two networks trained on synthetic faces: minutes on two CPU cores
# make test            environment in .venv, then lint, types and tests, those of Triton in its interpreter too
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

test: $(READY) .venv/triton-3.6
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy rebalfer_kernels
	$(MAKE) tests

test-oldest:
	$(MAKE) tests VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# Triton reads TRITON_INTERPRET when it is imported; its interpreter works on one core.
INTERPRET := TRITON_INTERPRET=1 $(RUN) -m pytest -k triton
tests: $(READY)
	$(RUN) -m pytest
	@$(INTERPRET) tests/test_laws.py & first=$$!; \
	  $(INTERPRET) --ignore=tests/test_laws.py --ignore=tests/resources tests; second=$$?; \
	  wait $$first && exit $$second

mutants: $(READY)
	$(RUN) tests/mutants

sanitize: $(READY)
	$(RUN) -m pytest -v tests/test_sanitizers.py

$(VENV)/.ready: $(CONSTRAINTS)
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c $(CONSTRAINTS) $(PACKAGES)
	touch $@

# The oldest supported Triton beside the installed one: the kernels must fit their budgets under both.
.venv/triton-3.6: | $(READY)
	$(RUN) -m pip install -q --no-deps --target $@ triton==3.6.0

# The installed torch is a requirement of its own installation, so that nothing replaces it.
given:
	$(PYTHON) -m pip install -q $(PACKAGES) \
	  torch==$$($(PYTHON) -c "import importlib.metadata as m; print(m.version('torch'))")
