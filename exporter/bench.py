"""What all cells of a run share: the recording, the judges, and answers in torch that several cells compare with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from calibration.recording import Recording
from exporter.artifact import Artifact
from exporter.errors import SourceError
from exporter.memo import FileMemo
from exporter.metrics.at_hand import Clip, Features, full_clip, identity, inception, lpips
from exporter.metrics.features import Judge, Verdicts
from exporter.metrics.images import Distance
from exporter.progress import Progress
from exporter.recipe import Recipe
from exporter.reference import JUDGE
from exporter.report.record import CellRecord

TORCH = "torch"


@dataclass(frozen=True)
class Judges:
    """What looks at images; where something is missing, the sentence that says why and how to get it.

    Attributes:
        judge: ranks prompts; `space` is its name.
        lpips: perceptual distance.
        clip: full-size CLIP.
        inception: Inception's features.
    """

    judge: Judge | str
    space: str
    lpips: Distance | str
    clip: Clip | str
    inception: Features | str


def find_judges(recipe: Recipe) -> Judges:
    """Return the judges that this machine and this recipe have."""
    folder = _judge_folder(recipe)
    if folder is None:
        judge: Judge | str = (
            "the recipe's source has no judge of its own: hard negatives are known for the embedded model's prompts "
            "only. Set measure.judge to a folder with a CLIPModel that knows them."
        )
    else:
        from exporter.reference.judge import Judge as ShapesJudge

        judge = ShapesJudge(folder)
    space = "the embedded judge" if recipe.measure.judge is None else Path(recipe.measure.judge).name
    return Judges(judge, space, lpips(), full_clip(), inception())


def judges_identity(recipe: Recipe, memo: FileMemo) -> dict[str, str | None]:
    """Return what tells the judges of `find_judges` from others, without loading any: versions and digests.

    Raises:
        SourceError: the recipe's judge is not there.
    """
    folder = _judge_folder(recipe)
    if folder is not None and not (folder / "config.json").is_file():
        raise SourceError(f"measure.judge: no model folder; got {folder}, expected config.json in it. Give its folder.")
    files = sorted(path for path in folder.glob("*") if path.is_file()) if folder else []
    return {**identity(memo), **{f"judge/{file.name}": memo.sha256(file) for file in files}}


def _judge_folder(recipe: Recipe) -> Path | None:
    if recipe.measure.judge is not None:
        return Path(recipe.measure.judge)
    return JUDGE if (recipe.source.path or "").startswith("reference:") else None


@dataclass
class Bench:
    """What all cells of a run share.

    Attributes:
        recipe: the recipe.
        out: the run's folder.
        dense: the dense state.
        recording: of the dense pipeline in torch, the reference of every fidelity.
        sampling: the recipe's, size resolved.
        progress: what long work reports to.
        torch_answers: answers of a component in torch, by the digest of its part of the state: what several targets
            and unchanged states are compared with is computed once.
        engines: target -> the dense engine that was measured, for interleaved latency.
        dense_cells: target -> what was measured of it.
    """

    recipe: Recipe
    out: Path
    dense: Artifact
    recording: Recording
    sampling: dict[str, Any]
    progress: Progress
    torch_answers: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, Artifact] = field(default_factory=dict)
    dense_cells: dict[str, CellRecord] = field(default_factory=dict)
    dense_verdicts: Verdicts | None = None

    @cached_property
    def judges(self) -> Judges:
        """What looks at images; loaded when it is first asked for."""
        return find_judges(self.recipe)

    @property
    def rows(self) -> range:
        """The prompts whose recorded calls are compared."""
        return range(min(self.recipe.measure.calls, self.recording.count))
