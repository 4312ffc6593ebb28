"""CLIP's text encoders in the Neural Engine form; see `exporter.lowering.neural_engine`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

DISCARDED = -1e4
"""Added to the scores of what is masked: exp of it is 0 in float32 and in float16, and it is finite in both."""

_FIRST_TOKENIZERS = 2
"""The end token that configs of the first CLIP state by mistake; their networks pool where the largest token is."""


def causal_bias(length: int, like: Tensor) -> Tensor:
    """Return what hides later tokens, (1, keys, 1, queries) of `length` each, in the dtype of `like`.

    Args:
        length: how many positions there are.
        like: a parameter of the network; the values are on its device, or on the CPU where it has none.
    """
    device = "cpu" if like.device.type == "meta" else like.device
    later = torch.ones(length, length, dtype=torch.bool, device=device).tril(-1)  # key after query
    return torch.zeros(length, length, dtype=like.dtype, device=device).masked_fill(later, DISCARDED)[None, :, None]


class CLIPTextModel(transformers.CLIPTextModel):  # type: ignore[misc]
    """transformers' text encoder with channels-first layers. It has that name because networks go by it."""

    causal_bias: Tensor

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Encode a text.

        Args:
            input_ids: (rows, tokens) int64.
            attention_mask: (rows, tokens), 1 for what is kept; None for all.
            position_ids: (1, tokens) int64; None for 0, 1 and so on.
            output_hidden_states: whether the states before every layer and behind the last are answered too; None for
                what the config says.
            return_dict: whether an object is returned instead of a tuple.

        Returns:
            ``last_hidden_state`` (rows, tokens, width), ``pooler_output`` (rows, width) and, where asked for,
            ``hidden_states``, a tuple of (rows, tokens, width): in the layout of transformers, one transpose each.
        """
        tokens = input_ids.shape[1]
        hidden = self.embeddings(input_ids=input_ids, position_ids=position_ids).transpose(1, 2)[:, :, None]
        bias = self.causal_bias[:, :tokens, :, :tokens]
        if attention_mask is not None:
            hidden_keys = (1 - attention_mask.to(bias.dtype)) * DISCARDED
            bias = bias + hidden_keys[:, :, None, None]
        states = [hidden]
        for layer in self.encoder.layers:
            hidden = layer(hidden, attention_mask=bias)
            states.append(hidden)
        last = self.final_layer_norm(hidden)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        answer = BaseModelOutputWithPooling(
            last_hidden_state=_sequence(last),
            pooler_output=self._pooled(last, input_ids),
            hidden_states=tuple(_sequence(state) for state in states) if wanted else None,
        )
        return answer if return_dict else answer.to_tuple()

    def _pooled(self, last: Tensor, input_ids: Tensor) -> Tensor:
        """Return the state (rows, width) of the end token: a sum over all where every other one is multiplied by 0."""
        ids = input_ids.to(torch.int)
        scores = ids if self.eos_token_id == _FIRST_TOKENIZERS else (ids == self.eos_token_id).to(torch.int)
        place = scores.argmax(dim=1, keepdim=True)
        chosen = torch.arange(ids.shape[1], device=ids.device)[None] == place
        return (last * chosen.to(last.dtype)[:, None, None]).sum(dim=3).squeeze(2)


class CLIPTextModelWithProjection(transformers.CLIPTextModelWithProjection):  # type: ignore[misc]
    """transformers' text encoder with a projection, over a `CLIPTextModel` of this form."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Encode a text as `CLIPTextModel.forward` does; ``text_embeds`` (rows, width) comes first, no pooled state."""
        found = self.text_model(input_ids, attention_mask, position_ids, output_hidden_states)
        answer = CLIPTextModelOutput(
            text_embeds=self.text_projection(found.pooler_output[:, :, None, None])[:, :, 0, 0],
            last_hidden_state=found.last_hidden_state,
            hidden_states=found.hidden_states,
        )
        return answer if return_dict else answer.to_tuple()


def _sequence(hidden: Tensor) -> Tensor:
    """Return (rows, tokens, width) from (rows, width, 1, tokens)."""
    return hidden.squeeze(2).transpose(1, 2)
