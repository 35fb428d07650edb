"""`pagoda prepare`: the same tokens as the tokenizer alone gives, from any file, by any number of processes, killed or
not."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import transformers

from pagoda.cli import main
from pagoda.common import PagodaError
from pagoda.data import corpus
from pagoda.data import prepare as module
from pagoda.data.corpus import all_documents, list_units
from pagoda.data.options import Preparation, Reading
from pagoda.data.prepare import prepare
from pagoda.data.shards import PackedRows, PreparedSet
from pagoda.data.tokenizer import load_tokenizer
from pagoda.data.vocabulary import train_tokenizer

WORDS = [
    "pagoda",
    "tower",
    "roof",
    "stone",
    "eaves",
    "bell",
    "garden",
    "monk",
    "rain",
    "lantern",
    "12",
    "345",
    "ünï",
    "塔",
    "😀",
]


def make_texts(n, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + ".\nEnd" for _ in range(n)]


TEXTS = make_texts(60)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(iter(make_texts(100, 1)), folder, "bpe", 300)
    return folder


def documents_of(folder, split):
    """The documents of a prepared set, read with numpy alone."""
    part = json.loads((folder / "manifest.json").read_text())["splits"][split]
    found = []
    for i, shard in enumerate(part["shards"]):
        tokens = np.fromfile(folder / f"{split}-{i:05}.tokens", "<u2")
        ends = np.fromfile(folder / f"{split}-{i:05}.index", "<i8", count=shard["documents"])
        found += [piece.tolist() for piece in np.split(tokens, ends)[:-1]]
    return found


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sources(kind, folder):
    """The texts, written in one of the ways that can be read."""
    folder.mkdir()
    if kind == "folder":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:03}.md").write_bytes(text.encode())
        (folder / "picture.png").write_bytes(b"\x89PNG\r\n\xff\xfe")
        (folder / ".hidden").write_text("no")
        return folder, {}
    if kind == "separated":
        (folder / "all.txt").write_bytes("\n\n\n".join(TEXTS).encode())
        return folder / "all.txt", {"document_separator": "\\n\\n"}
    if kind in ("jsonl", "jsonl.gz"):
        lines = "\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS)).encode()
        path = folder / f"all.{kind}"
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
        return path, {"text_field": "body"}
    if kind == "json":
        (folder / "all.json").write_text(json.dumps([{"body": text} for text in TEXTS]))
        return folder / "all.json", {"text_field": "body"}
    if kind == "parquet":
        table = pyarrow.table({"body": TEXTS, "other": list(range(len(TEXTS)))})
        pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=7)
        return folder / "all.parquet", {"text_field": "body"}
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved", {}


@pytest.mark.parametrize("kind", ["folder", "separated", "jsonl", "jsonl.gz", "json", "parquet", "datasets"])
def test_every_source_gives_the_same_documents(kind, tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 1000)
    path, reading = sources(kind, tmp_path / "src")
    out = tmp_path / "out"
    options = Preparation(str(tokenizer_dir), val_fraction=0.3, shard_tokens=200, workers=1)
    manifest = prepare([path], out, Reading(**reading), options)

    peer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    expected = {"train": [], "validation": []}
    for text in TEXTS:
        share = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
        expected["validation" if share < 0.3 else "train"].append([*peer(text).input_ids, peer.eos_token_id])
    for split, documents in expected.items():
        assert documents_of(out, split) == documents
        assert len(documents) > 10
        counts = {"documents": len(documents), "tokens": sum(map(len, documents))}
        assert {name: manifest["splits"][split][name] for name in counts} == counts
    assert sum(part["bytes"] for part in manifest["splits"].values()) == sum(len(t.encode()) for t in TEXTS)
    assert len(manifest["splits"]["train"]["shards"]) > 5
    assert manifest["skipped"] == ([str(path / "picture.png")] if kind == "folder" else [])
    assert PreparedSet(out).eos_id == peer.eos_token_id
    assert not [name for name in os.listdir(out) if name.startswith((".", "progress"))]


@pytest.mark.parametrize("separator", ["\\n\\n", "\\n", "<|end|>", "--", "\\n--\\n"])
def test_units_cut_a_file_anywhere(separator, tmp_path, monkeypatch):
    rng = random.Random(3)
    meant = separator.replace("\\n", "\n")
    for trial in range(20):
        pieces = rng.choices(["a", "word", "\n", "\n\n", "-", "<|", "|>", meant, meant * 2, "塔"], k=80)
        (tmp_path / "x.txt").write_bytes("".join(pieces).encode())
        found = []
        for size in (1 << 20, 1, 2, 3, 7, 30):
            monkeypatch.setattr(corpus, "UNIT_BYTES", size)
            reading = Reading(document_separator=separator)
            found.append(list(all_documents(list_units([tmp_path / "x.txt"], reading), reading)))
        assert all(one == found[0] for one in found), trial
        if not meant.startswith("\n"):
            whole = (tmp_path / "x.txt").read_bytes().decode()
            assert found[0] == [t for piece in whole.split(meant) if (t := piece.strip("\r\n"))]


def test_number_of_processes_makes_no_difference(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 1000)
    path, reading = sources("jsonl", tmp_path / "src")
    made = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        prepare([path], out, Reading(**reading), Preparation(str(tokenizer_dir), shard_tokens=300, workers=workers))
        made.append(files_of(out))
    assert made[0] == made[1]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare([path], out, Reading(**reading), Preparation(str(tokenizer_dir), shard_tokens=300))  # it is all there
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_killed_and_resumed_is_bit_identical(tmp_path, tokenizer_dir):
    (tmp_path / "src").mkdir()
    for i in range(40):
        lines = "\n".join(json.dumps({"text": text}) for text in make_texts(300, seed=i))
        (tmp_path / "src" / f"{i:02}.jsonl").write_text(lines)
    tail = ["--tokenizer", str(tokenizer_dir), "--shard_tokens", "5000", "--val_fraction", "0.2", "--workers", "2"]
    command = [sys.executable, "-m", "pagoda", "prepare", str(tmp_path / "src")]
    assert main(["prepare", str(tmp_path / "src"), str(tmp_path / "whole"), *tail]) == 0

    out = tmp_path / "out"
    reached = -1
    for _ in range(2):
        run = subprocess.Popen([*command, str(out), *tail], stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.time() + 60
        while time.time() < deadline and run.poll() is None:
            try:
                units = json.loads((out / "progress.json").read_text())["units"]
            except (FileNotFoundError, ValueError):
                units = -1
            if units > reached + 3:
                break
            time.sleep(0.002)
        reached = units
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        # What it had not recorded yet is there too, or half of it.
        with open(max(out.glob("train-*.tokens")), "ab") as file:
            file.write(b"half")
        with pytest.raises(PagodaError, match="unfinished: run the same"):
            PreparedSet(out)
    assert 0 < reached < 40
    deadline = time.time() + 20
    while (orphans := members(run.pid)) and time.time() < deadline:
        time.sleep(0.05)
    assert not orphans, "the processes of a killed run go with it"

    with pytest.raises(PagodaError, match="sources or options have changed"):
        prepare([tmp_path / "src"], out, Reading(), Preparation(str(tokenizer_dir), val_fraction=0.3))
    assert main(["prepare", str(tmp_path / "src"), str(out), *tail]) == 0
    assert files_of(out) == files_of(tmp_path / "whole")
    assert len(files_of(out)) > 20


def members(session):
    """The processes of a session that still run."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(name))
    return found


