"""Weights, or weights and activations, as small integers: symmetric, so that zeros stay zeros.

Ranges of activations are fitted on recorded calls of the dense pipeline, on prompts of their own. Linear layers' inputs
are evened out against their weights (SmoothQuant, arXiv 2211.10438, with a factor in front of the rounding instead of
one folded into the norm before it); every range is the one, of a few fractions of the largest magnitude, whose error
relative to the value's power is smallest on average over calls, so that quiet steps count as much as loud ones; what
rounding the weights adds to the mean is taken from the biases (arXiv 1906.04721, section 4.2). Weights have a scale per
output channel, or per group of inputs in 4 bits.

One graph with QuantizeLinear and DequantizeLinear serves every runtime. Its state holds the parent's weights, the plan
(`quantization.json`, and `quantization.txt` to read and edit) and the ranges. With `limit_db` the plan is made by
measurement: the error of the answers with each unit alone in integers, the milliseconds of each unit from the target's
own profile in floats and in integers, an exact knapsack, and the whole of it asked again.

Palettes are for Core ML: weights alone, each as a code into a table of a few values, found by one-dimensional k-means
and exact in 16 bits. In the graph they are floats of few values, so that every runtime can answer for the state. Mixed
plans know what each unit costs at 8, 6, 4 and 2 bits, and choose one of them, or floats, for each by a knapsack.
"""
