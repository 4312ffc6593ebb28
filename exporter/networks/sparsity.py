"""Zeros in unchanged shapes: N:M patterns along the axis that a layer sums over, and the claim that a weight has one.

A claim ``(n, m)`` says of a weight that at most n of every m consecutive numbers along its reduced axis are not zero:
the input features of a linear layer; the input channels of a convolution, for every output channel and every position
of the kernel. That is the axis on which compilers look for 2:4. A claim whose m is larger than `MAX_GROUP` is of the
whole weight, unstructured: at most n of all its m numbers are not zero. Claims change no shape, so they are no surgery:
they lie in ``sparsity.json`` beside the weights and are checked by counting zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from exporter.errors import ArtifactError, ExporterError
from exporter.networks.reading import read_object

if TYPE_CHECKING:
    from exporter.networks.record import Surgery

Pattern = tuple[int, int]
"""(n, m): at most n of m are not zero."""
Claims = Mapping[str, Pattern]
"""Name of a weight in the state dict -> its pattern."""

SPARSITY = "sparsity.json"
MAX_GROUP = 64
"""Largest m of a pattern along the reduced axis; a larger one is the number of all elements of the weight."""

_FORMAT = 1
_MAX_CLAIMS = 20_000
_MAX_ELEMENTS = 2**34
_NAME = re.compile(r"(?!.*__)[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*\.weight\Z")
_RESTORE = "Restore the original file."


def sums_over(module: nn.Module) -> int | None:
    """Return how many inputs a layer's reduced axis has; None for what has no such axis, or several."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return module.in_channels
    return None


def grouped(weight: Tensor, size: int) -> Tensor:
    """Return (..., groups, size): consecutive numbers along the reduced axis together.

    Args:
        weight: (outputs, inputs) of a linear layer, or (outputs, inputs, height, width) of a convolution.
        size: divides the number of inputs.
    """
    rows = weight.movedim(1, -1)
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // size, size)


