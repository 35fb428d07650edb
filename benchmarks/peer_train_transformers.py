"""transformers (and PEFT): training steps on 2 rows of 512 tokens, as one line of JSON. In the peer's own environment.

usage: peer_train_transformers.py HF_DIR full|full-compile|lora|qlora float32|bfloat16 STEPS THREADS
"""

import json
import resource
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

path, mode, dtype = sys.argv[1:4]
steps, threads = map(int, sys.argv[4:])
torch.set_num_threads(threads)
options = {}
if mode == "qlora":
    from transformers import BitsAndBytesConfig

    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options["device_map"] = "cpu"
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **options).train()
if mode.endswith("lora"):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
if mode == "full-compile":
    model = torch.compile(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
tokens = torch.randint(49152, (2, 512), generator=torch.Generator().manual_seed(0))
rates = []
for _ in range(steps):
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode.endswith("lora")):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    rates.append(tokens.numel() / (time.perf_counter() - start))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"tokens_per_second": statistics.median(rates[2:]), "peak_gib": peak}))
