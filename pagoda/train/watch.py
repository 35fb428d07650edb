"""Watching a run: `metrics.jsonl`, a progress line on standard error, and on request TensorBoard and Weights & Biases.

`metrics.jsonl` has one JSON object per line, each with its `step`: of training (loss, lr, grad_norm, tokens,
tokens_per_second, seconds) or of an evaluation (val_loss, sample). A run that goes on from step k forgets what was
written behind it, and a line that a crash left half-written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagoda.common import PagodaError, optional, replacing

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 10  # between lines where standard error is no terminal
BAR_SECONDS = 0.1  # between changes of the bar where it is one


class Watcher:
    """What a run tells its user. Everything is written by the main process alone; the others' calls do nothing.

    path            the run folder
    step            the step that the run goes on from (0: it starts)
    last_step       where it will end (0: nobody knows)
    tensorboard     write RUN/tensorboard
    wandb           a Weights & Biases project to report to (empty: none)
    flops_per_token operations of a token's forward and backward pass, and
    peak_flops      operations per second that the processes' devices reach at best: together they give MFU
    memory          a function that tells the memory in use, in GiB
    """

    def __init__(
        self,
        path: Path,
        step: int = 0,
        last_step: int = 0,
        main: bool = True,
        tensorboard: bool = False,
        wandb: str = "",
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        memory: Callable[[], float] | None = None,
    ):
        self.main, self.last_step = main, last_step
        if not main:
            return
        self.share_of_peak = flops_per_token / peak_flops if peak_flops else 0.0
        self.memory = memory
        self.began: tuple[int, float] | None = None  # the first step of this sitting, and when it was done
        self.shown = -math.inf
        self.tensorboard = open_tensorboard(path / "tensorboard", step) if tensorboard else None
        self.wandb = open_wandb(path, wandb) if wandb else None
        path.mkdir(parents=True, exist_ok=True)
        forget_after(path / METRICS, step)
        self.file = (path / METRICS).open("ab", buffering=0)  # a line is with the system when it is written
        self.bar = open_bar(step, last_step)

    def step(self, step: int, **record: float) -> None:
        """A training step is done."""
        if not self.main:
            return
        self._write({"step": step, **record})
        now = time.monotonic()
        self.began = self.began or (step, now)
        last = step == self.last_step
        if now - self.shown < (BAR_SECONDS if self.bar else PLAIN_SECONDS) and not last:
            return
        self.shown = now
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, status=self._status(step, record, now), refresh=True)
        else:
            self.note(self._status(step, record, now))

    def evaluation(self, step: int, **record: float | str) -> None:
        """An evaluation is done."""
        if not self.main:
            return
        self._write({"step": step, **record})
        numbers = [f"{k} {v:.4f}" for k, v in record.items() if isinstance(v, int | float)]
        texts = [f"{k}: {v}" for k, v in record.items() if isinstance(v, str)]
        self.note("\n".join([f"step {step}  {'  '.join(numbers)}".rstrip(), *texts]))

    def note(self, text: str) -> None:
        """A line on standard error, above the bar where there is one."""
        if not self.main:
            return
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """What was told so far is on the disk when this returns: a checkpoint never knows more than metrics.jsonl."""
        if not self.main:
            return
        os.fsync(self.file.fileno())
        if self.tensorboard:
            self.tensorboard.flush()

    def close(self) -> None:
        if not self.main:
            return
        if self.bar:
            self.bar.stop()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def _write(self, record: dict[str, Any]) -> None:
        # JSON knows neither NaN nor infinity
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            line = json.dumps(plain, ensure_ascii=False).encode() + b"\n"
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise PagodaError(f"cannot write {self.file.name}: {e.strerror}") from None
        if self.tensorboard:
            for key, value in record.items():
                if isinstance(value, str):
                    self.tensorboard.add_text(key, value, record["step"])
                elif key != "step":
                    self.tensorboard.add_scalar(key, value, record["step"])
        if self.wandb:
            self.wandb.log(record)

    def _status(self, step: int, record: dict[str, float], now: float) -> str:
        rate = record.get("tokens_per_second", 0.0)
        parts = [
            f"step {step}/{self.last_step}" if self.last_step else f"step {step}",
            f"loss {record['loss']:.3f}" if "loss" in record else "",
            f"lr {record['lr']:.1e}".replace("e-0", "e-") if "lr" in record else "",
            f"{human(rate)} tok/s" if rate else "",
            f"MFU {rate * self.share_of_peak:.0%}" if rate and self.share_of_peak else "",
            f"{self.memory():.1f} GiB" if self.memory else "",
        ]
        first, since = self.began
        if self.last_step and step > first:
            parts.append(f"{clock((now - since) / (step - first) * (self.last_step - step))} left")
        return "  ".join(p for p in parts if p)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in their order, without a line that is no record (a crash's last one)."""
    records = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and line.endswith("\n"):
                records.append(record)
    return records


def forget_after(path: Path, step: int) -> None:
    """Take out of a metrics.jsonl what was written behind a step, and half a last line; all of it before a start."""
    if not path.exists():
        return
    kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in read_metrics(path) if 0 < step >= r["step"]]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def open_bar(step: int, last_step: int) -> Any:
    """rich's progress, or None where standard error is no terminal. It has no thread: each step draws it anew."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = Console(stderr=True)
    status = TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True))
    columns = (BarColumn(bar_width=None), status) if console.width >= 100 and last_step else (status,)
    bar = Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False, expand=True)
    bar.add_task("", total=last_step or None, completed=step, status="")
    bar.start()
    return bar


def open_tensorboard(path: Path, step: int) -> Any:
    optional("tensorboard", "train")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=step + 1 if step else None)


def open_wandb(path: Path, project: str) -> Any:
    wandb = optional("wandb")
    identity = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]  # a resumed run is the same run
    path.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project=project, name=path.name, id=identity, resume="allow", dir=str(path))
    run.define_metric("*", step_metric="step")  # a resumed run may tell a step again
    return run


def human(n: float) -> str:
    """12345 as 12.3k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def clock(seconds: float) -> str:
    """3723 as 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
