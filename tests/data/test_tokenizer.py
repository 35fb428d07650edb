"""Tokenizers against transformers and sentencepiece: the same ids, the same text, nothing shown half."""

import json
import random

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from pagoda.common import PagodaError
from pagoda.data.tokenizer import load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 12345 o'clock in 2024.",
    "    def f(x):\n        return x  # indented\n\n\tprint(f(12),  34)\r\n",
    "敏捷的棕色狐狸跳过了懒狗。你好,世界!今天天气很好。",
    "emoji 😀 👩‍👩‍👧‍👦 flags 🇫🇷 accents café naïve Ünïcödé \u00a0nbsp",
    "Die Größe des Straßenbahnhäuschens; ¿qué tal? Ελληνικά, русский, हिन्दी, العربية",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "a",
    " leading",
    "trailing  ",
    "two  spaces   three",
    "\n\n\n",
    "x\u200by",
    "unseen: ꙮ ⟿ 𝔘𝔫𝔦",
    "<|im_start|>user\nhello<|im_end|>\n",
    " <s> in the middle</s>of it",
    "<think>so</think> done",
]


@pytest.fixture(scope="session")
def byte_level():
    """A byte-level BPE of 500 tokens, Chinese and emoji cut into bytes: (vocab, merges, added tokens)."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS[:2] * 4 + CORPUS[2:], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="session")
def sentencepiece_models(tmp_path_factory):
    """`bpe` and `unigram` models as Llama's are made: byte fallback, digits split, a dummy prefix."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 5), encoding="utf-8")
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"),
            model_prefix=str(folder / kind),
            model_type=kind,
            vocab_size=420,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.98,
            normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
            remove_extra_whitespaces=kind == "unigram",
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["<think>", "</think>"],
            control_symbols=["<|im_start|>", "<|im_end|>"],
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return folder


def write_gguf(path, kind, tokens, types, **values):
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_string("general.name", "tiny")
    for key, value in values.items():
        {"pre": writer.add_tokenizer_pre, "merges": writer.add_token_merges, "scores": writer.add_token_scores}.get(
            key, getattr(writer, f"add_{key}", None)
        )(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_gguf(path, byte_level, pre, **values):
    vocab, merges = byte_level
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if token.startswith("<|") else 1 for token in tokens]
    values = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "add_bos_token": False} | values
    merges = [" ".join(merge) for merge in merges]
    return write_gguf(path, "gpt2", tokens, types, pre=pre, merges=merges, **values)


def sentencepiece_gguf(path, model, **values):
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(sp.get_piece_size())
    types = [2 if sp.is_unknown(id) else 3 if sp.is_control(id) else 6 if sp.is_byte(id) else 1 for id in ids]
    tokens = [sp.id_to_piece(id) for id in ids]
    types = [4 if "think>" in token else kind for token, kind in zip(tokens, types)]
    scores = [sp.get_score(id) for id in ids]
    values = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0} | values
    return write_gguf(path, "llama", tokens, types, scores=scores, **values)


def assert_equal_to_transformers(ours, theirs, texts=TEXTS, special=True):
    for text in texts:
        ids = theirs(text, add_special_tokens=special).input_ids
        assert ours.encode(text, add_special_tokens=special) == ids, repr(text)
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def auto(path, **options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **options)


# GGUF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "default", "tekken"])
def test_byte_level_gguf_has_the_ids_of_transformers(tmp_path, byte_level, pre):
    path = byte_level_gguf(tmp_path / "m.gguf", byte_level, pre)
    assert_equal_to_transformers(load_tokenizer(path), auto(tmp_path, gguf_file="m.gguf"))


def test_llama_3_gguf_begins_with_bos_unless_told_otherwise(tmp_path, byte_level):
    path = byte_level_gguf(tmp_path / "m.gguf", byte_level, "llama-bpe", add_bos_token=True)
    # Which versions of transformers put BOS in front differs.
    assert_equal_to_transformers(load_tokenizer(path), auto(tmp_path, gguf_file="m.gguf"), special=False)
    first, *rest = load_tokenizer(path).encode("a")
    assert first == 1
    assert rest == load_tokenizer(path).encode("a", add_special_tokens=False)


def test_sentencepiece_gguf_has_the_ids_of_transformers(tmp_path, sentencepiece_models):
    path = sentencepiece_gguf(tmp_path / "m.gguf", sentencepiece_models / "bpe.model")
    ours = load_tokenizer(path)
    assert_equal_to_transformers(ours, auto(tmp_path, gguf_file="m.gguf"), special=False)
    assert ours.encode("hi") == [ours.bos_id, *ours.encode("hi", add_special_tokens=False)]
    assert ours.bos_id == 1


