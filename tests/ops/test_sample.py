"""The draw of tokens: the kernel against the reference on random rows, and both at the edges."""

import pytest
import torch

from pagoda.ops import cpu
from pagoda.ops.sample import sample

KINDS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.1),
    (0.7, 3, 1.0, 0.0),
    (1.3, 0, 0.6, 0.0),
    (0.8, 40, 0.9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 0.95, 0.05),
    (50.0, 0, 0.99, 0.0),  # nearly flat: the nucleus is nearly everything
    (1.0, 10**6, 1.0, 0.0),
]


def rows(n: int, size: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, size, generator=g) * 3
    options = torch.tensor([KINDS[i % len(KINDS)] for i in range(n)])
    return scores, torch.cat([options, torch.rand(n, 1, generator=g)], 1)


@pytest.mark.parametrize("size", [1, 7, 97, 256, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_draws_what_the_reference_draws(kernels, monkeypatch, size, dtype):
    scores, options = rows(600, size)
    scores = scores.to(dtype)
    found = sample(scores, options)
    monkeypatch.setattr(cpu, "kernels", None)
    expected = sample(scores, options)
    same = found == expected
    # bf16 has ties, whose order within a nucleus is anybody's; float32 rounding may cross a border once in a while
    assert same.float().mean() > (0.997 if dtype == torch.float32 else 0.9)
    greedy = options[:, 0] == 0
    values = scores.float()
    assert torch.equal(values[greedy].gather(1, found[greedy, None])[:, 0], values[greedy].amax(-1))


def test_a_row_is_drawn_alike_alone_in_strides_and_on_any_number_of_threads(kernels, two_threads):
    scores, options = rows(300, 5000)
    wide = torch.zeros(300, 6000)
    wide[:, :5000] = scores
    together = sample(wide[:, :5000], options)
    torch.set_num_threads(1)
    alone = torch.cat([sample(s[None], o[None]) for s, o in zip(scores, options)])
    assert torch.equal(together, alone)


def test_what_is_impossible_is_never_drawn(kernels):
    scores = torch.full((6, 500), float("-inf"))
    scores[:, [4, 420]] = 0.0
    chances = [0.0, 0.49, 0.51, 1 - 2**-24, 0.0, 1 - 2**-24]
    options = torch.tensor([[1.0, 0 if i < 4 else 100, 1.0, 0.0, c] for i, c in enumerate(chances)])
    assert sample(scores, options).tolist() == [4, 4, 420, 420, 4, 420]


def test_extremes_end_in_a_token(kernels, monkeypatch):
    scores = torch.tensor([[1.0, 3.0, 2.0]] * 5 + [[float("nan"), 1.0, 2.0], [float("inf"), 1.0, 2.0]])
    scores = torch.cat([scores, torch.full((1, 3), float("-inf"))])
    options = torch.tensor(
        [
            [1e-40, 0, 1.0, 0, 0.5],  # the largest
            [1e30, 0, 1.0, 0, 0.5],
            [1.0, 0, 1e-9, 0, 0.9],  # the nucleus is one token
            [1.0, 1, 1.0, 0, 0.9],
            [1.0, 0, 1.0, 1.0, 0.9],  # nothing but the likeliest
            *[[1.0, 0, 0.9, 0, 0.5]] * 3,
        ]
    )
    tokens = sample(scores, options).tolist()
    assert tokens[0] == tokens[2] == tokens[3] == tokens[4] == 1
    assert all(0 <= t < 3 for t in tokens)
    monkeypatch.setattr(cpu, "kernels", None)
    assert all(0 <= t < 3 for t in sample(scores, options).tolist())


def test_frequencies_are_the_probabilities(kernels):
    n = 40_000
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)).expand(n, 50).contiguous()
    chance = torch.rand(n, 1, generator=torch.Generator().manual_seed(2))
    seen = sample(scores, torch.cat([torch.tensor([[0.8, 0.0, 1.0, 0.0]]).expand(n, 4), chance], 1))
    expected = (scores[0] / 0.8).softmax(-1)
    assert (torch.bincount(seen, minlength=50) / n - expected).abs().max() < 0.01
