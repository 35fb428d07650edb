"""Runs as users start them: killed at any moment, over two processes, and what they refuse."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import MODEL, finetuning, losses, metrics, weights, write_text

from pagoda.cli import main
from pagoda.train.run import latest_checkpoint


def arguments(data, out, **train):
    small = dict(max_steps=6, seq_len=32, micro_batch_size=2, global_batch_size=4, precision="float32", save_interval=2)
    options = {**small, "eval_interval": 3, "lr": 1e-2, **train}
    named = [word for k, v in options.items() for word in (f"--train.{k}", str(v))]
    model = ["--model_name", "SmolLM2-135M", "--model_overrides", MODEL]
    return ["pretrain", *model, "--data", str(data), "--out_dir", str(out), "--device", "cpu", *named]


def pagoda(arguments, threads="1", **more):
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    return subprocess.Popen([sys.executable, "-m", "pagoda", *arguments], env=environment, text=True, **more)


def test_a_run_killed_again_and_again_gives_the_same_bits(data, tmp_path, threads):
    told = dict(max_steps=16, save_interval=1, keep_last=0, checkpointing="full")
    threads(1)  # as those below
    assert main(arguments(data, tmp_path / "whole", **told)) == 0
    kills, rng = 0, random.Random(0)
    while True:
        run = pagoda(arguments(data, tmp_path / "killed", **told), stderr=subprocess.DEVNULL)
        while run.poll() is None and not (tmp_path / "killed/checkpoints").exists():
            time.sleep(0.01)
        if kills < 2:  # somewhere in a step, or in a checkpoint: half of the time goes into saving
            seen = len(list((tmp_path / "killed/checkpoints").glob("step-*")))
            while run.poll() is None and len(list((tmp_path / "killed/checkpoints").glob("step-*"))) < seen + 3:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.1)
            run.send_signal(signal.SIGKILL)
            kills += 1
        if run.wait() == 0:
            break
    assert kills == 2
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    last = "checkpoints/step-16"
    assert weights(tmp_path / "whole" / last) == weights(tmp_path / "killed" / last)


def test_two_processes_equal_one(data, tmp_path):
    assert main(arguments(data, tmp_path / "one")) == 0
    for sharding in ("none", "zero3"):  # zero2 below
        out = tmp_path / sharding
        two = pagoda([*arguments(data, out, sharding=sharding), "--devices", "2"], stdout=subprocess.PIPE)
        assert two.communicate()[0].split() == [str(out / "checkpoints/step-6")]
        torch.testing.assert_close(losses(out), losses(tmp_path / "one"), rtol=0, atol=1e-4)
        values = [r["val_loss"] for r in metrics(out) if "val_loss" in r]
        expected = [r["val_loss"] for r in metrics(tmp_path / "one") if "val_loss" in r]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)
    # Saved by two it goes on with one, and back.
    moved = tmp_path / "zero3"
    by_two = lambda resumed: pagoda([*resumed, "--devices", "2"]).wait()  # noqa: E731
    for sharding, start in (("none", main), ("zero2", by_two)):
        shutil.rmtree(latest_checkpoint(moved))
        assert start(arguments(data, moved, sharding=sharding)) == 0
        torch.testing.assert_close(losses(moved), losses(tmp_path / "one"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_an_adapter_on_two_processes_equals_one(method, base, rows, tmp_path):
    shape = dict(method=method, micro_batch_size=2, global_batch_size=4, eval_interval=6)
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    assert main(finetuning(base, rows, one, **shape)) == 0
    assert pagoda([*finetuning(base, rows, two, **shape), "--devices", "2"]).wait() == 0
    for key in ("loss", "val_loss"):
        expected, seen = ([r[key] for r in metrics(run) if key in r] for run in (one, two))
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)
    shutil.copytree(two, resumed)
    shutil.rmtree(latest_checkpoint(resumed))
    assert pagoda([*finetuning(base, rows, resumed, **shape), "--devices", "2"]).wait() == 0
    assert metrics(resumed) == metrics(two)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (latest_checkpoint(resumed) / file).read_bytes() == (latest_checkpoint(two) / file).read_bytes()


def test_an_error_of_two_processes_is_one_line(data, tmp_path):
    two = pagoda([*arguments(data, tmp_path, global_batch_size=3), "--devices", "2"], stderr=subprocess.PIPE)
    said = two.communicate()[1]
    assert two.returncode == 2
    assert said.count("is not a multiple") == 1


def refused(capsys, arguments):
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    return said[-1]


def test_bad_input_is_one_line(data, tmp_path, capsys):
    def try_out(*more, data=data, **train):
        return refused(capsys, [*arguments(data, tmp_path / "run", **train), *more])

    assert "no prepared data" in try_out(data=tmp_path)
    assert "--data DIR" in refused(capsys, ["pretrain", "--model_name", "gpt2"])
    assert "too few for one batch of 4000" in try_out(global_batch_size=4000)
    assert "exceeds the model's context" in try_out("--model_overrides.max_position_embeddings", "16")
    assert "did you mean 'adamw'" in try_out("--optimizer", "adam")
    assert "train.lr must be 0 or more" in try_out(lr=-1)
    assert "unknown model name" in try_out("--model_name", "SmolLM2-135N")
    assert "several processes" in try_out(sharding="zero3")
    assert "one of them" in refused(capsys, ["pretrain", "--data", str(data)])
    assert not (tmp_path / "run").exists()
    assert "this run needs" in try_out("--model_overrides.vocab_size", "400000000")


def test_other_tokens_than_the_models_are_refused(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "run")) == 0
    text = write_text(tmp_path / "text.txt")
    assert main(["prepare", str(text), str(tmp_path / "char"), "--tokenizer", "char", "--split_by", "position"]) == 0
    told = ["--data", str(tmp_path / "char"), "--out_dir", str(tmp_path / "new"), "--init_from", str(tmp_path / "run")]
    assert "another tokenizer" in refused(capsys, ["pretrain", *told, "--train.seq_len", "16"])


def test_a_corrupt_shard_is_named(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "tokens")
    file = next((tmp_path / "tokens").glob("train-*.tokens"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert file.name in refused(capsys, arguments(tmp_path / "tokens", tmp_path / "run"))


def test_a_run_goes_on_from_a_checkpoint_of_another(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "first")) == 0
    told = ["--init_from", str(tmp_path / "first"), "--data", str(data), "--out_dir", str(tmp_path / "second")]
    small = ["--train.seq_len", "32", "--train.micro_batch_size", "4", "--train.max_steps", "3", "--train.lr", "1e-3"]
    capsys.readouterr()
    assert main(["pretrain", *told, *small]) == 0
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0] - 0.3
    done = capsys.readouterr().out.strip()
    assert json.loads((tmp_path / "second/checkpoints/step-3/config.json").read_text())["hidden_size"] == 32
    assert main(["generate", done, "--prompt", "the cat", "--max_new_tokens", "4", "--temperature", "0"]) == 0


def test_a_dry_run_writes_nothing(data, tmp_path, capsys):
    assert main([*arguments(data, tmp_path / "run"), "--dry_run"]) == 0
    assert "optimizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
