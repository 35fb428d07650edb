"""metrics.jsonl, the progress line, TensorBoard, Weights & Biases."""

import json
import os
import pty
import subprocess
import sys
import types

import pytest

from pagoda.common import PagodaError
from pagoda.train import watch
from pagoda.train.watch import Watcher, read_metrics


def record(step: int, **more) -> dict:
    return dict(
        loss=10.0 / step, lr=3e-4, grad_norm=1.0, tokens=step * 64, tokens_per_second=12345.0, seconds=1.5, **more
    )


def told(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def run(path, first, last, **options) -> Watcher:
    watcher = Watcher(path, first - 1, last_step=10, **options)
    for step in range(first, last + 1):
        watcher.step(step, **record(step))
    return watcher


def test_every_record_is_a_line_at_once(tmp_path):
    watcher = run(tmp_path, 1, 2)
    watcher.evaluation(2, val_loss=5.5, sample="Once «upon»\na time")
    assert told(tmp_path) == [
        {"step": 1, **record(1)},
        {"step": 2, **record(2)},
        {"step": 2, "val_loss": 5.5, "sample": "Once «upon»\na time"},
    ]
    watcher.close()


def test_a_resumed_run_forgets_what_was_behind_its_checkpoint_and_half_a_line(tmp_path):
    watcher = run(tmp_path, 1, 6)
    watcher.evaluation(4, val_loss=1.0)
    watcher.evaluation(6, val_loss=2.0)
    watcher.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "loss": 1.')
    run(tmp_path, 5, 7).close()
    assert [r["step"] for r in told(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 7]
    run(tmp_path, 1, 1).close()
    assert [r["step"] for r in told(tmp_path)] == [1]


def test_a_line_without_its_end_is_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\nnull\n{"loss": 1}\n\xff\n{"step": 12, "loss": 3}')
    assert read_metrics(path) == [{"step": 1, "loss": 2}]


def test_not_a_number_is_null_in_json(tmp_path):
    watcher = Watcher(tmp_path)
    watcher.step(1, loss=float("nan"), grad_norm=float("inf"))
    watcher.close()
    assert told(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_only_the_main_process_writes(tmp_path, capsys):
    watcher = run(tmp_path / "run", 1, 3, main=False, tensorboard=True, wandb="project")
    watcher.evaluation(3, val_loss=1.0)
    watcher.note("hello")
    watcher.flush()
    watcher.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_are_few_plain_lines(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    watcher = Watcher(tmp_path, 0, last_step=100, flops_per_token=1e6, peak_flops=5e10, memory=lambda: 1.94)
    for step in range(1, 101):
        now[0] += 1.0
        watcher.step(step, **record(step))
    watcher.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "step 1/100  loss 10.000  lr 3.0e-4  12.3k tok/s  MFU 25%  1.9 GiB"
    assert lines[1] == "step 11/100  loss 0.909  lr 3.0e-4  12.3k tok/s  MFU 25%  1.9 GiB  1:29 left"
    assert lines[-1].startswith("step 100/100")
    assert lines[-1].endswith("0:00 left")


@pytest.mark.parametrize("width", [80, 120])
def test_in_a_terminal_one_line_stays_and_notes_pass_above_it(tmp_path, width):
    code = f"""if True:
        import sys, time
        from pathlib import Path
        from pagoda.train.watch import Watcher
        path, flops = Path({str(tmp_path)!r}), dict(flops_per_token=1e6, peak_flops=5e10)
        watcher = Watcher(path, 0, last_step=10000, memory=lambda: 1.9, **flops)
        assert "torch" not in sys.modules
        for step in range(1, 5):
            watcher.step(step, loss=2.5, lr=3e-4, tokens_per_second=12345.0)
            time.sleep(0.11)
            if step == 2:
                watcher.note("saved [bold] step-2")
                print("to standard output")
        watcher.close()
    """
    main, other = pty.openpty()
    env = os.environ | {"COLUMNS": str(width), "TERM": "xterm"}
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=other, env=env, text=True)
    os.close(other)
    seen = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        seen += piece
    assert done.stdout.read() == "to standard output\n"
    assert done.wait() == 0
    os.close(main)
    seen = seen.decode()
    assert "saved [bold] step-2" in seen
    assert "step 4/10000  loss 2.500  lr 3.0e-4  12.3k tok/s  MFU 25%  1.9 GiB" in seen
    assert "left" in seen
    assert ("━" in seen) == (width >= 100)
    assert seen.count("\n") == 2, "the note's line and the bar's"


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, 1, 6, tensorboard=True).close()
    watcher = run(tmp_path, 4, 8, tensorboard=True)
    watcher.evaluation(8, val_loss=1.25, sample="text")
    watcher.flush()
    watcher.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([10 / s for s in range(1, 9)])
    assert events.Scalars("val_loss")[0].value == 1.25


def test_wandb_is_asked_for_or_missed_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PagodaError, match="pip install wandb"):
        Watcher(tmp_path, wandb="project")
    asked, logged = [], []
    fake = types.SimpleNamespace(
        define_metric=lambda *a, **k: None, log=lambda r: logged.append(dict(r)), finish=lambda: logged.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: asked.append(k) or fake))
    for first in (1, 2):
        run(tmp_path / "a run", first, 2, wandb="project").close()
    assert logged == [{"step": 1, **record(1)}, {"step": 2, **record(2)}, "end", {"step": 2, **record(2)}, "end"]
    assert asked[0] == asked[1]
    assert asked[0]["project"] == "project"
    assert asked[0]["resume"] == "allow"


def test_tensorboard_is_missed_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(PagodaError, match=r"pagoda-llm\[train\]"):
        Watcher(tmp_path, tensorboard=True)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_one_line(tmp_path):
    watcher = Watcher(tmp_path)
    watcher.file.close()
    watcher.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(PagodaError, match="cannot write /dev/full: No space left"):
        watcher.step(1, loss=1.0)
    watcher.close()
