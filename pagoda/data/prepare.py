"""Text to shards of tokens (shards.py), by several processes, killed at any time and taken up again.

The corpus is a list of units in a fixed order. Worker processes tokenize units, this process appends their documents
to the shards in the order of the units, and after each unit records in progress.json how far it is. Whatever a killed
run wrote behind that record is cut off by the next one. So the shards depend on the sources and the options only: not
on the number of processes, nor on how often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagoda.common import PagodaError, keep_heap, progress, read_json, replacing
from pagoda.data.corpus import Unit, all_documents, documents, list_units
from pagoda.data.options import Preparation, Reading
from pagoda.data.shards import FORMAT, SPLITS, ShardWriter, digest, token_dtype
from pagoda.data.tokenizer import Tokenizer, load_tokenizer
from pagoda.data.vocabulary import character_tokenizer, find_tokenizer

BATCH_CHARACTERS = 1 << 18  # of text tokenized at once: what it leaves in memory fits a cache
PIECE_CHARACTERS = 1 << 22  # longer documents are tokenized in pieces, where that makes no difference


def prepare(
    sources: list[str | os.PathLike], out: str | os.PathLike, reading: Reading, options: Preparation
) -> dict[str, Any]:
    """Write a prepared set into the folder `out`, or go on with an unfinished one, and return its manifest.

    A set that is there already, of the same sources and options, is left as it is. Raises PagodaError for sources that
    cannot be read, for a tokenizer without an end-of-text token, and for an `out` that holds something else.
    """
    out = Path(out)
    units = list_units(sources, reading)
    if inside := next((s for s in sources if Path(s).is_dir() and out.resolve().is_relative_to(Path(s).resolve())), 0):
        raise PagodaError(f"{out} lies in {inside}, which is to be read: choose another place")
    tokenizer = None if options.tokenizer == "char" else find_tokenizer(options.tokenizer)
    job = job_of(units, tokenizer, reading, options)
    if (out / "manifest.json").is_file():
        manifest = read_json(out / "manifest.json")
        if manifest.get("job") != job:
            raise PagodaError(f"{out} holds a set of other data or options: remove it or choose another place")
        return manifest
    record = read_progress(out, job)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if record is None:
            save_tokenizer(tokenizer or character_tokenizer(all_documents(units, reading)), out)
            record = {"job": job, "units": 0, "skipped": [], "splits": {}}
            write_json(out / "progress.json", record)
        return write_set(out, units, record, Worker(tokenizer or load_tokenizer(out / "tokenizer"), reading, options))
    except OSError as error:
        if error.filename and not str(error.filename).startswith(str(out)):
            raise
        raise PagodaError(f"cannot write {out}: {error.strerror}; make room and run the same command again") from None


def job_of(units: list[Unit], tokenizer: Tokenizer | None, reading: Reading, options: Preparation) -> str:
    """A fingerprint of all that the shards depend on."""
    files = dict.fromkeys(path for unit in units for path in unit.paths)
    stats = [(Path(path).name, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    chosen = vars(options) | {"tokenizer": tokenizer.fingerprint if tokenizer else "char", "workers": 0}
    return digest([FORMAT, stats, [(u.kind, u.first, u.last) for u in units], vars(reading), chosen])


def read_progress(out: Path, job: str) -> dict[str, Any] | None:
    """How far an earlier run came; None if there was none."""
    if (out / "progress.json").is_file():
        record = read_json(out / "progress.json")
        if record["job"] != job:
            raise PagodaError(
                f"{out} holds an unfinished set, and since it was begun its sources or options have changed: "
                "remove it or choose another place"
            )
        return record
    # A run that was killed before its first record leaves the tokenizer, perhaps, and temporary files.
    if out.exists() and (not out.is_dir() or any(path.name != "tokenizer" for path in remains(out))):
        raise PagodaError(f"{out} exists already: remove it or choose another place")
    return None


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    if tokenizer.eos_id is None:
        raise PagodaError("the tokenizer has no end-of-text token (eos_token in its tokenizer_config.json)")
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    with replacing(out / "tokenizer") as temporary:
        tokenizer.save(temporary)


def remains(out: Path) -> list[Path]:
    """What is in `out`, but for the temporary files of killed runs."""
    return [path for path in out.iterdir() if not (path.name.startswith(".") and path.name.endswith(".partial"))]


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def write_set(out: Path, units: list[Unit], record: dict[str, Any], mine: Worker) -> dict[str, Any]:
    """Tokenize the units that `record` says are missing, then write the manifest."""
    shard_tokens, tokenizer = mine.options.shard_tokens, mine.tokenizer
    writers = {
        split: ShardWriter(out, split, mine.dtype, shard_tokens, record["splits"].get(split)) for split in SPLITS
    }
    with tokenized(units[record["units"] :], mine, out / "tokenizer") as results:
        for result in progress(results, "tokenizing", len(units), record["units"]):
            for split, writer in writers.items():
                writer.append(*result.splits[split])
                writer.flush()
            record["units"] += 1
            record["skipped"] += result.skipped
            record["splits"] = {split: writer.state for split, writer in writers.items()}
            write_json(out / "progress.json", record)
    if not any(writer.state["bytes"] for writer in writers.values()):
        raise PagodaError("the sources hold no text")
    manifest = {
        "format": FORMAT,
        "job": record["job"],
        "dtype": mine.dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "skipped": record["skipped"],
        "splits": {split: writer.close() for split, writer in writers.items()},
    }
    write_json(out / "manifest.json", manifest)
    (out / "progress.json").unlink()
    for path in set(out.iterdir()) - set(remains(out)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return manifest


# Processes ----------------------------------------------------------------------------------------


@contextmanager
def tokenized(units: list[Unit], mine: Worker, tokenizer: Path) -> Iterator[Iterable[Result]]:
    """The units' results in order, by processes of one thread each: they scale better than threads that share a
    tokenizer's cache. One unit, or one process, is done here."""
    global worker
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(mine.options.workers or cores, len(units))
    if workers <= 1:
        yield map(mine.tokenize, units)
        return
    # A forked process starts at once and with this worker, but must not inherit torch's threads.
    forked = sys.platform == "linux" and "torch" not in sys.modules
    worker = mine if forked else None
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork" if forked else "spawn"),
        start_worker,
        () if forked else (tokenizer, mine.reading, mine.options),
    )
    try:
        yield in_order(pool, units, 2 * workers)
    except BrokenProcessPool:
        raise PagodaError(
            "a process was killed, by lack of memory perhaps: run the same command again with fewer --workers; "
            "it goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_order(pool: ProcessPoolExecutor, units: list[Unit], ahead: int) -> Iterator[Result]:
    """Results in the order of the units, at most `ahead` units begun before the next one is taken."""
    pending: deque = deque()
    for unit in units:
        pending.append(pool.submit(tokenize_unit, unit))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


worker: Worker | None = None  # of this process


def start_worker(*made_of: Any) -> None:
    """In a new process, which inherited its worker or makes one of a tokenizer's folder, reading and preparation."""
    global worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    keep_heap()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # and must not be outlived
    if made_of:
        tokenizer, *rest = made_of
        worker = Worker(load_tokenizer(tokenizer), *rest)


def tokenize_unit(unit: Unit) -> Result:
    return worker.tokenize(unit)


# Tokenizing ---------------------------------------------------------------------------------------


@dataclass
class Result:
    """A unit's documents. splits: by split, (tokens (N,), ends (D,) int64, bytes of text); skipped: files that are no
    text."""

    splits: dict[str, tuple[np.ndarray, np.ndarray, int]]
    skipped: list[str]


class Worker:
    """Tokenizes units: what the model puts before a text (a BOS or nothing), the document's ids, the end of text."""

    def __init__(self, tokenizer: Tokenizer, reading: Reading, options: Preparation):
        self.tokenizer, self.reading, self.options = tokenizer, reading, options
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.code = "H" if self.dtype.itemsize == 2 else "I"
        probe, around = (self.tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
        at = next((i for i in range(len(around)) if around[i : i + len(probe)] == probe), 0)
        self.before = np.array(around[:at], self.dtype)
        self.end = np.array([self.tokenizer.eos_id], self.dtype)
        # Whether a text may be cut behind a line end: not where each text gets a space of its own in front.
        first, second = (self.tokenizer.encode(text, add_special_tokens=False) for text in ("a\n", "b"))
        self.may_cut = self.tokenizer.encode("a\nb", add_special_tokens=False) == first + second

    def tokenize(self, unit: Unit) -> Result:
        skipped: list[str] = []
        ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
        n_bytes = dict.fromkeys(SPLITS, 0)
        pieces: list[str] = []
        owners: list[tuple[str, int]] = []  # split and number of pieces of each text

        def encode() -> None:
            encoded = iter(self.tokenizer.encode_batch(pieces, add_special_tokens=False))
            for split, n in owners:
                # An array of Python's takes a list three times as fast as one of numpy's.
                made = (np.frombuffer(array(self.code, next(encoded)), self.code) for _ in range(n))
                parts = [self.before, *made, self.end]
                ids[split] += parts
                lengths[split].append(sum(map(len, parts)))
            pieces.clear()
            owners.clear()

        waiting = 0
        for document in documents(unit, self.reading, skipped):
            for split, text, size in self.divide(document):
                cut = list(self.cut(text))
                pieces += cut
                owners.append((split, len(cut)))
                n_bytes[split] += size
                waiting += len(text)
            if waiting >= BATCH_CHARACTERS:
                encode()
                waiting = 0
        encode()
        none = np.empty(0, self.dtype)
        return Result(
            {
                split: (np.concatenate([none, *ids[split]]), np.cumsum(lengths[split], dtype=np.int64), n_bytes[split])
                for split in SPLITS
            },
            skipped,
        )

    def divide(self, text: str) -> Iterator[tuple[str, str, int]]:
        """(split, text, bytes) of what a document gives to the splits."""
        train, validation = SPLITS
        fraction = self.options.val_fraction
        if self.options.split_by == "position":
            place = int(len(text) * (1 - fraction))
            for split, part in ((train, text[:place]), (validation, text[place:])):
                if part:
                    yield split, part, len(part.encode())
            return
        data = text.encode()
        drawn = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2**64
        yield validation if drawn < fraction else train, text, len(data)

    def cut(self, text: str) -> Iterator[str]:
        """A very long text in pieces: tokenizing keeps a hundred bytes per token."""
        place = 0
        while self.may_cut and (match := _LINE_END.search(text, place + PIECE_CHARACTERS)):
            yield text[place : match.end()]
            place = match.end()
        yield text[place:]


_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")  # no tokenizer joins these with what follows


def summary(manifest: dict[str, Any]) -> str:
    """What a set holds, for people."""
    parts = [
        f"{split} {part['tokens']:,} tokens in {part['documents']:,} documents ({part['bytes'] / 1e6:.1f} MB of text)"
        for split, part in manifest["splits"].items()
    ]
    return "; ".join(parts)
