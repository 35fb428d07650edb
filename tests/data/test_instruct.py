"""Instruction data: the ids of transformers, exactly the answers trained on, and rows that lose and mix nothing."""

import csv
import json
import runpy
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from pagoda.cli import main
from pagoda.common import PagodaError
from pagoda.data.chat_template import TEMPLATES, use_template
from pagoda.data.instruct import Example, InstructionRows, answer_spans, read_instructions, split_by_hash, to_messages
from pagoda.data.options import InstructionOptions
from pagoda.data.show import parts
from pagoda.data.table import read_rows
from pagoda.data.tokenizer import Tokenizer
from pagoda.models.batch import Batch
from pagoda.models.loader import load

SPECIAL = """
<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn>
<end_of_turn> <|user|> <|assistant|> <|system|> <|end|> <think> </think>
"""
CORPUS = [
    "What is the capital of France? It is Paris, it's on the Seine. 今天天气很好 😀",
    '{"city": "Paris", "n": 12}',
] * 3
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris 😀, on the Seine"},
    {"role": "user", "content": "今天天气?"},
    {"role": "assistant", "content": "很好\n\nIt's fine."},
]
# What the model has to say, as each template's authors have it.
ENDS = {
    "plain": ("", "</s>"),
    "alpaca": ("", "</s>"),
    "vicuna": (" ", "</s>"),
    "chatml": ("", "<|im_end|>"),
    "llama-2": (" ", " </s>"),
    "llama-3": ("", "<|eot_id|>"),
    "mistral": (" ", "</s>"),
    "zephyr": ("", "</s>"),
    "gemma": ("", "<end_of_turn>"),
    "phi-3": ("", "<|end|>"),
}
# Qwen3: a turn has thoughts, empty ones too, only as long as it is the last.
QWEN3 = """{%- for m in messages %}
{%- set thought = '' %}{%- set content = m.content %}
{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
{{- content + '<|im_end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# DeepSeek-R1: the prompt opens the thoughts that a turn in the history does not show.
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' + m.content }}
{{- eos_token }}{%- else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""
# Mistral v0.3: the system message goes into a question that is still to be answered, and nowhere else.
MISTRAL3 = """{{ bos_token }}{% set chat = messages[1:] %}{% for m in chat %}{% if m.role == 'user' %}
{{- '[INST] ' + (messages[0].content + '\\n\\n' if loop.last else '') + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"""
QWEN2_TOOLS = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(params=["byte_level", "metaspace"])
def tokenizer(request):
    """As GPT-2's or Llama's are made, with everybody's special tokens."""
    if request.param == "byte_level":
        backend, alphabet = Backend(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = SPECIAL.split()
    else:
        backend, alphabet = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)), ["\u2581"]
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], *SPECIAL.split()]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS[:1] if request.param == "metaspace" else CORPUS, trainer)
    # Bytes are no special tokens.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer(Backend.from_str(json.dumps(state)), {"bos_token": "<s>", "eos_token": "</s>"})


def wearing(tokenizer: Tokenizer, template: str) -> Tokenizer:
    tokenizer.chat_template = template
    return tokenizer


def from_rows(tmp_path, tokenizer, *rows, **options) -> list[Example]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_instructions(file, tokenizer, InstructionOptions(**options)).examples


def trained_texts(example: Example, tokenizer: Tokenizer) -> list[str]:
    return [text for text, trained in parts(example, tokenizer) if trained]


def transformers_tokenizer(tokenizer, folder):
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


# Templates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_and_every_answer_is_trained_with_its_end(tmp_path, tokenizer, name):
    (example,) = from_rows(tmp_path, tokenizer, {"messages": CHAT}, template=name)
    theirs = transformers_tokenizer(tokenizer, tmp_path / "saved")
    assert example.tokens.tolist() == theirs.apply_chat_template(CHAT)["input_ids"]
    before, after = ENDS[name]
    answers = [before + m["content"] + after for m in CHAT if m["role"] == "assistant"]
    assert trained_texts(example, tokenizer) == answers
    assert tokenizer.token_id(after.strip()) in theirs_end_ids(tmp_path / "saved")


def theirs_end_ids(folder):
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder).eos_token_id


