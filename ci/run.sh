#!/usr/bin/env bash
# Sets up, runs the recipe 'shapes' on the embedded model and prints the path of the HTML report as its last line.
#
#   bash ci/run.sh [--out DIR] [options of 'exporter run']
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
out=$root/runs/shapes
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --out)
      [ $# -ge 2 ] || {
        printf 'run: --out: no folder; got nothing, expected a path. Write --out DIR.\n' >&2
        exit 2
      }
      out=$2
      shift
      ;;
    --out=*) out=${1#--out=} ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

bash "$root/ci/setup.sh"
printf "run: the recipe 'shapes' on the embedded model, into %s\n" "$out"
status=0
"$root/.venv/bin/exporter" run shapes --out "$out" ${arguments[@]+"${arguments[@]}"} || status=$?
printf 'run: ended with exit code %s after %s s, set-up included\n' "$status" "$SECONDS"
# A run whose gate was missed has a report too, and that is when it is wanted most.
if [ -f "$out/report.html" ]; then
  printf '%s/report.html\n' "$(CDPATH='' cd -- "$out" && pwd -P)"
fi
exit "$status"
