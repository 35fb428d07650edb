"""Which families there are, and which known model a name means."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from pagoda.common import PagodaError, did_you_mean
from pagoda.models.config import Config
from pagoda.models.gpt import GPT
from pagoda.models.rope import Rope

# One module per family (or close kin); importing them is what makes them known.
MODULES = ("llama", "mixtral", "qwen", "gpt_neox", "gpt2", "phi", "phi3", "gemma", "bloom", "falcon", "opt")


@cache
def families() -> list[type[GPT]]:
    """Every family, in the order of MODULES."""
    found = []
    for name in MODULES:
        module = importlib.import_module(f"pagoda.models.{name}")
        found += [
            c
            for c in vars(module).values()
            if isinstance(c, type) and issubclass(c, GPT) and c.model_types and c.__module__ == module.__name__
        ]
    return found


def family_of(hf: dict[str, Any], where: str = "config.json") -> type[GPT]:
    """The family that a Hugging Face configuration belongs to, by `model_type`, else by `architectures`."""
    for family in families():
        if hf.get("model_type") in family.model_types or (
            "model_type" not in hf and set(hf.get("architectures") or ()) & set(family.architectures)
        ):
            return family
    kind = hf.get("model_type") or ", ".join(hf.get("architectures") or ["none given"])
    known = sorted(t for f in families() for t in f.model_types)
    raise PagodaError(f"{where}: architecture '{kind}' is not supported; supported are {', '.join(known)}")


def from_hf_config(hf: dict[str, Any], where: str = "config.json") -> GPT:
    """An uninitialised model of the family and shape that a `config.json` describes, on the current default device."""
    family, config = read_config(hf, where)
    return family(config)


def read_config(hf: dict[str, Any], where: str = "config.json") -> tuple[type[GPT], Config]:
    """The family of a `config.json`, and our configuration."""
    family = family_of(hf, where)
    if method := (hf.get("quantization_config") or {}).get("quant_method"):
        raise PagodaError(f"{where}: weights quantized by '{method}' are not supported; use the unquantized model")
    hf = {"model_type": family.model_types[0], **family.defaults, **hf}
    try:
        config = family.read_config(hf)
        Rope(config.rope, config.rotary_dim, config.block_size)
    except KeyError as e:
        raise PagodaError(f"{where}: {e} is missing; a {family.__name__} model needs it") from None
    except (PagodaError, TypeError, ValueError, ArithmeticError, AttributeError) as e:  # of values of the wrong kind
        what = "" if isinstance(e, PagodaError) else "a value of the configuration makes no sense: "
        raise PagodaError(f"{where}: {what}{e}") from None
    config.hf = config.hf or hf
    return family, config


def count_parameters(hf: dict[str, Any]) -> int:
    """Parameters of the model that a configuration describes, without allocating it or building like layers twice."""
    family, config = read_config(hf)
    with torch.device("meta"):
        if config.dense_layers:
            return family(config).n_params()
        one, two = (family(replace(config, n_layer=n, windows=())).n_params() for n in (1, 2))
    return one + (config.n_layer - 1) * (two - one)


def known_models() -> dict[str, dict[str, Any]]:
    """The sizes that can be built by name: name to Hugging Face configuration."""
    return {name: hf for family in families() for name, hf in family.sizes.items()}


def known_config(name: str) -> dict[str, Any]:
    """The configuration of a known size, by name (any case; an organisation in front is ignored)."""
    by_lower = {k.lower(): hf for k, hf in known_models().items()}
    key = name.rsplit("/", 1)[-1].lower()
    if key not in by_lower:
        raise PagodaError(f"unknown model name '{name}'{did_you_mean(key, known_models())} (`pagoda models` lists all)")
    return by_lower[key]
