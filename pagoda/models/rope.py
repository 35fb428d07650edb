"""Rotary angles: the frequencies of every scaling that checkpoints use, and the cosines and sines of a stream.

Scalings that depend on the length of a sequence (`dynamic`, `longrope`) use the length of the sequence that a token
belongs to, never what else is in the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pagoda.common import PagodaError
from pagoda.ops.linear import embedding


class Rope:
    """Angles for one kind of layer: `rope(positions, lengths)` gives cos and sin (N, dim / 2) in float32.

    params are `rope_parameters` as Hugging Face configurations write them (rope_type, rope_theta, factor, ...);
    dim is how much of a head rotates; block_size the model's context.
    """

    TYPES = {  # and the parameters that each cannot do without
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (),
        "longrope": ("short_factor", "long_factor"),
    }

    def __init__(self, params: dict[str, Any], dim: int, block_size: int):
        self.params, self.dim, self.block_size = params, dim, block_size
        self.type = params.get("rope_type", params.get("type", "default"))
        if self.type not in self.TYPES:
            raise PagodaError(f"rotary scaling '{self.type}' is not supported: known are {', '.join(self.TYPES)}")
        if absent := [key for key in self.TYPES[self.type] if params.get(key) is None]:
            raise PagodaError(f"rotary scaling '{self.type}' needs {', '.join(absent)}")
        self.by_length = self.type in ("dynamic", "longrope")
        # A sequence that grows beyond this length has other angles from its start on: compute its keys again.
        self.recompute_beyond = None
        if self.type == "longrope":
            self.recompute_beyond = params.get("original_max_position_embeddings") or block_size
        self._tables: list[tuple[Tensor, Tensor]] = []  # the last counts; recordings may read those before it

    def __call__(self, positions: Tensor, lengths: Tensor | None, max_position: int) -> tuple[Tensor, Tensor]:
        """positions (N,) int64; lengths (N,): the length of each token's sequence, used by the scalings that ask for
        it; max_position: a bound for positions, as a plain integer."""
        if self.by_length:
            inv_freq, factor = self.frequencies(lengths)
            angles = positions[:, None].float() * inv_freq
            return angles.cos() * factor, angles.sin() * factor
        table = self._tables[-1][0] if self._tables else None
        if table is None or len(table) <= max_position or table.device != positions.device:
            size = max(256, 1 << max_position.bit_length())
            inv_freq, factor = self.frequencies()
            angles = (torch.arange(size).float()[:, None] * inv_freq).to(positions.device)
            self._tables.append((angles.cos() * factor, angles.sin() * factor))
        cos, sin = self._tables[-1]
        return embedding(positions, cos), embedding(positions, sin)

    def frequencies(self, lengths: Tensor | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies (dim / 2,), or (N, dim / 2) by the lengths; and the factor on cos and sin."""
        p, dim = self.params, self.dim
        base = float(p.get("rope_theta", 10000.0))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        if lengths is not None:
            exponents = exponents.to(lengths.device)
        inv_freq = 1.0 / base**exponents
        if self.type == "linear":  # Chen et al. 2023, position interpolation
            return inv_freq / p["factor"], 1.0
        if self.type == "dynamic":  # NTK-aware scaling whose base grows with the length
            grown = lengths.clamp_min(self.block_size).float() * p["factor"] / self.block_size - (p["factor"] - 1)
            return 1.0 / (base * grown[:, None] ** (dim / (dim - 2))) ** exponents, 1.0
        if self.type == "llama3":
            return _llama3(inv_freq, p, self.block_size), 1.0
        if self.type == "yarn":
            return _yarn(inv_freq, base, dim, p, self.block_size)
        if self.type == "longrope":  # Ding et al. 2024
            original = self.recompute_beyond
            short, long = (torch.tensor(p[k], device=inv_freq.device) for k in ("short_factor", "long_factor"))
            scale = p.get("factor") or self.block_size / original
            factor = p.get("attention_factor")
            if factor is None:
                factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            return torch.where(lengths[:, None] > original, inv_freq / long, inv_freq / short), factor
        return inv_freq, 1.0


def _llama3(inv_freq: Tensor, p: dict[str, Any], block_size: int) -> Tensor:
    """Llama 3.1: slow waves are stretched by `factor`, fast ones kept, those between are blended."""
    original = p.get("original_max_position_embeddings") or block_size
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = original * inv_freq / (2 * math.pi)  # full turns of each wave within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / p["factor"])


def _yarn(inv_freq: Tensor, base: float, dim: int, p: dict[str, Any], block_size: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): a ramp over the dimensions between kept and interpolated frequencies."""
    original = p.get("original_max_position_embeddings") or block_size
    factor = p.get("factor") or block_size / original

    def dimension(turns: float) -> float:  # the dimension that makes so many turns in the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    scaled = inv_freq * (1 - ramp) + inv_freq / factor * ramp
    attention_factor = p.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = p.get("mscale"), p.get("mscale_all_dim")
        attention_factor = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
    return scaled, attention_factor


def alibi_slopes(n_head: int) -> Tensor:
    """(n_head,) float32: the slope of each head (Press et al. 2021), also for head counts that are no power of two."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_head - power)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")  # a constant, also when the model is built on meta
