"""What several test files share."""

import pytest


@pytest.fixture(scope="session")
def default_model():
    """Path of the default model's GGUF file; downloaded once into the cache, like every download."""
    from pagoda.models.download import download

    return download("smollm2-135m-instruct")