def pattern_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return a bool mask of the scores' shape that keeps the n largest of every m; of equals the earlier.

    Args:
        scores: shaped as the weight; finite, larger is kept.
        pattern: that fits the shape, see `misfit`.
    """
    n, m = pattern
    if m > MAX_GROUP:
        order = torch.sort(scores.flatten(), descending=True, stable=True).indices
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[order[:n]] = True
        return mask.reshape(scores.shape)
    groups = grouped(scores, m)
    # Ranks by comparing pairs: for groups of 4 that is six passes, where sorting is millions of tiny sorts.
    rank = torch.zeros(groups.shape, dtype=torch.int16, device=scores.device)
    for later in range(1, m):
        for earlier in range(later):
            first_stays = groups[..., earlier] >= groups[..., later]
            rank[..., later] += first_stays
            rank[..., earlier] += ~first_stays
    kept = (rank < n).reshape(scores.movedim(1, -1).shape)
    return kept.movedim(-1, 1)


def misfit(shape: tuple[int, ...], pattern: Pattern) -> str:
    """Return why a weight of this shape cannot have a pattern; empty where it can."""
    n, m = pattern
    if len(shape) not in (2, 4):
        return f"got {len(shape)} axes, expected 2 of a linear layer or 4 of a convolution"
    elements = torch.Size(shape).numel()
    if not 1 <= n <= m:
        return f"got {n}:{m}, expected 1 <= n <= m"
    if m > MAX_GROUP and m != elements:
        return f"got {n} of {m} numbers, expected the {elements} of the weight"
    if m <= MAX_GROUP and shape[1] % m:
        return f"got {shape[1]} inputs, expected a multiple of {m}"
    return ""


def broken(weight: Tensor, pattern: Pattern) -> str:
    """Return where a weight does not have a pattern, naming the first group; empty where it has."""
    reason = misfit(tuple(weight.shape), pattern)
    if reason:
        return reason
    n, m = pattern
    if m > MAX_GROUP:
        found = int(torch.count_nonzero(weight))
        return f"got {found} numbers that are not zero of {m}, expected at most {n}" if found > n else ""
    counts = (grouped(weight, m) != 0).sum(dim=-1)
    if int(counts.max()) <= n:
        return ""
    *place, group = (int(index) for index in (counts > n).nonzero()[0])
    kernel = f" at kernel position {tuple(place[1:])}" if len(place) > 1 else ""
    return (
        f"got {int(counts[(*place, group)])} numbers that are not zero in group {group} (inputs {group * m} to "
        f"{group * m + m - 1}) of output {place[0]}{kernel}, expected at most {n} of {m}"
    )


def check_claims(weights: Mapping[str, Tensor], claims: Claims, place: str, error: type[ExporterError]) -> None:
    """Check every claim by counting zeros.

    Args:
        weights: a state dict.
        claims: what is said of it.
        place: where they stand, for messages.
        error: what to raise.

    Raises:
        ExporterError: `error`, naming layer and group, where a claim is false or of no weight.
    """
    for name, pattern in claims.items():
        told = broken(weights[name], pattern) if name in weights else "got no such weight"
        if told:
            raise error(f"{place}: {name}: claimed to be {stated(pattern)} sparse; {told}. Make the state again.")


def stated(pattern: Pattern) -> str:
    """Return a pattern in words: ``2:4``, or ``50 % unstructured``."""
    n, m = pattern
    return f"{n}:{m}" if m <= MAX_GROUP else f"{100 * n / m:.3g} % unstructured"


def write_claims(folder: Path, claims: Claims) -> None:
    """Write claims into a component folder; none are no file."""
    path = folder / SPARSITY
    path.unlink(missing_ok=True)
    if claims:
        entries = {name: list(pattern) for name, pattern in claims.items()}
        text = json.dumps({"format": _FORMAT, "weights": entries}, indent=1, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")


def load_claims(folder: Path) -> dict[str, Pattern]:
    """Return the claims of a component folder, empty where there are none. They are not checked here.

    Raises:
        ArtifactError: the file does not hold claims.
    """
    path = folder / SPARSITY
    if not path.exists():
        return {}
    data = read_object(path, ArtifactError)
    entries = data.get("weights")
    if set(data) != {"format", "weights"} or data["format"] != _FORMAT or not isinstance(entries, dict):
        raise ArtifactError(
            f"{path}: not claims of sparsity; got keys {', '.join(sorted(data))[:80]}, expected format {_FORMAT} and "
            f"weights. {_RESTORE}"
        )
    if len(entries) > _MAX_CLAIMS:
        raise ArtifactError(f"{path}: too many; got {len(entries)} claims, expected at most {_MAX_CLAIMS}. {_RESTORE}")
    return {name: _claim(name, entry, path) for name, entry in entries.items()}


def _claim(name: str, entry: Any, path: Path) -> Pattern:
    whole = isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry)
    if not whole or not _NAME.match(name) or not 1 <= entry[0] <= entry[1] <= _MAX_ELEMENTS:
        raise ArtifactError(
            f"{path}: not a claim; got {name[:80]!r}: {str(entry)[:40]}, expected a weight and [n, m]. {_RESTORE}"
        )
    return entry[0], entry[1]


def carried(claims: Claims, surgery: Surgery, weights: Mapping[str, Tensor]) -> tuple[dict[str, Pattern], list[str]]:
    """Return what claims say of a network after further surgery, and the names of weights that lost theirs.

    A weight that moved takes its claim along; one that was cut keeps a pattern along the reduced axis where it still
    has it, and an unstructured one is counted anew; one that was removed, or whose pattern the cut broke, has none.

    Args:
        claims: before.
        surgery: what was done since.
        weights: the state dict now.
    """
    kept: dict[str, Pattern] = {}
    lost = []
    for name, (n, m) in claims.items():
        path = name.removesuffix(".weight")
        for final in surgery.final_paths(path):
            weight = weights.get(f"{final}.weight")
            if weight is None:
                continue
            resized = final in surgery.resize and "weight" in surgery.resize[final].parameters
            recounted = (max(1, int(torch.count_nonzero(weight))), weight.numel())
            pattern = recounted if m > MAX_GROUP and resized else (n, m)
            if pattern[0] == pattern[1] or broken(weight, pattern):
                lost.append(f"{final}.weight")
            else:
                kept[f"{final}.weight"] = pattern
    return kept, lost
