"""Parts of the evaluator with many edges, on made-up values, against numpy and plain Python."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from targets.mil.constants import unpack
from targets.mil.kernels import KERNELS

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.binary(min_size=6, max_size=40), st.booleans())
def test_elements_of_a_few_bits_are_cut_from_a_long_number(bits: int, data: bytes, signed: bool) -> None:
    count = len(data) * 8 // bits
    number = int.from_bytes(data, "little")
    wanted = [number >> (bits * place) & ((1 << bits) - 1) for place in range(count)]
    if signed:
        wanted = [value - (1 << bits) if value >> (bits - 1) else value for value in wanted]
    found = unpack(np.frombuffer(data, np.uint8), bits, count, signed=signed)
    assert found.tolist() == wanted


@settings(max_examples=200)
@given(st.data())
def test_slices_are_numpys(data: st.DataObject) -> None:
    sizes = data.draw(SIZES)
    x = np.arange(int(np.prod(sizes)), dtype=np.float32).reshape(sizes)
    begin = [data.draw(st.integers(-size, size - 1)) for size in sizes]
    end = [data.draw(st.integers(-size, size)) for size in sizes]
    stride = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in sizes]
    flags = [[data.draw(st.booleans()) for _ in sizes] for _ in range(3)]
    wanted: list[slice | int] = []
    for axis in range(len(sizes)):
        start = None if flags[0][axis] else begin[axis]
        stop = None if flags[1][axis] else end[axis]
        wanted.append((start or 0) if flags[2][axis] else slice(start, stop, stride[axis]))
    names = ("begin_mask", "end_mask", "squeeze_mask")
    found = KERNELS["slice_by_index"].run(
        x=torch.from_numpy(x), begin=begin, end=end, stride=stride, **dict(zip(names, flags, strict=True))
    )
    np.testing.assert_array_equal(found.numpy(), x[tuple(wanted)])


@given(st.data())
def test_palettes_in_groups_are_looked_up_one_by_one(data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    sizes = [count * data.draw(st.integers(1, 3)) for count in groups]
    axis, values = data.draw(st.integers(0, len(sizes) - 1)), data.draw(st.integers(1, 3))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    indices = random.integers(0, 4, sizes).astype(np.uint8)
    lut = random.normal(size=(*groups, 4, values)).astype(np.float16)
    shape = [size * values if place == axis else size for place, size in enumerate(sizes)]
    wanted = np.zeros(shape, np.float16)
    for place in np.ndindex(*shape):
        source = [at // values if own == axis else at for own, at in enumerate(place)]
        group = [at * count // size for at, count, size in zip(source, groups, sizes, strict=True)]
        wanted[place] = lut[(*group, indices[tuple(source)], place[axis] % values)]
    found = KERNELS["constexpr_lut_to_dense"].run(
        indices=torch.from_numpy(indices), lut=torch.from_numpy(lut), vector_axis=axis
    )
    np.testing.assert_array_equal(found.numpy(), wanted)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_same_padding_gives_as_many_elements_as_strides_fit(size: int, stride: int, kernel: int, lower: bool) -> None:
    from targets.mil.kernels.dense import same_pads

    before, after = same_pads([4 * size], [kernel], [stride], lower=lower)
    assert (4 * size + before + after - kernel) // stride + 1 == -(-4 * size // stride)
    assert abs(before - after) <= 1
    assert before >= after if lower else before <= after
