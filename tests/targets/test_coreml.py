"""Core ML: packages made on any system, looked into with coremltools' own reader, and called through our evaluator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")

from targets.base import TargetError, TargetMissing
from targets.coreml import CoreMl, CoreMlOptions
from targets.coreml import chunks as coreml_chunks
from targets.coreml.package import MANIFEST, Manifest
from targets.mil.package import read_package
from targets.torch_source import TorchProgram

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
FACTS = {"weights_sha256": "f" * 64, "author": "tests", "version": "1"}


class Net(nn.Module):
    """A convolution, a clock and a layer that 16 bits overflow in where it is told to."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("frequencies", torch.exp(-torch.arange(8) / 2.0))
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.time = nn.Linear(16, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.gain = gain

    def forward(self, sample, timestep):
        angles = timestep.reshape(-1)[:, None] * self.frequencies[None]
        clock = self.time(torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1))
        hidden = (self.first(sample) + clock[:, :, None, None]).permute(0, 2, 3, 1)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return (hidden * self.gain * self.gain) / (self.gain * self.gain)


def program(net=None, calls=(), **extra):
    inputs = {"sample": np.zeros((2, 4, 8, 8), np.float32), "timestep": np.zeros((), np.float32)}
    about = {"": "a small net", "sample": "what comes in", "out": "what goes out"}
    return TorchProgram(
        "unet", net or Net(), inputs, ("out",), calls=calls, about=about, facts=FACTS, is_denoiser=True, **extra
    )


def fed(timestep=999.0, side=8, seed=0):
    sample = np.random.default_rng(seed).normal(size=(2, 4, side, side)).astype(np.float32)
    return {"sample": sample, "timestep": np.array(timestep, np.float32)}


def answered(net, feeds):
    with torch.no_grad():
        return net(torch.from_numpy(feeds["sample"]), torch.from_numpy(feeds["timestep"])).numpy()


def converted(folder: Path, source=None, **options):
    folder.mkdir()
    chosen = CoreMlOptions(**options)
    CoreMl().convert(source or program(), folder, chosen)
    return CoreMl().open(folder, chosen)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coreml") / "engine"
    session = converted(folder, precision="f32", license="openrail++")
    return folder, session


def test_a_package_answers_as_torch_does(engine):
    _, session = engine
    for timestep in (0.0, 1.0, 500.5, 999.0):
        feeds = fed(timestep)
        want, got = answered(Net(), feeds), session(feeds)["out"]
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert [(spec.name, spec.dtype, spec.shape) for spec in session.inputs] == [
        ("sample", "float32", (2, 4, 8, 8)),
        ("timestep", "float32", ()),
    ]
    assert session.outputs[0].shape == (2, 8, 8, 8)


def test_a_package_says_what_it_is_whose_and_under_which_licence(engine):
    import coremltools

    folder, _ = engine
    told = coremltools.utils.load_spec(str(folder / "model.mlpackage")).description  # a reader that is not ours
    assert told.metadata.license == "openrail++"
    assert told.metadata.userDefined["exporter.weights_sha256"] == FACTS["weights_sha256"]
    assert told.metadata.shortDescription == "a small net"
    assert {entry.name: entry.shortDescription for entry in told.input}["sample"] == "what comes in"
    assert [(entry.name, entry.shortDescription) for entry in told.output] == [("out", "what goes out")]


def test_operations_are_known_by_their_torch_modules(engine):
    folder, session = engine
    modules = Manifest.read(folder / MANIFEST).modules
    operations = {operation.name: operation.type for operation in read_package(folder / "model.mlpackage").operations}
    assert modules.keys() <= operations.keys()
    by_type = {modules[name] for name in modules if operations[name] in ("linear", "conv")}
    assert by_type == {"first", "time", "blocks.0", "blocks.1"}
    assert {layer.origin for layer in session.evidence().layers if layer.type == "conv"} == {"first"}


