"""What TensorRT's logs and inspector say, in the forms that versions 8, 10 and 11 and TensorRT-RTX have."""

from __future__ import annotations

import json

import pytest

from targets.trt_told import layers_of_inspector, layers_of_log, runs_sparse, skipped_for_memory, sparse_of_log

TEN = [
    "(Sparsity) Found 12 layer(s) eligible to use sparse tactics: a, b",
    "(Sparsity) Chose 3 layer(s) using sparse tactics: a",
    "(Sparsity) Found 14 layer(s) eligible to use sparse tactics: a, b",
    "(Sparsity) Chose 5 layer(s) using sparse tactics: a",
]
EIGHT = [
    "(Sparsity) Layers eligible for sparse math: conv_in, conv_out",
    "(Sparsity) TRT inference plan picked sparse implementation for layers:",
]
LISTED = """Layers:
Name: mid.conv1/Conv_myl0_7, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [32,8,8,8], \
Strides: [512,1,64,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], \
Constants: [ { Name: w, Dimensions: [64,8,3,3], Datatype: Int8, Format: (NHWC) Channel major format }], \
Outputs: [ { Name: y, Dimensions: [32,64,8,8], Datatype: Float, Format: (NHWC) Channel major format }], \
TacticName: __myelin_CASK_STUB, StreamId: 0, \
Metadata: [ONNX Layer: mid.conv1/Conv][ONNX Layer: mid.conv1.weight/DequantizeLinear]
Name: __myl_Silu_myl0_8, LayerType: kgen, \
Inputs: [ { Name: y, Dimensions: [32,64,8,8], Datatype: Float, Format: (NHWC) Channel major format }], \
Constants: [], \
Outputs: [ { Name: z, Dimensions: [32,64,8,8], Datatype: Half, Format: (NHWC) Channel major format }], \
TacticName: __myl_Silu_0xc658, StreamId: 0, Metadata: [ONNX Layer: act/Mul]
Name: sample, Dimensions: [32,8,8,8]"""
INSPECTED = {
    "Layers": [
        {
            "Name": "ff.net.2/MatMul_myl0_3",
            "LayerType": "gemm",
            "Inputs": [{"Name": "a", "Dimensions": [2, 8], "Format/Datatype": "Row major linear FP16 format"}],
            "Outputs": [{"Name": "b", "Dimensions": [2, 8], "Format/Datatype": "Row major linear FP32"}],
            "TacticName": "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64",
            "Metadata": "[ONNX Layer: ff.net.2/MatMul]",
        },
        {
            "Name": "conv_out",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "c", "Format": "Channel major", "DataType": "BFloat16"}],
            "Outputs": [{"Name": "d", "Format": "Channel major", "DataType": "Float"}],
            "TacticName": "sm80_xmma_fprop_implicit_gemm_bf16bf16",
        },
    ],
    "I/O Tensors": [],
}


def test_of_several_selections_the_last_is_the_engines() -> None:
    found = sparse_of_log(TEN)
    assert (found.eligible, found.chosen) == (14, 5)


def test_names_are_counted_where_no_number_is_told() -> None:
    found = sparse_of_log(["\n".join(EIGHT)])
    assert (found.eligible, found.chosen) == (2, 0)


@pytest.mark.parametrize("log", [[], ["Engine generation completed in 11.1 seconds."], TEN[:1]])
def test_silence_is_unknown_and_not_zero(log: list[str]) -> None:
    found = sparse_of_log(log)
    assert found.chosen is None
    assert found.eligible == (12 if log == TEN[:1] else None)


def test_kernels_that_were_not_tried_for_want_of_memory_are_found() -> None:
    lines = [
        "Skipping tactic 0x1f due to insufficient memory on requested size of 536870912 detected for tactic 0x1f.",
        "Total Weights Memory: 52131968 bytes",
        "Skipped printing memory information for 0 layers with 0 memory size",
    ]
    assert skipped_for_memory(lines) == lines[:1]


def test_layers_of_a_builders_log_say_what_they_compute_in() -> None:
    convolution, silu = layers_of_log(["something else", LISTED], "8.6")
    assert (convolution.name, convolution.type, convolution.precision) == ("mid.conv1/Conv_myl0_7", "correlation", "i8")
    assert convolution.origin == "mid.conv1/Conv,mid.conv1.weight/DequantizeLinear"
    assert (silu.type, silu.precision, silu.kernel) == ("kgen", "f16", "__myl_Silu_0xc658")
    assert layers_of_log(["no list"], "8.6") == ()


def test_layers_of_the_inspector_in_both_forms() -> None:
    product, convolution = layers_of_inspector(json.dumps(INSPECTED), "A100")
    assert (product.precision, product.origin, product.device) == ("f16", "ff.net.2/MatMul", "A100")
    assert convolution.precision == "bf16"
    assert [runs_sparse(layer) for layer in (product, convolution)] == [True, False]


def test_an_engine_without_details_has_names_and_nothing_else() -> None:
    (layer,) = layers_of_inspector('{"Layers": ["conv_in + relu"]}', "A100")
    assert (layer.name, layer.precision, layer.type) == ("conv_in + relu", "unknown", "unknown")
    assert runs_sparse(layer) is None
    with pytest.raises(ValueError, match="no list of layers"):
        layers_of_inspector("[]", "A100")


def test_a_placeholder_for_a_kernel_does_not_say_that_it_is_dense() -> None:
    assert [runs_sparse(layer) for layer in layers_of_log([LISTED], "8.6")] == [None, None]
