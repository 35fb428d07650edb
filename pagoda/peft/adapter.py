"""Adapters: small trainable parts that any model can wear, whatever the format of its weights.

`attach(model, options)` freezes the base and puts a method on: the model is the same object, its base keeps its names
and its bits. A method is one file beside this one with a subclass of `Method`, which says all that a training loop and
a file need to know: `attach`, `named`, `lr_scale`, `extra_loss`, `after_step`, `merge`, `config`. What finds a layer
uses the names of transformers' modules, translated through the family's table, so that files fit PEFT's (files.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pagoda.common import PagodaError, did_you_mean
from pagoda.models.gpt import GPT
from pagoda.models.layers import Linear, MoE, dense, set_weight
from pagoda.ops.linear import linear
from pagoda.peft.options import Options

PREFIX = "base_model.model."  # of every name in PEFT's files


class Method:
    """One method on one model. Subclasses give it parts; names are those of the file, without PREFIX."""

    mergeable = False
    prefix = PREFIX  # of its names in the file

    def __init__(self, model: GPT, options: Options):
        self.model, self.options = model, options

    def attach(self, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> None:
        """Make the parameters, trainable; `tensors` is what a file holds, where one says which layers and shapes."""
        raise NotImplementedError

    def named(self) -> dict[str, Tensor]:
        """The trainable parameters by their name in the file."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What the file holds; the names get `prefix`."""
        return {name: p.detach() for name, p in self.named().items()}

    def config(self) -> dict[str, Any]:
        """What adapter_config.json says besides the type: the options, by PEFT's names."""
        theirs = self.options.names_in_peft()
        return {theirs.get(name, name): value for name, value in vars(self.options).items()}

    @classmethod
    def read(cls, kind: type[Options], config: dict[str, Any]) -> Options:
        """The options that an adapter_config.json stands for. KeyError where one of PEFT's is absent and not off by
        default."""
        values, theirs = {}, kind.names_in_peft()
        for field in fields(kind):
            name = theirs.get(field.name, field.name)
            value = config.get(name)
            if value is None and field.default and field.name in theirs:
                raise KeyError(name)
            if value is not None:
                values[field.name] = ",".join(value) if isinstance(value, list) else value
        return kind(**values)

    def lr_scale(self, name: str) -> float:
        """Its part of what `lr_scale` below says of a parameter."""
        return 1.0

    def extra_loss(self) -> Tensor | float:
        """Added to the mean loss of a step."""
        return 0.0

    def after_step(self, step: int) -> None:
        """Called behind the optimizer's step, gradients still in place; step counts from 0."""

    def memory(self) -> dict[str, Tensor]:
        """What it remembers between steps besides its parameters, for `progress`."""
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Take up what `memory` gave."""

    def merge(self) -> None:
        """Fold the method into the weights and take it off."""
        raise PagodaError(f"{self.options.peft_type} cannot be merged into the weights: keep the adapter beside them")


class LinearMethod(Method):
    """A method that replaces linear layers by kinds of `Worn`."""

    mergeable = True

    def __init__(self, model: GPT, options: Options):
        super().__init__(model, options)
        self.layers: dict[str, Worn] = {}  # by transformers' names

    def wear(self, names: Iterable[str], make: Callable[[str, Linear], Worn]) -> None:
        """Put `make(name, layer)` in the place of every layer that transformers calls so."""
        paths = linears(self.model)
        for name in names:
            if name not in paths:
                family = type(self.model).__name__
                if name == hf_name(self.model, "head"):
                    raise PagodaError(f"the head ({name}) of this {family} wears no adapter: give it other targets")
                raise PagodaError(f"an adapter for another model: this {family} has no layer {name}")
            parent, _, leaf = paths[name].rpartition(".")
            parent = self.model.get_submodule(parent)
            self.layers[name] = make(name, getattr(parent, leaf))
            setattr(parent, leaf, self.layers[name])

    def config(self) -> dict[str, Any]:
        names = list(self.layers)
        transposed = any(linears(self.model)[n].endswith(self.model.transposed) for n in names)
        own = {"target_modules": shortest(self.model, names), "fan_in_fan_out": transposed}  # as GPT-2 keeps weights
        return {**super().config(), **own}

    def named(self) -> dict[str, Tensor]:
        return {f"{name}.{leaf}": p for name, layer in self.layers.items() for leaf, p in layer.own().items()}

    @torch.no_grad()
    def merge(self) -> None:
        paths = linears(self.model)
        for name, layer in self.layers.items():
            parent, _, leaf = paths[name].rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer.plain())


class Worn(Linear):
    """A Linear with something over it; its weight and bias stay under their names."""

    def __init__(self, base: Linear):
        nn.Module.__init__(self)
        if isinstance(base, Worn):
            raise PagodaError("two of these methods want the same linear layer: give them different targets")
        self.n_in, self.n_out = base.n_in, base.n_out
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def own(self) -> dict[str, Tensor]:
        """What is over it, by the name in a file."""
        raise NotImplementedError

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias, float32, of a Linear that does the same."""
        raise NotImplementedError

    def plain(self) -> Linear:
        """A Linear that does the same; a packed weight becomes a plain one."""
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.detach().float()
        weight, bias = self.fold(dense(self.weight, torch.float32).float(), bias)
        with torch.device("meta"):
            layer = Linear(self.n_in, self.n_out)
        set_weight(layer, "weight", nn.Parameter(weight.to(dtype), requires_grad=False))
        layer.bias = None if bias is None else nn.Parameter(bias.to(self.bias.dtype), requires_grad=False)
        return layer.train(self.training)


