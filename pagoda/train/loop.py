"""The training loop, the only one in the house: `train` is all of it, `step` is one step of the optimizer.

What is trained on is an objective (objective.py) over rows of tokens; how, is options.py; where it is written, run.py;
on how many processes, parallel.py. A step sees the same rows whatever the number of processes and micro-batches, and
everything that a step depends on is in the checkpoint: a run that goes on from one gives the same bits.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pagoda.common import PagodaError, keep_heap, trim_heap
from pagoda.data.shards import Rows
from pagoda.models.gpt import GPT
from pagoda.ops.loss import LARGE
from pagoda.ops.optim import norm_of, scale_
from pagoda.peft import adapter
from pagoda.train.objective import Objective, Source
from pagoda.train.options import Train
from pagoda.train.parallel import Workers
from pagoda.train.repeat import Gradients, Repeated, repeats
from pagoda.train.run import Progress, Run, latest_checkpoint
from pagoda.train.schedule import multiplier
from pagoda.train.watch import Watcher, clock


class Method:
    """What the adapters on a model want of the loop."""

    def __init__(self, model: GPT):
        self.lr_scale = partial(adapter.lr_scale, model)
        self.extra_loss = partial(adapter.extra_loss, model)
        self.after_step = partial(adapter.after_step, model)


@dataclass
class Job:
    """All that training needs; one per run and process."""

    model: GPT
    optimizer: torch.optim.Optimizer
    objective: Objective
    data: Source
    options: Train
    workers: Workers
    run: Run
    watch: Watcher
    evaluate: Callable[[Job], dict[str, float | str]] | None = None  # at every interval: what metrics.jsonl shall say
    eval_rows: int = 0  # that an evaluation scores
    method: Method | None = None
    progress: Progress = field(default_factory=Progress)
    released: list[float] = field(default_factory=list)  # squared norms of gradients that are gone already

    def __post_init__(self):
        self.gradients: Gradients = partial(gradients, self)


def train(job: Job) -> Progress:
    """Train until the options say that it is enough, or until the process is asked to stop (SIGTERM): then it saves.

    Raises PagodaError when the loss is not a number, naming the step and the last good checkpoint.
    """
    o, progress, workers = job.options, job.progress, job.workers
    last, first, saved, warm = last_step(o), progress.step, progress.step, 0.0
    asked_to_stop = []
    if o.release_gradients:
        release_gradients(job)
    if job.method is None and getattr(job.objective, "pure", False) and repeats(job.model, o, workers.device):
        job.gradients = Repeated(job.model, partial(gradients, job))
    before = signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    keep_heap()
    gc.freeze()  # what there is stays: looking through it for garbage took a millisecond a step
    trimming = trim_on_the_way(job)
    try:
        if job.evaluate and o.eval_first and not progress.step:
            job.watch.evaluation(0, **job.evaluate(job))
        while progress.step < last:
            start = time.perf_counter()
            rows = step_rows(job)
            late = progress.seconds >= o.seconds()
            scored, tokens, leave = workers.sum(
                sum(r.scored for r in rows), sum(len(r.tokens) for r in rows), bool(asked_to_stop) or late
            )
            if leave:
                break
            loss, norm, lr = step(job, rows, scored)
            seconds = time.perf_counter() - start
            progress.step, progress.tokens = progress.step + 1, progress.tokens + int(tokens)
            progress.seconds += seconds
            told = dict(loss=loss, lr=lr, grad_norm=norm, tokens=progress.tokens, tokens_per_second=tokens / seconds)
            job.watch.step(progress.step, **told, seconds=progress.seconds)
            if progress.step == first + 3 and workers.main:  # the first step is slower than the others
                job.watch.note(forecast(job, (progress.seconds - warm) / 2))
            elif progress.step == first + 1:
                warm = progress.seconds
            done = progress.step == last
            if job.evaluate and (done or (o.eval_interval and progress.step % o.eval_interval == 0)):
                job.watch.evaluation(progress.step, **job.evaluate(job))
            if job.run.due(progress.step) or done:
                saved = save(job)
        if saved != progress.step:
            save(job)
        if workers.main:
            job.watch.note(summary(job))
    finally:
        for hook in trimming:
            hook.remove()
        gc.unfreeze()
        signal.signal(signal.SIGTERM, before)
    return progress


def step(job: Job, rows: list[Rows], scored: float) -> tuple[float, float, float]:
    """One step of the optimizer over this process's micro-batches: the loss, the gradient's norm, the learning rate."""
    o, model, optimizer = job.options, job.model, job.optimizer
    lr = o.lr * multiplier(o.schedule, job.progress.step, last_step(o), o.warmup_steps, o.min_lr_ratio, o.decay_ratio)
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * lr
    total = 0.0
    for i, micro in enumerate(rows):
        if hasattr(model, "reshard") and o.sharding == "none":  # replicas add their gradients up once
            model.set_requires_gradient_sync(i == len(rows) - 1)
        total += job.gradients(micro, scored)
    if job.workers.size > 1 and not hasattr(model, "reshard"):
        job.workers.average_gradients(model)
    if o.release_gradients:
        norm = math.sqrt(sum(job.released))
    else:
        trained = (p for group in optimizer.param_groups for p in group["params"])
        norm = gradient_norm([p.grad for p in trained if p.grad is not None], o.clip)
    (loss,) = job.workers.sum(float(total))
    check_finite(job, loss, norm)
    if o.release_gradients:
        job.released.clear()
    else:
        optimizer.step()
    if job.method is not None:
        job.method.after_step(job.progress.step)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, lr


def gradients(job: Job, micro: Rows, scored: float) -> Tensor:
    """Both ways through the model for one micro-batch: its part of the loss. The gradients are added to those there."""
    o, workers = job.options, job.workers
    loss = job.objective(job.model, to_device(micro, workers.device)) / max(scored, 1)
    if job.method is not None:
        loss = loss + job.method.extra_loss() * o.micro_batch_size / o.global_batch_size
    if o.release_gradients:
        check_finite(job, float(loss.detach()), 0.0)  # behind the backward pass it would be too late
    (loss * workers.size).backward()  # the processes' gradients are averaged
    return loss.detach()


def check_finite(job: Job, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    good = latest_checkpoint(job.run.path)
    raise PagodaError(
        f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {job.progress.step + 1} is not a number; "
        + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
        + "; try a lower --train.lr, a longer warm-up, or --train.clip"
    )


def release_gradients(job: Job) -> None:
    """From now on the backward pass itself steps each parameter when its gradient is complete, and drops the gradient
    (Lv et al. 2023, "Full Parameter Fine-tuning with Limited Resources"): one gradient is in memory at a time."""

    def step_alone(p: torch.Tensor) -> None:
        job.released.append(gradient_norm([p.grad], 0) ** 2)
        job.optimizer.step()  # parameters without a gradient are left alone
        p.grad = None

    for p in job.model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(step_alone)


def trim_on_the_way(job: Job) -> list[RemovableHandle]:
    """From now on, until these hooks are removed, the holes that activations leave in the heap go back to the system:
    in the middle of a forward pass, and where its peak is not the step's, four times in a backward pass and before the
    last gradient, the embedding's, for 4 % of the time. The peak is there where one process trains in bf16."""
    model, o = job.model, job.options
    if job.workers.device.type != "cpu" or o.compile or model.embed.weight.nbytes < LARGE:
        return []
    trim, n = (lambda *_: trim_heap()), len(model.layers)
    hooks = [model.layers[n // 2].register_forward_pre_hook(trim)]
    if o.precision == "bf16" and job.workers.size == 1 and o.checkpointing == "none":
        return hooks
    return hooks + [m.register_full_backward_pre_hook(trim) for m in (model.embed, *model.layers[:: -(-n // 4)])]


def forecast(job: Job, seconds: float) -> str:
    """How long the run will take, its evaluations (a third of the work on a row) included, at that many a step."""
    o, step, last = job.options, job.progress.step, last_step(job.options)
    every, left = o.eval_interval or last, last - step
    rounds = last // every - (step - 1) // every + bool(last % every)  # one may follow this step, one is the last
    total = (left + rounds * job.eval_rows / o.global_batch_size / 3) * seconds
    total = min(total, o.seconds() - job.progress.seconds)
    return f"{seconds:.2f} s a step: {left} more take about {clock(total)}; peak memory {job.watch.memory():.2f} GiB"


def summary(job: Job) -> str:
    """What a run did, and took."""
    p = job.progress
    return (
        f"{p.step:,} steps, {p.tokens:,} tokens in {clock(p.seconds)} of training: "
        f"{p.tokens / max(p.seconds, 1e-9):.0f} tokens/s; peak memory {job.watch.memory():.2f} GiB"
    )


def step_rows(job: Job) -> list[Rows]:
    """The rows of this step that are this process's, by micro-batches: rank r of R takes every R-th one."""
    o, workers = job.options, job.workers
    n = o.micro_batch_size
    first = job.progress.step * o.global_batch_size
    count = o.global_batch_size // (n * workers.size)
    return [job.data.rows(first + (i * workers.size + workers.rank) * n, n) for i in range(count)]


def last_step(o: Train) -> int:
    """The number of steps that max_steps and max_tokens allow."""
    if not o.max_tokens:
        return o.max_steps
    return min(o.max_steps, -(-o.max_tokens // (o.global_batch_size * o.seq_len)))


def gradient_norm(gradients: list[torch.Tensor], clip: float) -> float:
    """The 2-norm of all gradients together, which are scaled down to `clip` where they exceed it (0: any norm)."""
    if not gradients:
        raise PagodaError("nothing is trained: no parameter takes a gradient")
    norm = norm_of(gradients)
    if clip and norm > clip:
        scale_(gradients, clip / norm)
    return norm


def to_device(rows: Rows, device: torch.device) -> Rows:
    if device.type == "cpu":
        return rows
    tokens, targets = (t.pin_memory().to(device, non_blocking=True) for t in (rows.tokens, rows.targets))
    return replace(rows, tokens=tokens, targets=targets)


def save(job: Job) -> int:
    job.watch.flush()
    path = job.run.save(job.model, job.optimizer, job.progress)
    job.watch.note(f"saved {path}")
    return job.progress.step
