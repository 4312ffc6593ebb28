"""Every method on every family: pruned, it reloads bit-equal, and its graph answers in ONNX Runtime as torch does.

Methods whose records of edits are of the same kinds share a graph of the family: which channels or blocks go, and what
weights stay, changes no operator. What a method does not prune, it refuses before any work, with the matrix's reason.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_families import MAKERS

from exporter.errors import RecipeError
from exporter.loan import DenseLoan
from exporter.lowering.export import export_component
from exporter.lowering.options import ExportOptions
from exporter.lowering.parity import check_parity
from exporter.lowering.scheduled import cuts_of
from exporter.lowering.wrappers import Sizes, example_feeds, signature
from exporter.networks.components import denoiser
from exporter.networks.cuts import Cut
from exporter.networks.storage import load_network, save_network
from exporter.networks.surgery import Snapshot, Surgery, diff
from exporter.preflight import check_recipe
from exporter.progress import Silent
from exporter.pruners import PRUNERS, pruner
from exporter.pruners.base import Context, Outcome
from exporter.pruners.matrix import matrix, refusal
from exporter.states import config_of

_LITTLE: dict[str, Any] = {
    "images": 2,
    "timesteps": 2,
    "sets": 2,
    "iterations": 1,
    "sampler_steps": 2,
    "round_to": 4,
    "groups": 2,
}
_GIVEN: dict[str, dict[str, Any]] = {
    **{name: {"keep_ratio": 0.6} for name in ("random", "magnitude", "taylor", "diff-pruning", "laptop-diff")},
    **{name: {"pattern": "unstructured", "keep_ratio": 0.5} for name in ("wanda", "sparsegpt", "obs-diff", "sparsedm")},
    "improved-techniques": {"keep_ratio": 0.7, "reevaluate": 99},
    "ecodiff": {"keep_ratio": 0.6, "round_to": 1, "steps": 2},
    "snapfusion": {"latency": "0.7 * dense", "steps": 8, "samples": 2, "batch": 2},
    "deepcache": {"interval": 2},
}
SUPPORTED = [(name, family) for name in PRUNERS for family in MAKERS if not refusal(name, family)]
PIXELS = ("DDPMPipeline", "DDIMPipeline")
GROUPS = [*((family,) for family in MAKERS if family not in PIXELS), PIXELS]
"""Families of one network, which is exported once."""
REFUSED = [(name, family) for name in PRUNERS for family in MAKERS if refusal(name, family)]


class Watch:
    """A target on which every parameter takes a nanosecond."""

    digest = "parameters"

    def whole_ms(self, network: torch.nn.Module) -> float:
        return sum(parameter.numel() for parameter in network.parameters()) * 1e-6

    def units_ms(self, network: torch.nn.Module, paths: Sequence[str]) -> dict[str, float]:
        return {path: self.whole_ms(network.get_submodule(path)) for path in paths}

    def control(self) -> dict[str, tuple[float, float, float]]:
        return {}


def dense_of(name: str, family: str, folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return the family's denoiser and its config; with two layers per block where a method needs those."""
    part, config = denoiser(family), dict(config_of(folder))
    if name != "bk-sdm":
        return load_network(folder, cls=part.cls), config
    config["layers_per_block"] = 2
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = UNet2DConditionModel.from_config(config).eval()
    return network, dict(network.config)


def options_of(name: str, loan: DenseLoan, family: str) -> Any:
    cls = pruner(name).options
    known = set(cls.__dataclass_fields__)
    given = {key: value for key, value in _LITTLE.items() if key in known} | _GIVEN.get(name, {})
    if "prompts" in known and family not in ("DDPMPipeline", "DDIMPipeline"):
        given["prompts"] = str(loan.folder.parent / "prompts.txt")
    return cls(**given)


@pytest.mark.parametrize("families", GROUPS, ids=" and ".join)
def test_every_method_prunes_reloads_and_exports(
    families: tuple[str, ...], loan_of: Callable[[str], DenseLoan], tmp_path: Path
) -> None:
    proved: set[str] = set()
    for family in families:
        loan = dataclasses.replace(loan_of(family), stopwatch=Watch())
        methods = [name for name, other in SUPPORTED if other == family]
        assert len(methods) >= 12
        for name in methods:
            folder = tmp_path / family / name
            folder.mkdir(parents=True)
            _check(name, family, loan, folder, proved)


