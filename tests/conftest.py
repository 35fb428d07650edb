"""What several test files share."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker; torch, which reads it, is not imported yet
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def default_model():
    """Path of the default model's GGUF file; downloaded once into the cache, like every download."""
    from pagoda.models.download import download

    return download("smollm2-135m-instruct")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def threads():
    """`threads(n)`: so many of them, until the test ends."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
