"""Pagoda beside transformers on one GPU: prefill, decoding and training steps; prints a table of both and their ratio.

usage: python benchmarks/gpu.py [--quick]

Models have random weights in bf16 and the shapes of SmolLM2-135M, TinyLlama-1.1B and Llama-2-7B. Both run in one
process, in turns. transformers decodes with its own cache and attention (sdpa) as `generate` does, a forward a token.
Peak memory is of PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pagoda.cli import main as pagoda
from pagoda.evaluate.bench import bench
from pagoda.models.registry import from_hf_config, known_config

DEVICE = torch.device("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small shape only")
    quick = parser.parse_args().quick
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", flush=True)
    print("| work | pagoda | transformers | ratio |\n|---|---|---|---|", flush=True)
    for name in ["SmolLM2-135M"] if quick else ["SmolLM2-135M", "Llama-2-7b-hf"]:
        for batch in (1, 32):
            inference(name, batch)
    for name, rows, length in [("SmolLM2-135M", 8, 1024)] + ([] if quick else [("TinyLlama-1.1B-Chat-v1.0", 4, 2048)]):
        training(name, rows, length, False)
        if name != "SmolLM2-135M":
            training(name, rows, length, True)


def row(what: str, ours: float, theirs: float, unit: str) -> None:
    print(f"| {what} | {ours:,.6g} {unit} | {theirs:,.6g} {unit} | {ours / theirs:.2f} |", flush=True)


def fresh() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def theirs(name: str):
    config = {k: v for k, v in known_config(name).items() if k != "model_type"}
    config = AutoConfig.for_model(known_config(name)["model_type"], **config)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@torch.inference_mode()
def inference(name: str, batch: int, n_prompt: int = 512, n_new: int = 64) -> None:
    with torch.device("meta"):
        model = from_hf_config(known_config(name))
    model = model.to(torch.bfloat16).to_empty(device=DEVICE).requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, 0.02)
    model.tie()
    ours = bench(model, torch.bfloat16, n_prompt, n_new, batch)
    del model
    fresh()
    model = theirs(name).eval()
    ids = torch.randint(model.config.vocab_size, (batch, n_prompt), device=DEVICE)
    prefill, decode = [], []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model(ids, logits_to_keep=1, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        torch.cuda.synchronize()
        prefill.append(batch * n_prompt / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(n_new):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        torch.cuda.synchronize()
        decode.append(batch * n_new / (time.perf_counter() - start))
    del model, out
    fresh()
    row(f"{name}, {batch} x {n_prompt} tokens, prefill", ours.prefill_tok_s, statistics.median(prefill[1:]), "tok/s")
    row(f"{name}, {batch} at a time, decode", ours.decode_tok_s, statistics.median(decode[1:]), "tok/s")
    share = f"{ours.decode_share_of_bandwidth:.0%} of {ours.read_gb_s:.0f} GB/s"
    print(f"| {name}, {batch} at a time, decode | {share} | | |", flush=True)


def training(name: str, rows: int, length: int, compiled: bool, steps: int = 14) -> None:
    fresh()
    vocab_size = known_config(name)["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        words = ["the", "cat", "saw", "a", "small", "dog", "near", "my", "old", "house", "and", "ran", "away"]
        picks = torch.randint(len(words), (steps * rows * length // 3,), generator=torch.Generator().manual_seed(0))
        Path(folder, "text.txt").write_text(" ".join(words[i] for i in picks))
        pagoda(["prepare", f"{folder}/text.txt", f"{folder}/tokens", "--tokenizer", "bytes", "--split_by", "position"])
        shape = ["--train.seq_len", str(length), "--train.micro_batch_size", str(rows), "--train.max_steps", str(steps)]
        quiet = ["--train.save_interval", "0", "--train.eval_interval", "0", "--train.eval_rows", "1"]
        options = [
            "--train.precision",
            "bf16",
            "--device",
            str(DEVICE),
            *quiet,
            *(["--train.compile"] if compiled else []),
        ]
        overrides = ["--model_overrides", json.dumps({"vocab_size": vocab_size})]
        data = ["--data", f"{folder}/tokens", "--out_dir", f"{folder}/run"]
        assert pagoda(["pretrain", "--model_name", name, *overrides, *data, *shape, *options]) == 0
        records = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    ours = statistics.median(r["tokens_per_second"] for r in records if "loss" in r and r["step"] > 4)
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.use_deterministic_algorithms(False)
    fresh()
    model = theirs(name).train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(vocab_size, (rows, length), device=DEVICE)
    rates = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        rates.append(rows * length / (time.perf_counter() - start))
    what = f"{name}, {rows} x {length} tokens a step, bf16{', compiled' if compiled else ''}"
    row(f"{what}, training", ours, statistics.median(rates[4:]), "tok/s")
    row(f"{what}, peak memory", peak, torch.cuda.max_memory_allocated() / 2**30, "GiB")
    del model, run, optimizer
    fresh()


if __name__ == "__main__":
    main()
