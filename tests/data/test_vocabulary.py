"""Vocabularies: trained ones open in transformers, extended models start as the paper says."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from tiny import make

from pagoda.cli import main
from pagoda.common import PagodaError
from pagoda.data.tokenizer import load_tokenizer
from pagoda.data.vocabulary import extend, merge, train_tokenizer

ENGLISH = """the pagoda stands over a garden where monks walk slowly under old stone roofs while rain falls from hanging
eaves into deep green ponds and lanterns glow beside wooden bridges until morning bells ring across quiet mountains"""
CHINESE = ["宝塔", "花园", "和尚", "在雨中", "走过", "古老", "石头", "屋顶", "下面", "今天天气很好", "我们去散步"]


def texts(words, seed=0, space=" "):
    rng = random.Random(seed)
    return [space.join(rng.choices(words, k=rng.randint(3, 20))) + ".\n" for _ in range(300)]


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory):
    """By kind: an English tokenizer, and one with Chinese in it."""
    folder = tmp_path_factory.mktemp("vocabularies")
    for kind in ("bpe", "sentencepiece", "unigram"):
        train_tokenizer(iter(texts(ENGLISH.split())), folder / f"{kind}-old", kind, 310, ["<|user|>"])
        train_tokenizer(iter(texts(CHINESE, 1, "")), folder / f"{kind}-new", kind, 330, ["<|other|>"])
    return folder


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "unigram"])
def test_trained_vocabularies_open_in_transformers(vocabularies, kind):
    path = vocabularies / f"{kind}-new"
    ours, peer = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    assert ours.vocab_size == len(peer) == 330
    assert ours.eos_id == peer.eos_token_id is not None
    for text in [*texts(CHINESE, 2, "")[:5], "unseen: é 😀\n\ttab  <|other|>", ""]:
        ids = ours.encode(text)
        assert peer(text).input_ids == ids
        assert ours.decode(ids, skip_special_tokens=True).strip(" ") == text.replace("<|other|>", "").strip(" ")
    assert len(ours.encode("<|other|>", add_special_tokens=False)) == 1


def test_sentencepiece_itself_agrees(vocabularies):
    sentencepiece = pytest.importorskip("sentencepiece")
    for kind in ("sentencepiece", "unigram"):
        path = vocabularies / f"{kind}-new"
        peer, ours = sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model")), load_tokenizer(path)
        for text in texts(CHINESE, 3, "")[:20]:
            assert ours.encode(text, add_special_tokens=False) == peer.encode(text)


@pytest.fixture(scope="session")
def models(vocabularies, tmp_path_factory):
    """Tiny random models that wear the old vocabularies: an untied one, a tied one, one with a bias at the head and an
    embedding larger than its vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    for name, variation, n_rows in (("llama", "llama", 310), ("gpt2", "gpt2", 310), ("phi", "phi", 320)):
        for kind in ("bpe", "sentencepiece", "unigram"):
            model = make(variation)
            model.resize_token_embeddings(n_rows, mean_resizing=False)
            torch.manual_seed(1)
            with torch.no_grad():
                for weight in (*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()):
                    weight.normal_()
            model.save_pretrained(folder / f"{name}-{kind}")
            load_tokenizer(vocabularies / f"{kind}-old").save(folder / f"{name}-{kind}")
    return folder


def pieces_by_hand(old, spelling, kind):
    """The old pieces of a token, by transformers: of its text, or byte by byte where it is no text."""
    backend = old.backend_tokenizer
    return [token.id for token in backend.model.tokenize(spelling)] if kind != "bpe" else bpe_by_hand(old, spelling)


