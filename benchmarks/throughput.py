"""Many requests at once on a CPU: Pagoda's engine beside vLLM, in turns; the table goes to RESULTS.md.

usage: python benchmarks/throughput.py PEERS_DIR [--rounds 1] [--new_tokens 128] [--only REGEX]
       python benchmarks/throughput.py --ours WEIGHTS NEW_TOKENS PROMPTS.json     (one system, JSON lines)

SmolLM2-135M, 1, 8 and 32 requests with short prompts and with 500-token prompts, greedy, none sharing a beginning. The
share outside is the time of a step that is not the model's forward: planning, guessing, choosing, text.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
BEGIN, END = "<!-- throughput.py -->", "<!-- /throughput.py -->"
LONG = "The quick brown fox jumps over the lazy dog. " * 50
CASES = {
    f"{n}, {kind}": [f"{i} {LONG}" if kind == "500-token prompts" else f"Tell me story number {i}." for i in range(n)]
    for n in (1, 8, 32)
    for kind in ("short prompts", "500-token prompts")
}
WEIGHTS = {"bf16": {"dtype": "bf16"}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}, "the file's bits": {}}


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        return ours(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--only", default="", help="the systems whose names match")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts, hf = f"{folder}/prompts.json", f"{folder}/hf"
        Path(prompts).write_text(json.dumps(CASES))
        convert = ["-m", "pagoda", "convert", "smollm2-135m-instruct", hf, "--dtype", "bf16"]
        subprocess.run([sys.executable, *convert], check=True, stdout=subprocess.DEVNULL)
        end = [str(args.new_tokens), prompts]
        systems = {f"pagoda {w}": [sys.executable, __file__, "--ours", w, *end] for w in WEIGHTS}
        systems["vLLM bf16"] = [args.peers / "vllm/bin/python", HERE / "peer_vllm.py", hf, *end]
        systems = {name: command for name, command in systems.items() if re.search(args.only, name)}
        found: dict[str, dict[str, list[dict]]] = {name: {} for name in systems}
        for _ in range(args.rounds):
            for name, command in systems.items():
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr[-2000:]}")
                for line in done.stdout.splitlines():
                    if line.startswith('{"case"'):
                        told = json.loads(line)
                        found[name].setdefault(told["case"], []).append(told)
                        print(name, line, file=sys.stderr, flush=True)
    write(found)


def ours(weights: str, new_tokens: str, prompts: str) -> None:
    from pagoda import LLM, Sampling
    from pagoda.engine.engine import Engine, Timing
    from pagoda.engine.request import Request

    start = time.perf_counter()
    llm = LLM.load("smollm2-135m-instruct", **WEIGHTS[weights])
    load = time.perf_counter() - start
    engine = Engine(llm.model, llm.tokenizer, kv_dtype=llm.kv_dtype)
    o = Sampling(max_new_tokens=int(new_tokens), temperature=0, ignore_eos=True)
    for case, texts in json.loads(Path(prompts).read_text()).items():
        requests = [Request(llm.encode(text), o) for text in texts]
        engine.scheduler.blocks.clear()
        engine.timing = Timing()
        start = time.perf_counter()
        engine.run(requests, lambda *_: None)
        seconds = time.perf_counter() - start
        told = {"case": case, "rate": len(texts) * o.max_new_tokens / seconds, "load": load}
        print(json.dumps({**told, "outside": engine.timing.outside / seconds}), flush=True)


def write(found: dict[str, dict[str, list[dict]]]) -> None:
    def median(name: str, case: str, key: str) -> float:
        return statistics.median(told[key] for told in found[name][case])

    base = found.get("vLLM bf16")
    lines = ["| requests | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for case in CASES:
        rates = {name: median(name, case, "rate") for name in found}
        cells = [
            f"{r:.0f}" + (f" ({r / rates['vLLM bf16']:.2f} x)" if base and "vLLM" not in n else "")
            for n, r in rates.items()
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    loads = [f"{statistics.median(t['load'] for c in cases.values() for t in c):.1f} s" for cases in found.values()]
    lines.append("| loading | " + " | ".join(loads) + " |")
    last = next(reversed(CASES))
    shares = [
        f"{median(n, last.replace('500-token', 'short'), 'outside'):.1%}" if "vLLM" not in n else "" for n in found
    ]
    lines.append("| outside the forward, 32 short | " + " | ".join(shares) + " |")
    print("\n".join(lines))
    old = RESULTS.read_text()
    before, _, rest = old.partition(BEGIN)
    RESULTS.write_text("\n".join([before.rstrip("\n"), "", BEGIN, *lines, END]) + (rest.partition(END)[2] or "\n"))


if __name__ == "__main__":
    main()
