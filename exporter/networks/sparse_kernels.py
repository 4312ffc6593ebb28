"""Which shapes a sparse kernel takes, and what it could gain: one rule for pruners and for the report of a graph.

Sources: inputs in multiples of 16 and outputs in multiples of 8, the rule of NVIDIA's ASP and ModelOpt; what one sparse
instruction takes, PTX's mma.sp: m16n8k16 of four-byte numbers, m16n8k32 of two, m16n8k64 of one. A shape that passes
can be multiplied sparsely, no more. Whether that is faster is another matter: TensorRT's maintainers found sparse
convolutions faster where inputs and outputs are 256 or more, the more so with kernels of 3x3 (NVIDIA/TensorRT issues
4065 and 3849), and gains of a whole network of 15 % or less (issue 2310).
"""

from __future__ import annotations

PATTERN = (2, 4)
"""The pattern that sparse kernels take."""
IMPLYING = ((1, 2), (1, 4), PATTERN)
"""Patterns whose zeros have it too."""
INPUTS_IN, OUTPUTS_IN = 16, 8
LEAST = 16
"""Fewest inputs and outputs of any sparse instruction."""
WIDE = 256
"""Inputs and outputs from which on gains were seen."""

_DEPTH = {1: 64, 2: 32, 4: LEAST}
"""Bytes of a number -> inputs that one sparse instruction takes."""
_ROWS = LEAST
"""Outputs that it takes."""


def unfit(inputs: int, outputs: int, *, group: int = PATTERN[1], size: int = 4) -> str:
    """Return why no sparse kernel takes a weight of this shape; empty where one does.

    Args:
        inputs: of a linear layer or a convolution.
        outputs: likewise.
        group: m of the pattern; of one that is no divisor of 16, for which there are no kernels, the multiple to keep.
        size: bytes of a number; a pruner, which does not know what its weights will be rounded to, leaves it at 4.
    """
    multiple = INPUTS_IN if INPUTS_IN % group == 0 else group
    if inputs % multiple:
        return f"{inputs} inputs, no multiple of {multiple} as sparse kernels need"
    if outputs % OUTPUTS_IN:
        return f"{outputs} outputs, no multiple of {OUTPUTS_IN} as sparse kernels need"
    depth = _DEPTH.get(size, _DEPTH[2])
    if inputs < depth or outputs < _ROWS:
        return f"smaller than the {depth} inputs and {_ROWS} outputs of one sparse instruction"
    return ""


def bound(share: float) -> str:
    """Return what sparse kernels could gain at most, in words.

    Args:
        share: of the multiplications, that they could take; the rest stays as slow as it is.
    """
    return (
        f"{1 / (1 - share / 2):.2f} times as fast at the very most, if sparse units multiplied twice as fast and "
        "nothing else took time. Measure it on the device."
    )
