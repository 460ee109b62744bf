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

# KubeRay's own schemas, against which tests check the manifests in cluster/kuberay.
KUBERAY_VERSION ?= v1.7.0
KUBERAY_CRDS ?= .crds
export KUBERAY_CRDS
CRD_URL := https://raw.githubusercontent.com/ray-project/kuberay/$(KUBERAY_VERSION)/helm-chart/kuberay-operator/crds

.PHONY: demo test test-slow test-official lint install crds clean

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

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

crds:
	mkdir -p $(KUBERAY_CRDS)
	for kind in rayclusters rayjobs rayservices; do \
	    curl -fsSL $(CRD_URL)/ray.io_$$kind.yaml -o $(KUBERAY_CRDS)/ray.io_$$kind.yaml || exit 1; done

clean:
	rm -rf $(VENV) $(OFFICIAL) .crds build *.egg-info
