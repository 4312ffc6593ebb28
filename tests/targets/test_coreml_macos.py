"""The target coreml on a Mac (ci/macos.sh): packages by Core ML and by our evaluator, on every compute unit."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'diffusion-exporter[coreml]'")

from coreml_nets import evaluated, fed, made

from targets import coreml
from targets.base import TargetError
from targets.coreml import CoreMl, CoreMlOptions
from targets.coreml.device import UNITS
from targets.coreml.package import MANIFEST, Manifest
from targets.mil.package import read_package

pytestmark = [
    pytest.mark.macos,
    pytest.mark.filterwarnings(
        *("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
        "ignore:overflow encountered in cast:RuntimeWarning",  # coremltools, of limits of integers
    ),
]
DEVICES = {
    "cpu": {"CPU"},
    "cpu-and-gpu": {"CPU", "GPU"},
    "cpu-and-neural-engine": {"CPU", "Neural Engine"},
    "all": {"CPU", "GPU", "Neural Engine"},
}
FLOAT_ON_CPU, FLOAT, HALF = 1e-4, 2e-3, 2e-2
"""Largest differences over the largest answer. A wrong parameter makes 1e-3 and more (`tests/targets/test_mil_networks`
plants some); other units may multiply floats in fewer bits."""
Packages = Callable[..., Path]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Return a function from options to a folder of packages, made once."""
    assert coreml.runs_core_ml()  # ci/macos.sh has looked
    known: dict[str, Path] = {}

    def folder(**options: Any) -> Path:
        key = json.dumps(options)
        if key not in known:
            known[key] = made(tmp_path_factory.mktemp("packages") / "unet", **options)
        return known[key]

    return folder


def opened(folder: Path, units: str) -> Any:
    return CoreMl().open(folder, CoreMlOptions(compute_units=units))


def apart(folder: Path, units: str, feeds: dict[str, Any]) -> float:
    """Return the largest difference between Core ML and our evaluator, over the largest answer."""
    wanted = evaluated(folder, feeds)
    session = opened(folder, units)
    got = session(feeds)["out"]
    session.close()
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert np.isfinite(got).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("units", UNITS)
def test_floats_are_answered_as_by_our_evaluator(packages: Packages, units: str) -> None:
    limit = FLOAT_ON_CPU if units == "cpu" else FLOAT
    assert apart(packages(precision="f32"), units, fed()) <= limit


@pytest.mark.parametrize("units", UNITS)
def test_16_bits_are_answered_as_by_our_evaluator(packages: Packages, units: str) -> None:
    assert apart(packages(), units, fed()) <= HALF


@pytest.mark.parametrize("units", UNITS)
def test_chunks_hand_over_what_lies_between_them(packages: Packages, units: str) -> None:
    folder = packages(chunks=2)
    assert len(Manifest.read(folder / MANIFEST).packages) == 2
    assert apart(folder, units, fed()) <= HALF


@pytest.mark.parametrize("units", UNITS)
def test_every_enumerated_shape_is_answered_and_no_other(packages: Packages, units: str) -> None:
    folder = packages(sides=[8, 16, 32])
    for side in (8, 16, 32):
        assert apart(folder, units, fed(side=side)) <= HALF
    with pytest.raises(TargetError, match="Core ML fails to run it"):
        opened(folder, units)(fed(side=12))


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(
    ("weights", "deployment", "form"),
    [
        ("palette-4", "iOS16", "constexpr_lut_to_dense"),
        ("palette-6", "iOS17", "constexpr_lut_to_dense"),
        ("palette-4", "iOS18", "constexpr_lut_to_dense"),
        ("int8", "iOS17", "constexpr_affine_dequantize"),
        ("int4", "iOS18", "constexpr_blockwise_shift_scale"),
    ],
)
def test_smaller_weights_are_unpacked_alike(
    packages: Packages, units: str, weights: str, deployment: str, form: str
) -> None:
    folder = packages(weights=weights, deployment=deployment)
    assert form in {operation.type for operation in read_package(folder / "model.mlpackage").operations}
    assert apart(folder, units, fed()) <= HALF


def test_answers_are_the_callers_and_inputs_may_be_read_only(packages: Packages) -> None:
    session, feeds = opened(packages(), "all"), fed()
    for array in feeds.values():
        array.flags.writeable = False
    first = session(feeds)["out"]
    kept = first.copy()
    for seed in range(1, 20):
        session(fed(seed))
    assert np.array_equal(first, kept)
    assert np.allclose(session(feeds)["out"], kept, rtol=0, atol=HALF * np.abs(kept).max())


@pytest.mark.parametrize("units", UNITS)
def test_the_plan_gives_operations_a_device_and_the_program_a_type(packages: Packages, units: str) -> None:
    if tuple(map(int, platform.mac_ver()[0].split(".")[:2])) < (14, 4):
        pytest.skip("compute plans are told from macOS 14.4 on")
    told = opened(packages(), units).evidence()
    heavy = [layer for layer in told.layers if layer.type in ("conv", "linear")]
    assert len(heavy) == 3
    assert {layer.device for layer in heavy} <= DEVICES[units], told.count("device")
    assert {layer.precision for layer in heavy} == {"f16"}
    assert {layer.origin for layer in heavy} == {"first", "blocks.0", "blocks.1"}
    assert any("where Core ML plans to run operations: " in note for note in told.notes)
    print(units, told.count("device"), *told.notes, sep="\n  ")  # noqa: T201 - what nobody has seen before this run


@pytest.mark.parametrize("units", UNITS)
def test_a_profile_is_part_of_whole_calls(packages: Packages, units: str) -> None:
    if tuple(map(int, platform.mac_ver()[0].split(".")[:2])) < (14, 4):
        pytest.skip("compute plans are told from macOS 14.4 on")
    session = opened(packages(), units)
    started = time.perf_counter()
    found = session.profile(fed(), 10)
    most = 1e3 * (time.perf_counter() - started) / 10
    assert {timed.layer.type for timed in found} >= {"conv", "linear"}
    assert 0 < sum(timed.ms for timed in found) <= most


@pytest.mark.parametrize("units", UNITS)
def test_loading_and_calls_are_timed_in_a_process_without_torch(packages: Packages, units: str, root: Path) -> None:
    folder = packages()
    options = json.dumps({"compute_units": units})
    command = [sys.executable, "-m", "targets.footprint", "coreml", options, "{}", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["load_ms"][folder.name] > 0
    assert found["first_ms"][folder.name] > 0
    session = opened(folder, units)
    session(fed())
    started = time.perf_counter()
    session(fed())
    assert 0 < time.perf_counter() - started < 10


def test_the_target_measures_here() -> None:
    here = CoreMl().capabilities()
    assert (here.available, here.runs, here.untimed) == (True, True, "")
    assert here.device.startswith("Core ML on ")


def test_a_damaged_package_is_refused_by_name(packages: Packages, tmp_path: Path) -> None:
    folder = made(tmp_path / "unet")
    (weights,) = folder.glob("*.mlpackage/Data/*/weights/weight.bin")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(TargetError, match=r"model\.mlpackage: Core ML cannot load it for cpu; got: "):
        opened(folder, "cpu")
