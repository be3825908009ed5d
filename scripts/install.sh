#!/usr/bin/env bash
# Puts the daemon and its systemd units below a prefix, or takes them away again.
#
#   scripts/install.sh install|uninstall
#
# PREFIX      where it goes (/usr/local)
# SYSCONFDIR  where elastic-daemon/elastic-daemon.toml is (/etc)
# DESTDIR     a root to stage into, for packagers; no file names it
# VENV        an environment that has the daemon; without it, one for NVIDIA GPUs is made, with PyPI's packages, in
#             PREFIX/lib/elastic-daemon/venv
# PYTHON      the Python to make it with (python3)
#
# It copies files and starts nothing: what is left to do is printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PREFIX="${PREFIX:-/usr/local}"
SYSCONFDIR="${SYSCONFDIR:-/etc}"
DESTDIR="${DESTDIR:-}"
PYTHON="${PYTHON:-python3}"

BINDIR="$PREFIX/bin"
UNITDIR="$PREFIX/lib/systemd/system"
SYSUSERSDIR="$PREFIX/lib/sysusers.d"
TMPFILESDIR="$PREFIX/lib/tmpfiles.d"
DOCDIR="$PREFIX/share/doc/elastic-daemon"
CONFDIR="$SYSCONFDIR/elastic-daemon"
OWN_VENV="$PREFIX/lib/elastic-daemon/venv"

# All pages, what they link to, and the alert rules and dashboard that they speak of.
DOCUMENTS=(README.md LICENSE docs deploy)

# Where each shell looks for what completes a program, @ being its name.
declare -A COMPLETIONS=(
  [bash]=share/bash-completion/completions/@
  [zsh]=share/zsh/site-functions/_@
  [fish]=share/fish/vendor_completions.d/@.fish
)

fail() {
  printf '[install] %s\n' "$*" >&2
  exit 2
}

# A space or a special character would need quoting in units and scripts.
for path in "$PREFIX" "$SYSCONFDIR" "${VENV:-/}"; do
  [[ "$path" =~ ^/[A-Za-z0-9._/+@-]*$ ]] ||
    fail "$path: give an absolute path of letters, digits and . _ + @ - only"
done

put() { install -D -m "$1" "$2" "$DESTDIR$3"; }

# put_rendered MODE FILE TARGET: with the paths filled in.
put_rendered() {
  install -d "$DESTDIR$(dirname "$3")"
  sed "s|@PREFIX@|$PREFIX|g; s|@BINDIR@|$BINDIR|g; s|@SYSCONFDIR@|$SYSCONFDIR|g" "$2" >"$DESTDIR$3"
  chmod "$1" "$DESTDIR$3"
}

# put_once MODE FILE TARGET: rendered, and not over what an operator has written.
put_once() { [[ -e "$DESTDIR$3" ]] || put_rendered "$@"; }

# Not the environment's own scripts, whose first line names the place where it was built.
put_program() {
  install -d "$DESTDIR$BINDIR"
  printf '#!/bin/sh\nexec %s -I -m %s "$@"\n' "$3/bin/python" "$2" >"$DESTDIR$BINDIR/$1"
  chmod 0755 "$DESTDIR$BINDIR/$1"
}

# put_completions NAME MODULE VENV: if the program can run here and makes them.
put_completions() {
  local shell script target
  for shell in "${!COMPLETIONS[@]}"; do
    script="$("$3/bin/python" -I -m "$2" completion "$shell" 2>/dev/null)" || continue
    [[ -n "$script" ]] || continue
    target="$DESTDIR$PREFIX/${COMPLETIONS[$shell]//@/$1}"
    install -d "$(dirname "$target")"
    printf '%s\n' "$script" >"$target"
  done
}

# As the tree has them, so that their links hold.
put_documents() {
  local file
  remove_documents
  while IFS= read -r file; do put 0644 "$file" "$DOCDIR/$file"; done < <(find "${DOCUMENTS[@]}" -type f)
}

