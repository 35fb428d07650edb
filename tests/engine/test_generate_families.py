"""Every family through the engine: each cached token is the likeliest by one pass over the whole text."""

import pytest
import tiny
import torch

from pagoda import Sampling
from pagoda.models.registry import from_hf_config

# Angles that follow the length differ between a text and its beginning: test_engine.py looks at those scalings.
NAMES = [name for name in tiny.VARIATIONS if "dynamic" not in name and "longrope" not in name]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they give on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens_are_the_likeliest(name):
    model_type, options = tiny.VARIATIONS[name]
    model = from_hf_config({"model_type": model_type, **options})
    model.init_weights()
    tiny.randomize(model)
    model.requires_grad_(False)
    prompts = [[5, 6, 7], list(range(10, 25))]
    tokens = tiny.generate(model, prompts, Sampling(temperature=0, max_new_tokens=24))
    for prompt, new in zip(prompts, tokens):
        scores = model(torch.tensor(prompt + new))[len(prompt) - 1 : -1]
        chosen = scores[torch.arange(24), torch.tensor(new)]
        assert (chosen > scores.amax(-1) - 1e-4).all()  # of two that tie, either
