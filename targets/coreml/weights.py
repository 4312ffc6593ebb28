"""Smaller weights of an ML Program: palettes, 8 and 4 bits, sparse forms, and what really became of each weight.

Palettes are found by `targets.palettes`, not by coremltools' own k-means: that one sorts 16-bit floating point with
numpy, which on some processors leaves millions of values unsorted (numpy 2.3.5 with AVX-512), and takes far longer.
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.base import TargetError, require
from targets.coreml.stored import INSTALL, MlModel, Stored, stored_weights
from targets.palettes import Codes, distinct, palette_of

PLACE = "target coreml: weights"
LEAST = 2048
"""Weights of no more elements stay as they are, as by coremltools' own default: a table of 256 entries takes a quarter
of what 8 bits save there, and all of them together are a thousandth of a network."""
BLOCK = 32
"""Inputs that share a scale of 4 bits."""
DEPLOYMENTS: Mapping[str, int] = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
"""System -> version of the file format that it brought."""
WORDS: Mapping[str, str] = {
    "float": "iOS16",
    "palette-2": "iOS16",
    "palette-4": "iOS16",
    "palette-6": "iOS16",
    "palette-8": "iOS16",
    "int8": "iOS16",
    "sparse": "iOS16",
    "int4": "iOS18",
    "sparse-palette-4": "iOS18",
    "sparse-palette-6": "iOS18",
    "sparse-palette-8": "iOS18",
    "sparse-int8": "iOS18",
}
"""What weights can become -> the oldest system whose Core ML reads it."""
_GROUPED = "iOS18"
_SPARSE, _PALETTE = "sparse", "palette-"
_CHANNELS = {"conv_transpose": (1, 0), "matmul": (-1, -2)}
"""Operation -> axes of its weight's outputs and inputs; 0 and 1 for all others."""
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Weight:
    """What became of one weight, read from the compressed program.

    Attributes:
        op: the operation that reads it; the first of several.
        shape: of the weight.
        asked: what it should have become.
        became: what it is stored as.
        tables: of its palette; 0 where it has none.
        before: bytes, uncompressed.
        after: bytes of all that it is stored as.
        why: it became something else than was asked; empty where it did not.
    """

    op: str
    shape: tuple[int, ...]
    asked: str
    became: str
    tables: int
    before: int
    after: int
    why: str = ""


@dataclass(frozen=True)
class Built:
    """A model, and the way to make it anew.

    Attributes:
        model: as coremltools has it.
        pack: takes passes, runs them over the program that the model was made of, which they change, and returns the
            model of that.
    """

    model: MlModel
    pack: Callable[[Any], MlModel]


@dataclass(frozen=True)
class Compressed:
    """A model with smaller weights.

    Attributes:
        model: with smaller weights.
        weights: what became of each weight of a convolution, linear layer or embedding, in the order of execution.
    """

    model: MlModel
    weights: tuple[Weight, ...]


def check_weights(weights: str, deployment: str, group: int = 0) -> None:
    """Refuse what the oldest system cannot read; needs no library.

    Args:
        weights: one of `WORDS`.
        deployment: one of `DEPLOYMENTS`.
        group: channels that share a palette; 0 for one palette per weight.

    Raises:
        TargetError: with the fix.
    """
    if weights not in WORDS:
        raise TargetError(f"{PLACE}: got '{weights}', expected one of {', '.join(WORDS)}. Write palette-6.")
    if deployment not in DEPLOYMENTS:
        known = ", ".join(DEPLOYMENTS)
        raise TargetError(f"{PLACE}: deployment: got '{deployment}', expected one of {known}. Write iOS18.")
    if isinstance(group, bool) or group < 0:
        raise TargetError(f"{PLACE}: group: got {group}, expected a number of channels, or 0 for all. Write 16.")
    if group and _PALETTE not in weights:
        raise TargetError(f"{PLACE}: group: got {group} for {weights}, expected a palette. Leave group out.")
    first = max(WORDS[weights], _GROUPED if group else "")
    if deployment < first:
        what = f"{weights} in groups of {group}" if group else weights
        fix = f"Write deployment: {first}" + (", or leave group out." if WORDS[weights] <= deployment else ".")
        raise TargetError(f"{PLACE}: got {what} for {deployment}, expected at least {first} for it. {fix}")


