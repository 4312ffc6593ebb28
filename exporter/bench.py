"""What all cells of a run share: the recording, the judges, and answers in torch that several cells compare with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.recording import Recording
from exporter.artifact import Artifact
from exporter.metrics.at_hand import Clip, Features, full_clip, inception, lpips
from exporter.metrics.features import Judge, Verdicts
from exporter.metrics.images import Distance
from exporter.progress import Progress
from exporter.recipe import Recipe

DENSE = "0-dense"
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
    from exporter.reference import JUDGE
    from exporter.reference.judge import Judge as ShapesJudge

    embedded = (recipe.source.path or "").startswith("reference:")
    judge: Judge | str = (
        "the recipe's source has no judge of its own: hard negatives are known for the embedded model's prompts only. "
        "Set measure.judge to a folder with a CLIPModel that knows them."
    )
    if recipe.measure.judge is not None:
        judge = ShapesJudge(Path(recipe.measure.judge))
    elif embedded:
        judge = ShapesJudge(JUDGE)
    space = "the embedded judge" if recipe.measure.judge is None else Path(recipe.measure.judge).name
    return Judges(judge, space, lpips(), full_clip(), inception())


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
        judges: what looks at images.
        torch_answers: answers of a component in torch, by the digest of its part of the state: what several targets
            and unchanged states are compared with is computed once.
        engines: target -> folder of the dense engine, for interleaved latency.
    """

    recipe: Recipe
    out: Path
    dense: Artifact
    recording: Recording
    sampling: dict[str, Any]
    progress: Progress
    judges: Judges
    torch_answers: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, Path] = field(default_factory=dict)
    dense_verdicts: Verdicts | None = None

    @property
    def rows(self) -> range:
        """The prompts whose recorded calls are compared."""
        return range(min(self.recipe.measure.calls, self.recording.count))
