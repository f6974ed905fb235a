# make demo    train on the embedded model and data, and see what it did
# make test    everything the tests need, then the tests
# make faults  runs killed and stopped at random moments, an hour or two; options in FAULTS: make faults FAULTS="--kills 50"
# make bench   this project beside TRL, hours; options in BENCH: make bench BENCH="--work dpo_hh_live --rounds 5"
# make two-hosts   train over two machines made of Linux namespaces; options in TWO_HOSTS
# All make .venv at their first call and leave the rest of the machine alone.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint faults bench two-hosts clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

faults: .venv/installed-dev
	$(BIN)/python tests/faults/long.py $(FAULTS)

bench: .venv/installed-bench
	$(BIN)/python benchmarks/bench.py $(BENCH)

two-hosts: .venv/installed
	$(BIN)/python scripts/two_hosts.py $(TWO_HOSTS)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: $(wildcard requirements*.txt) .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/installed-bench: benchmarks/requirements.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

clean:
	rm -rf .venv .ruff_cache .hypothesis