def bpe_by_hand(old, spelling):
    """Byte-level BPE as GPT-2's own code does it: the best-ranked pair first, until none is left."""
    model = json.loads(old.backend_tokenizer.to_str())["model"]
    ranks = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    word = list(spelling)
    while len(word) > 1:
        rank, i = min((ranks.get(pair, 10**9), i) for i, pair in enumerate(zip(word, word[1:])))
        if rank == 10**9:
            break
        word[i : i + 2] = [word[i] + word[i + 1]]
    return [model["vocab"][piece] for piece in word]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "unigram"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_new_rows_are_the_mean_of_the_old_pieces_rows(models, vocabularies, tmp_path, name, kind):
    n_new = extend(str(models / f"{name}-{kind}"), str(vocabularies / f"{kind}-new"), tmp_path / "out")
    assert n_new > 20
    old, new = (transformers.AutoTokenizer.from_pretrained(p) for p in (models / f"{name}-{kind}", tmp_path / "out"))
    before = transformers.AutoModelForCausalLM.from_pretrained(models / f"{name}-{kind}")
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(new) == len(old) + n_new == 310 + n_new
    assert after.config.vocab_size == max(len(new), before.config.vocab_size)

    tables = [(before.get_input_embeddings().weight, after.get_input_embeddings().weight)]
    tables.append((before.get_output_embeddings().weight, after.get_output_embeddings().weight))
    if name == "phi":
        tables.append((before.get_output_embeddings().bias, after.get_output_embeddings().bias))
    for id in range(len(new)):
        spelling = new.convert_ids_to_tokens(id)
        if id < 310:
            assert spelling == old.convert_ids_to_tokens(id)
        else:
            assert spelling in load_tokenizer(vocabularies / f"{kind}-new").backend.get_vocab()
        ids = [id] if id < 310 else pieces_by_hand(old, spelling, kind)
        for rows, grown in tables:
            expected = rows[ids].double().mean(0)
            torch.testing.assert_close(grown[id].double(), expected, atol=1e-6, rtol=1e-6)

    # Old text costs no more than before, the new language far less, and both come back as they were.
    for text in texts(ENGLISH.split(), 5)[:20]:
        assert len(new(text).input_ids) <= len(old(text).input_ids)
        assert new.decode(new(text).input_ids, skip_special_tokens=True).strip(" ") == text.strip(" ")
    chinese = texts(CHINESE, 5, "")[:20]
    assert np.sum([len(new(t).input_ids) for t in chinese]) < 0.6 * np.sum([len(old(t).input_ids) for t in chinese])
    assert [new.decode(new(t).input_ids, skip_special_tokens=True).strip(" ") for t in chinese] == chinese
    assert "<|other|>" not in new.get_vocab()
    assert new.convert_tokens_to_ids("<|user|>") == old.convert_tokens_to_ids("<|user|>")


def test_tokens_beside_the_vocabulary_keep_their_ids(vocabularies, tmp_path):
    """Special tokens that were added behind a model's vocabulary, as Llama 3 has them, stand before the new ones."""
    old, new = load_tokenizer(vocabularies / "bpe-old"), load_tokenizer(vocabularies / "bpe-new")
    old.backend.add_special_tokens(["<|late|>", "<|later|>"])
    merged = merge(old, new)
    merged.save(tmp_path / "out")
    for tokenizer in (merged, load_tokenizer(tmp_path / "out")):
        ids = [tokenizer.token_id(text) for text in ("<|late|>", "<|later|>")]
        assert ids == [310, 311]
        assert sorted(tokenizer.backend.get_vocab().values()) == list(range(tokenizer.vocab_size))
        assert tokenizer.encode("<|late|>") == [310]


def test_the_commands(vocabularies, models, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("".join(texts(CHINESE, 1, "")), encoding="utf-8")
    train = ["tokenizer", "train", str(tmp_path / "x.txt"), str(tmp_path / "tok"), "--vocab_size", "330"]
    assert main([*train, "--special_tokens", "<|a|>", "--special_tokens", "<|b|>"]) == 0
    assert set(load_tokenizer(tmp_path / "tok").special_tokens) == {"<|endoftext|>", "<|a|>", "<|b|>"}
    assert main(["tokenizer", "extend", str(models / "llama-bpe"), str(tmp_path / "tok"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "tok"), str(tmp_path / "out")]
    for args, words in {
        (*train,): "exists already",
        (*train[:3], str(tmp_path / "t"), "--vocab_size", "200"): "vocab_size must be at least 257",
        (*train[:3], str(tmp_path / "t"), "--vocab_size", "5000"): "tokens only: lower vocab_size",
        (*train[:3], str(tmp_path / "t"), "--kind", "sentencepiece"): "sentencepiece cannot make this vocabulary",
        (*train[:3], str(tmp_path / "t"), "--kind", "wordpiece"): "kind must be one of",
        (
            "tokenizer",
            "extend",
            str(models / "llama-bpe"),
            str(vocabularies / "unigram-new"),
            str(tmp_path / "t"),
        ): "is byte-level BPE, the new one unigram",
    }.items():
        assert main(list(args)) == 2
        assert words in (err := capsys.readouterr().err)
        assert err.count("\n") == 1
        assert not (tmp_path / "t").exists()


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(PagodaError, match="hold no text"):
        train_tokenizer(iter([]), tmp_path / "tok")
