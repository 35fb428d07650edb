"""The generator on a tiny random model: batches, chunks and limits change nothing about a sequence's tokens."""

import pytest
import torch

from pagoda import PagodaError, Sampling
from pagoda.engine import generate
from pagoda.engine.generate import Generator
from pagoda.models.registry import from_hf_config

GREEDY = Sampling(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model():
    hf = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 200,
    }
    model = from_hf_config(hf)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


def run(model, prompts, options=GREEDY):
    tokens = [[] for _ in prompts]
    for index, token in Generator(model, prompts, [options] * len(prompts)):
        tokens[index].append(token)
    return tokens


@torch.inference_mode()
def recompute(model, prompt, n):
    """Greedy tokens without a cache: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


PROMPTS = [[5, 6, 7], list(range(1, 90)), [11] * 64, [3]]


def test_cached_tokens_equal_recomputed_ones(model):
    assert run(model, PROMPTS[:2]) == [recompute(model, p, 12) for p in PROMPTS[:2]]


def test_a_batch_gives_each_prompt_its_own_tokens(model):
    assert run(model, PROMPTS) == [run(model, [p])[0] for p in PROMPTS]


def test_prefill_in_chunks_changes_nothing(model, monkeypatch):
    whole = run(model, PROMPTS)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 10)
    assert run(model, PROMPTS) == whole


def test_generation_ends_at_the_context(model):
    assert len(run(model, [list(range(1, 90)) * 2], Sampling(temperature=0, max_new_tokens=500))[0]) == 200 - 178


def test_stopped_sequences_leave_the_batch(model):
    alone = run(model, [PROMPTS[1]])[0]
    generator = Generator(model, PROMPTS[:2], [GREEDY] * 2)
    rest = []
    for index, token in generator:
        if index == 0:
            generator.stop(0)
        else:
            rest.append(token)
    assert rest == alone
    assert generator.timing.decode_tokens == 11


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1] * 200, "200 tokens and the model's context is 200"),
        ([97], "token 97 .*vocabulary"),
        ([3, -1], "token -1 "),
    ],
)
def test_impossible_prompts_are_refused(model, prompt, message):
    with pytest.raises(PagodaError, match=message):
        Generator(model, [prompt], [GREEDY])
    with pytest.raises(PagodaError, match="no prompt"):
        Generator(model, [], [])


def test_an_interrupted_prefill_has_a_summary():
    assert generate.Timing(prefill_tokens=2048).summary() == "[]"


def test_embeddings_and_ids_are_the_same_input(model):
    ids = torch.randint(0, 97, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(model(model.embed(ids)), model(ids))


def scaled(rope):
    """A model whose rotary angles depend on the length of the text, trained to 16 tokens."""
    hf = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 100,
        "rope_parameters": {"rope_theta": 100.0, "original_max_position_embeddings": 16, **rope},
        "initializer_range": 0.3,
    }
    model = from_hf_config(hf)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [2.0, 3.0, 4.0, 8.0]}


def test_longrope_computes_a_sequence_again_when_it_outgrows_the_original_context(monkeypatch):
    model = scaled(LONGROPE)
    prompts = [[5, 6, 7], list(range(1, 15)), [11] * 16, list(range(30, 60))]
    expected = [recompute(model, p, 20) for p in prompts]
    options = Sampling(temperature=0, max_new_tokens=20)
    assert run(model, prompts, options) == expected
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 10)
    assert run(model, prompts, options) == expected


def test_dynamic_scaling_does_not_see_the_chunks_of_prefill(monkeypatch):
    model = scaled({"rope_type": "dynamic", "factor": 2.0})
    model.rope.block_size = 16
    whole = run(model, PROMPTS)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 10)
    assert run(model, PROMPTS) == whole
