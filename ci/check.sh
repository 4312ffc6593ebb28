#!/usr/bin/env bash
# Everything that can be said about the sources without running them: format, lint, types, layers, sizes, scripts,
# recipes. Under a minute. All checks run, whatever the first ones say; the exit code is 1 when any failed.
#
#   bash ci/check.sh              needs the environment of ci/setup.sh
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bin=$root/.venv/bin
[ -x "$bin/ruff" ] || {
  printf 'check: %s is missing. Run: bash ci/setup.sh\n' "$bin/ruff" >&2
  exit 4
}

failed=()
check() {
  local title=$1 from=$SECONDS
  shift
  printf 'check: %s\n' "$title"
  "$@" || failed+=("$title")
  printf 'check: %s: %s s\n' "$title" "$((SECONDS - from))"
}

# Linters of scripts are binaries that are not built for every machine; one that is missing is named, not left out.
tool() {
  local name=$1
  shift
  if [ -x "$bin/$name" ]; then
    "$bin/$name" "$@"
  else
    printf 'check: not checked: there is no build of %s for this machine (%s)\n' "$name" "$(uname -sm)"
  fi
}

check 'format' "$bin/ruff" format --check --quiet .
check 'lint' "$bin/ruff" check --quiet .
check 'types' "$bin/mypy"
check 'layers' "$bin/lint-imports" --no-logo
check 'shell scripts' tool shellcheck ci/*.sh .ci/run
check 'Dockerfile' tool hadolint Dockerfile
check 'sizes, words, folders, recipes' "$bin/python" -m pytest --quiet -p no:randomly -p no:cacheprovider \
  tests/project/test_sizes.py tests/project/test_text.py tests/project/test_top_level.py tests/project/test_recipes.py

if [ ${#failed[@]} -gt 0 ]; then
  printf 'check: failed:'
  printf ' [%s]' "${failed[@]}"
  printf '\n'
  exit 1
fi
printf 'check: all passed in %s s\n' "$SECONDS"