def test_sentencepiece_gguf_without_prefix_space(tmp_path, sentencepiece_models):
    path = sentencepiece_gguf(tmp_path / "m.gguf", sentencepiece_models / "bpe.model", add_space_prefix=False)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("fox jumps", add_special_tokens=False)
    assert not tokenizer.backend.id_to_token(ids[0]).startswith("▁")
    assert tokenizer.decode(ids) == "fox jumps"
    assert tokenizer.decode(tokenizer.encode(" fox")) == " fox"


def test_unigram_gguf_has_the_ids_of_sentencepiece(tmp_path, sentencepiece_models):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((sentencepiece_models / "unigram.model").read_bytes())
    path = write_gguf(
        tmp_path / "m.gguf",
        "t5",
        [piece.piece for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        precompiled_charsmap=list(proto.normalizer_spec.precompiled_charsmap),
        remove_extra_whitespaces=True,
        eos_token_id=2,
        add_eos_token=True,
    )
    ours = load_tokenizer(path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_models / "unigram.model"))
    for text in TEXTS[:14]:
        assert ours.encode(text) == [*sp.encode(text), 2], repr(text)


def test_every_end_token_of_a_gguf_ends_a_generation(tmp_path, byte_level):
    path = byte_level_gguf(tmp_path / "m.gguf", byte_level, "llama-bpe", eot_token_id=0)
    assert load_tokenizer(path).eos_ids == [2, 0]


def test_a_turn_ends_a_generation_where_the_gguf_forgets_to_say_so(tmp_path, byte_level):
    path = byte_level_gguf(tmp_path / "m.gguf", byte_level, "llama-bpe", eos_token_id=0)
    assert load_tokenizer(path).eos_ids == [0, 2]  # <|im_end|>


def test_the_default_models_ids_equal_transformers(default_model):
    tokenizer = load_tokenizer(default_model)
    assert_equal_to_transformers(tokenizer, auto(default_model.parent, gguf_file=default_model.name))
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, [2])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_gguf_vocabularies_that_cannot_be_read_are_named(tmp_path, byte_level):
    path = byte_level_gguf(tmp_path / "m.gguf", byte_level, "brand-new")
    with pytest.raises(PagodaError, match="unknown pre-tokenizer 'brand-new'"):
        load_tokenizer(path)
    path = write_gguf(tmp_path / "b.gguf", "bert", ["a"], [1])
    with pytest.raises(PagodaError, match="unsupported vocabulary 'bert'"):
        load_tokenizer(path)
    path = write_gguf(tmp_path / "c.gguf", "gpt2", ["a", "b"], [1, 1], pre="default", merges=["a c"])
    with pytest.raises(PagodaError, match="broken vocabulary"):
        load_tokenizer(path)


# Hugging Face directories ---------------------------------------------------------------------------------------------


def write_directory(folder, byte_level, tokenizer_config, **files):
    """A directory with a `tokenizer.json` that adds a BOS, cuts at 16 tokens, and so on."""
    vocab, merges = byte_level
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in vocab if token.startswith("<|")])
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", vocab["<|im_start|>"])]
    )
    backend.enable_truncation(16)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": tokenizer_config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
    "pad_token": "[PAD]",  # in no file: it is added
    "added_tokens_decoder": {
        "501": {"content": "<think>", "special": False},
        "500": {"content": "[PAD]", "special": True},
    },
    "chat_template": "{{ messages[0]['content'] }}",
}


def test_tokenizer_json_has_the_ids_of_transformers(tmp_path, byte_level):
    folder = write_directory(tmp_path / "m", byte_level, CONFIG)
    ours, theirs = load_tokenizer(folder), auto(folder)
    theirs.backend_tokenizer.no_truncation()
    assert_equal_to_transformers(ours, theirs)
    assert (ours.pad_id, ours.token_id("<think>"), ours.vocab_size) == (500, 501, 502)
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "[PAD]": 500}
    assert ours.chat_template == CONFIG["chat_template"]
    assert len(ours.encode("word " * 100)) > 100  # the saved limit does not hold


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, [2]),
        ({"config": {"eos_token_id": 0}}, [0, 2]),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [0, 2]}}, [0, 2]),
    ],
)
def test_end_tokens_come_from_the_generation_configuration(tmp_path, byte_level, files, expected):
    folder = write_directory(tmp_path / "m", byte_level, CONFIG, **files)
    assert load_tokenizer(folder).eos_ids == expected


