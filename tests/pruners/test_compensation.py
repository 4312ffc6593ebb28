"""Optimal brain surgeon by columns: against its closed form, solved by least squares without any of its tricks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from exporter.errors import ComponentFailed
from exporter.pruners import compensation
from exporter.pruners.compensation import compensated

TINY = 1e-12  # damping that leaves the closed form as it is


def case(outputs=3, columns=8, rows=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mixed
    weights = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    return weights, inputs, inputs.T @ inputs


def error(weights, changed, inputs):
    return float((inputs @ (weights - changed).T).square().sum())


def refitted(weights, mask, inputs):
    """The best weights with zeros where the mask has them: least squares, an output at a time."""
    best = torch.zeros_like(weights)
    for row in range(len(weights)):
        kept = mask[row].nonzero().flatten()
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept], inputs @ weights[row]).solution
    return best


def test_one_removed_weight_is_the_cheapest_and_the_rest_is_the_exact_solution():
    """One of the first m columns goes; everything right of it is free to make good, as least squares would."""
    weights, inputs, gram = case(outputs=1)
    found = compensated(weights, gram, 7 / 8, damping=TINY)
    (removed,) = (found[0] == 0).nonzero().flatten().tolist()
    costs = []
    for column in range(8):
        mask = torch.ones(1, 8, dtype=torch.bool)
        mask[0, :column] = True
        later = [i for i in range(8) if i > column]
        change = (
            torch.linalg.lstsq(inputs[:, later], inputs[:, column] * weights[0, column]).solution if later else None
        )
        best = weights.clone()
        best[0, column] = 0
        if later:
            best[0, later] += change
        costs.append((error(weights, best, inputs), best))
    cheapest = min(range(8), key=lambda column: costs[column][0])
    assert removed == cheapest
    torch.testing.assert_close(found, costs[removed][1], rtol=1e-6, atol=1e-8)


def test_a_removed_first_column_gives_the_solution_of_least_squares_over_all_others():
    weights, inputs, gram = case(outputs=2)
    weights[:, 0] *= 1e-3  # cheapest by far
    found = compensated(weights, gram, 7 / 8, damping=TINY)
    assert (found[:, 0] == 0).all()
    torch.testing.assert_close(found, refitted(weights, found != 0, inputs), rtol=1e-6, atol=1e-9)


def by_explicit_inverses(weights, gram, n, m):
    """The same algorithm without its factorization: an inverse of what is left at every column, a row at a time."""
    result = weights.numpy().copy()
    columns = result.shape[1]
    for row in result:
        for column in range(columns):
            left = np.linalg.inv(gram.numpy()[column:, column:])
            if column % m == 0:  # each further column's cost is with the columns before it gone
                costs = [row[i] ** 2 / np.linalg.inv(gram.numpy()[i:, i:])[0, 0] for i in range(column, column + m)]
                removed = column + np.argsort(costs)[: m - n]
            if column in removed:
                row[column:] -= row[column] / left[0, 0] * left[0]
                row[column] = 0
    return torch.from_numpy(result)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_every_column_is_as_with_explicit_inverses(n, m):
    weights, _, gram = case(columns=16)
    found = compensated(weights, gram, (n, m), damping=TINY)
    torch.testing.assert_close(found, by_explicit_inverses(weights, gram, n, m), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), 0.5], ids=str)
def test_wide_layers_answer_closer_than_after_cutting_by_size_and_not_closer_than_refitted(pattern):
    for seed in range(3):
        weights, _, _ = case(outputs=16, columns=64, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(512, 4, generator=generator, dtype=torch.float64)
        inputs = torch.randn(512, 64, generator=generator, dtype=torch.float64)
        inputs += shared @ torch.randn(4, 64, generator=generator, dtype=torch.float64)
        found = compensated(weights, inputs.T @ inputs, pattern, damping=0.01)
        kept = found != 0
        if isinstance(pattern, float):
            assert int(kept.sum()) == 512
            by_size = weights.abs() >= weights.abs().flatten().sort(descending=True).values[511]
        else:
            n, m = pattern
            assert (kept.reshape(16, -1, m).sum(-1) == n).all()
            by_size = (weights.abs().reshape(16, -1, m).argsort(-1, descending=True).argsort(-1) < n).reshape(16, 64)
        best = error(weights, refitted(weights, kept, inputs), inputs)
        assert best <= error(weights, found, inputs) < 0.8 * error(weights, weights * by_size, inputs)


def test_the_block_size_changes_only_the_order_of_the_arithmetic(monkeypatch):
    weights, _, gram = case(outputs=5, columns=32, rows=128)
    results = []
    for block in (4, 16, 128):
        monkeypatch.setattr(compensation, "BLOCK", block)
        results.append(compensated(weights, gram, (2, 4), damping=0.01))
    for one, other in itertools.pairwise(results):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_independent_inputs_leave_nothing_to_make_good():
    """With a diagonal Hessian the removal is by size times input, and what stays does not move."""
    weights, _, _ = case(outputs=4, columns=16)
    power = torch.linspace(0.1, 5, 16, dtype=torch.float64)
    found = compensated(weights, torch.diag(power), (2, 4), damping=TINY)
    scores = (weights.square() * power).reshape(4, 4, 4)
    mask = (scores.argsort(-1, descending=True).argsort(-1) < 2).reshape(4, 16)
    torch.testing.assert_close(found, weights * mask)


def test_columns_without_input_go_first():
    weights, inputs, _ = case(outputs=3, columns=8)
    inputs[:, [1, 2, 4, 7]] = 0
    found = compensated(weights, inputs.T @ inputs, (2, 4), damping=0.01)
    assert (found[:, [1, 2, 4, 7]] == 0).all()
    torch.testing.assert_close(found[:, [0, 3, 5, 6]], weights[:, [0, 3, 5, 6]])


def test_a_hessian_without_an_inverse_is_refused():
    weights, _, gram = case()
    with pytest.raises(ComponentFailed, match=r"prune\.damping: the Hessian of 8 columns .* Raise damping"):
        compensated(weights, -gram, (2, 4), damping=TINY)
