"""Shards and rows: what comes out is what went in, built again here the slow and obvious way."""

import numpy as np
import pytest

from pagoda.common import PagodaError
from pagoda.data import shards
from pagoda.data.shards import PackedRows, PreparedSet, ShardWriter, draws, mixture, permuted

EOS = 9


def write_set(folder, documents, tokenizer="fingerprint", shard_tokens=50, dtype="<u2", **more):
    """A prepared set of these documents (lists of ids), written in several pieces."""
    folder.mkdir()
    splits = {"train": documents, **more}
    manifest = {"format": shards.FORMAT, "dtype": dtype, "vocab_size": 10, "eos_id": EOS, "tokenizer": tokenizer}
    manifest["splits"] = {}
    for split, texts in splits.items():
        writer = ShardWriter(folder, split, np.dtype(dtype), shard_tokens)
        for piece in (texts[:3], texts[3:]):
            ends = np.cumsum([len(text) for text in piece], dtype=np.int64)
            writer.append(np.array([id for text in piece for id in text], dtype), ends, 1)
        manifest["splits"][split] = writer.close()
    (folder / "manifest.json").write_text(shards.json.dumps(manifest))
    return folder


def random_documents(n, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [[*rng.integers(0, 9, rng.integers(1, longest)).tolist(), EOS] for _ in range(n)]


def naive_row(documents, start, seq_len):
    """Tokens, targets and lengths of a row that begins at token `start` of the documents laid end to end."""
    stream = [(id, d) for d, document in enumerate(documents) for id in document] * 3
    row = stream[start : start + seq_len + 1]
    targets = [b if b_doc == a_doc else -100 for (_, a_doc), (b, b_doc) in zip(row, row[1:])]
    lengths = []
    for k in range(seq_len):
        new = k == 0 or row[k][1] != row[k - 1][1]
        lengths = [*lengths, 1] if new else [*lengths[:-1], lengths[-1] + 1]
    return [id for id, _ in row[:-1]], targets, lengths


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("seq_len", [1, 7, 64, 200])
def test_rows_are_the_documents_end_to_end(tmp_path, seq_len, dtype):
    documents = random_documents(40)
    rows = PackedRows([(PreparedSet(write_set(tmp_path / "set", documents, dtype=dtype)), 1.0)], seq_len)
    assert rows.n_rows == sum(map(len, documents)) // seq_len
    seen = set()
    for first in range(0, 2 * rows.n_rows, 3):  # into the second epoch
        made = rows.rows(first, 3)
        tokens, targets, lengths = [], [], []
        for i in range(first, first + 3):
            _, start = rows.place(i)
            if i < rows.n_rows:
                seen.add(start)
            for whole, part in zip((tokens, targets, lengths), naive_row(documents, start, seq_len)):
                whole += part
        assert made.tokens.tolist() == tokens
        assert made.targets.tolist() == targets
        assert made.lengths == lengths
        assert made.scored == sum(target != -100 for target in targets)
    assert seen == {i * seq_len for i in range(rows.n_rows)}  # the first epoch has every row once


def test_a_row_does_not_depend_on_how_it_is_asked_for(tmp_path):
    rows = PackedRows([(PreparedSet(write_set(tmp_path / "set", random_documents(60))), 1.0)], 16)
    together = rows.rows(5, 12)
    apart = [rows.rows(i, 1) for i in range(5, 17)]
    assert together.tokens.tolist() == [id for one in apart for id in one.tokens.tolist()]
    assert together.lengths == [n for one in apart for n in one.lengths]
    assert together.tokens.tolist() != rows.rows(6, 12).tokens.tolist()
    other = PackedRows([(PreparedSet(tmp_path / "set"), 1.0)], 16, seed=1)
    assert together.tokens.tolist() != other.rows(5, 12).tokens.tolist()


def test_epochs_are_permuted_and_cut_elsewhere(tmp_path):
    rows = PackedRows([(PreparedSet(write_set(tmp_path / "set", random_documents(200))), 1.0)], 16)
    epochs = [[rows.place(e * rows.n_rows + i)[1] for i in range(rows.n_rows)] for e in range(3)]
    assert len({starts[0] % 16 for starts in epochs}) > 1
    assert all(len(set(starts)) == rows.n_rows for starts in epochs)
    assert epochs[0] != sorted(epochs[0])


def test_sequential_rows_come_once_in_order(tmp_path):
    sets = [PreparedSet(write_set(tmp_path / name, random_documents(20, seed))) for seed, name in enumerate("ab")]
    rows = PackedRows([(s, 1.0) for s in sets], 32, sequential=True)
    starts = [rows.place(i) for i in range(rows.n_rows)]
    assert starts == [(s, 32 * i) for s in (0, 1) for i in range(sets[s].splits["train"].n_tokens // 32)]
    with pytest.raises(IndexError):
        rows.rows(rows.n_rows, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 4096])
def test_permuted_is_a_permutation(n):
    _, *keys = draws(0, 0, 0)
    places = [permuted(i, n, keys) for i in range(n)]
    assert sorted(places) == list(range(n))
    assert n < 10 or places != list(range(n))


def test_permutations_are_even():
    """Over many epochs each of 6 rows stands in each place equally often (chi-squared, 25 degrees of freedom)."""
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        _, *keys = draws(0, 0, epoch)
        for i in range(6):
            counts[i, permuted(i, 6, keys)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 60  # exceeded once in 10,000


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.2, 0.1], [3, 1], [1, 1e-7], [1e-9] * 20 + [1]])
def test_mixture_proportions(weights):
    source, rank, counts = mixture(weights)
    assert sum(counts) == len(source) == shards.PERIOD
    share = np.array(weights) / sum(weights)
    assert np.abs(np.array(counts) / shards.PERIOD - share).max() < 21 / shards.PERIOD
    for s, n in enumerate(counts):
        mine = source == s
        assert rank[mine].tolist() == list(range(n)), "each row of a set once"
        # Every beginning of the sequence has nearly its share.
        assert np.abs(np.cumsum(mine) - np.arange(1, len(source) + 1) * n / len(source)).max() < len(weights)


