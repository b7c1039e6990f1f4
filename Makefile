# Every target does its own set-up: the first one that needs the virtual environment makes it.
# Needs Python >= 3.11 and make, nothing else.

PYTHON ?= python3
VENV ?= .venv
# What pip is asked for. Another version or build: make test TORCH="torch==2.13.0 --index-url <an index of CPU builds>"
# With TORCH=none, what needs no PyTorch is installed and tested.
TORCH ?= torch
# cpu or cuda13; or what pip is asked for in place of the pins: make test JAX="jax==0.12.0.1 flax==0.12.12"
JAX ?= $(if $(filter test-gpu bench-gpu,$(MAKECMDGOALS)),cuda13,cpu)
# What `make zoo` ports: torchvision, transformers or timm.
LIBRARY ?= torchvision
# For test-gpu and bench-gpu: INSTALLED=1 takes what PYTHON has as it is. Nothing is set up, nothing is downloaded.
INSTALLED ?=
# pytest processes, and further arguments for pytest: make test ARGS="-k conv"
WORKERS ?= 2
ARGS ?=

# Where XLA's compiler for GPUs is, once `make gpu-programs` has run: one for each set of versions.
GPU_PROGRAMS = $(CURDIR)/build/gpu-programs/$(VENV)

# Where `make test` runs once more what needs no PyTorch; without, the newest Python at hand.
NEWEST ?=
ifeq ($(TORCH),none)
EXTRAS := plots,train
GROUP := test
TESTED := tests/jaxensemble jaxensemble
else
EXTRAS := demo,train
GROUP := dev
TESTED :=
endif
ifeq ($(JAX),cuda13)
EXTRAS := $(EXTRAS),cuda13
JAX_PLATFORMS ?= cuda,cpu
else
JAX_PLATFORMS ?= cpu
endif
# What is asked for by name is not pinned, nor what else PyTorch or JAX has a say in.
ASKED_TORCH := $(filter-out torch none,$(TORCH))
ASKED_JAX := $(filter-out cpu cuda13,$(JAX))
ASKED := $(ASKED_TORCH) $(ASKED_JAX)
UNPINNED := $(if $(ASKED_TORCH),torch setuptools) $(if $(ASKED_JAX),jax jaxlib flax)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GPU_SETUP := $(if $(INSTALLED),,$(STAMP))
GPU_PYTHON := $(if $(INSTALLED),PYTHONPATH=. $(PYTHON),$(BIN)/python)
CHOICE := $(TORCH) with JAX for $(JAX)

# ASKED reaches the shell through the environment, so that the > of `torch>=2.13` is not a redirection.
export ASKED CHOICE JAX_PLATFORMS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Pyright otherwise asks a registry for its newest version at every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# Another choice of torch or JAX than the one installed is installed over it.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CHOICE))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-train lint style types test test-newest test-versions tested quick gpu-programs test-gpu slow further zoo operators fuzz mutants bench bench-gpu bench-training bench-porting bench-scale bench-lowering golden format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" JAX=$(JAX)' \
		'(or cuda13) NEWEST="$(NEWEST)" WORKERS=$(WORKERS) ARGS="$(ARGS)"'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt pip  # one that knows of dependency groups
	sed -e '' $(UNPINNED:%=-e '/^%==/d') constraints.txt > $(VENV)/constraints.txt
ifneq ($(strip $(ASKED)),)
	$(BIN)/pip install $$ASKED
	$(BIN)/pip freeze | grep $(UNPINNED:%=-e '^%==') >> $(VENV)/constraints.txt
endif
	$(BIN)/pip install --editable ".[$(EXTRAS)]" --group $(GROUP) --constraint $(VENV)/constraints.txt
	@printf '%s\n' "$$CHOICE" > $@

setup: $(STAMP) ## make the virtual environment and install everything into it

demo: $(STAMP) ## train two ensembles in PyTorch, port them, prove that they agree, look at their uncertainty
	$(BIN)/torch-bridge demo

demo-train: $(STAMP) ## train ten CNNs on handwritten digits in one program, next to PyTorch's loop
	$(BIN)/python examples/deep_ensemble.py

lint: style types ## check formatting, lint and types

style: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

