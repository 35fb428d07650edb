"""One stream on a CPU: Pagoda beside llama.cpp and transformers, in turns, in one run; the table goes to RESULTS.md.

usage: python benchmarks/decode.py PEERS_DIR [--rounds 3] [--prompt_tokens 512] [--new_tokens 64] [--only REGEX]

PEERS_DIR is what setup_peers.sh built. Every system gets the same threads and random tokens, in a process of its own;
a round measures each system once, and the medians of the rounds count, of their ratios too. What a long context costs
is measured in one process, a few steps of either length in turns. With --only the systems whose names match are
measured, and printed with their ratios to the last of them; RESULTS.md stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

Rates = dict[str, dict[str, float]]
Profile = dict[str, float | tuple[float, ...]]
HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt_tokens", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--only", default="", help="the systems whose names match")
    args = parser.parse_args()
    from pagoda.models.download import download

    gguf = str(download("smollm2-135m-instruct"))
    threads = str(torch.get_num_threads())
    size = [str(args.prompt_tokens), str(args.new_tokens)]
    with tempfile.TemporaryDirectory() as folder:
        hf, tiny = f"{folder}/hf", f"{folder}/tinyllama.gguf"
        subprocess.run([sys.executable, "-m", "pagoda.cli", "convert", gguf, hf, "--dtype", "float32"], check=True)
        write_tinyllama(tiny)
        llamacpp = [args.peers / "llamacpp/bin/python", HERE / "peer_llamacpp.py"]
        transformers = [args.peers / "transformers/bin/python", HERE / "peer_transformers.py"]
        systems = {
            "pagoda, the file's bits (Q4_1, head Q8_0)": ours(gguf, *size),
            **{f"llama.cpp {t}": [*llamacpp, gguf, t, *size, threads] for t in ("Q4_0", "Q4_1")},
            "pagoda int4": ours(hf, *size, "--quantize", "int4"),
            "pagoda nf4": ours(hf, *size, "--quantize", "nf4"),
            "pagoda int8, bf16 activations": ours(hf, *size, "--quantize", "int8", "--dtype", "bf16"),
            "pagoda int8": ours(hf, *size, "--quantize", "int8"),
            "llama.cpp Q8_0": [*llamacpp, gguf, "Q8_0", *size, threads],
            "llama.cpp BF16": [*llamacpp, gguf, "BF16", *size, threads],
            "pagoda bf16": ours(hf, *size, "--dtype", "bf16"),
            "transformers bf16": [*transformers, hf, "bfloat16", *size, threads],
            "pagoda bf16, without kernels": ours(hf, *size, "--dtype", "bf16", reference=True),
            "pagoda float32": ours(hf, *size, "--dtype", "float32"),
            "transformers float32": [*transformers, hf, "float32", *size, threads],
            "pagoda, 8,000 tokens of context": ours(gguf, "8000", size[1]),
            "pagoda, 8,000 tokens of context, int8 cache": ours(gguf, "8000", size[1], "--kv_dtype", "int8"),
            "pagoda, TinyLlama's shape, Q4_0": ours(tiny, *size),
            "llama.cpp, TinyLlama's shape, Q4_0": [*llamacpp, tiny, "same", *size, threads],
        }
        systems = {name: command for name, command in systems.items() if re.search(args.only, name)}
        rounds, growths = [], []
        for _ in range(args.rounds):
            rounds.append({name: run(command) for name, command in systems.items()})
            growths += [] if args.only else [growth(gguf)]
    figures = {name: [key for key, x in rounds[0][name].items() if not isinstance(x, dict)] for name in systems}
    median = {name: {k: statistics.median(r[name][k] for r in rounds) for k in keys} for name, keys in figures.items()}
    if not args.only:
        return report(table(median, rounds, growths, args))
    last = median[list(systems)[-1]]
    for name, r in median.items():
        rates = (f"{key} {r[key]:.1f} ({r[key] / last[key]:.2f} x)" for key in ("prefill", "decode"))
        print(f"{name}: {', '.join(rates)}")


def ours(model: str, prompt: str, new: str, *options: str, reference: bool = False) -> list:
    environment = ["env", "PAGODA_KERNELS=reference"] if reference else []
    sizes = ["--prompt_tokens", prompt, "--new_tokens", new]
    return [*environment, sys.executable, "-m", "pagoda.cli", "bench", model, *sizes, *options, "--json"]


def run(command: list) -> dict[str, float]:
    """One measurement: tokens per second of prefill and decode, and what else `pagoda bench` tells."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    result = {key.removesuffix("_tok_s"): value for key, value in result.items()}
    print(f"{result['prefill']:9.1f} {result['decode']:9.1f}  {' '.join(map(str, command))[-110:]}", file=sys.stderr)
    return result


