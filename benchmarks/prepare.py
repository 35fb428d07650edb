"""`pagoda prepare` beside `tokenizers` alone: MB of text per second on all cores, in turns; the medians count.

usage: python benchmarks/prepare.py TEXT [TEXT ...] [--tokenizer smollm2-135m-instruct] [--rounds 3]

TEXT is what `pagoda prepare` takes. The peer has the documents in memory and calls `encode_batch_fast` on all of them
at once, with its own threads. `pagoda prepare` is the whole command: it starts its processes, reads, tokenizes, hashes,
and writes the shards.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pagoda.data.corpus import all_documents, list_units
from pagoda.data.options import Reading
from pagoda.data.vocabulary import find_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)  # only the peer, in this process
    args = parser.parse_args()
    if args.peer:
        texts = list(all_documents(list_units(args.text, Reading()), Reading()))
        tokenizer = find_tokenizer(args.tokenizer).backend
        start = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        print(time.perf_counter() - start, sum(len(text.encode()) for text in texts), sum(map(len, encodings)))
        return
    options = ["--tokenizer", args.tokenizer]
    rates: dict[str, list[float]] = {"tokenizers": [], "pagoda prepare": []}
    for _ in range(args.rounds):
        peer = [sys.executable, __file__, *args.text, *options, "--peer"]
        seconds, n_bytes, n_tokens = map(float, subprocess.check_output(peer, text=True).split())
        rates["tokenizers"].append(n_bytes / seconds)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pagoda", "prepare", *args.text, str(Path(folder, "out")), *options]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            rates["pagoda prepare"].append(n_bytes / (time.perf_counter() - start))
    print(f"{n_bytes / 1e6:.1f} MB of text, {n_tokens / 1e6:.2f} M tokens, {args.tokenizer}")
    medians = {name: statistics.median(of) / 1e6 for name, of in rates.items()}
    for name, rate in medians.items():
        print(f"{name:16} {rate:6.2f} MB/s")
    print(f"ratio            {medians['pagoda prepare'] / medians['tokenizers']:6.2f}")


if __name__ == "__main__":
    main()
