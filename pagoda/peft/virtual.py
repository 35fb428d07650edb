"""Virtual tokens before every sequence: prompt tuning, P-Tuning, prefix tuning, P-Tuning v2.

`GPT.hidden` hands the stream to a `Virtual`, which puts its n tokens before every sequence that starts. They count as
positions, as in PEFT. A prompt gives them embeddings (prompt tuning, Lester et al. 2021; P-Tuning, Liu et al. 2021,
makes those by an encoder). A prefix gives them keys and values in every layer (Li & Liang 2021; P-Tuning v2, Liu et al.
2021), so that what else flows through their places is of no consequence. With a cache, whoever owns its pages leaves
room for `n_virtual` tokens before each sequence and counts them as past; a sequence starts where only they are past.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.common import PagodaError
from pagoda.models.batch import Batch, VirtualKV
from pagoda.models.gpt import GPT
from pagoda.peft import adapter
from pagoda.peft.options import Prefix, Prompt, PTuning

EMBEDDINGS = "prompt_embeddings"  # the one tensor in PEFT's files


class Virtual(nn.Module):
    """n virtual tokens. What `made` gives are their embeddings (n, n_embd), or with a `shape` a prefix's keys and
    values: (n, n_layer, 2, n_kv_head, head_size)."""

    def __init__(self, n: int, shape: tuple[int, ...] | None):
        super().__init__()
        self.n, self.shape = n, shape

    def made(self) -> Tensor:
        """(n, width)"""
        raise NotImplementedError

    def forward(self, model: GPT, tokens: Tensor, batch: Batch) -> tuple[Tensor, Batch, Tensor]:
        """The stream with the virtual tokens in it: embeddings, its batch, and where the real tokens are."""
        x = tokens if tokens.is_floating_point() else model.embed(tokens)
        longer, order = lengthen(batch, self.n)
        made, real = self.made(), order >= self.n
        if self.shape is None:
            before = made.to(x.dtype)
        else:
            before, rows = x.new_zeros(self.n, x.shape[1]), (~real).nonzero()[:, 0]
            layers = made.view(self.shape).to(model.compute_dtype or x.dtype)[order[rows]].unbind(1)
            longer.virtual = VirtualKV(rows, [(kv[:, 0], kv[:, 1]) for kv in layers])
        return torch.cat([before, x])[order], longer, real.nonzero()[:, 0]


def lengthen(batch: Batch, n: int) -> tuple[Batch, Tensor]:
    """The batch with n tokens before every sequence that starts, and for each of its tokens where it comes from: 0 to
    n - 1 is a virtual one, n + i the i-th of the stream."""
    bounds = batch.cu_seqlens.tolist()
    past = [t - (b - a) for t, a, b in zip(batch.seq_lens.tolist(), bounds, bounds[1:])]
    begins = 0 if batch.cache is None else n  # what is past where a sequence starts
    starts = [p == begins and b > a for p, a, b in zip(past, bounds, bounds[1:])]
    device = batch.positions.device
    order, slots = [], []
    for s, (start, a, b) in enumerate(zip(starts, bounds, bounds[1:])):
        if start:
            order.append(torch.arange(n, device=device))
            if batch.cache is not None:
                where, size = order[-1], batch.cache.page_size
                slots.append(batch.block_table[s, where // size] * size + where % size)
        order.append(torch.arange(n + a, n + b, device=device))
        if batch.cache is not None:
            slots.append(batch.slots[a:b])
    longer = Batch.of(
        [b - a + n * start for start, a, b in zip(starts, bounds, bounds[1:])],
        device,
        [p - begins * start for start, p in zip(starts, past)],
        cache=batch.cache,
        slots=torch.cat(slots).long() if slots else None,
        block_table=batch.block_table,
    )
    if batch.scaling_lens is not None:
        longer = replace(longer, scaling_lens=batch.scaling_lens + (n if batch.cache is None else 0))
    return longer, torch.cat(order)


class Plain(Virtual):
    """The parameters themselves."""

    def __init__(self, weight: Tensor, shape: tuple[int, ...] | None = None):
        super().__init__(len(weight), shape)
        self.prompt_embeddings = nn.Parameter(weight)

    def made(self) -> Tensor:
        return self.prompt_embeddings


class Encoded(Virtual):
    """Made by a network from embeddings of its own; modules and names are those of PEFT's encoders."""

    def __init__(self, n: int, width: int, head: nn.Module, lstm: nn.LSTM | None, shape: tuple[int, ...] | None = None):
        super().__init__(n, shape)
        self.embedding = nn.Embedding(n, width)
        if lstm is not None:
            self.lstm_head = lstm
        self.add_module("mlp_head" if shape is None else "transform", head)

    def made(self) -> Tensor:
        x = self.embedding.weight
        if hasattr(self, "lstm_head"):
            x = self.lstm_head(x[None])[0][0]
        return (self.mlp_head if self.shape is None else self.transform)(x)


