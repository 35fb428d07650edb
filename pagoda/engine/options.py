"""What a user can ask of a generation. Free of torch, so that `--help` stays fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pagoda.common import PagodaError, demand

MOST_ANSWERS = 128  # to one request
MOST_LOGPROBS = 20  # alternatives reported for a token


@dataclass
class Guided:
    """What an answer must be: exactly one of these. Needs the package `llguidance`.

    Args:
        json: a JSON schema, as a dictionary or as text; {} is any value.
        regex: a regular expression for the whole answer.
        grammar: a Lark grammar that starts at `start`.
        choice: one of these texts.
        any_json: any JSON object.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None
    any_json: bool = False

    def __post_init__(self):
        if sum(bool(given) or given == {} for given in vars(self).values()) != 1:
            raise PagodaError("guided output takes exactly one of json, regex, grammar, choice, any_json")


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
        min_new_tokens: no end before so many tokens.
        stop_token_ids: tokens that end the answer (they are not part of it).
        logit_bias: token to what is added to its score.
        n: answers to the prompt; they share its memory.
        best_of: make so many answers and return the n with the highest mean log-probability (0: n).
        logprobs: report every token's log-probability, and so many of the most likely ones beside it.
        prompt_logprobs: the same for the tokens of the prompt.
        beam_width: search with so many beams instead of drawing; the n best are returned (0: off).
        length_penalty: a beam's score is its log-probability over its length to this power.
        guided: what the answer must be.
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
    min_new_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)
    logit_bias: dict[int, float] = field(default_factory=dict)
    n: int = 1
    best_of: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int = 0
    length_penalty: float = 1.0
    guided: Guided | None = None

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        demand(
            self,
            max_new_tokens=(self.max_new_tokens >= 1, "at least 1"),
            temperature=(self.temperature >= 0, "0 or more"),
            top_k=(0 <= self.top_k < 2**31, "0 (off) or more, and below 2^31"),
            top_p=(0 < self.top_p <= 1, "above 0 and at most 1"),
            min_p=(0 <= self.min_p <= 1, "between 0 and 1"),
            repetition_penalty=(0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            presence_penalty=(-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            frequency_penalty=(-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            seed=(self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            min_new_tokens=(0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            n=(1 <= self.n <= MOST_ANSWERS, f"between 1 and {MOST_ANSWERS}"),
            best_of=(self.best_of == 0 or self.n <= self.best_of <= MOST_ANSWERS, f"n to {MOST_ANSWERS}, or 0"),
            logprobs=(self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
            prompt_logprobs=(
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MOST_LOGPROBS,
                f"0 to {MOST_LOGPROBS}",
            ),
            beam_width=(self.beam_width == 0 or self.n <= self.beam_width <= MOST_ANSWERS, f"n to {MOST_ANSWERS}"),
            length_penalty=(-10 <= self.length_penalty <= 10, "between -10 and 10"),
        )
        # Scores over less would be infinite, and less than any weight is none: both mean the likeliest token.
        self.temperature = self.temperature if self.temperature >= 1e-4 else 0.0
        self.top_p = max(self.top_p, 1e-6)
        if any(not s for s in self.stop):
            raise PagodaError("stop must not hold an empty text")
        if any(not math.isfinite(bias) for bias in self.logit_bias.values()):
            raise PagodaError("logit_bias takes finite numbers")
        if self.beam_width and (self.guided or self.best_of or self.logprobs is not None):
            raise PagodaError("beam search goes neither with guided output nor with best_of nor with logprobs")

    @property
    def answers(self) -> int:
        """Sequences that run for this."""
        return self.beam_width or self.best_of or self.n


# What requests to an engine may ask for and a command line cannot say.
REQUEST_ONLY = {"stop_token_ids", "logit_bias", "n", "best_of", "logprobs", "prompt_logprobs", "beam_width"}
REQUEST_ONLY |= {"length_penalty", "guided"}


@dataclass
class Weights:
    """How a model is loaded.

    Args:
        dtype: float32, bf16, float16, or auto for the own one (a GGUF file keeps its bits: docs/checkpoints.md).
        device: cpu, cuda, mps, or auto for the first accelerator that is there.
        quantize: pack the weights to int8, int4 or nf4.
        kv_dtype: of the key/value cache: float32, bf16, int8, or auto for bf16 (float32 if dtype is float32).
        batch_invariant: the same bits whatever else runs, also with nf4 on AMX, where one sequence then decodes slower.
    """

    dtype: str = "auto"
    device: str = "auto"
    quantize: str | None = None
    kv_dtype: str = "auto"
    batch_invariant: bool = False


@dataclass
class EngineOptions:
    """How requests share the machine.

    Args:
        max_num_seqs: most sequences that run at once; the others wait.
        max_step_tokens: most tokens of prompts in one step: more is faster for them, and slower for those who read
            (0: 512 on a CPU, 4,096 on a GPU).
        kv_memory: GiB of the key/value cache (0: a third of the memory that is free, or what max_num_seqs can use).
        max_queue: most requests that wait; more are refused.
        prefix_caching: keep the keys and values of prompts for others that begin alike.
        speculate: guess tokens ahead: ngram (from the text so far), or the name of a small model with the same
            tokenizer. Answers stay the same.
        n_draft: tokens guessed at once, at most 7.
    """

    max_num_seqs: int = 256
    max_step_tokens: int = 0
    kv_memory: float = 0.0
    max_queue: int = 1024
    prefix_caching: bool = True
    speculate: str = ""
    n_draft: int = 4

    def __post_init__(self):
        demand(
            self,
            max_num_seqs=(self.max_num_seqs >= 1, "at least 1"),
            max_step_tokens=(not self.max_step_tokens or self.max_step_tokens >= 128, "at least 128"),
            kv_memory=(0 <= self.kv_memory < math.inf, "0 (as much as fits) or more GiB"),
            max_queue=(self.max_queue >= 0, "0 or more"),
            n_draft=(1 <= self.n_draft <= 7, "between 1 and 7"),
        )
