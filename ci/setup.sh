#!/usr/bin/env bash
# Makes .venv in the repository and installs the project into it; does nothing when that is already complete.
#
#   bash ci/setup.sh [EXTRAS]     EXTRAS: comma-separated extras of pyproject.toml
#
# Needs Python 3.11 or newer and pip; no root, no system packages. From the environment it takes
#   PYTHON              the interpreter; by default the first of python3.11, python3.12, ... that is new enough
#   SETUP_EXTRAS        the extras where none are given; by default openvino,coreml,tensorrt-rtx,dev
#   TORCH_REQUIREMENT   which torch; by default torch==2.13.0
# and where pip finds packages is pip's own matter (its configuration files and variables).
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
extras=${1:-${SETUP_EXTRAS:-openvino,coreml,tensorrt-rtx,dev}}
torch=${TORCH_REQUIREMENT:-torch==2.13.0}
venv=$root/.venv
unfinished=$venv/.setup-unfinished

say() { printf 'set-up: %s\n' "$*"; }
fail() {
  printf 'set-up: %s\n' "$*" >&2
  exit 4
}

find_python() {
  local name
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v -- "$name"
      return
    fi
  done
  fail "no usable Python; got none of '${PYTHON:-python3.11 ... python}' at 3.11 or newer. Install Python 3.11 and pip, or name one with PYTHON=..."
}

# The environment depends on these and on nothing else: where it lies, what it runs on, what was asked for.
fingerprint() {
  "$1" - "$root" "$extras" "$torch" <<'PYTHON'
import hashlib, pathlib, sys

root, *asked = sys.argv[1:]
digest = hashlib.sha256((pathlib.Path(root) / "pyproject.toml").read_bytes())
digest.update("\0".join([root, sys.version, *asked]).encode())
print(digest.hexdigest()[:16])
PYTHON
}

make_venv() {
  mkdir -p -- "$venv"
  : >"$unfinished"
  if "$1" -c 'import ensurepip' 2>/dev/null; then
    "$1" -m venv "$venv"
  else
    # Debian ships ensurepip in a package of its own; the system's pip can fill an environment without it.
    "$1" -m venv --without-pip "$venv"
    "$1" -m pip --python "$venv/bin/python" install --quiet pip
  fi
}

# Scripts in an environment begin with the path they were installed at, so one that was moved works only by halves.
is_usable() {
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 && head -n 3 -- "$venv/bin/pip" | grep -qF -- "$venv/bin/python"
}

if command -v flock >/dev/null; then
  # Two set-ups at once (run.sh beside test.sh) would write into each other's environment.
  exec 9<"${BASH_SOURCE[0]}"
  flock --nonblock 9 || {
    say "waiting for another set-up of $root"
    flock 9
  }
fi

python=$(find_python)
stamp=$venv/.setup-complete-$(fingerprint "$python")
if [ -f "$stamp" ] && [ ! -f "$unfinished" ] && "$venv/bin/python" -c '' 2>/dev/null; then
  say "$venv is complete and pyproject.toml is unchanged"
  exit 0
fi

if [ -f "$unfinished" ]; then
  say "an earlier set-up was interrupted; starting $venv again"
  rm -rf -- "$venv"
elif [ -d "$venv" ] && ! is_usable; then
  say "$venv does not work here (moved, or its Python is gone); starting it again"
  rm -rf -- "$venv"
fi
if [ ! -d "$venv" ]; then
  say "making $venv with $("$python" --version) ($python)"
  make_venv "$python"
fi
: >"$unfinished"

# The marker outlives only what can leave half a package behind: a kill, or Ctrl-C. When pip itself gives up (no network,
# say), it has undone its work, and the environment stays as it was.
trap 'exit 130' INT TERM
pip_install() {
  local options=() status=0
  [ -t 1 ] || options=(-qq --progress-bar off)
  "$venv/bin/python" -m pip --disable-pip-version-check install ${options[@]+"${options[@]}"} "$@" || status=$?
  [ "$status" -ne 0 ] || return 0
  [ "$status" -gt 128 ] || rm -f -- "$unfinished"
  fail "pip ended with exit code $status while installing ${*: -1}; its reason stands above. Then run this again."
}
say "1 of 2: $torch, alone and first, so that nothing else chooses another build of it"
pip_install "$torch"
say "2 of 2: the project and its dependencies, with the extras $extras (a few minutes when nothing is cached)"
pip_install --editable "${root}[$extras]"

: >"$stamp"
rm -f -- "$unfinished"
say "complete after $SECONDS s"
