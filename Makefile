# Targets: setup, demo, test, kills, fuzz, chaos, soak, check, bench, bench-forward-only, bench-dlora,
# bench-offsite, bench-methods, bench-tenants, bench-devices, bench-bookkeeping. See README.md.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Apart: peft imports it wherever it can, which slows the start of every process.
QUANTIZE := $(VENV)/quantize
GEN    := isthmus/wire/gen
PROTOC = $(BIN)/python -m grpc_tools.protoc -I$(GEN)=protos/isthmus/v1 $(GEN)/backbone.proto $(GEN)/health.proto

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test kills fuzz chaos soak check bench bench-forward-only bench-dlora bench-offsite bench-methods bench-tenants bench-devices
.PHONY: bench-bookkeeping browser proto format clean

setup: $(VENV)/.ready

# The CPU build of PyTorch: from the configured index where it has one, else from PyTorch's own index.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)+cpu' 2>/dev/null || $(BIN)/pip install --quiet --index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --quiet --editable '.[edge,cloud,ray,sft,dev]'
	$(BIN)/pip install --quiet --no-deps --target $(QUANTIZE) 'bitsandbytes>=0.48'
	touch $@

demo: setup
	$(BIN)/python -m demo.run

# Debian's browser, in which the status page is tested.
browser:
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } \
		|| echo 'no chromium could be installed: install it by hand, or tests/watching/test_page.py will fail'

test: setup browser
	$(BIN)/python -m pytest
	PYTHONPATH=$(QUANTIZE) $(BIN)/python -m pytest tests/quantized

# Every method killed at every point that concerns it; `make test` takes some of them.
kills: setup
	ISTHMUS_KILLS=all $(BIN)/python -m pytest tests/kills

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.check_generated
	$(BIN)/python -m tests.check_unsafe

# INPUTS=N, SEED=N
fuzz: setup
	$(BIN)/python -m tests.fuzz.run --inputs $(or $(INPUTS),100000) --seed $(or $(SEED),0)

# MINUTES=N, SEED=N
chaos: setup
	$(BIN)/python -m tests.chaos.run --minutes $(or $(MINUTES),5) --seed $(or $(SEED),0)

soak: setup
	$(BIN)/python -m tests.soak.run

bench: setup
	$(BIN)/python -m benchmarks.run

bench-forward-only: setup
	$(BIN)/python -m benchmarks.forward_only

bench-dlora: setup
	$(BIN)/python -m benchmarks.dlora

bench-offsite: setup
	$(BIN)/python -m benchmarks.offsite

bench-methods: setup
	$(BIN)/python -m benchmarks.methods

bench-tenants: setup
	$(BIN)/python -m benchmarks.tenants

bench-devices: setup
	$(BIN)/python -m benchmarks.devices

bench-bookkeeping: setup
	$(BIN)/python -m benchmarks.bookkeeping

proto: setup
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=.

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
