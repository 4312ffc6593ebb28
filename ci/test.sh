#!/usr/bin/env bash
# Sets up, then every check and every test that needs neither a GPU nor macOS.
#
#   bash ci/test.sh [options of pytest]
#
# Tests run in random order (the seed is printed), with warnings as errors and sockets blocked, on a worker of one
# thread for each core, two to eight of them; line and branch coverage has a floor, which stands in pyproject.toml.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"

bash ci/setup.sh
bash ci/check.sh
workers=$(.venv/bin/python -c 'import os; print(min(max(os.cpu_count() or 2, 2), 8))')
printf 'test: all tests, on %s workers\n' "$workers"
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 exec .venv/bin/python -m pytest --numprocesses "$workers" --dist worksteal --durations 15 \
  --cov --cov-report term:skip-covered "$@"