def adapters(model: GPT) -> list[Method]:
    """The methods that a model wears, in the order they were put on."""
    return model.__dict__.setdefault("adapters", [])


def attach(
    model: GPT,
    options: Options | Iterable[Options],
    total_steps: int = 0,
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """Put a method on a model, or several; the base is frozen. Returns the model.

    total_steps: of the run, for what follows a schedule (AdaLoRA). dtype: of the parameters; where they are used they
    are cast to the stream's type. Raises PagodaError where the family cannot wear the method.
    """
    for one in [options] if isinstance(options, Options) else options:
        one = replace(one)
        if getattr(one, "total_steps", None) == 0:
            one.total_steps = total_steps
        put_on(model, one, dtype, None)
    return model


def put_on(model: GPT, options: Options, dtype: torch.dtype, tensors: dict[str, Tensor] | None) -> Method:
    if not adapters(model):
        model.requires_grad_(False)
    method = code_of(options)(model, options)
    method.attach(dtype, tensors)
    adapters(model).append(method)
    model.changes += 1
    return method


def code_of(options: Options | type[Options]) -> type[Method]:
    """The class of the method that options belong to."""
    return getattr(import_module(f"pagoda.peft.{options.module}"), options.kind)


def merge(model: GPT) -> GPT:
    """Fold all adapters into the weights, and take them off. A packed weight that changes becomes a plain one.

    Returns the model. Raises PagodaError, with the model as it was, where a method cannot be folded.
    """
    for method in adapters(model):
        if not method.mergeable:
            method.merge()
    for method in reversed(adapters(model)):
        method.merge()
    adapters(model).clear()
    model.changes += 1
    return model


@torch.no_grad()
def merge_and_compare(model: GPT) -> tuple[float, float]:
    """`merge`, and what it costs: the mean change of a logit over some tokens, and the mean size of a logit. Beyond
    float32's rounding there is a change where weights are narrower: the merged ones are rounded once more."""
    n = min(64, model.config.block_size - model.n_virtual)
    tokens = torch.arange(n, device=model.device) * 7919 % model.config.vocab_size
    before = model(tokens).float()
    after = merge(model)(tokens).float()
    return (after - before).abs().mean().item(), before.abs().mean().item()


def trainable_parameters(model: GPT) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of what trains."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def lr_scale(model: GPT, name: str) -> float:
    """What a parameter's learning rate is multiplied by; name as in `model.named_parameters()`."""
    return math.prod(method.lr_scale(name) for method in adapters(model))


def extra_loss(model: GPT) -> Tensor | float:
    """What the methods add to the mean loss of a step."""
    return sum(method.extra_loss() for method in adapters(model))


def after_step(model: GPT, step: int) -> None:
    """To be called behind the optimizer's step and before the gradients are cleared; step counts from 0."""
    for method in adapters(model):
        method.after_step(step)


def progress(model: GPT) -> dict[str, Tensor]:
    """What a run needs to go on exactly: the trainable parameters, and what the methods remember. (An adapter's files
    may hold less: AdaLoRA's only the ranks that are left.)"""
    found = {name: p.detach() for name, p in trainable_parameters(model)}
    for i, method in enumerate(adapters(model)):
        found |= {f"{i}:{name}": t for name, t in method.memory().items()}
    return found


@torch.no_grad()
def restore(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Take up what `progress` gave, on a model that wears the same methods."""
    for name, p in trainable_parameters(model):
        p.copy_(tensors[name])
    for i, method in enumerate(adapters(model)):
        method.remember({n.partition(":")[2]: t for n, t in tensors.items() if n.startswith(f"{i}:")})


# Names


def hf_name(model: GPT, path: str) -> str:
    """What transformers calls our module: `layers.3.attn.q_proj` is `model.layers.3.self_attn.q_proj` in Llama. Empty
    for what no checkpoint has."""
    pattern, numbers = re.sub(r"\.\d+(?=\.)", ".{}", path, count=1), re.findall(r"\.(\d+)\.", path)[:1]
    return model.names.get(pattern, "").format(*numbers)


def linears(model: GPT) -> dict[str, str]:
    """Transformers' names of the linear layers that can wear something (no head, no router), and ours."""
    routers = {m.router for m in model.modules() if isinstance(m, MoE)}
    return {
        hf_name(model, path): path
        for path, m in model.named_modules()
        if isinstance(m, Linear) and m is not model.head and m not in routers
    }


def matching(model: GPT, targets: str) -> list[str]:
    """The linear layers that targets mean (see options.LoRA), by transformers' names, in the model's order."""
    known = list(linears(model))
    chosen: set[str] = set()
    for target in (t.strip() for t in targets.split(",")):
        found = known if target == "all-linear" else [n for n in known if matches(target, n)]
        if not found:
            leaves = list(dict.fromkeys(n.rpartition(".")[2] for n in known))
            close = did_you_mean(target, leaves)
            raise PagodaError(f"no linear layer matches '{target}'{close}; there are {', '.join(leaves)}")
        chosen.update(found)
    return [n for n in known if n in chosen]


def matches(target: str, name: str) -> bool:
    """Whether a target is a name, the end of one, or a pattern of all of it, as in PEFT."""
    try:
        return name == target or name.endswith(f".{target}") or re.fullmatch(target, name) is not None
    except re.error as e:
        raise PagodaError(f"'{target}' is not a regular expression: {e}") from None


def shortest(model: GPT, names: list[str]) -> list[str]:
    """How adapter_config.json names these layers: by the ends of their names where those mean no other layer."""
    ends = sorted({n.rpartition(".")[2] for n in names})
    return ends if set(matching(model, ",".join(ends))) == set(names) else sorted(names)
