# Set-up happens once, in .venv; every target below that needs it depends on its stamp file.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run in this many processes, with one thread each: on two cores one more than these, as some wait for ranks and for deaths.
JOBS ?= 3
# Examples for each property of `make fuzz`.
N ?= 2000
# Further arguments for pytest, the demo or the benchmark: make test ARGS="-k ghost"
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint fuzz bench bench-cpu bench-cuda roofline scale clean
.DELETE_ON_ERROR:

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# torch goes first and alone: resolved by itself under the constraints, it is the build that this machine's package
# index prefers (CPU or CUDA). Triton comes with CUDA builds only, but the kernels' interpreter needs it everywhere.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet triton -c constraints.txt
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(VENV)/.demo ## Train a small GPT with DP-SGD on the Python standard library (3 minutes).
	$(BIN)/python -m examples.demo $(ARGS)

# Inductor reads the processor's vector instructions from the system; that the compiler knows them too takes it a quarter of a minute
# to find out.
test: export TORCHINDUCTOR_VEC_ISA_OK ?= 1
# Memory that a compilation leaves behind is found soon enough.
test: export TORCH_DYNAMO_RUN_GC_AFTER_COMPILE ?= 0
test: $(VENV)/.dev ## Run the tests.
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

fuzz: $(VENV)/.dev ## Compare N (2000) random graphs with the per-sample oracle.
	FLASHNORM_FUZZ_EXAMPLES=$(N) OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	    $(BIN)/python -m pytest -n $(JOBS) --timeout 0 tests/test_fuzz.py $(ARGS)

bench: $(VENV)/.bench ## Measure against every peer on the CPU, small sizes (15 minutes), and judge everybody's soundness.
	$(BIN)/python -m benchmarks run all --device cpu --minutes 13.5 $(ARGS)

bench-cpu: $(VENV)/.dev ## Time a private training step against the compiled non-private one.
	$(BIN)/python -m benchmarks run core --repeats 20 --seconds 10 --contenders flashnorm $(ARGS)

bench-cuda: $(VENV)/.bench ## Measure at the papers' sizes on a GPU (25 minutes); ARGS=--dry-run generates the code without one.
	$(BIN)/python -m benchmarks run all --device cuda --minutes 24 $(ARGS)

roofline: $(VENV)/.dev ## Predict the cost of privacy on an H200 from generated code; on a GPU, measure each kernel as well.
	$(BIN)/python -m benchmarks.roofline $(ARGS)
	if $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then $(BIN)/python -m benchmarks.kernels; fi

scale: $(VENV)/.dev ## Predict memory, messages and time of Llama-13B on 4 GPUs, and of Llama-70B on 64 and 1024 (10 minutes).
	$(BIN)/python -m benchmarks.scale $(ARGS)

# The type checker reads a real installation, made from a wheel in .lint/site: an editable one hides the folders that
# package-dir maps, and only a real one shows a package or a data file that pyproject.toml forgot.
lint: $(VENV)/.dev ## Check format, lint rules and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@rm -rf build .lint
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target .lint/site .
	@rm -rf build
	MYPYPATH=.lint/site $(BIN)/mypy -p flashnorm_compile -p benchmarks -p examples

clean: ## Remove the virtual environment, builds and caches.
	rm -rf $(VENV) build dist .lint *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis examples/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