class VirtualMethod(adapter.Method):
    """What the four have in common; each makes its own `Virtual`."""

    prefix = ""

    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        model = self.model
        if model.virtual is not None:
            raise PagodaError("a model can wear one method of virtual tokens (prefix, prompt, p_tuning), not two")
        if model.embed.weight.shape[1] != model.config.n_embd:
            raise PagodaError(
                f"virtual tokens do not fit this {type(model).__name__}: its embedding is narrower than its stream; "
                "use lora"
            )
        plain = tensors is not None and not any(name.startswith("encoder.") for name in tensors)
        virtual = self.plain() if plain else self.make()
        model.virtual = virtual.to(model.device, dtype).train(model.training)

    def make(self) -> Virtual:
        raise NotImplementedError

    def plain(self) -> Virtual:
        return Plain(torch.randn(self.options.n_virtual, self.model.config.n_embd))

    def named(self) -> dict[str, Tensor]:
        start = "" if isinstance(self.model.virtual, Plain) else "encoder."
        return {f"{start}{name}": p for name, p in self.model.virtual.named_parameters()}

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """PEFT's one tensor, and for going on training the encoder behind it, which PEFT passes over."""
        return {**super().state(), EMBEDDINGS: self.model.virtual.made().detach()}

    def config(self) -> dict[str, Any]:
        c = self.model.config
        sizes = {"num_layers": c.n_layer, "num_attention_heads": c.n_head, "token_dim": c.n_embd}
        return {**super().config(), **sizes, "num_transformer_submodules": 1}


class PromptMethod(VirtualMethod):
    def make(self) -> Virtual:
        o: Prompt = self.options
        if o.init == "random":
            return self.plain()
        ids = torch.randint(self.model.config.vocab_size, (o.n_virtual,))
        return Plain(self.model.embed(ids.to(self.model.device)).detach().float())

    def config(self) -> dict[str, Any]:
        return {**super().config(), "prompt_tuning_init": "RANDOM"}  # our names of it mean nothing to PEFT

    @classmethod
    def read(cls, kind: type[Prompt], config: dict[str, Any]) -> Prompt:
        return kind(config["num_virtual_tokens"])


class PTuningMethod(VirtualMethod):
    def make(self) -> Virtual:
        o: PTuning = self.options
        width = self.model.config.n_embd
        hidden = o.hidden or width
        if o.encoder == "mlp":
            head = mlp(width, hidden, hidden, width)
            return Encoded(o.n_virtual, width, head, None)
        lstm = nn.LSTM(width, hidden, o.layers, dropout=o.dropout, bidirectional=True, batch_first=True)
        return Encoded(o.n_virtual, width, mlp(2 * hidden, 2 * hidden, width), lstm)

    def config(self) -> dict[str, Any]:
        o: PTuning = self.options
        own = {"encoder_reparameterization_type": o.encoder.upper()}
        return {**super().config(), **own, "encoder_hidden_size": o.hidden or self.model.config.n_embd}

    @classmethod
    def read(cls, kind: type[PTuning], config: dict[str, Any]) -> PTuning:
        return super().read(kind, {k: v.lower() if k.endswith("_type") else v for k, v in config.items()})


class PrefixMethod(VirtualMethod):
    @property
    def shape(self) -> tuple[int, ...]:
        """(n, n_layer, 2, n_kv_head, head_size)"""
        c = self.model.config
        return self.options.n_virtual, c.n_layer, 2, c.n_kv_head, c.head_size

    def plain(self) -> Virtual:
        return Plain(torch.randn(self.options.n_virtual, self.width * 2 * self.model.config.n_layer), self.shape)

    @property
    def width(self) -> int:
        return self.model.config.n_kv_head * self.model.config.head_size

    def make(self) -> Virtual:
        o: Prefix = self.options
        if not o.projection:
            return self.plain()
        width, hidden = self.width, o.hidden or self.width
        head = nn.Sequential(
            nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width * 2 * self.model.config.n_layer)
        )
        return Encoded(o.n_virtual, width, head, None, self.shape)

    def config(self) -> dict[str, Any]:
        heads = {"num_attention_heads": self.model.config.n_kv_head, "token_dim": self.width}
        return {**super().config(), **heads, "encoder_hidden_size": self.options.hidden or self.width}


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths, widths[1:]):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
