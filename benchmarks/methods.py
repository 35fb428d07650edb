"""Every way of finetuning on the demo's task: the table of docs/finetune.md.

usage: python benchmarks/methods.py [--out runs/methods] [--only REGEX]

The default model learns to turn notes into records as in the demo, but in 40 steps of 256 tokens, about half of what
that trains: once with every method, at a rate that suits it, in a process of its own. What was measured is kept in
OUT/results.json and not measured again, so that the table can grow over several calls. Trainable parameters are those
that the optimizer has a state of; memory is the process's peak, as the system counts it; speed is the ninth decile of
the steps', so that what else runs on the machine now and then does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from train import PARAMETERS, measure

from pagoda import LLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from demo import MODEL, RECIPES, exact  # noqa: E402

DOCS = HERE.parent / "docs/finetune.md"
STEPS = ["--epochs", "0", "--train.max_steps", "40", "--train.seq_len", "256"]  # of one row
BEGIN, END = "<!-- methods.py -->", "<!-- /methods.py -->"


@dataclass
class Way:
    """One way of finetuning, by the options that it is chosen with."""

    lr: float
    method: str
    more: str = ""

    @property
    def options(self) -> str:
        return " ".join(["--method", self.method, "--train.lr", f"{self.lr:g}", *self.more.split()])


WAYS = {
    "full": Way(2e-4, "full"),
    "LoRA": Way(2e-3, "lora"),
    "QLoRA": Way(2e-3, "qlora"),
    "rsLoRA": Way(1e-3, "lora", "--lora.rslora"),
    "LoRA+": Way(5e-4, "lora", "--lora.plus_ratio 8"),
    "DoRA": Way(2e-3, "lora", "--lora.dora"),
    "AdaLoRA": Way(5e-3, "adalora"),
    "IA3": Way(5e-2, "ia3"),
    "Houlsby": Way(3e-3, "houlsby"),
    "Pfeiffer": Way(3e-3, "pfeiffer"),
    "parallel": Way(2e-3, "parallel"),
    "LLaMA-Adapter": Way(2e-2, "llama_adapter"),
    "Adapter v2": Way(1e-2, "adapter_v2"),
    "prefix": Way(5e-3, "prefix"),
    "P-Tuning v2": Way(3e-2, "p_tuning_v2"),
    "prompt": Way(5e-2, "prompt"),
    "P-Tuning": Way(5e-3, "p_tuning"),
    "MAM": Way(2e-3, "prefix,parallel"),
    "UniPELT": Way(2e-3, "lora,prefix,pfeiffer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--only", default="", help="the methods whose names match, all of the name")
    args = parser.parse_args()
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for name, way in WAYS.items():
        if results.get(name, {}).get("options") == way.options or not re.fullmatch(args.only or ".*", name):
            continue
        results[name] = {"options": way.options, **try_out(way, args.out / name)}
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
        file.write_text(json.dumps(results, indent=1))
    write(results)


def try_out(way: Way, run: Path) -> dict[str, float]:
    """Train, count, ask."""
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    _, peak = measure(["finetune", MODEL, "--config", RECIPES / "demo.yaml", *STEPS, *way.options.split()], run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rate = statistics.quantiles([r["tokens_per_second"] for r in records if "loss" in r], n=10)[-1]
    state = next((run / "checkpoints").glob("step-*/trainer"))
    entries = dcp.FileSystemReader(state).read_metadata().state_dict_metadata
    trained = sum(entry.size.numel() for key, entry in entries.items() if key.endswith("|exp_avg"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a child's peak begins at what its parent holds
        return {"trained": trained, "peak": peak, "rate": rate, "exact": pool.apply(ask, (run,))}


def ask(run: Path) -> float:
    """The share of the held-out cases that are answered right."""
    cases = [json.loads(line) for line in (RECIPES / "demo/held_out.jsonl").read_text().splitlines()]
    with contextlib.redirect_stdout(sys.stderr):
        return exact(LLM.load(run), cases)


def write(results: dict[str, dict]) -> None:
    lines = [
        "| method | options | trainable | share | peak, GiB | tokens/s | held-out exact match |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, way in WAYS.items():
        if r := results.get(name):
            lines.append(
                f"| {name} | `{way.options}` | {r['trained']:,} | {r['trained'] / PARAMETERS:.2%} "
                f"| {r['peak']:.2f} | {r['rate']:.0f} | {r['exact']:.0%} |"
            )
    print("\n".join(lines))
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text("\n".join([before + BEGIN, *lines, END]) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
