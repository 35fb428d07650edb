"""The chunked linear cross-entropy against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from pagoda.ops.loss import linear_cross_entropy

N, N_EMBD, VOCAB = 23, 12, 31


def inputs(dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, N_EMBD, generator=g), torch.randn(VOCAB, N_EMBD, generator=g)
    b = torch.randn(VOCAB, generator=g) if bias else None
    targets = torch.randint(0, VOCAB, (N,), generator=g)
    targets[[0, 7, 22]] = -100
    tensors = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, b)]
    return *tensors, targets


def exact(hidden, weight, bias, targets, softcap, upstream):
    """Losses and gradients by autograd in float64."""
    tensors = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*tensors)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    losses.backward(upstream.double())
    return losses.detach(), [None if x is None else x.grad for x in tensors]


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients_match_float64_autograd(bias, softcap, chunk):
    hidden, weight, b, targets = inputs(bias=bias)
    upstream = torch.randn(N, generator=torch.Generator().manual_seed(1))
    losses = linear_cross_entropy(hidden, weight, targets, b, softcap, chunk)
    losses.backward(upstream)
    expected, grads = exact(hidden, weight, b, targets, softcap, upstream)
    assert losses.dtype == torch.float32
    assert not losses[[0, 7, 22]].any()
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip((hidden, weight, b), grads):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs, atol=1e-5, rtol=1e-4)


def test_bfloat16_losses_are_float32_and_gradients_near():
    hidden, weight, b, targets = inputs(torch.bfloat16)
    upstream = torch.full((N,), 1 / N)
    losses = linear_cross_entropy(hidden, weight, targets, b, 0.0, 8)
    losses.backward(upstream)
    expected, grads = exact(hidden, weight, b, targets, 0.0, upstream)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, atol=0.05, rtol=0.02)
    for ours, theirs in zip((hidden, weight, b), grads):
        assert ours.grad.dtype == torch.bfloat16
        assert F.cosine_similarity(ours.grad.double().flatten(), theirs.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_take_no_gradient(frozen):
    *tensors, targets = inputs()
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(tensors[0], tensors[1], targets, tensors[2]).sum().backward()
    assert [x.grad is None for x in tensors] == [i == frozen for i in range(3)]


def test_no_tokens_and_nothing_scored():
    hidden, weight, b, targets = inputs()
    assert linear_cross_entropy(hidden[:0], weight, targets[:0], b).shape == (0,)
    losses = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), b)
    losses.sum().backward()
    assert not losses.any()
    assert not hidden.grad.any()


def test_only_a_chunk_of_logits_exists_at_a_time(monkeypatch):
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda h, *rest: rows.append(len(h)) or linear(h, *rest))
    hidden, weight, b, targets = inputs()
    linear_cross_entropy(hidden, weight, targets, b, 0.0, 8).sum().backward()
    assert max(rows) == 8
    assert sum(rows) == 2 * N  # once forward, once backward
