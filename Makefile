# make run    set up what is missing and serve the embedded model on 127.0.0.1:8000; TORCH=cpu and TORCH=cuda choose the
#             build of torch, which is CUDA's unasked only where there is an NVIDIA driver
# make test   set up what is missing and run all tests but those of make judge and make editor
# make quick  run the tests that need no model, no process and no compiler: a minute
# make judge  run the tests that take too long for every run, and write benchmarks/results/judge.json: a quarter of an hour
# make editor drive ComfyUI's own editor in chromium, if that is installed (apt install chromium-headless-shell): a minute
# make check  lint and types
# make mutate change the core modules a little, run their tests each time, and write benchmarks/results/mutation.json: how
#             many of the changes they notice (hours; MODULES=handler/engine/queue.py for a part); make mutate-changes makes
#             those that are listed, and fails if any goes unnoticed
# make gpu-wheels  fetch what a lent GPU machine lacks into .whl; benchmarks/gpu.py says what to run there
# make lock   bring platform/locks/, the versions and hashes of all that is installed, in step with requirements.txt
#             (UPGRADE=-U for newer ones)
# make peers  measure Kindling beside diffusers behind FastAPI and LitServe, which it installs in an environment of their
#             own, and write benchmarks/results/peers.json: ten minutes, half of them for compiling
# make spark  train the embedded model on (2.5 hours on two idle cores; goes on where it stopped), or with
#             FROM=nothing from nothing (4.5)
# make lower  lower the models' GPU code without a GPU and write benchmarks/results/lowered.json (two hours; 0.8 GB of
#             downloads the first time); make lower-check compares FLUX.1's with that file (minutes)

PYTHON ?= python3
PORT ?= 8000
SEED ?= 1
FROM ?= shipped
VENV := .venv
BIN := $(VENV)/bin
FAL := $(VENV)/fal
RAY := $(VENV)/ray
EDITOR := $(VENV)/editor
PEERS := $(VENV)/peers
PIP := $(BIN)/python -m pip install --disable-pip-version-check
GPULESS ?= .gpuless
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
SPREAD := -n 3 --dist loadfile --no-loadscope-reorder # in the order of tests/conftest.py
VERSION = $(shell sed -n 's/^torch==//p' requirements.txt)
export PYTHONDONTWRITEBYTECODE = # set, each of a thousand processes would compile all of handler/ and the tests anew
.DEFAULT_GOAL := run
.PHONY: run test quick judge editor peers check mutate mutate-changes gpu-wheels lock spark lower lower-check can-lower another-torch

# For Linux, PyPI's torch brings CUDA's libraries; where no driver could use them, torch's own index has one without. An
# environment keeps the build that it has, unless told otherwise; also one for another CUDA, such as older drivers need.
ifeq ($(shell uname -s),Linux)
DRIVER := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /usr/lib/wsl/lib/libcuda.so.1)
INSTALLED := $(wildcard $(VENV)/lib/python*/site-packages/torch-*.dist-info)
HAS := $(if $(INSTALLED),$(if $(findstring +cpu,$(INSTALLED)),cpu,cuda))
override TORCH := $(or $(strip $(TORCH)),$(HAS),$(if $(DRIVER),cuda,cpu))
$(if $(filter-out cpu cuda,$(TORCH))$(word 2,$(TORCH)),$(error TORCH=$(TORCH) should be cpu or cuda: which build of torch to install))
ANOTHER := $(if $(filter-out $(TORCH),$(HAS)),another-torch)
KEPT := $(if $(filter cuda,$(HAS)),$(findstring torch-$(VERSION)+,$(INSTALLED)))
else
override TORCH :=
endif
CPU_INDEX := https://download.pytorch.org/whl/cpu
ABOUT_ = torch and diffusers
ABOUT_cpu = torch for CPUs, 0.2 GB. With an NVIDIA GPU, "make TORCH=cuda" takes the one for CUDA, 2.7 GB
ABOUT_cuda = torch for CUDA, 2.7 GB to download and 5 on disk. "make TORCH=cpu" takes the one for CPUs, 0.2 GB
INSTALL_ = $(PIP) -c $(VENV)/versions torch
INSTALL_cuda = $(PIP) -c $(VENV)/versions torch$(if $(KEPT),,===$(VERSION))
# First without torch's index: what lies on a disk that pip looks through, or in a mirror, need not be downloaded.
INSTALL_cpu = $(PIP) -q -c $(VENV)/versions torch==$(VERSION)+cpu 2> /dev/null \
    || $(PIP) -c $(VENV)/versions --extra-index-url $(CPU_INDEX) torch==$(VERSION)+cpu \
    || { echo 'torch for CPUs could not be had. "make TORCH=cuda" takes the one of PyPI, 2.7 GB, which runs on CPUs too.'; exit 1; }

run: $(VENV)/run
	@$(BIN)/python -m handler serve --port $(PORT)

test: $(VENV)/dev $(FAL)/ready $(RAY)/ready
	$(BIN)/python -m pytest $(SPREAD)
	$(FAL)/bin/python -m pytest tests/platform/test_fal_app.py
	$(RAY)/bin/python -m pytest tests/platform/test_ray_app.py

