"""How fast a model runs here, and which share of the machine's own ceilings that is.

Decoding has to read every weight and the whole cache once a token, so memory bandwidth bounds it; prefill is bound by
the rate of matrix products. Both ceilings are measured in the same run, with PyTorch's own operations, products also
with our kernel where there is one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagoda.common import PagodaError, use_huge_pages
from pagoda.engine.engine import Engine, Timing, step_tokens
from pagoda.engine.options import EngineOptions, Sampling
from pagoda.engine.request import Request
from pagoda.engine.runner import recorded_rows
from pagoda.models.gpt import GPT
from pagoda.models.layers import weights_of
from pagoda.ops import cpu
from pagoda.ops.cpu.record import Recording
from pagoda.ops.formats import PackedWeight
from pagoda.ops.linear import multiplies, multiply


@dataclass
class Speed:
    """Rates are tokens per second of the whole batch; shares are of the machine's measured ceilings."""

    prefill_tok_s: float
    decode_tok_s: float
    first_token_s: float
    peak_memory_gib: float
    decode_bytes_per_step: int
    read_gb_s: float
    decode_share_of_bandwidth: float
    gemm_gflop_s: float
    prefill_share_of_gemm: float
    decode_step_ms: dict[str, float]  # what each kernel takes of a step, without the Python around it


def bench(
    model: GPT, kv_dtype: torch.dtype, prompt_tokens: int = 512, new_tokens: int = 128, batch: int = 1, repeats: int = 3
) -> Speed:
    """Prefill `batch` prompts of random tokens, decode greedily; the median of `repeats` runs behind one to warm up."""
    config = model.config
    if min(prompt_tokens, batch, repeats) < 1 or new_tokens < 2:
        raise PagodaError("prompt_tokens, batch and repeats must be at least 1, and new_tokens at least 2")
    if prompt_tokens + new_tokens > config.block_size:
        raise PagodaError(f"{prompt_tokens} + {new_tokens} tokens do not fit the context of {config.block_size}")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (batch, prompt_tokens), generator=generator).tolist()
    greedy = Sampling(temperature=0, max_new_tokens=new_tokens)
    budget = step_tokens(model.device, 2048)
    together = EngineOptions(max_num_seqs=batch, max_step_tokens=budget, prefix_caching=False)
    engine = Engine(model, options=together, kv_dtype=kv_dtype)
    engine.run([Request(p, greedy) for p in prompts], lambda *_: None)  # to warm up
    memory, much = peak_memory(model.device), memory_to_read(model.device)
    runs, reads = [], []
    for _ in range(repeats):
        engine.timing = Timing()
        engine.run([Request(p, greedy) for p in prompts], lambda *_: None)
        runs.append(engine.timing)
        reads.append(read_bandwidth(much))  # now: a virtual machine's may be another one in a second
    decoder = engine.runner.decoders.get(recorded_rows(batch))  # of all sequences; some end before the others
    recording = decoder.recording if decoder else None
    step = recording.seconds() if isinstance(recording, Recording) and recording.complete else {}
    gemm = gemm_rate(product_type(model), model.device)
    moved = decode_bytes(model, kv_dtype, prompt_tokens + new_tokens // 2, batch)
    flops = model.flops_per_token(prompt_tokens)
    # The head runs for each prompt's last token alone.
    flops -= 2 * config.n_embd * config.vocab_size * (1 - 1 / prompt_tokens)
    first = statistics.median(t.prefill_seconds for t in runs)
    prefill = batch * prompt_tokens / first
    rates = [t.decode_tokens / t.decode_seconds for t in runs]
    return Speed(
        prefill_tok_s=prefill,
        decode_tok_s=statistics.median(rates),
        first_token_s=first,
        peak_memory_gib=memory,
        decode_bytes_per_step=moved,
        read_gb_s=statistics.median(reads) / 1e9,
        decode_share_of_bandwidth=statistics.median(moved * r / batch / read for r, read in zip(rates, reads)),
        gemm_gflop_s=gemm / 1e9,
        prefill_share_of_gemm=flops * prefill / gemm,
        decode_step_ms={name: seconds * 1000 for name, seconds in step.items()},
    )


def decode_bytes(model: GPT, kv_dtype: torch.dtype, context: int, batch: int) -> int:
    """Bytes that one decode step must read: every weight once (of the embedding one row, of experts as many as can be
    chosen), and each sequence's cache."""
    weights = {id(w): w for name, w in weights_of(model) if name not in ("embed.weight", "pos_embed.weight")}
    read = 0
    for w in weights.values():
        experts = isinstance(w, torch.nn.ModuleList) or (model.config.n_expert and len(w.shape) == 3)
        parts = list(w) if experts else [w]
        size = sum(p.nbytes if isinstance(p, PackedWeight) else p.numel() * p.element_size() for p in parts)
        chosen = min(len(parts), batch * model.config.n_expert_per_token) if experts else 1
        read += size * chosen // len(parts)
    windows = model.config.windows
    for spec, window in zip(model.cache_specs(), windows):
        read += batch * spec.page_bytes(1, kv_dtype) * (min(window, context) if window else context)
    return read


def memory_to_read(device: torch.device) -> Tensor:
    """256 MB, on a GPU 1 GB, which lie as weights do."""
    x = torch.empty(2**26 if device.type == "cpu" else 2**28, device=device)
    if device.type == "cpu":
        use_huge_pages(x.data_ptr(), x.nbytes)
    return x.fill_(1)


def read_bandwidth(x: Tensor, times: int = 10) -> float:
    """Bytes per second that a sum over x reads: the best of `times`."""
    return x.nbytes / best_time(lambda: x.sum(), times)


def product_type(model: GPT) -> torch.dtype:
    """The type whose rate of products is the model's ceiling: bf16 where weights are packed, but in float32."""
    packed = [w for _, w in weights_of(model) if isinstance(w, PackedWeight) and w.format != "float32"]
    return torch.bfloat16 if packed else model.dtype


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a 512 x 2048 x 2048 product (on a GPU 8192 in all directions, so that launching it does
    not count): the best of ten, by PyTorch or by our kernel. In float32 where bf16 is emulated."""
    if dtype == torch.bfloat16 and device.type == "cpu" and cpu.emulates(torch.empty(0, dtype=dtype)):
        dtype = torch.float32
    m, n = (512, 2048) if device.type == "cpu" else (8192, 8192)
    own = torch.Generator(device)  # a run that is going on draws what it would have drawn
    a, b = (torch.randn(rows, n, dtype=dtype, device=device, generator=own) for rows in (m, n))
    products = [torch.mm, multiply] if multiplies(a, b) else [torch.mm]
    return 2 * m * n * n / min(best_time(lambda product=product: product(a, b), 10) for product in products)


def best_time(function: Callable, times: int) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def peak_memory(device: torch.device) -> float:
    """GiB: of the process (mapped pages counted) on a CPU, of the device's allocator elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
