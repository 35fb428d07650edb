"""What goes into the engine (`Request`), what comes out (`Output`), and what is in the making between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pagoda.common import PagodaError
from pagoda.data.tokenizer import Tokenizer
from pagoda.engine.options import Sampling


@dataclass
class Request:
    """Token ids to go on from, and how. `adapter`: one that the engine has loaded; the lowest priority runs first."""

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    priority: int = 0


def check_tokens(ids: Iterable[int], vocab_size: int, where: str = "") -> None:
    """Raises PagodaError for what is no token of a model."""
    if bad := [t for t in ids if not 0 <= t < vocab_size]:
        raise PagodaError(f"{where}token {bad[0]} is outside the model's vocabulary of {vocab_size}")


@dataclass
class TokenLogprob:
    """A token, its log-probability (nats, of the model, before temperature and penalties), the likeliest beside it."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Output:
    """A piece of one answer.

    index            which of the request's answers
    text, token_ids  what is new; text comes in whole characters, and is held back while it may be a stop text
    logprobs         of the new tokens, where asked for
    finish_reason    at the end: `stop` (end of text, a stop text or token), `length`, `abort` or `error` (see error)
    stop_reason      the stop text or token that ended it; None for the end of the text
    prompt_logprobs  with the first piece, where asked for: None for the first token, which nothing predicts
    cached_tokens    of the prompt, taken over from earlier prompts
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str = ""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0


class Sequence:
    """One answer in the making: the tokens of its prompt, those behind them, and where they are in the cache."""

    def __init__(self, group: Group, index: int):
        self.group, self.index = group, index
        self.tokens = list(group.request.prompt)
        self.n_prompt = self.n_prefill = len(self.tokens)  # the first n_prefill go into the cache in large pieces
        self.cached = 0  # tokens whose keys and values are in the cache
        self.drafted = 0  # the same in the draft model's cache
        self.blocks: list[int] = []
        self.remembered = 0  # of its blocks
        self.chooser = None  # sampling.Chooser
        self.text: Text | None = None
        self.finish_reason: str | None = None
        self.logprob = 0.0  # of the answer so far

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet. While decoding it is one: the last."""
        return len(self.tokens) - self.cached

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and len(self.tokens) > self.n_prompt

    @property
    def new(self) -> list[int]:
        return self.tokens[self.n_prompt :]

    def fork(self, index: int) -> Sequence:
        """Another answer that goes on from here. Whoever owns the blocks counts the new owner."""
        other = Sequence(self.group, index)
        other.tokens, other.n_prefill = list(self.tokens), self.n_prefill
        other.cached, other.drafted = self.cached, self.drafted
        other.blocks, other.remembered = list(self.blocks), self.remembered
        other.logprob = self.logprob
        return other


class Group:
    """A request and its answers."""

    def __init__(self, request: Request, number: int, most: int):
        self.request, self.number = request, number
        self.most = most  # new tokens at most
        self.sequences = [Sequence(self, 0)]
        self.started = False
        self.held: dict[int, Output] = {}  # best_of: everything until the last answer is finished
        self.finished: list[tuple[float, list[int], str]] = []  # beams: score, tokens, reason, the best first
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.cached_tokens = 0
        self.told = False  # what goes with the first piece

    @property
    def live(self) -> list[Sequence]:
        """The answers that are not finished."""
        return [s for s in self.sequences if s.finish_reason is None]

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first."""
        return self.request.priority, self.number


class Text:
    """Tokens to text as they come: whole characters only, and nothing that may turn out to be a stop text. The first
    `least` tokens may hold one."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], least: int = 0):
        self.stream, self.stop, self.least, self.held = tokenizer.stream(), stop, least, ""
        self.stopped: str | None = None  # the stop text that came

    def push(self, token: int) -> str:
        text = self.held + self.stream.push(token)
        if self.least:
            self.least -= 1
            return text
        return self._release(text)

    def flush(self) -> str:
        """What was held back, at the end."""
        text = self._release(self.held + self.stream.flush())
        text, self.held = text + self.held, ""
        return text

    def _release(self, text: str) -> str:
        if not self.stop:
            return text
        places = [(p, s) for p, s in ((text.find(s), s) for s in self.stop) if p >= 0]
        if places:
            place, self.stopped = min(places, key=lambda found: found[0])
            self.held = ""
            return text[:place]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