def test_alpaca_writes_instruction_and_input_apart(tmp_path, tokenizer):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (example,) = from_rows(tmp_path, tokenizer, row, template="alpaca")
    text = "".join(text for text, _ in parts(example, tokenizer))
    assert "paired with an input" in text
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>" in text


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (QWEN3, ["Paris 😀, on the Seine<|im_end|>", "<think>\n\n</think>\n\n很好\n\nIt's fine.<|im_end|>"]),
        (R1, ["Paris 😀, on the Seine</s>", "很好\n\nIt's fine.</s>"]),
        (MISTRAL3, [" Paris 😀, on the Seine</s>", " 很好\n\nIt's fine.</s>"]),
        (MARKED, ["Paris 😀, on the Seine<|im_end|>", "很好\n\nIt's fine.<|im_end|>"]),
    ],
    ids=["qwen3", "deepseek-r1", "mistral-v0.3", "generation blocks"],
)
def test_templates_that_write_the_last_turn_or_its_prompt_differently(tmp_path, tokenizer, template, answers):
    (example,) = from_rows(tmp_path, wearing(tokenizer, template), {"messages": CHAT})
    theirs = transformers_tokenizer(tokenizer, tmp_path / "saved")
    assert example.tokens.tolist() == theirs.apply_chat_template(CHAT)["input_ids"]
    assert trained_texts(example, tokenizer) == answers


def test_thoughts_of_an_earlier_turn_are_trained_where_the_template_shows_them(tmp_path, tokenizer):
    chat = [dict(m, content="<think>\nHm.\n</think>\n\nYes") if m["role"] == "assistant" else m for m in CHAT]
    (example,) = from_rows(tmp_path, wearing(tokenizer, QWEN3), {"messages": chat})
    assert trained_texts(example, tokenizer) == ["Yes<|im_end|>", "<think>\nHm.\n</think>\n\nYes<|im_end|>"]


def test_generation_blocks_give_the_mask_of_transformers(tmp_path, tokenizer):
    (example,) = from_rows(tmp_path, wearing(tokenizer, MARKED), {"messages": CHAT})
    theirs = transformers_tokenizer(tokenizer, tmp_path / "saved")
    masks = theirs.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)["assistant_masks"]
    # transformers counts a character of several tokens for its first one only
    assert (np.array(masks, bool) <= example.trained).all()
    assert example.trained.sum() - sum(masks) <= 12


def test_a_template_that_cannot_be_followed_is_refused(tokenizer):
    last_only = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
        "{{ '#' if loop.last else '' }}{% endfor %}"
    )
    with pytest.raises(PagodaError, match="message 3 differently once others follow"):
        answer_spans(wearing(tokenizer, last_only), CHAT)


def test_all_trains_everything(tmp_path, tokenizer):
    (example,) = from_rows(tmp_path, tokenizer, {"messages": CHAT}, template="chatml", train_on="all")
    assert example.trained.all()


def test_an_answer_without_an_end_token_is_pointed_out(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    data = read_instructions(
        tmp_path / "a.jsonl", wearing(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    )
    assert "1 of 1 examples do not end with a token that ends a generation" in data.notes()[0]


def test_template_from_a_file_and_unknown_ones(tmp_path, tokenizer):
    (tmp_path / "mine.jinja").write_text(R1)
    use_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == R1
    for name, words in (
        ("chatlm", "unknown chat template 'chatlm'; did you mean 'chatml'"),
        ("none.jinja", "cannot read"),
    ):
        with pytest.raises(PagodaError, match=words):
            use_template(tokenizer, name)
    with pytest.raises(PagodaError, match="no chat template: name one with --template"):
        use_template(wearing(tokenizer, ""), None)
    bare = Backend(models.BPE({"a": 0, "</s>": 1}, []))
    bare.add_special_tokens([AddedToken("</s>")])
    with pytest.raises(
        PagodaError, match=r"ends an answer with <\|im_end\|>, no token of this model: use plain, alpaca"
    ):
        use_template(Tokenizer(bare, {"eos_token": "</s>"}), "chatml")


# Formats --------------------------------------------------------------------------------------------------------------

CALL = {"name": "weather", "arguments": {"city": "Paris"}}
WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
SHAREGPT_TOOLS = {
    "conversations": [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"t": 12}'},
        {"from": "gpt", "value": "Fine."},
    ],
    "tools": json.dumps([WEATHER]),
}
OPENAI_TOOLS = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}],
        },
        {"role": "tool", "content": '{"t": 12}'},
        {"role": "assistant", "content": "Fine."},
    ],
    "tools": [{"type": "function", "function": WEATHER}],
}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "context": None, "response": "A"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        {"prompt": "Q", "completion": "A"},
        {"question": "Q", "answer": "A"},
    ],
)
def test_every_format_becomes_messages(row):
    messages, tools = to_messages(row)
    assert [(m["role"], m["content"]) for m in messages] == [("user", "Q"), ("assistant", "A")]
    assert tools is None
    with_system, _ = to_messages(row | {"system": "S"})
    assert with_system[0] == {"role": "system", "content": "S"}


