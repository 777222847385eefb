# `make run` starts the relay, `make check` checks in a minute and a half, `make test` checks everything. Each makes the
# virtual environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# The tests start Python hundreds of times: its modules are compiled once.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run check test lint types check-lua docs docs-generate format lock clean system peers bench

run: $(READY)
	@exec $(BIN)/limiter serve

# What can be checked anywhere in a minute and a half: it needs no root, no package of the system and no other program.
check: lint types
	LIMITER_TEST_TOPOLOGY=valkey $(BIN)/pytest --quick --numprocesses 2 --dist worksteal

# Everything; what this machine cannot run is skipped, and the end of the output says why.
# The system tests start whole fleets and measure: they run one after the other.
test: system $(READY) peers lint types check-lua
	$(BIN)/pytest --numprocesses 2 --dist worksteal --ignore tests/system
	$(BIN)/pytest tests/system

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/codespell $$(git ls-files '*.md' '*.py' '*.lua' 2>/dev/null)

types: $(READY)
	$(BIN)/mypy

# luacheck is Debian's; the tests load every composed script into both servers in any case.
check-lua: $(READY)
	@if command -v luacheck >/dev/null; then for name in $$($(BIN)/limiter lua names | cut -d" " -f1); do \
	  $(BIN)/limiter lua show $$name | luacheck -q --config .luacheckrc --filename lua/$$name.lua - || exit 1; done; \
	else echo "luacheck is not installed (Debian: lua-check): only the servers check the scripts"; fi

# HTML in docs/_build; a warning is an error, as a link that leads nowhere.
docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build
	@echo "docs/_build/index.html"

# Writes the pages that are made from the code: the commands' help and the heads of the Lua scripts.
docs-generate: $(READY)
	$(BIN)/python docs/generate.py

format: $(READY)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# Writes the lock again, from the lower bounds in pyproject.toml.
lock: $(READY)
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group dev --group docs \
	  --no-emit-index-url --no-emit-find-links --no-header --no-annotate --upgrade pyproject.toml --output-file requirements.lock

# What has no package for pip: a second server to test against, and the Lua linter. As root they are installed;
# for anybody else the tests that need them say that they are skipped, and why.
system:
	@tools/system-packages redis-server redis-tools lua-check nginx-light docker-compose
	@command -v npm >/dev/null || tools/system-packages nodejs npm

# Clients and servers of others that the relay is tested with, each in a folder of its own.
peers: system
	@tools/test-peers $(PYTHON)

$(READY): pyproject.toml requirements.lock
	tools/make-venv $(PYTHON) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

clean:
	rm -rf $(VENV) .cache docs/_build tests/support/sdk/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache

# Half an hour to an hour: every benchmark that this machine can run, into benchmarks/RESULTS.md.
bench: $(READY)
	tools/system-packages redis-server redis-tools wrk
	@command -v npm >/dev/null || tools/system-packages nodejs npm
	$(BIN)/python -m benchmarks
