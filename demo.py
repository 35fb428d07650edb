"""What `make demo` shows: a real model answers on this machine, learns something that it could not do before, and is
served with what it has learnt beside what it was.

A second run finds what the first one trained; `make demo FRESH=1` trains anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
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
    known, start = (RUN / "latest").exists(), time.perf_counter()
    if code := pagoda(command):
        sys.exit(code)
    seconds = time.perf_counter() - start
    pagoda(["plot", str(RUN), "--out", str(RUN / "loss.png")])
    print("After:")
    after = exact(LLM.load(RUN), cases)
    told = "finetuning, some time ago (`make demo FRESH=1` trains anew)" if known else f"{seconds:.0f} s of finetuning"
    print(f"\nexact records: {before:.0%} before, {after:.0%} after {told}")
    serve(cases[0]["prompt"])


def serve(note: str) -> None:
    """Both models behind OpenAI's API and a page, out of one process; both are asked through the `openai` client."""
    from openai import OpenAI

    adapter = f"notes={RUN / 'checkpoints' / (RUN / 'latest').read_text().strip()}"
    command = [sys.executable, "-m", "pagoda", "serve", MODEL, "--adapters", adapter, "--port"]
    print(f"\n$ pagoda {' '.join(command[3:])} 8000", flush=True)
    start = time.perf_counter()
    server = subprocess.Popen([*command, "8000" if free(8000) else "0"], stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"http://[\w.:]+", line):
                break
        else:
            sys.exit(f"demo: the server did not start: {''.join(said)}")
        threading.Thread(target=lambda: any(server.stderr), daemon=True).start()  # nobody waits for what else it says
        page = found.group()
        client = OpenAI(base_url=f"{page}/v1", api_key="none")
        message = [{"role": "user", "content": note}]
        for model in (MODEL, "notes"):
            answer = client.chat.completions.create(model=model, messages=message, temperature=0, max_tokens=48)
            if model == MODEL:
                print(f"the first answer came {time.perf_counter() - start:.1f} s after the command")
            print(f"  {model}: {answer.choices[0].message.content.strip().splitlines()[0]}")
        if sys.stdout.isatty():
            print(f"\nChat with both in a browser: {page} (Ctrl-C ends the demo)", flush=True)
            server.wait()
        else:
            print(f"\nThe page to chat with both was at {page}. Start it again with the command above, or stay in the")
            print(f"terminal: .venv/bin/pagoda chat {MODEL}, or .venv/bin/pagoda chat {RUN}")
    except KeyboardInterrupt:
        print()
    finally:
        server.terminate()
        server.wait()


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


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
