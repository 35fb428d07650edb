"""What a run says that it will need, and what it then uses: the table of RESULTS.md.

usage: python benchmarks/memory.py [--steps 6] [--only REGEX] [--long 30]

SmolLM2-135M at 2 rows of 512 tokens, and a small model. Every configuration runs through the command that its users
run, once from the start and once resumed from the checkpoint in its middle. Used is the peak of the largest process, as
the system counts it. With --long the first one that matches runs so many steps instead, and the time that it takes is
compared with what it forecast behind its third step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
FULL = {
    "bf16": "--train.precision bf16",
    "bf16, compiled": "--train.precision bf16 --train.compile",
    "mixed": "--train.precision mixed",
    "float32": "--train.precision float32",
    "bf16, adamw8bit": "--train.precision bf16 --optimizer adamw8bit",
    "bf16, adafactor": "--train.precision bf16 --optimizer adafactor",
    "bf16, muon": "--train.precision bf16 --optimizer muon",
    "bf16, checkpointing full": "--train.precision bf16 --train.checkpointing full",
    "bf16, checkpointing selective": "--train.precision bf16 --train.checkpointing selective",
    "bf16, two micro-batches": "--train.precision bf16 --train.global_batch_size 4",
    "mixed, two micro-batches": "--train.precision mixed --train.global_batch_size 4",
    "bf16, two processes": "--train.precision bf16 --devices 2",
    "mixed, two processes": "--train.precision mixed --devices 2",
    "bf16, two processes, zero3": "--train.precision bf16 --devices 2 --train.sharding zero3",
    "mixed, two processes, zero3": "--train.precision mixed --devices 2 --train.sharding zero3",
}
TUNED = {
    "LoRA bf16": "--train.precision bf16",
    "LoRA bf16, checkpointing full": "--train.precision bf16 --train.checkpointing full",
    "QLoRA bf16": "--train.precision bf16 --method qlora",
    "QLoRA mixed": "--train.precision mixed --method qlora",
    "full, mixed": "--train.precision mixed --method full",
    "full, bf16, release_gradients": "--train.precision bf16 --method full --train.release_gradients --train.clip 0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="the configurations whose names match")
    parser.add_argument("--long", type=int, default=0, help="steps of a run whose time is compared with its forecast")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {k: v for k, v in configurations(Path(folder)).items() if re.search(args.only, k)}
        if args.long:
            return check_forecast(*next(iter(commands.items())), Path(folder) / "run", args.long)
        print("| configuration | estimated, GiB | used | ratio | resumed: estimated | used | ratio |")
        print("|---|---|---|---|---|---|---|")
        for i, (name, command) in enumerate(commands.items()):
            row = [name]
            out = Path(folder) / f"run-{i}"
            for _ in ("start", "resume"):
                text, used = run(command, out, args.steps, save_interval=args.steps // 2)
                said = float(re.search(r"peak +([\d.]+) GiB", text)[1])
                row += [f"{said:.2f}", f"{used:.2f}", f"{said / used:.2f}"]
                shutil.rmtree(out / f"checkpoints/step-{args.steps}")  # it goes on from the checkpoint before
            shutil.rmtree(out)
            print("|", " | ".join(row), "|", flush=True)


def check_forecast(name: str, command: list[str], out: Path, steps: int) -> None:
    """The time that a run forecasts, and the time until it has trained and validated that much."""
    options = ["--train.max_steps", str(steps), "--train.save_interval", "0", "--out_dir", str(out)]
    command = [sys.executable, "-m", "pagoda", *command, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if match := re.search(r"about ([\d:]+);", line):
            begin, said = time.perf_counter(), sum(60**i * int(n) for i, n in enumerate(match[1].split(":")[::-1]))
        elif line.startswith("saved"):
            took = time.perf_counter() - begin
    process.wait()
    print(f"{name}, {steps} steps: forecast {said} s, took {took:.0f} s, ratio {said / took:.2f}")


def configurations(folder: Path) -> dict[str, list[str]]:
    """Name and command of each, on data made here."""
    hf, tokens, chars = (str(folder / name) for name in ("hf", "tokens", "chars"))
    pagoda("convert", "smollm2-135m-instruct", hf, "--dtype", "float32")
    words = (HERE.parent / "LICENSE").read_text().split()
    (folder / "text.txt").write_text("\n".join(" ".join(words[i:] + words[:i]) for i in range(0, 500, 5)))
    pairs = [" ".join((words[i:] + words[:i])[:60]) for i in range(1500)]  # short, so that they fill the rows
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": p[:200], "completion": p[200:]}) for p in pairs))
    pagoda("prepare", f"{folder}/text.txt", tokens, "--tokenizer", hf, "--split_by", "position")
    pagoda("prepare", f"{folder}/text.txt", chars, "--tokenizer", "char", "--split_by", "position")
    shape = ["--train.seq_len", "512", "--train.micro_batch_size", "2", "--device", "cpu", "--train.eval_rows", "4"]
    full = ["pretrain", "--init_from", hf, "--data", tokens, *shape]
    tuned = ["finetune", hf, "--data", f"{folder}/rows.jsonl", "--train_on", "all", "--epochs", "0", *shape]
    small = ["pretrain", "--config", str(HERE.parent / "recipes/pretrain/char-1m.yaml"), "--data", chars]
    return {
        **{f"pretrain {name}": [*full, *options.split()] for name, options in FULL.items()},
        **{f"finetune {name}": [*tuned, *options.split()] for name, options in TUNED.items()},
        "pretrain char-1m": [*small, "--device", "cpu"],
    }


def pagoda(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pagoda", *arguments], check=True, capture_output=True)


def run(command: list[str], out: Path, steps: int, save_interval: int) -> tuple[str, float]:
    """What a run said, and the GiB that its largest process used."""
    told = {"max_steps": steps, "save_interval": save_interval}
    options = [w for k, v in told.items() for w in (f"--train.{k}", str(v))]
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "pagoda", *command, *options, "--out_dir", str(out)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(f"{' '.join(command)}: {text[-2000:]}")
    return text, usage.ru_maxrss / 2**20


if __name__ == "__main__":
    main()
