"""What a user can ask of reading and preparing data. Free of torch, so that `--help` stays fast."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.common import demand, one_of


@dataclass
class Reading:
    """How documents are found in files.

    Args:
        text_field: the field with the text, in JSON, JSONL, CSV, Parquet and Arrow files.
        document_separator: what divides a text file into documents, such as "\\n\\n" for blank lines or
            "<|endoftext|>"; without it a file is one document.
        include: which files of a folder to read, such as "*.py".
    """

    text_field: str = "text"
    document_separator: str = ""
    include: str = "*"

    def __post_init__(self):
        for written, meant in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):  # shells pass them on as they are
            self.document_separator = self.document_separator.replace(written, meant)


@dataclass
class Preparation:
    """How documents become shards of tokens.

    Args:
        tokenizer: a model (name, directory, GGUF file, Hub id), a directory with a tokenizer, a tokenizer.json, or
            `char` (the characters of the data) or `bytes`.
        val_fraction: how much goes to the validation split.
        split_by: `document` sends whole documents there, chosen by a hash of their text; `position` the last part of
            every document (for a single long text).
        shard_tokens: a shard ends with the document that brings it to this many tokens.
        workers: processes (0: one per core).
    """

    tokenizer: str = ""
    val_fraction: float = 0.01
    split_by: str = "document"
    shard_tokens: int = 100_000_000
    workers: int = 0

    def __post_init__(self):
        one_of("split_by", self.split_by, ("document", "position"))
        demand(
            self,
            val_fraction=(0 <= self.val_fraction < 1, "at least 0 and below 1"),
            shard_tokens=(self.shard_tokens >= 1, "at least 1"),
            workers=(self.workers >= 0, "0 (one per core) or more"),
        )


@dataclass
class InstructionOptions:
    """How rows of instruction data become tokens.

    Args:
        template: a chat template by name (alpaca, vicuna, chatml, llama-2, llama-3, mistral, zephyr, gemma, phi-3,
            plain) or a .jinja file; the model's own without it.
        format: alpaca, sharegpt, messages or prompt; auto recognises each row by its keys.
        train_on: answers (every turn of the assistant) or all.
        packing: let several examples share a row (none sees another).
        skip_bad_rows: leave out rows that cannot be used, and count them.
    """

    template: str | None = None
    format: str = "auto"
    train_on: str = "answers"
    packing: bool = True
    skip_bad_rows: bool = False

    def __post_init__(self):
        one_of("format", self.format, ("auto", "alpaca", "sharegpt", "messages", "prompt"))
        one_of("train_on", self.train_on, ("answers", "all"))
