"""Ranges, scales and Q/DQ graphs, held to torch's own modules and to arithmetic in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from calibration.errors import CalibrationError
from calibration.fitting import Fit, fit
from calibration.qdq import Manner, write_quantized
from calibration.schemes import unit_of
from calibration.sites import sites_of
from calibration.statistics import Study, reach
from exporter.networks.storage import load_network
from targets.ort import OnnxRuntime

if TYPE_CHECKING:
    from exporter.loan import DenseLoan

ROWS = 2
FEED_FORWARD = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def graph(tiny_graph: Path) -> Path:
    return tiny_graph


@pytest.fixture(scope="module")
def network(tiny_loan: DenseLoan) -> nn.Module:
    return load_network(tiny_loan.dense.path / "unet", cls="UNet2DConditionModel")


def feeds(seed: int, timestep: float = 501.0, rows: int = ROWS, side: int = 8) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    return {
        "sample": draw((rows, 4, side, side)).astype(np.float32),
        "timestep": np.array(timestep, np.float32),
        "encoder_hidden_states": draw((rows, 32, 32)).astype(np.float32),
    }


CALLS = [feeds(0, 901.0), feeds(1, 501.0), feeds(2, 1.0)]


def study(graph: Path, workdir: Path, calls: list[dict[str, np.ndarray]] = CALLS) -> Study:
    return Study(graph, calls, OnnxRuntime().open_as_written, workdir, lambda: None)


@pytest.fixture(scope="module")
def fitted(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return fit(study(graph, tmp_path_factory.mktemp("fit")))


def seen_by_torch(network: nn.Module, calls: list[dict[str, np.ndarray]]) -> dict[str, list[torch.Tensor]]:
    """Return what every linear layer and convolution is given, call by call."""
    found: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        return lambda module, given: found.setdefault(name, []).append(given[0].detach())

    layers = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    handles = [part.register_forward_pre_hook(note(name)) for name, part in layers.items()]
    with torch.no_grad():
        for call in calls:
            network(**{name: torch.from_numpy(np.asarray(value)) for name, value in call.items()})
    for handle in handles:
        handle.remove()
    return found


def answer(path: Path, call: dict[str, np.ndarray]) -> np.ndarray:
    session = OnnxRuntime().open_as_written(path)
    try:
        return session(call)["out_sample"]
    finally:
        session.close()


def written(graph: Path, out: Path, schemes: dict[str, str], fitted: Fit | None, manner: Manner | None = None) -> Path:
    out.mkdir()
    write_quantized(graph, out, schemes, fitted, manner or Manner())
    return out / "model.onnx"


def test_sites_are_the_layers_of_the_network_and_two_products_per_attention(graph, network):
    sites = sites_of(ir.load(graph).graph)
    layers = {name for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    attentions = {name for name, _ in network.named_modules() if name.endswith(("attn1", "attn2"))}
    products = {f"{name}.{part}" for name in attentions for part in ("scores", "mixed")}
    assert set(sites) == layers | products


def test_what_values_reach_is_what_torch_sees(graph, network, tmp_path):
    reached = reach(study(graph, tmp_path))
    seen = seen_by_torch(network, CALLS)
    asked = [name for name in reached.largest if name.endswith("#0") and name[:-2] in seen]
    assert len(asked) > 50
    for name in asked:
        for call, given in enumerate(seen[name[:-2]]):
            channels = given.movedim(1, -1) if given.ndim == 4 else given
            rows = channels.reshape(-1, channels.shape[-1])
            np.testing.assert_allclose(reached.largest[name][call], rows.abs().amax(0), rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(reached.mean[name][call], rows.mean(0), rtol=1e-2, atol=1e-4)


def test_a_kill_between_two_calls_asks_none_twice_and_changes_nothing(graph, fitted, tmp_path):
    asked = []

    def opener(path: Path) -> Any:
        session = OnnxRuntime().open_as_written(path)

        def ask(call: dict[str, np.ndarray]) -> Any:
            if len(asked) == 4:
                asked.append("killed")
                raise KeyboardInterrupt
            asked.append(float(call["timestep"]))
            return session(call)

        return ask

    again = Study(graph, CALLS, opener, tmp_path, lambda: None)
    with pytest.raises(KeyboardInterrupt):
        fit(again)
    found = fit(again)
    assert [step for step in asked if step != "killed"] == [901.0, 501.0, 1.0] * 2
    assert found.scales == fitted.scales


def test_a_fit_is_the_same_after_it_was_stored(fitted, tmp_path):
    fitted.save(tmp_path / "fit.safetensors")
    found = Fit.load(tmp_path / "fit.safetensors")
    assert found.scales == pytest.approx(dict(fitted.scales))
    assert found.largest == pytest.approx(dict(fitted.largest))
    assert {name: value.tolist() for name, value in found.smoothing.items()} == {
        name: value.tolist() for name, value in fitted.smoothing.items()
    }
    (tmp_path / "fit.safetensors").write_bytes(b"{}")
    with pytest.raises(CalibrationError, match=r"fit\.safetensors: not a fit"):
        Fit.load(tmp_path / "fit.safetensors")


@pytest.mark.parametrize("layer", ["up_blocks.0.resnets.0.conv1", FEED_FORWARD])
def test_one_layer_in_8_bits_computes_what_arithmetic_says(graph, network, fitted, tmp_path, layer):
    path = written(graph, tmp_path / "out", {layer: "int8"}, fitted, Manner(correct=False))
    module = network.get_submodule(layer)
    given = seen_by_torch(network, CALLS[:1])[layer][0]
    divisor = torch.from_numpy(fitted.smoothing.get(f"{layer}#0", np.ones(given.shape[-1], np.float32)))
    even = given if given.ndim == 4 else given / divisor
    scale = fitted.scales[f"{layer}#0"]
    rounded = torch.round(even / scale).clamp(-128, 127) * scale
    weight = module.weight if given.ndim == 4 else module.weight * divisor
    heights = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) / 127
    with torch.no_grad():
        kept, module.weight = module.weight, nn.Parameter(torch.round(weight / heights) * heights)
        handle = module.register_forward_pre_hook(lambda *_: (rounded,))
        wanted = network(**{name: torch.from_numpy(np.asarray(value)) for name, value in CALLS[0].items()}).sample
        handle.remove()
        module.weight = kept
    np.testing.assert_allclose(answer(path, CALLS[0]), wanted.numpy(), atol=2e-4)


def test_weights_of_4_bits_share_a_scale_by_groups(graph, network, tmp_path):
    path = written(graph, tmp_path / "out", {FEED_FORWARD: "int4-weights"}, None, Manner(group=32))
    module = network.get_submodule(FEED_FORWARD)
    with torch.no_grad():
        parts = module.weight.reshape(module.weight.shape[0], -1, 32)
        heights = parts.abs().amax(dim=2, keepdim=True) / 7
        kept = module.weight
        module.weight = nn.Parameter((torch.round(parts / heights) * heights).reshape(kept.shape))
        wanted = network(**{name: torch.from_numpy(np.asarray(value)) for name, value in CALLS[0].items()}).sample
        module.weight = kept
    np.testing.assert_allclose(answer(path, CALLS[0]), wanted.numpy(), atol=2e-4)


def everything(graph: Path, scheme: str) -> dict[str, str]:
    return dict.fromkeys(sites_of(ir.load(graph).graph), scheme)


def distance(path: Path, graph: Path, **shape: int) -> float:
    """Return the PSNR in dB of a quantized graph to the float one, on a call that nothing was fitted on."""
    call = feeds(7, 301.0, **shape)
    wanted, got = answer(graph, call), answer(path, call)
    return float(10 * np.log10((wanted.max() - wanted.min()) ** 2 / np.mean((wanted - got) ** 2)))


def test_schemes_are_as_close_as_their_bits(graph, fitted, tmp_path):
    found = {
        scheme: distance(written(graph, tmp_path / scheme, everything(graph, scheme), fitted), graph)
        for scheme in ("int8", "int8-weights", "int4-weights")
    }
    assert found["int8-weights"] > found["int8"] > 30
    assert found["int8-weights"] - 6 > found["int4-weights"] > 30


def test_a_graph_with_open_shapes_is_rounded_for_all_of_them(open_graph, tmp_path):
    fitted = fit(study(open_graph, tmp_path))
    path = written(open_graph, tmp_path / "out", everything(open_graph, "int8"), fitted, Manner(results=True))
    for shape in ({"rows": 1, "side": 8}, {"rows": 3, "side": 16}):
        assert distance(path, open_graph, **shape) > 30, shape


def test_rounded_results_leave_every_convolution_between_integers(graph, fitted, tmp_path):
    path = written(graph, tmp_path / "out", everything(graph, "int8"), fitted, Manner(results=True))
    for node in ir.load(path).graph:
        if node.op_type == "Conv":
            assert [reader.op_type for reader, _ in node.outputs[0].uses()] == ["QuantizeLinear"]
            assert node.inputs[0].producer().op_type == "DequantizeLinear"


def test_taking_the_mean_error_from_biases_brings_answers_closer(graph, fitted, tmp_path):
    plain = written(graph, tmp_path / "plain", everything(graph, "int4-weights"), fitted, Manner(correct=False))
    corrected = written(graph, tmp_path / "corrected", everything(graph, "int4-weights"), fitted)
    assert distance(corrected, graph) > distance(plain, graph)


def test_zero_weights_stay_zero(graph, tmp_path):
    model = ir.load(graph)
    held = model.graph.initializers["up_blocks.0.resnets.0.conv1.weight"]
    values = held.const_value.numpy().copy()
    values[:, ::2] = 0
    held.const_value = ir.tensor(values, name=held.name)
    (tmp_path / "in").mkdir()
    ir.save(model, tmp_path / "in" / "model.onnx")
    path = written(tmp_path / "in" / "model.onnx", tmp_path / "out", everything(graph, "int8-weights"), None)
    codes = ir.load(path).graph.initializers["up_blocks.0.resnets.0.conv1.weight.codes"].const_value.numpy()
    assert codes.dtype == np.int8
    assert not codes[:, ::2].any()
    assert codes[:, 1::2].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"sample": np.full((ROWS, 4, 8, 8), np.inf, np.float32)}, r"not finite in call 0"),
        ({"encoder_hidden_states": np.zeros((ROWS, 32, 32), np.float32)}, r"attn2\.to_k#0: got nothing but zeros"),
    ],
)
def test_ranges_that_say_nothing_are_refused(graph, tmp_path, call, message):
    with pytest.raises(CalibrationError, match=message):
        reach(study(graph, tmp_path, [feeds(0) | call]))


def test_8_bits_without_a_fit_or_with_anothers_are_refused(graph, fitted, tmp_path):
    with pytest.raises(CalibrationError, match=r"conv_in: got no fit, expected one for int8"):
        written(graph, tmp_path / "none", {"conv_in": "int8"}, None)
    others = Fit({"elsewhere#0": 1.0}, {}, {}, {}, {})
    with pytest.raises(CalibrationError, match=r"no range for conv_in#0"):
        written(graph, tmp_path / "others", {"conv_in": "int8"}, others)


def test_one_layer_in_8_bit_floats_computes_what_torchs_casts_say(graph, network, fitted, tmp_path):
    """ONNX Runtime has no kernels for these on a processor: one layer is cut out and asked of onnx's own evaluator."""
    path = written(graph, tmp_path / "out", {FEED_FORWARD: "fp8"}, fitted, Manner(correct=False))
    model = ir.load(path)
    product = next(node for node in model.graph if node.name == f"{FEED_FORWARD}/MatMul")
    smoothing = product.inputs[0].producer().inputs[0].producer().inputs[0].producer()
    part = ir.convenience.extract(model.graph, [smoothing.inputs[0].name], [product.outputs[0].name])
    for value in part.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)  # out of its file
    given = seen_by_torch(network, CALLS[:1])[FEED_FORWARD][0]
    proto = ir.to_proto(ir.Model(part, ir_version=model.ir_version))
    (got,) = ReferenceEvaluator(proto).run(None, {smoothing.inputs[0].name: given.numpy()})
    divisor = torch.from_numpy(fitted.smoothing[f"{FEED_FORWARD}#0"])
    weight = network.get_submodule(FEED_FORWARD).weight.detach() * divisor
    heights = weight.abs().amax(dim=1, keepdim=True) / 448
    scale = fitted.largest[f"{FEED_FORWARD}#0"] / 448

    def cast(values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.float8_e4m3fn).float()

    wanted = (cast(given / divisor / scale) * scale) @ (cast(weight / heights) * heights).T
    np.testing.assert_allclose(got, wanted.numpy(), atol=2e-4)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("a.b.c", "a.b"), ("a.bc", "a"), ("a.b", "a.b"), ("x", "")],
)
def test_the_longest_path_that_holds_a_site_decides(name, wanted):
    assert unit_of(name, {"": 0, "a": 1, "a.b": 2}) == wanted


def test_without_a_rest_a_site_may_be_in_no_unit():
    assert unit_of("x.y", {"a": 1}) is None
