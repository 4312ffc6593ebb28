"""Every error a user can cause, as one tree.

ExporterError
├── RecipeError         exit 2   the recipe: unknown key, wrong value, impossible combination
├── SourceError         exit 2   the source model: missing, damaged, unsupported
├── ArtifactError       exit 2   an artifact on disk: changed, truncated, from elsewhere, hostile
├── SurgeryError        exit 1   a network was edited in a way that cannot be recorded (a pruner's bug)
├── ToolMissing         exit 4   a library or device is missing; the message holds the install command
├── ComponentFailed     exit 5   a stage, target or engine failed while others may have finished
└── Interrupted         exit 130 Ctrl-C

Form of every message: ``place: what is wrong; got X, expected Y. Fix.``
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ExporterError(Exception):
    """Base of everything a user can fix; printed without a traceback."""

    exit_code = 1


class RecipeError(ExporterError):
    """The recipe is not valid or cannot be carried out."""

    exit_code = 2


class OutOfReach(RecipeError):  # noqa: N818
    """A budget that a method cannot keep to.

    Args:
        message: the sentence.
        least: what it can reach, as a share of the network before.
    """

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


class SourceError(ExporterError):
    """The source model is missing, damaged or of a kind that is not supported."""

    exit_code = 2


class ArtifactError(ExporterError):
    """A directory that should be an artifact is not the one that was written."""

    exit_code = 2


class SurgeryError(ExporterError):
    """A network was edited in a way that a surgery record cannot express."""

    exit_code = 1


class ToolMissing(ExporterError):  # noqa: N818 - reads as what it is
    """A library, device or feature of the device that the recipe asks for is not here."""

    exit_code = 4


class ComponentFailed(ExporterError):  # noqa: N818
    """One target or stage failed; the message says which and why."""

    exit_code = 5


class Interrupted(ExporterError):  # noqa: N818
    """The user stopped the run; what was finished stays."""

    exit_code = 130


class Findings:
    """Problems that do not depend on each other, gathered so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.errors: list[ExporterError] = []

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keep what is wrong with the input and go on behind the block; other errors pass."""
        try:
            yield
        except (RecipeError, SourceError, ArtifactError) as error:
            self.errors.append(error)

    def raise_all(self) -> None:
        """Raise what was gathered: a single problem as it is, several as one RecipeError with a line for each."""
        lines = dict.fromkeys(str(error) for error in self.errors)
        if len(lines) == 1:
            raise self.errors[0]
        if lines:
            raise RecipeError("\n".join(lines))


EXIT_ORDER = (1, 2, 4, 5, 3)
"""Where several failures apply, the first of these decides the exit code."""


def exit_code_of(codes: list[int]) -> int:
    """Return the exit code of a run that met these, 0 when there are none."""
    return next((code for code in EXIT_ORDER if code in codes), max(codes, default=0))
