"""Operations that move elements, with what their documentation says that they give."""

from __future__ import annotations

from typing import Any

import numpy as np
from mil_cases import Case, _calls, floats, whole
from mil_programs import Array


def movement() -> list[Case]:
    return [*_shapes(), *_joins(), *_blocks(), *_slices(), *_gathers(), *_scatters(), *_makers()]


def _shapes() -> list[Case]:
    x = {"x": floats(2, 3, 4)}
    return [
        Case("reshape", _calls("reshape", shape=[4, -1]), x, lambda x: x.reshape(4, 6)),
        Case(
            "reshape keeps",
            _calls(
                "reshape",
                shape=[0, -1, 2],
            ),
            x,
            lambda x: x.reshape(2, 6, 2),
        ),
        Case("reshape computed", _computed_reshape, {"x": floats(2, 3, 4)}, lambda x: x.reshape(4, 3, 2)),
        Case(
            "reshape_like",
            lambda mb, x, y: mb.reshape_like(
                x=x, ref_tensors=(y, y), begins=(0, 1), ends=(1, 0), end_masks=(False, True)
            ),
            {"x": floats(3, 8), "y": floats(4, 6)},
            lambda x, y: x.reshape(4, 6),
        ),
        Case("transpose", _calls("transpose", perm=[2, 0, -2]), x, lambda x: x.transpose(2, 0, 1)),
        Case("expand_dims", _calls("expand_dims", axes=[0, -1]), x, lambda x: np.expand_dims(x, (0, -1))),
        Case("squeeze", _calls("squeeze", axes=[0, -1]), {"x": floats(1, 3, 1, 1)}, lambda x: x.squeeze((0, -1))),
        Case("squeeze all", _calls("squeeze"), {"x": floats(1, 3, 1, 2)}, lambda x: x.squeeze()),
        Case("flatten2d", _calls("flatten2d", axis=-1), x, lambda x: x.reshape(6, 4)),
        Case("flatten2d default", _calls("flatten2d"), x, lambda x: x.reshape(2, 12)),
        Case("tile", _calls("tile", reps=[2, 1, 3]), x, lambda x: np.tile(x, (2, 1, 3))),
        Case("reverse", _calls("reverse", axes=[0, -1]), x, lambda x: x[::-1, :, ::-1]),
        Case("reverse all", _calls("reverse"), x, lambda x: x[::-1, ::-1, ::-1]),
        Case(
            "reverse_sequence",
            _calls("reverse_sequence", lengths=np.array([2, 4, 1], np.int32), seq_axis=0, batch_axis=1),
            {"x": floats(4, 3, 2)},
            _reversed_parts,
        ),
        Case("pad", _calls("pad", pad=[1, 2, 0, 3], constant_val=0.5), x, lambda x: _padded(x, constant_values=0.5)),
        Case("pad reflect", _calls("pad", pad=[1, 2, 0, 3], mode="reflect"), x, lambda x: _padded(x, mode="reflect")),
        Case("pad replicate", _calls("pad", pad=[1, 2, 0, 3], mode="replicate"), x, lambda x: _padded(x, mode="edge")),
        Case("shape", _calls("shape"), x, lambda x: np.array(x.shape)),
        Case(
            "band_part",
            _calls("band_part", lower=1, upper=0),
            {"x": floats(2, 4, 5)},
            lambda x: np.tril(np.triu(x, -1)),
        ),
        Case("band_part upper", _calls("band_part", lower=0), {"x": floats(2, 4, 5)}, np.triu),
        Case("sliding_windows", _calls("sliding_windows", axis=1, size=3, stride=2), {"x": floats(2, 8, 3)}, _windows),
        Case(
            "crop",
            _calls("crop", crop_height=[1, 2], crop_width=[0, 3]),
            {"x": floats(1, 2, 6, 7)},
            lambda x: x[:, :, 1:4, :4],
        ),
    ]


def _computed_reshape(mb: Any, x: Any) -> Any:
    """Reshape to the shape from the end, computed with integers."""
    return mb.reshape(x=x, shape=mb.concat(values=[mb.reverse(x=mb.shape(x=x))], axis=0))


def _reversed_parts(x: Array) -> Array:
    found = x.copy()
    for column, length in enumerate((2, 4, 1)):
        found[:length, column] = x[:length, column][::-1]
    return found


def _padded(x: Array, **how: Any) -> Array:
    return np.pad(x, ((0, 0), (1, 2), (0, 3)), **how)


def _windows(x: Array) -> Array:
    return np.stack([x[:, start : start + 3] for start in (0, 2, 4)], axis=1)


