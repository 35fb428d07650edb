"""Documents of text, whatever they lie in: files, folders, JSONL, Parquet, Arrow, data sets of the Hugging Face hub.

`list_units` cuts the sources into units of work in a fixed order, about a megabyte of text each; `documents` reads one
of them. So processes can share the work, and a document keeps its place however many they are.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pagoda.common import PagodaError
from pagoda.data.options import Reading
from pagoda.data.table import arrow, hub_dataset, read_rows

UNIT_BYTES = 1 << 20
LINES = (".jsonl", ".ndjson")
ARROW = (".parquet", ".arrow")
TABLES = (".json", ".csv", ".tsv")  # read whole, where they are named


@dataclass(frozen=True)
class Unit:
    """A piece of the corpus.

    kind    text: whole files, one document each; records: what begins in bytes first..last-1 of a file, divided by
            the separator; lines: the same, JSON lines; table: the rows of a whole file; arrow: rows first..last-1 of
            an Arrow file; parquet: row group `first`
    paths   the files
    strict  whether a file that is no UTF-8 text is an error; otherwise it is skipped
    """

    kind: str
    paths: tuple[str, ...]
    first: int = 0
    last: int = 0
    strict: bool = True


def list_units(sources: Iterable[str | os.PathLike], reading: Reading) -> list[Unit]:
    """The units of files, folders (sorted by name; where one holds data files, these only) and hub data sets
    (`org/name[/config][@revision][:split]`)."""
    units = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = list(files_below(path, reading.include))
            data = [file for file in files if suffix_of(file) in (*LINES, *ARROW)]
            if not files:
                raise PagodaError(f"{path} holds no files named {reading.include}")
            units += units_of(data or files, reading, strict=bool(data))
        elif path.is_file():
            units += units_of([path], reading, strict=True)
        elif (dataset := hub_dataset(str(source))) is not None:
            units += units_of([Path(file["filename"]) for file in dataset.cache_files], reading, strict=True)
        else:
            raise PagodaError(f"no such file or directory: '{source}'")
    return units


def files_below(folder: Path, include: str) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(fnmatch.filter(names, include)):
            if not name.startswith(".") and os.path.isfile(os.path.join(parent, name)):
                yield Path(parent, name)


def suffix_of(path: Path) -> str:
    """The kind of a file by its name, behind which `.gz` may stand."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def units_of(files: list[Path], reading: Reading, strict: bool) -> Iterator[Unit]:
    together, size = [], 0  # small text files that make a unit
    for path in files:
        suffix, n_bytes = suffix_of(path), path.stat().st_size
        if suffix in LINES or (reading.document_separator and suffix not in (*ARROW, *TABLES)):
            kind, separator = ("lines", "\n") if suffix in LINES else ("records", reading.document_separator)
            step = UNIT_BYTES if path.suffix != ".gz" and divides_anywhere(separator) else n_bytes
            yield from (Unit(kind, (str(path),), at, at + step, strict) for at in range(0, n_bytes, max(step, 1)))
        elif suffix == ".parquet":
            yield from (Unit("parquet", (str(path),), group) for group in range(open_parquet(path).num_row_groups))
        elif suffix == ".arrow":
            n_rows = open_arrow(path).num_rows
            step = max(1, n_rows * UNIT_BYTES // n_bytes)
            yield from (Unit("arrow", (str(path),), at, min(at + step, n_rows)) for at in range(0, n_rows, step))
        elif suffix in TABLES and strict:
            yield Unit("table", (str(path),))
        else:
            together.append(str(path))
            size += n_bytes
            if size >= UNIT_BYTES:
                yield Unit("text", tuple(together), strict=strict)
                together, size = [], 0
    if together:
        yield Unit("text", tuple(together), strict=strict)


def divides_anywhere(separator: str) -> bool:
    """Whether records can be found from the middle of a file: not if a separator may overlap the next one. (Line ends
    may: all that stand together divide once.)"""
    overlaps = any(separator.endswith(separator[:n]) for n in range(1, len(separator)))
    return not overlaps or not separator.strip("\r\n")


def documents(unit: Unit, reading: Reading, skipped: list[str]) -> Iterator[str]:
    """The texts of a unit, empty ones left out. Paths of files that are no text are added to `skipped`."""
    if unit.kind == "text":
        texts = whole_files(unit, skipped)
    elif unit.kind in ("records", "lines"):
        texts = records(unit, reading, skipped)
    elif unit.kind == "table":
        texts = (text_of(row, reading.text_field, where) for where, row in read_rows(unit.paths[0]))
    else:
        texts = column(unit, reading.text_field)
    return (text for text in texts if text)


def all_documents(units: Iterable[Unit], reading: Reading) -> Iterator[str]:
    for unit in units:
        yield from documents(unit, reading, [])


def whole_files(unit: Unit, skipped: list[str]) -> Iterator[str]:
    for path in unit.paths:
        try:
            text = bytes(contents(path)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if unit.strict:
                raise not_text(path, error.start) from None
            skipped.append(path)
            continue
        if "\0" in text and not unit.strict:  # a binary file that happens to be valid
            skipped.append(path)
            continue
        yield text


def records(unit: Unit, reading: Reading, skipped: list[str]) -> Iterator[str]:
    """What stands between separators and begins in the unit, without the line ends around it."""
    (path,) = unit.paths
    separator = b"\n" if unit.kind == "lines" else reading.document_separator.encode()
    data = contents(path)
    last = len(data) if path.endswith(".gz") else unit.last

    line_ends = not separator.strip(b"\r\n")

    def behind(found: int) -> int:
        """Where the record after the separator at `found` begins."""
        if found < 0:
            return len(data)
        found += len(separator)
        while line_ends and data[found : found + 1] in (b"\n", b"\r"):
            found += 1
        return found

    place = unit.first and behind(data.find(separator, max(0, unit.first - len(separator))))
    while place < min(last, len(data)):
        end = data.find(separator, place)
        record = data[place : end if end >= 0 else len(data)]
        try:
            text = record.decode("utf-8-sig" if place == 0 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            if unit.strict:
                raise not_text(path, place + error.start) from None
            skipped.append(path)
            return
        if unit.kind == "lines" and text.strip():
            where = f"{path} byte {place}"
            try:
                row = json.loads(text)
            except ValueError as error:
                raise PagodaError(f"{where}: broken JSON ({error}); every line must be an object") from None
            text = text_of(row, reading.text_field, where)
        yield text
        place = behind(end)


def column(unit: Unit, field: str) -> Iterator[str]:
    """The texts of rows of a Parquet or Arrow file."""
    path = Path(unit.paths[0])
    table = open_parquet(path) if unit.kind == "parquet" else open_arrow(path)
    names = (table.schema_arrow if unit.kind == "parquet" else table.schema).names
    if field not in names:
        raise no_field(str(path), field, names)
    if unit.kind == "parquet":
        with arrow(path):
            table = table.read_row_group(unit.first, columns=[field])
    else:
        table = table.slice(unit.first, unit.last - unit.first)
    for batch in table.select([field]).to_batches(1000):
        for row in batch.to_pylist():
            yield text_of(row, field, str(path))


def text_of(row: object, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        raise no_field(where, field, row if isinstance(row, dict) else ())
    if not isinstance(row[field] or "", str):
        raise PagodaError(f"{where}: the field '{field}' is no text: {str(row[field])[:40]}; give --text_field")
    return row[field] or ""


def no_field(where: str, field: str, names: Iterable[str]) -> PagodaError:
    names = ", ".join(names) or "none"
    return PagodaError(f"{where} has no field '{field}' (its fields: {names}): give --text_field")


def not_text(path: str, place: int) -> PagodaError:
    return PagodaError(f"{path} is not UTF-8 text (byte {place}): convert it first")


def contents(path: str) -> mmap.mmap | bytes:
    """The bytes of a file, decompressed if they are."""
    try:
        if path.endswith(".gz"):
            with gzip.open(path) as file:
                return file.read()
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b""
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PagodaError(f"{path} is damaged ({error}); copy it again") from None
    except OSError as error:
        raise PagodaError(f"cannot read {path}: {error.strerror}") from None


def open_parquet(path: Path):
    """A pyarrow ParquetFile."""
    with arrow(path) as pyarrow:
        return pyarrow.parquet.ParquetFile(path)


def open_arrow(path: Path):
    """A pyarrow table over the mapped file (`datasets` writes streams, others files)."""
    with arrow(path) as pyarrow:
        source = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).read_all()