def test_families_that_share_graphs_have_one_network(loan_of: Callable[[str], DenseLoan]) -> None:
    for families in GROUPS:
        configs = [config_of(loan_of(family).dense.path / denoiser(family).folder) for family in families]
        assert all(config == configs[0] for config in configs)
    assert sorted(family for families in GROUPS for family in families) == sorted(MAKERS)


def _check(name: str, family: str, loan: DenseLoan, folder: Path, proved: set[str]) -> None:
    part = denoiser(family)
    network, config = dense_of(name, family, loan.dense.path / part.folder)
    before, weights = Snapshot.of(network), copy.deepcopy(network.state_dict())
    context = Context(torch.Generator().manual_seed(0), Silent(), folder / "work", loan)
    context.workdir.mkdir()
    outcome: Outcome = pruner(name)(options_of(name, loan, family)).prune(network, context)
    surgery, state = diff(before, network), network.state_dict()
    changed = state.keys() != weights.keys() or any(
        value.shape != weights[key].shape or not torch.equal(value, weights[key]) for key, value in state.items()
    )
    assert changed or outcome.schedule is not None, name
    save_network(network, folder / "saved", surgery=surgery, original_config=config, sparsity=dict(outcome.sparsity))
    again = load_network(folder / "saved", cls=part.cls)
    assert again.state_dict().keys() == state.keys(), name
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items()), name
    graphs = [again] if outcome.schedule is None else cuts_of(part, again, outcome.schedule)
    for index, graph in enumerate(graphs):
        key = f"{_kinds(surgery)} {graph.pattern if isinstance(graph, Cut) else 'whole'}"
        if key not in proved:
            assert _parity(part.name, graph, part.cls, folder / f"graph-{index}") > 90, name
            proved.add(key)


def _kinds(surgery: Surgery) -> str:
    """Return what may differ between two graphs of a family besides numbers."""
    kinds = sorted({entry.kind for entry in surgery.stand_in.values()})
    return f"{kinds} {bool(surgery.keep)} {bool(surgery.resize)}"


def _parity(name: str, graph: Any, cls: str, folder: Path) -> float:
    """Return how near ONNX Runtime is to torch, in dB."""
    folder.mkdir()
    side = 16 if cls == "UNet2DModel" else 8
    export_component(name, graph, folder, ExportOptions(latent=side, tokens=8))
    inputs = example_feeds(graph, Sizes(2, side, 8))
    feeds = {key: value.numpy() for key, value in zip(signature(graph).inputs, inputs, strict=True)}
    (made,) = folder.glob("*.onnx")
    found: float = check_parity(name, graph, made, [(0.0, feeds)])["psnr_db"]
    return found


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_it_does_not_prune_is_refused_before_any_work_and_by_the_method_itself(
    name: str, family: str, loan_of: Callable[[str], DenseLoan], recipe_of: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = recipe_of(family)
    stage = recipe.stages[0].model_validate({"prune": {"method": name}})
    with pytest.raises(RecipeError, match=rf"prune\.method: {name} does not prune {family}: .*`exporter pruners`"):
        check_recipe(recipe.model_copy(update={"stages": (stage,)}), tmp_path / "out")
    loan, part = loan_of(family), denoiser(family)
    network = load_network(loan.dense.path / part.folder, cls=part.cls)
    with pytest.raises(RecipeError, match=r"prune\.method: .*[Cc]hoose another method"):
        pruner(name)(options_of(name, loan, family)).prune(
            network, Context(torch.Generator(), Silent(), tmp_path, loan)
        )


def test_the_matrix_has_every_method_and_family() -> None:
    found = matrix()
    assert set(found) == set(PRUNERS)
    assert {family for row in found.values() for family in row} >= set(MAKERS)
    assert sum(bool(row[family]) for row in found.values() for family in MAKERS) == len(REFUSED) > 0
