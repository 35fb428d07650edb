"""Making vocabularies: of characters or bytes, trained on text (BPE, SentencePiece), or a model's own with more tokens.

Extending follows Chinese-LLaMA (Cui et al. 2023): what a new vocabulary has and the old one has not is appended to it,
and each new row of the embedding and of the head starts as the mean of the rows of the old pieces that the token was
written with until then.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from pagoda.common import PagodaError, one_of, optional, replacing
from pagoda.data.tokenizer import PRE_TOKENIZERS, Tokenizer, bpe_merges, load_tokenizer
from pagoda.models.download import resolve

if TYPE_CHECKING:
    from pagoda.models.gpt import GPT

END = "<|endoftext|>"
KINDS = ("bpe", "sentencepiece", "unigram")
MAX_LINE = 1 << 14  # bytes: SentencePiece trains on lines and leaves longer ones out
MAX_LINES = 5_000_000  # a random choice of so many is enough for it


def find_tokenizer(name: str) -> Tokenizer:
    """What `--tokenizer` names: a model's (only its tokenizer is fetched), a directory's, a tokenizer.json, `bytes`."""
    path = Path(name).expanduser()
    if not name:
        raise PagodaError("no tokenizer: give --tokenizer MODEL, or char or bytes for a small model of its own")
    if name == "bytes":
        return byte_tokenizer()
    if path.name == "tokenizer.json" and path.is_file():
        return load_tokenizer(path.parent)
    if path.is_dir() and any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return load_tokenizer(path)
    return load_tokenizer(resolve(name, weights=False))


def character_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """One token per character that occurs in the texts, in the order of their code points, and an end of text. Other
    characters are left out when a text is encoded."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise PagodaError("the sources hold no text")
    backend = Backend(BPE({character: id for id, character in enumerate(sorted(characters))}, []))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {"eos_token": END}, config={"clean_up_tokenization_spaces": False})


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes, each under its own value, and an end of text."""
    backend = Backend(BPE({character: byte for byte, character in enumerate(spelled_bytes())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {"eos_token": END}, config={"clean_up_tokenization_spaces": False})


def spelled_bytes() -> list[str]:
    """GPT-2's character for each byte: printable ones stand for themselves, the others are moved behind 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


# Training -----------------------------------------------------------------------------------------


def train_tokenizer(
    texts: Iterator[str],
    out: str | os.PathLike,
    kind: str = "bpe",
    vocab_size: int = 32_000,
    special_tokens: Iterable[str] = (),
) -> Tokenizer:
    """Train a vocabulary of `vocab_size` tokens on texts and write it as a Hugging Face directory.

    kind            bpe (byte-level, text cut as for Llama 3), sentencepiece (its BPE with byte fallback, as for
                    Llama 2), or unigram (SentencePiece's other model, with byte fallback)
    special_tokens  besides `<|endoftext|>` (bpe) or `<unk>`, `<s>` and `</s>`
    Raises PagodaError for a vocab_size that the texts cannot fill, or that does not hold every byte.
    """
    one_of("kind", kind, KINDS)
    first = next(texts, None)
    if first is None:
        raise PagodaError("the sources hold no text")
    texts = chain([first], texts)
    smallest = 256 + len(special := list(dict.fromkeys(special_tokens))) + (1 if kind == "bpe" else 3)
    if vocab_size < smallest:
        raise PagodaError(f"vocab_size must be at least {smallest} (every byte, and the special tokens)")
    if Path(out).exists():
        raise PagodaError(f"{out} exists already: remove it or choose another place")
    with replacing(out) as temporary:
        if kind == "bpe":
            tokenizer = train_bpe(texts, vocab_size, [END, *special])
        else:
            temporary.mkdir()
            train_sentencepiece(texts, temporary, "bpe" if kind == "sentencepiece" else "unigram", vocab_size, special)
            tokenizer = load_tokenizer(temporary)
        if tokenizer.vocab_size < vocab_size:
            raise PagodaError(
                f"the text is enough for {tokenizer.vocab_size} tokens only: lower vocab_size or give more text"
            )
        tokenizer.save(temporary)
    return tokenizer


def train_bpe(texts: Iterator[str], vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    backend = Backend(BPE())
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["llama3"]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special_tokens,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    special = {"bos_token": END, "eos_token": END}
    return Tokenizer(backend, special, config={"clean_up_tokenization_spaces": False})


def train_sentencepiece(
    texts: Iterator[str], folder: Path, model_type: str, vocab_size: int, special: list[str]
) -> None:
    sentencepiece = optional("sentencepiece", "data")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            control_symbols=special,
            # As Llama's: nothing of the text is lost.
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=MAX_LINE,
            input_sentence_size=MAX_LINES,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2].partition(" or decrease")[0]
        raise PagodaError(f"sentencepiece cannot make this vocabulary ({reason})") from None
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


