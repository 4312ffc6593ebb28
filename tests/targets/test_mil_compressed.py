"""Decompression of weights, against coremltools' own: bit for bit where values are picked, closely where scaled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil_programs import Array, library, quiet, save_program

_RANDOM = np.random.default_rng(7)


def _bits(count: int, *shape: int) -> Array:
    """Return (shape) random numbers of a few bits, in coremltools' own type of that many."""
    from coremltools.converters.mil.mil.types.type_mapping import string_to_nptype

    return _RANDOM.integers(0, 1 << count, shape).astype(string_to_nptype(f"uint{count}"))


def _half(*shape: int) -> Array:
    return _RANDOM.normal(size=shape).astype(np.float16)


def _int4(*shape: int) -> Array:
    from coremltools.converters.mil.mil.types.type_mapping import string_to_nptype

    return _RANDOM.integers(-8, 8, shape).astype(string_to_nptype("int4"))


def _mask(*shape: int) -> Array:
    found = _bits(1, *shape)
    found.reshape(-1)[:2] = 1
    return found


def _new_forms() -> dict[str, Callable[[Any], Any]]:
    """Return decompressions of iOS 18: name -> what builds one."""
    mask = _mask(6, 4)
    found: dict[str, Callable[[Any], Any]] = {}
    for bits in (1, 2, 3, 4, 6, 8):
        indices, lut = _bits(bits, 6, 5), _half(3, 1, 1 << bits, 1)
        found[f"palette of {bits} bits"] = _op("constexpr_lut_to_dense", indices=indices, lut=lut)
    found["palette of int8"] = _op(
        "constexpr_lut_to_dense", indices=_bits(4, 4, 6), lut=_RANDOM.integers(-128, 128, (1, 2, 16, 1)).astype(np.int8)
    )
    for axis in (0, 1):
        parameters = {"indices": _bits(2, 4, 6), "lut": _half(2, 1, 4, 3), "vector_axis": axis}
        found[f"vectors along {axis}"] = _op("constexpr_lut_to_dense", **parameters)
    found["sparse"] = _op("constexpr_sparse_to_dense", nonzero_data=_half(int(np.count_nonzero(mask))), mask=mask)
    count = int(np.count_nonzero(mask))
    found["sparse palette"] = _op(
        "constexpr_lut_to_sparse", indices_mask=mask, indices_nonzero_data=_bits(3, count), lut=_half(2, 1, 8, 1)
    )
    found["sparse vectors"] = _op(
        "constexpr_lut_to_sparse",
        indices_mask=mask,
        indices_nonzero_data=_bits(2, count),
        lut=_half(1, 1, 4, 2),
        vector_axis=0,
    )
    found["scaled int8"] = _op(
        "constexpr_blockwise_shift_scale",
        data=_RANDOM.integers(-128, 128, (6, 8)).astype(np.int8),
        scale=_half(6, 1),
        offset=_RANDOM.integers(-9, 9, (6, 1)).astype(np.int8),
    )
    found["scaled int4 in blocks"] = _op("constexpr_blockwise_shift_scale", data=_int4(6, 8), scale=_half(3, 2))
    found["scaled uint4 with an offset"] = _op(
        "constexpr_blockwise_shift_scale", data=_bits(4, 6, 8), scale=_half(1, 4), offset=_bits(4, 1, 4)
    )
    found["scaled sparse"] = _op(
        "constexpr_sparse_blockwise_shift_scale",
        data_mask=mask,
        nonzero_data=_RANDOM.integers(-128, 128, count).astype(np.int8),
        scale=_half(6, 1),
        offset=_RANDOM.integers(-9, 9, (6, 1)).astype(np.int8),
    )
    found["cast"] = _op("constexpr_cast", source_val=_half(3, 4), output_dtype="fp32")
    return found


def _old_forms() -> dict[str, Callable[[Any], Any]]:
    """Return decompressions of iOS 16: name -> what builds one."""
    found: dict[str, Callable[[Any], Any]] = {}
    for bits in (1, 2, 4, 6, 8):
        count = -(-bits * 35 // 8)
        found[f"old palette of {bits} bits"] = _op(
            "constexpr_lut_to_dense",
            indices=_RANDOM.integers(0, 256, count).astype(np.uint8),
            lut=_half(1 << bits),
            shape=np.array([5, 7], np.uint32),
        )
    packed = np.packbits(_RANDOM.integers(0, 2, 35).astype(np.uint8), bitorder="little")
    found["old sparse"] = _op(
        "constexpr_sparse_to_dense",
        nonzero_data=_half(int(np.unpackbits(packed).sum())),
        mask=packed,
        shape=np.array([5, 7], np.uint32),
    )
    for kind, low, high in (("int8", -128, 128), ("uint8", 0, 256)):
        found[f"old scaled {kind}"] = _op(
            "constexpr_affine_dequantize",
            quantized_data=_RANDOM.integers(low, high, (3, 4, 2)).astype(kind),
            zero_point=_RANDOM.integers(low, high, 4).astype(kind),
            scale=_RANDOM.uniform(0.01, 0.1, 4).astype(np.float16),
            axis=1,
        )
    found["old cast"] = _op("constexpr_cast", source_val=_half(3, 4), output_dtype="fp32")
    return found


def _op(name: str, **parameters: Any) -> Callable[[Any], Any]:
    return lambda mb: getattr(mb, name)(**parameters)


SCALED = ("scaled int8", "scaled int4 in blocks", "scaled uint4 with an offset", "scaled sparse", "old scaled")
"""These multiply: 16-bit products may be rounded once or twice."""


@pytest.fixture(scope="module")
def decompressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Array], list[Array]]]:
    """Return case -> our results and coremltools'."""
    library()
    from targets.mil.evaluator import Evaluator

    found: dict[str, tuple[list[Array], list[Array]]] = {}
    for opset, cases in (("iOS18", _new_forms()), ("iOS16", _old_forms())):
        path = tmp_path_factory.mktemp("compressed") / f"{opset}.mlpackage"
        names: dict[str, list[str]] = {}
        theirs = {}
        for name, build in cases.items():
            theirs[name] = _theirs(build, opset)

        def program(mb: Any, given: Any, cases: Any = cases, names: Any = names) -> list[Any]:
            for name, build in cases.items():
                made = build(mb)
                names[name] = [item.name for item in (made if isinstance(made, (list, tuple)) else (made,))]
            return [mb.identity(x=given["x"], name="first")]

        feeds = {"x": np.zeros((1, 2), np.float32)}
        evaluator = Evaluator(save_program(path, feeds, program, opset), threads=1)
        ours: dict[str, Array] = {}
        for operation, results in evaluator.values(feeds):
            ours |= {spec.name: value.numpy() for spec, value in zip(operation.outputs, results, strict=True)}
        found |= {name: ([ours[item] for item in names[name]], theirs[name]) for name in cases}
    return found


