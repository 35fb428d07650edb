"""What a model would be trained on, for human eyes: examples with their trained parts marked, and the totals."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from pagoda.data.instruct import Example, InstructionRows, Instructions
from pagoda.data.tokenizer import Tokenizer

GREEN, FAINT, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def parts(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text in pieces: (text, whether it is trained on), special tokens included."""
    pieces, shown, end = [], "", 0
    for trained, run in groupby(example.trained.tolist()):
        end += len(list(run))
        text = tokenizer.decode(example.tokens[:end].tolist(), skip_special_tokens=False)
        pieces.append((text[len(shown) :], trained))
        shown = text
    return pieces


def as_text(data: Instructions, rows: InstructionRows, tokenizer: Tokenizer, n: int, colour: bool) -> str:
    """The first n examples with what is trained on in colour or between marks, then the totals."""
    special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)) or r"\b\B")  # else: what is never found

    def drawn(text: str, trained: bool) -> str:
        if not colour:
            return f"[[{text}]]" if trained else text
        if trained:  # line by line: pagers forget a colour at the end of one
            return re.sub(r"[^\n]+", lambda line: GREEN + line[0] + PLAIN, text)
        return special.sub(lambda token: FAINT + token[0] + PLAIN, text)

    lines = []
    for i, example in enumerate(data.examples[:n], 1):
        head = f"--- example {i}: {len(example.tokens)} tokens, {example.trained.sum()} trained on"
        lines += [f"{FAINT}{head}{PLAIN}" if colour else head]
        lines += ["".join(drawn(*part) for part in parts(example, tokenizer)).rstrip("\n"), ""]
    formats = ", ".join(f"{count:,} of the {name} format" for name, count in data.formats.most_common())
    return "\n".join([*lines, f"rows read: {formats}", rows.summary()])


def as_json(data: Instructions, rows: InstructionRows, tokenizer: Tokenizer, n: int) -> dict[str, Any]:
    """The same for programs."""
    examples = [
        {
            "tokens": len(example.tokens),
            "trained_tokens": int(example.trained.sum()),
            "parts": [{"text": text, "trained": trained} for text, trained in parts(example, tokenizer)],
        }
        for example in data.examples[:n]
    ]
    totals = {
        "examples": len(rows.examples),
        "tokens": rows.n_tokens,
        "trained_tokens": rows.n_trained,
        "rows": rows.n_rows,
        "seq_len": rows.seq_len,
        "fullness": rows.fullness,
        "truncated": rows.truncated,
        "tokens_lost": rows.tokens_lost,
        "dropped": rows.dropped,
        "bad_rows": data.bad_rows,
        "formats": dict(data.formats),
    }
    return {"examples": examples, "totals": totals, "notes": data.notes()}
