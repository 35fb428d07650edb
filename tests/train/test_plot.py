"""Loss curves, in the terminal and as PNG."""

import json

import numpy as np
import pytest

from pagoda.cli import main
from pagoda.train.plot import draw_text, read_curves, smooth


def write(path, losses, validation=(), every=10):
    path.mkdir()
    lines = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    lines += [{"step": (i + 1) * every, "val_loss": loss} for i, loss in enumerate(validation)]
    lines.append({"step": 1, "sample": "text"})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    return str(path)


def falling(n=200, end=2.0):
    return [end + 9 * 0.97**i for i in range(n)]


def test_smoothing_takes_away_noise_and_no_level():
    assert np.array_equal(smooth(np.array([])), [])
    assert np.allclose(smooth(np.full(500, 3.0)), 3.0)
    line = np.linspace(5, 1, 400)
    assert np.allclose(smooth(line)[:390], line[:390]), "centred: a straight line does not lag"
    noise = np.random.default_rng(0).normal(size=4000)
    assert smooth(noise)[1000:].std() < 0.15


def test_the_terminal_shows_each_run_in_eighty_columns(tmp_path):
    runs = [
        write(tmp_path / "first", falling(), falling(20), every=10),
        write(tmp_path / "a-second-run-with-a-long-name", falling(100, 3.0)),
    ]
    text = draw_text(read_curves(runs))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "12 ┤" in lines[0]
    assert "200" in lines[19]
    ends = [line.rstrip()[-1] for line in lines[:18]]
    assert {"a", "b"} <= set(ends)
    assert sum(line.count("o") for line in lines[:18]) > 10
    last, other, lowest = smooth(np.array(falling()))[-1], smooth(np.array(falling(100, 3.0)))[-1], falling(20)[-1]
    assert lines[21:] == [
        "a  first",
        f"   step 200: loss {last:.4f}, o val_loss {lowest:.4f} (lowest {lowest:.4f} at step 200)",
        "b  a-second-run-with-a-long-name",
        f"   step 100: loss {other:.4f}",
    ]


def test_a_straight_line_is_drawn_straight(tmp_path):
    curves = read_curves([write(tmp_path / "run", np.linspace(3, 2, 400).tolist())])
    rows = draw_text(curves).splitlines()[:18]
    columns = [next(i for i, c in enumerate(row[8:]) if c != " ") for row in rows]
    assert np.allclose(np.diff(columns[:-1]), 70 / 18, atol=1.1)


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0], [0.0, -1.0, 3.0], [5.0, float("nan"), 1.0]])
def test_odd_curves_are_drawn_too(tmp_path, losses, capsys):
    run = write(tmp_path / "run", losses)
    assert main(["plot", run, "--out", str(tmp_path / "loss.png"), "--width", "50"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 50


def test_validation_alone_is_enough(tmp_path):
    text = draw_text(read_curves([write(tmp_path / "run", [], [3.0, 2.0, 1.0])]))
    assert sum(line.count("o") for line in text.splitlines()[:18]) == 3
    assert "lowest 1.0000 at step 30" in text


def test_the_command_writes_a_picture_of_several_runs(tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    runs = [write(tmp_path / "one", falling(), falling(20)), write(tmp_path / "two", falling(100, 3.0))]
    out = tmp_path / "pictures" / "loss.png"
    assert main(["plot", *runs, "--out", str(out)]) == 0
    text, notes = capsys.readouterr()
    assert "a  one" in text
    assert str(out) in notes
    pixels = image.imread(out)
    assert pixels.shape[:2] == (780, 1350)
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # a line of each run
        assert (np.abs(pixels[..., :3] - np.array(color) / 255).max(-1) < 0.01).sum() > 500
    assert main(["plot", str(tmp_path / "one" / "metrics.jsonl")]) == 0
    assert "a  one" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    runs = [write(tmp_path / "x" / "run", [1.0]), write(tmp_path / "y" / "run", [1.0])]
    assert [c.name for c in read_curves(runs)] == runs


def test_mistakes_cost_one_line(tmp_path, capsys):
    empty = write(tmp_path / "empty", [])
    good = write(tmp_path / "good", [1.0])
    (tmp_path / "folder").mkdir()
    for args, words in (
        ([str(tmp_path / "missing")], "no metrics in"),
        ([str(tmp_path / "folder")], "metrics.jsonl"),
        ([good, empty], f"no metrics in {empty}"),
        ([good, "--out", str(tmp_path / "loss.jpg")], "PNG"),
    ):
        assert main(["plot", *args]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
