# Each target does all of its own set-up in .venv; it needs Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
# Empty: the newest versions that pip finds.
CONSTRAINTS ?= -c constraints.txt

.PHONY: demo test quick lint docs clean

demo: $(STAMP)          ## train a small base and three experts, merge and compare them
	$(BIN)/moerge demo $(ARGS)

test: $(STAMP)          ## ruff, mypy and all tests
	$(BIN)/ruff check src tests docs benchmarks experiments
	$(BIN)/ruff format --check src tests docs benchmarks experiments
	$(BIN)/mypy
	$(BIN)/pytest

quick: $(STAMP)         ## within two minutes: without the slow tests, and with few examples of each property
	MOERGE_EXAMPLES=10 $(BIN)/pytest -m "not slow"

docs: $(STAMP)          ## the documentation site, in ./site
	$(BIN)/mkdocs build --strict

lint: $(STAMP)          ## mend what ruff can mend
	$(BIN)/ruff check --fix src tests docs benchmarks experiments
	$(BIN)/ruff format src tests docs benchmarks experiments

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch $(CONSTRAINTS)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' $(CONSTRAINTS)
	touch $@

clean:
	rm -rf $(VENV)
