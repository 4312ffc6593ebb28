"""BK-SDM presets: stock diffusers loads what is left, and it holds the weights that the authors take over."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from exporter.artifact import open_artifact
from exporter.errors import RecipeError
from exporter.memo import FileMemo
from exporter.networks.probe import example_inputs
from exporter.networks.stock import is_built_by
from exporter.networks.storage import load_network
from exporter.networks.surgery import Snapshot, Surgery, diff, replay
from exporter.progress import Silent
from exporter.pruners.base import Context
from exporter.pruners.bk_sdm import BkSdm, BkSdmOptions
from exporter.recipe import Recipe
from exporter.transforms import Lab, make_state

PRESETS = ("base", "small", "tiny")


def build(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return UNet2DConditionModel(
            **{
                "sample_size": 8,
                "block_out_channels": (16, 16, 32),
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                "norm_num_groups": 4,
                "attention_head_dim": [2, 4, 8],
                "cross_attention_dim": 8,
                **changes,
            }
        ).eval()


def pruned(network, preset):
    outcome = BkSdm(BkSdmOptions(preset)).prune(network, Context(torch.Generator(), Silent(), Path("unused")))
    return network, outcome


def answer(network):
    feeds = example_inputs(network, batch=2)
    with torch.no_grad():
        return network(feeds["sample"], 17, feeds["encoder_hidden_states"]).sample


@pytest.mark.parametrize("preset", PRESETS)
def test_stock_diffusers_loads_the_state_and_answers_bit_equal(preset, tiny_loan, tmp_path):
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "source": {"path": str(tiny_loan.dense.path)},
            "sampling": {"steps": 2, "size": 64},
            "stages": [
                {"prune": {"method": "bk-sdm", "preset": preset}},
                {"prune": {"method": "random", "keep_ratio": 0.5}},
            ],
            "targets": {"ort": {"type": "onnxruntime"}},
        }
    )
    lab = Lab(recipe, tmp_path, Silent(), FileMemo())
    state, _ = make_state(0, tiny_loan.dense, tiny_loan.dense, tmp_path / "1-pruned", lab)
    facts = open_artifact(state.path).manifest.facts["facts"]
    assert (facts["stock_config"], facts["preset"]) == (True, preset)
    stock, info = UNet2DConditionModel.from_pretrained(state.path / "unet", output_loading_info=True)
    assert not any(info.values())
    assert not (state.path / "unet" / "surgery.json").exists()
    ours = load_network(state.path / "unet", cls="UNet2DConditionModel")
    assert torch.equal(answer(ours), answer(copy.deepcopy(stock).eval()))
    # What comes next starts from the stock config.
    later, _ = make_state(1, state, tiny_loan.dense, tmp_path / "2-pruned", lab)
    assert json.loads((later.path / "unet" / "surgery.json").read_text())["resize"]
    load_network(later.path / "unet", cls="UNet2DConditionModel")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_authors_own_mapping_of_names_gives_the_same_network(preset):
    """A stock network of the small config, filled from the dense one's state dict by renaming."""
    dense = build()
    made, outcome = pruned(build(), preset)
    assert is_built_by(made, outcome.config)
    student = UNet2DConditionModel.from_config(outcome.config).eval()
    gone = len(dense.up_blocks) - len(student.up_blocks)
    state = dense.state_dict()
    taken = {}
    for name, value in student.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up_blocks":
            parts[1] = str(int(parts[1]) + gone)
            if parts[2] in ("resnets", "attentions") and parts[3] == "1":
                parts[3] = "2"
        source = state[".".join(parts)]
        if source.shape != value.shape:  # tiny: 32 channels came from below, 16 do; 16 of the skip stay
            assert (preset, parts[1:4]) == ("tiny", ["1", "resnets", "0"])
            kept = torch.tensor([*range(16), *range(32, 48)])
            source = source.index_select(0 if source.dim() == 1 else 1, kept)
        taken[name] = source
    student.load_state_dict(taken)
    assert torch.equal(answer(student), answer(made))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_edit_can_be_recorded_too(preset):
    network = build()
    before = Snapshot.of(network)
    surgery = diff(before, pruned(network, preset)[0])
    rebuilt = build()
    replay(rebuilt, Surgery.from_json(json.loads(json.dumps(surgery.to_json()))))
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(answer(rebuilt), answer(network))


def test_the_published_config_of_stable_diffusion_comes_out():
    """The three configs that the authors publish, as far as they differ from Stable Diffusion 1.5."""
    four = {
        "block_out_channels": (8, 16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 2,
    }
    made = {preset: pruned(build(**four), preset)[1].config for preset in PRESETS}
    assert [made[preset]["layers_per_block"] for preset in PRESETS] == [1, 1, 1]
    assert [made[preset]["mid_block_type"] for preset in PRESETS] == ["UNetMidBlock2DCrossAttn", None, None]
    assert [len(made[preset]["block_out_channels"]) for preset in PRESETS] == [4, 4, 3]
    assert made["tiny"]["down_block_types"] == ["CrossAttnDownBlock2D"] * 3
    assert made["tiny"]["up_block_types"] == ["CrossAttnUpBlock2D"] * 3


def test_a_config_that_does_not_build_the_network_is_not_taken():
    made, outcome = pruned(build(), "base")
    made.mid_block.attentions[0].transformer_blocks[0].attn1.heads = 4
    assert not is_built_by(made, outcome.config)
    assert not is_built_by(made, {**outcome.config, "block_out_channels": (7,)})


@pytest.mark.parametrize(
    ("changes", "preset", "words"),
    [
        ({"layers_per_block": 1}, "base", r"got \[1\] down and \[2\] up, expected \[2\] and \[3\]\. Write method"),
        ({"mid_block_type": None}, "small", r"without one\. Write preset: base"),
    ],
)
def test_what_the_presets_do_not_fit_is_refused(changes, preset, words):
    with pytest.raises(RecipeError, match=words):
        pruned(build(**changes), preset)


def test_one_stage_cannot_lose_its_innermost():
    one = {"block_out_channels": (16,), "attention_head_dim": 2}
    one |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with pytest.raises(RecipeError, match=r"one stage, expected two or more\. Write preset: small"):
        pruned(build(**one), "tiny")


def test_another_family_is_refused(network):
    with pytest.raises(RecipeError, match="cuts a UNet2DConditionModel; got AutoencoderKL"):
        pruned(network("vae"), "base")


def test_an_unknown_preset_is_refused():
    with pytest.raises(RecipeError, match="got 'large', expected one of base, small, tiny"):
        BkSdmOptions("large")