# Folders whole: nothing of an earlier version may stay beside the new one. That had two pages at the top.
remove_documents() {
  local name
  for name in "${DOCUMENTS[@]}" deploy.md watchdog.md; do rm -rf "$DESTDIR$DOCDIR/$name"; done
}

make_venv() {
  "$PYTHON" -I -m venv "$DESTDIR$OWN_VENV"
  "$DESTDIR$OWN_VENV/bin/python" -I -m pip --disable-pip-version-check --no-input install ".[cuda]"
}

install_all() {
  local venv="${VENV:-$OWN_VENV}" runnable="${VENV:-$DESTDIR$OWN_VENV}"
  if [[ -z "${VENV:-}" ]]; then make_venv; fi
  [[ -n "$DESTDIR" || -x "$venv/bin/python" ]] || fail "$venv has no bin/python: name an environment with VENV="
  put_program elastic-daemon elastic_daemon.cli "$venv"
  put_program elastic-watchdog watchdog.cli "$venv"
  put_completions elastic-daemon elastic_daemon.cli "$runnable"
  put_completions elastic-watchdog watchdog.cli "$runnable"
  put_rendered 0644 systemd/elastic-daemon.service "$UNITDIR/elastic-daemon.service"
  put_rendered 0644 systemd/elastic-watchdog.service "$UNITDIR/elastic-watchdog.service"
  put 0644 systemd/sysusers.conf "$SYSUSERSDIR/elastic-daemon.conf"
  put_rendered 0644 systemd/tmpfiles.conf "$TMPFILESDIR/elastic-daemon.conf"
  put_once 0644 systemd/elastic-daemon.toml "$CONFDIR/elastic-daemon.toml"
  put_once 0600 systemd/secrets.env "$CONFDIR/secrets.env"
  # systemd-tmpfiles gives them to the daemon's group, which may not exist yet.
  put_once 0640 systemd/api-keys "$CONFDIR/api-keys"
  put_once 0640 systemd/admin-key "$CONFDIR/admin-key"
  put_documents
  printf '[install] installed below %s\n' "$DESTDIR$PREFIX"
  cat <<EOT
[install] left to do on the machine that is to serve, as root:
    systemd-sysusers $SYSUSERSDIR/elastic-daemon.conf
    systemd-tmpfiles --create $TMPFILESDIR/elastic-daemon.conf
    systemctl daemon-reload
    \$EDITOR $CONFDIR/elastic-daemon.toml
    systemctl enable --now elastic-watchdog.service elastic-daemon.service
EOT
}

# Only what install puts there; configuration, state and caches stay.
uninstall_all() {
  local target folder
  rm -f "$DESTDIR$BINDIR/elastic-daemon" "$DESTDIR$BINDIR/elastic-watchdog" \
    "$DESTDIR$UNITDIR/elastic-daemon.service" "$DESTDIR$UNITDIR/elastic-watchdog.service" \
    "$DESTDIR$SYSUSERSDIR/elastic-daemon.conf" "$DESTDIR$TMPFILESDIR/elastic-daemon.conf"
  remove_documents
  for target in "${COMPLETIONS[@]}"; do
    rm -f "$DESTDIR$PREFIX/${target//@/elastic-daemon}" "$DESTDIR$PREFIX/${target//@/elastic-watchdog}"
  done
  if [[ -f "$DESTDIR$OWN_VENV/pyvenv.cfg" ]]; then rm -rf "$DESTDIR$OWN_VENV"; fi
  for folder in "$DOCDIR" "$PREFIX/lib/elastic-daemon"; do
    if [[ -d "$DESTDIR$folder" ]]; then rmdir --ignore-fail-on-non-empty "$DESTDIR$folder"; fi
  done
  printf '[install] removed; %s, /var/lib/elastic-daemon and /var/cache/elastic-daemon are kept\n' "$CONFDIR"
}

case "${1:-}" in
  install) install_all ;;
  uninstall) uninstall_all ;;
  *) fail "say install or uninstall" ;;
esac
