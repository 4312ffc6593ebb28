"""Mixed palettes: the knapsack against trying everything, what is refused, and stages that make such states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import yaml

from calibration.qdq import Manner, write_quantized
from calibration.schemes import PALETTES, SCHEMES
from calibration.sites import Site, sites_of
from exporter.errors import RecipeError
from exporter.networks.quantization import TABLE, read_quantization
from exporter.progress import Silent
from exporter.pruners.notes import Notes
from exporter.quantizing.checks import check_schemes
from exporter.quantizing.mixing import Choice, Mixer, Picks, lightest, most_exact, search_mixed, size_of, summed
from exporter.quantizing.options import QuantizeOptions, quantize_options
from exporter.quantizing.plan import read_plan
from exporter.quantizing.trial import Trial, decibels
from exporter.recipe import read_recipe
from exporter.report.record import RunRecord
from exporter.run import run_recipe
from exporter.stage_checks import check_data
from targets.ort import OnnxRuntime
from targets.palettes import distinct, palettize

CALLS = 2


def drawn(seed: int, units: int = 6) -> dict[str, list[Choice]]:
    """Return units whose choices cost the more the smaller they are."""
    draw = np.random.default_rng(seed)
    found = {}
    for unit in range(units):
        count, loud = int(draw.integers(50, 900)), 10 ** draw.uniform(-6, -3, CALLS)
        several = [Choice("float", 2 * count, (0.0,) * CALLS)]
        for scheme, bits in PALETTES.items():
            several.append(Choice(scheme, count * bits // 8, tuple(loud * 4.0**-bits * draw.uniform(0.5, 2))))
        found[f"unit{unit}"] = several
    return found


def everything(choices: Mapping[str, list[Choice]]) -> list[Picks]:
    return [dict(zip(choices, picks, strict=True)) for picks in product(*choices.values())]


def loudest(picks: Picks) -> float:
    """Return the sum that the knapsack minimizes: of each unit the error in the call where it is largest."""
    return sum(max(choice.errors) for choice in picks.values())


class TestKnapsack:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("share", [0.15, 0.3, 0.55, 1.0])
    def test_least_error_in_so_many_bytes(self, seed: int, share: float) -> None:
        choices = drawn(seed)
        budget = int(share * sum(several[0].nbytes for several in choices.values()))
        found = most_exact(choices, budget)
        assert found is not None
        assert size_of(found) <= budget
        best = min(loudest(picks) for picks in everything(choices) if size_of(picks) <= budget)
        assert loudest(found) == pytest.approx(best)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("allowed", [1e-4, 1e-5, 1e-7])
    def test_fewest_bytes_under_a_limit(self, seed: int, allowed: float) -> None:
        choices = drawn(seed)
        found = lightest(choices, allowed)
        assert found is not None
        assert max(summed(found)) <= allowed
        sure = min(size_of(picks) for picks in everything(choices) if loudest(picks) <= allowed)
        best = min(size_of(picks) for picks in everything(choices) if max(summed(picks)) <= allowed)
        assert best <= size_of(found) <= sure

    def test_nothing_is_small_enough(self) -> None:
        assert most_exact(drawn(0), 10) is None

    def test_millions_of_bytes_never_exceed_the_budget(self) -> None:
        choices = {
            unit: [Choice(c.scheme, c.nbytes * 54_321, c.errors) for c in several]
            for unit, several in drawn(1, 40).items()
        }
        whole = sum(several[0].nbytes for several in choices.values())
        found = most_exact(choices, int(0.3 * whole))
        assert found is not None
        assert 0.29 * whole < size_of(found) <= 0.3 * whole


class TestSearch:
    def test_a_plan_that_the_sums_promised_wrongly_is_mended(self) -> None:
        choices, asked = drawn(2), []

        def together(picks: Picks) -> list[float]:
            asked.append(size_of(picks))
            return [2.5 * error for error in summed(picks)]

        found = search_mixed(choices, 50.0, together)
        assert found is not None
        assert found.worst_db >= 50
        assert len(asked) > 1
        assert [entry[0] for entry in found.tries] == asked
        assert found.worst_db == pytest.approx(decibels(max(together(found.picks))))

    def test_there_may_be_no_plan(self) -> None:
        assert search_mixed(drawn(3), 150.0, summed) is None


class TestOptions:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"scheme": "palette-mixed"}, "palette-mixed: got neither, expected exactly one of size and limit_db"),
            ({"scheme": "palette-mixed", "size": 0.3, "limit_db": 40}, "got size 0.3 and limit_db 40, expected exact"),
            ({"scheme": "palette-mixed", "size": 0}, "size: got 0, expected a number above 0 and at most 1"),
            ({"scheme": "palette-mixed", "size": 1.2}, r"size: got 1\.2, expected a number above 0 and at most 1"),
            ({"scheme": "palette-6", "size": 0.3}, "size: got 0.3 for palette-6, expected it for palette-mixed alone"),
            ({"scheme": "palette-5"}, r"scheme: got 'palette-5', expected .*'palette-6'"),
        ],
    )
    def test_wrong_budgets_are_named(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            quantize_options(given, "stages[0].quantize", None)

    def test_a_plan_knows_palettes_but_no_mixture(self, tmp_path: Path) -> None:
        (tmp_path / "plan.txt").write_text("conv_in palette-8\n* palette-4\n")
        assert read_plan(tmp_path / "plan.txt") == {"conv_in": "palette-8", "": "palette-4"}
        (tmp_path / "plan.txt").write_text("conv_in palette-mixed\n")
        with pytest.raises(RecipeError, match="scheme: got 'palette-mixed', expected float"):
            read_plan(tmp_path / "plan.txt")
        assert "palette-mixed" not in SCHEMES

    @pytest.mark.parametrize("scheme", ["palette-6", "palette-mixed"])
    def test_other_targets_refuse_with_the_reason(self, scheme: str) -> None:
        size = 0.3 if scheme == "palette-mixed" else None
        for name in ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch-cuda"):
            content = {"name": "a", "source": {"path": "."}, "targets": {"x": {"type": name}}}
            recipe = recipe_from(content | {"stages": [{"quantize": {"scheme": scheme, "size": size}}]})
            with pytest.raises(RecipeError, match=r"does not run palette-.: palettes are Core ML's; .* gain nothing"):
                check_data(recipe, 0, QuantizeOptions(scheme, size=size))
        offered = {"phone (coreml)": dict.fromkeys(PALETTES, "")}
        check_schemes(QuantizeOptions(scheme, size=size), "stages[0].quantize", offered)


def recipe_from(content: dict[str, Any]) -> Any:
    from exporter.recipe import Recipe

    return Recipe.model_validate(content)


class TestGraph:
    def test_weights_have_few_values_and_no_nodes_are_added(self, tiny_graph: Path, tmp_path: Path) -> None:
        names = dict.fromkeys(sites_of(ir.load(tiny_graph).graph), "palette-4")
        told = write_quantized(tiny_graph, tmp_path, names, None, Manner(palettize=palettize))
        before, after = (ir.load(path).graph for path in (tiny_graph, tmp_path / "model.onnx"))
        assert [node.op_type for node in before] == [node.op_type for node in after]
        plain = sites_of(before)
        for name, site in sites_of(after).items():
            if site.weight is None:
                assert told.schemes[name] == "float"
                continue
            values = site.weight.const_value.numpy()
            assert values.dtype == np.float32
            assert distinct(values) <= 16
            assert np.array_equal(values, palettize(plain[name].weight.const_value.numpy(), 4))

    def test_errors_of_palettes_are_those_of_the_graph_that_holds_them(self, tiny_graph: Path, tmp_path: Path) -> None:
        draw = np.random.default_rng(3).standard_normal
        calls = [
            {
                "sample": draw((2, 4, 8, 8)).astype(np.float32),
                "timestep": np.array(step, np.float32),
                "encoder_hidden_states": draw((2, 32, 32)).astype(np.float32),
            }
            for step in (1.0, 900.0)
        ]
        manner = Manner(palettize=palettize)
        sites = sites_of(ir.load(tiny_graph).graph)
        schemes = dict(zip((name for name in sites if sites[name].weight is not None), cycle(PALETTES), strict=False))
        write_quantized(tiny_graph, tmp_path, schemes, None, manner)

        def answers(path: Path) -> list[Any]:
            session = OnnxRuntime().open(path, OnnxRuntime.options())
            return [session(feeds)["out_sample"] for feeds in calls]

        wanted, got = answers(tiny_graph), answers(tmp_path / "model.onnx")
        peak = max(map(np.max, wanted)) - min(map(np.min, wanted))
        errors = [float(np.mean((a - b) ** 2)) / peak**2 for a, b in zip(got, wanted, strict=True)]
        assert min(errors) > 1e-6
        assert Trial(tiny_graph, None, manner, calls, None).errors(schemes) == pytest.approx(errors, rel=1e-3)

    def test_a_size_that_two_bits_do_not_reach_is_refused_before_any_call(
        self, tiny_graph: Path, tmp_path: Path
    ) -> None:
        trial = Trial(tiny_graph, None, Manner(palettize=palettize), [], None)
        with pytest.raises(RecipeError, match=r"quantize\.size: got 0\.05, expected at least 0\.12"):
            Mixer(trial, Notes(tmp_path / "known.json", "key"), Silent()).plan(None, 0.05)


def recipe_of(folder: Path, source: Path, stage: dict[str, Any]) -> Path:
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    prompts = str(folder / "prompts.txt")
    calibration = {"prompts": prompts, "samples": 2, "calls": 2}
    content = {
        "name": "palettes",
        "source": {"path": str(source)},
        "sampling": {"scheduler": "ddim", "steps": 2, "guidance": 3.0, "size": 64, "batch": 2},
        "stages": [{"quantize": {"calibration": calibration, **stage}}],
        "targets": {"ort": {"type": "onnxruntime"}},
        "measure": {"prompts": prompts, "images": 2, "calls": 2, "latency_seconds": 0.2, "states": "final"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
class TestStages:
    """ONNX Runtime stands in for Core ML: to it, palettes are floats, which is what the state itself is."""

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(OnnxRuntime, "schemes", (*OnnxRuntime.schemes, *PALETTES))

    def test_palettes_of_the_embedded_model(self, tmp_path: Path) -> None:
        import exporter.reference

        source = Path(exporter.reference.__file__).parent / "shapes"
        record = run_recipe(read_recipe(recipe_of(tmp_path, source, {"scheme": "palette-6"})), tmp_path / "out")
        assert {cell.status for cell in record.cells} == {"ok"}
        told = read_quantization(tmp_path / "out/states/1-quantized/unet")
        assert told is not None
        assert dict(told.plan) == {"": "palette-6"}
        graphs = [json.loads(path.read_text()) for path in (tmp_path / "out/lowered").glob("onnx-unet-*/manifest.json")]
        quantized = next(graph["facts"]["quantized"] for graph in graphs if "quantized" in graph["facts"])
        assert quantized["layers"]["palette-6"] > 30
        found = {item.name: item.value for cell in record.cells for item in cell.measurements if item.target == "ort"}
        assert found["fidelity.teacher_forced.psnr_db"] > 25

    def test_a_size_and_then_a_limit_ask_each_unit_once(
        self, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, errors = [], Trial.errors

        def counted(trial: Trial, schemes: Mapping[str, str]) -> list[float]:
            asked.append(set(schemes.values()))
            return errors(trial, schemes)

        def coarse(sites: Mapping[str, Site]) -> dict[str, tuple[str, ...]]:
            """Return a few large units, whose trials take a quarter of the time."""
            parts = {name.partition(".")[0] for name in sites}
            return {part: tuple(name for name in sites if name.partition(".")[0] == part) for part in sorted(parts)}

        monkeypatch.setattr(Trial, "errors", counted)
        monkeypatch.setattr("exporter.quantizing.mixing.units_of", coarse)

        def made(**stage: Any) -> tuple[dict[str, Any], Path, RunRecord]:
            recipe = recipe_of(tmp_path, tiny_pipeline_folder, {"scheme": "palette-mixed", **stage})
            record = run_recipe(read_recipe(recipe), tmp_path / "out")
            return record.states[1].facts["search"], tmp_path / "out/states/1-quantized/unet", record

        told, folder, record = made(size=0.3)
        units = len(told["table"])
        assert len(asked) == 4 * units + 1
        assert 0.25 < told["size"] <= 0.3
        assert sum(told["units"].values()) == units
        assert len({row["scheme"] for row in told["table"]}) > 1
        plan = read_plan(folder / TABLE)
        assert plan == {row["unit"]: row["scheme"] for row in told["table"]} | {"": "float"}
        assert {cell.status for cell in record.cells} == {"ok"}
        asked.clear()
        limit = told["worst_db"] + 5
        tighter, folder, _ = made(limit_db=limit)
        assert 0 < len(asked) <= 6
        assert tighter["worst_db"] >= limit
        assert tighter["size"] > told["size"]