def _joins() -> list[Case]:
    x, y = floats(2, 3), floats(2, 3)
    pair = {"x": x, "y": y}
    return [
        Case(
            "concat", lambda mb, x, y: mb.concat(values=[x, y], axis=-1), pair, lambda x, y: np.concatenate([x, y], -1)
        ),
        Case(
            "concat interleave",
            lambda mb, x, y: mb.concat(values=[x, y], axis=0, interleave=True),
            pair,
            lambda x, y: np.stack([x[0], y[0], x[1], y[1]]),
        ),
        Case("stack", lambda mb, x, y: mb.stack(values=[x, y], axis=1), pair, lambda x, y: np.stack([x, y], 1)),
        Case("split", _calls("split", num_splits=3, axis=1), {"x": floats(2, 6)}, lambda x: np.split(x, 3, 1)),
        Case(
            "split sizes",
            _calls("split", split_sizes=[1, 4, 2], axis=-1),
            {"x": floats(2, 7)},
            lambda x: (x[:, :1], x[:, 1:5], x[:, 5:]),
        ),
    ]


def _blocks() -> list[Case]:
    return [
        Case("depth_to_space", _calls("depth_to_space", block_size=2), {"x": floats(2, 12, 2, 3)}, _depth_to_space),
        Case("space_to_depth", _calls("space_to_depth", block_size=2), {"x": floats(2, 3, 4, 6)}, _space_to_depth),
        Case("pixel_shuffle", _calls("pixel_shuffle", upscale_factor=2), {"x": floats(2, 12, 2, 3)}, _pixel_shuffle),
        Case(
            "pixel_unshuffle",
            _calls("pixel_unshuffle", downscale_factor=np.uint32(2)),
            {"x": floats(2, 3, 4, 6)},
            lambda x: x.reshape(2, 3, 2, 2, 3, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 3),
        ),
        Case(
            "space_to_batch",
            _calls("space_to_batch", block_shape=[2, 3], paddings=np.array([[0, 1], [1, 1]], np.int32)),
            {"x": floats(2, 3, 3, 4)},
            _space_to_batch,
        ),
        Case(
            "batch_to_space",
            _calls("batch_to_space", block_shape=[2, 3], crops=np.array([[0, 1], [1, 1]], np.int32)),
            {"x": floats(12, 3, 2, 2)},
            _batch_to_space,
        ),
    ]


def _depth_to_space(x: Array) -> Array:
    found = np.zeros((2, 3, 4, 6))
    for i in range(2):
        for j in range(2):
            found[:, :, i::2, j::2] = x[:, (2 * i + j) * 3 : (2 * i + j + 1) * 3]
    return found


def _space_to_depth(x: Array) -> Array:
    return np.concatenate([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], axis=1)


def _pixel_shuffle(x: Array) -> Array:
    found = np.zeros((2, 3, 4, 6))
    for i in range(2):
        for j in range(2):
            found[:, :, i::2, j::2] = x[:, 2 * i + j :: 4]
    return found


def _space_to_batch(x: Array) -> Array:
    wide = np.pad(x, ((0, 0), (0, 0), (0, 1), (1, 1)))
    return np.concatenate([wide[:, :, i::2, j::3] for i in range(2) for j in range(3)], axis=0)


def _batch_to_space(x: Array) -> Array:
    whole_image = np.zeros((2, 3, 4, 6))
    for i in range(2):
        for j in range(3):
            start = (3 * i + j) * 2
            whole_image[:, :, i::2, j::3] = x[start : start + 2]
    return whole_image[:, :, :3, 1:5]


def _slices() -> list[Case]:
    x = {"x": floats(4, 5, 6)}
    masks = {
        "begin_mask": [True, False, False],
        "end_mask": [False, True, False],
        "squeeze_mask": [False, False, True],
    }
    computed = {"x": floats(4, 5, 6), "b": np.array([1, 0, 2], np.int32), "e": np.array([3, 5, -1], np.int32)}
    return [
        Case(
            "slice_by_index",
            _calls("slice_by_index", begin=[1, 0, -4], end=[3, 5, -1], stride=[1, 2, 1]),
            x,
            lambda x: x[1:3, 0:5:2, -4:-1],
        ),
        Case(
            "slice_by_index masks",
            _calls("slice_by_index", begin=[2, 1, -2], end=[3, 2, 0], **masks),
            x,
            lambda x: x[:3, 1:, -2],
        ),
        Case(
            "slice_by_index backwards",
            _calls(
                "slice_by_index", begin=[3, 4, 5], end=[0, 1, 0], stride=[-1, -2, -1], end_mask=[False, False, True]
            ),
            x,
            lambda x: x[3:0:-1, 4:1:-2, ::-1],
        ),
        Case(
            "slice_by_index computed",
            lambda mb, x, b, e: mb.slice_by_index(x=x, begin=b, end=e),
            computed,
            lambda x, b, e: x[1:3, 0:5, 2:-1],
        ),
        Case("slice_by_size", _calls("slice_by_size", begin=[1, 0, 2], size=[2, -1, 3]), x, lambda x: x[1:3, :, 2:5]),
        Case(
            "slice_update",
            lambda mb, x, u: mb.slice_update(x=x, update=u, begin=[1, 0, 2], end=[3, 5, 6], stride=[1, 2, 2]),
            {"x": floats(4, 5, 6), "u": floats(2, 3, 2)},
            _updated,
            "iOS18",
        ),
    ]


