"""What `make demo` shows: a real model on this machine, from the download to its answers."""

from __future__ import annotations

import sys
import time

from pagoda import LLM, PagodaError

MODEL = "smollm2-135m-instruct"
QUESTIONS = (
    "What is a pagoda? Answer in one sentence.",
    "Write a Python function that returns the sum of a list of numbers.",
    "Name three rivers in Europe.",
)


def main() -> None:
    start = time.perf_counter()
    llm = LLM.load(MODEL)
    print(f"{MODEL}: {llm.model.n_params() / 1e6:.1f} M parameters, loaded in {time.perf_counter() - start:.1f} s")
    for question in QUESTIONS:
        print(f"\n> {question}")
        for piece in llm.stream([{"role": "user", "content": question}], temperature=0, max_new_tokens=120):
            print(piece, end="", flush=True)
        print(f"\n{llm.timing.summary()}")
    print(f"\nGo on by yourself: .venv/bin/pagoda chat {MODEL}")


if __name__ == "__main__":
    try:
        main()
    except PagodaError as error:
        sys.exit(f"demo: {error}")
