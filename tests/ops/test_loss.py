"""The chunked linear cross-entropy against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from pagoda.ops import cpu
from pagoda.ops import loss as loss_file
from pagoda.ops.formats import pack
from pagoda.ops.loss import linear_cross_entropy

N, N_EMBD, VOCAB = 23, 12, 31


@pytest.fixture(params=[*(cpu.available() or []), "reference"], autouse=True)
def path(request, monkeypatch):
    """One kernel variant after the other, and the reference, which works in pieces of rows."""
    monkeypatch.setattr(cpu, "kernels", None if request.param == "reference" else cpu.load(request.param))
    monkeypatch.setattr(loss_file, "PIECE", 4)
    return request.param


def inputs(dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, N_EMBD, generator=g), torch.randn(VOCAB, N_EMBD, generator=g)
    b = torch.randn(VOCAB, generator=g) if bias else None
    targets = torch.randint(0, VOCAB, (N,), generator=g)
    targets[[0, 7, 22]] = -100
    tensors = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, b)]
    return *tensors, targets


def exact(hidden, weight, bias, targets, softcap, upstream, z_loss=0.0):
    """Losses and gradients by autograd in float64."""
    tensors = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*tensors)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    losses = losses + z_loss * logits.logsumexp(-1).square() * (targets != -100)
    losses.backward(upstream.double())
    return losses.detach(), [None if x is None else x.grad for x in tensors]


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_losses_and_gradients_match_float64_autograd(bias, softcap, chunk, uniform, z_loss):
    hidden, weight, b, targets = inputs(bias=bias)
    upstream = torch.randn(N, generator=torch.Generator().manual_seed(1))
    upstream = torch.full_like(upstream, 0.3) if uniform else upstream
    losses = linear_cross_entropy(hidden, weight, targets, b, softcap, z_loss, chunk)
    losses.backward(upstream)
    expected, grads = exact(hidden, weight, b, targets, softcap, upstream, z_loss)
    assert losses.dtype == torch.float32
    assert not losses[[0, 7, 22]].any()
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip((hidden, weight, b), grads):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs, atol=1e-5, rtol=1e-4)


def test_bfloat16_losses_are_float32_and_gradients_near():
    hidden, weight, b, targets = inputs(torch.bfloat16)
    upstream = torch.full((N,), 1 / N)
    losses = linear_cross_entropy(hidden, weight, targets, b, chunk=8)
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


@pytest.mark.parametrize("target", [VOCAB, VOCAB + 5, -1, -101, 2**40])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    hidden, weight, bias, targets = inputs()
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets, bias)


def test_targets_of_32_bits():
    hidden, weight, bias, targets = inputs()
    losses = linear_cross_entropy(hidden, weight, targets, bias)
    assert torch.equal(linear_cross_entropy(hidden, weight, targets.int(), bias), losses)


def test_only_a_chunk_of_logits_exists_at_a_time(monkeypatch):
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda h, *rest: rows.append(len(h)) or linear(h, *rest))
    hidden, weight, b, targets = inputs()
    linear_cross_entropy(hidden, weight, targets, b, chunk=8).sum().backward()
    assert max(rows) == 8
    assert sum(rows) == N  # and once: the gradients are made with them


def test_without_gradients_the_losses_are_the_same():
    hidden, weight, b, targets = inputs()
    losses = linear_cross_entropy(hidden, weight, targets, b, 3.0, 0.1, 8)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, b, 3.0, 0.1, 8), losses.detach())


def test_the_way_back_may_be_gone_twice():
    hidden, weight, b, targets = inputs()
    total = linear_cross_entropy(hidden, weight, targets, b).sum()
    total.backward(retain_graph=True)
    once = [x.grad.clone() for x in (hidden, weight, b)]
    (3 * total).backward()
    for x, first in zip((hidden, weight, b), once):
        torch.testing.assert_close(x.grad, 4 * first)


def test_a_packed_head_passes_the_gradient_on():
    hidden, weight, b, targets = inputs()
    packed = pack(weight, "float32")
    linear_cross_entropy(hidden, packed, targets, b).sum().backward()
    _, (expected, _, expected_b) = exact(hidden, weight, b, targets, 0.0, torch.ones(N))
    torch.testing.assert_close(hidden.grad.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b.grad.double(), expected_b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [8, 1024])
def test_the_gradient_of_a_bfloat16_head_is_rounded_like_a_number_not_like_a_sum(chunk):
    """Two roundings of a result (and the roundings of logits and probabilities), but none for each chunk."""
    g = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 64, generator=g).bfloat16().requires_grad_() for n in (200, 50))
    targets = torch.randint(0, 50, (200,), generator=g)
    linear_cross_entropy(hidden, weight, targets, chunk=chunk).mean().backward()
    _, (expected, expected_weight, _) = exact(hidden, weight, None, targets, 0.0, torch.full((200,), 1 / 200))
    for ours, theirs in ((hidden.grad, expected), (weight.grad, expected_weight)):
        assert (ours.double() - theirs).norm() / theirs.norm() < 0.006


def test_compiled_it_gives_the_same():
    results = []
    for function in (linear_cross_entropy, torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)):
        hidden, weight, b, targets = inputs()
        losses = function(hidden, weight, targets, b, 3.0, 0.1, 8)
        losses.mean().backward()
        results.append([losses.detach(), hidden.grad, weight.grad, b.grad])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
