"""Folds and simplifies a traced graph: the library's passes and rules, less what costs time and finds nothing.

The exporter's own choice tries every rule it knows on every node. One of them, which joins two slices to a split, looks
through the whole graph for each slice, which was half of the time for a U-Net of Stable Diffusion and found nothing,
since networks that split are traced as splits. Those for quantized, batch-normalized or padded layers have nothing to
do either in what this package exports.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

_ROUNDS = 2
_RULES = (
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
)


def simplify(model: ir.Model) -> None:
    """Fold constants, drop what does nothing, join what can be joined; in place.

    Args:
        model: straight from the exporter. Initializers without values are left alone.
    """
    passes.InlinePass()(model)
    rewrite = RewritePass(_RULES)
    for _ in range(_ROUNDS):
        folded = fold_constants_ir(model, onnx_shape_inference=True).modified
        rewritten = rewrite(model).modified
        passes.RemoveUnusedNodesPass()(model)
        if not folded and not rewritten:
            break
    for step in (
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        step(model)
