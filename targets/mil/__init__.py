"""An evaluator of saved Core ML ML Programs (``.mlpackage``) with torch, on any operating system.

Core ML itself predicts on Apple's systems only. This package reads what a converter *saved* and computes what the
program says, so that a package can be compared with the network it was made from, before anyone has a device.

What it is
    `package.read_package` reads the program: inputs, outputs, operations, constants; no weight is touched, nothing is
    evaluated, torch is not loaded. `evaluator.Evaluator` is a session as other targets open them: call it, ask it for
    `evidence`, `profile` it; `values` gives every operation's results in order. `evaluator.first_divergence` takes a
    sound and a suspected program with the same operations and names the first operation that does something else: each
    gets the values of the sound one, so nothing is carried along. `values` with 64-bit floats tells what the
    evaluator's own 32 bits add.

    The reader is our own, over the messages that the format defines; no loader of the converter takes part, so none of
    its mistakes is made twice. Weights are mapped from their file: a package in 32-bit floats costs no copy of them,
    16-bit ones are widened for the one operation that takes them. What depends on constants only (decompression above
    all) is computed at the first call, once, and kept in its declared type.

What it honours
    The types that the program declares: each operation computes in 32-bit floats on inputs that were rounded before,
    and its result is rounded to the declared type (to 16 bits, to integers). Declared shapes: a result of another shape
    is an error. Fixed, enumerated and open shapes. One function of several. Opsets of iOS 15 to 18; parameters that we
    do not know are refused by name, and so are operations, all of them at once, before anything runs: loops and
    branches, lists, recurrent layers, random numbers, ``affine``, ``resample``, ``crop_resize``,
    ``non_maximum_suppression``, ``classify`` and ``conv_quantized``. States, images, strings and pipelines as well.

Operations
    Elementwise, unary and binary, comparisons and logic, activations, ``select`` and ``cast``; all reductions,
    ``cumsum``, ``topk``, ``argsort``, ``non_zero``; ``linear``, ``matmul``, ``einsum``,
    ``scaled_dot_product_attention``, ``conv``, ``conv_transpose``, pools, batch, instance, layer, L2 and local response
    norms; everything that moves elements (reshapes, transposes, slices, gathers, scatters, joins, splits, pads, blocks,
    windows); nearest and linear resizing in all sampling modes; ``quantize``, ``dequantize`` and every ``constexpr_*``
    of iOS 16 to 18: affine, palettes (grouped, of vectors), sparse, in blocks, and chains of these. `kernels` has them.

How exact it is
    Every operation is tested against what its documentation says, in numpy, within 4e-6 of the largest element, and
    against coremltools' own values where it has any. Palettes and sparse weights are bit for bit what coremltools
    decompresses; scaled ones are rounded once where it rounds twice. On whole networks the evaluator's own part is
    1e-7 to 2e-6 of the largest output in 32 bits, as much as torch's. More between a package and torch is in the
    package. What to look at first: coremltools' pass ``common::fuse_elementwise_to_batchnorm`` turns the scale and
    shift of group norms into ``batch_norm`` with an epsilon of 1e-5, which makes each scale 5e-6 smaller (up to 3e-5 on
    whole networks); in 16 bits, squares in norms, and timesteps times frequencies.

What it does not model
    What a device does: accumulation in fewer bits, fusions that skip a rounding, another order of sums, which unit runs
    what. Time: its own says nothing about any device. Where the documentation leaves a choice, it takes the obvious
    one: quotients of integers lose their fraction, the odd element of ``same`` padding goes behind, equal elements
    keep their order. Agreement shows that the package says what torch computes under this reading of the format; it
    does not replace a run on a device.
"""
