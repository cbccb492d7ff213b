"""The tree gate: hand-made trees, its gradients, its sparsity and the mixture that it routes."""

import math

import pytest
import torch

from kernels.expert_dispatch import leaf_entropy, leaf_probabilities, route, tree_gate


def test_a_tree_by_hand():
    """Five experts: splits 0 to 3, children 2 i + 1 and 2 i + 2, expert e at node 4 + e."""
    logits = torch.tensor([0.0, 9.0, -9.0, 0.25], dtype=torch.float64)
    step = 0.5 + 1.5 * 0.25 - 2 * 0.25**3
    # node 1: 1/2, node 2: 1/2; node 1 -> node 3: 1/2, node 4 (expert 0): 0; node 2 -> nodes 5, 6 (experts 1, 2): 0, 1/2
    # node 3 -> nodes 7, 8 (experts 3, 4)
    expected = torch.tensor([0, 0, 0.5, 0.5 * step, 0.5 * (1 - step)], dtype=torch.float64)
    torch.testing.assert_close(leaf_probabilities(logits), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(leaf_probabilities(3 * logits, width=3.0), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("experts", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("trees", [1, 2, 3])
@pytest.mark.parametrize("leaves", [False, True], ids=["splits", "leaves"])
def test_weights_are_a_distribution_and_sparse_once_splits_saturate(experts, trees, leaves):
    splits = torch.randn(197, trees, experts - 1)
    logits = 30 * torch.randn(197, trees, experts) if leaves else None
    soft, hard = tree_gate(splits, logits), tree_gate(splits.sign(), logits)
    for weights in (soft, hard):
        assert weights.shape == (197, experts)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(197), rtol=0, atol=1e-5)
    assert ((hard > 0).sum(1) <= trees).all()
    routing = route(hard, softmax=False, experts_per_token=min(trees, experts))
    torch.testing.assert_close(routing.gates.sum(0), torch.ones(197), rtol=0, atol=1e-5)
    assert routing.probabilities is routing.scores


def test_gradients():
    splits, leaves = (torch.randn(3, 2, n, dtype=torch.float64).mul(0.2).requires_grad_() for n in (4, 5))
    assert torch.autograd.gradcheck(tree_gate, (splits, leaves))
    assert torch.autograd.gradcheck(lambda x: leaf_entropy(leaf_probabilities(x)), splits)
    assert torch.autograd.gradcheck(lambda x: tree_gate(x, width=2.0), splits)

    def gates(splits, leaves):
        return route(tree_gate(splits, leaves), softmax=False, experts_per_token=2).gates

    assert torch.autograd.gradcheck(gates, (splits, leaves))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_extreme_logits_give_finite_gradients(size):
    splits = torch.tensor([[[-size, 0.5]], [[size, -0.5]], [[0.0, size]]]).requires_grad_()
    leaves = torch.tensor([[[size, -size, 0]], [[-size, size, 1]], [[0, -size, size]]]).requires_grad_()
    weights = tree_gate(splits, leaves)
    loss = weights.square().sum() + leaf_entropy(leaf_probabilities(splits))
    assert torch.isfinite(loss)
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, (splits, leaves)))


def test_entropy_falls_to_zero_at_hard_splits():
    assert leaf_entropy(leaf_probabilities(torch.ones(4, 2, 3))) == 0
    even = leaf_entropy(leaf_probabilities(torch.zeros(4, 2, 3)))
    assert math.isclose(even, 2 * math.log(4), rel_tol=1e-6)
    assert leaf_entropy(torch.empty(0, 2, 4)) == 0


def test_narrow_dtypes_and_compilation():
    splits = torch.randn(9, 2, 3)
    assert tree_gate(splits.bfloat16()).dtype == torch.float32
    compiled = torch.compile(tree_gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(splits, torch.ones(9, 2, 4)), tree_gate(splits, torch.ones(9, 2, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tree_gate(torch.ones(3, 4)), r"split_logits has shape \(3, 4\) and leaf_logits None"),
        (lambda: tree_gate(torch.ones(3, 0, 4)), r"split_logits has shape \(3, 0, 4\)"),
        (lambda: tree_gate(torch.ones(3, 2, 4), torch.ones(3, 2, 4)), r"leaf_logits \(3, 2, 4\)"),
        (lambda: tree_gate(torch.full((3, 2, 4), math.nan)), "split_logits has a NaN"),
        (lambda: tree_gate(torch.ones(3, 2, 1), torch.full((3, 2, 2), math.inf)), "leaf_logits has a number that"),
        (lambda: leaf_probabilities(torch.ones(3), width=0.0), "width is 0.0; it must be positive and finite"),
        (lambda: leaf_probabilities(torch.ones(3).long()), "split_logits has shape .* dtype torch.int64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
