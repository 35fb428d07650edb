"""The engine: requests in, pieces of answers out, a step at a time. Offline generation and the server both run it.

`add` a request, call `step` while `has_work`. A step is: plan (scheduler.py), guess (speculate.py), one forward
(runner.py), choose (sampling.py), and hand out what is new. A request's tokens and log-probabilities are the same alone
and in any company, bit for bit, with the CPU kernels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.common import PagodaError, free_memory, keep_heap
from pagoda.data.tokenizer import Tokenizer
from pagoda.engine import beam
from pagoda.engine.adapters import Adapters
from pagoda.engine.blocks import Blocks
from pagoda.engine.guided import Guides
from pagoda.engine.options import EngineOptions
from pagoda.engine.request import Group, Output, Request, Sequence, Text, TokenLogprob, check_tokens
from pagoda.engine.runner import Runner
from pagoda.engine.sampling import Chooser, choose, log_probabilities
from pagoda.engine.scheduler import Scheduler, Work
from pagoda.engine.speculate import DraftModel, PromptLookup
from pagoda.models.batch import Batch, Cache
from pagoda.models.gpt import GPT
from pagoda.ops.attention import preferred_page_size

Pieces = list[tuple[Group, Output]]
LONGEST_PAGE = 4096  # tokens, where a sequence gets one page of its own


@dataclass
class Timing:
    """Seconds and tokens: of steps that took in prompts, and of those that only decoded."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    outside: float = 0.0  # of all seconds, those outside the model

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{n} {what} tokens at {n / seconds:.1f} tokens/s"
            for n, what, seconds in (
                (self.prefill_tokens, "prompt", self.prefill_seconds),
                (self.decode_tokens, "new", self.decode_seconds),
            )
            if n and seconds  # a phase that was interrupted has no time
        ]
        return f"[{', '.join(parts)}]"


def step_tokens(device: torch.device, on_cpu: int) -> int:
    """Prompt tokens of a step that keep a device as busy as `on_cpu` of them a CPU."""
    return on_cpu if device.type == "cpu" else 8 * on_cpu


