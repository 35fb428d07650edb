"""A tiny random model behind a real engine and a real server."""

import json

import pytest
import tiny
from standin import TEMPLATE, serving

from pagoda.data.vocabulary import byte_tokenizer
from pagoda.engine.async_engine import AsyncEngine
from pagoda.engine.options import EngineOptions, Weights
from pagoda.serve.options import Serving
from pagoda.serve.start import build


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A Hugging Face directory: two layers, a token per byte, a chat template with tools."""
    import transformers

    folder = tmp_path_factory.mktemp("served") / "tiny-model"
    config = transformers.LlamaConfig(**{**tiny.KV, "vocab_size": 257, "max_position_embeddings": 512})
    model = transformers.LlamaForCausalLM(config)
    tiny.randomize(model)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 256, "bos_token_id": None}))
    return folder


@pytest.fixture(scope="session")
def make_engine(model_dir):
    def make(path=model_dir, adapters=(), **options):
        options = EngineOptions(**{"kv_memory": 0.02, **options})
        return AsyncEngine(build(str(path), Serving(adapters=list(adapters)), options, Weights(device="cpu")))

    return make


@pytest.fixture(scope="module")
def tiny_server(make_engine):
    """One server for the tests of a file."""
    with serving(make_engine()) as running:
        yield running
