"""Cutting weights: zeros in unchanged shapes, which layers may have them, and what is claimed of those that do.

Zeros make a network faster only where a compiler looks for them, so a pattern n:m lies along the axis that it looks at
(see `exporter.networks.sparsity`), and layers whose widths its kernels do not take, or that are narrower than the
recipe asks for, are left dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from exporter.errors import ComponentFailed, RecipeError
from exporter.networks.sparse_kernels import LEAST, unfit
from exporter.networks.sparsity import MAX_GROUP, Pattern, pattern_mask, stated, sums_over
from exporter.pruners.base import Outcome
from exporter.pruners.patterns import UNSTRUCTURED, pattern_from
from exporter.pruners.protect import check_patterns, is_protected

_ENDS = ("conv_in", "conv_out", "norm_out", "pos_embed", "quant_conv", "post_quant_conv", "x_embedder")
"""Modules that take the input in or make the answer, wherever they are."""
_TOP_ENDS = ("proj_out", "proj_out_1", "proj_out_2", "text_projection")
"""The same, where the network itself holds them: blocks have projections of these names inside."""
_EMBEDDINGS = (
    "adaln_single",
    "add_embedding",
    "caption_projection",
    "class_embedding",
    "context_embedder",
    "emb",
    "embeddings",
    "encoder_hid_proj",
    "time_embedding",
    "time_text_embed",
    "timestep_embedder",
)


@dataclass(frozen=True)
class SparseLayer:
    """One layer that is to get zeros.

    Attributes:
        path: module path.
        module: the linear layer or convolution.
        pattern: n and m; of the whole weight for an unstructured one, n then being what may stay.
    """

    path: str
    module: nn.Linear | nn.Conv2d
    pattern: Pattern

    @property
    def name(self) -> str:
        """The weight's name in the state dict."""
        return f"{self.path}.weight"

    @property
    def is_whole(self) -> bool:
        """Whether the zeros may lie anywhere."""
        return self.pattern[1] > MAX_GROUP


@dataclass(frozen=True)
class Found:
    """Layers of a network by what may be done to them.

    Attributes:
        layers: those that can be masked, in the network's order.
        skipped: path -> why not.
        kept_dense: paths of those that could, and stay dense since they are the most sensitive.
    """

    layers: tuple[SparseLayer, ...]
    skipped: Mapping[str, str]
    kept_dense: tuple[str, ...] = ()

    def without(self, paths: Sequence[str]) -> Found:
        """Return the same with these layers kept dense."""
        left = tuple(layer for layer in self.layers if layer.path not in paths)
        return Found(left, self.skipped, (*self.kept_dense, *paths))

    def outcome(self, **facts: object) -> Outcome:
        """Return what a method tells when these layers have their zeros."""
        claims = {layer.name: _claim(layer) for layer in self.layers}
        weights = [layer.module.weight for layer in self.layers]
        kept = sum(int(torch.count_nonzero(weight)) for weight in weights) / max(1, sum(w.numel() for w in weights))
        told = {
            "pattern": next((UNSTRUCTURED if layer.is_whole else stated(layer.pattern) for layer in self.layers), None),
            "eligible": len(self.layers) + len(self.kept_dense),
            "masked": [layer.path for layer in self.layers],
            "kept_dense": list(self.kept_dense),
            "skipped": dict(self.skipped),
            "weights_kept": round(kept, 6),
        }
        return Outcome({**told, **facts}, sparsity=claims)


def _claim(layer: SparseLayer) -> Pattern:
    if not layer.is_whole:
        return layer.pattern
    return max(1, int(torch.count_nonzero(layer.module.weight))), layer.module.weight.numel()


def sparse_layers(
    network: nn.Module, text: str, keep_ratio: float | None, protect: tuple[str, ...] = (), least: int = LEAST
) -> Found:
    """Return which layers of a network can be masked, and why the others cannot.

    Left out are the layers that take the input in, embed time and text, or make the answer; and for n:m those whose
    widths sparse kernels do not take, or that have fewer inputs or outputs than asked for.

    Args:
        network: of an AutoencoderKL the decoder alone is looked at.
        text: the recipe's ``pattern``.
        keep_ratio: the recipe's.
        protect: the recipe's.
        least: the recipe's; for n:m.

    Raises:
        RecipeError: no layer can be masked, a ratio that would empty one, or a pattern of `protect` matches nothing.
    """
    check_patterns(network, protect)
    pattern = pattern_from(text, keep_ratio)
    if keep_ratio == 1.0:
        return Found((), {})
    layers, skipped, seen, widest = [], {}, set[int](), 0
    for path, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if isinstance(network, AutoencoderKL) and not path.startswith(("decoder.", "post_quant_conv")):
            continue
        reason = _reason(path, module, pattern, protect)
        if not reason and pattern is not None and (side := min(module.weight.shape[:2])) < least:
            reason, widest = f"{side} inputs or outputs, fewer than the {least} asked for", max(widest, side)
        if module.weight.data_ptr() in seen:
            reason = "shares its weight with another layer"
        seen.add(module.weight.data_ptr())
        if reason:
            skipped[path] = reason
        else:
            layers.append(SparseLayer(path, module, pattern or _whole(path, module.weight, float(keep_ratio or 1))))
    if not layers:
        raise RecipeError(_none_left(type(network).__name__, text, least, widest))
    return Found(tuple(layers), skipped)


def _none_left(network: str, text: str, least: int, widest: int) -> str:
    if not widest:
        got = f"prune.pattern: no layer of {network} can be {text} sparse; expected at least one."
        return f"{got} Write pattern: {UNSTRUCTURED}, or shorten protect."
    got = f"prune.least: no layer of {network} can be {text} sparse; got least: {least}, expected at most {widest}, "
    return f"{got}the widest layer's. Write least: {widest}, and measure whether layers so small win."


def _whole(path: str, weight: Tensor, keep_ratio: float) -> Pattern:
    kept = round(keep_ratio * weight.numel())
    if kept < 1:
        got = f"prune.keep_ratio: {keep_ratio:g} of the {weight.numel()} weights of {path} keeps none; expected one."
        raise RecipeError(f"{got} Raise keep_ratio.")
    return kept, weight.numel()


def _reason(path: str, module: nn.Linear | nn.Conv2d, pattern: Pattern | None, protect: tuple[str, ...]) -> str:
    """Return why a layer stays dense; empty where it need not."""
    parts = path.split(".")
    inputs, outputs = sums_over(module), module.weight.shape[0]
    if is_protected([path], protect):
        return "protected"
    if set(parts) & set(_ENDS) or parts[0] in _TOP_ENDS:
        return "takes the input in or makes the answer"
    if set(parts) & set(_EMBEDDINGS):
        return "embeds time or text"
    if inputs is None:
        return "a convolution of several groups"
    if pattern is None:
        return f"{module.weight.numel()} weights, too few" if module.weight.numel() <= MAX_GROUP else ""
    return unfit(inputs, outputs, group=pattern[1])


@torch.no_grad()
def mask_by(found: Found, score: Callable[[SparseLayer], Tensor]) -> None:
    """Put zeros into the lowest-scored weights of every layer, in place.

    Args:
        found: the layers.
        score: a layer -> scores of its weight's shape, larger is kept; of equals the earlier stays.

    Raises:
        ComponentFailed: a score is not finite.
    """
    for layer in found.layers:
        scores = score(layer)
        if not bool(torch.isfinite(scores).all()):
            raise ComponentFailed(f"prune: {layer.path}: scores that are not finite. Load the source in float32.")
        layer.module.weight.mul_(pattern_mask(scores, layer.pattern))
