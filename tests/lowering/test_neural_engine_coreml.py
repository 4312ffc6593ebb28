"""What coremltools makes of the Neural Engine form: convolutions, four axes, few reshapes; of stock networks not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scrambled_networks import clip, one_level
from torch import nn

from exporter.lowering.neural_engine import neural_engine_form
from exporter.lowering.wrappers import Sizes, example_feeds, signature, wrap
from exporter.networks.standins import stand_in

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",  # what diffusers asserts of shapes
    "ignore:.torch.jit:DeprecationWarning",  # coremltools converts what it traces
    "ignore:.is_gradient_checkpointing:FutureWarning",  # a property of transformers that tracing reads
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning:coremltools",  # its `int` of an array of one
)
SIZES = Sizes(rows=2, latent=8, tokens=6)
MOVES = ("reshape", "transpose", "expand_dims", "squeeze")


@dataclass(frozen=True)
class Program:
    """What is in a converted program.

    Attributes:
        operations: kind of operation, constants left out, to how many there are.
        rank: the most axes of any result.
    """

    operations: Counter[str]
    rank: int

    def count(self, *kinds: str) -> int:
        return sum(self.operations[kind] for kind in kinds)


@pytest.fixture(scope="module")
def coremltools() -> Any:
    return pytest.importorskip("coremltools")


def converted(library: Any, network: nn.Module) -> Program:
    feeds = tuple(feed[None] if feed.ndim == 0 else feed for feed in example_feeds(network, SIZES))
    with torch.no_grad():
        traced = torch.jit.trace(wrap(network).eval(), feeds, check_trace=False)
    types = [np.int32 if feed.dtype == torch.int64 else np.float32 for feed in feeds]
    named = zip(signature(network).inputs, feeds, types, strict=True)
    program = library.convert(
        traced,
        inputs=[library.TensorType(name=name, shape=tuple(feed.shape), dtype=kind) for name, feed, kind in named],
        outputs=[library.TensorType(name=name.replace(".", "_")) for name in signature(network).outputs],
        convert_to="milinternal",
        minimum_deployment_target=library.target.iOS17,
        compute_precision=library.precision.FLOAT32,
    )
    made = [operation for operation in program.functions["main"].operations if operation.op_type != "const"]
    ranks = [len(value.shape) for operation in made for value in operation.outputs]
    return Program(Counter(operation.op_type for operation in made), max(ranks))


def test_a_u_net_is_converted_as_the_neural_engine_wants_it(coremltools: Any) -> None:
    network = one_level()
    stock = converted(coremltools, network)
    form = converted(coremltools, neural_engine_form("unet", network, channels_first_text=True))
    assert stock.rank == 5
    assert form.rank == 4
    assert form.count("linear", "matmul", "reduce_mean") == 0
    linear, convolutions = (sum(type(part) is kind for part in network.modules()) for kind in (nn.Linear, nn.Conv2d))
    assert stock.count("linear") == linear > 40
    assert form.count("conv") == linear + convolutions
    heads = sum(part.heads for part in network.modules() if hasattr(part, "heads"))
    assert form.count("einsum") == 2 * heads
    norms = [type(part) for part in network.modules()]
    assert form.count("layer_norm") == norms.count(nn.LayerNorm)
    assert form.count("instance_norm") == norms.count(nn.GroupNorm)
    attentions = sum(hasattr(part, "to_k") for part in network.modules())
    assert form.count("transpose") == attentions < stock.count("transpose") / 4  # of the keys; text comes as it should
    pictures = sum(name.split(".")[-2:-1] == ["attentions"] for name, _ in network.named_modules())
    assert form.count("reshape") == 2 * (pictures + norms.count(nn.GroupNorm)) < stock.count("reshape") * 0.6
    assert form.count(*MOVES) < stock.count(*MOVES) / 2


def test_a_text_encoder_is_converted_as_the_neural_engine_wants_it(coremltools: Any) -> None:
    network = clip()
    stock, form = converted(coremltools, network), converted(coremltools, neural_engine_form("text_encoder", network))
    assert form.rank == 4
    assert form.count("linear", "matmul", "reshape", "gather_nd") == 0
    assert form.count("conv") == stock.count("linear") == 18
    assert form.count("einsum") == 2 * 3 * 4
    assert form.count("layer_norm") == 7
    answers = 1 + 1 + 3  # the last states, and those before the layers and behind them
    assert form.count("transpose") == 1 + 3 + answers < stock.count("transpose")
    assert form.count("gather") == 1  # the tokens


def test_what_is_gone_leaves_no_operations(coremltools: Any) -> None:
    network = one_level()
    whole = converted(coremltools, neural_engine_form("unet", network))
    block = network.mid_block.attentions[0].transformer_blocks[0]
    block.attn1, block.ff = stand_in("zero", block.attn1), stand_in("zero", block.ff)
    less = converted(coremltools, neural_engine_form("unet", network))
    assert whole.count("conv") - less.count("conv") == 4 + 2
    assert whole.count("layer_norm") - less.count("layer_norm") == 2
    assert less.operations.keys() <= whole.operations.keys()
    assert whole.count("add") - less.count("add") == 2
