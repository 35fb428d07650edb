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
from pagoda.engine.sampling import Chooser, choose, log_probabilities

VOCAB = 40


def draws(options: dict, logits: torch.Tensor, n: int = 6000) -> torch.Tensor:
    """Relative frequencies (VOCAB,) of n draws, in one step and each with a seed of its own."""
    choosers = [Chooser(Sampling(seed=i, **options), [], VOCAB) for i in range(n)]
    return torch.bincount(torch.tensor(choose(logits.expand(n, VOCAB), choosers)), minlength=VOCAB) / n


def one(chooser: Chooser, logits: torch.Tensor) -> int:
    return choose(logits[None], [chooser])[0]


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
    seen = draws(options, logits)
    assert (seen[expected == 0] == 0).all()
    assert (seen - expected).abs().max() < 0.03


def test_repetition_penalty_equals_transformers():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    prompt = [3, 7, int(logits.argmax())]
    chooser = Chooser(Sampling(temperature=0, repetition_penalty=1.7), prompt, VOCAB)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits[None].clone())[0]
    chooser.adjust(logits)
    torch.testing.assert_close(logits, expected)


def test_presence_and_frequency_penalties_count_the_answer_only():
    logits = torch.zeros(VOCAB)
    logits[4], logits[9] = 2.0, 1.0
    chooser = Chooser(Sampling(temperature=0, presence_penalty=0.4, frequency_penalty=0.5), [4, 4, 4], VOCAB)
    assert one(chooser, logits) == 4  # the prompt does not count
    assert one(chooser, logits) == 4  # 2 - 0.5 - 0.4 is still above 1
    assert one(chooser, logits) == 9  # 2 - 1.0 - 0.4 is not


def test_same_seed_same_tokens_other_seed_others():
    logits = torch.zeros(VOCAB)
    runs = [[one(c, logits) for _ in range(20)] for c in (Chooser(Sampling(seed=n), [], VOCAB) for n in (5, 5, 6))]
    assert runs[0] == runs[1] != runs[2]


def test_a_row_is_drawn_alike_alone_and_among_others():
    kinds = [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0}, {"top_k": 9, "top_p": 0.4}]
    kinds += [{"logit_bias": {3: 5.0}}, {"frequency_penalty": 1.0}]
    logits = torch.randn(400, VOCAB, generator=torch.Generator().manual_seed(3))

    def choosers():
        return [Chooser(Sampling(seed=i, **{"temperature": 1.0, **kinds[i % 8]}), [], VOCAB) for i in range(400)]

    assert choose(logits, choosers()) == [one(c, row) for c, row in zip(choosers(), logits)]


def test_temperature_zero_takes_the_largest():
    logits = torch.randn(VOCAB)
    assert one(Chooser(Sampling(temperature=0, top_k=3), [], VOCAB), logits) == int(logits.argmax())


def test_nothing_improbable_is_drawn_at_the_edges():
    logits = torch.full((VOCAB,), float("-inf"))
    logits[[4, 20]] = 0.0
    for chance in (0.0, 1 - 2**-53):
        chooser = Chooser(Sampling(temperature=1.0), [], VOCAB)
        chooser.random.random = lambda chance=chance: chance
        assert one(chooser, logits) == (20 if chance else 4)


def test_log_probabilities():
    logits = torch.randn(3, VOCAB)
    expected = logits.double().log_softmax(-1)
    for i, told in enumerate(log_probabilities(logits, [5, 6, 7], [0, 3, 1])):
        assert told.token == 5 + i
        assert abs(told.logprob - expected[i, 5 + i]) < 1e-5
        assert [token for token, _ in told.top] == expected[i].topk([0, 3, 1][i]).indices.tolist()


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
        {"n": 0},
        {"n": 3, "best_of": 2},
        {"logprobs": 100},
        {"beam_width": 1, "n": 2},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"logit_bias": {1: float("nan")}},
    ],
)
def test_nonsense_options_are_refused_by_name(options):
    with pytest.raises(PagodaError, match=[*options][-1] if "best_of" in options else next(iter(options))):
        Sampling(**options)
