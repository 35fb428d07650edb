"""Sampling against transformers' logits processors, and against the distributions it must draw from."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagoda import PagodaError, Sampling
from pagoda.engine.sampling import Sampler

VOCAB = 40


def draws(options: Sampling, logits: torch.Tensor, n: int = 4000) -> torch.Tensor:
    """Relative frequencies (VOCAB,) of n draws."""
    sampler = Sampler(options, [], VOCAB)
    return torch.bincount(torch.tensor([sampler(logits) for _ in range(n)]), minlength=VOCAB) / n


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.5, "top_p": 0.6}, [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.6)]),
        ({"temperature": 1.0, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"temperature": 1.0, "top_k": 8, "top_p": 0.7}, [TopKLogitsWarper(8), TopPLogitsWarper(0.7)]),
    ],
)
def test_draws_follow_transformers_distribution(options, warpers):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    expected = logits[None]
    for warper in warpers:
        expected = warper(None, expected)
    expected = expected.softmax(-1)[0]
    seen = draws(Sampling(seed=0, **options), logits)
    assert (seen[expected == 0] == 0).all()
    assert (seen - expected).abs().max() < 0.03


def test_repetition_penalty_equals_transformers():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    prompt = [3, 7, int(logits.argmax())]
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.7), prompt, VOCAB)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits[None].clone())[0]
    torch.testing.assert_close(sampler._penalize(logits), expected)


def test_presence_and_frequency_penalties_count_the_answer_only():
    logits = torch.zeros(VOCAB)
    logits[4], logits[9] = 2.0, 1.0
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.4, frequency_penalty=0.5), [4, 4, 4], VOCAB)
    assert sampler(logits) == 4  # the prompt does not count
    assert sampler(logits) == 4  # 2 - 0.5 - 0.4 is still above 1
    assert sampler(logits) == 9  # 2 - 1.0 - 0.4 is not


def test_same_seed_same_tokens_other_seed_others():
    logits = torch.zeros(VOCAB)
    runs = [[s(logits) for _ in range(20)] for s in (Sampler(Sampling(seed=n), [], VOCAB) for n in (5, 5, 6))]
    assert runs[0] == runs[1] != runs[2]


def test_temperature_zero_takes_the_largest():
    logits = torch.randn(VOCAB)
    assert Sampler(Sampling(temperature=0, top_k=3), [], VOCAB)(logits) == int(logits.argmax())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"max_new_tokens": 0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": float("inf")},
        {"seed": -1},
        {"stop": [""]},
    ],
)
def test_nonsense_options_are_refused_by_name(options):
    with pytest.raises(PagodaError, match=next(iter(options))):
        Sampling(**options)
