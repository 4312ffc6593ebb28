"""The networks that ci/bench_gpu.py measures: published configs, what they are called with, and their linear layers.

``python ci/gpu_networks.py`` prints every distinct linear layer as a line of JSON; nothing is computed for that, so it
needs no GPU and no memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A denoiser and the size of its call.

    Attributes:
        family: of `exporter.random_weights.families`.
        part: its folder.
        changes: to the published config.
        rows: per call; two are an image with and without its prompt.
        latent: side.
        tokens: length of the text.
    """

    family: str
    part: str
    changes: Mapping[str, Any]
    rows: int
    latent: int
    tokens: int


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "sd15": Network("sd15", "unet", {}, 2, 64, 77),
        "sdxl": Network("sdxl", "unet", {}, 2, 128, 77),
        # One block of each kind; 128 x 128 latents are 4,096 places for it.
        "flux-block": Network("flux", "transformer", {"num_layers": 1, "num_single_layers": 1}, 1, 128, 512),
    }
)


@dataclass(frozen=True)
class Linear:
    """A distinct linear layer.

    Attributes:
        rows: that it multiplies in a call, all leading axes together.
        inputs: per row.
        outputs: per row.
        where: network -> how many layers of this shape it calls.
    """

    rows: int
    inputs: int
    outputs: int
    where: Mapping[str, int]


def built(network: Network, device: str = "meta") -> Any:
    """Return the module: without numbers on ``meta``; elsewhere without parameters, its computed buffers real."""
    import diffusers
    from accelerate import init_empty_weights

    from exporter.random_weights.families import family

    part = next(part for part in family(network.family).parts if part.folder == network.part)
    cls, config = getattr(diffusers, part.cls), {**part.config, **network.changes}
    with torch.device("meta") if device == "meta" else init_empty_weights(include_buffers=False):
        return cls.from_config(config).eval()


def inputs_of(network: Network, module: nn.Module) -> tuple[Tensor, ...]:
    """Return example inputs of the wrapped module, as the exporter makes them."""
    from exporter.lowering.wrappers import Sizes, example_feeds

    return example_feeds(module, Sizes(network.rows, network.latent, network.tokens))


def called(network: Network) -> tuple[list[tuple[int, int, int]], int]:
    """Return (rows, inputs, outputs) of every linear layer in a call, and the multiplications of all weights in it."""
    from exporter.lowering.wrappers import wrap

    module = built(network)
    linear: list[tuple[int, int, int]] = []
    products = [0]
    hooks = [part.register_forward_hook(_seen(linear, products)) for part in module.modules() if _has_weight(part)]
    with torch.no_grad():
        wrap(module)(*(value.to("meta") for value in inputs_of(network, module)))
    for hook in hooks:
        hook.remove()
    return linear, products[0]


def linear_layers(names: list[str]) -> list[Linear]:
    """Return the distinct linear layers of some networks, largest first."""
    found: dict[tuple[int, int, int], dict[str, int]] = {}
    for name in names:
        for shape in called(NETWORKS[name])[0]:
            counts = found.setdefault(shape, {})
            counts[name] = counts.get(name, 0) + 1
    order = sorted(found, key=lambda shape: (-shape[0] * shape[1] * shape[2], shape))
    return [Linear(*shape, where=found[shape]) for shape in order]


def eligible_share(name: str) -> float:
    """Return what part of a network's multiplications with weights its linear layers do that torch stores sparse."""
    from targets.semi_structured import refusal

    linear, products = called(NETWORKS[name])
    taken = [(rows, wide, out) for rows, wide, out in linear if not refusal("MatMul", (out, wide), torch.float16)]
    return sum(rows * wide * out for rows, wide, out in taken) / products


def _has_weight(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear | nn.Conv2d)


def _seen(linear: list[tuple[int, int, int]], products: list[int]) -> Callable[[Any, Any, Any], None]:
    def hook(part: Any, given: Any, answer: Tensor) -> None:
        products[0] += answer.numel() * part.weight[0].numel()
        if isinstance(part, nn.Linear):
            linear.append((given[0].numel() // part.in_features, part.in_features, part.out_features))

    return hook


if __name__ == "__main__":
    for layer in linear_layers(sys.argv[1:] or list(NETWORKS)):
        sys.stdout.write(json.dumps(asdict(layer)) + "\n")
