"""What a user can ask of a generation. Free of torch, so that `--help` stays fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pagoda.common import PagodaError


@dataclass
class Sampling:
    """How tokens are chosen, and when to stop.

    Args:
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the most likely token; higher is more varied.
        top_k: choose among the k most likely tokens (0: all).
        top_p: choose among the most likely tokens that together have this probability (1: all).
        min_p: drop tokens less likely than this share of the most likely one (0: none).
        repetition_penalty: divide the score of tokens already in the prompt or the answer (1: off).
        presence_penalty: subtract this from the score of tokens already in the answer.
        frequency_penalty: subtract this once for every time a token stands in the answer.
        stop: texts that end the answer (they are not part of it).
        seed: makes sampling repeatable.
        ignore_eos: go on behind the end-of-text token.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        for name, ok, what in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
        ):
            value = getattr(self, name)
            if not ok or (isinstance(value, float) and not math.isfinite(value)):
                raise PagodaError(f"{name} must be {what}, not {value}")
        if any(not s for s in self.stop):
            raise PagodaError("stop must not hold an empty text")


@dataclass
class Weights:
    """How a model is loaded.

    Args:
        dtype: float32, bf16, float16, or auto for the checkpoint's own (a GGUF file keeps its own bits).
        device: cpu, cuda, mps, or auto for the first accelerator that is there.
        quantize: pack the weights to int8, int4 or nf4.
        kv_dtype: of the key/value cache: float32, bf16, int8, or auto for bf16 (float32 if dtype is float32).
    """

    dtype: str = "auto"
    device: str = "auto"
    quantize: str | None = None
    kv_dtype: str = "auto"
