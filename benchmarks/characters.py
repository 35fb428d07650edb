"""nanoGPT's CPU preset on a text of characters (tinyshakespeare): Pagoda beside it, in turns, to RESULTS.md.

usage: python benchmarks/characters.py TEXT [--rounds 1]

Same shape, batch, schedule and number of tokens; then recipes/pretrain/char-1m.yaml, which may take as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
BEGIN, END = "<!-- characters.py -->", "<!-- /characters.py -->"
PRESET = {
    "model_overrides": '{"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64}',
    "train.max_steps": 2000,
    "train.seq_len": 64,
    "train.micro_batch_size": 12,
    "train.lr": 1e-3,
    "train.min_lr_ratio": 0.1,
    "train.beta2": 0.99,
    "train.warmup_steps": 100,
    "train.eval_interval": 250,
    "train.eval_rows": 480,
    "train.save_interval": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens = f"{folder}/tokens"
        split = ["--tokenizer", "char", "--split_by", "position", "--val_fraction", "0.1"]
        subprocess.run([sys.executable, "-m", "pagoda", "prepare", args.text, tokens, *split], check=True)
        preset = [f"--{k}={v}" for k, v in PRESET.items()]
        recipe = str(HERE.parent / "recipes/pretrain/char-1m.yaml")
        systems = {
            "nanoGPT's preset in plain PyTorch, float32": None,
            "pagoda, float32": ["--model_name", "gpt2", *preset, "--train.precision", "float32"],
            "pagoda, bf16": ["--model_name", "gpt2", *preset, "--train.precision", "bf16"],
            "pagoda, mixed": ["--model_name", "gpt2", *preset, "--train.precision", "mixed"],
            "pagoda, recipes/pretrain/char-1m.yaml": ["--config", recipe],
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for i in range(args.rounds):
            for k, (name, options) in enumerate(systems.items()):
                runs[name].append(ours(tokens, f"{folder}/{i}-{k}", options) if options else peer(args.text))
                print(name, runs[name][-1], file=sys.stderr, flush=True)
    lines = ["| 2,000 steps of 12 x 64 characters | validation loss | seconds, evaluations included | ratio |"]
    lines += ["|---|---|---|---|"]
    figures = {name: [statistics.median(x) for x in zip(*pairs)] for name, pairs in runs.items()}
    first = next(iter(figures.values()))[1]
    lines += [f"| {n} | {loss:.3f} | {s:.0f} | {s / first:.2f} |" for n, (loss, s) in figures.items()]
    print("\n".join(lines))
    before, _, rest = RESULTS.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    RESULTS.write_text("\n".join([before.rstrip("\n"), "", BEGIN, *lines, END]) + (after or "\n"))


def peer(text: Path) -> tuple[float, float]:
    command = [sys.executable, HERE / "peer_nanogpt.py", text, str(torch.get_num_threads())]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return told["val_loss"], told["seconds"]


def ours(tokens: str, run: str, options: list[str]) -> tuple[float, float]:
    """The validation loss, and the seconds between the first step's start and the last evaluation's end."""
    command = [sys.executable, "-m", "pagoda", "pretrain", *options, "--data", tokens, "--out_dir", run]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.perf_counter() - start
    idle = [sys.executable, "-m", "pagoda", "pretrain", *options, "--data", tokens, "--out_dir", run]
    start = time.perf_counter()
    subprocess.run(idle, check=True, capture_output=True)  # goes on from the end: starting costs this much
    seconds = whole - (time.perf_counter() - start)
    records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [r["val_loss"] for r in records if "val_loss" in r][-1], seconds


if __name__ == "__main__":
    main()
