"""What diff records, what it refuses, and how records compose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_samples import network, take, text_encoder, unet
from torch import nn

from exporter.errors import ArtifactError, SurgeryError
from exporter.networks.standins import stand_in
from exporter.networks.surgery import Resize, Snapshot, StandIn, Surgery, diff, replay


class _Small(nn.Module):
    """A list, a pair of layers and a norm: enough for rules that hold for any network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            value = layer(value)
        return self.head(self.norm(value))


def test_a_deleted_entry_renumbers_the_rest_and_edits_follow_the_module() -> None:
    net = _Small()
    snapshot = Snapshot.of(net)
    marked = net.layers[2]
    del net.layers[0]
    take(net.layers[2], [0, 1], axis=0)
    surgery = diff(snapshot, net)
    assert net.layers[1] is marked
    assert surgery.keep == {"layers": (1, 2, 3)}
    assert set(surgery.resize) == {"layers.2"}


def test_order_and_copies_are_recorded() -> None:
    net = _Small()
    snapshot = Snapshot.of(net)
    entries = list(net.layers)
    net.layers = nn.ModuleList([entries[3], entries[1], copy.deepcopy(entries[1])])
    surgery = diff(snapshot, net)
    assert surgery == Surgery(keep={"layers": (3, 1, 1)})
    again = _Small()
    replay(again, surgery)
    assert len({id(p) for p in again.parameters()}) == len(list(again.parameters())), "a copy shares weights"


def test_a_new_layer_of_the_same_class_is_a_resize_not_a_copy() -> None:
    net = _Small()
    snapshot = Snapshot.of(net)
    net.layers[3] = nn.Linear(4, 2)
    net.head = nn.Linear(2, 4, bias=False)
    surgery = diff(snapshot, net)
    assert not surgery.keep
    assert set(surgery.resize) == {"layers.3", "head"}


def test_tuples_come_back_as_tuples() -> None:
    net = _Small()
    snapshot = Snapshot.of(net)
    net.norm.weight, net.norm.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    net.norm.normalized_shape = (3,)
    again = _Small()
    replay(again, Surgery.from_json(diff(snapshot, net).to_json()))
    assert again.norm.normalized_shape == (3,)
    assert isinstance(again.norm.normalized_shape, tuple)
    assert again.norm(torch.ones(2, 3)).shape == (2, 3)


def test_a_bias_may_come_and_go() -> None:
    net = _Small()
    snapshot = Snapshot.of(net)
    net.head.bias = nn.Parameter(torch.ones(4))
    net.layers[0].bias = None
    again = _Small()
    replay(again, diff(snapshot, net))
    assert again.head.bias is not None
    assert again.layers[0].bias is None


def test_a_stand_in_of_an_earlier_stage_is_edited_by_a_later_one() -> None:
    net = unet()
    block = net.up_blocks[1].resnets
    first_snapshot = Snapshot.of(net)
    block[0] = stand_in("shortcut", block[0])
    first = diff(first_snapshot, net)
    second_snapshot = Snapshot.of(net)
    net.mid_block.attentions[0] = stand_in("bypass", net.mid_block.attentions[0])
    second = diff(second_snapshot, net)
    assert set(second.stand_in) == {"mid_block.attentions.0"}
    assert first.then(second) == diff(first_snapshot, net)


def test_a_later_stage_takes_along_what_it_drops_and_repeats_what_it_copies() -> None:
    inner = Resize({"weight": (2, 4)}, {"out_features": 2})
    first = Surgery(keep={"layers": (0, 2, 3)}, resize={"layers.1": inner, "layers.2": inner}, stand_in={})
    second = Surgery(keep={"layers": (1, 1)}, stand_in={"norm": StandIn("bypass")})
    both = first.then(second)
    assert both.keep == {"layers": (2, 2)}
    assert both.resize == {"layers.0": inner, "layers.1": inner}
    assert both.stand_in == {"norm": StandIn("bypass")}


def test_a_stand_in_takes_earlier_sizes_below_it_along() -> None:
    first = Surgery(resize={"block.conv": Resize({"weight": (2, 4)}), "block": Resize({}, {"channels": 2})})
    both = first.then(Surgery(stand_in={"block": StandIn("bypass")}))
    assert both == Surgery(stand_in={"block": StandIn("bypass")})


def test_later_sizes_win() -> None:
    first = Surgery(resize={"a": Resize({"weight": (8, 4), "bias": (8,)}, {"out_features": 8})})
    second = Surgery(resize={"a": Resize({"weight": (8, 2)}, {"in_features": 2})})
    expected = Resize({"weight": (8, 2), "bias": (8,)}, {"out_features": 8, "in_features": 2})
    assert first.then(second).resize == {"a": expected}


def _patch_forward(net: Any) -> str:
    resnet = net.mid_block.resnets[0]
    resnet.forward = resnet.forward
    return "mid_block.resnets.0"


def _hook(net: Any) -> str:
    net.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda module, inputs, output: output * 2)
    return "down_blocks.0.resnets.0.conv1"


def _new_attribute(net: Any) -> str:
    net.mid_block.resnets[0].importance = 3
    return "mid_block.resnets.0.importance"


def _odd_attribute(net: Any) -> str:
    net.mid_block.resnets[0].output_scale_factor = 2.0
    return "mid_block.resnets.0.output_scale_factor"


def _deleted_attribute(net: Any) -> str:
    del net.mid_block.resnets[0].pre_norm
    return "mid_block.resnets.0.pre_norm"


def _processor(net: Any) -> str:
    from diffusers.models.attention_processor import AttnProcessor

    net.mid_block.attentions[0].transformer_blocks[0].attn1.processor = AttnProcessor()
    return "mid_block.attentions.0.transformer_blocks.0.attn1.processor"