def _theirs(build: Callable[[Any], Any], opset: str) -> list[Array]:
    """Return what coremltools' own decompression gives."""
    ct = library()
    from coremltools.converters.mil.mil import Builder, Function, types

    with quiet(), Function({"x": Builder.placeholder((1,), types.fp32)}, opset_version=getattr(ct.target, opset)):
        made = build(Builder)
        first = made[0] if isinstance(made, (list, tuple)) else made
        values = first.op.materialized_val_inference()
    return list(values) if isinstance(values, tuple) else [values]


NAMES = (
    *(f"palette of {bits} bits" for bits in (1, 2, 3, 4, 6, 8)),
    "palette of int8",
    "vectors along 0",
    "vectors along 1",
    "sparse",
    "sparse palette",
    "sparse vectors",
    "scaled int8",
    "scaled int4 in blocks",
    "scaled uint4 with an offset",
    "scaled sparse",
    "cast",
    *(f"old palette of {bits} bits" for bits in (1, 2, 4, 6, 8)),
    "old sparse",
    "old scaled int8",
    "old scaled uint8",
    "old cast",
)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_decompressed_as_coremltools_does(
    decompressed: dict[str, tuple[list[Array], list[Array]]], name: str
) -> None:
    assert set(decompressed) == set(NAMES)
    ours, theirs = decompressed[name]
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        if name.startswith(SCALED):
            np.testing.assert_allclose(own.astype(np.float32), other.astype(np.float32), rtol=2e-3, atol=1e-6)
        else:
            np.testing.assert_array_equal(own.astype(np.float32), other.astype(np.float32))


def test_a_palette_of_integers_is_scaled_in_two_steps(tmp_path: Path) -> None:
    library()
    from targets.mil.evaluator import Evaluator

    indices, lut = _bits(2, 4, 6), _RANDOM.integers(-128, 128, (1, 1, 4, 1)).astype(np.int8)
    scale, mask = _half(4, 1), _mask(4, 6)

    def program(mb: Any, given: Any) -> list[Any]:
        dense = mb.constexpr_lut_to_dense(indices=indices, lut=lut)
        scaled = mb.constexpr_blockwise_shift_scale(data=dense, scale=scale, name="scaled")
        where, sparse = mb.constexpr_lut_to_sparse(
            indices_mask=mask, indices_nonzero_data=indices.reshape(-1)[: int(np.count_nonzero(mask))], lut=lut
        )
        place, half = mb.constexpr_sparse_blockwise_shift_scale(data_mask=where, nonzero_data=sparse, scale=scale)
        whole = mb.constexpr_sparse_to_dense(nonzero_data=half, mask=place, name="whole")
        x = mb.cast(x=given["x"], dtype="fp16")
        return [mb.cast(x=mb.add(x=mb.add(x=x, y=scaled), y=whole), dtype="fp32", name="sum")]

    feeds = {"x": np.zeros((4, 6), np.float32)}
    evaluator = Evaluator(save_program(tmp_path / "chain.mlpackage", feeds, program, "iOS18"), threads=1)
    picked = lut.reshape(-1)[indices.astype(int)].astype(np.float32)
    scaled = (picked * scale.astype(np.float32)).astype(np.float16)
    sparse = np.zeros((4, 6), np.float32)
    kept = indices.reshape(-1)[: int(np.count_nonzero(mask))].astype(int)
    sparse[mask.astype(bool)] = lut.reshape(-1)[kept]
    wanted = (scaled + (sparse * scale.astype(np.float32)).astype(np.float16)).astype(np.float32)
    first, second = evaluator(feeds)["sum"], evaluator(feeds)["sum"]
    np.testing.assert_array_equal(first, wanted)
    np.testing.assert_array_equal(second, wanted)


def test_numbers_of_a_few_bits_lie_from_the_lowest_bit_on() -> None:
    from targets.mil.constants import unpack

    np.testing.assert_array_equal(unpack(np.array([0b01101100, 0b11], np.uint8), 2, 5), [0, 3, 2, 1, 3])
    np.testing.assert_array_equal(unpack(np.array([0b10_001_011, 0b1], np.uint8), 3, 3), [3, 1, 6])
    np.testing.assert_array_equal(unpack(np.array([0x8F], np.uint8), 4, 2, signed=True), [-1, -8])
