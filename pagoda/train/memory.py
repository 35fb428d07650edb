"""What a run will need, said before it runs: bytes per process, and what to change where they are too many.

Weights, gradients and the optimizer's state are counted. Activations are measured: one and two blocks of the model, on
random weights and one row of tokens, and what autograd keeps of them; they grow with blocks and rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import nn

from pagoda.common import PagodaError, free_memory, trim_heap
from pagoda.models.batch import Batch
from pagoda.models.gpt import GPT
from pagoda.models.layers import set_weight
from pagoda.ops import cpu
from pagoda.ops.cpu.record import Recording
from pagoda.ops.loss import BLOCK, CHUNK_BYTES
from pagoda.train.optim import make_optimizer, state_bytes, step_bytes
from pagoda.train.options import Train
from pagoda.train.parallel import Workers
from pagoda.train.repeat import repeats

GIB = 2**30


@dataclass
class Memory:
    """Bytes of one process at its peak, by what they are for."""

    program: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    data: int
    peak: int

    def table(self) -> str:
        parts = {k: v for k, v in vars(self).items() if k != "peak"}
        lines = [f"  {name:12}{size / GIB:8.2f} GiB" for name, size in parts.items()]
        return "\n".join(["memory per process, estimated:", *lines, f"  {'peak':12}{self.peak / GIB:8.2f} GiB"])


@dataclass
class Activations:
    """Bytes that one row leaves for the backward pass: each block, and all else; or, of steps that are repeated, all
    that is made in a step and stays."""

    block: int
    rest: int
    repeated: bool = False


def check_memory(
    model: GPT, optimizer: str, options: Train, workers: Workers, dress: Callable[[GPT], None] | None = None
) -> Memory:
    """The estimate for a model (on the meta device is enough); PagodaError where the machine has less.

    dress: what gives a small copy of the model the adapters, and the frozen weights, that the model itself has
    """
    kept = rehearse(model, optimizer, options, workers.device, dress)
    program = resident(workers.device, model)
    need = estimate(model, optimizer, options, workers, kept, program)
    have = free_memory(workers.device) // (workers.size if workers.device.type == "cpu" else 1)
    if need.peak - program <= have:
        return need
    advice = "no setting fits: use a smaller model, a shorter --train.seq_len, or more processes with zero3"
    sizes = [m for m in range(options.micro_batch_size, 0, -1) if options.micro_batch_size % m == 0]
    optimizers = ((optimizer, options.precision), ("adamw8bit", options.precision), ("adafactor", "bf16"))
    for (o, p), c, m in product(optimizers, ("none", "full"), sizes):
        changed = replace(options, precision=p, checkpointing=c, micro_batch_size=m)
        if estimate(model, o, changed, workers, kept, program).peak - program <= have:
            names = f"--train.precision {p} --train.checkpointing {c} --train.micro_batch_size {m}"
            advice = f"this would fit: --optimizer {o} {names}"
            break
    raise PagodaError(f"this run needs {need.peak / GIB:.2f} GiB per process, {have / GIB:.2f} GiB are free; {advice}")


def estimate(model: GPT, optimizer: str, o: Train, workers: Workers, kept: Activations, program: int) -> Memory:
    """See `Memory`. The peak comes at the start of the backward pass (all activations, the head's logits), at its end
    (all gradients, one of which is summed, counted or stepped), or where one process gathers all weights to save them.
    """
    stored = torch.float32 if o.precision != "bf16" else torch.bfloat16
    compute = 4 if o.precision == "float32" else 2
    shards = workers.size if o.sharding != "none" else 1
    trained = [(name, p.to(stored)) for name, p in model.named_parameters() if p.requires_grad]
    state, moment = (f(optimizer, trained, shards) for f in (state_bytes, step_bytes))
    largest = max(p.numel() for _, p in trained)
    parameters = sum(p.nbytes for _, p in trained)
    gradients = largest * stored.itemsize if o.release_gradients else parameters // shards
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    weights = parameters // shards + sum(t.nbytes for t in frozen)
    used, gathered, reduced = stored.itemsize, 0, 0  # used: bytes of a number of the weights that the model works with
    n_layer = len(model.layers)
    if workers.size > 1 and not frozen:  # FSDP gathers everything, or two blocks and what is outside of them
        n_all, n_block = (sum(p.numel() for p in m.parameters()) for m in (model, model.layers[0]))
        outside = n_all - n_block * n_layer
        used, gathered = compute, compute * (n_all if o.sharding != "zero3" else outside + 2 * n_block)
        reduced = (4 + compute) * outside  # gradients are added up in float32: what is outside of the blocks comes last
        if shards == 1 and stored == torch.bfloat16:
            reduced += 4 * n_all  # and of replicas FSDP holds these sums until the end
    rows = o.micro_batch_size
    n_tokens = rows * o.seq_len
    passed = n_tokens * model.config.n_embd * compute
    again = {"none": 0, "selective": n_layer // 2, "full": n_layer}[o.checkpointing]
    activations = rows * kept.rest + (n_layer - again) * rows * kept.block + again * passed
    logits = head_bytes(model, n_tokens, compute, used, workers.device)
    begin = gathered + activations + logits
    if o.global_batch_size > rows * workers.size or kept.repeated:  # what came before has left its own
        begin += gradients
    end = rows * kept.block + reduced
    if model.embed.weight is model.head.weight and getattr(model.embed.weight, "requires_grad", False):
        end += model.embed.weight.numel() * used  # a second gradient of the same weight
    end = gradients + max(end, moment) + (activations if kept.repeated else 0)
    data = n_tokens * 16
    peak = program + weights + state + data + max(begin, end, parameters if shards > 1 else 0)
    return Memory(program, weights + gathered, gradients, state, activations, logits, data, peak)


def head_bytes(model: GPT, n_tokens: int, compute: int, used: int, device: torch.device) -> int:
    """What `linear_cross_entropy` holds: a chunk of logits, the head's gradient, and what it casts. compute and used:
    bytes of a number of the logits and of the head."""
    rows, vocab_size, n_embd = CHUNK_BYTES // compute, model.config.vocab_size, model.config.n_embd
    chunk, n_head = min(n_tokens, rows), vocab_size * n_embd
    logits = chunk * vocab_size * compute
    if compute == 2 and cpu.emulates(torch.empty(0, dtype=torch.bfloat16, device=device)):
        logits += 4 * min(BLOCK, vocab_size) * (chunk + n_embd)
    if device.type != "cpu":
        logits += 4 * chunk * vocab_size
    if not getattr(model.head.weight, "requires_grad", False):
        return logits
    if used > compute:
        return logits + n_head * (used + compute)  # the masters' gradient, and a copy of them for the product
    if n_tokens <= rows:
        return logits + n_head * used
    return 4 * n_head + max(logits, n_head * used)  # a float32 sum over chunks, rounded in the end


def rehearse(
    model: GPT, optimizer: str, o: Train, device: torch.device, dress: Callable[[GPT], None] | None = None
) -> Activations:
    """Steps of the same model with one block and with two, on one row. What a run leaves in a process whatever its
    size, modules imported late and code that PyTorch compiles for its products, is there afterwards."""
    repeated = dress is None and repeats(model, o, device)
    with torch.random.fork_rng():
        one, two = (kept_bytes(shortened(model, n), optimizer, o, device, dress, repeated) for n in (1, 2))
    trim_heap()
    return Activations(two - one, 2 * one - two, repeated)


def shortened(model: GPT, n_layer: int) -> GPT:
    """The same model with few blocks and a small vocabulary."""
    c = model.config
    layers = {
        "n_layer": n_layer,
        "windows": c.windows[:n_layer],
        "dense_layers": tuple(d for d in c.dense_layers if d < n_layer),
    }
    with torch.device("meta"):
        return type(model)(replace(c, vocab_size=min(c.vocab_size, 256), **layers))


def kept_bytes(
    model: GPT, optimizer: str, o: Train, device: torch.device, dress: Callable[[GPT], None] | None, repeated: bool
) -> int:
    """Bytes of one row that autograd keeps for the backward pass of a step, or that a recording keeps; parameters and
    gradients not counted."""
    dtype = torch.bfloat16 if o.precision == "bf16" or (dress and o.precision == "mixed") else torch.float32
    for name, p in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        set_weight(model.get_submodule(module), leaf, nn.Parameter(torch.rand(p.shape, device=device).to(dtype) / 16))
    model.tie()
    if dress is not None:
        dress(model)
    elif o.precision == "mixed":
        model.compute_dtype = torch.bfloat16
    if o.compile:
        for block in model.layers:
            block.compile()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    tokens = torch.zeros(o.seq_len, dtype=torch.int64, device=device)

    def both_ways() -> torch.Tensor:
        nonlocal size
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(tokens, Batch.of([o.seq_len], device), targets=tokens).sum()
        size = sum(s.nbytes() for s in kept.values())
        kept.clear()
        loss.backward()
        return loss.detach()

    size = 0
    if not repeated:
        both_ways()
    elif (recording := Recording(both_ways, operations=True)).complete:
        size = recording.nbytes - 2 * sum(p.nbytes for p in model.parameters())
    make_optimizer(optimizer, model.named_parameters(), 0.0).step()
    return size


def resident(device: torch.device, model: GPT) -> int:
    """Bytes that this process holds already, a model's weights left out."""
    weights = {t.untyped_storage() for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"}
    held = sum(s.nbytes() for s in weights if s.resizable())  # others are views of a file, not read yet
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) - held
    if Path("/proc/self/statm").is_file():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") - held
    return 300 * 2**20
