# make demo: eight adapters learn at once on this machine's CPU. make test: everything that must hold.
# Each does the set-up it needs, in .venv; nothing is installed elsewhere.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: demo test smoke lint setup clean

demo: $(READY)
	$(BIN)/weft adapters=demo run.dir=outputs/demo

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The benchmarks in small: that they run and write what they should; their figures mean nothing.
smoke: $(READY)
	$(BIN)/python benchmarks/experiments.py --smoke
	$(BIN)/python benchmarks/param_sync.py --smoke
	$(BIN)/python benchmarks/learning.py --smoke
	$(BIN)/python benchmarks/decode.py --smoke

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(READY)

# torch first: the CPU build has to be there before anything that would pull the CUDA one. --no-deps: the pins are complete.
$(READY): requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile uv torch==2.13.0
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements/cpu.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	mkdir -p .typing/weft && for x in actors configs kernels pipeline transport; do ln -sfn ../../$$x .typing/weft/$$x; done
	touch $@

clean:
	rm -rf $(VENV) .typing outputs