def test_characters_of_one_text_split_by_position(tmp_path):
    """As nanoGPT's shakespeare_char: the sorted characters, the first nine tenths to train on."""
    text = "First Citizen:\nBefore we proceed any further, hear me speak!\n" * 9
    (tmp_path / "play.txt").write_text(text)
    options = Preparation("char", val_fraction=0.1, split_by="position")
    prepare([tmp_path / "play.txt"], tmp_path / "out", Reading(), options)
    characters = sorted(set(text))
    end, n = len(characters), int(len(text) * 0.9)
    ids = [characters.index(character) for character in text]
    assert documents_of(tmp_path / "out", "train") == [[*ids[:n], end]]
    assert documents_of(tmp_path / "out", "validation") == [[*ids[n:], end]]
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert tokenizer.decode(ids) == text == peer.decode(ids)
    assert peer(text).input_ids == ids
    assert tokenizer.vocab_size == len(peer) == end + 1
    PackedRows([(PreparedSet(tmp_path / "out"), 1)], 32, "validation", sequential=True)


def test_bytes_stand_for_themselves(tmp_path):
    text = "".join(map(chr, range(1, 300))) + "塔😀\r\n\t"
    (tmp_path / "x.txt").write_bytes(text.encode())
    prepare([tmp_path / "x.txt"], tmp_path / "out", Reading(), Preparation("bytes", val_fraction=0))
    assert documents_of(tmp_path / "out", "train") == [[*text.encode(), 256]]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer").decode([*text.encode()]) == text