def test_a_mixture_takes_rows_of_every_set_by_weight(tmp_path):
    a = PreparedSet(write_set(tmp_path / "a", [[1] * 9 + [EOS]] * 30))
    b = PreparedSet(write_set(tmp_path / "b", [[2] * 9 + [EOS]] * 3))
    rows = PackedRows([(a, 3.0), (b, 1.0)], 10)
    tokens = rows.rows(0, 400).tokens.view(400, 10)
    assert (tokens == 1).any(1).sum() == 300
    assert (tokens == 2).any(1).sum() == 100
    assert rows.fingerprint != PackedRows([(a, 2.0), (b, 1.0)], 10).fingerprint


def test_writing_resumes_behind_the_record(tmp_path):
    documents = random_documents(50)
    whole = write_set(tmp_path / "whole", documents)
    (folder := tmp_path / "again").mkdir()
    dtype, state = np.dtype("<u2"), None
    for k in range(0, 50, 5):
        piece = documents[k : k + 5]
        arrays = (
            np.array([id for text in piece for id in text], dtype),
            np.cumsum([len(d) for d in piece], dtype=np.int64),
            1,
        )
        writer = ShardWriter(folder, "train", dtype, 50, state)
        writer.append(*arrays)
        writer.flush()
        state = shards.json.loads(shards.json.dumps(writer.state))
        writer.append(*arrays)  # lost: the run is killed before it says so
        writer.flush()
    ShardWriter(folder, "train", dtype, 50, state).close()
    files = sorted(path.name for path in whole.glob("train*"))
    assert len(files) > 10
    for name in files:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[:-2] if how == "cut" else data)


@pytest.mark.parametrize("file", ["train-00001.tokens", "train-00001.index"])
@pytest.mark.parametrize(("how", "words"), [("flip", "is corrupt"), ("cut", "truncated"), ("remove", "missing")])
def test_a_damaged_shard_is_named(tmp_path, file, how, words, monkeypatch):
    folder = write_set(tmp_path / "set", random_documents(40))
    path = folder / file
    path.unlink() if how == "remove" else damage(path, how)
    with pytest.raises(PagodaError, match=words) as caught:
        PreparedSet(folder)
    assert str(path) in str(caught.value)
    if how == "flip":  # a large set is checked as it is read
        monkeypatch.setattr(shards, "CHECK_WHOLE", 0)
        rows = PackedRows([(PreparedSet(folder), 1.0)], 8)
        with pytest.raises(PagodaError, match=words):
            rows.rows(0, rows.n_rows)


def test_mistakes_are_named(tmp_path):
    documents = random_documents(10)
    a = PreparedSet(write_set(tmp_path / "a", documents))
    b = PreparedSet(write_set(tmp_path / "b", documents, tokenizer="another"))
    n = a.splits["train"].n_tokens
    for match, arguments in {
        "different tokenizers": ([(a, 1), (b, 1)], 8),
        "above 0, not -1": ([(a, -1)], 8),
        f"{n} tokens for train, too few for one row": ([(a, 1)], n + 1),
        "no documents for validation": ([(a, 1)], 8, "validation"),
    }.items():
        with pytest.raises(PagodaError, match=match):
            PackedRows(*arguments)
    with pytest.raises(PagodaError, match="too few for one batch of 1000"):
        PackedRows([(a, 1)], 8, batch=1000)
    with pytest.raises(PagodaError, match="is no prepared data"):
        PreparedSet(tmp_path)
    (tmp_path / "a" / "manifest.json").write_text('{"format"')
    with pytest.raises(PagodaError, match=r"manifest.json: not valid JSON"):
        PreparedSet(tmp_path / "a")
