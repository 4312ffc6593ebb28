"""Pipeline folders of real architectures with random weights: to size a device before the weights are there."""