def compress(
    built: Built,
    weights: str,
    deployment: str,
    *,
    plan: Mapping[str, str] = _NOTHING,
    group: int = 0,
    exact: bool = False,
) -> Compressed:
    """Return a model with its weights stored smaller.

    Values in sparse forms alone, and zeros in all of them, stay exactly what they are. Palettes and 8 bits of sparse
    forms are of the other values; where there are too few zeros for a sparse form to be smaller, the weight is stored
    without it.

    Args:
        built: an ML Program for `deployment`; its weights become what is asked.
        weights: what every weight of more than `LEAST` elements becomes, one of `WORDS`.
        deployment: the oldest system that runs it.
        plan: operation -> word for its weight, before `weights`.
        group: channels that share a palette; 0 for one palette per weight. Weights of fewer have one.
        exact: palettes hold what is there, which must have few enough different values already.

    Raises:
        TargetMissing: coremltools is not installed.
        TargetError: a word that the system cannot read, an operation that is not there or has no weight, or, with
            `exact`, more different values than the palette holds.
    """
    for word in {weights, *plan.values()}:
        check_weights(word, deployment, group if _PALETTE in word else 0)
    library: Any = require("coremltools", PLACE, INSTALL)
    _check_version(built.model, deployment)
    before = stored_weights(built.model)
    asked = _asked(before, weights, plan)
    chosen = {item: word for item, word in asked.items() if word != "float" and not _unfit(item, word, group)}
    after = _Work(library, built, group, exact).done(chosen)
    found = {item.op: item for item in stored_weights(after)}
    lost = [item.op for item in asked if item.op not in found]
    if lost:
        raise TargetError(
            f"{PLACE}: coremltools changed {lost[0]} while it compressed weights; got a program without it, expected "
            "the same operations. Convert the network again, or write weights: float."
        )
    told = tuple(_told(item, found[item.op], word, group) for item, word in asked.items())
    return Compressed(after, told)


def _check_version(model: MlModel, deployment: str) -> None:
    got = int(model.get_spec().specificationVersion)
    if got != DEPLOYMENTS[deployment]:
        known = {version: name for name, version in DEPLOYMENTS.items()}
        raise TargetError(
            f"{PLACE}: got a model for {known.get(got, f'version {got}')}, expected one for {deployment}. Convert it "
            "for that."
        )