# Extending ----------------------------------------------------------------------------------------


def extend(model: str, new_tokenizer: str, out: str | os.PathLike) -> int:
    """Give a model the tokens of another vocabulary besides its own, write both as a Hugging Face directory, and
    return how many tokens are new. PagodaError if the two vocabularies are of different kinds."""
    from pagoda.models.loader import load, save

    path = resolve(model)
    old, new = load_tokenizer(path), find_tokenizer(new_tokenizer)
    merged = merge(old, new)
    gpt = load(path)
    resize(gpt, merged.vocab_size, old_pieces(old, merged))
    save(gpt, out, beside=merged.save)
    return merged.vocab_size - old.vocab_size


def merge(old: Tokenizer, new: Tokenizer) -> Tokenizer:
    """The old tokenizer with those of the new one's tokens that it has not, under ids behind its own; what is special
    in the new one stays out. Old tokens keep their ids and their merges come first."""
    parts, more = (json.loads(tokenizer.backend.to_str()) for tokenizer in (old, new))
    kinds = [describe(part) for part in (parts, more)]
    if kinds[0] not in KIND_OF:
        raise PagodaError(f"the model's vocabulary is {kinds[0]}; only {', '.join(KIND_OF)} can be extended")
    if kinds[0] != kinds[1]:
        raise PagodaError(
            f"the model's vocabulary is {kinds[0]}, the new one {kinds[1]}: train one of the same kind "
            f"(`pagoda tokenizer train --kind {KIND_OF[kinds[0]]}`)"
        )
    known = old.backend.get_vocab(with_added_tokens=True)
    special = new.special_tokens
    added = [text for text in vocabulary(more) if text not in known and text not in special]
    ids = {text: len(known) + i for i, text in enumerate(added)}
    # Old tokens that stood beside the model's own take their place in it: ids go on behind them.
    own = set(vocabulary(parts))
    beside = [text for text in sorted(known, key=known.get) if text not in own]
    model = parts["model"]
    if kinds[0] == "unigram":
        worst = min(score for _, score in model["vocab"])
        scores = dict(more["model"]["vocab"])
        model["vocab"] += [[text, worst] for text in beside] + [[text, scores[text]] for text in added]
    else:
        model["vocab"] |= {text: known[text] for text in beside} | ids
        model["merges"] += [list(pair) for pair in bpe_merges(model["vocab"], ids, longest_first=False)]
    backend = Backend.from_str(json.dumps(parts))
    return Tokenizer(backend, old.special, old.eos_ids, old.chat_template, old.config, old.generation)


KIND_OF = {"byte-level BPE": "bpe", "SentencePiece BPE": "sentencepiece", "unigram": "unigram"}


def vocabulary(parts: dict[str, Any]) -> list[str]:
    """The model's own tokens in the order of their ids."""
    vocab = parts["model"]["vocab"]
    return [text for text, _ in vocab] if isinstance(vocab, list) else sorted(vocab, key=vocab.get)


def describe(parts: dict[str, Any]) -> str:
    """What spelling the tokens of a tokenizer.json have."""
    kind = parts["model"]["type"]
    if kind != "BPE":
        return kind.lower()
    return "byte-level BPE" if '"ByteLevel"' in json.dumps(parts["decoder"]) else "SentencePiece BPE"


def old_pieces(old: Tokenizer, merged: Tokenizer) -> list[list[int]]:
    """The old ids that each new token was written with, in the order of the new ids."""
    texts = [merged.backend.id_to_token(id) for id in range(old.vocab_size, merged.vocab_size)]
    return [[token.id for token in old.backend.model.tokenize(text)] for text in texts]


def resize(model: GPT, vocab_size: int, pieces: list[list[int]]) -> None:
    """Rows for the last len(pieces) of `vocab_size` tokens, each the mean of the rows of its pieces, in the embedding
    and the head (weight and bias). An embedding that was padded beyond its vocabulary is used up first."""
    import torch
    from torch import nn

    from pagoda.models.layers import set_weight

    n_old = vocab_size - len(pieces)

    def grown(rows: torch.Tensor) -> nn.Parameter:
        new = torch.stack([rows[ids].float().mean(0) for ids in pieces]).to(rows.dtype)
        return nn.Parameter(torch.cat([rows[:n_old], new, rows[vocab_size:]]), requires_grad=rows.requires_grad)

    if pieces:
        model.config.vocab_size = max(vocab_size, len(model.embed.weight))
        for module, name in ((model.embed, "weight"), (model.head, "weight"), (model.head, "bias")):
            if getattr(module, name, None) is not None:
                set_weight(module, name, grown(getattr(module, name).detach()))
        model.tie()
