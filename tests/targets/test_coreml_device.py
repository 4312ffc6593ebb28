"""Packages run by Core ML, whose native binding is played by our evaluator (tests/coreml_stand_in.py)."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")

import coreml_stand_in
from coreml_nets import evaluated, fed, made

from targets.base import TargetError
from targets.coreml import CoreMl, CoreMlOptions
from targets.coreml.device import ESTIMATED, UNITS, machine_name
from targets.coreml.package import MANIFEST, Manifest
from targets.mil.package import read_package

pytestmark = pytest.mark.filterwarnings(
    *("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    "ignore:overflow encountered in cast:RuntimeWarning",  # coremltools, of limits of integers
)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return made(tmp_path_factory.mktemp("device") / "half")


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    return made(tmp_path_factory.mktemp("device") / "cut", chunks=2)


@pytest.fixture
def native(monkeypatch, tmp_path):
    return coreml_stand_in.install(monkeypatch, tmp_path)


@pytest.mark.parametrize("units", UNITS)
def test_every_unit_is_asked_for_by_the_librarys_name_for_it(half, native, units):
    session = CoreMl().open(half, CoreMlOptions(compute_units=units))
    assert [chosen for _, chosen in native.opened] == [UNITS[units]]
    assert np.array_equal(session(fed())["out"], evaluated(half, fed()))


def test_chunks_are_called_in_turn_with_16_bits_between_them(cut, half, native):
    session = CoreMl().open(cut, CoreMlOptions())
    assert len(native.opened) == 2
    got = session(fed())["out"]
    assert (got.dtype, got.shape) == (np.float32, (2, 8, 8, 8))
    assert np.array_equal(got, evaluated(half, fed()))
    told = session.evidence()
    for name in Manifest.read(cut / MANIFEST).packages:
        assert any(note.startswith(f"{name}: where Core ML plans to run operations: ") for note in told.notes)


def test_inputs_that_may_not_be_written_are_copied_for_the_binding(half, native):
    """A kit's arrays are mapped from their files, read only; the binding wants their memory for itself."""
    session, feeds = CoreMl().open(half, CoreMlOptions()), fed()
    for array in feeds.values():
        array.flags.writeable = False
    first = session(feeds)["out"]
    kept = first.copy()
    session(fed(1))
    assert np.array_equal(first, kept), "answers are the caller's"
    assert np.array_equal(kept, evaluated(half, feeds))


def test_devices_are_the_plans_and_types_are_the_programs(half, native):
    told = CoreMl().open(half, CoreMlOptions(compute_units="cpu-and-neural-engine")).evidence()
    own = {operation.name: operation for operation in read_package(half / "model.mlpackage").operations}
    layers = {layer.name: layer for layer in told.layers}
    assert layers.keys() == {*own, "made_by_the_compiler"}
    for name, operation in own.items():
        assert layers[name].type == operation.type
        assert layers[name].device == ("Neural Engine" if operation.type in coreml_stand_in.HEAVY else "CPU")
        dtype = operation.outputs[0].dtype
        assert layers[name].precision == {"float16": "f16", "float32": "f32", "int32": "i32"}[dtype]
    added = layers["made_by_the_compiler"]
    assert (added.type, added.precision, added.device) == ("reshape", "unknown", "CPU")
    assert {layer.origin for layer in told.layers if layer.type in ("conv", "linear")} == {
        "first",
        "blocks.0",
        "blocks.1",
    }
    counts = told.count("device")
    assert counts["Neural Engine"] == 3
    where = f"where Core ML plans to run operations: CPU {counts['CPU']}, Neural Engine 3"
    assert any(note.startswith(where) for note in told.notes)
    assert f"the Neural Engine could run {counts['CPU']} of those that are planned elsewhere" in told.notes
    assert any(note.startswith("Core ML compiled it in ") for note in told.notes)
    assert told.device == "Core ML, units: cpu-and-neural-engine"
    assert told.runtime.startswith("Core ML of macOS ")


def test_units_that_may_not_be_used_get_nothing(half, native):
    told = CoreMl().open(half, CoreMlOptions(compute_units="cpu")).evidence()
    assert told.count("device") == {"CPU": len(told.layers)}
    assert not any("planned elsewhere" in note for note in told.notes)


def test_decompressed_weights_have_no_device_and_are_counted_so(tmp_path, native, monkeypatch):
    monkeypatch.setattr("targets.coreml.weights.LEAST", 100)
    session = CoreMl().open(made(tmp_path / "small", weights="palette-4"), CoreMlOptions())
    told = session.evidence()
    unpacked = [layer for layer in told.layers if layer.type == "constexpr_lut_to_dense"]
    assert unpacked
    assert {layer.device for layer in unpacked} == {"unknown"}
    assert any(f"unknown {len(unpacked)}" in note for note in told.notes)
    assert not any(timed.layer.type.startswith("constexpr") for timed in session.profile(fed(), 1))


def test_a_profile_shares_whole_calls_by_cost_and_leaves_out_what_has_none(half, native, monkeypatch):
    session = CoreMl().open(half, CoreMlOptions())
    ticks = iter(range(100))
    monkeypatch.setattr("targets.coreml.device.time.perf_counter", lambda: 0.4 * next(ticks))  # 0.1 s in each of 4
    found = session.profile(fed(), 4)
    assert all(timed.layer.kernel == ESTIMATED for timed in found)
    assert coreml_stand_in.WITHOUT_COST not in {timed.layer.type for timed in found}
    assert coreml_stand_in.WITHOUT_COST in {layer.type for layer in session.evidence().layers}
    by_type = {timed.layer.type: timed.ms for timed in found}
    assert by_type["conv"] == by_type["linear"] == pytest.approx(20.0)  # 0.2 of 100 ms
    assert by_type["silu"] == pytest.approx(0.1)
    assert sum(timed.ms for timed in found) < 100.0, "what the estimates do not cover is nobody's"


