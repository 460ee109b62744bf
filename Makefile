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

# vLLM without a GPU, in an environment of its own: 3 GB.
VLLM ?= .venv-vllm
VLLM_STAMP := $(VLLM)/.installed

# Mistral's tokenizers and encoder, which want an older numpy than ours: an environment of its own.
MISTRAL ?= .venv-mistral

# Servers that speak the protocols of S3 and of Google's storage, against which tests run: botocore
# wants an older python-dateutil than ours, so an environment of its own.
STORES ?= .venv-stores
STORES_STAMP := $(STORES)/.installed
export STEP_RAY_STORES ?= $(abspath $(STORES)/bin)

.PHONY: demo test test-slow test-official test-vllm install-vllm test-mistral test-gpu lint install crds clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/step-ray run jobs/configs/demo.yaml

# What needs no cluster runs on all cores; the tests on Ray share one cluster, so they run in a row.
test: $(STAMP) $(STORES_STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --maxprocesses 8 --dist loadfile --ignore tests/ray
	$(BIN)/python -m pytest -m "not slow and not gpu" tests/ray

test-slow: $(STAMP) $(STORES_STAMP)
	$(BIN)/python -m pytest -m slow

# Needs a CUDA device and torch for CUDA; `pip install 'step-ray[liger]'` for the kernels of Liger.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu

$(STORES_STAMP): tests/stores.txt
	$(PYTHON) -m venv $(STORES)
	$(STORES)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/stores.txt
	touch $@

$(OFFICIAL_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OFFICIAL)
	$(OFFICIAL)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(OFFICIAL)/bin/python $(PIP_INSTALL) -e '.[alfworld,dev]'
	touch $@

test-official: $(OFFICIAL_STAMP)
	$(OFFICIAL)/bin/python -m pytest tests/envs -k alfworld

$(VLLM_STAMP): pyproject.toml tests/with_vllm/requirements.txt tests/with_vllm/make_shim.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r tests/with_vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps `$(VLLM)/bin/python tests/with_vllm/make_shim.py $(VLLM)`
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

install-vllm: $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	$(VLLM)/bin/python -m pytest tests/with_vllm

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

crds:
	mkdir -p $(KUBERAY_CRDS)
	for kind in rayclusters rayjobs rayservices; do \
	    curl -fsSL $(CRD_URL)/ray.io_$$kind.yaml -o $(KUBERAY_CRDS)/ray.io_$$kind.yaml || exit 1; done

clean:
	rm -rf $(VENV) $(OFFICIAL) $(VLLM) $(MISTRAL) $(STORES) .crds build *.egg-info
