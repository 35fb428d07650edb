"""nanoGPT's CPU preset in plain PyTorch, written as nanoGPT does it: the yardstick of benchmarks/characters.py.

usage: peer_nanogpt.py TEXT THREADS

A GPT-2 of 4 layers, 128 wide, without biases and dropout, on characters: 2,000 steps of 12 random pieces of 64, AdamW,
float32; the loss on 20 batches of each split every 250 steps. Prints the validation loss and the seconds as JSON.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

STEPS, BATCH, T, LAYERS, HEADS, C = 2000, 12, 64, 4, 4, 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(C, bias=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(b, t, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f, self.head = nn.LayerNorm(C, bias=False), nn.Linear(C, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * LAYERS) if "proj" in name or "down" in name else 0.02
                nn.init.normal_(p, std=std)
        self.head.weight = self.wte.weight

    def forward(self, x, y):
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.ln_f(h)).view(-1, self.wte.num_embeddings), y.view(-1))


def main():
    torch.set_num_threads(int(sys.argv[2]))
    torch.manual_seed(1337)
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([index[c] for c in text])
    n = int(0.9 * len(data))
    splits = {"train": data[:n], "val": data[n:]}

    def batch(split):
        start = torch.randint(len(splits[split]) - T, (BATCH,))
        return tuple(torch.stack([splits[split][i + d : i + d + T] for i in start]) for d in (0, 1))

    model = NanoGPT(len(index))
    decay, plain = ([p for p in model.parameters() if (p.dim() > 1) == m] for m in (True, False))
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    start, losses = time.perf_counter(), {}
    for step in range(STEPS + 1):
        if step < 100:
            lr = 1e-3 * (step + 1) / 101
        else:
            lr = 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step % 250 == 0:
            with torch.no_grad():
                losses = {s: sum(model(*batch(s)).item() for _ in range(20)) / 20 for s in splits}
        if step == STEPS:
            break
        loss = model(*batch("train"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    print(json.dumps({"val_loss": losses["val"], "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