def test_tool_calls_of_sharegpt_and_openai_become_what_transformers_renders(tmp_path, tokenizer):
    wearing(tokenizer, QWEN2_TOOLS)
    first, second = from_rows(tmp_path, tokenizer, SHAREGPT_TOOLS, OPENAI_TOOLS)
    assert first.tokens.tolist() == second.tokens.tolist()
    theirs = transformers_tokenizer(tokenizer, tmp_path / "saved")
    messages = [dict(m) for m in OPENAI_TOOLS["messages"]]
    messages[0]["content"] = "Weather?"
    messages[1] = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    ids = theirs.apply_chat_template(messages, tools=OPENAI_TOOLS["tools"])["input_ids"]
    assert first.tokens.tolist() == ids
    call, answer = trained_texts(first, tokenizer)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>' in call
    assert answer == "Fine.<|im_end|>"


def test_a_template_that_knows_no_tools_gets_them_as_text(tmp_path, tokenizer):
    (example,) = from_rows(tmp_path, tokenizer, SHAREGPT_TOOLS, template="chatml")
    text = "".join(text for text, _ in parts(example, tokenizer))
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert "<|im_start|>user\n<tool_response>\n{" in text
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert trained_texts(example, tokenizer) == [call, "Fine.<|im_end|>"]


def test_json_jsonl_csv_parquet_and_folders_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": "a,\n\u2028b", "output": "1"}, {"instruction": "ü", "output": "2"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    lines = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    with open(tmp_path / "c.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.json", "b.jsonl", "c.csv", "d.parquet"):
        assert [row for _, row in read_rows(tmp_path / name)] == rows
    assert [row for _, row in read_rows(tmp_path)] == rows * 4
    assert [where for where, _ in read_rows(tmp_path / "b.jsonl")] == ["b.jsonl line 1", "b.jsonl line 3"]


def test_parquet_drops_the_fields_that_arrow_adds(tmp_path):
    import pyarrow
    import pyarrow.parquet

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat}]), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet")] == [{"messages": chat}]


def test_a_hub_data_set_is_named_with_its_parts(monkeypatch):
    import datasets

    def load_dataset(*names, **options):
        if names[0] == "org/none":
            raise FileNotFoundError("no connection\nat all")
        return datasets.Dataset.from_list([{"asked": [*names, options["revision"], options["split"]]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source, asked in (
        ("org/name", ["org/name", None, None, "train"]),
        ("org/name/main@v1.0:test", ["org/name", "main", "v1.0", "test"]),
    ):
        assert list(read_rows(source)) == [(f"{source} row 1", {"asked": asked})]
    with pytest.raises(PagodaError, match=r"hub's data set 'org/none' cannot be loaded \(no connection\); name it"):
        list(read_rows("org/none"))


# Bad input ------------------------------------------------------------------------------------------------------------

GOOD = json.dumps({"prompt": "q", "completion": "a"})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.csv", "prompt,completion\n", "is empty"),
        (
            "a.jsonl",
            GOOD + "\n{broken\n",
            "a.jsonl line 2 is broken JSON: expecting property name enclosed in double quotes at column 2",
        ),
        ("a.json", f"[{GOOD},\n{GOOD}\n{GOOD}]", "a.json line 3 is broken JSON"),
        ("a.jsonl", GOOD + "\n3\n", "a.jsonl line 2 is no object"),
        ("a.csv", "prompt,completion\na\n", "a.csv line 2 has not as many fields"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8 text"),
        ("a.parquet", b"PAR0", "cannot be read|no Parquet file"),
        ("a.txt", "hello", "none of the files that can be read"),
        ("a.jsonl", '{"text": "x", "id": 3}', "unknown format with the keys text, id; known: alpaca"),
        ("a.jsonl", GOOD + '\n{"prompt": "q", "completion": " "}', "a.jsonl line 2: the row has no answer"),
        ("a.json", '[{"messages": [{"role": "user", "content": "q"}]}]', "a.json row 1: the row has no answer"),
        ("a.jsonl", '{"messages": []}', "line 1: the row has no"),
        ("a.jsonl", '{"conversations": [{"from": "man", "value": "q"}]}', "unknown role 'man'"),
        ("a.jsonl", '{"conversations": [{"value": "q"}]}', "not a row of the sharegpt format: 'from' is missing"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "only text can be trained on"),
        ("a.jsonl", '{"messages": "hello"}', "not a row of the messages format"),
    ],
)
def test_bad_data_costs_one_line(tmp_path, tokenizer, name, content, words):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PagodaError, match=words) as caught:
        read_instructions(file, tokenizer, InstructionOptions(template="chatml"))
    assert "\n" not in str(caught.value)


def test_bad_rows_are_skipped_and_counted(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{GOOD}\n{{"prompt": "q", "completion": ""}}\n{{"x": 1}}\n{GOOD}\n')
    data = read_instructions(file, tokenizer, InstructionOptions(template="chatml", skip_bad_rows=True))
    assert len(data.examples) == 2
    assert data.bad_rows == 2
    assert "2 bad rows left out, the first: a.jsonl line 2: the row has no answer" in data.notes()[0]
    file.write_text('{"x": 1}\n')
    with pytest.raises(PagodaError, match=r"holds no row that can be used; a\.jsonl line 1: unknown format"):
        read_instructions(file, tokenizer, InstructionOptions(template="chatml", skip_bad_rows=True))


def test_missing_sources_are_named(tmp_path):
    for source, words in (
        (tmp_path / "no.json", "no such file"),
        (tmp_path, "holds no data files"),
    ):
        with pytest.raises(PagodaError, match=words):
            list(read_rows(source))


def test_options_are_checked():
    for options in ({"format": "alpacca"}, {"train_on": "questions"}):
        with pytest.raises(PagodaError, match="must be one of"):
            InstructionOptions(**options)


# Rows -----------------------------------------------------------------------------------------------------------------


def some(*lengths, answer=3, seed=0) -> list[Example]:
    """Examples of random tokens, of which the last few are the answer."""
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(3, 96, n).astype(np.int32), np.arange(n) >= n - answer) for n in lengths]