# One thread per process: the processes of pytest-xdist already share the cores.
test tested further quick test-gpu slow operators fuzz mutants: export OMP_NUM_THREADS := 1
# Most tests compile a program to run it once: what compiles soonest serves them best.
test tested further quick test-gpu operators fuzz mutants: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1
# XLA ends the process at a flag it does not know, and jaxlib 0.11 no longer knows the emitters'.
EMITTERS = $(if $(wildcard $(VENV)/lib/python*/site-packages/jaxlib-0.10.*),--xla_cpu_use_fusion_emitters=false)
test tested further quick fuzz mutants: export XLA_FLAGS = --xla_cpu_parallel_codegen_split_count=1 $(EMITTERS)
# Its tests are skipped without it.
tested further quick: export PYTHONPATH = $(wildcard $(GPU_PROGRAMS))
# What tests measure is no one's plan.
test tested further quick gpu-programs test-gpu slow: export JAXENSEMBLE_CACHE := $(CURDIR)/build/cache

# Pyright has one thread, which is best used while the tests run.
test: $(if $(filter none,$(TORCH)),$(STAMP),style) ## lint and the tests, one in ten of long tables; what needs no PyTorch on the newest Python, too
	@$(MAKE) --no-print-directory --jobs=2 $(if $(filter none,$(TORCH)),,types) tested
	@$(MAKE) --no-print-directory test-newest

# Of what there are many cases of, one in ten: the others take longer than a change should wait.
SOON := not slow and not further

