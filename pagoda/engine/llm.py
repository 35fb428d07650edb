"""`LLM`: a model and its tokenizer, joined for use from Python and from the commands."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pagoda.common import PagodaError, read_json, resolve_device, resolve_dtype
from pagoda.data.tokenizer import Tokenizer, load_tokenizer
from pagoda.engine.engine import Engine, Timing, step_tokens
from pagoda.engine.options import EngineOptions, Sampling, Weights
from pagoda.engine.request import Output, Request, TokenLogprob, check_tokens
from pagoda.models.download import ADAPTER, resolve
from pagoda.models.gpt import GPT
from pagoda.models.loader import load
from pagoda.ops.cpu import kernels
from pagoda.ops.formats import PackedWeight
from pagoda.peft.files import load_adapter

Messages = list[dict[str, Any]]


@dataclass
class Completion:
    """What a prompt led to. finish_reason is `stop` (end of text, or a stop text) or `length`.

    logprobs are there when asked for; with `n` above 1 `others` are the answers behind the first."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str = "length"
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    others: list[Completion] = field(default_factory=list)


class LLM:
    """`LLM.load(name)`, then `generate`, `chat`, `stream` or `score`.

    Sampling options go in as keywords: `llm.generate("Once", temperature=0, max_new_tokens=20)`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str = "", kv_dtype: torch.dtype | None = None):
        self.model, self.tokenizer, self.name, self.kv_dtype = model, tokenizer, name, kv_dtype
        self.timing = Timing()  # of the last call
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """What runs the prompts; it remembers their beginnings from call to call."""
        with self._lock:
            if self._engine is None:
                options = EngineOptions(max_step_tokens=step_tokens(self.model.device, 2048))
                self._engine = Engine(self.model, self.tokenizer, options, self.kv_dtype)
            return self._engine

    @classmethod
    def load(
        cls,
        name: str | Path,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        kv_dtype: str = "auto",
        batch_invariant: bool = False,
    ) -> LLM:
        """From a directory, a GGUF file, a known name or a Hub id, which is downloaded when it is not there yet.

        dtype      `float32`, `bf16`, `float16`, or `auto` for the checkpoint's own. A GGUF file keeps its own bits
                   with `auto` (docs/checkpoints.md), and is dequantized to the dtype otherwise
        device     `auto`, `cpu`, `cuda`, `mps`, ...
        quantize   the weights to `int8`, `int4` or `nf4`; activations are of the dtype (float32 with a GGUF file's own)
        kv_dtype   of the cache: `auto` for bf16 (float32 where dtype is float32), `float32`, `bf16`, `int8`
        batch_invariant  the same bits in any company with `nf4` on AMX too (all else has them anyway)
        """
        model, cache_dtype, path = load_model(name, Weights(dtype, device, quantize, kv_dtype, batch_invariant))
        return cls(model, load_tokenizer(path), str(name), cache_dtype)

    def generate(
        self, prompts: str | list[int] | list[str] | list[list[int]], options: Sampling | None = None, **sampling: Any
    ) -> Completion | list[Completion]:
        """Complete a prompt (text or token ids), or several at once: one Completion, or a list of them."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        options = replace(options or Sampling(), **sampling)
        ids = [self.encode(p) for p in ([prompts] if single else prompts)]
        answers = [[Completion("", [], len(p)) for _ in range(options.n)] for p in ids]
        for i, piece in self._run(ids, options):
            done = answers[i][piece.index]
            done.text += piece.text
            done.token_ids += piece.token_ids
            done.logprobs += piece.logprobs
            done.prompt_logprobs = done.prompt_logprobs or piece.prompt_logprobs
            done.finish_reason = piece.finish_reason or done.finish_reason
        for first, *others in answers:
            first.others = others
        return answers[0][0] if single else [first for first, *_ in answers]

    def chat(self, messages: Messages, options: Sampling | None = None, **sampling: Any) -> Completion:
        """Answer a conversation (`[{"role": "user", "content": "..."}]`) through the model's chat template."""
        return self.generate(self.chat_ids(messages), options, **sampling)

    def stream(
        self, prompt: str | list[int] | Messages, options: Sampling | None = None, **sampling: Any
    ) -> Iterator[str]:
        """The answer to a prompt or a conversation, piece by piece, never with half a character."""
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
        ids = self.chat_ids(prompt) if is_chat else self.encode(prompt)
        for _, piece in self._run([ids], replace(options or Sampling(), **sampling)):
            if piece.text and piece.index == 0:
                yield piece.text

    @torch.inference_mode()
    def score(self, text: str | list[int]) -> list[tuple[int, float]]:
        """(token, log-probability in nats) of every token of the text but the first, which nothing predicts."""
        ids = self.encode(text)
        if len(ids) < 2:
            raise PagodaError("a text needs two tokens or more to be scored")
        if len(ids) > self.model.config.block_size:
            raise PagodaError(f"the text has {len(ids)} tokens and the context is {self.model.config.block_size}")
        check_tokens(ids, self.model.config.vocab_size)
        tokens = torch.tensor(ids, device=self.model.device)
        losses = self.model(tokens[:-1], targets=tokens[1:])
        return [(token, -loss) for token, loss in zip(ids[1:], losses.tolist())]

    def encode(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def chat_ids(self, messages: Messages, **options: Any) -> list[int]:
        """A conversation as the token ids that the model's chat template makes of it, ready for the answer."""
        text = self.tokenizer.apply_chat_template(messages, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _run(self, prompts: list[list[int]], options: Sampling) -> Iterator[tuple[int, Output]]:
        """(index, piece) as the answers go on."""
        self.engine.timing = self.timing = Timing()
        if not prompts:
            raise PagodaError("no prompt: give at least one")
        for i, piece in self.engine.stream([Request(prompt, options) for prompt in prompts]):
            if piece.error:
                raise PagodaError(piece.error)
            yield i, piece


def load_model(name: str | Path, weights: Weights) -> tuple[GPT, torch.dtype, Path]:
    """The model that a name means, the type of its cache, and where it was found. On a CPU with kernels all matrices
    are laid out for them, in the bits that they have or are rounded to; without kernels bf16 ones for PyTorch."""
    device = resolve_device(weights.device)
    dtype = None if weights.dtype == "auto" else resolve_dtype(weights.dtype)
    quantize = weights.quantize
    if quantize not in (None, "int8", "int4", "nf4"):
        raise PagodaError(f"unknown quantization '{quantize}': use int8, int4 or nf4")
    if weights.kv_dtype == "auto":
        cache_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    else:
        cache_dtype = torch.int8 if weights.kv_dtype == "int8" else resolve_dtype(weights.kv_dtype)
    found = path = resolve(str(name))
    adapter = (found / ADAPTER).is_file()
    if adapter:
        path = base_of(found)
    if device.type == "cpu" and kernels is not None:
        quantize = quantize or {None: "own", torch.bfloat16: "bf16"}.get(dtype, "float32")
        if path.is_file():
            dtype = dtype or torch.float32  # of the activations: with packed weights they are the smaller part
    elif quantize:
        dtype = dtype or torch.bfloat16
    model = load(path, dtype, device, quantize=quantize)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.invariant = weights.batch_invariant
    if adapter:
        load_adapter(model, found)
        path = found if (found / "tokenizer.json").is_file() else path
    return model, cache_dtype, path


def base_of(adapter: Path) -> Path:
    """The model that an adapter was made for."""
    base = read_json(adapter / ADAPTER).get("base_model_name_or_path")
    if not base:
        raise PagodaError(f"{adapter / ADAPTER} does not say for which model it is: `pagoda merge BASE {adapter} OUT`")
    try:
        return resolve(base)
    except PagodaError as e:
        raise PagodaError(f"{adapter} is an adapter for {base}: {e}") from None
