"""litgpt: compiled training steps of SmolLM2-135M on 2 rows of 512 tokens, as one line of JSON. Its own environment.

usage: peer_train_litgpt.py STEPS THREADS        (what `litgpt pretrain` does in a step, precision bf16-true)
"""

import json
import resource
import statistics
import sys
import time

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

steps, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.set_default_dtype(torch.bfloat16)
model = GPT(Config.from_name("SmolLM2-135M"))
model.max_seq_length = 512
model.apply(model._init_weights)
model = torch.compile(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
tokens = torch.randint(49152, (2, 513), generator=torch.Generator().manual_seed(0))
rates = []
for _ in range(steps):
    start = time.perf_counter()
    logits = model(tokens[:, :-1].contiguous())
    loss = chunked_cross_entropy(logits, tokens[:, 1:].contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    rates.append(1024 / (time.perf_counter() - start))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"tokens_per_second": statistics.median(rates[2:]), "peak_gib": peak}))
