"""Small runs for the tests of the training loop."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pagoda.data.shards import Rows
from pagoda.models.loader import open_checkpoint, stream
from pagoda.models.registry import from_hf_config
from pagoda.train.loop import Job, last_step
from pagoda.train.objective import NextToken
from pagoda.train.optim import make_optimizer
from pagoda.train.options import Train
from pagoda.train.parallel import Workers, build, micro_batches
from pagoda.train.run import Run
from pagoda.train.watch import Watcher, read_metrics

LLAMA = dict(
    model_type="llama", vocab_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    hidden_size=32, intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip


MODEL = (
    '{"num_hidden_layers":2,"hidden_size":32,"intermediate_size":64,"num_attention_heads":4,"num_key_value_heads":2}'
)


@dataclass
class Noise:
    """Random tokens, row by row; `parts` documents in each."""

    seq_len: int = 16
    vocab_size: int = 96
    parts: tuple[int, ...] = (16,)
    n_rows: int = 1000
    fingerprint: str = "noise"

    def rows(self, first: int, n: int) -> Rows:
        size = self.seq_len + 1
        rows = [np.random.default_rng(i).integers(self.vocab_size, size=size) for i in range(first, first + n)]
        tokens = torch.from_numpy(np.stack(rows))
        targets = tokens[:, 1:].clone()
        targets[:, np.cumsum(self.parts) - 1] = -100  # nobody predicts the next document
        scored = int((targets >= 0).sum())
        return Rows(tokens[:, :-1].flatten(), targets.flatten(), list(self.parts) * n, scored)


def options(**changes) -> Train:
    small = dict(
        max_steps=6, seq_len=16, micro_batch_size=2, precision="float32", lr=1e-2, save_interval=3, warmup_steps=2
    )
    return Train(**{**small, "warmup_steps": 2, **changes})


def make_job(out: Path, o: Train, hf=None, start: Path | None = None, data=None, optimizer="adamw", resume="auto"):
    """A job on a tiny model: fresh from a configuration, or from a checkpoint."""
    workers = Workers("cpu")
    micro_batches(o, workers)
    with torch.device("meta"):
        model = from_hf_config(open_checkpoint(start).config if start else hf or LLAMA)
    run, data = Run(out, o, workers), data or Noise()
    torch.manual_seed(0)
    checkpoint = run.open({"train": asdict(o)}, data.fingerprint, resume)
    if checkpoint or start:
        weights = stream(model, checkpoint or start)
    else:
        weights = model.fresh_weights(torch.Generator().manual_seed(0))
    model = build(model, weights, o, workers)
    betas = (o.beta1, o.beta2)
    optimize = make_optimizer(optimizer, model.named_parameters(), o.lr, o.weight_decay, betas, o.eps)
    job = Job(model, optimize, NextToken(o.z_loss), data, o, workers, run, watch=None)
    if checkpoint:
        job.progress = run.restore(checkpoint, model, optimize)
    job.watch = Watcher(out, job.progress.step, last_step(o), memory=lambda: 0.0)
    return job


def finetuning(base: Path, rows: Path, out: Path, *more: str, method: str = "lora", **train) -> list[str]:
    """The command that finetunes a model on the rows."""
    told = dict(seq_len=128, micro_batch_size=4, max_steps=12, lr=1e-2, precision="float32", save_interval=6)
    named = [w for k, v in {**told, **train}.items() for w in (f"--train.{k}", str(v))]
    command = ["finetune", str(base), "--data", str(rows), "--method", method, "--out_dir", str(out), "--epochs", "0"]
    return [*command, "--template", "zephyr", "--val_fraction", "0.2", "--device", "cpu", *named, *more]


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def metrics(run: Path) -> list[dict]:
    """Everything in metrics.jsonl but what the clock says."""
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(run / "metrics.jsonl")]


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def write_text(path: Path, n: int = 400) -> Path:
    """A text of n sentences with something to learn."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "saw", "a", "small", "dog", "near", "my", "old", "house", "and", "ran", "away", "from", "it"]
    lines = [" ".join(rng.choice(words, 8)) + "." for _ in range(n)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())
