"""Guided output: at every token, which ones can still lead to what was asked for. The package `llguidance` knows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagoda.common import PagodaError, optional
from pagoda.data.tokenizer import Tokenizer
from pagoda.engine.options import Guided

ANY_OBJECT = {"type": "object"}
# As json.dumps writes it. Where any space is allowed a small model may write nothing else until its tokens are spent.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Guides:
    """Makes guides for one tokenizer. The package reads its vocabulary once, when the first guide is asked for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size, self.vocabulary = tokenizer, vocab_size, None

    def grammar(self, guided: Guided) -> str:
        """What was asked for, in the package's terms. Raises PagodaError for a schema or pattern without sense."""
        guidance = optional("llguidance", "serve")
        if self.vocabulary is None:
            text = self.tokenizer.backend.to_str()
            self.vocabulary = guidance.LLTokenizer(text, n_vocab=self.vocab_size, eos_token=self.tokenizer.eos_ids)
        matcher = guidance.LLMatcher
        try:
            if guided.any_json or guided.json is not None:
                schema = ANY_OBJECT if guided.any_json else guided.json
                kind = "json"
                text = schema if isinstance(schema, str) else json.dumps(schema)
                grammar = matcher.grammar_from_json_schema(text, defaults=SPACES)
            elif guided.regex is not None:
                kind, grammar = "regex", matcher.grammar_from_regex(guided.regex)
            elif guided.choice is not None:
                if not all(isinstance(text, str) and text for text in guided.choice):
                    raise PagodaError("guided choice takes texts that are not empty")
                choices = " | ".join(json.dumps(text) for text in guided.choice)
                kind, grammar = "choice", matcher.grammar_from_lark(f"start: {choices}")
            else:
                kind, grammar = "grammar", matcher.grammar_from_lark(guided.grammar)
            problem = matcher.validate_grammar(grammar, self.vocabulary)
        except (ValueError, TypeError) as e:
            problem, kind = str(e), "output"
        if problem:
            raise PagodaError(f"the guided {kind} makes no sense: {' '.join(problem.split())[:300]}")
        return grammar

    def guide(self, guided: Guided) -> Guide:
        grammar = self.grammar(guided)
        return Guide(optional("llguidance", "serve").LLMatcher(self.vocabulary, grammar))


class Guide:
    """Follows one answer."""

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def mask(self, scores: Tensor) -> None:
        """Forbid, in place, what cannot come next: scores (vocab_size,)."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, count=len(scores), bitorder="little"))
        scores.masked_fill_(allowed == 0, float("-inf"))

    def accept(self, token: int) -> None:
        if not self.matcher.consume_token(token):
            raise PagodaError(f"the guide lost its way: {self.matcher.get_error() or 'an impossible token'}")

    @property
    def finished(self) -> bool:
        """Whether nothing but the end can follow."""
        return self.matcher.is_stopped()
