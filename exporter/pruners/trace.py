"""A torch-pruning dependency graph of a diffusers or CLIP network, leaving no trace on the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from exporter.errors import RecipeError
from exporter.networks.inputs import as_arguments
from exporter.networks.probe import example_inputs


def dependency_graph(network: nn.Module) -> torch_pruning.DependencyGraph:
    """Return the couplings between the layers of a network, found by one forward pass and autograd.

    Of an AutoencoderKL only the decoder is traced, so only the decoder can be cut.

    Raises:
        RecipeError: the network's attention runs through a processor with weights of its own.
    """
    graph = torch_pruning.DependencyGraph()
    with _traceable(network), warnings.catch_warnings():
        # torch-pruning warns that very deep graphs are searched only so far; every group is checked by `channels`.
        warnings.filterwarnings("ignore", message="Maximum recursive depth")
        # Its containers are passed explicitly: as shared mutable defaults they leak from one network into the next.
        graph.build_dependency(
            network,
            example_inputs(network, batch=1),
            forward_fn=_forward(network),
            unwrapped_parameters=[],
            customized_pruners={},
            ignored_layers=[],
            ignored_params=[],
            verbose=False,
        )
    return graph


def _forward(network: nn.Module) -> Callable[[Any, dict[str, Tensor]], Any]:
    return _decoded if isinstance(network, AutoencoderKL) else _answered


def _decoded(vae: Any, feeds: dict[str, Tensor]) -> Any:
    return vae.decode(*feeds.values()).sample


def _answered(network: nn.Module, feeds: dict[str, Tensor]) -> Any:
    return network(**as_arguments(feeds))[0]


@contextmanager
def _traceable(network: nn.Module) -> Iterator[None]:
    """Eager attention, gradients on, evaluation mode; everything as it was on the way out, whatever happens."""
    # Attention over text and image at once has projections of its own, which the plain processor does not know.
    found = [module for module in network.modules() if isinstance(module, Attention)]
    attentions = [module for module in found if module.added_kv_proj_dim is None]
    processors = [attention.processor for attention in attentions]
    for attention in attentions:
        if isinstance(attention.processor, nn.Module):
            name = type(attention.processor).__name__
            raise RecipeError(
                f"prune: attention runs through {name}, which has weights of its own; expected a plain processor. "
                "Unload adapters from the source first."
            )
    modes = {module: module.training for module in network.modules()}
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    try:
        for attention in attentions:
            attention.processor = AttnProcessor()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for attention, processor in zip(attentions, processors, strict=True):
            attention.processor = processor
        for module, mode in modes.items():
            module.training = mode
