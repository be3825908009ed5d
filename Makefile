# elastic-ep-daemon. `make` lists the targets.
#
# PYTHON           the Python to build .venv with (3.11 to 3.13; found by itself)
# TORCH_INDEX_URL  where torch's CPU build is taken from if pip's own sources lack it
# ARGS             arguments of `make serve` and `make drill`
# STAGES           test stages to run (unit contract e2e chaos gpu)
# PYTEST_ARGS      further arguments of pytest
# REQUIRE_TOOLS    1: a missing program that tests use (docs/contributing.md) fails them
# PREFIX, SYSCONFDIR, DESTDIR, VENV   of `make install`: scripts/install.sh

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup drill serve test check format install uninstall clean distclean

# Exported as they came (empty is the same as unset to the scripts).
export PYTHON TORCH_INDEX_URL STAGES PYTEST_ARGS REQUIRE_TOOLS PREFIX SYSCONFDIR DESTDIR VENV
unexport ARGS

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## build or refresh .venv (PYTHON=python3.12 picks a Python)
	@bash scripts/setup.sh

drill: setup ## kill a rank of a daemon under load, and say what clients saw, with ARGS="..." as arguments
	@exec .venv/bin/elastic-daemon drill $(ARGS)

serve: setup ## run the daemon, with ARGS="..." as its arguments
	@exec .venv/bin/elastic-daemon serve $(ARGS)

test: check ## run the checks, then the tests, stage by stage
	@bash scripts/test.sh

check: setup ## lint, check the layout and the types
	@bash scripts/check.sh

format: setup ## mend the layout and what the linter can mend
	@.venv/bin/python -m ruff check --fix-only --quiet . ; .venv/bin/python -m ruff format .

install: ## install daemon and systemd units (PREFIX=/usr/local, DESTDIR=, VENV= of an existing environment)
	@bash scripts/install.sh install

uninstall: ## take away what install has put there
	@bash scripts/install.sh uninstall

clean: ## remove caches and build products, keep .venv
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .setup.log
	@find . -name .venv -prune -o -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	@rm -rf .venv .venv.old .setup.lock