quick: $(VENV)/dev
	$(BIN)/python -m pytest $(SPREAD) --quick

judge: $(VENV)/dev
	$(BIN)/python benchmarks/judge.py --save

editor: $(EDITOR)/ready
	$(EDITOR)/bin/python -m pytest tests/server/test_editor_page.py

peers: $(PEERS)/ready
	$(BIN)/python benchmarks/peers.py --save

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutate: $(VENV)/dev
	$(BIN)/python benchmarks/mutate.py $(MODULES) --seed $(SEED) --n 12 --save

mutate-changes: $(VENV)/dev
	$(BIN)/python benchmarks/mutate.py --changes

gpu-wheels: $(VENV)/run
	@$(BIN)/python benchmarks/gpurun/wheels.py

spark: $(VENV)/dev
	$(BIN)/python -m spark.train --begin $(FROM)

lower: $(GPULESS)/ready
	$(GPULESS)/venv/bin/python benchmarks/lower.py

can-lower:
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'

lower-check: $(GPULESS)/ready
	$(GPULESS)/venv/bin/python benchmarks/lower.py --check

UNHASHED := sed '/--hash=/d; s/ *\\$$//'
LOCKED := $(VENV)/lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url --system-certs $(UPGRADE)
# What differs from one build of torch to the next is in its lock alone.
APART = $$(sed -n 's/^\(torch\|triton\|cuda-[a-z]*\|nvidia-[a-z0-9-]*\)==.*/--no-emit-package \1/p' platform/locks/torch-cu130.lock)

lock: $(VENV)/run
	@$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install -q --disable-pip-version-check uv==0.13.9 cyclonedx-bom==7.5.0
	for build in cu130 cu126; do \
	    $(BIN)/python -c 'from handler.catalog.cuda import *; print(*cuda_build("'$$build'").requirements("$(VERSION)"), sep="\n")' \
	        > platform/locks/torch-$$build.in || exit; \
	done
	mv platform/locks/torch-cu126.in platform/locks/torch-cu126.lock
	$(LOCKED) platform/locks/torch-cu130.in -o platform/locks/torch-cu130.lock
	rm platform/locks/torch-cu130.in
	for sdk in requirements runpod fal ray; do \
	    sed -n "s/^$$sdk = \[\"\(.*\)\"\].*/\1/p" pyproject.toml | $(LOCKED) $(APART) -c platform/locks/torch-cu130.lock \
	        requirements.txt - -o platform/locks/$$sdk.lock || exit; \
	done
	$(UNHASHED) platform/locks/torch-cu130.lock platform/locks/runpod.lock | sort -u | \
	    $(VENV)/lock/bin/cyclonedx-py requirements - --output-reproducible -o platform/locks/sbom.json

$(VENV)/run: requirements.txt pyproject.toml platform/locks/requirements.lock platform/locks/torch-cu130.lock $(ANOTHER)
	@echo 'Setting up $(VENV), which takes a few minutes the first time: diffusers, and $(ABOUT_$(TORCH)).'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kindling needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(UNHASHED) platform/locks/torch-cu130.lock platform/locks/requirements.lock | sort -u > $(VENV)/versions
	@$(INSTALL_$(TORCH))
	$(PIP) -c $(VENV)/versions -e .
	@touch $@

$(VENV)/dev: $(VENV)/run
	@echo "Adding what the tests need."
	$(PIP) -c $(VENV)/versions -e '.[dev]'
	@touch $@

# An environment over the first, with what an extra of pyproject.toml names and the first cannot have.
PURELIB = python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
define over
@$(BIN)/python -m venv $(1)
@$(BIN)/$(PURELIB) > $(1)/over
@mv $(1)/over $$($(1)/bin/$(PURELIB))/over.pth
$(1)/bin/python -m pip install -q --disable-pip-version-check --no-warn-conflicts \
    $$(sed -n 's/^$(2) = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d '",')
@touch $@
endef

$(FAL)/ready: $(VENV)/dev
	@echo "Adding fal, in an environment over the first: its pins and RunPod's exclude each other."
	$(call over,$(FAL),fal)

$(RAY)/ready: $(VENV)/dev
	@echo "Adding Ray, in an environment over the first."
	$(call over,$(RAY),ray)

$(EDITOR)/ready: $(VENV)/dev
	@echo "Adding ComfyUI's editor, in an environment over the first."
	$(call over,$(EDITOR),comfy-ui)

$(PEERS)/ready: $(VENV)/dev
	@echo "Adding FastAPI and LitServe, in an environment over the first."
	$(call over,$(PEERS),peers)

$(GPULESS)/ready: benchmarks/gpuless/requirements.txt benchmarks/gpuless/stubs.py
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	    { echo "Lowering needs Python 3.12, as the GPU machine has it: make ... PYTHON312=/path/to/python3.12"; exit 1; }
	@echo "Setting up $(GPULESS): downloading about 0.8 GB, torch for CUDA among it; a few minutes the first time."
	@$(PYTHON312) -m venv $(GPULESS)/venv
	$(GPULESS)/venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r benchmarks/gpuless/requirements.txt
	$(GPULESS)/venv/bin/python benchmarks/gpuless/stubs.py
	@touch $@