def documents(rows) -> list[tuple]:
    split = list(zip(rows.tokens.split(rows.lengths), rows.targets.split(rows.lengths)))
    return [(tuple(tokens.tolist()), tuple(targets.tolist())) for tokens, targets in split]


def expected(example: Example) -> tuple:
    targets = [t if on else -100 for t, on in zip(example.tokens.tolist(), example.trained.tolist())]
    return tuple(example.tokens.tolist()[:-1]), tuple(targets[1:])


def test_an_epoch_has_every_example_once_in_rows_that_keep_to_seq_len():
    examples = some(*np.random.default_rng(1).integers(4, 33, 200).tolist())
    rows = InstructionRows(examples, 32, seed=3)
    for epoch in range(2):
        found = [documents(rows.rows(epoch * rows.n_rows + i, 1)) for i in range(rows.n_rows)]
        assert all(sum(len(tokens) for tokens, _ in row) <= 32 for row in found)
        assert sorted(chain.from_iterable(found)) == sorted(expected(e) for e in examples)
    assert rows.fullness > 0.95
    assert rows.rows(0, 5).scored == (rows.rows(0, 5).targets >= 0).sum()


def test_rows_are_a_function_of_their_index():
    examples = some(*range(4, 20))
    rows, again, other = (InstructionRows(examples, 24, seed=s) for s in (0, 0, 1))
    assert rows.fingerprint == again.fingerprint
    n = rows.n_rows
    whole = documents(rows.rows(2, 2 * n))
    assert whole == list(chain.from_iterable(documents(again.rows(i, 1)) for i in range(2, 2 + 2 * n)))
    assert documents(rows.rows(0, n)) != documents(rows.rows(n, n))
    assert documents(rows.rows(0, n)) != documents(other.rows(0, n))
    examples[3].trained[-2] = False
    assert InstructionRows(examples, 24).fingerprint != rows.fingerprint


def test_fill_makes_every_row_equally_long():
    rows = InstructionRows(some(9, 12, 4), 16, fill=True).rows(0, 4)
    assert len(rows.tokens) == len(rows.targets) == sum(rows.lengths) == 64
    filler = [(tokens, targets) for tokens, targets in documents(rows) if set(tokens) == {0}]
    assert filler
    assert all(set(targets) == {-100} for _, targets in filler)


def test_without_packing_a_row_is_an_example():
    rows = InstructionRows(some(9, 12, 4), 16, packing=False, sequential=True)
    assert rows.n_rows == 3
    assert [rows.rows(i, 1).lengths for i in range(3)] == [[8], [11], [3]]
    with pytest.raises(IndexError):
        rows.rows(3, 1)


