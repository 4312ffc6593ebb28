"""States with zeros: recovery keeps them, later cuts take their claims along or drop them, lowering proves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.artifact import digest_of
from exporter.errors import ArtifactError
from exporter.memo import FileMemo
from exporter.networks.source import check_source
from exporter.networks.sparsity import broken, load_claims
from exporter.networks.storage import load_network
from exporter.progress import Silent
from exporter.transforms import Lab, make_dense, make_state

UNET = "UNet2DConditionModel"


@pytest.fixture(scope="module")
def made(tiny_recipe: Any, tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from stages to the states that they make, the dense one first."""
    out = tmp_path_factory.mktemp("states")
    prompts = out / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    dense, _ = make_dense(tiny_pipeline_folder, check_source(tiny_pipeline_folder), out / "0-dense")

    def states(*stages: dict[str, Any]) -> list[Any]:
        recipe = tiny_recipe(stages=list(stages), sampling={"steps": 2, "guidance": 3.0, "batch": 2})
        lab = Lab(recipe, out, Silent(), FileMemo())
        found = [dense]
        for index in range(len(stages)):
            name = f"{index + 1}-{digest_of(list(stages[: index + 1]))[:8]}"
            found.append(make_state(index, found[-1], dense, out / name, lab)[0])
        return found

    states.prompts = str(prompts)  # type: ignore[attr-defined]
    return states


def loaded(state: Any) -> torch.nn.Module:
    return load_network(state.path / "unet", cls=UNET)


SPARSE = {"prune": {"method": "magnitude", "cut": "weights", "keep_ratio": 0.5, "pattern": "2:4"}}


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_recovery_trains_what_stays_and_keeps_the_zeros(made, pattern):
    tune = {"method": "distill", "steps": 3, "batch": 2, "samples": 2, "weight_decay": 0.5, "prompts": made.prompts}
    sparse = {"prune": {**SPARSE["prune"], "pattern": pattern}}
    _, before, after = made(sparse, {"tune": {**tune, "learning_rate": 1e-2}})
    claims = load_claims(before.path / "unet")
    assert len(claims) > 60
    assert load_claims(after.path / "unet") == claims
    first, second = loaded(before), loaded(after)
    for state, network in ((before, first), (after, second)):
        told = state.manifest.facts["facts"]
        assert told["layers_with_zeros"] == len(claims)
        zeros = sum(int((parameter == 0).sum()) for parameter in network.parameters())
        count = sum(parameter.numel() for parameter in network.parameters())
        assert told["non_zero_share"] == pytest.approx(1 - zeros / count, abs=1e-4)
    for name in claims:
        was, now = first.get_parameter(name), second.get_parameter(name)
        assert torch.equal(was == 0, now == 0), name
        assert not torch.equal(was, now), name


def test_a_recommended_order_ends_with_every_claim(made):
    """Channels, then 2:4: the narrower layers are masked."""
    channels = {"prune": {"method": "magnitude", "keep_ratio": 0.5, "round_to": 16}}
    _, _, last = made(channels, SPARSE)
    network, claims = loaded(last), load_claims(last.path / "unet")
    assert len(claims) > 60
    assert not any(broken(network.get_parameter(name).detach(), pattern) for name, pattern in claims.items())


def test_channels_in_another_order_are_no_edit_and_stay_where_zeros_are_already(made):
    permuted = {"prune": {**SPARSE["prune"], "permute": True}}
    dense, once, twice = made(permuted, permuted)
    told = [state.manifest.facts["facts"] for state in (once, twice)]
    assert told[0]["kept_magnitude"]["permuted"] > told[0]["kept_magnitude"]["plain"]
    assert told[1]["kept_magnitude"] == {"plain": 1.0, "permuted": 1.0, "layers": {}}
    assert not any(told[0][name] for name in ("lists_shortened", "modules_replaced", "modules_resized"))
    before, first, second = (loaded(state).state_dict() for state in (dense, once, twice))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in first.items()}
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_later_cut_says_whose_claims_it_broke(made):
    channels = {"prune": {"method": "random", "keep_ratio": 0.6, "round_to": 1}}
    _, sparse, last = made(SPARSE, channels)
    before, after = load_claims(sparse.path / "unet"), load_claims(last.path / "unet")
    lost = set(last.manifest.facts["facts"]["sparsity_lost"])
    assert lost
    assert set(before) == set(after) | lost
    assert not set(after) & lost
    loaded(last)  # what is still claimed is true


def test_a_false_claim_of_a_state_is_refused_on_load(made, tmp_path):
    _, sparse = made(SPARSE)
    shutil.copytree(sparse.path / "unet", tmp_path / "unet")
    path = tmp_path / "unet" / "sparsity.json"
    claims = json.loads(path.read_text())
    claims["weights"]["conv_out.weight"] = [2, 4]
    path.write_text(json.dumps(claims))
    with pytest.raises(ArtifactError, match=r"conv_out\.weight: claimed to be 2:4 sparse; got [34] numbers .* group 0"):
        load_network(tmp_path / "unet", cls=UNET)
