#!/usr/bin/env bash
# Checks our calls of TensorRT by type, against the Python bindings of 10.16 and 11.4 (and of TensorRT-RTX, as ci/test.sh
# does). Exit 4, with the reason, where there is no C compiler, or no Linux, which the bindings are for.
#
#   bash ci/trt_stubs.sh [options of pytest]
#
# pip fetches the bindings from the registry that it is configured for, or from the folder TENSORRT_WHEELS where it is
# set. They are proprietary: they and what is made from them stay in a temporary folder. No part of the library is needed.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
missing() {
  printf 'trt_stubs: not run: %s\n' "$*" >&2
  exit 4
}

[ "$(uname -sm)" = 'Linux x86_64' ] || missing "the bindings are for Linux x86_64; this is $(uname -sm)."
command -v cc >/dev/null || missing 'no C compiler; cc is not on this machine.'
if [ -n "${TENSORRT_WHEELS-}" ]; then
  [ -d "$TENSORRT_WHEELS" ] || missing "TENSORRT_WHEELS: got '$TENSORRT_WHEELS', expected a folder with the wheels."
  TENSORRT_WHEELS=$(CDPATH='' cd -- "$TENSORRT_WHEELS" && pwd -P)
  export TENSORRT_WHEELS
fi
cd -- "$root"
bash ci/setup.sh
exec .venv/bin/python -m pytest -m 'network or not network' tests/targets/test_trt_stubs.py "$@"
