"""Instruction data: rows of questions and answers become tokens, with a mask of what is trained on.

`read_instructions` goes the whole way: a row of any known format (FORMATS) becomes messages, the chat template writes
them as text, the tokenizer cuts it, and `answer_spans` says which characters the assistant has written. What is trained
is part of the template's own rendering of the whole conversation, so the ids are those that every other reader of the
same template gets. `InstructionRows` packs the examples into rows for the training loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from pagoda.common import PagodaError
from pagoda.data.chat_template import generation_spans, spell_out_tools, use_template
from pagoda.data.options import InstructionOptions
from pagoda.data.shards import IGNORE, Rows, draws, permuted
from pagoda.data.table import Row, read_rows
from pagoda.data.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


@dataclass
class Example:
    """A conversation as (n,) int32 token ids, and (n,) bool: which of them are trained on."""

    tokens: np.ndarray
    trained: np.ndarray


@dataclass
class Instructions:
    """The examples of a source, in its order, and how many rows of each format they were. bad_rows were left out
    (`first_bad` says what was wrong with the first); of `endless` examples the last answer does not end with a token
    that ends a generation."""

    examples: list[Example]
    formats: Counter[str] = field(default_factory=Counter)
    bad_rows: int = 0
    first_bad: str = ""
    endless: int = 0

    def notes(self) -> list[str]:
        """What a user should know before training on them, a line each."""
        lines = []
        if self.bad_rows:
            lines.append(f"{self.bad_rows} bad rows left out, the first: {self.first_bad}")
        if self.endless:
            lines.append(
                f"{self.endless} of {len(self.examples)} examples do not end with a token that ends a generation: the"
                " template does not write one, so the model will not learn to stop"
            )
        return lines


def read_instructions(
    source: str | os.PathLike, tokenizer: Tokenizer, options: InstructionOptions | None = None
) -> Instructions:
    """Examples from a file, a folder or a hub data set (`read_rows`). The tokenizer wears options.template from now on.

    A row that cannot be used (no answer, unknown keys, refused by the template) raises PagodaError with its place, or
    is counted with options.skip_bad_rows.
    """
    options = options or InstructionOptions()
    use_template(tokenizer, options.template)
    result, ends = Instructions([]), set(tokenizer.eos_ids)
    texts = _texts(read_rows(source), tokenizer, options, result)
    while chunk := list(islice(texts, 1000)):
        encodings = tokenizer.backend.encode_batch([text for text, _ in chunk], add_special_tokens=False)
        for encoding, (_, spans) in zip(encodings, chunk):
            tokens = np.array(encoding.ids, np.int32)
            trained = np.zeros(len(tokens), bool)
            begins, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
            stops = np.maximum(stops, begins + 1)  # a token of no characters stands where it begins
            for begin, stop in spans:
                trained |= (begins < stop) & (stops > begin)
            result.examples.append(Example(tokens, trained))
            last = trained.nonzero()[0][-1:]
            result.endless += options.train_on == "answers" and not ends.intersection(tokens[last].tolist())
    if not result.examples:
        raise PagodaError(f"{source} holds no row that can be used; {result.first_bad}")
    return result


def _texts(
    rows: Iterable[tuple[str, Row]], tokenizer: Tokenizer, options: InstructionOptions, result: Instructions
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    for where, row in rows:
        try:
            format = _recognise(row) if options.format == "auto" else options.format
            messages, tools = to_messages(row, format)
            text = answer_spans(tokenizer, messages, tools, everything=options.train_on == "all")
        except PagodaError as error:
            bad = f"{where}: {error}"
            if not options.skip_bad_rows:
                raise PagodaError(f"{bad} (--skip_bad_rows leaves such rows out)") from None
            result.bad_rows += 1
            result.first_bad = result.first_bad or bad
        else:
            result.formats[format] += 1
            yield text


# Rows to messages -----------------------------------------------------------------------------------------------------


def to_messages(row: Row, format: str = "auto") -> tuple[Messages, Tools]:
    """The conversation of a row and its tools (JSON schemas in OpenAI's form, or None).

    A row of another format, or without an answer, raises PagodaError.
    """
    format = _recognise(row) if format == "auto" else format
    try:
        messages = FORMATS[format](row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        raise PagodaError(f"not a row of the {format} format: {missing}; its keys: {', '.join(row)}") from None
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    if not any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in messages):
        raise PagodaError("the row has no answer")
    return messages, _tools(row.get("tools"))


def _recognise(row: Row) -> str:
    if "messages" in row or isinstance(row.get("prompt"), list):
        return "messages"
    if "conversations" in row or "conversation" in row:
        return "sharegpt"
    if "instruction" in row and row.keys() & {"output", "response"}:
        return "alpaca"
    if any(question in row and answer in row for question, answer in PAIRS):
        return "prompt"
    pairs = " or ".join(f"{question} and {answer}" for question, answer in PAIRS)
    raise PagodaError(
        f"unknown format with the keys {', '.join(row) or '(none)'}; known: alpaca (instruction, input, output),"
        f" sharegpt (conversations), messages (messages), prompt ({pairs})"
    )


def _alpaca(row: Row) -> Messages:
    """Stanford Alpaca; `context` and `response` are Dolly's names, `history` (pairs of turns) is LLaMA-Factory's."""
    messages = []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    instruction, more = _text(row["instruction"]), _text(row.get("input") or row.get("context"))
    question = {"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction}
    if not messages:  # the alpaca template writes the two apart
        question |= {"instruction": instruction, "input": more}
    answer = row["output"] if "output" in row else row["response"]
    return [*messages, question, {"role": "assistant", "content": _text(answer)}]


_ROLES = dict(human="user", user="user", gpt="assistant", assistant="assistant", chatgpt="assistant", model="assistant")
_ROLES |= dict(system="system", developer="system", observation="tool", tool="tool", function="tool")
_ROLES |= dict(function_call="assistant")


def _sharegpt(row: Row) -> Messages:
    """Turns of `from` and `value`; `function_call` is a turn of the assistant, `observation` what the function said."""
    messages = []
    for turn in _parsed(row["conversations"] if "conversations" in row else row["conversation"]):
        if "role" in turn:  # OpenAI's keys under ShareGPT's name
            messages.append(_message(turn))
            continue
        message = {"role": _role(turn["from"]), "content": _text(turn["value"])}
        if turn["from"] == "function_call":
            calls = json.loads(turn["value"])
            calls = calls if isinstance(calls, list) else [calls]
            message |= {"content": "", "tool_calls": [_call(call) for call in calls]}
        messages.append(message)
    return messages


def _messages(row: Row) -> Messages:
    turns = _parsed(row["messages"]) if "messages" in row else [*row["prompt"], *row["completion"]]
    return [_message(turn) for turn in turns]


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's form. What a template may know besides (`reasoning_content`, `name`) stays."""
    message = turn | {"role": _role(turn["role"]), "content": _text(turn.get("content"))}
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    message.pop("function_call", None)
    message.pop("tool_calls", None)
    return message | ({"tool_calls": [_call(call) for call in calls]} if calls else {})


PAIRS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response")]


def _prompt(row: Row) -> Messages:
    question, answer = next(((q, a) for q, a in PAIRS if q in row and a in row), PAIRS[0])
    return [
        {"role": "user", "content": _text(row[question])},
        {"role": "assistant", "content": _text(row[answer])},
    ]


FORMATS: dict[str, Callable[[Row], Messages]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt": _prompt,
}


def _parsed(value: Any) -> Any:
    """CSV files hold lists as JSON text."""
    return json.loads(value) if isinstance(value, str) else value


def _role(name: str) -> str:
    if name not in _ROLES:
        raise ValueError(f"unknown role '{name}'")
    return _ROLES[name]


def _text(content: Any) -> str:
    """Content is a text, or OpenAI's list of parts."""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("only text can be trained on")
        return "".join(part["text"] for part in content)
    return "" if content is None else content if isinstance(content, str) else str(content)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call as templates want it: the arguments an object, where OpenAI has JSON text."""
    function = dict(call.get("function", call))
    with contextlib.suppress(ValueError):
        function["arguments"] = _parsed(function.get("arguments") or {})
    return {"type": "function", **({"id": call["id"]} if "id" in call else {}), "function": function}


def _tools(tools: Any) -> Tools:
    try:
        tools = _parsed(tools or [])
    except ValueError:
        raise PagodaError("`tools` is broken JSON") from None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


# Messages to text, and what of it is trained --------------------------------------------------------------------------


def answer_spans(
    tokenizer: Tokenizer, messages: Messages, tools: Tools = None, everything: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The template's text of a conversation, and (begin, end) in characters of what is trained in it: every turn of the
    assistant with the token that ends it, or all of the text.

    What the template itself marks by `{% generation %}` is taken as it is. Otherwise turn i is what the conversation up
    to it has more than the prompt for it; both are rendered, and found again in the whole. Where that fails, because
    the template writes the same turns differently in each of the three, the turn is what changes with its content.
    PagodaError for a template that leaves neither way.
    """
    messages, tools = spell_out_tools(tokenizer.chat_template or "", messages, tools)
    variables = {"tools": tools, "strftime_now": _some_day}

    def rendered(messages: Messages, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages, prompt, **variables)

    whole = rendered(messages)
    if everything:
        return whole, [(0, len(whole))]
    marked = generation_spans(tokenizer.chat_template, messages, **tokenizer.special, **variables)
    if marked is not None:
        return whole, marked
    special = "|".join(re.escape(token) for token in tokenizer.special_tokens)
    spans, before, done = [], "", 0  # the conversation up to the turn before, and where that ends in the whole
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = rendered(messages[:i], prompt=True), rendered(messages[: i + 1])
        answer, begin, end = answered[len(prompt) :], -1, -1
        if answered.startswith(prompt):
            if whole.startswith(prompt):
                begin = len(prompt)
            elif prompt.startswith(before) and whole.startswith(prompt[len(before) :], done):
                begin = done + len(prompt) - len(before)  # an earlier turn reads differently here
            end = begin + _overlap(answer, whole[begin:])
        if not done <= begin < end and not message.get("tool_calls"):
            begin, rest = _around(rendered([*messages[:i], message | {"content": _MARK}, *messages[i + 1 :]]), whole)
            closing = re.match(rf"\s*(?:{special})", whole[rest:])
            end = rest + (closing.end() if closing and special else 0)
        if not done <= begin < end:
            raise PagodaError(
                f"the template writes message {i + 1} differently once others follow, so it is not clear what to train:"
                " train on all, or name another template"
            )
        before, done = answered, end
        # The model stops at the end token; a line break behind it is the template's.
        closed = re.search(rf"(?:{special})(?=\s*$)", whole[begin:end])
        spans.append((begin, begin + closed.end() if closed and special else end))
    return whole, spans


_MARK = "\ufdd2"  # one of the code points that Unicode keeps out of every text


def _around(changed: str, whole: str) -> tuple[int, int]:
    """Where that stands in the whole which is _MARK in `changed`: (begin, end), or (-1, -1) if more has changed."""
    head, _, tail = changed.partition(_MARK)
    fits = _MARK in changed and whole.startswith(head) and whole.endswith(tail)
    # No prompt ends with a space: one before the content is the model's to say.
    return (len(head.rstrip(" ")), len(whole) - len(tail)) if fits else (-1, -1)


def _overlap(a: str, b: str) -> int:
    """Length of the longest end of `a` that `b` begins with: all of `a`, unless the template drops something of a turn
    that is not the last (Qwen3's empty thoughts)."""
    return next((n for n in range(min(len(a), len(b)), 0, -1) if b.startswith(a[len(a) - n :])), 0)


def _some_day(format: str) -> str:
    """Templates that write today's date get Llama 3's own default, so that data are the same on every day."""
    from datetime import datetime

    return datetime(2024, 7, 26).strftime(format)


# Examples to rows -----------------------------------------------------------------------------------------------------


def split_by_hash(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(training, validation): an example goes where the hash of its tokens says, whatever else is in the set, and equal
    examples go together. Either side has one at least; a set of fewer than two kinds raises PagodaError."""
    hashes = [hashlib.blake2b(example.tokens.tobytes(), digest_size=8).digest() for example in examples]
    places = [int.from_bytes(digest, "little") / 2**64 for digest in hashes]
    ordered = sorted(set(places))
    if len(ordered) < 2:
        raise PagodaError("one example cannot be split: give validation data of its own, or none")
    border = min(max(share, ordered[1]), ordered[-1])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, place in zip(examples, places):
        sides[place < border].append(example)
    return sides


class InstructionRows:
    """A data source for the training loop: examples, several to a row of `seq_len` tokens, each a document of its own.

    packing: best fit, longest first; without it each row is one example.
    fill: make each row `seq_len` tokens long by a document of zeros that nothing is trained on; torch.compile wants
        that, a CPU is quicker without.
    sequential: all rows once, in order (validation); else epoch after epoch, each permuted by `seed`.

    Nothing is stored behind the last token that is trained on: no loss depends on it. Longer examples are cut at the
    end; those that lose all of their answer are left out (`summary` counts both). PagodaError when none is left.

    n_rows: rows of an epoch.  fingerprint: of the tokens and what is trained of them.
    """

    def __init__(
        self,
        examples: list[Example],
        seq_len: int,
        seed: int = 0,
        packing: bool = True,
        fill: bool = False,
        sequential: bool = False,
    ):
        self.seq_len, self.seed, self.fill, self.sequential = seq_len, seed, fill, sequential
        self.examples: list[Example] = []
        self.truncated = self.tokens_lost = self.dropped = 0
        digest = hashlib.blake2b(digest_size=16)
        for example in examples:
            self._add(example)
            digest.update(example.tokens.tobytes() + example.trained.tobytes())
        self.fingerprint = digest.hexdigest()
        if not self.examples:
            raise PagodaError(f"no example has a token to train on within seq_len {seq_len}: make it larger")
        # As inputs; the last token of an example is a target only.
        lengths = [len(example.tokens) - 1 for example in self.examples]
        self.packs = _best_fit(lengths, seq_len) if packing else [[i] for i in range(len(lengths))]
        self.n_rows, self.n_tokens = len(self.packs), sum(lengths)
        self.n_trained = sum(int(example.trained[1:].sum()) for example in self.examples)

    def _add(self, example: Example) -> None:
        n = int(example.trained.nonzero()[0][-1]) + 1 if example.trained.any() else 0
        kept = min(n, self.seq_len + 1)
        if not example.trained[1:kept].any():
            self.dropped += 1
            return
        self.truncated += kept < n
        self.tokens_lost += n - kept
        self.examples.append(Example(example.tokens[:kept], example.trained[:kept]))

    def rows(self, first: int, n: int) -> Rows:
        """Rows first to first + n - 1 of the endless sequence (of the only pass, if sequential) as one flat stream."""
        import torch

        tokens, targets, lengths = [], [], []
        for index in range(first, first + n):
            epoch, place = divmod(index, self.n_rows)
            if self.sequential and epoch:
                raise IndexError(f"row {index} of {self.n_rows}")
            if not self.sequential:
                place = permuted(place, self.n_rows, draws(self.seed, epoch))
            room = self.seq_len
            for i in self.packs[place]:
                example = self.examples[i]
                tokens.append(example.tokens[:-1])
                targets.append(np.where(example.trained[1:], example.tokens[1:], IGNORE))
                lengths.append(len(tokens[-1]))
                room -= lengths[-1]
            if self.fill and room:
                tokens.append(np.zeros(room, np.int64))
                targets.append(np.full(room, IGNORE))
                lengths.append(room)
        flat, wanted = (np.concatenate(parts).astype(np.int64) for parts in (tokens, targets))
        scored = int((wanted != IGNORE).sum())
        return Rows(torch.from_numpy(flat), torch.from_numpy(wanted), lengths, scored)

    @property
    def fullness(self) -> float:
        """Share of the rows' places that examples take."""
        return self.n_tokens / (self.n_rows * self.seq_len)

    def summary(self) -> str:
        text = (
            f"{len(self.examples):,} examples, {self.n_tokens:,} tokens ({self.n_trained:,} trained on)"
            f" in {self.n_rows:,} {'row' if self.n_rows == 1 else 'rows'} of {self.seq_len}"
            f" ({self.fullness:.1%} full); {self.truncated:,} truncated"
        )
        text += f" ({self.tokens_lost:,} tokens lost)" if self.truncated else ""
        return text + (f"; {self.dropped:,} left out, all of their answer cut away" if self.dropped else "")


def _best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the row where it leaves the least (Johnson 1973)."""
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (places left, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(spaces, (lengths[i], 0))
        if at < len(spaces):
            left, row = spaces.pop(at)
            packs[row].append(i)
        else:
            left, row = room, len(packs)
            packs.append([i])
        if left > lengths[i]:
            insort(spaces, (left - lengths[i], row))
    return packs
