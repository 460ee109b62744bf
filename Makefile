# Two commands on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Pinned versions of everything that is installed; see constraints.txt for how to renew it.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL := $(BIN)/python $(PIP_INSTALL)

# The official ALFWorld engine, which compiles C++, in an environment of its own.
OFFICIAL ?= .venv-official
OFFICIAL_STAMP := $(OFFICIAL)/.installed

# Mistral's tokenizers and encoder, which want an older numpy than ours: an environment of its own.
MISTRAL ?= .venv-mistral

.PHONY: demo test test-slow test-official test-mistral lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/step-ray run jobs/configs/demo.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

$(OFFICIAL_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OFFICIAL)
	$(OFFICIAL)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(OFFICIAL)/bin/python $(PIP_INSTALL) -e '.[alfworld,dev]'
	touch $@

test-official: $(OFFICIAL_STAMP)
	$(OFFICIAL)/bin/python -m pytest tests/envs -k alfworld

$(MISTRAL)/.installed: pyproject.toml
	$(PYTHON) -m venv $(MISTRAL)
	$(MISTRAL)/bin/python -m pip install --quiet --disable-pip-version-check \
	  'mistral_common[sentencepiece]==1.13.1' transformers==5.19.0 tokenizers==0.23.3 protobuf \
	  'pytest>=8,<10' 'hypothesis>=6,<7' 'pydantic>=2.12,<3' 'pyyaml>=6,<7' 'jinja2>=3.1,<4'
	touch $@

test-mistral: $(MISTRAL)/.installed
	PYTHONPATH=. $(MISTRAL)/bin/python -m pytest tests/mistral

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OFFICIAL) $(MISTRAL) build *.egg-info