class Engine:
    """Runs requests together on one model. Without a tokenizer it gives token ids and no text."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        kv_dtype: torch.dtype | None = None,
        draft: GPT | None = None,
    ):
        options = options or EngineOptions()
        if not options.max_step_tokens:
            options = replace(options, max_step_tokens=step_tokens(model.device, 512))
        self.tokenizer, self.options = tokenizer, options
        self.kv_dtype, self.draft = kv_dtype or model.dtype, draft
        self.guides = Guides(tokenizer, model.config.vocab_size) if tokenizer else None
        self.numbers = self.new_tokens = self.prompt_tokens = 0
        self.groups: dict[Group, None] = {}  # in the order they came
        self.next_model: GPT | None = None
        self.lost: dict[str, str] = {}  # adapters that the new weights did not take, and why
        self.inboxes: dict[Group, list[Output]] = {}  # of those who stream: what another's step made for them
        self.lock = threading.RLock()  # between them
        self.timing = Timing()
        keep_heap()
        self._use(model)

    def _use(self, model: GPT) -> None:
        """Run this model from now on. Nothing is running."""
        self.model, self.changes, o = model, model.changes, self.options
        if self.draft is not None and self.draft.config.vocab_size != model.config.vocab_size:
            raise PagodaError("a draft model needs the vocabulary of the model that it guesses for")
        longest = model.config.block_size
        size = min(preferred_page_size(model.device, longest), LONGEST_PAGE)
        specs = model.cache_specs(), self.draft.cache_specs() if self.draft else []
        block_bytes = sum(spec.page_bytes(size, self.kv_dtype) for some in specs for spec in some)
        most = o.max_num_seqs * -(-longest // size)
        limit = int(o.kv_memory * 2**30) or free_memory(model.device) // 3
        blocks = Blocks(min(most, limit // block_bytes - 1), size)  # one more is for rows of nobody
        self.context = min(longest, blocks.n * size) - model.n_virtual
        self.short_of_memory = f" (of {longest}, for want of kv_memory)" if blocks.n * size < longest else ""
        if self.context < min(longest, 64) - model.n_virtual:
            raise PagodaError(f"kv_memory is too small: a block of {size} tokens takes {block_bytes / 2**20:.1f} MiB")
        rope = model.rope
        by_length = rope is not None and rope.by_length
        cache = Cache(specs[0], blocks.n + 1, size, self.kv_dtype, model.device)
        self.runner, self.caches = Runner(model, cache), [cache]
        beyond = rope.recompute_beyond if rope is not None else None
        caching = o.prefix_caching and not by_length and not model.n_virtual
        self.scheduler = Scheduler(blocks, o, model.n_virtual, beyond, caching)
        self.speculator = None
        if self.draft is not None:
            shadow = Cache(specs[1], blocks.n + 1, size, self.kv_dtype, model.device)
            self.speculator = DraftModel(Runner(self.draft, shadow))
            self.caches.append(shadow)
        elif o.speculate == "ngram":
            self.speculator = PromptLookup()
        if by_length or model.n_virtual:
            self.speculator = None  # where every token ahead would change the angles of all
        self.adapters = Adapters(model)

    # ------------------------------------------------------------------------------------------------- requests

    @property
    def has_work(self) -> bool:
        return bool(self.groups)

    def check(self, request: Request) -> None:
        """Raises PagodaError for what cannot be answered."""
        prompt, o = request.prompt, request.sampling
        if not prompt:
            raise PagodaError("the prompt is empty: give at least one token")
        if len(prompt) >= self.context:
            raise PagodaError(
                f"the prompt has {len(prompt)} tokens and the model's context is {self.context}"
                f"{self.short_of_memory}: shorten it to {self.context - 1} or less"
            )
        for ids, where in ((prompt, ""), (o.logit_bias, "logit_bias: "), (o.stop_token_ids, "stop_token_ids: ")):
            check_tokens(ids, self.model.config.vocab_size, where)
        if request.adapter is not None and request.adapter not in self.adapters.names:
            raise PagodaError(f"no adapter '{request.adapter}' is loaded")
        if o.guided is not None:
            if self.guides is None:
                raise PagodaError("guided output needs a tokenizer")
            self.guides.grammar(o.guided)
        each = self.scheduler.n_blocks(len(prompt) + self._most(request))
        if o.beam_width * each > self.scheduler.blocks.n:
            raise PagodaError(f"{o.beam_width} beams do not fit the key/value cache: fewer beams or tokens do")

    def add(self, request: Request) -> Group:
        self.check(request)
        group = Group(request, self.numbers, self._most(request))
        self.numbers += 1
        self._dress(group.sequences[0])
        self.groups[group] = None
        self.prompt_tokens += len(request.prompt)
        self.scheduler.add(group.sequences[0])
        for cache in self.caches:
            if not cache.in_huge_pages:
                cache.expect(self.scheduler.n_tokens)
        return group

    def abort(self, group: Group) -> None:
        """Nobody waits for it any more: it ends, and its blocks are free at once."""
        for s in group.live:
            s.finish_reason = "abort"
            self.scheduler.remove(s)
        self.groups.pop(group, None)

    def _most(self, request: Request) -> int:
        return min(request.sampling.max_new_tokens, self.context - len(request.prompt))

    def _dress(self, s: Sequence) -> None:
        """What a sequence needs to choose and to speak."""
        o, request = s.group.request.sampling, s.group.request
        guide = self.guides.guide(o.guided) if o.guided is not None else None
        ends = [*self._ends(o), *o.stop_token_ids]
        s.chooser = Chooser(o, request.prompt, self.model.config.vocab_size, s.index, ends, guide)
        s.text = self.text(s.group)

    def text(self, group: Group) -> Text | None:
        o = group.request.sampling
        return Text(self.tokenizer, o.stop, o.min_new_tokens) if self.tokenizer else None

    def _ends(self, options) -> list[int]:
        return [] if options.ignore_eos or self.tokenizer is None else self.tokenizer.eos_ids

    # ----------------------------------------------------------------------------------------------------- step

    def step(self) -> Pieces:
        """One forward for everybody: what is new of each answer."""
        start = time.perf_counter()
        if self.next_model is not None and not any(g.started for g in self.groups):
            self._replace()
        if self.lost:
            return self._tell_lost()
        if self.changes != self.model.changes:  # somebody has put on an adapter: nothing that is remembered holds
            self.changes = self.model.changes
            self.runner.decoders.clear()
            self.scheduler.blocks.clear()
        works = self.scheduler.plan(self.options.n_draft if self.speculator else 0)
        if not works:
            return []
        self.runner.copy(self.scheduler.copies)
        if isinstance(self.speculator, DraftModel):
            self.speculator.runner.copy(self.scheduler.copies)
        if self.speculator is not None:
            self.speculator.guess(works)
        rows = []  # where each work's scores begin
        for work in works:
            if work.drafts:
                work.scored = 1 + len(work.drafts)
            rows.append(rows[-1] + works[len(rows) - 1].scored if rows else 0)
        prompts = sum(w.n for w in works if w.sequence.cached < w.sequence.n_prompt)
        before = time.perf_counter()
        worn = self.adapters.wear([(w.sequence.group.request.adapter, len(w.tokens)) for w in works])
        draws = None if worn or self.speculator is not None else self._draws(works)
        logits = self.runner.run(works, record=not worn, draws=draws)
        model_seconds = time.perf_counter() - before
        with torch.inference_mode():
            pieces = self._advance(works, rows, logits, draws)
        t, seconds = self.timing, time.perf_counter() - start
        t.outside += seconds - model_seconds
        if prompts:
            t.prefill_tokens, t.prefill_seconds = t.prefill_tokens + prompts, t.prefill_seconds + seconds
        else:
            t.decode_tokens, t.decode_seconds = t.decode_tokens + sum(w.n for w in works), t.decode_seconds + seconds
        return pieces

    def _draws(self, works: list[Work]) -> list[tuple[float, ...]] | None:
        """How all choose, if they only decode and choose by the scores as they are: then a step can do it by itself."""
        for s in (w.sequence for w in works):
            if not s.decoding or s.chooser.adjusts or s.group.request.sampling.beam_width:
                return None
        return [w.sequence.chooser.draw() for w in works]

    def _advance(
        self, works: list[Work], rows: list[int], logits: Tensor, draws: list[tuple[float, ...]] | None = None
    ) -> Pieces:
        asks: list[tuple[Sequence, int, list[int]]] = []  # who chooses, from which row on, and the guesses
        pieces: Pieces = []
        beams: dict[Group, list[tuple[Sequence, int]]] = {}
        forks = []
        for work, row in zip(works, rows):
            s, o = work.sequence, work.sequence.group.request.sampling
            if work.scored == work.n and s.cached < s.n_prompt and o.prompt_logprobs is not None:
                self._score_prompt(work, logits[row : row + work.scored])
                row += work.scored - 1
            if s.cached + work.n < len(s.tokens) or not work.scored:
                continue
            if o.beam_width:
                beams.setdefault(s.group, []).append((s, row))
                continue
            asks.append((s, row, work.drafts))
            if len(s.group.sequences) < o.answers:
                forks.append((s, row))
        chosen: dict[Sequence, list[int]] = {}
        for s, row in forks:  # the answers part where the prompt ends; they share what is in the cache by then
            work = next(w for w in works if w.sequence is s)
            s.cached += work.n
            for index in range(1, s.group.request.sampling.answers):
                other = self.scheduler.fork(s, index)
                self._dress(other)
                s.group.sequences.append(other)
                asks.append((other, row, []))
            s.cached -= work.n
        logprobs = self._choose(asks, logits, chosen, draws)
        for work in works:
            if work.drafts:
                work.n = len(chosen[work.sequence])
        if self.speculator is not None:
            self.speculator.seen(works)
        for work in works:
            self.scheduler.done(work)
        for s, _, _ in asks:
            pieces += self._take(s, chosen[s], logprobs.get(s, []))
        for group, live in beams.items():
            pieces += beam.advance(self, group, [s for s, _ in live], logits[[row for _, row in live]])
        return pieces

    def _choose(
        self,
        asks: list[tuple[Sequence, int, list[int]]],
        logits: Tensor,
        chosen: dict[Sequence, list[int]],
        draws: list[tuple[float, ...]] | None,
    ) -> dict[Sequence, list[TokenLogprob]]:
        """Each one's next token, and those behind it as long as they are what was guessed."""
        told: dict[Sequence, list[TokenLogprob]] = {}
        place = 0
        while asks:
            rows = [row + place for _, row, _ in asks]
            some = logits if rows == list(range(len(logits))) else logits[torch.tensor(rows, device=logits.device)]
            tokens = choose(some, [s.chooser for s, _, _ in asks], draws, self.runner.chosen)
            tops = [logprobs_wanted(s) for s, _, _ in asks]
            wanted = [i for i, top in enumerate(tops) if top is not None]
            if wanted:
                scores = some if len(wanted) == len(asks) else some[torch.tensor(wanted, device=some.device)]
                found = log_probabilities(scores, [tokens[i] for i in wanted], [tops[i] for i in wanted])
                for i, logprob in zip(wanted, found):
                    told.setdefault(asks[i][0], []).append(logprob)
            going = []
            for ask, token in zip(asks, tokens):
                s, _, drafts = ask
                chosen.setdefault(s, []).append(token)
                o = s.chooser.options
                over = s.chooser.failed or s.chooser.ended or token in o.stop_token_ids or token in self._ends(o)
                if place < len(drafts) and drafts[place] == token and not over:
                    going.append(ask)
            asks, place = going, place + 1
        return told

    def _take(self, s: Sequence, tokens: list[int], logprobs: list[TokenLogprob]) -> Pieces:
        """The sequence goes on by these tokens: what there is to tell."""
        o, group, out = s.group.request.sampling, s.group, Output(s.index)
        if s.chooser.failed:
            return self._finish(s, replace(out, error=s.chooser.failed), "error")
        for i, token in enumerate(tokens):
            if i < len(logprobs):
                s.logprob += logprobs[i].logprob
            ends = token in self._ends(o)
            if ends or token in o.stop_token_ids:
                out.stop_reason = None if ends else token
                return self._finish(s, out, "stop")
            s.tokens.append(token)
            self.new_tokens += 1
            out.token_ids.append(token)
            out.logprobs += logprobs[i : i + 1] if o.logprobs is not None else []
            out.text += s.text.push(token) if s.text else ""
            if s.text and s.text.stopped is not None:
                out.stop_reason = s.text.stopped
                return self._finish(s, out, "stop")
            if s.chooser.ended and i == len(tokens) - 1:  # it has seen them all
                return self._finish(s, out, "stop")
            if len(s.tokens) - s.n_prompt >= group.most:
                return self._finish(s, out, "length")
        return self._tell(group, out)

    def _finish(self, s: Sequence, out: Output, reason: str) -> Pieces:
        if s.text and s.text.stopped is None:
            out.text += s.text.flush()
            if s.text.stopped is not None:  # it stood in what was held back
                out.stop_reason, reason = s.text.stopped, "stop"
        s.finish_reason = out.finish_reason = reason
        self.scheduler.remove(s)
        pieces = self._tell(s.group, out)
        if not s.group.live:
            self.groups.pop(s.group, None)
        return pieces

    def _tell(self, group: Group, out: Output) -> Pieces:
        """The piece, with what goes along with a request's first; with best_of all in the end, the best first."""
        o = group.request.sampling
        if o.best_of <= o.n:
            if not group.told:
                group.told = True
                out.prompt_logprobs, out.cached_tokens = group.prompt_logprobs, group.cached_tokens
            return [(group, out)]
        held = group.held.setdefault(out.index, Output(out.index))
        held.text, held.token_ids, held.logprobs = (
            held.text + out.text,
            held.token_ids + out.token_ids,
            held.logprobs + out.logprobs,
        )
        held.finish_reason, held.stop_reason, held.error = out.finish_reason, out.stop_reason, out.error
        if group.live:
            return []
        ranked = sorted(group.sequences, key=lambda s: -s.logprob / max(len(s.new), 1))
        best = [replace(group.held[s.index], index=i) for i, s in enumerate(ranked[: o.n])]
        best[0].prompt_logprobs, best[0].cached_tokens = group.prompt_logprobs, group.cached_tokens
        return [(group, piece) for piece in best]

    def _score_prompt(self, work: Work, logits: Tensor) -> None:
        """The log-probabilities of the prompt's tokens in this piece: row i scores the token behind it."""
        s, top = work.sequence, work.sequence.group.request.sampling.prompt_logprobs
        told = s.group.prompt_logprobs = s.group.prompt_logprobs or [None]
        following = s.tokens[s.cached + 1 : min(s.cached + work.n + 1, s.n_prompt)]
        for i in range(len(told) - s.cached - 1, len(following), 64):  # a few rows of the vocabulary at a time
            some = following[i : i + 64]
            told += log_probabilities(logits[i : i + len(some)], some, [top] * len(some))

    # ---------------------------------------------------------------------------------------- everything besides

    @torch.inference_mode()
    def embed(self, prompts: list[list[int]], pooling: str = "mean") -> Tensor:
        """(n, n_embd) float32 of length 1: the mean of each text's last hidden states, or the last of them."""
        for p in prompts:
            self.check(Request(p))
        self.adapters.wear([])
        batch = Batch.of([len(p) for p in prompts], self.model.device)
        x = self.model.hidden(torch.tensor([t for p in prompts for t in p], device=self.model.device), batch).float()
        parts = x.split([len(p) for p in prompts])
        pooled = torch.stack([p.mean(0) if pooling == "mean" else p[-1] for p in parts])
        return F.normalize(pooled, dim=-1).cpu()

    def load_adapter(self, name: str, path) -> None:
        """Take up an adapter, in place of one of that name. Raises PagodaError while requests for that run."""
        self._unused(name)
        self.adapters.load(name, path)
        self.lost.pop(name, None)
        self.scheduler.blocks.clear()

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter, and what the cache holds of it. Raises PagodaError while requests for it run."""
        self._unused(name)
        self.adapters.drop(name)
        self.scheduler.blocks.clear()

    def _unused(self, name: str) -> None:
        if any(g.request.adapter == name for g in self.groups):
            raise PagodaError(f"adapter '{name}' is in use: wait until its requests have ended")

    def replace(self, model: GPT) -> None:
        """Go over to other weights: what runs is finished on the old ones, what comes waits for the new ones."""
        self.next_model = model
        self.scheduler.admitting = False
        if not any(g.started for g in self.groups):
            self._replace()

    def _replace(self) -> None:
        paths, before, old = self.adapters.paths, self.scheduler, self.model
        model, self.next_model = self.next_model, None
        try:
            self._use(model)
        except BaseException:
            self.model, before.admitting = old, True
            raise
        for count in ("preemptions", "query_tokens", "hit_tokens"):
            setattr(self.scheduler, count, getattr(before, count))
        for s in before.waiting:
            self.scheduler.add(s)
        for name, path in paths.items():
            try:
                self.adapters.load(name, path)
            except (PagodaError, OSError) as e:
                self.lost[name] = f"adapter '{name}' does not go on the new weights: {e}"

    def _tell_lost(self) -> Pieces:
        """Who waits for an adapter that the new weights do not have ends."""
        lost, self.lost, pieces = self.lost, {}, []
        for group in [g for g in self.groups if g.request.adapter in lost]:
            self.abort(group)
            error, n = lost[group.request.adapter], group.request.sampling.n
            pieces += [(group, Output(i, finish_reason="error", error=error)) for i in range(n)]
        return pieces

    def run(self, requests: list[Request], each: Callable[[int, Output], None]) -> None:
        """All requests to their end; each(i, piece) gets what is new of request i."""
        for i, piece in self.stream(requests):
            each(i, piece)

    def stream(self, requests: list[Request]) -> Iterator[tuple[int, Output]]:
        """All requests to their end: (i, piece) is what is new of request i. Whoever stops listening ends them. Several
        may be open at once, in several threads too: whose turn it is makes a step for all."""
        groups: dict[Group, int] = {}
        try:
            for i, request in enumerate(requests):
                with self.lock:
                    group = self.add(request)
                    groups[group], self.inboxes[group] = i, []
            going = True
            while going:
                with self.lock:
                    if not any(self.inboxes[g] for g in groups):
                        for group, piece in self.step():
                            if group in self.inboxes:
                                self.inboxes[group].append(piece)
                    found = [(i, piece) for g, i in groups.items() for piece in self.inboxes[g]]
                    for group in groups:
                        self.inboxes[group].clear()
                    going = any(g in self.groups for g in groups)
                yield from found
        finally:
            with self.lock:
                for group in groups:
                    self.abort(group)
                    self.inboxes.pop(group, None)

    def stats(self) -> dict[str, int | float]:
        """Counts since the start, and how things stand."""
        scheduler = self.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_blocks_used": scheduler.blocks.used,
            "kv_blocks_total": scheduler.blocks.n,
            "prefix_query_tokens": scheduler.query_tokens,
            "prefix_hit_tokens": scheduler.hit_tokens,
            "preemptions": scheduler.preemptions,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
        }


def logprobs_wanted(s: Sequence) -> int | None:
    """How many of the likeliest tokens to report beside each; None to report nothing."""
    o = s.group.request.sampling
    return 0 if o.logprobs is None and o.best_of > o.n else o.logprobs
