"""Puts the measured figures into the README and a thinned training log beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
_LINES = 40  # of each run's log, in training.json


def _row(name: str, value: Any) -> str:
    if isinstance(value, dict) and "rate" in value:
        interval = f"{100 * value['low']:.1f} to {100 * value['high']:.1f} %"
        return f"| {name} | {100 * value['rate']:.1f} % | {interval} | {value['count']} |"
    return f"| {name} | {value} | | |"


def figures_table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table.

    Args:
        figures: What `evaluate` returned.

    Returns:
        The table, with a sentence that states prompts, steps and guidance.
    """
    prompts = figures["prompts"]
    head = (
        f"{prompts['count']} held-out prompts (`scenes({prompts['seed']}, {prompts['count']}, held_out=True)`), "
        f"noise seeds {prompts['noise_seed']} and up, {figures['steps']} steps, guidance {figures['guidance']}."
    )
    names = {
        "judge_first_of_17": "judge ranks the right prompt first of 17",
        "judge_first_of_17_one_thing": "the same, prompts with one thing",
        "judge_first_of_17_two_things": "the same, prompts with two things",
        "reader_right": "reader finds background, colours and positions right",
        "reader_and_judge_agree": "reader and judge agree",
        "judge_on_fresh_renders": "judge first of 17 on fresh renders of the same prompts",
        "reader_on_fresh_renders": "reader right on those renders",
        "clip_score_generated": "CLIP score of generated images",
        "clip_score_renders": "CLIP score of those renders",
        "reconstruction_psnr_db": "autoencoder PSNR, 512 of those renders (dB)",
    }
    rows = [_row(text, figures[name]) for name, text in names.items() if name in figures]
    return "\n".join([head, "", "| figure | value | 95 % interval | images |", "| --- | --- | --- | --- |", *rows])


def thinned_log(path: Path) -> list[dict[str, float]]:
    """Return some lines of a training log.

    Args:
        path: A ``.jsonl`` log.

    Returns:
        About 40 of its lines, evenly spaced, the last one among them.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    every = max(1, len(lines) // _LINES)
    return lines[::-1][::every][::-1]


def write_report(into: Path, work: Path, figures: dict[str, Any]) -> None:
    """Write ``training.json`` and the figures between the marks of ``README.md``.

    Args:
        into: Folder of the README; where there is none, only the log is written.
        work: Folder of the training logs.
        figures: What `evaluate` returned.
    """
    logs = {path.stem: thinned_log(path) for path in sorted(work.glob("*.jsonl"))}
    if logs:
        lines = ",\n".join(
            f'"{name}": [\n' + ",\n".join(json.dumps(line) for line in log) + "\n]" for name, log in logs.items()
        )
        (into / "training.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    readme = into / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[-1]
        readme.write_text(f"{before}{BEGIN}\n{figures_table(figures)}\n{END}{after}", encoding="utf-8")
