"""`LLM`: a model and its tokenizer, joined for use from Python and from the commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pagoda.common import PagodaError, resolve_device, resolve_dtype
from pagoda.data.tokenizer import Tokenizer, load_tokenizer
from pagoda.engine.generate import Generator, Timing
from pagoda.engine.options import Sampling, Weights
from pagoda.models.download import ADAPTER, resolve
from pagoda.models.gpt import GPT
from pagoda.models.loader import load, read_json
from pagoda.ops.cpu import kernels
from pagoda.peft.files import load_adapter

Messages = list[dict[str, Any]]


@dataclass
class Completion:
    """What a prompt led to. finish_reason is `stop` (end of text, or a stop text) or `length`."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str = "length"


class LLM:
    """`LLM.load(name)`, then `generate`, `chat`, `stream` or `score`.

    Sampling options go in as keywords: `llm.generate("Once", temperature=0, max_new_tokens=20)`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str = "", kv_dtype: torch.dtype | None = None):
        self.model, self.tokenizer, self.name, self.kv_dtype = model, tokenizer, name, kv_dtype
        self.timing = Timing()  # of the last call

    @classmethod
    def load(
        cls,
        name: str | Path,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        kv_dtype: str = "auto",
    ) -> LLM:
        """From a directory, a GGUF file, a known name or a Hub id, which is downloaded when it is not there yet.

        dtype      `float32`, `bf16`, `float16`, or `auto` for the checkpoint's own. A GGUF file keeps its own bits
                   with `auto`, and is dequantized to the dtype otherwise
        device     `auto`, `cpu`, `cuda`, `mps`, ...
        quantize   the weights to `int8`, `int4` or `nf4` (the activations are then float32 unless dtype says otherwise)
        kv_dtype   of the cache: `auto` for bf16 (float32 where dtype is float32), `float32`, `bf16`, `int8`
        """
        model, cache_dtype, path = load_model(name, Weights(dtype, device, quantize, kv_dtype))
        return cls(model, load_tokenizer(path), str(name), cache_dtype)

    def generate(
        self, prompts: str | list[int] | list[str] | list[list[int]], options: Sampling | None = None, **sampling: Any
    ) -> Completion | list[Completion]:
        """Complete a prompt (text or token ids), or several at once: one Completion, or a list of them."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        options = options or Sampling(**sampling)
        ids = [self.encode(p) for p in ([prompts] if single else prompts)]
        done = [Completion("", [], len(p)) for p in ids]
        for index, text, completion in self._run(ids, options):
            done[index].text += text
            if completion is not None:
                done[index].token_ids, done[index].finish_reason = completion
        return done[0] if single else done

    def chat(self, messages: Messages, options: Sampling | None = None, **sampling: Any) -> Completion:
        """Answer a conversation (`[{"role": "user", "content": "..."}]`) through the model's chat template."""
        return self.generate(self.chat_ids(messages), options, **sampling)

    def stream(
        self, prompt: str | list[int] | Messages, options: Sampling | None = None, **sampling: Any
    ) -> Iterator[str]:
        """The answer to a prompt or a conversation, piece by piece, never with half a character."""
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
        ids = self.chat_ids(prompt) if is_chat else self.encode(prompt)
        for _, text, _ in self._run([ids], options or Sampling(**sampling)):
            if text:
                yield text

    @torch.inference_mode()
    def score(self, text: str | list[int]) -> list[tuple[int, float]]:
        """(token, log-probability in nats) of every token of the text but the first, which nothing predicts."""
        ids = self.encode(text)
        if len(ids) < 2:
            raise PagodaError("a text needs two tokens or more to be scored")
        if len(ids) > self.model.config.block_size:
            raise PagodaError(f"the text has {len(ids)} tokens and the context is {self.model.config.block_size}")
        tokens = torch.tensor(ids, device=self.model.device)
        losses = self.model(tokens[:-1], targets=tokens[1:])
        return [(token, -loss) for token, loss in zip(ids[1:], losses.tolist())]

    def encode(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def chat_ids(self, messages: Messages, **options: Any) -> list[int]:
        """A conversation as the token ids that the model's chat template makes of it, ready for the answer."""
        text = self.tokenizer.apply_chat_template(messages, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _run(
        self, prompts: list[list[int]], options: Sampling
    ) -> Iterator[tuple[int, str, tuple[list[int], str] | None]]:
        """(index, new text, (token ids, finish reason) at the end) as sequences go on."""
        generator = Generator(self.model, prompts, [options] * len(prompts), self.kv_dtype)
        self.timing = generator.timing
        ends = set() if options.ignore_eos else set(self.tokenizer.eos_ids)
        texts = [Text(self.tokenizer, options.stop) for _ in prompts]
        ids: list[list[int]] = [[] for _ in prompts]
        for index, token in generator:
            text = texts[index]
            if token in ends:
                new, reason = text.flush(), "stop"
            else:
                ids[index].append(token)
                new = text.push(token)
                reason = "stop" if text.stopped else None if index in generator.running else "length"
                if reason == "length":
                    new += text.flush()
                    reason = "stop" if text.stopped else reason
            if reason:
                generator.stop(index)
            yield index, new, (ids[index], reason) if reason else None


def load_model(name: str | Path, weights: Weights) -> tuple[GPT, torch.dtype, Path]:
    """The model that a name means, the type of its cache, and where it was found. On a CPU with kernels all matrices
    are laid out for them, in the bits that they have or are rounded to."""
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


class Text:
    """Tokens to text as they come: whole characters only, and nothing that may turn out to be a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.stream, self.stop, self.held, self.stopped = tokenizer.stream(), stop, "", False

    def push(self, token: int) -> str:
        return self._release(self.held + self.stream.push(token))

    def flush(self) -> str:
        """What was held back, at the end."""
        text = self._release(self.held + self.stream.flush())
        text, self.held = text + self.held, ""
        return text

    def _release(self, text: str) -> str:
        places = [p for p in (text.find(s) for s in self.stop) if p >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
