"""Reading saved ML Programs: what is in them, and what is said of packages that are none, damaged or not for us."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil_programs import library, quiet, save_program

from targets.base import TargetError, TensorSpec

X = np.zeros((1, 2, 4, 4), np.float32)
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


def _convolution(mb: Any, given: Any) -> list[Any]:
    weight = np.arange(3 * 2 * 3 * 3, dtype=np.float32).reshape(3, 2, 3, 3)
    found = mb.conv(x=given["x"], weight=weight, pad_type="custom", pad=[1, 1, 0, 0], name="conv_in")
    return [mb.concat(values=[found, found], axis=1, name="y")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_program(tmp_path_factory.mktemp("package") / "net.mlpackage", {"x": X}, _convolution)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "net.mlpackage")
    return tmp_path / "net.mlpackage"


def _change(package: Path, change: Callable[[Any], None]) -> None:
    from targets.mil.proto import messages

    model = messages()[0].Model()
    model.ParseFromString((package / MODEL).read_bytes())
    change(model)
    (package / MODEL).write_bytes(model.SerializeToString())


def _operation(model: Any, kind: str) -> Any:
    (function,) = model.mlProgram.functions.values()
    return next(item for item in function.block_specializations[function.opset].operations if item.type == kind)


def test_a_package_tells_its_operations_without_its_weights(copy: Path) -> None:
    from targets.mil.package import read_package

    (copy / WEIGHTS).unlink()
    package = read_package(copy)
    assert (package.deployment, package.opset, package.functions) == ("iOS17", "CoreML7", ("main",))
    assert [feature.spec for feature in package.inputs] == [TensorSpec("x", "float32", (1, 2, 4, 4))]
    assert [feature.spec for feature in package.outputs] == [TensorSpec("y", "float32", (1, 6, 4, 2))]
    assert package.metadata["com.github.apple.coremltools.version"]
    conv, concat = package.operations
    assert (conv.type, conv.name) == ("conv", "conv_in")
    assert conv.outputs == (TensorSpec("conv_in", "float32", (1, 3, 4, 2)),)
    pad, weight = conv.constant("pad"), conv.constant("weight")
    assert pad is not None
    assert weight is not None
    assert pad.plain() == [1, 1, 0, 0]
    assert (weight.dtype, weight.shape, weight.plain()) == ("float32", (3, 2, 3, 3), None)
    assert weight.file.endswith("weight.bin")
    assert (conv.inputs["x"], concat.inputs["values"]) == (("x",), ("conv_in", "conv_in"))


def test_messages_load_without_the_library_and_beside_it(saved: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from targets.mil.package import read_package;"
        "read_package(Path(sys.argv[1]));"
        "assert not {'coremltools', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(saved)], check=True, timeout=60)


def _refused(package: Path, *words: str, **options: Any) -> str:
    from targets.mil.evaluator import Evaluator

    with pytest.raises(TargetError) as refused:
        Evaluator(package, **options)
    told = str(refused.value)
    assert all(word in told for word in ("got", "expected", *words)), told
    return told


def test_what_is_no_package_is_refused(tmp_path: Path, copy: Path) -> None:
    _refused(tmp_path / "none.mlpackage", "not a package", "Manifest.json")
    (copy / MODEL).write_bytes(b"\xff" * 64)
    _refused(copy, "not a model")
    (copy / MODEL).unlink()
    _refused(copy, "a missing file")
    (copy / "Manifest.json").write_text("{")
    _refused(copy, "Manifest.json: damaged")
    (copy / "Manifest.json").write_text("{}")
    _refused(copy, "Manifest.json: damaged")


@pytest.mark.parametrize("name", ["../../../outside.mlmodel", "/etc/hostname"])
def test_a_model_outside_of_the_package_is_not_read(copy: Path, name: str) -> None:
    manifest = json.loads((copy / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = name
    (copy / "Manifest.json").write_text(json.dumps(manifest))
    (copy.parent / "outside.mlmodel").write_bytes(b"")
    _refused(copy, "outside of the package", name)


@pytest.mark.parametrize("name", ["@model_path/../../../../weight.bin", "/etc/hostname"])
def test_weights_outside_of_the_package_are_not_read(copy: Path, name: str) -> None:
    shutil.copy(copy / WEIGHTS, copy.parent / "weight.bin")

    def change(model: Any) -> None:
        (function,) = model.mlProgram.functions.values()
        for item in function.block_specializations[function.opset].operations:
            if item.type == "const" and item.attributes["val"].WhichOneof("value") == "blobFileValue":
                item.attributes["val"].blobFileValue.fileName = name

    _change(copy, change)
    _refused(copy, "outside of the package", name)


def test_a_link_out_of_the_package_is_not_followed(copy: Path) -> None:
    shutil.move(copy / WEIGHTS, copy.parent / "weight.bin")
    (copy / WEIGHTS).symlink_to(copy.parent / "weight.bin")
    _refused(copy, "outside of the package")


def test_damaged_weights_are_refused(copy: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    for size, words in ((40, "truncated; got 40"), (80, "truncated; got 80"), (len(whole) - 4, "truncated")):
        (copy / WEIGHTS).write_bytes(whole[:size])
        _refused(copy, words)
    for place, number, words in (
        (4, 7, "not a file of weights; got version 7"),
        (64, 1, "no entry at 64; got 0x1"),
        (68, 1, "type; got float16 in the file, expected float32"),
        (72, 3, "size; got 3 bytes, expected 216"),
        (80, 1 << 40, "truncated"),
    ):
        data = bytearray(whole)
        struct.pack_into("<Q" if place == 80 else "<I", data, place, number)
        (copy / WEIGHTS).write_bytes(data)
        _refused(copy, words)
    (copy / WEIGHTS).unlink()
    _refused(copy, "a missing file")


def test_unknown_operations_are_all_named_before_anything_runs(copy: Path) -> None:
    def change(model: Any) -> None:
        _operation(model, "conv").type = "fold"
        _operation(model, "concat").type = "knit"

    _change(copy, change)
    told = _refused(copy, "fold 'conv_in' of net.conv_in", "knit 'y'", modules={"conv_in": "net.conv_in"})
    assert "of type fold, knit" in told


def test_branches_are_refused_by_name(tmp_path: Path) -> None:
    def build(mb: Any, given: Any) -> list[Any]:
        positive = mb.squeeze(x=mb.greater(x=mb.reduce_sum(x=given["x"], keep_dims=False), y=np.float32(0)))
        return [mb.cond(pred=positive, _true_fn=lambda: mb.relu(x=given["x"]), _false_fn=lambda: mb.abs(x=given["x"]))]

    _refused(save_program(tmp_path / "cond.mlpackage", {"x": X}, build), "cond '")


def test_unknown_parameters_and_missing_values_are_refused(copy: Path) -> None:
    def strange(model: Any) -> None:
        conv = _operation(model, "conv")
        conv.inputs["twist"].CopyFrom(conv.inputs["pad"])

    whole = (copy / MODEL).read_bytes()
    _change(copy, strange)
    _refused(copy, "parameters that the evaluator does not know; got twist")
    (copy / MODEL).write_bytes(whole)

    def missing(model: Any) -> None:
        _operation(model, "conv").inputs["x"].arguments[0].name = "z"

    _change(copy, missing)
    _refused(copy, "takes 'z'")


def test_a_shape_other_than_declared_is_refused_when_it_runs(copy: Path) -> None:
    from targets.mil.evaluator import Evaluator

    def change(model: Any) -> None:
        _operation(model, "conv").outputs[0].type.tensorType.dimensions[2].constant.size = 5

    _change(copy, change)
    with pytest.raises(TargetError, match=r"conv 'conv_in': shape of 'conv_in'; got \(1, 3, 4, 2\), expected"):
        Evaluator(copy)({"x": X})


def test_an_output_may_be_a_constant(copy: Path) -> None:
    from targets.mil.evaluator import Evaluator
    from targets.mil.package import read_package

    weight = read_package(copy).operations[0].constant("weight")
    assert weight is not None

    def change(model: Any) -> None:
        (function,) = model.mlProgram.functions.values()
        function.block_specializations[function.opset].outputs[0] = weight.name

    _change(copy, change)
    found = Evaluator(copy)({"x": X})[weight.name]
    np.testing.assert_array_equal(found, np.arange(54, dtype=np.float32).reshape(3, 2, 3, 3))


def test_other_types_of_models_are_refused(copy: Path) -> None:
    _change(copy, lambda model: model.neuralNetwork.SetInParent())
    _refused(copy, "got neuralNetwork, expected mlProgram")


def test_states_are_refused_by_name(tmp_path: Path) -> None:
    ct = library()
    from coremltools.converters.mil.mil import Builder, types

    with quiet():

        @Builder.program(
            input_specs=[Builder.TensorSpec((1, 2), types.fp16), Builder.StateTensorSpec((1, 2), types.fp16)],
            opset_version=ct.target.iOS18,
        )
        def program(x: Any, memory: Any) -> Any:
            return Builder.add(x=x, y=Builder.read_state(input=memory))

        model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
        model.save(str(tmp_path / "state.mlpackage"))
        del model
        import gc

        gc.collect()
    _refused(tmp_path / "state.mlpackage", "states that it keeps between calls; got memory")


def test_threads_are_checked_and_given_back(saved: Path) -> None:
    import torch

    from targets.mil.evaluator import Evaluator

    before = torch.get_num_threads()
    with pytest.raises(TargetError, match="threads: got 0"):
        Evaluator(saved, threads=0)
    Evaluator(saved, threads=before + 1)({"x": X})
    assert torch.get_num_threads() == before