def _asked(stored: Sequence[Stored], weights: str, plan: Mapping[str, str]) -> dict[Stored, str]:
    """Return what each weight should become.

    Raises:
        TargetError: the plan names an operation without a weight, or wants two things of a weight that two share.
    """
    owner = {op: item for item in stored for op in item.readers}
    found = dict.fromkeys(stored, weights)
    named: dict[Stored, str] = {}
    for op, word in plan.items():
        if op not in owner:
            near = get_close_matches(op, owner, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise TargetError(
                f"{PLACE}: plan: got '{op}', expected an operation of the program with a weight. Correct it.{hint}"
            )
        item = owner[op]
        if named.setdefault(item, word) != word:
            raise TargetError(
                f"{PLACE}: plan: got {named[item]} and {word} for {item.value}, which several operations read; "
                "expected one of them. Write the same for each."
            )
        found[item] = word
    return found


def _unfit(item: Stored, word: str, group: int) -> str:
    """Return why a weight cannot become what is asked; empty where it can."""
    out, into = _CHANNELS.get(item.kind, (0, 1))
    channels, inputs = item.shape[out], item.shape[into]
    if item.form != "float":
        return f"it is {item.form} already"
    if math.prod(item.shape) <= LEAST:
        return f"no more than {LEAST} elements"
    if item.others:
        return f"{item.others[0]} reads it too, not as a weight"
    if word == "int4" and inputs % BLOCK:
        return f"{inputs} inputs are no multiple of {BLOCK}"
    if _PALETTE in word and group and channels > group and channels % group:
        return f"{channels} channels are no multiple of {group}"
    return ""


def _told(before: Stored, after: Stored, word: str, group: int) -> Weight:
    became, why = after.form, ""
    if became != word:
        few = f"too few zeros for a sparse form to be smaller than {became}"
        why = _unfit(before, word, group) or (few if word.startswith(_SPARSE) else "coremltools left it as it is")
    return Weight(before.op, before.shape, word, became, after.tables, before.nbytes, after.nbytes, why)


@dataclass(frozen=True)
class _Work:
    """Puts weights of a model into other forms, one kind after the other.

    Attributes:
        library: ``coremltools``.
        built: the model.
        group: channels that share a palette.
        exact: palettes hold what is there.
    """

    library: Any
    built: Built
    group: int
    exact: bool

    @property
    def _kinds(self) -> Any:
        return self.library.optimize.coreml

    def done(self, chosen: Mapping[Stored, str]) -> MlModel:
        """Return a model whose weights have become what was chosen; sparse first, since the rest is of what is left."""
        model = self.built.model
        sparse = {item: word for item, word in chosen.items() if word.startswith(_SPARSE)}
        for share in sorted({_worth(item, word) for item, word in sparse.items()}):
            named = [item for item, word in sparse.items() if _worth(item, word) == share]
            form = self._kinds.OpThresholdPrunerConfig(
                threshold=0.0, minimum_sparsity_percentile=share, weight_threshold=LEAST
            )
            model = self._pass("prune_weights", model, dict.fromkeys(named, form), joint=False)
        now = {item.op: item for item in stored_weights(model)}
        thinned = {item for item in sparse if now[item.op].form == _SPARSE}
        palettes = {
            now[item.op]: self._palette(item, int(word.rpartition("-")[2]), item in thinned)
            for item, word in chosen.items()
            if _PALETTE in word
        }
        model = self._pass(
            "palettize_weights", model, palettes, joint=any(_PALETTE in sparse[item] for item in thinned)
        )
        integers = {
            now[item.op]: self._integers(word) for item, word in chosen.items() if word.endswith(("int8", "int4"))
        }
        joint = any(sparse[item].endswith("int8") for item in thinned)
        return self._pass("linear_quantize_weights", model, integers, joint=joint)

    def _pass(self, name: str, model: MlModel, forms: Mapping[Stored, Any], *, joint: bool) -> MlModel:
        if not forms:
            return model
        # By the name of the weight, not of the operation: its bias may be another's too, which may become another form.
        named = {item.value: form for item, form in forms.items()}
        config = self._kinds.OptimizationConfig(op_name_configs=named)
        # Not by the library's function of that name, which runs the hundred passes of a conversion once more.
        passes = self.library.PassPipeline.EMPTY
        passes.passes = [f"compression::{name}", "common::const_deduplication", "common::dead_code_elimination"]
        passes.set_options(passes.passes[0], {"config": config, "joint_compression": joint})
        logger = logging.getLogger("coremltools")
        level = logger.level
        logger.setLevel(logging.ERROR)  # what it leaves out is read back from the program, and told
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)  # its folder's own matter
                found = self.built.pack(passes)
                gc.collect()  # the program that it worked on holds itself, with all weights
                return found
        except ValueError as error:
            raise TargetError(f"{PLACE}: coremltools refuses {name}; got: {error}. Write weights: float.") from error
        finally:
            logger.setLevel(level)

    def _palette(self, item: Stored, bits: int, thinned: bool) -> Any:
        channels = item.shape[_CHANNELS.get(item.kind, (0, 1))[0]]
        grouped = 0 < self.group < channels
        return self._kinds.OpPalettizerConfig(
            mode="custom",
            lut_function=partial(_table, bits=bits, nonzero=thinned, exact=item.op if self.exact else ""),
            granularity="per_grouped_channel" if grouped else "per_tensor",
            group_size=self.group or BLOCK,
            weight_threshold=LEAST,
        )

    def _integers(self, word: str) -> Any:
        blocks = {"granularity": "per_block", "block_size": BLOCK}
        return self._kinds.OpLinearQuantizerConfig(
            mode="linear_symmetric",
            dtype=word.rpartition("-")[2],
            weight_threshold=LEAST,
            **(blocks if word == "int4" else {"granularity": "per_channel"}),
        )


def _worth(item: Stored, word: str) -> float:
    """Return the share of zeros from which on a bit per weight, which says where they are, pays for itself."""
    stored = 8 * item.nbytes // math.prod(item.shape) if word == _SPARSE else int(word[-1])
    return 1 / stored


def _table(weight: NDArray[Any], *, bits: int, nonzero: bool, exact: str) -> tuple[NDArray[Any], Codes]:
    """Return a table of ``2 ** bits`` entries and the code of each weight, flat, as coremltools asks for them.

    Args:
        weight: of one palette; where `nonzero`, its zeros are stored elsewhere and have no entry.
        bits: of a code.
        nonzero: whether zeros are left out.
        exact: the operation to name where values would change; empty where they may.
    """
    kept = weight != 0 if nonzero else np.ones(weight.shape, np.bool_)
    values = weight[kept]
    table, found = palette_of(values, bits)
    if exact and not np.array_equal(table[found], values):
        raise TargetError(
            f"{PLACE}: {exact}: got {distinct(values)} different values, expected at most {1 << bits}, each exact in "
            "16 bits. Palettize them first, or store them in more bits."
        )
    codes = np.zeros(weight.shape, np.uint8)
    codes[kept] = found
    full = np.zeros(1 << bits, weight.dtype)
    full[: table.size] = table
    full[table.size :] = table[-1] if table.size else 0
    return full, codes.ravel()
