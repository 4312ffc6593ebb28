"""What a run, or a bench, lends to pruning methods: the dense pipeline, what it draws, and times on the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.calling import Drawing, Form
from calibration.prompts import PromptSet
from calibration.recording import Recording
from exporter.artifact import Artifact, digest_of
from exporter.errors import RecipeError
from exporter.progress import Progress
from exporter.prompts import prompt_set
from exporter.pruners.base import Stopwatch
from exporter.sampling import drawing_of
from exporter.states import form_of
from exporter.tuning.base import Shelf

if TYPE_CHECKING:  # seconds to import
    from exporter.tuning.data import LatentData

_AT_ONCE = 32  # images of training data


@dataclass(frozen=True)
class DenseLoan:
    """The dense pipeline and the target; see `exporter.pruners.base.Loan`.

    Attributes:
        dense: the dense state.
        sampling: of the recipe, size resolved.
        stopwatch: of the first usable target, or why there is none.
        seed: noise of what is drawn here follows from it; it differs from that of what the run measures.
        folder: keeps recordings and latents, so that an interrupted stage goes on.
        progress: what long work reports to.
        shelf: of training data; by default an own one.
    """

    dense: Artifact
    sampling: dict[str, Any]
    stopwatch: Stopwatch | str
    seed: int
    folder: Path
    progress: Progress
    shelf: Shelf | None = None

    @property
    def form(self) -> Form:
        """How the pipeline is called."""
        return form_of(self.dense.path)

    @property
    def drawing(self) -> Drawing:
        """Steps, guidance and size of the recipe's sampling."""
        return drawing_of(self.sampling)

    @property
    def batch(self) -> int:
        """Images at a time."""
        return int(self.sampling["batch"])

    def pipeline(self) -> Any:
        """Return a dense pipeline of one's own."""
        from exporter.networks.pipeline import load_pipeline
        from exporter.sampling import use_scheduler

        pipeline = load_pipeline(self.dense.path)
        use_scheduler(pipeline, self.sampling["scheduler"])
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def texts(self, prompts: str | None) -> list[str]:
        """Return the prompts of a named set or file; a single empty one where the pipeline draws without being asked.

        Raises:
            RecipeError: None was given, or there is no such set.
        """
        if prompts is None and self.form.asked == "batch_size":
            return [""]
        return list(prompt_set(_named(prompts)).prompts)

    def recording(self, prompts: str | None, images: int) -> Recording:
        """Record the dense pipeline on the first prompts of a set, or find it done.

        Raises:
            RecipeError: no prompts, or no such set.
            CalibrationError: the pipeline cannot be recorded.
        """
        if prompts is None and self.form.asked == "batch_size":  # where prompts are only counted
            chosen = PromptSet.of("unasked", [f"image {number}" for number in range(images)])
        else:
            chosen = prompt_set(_named(prompts)).first(images)
        key = digest_of([self.dense.digest, chosen.digest, self.seed, self.sampling])
        folder = self.folder / f"recording-{key[:16]}"
        if folder.is_dir():  # appears only when complete
            return Recording.open(folder)
        from calibration.record import record

        return record(
            self.pipeline(),
            chosen,
            folder,
            seed=self.seed,
            steps=self.sampling["steps"],
            guidance=self.sampling["guidance"],
            size=self.sampling["size"],
            batch=self.batch,
            progress=self.progress,
            model=self.dense.digest,
            form=self.form,
        )

    def data(self, prompts: str | None, samples: int) -> LatentData:
        """Return latents that the dense pipeline draws for the prompts of a set, in turn.

        Raises:
            RecipeError: no prompts, no such set, or a scheduler without a schedule of noise.
        """
        from exporter.tuning.data import Generation, generated

        how = self.drawing
        shelf = self.shelf or Shelf(self.folder / "data", self.seed)
        plan = Generation(how.steps, how.guidance, how.height, shelf.seed, _AT_ONCE, self.form)
        return generated(
            self.pipeline(), self.texts(prompts), samples, plan, folder=shelf.folder, progress=self.progress
        )


def _named(prompts: str | None) -> str:
    if prompts is None:
        got = "prune.prompts: missing; expected a set or file of prompts, which this method draws with."
        raise RecipeError(f"{got} Write prompts: FILE (one a line), or a built-in set such as everyday.")
    return prompts
