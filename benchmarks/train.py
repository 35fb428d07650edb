"""Training steps on a CPU: Pagoda beside transformers, PEFT and litgpt, in turns; the table goes to RESULTS.md.

usage: python benchmarks/train.py PEERS_DIR [--rounds 3] [--steps 6] [--only REGEX]

SmolLM2-135M, 2 rows of 512 tokens a step, AdamW. PEERS_DIR is what setup_peers.sh built. Every system runs in a process
of its own, through the command that its users run; a round measures each once, and the medians of the rounds count.
The first two steps of a process are left out. Memory is the process's peak, as the system counts it. With --only the
other rows of the table stay as they are; a ratio is always of systems that were measured together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pagoda.evaluate.bench import gemm_rate

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
BEGIN, END = "<!-- train.py -->", "<!-- /train.py -->"
FLOPS = {"full": 6, "lora": 4}  # per parameter and token: adapters need no gradients of the weights
PARAMETERS = 134_515_008
RATIOS = {  # what is compared: the ratios of speed and of memory that were asked for
    ("pagoda full, bf16", "transformers full, bf16"): "1.4, 0.65",
    ("pagoda full, bf16", "transformers full, bf16, compiled"): "",
    ("pagoda full, bf16, compiled", "transformers full, bf16, compiled"): "",
    ("pagoda full, bf16", "litgpt full, bf16, compiled"): "",
    ("pagoda full, float32", "transformers full, float32"): "",
    ("pagoda LoRA, bf16", "PEFT LoRA, bf16"): "1.4, 0.6",
    ("pagoda QLoRA, bf16", "PEFT QLoRA, bf16"): "1.4, 0.5",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="the systems whose names match")
    args = parser.parse_args()
    threads = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        hf, tokens, texts = f"{folder}/hf", f"{folder}/tokens", f"{folder}/texts.jsonl"
        pagoda("convert", "smollm2-135m-instruct", hf, "--dtype", "float32")
        write_texts(Path(folder))
        pagoda("prepare", f"{folder}/text.txt", tokens, "--tokenizer", hf, "--split_by", "position")
        shape = ["--train.seq_len", "512", "--train.micro_batch_size", "2", "--train.save_interval", "0"]
        shape += ["--train.max_steps", str(args.steps), "--device", "cpu"]
        full = ["pretrain", "--init_from", hf, "--data", tokens, "--train.eval_interval", "0", "--train.eval_rows", "1"]
        adapter = ["finetune", hf, "--data", texts, "--train_on", "all", "--val_fraction", "0", "--epochs", "0"]
        peer = [args.peers / "transformers/bin/python", HERE / "peer_train_transformers.py", hf]
        litgpt = [args.peers / "litgpt/bin/python", HERE / "peer_train_litgpt.py"]
        end = [str(args.steps), threads]
        systems = {
            "pagoda full, bf16": [*full, *shape, "--train.precision", "bf16"],
            "pagoda full, bf16, compiled": [*full, *shape, "--train.precision", "bf16", "--train.compile"],
            "pagoda full, float32": [*full, *shape, "--train.precision", "float32"],
            "pagoda LoRA, bf16": [*adapter, *shape, "--train.precision", "bf16"],
            "pagoda QLoRA, bf16": [*adapter, *shape, "--train.precision", "bf16", "--method", "qlora"],
            "transformers full, bf16": [*peer, "full", "bfloat16", *end],
            "transformers full, bf16, compiled": [*peer, "full-compile", "bfloat16", *end],
            "transformers full, float32": [*peer, "full", "float32", *end],
            "litgpt full, bf16, compiled": [*litgpt, *end],
            "PEFT LoRA, bf16": [*peer, "lora", "bfloat16", *end],
            "PEFT QLoRA, bf16": [*peer, "qlora", "bfloat16", *end],
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in systems if re.search(args.only, name)}
        for i in range(args.rounds):
            for name in runs:
                command = systems[name]
                rate, peak = measure(command, Path(folder) / f"run-{i}-{len(name)}-{hash(name) % 10**6}")
                runs[name].append((rate, peak))
                print(f"{name}: {rate:.0f} tokens/s, {peak:.2f} GiB", file=sys.stderr, flush=True)
    ceilings = {t: gemm_rate(d, torch.device("cpu")) for t, d in (("bf16", torch.bfloat16), ("float32", torch.float32))}
    write(list(systems), runs, ceilings)


def pagoda(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pagoda", *arguments], check=True, stdout=subprocess.DEVNULL)


def write_texts(folder: Path) -> None:
    """Words without end: a text to pretrain on, and conversations that fill their rows."""
    generator = torch.Generator().manual_seed(0)
    words = (HERE.parent / "LICENSE").read_text().split()
    texts = [" ".join(words[i] for i in torch.randint(len(words), (900,), generator=generator)) for _ in range(64)]
    (folder / "text.txt").write_text("\n".join(texts))
    rows = [json.dumps({"prompt": text[:400], "completion": text[400:]}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(rows))


def measure(command: list, run: Path) -> tuple[float, float]:
    """Tokens per second, and the process's peak in GiB."""
    ours = command[0] in ("pretrain", "finetune")
    command = [sys.executable, "-m", "pagoda", *command, "--out_dir", str(run)] if ours else command
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            err.seek(0)
            sys.exit(f"{command}: {err.read()[-2000:]}")
        out.seek(0)
        said = out.read()
    peak = usage.ru_maxrss / 2**20
    if not ours:
        return json.loads(said.splitlines()[-1])["tokens_per_second"], peak
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(r["tokens_per_second"] for r in records[2:] if "loss" in r), peak


def write(systems: list[str], runs: dict[str, list[tuple[float, float]]], ceilings: dict[str, float]) -> None:
    before, _, rest = RESULTS.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
    figures = {name: tuple(statistics.median(values) for values in zip(*pairs)) for name, pairs in runs.items()}
    for name, (rate, peak) in figures.items():
        work = FLOPS["lora" if "LoRA" in name else "full"] * PARAMETERS * rate
        share = work / ceilings["float32" if "float32" in name else "bf16"]
        rows[name] = f"| {name} | {rate:.0f} | {share:.0%} | {peak:.2f} |"
    for (ours, theirs), asked in RATIOS.items():
        if ours in figures and theirs in figures:
            (rate, peak), (their_rate, their_peak) = figures[ours], figures[theirs]
            name = f"{ours} : {theirs}"
            rows[name] = f"| {name} | {rate / their_rate:.2f} | {peak / their_peak:.2f} | {asked} |"
    ceiling = ", ".join(f"{t} {rate / 1e9:.0f} GFLOP/s" for t, rate in ceilings.items())
    lines = [
        f"Products of large matrices beside the last of these: {ceiling} (float32 where PyTorch emulates bf16).",
        "",
        "| system | tokens/s | share of the ceiling | peak, GiB |",
        "|---|---|---|---|",
        *(rows[name] for name in systems if name in rows),
        "",
        "| ratio | tokens/s | peak | asked |",
        "|---|---|---|---|",
        *(rows[name] for name in (f"{ours} : {theirs}" for ours, theirs in RATIOS) if name in rows),
    ]
    print("\n".join(lines))
    RESULTS.write_text("\n".join([before.rstrip("\n"), "", BEGIN, *lines, END]) + (after or "\n"))


if __name__ == "__main__":
    main()
