# make demo            environment in .venv, then two networks trained on synthetic faces: minutes on two CPU cores
# make test            environment in .venv, then lint, types and tests
# make test PYTHON=…   the same in an environment you have: adds what is missing, never another torch
VENV := .venv
PACKAGES := torch torchvision timm numpy ninja matplotlib tqdm tensorboard pytest pytest-benchmark hypothesis ruff mypy setuptools

ifdef PYTHON
RUN := $(PYTHON)
READY := given
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test given
demo: $(READY)
	$(RUN) -m trainer demo

test: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy rebalfer_kernels
	$(RUN) -m pytest

$(VENV)/.ready: constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt $(PACKAGES)
	touch $@

# The installed torch constrains its own installation, so that nothing replaces it.
given:
	@$(PYTHON) -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(or $(TMPDIR),/tmp)/rebalfer-torch.txt
	$(PYTHON) -m pip install -q -c $(or $(TMPDIR),/tmp)/rebalfer-torch.txt $(PACKAGES)