tested: $(STAMP)
	$(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal -m "$(SOON)" $(TESTED) $(ARGS)

PYTHONS = $(foreach version,$(1),python$(version) $(HOME)/.pyenv/versions/$(version).*/bin/python)
FIND = find() { for python in "$$@"; do "$$python" -c '' 2>/dev/null && echo "$$python" && return; done; }

test-newest: ## every test that needs no PyTorch, on the newest Python at hand (NEWEST= names another one)
	@$(FIND); newest=$$(find $(or $(NEWEST),$(call PYTHONS,3.13 3.12))); \
	minor() { "$$1" -c 'import sys; print(sys.version_info[:2])'; }; \
	if [ -n '$(strip $(ARGS))' ]; then echo 'Left out with ARGS: the tests that need no PyTorch, on the newest Python'; \
	elif [ -z "$$newest" ]; then echo 'Left out: the tests that need no PyTorch, on Python 3.13 or 3.12: none is at hand'; \
	elif [ "$$(minor "$$newest")" = "$$(minor $(PYTHON))" ]; then echo 'These tests ran on the newest Python at hand'; \
	else echo "The tests that need no PyTorch, on $$newest"; \
	$(MAKE) --no-print-directory tested PYTHON="$$newest" VENV=$(VENV)-newest TORCH=none JAX=cpu JAX_PLATFORMS=cpu; fi

# What ran without a failure is written into the table of README, which `doctor` reads, too.
RAN := $(CURDIR)/build/versions/tested_with.json
test-versions: $(STAMP) ## the tests with every set of versions that is supported (an hour; gigabytes of downloads)
	mkdir -p build/versions
	cp jaxensemble/tested_with.json $(RAN)
	set -e; export TESTED_WITH=$(RAN); $(FIND); \
	try() { $(MAKE) tested ARGS= VENV="build/versions/$$1" PYTHON="$$(find $$2)" TORCH="$$3" JAX="$$4"; }; \
	try lowest "$(call PYTHONS,3.11)" torch==2.13.0 cpu; \
	try middle "$(call PYTHONS,3.12)" torch==2.11.0 cpu; \
	try newest-jax "$(call PYTHONS,3.12)" none "jax==0.12.0.1 flax==0.12.12"; \
	try newest "$(call PYTHONS,3.13)" torch==2.15.0 "jax==0.12.0.1 flax==0.12.12"
	cp $(RAN) jaxensemble/tested_with.json
	$(BIN)/python -m tests.helpers.tested

quick: $(STAMP) ## in 90 seconds: format, lint, and the tests of the modules that were changed since the last commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	tests=$$($(BIN)/python -m tests.helpers.changed) && \
	$(BIN)/pytest --numprocesses $(WORKERS) -m "not slow" --budget 70 $$tests $(ARGS)

# XLA's compiler for NVIDIA's GPUs, of the version of JAX: needs no GPU, no driver, and nothing else of NVIDIA's.
$(GPU_PROGRAMS): | $(STAMP)
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(BIN)/pip install --no-deps --target $@ "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version"

gpu-programs: export PYTHONPATH := $(GPU_PROGRAMS)
gpu-programs: $(STAMP) $(GPU_PROGRAMS) ## compile programs for an H200 that is not there, and count their kernels (a download of 400 MB)
	$(BIN)/pytest tests/gpu_programs $(ARGS)

# Asks for cuda by name, so that a missing GPU is an error. Processes share the GPU, so none may reserve most of it.
test-gpu: export JAX_PLATFORMS := cuda,cpu
test-gpu: export XLA_PYTHON_CLIENT_PREALLOCATE := false
test-gpu: $(GPU_SETUP) ## the tests of `make test`, on the GPU (JAX=cuda13 by default)
	$(GPU_PYTHON) -m pytest $(if $(INSTALLED),,--numprocesses $(WORKERS)) -m "$(SOON)" $(ARGS)

slow: $(STAMP) further ## the slow tests, and all cases that `make test` leaves out
	$(BIN)/pytest --numprocesses $(WORKERS) -m slow $(ARGS)

further: $(STAMP)
	$(BIN)/pytest --numprocesses $(WORKERS) -m "further and not slow" $(ARGS)

# torchvision's wheels need the very torch they were built with; its model definitions do not, and come without the rest.
build/zoo/torchvision:
	$(BIN)/pip install --no-deps --target build/zoo "torchvision==0.28.0"

build/zoo/transformers:
	$(BIN)/pip install --target build/zoo "transformers==5.24.0"

# timm asks for torchvision, of which it uses definitions only.
build/zoo/timm: | build/zoo/torchvision
	$(BIN)/pip install --no-deps --target build/zoo "timm==1.0.31"
	$(BIN)/pip install --target build/zoo "huggingface_hub==2.4.0" safetensors pyyaml

# LIBRARY=transformers: small models of its families, in some minutes. LIBRARY=timm: one network of each of its modules.
zoo: $(STAMP) build/zoo/$(LIBRARY) ## port all of torchvision's classification networks and prove them (an hour; resumes)
	$(BIN)/python -m benchmarks.zoo --library $(LIBRARY) $(ARGS)
	$(if $(filter timm,$(LIBRARY)),$(BIN)/python -m benchmarks.zoo --library timm --train $(ARGS))
	$(BIN)/python -m benchmarks.zoo.coverage

fuzz: $(STAMP) ## prove random networks in every stage and in other ways of running them (resumes)
	$(BIN)/python -m benchmarks.trust fuzz $(ARGS)

mutants: $(STAMP) ## plant errors into random networks, which the proof has to find (resumes)
	$(BIN)/python -m benchmarks.trust mutants $(ARGS)

operators: $(STAMP) ## port PyTorch's own operator database, three samples of each operator (half an hour; resumes)
	$(BIN)/python -m benchmarks.zoo.operators $(ARGS)
	$(BIN)/python -m benchmarks.zoo.coverage

bench: $(STAMP) build/zoo/torchvision ## time ensembles next to every way that PyTorch has of running them, on the CPU
	$(BIN)/python -m benchmarks.speed tutorial zoo scaling
	$(BIN)/python -m benchmarks.speed.overhead
	$(BIN)/python -m benchmarks.speed.figures

# Asks for cuda by name, as test-gpu does.
bench-gpu: export JAX_PLATFORMS := cuda,cpu
bench-gpu: export XLA_PYTHON_CLIENT_PREALLOCATE := false
bench-gpu: $(GPU_SETUP) ## the same on the GPU, in float32, TF32 and bfloat16 (JAX=cuda13 by default)
	$(GPU_PYTHON) -m benchmarks.speed tutorial images --rounds 5
	$(GPU_PYTHON) -m benchmarks.speed tutorial images --rounds 5 --tf32
	$(GPU_PYTHON) -m benchmarks.speed tutorial images --rounds 5 --dtype bfloat16
	$(GPU_PYTHON) -m benchmarks.speed.figures

bench-training: $(STAMP) build/zoo/torchvision ## time a training step next to PyTorch's ways, and measure its memory (on a GPU with JAX=cuda13)
	$(BIN)/python -m benchmarks.speed training --rounds 5
	$(BIN)/python -m benchmarks.speed.memory
	$(BIN)/python -m benchmarks.speed.figures

bench-lowering: $(STAMP) ## how fast every form of a convolution is, layer by layer, and how far steps round
	$(BIN)/python -m benchmarks.speed.lowering
	$(BIN)/python -m benchmarks.speed.rounding

bench-scale: $(STAMP) ## time members over 1, 2 and 4 processes of this machine, and write the tables of docs/scale.md
	$(BIN)/python -m benchmarks.speed.scale

bench-porting: $(STAMP) build/zoo/torchvision ## time and memory of porting
	$(BIN)/python -m benchmarks.speed.porting

golden: $(STAMP) ## write the golden sources again, after a change of what is printed
	UPDATE_GOLDEN=1 $(BIN)/pytest -m "" tests/torch_bridge/porting/test_golden.py

format: $(STAMP) ## format and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment, builds and caches
	rm -rf $(VENV) $(VENV)-newest build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
