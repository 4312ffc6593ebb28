"""The table of ci/bench_gpu.py's figures: ``python ci/gpu_table.py gpu.json`` prints it as Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
CLAIMED = 1.2
"""SparseDM's headline: how many times as fast 2:4 makes a network."""
KINDS = ("fp16", "bf16", "int8")
HOW = (
    "How it was taken: every variant is recorded as a CUDA graph (a layer as 20 products in a row, so its weights stay "
    "in the GPU's cache), dense and 2:4 are replayed pair by pair in alternating order between two events of the "
    "device, after a warm-up until their times settle. A gain is the median over the pairs of dense over 2:4 with its "
    "95 % interval: above 1, 2:4 is faster. Weights are random, magnitude 2:4 along the inputs; the dense twin has the "
    "same zeros. 2:4 is PyTorch's semi-structured tensor with cuSPARSELt's default algorithm; *searched* has the one "
    "that its search finds for the shape. int8 is `torch._int_mm` against `torch._cslt_sparse_mm`, both with 32-bit "
    "sums. Shares are of the multiplications with weights, without those of attention. *off* is the largest difference "
    "between the two answers, in shares of the largest number. A row without a time says why."
)


def table_of(told: Mapping[str, Any]) -> str:
    """Return everything that was measured, for people.

    Args:
        told: what ``gpu.json`` holds.
    """
    machine = told["machine"]
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items() if name != "gpu")
    parts = [f"# 2:4 on {machine['gpu']}", f"{machine['gpu']}: {facts}. At most {told['pairs']} pairs of each.", HOW]
    parts += [*_whole(told["whole"]), *_layers(told["layers"])]
    return "\n\n".join(parts) + "\n"


def _whole(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## Whole steps", "Not measured in this run."]
    table = [
        "| network | type | layers 2:4 | their share of multiplications | dense ms | 2:4 ms | gain | off |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        share = f"{row['share']:.1%}, so at most {1 / (1 - row['share'] / 2):.2f}x"
        start = f"| {row['network']} | {row['kind']} | {row.get('linear', '')} | {share} |"
        if "reason" in row:
            table.append(f"{start} not measured: {_cell(row['reason'])} | | | |")
        else:
            times = f" {row['dense_us'] / 1e3:.2f} | {row['sparse_us'] / 1e3:.2f} |"
            table.append(f"{start}{times} {_gain(row['gain'])} | {row['off']:.1e} |")
    reached = [f"{row['network']} in {row['kind']}" for row in rows if "gain" in row and row["gain"]["low"] >= CLAIMED]
    said = f"SparseDM's headline is {CLAIMED}x. Whole steps that reach it: {', '.join(reached) or 'none of these'}."
    return ["## Whole steps", "\n".join(table), said]


def _layers(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["## Layers", "Not measured in this run."]
    shapes: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault((row["rows"], row["inputs"], row["outputs"]), {})[row["kind"]] = row
    head = "".join(f" {kind}: dense us | 2:4 us | gain |" + ("" if kind == "int8" else " searched |") for kind in KINDS)
    table = [f"| rows x inputs -> outputs | layers |{head}", f"| --- | --- |{' --- |' * (head.count('|'))}"]
    for (count, inputs, outputs), kinds in shapes.items():
        where = ", ".join(f"{name} {number}" for name, number in next(iter(kinds.values()))["where"].items())
        cells = "".join(_times(kinds.get(kind), searched=kind != "int8") for kind in KINDS)
        table.append(f"| {count} x {inputs} -> {outputs} | {where} |{cells}")
    said = [_said(kind, [row for row in rows if row["kind"] == kind]) for kind in KINDS]
    why = dict.fromkeys(
        f"- {_shape(row)}, {row['kind']}{words}: {row[key]}"
        for row in rows
        for key, words in (("reason", ""), ("search_failed", ", searched"))
        if key in row
    )
    return [
        f"## {len(shapes)} layers",
        "\n".join(table),
        "\n".join(said),
        *(["Not measured:", "\n".join(why)] if why else []),
    ]


def _times(row: Row | None, *, searched: bool) -> str:
    if row is None or "reason" in row:
        return " not measured | | |" + (" |" if searched else "")
    times = f" {row['dense_us']:.1f} | {row['sparse_us']:.1f} | {_gain(row['gain'])}{'' if row['settled'] else ' *'} |"
    found = _gain(row["searched"]) if "searched" in row else "not measured"
    return times + (f" {found} |" if searched else "")


def _said(kind: str, rows: Iterable[Row]) -> str:
    """Return which shapes win and lose in one type: where the whole interval lies on one side of 1."""
    taken = [row for row in rows if "gain" in row]
    wins = [row for row in taken if row["gain"]["low"] > 1]
    losses = [row for row in taken if row["gain"]["high"] < 1]
    if not taken:
        return f"- {kind}: nothing was measured."
    best = max(taken, key=lambda row: float(row["gain"]["value"]))
    worst = min(taken, key=lambda row: float(row["gain"]["value"]))
    return (
        f"- {kind}: of {len(taken)} shapes {len(wins)} win, {len(losses)} lose, {len(taken) - len(wins) - len(losses)} "
        f"are undecided; from {worst['gain']['value']:.2f}x ({_shape(worst)}) to {best['gain']['value']:.2f}x "
        f"({_shape(best)})."
    )


def _shape(row: Row) -> str:
    return f"{row['rows']} x {row['inputs']} -> {row['outputs']}"


def _gain(gain: Mapping[str, float]) -> str:
    return f"{gain['value']:.2f} ({gain['low']:.2f} to {gain['high']:.2f})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(table_of(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
