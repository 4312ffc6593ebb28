"""What a layer can become, and which layer becomes what: words and arithmetic on names, quick to import."""

from __future__ import annotations

from collections.abc import Mapping

FLOAT, INT8, FP8, INT8_WEIGHTS, INT4_WEIGHTS = "float", "int8", "fp8", "int8-weights", "int4-weights"
FP16, BF16 = "fp16", "bf16"
PALETTES: Mapping[str, int] = {"palette-2": 2, "palette-4": 4, "palette-6": 6, "palette-8": 8}
"""Schemes of weights as codes into a table of a few values, and the bits of a code."""
PALETTE_MIXED = "palette-mixed"
"""What a stage may ask for and no unit becomes: one of the palettes each."""
ROUNDING = (INT8, FP8)
"""Schemes that round activations too, and so need ranges."""
NARROW = (FP16, BF16)
"""Schemes that change what is computed in, norms and sums among it, and round nothing to integers."""
SCHEMES: Mapping[str, str] = {
    FLOAT: "as it is",
    FP16: "computed in 16 bits, but for what overflows on recorded inputs",
    BF16: "computed in bfloat16",
    INT8: "weights and activations in 8 bits",
    FP8: "weights and activations in 8-bit floating point (E4M3)",
    INT8_WEIGHTS: "weights in 8 bits, computed in floating point",
    INT4_WEIGHTS: "weights of linear layers in 4 bits by groups, of convolutions in 8; computed in floating point",
    **{name: f"weights as one of {2**bits} values of their own, for Core ML" for name, bits in PALETTES.items()},
}
"""What a unit can become."""
ASKED: Mapping[str, str] = {
    **SCHEMES,
    PALETTE_MIXED: "palettes of 8, 6, 4 or 2 bits, each unit's from what it costs, under size or limit_db; for Core ML",
}
"""What a stage can ask for, and `FLOAT`."""
SCORES, MIXED, PRODUCT = "scores", "mixed", "product"
"""Last part of the names of products: queries by keys; probabilities by values; any other."""
BITS: Mapping[str, float] = {
    FLOAT: 32,
    FP16: 16,
    BF16: 16,
    INT8: 8,
    FP8: 8,
    INT8_WEIGHTS: 8,
    INT4_WEIGHTS: 4,
    **PALETTES,
}
"""Of a weight."""


def unit_of(name: str, units: Mapping[str, object]) -> str | None:
    """Return the longest of some module paths that a site's name is or begins with; None where there is none.

    Args:
        name: of a site.
        units: by path; the empty path holds everything.
    """
    path = name
    while path not in units:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path
