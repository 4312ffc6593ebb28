"""Stages that quantize: which units in which scheme, the plan that says so, and the ranges that go with it."""
