# Each target does all of its own set-up in .venv; it needs Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(STAMP)          ## train a small base and three experts, merge and compare them
	$(BIN)/moerge demo $(ARGS)

test: $(STAMP)          ## ruff, mypy and all tests
	$(BIN)/ruff check src tests benchmarks experiments
	$(BIN)/ruff format --check src tests benchmarks experiments
	$(BIN)/mypy
	$(BIN)/pytest

lint: $(STAMP)          ## mend what ruff can mend
	$(BIN)/ruff check --fix src tests benchmarks experiments
	$(BIN)/ruff format src tests benchmarks experiments

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[models,dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV)