def test_the_way_from_the_timestep_to_its_sines_stays_in_32_bits(tmp_path):
    session = converted(tmp_path / "half")
    by_type = {layer.type: layer.precision for layer in session.evidence().layers}
    assert (by_type["sin"], by_type["cos"]) == ("f32", "f32")
    assert (by_type["conv"], by_type["linear"]) == ("f16", "f16")
    feeds = fed(999.0)
    want, got = answered(Net(), feeds), session(feeds)["out"]
    assert np.abs(got - want).max() <= 5e-3 * np.abs(want).max()


def test_what_overflows_on_recorded_inputs_stays_in_32_bits_and_is_told(tmp_path):
    net = Net(gain=400.0)
    calls = (fed(seed=1), fed(seed=2))
    bare = converted(tmp_path / "bare", program(net))
    assert not np.isfinite(bare(calls[0])["out"]).all(), "the planted overflow must be one"
    session = converted(tmp_path / "kept", program(net, calls))
    want, got = answered(net, calls[0]), session(calls[0])["out"]
    assert np.abs(got - want).max() <= 5e-3 * np.abs(want).max()
    kept = Manifest.read(tmp_path / "kept" / MANIFEST).kept_in_float
    assert kept
    assert all(value > 30000 for value in kept.values())
    assert any("kept in 32 bits" in note for note in session.evidence().notes)
    by_type = {layer.type: layer.precision for layer in session.evidence().layers}
    assert by_type["conv"] == "f16", "what fits stays in 16 bits"


def test_smaller_weights_are_stored_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr("targets.coreml.weights.LEAST", 100)
    session = converted(tmp_path / "small", weights="palette-4")
    notes = " ".join(session.evidence().notes)
    assert "weights as palette-4: stored are palette-4 2, float 2" in notes
    assert "2 because no more than 100 elements" in notes
    unpacked = [layer.origin for layer in session.evidence().layers if layer.type == "constexpr_lut_to_dense"]
    assert len(unpacked) == 2
    feeds = fed(10.0)
    want, got = answered(Net(), feeds), session(feeds)["out"]
    assert 1e-3 < np.abs(got - want).max() / np.abs(want).max() < 0.2, "sixteen values are few, not none"


def test_chunks_answer_as_the_whole_and_are_described(tmp_path, engine):
    import coremltools

    session = converted(tmp_path / "cut", precision="f32", chunks=2, license="mit")
    manifest = Manifest.read(tmp_path / "cut" / MANIFEST)
    assert manifest.packages == ("chunk-1.mlpackage", "chunk-2.mlpackage")
    feeds = fed(3.0)
    assert np.array_equal(session(feeds)["out"], engine[1](feeds)["out"])
    for name in manifest.packages:
        told = coremltools.utils.load_spec(str(tmp_path / "cut" / name)).description
        assert told.metadata.license == "mit"
        assert told.metadata.userDefined["exporter.weights_sha256"] == FACTS["weights_sha256"]
        assert all(entry.shortDescription for entry in (*told.input, *told.output))


def test_a_chunk_above_the_limit_is_refused_with_the_number_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(coreml_chunks, "LARGEST_BYTES", 2000)
    with pytest.raises(TargetError, match=r"chunks: got .* GB in the largest of 2, expected .* Write chunks: 4"):
        converted(tmp_path / "cut", chunks=2)


def test_enumerated_shapes_are_all_answered_and_no_other(tmp_path):
    shapes = (((2, 4, 8, 8), ()), ((2, 4, 16, 16), ()))
    session = converted(tmp_path / "open", program(shapes=shapes), precision="f32")
    assert session.inputs[0].shape == (2, 4, -1, -1)
    for side in (8, 16):
        feeds = fed(10.0, side)
        want = answered(Net(), feeds)
        assert np.abs(session(feeds)["out"] - want).max() <= 1e-5 * np.abs(want).max()
    with pytest.raises(TargetError, match=r"wrong shape; got \(2, 4, 12, 12\), expected one of"):
        session(fed(10.0, 12))


