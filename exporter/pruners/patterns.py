"""What a recipe may say about zeros: patterns, and the keys of the methods that put them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from exporter.errors import RecipeError
from exporter.networks.sparse_kernels import LEAST
from exporter.networks.sparsity import MAX_GROUP, Pattern
from exporter.pruners.base import CutOptions, DataOptions

UNSTRUCTURED = "unstructured"


def pattern_from(text: str, keep_ratio: float | None) -> Pattern | None:
    """Return n:m as numbers, None for unstructured.

    Args:
        text: the recipe's ``pattern``.
        keep_ratio: the recipe's; needed for unstructured, otherwise left out or n / m; 1 keeps all of any pattern.

    Raises:
        RecipeError: the two do not fit together or are out of range.
    """
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise RecipeError(f"prune.keep_ratio: got {keep_ratio:g}, expected a number in (0, 1]. Write 0.5 to keep 50 %.")
    if text == UNSTRUCTURED:
        if keep_ratio is None:
            raise RecipeError("prune.keep_ratio: missing; expected a number in (0, 1] for unstructured. Write 0.5.")
        return None
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m <= MAX_GROUP:
        got = f"prune.pattern: got {text!r}, expected n:m with 0 < n < m <= {MAX_GROUP}, or {UNSTRUCTURED}."
        raise RecipeError(f'{got} Write "2:4".')
    if keep_ratio not in (None, 1.0) and abs(float(keep_ratio or 0) - n / m) > 1e-9:
        got = f"prune.keep_ratio: got {keep_ratio:g}, expected {n / m:g}, which is what {text} keeps."
        raise RecipeError(f"{got} Leave it out, or write pattern: {UNSTRUCTURED}.")
    return n, m


def check_layers(pattern: str, least: int, *, permute: bool) -> None:
    """Check which layers a recipe asks for, and in which order of their inputs.

    Raises:
        RecipeError: fewer inputs than a kernel takes, or an order for a pattern that has no use for one.
    """
    if least < LEAST:
        got = f"prune.least: got {least}, expected at least {LEAST}, which one sparse instruction takes."
        raise RecipeError(f"{got} Leave it out for {LEAST}.")
    if permute and pattern == UNSTRUCTURED:
        got = f"prune.permute: got true with pattern: {UNSTRUCTURED}, which keeps the same in any order; expected n:m."
        raise RecipeError(f'{got} Write pattern: "2:4", or leave permute out.')


@dataclass(frozen=True)
class SparseOptions(DataOptions):
    """Recipe keys of a method that puts zeros where recorded inputs say that they cost least.

    Attributes:
        prompts: a set or file of prompts, none of those that the run measures on. The embedded model has its own.
        images: how many of them are drawn.
        pattern: ``n:m``, at most n of m consecutive inputs of a layer not zero, such as ``2:4``; or ``unstructured``.
        keep_ratio: fraction of a layer's weights that stay, in (0, 1]; for ``unstructured``. Follows from ``n:m``.
        protect: module path patterns that stay dense, all below a match included.
        keep_dense: how many of the most sensitive layers stay dense: those that, masked alone by magnitude, move the
            guided answer most.
        least: fewest inputs and outputs of a layer that gets n:m; narrower ones stay dense. The default is what one
            sparse instruction takes, so that a kernel exists. Those that win are wider: TensorRT's maintainers saw
            gains from 256 on (issues 4065 and 3849 of NVIDIA/TensorRT). Write 256 where only speed there counts.
        permute: reorder the inputs of layers before n:m is put, so that more stays (here of magnitude times the norm
            of what it is multiplied with), wherever the layers that make and read them can be reordered alike:
            feed-forward neurons, values of a head, channels of a norm's group inside of a resnet. The dense network
            answers as before. Off by default: it takes minutes for a large network, and other weights stay than
            without.
    """

    pattern: str = "2:4"
    keep_ratio: float | None = field(default=None, metadata={"exclusiveMinimum": 0, "maximum": 1})
    protect: tuple[str, ...] = ()
    keep_dense: int = field(default=0, metadata={"minimum": 0})
    least: int = field(default=LEAST, metadata={"minimum": LEAST})
    permute: bool = False

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        pattern_from(self.pattern, self.keep_ratio)
        check_layers(self.pattern, self.least, permute=self.permute)
        if self.keep_dense < 0:
            raise RecipeError(f"prune.keep_dense: got {self.keep_dense}, expected 0 or more. Write 0 for none.")


@dataclass(frozen=True)
class MaskOptions(CutOptions):
    """Recipe keys of a method that removes channels, blocks or single weights by scores that need no data.

    Attributes:
        keep_ratio: fraction kept, in (0, 1]: of each layer's width (``channels``), of the units (``blocks``), or of
            each layer's weights (``weights``).
        round_to: widths become multiples of it, at least 1; ignored by ``blocks`` and ``weights``.
        cut: remove ``channels`` of layers or whole ``blocks``, or put zeros in the place of single ``weights``.
        component: ``denoiser``, ``vae_decoder`` or a text encoder, by its name.
        protect: module path patterns (``mid_block``, ``down_blocks.*.attentions.*``) that are never touched, all below
            a match included.
        parts: which widths ``channels`` cuts. ``streams``, the residual streams that run through many blocks, cost
            most fidelity and are left alone unless named.
        ranking: ``local`` keeps the ratio of each layer's width, ``global`` of all widths together, so that layers of
            low scores give more; scores count relative to their layer's mean. Ignored by ``blocks``, which are ranked
            together, and by ``weights``.
        pattern: where ``weights`` may have their zeros: ``unstructured``, or ``n:m`` such as ``2:4``, which keeps at
            most n of m consecutive inputs of a layer and goes with a keep_ratio of n / m.
        least: fewest inputs and outputs of a layer that gets n:m; narrower ones stay dense. The default is what one
            sparse instruction takes, so that a kernel exists. Those that win are wider: TensorRT's maintainers saw
            gains from 256 on (issues 4065 and 3849 of NVIDIA/TensorRT). Write 256 where only speed there counts.
    """

    cut: Literal["channels", "blocks", "weights"] = "channels"  # type: ignore[assignment] # one more than others
    pattern: str = UNSTRUCTURED
    least: int = field(default=LEAST, metadata={"minimum": LEAST})

    def __post_init__(self) -> None:
        """Check what types cannot say.

        Raises:
            RecipeError: a value out of range, naming the key and the fix.
        """
        super().__post_init__()
        check_layers(self.pattern, self.least, permute=False)
        if self.cut == "weights":
            pattern_from(self.pattern, self.keep_ratio)
        elif self.pattern != UNSTRUCTURED:
            got = f"prune.pattern: got {self.pattern!r} with cut: {self.cut}; expected it with cut: weights only."
            raise RecipeError(f"{got} Write cut: weights.")
