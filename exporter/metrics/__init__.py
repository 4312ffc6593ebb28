"""Fidelity, latency and size of a state on a target, and gates on them."""
