#!/usr/bin/env bash
# Runs the tests marked 'macos'. Exit 4, with the reason, elsewhere.
#
#   bash ci/macos.sh [options of pytest]
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
[ "$(uname -s)" = Darwin ] || {
  printf 'macos: not run: Core ML executes on macOS only; this is %s.\n' "$(uname -s)" >&2
  exit 4
}
bash ci/setup.sh openvino,coreml,dev
exec .venv/bin/python -m pytest -m macos --durations 15 "$@"
