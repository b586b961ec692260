# demo: watch a model learn a preference.   test: the tests.   check: style.
# test-newest: what touches torch, torchao, transformers, peft and trl, with the newest of them, against the pinned ones.
# Everything happens in .venv and .venv-newest, which are made on the first call.

PYTHON ?= python3
BIN = .venv/bin

# Names and numbers, NF4, two processes, files that others read, losses against TRL's
NEWEST = tests/test_versions.py tests/models/test_models.py tests/losses/test_losses_against_trl.py \
	tests/run/test_optimizers.py \
	tests/cli/test_cli.py::test_a_torchtune_recipe_runs_to_its_end_with_components_from_the_current_folder \
	"tests/recipes/test_distributed.py::test_any_number_of_processes_gives_the_numbers_of_one_device[qlora-2]" \
	"tests/recipes/test_distributed.py::test_any_number_of_processes_gives_the_numbers_of_one_device[lora-2]" \
	tests/recipes/test_distributed.py::test_an_export_of_many_processes_loads_in_transformers_and_peft

.PHONY: demo test test-newest check
demo: .venv/ready
	$(BIN)/python tools/make_reviewer2.py
	$(BIN)/tune run recipes/lora_dpo_single_device --config configs/reviewer2.yaml
	$(BIN)/python tools/judge_reviewer2.py runs/reviewer2 --check

test: .venv/ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-newest: .venv/ready-test .venv-newest/ready-test
	OMP_NUM_THREADS=1 PAIRTUNE_PINNED_PYTHON=$(CURDIR)/$(BIN)/python .venv-newest/bin/python -m pytest -n auto --dist worksteal $(NEWEST)

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

.venv-newest/ready-test: pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --constraint constraints-newest.txt --editable ".[test]"
	touch $@
