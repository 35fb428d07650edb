"""What `make demo` shows: a real model answers on this machine, and learns something that it could not do before.

A second run finds what the first one trained; `make demo FRESH=1` trains anew.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from pagoda import LLM, PagodaError
from pagoda.cli import main as pagoda

MODEL = "smollm2-135m-instruct"
QUESTIONS = (
    "What is a pagoda? Answer in one sentence.",
    "Write a Python function that returns the sum of a list of numbers.",
    "Name three rivers in Europe.",
)
RUN = Path(".demo")
RECIPES = Path("recipes/finetune")


def main() -> None:
    if os.environ.get("FRESH"):
        shutil.rmtree(RUN, ignore_errors=True)
    start = time.perf_counter()
    llm = LLM.load(MODEL)
    print(f"{MODEL}: {llm.model.n_params() / 1e6:.1f} M parameters, loaded in {time.perf_counter() - start:.1f} s")
    for question in QUESTIONS:
        print(f"\n> {question}")
        for piece in llm.stream([{"role": "user", "content": question}], temperature=0, max_new_tokens=120):
            print(piece, end="", flush=True)
        print(f"\n{llm.timing.summary()}")

    cases = [json.loads(line) for line in (RECIPES / "demo/held_out.jsonl").read_text().splitlines()]
    print(f"\nNow it learns to turn a note into a record, from 240 examples; {len(cases)} others are held out. Before:")
    before = exact(llm, cases)
    del llm
    command = ["finetune", MODEL, "--config", str(RECIPES / "demo.yaml"), "--out_dir", str(RUN)]
    print(f"$ pagoda {' '.join(command)}", flush=True)
    start = time.perf_counter()
    if code := pagoda(command):
        sys.exit(code)
    seconds = time.perf_counter() - start
    pagoda(["plot", str(RUN), "--out", str(RUN / "loss.png")])
    print("After:")
    after = exact(LLM.load(RUN), cases)
    print(f"\nexact records: {before:.0%} before, {after:.0%} after {seconds:.0f} s of finetuning (`make demo FRESH=1`")
    print(f"trains anew). Go on by yourself: .venv/bin/pagoda chat {MODEL}, or .venv/bin/pagoda chat {RUN}")


def exact(llm: LLM, cases: list[dict[str, str]]) -> float:
    """The share of held-out notes whose record is right to the letter; three are shown."""
    prompts = [llm.chat_ids([{"role": "user", "content": case["prompt"]}]) for case in cases]
    answers = [done.text.strip() for done in llm.generate(prompts, temperature=0, max_new_tokens=48)]
    for case, answer in list(zip(cases, answers))[:3]:
        print(f"  > {case['prompt']}\n  {answer.splitlines()[0] if answer else ''}")
    return sum(answer == case["completion"] for case, answer in zip(cases, answers)) / len(cases)


if __name__ == "__main__":
    try:
        main()
    except PagodaError as error:
        sys.exit(f"demo: {error}")