def test_a_package_of_another_state_is_refused(tmp_path, engine):
    converted(tmp_path / "mine", precision="f32").close()
    listed = tmp_path / "mine" / MANIFEST
    content = json.loads(listed.read_text())
    listed.write_text(json.dumps({**content, "digest": "0" * 64}))
    with pytest.raises(TargetError, match=r"a package of another state; got one made from weights ffff.*expected 0000"):
        CoreMl().open(tmp_path / "mine", CoreMlOptions())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not the list of a model's packages"),
        ("{}", "not the list of a model's packages"),
        ('{"packages": ["../elsewhere"]}', "packages elsewhere"),
        ('{"format": 99}', "of another version"),
    ],
)
def test_a_damaged_list_of_packages_is_refused(tmp_path, engine, content, said):
    folder, _ = engine
    known = json.loads((folder / MANIFEST).read_text())
    changed = content if content in ("{", "{}") else json.dumps({**known, **json.loads(content)})
    (tmp_path / MANIFEST).write_text(changed)
    with pytest.raises(TargetError, match=said):
        CoreMl().open(tmp_path, CoreMlOptions())


class Deep(nn.Module):
    """Six axes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Unflatten(1, (1, 2, 2))

    def forward(self, sample, timestep):
        return (self.inner(sample) * timestep.reshape(-1)).sum(dim=1)


class Odd(nn.Module):
    """Something that the converter has not."""

    def forward(self, sample, timestep):
        return torch.linalg.svd(sample + timestep.reshape(-1))[0]


def test_what_does_not_convert_is_named(tmp_path):
    with pytest.raises(TargetError, match=r"unet: coremltools cannot convert it; got NotImplementedError: .*svd"):
        converted(tmp_path / "odd", program(Odd()))
    with pytest.raises(TargetError, match=r"unet: inner \(reshape\): a tensor of 6 axes; Core ML takes at most 5"):
        converted(tmp_path / "deep", program(Deep()))


def test_an_onnx_file_and_a_schedule_are_refused(tmp_path):
    with pytest.raises(TargetError, match="got an ONNX file, expected a torch network"):
        CoreMl().compile(tmp_path / "model.onnx", tmp_path, CoreMlOptions())
    with pytest.raises(TargetError, match="graphs of a schedule"):
        CoreMl().join([], tmp_path, CoreMlOptions())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"deployment": "iOS15"}, "deployment: got 'iOS15', expected one of iOS16, iOS17, iOS18"),
        ({"precision": "bf16"}, "precision: got 'bf16', expected one of f16, f32"),
        ({"chunks": 3}, "chunks: got 3, expected one of 1, 2, 4"),
        ({"compute_units": "ane"}, "compute_units: got 'ane', expected one of all"),
        ({"threads": 0}, "threads: got 0"),
        ({"weights": "int4"}, "got int4 for iOS17, expected at least iOS18"),
        ({"weights": "palette-6", "group": 16}, "got palette-6 in groups of 16 for iOS17"),
    ],
)
def test_options_are_checked_before_any_work(wrong, said):
    with pytest.raises(TargetError, match=said):
        CoreMl().check(CoreMlOptions(**wrong))


def test_without_coremltools_the_install_command_is_told(monkeypatch):
    monkeypatch.setattr("targets.coreml.installed_version", lambda name: None)
    assert not CoreMl().capabilities().available
    with pytest.raises(TargetMissing, match=r"pip install 'diffusion-exporter\[coreml\]'"):
        CoreMl().check(CoreMlOptions())


def test_times_of_evaluated_packages_count_for_nothing(monkeypatch):
    monkeypatch.setattr("targets.coreml.runs_core_ml", lambda: False)
    here = CoreMl().capabilities()
    assert here.runs
    assert "not run by Core ML" in here.untimed
    monkeypatch.setattr("targets.coreml.runs_core_ml", lambda: True)
    assert CoreMl().capabilities().untimed == ""
