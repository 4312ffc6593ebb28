"""The U-Net and its blocks in the Neural Engine form; see `exporter.lowering.neural_engine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import diffusers
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from exporter.lowering.neural_engine_layers import score_bias


class UNet2DConditionModel(diffusers.UNet2DConditionModel):  # type: ignore[misc]
    """diffusers' U-Net, whose parts take text states channels first. It has that name because networks go by it."""

    channels_first_text: bool

    def process_encoder_hidden_states(
        self, encoder_hidden_states: Tensor, added_cond_kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Return text states as (rows, width, 1, tokens), which the forward of diffusers hands to every block.

        Args:
            encoder_hidden_states: (rows, tokens, width), or what is returned where the form takes that.
            added_cond_kwargs: not read.
        """
        del added_cond_kwargs
        return encoder_hidden_states if self.channels_first_text else encoder_hidden_states.transpose(1, 2)[:, :, None]


class TimestepEmbedding(nn.Module):
    """diffusers' `TimestepEmbedding` with an answer of four axes, which every residual block adds as it is."""

    linear_1: nn.Module
    cond_proj: nn.Module | None
    act: nn.Module | None
    linear_2: nn.Module
    post_act: nn.Module | None

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embed.

        Args:
            sample: (rows, channels).
            condition: (rows, width) or None.

        Returns:
            (rows, embedding, 1, 1).
        """
        hidden = sample[:, :, None, None]
        if condition is not None and self.cond_proj is not None:
            hidden = hidden + self.cond_proj(condition[:, :, None, None])
        for part in (self.linear_1, self.act, self.linear_2, self.post_act):
            hidden = hidden if part is None else part(hidden)
        return hidden


class ResnetBlock2D(nn.Module):
    """diffusers' `ResnetBlock2D` for an embedding of the timestep of four axes."""

    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    conv2: nn.Module
    nonlinearity: nn.Module
    time_emb_proj: nn.Module | None
    conv_shortcut: nn.Module | None
    upsample: Any
    downsample: Any
    skip_time_act: bool
    time_embedding_norm: str
    output_scale_factor: float

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """Return (rows, channels, height, width).

        Args:
            input_tensor: (rows, channels, height, width).
            temb: (rows, embedding, 1, 1) or None.
        """
        hidden = self.nonlinearity(self.norm1(input_tensor))
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if shift is not None and self.time_embedding_norm == "scale_shift":
            scale, shift = shift.chunk(2, dim=1)
            hidden = self.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm2(hidden if shift is None else hidden + shift)
        hidden = self.conv2(self.dropout(self.nonlinearity(hidden)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        answer = input_tensor + hidden
        return cast("Tensor", answer if self.output_scale_factor == 1.0 else answer / self.output_scale_factor)


class Transformer2DModel(nn.Module):
    """diffusers' `Transformer2DModel` of images, which becomes one row of pixels instead of a sequence."""

    norm: nn.Module
    proj_in: nn.Module
    transformer_blocks: nn.ModuleList
    proj_out: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **ignored: Any,
    ) -> Any:
        """Return (rows, channels, height, width), in the convention of diffusers.

        Args:
            hidden_states: (rows, channels, height, width).
            encoder_hidden_states: (rows, width, 1, tokens) or None.
            attention_mask: of self-attention, as the U-Net of diffusers hands it on; None for none.
            encoder_attention_mask: of the text, likewise.
            return_dict: whether an object is returned instead of a tuple.
            **ignored: what the attention of diffusers does not read either.
        """
        rows, _, height, width = hidden_states.shape
        hidden = self.proj_in(self.norm(hidden_states))
        hidden = hidden.reshape(rows, -1, 1, height * width)
        masks = (score_bias(attention_mask), score_bias(encoder_attention_mask))
        for block in self.transformer_blocks:
            hidden = block(hidden, masks[0], encoder_hidden_states, masks[1])
        answer = self.proj_out(hidden.reshape(rows, -1, height, width)) + hidden_states
        return Transformer2DModelOutput(sample=answer) if return_dict else (answer,)


class BasicTransformerBlock(nn.Module):
    """diffusers' `BasicTransformerBlock` of the kind that U-Nets have, over (rows, channels, 1, tokens)."""

    norm1: nn.Module
    attn1: nn.Module
    norm2: nn.Module | None
    attn2: nn.Module | None
    norm3: nn.Module
    ff: nn.Module
    only_cross_attention: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return (rows, channels, 1, tokens).

        Args:
            hidden_states: (rows, channels, 1, tokens).
            attention_mask: of self-attention, as `score_bias` returns it.
            encoder_hidden_states: (rows, width, 1, tokens) or None.
            encoder_attention_mask: of the text, as `score_bias` returns it.
        """
        hidden = hidden_states
        context = encoder_hidden_states if self.only_cross_attention else None
        hidden = hidden + self.attn1(self.norm1(hidden), encoder_hidden_states=context, attention_mask=attention_mask)
        if self.attn2 is not None:
            normed = hidden if self.norm2 is None else self.norm2(hidden)
            hidden = hidden + self.attn2(
                normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
            )
        return cast("Tensor", hidden + self.ff(self.norm3(hidden)))
