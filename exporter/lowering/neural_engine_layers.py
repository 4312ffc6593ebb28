"""Layers of the Neural Engine form: what torch has over (rows, tokens, channels), over (rows, channels, 1, tokens).

Each takes the place, the attributes, the children and the parameters of a layer of a network; see
`exporter.lowering.neural_engine`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def over_channels(parameter: Tensor) -> Tensor:
    """Return a parameter (channels,) as a view that broadcasts over (rows, channels, height, width)."""
    return parameter[None, :, None, None]


def score_bias(mask: Tensor | None) -> Tensor | None:
    """Return what is added to attention scores, as (rows, keys, 1, queries).

    Args:
        mask: (rows, keys), where 1 keeps and 0 discards, or a bias (rows, queries or 1, keys); None for none.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = ((1 - mask) * -10000.0)[:, None]
    return mask.transpose(1, 2)[:, :, None]


def split_attention(
    states: tuple[Tensor, Tensor, Tensor], head_width: int, scale: float, bias: Tensor | None, query_chunk: int | None
) -> Tensor:
    """Attend with one product per head, so that no head gets an axis of its own.

    Args:
        states: query (rows, channels, 1, queries); key and value (rows, channels, 1, keys). Heads lie behind each other
            in the channels.
        head_width: channels of a head.
        scale: of the scores.
        bias: (rows or 1, keys, 1, queries or 1), added to the scores of every head.
        query_chunk: how many queries at a time; None for all.

    Returns:
        (rows, channels, 1, queries).
    """
    query, key, value = states
    keys, values = torch.split(key.transpose(1, 3), head_width, dim=3), torch.split(value, head_width, dim=1)
    query = query * scale
    if query_chunk is None:
        return _attend(torch.split(query, head_width, dim=1), keys, values, bias)
    chunks = torch.split(query, query_chunk, dim=3)
    own = (bias,) * len(chunks) if bias is None or bias.shape[3] == 1 else torch.split(bias, query_chunk, dim=3)
    answers = [
        _attend(torch.split(chunk, head_width, dim=1), keys, values, part)
        for chunk, part in zip(chunks, own, strict=True)
    ]
    return torch.cat(answers, dim=3)


def _attend(
    queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], values: tuple[Tensor, ...], bias: Tensor | None
) -> Tensor:
    heads = []
    for query, key, value in zip(queries, keys, values, strict=True):
        scores = torch.einsum("bchq,bkhc->bkhq", query, key)
        if bias is not None:
            scores = scores + bias
        heads.append(torch.einsum("bkhq,bchk->bchq", scores.softmax(dim=1), value))
    return torch.cat(heads, dim=1)


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over the channels of (rows, channels, 1, tokens).

    Written operation by operation as coremltools' pass for this layout expects it, which makes it one `layer_norm`. It
    knows the affine part in the opposite order only, (x + b) * w, which divides by w: ours stays two operations.
    """

    eps: float
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalized states, same shape."""
        centred = hidden - hidden.mean(dim=1, keepdim=True)
        variance = (centred * centred).mean(dim=1, keepdim=True)
        answer = centred * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            answer = answer * over_channels(self.weight)
        return answer if self.bias is None else answer + over_channels(self.bias)


class GroupNorm(nn.Module):
    """`torch.nn.GroupNorm` in four axes: coremltools' own translation of it has five.

    Only channels and rows of the image are merged, so that the last axis, which the Neural Engine keeps contiguous,
    stays as it is.
    """

    num_groups: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalized (rows, channels, height, width)."""
        rows, channels, height, width = hidden.shape
        grouped = hidden.reshape(rows, self.num_groups, -1, width)
        answer = F.instance_norm(grouped, eps=self.eps).reshape(rows, channels, height, width)
        if self.weight is not None:
            answer = answer * over_channels(self.weight)
        return answer if self.bias is None else answer + over_channels(self.bias)


class Attention(nn.Module):
    """diffusers' `Attention` over channels-first states, without what `neural_engine_unet` refuses."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    head_width: int
    scale: float
    query_chunk: int | None

    def forward(
        self, hidden: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attend to itself, or to a text.

        Args:
            hidden: (rows, channels, 1, queries).
            encoder_hidden_states: (rows, width, 1, keys).
            attention_mask: as `score_bias` returns it.

        Returns:
            (rows, channels, 1, queries).
        """
        context = hidden if encoder_hidden_states is None else encoder_hidden_states
        states = (self.to_q(hidden), self.to_k(context), self.to_v(context))
        answer = split_attention(states, self.head_width, self.scale, attention_mask, self.query_chunk)
        for part in self.to_out:
            answer = part(answer)
        return answer


class CLIPAttention(nn.Module):
    """transformers' `CLIPAttention` over channels-first states."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    head_dim: int
    scale: float
    query_chunk: int | None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Return (rows, channels, 1, tokens) from the same, and None for weights that nobody reads.

        Args:
            hidden_states: (rows, channels, 1, tokens).
            attention_mask: as `score_bias` returns it.
        """
        states = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        answer = split_attention(states, self.head_dim, self.scale, attention_mask, self.query_chunk)
        return self.out_proj(answer), None


class GEGLU(nn.Module):
    """diffusers' `GEGLU` with the gate in the second half of the channels."""

    proj: nn.Module

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (rows, neurons, 1, tokens) from (rows, channels, 1, tokens)."""
        kept, gate = torch.chunk(self.proj(hidden), 2, dim=1)
        return kept * F.gelu(gate)


class Zero(nn.Module):
    """The stand-in of that name in a linear layer's place, whose width is the second axis here."""

    out_features: int

    def forward(self, hidden: Tensor) -> Tensor:
        """Return zeros (rows, out_features, 1, tokens) from (rows, channels, 1, tokens)."""
        return torch.zeros_like(hidden[:, :1]).expand(-1, self.out_features, -1, -1)


class Gather(nn.Module):
    """The stand-in of that name, which puts the outputs of a narrower layer into place along the second axis."""

    linear: nn.Module
    index: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (rows, out_features, 1, tokens) from (rows, in_features, 1, tokens)."""
        return F.pad(self.linear(hidden), (0, 0, 0, 0, 0, 1)).index_select(1, self.index)
