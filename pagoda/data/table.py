"""Rows of data files: JSON, JSONL, CSV, Parquet, folders of them, and data sets of the Hugging Face hub.

`read_rows` yields one dict per row, and where it stands (`data.jsonl line 3`), for the complaint about it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pagoda.common import PagodaError, optional, read_text

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(?P<config>[\w.-]+))?(@(?P<revision>[^:]+))?(:(?P<split>[\w.-]+))?"
)


def read_rows(source: str | os.PathLike) -> Iterator[tuple[str, Row]]:
    """(where, row) of every row of a file, of every data file below a folder (in the order of their names), or of a hub
    data set: `org/name[/config][@revision][:split]`, split `train` if not given.

    What cannot be read, and what holds no row at all, raises PagodaError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise PagodaError(f"{path} holds no data files ({', '.join(SUFFIXES)})")
        rows = (row for file in files for row in _read_file(file, str(file.relative_to(path))))
    elif path.is_file():
        rows = _read_file(path, path.name)
    elif (dataset := hub_dataset(str(source))) is not None:
        rows = ((f"{source} row {i}", _without_none(row)) for i, row in enumerate(dataset, 1))
    else:
        raise PagodaError(f"no such file or directory: '{source}'")
    empty = True
    for where, row in rows:
        if not isinstance(row, dict):
            raise PagodaError(f"{where} is no object with named fields: {json.dumps(row, ensure_ascii=False)[:60]}")
        empty = False
        yield where, row
    if empty:
        raise PagodaError(f"{source} is empty: it holds no rows")


def _read_file(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise PagodaError(f"{path} is none of the files that can be read ({', '.join(SUFFIXES)})")
    if suffix == ".parquet":
        yield from _read_parquet(path, name)
        return
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        yield from _read_csv(text, name, "\t" if suffix == ".tsv" else ",")
    elif text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise PagodaError(f"{name} line {error.lineno} is broken JSON: {_slip(error)}") from None
        yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, 1))
    else:  # a row per line, whatever the file is called
        for i, line in enumerate(text.split("\n"), 1):  # a text may hold the other marks that end a line for Python
            if not line.strip():
                continue
            try:
                yield f"{name} line {i}", json.loads(line)
            except json.JSONDecodeError as error:
                hint = " (a file of JSON holds a list of objects, or one object per line)" if i == 1 else ""
                raise PagodaError(f"{name} line {i} is broken JSON: {_slip(error)}{hint}") from None


def _slip(error: json.JSONDecodeError) -> str:
    """`unterminated string starting at column 17`"""
    return f"{error.msg[0].lower()}{error.msg[1:].removesuffix(' at')} at column {error.colno}"


def _read_csv(text: str, name: str, delimiter: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            # More fields than names stand under None.
            if None in row or None in row.values():
                raise PagodaError(f"{name} line {reader.line_num} has not as many fields as the first line has names")
            yield f"{name} line {reader.line_num}", row
    except csv.Error as error:
        raise PagodaError(f"{name} line {reader.line_num} is broken CSV: {error}") from None


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    i = 0
    with arrow(path) as pyarrow:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            for row in batch.to_pylist():
                i += 1
                yield f"{name} row {i}", _without_none(row)


@contextmanager
def arrow(path: Path) -> Iterator[Any]:
    """The package pyarrow, to read a file with: what it has to complain about becomes PagodaError."""
    pyarrow, *_ = (optional(package, "data") for package in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"))
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError) as error:
        raise PagodaError(f"{path} cannot be read ({str(error).splitlines()[0]}); copy it again") from None


def hub_dataset(source: str):
    """The `datasets.Dataset` that a hub id (`org/name[/config][@revision][:split]`) names, None for other texts."""
    if not (match := _HUB_ID.fullmatch(source)) or Path(source).suffix.lower() in SUFFIXES:
        return None
    repo, config, revision, split = match.group("repo", "config", "revision", "split")
    datasets = optional("datasets", "data")
    try:
        return datasets.load_dataset(repo, config, revision=revision, split=split or "train")
    except Exception as error:  # network, unknown name, unknown split, a broken file: all end here
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PagodaError(
            f"no such path, and the hub's data set '{repo}' cannot be loaded ({reason});"
            " name it org/name[/config][@revision][:split]"
        ) from None


def _without_none(value: Any) -> Any:
    """Arrow gives every object every field that any object has: those that are not there are None."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