def test_without_a_plan_devices_are_unknown_and_nothing_is_shared_out(half, native):
    native.tells_plan = False
    session = CoreMl().open(half, CoreMlOptions())
    told = session.evidence()
    assert told.count("device") == {"unknown": len(told.layers)}
    assert told.count("precision")["f16"] > 1, "types are known without it"
    assert any("macOS 14.4" in note and "only available on macOS >= 14.4" in note for note in told.notes)
    with pytest.raises(TargetError, match="got no estimate of any operation's cost"):
        session.profile(fed(), 1)
    assert session(fed())["out"].shape == (2, 8, 8, 8)


def test_a_plan_of_something_else_is_refused(half, native, monkeypatch):
    init = coreml_stand_in.PlanProxy.__init__

    def of_nothing(self, path, units):
        init(self, path, units)
        self.model_structure = self._plan.MLModelStructure(None, None, None)

    monkeypatch.setattr(coreml_stand_in.PlanProxy, "__init__", of_nothing)
    with pytest.raises(TargetError, match=r"model\.mlpackage: compute plan: got no ML Program, expected"):
        CoreMl().open(half, CoreMlOptions()).evidence()


def test_what_core_ml_refuses_is_told_with_the_system_that_it_takes(half, native):
    native.refuses = "Error loading\n  the model.\n"
    with pytest.raises(
        TargetError,
        match=r"half/model\.mlpackage: Core ML cannot load it for all; got: Error loading the model\. "
        r"A package for iOS17 needs macOS 14 or newer; .* compute_units: cpu",
    ):
        CoreMl().open(half, CoreMlOptions())


def test_what_core_ml_cannot_run_is_told(half, native):
    session = CoreMl().open(half, CoreMlOptions(compute_units="cpu-and-gpu"))
    native.fails = "E5RT: no kernel"
    with pytest.raises(TargetError, match=r"fails to run it on cpu-and-gpu; got: E5RT: no kernel\. Open it with comp"):
        session(fed())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda found: {"other": found["out"]}, r"output 'out': got other, expected numbers of that name"),
        (lambda found: {"out": None}, r"output 'out': got out, expected numbers"),
        (lambda found: {"out": found["out"][:1]}, r"output 'out': got \(1, 8, 8, 8\), expected \(2, 8, 8, 8\)"),
    ],
)
def test_answers_that_the_program_does_not_promise_are_refused(half, native, monkeypatch, answer, said):
    predict = native.predict
    monkeypatch.setattr(native, "predict", lambda self, data, state: answer(predict(self, data, state)))
    with pytest.raises(TargetError, match=said):
        CoreMl().open(half, CoreMlOptions())(fed())


def test_what_was_compiled_goes_when_the_session_is_closed_or_forgotten(half, native):
    session = CoreMl().open(half, CoreMlOptions())
    folder = Path(native.opened[-1][0]).parent
    assert folder.is_dir()
    session.close()
    assert not folder.exists()
    with pytest.raises(TargetError, match="the session is closed"):
        session(fed())
    session = CoreMl().open(half, CoreMlOptions())
    folder = Path(native.opened[-1][0]).parent
    del session
    gc.collect()
    assert not folder.exists()


def test_the_target_on_a_mac_names_its_processor(native, monkeypatch):
    machine_name.cache_clear()
    monkeypatch.setattr("targets.coreml.device.subprocess.run", _told("Apple M2 Pro\n"))
    try:
        here = CoreMl().capabilities()
    finally:
        machine_name.cache_clear()
    assert here.device == "Core ML on Apple M2 Pro"
    assert (here.runs, here.untimed) == (True, "")


def _told(text):
    class Done:
        stdout = text

    return lambda *words, **keywords: Done()


def test_a_mac_needs_no_torch_to_open_run_and_explain_packages(half, root, tmp_path):
    """In a process where torch cannot be imported: the session, and the reader of programs."""
    np.save(tmp_path / "feeds.npy", fed()["sample"])
    code = f"""
        import sys
        sys.modules["torch"] = None
        import numpy as np
        from types import SimpleNamespace
        from targets import coreml
        from targets.coreml import device as coreml_device
        class Model:
            def __init__(self, path, compute_units):
                pass
            def predict(self, data):
                assert data["count"].shape == (1,)
                return {{"out": np.zeros((2, 8, 8, 8), np.float32)}}
        class Plan:
            @staticmethod
            def load_from_path(path, compute_units):
                raise RuntimeError("none here")
        models = SimpleNamespace(
            CompiledMLModel=Model,
            utils=SimpleNamespace(compile_model=lambda source, destination: destination),
            compute_plan=SimpleNamespace(MLComputePlan=Plan),
        )
        library = SimpleNamespace(models=models, ComputeUnit=SimpleNamespace(ALL=0))
        coreml.runs_core_ml = lambda: True
        coreml.coremltools = coreml_device.coremltools = lambda: library
        target = coreml.CoreMl()
        assert target.capabilities().runs
        from pathlib import Path
        session = target.open(Path({str(half)!r}), coreml.CoreMlOptions())
        feeds = {{"sample": np.load({str(tmp_path / "feeds.npy")!r}), "count": np.array(3, np.int32)}}
        assert session(feeds)["out"].shape == (2, 8, 8, 8)
        told = session.evidence()
        assert told.placement is not None and len(told.layers) > 5
        assert not [name for name in sys.modules if name.startswith("torch.")]
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
