"""Prepared tokens on disk, and rows of them for training.

A prepared set (`pagoda prepare` writes it) is a folder:

    manifest.json            what is in it: counts, the tokenizer's fingerprint, and per shard its size and checksum
    tokenizer/               the tokenizer's own files, for the final model to carry
    train-00000.tokens       the ids of whole documents, end to end: uint16, or uint32 for a vocabulary above 65,536
    train-00000.index        where each document ends (int64, in tokens), then a CRC-32 per block of tokens (uint32)
    validation-00000.tokens  ...

Files are mapped, not read. A block is checked against its CRC the first time that something in it is used, a small
set as a whole when it is opened. `PackedRows` makes training rows of one or several sets: which tokens row i has is a
pure function of i, so that a run resumes by its step alone and any number of processes agrees on the global batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagoda.common import PagodaError, read_json

if TYPE_CHECKING:
    import torch

    from pagoda.data.tokenizer import Tokenizer

FORMAT = "pagoda tokens 1"
SPLITS = ("train", "validation")
BLOCK = 1 << 20  # bytes of tokens under one checksum
CHECK_WHOLE = 1 << 30  # bytes up to which a set is checked when it is opened
PERIOD = 1 << 16  # rows after which a mixture repeats its pattern
IGNORE = -100  # a target that is not scored


@dataclass
class Rows:
    """n rows of seq_len tokens as one flat stream of N = n * seq_len.

    tokens   (N,) int64
    targets  (N,) int64: what each position should predict, -100 for nothing
    lengths  of the documents (or pieces of them) that the stream divides into; they sum to N
    scored   how many targets are not -100
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    lengths: list[int]
    scored: int


# Writing ------------------------------------------------------------------------------------------


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Appends whole documents to the shards of one split. `state` after `flush` says all that is needed to go on."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict | None = None):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        # closed shards, and the counts of the open one
        self.state = state or {"shards": [], "tokens": 0, "documents": 0, "bytes": 0}
        self._open()

    def _open(self) -> None:
        """Continue the open shard, without what a killed run wrote to it and did not record."""
        names = shard_files(self.split, len(self.state["shards"]))
        sizes = self.state["tokens"] * self.dtype.itemsize, self.state["documents"] * 8
        self.files = [open(self.folder / name, "ab") for name in names]  # noqa: SIM115
        for file, size in zip(self.files, sizes):
            if os.fstat(file.fileno()).st_size < size:
                raise PagodaError(f"{file.name} has lost what was written to it: remove {self.folder} and start again")
            file.truncate(size)

    def append(self, tokens: np.ndarray, ends: np.ndarray, n_bytes: int) -> None:
        """Documents end to end: tokens (N,), ends (D,) int64 with ends[-1] == N; n_bytes of text they came from."""
        self.state["bytes"] += n_bytes
        start = 0  # tokens written
        while len(ends):
            # A shard ends with the first document that fills it.
            room = self.shard_tokens - self.state["tokens"]
            n = min(int(np.searchsorted(ends, start + room)) + 1, len(ends))
            stop = int(ends[n - 1])
            self.files[0].write(tokens[start:stop].astype(self.dtype).tobytes())
            self.files[1].write((ends[:n] - start + self.state["tokens"]).astype("<i8").tobytes())
            self.state["tokens"] += stop - start
            self.state["documents"] += n
            start, ends = stop, ends[n:]
            if self.state["tokens"] >= self.shard_tokens:
                self._close_shard()
                self._open()

    def _close_shard(self) -> None:
        path, index = (self.folder / name for name in shard_files(self.split, len(self.state["shards"])))
        self.files[0].close()
        with open(path, "rb") as file:
            blocks = [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]
        self.files[1].write(np.array(blocks, "<u4").tobytes())
        self.files[1].close()
        shard = {name: self.state[name] for name in ("tokens", "documents")}
        self.state["shards"].append(shard | {"crc": zlib.crc32(index.read_bytes())})
        self.state["tokens"] = self.state["documents"] = 0

    def flush(self) -> None:
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> dict[str, Any]:
        """Finish, and return the split's part of the manifest."""
        if self.state["tokens"]:
            self._close_shard()
        else:
            for file in self.files:
                file.close()
                os.unlink(file.name)
        shards = self.state["shards"]
        counts = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens")}
        return counts | {"bytes": self.state["bytes"], "shards": shards}


