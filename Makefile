# make demo and make test do all the set-up themselves, in an environment of their own.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.ready
	$(BIN)/python -m lasem_fast demo $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/pip install --quiet ruff==0.14.5
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch comes first and by version, so that nothing else decides which build of it is taken.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) "numpy<2.4" "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
