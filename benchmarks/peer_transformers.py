"""transformers on one stream: prefill and decode rates as one line of JSON. Runs in the peer's own environment.

usage: peer_transformers.py HF_DIR float32|bfloat16 PROMPT_TOKENS NEW_TOKENS THREADS
"""

import json
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

path, dtype = sys.argv[1:3]
n_prompt, n_new, threads = map(int, sys.argv[3:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
ids = torch.randint(model.config.vocab_size, (1, n_prompt), generator=torch.Generator().manual_seed(0))
prefill, decode = [], []
with torch.inference_mode():
    for _ in range(3):
        start = time.perf_counter()
        out = model(ids, logits_to_keep=1, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefill.append(n_prompt / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(n_new):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        decode.append(n_new / (time.perf_counter() - start))
print(json.dumps({"prefill": statistics.median(prefill), "decode": statistics.median(decode)}))