def _updated(x: Array, u: Array) -> Array:
    found = x.copy()
    found[1:3, 0:5:2, 2:6:2] = u
    return found


def _gathers() -> list[Case]:
    return [
        Case(
            "gather",
            _calls("gather", axis=1),
            {"x": floats(3, 4, 2), "indices": np.array([[3, 0], [1, 1]], np.int32)},
            lambda x, indices: x[:, indices],
        ),
        Case(
            "gather from the end",
            _calls("gather", axis=-1, batch_dims=0, validate_indices=False),
            {"x": floats(3, 4), "indices": np.array([-1, 0], np.int32)},
            lambda x, indices: x[:, indices],
            "iOS17",
        ),
        Case(
            "gather in batches",
            _calls("gather", axis=1, batch_dims=1),
            {"x": floats(2, 4, 3), "indices": np.array([[3, 0], [1, 1]], np.int32)},
            lambda x, indices: np.stack([x[row][indices[row]] for row in range(2)]),
        ),
        Case(
            "gather_nd",
            _calls("gather_nd"),
            {"x": floats(3, 4, 2), "indices": np.array([[0, 3], [2, 1], [1, 0]], np.int32)},
            lambda x, indices: x[indices[:, 0], indices[:, 1]],
        ),
        Case(
            "gather_nd in batches",
            _calls("gather_nd", batch_dims=1),
            {"x": floats(2, 4, 3), "indices": np.array([[[3], [0]], [[1], [1]]], np.int32)},
            lambda x, indices: np.stack([x[row][indices[row, :, 0]] for row in range(2)]),
        ),
        Case(
            "gather_along_axis",
            _calls("gather_along_axis", axis=1),
            {"x": floats(2, 4), "indices": np.array([[3, 0, 1], [1, 1, 2]], np.int32)},
            lambda x, indices: np.take_along_axis(x, indices, 1),
        ),
    ]


_MEET = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new,
    "max": np.maximum,
    "min": np.minimum,
}


def _scatters() -> list[Case]:
    found = []
    for mode, meet in _MEET.items():
        data = {"data": floats(4, 3), "indices": np.array([2, 0], np.int32), "updates": floats(2, 3, low=0.5)}

        def rows(data: Array, indices: Array, updates: Array, meet: Any = meet) -> Array:
            found = data.copy()
            found[indices] = meet(found[indices], updates)
            return found

        found.append(Case(f"scatter {mode}", _calls("scatter", axis=0, mode=mode), data, rows))
    found += [
        Case(
            "scatter_along_axis",
            _calls("scatter_along_axis", axis=1, mode="update"),
            {"data": floats(2, 4), "indices": np.array([[3, 0], [1, 2]], np.int32), "updates": floats(2, 2)},
            _put_along,
        ),
        Case(
            "scatter_nd",
            _calls("scatter_nd", mode="add"),
            {"data": floats(3, 4, 2), "indices": np.array([[0, 3], [2, 1], [0, 3]], np.int32), "updates": floats(3, 2)},
            _added,
        ),
    ]
    return found


def _put_along(data: Array, indices: Array, updates: Array) -> Array:
    found = data.copy()
    np.put_along_axis(found, indices, updates, 1)
    return found


def _added(data: Array, indices: Array, updates: Array) -> Array:
    found = data.copy()
    np.add.at(found, (indices[:, 0], indices[:, 1]), updates)
    return found


def _makers() -> list[Case]:
    return [
        Case(
            "fill",
            lambda mb, s: mb.fill(shape=s, value=1.5),
            {"s": np.array([2, 3], np.int32)},
            lambda s: np.full(s, 1.5),
        ),
        Case(
            "fill_like",
            _calls("fill_like", value=2),
            {"ref_tensor": floats(2, 3)},
            lambda ref_tensor: np.full((2, 3), 2),
        ),
        Case(
            "range_1d",
            lambda mb, e: mb.range_1d(start=1, end=mb.squeeze(x=e), step=2),
            {"e": np.array([8], np.int32)},
            lambda e: np.arange(1, 8, 2),
        ),
        Case(
            "one_hot", _calls("one_hot", one_hot_vector_size=4, axis=0), {"indices": whole(3, low=0, high=4)}, _one_hot
        ),
    ]


def _one_hot(indices: Array) -> Array:
    return np.eye(4, dtype=np.int32)[indices].T
