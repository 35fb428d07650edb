"""Finetuning: instruction data, a method (all weights, or adapters), and the loop that pretraining uses."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from pagoda.common import PagodaError
from pagoda.data.instruct import InstructionRows, read_instructions, split_by_hash
from pagoda.data.options import InstructionOptions
from pagoda.data.tokenizer import load_tokenizer
from pagoda.models.download import resolve
from pagoda.models.gpt import GPT
from pagoda.models.loader import load, open_checkpoint
from pagoda.models.registry import from_hf_config
from pagoda.peft import adapter
from pagoda.peft.files import save_adapter
from pagoda.peft.options import Options, named
from pagoda.train.job import first_weights, fits, start_job
from pagoda.train.loop import Method, last_step
from pagoda.train.objective import NextToken
from pagoda.train.options import Start, Train
from pagoda.train.parallel import Workers, build, finish_block, micro_batches
from pagoda.train.run import Run


def finetune(
    model: str,
    data: str,
    options: Train,
    start: Start,
    instructions: InstructionOptions,
    methods: dict[str, Options],
    method: str = "lora",
    quantize: str | None = None,
    val_data: str = "",
    val_fraction: float = 0.05,
    epochs: float = 0.0,
) -> Path | None:
    """Train a model on instructions. Returns the last checkpoint: a model, or an adapter; None for a dry run.

    method   `full`, or a method of `peft.options.METHODS`, or several with commas between; `qlora` is LoRA over a base
             in NF4
    methods  the options of each method by name, of which those of `method` are used
    epochs   how often the data is seen, in place of options.max_steps
    """
    config = {k: v for k, v in locals().items() if k not in ("options", "start", "methods")} | start.config()
    config |= {"command": "finetune", "instructions": asdict(instructions)}
    names = named(method)
    if not names and quantize:
        raise PagodaError("full trains the weights themselves: leave out --quantize, or give --method qlora")
    if not 0 <= val_fraction < 1:
        raise PagodaError(f"val_fraction is a share of the data: 0 or more and below 1, not {val_fraction}")
    if not 0 <= epochs < math.inf:
        raise PagodaError(f"epochs must be 0 or more, not {epochs}")
    workers = Workers(start.device)
    micro_batches(options, workers)
    options.lr = options.lr or (2e-4 if names else 2e-5)
    base = resolve(model)
    tokenizer = load_tokenizer(base)
    source, validation = instruction_rows(
        data, val_data, val_fraction, tokenizer, instructions, options, start.seed, workers
    )
    if epochs:
        options.max_steps = max(1, round(epochs * source.n_rows / options.global_batch_size))
    config |= {"train": asdict(options), **{name: asdict(methods[name]) for name in names}}
    objective = NextToken(options.z_loss)
    if not names:
        with torch.device("meta"):
            gpt = from_hf_config(open_checkpoint(base).config, str(base))
        run = Run(start.out_dir, options, workers, beside=tokenizer.save)
        if not fits(gpt, run, start):
            return None
        checkpoint = run.open(config, source.fingerprint, start.resume)
        gpt = build(gpt, first_weights(gpt, checkpoint or base, start.seed), options, workers)
        return start_job(gpt, checkpoint, objective, source, validation, run, tokenizer, start)

    if options.sharding != "none" or options.cpu_offload:
        raise PagodaError("adapters are trained on a whole model in every process: leave out --train.sharding")
    dtype = torch.float32 if options.precision == "float32" else torch.bfloat16
    quantize = "nf4" if "qlora" in names else quantize
    gpt = load(base, dtype, workers.device, quantize=quantize).train()

    def dress(model: GPT) -> None:
        torch.manual_seed(start.seed)
        narrow = dtype if options.precision == "bf16" else torch.float32
        adapter.attach(model, [replace(methods[name]) for name in names], last_step(options), narrow)
        model.train()

    dress(gpt)
    known_as = str(base if Path(model).exists() else model)
    write = lambda model, path: save_adapter(model, path, known_as)  # noqa: E731
    run = Run(start.out_dir, options, workers, beside=tokenizer.save, save_adapter=write)
    if not fits(gpt, run, start, dress):
        return None
    checkpoint = run.open(config, source.fingerprint, start.resume)
    for layer, block in enumerate(gpt.layers):
        finish_block(block, layer, options, None)
    return start_job(gpt, checkpoint, objective, source, validation, run, tokenizer, start, Method(gpt))


def instruction_rows(
    data: str,
    val_data: str,
    val_fraction: float,
    tokenizer,
    instructions: InstructionOptions,
    options: Train,
    seed: int,
    workers: Workers,
) -> tuple[InstructionRows, InstructionRows | None]:
    """The rows to train on, and those to validate with."""
    read = read_instructions(data, tokenizer, instructions)
    examples, held_out = read.examples, []
    if val_data:
        held_out = read_instructions(val_data, tokenizer, instructions).examples
    elif val_fraction:
        examples, held_out = split_by_hash(examples, val_fraction)
    shape = dict(seq_len=options.seq_len, packing=instructions.packing, fill=options.compile)
    source = InstructionRows(examples, seed=seed, **shape)
    if workers.main:
        for line in [*read.notes(), source.summary()]:
            print(line, file=sys.stderr)
    return source, InstructionRows(held_out, sequential=True, **shape) if held_out else None
