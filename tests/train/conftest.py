"""A tiny model that a run made, with a tokenizer: what finetuning starts from."""

import json

import pytest
from helpers import MODEL, write_text

from pagoda.cli import main


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Prepared tokens of a small text, by the bytes tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    text = write_text(folder / "text.txt")
    separator = ["--document_separator", "\\n\\n", "--val_fraction", "0.1", "--workers", "1"]
    assert main(["prepare", str(text), str(folder / "tokens"), "--tokenizer", "bytes", *separator]) == 0
    return folder / "tokens"


@pytest.fixture(scope="session")
def base(data, tmp_path_factory):
    """The run of a tiny model on them."""
    out = tmp_path_factory.mktemp("base")
    small = ["--model_name", "SmolLM2-135M", "--model_overrides", MODEL, "--train.precision", "float32"]
    shape = ["--train.seq_len", "64", "--train.micro_batch_size", "4", "--train.max_steps", "20", "--train.lr", "1e-2"]
    assert main(["pretrain", *small, *shape, "--data", str(data), "--out_dir", str(out), "--device", "cpu"]) == 0
    return out


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Instructions to swap two words."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["cat", "dog", "house", "old", "small", "near", "ran", "away"]
    told = [{"prompt": f"say {a} and {b}", "completion": f"{b} {a}"} for a in words for b in words]
    file.write_text("\n".join(map(json.dumps, told)))
    return file
