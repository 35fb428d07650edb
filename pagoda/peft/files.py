"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Methods that PEFT does not have are the same two files with a `peft_type` of our own; so are several methods at once
(`COMBINATION`: the configurations in `parts`, and every tensor's name begins with its part's number).
"""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copymode
from typing import Any

import torch
from torch import Tensor

from pagoda.common import PagodaError, read_json, replacing
from pagoda.models.gpt import GPT
from pagoda.models.loader import listed
from pagoda.peft.adapter import PREFIX, Method, adapters, code_of, put_on
from pagoda.peft.options import METHODS, LlamaAdapter, Options

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMBINATION = "COMBINATION"
OURS = "LLAMA_ADAPTER"  # an ADAPTION_PROMPT of a family that PEFT does not have it for
# What PEFT's configurations may ask for that would change the results and that we do not do.
UNSUPPORTED = (
    *("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "alpha_pattern"),
    *("lora_bias", "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config"),
    "monteclora_config",
)
HARMLESS_STARTS = ("gaussian", "orthogonal", "eva")  # of LoRA's matrices; the others change the base's weights too


def save_adapter(model: GPT, path: str | Path, base_name: str = "") -> None:
    """Write what a model wears into a directory. base_name: where the base is, for whoever loads the adapter."""
    from safetensors.torch import save_file

    if not adapters(model):
        raise PagodaError("the model wears no adapter: there is nothing to save")
    parts = [(describe(m, base_name), {m.prefix + n: t for n, t in m.state().items()}) for m in adapters(model)]
    config, tensors = parts[0]
    if len(parts) > 1:
        config = {"peft_type": COMBINATION, "base_model_name_or_path": base_name, "parts": [c for c, _ in parts]}
        tensors = {f"{i}.{name}": t for i, (_, state) in enumerate(parts) for name, t in state.items()}
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / CONFIG) as text, replacing(path / WEIGHTS) as weights:
        text.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, weights, metadata={"format": "pt"})
        copymode(text, weights)  # safetensors writes files that nobody else may read


def describe(method: Method, base_name: str) -> dict[str, Any]:
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True}
    return {"peft_type": method.options.peft_type, **common, **method.config()}


def load_adapter(model: GPT, path: str | Path, trainable: bool = False) -> GPT:
    """Put on what a directory holds, ours or PEFT's. Returns the model.

    trainable: to go on training (parameters in float32); else they have the model's type and take no gradients.
    Raises PagodaError for what is missing, unreadable, of an unknown kind, or made for another model.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise PagodaError(f"{path}: no {CONFIG} there; an adapter is a directory that holds one")
    config = read_json(path / CONFIG)
    tensors = read_tensors(path / WEIGHTS)
    parts = [(config, tensors)]
    if config.get("peft_type") == COMBINATION:
        parts = [
            (part, {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")})
            for i, part in enumerate(config.get("parts", []))
        ]
    for part, own in parts:
        load_part(model, path, part, own, trainable)
    return model


def load_part(model: GPT, path: Path, config: dict[str, Any], tensors: dict[str, Tensor], trainable: bool) -> None:
    kind = kind_of(config, path)
    for key in UNSUPPORTED:
        if config.get(key):
            raise PagodaError(f"{path / CONFIG}: {key} = {config[key]!r} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in HARMLESS_STARTS:
        raise PagodaError(f"{path / CONFIG}: an adapter that began as '{start}' changed its base: merge it in PEFT")
    if config.get("bias", "none") != "none":
        raise PagodaError(f"{path / CONFIG}: bias = {config['bias']!r} is not supported, only 'none'")
    code = code_of(kind)
    try:
        options = code.read(kind, config)
    except KeyError as e:
        raise PagodaError(f"{path / CONFIG}: {e} is missing") from None
    tensors = {plain_name(model, name): t for name, t in tensors.items()}
    check_layers(model, path, tensors)
    method = put_on(model, options, torch.float32 if trainable else model.dtype, tensors)
    fill(method, path, tensors)
    if not trainable:
        for p in method.named().values():
            p.requires_grad_(False)


def kind_of(config: dict[str, Any], path: Path) -> type[Options]:
    """The options of an adapter_config.json's type."""
    kinds = {kind.peft_type: kind for kind in reversed(METHODS.values())} | {OURS: LlamaAdapter}
    if config.get("peft_type") not in kinds:
        raise PagodaError(
            f"{path / CONFIG}: peft_type {config.get('peft_type')!r} is not supported; there are {', '.join(kinds)}"
        )
    return kinds[config["peft_type"]]


def read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        old = file.with_suffix(".bin").is_file()
        why = "only pickled weights, which may run code when opened; save it again as safetensors" if old else "no file"
        raise PagodaError(f"{file.parent}: {why} {'' if old else file.name + ' there'}".rstrip())
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise PagodaError(f"{file}: not a readable safetensors file ({e}); download or copy it again") from None


def plain_name(model: GPT, name: str) -> str:
    """A tensor's name without PEFT's prefix, in the family's first spelling."""
    name = name.removeprefix(PREFIX)
    for ours, theirs in model.prefixes:
        if theirs and name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def check_layers(model: GPT, path: Path, tensors: dict[str, Tensor]) -> None:
    """All layers that the file names are there."""
    known = {template.split("{}")[0] for template in model.names.values() if "{}" in template}
    for name, t in tensors.items():
        for start in known:
            layer = name.removeprefix(start).split(".")[0]
            if name.startswith(start) and layer.isdigit() and int(layer) >= model.config.n_layer:
                raise PagodaError(
                    f"{path}: an adapter for another model: it has {name} {tuple(t.shape)}, "
                    f"this {type(model).__name__} has {model.config.n_layer} layers"
                )


@torch.no_grad()
def fill(method: Method, path: Path, tensors: dict[str, Tensor]) -> None:
    own = method.named()
    if absent := set(own) - set(tensors):
        raise PagodaError(f"{path}: the adapter lacks {listed(list(absent))}")
    if odd := set(tensors) - set(method.state()):
        raise PagodaError(
            f"{path}: the adapter holds {listed(list(odd))}, which {method.options.peft_type} has not here"
        )
    for name, p in own.items():
        if tensors[name].shape != p.shape:
            raise PagodaError(
                f"{path}: an adapter for another model: {name} has shape {tuple(tensors[name].shape)}, "
                f"this {type(method.model).__name__} takes {tuple(p.shape)}"
            )
        p.copy_(tensors[name])