def test_truncation_is_counted_and_lost_answers_leave():
    examples = some(30, 21, 10) + some(40, answer=20)
    rows = InstructionRows(examples, 20)
    # 30: the answer is cut away; 21 just fits; 40: 21 of its tokens stay, the first of the answer among them
    assert (len(rows.examples), rows.truncated, rows.tokens_lost, rows.dropped) == (3, 1, 19, 1)
    assert "1 truncated (19 tokens lost); 1 left out, all of their answer cut away" in rows.summary()
    with pytest.raises(PagodaError, match="no example has a token to train on within seq_len 2"):
        InstructionRows(some(30), 2)


def test_nothing_is_stored_behind_the_last_trained_token():
    (example,) = some(10)
    example.trained[6:] = False
    example.trained[5] = True
    assert InstructionRows([example], 32).rows(0, 1).lengths == [5]


def test_packed_rows_have_the_losses_of_transformers_on_each_example(tmp_path):
    theirs = tiny.saved("llama", tmp_path)
    examples = some(7, 12, 5, 20, 9)
    batch = InstructionRows(examples, 32, fill=True).rows(0, 2)
    ours = load(tmp_path, torch.float32)(batch.tokens, Batch.of(batch.lengths), targets=batch.targets).sum()
    losses = []
    for example in examples:
        ids = torch.tensor(example.tokens[None]).long()
        labels = ids.masked_fill(~torch.tensor(example.trained[None]), -100)
        losses.append(theirs(ids, labels=labels).loss * example.trained.sum())
    assert batch.scored == 15
    torch.testing.assert_close(ours, sum(losses), rtol=1e-5, atol=1e-5)


def test_the_split_goes_by_content():
    examples = some(*[8] * 300)
    train, validation = split_by_hash(examples, 0.1)
    assert len(train) + len(validation) == 300
    assert 15 < len(validation) < 50
    fewer, kept = split_by_hash(examples[:150] * 2, 0.1)
    inside = {e.tokens.tobytes() for e in validation}
    assert {e.tokens.tobytes() for e in kept} <= inside
    assert not {e.tokens.tobytes() for e in fewer} & inside
    assert [len(side) for side in split_by_hash(examples[:2], 0.001)] == [1, 1]
    with pytest.raises(PagodaError, match="one example cannot be split"):
        split_by_hash(examples[:1] * 2, 0.5)


# The command, and the demo's data -------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, tokenizer):
    """A folder that `--tokenizer` takes."""
    tokenizer.save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text(f"{GOOD}\n" * 3)
    return tmp_path


@pytest.mark.parametrize("tokenizer", ["byte_level"], indirect=True)
def test_data_show_marks_what_is_trained(model, capsys, monkeypatch):
    args = ["data", "show", str(model / "data.jsonl"), "--tokenizer", str(model / "model"), "--template", "chatml"]
    assert main([*args, "--n", "1", "--seq_len", "64"]) == 0
    out, _ = capsys.readouterr()
    assert "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]\n" in out
    assert "rows read: 3 of the prompt format\n3 examples" in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(args) == 0
    assert "\x1b[32ma<|im_end|>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(args) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main([*args, "--json", "--seq_len", "64"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["totals"]["trained_tokens"] == 6
    assert shown["examples"][0]["parts"][1] == {"text": "a<|im_end|>", "trained": True}


@pytest.mark.parametrize("tokenizer", ["byte_level"], indirect=True)
def test_data_show_needs_a_template(model, capsys):
    assert main(["data", "show", str(model / "data.jsonl"), "--tokenizer", str(model / "model")]) == 2
    assert "no chat template: name one with --template" in capsys.readouterr().err


def test_the_demo_data_is_what_its_script_writes_and_keeps_held_out_notes_apart(tmp_path):
    folder = Path(__file__).parents[2] / "recipes/finetune/demo"
    script = tmp_path / "make_data.py"
    script.write_text((folder / "make_data.py").read_text())
    runpy.run_path(str(script), run_name="__main__")
    texts = {}
    for name in ("train.jsonl", "held_out.jsonl"):
        texts[name] = (folder / name).read_text()
        assert (tmp_path / name).read_text() == texts[name]
    train, held_out = ([json.loads(line) for line in text.splitlines()] for text in texts.values())
    assert (len(train), len(held_out)) == (240, 40)
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in held_out}
    both = [{(r["name"], r["item"]) for r in (json.loads(e["completion"]) for e in part)} for part in (train, held_out)]
    assert not both[0] & both[1]
    assert all(str(v) in e["prompt"] for e in train + held_out for v in json.loads(e["completion"]).values())
