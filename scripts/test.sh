#!/usr/bin/env bash
# Runs the test stages in order and stops at the first that fails. A stage is a
# folder of tests/; the files that lie in tests/ itself belong to the first one.
#
#   STAGES="unit contract" scripts/test.sh   only these stages
#   PYTEST_ARGS="-x -k drain" scripts/test.sh
#   REQUIRE_TOOLS=1 scripts/test.sh         fail where a program that tests use is missing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ALL_STAGES=(unit contract e2e chaos gpu)
read -ra stages <<<"${STAGES:-${ALL_STAGES[*]}}"
read -ra pytest_args <<<"${PYTEST_ARGS:-}"

passed=() skipped=()
for stage in "${stages[@]}"; do
  paths=()
  if [[ -d "tests/$stage" && -n "$(find "tests/$stage" -name 'test_*.py' -print -quit)" ]]; then
    paths+=("tests/$stage")
  fi
  if [[ "$stage" == "${ALL_STAGES[0]}" ]]; then
    for file in tests/test_*.py; do
      if [[ -f "$file" ]]; then paths+=("$file"); fi
    done
  fi
  if ((${#paths[@]} == 0)); then
    printf '[test] stage %s: no tests, skipped\n' "$stage"
    skipped+=("$stage")
    continue
  fi
  printf '[test] stage %s: pytest %s\n' "$stage" "${paths[*]} ${pytest_args[*]}"
  start=$SECONDS status=0
  .venv/bin/python -m pytest "${paths[@]}" "${pytest_args[@]}" || status=$?
  case "$status" in
    0)
      printf '[test] stage %s: passed in %d s\n' "$stage" "$((SECONDS - start))"
      passed+=("$stage")
      ;;
    5)
      printf '[test] stage %s: no test selected, skipped\n' "$stage"
      skipped+=("$stage")
      ;;
    *)
      printf '[test] stage %s: FAILED after %d s\n' "$stage" "$((SECONDS - start))" >&2
      exit "$status"
      ;;
  esac
done

# A folder of tests that no stage runs would go unnoticed.
for folder in tests/*/; do
  name="$(basename "$folder")"
  if [[ " ${ALL_STAGES[*]} " != *" $name "* && -n "$(find "$folder" -name 'test_*.py' -print -quit)" ]]; then
    printf '[test] note: tests/%s belongs to no stage and was not run\n' "$name"
  fi
done
# What was skipped for want of a program must not go unnoticed either. tests/tools.py has the packages.
missing=()
for tool in systemd-analyze chromium chromedriver zsh fish curl jq openssl watch; do
  if ! command -v "$tool" >/dev/null 2>&1; then missing+=("$tool"); fi
done
if ((${#missing[@]})); then
  printf '[test] note: not here, and tests that need them skipped: %s (REQUIRE_TOOLS=1 fails them)\n' "${missing[*]}"
fi
printf '[test] passed: %s; skipped: %s; %d s in all\n' "${passed[*]:-none}" "${skipped[*]:-none}" "$SECONDS"
