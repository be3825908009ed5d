#!/usr/bin/env bash
# Static checks of the whole tree: lint, format, types. Runs all three and fails
# if one of them does.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON_BIN=.venv/bin/python
status=0

check() {
  printf '[check] %s\n' "$*"
  "$PYTHON_BIN" -m "$@" || status=1
}

check ruff check .
check ruff format --check .

packages=()
for package in elastic_daemon watchdog training bench tests; do
  if [[ -f "$package/__init__.py" ]]; then packages+=("$package"); fi
done
check mypy "${packages[@]}"

if ((status)); then printf '[check] failed (make format mends layout)\n' >&2; fi
exit "$status"
