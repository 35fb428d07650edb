"""Several processes train one model: data parallel, with parameters, gradients and optimizer sharded as asked.

Every process is one `Workers`. A single process is the case of one, and uses none of `torch.distributed`. With more,
`fully_shard` (FSDP2) is applied from outside, block by block; the models know nothing of it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pagoda.common import PagodaError, resolve_device
from pagoda.models.gpt import GPT
from pagoda.models.layers import set_weight
from pagoda.train.options import Train


class Workers:
    """The processes of a run, seen from one of them: `rank` of `size`, on `device`."""

    def __init__(self, device: str = "auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = resolve_device(device)
        if self.device.type == "cuda":  # the same bits again
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        if self.size > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    @property
    def main(self) -> bool:
        """Whether this process writes what the run writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device if self.device.type == "cuda" else "cpu")
        dist.all_reduce(total)
        return total.tolist()

    def average_gradients(self, model: nn.Module) -> None:
        """Of a model that every process has whole: adapters, which are small, are added up without FSDP."""
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= self.size

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sharder(self, options: Train):
        """What `fully_shard` is told: a function to apply to each block, and then to the whole model."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        kind = self.device.type
        if options.sharding == "none":  # replicas: shards over groups of one process
            mesh = init_device_mesh(kind, (self.size, 1), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(kind, (self.size,))
        dtype = torch.bfloat16 if options.precision == "mixed" else None
        return partial(
            fully_shard,
            mesh=mesh,
            reshard_after_forward=options.sharding == "zero3",
            mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy(),
        )


def build(model: GPT, weights: Iterable[tuple[str, Tensor]], options: Train, workers: Workers) -> GPT:
    """Give a model on the meta device its weights, and apply what training asks for around its blocks.

    weights  (name, tensor) of every parameter in the model's order, one in memory at a time. With several processes a
             block is sharded as soon as it is complete, so that no process ever holds the whole model
    In this order: weights, activation checkpointing, compilation, sharding.
    """
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    shard = workers.sharder(options) if workers.size > 1 else None
    place = torch.device("cpu") if shard and options.cpu_offload else workers.device
    complete = 0
    for name, tensor in weights:
        if shard and name.startswith("layers.") and (layer := int(name.split(".")[1])) > complete:
            finish_block(model.layers[complete], complete, options, shard)
            complete = layer
        module, _, leaf = name.rpartition(".")
        owned = torch.empty_like(tensor, dtype=dtype, device=place, memory_format=torch.contiguous_format)
        set_weight(model.get_submodule(module), leaf, nn.Parameter(owned.copy_(tensor)))
    for layer in range(complete, len(model.layers)):
        finish_block(model.layers[layer], layer, options, shard)
    model.tie()
    if shard:
        shard(model)
    elif options.precision == "mixed":
        model.compute_dtype = torch.bfloat16
    return model.train()


def finish_block(block: nn.Module, layer: int, options: Train, shard) -> None:
    if options.checkpointing == "full" or (options.checkpointing == "selective" and layer % 2):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if options.compile:
        block.compile()
    if shard:
        shard(block)


def launch(devices: int, arguments: list[str]) -> int:
    """Run `pagoda ARGUMENTS` in `devices` processes on this machine; the exit code. As `torchrun` does, in a page.

    The first process speaks for all. Of the others only what the first to fail says is shown.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // devices))
    processes, errors = [], []
    for rank in range(devices):
        environment = {
            "OMP_NUM_THREADS": threads,
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(devices),
        }
        errors.append(tempfile.TemporaryFile() if rank else None)  # noqa: SIM115
        out = subprocess.DEVNULL if rank else None
        command = [sys.executable, "-m", "pagoda", *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=errors[rank]))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: [p.send_signal(n) for p in processes])
    while all(p.poll() in (None, 0) for p in processes) and any(p.poll() is None for p in processes):
        time.sleep(0.1)
    time.sleep(0 if all(p.poll() == 0 for p in processes) else 2)  # time for the first to say why
    failed = [rank for rank, p in enumerate(processes) if p.poll() not in (None, 0)]
    for p in processes:
        p.kill()
        p.wait()
    if not failed:
        return 0
    if 0 not in failed or processes[0].returncode < 0:
        for rank in failed:
            if rank:
                errors[rank].seek(0)
                sys.stderr.write(errors[rank].read().decode(errors="replace"))
                break
    return abs(processes[failed[0]].returncode)


def micro_batches(options: Train, workers: Workers) -> int:
    """Micro-batches of one optimizer step on each process."""
    step = options.micro_batch_size * workers.size
    if not options.global_batch_size:
        options.global_batch_size = step
    if options.global_batch_size % step:
        raise PagodaError(
            f"train.global_batch_size {options.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{options.micro_batch_size} times {workers.size} processes"
        )
    if options.release_gradients and options.global_batch_size != options.micro_batch_size:
        raise PagodaError("train.release_gradients needs one process and one micro-batch a step")
    if workers.size == 1 and (options.sharding != "none" or options.cpu_offload):
        raise PagodaError("train.sharding and train.cpu_offload need several processes: give --devices 2 or more")
    return options.global_batch_size // step
