# make demo and make test are all that a newcomer needs: both set up .venv first if it is not there.
# Another Python than python3: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
NEW_ENOUGH := 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'

# The tests start many hundred processes, each of which would compile our code anew.
unexport PYTHONDONTWRITEBYTECODE

THOROUGH := run/test_reliability.py run/test_disk.py run/test_memory.py \
	planning/test_mixtures.py planning/test_embedders.py planning/test_checkpoints.py \
	card/test_ancestors.py evaluation/test_evaluation.py \
	run/test_properties.py searching/test_search.py searching/test_study.py searching/test_databases.py searching/test_outcome.py searching/test_candidates.py methods/test_laws.py action/test_act.py \
	distributed/test_ray.py distributed/test_spread.py project/test_integrations.py planning/test_large.py planning/test_lora_tokens.py \
	planning/test_lora_pipelines.py \
	planning/test_transplant.py run/test_hub_line.py run/test_notebook.py run/test_resume.py \
	statistics/test_measure.py statistics/test_on_the_way.py \
	space/test_api.py space/test_bot.py space/test_door.py space/test_jobs.py space/test_page.py space/test_publish.py \
	space/test_webhooks.py

WITH_ORACLES := models/test_packed.py models/test_gguf.py models/test_fp8.py \
	planning/test_embedders.py planning/test_lora_pipelines.py

.PHONY: demo test light reliability oracles lint tables clean

# Where the tests' environment is there, it does.
demo: $(if $(wildcard .venv/set-up),.venv/set-up,.venv/set-up-demo)
	$(BIN)/python examples/demo.py

test: .venv/set-up
	$(BIN)/pytest -n 4 --dist worksteal

# The package by itself, without torch, and the tests that take none.
light: .venv-light/set-up
	.venv-light/bin/pytest -n 2 --dist worksteal

# Every case of docs/reliability.md, where make test tries some, a merge larger than its memory, and thousands of drawn
# recipes, options and models: some minutes.
reliability: .venv/set-up
	RELIABILITY=all $(BIN)/pytest -n auto --maxprocesses 4 $(addprefix tests/,$(THOROUGH))

# What other libraries read and compute of their own formats, by themselves: heavy, and for a few tests alone.
oracles: .venv/set-up-oracles
	$(BIN)/pytest -rs $(addprefix tests/,$(WITH_ORACLES))

lint: .venv/set-up-lint
	$(BIN)/ruff check
	$(BIN)/ruff check --preview --select PLW1514 merger
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/windows -p merger
	$(BIN)/lint-imports
	$(BIN)/python docs/tables.py --check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions action.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml examples/*.yml
	$(BIN)/actionlint .github/workflows/*.yml examples/*.yml
	$(BIN)/zizmor --offline --quiet .

tables: .venv/set-up
	$(BIN)/python docs/tables.py
	$(BIN)/python tests/reliability/page.py
	$(BIN)/python tests/architectures/page.py

# .venv stays: it takes a while to make. Remove it by hand.
clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

.venv/set-up-demo: pyproject.toml constraints.txt
	@$(PYTHON) -c $(NEW_ENOUGH)
	PYTHON=$(PYTHON) .ci/demo
	@touch $@

# A Python's own pip may be too old to install a dependency group, so the newer one comes first.
.venv/set-up: pyproject.toml constraints.txt
	@$(PYTHON) -c $(NEW_ENOUGH)
	@echo "setting up .venv, once: some minutes, 2.5 GB with torch and what the tests need"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt --group test -e .
	@touch $@

.venv-light/set-up: pyproject.toml constraints.txt
	test -x .venv-light/bin/pip || $(PYTHON) -m venv .venv-light
	.venv-light/bin/python -m pip install --quiet -c constraints.txt --upgrade pip
	.venv-light/bin/python -m pip install --quiet -c constraints.txt --group light -e .
	@touch $@

.venv/set-up-oracles: .venv/set-up
	BUILD_CUDA_EXT=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --group oracles
	test -x .venv-pylate/bin/pip || $(PYTHON) -m venv .venv-pylate
	.venv-pylate/bin/python -m pip install --quiet --upgrade pip
	.venv-pylate/bin/python -m pip install --quiet --group pylate
	.venv-pylate/bin/python -m pip install --quiet --no-deps pylate==1.6.0
	@touch $@

.venv/set-up-lint: .venv/set-up
	$(BIN)/python -m pip install --quiet -c constraints.txt --group lint
	@touch $@
