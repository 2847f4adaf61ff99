# Every target installs what it needs into .venv from constraints.txt, and only when
# pyproject.toml or constraints.txt changed since. Another interpreter: make test PYTHON=python3.12
# (remove .venv first).

PYTHON ?= python3
BIN := .venv/bin
BETTY := betty-ml==0.2.1
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-all fuzz check bench gallery format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      hypergradients through an ordinary loop: run, explain and draw one example"
	@echo "make test      lint, types and all but the slow tests"
	@echo "make test-all  the slow tests too, and which planted faults the tests notice"
	@echo "make fuzz      judge N=10000 generated programs; stops and goes on at any moment"
	@echo "make bench     every script of benchmarks/"
	@echo "make gallery   draw the loops of docs/gallery and every example into docs/gallery/"
	@echo "make format    let ruff rewrite what it can"
	@echo "make clean     remove what was built (not .venv)"

# --- environment

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/.installed-demo: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing mlc for the demo into .venv (the first time takes minutes: torch is large)"
	$(INSTALL) --editable '.[draw,examples]'
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing mlc, its tests and its tools into .venv (the first time takes minutes: torch is large)"
	$(INSTALL) --editable '.[draw,examples,test,dev]'
	@touch $@ .venv/.installed-demo

.venv/.installed-bench: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing mlc and what the benchmarks need into .venv"
	$(INSTALL) --editable '.[draw,examples,bench]'
	@touch $@ .venv/.installed-demo

# Betty declares Python below 3.11 (it runs on later ones): a folder of its own, which only benchmarks look into.
.venv/.installed-peers: .venv/.installed-bench
	@echo "installing what the benchmarks compare with into .venv/peers"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --upgrade --target .venv/peers $(BETTY) \
		&& touch $@ || echo "Betty could not be installed: the benchmarks go without it, and the next run tries again"

# --- what people run

demo: .venv/.installed-demo
	@mkdir -p build
	$(BIN)/mlc run examples/reweighting.py
	$(BIN)/mlc explain examples/reweighting.py
	$(BIN)/mlc draw examples/reweighting.py -o build/reweighting.svg

check: .venv/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: check
	$(BIN)/python -m pytest -n auto --dist worksteal -m ''
	$(BIN)/python -m tests.mutation

N ?= 10000
fuzz: .venv/.installed-test
	$(BIN)/python -m tests.fuzz run -n $(N)

bench: .venv/.installed-peers
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

gallery: .venv/.installed-demo
	$(BIN)/python docs/gallery/draw.py

format: .venv/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find mlc tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
