"""What several test files share."""

import pytest
import torch


@pytest.fixture(scope="session")
def default_model():
    """Path of the default model's GGUF file; downloaded once into the cache, like every download."""
    from pagoda.models.download import download

    return download("smollm2-135m-instruct")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers in every run."""
    torch.manual_seed(0)
