# Two commands for everybody, `make demo` and `make test`; each sets up its own .venv first.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
OUTPUTS := outputs

.PHONY: demo test reproduce lint test-upstream wheel clean

# Evaluate the bundled checkpoint on the embedded sample at every K and t, plot it, classify a few images.
demo: $(SETUP)
	mkdir -p $(OUTPUTS)
	$(BIN)/visual-perceiver evaluate --plot $(OUTPUTS)/tradeoff.png --json $(OUTPUTS)/evaluation.json
	$(BIN)/python -m hf_visual_perceiver.data.sample_images $(OUTPUTS)/images --count 8
	$(BIN)/visual-perceiver predict $(OUTPUTS)/images --budget K=8
	$(BIN)/visual-perceiver predict $(OUTPUTS)/images --budget t=0.8

# The paper's tables and figures beside ours, from the checkpoints in benchmarks/papers/reproduce.yaml, on the embedded sample.
reproduce: $(SETUP)
	$(BIN)/python benchmarks/papers/reproduce.py --output-dir $(OUTPUTS)/paper

test: $(SETUP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The suites of transformers and timm themselves, downloaded when they run, on our classes.
test-upstream: $(SETUP)
	$(BIN)/python tests/upstream/run.py

wheel: $(SETUP)
	$(BIN)/python -m build --wheel

$(SETUP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[dev]"
	touch $(SETUP)

clean:
	rm -rf .venv $(OUTPUTS) build dist *.egg-info
