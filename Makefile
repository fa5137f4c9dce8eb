# Two commands for everybody, `make demo` and `make test`; each sets up its own .venv first.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
OUTPUTS := outputs
LINKS := build/links

.PHONY: demo test reproduce lint coverage docs links test-upstream test-lowest wheel clean

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

coverage: $(SETUP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --cov --cov-report term-missing:skip-covered

lint: $(SETUP) links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd $(LINKS) && $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml --no-cache --no-logo

# The pages in build/docs: README, docs/ and the other Markdown files, with links as in the repository, and the API.
docs: $(SETUP) links
	rm -rf build/docs build/docs_source
	mkdir -p build/docs_source
	cp -r README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE docs benchmarks training build/docs_source/
	for folder in checkpoints/*; do mkdir -p build/docs_source/$$folder; cp $$folder/*.md $$folder/*.png build/docs_source/$$folder/; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The package with all of its folders where they are installed, for tools that read sources.
links:
	rm -rf $(LINKS)
	mkdir -p $(LINKS)/hf_visual_perceiver
	ln -s $(CURDIR)/hf_visual_perceiver/* $(LINKS)/hf_visual_perceiver/
	ln -sfn $(CURDIR)/modeling $(CURDIR)/training $(LINKS)/hf_visual_perceiver/

# The suite with the lowest versions that pyproject.toml allows, in a new environment.
test-lowest:
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --progress-bar off --constraint tests/lowest.txt -e ".[dev]"
	.venv-lowest/bin/python -m pytest --numprocesses auto --dist loadfile

# The suites of transformers and timm themselves, downloaded when they run, on our classes.
test-upstream: $(SETUP)
	$(BIN)/python tests/upstream/run.py

wheel: $(SETUP)
	$(BIN)/python -m build --wheel

$(SETUP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[dev,docs]"
	touch $(SETUP)

clean:
	rm -rf .venv .venv-lowest $(OUTPUTS) build dist *.egg-info
