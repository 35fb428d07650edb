"""A GPU computes what a CPU does: attention, packed weights, every family, and the engine with its CUDA graphs."""

import subprocess
import sys

import pytest
import tiny
import torch
from tiny import GPU, needs_gpu

from pagoda import Sampling
from pagoda.engine.engine import Engine
from pagoda.engine.options import EngineOptions
from pagoda.engine.request import Request
from pagoda.engine.runner import Graph
from pagoda.models.loader import load
from pagoda.models.registry import from_hf_config
from pagoda.ops.attention import _decode, attention
from pagoda.ops.formats import FORMATS, pack
from pagoda.ops.linear import embedding, linear

CASES = {
    "plain": {},
    "window": dict(window=5),
    "softcap": dict(softcap=3.0),
    "alibi": dict(alibi=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "alibi-window": dict(alibi=torch.tensor([0.5, 0.25, 0.125, 0.0625]), window=7),
}


def paged(lengths: list[int], new: list[int], page_size: int, dtype: torch.dtype, int8: bool = False):
    """Random queries, and pages in any order; behind each sequence's end they hold NaN."""
    n_pages = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(n_pages)).tolist()
    table = torch.zeros(len(lengths), max(n_pages) + 1, dtype=torch.int32)
    k, v = (torch.full((sum(n_pages), page_size, 2, 16), float("nan")) for _ in range(2))
    for s, (length, n) in enumerate(zip(lengths, n_pages)):
        table[s, :n] = torch.tensor([order.pop() for _ in range(n)])
        for i in range(length):
            page = table[s, i // page_size]
            k[page, i % page_size], v[page, i % page_size] = torch.randn(2, 2, 16)
    told = dict(block_table=table, seq_lens=torch.tensor(lengths, dtype=torch.int32), max_seq_len=max(lengths))
    if int8:
        k, v = k.nan_to_num(), v.nan_to_num()
        for name, x in (("k", k), ("v", v)):
            told[f"{name}_scale"] = x.abs().amax(-1) / 127
            x.copy_((x / told[f"{name}_scale"].clamp_min(1e-9)[..., None]).round())
        k, v = k.to(torch.int8), v.to(torch.int8)
    else:
        k, v = k.to(dtype), v.to(dtype)
    q = torch.randn(sum(new), 4, 16).to(dtype)
    told["cu_seqlens"] = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, dict(told, max_seqlen=max(new), scale=0.25)


def at(device: str, *values):
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


def exactly(q, k, v, told) -> torch.Tensor:
    """The reference in float64."""
    wide = [x if x.dtype == torch.int8 else x.double() for x in (q, k, v)]
    with torch.enable_grad():  # which the kernels for a CPU leave alone in float64
        return attention(*wide, **told)


def test_a_decode_step_of_all_sequences_together_equals_the_loop():
    """What a GPU computes where flash attention cannot, computed here."""
    for case in CASES.values():
        for int8 in (False, True):
            q, k, v, told = paged([9, 1, 33, 16], [1] * 4, 16, torch.float32, int8)
            options = dict(window=0, softcap=0.0, alibi=None, k_scale=None, v_scale=None) | case
            options |= {name: told[name] for name in ("block_table", "seq_lens", "k_scale", "v_scale") if name in told}
            y = _decode(q, k, v, scale=0.25, **options)
            torch.testing.assert_close(y, exactly(q, k, v, {**told, **case}).float(), atol=1e-5, rtol=0)


@needs_gpu
@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_attention_over_pages(case, dtype, page_size):
    for new in ([1, 1, 1, 1], [9, 1, 4, 16]):
        for int8 in (False, True):
            q, k, v, told = paged([9, 1, 333, 16], new, page_size, dtype, int8)
            told |= CASES[case]
            keys, values = told.keys(), at(GPU, *told.values())
            with torch.no_grad():
                y = attention(*at(GPU, q, k, v), **dict(zip(keys, values))).cpu()
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(y.double(), exactly(q, k, v, told), atol=tolerance, rtol=0)


@needs_gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients(case, dtype):
    lengths = [7, 1, 40, 16]
    told = dict(cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32))
    told |= dict(max_seqlen=max(lengths), scale=0.25, **CASES[case])
    inputs = [torch.randn(sum(lengths), n, 16).to(dtype) for n in (4, 2, 2, 4)]
    results = []
    for device, wide in (("cpu", torch.float64), (GPU, dtype)):
        q, k, v, grad = (x.to(device, wide) for x in inputs)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        y = attention(q, k, v, **dict(zip(told.keys(), at(device, *told.values()))))
        results.append([x.double().cpu() for x in (y, *torch.autograd.grad(y, (q, k, v), grad))])
    for expected, found in zip(*results):
        error = (found - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@needs_gpu
@pytest.mark.parametrize("format", FORMATS[:5])
def test_packed_weights(format):
    weight, x, ids = torch.randn(70, 96), torch.randn(5, 96), torch.tensor([3, 69, 0])
    packed = pack(weight, format)
    there = pack(weight.to(GPU), format)
    whole = packed.dequantize()
    torch.testing.assert_close(there.dequantize().cpu(), whole, atol=1e-6, rtol=1e-5)
    moved = packed.to(GPU)
    with torch.no_grad():
        torch.testing.assert_close(linear(x.to(GPU), moved).cpu(), x @ whole.T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(embedding(ids.to(GPU), moved).float().cpu(), whole[ids], atol=0, rtol=0)


@needs_gpu
@pytest.mark.parametrize("name", tiny.VARIATIONS)
def test_every_family(name, tmp_path):
    """Logits and greedy tokens of a CPU, which test_families.py compares with transformers; in bf16 likely ones."""
    tiny.saved(name, tmp_path)
    model, here = load(tmp_path, device=GPU), load(tmp_path)
    ids = tiny.prompt(23)
    with torch.no_grad():
        expected = here(ids)
        torch.testing.assert_close(model(ids.to(GPU)).cpu(), expected, atol=2e-4, rtol=0)
    if model.rope is not None and model.rope.by_length:
        return  # the angles of a text are others than those of its beginning
    greedy = Sampling(temperature=0, max_new_tokens=12)
    prompts = [ids.tolist(), tiny.prompt(5, 7).tolist(), tiny.prompt(11, 8).tolist()]
    together = tiny.generate(model, prompts, greedy)
    assert together == tiny.generate(here, prompts, greedy)
    for prompt, new in zip(prompts, together):
        assert tiny.generate(model, [prompt], greedy) == [new]
    narrow = load(tmp_path, device=GPU, dtype=torch.bfloat16)
    with torch.no_grad():
        error = (narrow(ids.to(GPU)).float().cpu() - expected).norm() / expected.norm()
    assert error < (0.2 if narrow.config.n_expert else 0.06)  # a router may choose other experts
    engine = Engine(narrow, options=EngineOptions(kv_memory=0.05))
    tokens = [[], [], []]
    engine.run([Request(p, greedy) for p in prompts], lambda i, piece: tokens[i].extend(piece.token_ids))
    if GPU == "cuda" and not narrow.config.n_expert:
        decoders = list(engine.runner.decoders.values())
        assert decoders
        assert all(isinstance(d.recording, Graph) for d in decoders)
    for prompt, new in zip(prompts, tokens):  # of two that nearly tie, either
        whole = torch.tensor(prompt + new, device=GPU)
        with torch.no_grad():
            scores = narrow(whole)[len(prompt) - 1 : -1].float()
        chosen = scores.gather(1, torch.tensor(new, device=GPU)[:, None])[:, 0]
        assert (chosen > scores.amax(-1) - 0.15 * scores.std()).all()


@needs_gpu
@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_quantized_models(quantize, tmp_path):
    tiny.saved("llama", tmp_path)
    ids = tiny.prompt(23)
    with torch.no_grad():
        expected = load(tmp_path, quantize=quantize)(ids)
        model = load(tmp_path, quantize=quantize, device=GPU)
        error = (model(ids.to(GPU)).cpu() - expected).norm() / expected.norm()
    assert error < 0.03  # a CPU rounds activations to int8 too
    greedy = Sampling(temperature=0, max_new_tokens=8)
    assert len(tiny.generate(model, [ids.tolist()], greedy)[0]) == 8


@needs_gpu
def test_sampling_penalties_beams_and_drafts():
    model = from_hf_config({"model_type": "llama", **tiny.KV})
    model.init_weights()
    model = model.to(GPU).requires_grad_(False)
    prompts = [tiny.prompt(9, s).tolist() for s in range(3)]
    drawn = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3, max_new_tokens=10, repetition_penalty=1.2)
    first = tiny.generate(model, prompts, drawn)
    assert first == tiny.generate(model, prompts, drawn)
    greedy = Sampling(temperature=0, max_new_tokens=10)
    assert tiny.generate(model, prompts, greedy) == tiny.generate(model, prompts, greedy, speculate="ngram")
    beams = Sampling(temperature=0, beam_width=3, max_new_tokens=6)
    assert len(tiny.generate(model, prompts[:1], beams)[0]) > 0
    assert len(tiny.generate(model, prompts, greedy, kv_dtype=torch.int8)[0]) == 10


@needs_gpu
def test_the_commands(tmp_path):
    tiny.saved("llama", tmp_path)
    command = [sys.executable, "-m", "pagoda", "bench", str(tmp_path), "--device", GPU, "--prompt_tokens", "16"]
    done = subprocess.run([*command, "--new_tokens", "8", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "decode_tok_s" in done.stdout