def test_documents_begin_as_prompts_do(tmp_path):
    """A tokenizer that puts a BOS before a prompt puts it before every document, and the end of text behind."""
    pytest.importorskip("sentencepiece")
    train_tokenizer(iter(make_texts(100)), tmp_path / "tok", "sentencepiece", 320)
    (tmp_path / "x.txt").write_text("pagoda tower")
    prepare([tmp_path / "x.txt"], tmp_path / "out", Reading(), Preparation(str(tmp_path / "tok"), val_fraction=0))
    tokenizer = load_tokenizer(tmp_path / "tok")
    expected = [*tokenizer.encode("pagoda tower"), tokenizer.eos_id]
    assert expected[0] == tokenizer.bos_id
    assert documents_of(tmp_path / "out", "train") == [expected]


def test_very_long_texts_go_in_pieces(tmp_path, tokenizer_dir, monkeypatch):
    text = "\n".join(make_texts(300)) + " \n\n x\n\n  y\n"
    (tmp_path / "x.txt").write_bytes(text.encode())
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    prepare([tmp_path / "x.txt"], tmp_path / "out", Reading(), Preparation(str(tokenizer_dir), val_fraction=0))
    tokenizer = load_tokenizer(tokenizer_dir)
    assert documents_of(tmp_path / "out", "train") == [[*tokenizer.encode(text), tokenizer.eos_id]]


def test_another_tokenizer_is_refused(tmp_path, tokenizer_dir):
    (tmp_path / "x.txt").write_text("pagoda tower")
    prepare([tmp_path / "x.txt"], tmp_path / "out", Reading(), Preparation(str(tokenizer_dir), val_fraction=0))
    made = PreparedSet(tmp_path / "out")
    made.check_tokenizer(load_tokenizer(tokenizer_dir), "the model")
    made.check_tokenizer(load_tokenizer(made.tokenizer_path), "the model")
    train_tokenizer(iter(make_texts(100, 1)), tmp_path / "other", "bpe", 301)
    with pytest.raises(PagodaError, match="another tokenizer than that of the model"):
        made.check_tokenizer(load_tokenizer(tmp_path / "other"), "the model")


@pytest.mark.parametrize(
    ("name", "content", "args", "words"),
    [
        ("x.txt", b"\xff\xfe", [], "x.txt is not UTF-8 text (byte 0)"),
        ("x.txt", b"", [], "hold no text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', [], "x.jsonl byte 14: broken JSON"),
        ("x.jsonl", b'{"body": "a"}', [], "has no field 'text' (its fields: body): give --text_field"),
        ("x.jsonl", b'{"text": 3}', [], "the field 'text' is no text"),
        ("x.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], [], "x.jsonl.gz is damaged"),
        ("x.parquet", b"PAR1", [], "x.parquet cannot be read"),
        ("x.txt", b"a", ["--val_fraction", "1"], "val_fraction must be at least 0 and below 1"),
        ("x.txt", b"a", ["--split_by", "size"], "split_by must be one of document, position"),
        ("x.txt", b"a", ["--tokenizer", "smollm2-135-instruct"], "did you mean 'smollm2-135m-instruct'"),
        ("x.txt", b"a", ["--tokenizer", ""], "no tokenizer: give --tokenizer"),
        ("y.txt", b"a", [], "no such file or directory"),
    ],
)
def test_mistakes_cost_one_line(name, content, args, words, tmp_path, capsys, tokenizer_dir):
    (tmp_path / name).write_bytes(content)
    src = tmp_path / name.replace("y", "z")
    tokenizer = [] if "--tokenizer" in args else ["--tokenizer", str(tokenizer_dir)]
    assert main(["prepare", str(src), str(tmp_path / "out"), *tokenizer, *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("pagoda: ")
    assert err.count("\n") == 1


def test_nothing_else_is_overwritten(tmp_path, tokenizer_dir):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.txt").write_text("a")
    options = Preparation(str(tokenizer_dir), val_fraction=0)
    with pytest.raises(PagodaError, match="lies in"):
        prepare([tmp_path / "src"], tmp_path / "src" / "out", Reading(), options)
    with pytest.raises(PagodaError, match="exists already"):
        prepare([tmp_path / "src"], tmp_path, Reading(), options)
    prepare([tmp_path / "src"], tmp_path / "out", Reading(), options)
    with pytest.raises(PagodaError, match="a set of other data or options"):
        prepare([tmp_path / "src"], tmp_path / "out", Reading(), Preparation("bytes", val_fraction=0))
