"""Training on a GPU: the losses of a CPU, and the same bits when a run is resumed."""

import shutil

import pytest
import torch
from helpers import MODEL, finetuning, losses, metrics, weights
from tiny import GPU, needs_gpu

from pagoda.cli import main
from pagoda.train.watch import read_metrics

pytestmark = needs_gpu


def pretrain(data, out, device=GPU, optimizer="adamw", **train) -> list[float]:
    small = dict(max_steps=8, seq_len=64, micro_batch_size=2, global_batch_size=4, save_interval=4, lr=3e-3)
    named = [w for k, v in {**small, **train}.items() for w in (f"--train.{k}", str(v))]
    model = ["--model_name", "SmolLM2-135M", "--model_overrides", MODEL, "--optimizer", optimizer]
    assert main(["pretrain", *model, "--data", str(data), "--out_dir", str(out), "--device", device, *named]) == 0
    return losses(out)


@pytest.mark.parametrize("precision", ["float32", "mixed", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion", "adafactor", "muon"])
def test_losses_are_those_of_a_cpu_and_resuming_gives_the_same_bits(optimizer, precision, data, tmp_path):
    told = dict(precision=precision, keep_last=0, lr=3e-4 if optimizer == "lion" else 3e-3)
    here = pretrain(data, tmp_path / "cpu", "cpu", optimizer, **told)
    there = pretrain(data, tmp_path / "gpu", GPU, optimizer, **told)
    torch.testing.assert_close(there, here, atol=0, rtol=2e-4 if precision == "float32" else 2e-2)
    shutil.copytree(tmp_path / "gpu", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-8")
    pretrain(data, tmp_path / "resumed", GPU, optimizer, **told)
    assert metrics(tmp_path / "gpu") == metrics(tmp_path / "resumed")
    last = "checkpoints/step-8"
    assert weights(tmp_path / "gpu" / last) == weights(tmp_path / "resumed" / last)


@pytest.mark.parametrize("told", [dict(checkpointing="full"), dict(z_loss=1e-4), dict(eval_interval=4)])
def test_other_ways_of_training(told, data, tmp_path):
    here = pretrain(data, tmp_path / "cpu", "cpu", precision="float32", **told)
    torch.testing.assert_close(pretrain(data, tmp_path / "gpu", precision="float32", **told), here, atol=0, rtol=2e-4)


@pytest.mark.parametrize(
    "method", ["full", "lora", "adalora", "ia3", "pfeiffer", "llama_adapter", "prefix", "p_tuning"]
)
def test_finetuning(method, base, rows, tmp_path):
    for device in ("cpu", GPU):
        command = finetuning(base, rows, tmp_path / device, method=method, max_steps=6, lr=1e-3)
        command[command.index("--device") + 1] = device
        assert main(command) == 0
    torch.testing.assert_close(losses(tmp_path / GPU), losses(tmp_path / "cpu"), atol=0, rtol=1e-3)


def test_qlora(base, rows, tmp_path):
    more = ["--quantize", "nf4"]
    command = finetuning(base, rows, tmp_path / "run", *more, max_steps=12, precision="bf16")
    command[command.index("--device") + 1] = GPU
    assert main(command) == 0
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    assert all("loss" in r or "val_loss" in r for r in read_metrics(tmp_path / "run/metrics.jsonl"))
