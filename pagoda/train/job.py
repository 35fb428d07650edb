"""From what a user asked for to a `Job` that the loop can run: pretraining here, finetuning in finetune.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pagoda.common import PagodaError
from pagoda.data.shards import PackedRows, PreparedSet
from pagoda.data.tokenizer import Tokenizer, load_tokenizer
from pagoda.evaluate.bench import gemm_rate, peak_memory
from pagoda.models.download import resolve
from pagoda.models.gpt import GPT
from pagoda.models.loader import open_checkpoint, stream
from pagoda.models.registry import from_hf_config, known_config
from pagoda.train.loop import Job, Method, last_step, to_device, train
from pagoda.train.memory import check_memory
from pagoda.train.objective import NextToken, Objective, Source
from pagoda.train.optim import make_optimizer
from pagoda.train.options import Start, Train
from pagoda.train.parallel import Workers, build, micro_batches
from pagoda.train.run import Run
from pagoda.train.watch import Watcher

EVAL_TOKENS = 4096  # in a batch of an evaluation, at least


def pretrain(
    data: list[str],
    options: Train,
    start: Start,
    model_name: str = "",
    init_from: str = "",
    model_overrides: dict[str, Any] | None = None,
) -> Path | None:
    """Train a model on prepared tokens: a fresh one of a known shape, or one that goes on from a checkpoint.

    data             folders of `pagoda prepare`, each with `:WEIGHT` behind it where they are mixed
    model_name       a known size (`pagoda models`) to build from scratch
    model_overrides  keys of its config.json that shall be other than usual
    init_from        a checkpoint, a run or a known model to start from instead
    Returns the last checkpoint, or None for a dry run.
    """
    config = {k: v for k, v in locals().items() if k not in ("options", "start")} | start.config()
    config |= {"command": "pretrain", "train": asdict(options)}
    workers = Workers(start.device)
    micro_batches(options, workers)
    sets = [prepared(d) for d in data]
    source = PackedRows(sets, options.seq_len, seed=start.seed, batch=options.global_batch_size)
    validation = validation_rows(sets, options)
    first = sets[0][0]
    tokenizer = load_tokenizer(first.tokenizer_path)
    if bool(model_name) == bool(init_from):
        raise PagodaError(
            "give --model_name (a shape to build from scratch) or --init_from (a checkpoint), one of them"
        )
    if init_from:
        base = resolve(init_from)
        first.check_tokenizer(load_tokenizer(base), init_from)
        hf = open_checkpoint(base).config
    else:
        base = None
        hf = {**known_config(model_name), **fitting_vocabulary(known_config(model_name), tokenizer)}
    hf |= {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in (model_overrides or {}).items()}
    with torch.device("meta"):
        model = from_hf_config(hf, str(base or "the model's configuration"))
    run = Run(start.out_dir, options, workers, beside=tokenizer.save)
    if not fits(model, run, start):
        return None
    checkpoint = run.open(config, source.fingerprint, start.resume)
    model = build(model, first_weights(model, checkpoint or base, start.seed), options, workers)
    return start_job(model, checkpoint, NextToken(options.z_loss), source, validation, run, tokenizer, start)


def fits(model: GPT, run: Run, start: Start, dress: Callable[[GPT], None] | None = None) -> bool:
    """Say what the run will need, and refuse what cannot work. False when that was all that was asked for."""
    options = run.options
    if options.seq_len + model.n_virtual > model.config.block_size:
        virtual = f" with {model.n_virtual} virtual tokens before it" if model.n_virtual else ""
        context = model.config.block_size
        raise PagodaError(f"train.seq_len {options.seq_len}{virtual} exceeds the model's context of {context}")
    report = check_memory(model, start.optimizer, options, run.workers, dress)
    if run.workers.main:
        print(report.table(), file=sys.stderr)
        if dress:
            trained, n = sum(p.numel() for p in model.parameters() if p.requires_grad), model.n_params()
            print(f"training {trained:,} of {n:,} parameters ({trained / n:.2%})", file=sys.stderr)
    return not start.dry_run


def start_job(
    model: GPT,
    checkpoint: Path | None,
    objective: Objective,
    source: Source,
    validation: Source | None,
    run: Run,
    tokenizer: Tokenizer,
    start: Start,
    method: Method | None = None,
) -> Path:
    """Train a model that has its weights, from a checkpoint's progress on if there is one. Returns the last checkpoint.

    method: what finetuning wears the model with, as far as the loop must know
    """
    options, workers = run.options, run.workers
    torch.manual_seed(start.seed + workers.rank)
    rates = options.lr, options.weight_decay, (options.beta1, options.beta2), options.eps
    scale = {"lr_scale": method.lr_scale} if method else {}
    optimize = make_optimizer(start.optimizer, model.named_parameters(), *rates, **scale)
    job = Job(model, optimize, objective, source, options, workers, run, watch=None, method=method)
    if checkpoint is not None:
        job.progress = run.restore(checkpoint, model, optimize)
    compute = torch.float32 if options.precision == "float32" else torch.bfloat16
    job.watch = Watcher(
        run.path,
        job.progress.step,
        last_step(options),
        main=workers.main,
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        flops_per_token=(2 if method else 3) * model.flops_per_token(options.seq_len),  # frozen weights: no gradients
        peak_flops=workers.size * gemm_rate(compute, workers.device) if workers.main else 0.0,
        memory=lambda: peak_memory(workers.device),
    )
    if validation is not None or options.sample_prompt:
        job.eval_rows = min(validation.n_rows, options.eval_rows) if validation else 0
        job.evaluate = lambda job: evaluate(job, validation, tokenizer, start.seed)
    try:
        train(job)
    finally:
        job.watch.close()
        workers.close()
    return run.path / "checkpoints" / f"step-{job.progress.step}"


def prepared(text: str) -> tuple[PreparedSet, float]:
    """`DIR` or `DIR:WEIGHT`."""
    path, colon, weight = text.rpartition(":")
    try:
        return PreparedSet(Path(path)) if colon else PreparedSet(Path(text)), float(weight) if colon else 1.0
    except ValueError:
        return PreparedSet(Path(text)), 1.0


def validation_rows(sets: list[tuple[PreparedSet, float]], options: Train) -> PackedRows | None:
    """The validation split, where there is one that fills a row."""
    some = [(s, w) for s, w in sets if "validation" in s.splits and s.splits["validation"].n_tokens >= options.seq_len]
    return PackedRows(some, options.seq_len, split="validation", sequential=True) if some else None


def fitting_vocabulary(hf: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """What a fresh model takes from its tokenizer. A vocabulary that was rounded up a little stays as it is."""
    told: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    size = tokenizer.vocab_size
    if not size <= hf["vocab_size"] <= 1.1 * size:
        told["vocab_size"] = size
    return told


def first_weights(model: GPT, checkpoint: Path | None, seed: int) -> Iterator[tuple[str, Tensor]]:
    if checkpoint is None:
        return model.fresh_weights(torch.Generator().manual_seed(seed))
    return stream(model, checkpoint)


@contextmanager
def untrained(model: GPT) -> Iterator[None]:
    """Nothing in this block changes the training: neither the random states nor the model."""
    with torch.random.fork_rng(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train()
            for module in model.modules():
                if hasattr(module, "reshard"):  # no backward pass will do it
                    module.reshard()


def evaluate(job: Job, validation: Source | None, tokenizer: Tokenizer, seed: int) -> dict[str, float | str]:
    """The loss per scored token of the validation rows, and a completion of the sample prompt."""
    o, workers, told = job.options, job.workers, {}
    with untrained(job.model):
        if validation is not None:
            total, n = 0.0, max(o.micro_batch_size, EVAL_TOKENS // o.seq_len)  # nothing is kept for a way back
            scored = 0
            count = min(validation.n_rows, o.eval_rows)
            for first in range(0, count, n * workers.size):  # every process takes part in every round
                begin = first + workers.rank * n
                some = min(begin, count - 1)  # who has nothing left to do goes through the motions
                rows = validation.rows(some, min(n, count - some))
                losses = float(job.objective(job.model, to_device(rows, workers.device)))
                if begin < count:
                    total, scored = total + losses, scored + rows.scored
            total, scored = workers.sum(total, scored)
            told["val_loss"] = total / max(scored, 1)
        if o.sample_prompt:
            told["sample"] = complete(job.model, tokenizer, o.sample_prompt, o.sample_tokens, seed)
    return told


def complete(model: GPT, tokenizer: Tokenizer, prompt: str, n: int, seed: int) -> str:
    """A completion at temperature 0.8, without a cache: the forward pass that training uses, sharded or not."""
    ids = tokenizer.encode(prompt)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(min(n, model.config.block_size - len(ids))):
        tokens = torch.tensor(ids, device=model.device)
        logits = model(tokens, logits_at=torch.tensor([len(ids) - 1], device=model.device))[0].float().cpu()
        token = int(torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator))
        if token in tokenizer.eos_ids:
            break
        ids.append(token)
    return tokenizer.decode(ids)