def _config(net: Any) -> str:
    net.register_to_config(center_input_sample=True)
    return "_internal_dict"


def _shared_storage(net: Any) -> str:
    net.mid_block.resnets[0].conv1.weight = net.mid_block.resnets[1].conv1.weight
    return "mid_block.resnets.0.conv1.weight"


def _one_module_twice(net: Any) -> str:
    net.mid_block.resnets[1] = net.mid_block.resnets[0]
    return "mid_block.resnets"


def _other_class(net: Any) -> str:
    net.conv_in = nn.Sequential(net.conv_in)
    return "conv_in"


def _new_child(net: Any) -> str:
    net.mid_block.extra = nn.Linear(2, 2)
    return "mid_block"


def _mask(net: Any) -> str:
    from torch.nn.utils import prune

    prune.l1_unstructured(net.conv_in, "weight", amount=0.5)
    return "conv_in"


def _buffer(net: Any) -> str:
    net.conv_in.register_buffer("kept", torch.ones(1))
    return "conv_in"


REFUSED: tuple[Callable[[Any], str], ...] = (
    _patch_forward,
    _hook,
    _new_attribute,
    _odd_attribute,
    _deleted_attribute,
    _processor,
    _config,
    _shared_storage,
    _one_module_twice,
    _other_class,
    _new_child,
    _mask,
    _buffer,
)


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__.strip("_"))
def test_what_cannot_be_recorded_is_refused_by_name(edit: Callable[[Any], str]) -> None:
    net = unet()
    snapshot = Snapshot.of(net)
    path = edit(net)
    with pytest.raises(SurgeryError) as caught:
        diff(snapshot, net)
    assert path in str(caught.value)


def test_a_changed_constant_buffer_is_refused() -> None:
    net = text_encoder()
    snapshot = Snapshot.of(net)
    net.embeddings.position_ids = net.embeddings.position_ids.flip(-1)
    with pytest.raises(SurgeryError, match="embeddings"):
        diff(snapshot, net)


def test_another_network_is_refused() -> None:
    with pytest.raises(SurgeryError, match="the network"):
        diff(Snapshot.of(unet()), unet())


def test_what_does_not_run_is_refused() -> None:
    net = unet()
    snapshot = Snapshot.of(net)
    take(net.mid_block.resnets[0].conv1, list(range(8)), axis=0)
    with pytest.raises(SurgeryError, match="does not run"):
        diff(snapshot, net)


def test_looking_at_a_network_leaves_no_trace() -> None:
    net = text_encoder()
    snapshot = Snapshot.of(net)
    with torch.no_grad():
        net(
            input_ids=torch.tensor([[1, 2, 39]]), output_hidden_states=True
        )  # installs hooks that do nothing by themselves
    net.train()
    assert diff(snapshot, net).is_empty
    assert net.training


def test_modules_under_two_paths_stay_one() -> None:
    from diffusers.models.downsampling import Downsample2D

    def sampler() -> Any:
        return nn.Sequential(Downsample2D(4, use_conv=True))  # `conv` and `Conv2d_0` are one module

    net = sampler()
    snapshot = Snapshot.of(net)
    take(net[0].conv, [0, 1], axis=0)
    net[0].out_channels = 2
    surgery = diff(snapshot, net)
    assert set(surgery.resize) == {"0", "0.Conv2d_0"}, "recorded once"
    again = sampler()
    replay(again, surgery)
    assert again[0].conv is again[0].Conv2d_0
    assert again(torch.zeros(1, 4, 8, 8)).shape == (1, 2, 4, 4)

    net[0].conv = copy.deepcopy(net[0].conv)
    with pytest.raises(SurgeryError, match="two paths"):
        diff(snapshot, net)


def test_one_module_in_two_blocks_stays_one() -> None:
    net = _Small()
    shared = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2)), "b": nn.Sequential(nn.Linear(2, 2))})
    shared["b"][0] = shared["a"][0]
    net.head = nn.Sequential(shared)
    snapshot = Snapshot.of(net)
    assert diff(snapshot, net).is_empty
    shared["b"][0] = copy.deepcopy(shared["a"][0])
    with pytest.raises(SurgeryError, match="became two"):
        diff(snapshot, net)


def test_tied_parameters_stay_tied() -> None:
    net = _Small()
    net.head.weight = net.layers[0].weight
    snapshot = Snapshot.of(net)
    assert diff(snapshot, net).is_empty
    net.head.weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(SurgeryError, match="came apart"):
        diff(snapshot, net)


@pytest.mark.parametrize(
    "surgery",
    [
        Surgery(keep={"nowhere": (0,)}),
        Surgery(keep={"conv_in": (0,)}),
        Surgery(keep={"down_blocks": (0, 7)}),
        Surgery(keep={"down_blocks": (0,) * 100}),
        Surgery(stand_in={"down_blocks.9": StandIn("bypass")}),
        Surgery(stand_in={"conv_in": StandIn("shortcut")}),
        Surgery(stand_in={"conv_in": StandIn("zero")}),
        Surgery(stand_in={"conv_in": StandIn("gather", (0,), 4)}),
        Surgery(resize={"conv_in": Resize({"waist": (2,)})}),
        Surgery(resize={"conv_in": Resize({"weight": (2, 2)})}),
        Surgery(resize={"conv_in": Resize({}, {"heads": 4})}),
        Surgery(resize={"conv_in": Resize({}, {"in_channels": (4,)})}),
        Surgery(resize={"config": Resize({}, {"in_channels": 4})}),
    ],
    ids=str,
)
def test_a_record_of_another_network_is_refused(surgery: Surgery) -> None:
    with pytest.raises(ArtifactError, match="Restore the original file"):
        replay(network("UNet2DConditionModel"), surgery)
