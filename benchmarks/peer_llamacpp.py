"""llama.cpp on one stream, by its C interface: prefill and decode rates as one line of JSON. Runs in the peer's own
environment.

usage: peer_llamacpp.py GGUF TYPE PROMPT_TOKENS NEW_TOKENS THREADS   (TYPE: Q4_0, Q8_0, ...; `same` keeps the file's)
"""

import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp as lc
import numpy as np

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}


def measure(path: str, n_prompt: int, n_new: int, threads: int) -> dict:
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    params = lc.llama_context_default_params()
    params.n_ctx = n_prompt + n_new + 64
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    context = lc.llama_init_from_model(model, params)
    vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    prompt = np.random.default_rng(0).integers(0, vocab_size, n_prompt).tolist()
    token = (lc.llama_token * 1)()

    def decode(tokens) -> None:
        for i in range(0, len(tokens), 512):
            part = (lc.llama_token * len(tokens[i : i + 512]))(*tokens[i : i + 512])
            assert lc.llama_decode(context, lc.llama_batch_get_one(part, len(part))) == 0
        scores = np.ctypeslib.as_array(lc.llama_get_logits_ith(context, -1), (vocab_size,))
        token[0] = int(scores.argmax())

    prefill_rates, decode_rates = [], []
    for _ in range(4):
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        start = time.perf_counter()
        decode(prompt)
        prefill_rates.append(n_prompt / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(n_new):
            decode(list(token))
        decode_rates.append(n_new / (time.perf_counter() - start))
    return {"prefill": statistics.median(prefill_rates[1:]), "decode": statistics.median(decode_rates[1:])}


def main() -> None:
    source, kind = sys.argv[1:3]
    numbers = list(map(int, sys.argv[3:]))
    if kind == "same":
        print(json.dumps(measure(source, *numbers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.gguf"))
        params = lc.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = FILE_TYPES[kind], True, numbers[2]
        assert lc.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(params)) == 0
        print(json.dumps(measure(path, *numbers)))


if __name__ == "__main__":
    main()