def growth(gguf: str, short: int = 512, long: int = 8000, turns: int = 40, steps: int = 4) -> tuple[float, Profile]:
    """A decode step's time with `long` tokens of context over that with `short` ones, as a multiple of what their bytes
    say: the median of turns of a few steps each, by two engines in this process. And where the times go: of each
    context, in other such turns, medians of what reads weights, what reads the cache, and the rest."""
    from pagoda.engine.engine import Engine
    from pagoda.engine.llm import LLM
    from pagoda.engine.options import EngineOptions, Sampling
    from pagoda.engine.request import Request
    from pagoda.evaluate.bench import decode_bytes, memory_to_read, read_bandwidth

    model = LLM.load(gguf).model
    engines = []
    for n in (short, long):
        options = EngineOptions(max_num_seqs=1, max_step_tokens=2048, prefix_caching=False)
        engine = Engine(model, options=options, kv_dtype=torch.bfloat16)
        prompt = torch.randint(model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(0)).tolist()
        engine.add(Request(prompt, Sampling(temperature=0, max_new_tokens=model.config.block_size - n)))
        while engine.timing.decode_tokens < 16:  # prefill and the first steps, which are written down
            engine.step()
        engines.append(engine)
    ratios = []
    for _ in range(turns):
        seconds = []
        for engine in engines:
            before = engine.timing.decode_seconds
            for _ in range(steps):
                engine.step()
            seconds.append(engine.timing.decode_seconds - before)
        ratios.append(seconds[1] / seconds[0])
    read = [decode_bytes(model, torch.bfloat16, n + 16 + turns * steps // 2, 1) for n in (short, long)]
    low, middle, high = (q * read[0] / read[1] for q in statistics.quantiles(ratios))
    print(f"{middle:9.2f}  {long} against {short} tokens (quarters at {low:.2f} and {high:.2f})", file=sys.stderr)

    recordings = [decoder.recording for engine in engines for decoder in engine.runner.decoders.values()]
    weights, much = decode_bytes(model, torch.bfloat16, 0, 1), memory_to_read(model.device)
    took, sums = [[], []], []
    for _ in range(turns):
        for runs, recording in zip(took, recordings):
            runs += [recording.seconds(times=1) for _ in range(steps)]
        sums.append(read_bandwidth(much, times=1) / 1e9)
    profile = {"a sum, GB/s": statistics.median(sums)}
    for n, runs in zip((short, long), took):
        cache = decode_bytes(model, torch.bfloat16, n + 16 + turns * steps, 1) - weights
        products = statistics.median(run["linear"] + run["linear_many"] for run in runs)
        attention = statistics.median(run["attention"] for run in runs)
        rest = statistics.median(sum(run.values()) for run in runs) - products - attention
        profile[f"{n:,} tokens"] = (products, weights, attention, cache, rest)
    return middle, profile


def table(rates: Rates, rounds: list[Rates], growths: list[tuple[float, Profile]], args: argparse.Namespace) -> str:
    own = rates["pagoda, the file's bits (Q4_1, head Q8_0)"]
    lines = [
        f"{cpu_name()}, {platform.machine()}, {torch.get_num_threads()} threads; read bandwidth "
        f"{own['read_gb_s']:.1f} GB/s; medians of {args.rounds} rounds, {args.prompt_tokens} prompt tokens, "
        f"{args.new_tokens} new ones.",
        "",
        "| system | prefill, tokens/s | decode, tokens/s | share of read bandwidth |",
        "|---|---|---|---|",
    ]
    for name, r in rates.items():
        share = f"{r['decode_share_of_bandwidth']:.0%}" if "decode_share_of_bandwidth" in r else ""
        lines.append(f"| {name} | {r['prefill']:.0f} | {r['decode']:.1f} | {share} |")
    lines += ["", "| target | asked | seen | in each round | what asked would read, of the bandwidth |"]
    lines += ["|---|---|---|---|---|"]
    for same in zip(*(targets(r, ratio) for r, (ratio, _) in zip(rounds, growths))):  # a target in all rounds
        what, asked = same[0][:2]
        seen, *needed = (statistics.median(column) for column in zip(*(x[2:] for x in same)))
        each = ", ".join(f"{x[2]:.2f}" for x in same)
        lines.append(f"| {what} | {asked} | {seen:.2f} | {each} | {''.join(map('{:.0%}'.format, needed))} |")
    lines += ["", "| a step of the file's bits, with | products | attention | the rest |", "|---|---|---|---|"]
    for number, (_, profile) in enumerate(growths, start=1):
        profile = dict(profile)
        reads = f"round {number}, a sum reads {profile.pop('a sum, GB/s'):.0f} GB/s"
        for context, (products, weights, attention, cache, rest) in profile.items():
            parts = ((products, weights), (attention, cache))
            cells = (f"{t * 1e3:.2f} ms, {n / 1e6:.0f} MB, {n / t / 1e9:.0f} GB/s" for t, n in parts)
            lines.append(f"| {context} ({reads}) | {' | '.join(cells)} | {rest * 1e3:.2f} ms |")
    return "\n".join(lines)


def targets(rates: Rates, growth: float) -> list[tuple]:
    """What is asked, how much, what was seen; for decoding faster than a peer also the share of the read bandwidth that
    the asked rate would take, with a step's bytes."""

    def ratio(a: str, b: str, key: str = "decode") -> float:
        return rates[a][key] / rates[b][key]

    def best(prefix: str) -> float:
        return max(r["prefill"] for name, r in rates.items() if name.startswith(prefix) and "shape" not in name)

    def faster(what: str, asked: float, a: str, b: str) -> tuple[str, str, float, float]:
        needed = asked * rates[b]["decode"] * rates[a]["decode_bytes_per_step"] / 1e9 / rates[a]["read_gb_s"]
        return what, f"{asked:g}", ratio(a, b), needed

    own, tiny = "pagoda, the file's bits (Q4_1, head Q8_0)", "TinyLlama's shape, Q4_0"
    return [
        faster("decode, 4-bit: the file's bits / llama.cpp Q4_0", 2, own, "llama.cpp Q4_0"),
        ("decode, 4-bit: the file's bits / llama.cpp on the same bits", "more", ratio(own, "llama.cpp Q4_1")),
        faster("decode, 8-bit: int8 / llama.cpp Q8_0", 1.8, "pagoda int8", "llama.cpp Q8_0"),
        faster("decode, bf16 / llama.cpp BF16", 1.3, "pagoda bf16", "llama.cpp BF16"),
        faster("decode, bf16 / transformers bf16", 5, "pagoda bf16", "transformers bf16"),
        ("prefill, best / llama.cpp's best", "2.0", best("pagoda") / best("llama.cpp")),
        ("prefill, best / transformers bf16", "1.3", best("pagoda") / rates["transformers bf16"]["prefill"]),
        (f"TinyLlama's shape: decode / llama.cpp's, {tiny}", "1.0", ratio(f"pagoda, {tiny}", f"llama.cpp, {tiny}")),
        ("TinyLlama's shape: share of read bandwidth", "0.75", rates[f"pagoda, {tiny}"]["decode_share_of_bandwidth"]),
        ("8,000 against 512 tokens of context: time per token / bytes per token", "at most 1", growth),
        (
            "without kernels, bf16: prefill / transformers",
            "1.1",
            ratio("pagoda bf16, without kernels", "transformers bf16", "prefill"),
        ),
        (
            "without kernels, bf16: decode / transformers",
            "1.8",
            ratio("pagoda bf16, without kernels", "transformers bf16"),
        ),
    ]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def report(text: str) -> None:
    """Print the table, and put it into RESULTS.md in the place of the one before."""
    print(text)
    start, end = "<!-- decode.py -->", "<!-- /decode.py -->"
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else f"# Results\n\n{start}\n{end}\n"
    before, _, rest = old.partition(start)
    RESULTS.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def write_tinyllama(path: str) -> None:
    """A GGUF file of TinyLlama-1.1B's shape with random Q4_0 weights (what they say does not matter for speed)."""
    import gguf

    n_embd, n_head, n_kv_head, n_layer, mlp, vocab_size = 2048, 32, 4, 22, 5632, 32000
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layer)
    writer.add_context_length(2048)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_kv_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = random.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        scales = np.full((rows, columns // 32, 1), 0.01, dtype=np.float16)
        blocks[..., :2] = scales.view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(n_embd, dtype=np.float32))

    matrix("token_embd.weight", vocab_size, n_embd)
    for i in range(n_layer):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        kv = n_embd // n_head * n_kv_head
        for name, rows, columns in (
            *(("attn_q", n_embd, n_embd), ("attn_k", kv, n_embd), ("attn_v", kv, n_embd)),
            *(("attn_output", n_embd, n_embd), ("ffn_gate", mlp, n_embd), ("ffn_up", mlp, n_embd)),
            ("ffn_down", n_embd, mlp),
        ):
            matrix(f"blk.{i}.{name}.weight", rows, columns)
    norm("output_norm.weight")
    matrix("output.weight", vocab_size, n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