def shard_files(split: str, number: int) -> tuple[str, str]:
    return f"{split}-{number:05}.tokens", f"{split}-{number:05}.index"


# Reading ------------------------------------------------------------------------------------------


class Shard:
    """The documents of one shard. Its files are mapped on first use."""

    def __init__(self, folder: Path, split: str, number: int, entry: dict[str, int], dtype: np.dtype):
        self.path, self.index = (folder / name for name in shard_files(split, number))
        self.n_tokens, self.n_documents, self.crc, self.dtype = entry["tokens"], entry["documents"], entry["crc"], dtype
        self.n_blocks = -(-self.n_tokens * dtype.itemsize // BLOCK)
        self.tokens: np.ndarray | None = None
        for path, size in (
            (self.path, self.n_tokens * dtype.itemsize),
            (self.index, 8 * self.n_documents + 4 * self.n_blocks),
        ):
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "missing" if found is None else f"truncated or damaged: {found} bytes instead of {size}"
                raise PagodaError(f"{path} is {what}; copy the set again or run `pagoda prepare` anew")

    def _map(self) -> None:
        index = np.memmap(self.index, np.uint8, "r").view(np.ndarray)
        if zlib.crc32(index) != self.crc:
            raise self._damaged(self.index)
        self.ends = index[: 8 * self.n_documents].view("<i8")
        self.crcs = index[8 * self.n_documents :].view("<u4")
        self.checked = bytearray(self.n_blocks)
        self.tokens = np.memmap(self.path, self.dtype, "r").view(np.ndarray)

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens first..last-1, a view of the file; PagodaError where the file is damaged."""
        if self.tokens is None:
            self._map()
        size = BLOCK // self.dtype.itemsize
        for b in range(first // size, -(-last // size)):
            if not self.checked[b] and zlib.crc32(self.tokens[b * size : (b + 1) * size]) != self.crcs[b]:
                raise self._damaged(self.path)
            self.checked[b] = True
        return self.tokens[first:last]

    def ends_between(self, first: int, last: int) -> np.ndarray:
        """Where documents end, first < end <= last: int64."""
        if self.tokens is None:
            self._map()
        a, b = self.ends.searchsorted((first, last), "right")
        return self.ends[a:b]

    def _damaged(self, path: Path) -> PagodaError:
        return PagodaError(f"{path} is corrupt (its checksum differs); copy the set again or run `pagoda prepare` anew")


class Stream:
    """The documents of one split end to end, as one ring of tokens over all shards."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.starts = list(accumulate((shard.n_tokens for shard in shards), initial=0))
        self.n_tokens = self.starts[-1]

    def read(self, first: int, tokens: np.ndarray) -> np.ndarray:
        """Fill `tokens` from place `first` on, and return where in it documents end (int64): 0 < end <= len(tokens)."""
        place, done, ends = first % self.n_tokens, 0, []
        while done < len(tokens):
            number = bisect_right(self.starts, place) - 1
            shard, start = self.shards[number], self.starts[number]
            n = min(self.starts[number + 1] - place, len(tokens) - done)
            a, b = place - start, place - start + n
            tokens[done : done + n] = shard.read(a, b)
            ends.append(shard.ends_between(a, b) - a + done)
            done, place = done + n, (place + n) % self.n_tokens
        return ends[0] if len(ends) == 1 else np.concatenate(ends)


class PreparedSet:
    """A folder that `pagoda prepare` wrote.

    splits             {"train": Stream, "validation": Stream}, those with documents
    vocab_size         of its tokenizer; eos_id ends every document
    tokenizer_path     the tokenizer's files, for `load_tokenizer`
    tokenizer          the fingerprint of its vocabulary, as `Tokenizer.fingerprint`
    fingerprint        of tokens and tokenizer
    manifest           manifest.json: `splits` has documents, tokens and bytes of text
    Raises PagodaError for a folder that is no such set, unfinished, truncated or corrupt (naming the file).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path = Path(path)
        self.manifest = manifest = read_manifest(path)
        try:
            self.vocab_size, self.eos_id, self.tokenizer = (manifest[k] for k in ("vocab_size", "eos_id", "tokenizer"))
            dtype = np.dtype(manifest["dtype"])
            shards = {
                split: [Shard(path, split, i, entry, dtype) for i, entry in enumerate(part["shards"])]
                for split, part in manifest["splits"].items()
            }
        except (KeyError, TypeError, AttributeError):
            raise PagodaError(f"{path / 'manifest.json'} is incomplete; run `pagoda prepare` anew") from None
        self.splits = {split: Stream(parts) for split, parts in shards.items() if parts}
        self.tokenizer_path = path / "tokenizer"
        content = [self.tokenizer, {split: part["shards"] for split, part in manifest["splits"].items()}]
        self.fingerprint = digest(content)
        if sum(stream.n_tokens for stream in self.splits.values()) * dtype.itemsize <= CHECK_WHOLE:
            for stream in self.splits.values():
                for shard in stream.shards:
                    shard.read(0, shard.n_tokens)

    def check_tokenizer(self, tokenizer: Tokenizer, model: str) -> None:
        """PagodaError unless the model called `model` has the tokenizer that this set was made with."""
        if tokenizer.fingerprint != self.tokenizer:
            raise PagodaError(
                f"{self.path} was prepared with another tokenizer than that of {model}: "
                f"prepare it again with --tokenizer {model}"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / "manifest.json").is_file():
        if (folder / "progress.json").is_file():
            raise PagodaError(f"{folder} is unfinished: run the same `pagoda prepare` again, it goes on")
        raise PagodaError(f"{folder} is no prepared data: make some with `pagoda prepare SRC {folder}`")
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise PagodaError(f"{folder / 'manifest.json'} is not of this version's format; run `pagoda prepare` anew")
    return manifest


def digest(content: Any) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


# Rows ---------------------------------------------------------------------------------------------


class PackedRows:
    """Rows for pretraining: a split's documents end to end, cut every seq_len tokens.

    sets        prepared sets with their weights: of many rows, set s gives the share weight_s / sum of weights
    split       train or validation
    seed        of the permutations: every epoch of every set has its own, and cuts the stream at other places
    sequential  all rows of all sets once, in order (validation)
    batch       rows of a global batch: fewer than that in an epoch are refused

    Targets are the next token of the same document, also behind the cut, and -100 where a document ends.
    Raises PagodaError for a split that is missing or too small, and for sets of different tokenizers.
    """

    def __init__(
        self,
        sets: list[tuple[PreparedSet, float]],
        seq_len: int,
        split: str = "train",
        seed: int = 0,
        sequential: bool = False,
        batch: int = 1,
    ):
        self.seq_len, self.seed, self.sequential = seq_len, seed, sequential
        check_mixture(sets, split)
        self.streams = [prepared.splits[split] for prepared, _ in sets]
        self.n_each = [stream.n_tokens // seq_len for stream in self.streams]
        self.n_rows = sum(self.n_each)
        for (prepared, _), stream, n in zip(sets, self.streams, self.n_each):
            if n == 0:
                raise PagodaError(
                    f"{prepared.path} has {stream.n_tokens} tokens for {split}, too few for one row of {seq_len}: "
                    "prepare more text or lower seq_len"
                )
        if self.n_rows < batch:
            raise PagodaError(
                f"the data makes {self.n_rows} rows of {seq_len} tokens for {split}, too few for one batch of {batch}: "
                "prepare more text, or lower global_batch_size or seq_len"
            )
        weights = [weight for _, weight in sets]
        self.source, self.rank, self.per_period = mixture(weights)
        self.starts = list(accumulate(self.n_each, initial=0))
        self.fingerprint = digest([split, [(prepared.fingerprint, weight) for prepared, weight in sets]])

    def place(self, i: int) -> tuple[int, int]:
        """Row i of the endless sequence: which set, and where in its stream the row begins."""
        if self.sequential:
            if i >= self.n_rows:
                raise IndexError(f"row {i} of {self.n_rows}")
            s = bisect_right(self.starts, i) - 1
            return s, (i - self.starts[s]) * self.seq_len
        period, i = divmod(i, PERIOD)
        s = int(self.source[i])
        epoch, k = divmod(period * self.per_period[s] + int(self.rank[i]), self.n_each[s])
        shift, *keys = draws(self.seed, s, epoch)
        # The stream is a ring: later epochs begin elsewhere in it, so that rows are cut at other places.
        shift = shift % self.streams[s].n_tokens if epoch else 0
        return s, shift + permuted(k, self.n_each[s], keys) * self.seq_len

    def rows(self, first: int, n: int) -> Rows:
        """Rows first..first+n-1 of the endless sequence (of the only pass, if sequential)."""
        import torch

        size = self.seq_len
        tokens, targets = np.empty(n * size, np.int64), np.empty(n * size, np.int64)
        read, cuts = np.empty(size + 1, np.int64), []
        for r in range(n):
            s, place = self.place(first + r)
            ends = self.streams[s].read(place, read)
            row = slice(r * size, (r + 1) * size)
            tokens[row], targets[row] = read[:-1], read[1:]
            ends = ends[ends <= size]
            targets[r * size + ends - 1] = IGNORE
            cuts += [r * size, *(r * size + ends[ends < size]).tolist()]
        lengths = np.diff([*cuts, n * size]).tolist()
        scored = int((targets != IGNORE).sum())
        return Rows(torch.from_numpy(tokens), torch.from_numpy(targets), lengths, scored)


def check_mixture(sets: list[tuple[PreparedSet, float]], split: str) -> None:
    for prepared, weight in sets:
        if not 0 < weight < float("inf"):
            raise PagodaError(f"the weight of {prepared.path} must be a number above 0, not {weight}")
        if split not in prepared.splits:
            hint = "; prepare it with another val_fraction" if split in SPLITS else f" (there are {', '.join(SPLITS)})"
            raise PagodaError(f"{prepared.path} has no documents for {split}{hint}")
        if prepared.tokenizer != sets[0][0].tokenizer:
            raise PagodaError(
                f"{sets[0][0].path} and {prepared.path} were prepared with different tokenizers and cannot be mixed: "
                "prepare both with the same --tokenizer"
            )


def mixture(weights: list[float]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The order in which sets take turns, over PERIOD rows: each row's set, its rank among that set's rows, and how
    many rows each set has. A set's rows are spread evenly, so that every stretch has nearly the wanted shares."""
    shares = np.array(weights) / sum(weights) * PERIOD
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    while (missing := PERIOD - counts.sum()) > 0:  # the largest errors first
        counts[np.argmax(shares - counts)] += 1
    counts[np.argmax(counts)] += missing  # many tiny weights take their one row from the largest
    when = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
    source = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(n) for n in counts])
    order = np.argsort(when, kind="stable")
    return source[order], rank[order], counts.tolist()


@lru_cache(maxsize=256)
def draws(*what: int) -> list[int]:
    """7 random numbers of 64 bits that depend on the arguments only (and on no library's version)."""
    return np.frombuffer(hashlib.blake2b(repr(what).encode(), digest_size=56).digest(), "<u8").tolist()


def permuted(i: int, n: int, keys: list[int]) -> int:
    """Where a random permutation of 0..n-1 puts i: a Feistel network over the next power of 4, walked until it lands
    below n (Black and Rogaway 2002). No list of n numbers is ever made."""
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for k in keys:
            mixed = (right ^ k) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed ^ mixed >> 29) & mask
        i = left << half | right
        if i < n:
            return i