def test_chat_template_file_goes_before_the_configuration(tmp_path, byte_level):
    config = CONFIG | {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}
    folder = write_directory(tmp_path / "m", byte_level, config)
    assert load_tokenizer(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("j")
    assert load_tokenizer(folder).chat_template == "j"


def test_vocab_and_merges_have_the_ids_of_transformers(tmp_path, byte_level):
    from transformers import GPT2Tokenizer

    vocab, merges = byte_level
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    config |= {"unk_token": "<|endoftext|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    theirs.add_bos_token = True
    texts = [text for text in TEXTS if "<|im_end|>" not in text]  # which no file here says is special
    assert_equal_to_transformers(load_tokenizer(tmp_path), theirs, texts)


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("add_bos", [True, False])
def test_sentencepiece_model_has_the_ids_of_transformers(tmp_path, sentencepiece_models, legacy, add_bos):
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_models / "bpe.model").read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos, "bos_token": "<s>", "eos_token": "</s>"}
    config |= {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_equal_to_transformers(load_tokenizer(tmp_path), auto(tmp_path))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_model_has_the_ids_of_sentencepiece(tmp_path, sentencepiece_models, kind):
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_models / f"{kind}.model").read_bytes())
    ours = load_tokenizer(tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, [2], sp.get_piece_size())
    for text in TEXTS[:14]:
        if kind == "bpe" and text.startswith(" "):
            continue  # transformers sees the space itself as the dummy prefix, SentencePiece adds another one
        assert ours.encode(text) == [1, *sp.encode(text)], repr(text)


def test_broken_tokenizer_files_are_errors(tmp_path, byte_level):
    with pytest.raises(PagodaError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(PagodaError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(PagodaError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    folder = write_directory(tmp_path / "m", byte_level, CONFIG)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(PagodaError, match="not valid JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(PagodaError, match=r"cannot read .*tokenizer\.json"):
        load_tokenizer(folder)


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "directory"])
def test_saved_tokenizers_open_in_transformers_and_here(tmp_path, byte_level, sentencepiece_models, kind):
    if kind == "byte_level":
        path = byte_level_gguf(tmp_path / "m.gguf", byte_level, "llama-bpe", add_bos_token=True, chat_template="t😀")
    elif kind == "sentencepiece":
        path = sentencepiece_gguf(tmp_path / "m.gguf", sentencepiece_models / "bpe.model", chat_template="t😀")
    else:
        path = write_directory(tmp_path / "m", byte_level, CONFIG | {"chat_template": "t😀"})
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')  # transformers picks a class by it
    theirs, again = auto(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")
    assert_equal_to_transformers(tokenizer, theirs)
    assert_equal_to_transformers(again, theirs)
    assert again.chat_template == theirs.chat_template == "t😀"
    assert again.special == tokenizer.special
    assert again.eos_ids == tokenizer.eos_ids


# Streaming ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def two_tokenizers(tmp_path_factory, byte_level, sentencepiece_models):
    folder = tmp_path_factory.mktemp("stream")
    return {
        "byte_level": load_tokenizer(byte_level_gguf(folder / "b.gguf", byte_level, "llama-bpe")),
        "sentencepiece": load_tokenizer(sentencepiece_gguf(folder / "s.gguf", sentencepiece_models / "bpe.model")),
    }


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_gives_the_text_and_never_half_a_character(two_tokenizers, kind, skip):
    tokenizer = two_tokenizers[kind]
    for text in [*TEXTS, " ".join(TEXTS)]:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream(skip_special_tokens=skip)
        pieces = [stream.push(id) for id in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_stream_after_a_prompt_continues_its_text(two_tokenizers, kind):
    tokenizer = two_tokenizers[kind]
    for text in TEXTS[:5]:
        ids = tokenizer.encode(text)
        for cut in range(len(ids)):
            prompt = tokenizer.decode(ids[:cut])
            if prompt.endswith("\ufffd"):
                continue
            stream = tokenizer.stream(ids[:cut])
            assert prompt + "".join(stream.push(id) for id in ids[cut:]) == tokenizer.decode(ids)


def test_a_stream_shows_each_word_as_soon_as_it_is_there(two_tokenizers):
    tokenizer = two_tokenizers["sentencepiece"]
    stream = tokenizer.stream()
    ids = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    assert [stream.push(id) for id in ids] == [
        tokenizer.decode(ids[: i + 1])[len(tokenizer.decode(ids[:i])) :] for i in range(len(ids))
    ]


def test_a_stream_that_stops_inside_a_character_flushes_a_replacement(two_tokenizers):
    for tokenizer in two_tokenizers.values():
        ids = tokenizer.encode("a😀", add_special_tokens=False)
        stream = tokenizer.stream()
        assert "".join(stream.push(id) for id in ids[:-1]) == "a"
        assert stream.flush().strip("\ufffd") == ""


def test_random_ids_stream_as_they_decode(two_tokenizers):
    tokenizer, rng = two_tokenizers["byte_level"], random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
        stream = tokenizer.stream()
        assert "".join([*(stream.push(id) for id in ids), stream.flush()]) == tokenizer.decode(ids)
