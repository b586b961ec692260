# demo: watch a model learn a preference.   test: the tests.   check: style.
# Everything happens in .venv, which is made on the first call.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test check
demo: .venv/ready
	$(BIN)/python tools/make_reviewer2.py
	$(BIN)/tune run recipes/lora_dpo_single_device --config configs/reviewer2.yaml
	$(BIN)/python tools/judge_reviewer2.py runs/reviewer2 --check

test: .venv/ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@ .venv/ready
