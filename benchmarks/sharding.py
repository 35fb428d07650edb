"""Bytes of parameters, gradients and optimizer that each of two processes holds, by --train.sharding.

usage: python benchmarks/sharding.py [MODEL_NAME]        (SmolLM2-135M by default; two gloo processes on this machine)

Counted behind the first step: what lies in the local shards. The ratio is to plain data parallel.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch

from pagoda.models.batch import Batch
from pagoda.models.registry import from_hf_config, known_config
from pagoda.train.optim import local, make_optimizer
from pagoda.train.options import Train
from pagoda.train.parallel import Workers, build


def main(name: str = "SmolLM2-135M") -> None:
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, name]
        processes = [subprocess.Popen(command, env={**common, "RANK": str(r)}) for r in range(2)]
        sys.exit(max(p.wait() for p in processes))
    workers, figures = Workers("cpu"), {}
    for sharding in ("none", "zero2", "zero3"):
        options = Train(sharding=sharding, precision="float32")
        with torch.device("meta"):
            model = from_hf_config(known_config(name))
        model = build(model, model.fresh_weights(torch.Generator().manual_seed(0)), options, workers)
        optimizer = make_optimizer("adamw", model.named_parameters(), 1e-4)
        tokens = torch.arange(64)
        model(tokens, Batch.of([64]), targets=tokens).sum().backward()
        optimizer.step()
        held = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
        figures[sharding] = sum(local(t).nbytes for t in held)
        del model, optimizer, held
    if workers.main:
        print("| --train.sharding | parameters, gradients, optimizer per process, GiB | ratio |\n|---|---|---|")
        for sharding, n in figures.items():
            print(f"| {sharding} | {n / 2**30:.2f} | {n / figures['none']:.2f} |")
    workers.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
