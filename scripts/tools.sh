#!/usr/bin/env bash
# tools.sh: install the programs that tests use and the project does not bring (tests/tools.py), on Debian and Ubuntu, as
# root. Status 0: all are there. 1: they are not, and tests that need one are skipped.
set -uo pipefail

PROGRAMS=(systemd-analyze chromium chromedriver zsh fish curl jq openssl watch)
PACKAGES=(systemd chromium chromium-driver zsh fish curl jq openssl procps)
LIMIT_S=300

missing() {
  local program
  for program in "${PROGRAMS[@]}"; do
    command -v "$program" >/dev/null || echo "$program"
  done
}

[ -n "$(missing)" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "[tools] missing: $(missing | tr '\n' ' '); their tests are skipped (Debian and Ubuntu: apt-get install ${PACKAGES[*]})"
  exit 1
fi
echo "[tools] installing: $(missing | tr '\n' ' ')"
export DEBIAN_FRONTEND=noninteractive
timeout "$LIMIT_S" apt-get update -qq >/dev/null 2>&1
timeout "$LIMIT_S" apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >/dev/null 2>&1
[ -z "$(missing)" ] || { echo "[tools] could not be installed: $(missing | tr '\n' ' '); their tests are skipped"; exit 1; }
