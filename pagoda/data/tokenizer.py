"""Text to token ids and back, for every form that a vocabulary comes in.

`load_tokenizer` reads a Hugging Face directory (`tokenizer.json`; a SentencePiece `tokenizer.model`; GPT-2's
`vocab.json` and `merges.txt`) or the metadata of a GGUF file. All of them end as one `tokenizers.Tokenizer` inside a
`Tokenizer`, which knows the special tokens and the chat template, decodes a stream without ever showing half a
character, and saves itself as a Hugging Face directory.

A vocabulary that carries no `tokenizer.json` is rebuilt as transformers 5 rebuilds it, so that the ids are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram

from pagoda.common import PagodaError, read_json
from pagoda.data.chat_template import render

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A tokenizer with its special tokens.

    backend: the `tokenizers.Tokenizer`, its post-processor adding whatever the model wants around a text.
    special: the texts of `bos_token`, `eos_token`, `unk_token`, `pad_token`, those that exist.
    eos_ids: every id that ends a generation.
    chat_template: the Jinja source, or None.
    config, generation: the `tokenizer_config.json` and the `generation_config.json` to save.
    """

    def __init__(
        self,
        backend: Backend,
        special: dict[str, str],
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        config: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
    ):
        # Lengths are the caller's business; files that were saved while training tend to carry a limit.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = {name: special[name] for name in SPECIAL_NAMES if special.get(name) is not None}
        known = set(self.special_tokens)
        missing = [text for text in dict.fromkeys(self.special.values()) if text not in known]
        backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in missing])
        own = [self.eos_id] if self.eos_id is not None else []
        self.eos_ids = list(dict.fromkeys([*eos_ids, *own]))
        self.chat_template = chat_template
        self.config, self.generation = config or {}, generation or {}

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included. A model's embedding may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """The same for tokenizers with the same tokens under the same ids, whatever file they come from."""
        pairs = sorted(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[::-1])
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:32]

    @property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that are no text (`<|im_end|>`): text -> id."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    def token_id(self, token: str) -> int | None:
        """The id of one token's own spelling, None when the vocabulary has no such token."""
        return self.backend.token_to_id(token)

    def _special_id(self, name: str) -> int | None:
        return self.token_id(self.special[name]) if name in self.special else None

    @property
    def bos_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The one end token that the tokenizer itself names; generation stops at any of `eos_ids`."""
        return self._special_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._special_id("pad_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in it count as such. `add_special_tokens` puts around it what
        the model wants (usually a BOS or nothing); leave it off for a rendered chat, which has them already."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise PagodaError("the text is not valid Unicode (was it UTF-8?)") from None

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 come out as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, context: Iterable[int] = (), skip_special_tokens: bool = True) -> TokenStream:
        """A decoder for ids that come one at a time. With the prompt's ids as `context` the text continues the prompt
        (SentencePiece then keeps a leading space), without it the text is that of `decode`."""
        return TokenStream(self, context, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation as the model was trained on it; encode it with `add_special_tokens=False`.

        messages: `{"role": ..., "content": ...}` dicts. A model without a template raises PagodaError, and so does a
        conversation that the template refuses.
        """
        named = self.special | {"add_generation_prompt": add_generation_prompt, "tools": tools} | variables
        return render(self.chat_template, messages, **named)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` (chat template included) and `generation_config.json` (which
        names the tokens that end an answer) into a directory."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        # A class of its own in the original configuration would make transformers rebuild the tokenizer.
        config = self.config | self.special | {"tokenizer_class": "PreTrainedTokenizerFast"}
        for key in ("added_tokens_decoder", "auto_map"):  # tokenizer.json has the tokens; no code comes along
            config.pop(key, None)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        ids = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_ids, "pad_token_id": self.pad_id}
        generation = {name: id for name, id in ids.items() if id not in (None, [])} | self.generation
        for name, content in (("tokenizer_config.json", config), ("generation_config.json", generation)):
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


class TokenStream:
    """Incremental decoding. A token may be part of a character, and what a token reads as depends on its neighbours, so
    the text since the last whole piece is decoded again with each id, and its new part shown once it ends well."""

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int], skip_special_tokens: bool):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.ids = list(context)[-8:]  # enough neighbours for any decoder
        self.shown = len(self._decode(self.ids))  # characters of the text of `ids` that are out already
        self.settled = len(self.ids)  # ids that these characters come from

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, self.skip_special_tokens)

    def push(self, id: int) -> str:
        """Take one id, return the text that is certain now (often a word, sometimes nothing)."""
        self.ids.append(id)
        text = self._decode(self.ids)
        if len(text) <= self.shown or text.endswith("\ufffd"):  # nothing new, or the beginning of a character
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """The rest, at the end of the stream: bytes that never became a character come out as U+FFFD."""
        return self._emit(self._decode(self.ids))

    def _emit(self, text: str) -> str:
        piece = text[self.shown :]
        # Keep the ids of this piece as context for the next one, and forget those before.
        self.ids = self.ids[self.settled :]
        self.settled = len(self.ids)
        self.shown = len(self._decode(self.ids))
        return piece


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or a GGUF file. PagodaError when there is none or it is broken."""
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise PagodaError(f"{path} is no tokenizer: give a Hugging Face directory or a .gguf file")
        return _from_gguf(path)
    if not path.is_dir():
        raise PagodaError(f"no such file or directory: '{path}'")
    return _from_directory(path)


# Hugging Face directories ------------------------------------------------------------


def _from_directory(folder: Path) -> Tokenizer:
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json") | config
    special = {name: _token_text(special.get(name)) for name in SPECIAL_NAMES}
    if (folder / "tokenizer.json").is_file():
        try:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise PagodaError(f"cannot read {folder / 'tokenizer.json'} ({error}); download it again") from None
    elif (folder / "tokenizer.model").is_file():
        backend = _from_sentencepiece(folder / "tokenizer.model", config, special)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in merges if line and not line.startswith("#version")]
        backend = _byte_level(_read_json(folder / "vocab.json"), merges, "gpt-2")
        _surround(backend, special, config.get("add_bos_token", False), config.get("add_eos_token", False))
    else:
        raise PagodaError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
    # Tokens that were added beside the file, in the order of their ids.
    added = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    new = [token for _, token in added if backend.token_to_id(token["content"]) is None]
    backend.add_tokens(
        [AddedToken(token["content"], **{key: token.get(key, False) for key in fields}) for token in new]
    )

    generation = _read_json(folder / "generation_config.json")
    eos_ids = generation.get("eos_token_id")
    if eos_ids is None:
        eos_ids = _read_json(folder / "config.json").get("eos_token_id")
    eos_ids = [eos_ids] if isinstance(eos_ids, int) else eos_ids or []
    return Tokenizer(backend, special, eos_ids, _directory_template(folder, config), config, generation)


def _directory_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default", next(iter(named.values()), None))
    return template


def _token_text(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


# GGUF files ------------------------------------------------------------

# How text is cut before byte-level BPE, by `tokenizer.ggml.pre`. The expressions are those of the models' own
# tokenizer.json files; llama.cpp keeps the list of names (llama-vocab.cpp).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# None stands for GPT-2's, which `tokenizers` has built in. SmolLM's own tokenizer splits digits off first, which
# differs for two or more spaces before a digit only; transformers, reading a GGUF file, does not, and we follow it.
PRE_TOKENIZERS = dict.fromkeys(("default", "gpt-2", "smollm", "phi-2", "olmo", "mpt"), None)
PRE_TOKENIZERS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "dbrx"), _LLAMA3)
PRE_TOKENIZERS |= dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2)
PRE_TOKENIZERS |= {"tekken": _TEKKEN}
# A word that is a token as it stands is taken whole, even where no merges lead to it.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")

# tokenizer.ggml.token_type, and the piece types of SentencePiece: the same numbers.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_TURN_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"}


def _from_gguf(path: Path) -> Tokenizer:
    from pagoda.models.gguf import read_gguf

    gguf = read_gguf(path)
    meta = gguf.metadata
    kind, tokens = gguf.require("tokenizer.ggml.model"), gguf.require("tokenizer.ggml.tokens")
    types = meta.get("tokenizer.ggml.token_type", [])
    pre = meta.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        if pre not in PRE_TOKENIZERS:
            raise PagodaError(f"{path}: unknown pre-tokenizer {pre!r}; use the model's Hugging Face directory instead")
        vocab = dict(zip(tokens, range(len(tokens))))
        try:
            backend = _byte_level(vocab, gguf.require("tokenizer.ggml.merges"), pre)
        except Exception as error:  # tokenizers raises bare Exception
            raise PagodaError(f"{path}: broken vocabulary ({error}); convert the model again") from None
    elif kind in ("llama", "t5"):
        scores = gguf.require("tokenizer.ggml.scores")
        charsmap = bytes(byte & 255 for byte in meta.get("tokenizer.ggml.precompiled_charsmap", []))
        backend = _sentencepiece(
            list(zip(tokens, scores, types or [1] * len(tokens))),
            unigram=kind == "t5",
            by_score=True,
            charsmap=charsmap,
            squeeze=meta.get("tokenizer.ggml.remove_extra_whitespaces", False),
            prefix="first" if meta.get("tokenizer.ggml.add_space_prefix", True) else "never",
        )
    else:
        raise PagodaError(f"{path}: unsupported vocabulary {kind!r} (supported: gpt2, llama, t5)")
    _add_tokens(backend, zip(tokens, types))

    def token(name: str) -> str | None:
        id = meta.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[id] if id is not None and id < len(tokens) else None

    special = {"bos_token": token("bos"), "eos_token": token("eos"), "unk_token": token("unknown")}
    special["pad_token"] = token("padding")
    # Where the file does not say, llama.cpp adds a BOS for these.
    add_bos = meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or PRE_TOKENIZERS.get(pre) in (_LLAMA3, _TEKKEN))
    add_eos = meta.get("tokenizer.ggml.add_eos_token", kind == "t5")
    # the ends of text, of a turn, and of a message; where a file forgets those, llama.cpp knows them by their texts
    ends = [meta[key] for name in ("eos", "eot", "eom") if (key := f"tokenizer.ggml.{name}_token_id") in meta]
    ends += [id for id, (text, kind) in enumerate(zip(tokens, types)) if kind == _CONTROL and text in _TURN_ENDS]
    result = Tokenizer(
        backend,
        special,
        ends,
        meta.get("tokenizer.chat_template"),
        {"clean_up_tokenization_spaces": False},
    )
    _surround(backend, special, add_bos, add_eos)
    return result


def _byte_level(vocab: dict[str, int], merges: list[str], pre: str) -> Backend:
    """GPT-2's byte-level BPE, the text cut before it by PRE_TOKENIZERS[pre]."""
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Backend(BPE(vocab, pairs, ignore_merges=pre in _WHOLE_WORDS))
    pattern = PRE_TOKENIZERS[pre]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    if pattern is _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: Backend, typed: Iterable[tuple[str, int]]) -> None:
    """Control tokens (`<|im_end|>`) become special ones, user-defined ones (`<think>`) are matched whole in a text."""
    added = [(text, kind) for text, kind in typed if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(text, normalized=False, special=kind == _CONTROL) for text, kind in added])


def _surround(backend: Backend, special: dict[str, str | None], add_bos: bool, add_eos: bool) -> None:
    """Make `backend` put a BOS before and an EOS after each text."""
    bos, eos = special.get("bos_token") if add_bos else None, special.get("eos_token") if add_eos else None
    around = [token for token in (bos, eos) if token is not None]
    # Not in the vocabulary yet, if a directory names it beside the files only.
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in around])
    backend.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in around],
    )


# SentencePiece ------------------------------------------------------------

_SPACE = "\u2581"


def _sentencepiece(
    pieces: list[tuple[str, float, int]], unigram: bool, by_score: bool, charsmap: bytes, squeeze: bool, prefix: str
) -> Backend:
    """Pieces (text, score, type) as a `tokenizers` model, the way transformers does it for Llama.

    prefix: where a space is put before the text: `first` (the beginning), `always` (after every special token too), or
    `never`. by_score: BPE merges rank by their pieces' scores, as llama.cpp has it, else by the order of the pieces.
    """
    texts = [text for text, _, _ in pieces]
    unknown = next((id for id, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    has_bytes = "<0x00>" in texts
    if unigram:
        model = Unigram([(text, score) for text, score, _ in pieces], unk_id=unknown, byte_fallback=has_bytes)
    else:
        vocab = {text: id for id, text in enumerate(texts)}
        ranks = {text: -score for text, score, _ in pieces} if by_score else vocab
        unk_token = None if unknown is None else texts[unknown]
        merges = bpe_merges(vocab, ranks, longest_first=by_score)
        model = BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=has_bytes)
    backend = Backend(model)
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        prefix = "always" if prefix == "first" else prefix  # `first` misses a text whose own first spaces are gone
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=prefix, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix != "never":
        steps.append(decoders.Strip(" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def bpe_merges(vocab: dict[str, int], ranks: dict[str, float], longest_first: bool) -> list[tuple[str, str]]:
    """SentencePiece's BPE merges any two pieces that make a third, the best-ranked third first; `tokenizers` wants the
    pairs in order. Ties fall as in transformers' `generate_merges`."""
    sign = -1 if longest_first else 1
    found = []
    for text, rank in ranks.items():
        pairs = [
            (rank, sign * i, sign * (len(text) - i), left, right)
            for i in range(1, len(text))
            if (left := text[:i]) in vocab and (right := text[i:]) in vocab
        ]
        found += sorted(pairs, key=lambda pair: (vocab[pair[3]], vocab[pair[4]])) if len(pairs) > 1 else pairs
    found.sort(key=lambda pair: pair[:3])
    return [(left, right) for *_, left, right in found]


def _from_sentencepiece(path: Path, config: dict[str, Any], special: dict[str, str | None]) -> Backend:
    """A `tokenizer.model` file. Fills in the special tokens that the configuration beside it does not name."""
    try:
        model = _read_sentencepiece(path)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError):
        raise PagodaError(f"{path} is not a SentencePiece model; download it again") from None
    prefix = "never"
    if config.get("add_prefix_space", model["add_dummy_prefix"]) is not False:
        prefix = "always" if config.get("legacy") else "first"  # what transformers' LlamaTokenizer calls legacy
    pieces = model["pieces"]
    backend = _sentencepiece(
        pieces,
        unigram=model["unigram"],
        by_score=False,
        charsmap=model["charsmap"],
        squeeze=model["squeeze"],
        prefix=prefix,
    )
    _add_tokens(backend, ((text, kind) for text, _, kind in pieces))
    for name in SPECIAL_NAMES:
        id = model[name]
        if special[name] is None and 0 <= id < len(pieces):
            special[name] = pieces[id][0]
    _surround(backend, special, config.get("add_bos_token", True), config.get("add_eos_token", False))
    return backend


def _read_sentencepiece(path: Path) -> dict[str, Any]:
    """The fields of sentencepiece_model.proto that matter, without the protobuf package."""
    # The defaults are those of the proto.
    model = {"pieces": [], "unigram": True, "charsmap": b"", "squeeze": True, "add_dummy_prefix": True}
    model |= {"unk_token": 0, "bos_token": 1, "eos_token": 2, "pad_token": -1}
    trainer_fields = {40: "unk_token", 41: "bos_token", 42: "eos_token", 43: "pad_token"}
    for field, value in _protobuf(path.read_bytes()):
        if field == 1:
            piece = {1: b"", 2: 0.0, 3: 1} | dict(_protobuf(value))
            model["pieces"].append((piece[1].decode(), piece[2], piece[3]))
        elif field == 2:
            trainer = dict(_protobuf(value))
            if trainer.get(3, 1) not in (1, 2):
                raise PagodaError(f"{path}: only unigram and BPE models of SentencePiece are supported")
            model["unigram"] = trainer.get(3, 1) == 1
            for number, name in trainer_fields.items():
                id = trainer.get(number, model[name])
                model[name] = id - (1 << 64) if id >= 1 << 63 else id
        elif field == 3:
            normalizer = dict(_protobuf(value))
            model["charsmap"] = normalizer.get(2, b"")
            model["add_dummy_prefix"] = bool(normalizer.get(3, 1))
            model["squeeze"] = bool(normalizer.get(4, 1))
    if not model["pieces"]:
        raise ValueError("no pieces")
    return model


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: ints, float32 and bytes as they come."""
    pos = 0

    def varint() -> int:
        nonlocal pos
        value = shift = 0
        while True:
            byte = data[pos]
            pos += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while pos < len(data):
        key = varint()
        field, wire = key >> 3, key & 7
        if wire == 0:
            yield field, varint()
        elif wire == 2:
            length = varint()
            if pos + length > len(data):
                raise ValueError("truncated")
            pos += length
            yield field, data[pos - length : pos]
        elif wire in (1, 5):
            (value,) = struct.unpack_from("<f" if wire == 5 else "<d", data, pos)
            pos += 4 if wire == 5 else 8
            yield field, value
        else:
            raise ValueError(f"wire type {wire}")
