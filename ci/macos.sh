#!/usr/bin/env bash
# Runs the tests marked 'macos', then measures a kit for Core ML through Core ML itself, once per compute unit. Exit 4,
# with the reason, where there is no Core ML.
#
#   bash ci/macos.sh                  the tests alone
#   bash ci/macos.sh KIT              and a kit (`exporter kit RUN --target NAME`); says how what it found is merged
#   bash ci/macos.sh RUN [TARGET]     and a run's target of type coreml: makes its kit, measures it and merges
#
# From the environment it takes
#   OUT         folder of engines and results; by default runs/macos
#   HOST_NAME   what reports call this Mac; by default what hostname says
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
from=$PWD
cd -- "$root"
missing() {
  printf 'macos: not run: %s\n' "$*" >&2
  exit 4
}
wrong() {
  printf 'macos: %s\n' "$*" >&2
  exit 2
}
absolute() {
  case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$from/$1" ;;
  esac
}

# What was asked for is looked at before anything is set up, which takes minutes.
given='' kit='' run=''
if [ "$#" -gt 0 ]; then
  given=$(absolute "$1")
  if [ -f "$given/measure.py" ]; then
    kit=$given
    [ "$#" -eq 1 ] || wrong "got '$2' after a kit, expected nothing: a kit is for one target. Leave it out."
  elif [ -f "$given/report.json" ]; then
    run=$given
    [ "$#" -le 2 ] || wrong "got '$3', expected RUN and a target. Leave the rest out."
  else
    wrong "$1: no kit and no run; got neither measure.py nor report.json in it. Make a kit: exporter kit RUN --target NAME"
  fi
fi

[ "$(uname -s)" = Darwin ] || missing "Core ML executes on macOS only; this is $(uname -s)."
bash ci/setup.sh openvino,coreml,dev
bin=$root/.venv/bin
"$bin/python" -c 'import coremltools.libcoremlpython' 2>/dev/null ||
  missing 'the installed coremltools has no bindings of Core ML. Install its wheel for this Mac and this Python.'

failed=0
"$bin/python" -m pytest -m macos --durations 15 || failed=$?
[ -n "$given" ] || exit "$failed"

out=$(absolute "${OUT:-$root/runs/macos}")
host=${HOST_NAME:-$(hostname -s)}
host=$(printf '%s' "$host" | LC_ALL=C tr -c 'A-Za-z0-9._-' '-' | LC_ALL=C sed 's/^[^A-Za-z0-9]*//' | cut -c 1-40)
host=${host:-mac}

targets='import json, pathlib, sys

told = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
print(*(item["name"] for item in told["targets"] if item["type"] == "coreml" and not item.get("host")))'
if [ -n "$run" ]; then
  target=${2:-}
  if [ -z "$target" ]; then
    target=$("$bin/python" -c "$targets" "$run/report.json")
    case $target in
      '') wrong "$run: got no target of type coreml, expected one. Give a run that has one." ;;
      *' '*) wrong "$run: got several targets of type coreml: $target. Write which: bash ci/macos.sh RUN TARGET" ;;
    esac
  fi
  kit=$out/kit-$target
  "$bin/exporter" kit "$run" --target "$target" --out "$kit"
fi

merges=()
for unit in cpu cpu-and-gpu cpu-and-neural-engine all; do
  place=$out/$host-$unit
  rm -f -- "$place/result.json"
  status=0
  "$bin/python" "$kit/measure.py" --name "$host-$unit" --option "compute_units=$unit" --out "$place" || status=$?
  [ "$status" -eq 0 ] || failed=$status
  # A state that failed is told in the result; without one, nothing could be measured at all.
  [ -f "$place/result.json" ] || continue
  merges+=("$place/result.json")
done
for result in ${merges[@]+"${merges[@]}"}; do
  if [ -n "$run" ]; then
    "$bin/exporter" merge "$run" "$result" || failed=$?
  else
    printf 'exporter merge RUN %s\n' "$result"
  fi
done
exit "$failed"
