"""What a user can ask of a training run. Free of torch, so that `--help` stays fast."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagoda.common import PagodaError, demand, one_of
from pagoda.train.schedule import SCHEDULES

PRECISIONS = ("mixed", "bf16", "float32")
OPTIMIZERS = ("adamw", "adamw8bit", "lion", "adafactor", "muon")
SHARDINGS = ("none", "zero2", "zero3")


@dataclass
class Start:
    """Where a run lives and how it begins, whatever is trained and how.

    Args:
        out_dir: the folder of the run.
        optimizer: adamw, adamw8bit, lion, adafactor or muon.
        seed: of the first weights and of the order of the data.
        devices: processes on this machine (for several machines use torchrun).
        device: cpu, cuda, mps, or auto for the first accelerator that is there.
        resume: auto goes on where the run has a checkpoint; no wants a new run; must wants a checkpoint.
        dry_run: say what the run will need, and stop.
    """

    out_dir: Path = Path("run")
    optimizer: str = "adamw"
    seed: int = 0
    devices: int = 1
    device: str = "auto"
    resume: str = "auto"
    dry_run: bool = False

    def __post_init__(self):
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("resume", self.resume, ("auto", "no", "must"))
        demand(self, devices=(self.devices >= 1, "at least 1"))

    def config(self) -> dict[str, Any]:
        """What config.yaml says of it: all but the folder, which is where that file lies."""
        return {k: v for k, v in asdict(self).items() if k != "out_dir"}


@dataclass
class Train:
    """How a model is trained, whatever the objective.

    Args:
        max_steps: optimizer steps at most.
        max_tokens: tokens at most (0: no such limit).
        max_time: wall time at most, such as 90s, 30m or 2h (empty: no such limit).
        seq_len: tokens of a row.
        micro_batch_size: rows that go through the model at once on each process; only memory and speed depend on it.
        global_batch_size: rows of one optimizer step, all processes together (0: micro_batch_size times processes).
        precision: mixed (float32 parameters, bf16 arithmetic), bf16 (all in bf16, half the memory) or float32.
        lr: the highest learning rate.
        schedule: cosine, linear, constant or wsd (warm up, stay, decay over the last decay_ratio of the steps).
        warmup_steps: steps over which the learning rate rises from zero; below 1 a share of all steps.
        min_lr_ratio: where the schedule ends, as a share of lr.
        decay_ratio: the share of the steps over which wsd decays.
        weight_decay: of matrices; vectors have none.
        beta1: of the first moment.
        beta2: of the second moment.
        eps: of the optimizer.
        clip: the largest norm of the gradient (0: any).
        z_loss: weight of the squared log-normalizer, which keeps logits from drifting (PaLM: 1e-4).
        checkpointing: what the backward pass computes again to save memory: none, selective (every second block), full.
        release_gradients: step each parameter as soon as its gradient is there, and drop the gradient (LOMO; needs
            clip 0 and one micro-batch a step).
        compile: run each block through torch.compile.
        sharding: over processes: none (every process holds all), zero2 (gradients and optimizer), zero3 (weights too).
        cpu_offload: keep parameters, gradients and optimizer in main memory and send them to the device as needed.
        save_interval: steps between checkpoints (0: only the last).
        keep_last: checkpoints to keep (0: all).
        keep_every: keep those of every such step besides (0: none).
        eval_interval: steps between evaluations (0: only after the last).
        eval_first: evaluate before the first step too.
        eval_rows: rows of validation data at most.
        sample_prompt: a text to complete at every evaluation (empty: none).
        sample_tokens: the length of those completions.
        tensorboard: write TensorBoard files too.
        wandb: a Weights & Biases project to report to.
    """

    max_steps: int = 1000
    max_tokens: int = 0
    max_time: str = ""
    seq_len: int = 1024
    micro_batch_size: int = 8
    global_batch_size: int = 0
    precision: str = "mixed"
    lr: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: float = 0.02
    min_lr_ratio: float = 0.1
    decay_ratio: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    z_loss: float = 0.0
    checkpointing: str = "none"
    release_gradients: bool = False
    compile: bool = False
    sharding: str = "none"
    cpu_offload: bool = False
    save_interval: int = 500
    keep_last: int = 2
    keep_every: int = 0
    eval_interval: int = 250
    eval_first: bool = False
    eval_rows: int = 64
    sample_prompt: str = ""
    sample_tokens: int = 64
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self):
        one_of("train.precision", self.precision, PRECISIONS)
        one_of("train.schedule", self.schedule, SCHEDULES)
        one_of("train.checkpointing", self.checkpointing, ("none", "selective", "full"))
        one_of("train.sharding", self.sharding, SHARDINGS)
        for name in ("max_steps", "seq_len", "micro_batch_size", "eval_rows", "sample_tokens"):
            if getattr(self, name) < 1:
                raise PagodaError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < math.inf:
                raise PagodaError(f"train.{name} must be 0 or more, not {value}")
        for name in ("min_lr_ratio", "decay_ratio", "beta1", "beta2"):
            if getattr(self, name) > 1:
                raise PagodaError(f"train.{name} must be at most 1, not {getattr(self, name)}")
        if self.release_gradients and self.clip:
            raise PagodaError("train.release_gradients never has all gradients at once to clip: give --train.clip 0")
        self.seconds()

    def seconds(self) -> float:
        """`max_time` in seconds; infinity without a limit."""
        if not self.max_time:
            return math.inf
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", self.max_time.strip())
        if not match:
            raise PagodaError(f"train.max_time: '{self.max_time}' is not a time: write 90s, 30m, 2h or 1d")
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


@dataclass
class Finetune(Train):
    __doc__ = (Train.__doc__ or "").replace(
        "the highest learning rate.", "the highest learning rate (0: 2e-4 for adapters, 2e-5 for all weights)."
    )
    lr: float = 0.0
    micro_batch_size: int = 2
    warmup_steps: float = 0.05
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    beta2: float = 0.999
    save_interval: int = 200
    eval_interval: int = 50
    eval_first: bool = True
