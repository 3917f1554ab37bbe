# Each target sets up what it needs in .venv; CPU is enough for demo and test.

BIN := .venv/bin
STAMP := .venv/.setup-stamp
COMPILER := .venv/.compiler-stamp
CUDA := .venv/.cuda-stamp

# test-long: rarer cases, the model on every shape of mesh of eight simulated devices, four
# processes, and what compiles long.
.PHONY: setup demo test test-gpu test-long lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh
	@touch $@

$(COMPILER): $(STAMP)
	@scripts/setup.sh compiler
	@touch $@

$(CUDA): $(STAMP)
	@scripts/setup.sh cuda
	@touch $@

demo: $(STAMP)
	@$(BIN)/sparsex demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(COMPILER)
	$(BIN)/pytest -m "not gpu and not long" -n 2

test-long: $(COMPILER)
	$(BIN)/pytest -m "long and not gpu"

test-gpu: $(CUDA)
	JAX_PLATFORMS=cuda $(BIN)/pytest -m gpu

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis sparsex-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
