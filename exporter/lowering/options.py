"""How components become ONNX: what the key of every exported component holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportOptions:
    """How components become ONNX.

    Attributes:
        opset: of the ONNX operators. 20 writes attention and group normalization in basic operators, which every
            runtime and quantizer reads; 21 has GroupNormalization, 23 Attention.
        dynamic: leave batch, height and width open instead of fixing them.
        batch: images per call; fixed unless `dynamic`.
        guided: the denoiser answers two rows per image, without and with the prompt.
        latent: side of the latent; fixed unless `dynamic`.
        tokens: length of the text, always fixed.
        batches: least and most images per call that engines are built for, where a runtime has to know; of `dynamic`.
        latents: the same of the latent's side.
        external_bytes: weights beyond this stay in files beside the graph; below, the graph holds them.
    """

    opset: int = 20
    dynamic: bool = False
    batch: int = 1
    guided: bool = True
    latent: int = 64
    tokens: int = 77
    batches: tuple[int, int] | None = None
    latents: tuple[int, int] | None = None
    external_bytes: int = 100_000_000
