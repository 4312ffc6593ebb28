#!/usr/bin/env bash
# Runs the tests marked 'gpu', then measures dense against 2:4 on the GPU that is here (ci/bench_gpu.py). Exit 4, with
# the reason, where there is no NVIDIA GPU that torch can use.
#
#   bash ci/gpu.sh [OUT] [options of ci/bench_gpu.py]     OUT: folder of gpu.md and gpu.json; by default runs/gpu
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
missing() {
  printf 'gpu: not run: %s\n' "$*" >&2
  exit 4
}

command -v nvidia-smi >/dev/null || missing 'no NVIDIA driver; nvidia-smi is not on this machine.'
nvidia-smi --list-gpus | grep -q GPU || missing 'no NVIDIA GPU; nvidia-smi lists none.'
bash ci/setup.sh
.venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  missing 'the installed torch is a build without CUDA. Name one with TORCH_REQUIREMENT=... and run ci/setup.sh again.'
failed=0
.venv/bin/python -m pytest -m gpu --durations 15 || failed=$?
out=${1:-runs/gpu}
.venv/bin/python ci/bench_gpu.py "$out" "${@:2}"
printf '%s\n' "$out/gpu.md"
exit "$failed"
