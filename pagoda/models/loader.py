"""Checkpoints in and out: Hugging Face directories, read in place and written back the same.

Loading goes tensor by tensor. What already has the wanted type is a view of the memory-mapped file; what must be
converted is copied and its pages are given back, so that memory peaks at the weights and not at twice the weights.
"""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copymode
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pagoda.common import PagodaError, read_json, replacing, trim_heap
from pagoda.models.gguf import dequantize, hf_config, hf_tensors, in_kernel_blocks, read_gguf
from pagoda.models.gpt import GPT
from pagoda.models.layers import Linear, MoE, dense, n_elements, pack_stack, set_weight, weights_of
from pagoda.models.registry import from_hf_config
from pagoda.ops.formats import Arena, PackedWeight, pack, pack_gguf

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
QUANTIZE = ("int8", "int4", "nf4", "own", "bf16", "float32")
TRIM_EVERY = 2**24  # converted numbers
# Buffers that old checkpoints carry and nobody reads.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


class Checkpoint(Protocol):
    """Named tensors in transformers' naming, whatever file they come from."""

    config: dict[str, Any]
    dtype: torch.dtype  # what its parameters become when nobody asks for another type
    views: bool  # whether `read` gives views of the mapped file

    def names(self) -> set[str]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, as a view of the mapped file wherever that is possible; dtype is what it will become."""

    def packed(self, name: str, dtype: torch.dtype) -> PackedWeight | None:
        """The tensor in its own bits, where the file holds it in a format that `ops.linear` takes."""

    def release(self, name: str) -> None:
        """The tensor's pages of the file are not needed any more."""


class SafetensorsDirectory:
    """A Hugging Face directory: config.json and one or more *.safetensors files."""

    views = True
    TYPES: ClassVar = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / "config.json")
        self._maps: dict[Path, mmap.mmap] = {}
        self._entries: dict[str, tuple[Path, torch.dtype, list[int], int, int]] = {}
        for file in weight_files(path):
            self._open(file)
        self.dtype = Counter(dtype for _, dtype, *_ in self._entries.values()).most_common(1)[0][0]

    def _open(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with open(file, "rb"), safe_open(file, "pt"):  # the library checks the header against the file's size
                pass
        except OSError as e:
            raise PagodaError(f"cannot read {file}: {e.strerror or e}") from None
        except SafetensorError as e:
            raise PagodaError(f"{file}: not a readable safetensors file ({e}); download or copy it again") from None
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
            self._maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            if entry["dtype"] not in self.TYPES:
                raise PagodaError(f"{file}: tensor {name} has type {entry['dtype']}, which is not supported")
            self._entries[name] = (file, self.TYPES[entry["dtype"]], entry["shape"], start, end)

    def names(self) -> set[str]:
        return set(self._entries)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        file, dtype, shape, start, end = self._entries[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:  # torch wants aligned views: an odd header costs a copy
            return torch.frombuffer(bytearray(self._maps[file][start:end]), dtype=dtype).view(shape)
        count = (end - start) // dtype.itemsize
        return torch.frombuffer(self._maps[file], dtype=dtype, count=count, offset=start).view(shape)

    def packed(self, name: str, dtype: torch.dtype) -> PackedWeight | None:
        return None

    def release(self, name: str) -> None:
        file, _, _, start, end = self._entries[name]
        release_pages(self._maps[file], start, end)


class GGUFFile:
    """A GGUF file: the configuration from its metadata, the tensors dequantized as they are read."""

    views = False
    FLOATS: ClassVar = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

    def __init__(self, path: Path):
        gguf = read_gguf(path)
        self.config = hf_config(gguf)
        self._tensors = {name: (tensor, rows) for name, tensor, rows in hf_tensors(gguf)}
        kind = gguf.tensors["token_embd.weight"].type
        self.dtype = self.FLOATS.get(kind, torch.bfloat16)

    def names(self) -> set[str]:
        return set(self._tensors)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor, rows = self._tensors[name]
        return dequantize(tensor, dtype or self.dtype, rows)

    def packed(self, name: str, dtype: torch.dtype) -> PackedWeight | None:
        """Other blocks than `in_kernel_blocks` knows are rounded again, to Q8_0. F16 and F32 are no blocks."""
        tensor, rows = self._tensors[name]
        if tensor.type in ("F32", "F16"):
            return None
        if tensor.type == "BF16":
            return pack(dequantize(tensor, torch.bfloat16, rows), "bf16").to(dtype)
        if found := in_kernel_blocks(tensor):
            return pack_gguf(*found, tensor.shape, rows, dtype)
        return pack(dequantize(tensor, rows=rows), "q8_0").to(dtype)

    def release(self, name: str) -> None:
        tensor, _ = self._tensors[name]
        release_pages(tensor.mapping, tensor.offset, tensor.offset + tensor.nbytes)


def release_pages(mapping: mmap.mmap, start: int, end: int) -> None:
    """Give the pages inside bytes [start, end) of a file mapping back to the system; they can be read again."""
    if not hasattr(mapping, "madvise"):
        return
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = end // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        mapping.madvise(mmap.MADV_DONTNEED, start, length)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory: those of its index, or all there are."""
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise PagodaError(f"{path / INDEX}: it has no weight_map; download or copy it again")
        files = [path / name for name in sorted(set(index["weight_map"].values()))]
        absent = [f.name for f in files if not f.is_file()]
        if absent:
            raise PagodaError(f"{path}: {listed(absent)} of the index missing; download or copy the shards again")
        return files
    files = [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        if pickles := sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]):
            raise PagodaError(
                f"{path}: only pickled weights ({pickles[0].name}), which may run code when opened; convert them where "
                "you trust them: transformers' AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        raise PagodaError(f"{path}: no *.safetensors file there")
    return files


def listed(names: list[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_checkpoint(path: Path) -> Checkpoint:
    """A Hugging Face directory, or a GGUF file."""
    if path.is_dir():
        return SafetensorsDirectory(path)
    return GGUFFile(path)


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trainable: bool = False,
    quantize: str | None = None,
) -> GPT:
    """The model in a Hugging Face directory or a GGUF file.

    dtype      of all parameters; None keeps the checkpoint's own (bfloat16 for a quantized GGUF file)
    trainable  the parameters are owned and take gradients; otherwise they may be views of the mapped file
    quantize   pack the matrices (ops/formats.py): `int8`, `int4`, `nf4`; `own` keeps the bits of a GGUF file
               (docs/checkpoints.md); `float32` and `bf16` only lay them out for the kernels. The rest has the dtype
    Raises PagodaError for what is missing, unexpected, truncated or unsupported.
    """
    path = Path(path)
    if quantize is not None and quantize not in QUANTIZE:
        raise PagodaError(f"unknown quantization '{quantize}': use one of {', '.join(QUANTIZE)}")
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = from_hf_config(checkpoint.config, str(path))
    fill(model, checkpoint, path, dtype or checkpoint.dtype, torch.device(device), trainable, quantize)
    model.tie()
    return model.requires_grad_(trainable).train(trainable)


def stream(model: GPT, path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter, in the model's order, read from a checkpoint one after the other."""
    path = Path(path)
    checkpoint = open_checkpoint(path)
    for param, parts in find_weights(model, checkpoint, path).items():
        yield param, read_parameter(checkpoint, parts, checkpoint.dtype, is_transposed(model, param))
        for name in flatten(parts):
            checkpoint.release(name)


def fill(
    model: GPT,
    checkpoint: Checkpoint,
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    owned: bool,
    quantize: str | None,
) -> None:
    """Replace the meta parameters of a model by those of a checkpoint, one after the other."""
    converted, arena = 0, Arena()
    for param, parts in find_weights(model, checkpoint, path).items():
        module, leaf = model.get_submodule(param.rpartition(".")[0]), param.rpartition(".")[2]
        shape = getattr(module, leaf).shape
        format = pack_format(model, param, quantize)
        weight = checkpoint.packed(parts, dtype) if format == "own" and isinstance(parts, str) else None
        if weight is None:
            weight = read_parameter(checkpoint, parts, dtype, is_transposed(model, param))
        if weight.shape != shape:
            name = next(flatten(parts))
            raise PagodaError(
                f"{path}: {name} has shape {tuple(weight.shape)}, the configuration asks for {tuple(shape)}"
            )
        if isinstance(weight, PackedWeight):
            weight = weight.to(device)
        elif format is not None:
            format = {torch.bfloat16: "bf16"}.get(dtype, "float32") if format == "own" else format
            weight = (pack(weight, format) if weight.dim() == 2 else pack_stack(weight, format)).to(dtype).to(device)
        else:
            source, weight = weight, weight.to(device=device, dtype=dtype).contiguous()
            is_view = checkpoint.views and isinstance(parts, str) and weight.data_ptr() == source.data_ptr()
            if is_view and owned:
                weight, is_view = weight.clone(), False
            weight = nn.Parameter(weight, requires_grad=False)
            if is_view:
                set_weight(module, leaf, weight)
                continue
        if device.type == "cpu" and format is not None:
            weight._apply(arena)
        set_weight(module, leaf, weight)
        for name in flatten(parts):
            checkpoint.release(name)
        converted += n_elements(weight)
        if converted > TRIM_EVERY:
            trim_heap()
            converted = 0
    trim_heap()


def pack_format(model: GPT, param: str, quantize: str | None) -> str | None:
    """The format of one weight: the matrices of linear layers and experts, the embedding and the head are packed.

    Four bits cost the embedding and the head too much: they keep eight. A router keeps its own numbers.
    """
    name, _, leaf = param.rpartition(".")
    module = model.get_submodule(name)
    is_matrix = leaf == "weight" and isinstance(module, Linear) and not name.endswith("router")
    is_expert = isinstance(module, MoE) and leaf in ("gate_up", "down")
    if quantize is None or not (is_matrix or is_expert or module is model.embed):
        return None
    return "int8" if quantize in ("int4", "nf4") and module in (model.embed, model.head) else quantize


def read_parameter(
    checkpoint: Checkpoint, parts: str | list[list[str]], dtype: torch.dtype, transposed: bool
) -> Tensor:
    """One of our parameters out of a checkpoint: a view where that is possible."""
    if not isinstance(parts, str):
        return read_experts(checkpoint, parts, dtype)
    tensor = checkpoint.read(parts, dtype)
    return tensor.T if transposed else tensor


def checkpoint_names(model: GPT) -> dict[str, str | list[list[str]]]:
    """Each of our parameters and what the checkpoint calls it; stacked experts: per expert the parts of its rows."""
    table: dict[str, str | list[list[str]]] = {}
    for param, _ in weights_of(model):
        module, _, leaf = param.rpartition(".")
        if model.config.tie_embeddings and param == "head.weight":
            continue
        pattern = re.sub(r"\.\d+(\.|$)", r".{}\1", module, count=1)
        layer = re.findall(r"\.(\d+)(?:\.|$)", module)[:1]
        if f"{pattern}.{leaf}" in model.expert_names:
            templates = model.expert_names[f"{pattern}.{leaf}"]
            n_expert = model.config.n_expert
            table[param] = [[t.format(*layer, e) for t in templates] for e in range(n_expert)]
        else:
            table[param] = f"{model.names[pattern].format(*layer)}.{leaf}"
    return table


def is_transposed(model: GPT, param: str) -> bool:
    """Whether the checkpoint stores this weight as (n_in, n_out), as GPT-2's Conv1D does."""
    return param.endswith(".weight") and param.removesuffix(".weight").endswith(model.transposed)


def resolve(model: GPT, parts: str | list[list[str]], names: set[str]) -> str | list[list[str]]:
    """The names as this file has them: some checkpoints begin them another way."""
    if isinstance(parts, list):
        return [[resolve(model, p, names) for p in group] for group in parts]
    if parts not in names:
        for ours, theirs in model.prefixes:
            other = theirs + parts.removeprefix(ours)
            if parts.startswith(ours) and other in names:
                return other
    return parts


def flatten(parts: str | list[list[str]]) -> Iterator[str]:
    if isinstance(parts, str):
        yield parts
    else:
        for group in parts:
            yield from group


def read_experts(checkpoint: Checkpoint, parts: list[list[str]], dtype: torch.dtype) -> Tensor:
    """Stack the experts' weights (n_expert, rows, columns), the parts of each one below the other."""
    rows, columns = checkpoint.read(parts[0][0]).shape
    out = torch.empty(len(parts), rows * len(parts[0]), columns, dtype=dtype)
    for group, expert in zip(parts, out):
        for name, piece in zip(group, expert.split(rows)):
            tensor = checkpoint.read(name)
            if tensor.shape != piece.shape:
                raise PagodaError(f"{name} has shape {tuple(tensor.shape)}, other experts have {tuple(piece.shape)}")
            piece.copy_(tensor)
            checkpoint.release(name)
    return out


def find_weights(model: GPT, checkpoint: Checkpoint, path: Path) -> dict[str, str | list[list[str]]]:
    """What this file calls each of our parameters. PagodaError unless all are there, and nothing else but what is known
    to be of no use."""
    names, problems = checkpoint.names(), []
    sources = {param: resolve(model, parts, names) for param, parts in checkpoint_names(model).items()}
    wanted = {name for parts in sources.values() for name in flatten(parts)}
    if missing := wanted - names:
        problems.append(f"missing weights: {listed(list(missing))}")
    unexpected = {n for n in names - wanted if not IGNORED.search(n)}
    if model.ignored:
        unexpected = {n for n in unexpected if not re.search(model.ignored, n)}
    head = f"{model.names['head']}.weight"
    if model.config.tie_embeddings and head in unexpected:
        unexpected.discard(head)
        embed = sources["embed.weight"]
        if not missing and not torch.equal(checkpoint.read(head), checkpoint.read(embed)):
            problems.append(f"tie_word_embeddings is true, but {head} differs from {embed}: set it to false")
    if unexpected:
        problems.append(f"unexpected weights: {listed(list(unexpected))}")
    if problems:
        raise PagodaError(f"{path}: does not match its configuration: {'; '.join(problems)}")
    return sources


def save(
    model: GPT,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    beside: Callable[[Path], None] | None = None,
    write: bool = True,
) -> None:
    """Write a Hugging Face directory (config.json and safetensors, sharded above max_shard_bytes).

    `beside` writes what else belongs there, such as a tokenizer's files, given the directory. The directory appears
    complete or not at all; one that exists and is not empty is refused. Where processes share the weights, all call
    this and one has `write`: the others only help to gather.
    """
    from safetensors import SafetensorError

    if not write:
        return write_weights(model, None, dtype or model.dtype, max_shard_bytes)

    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PagodaError(f"{path} exists already: remove it or choose another place")
    hf = {**model.config.hf, "vocab_size": model.config.vocab_size}
    hf.pop("torch_dtype", None)
    hf["dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    hf.setdefault("architectures", [model.architectures[0]])
    try:
        with replacing(path) as temporary:
            temporary.mkdir()
            write_weights(model, temporary, dtype or model.dtype, max_shard_bytes)
            config = temporary / "config.json"
            config.write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
            for file in temporary.glob("*.safetensors"):
                copymode(config, file)  # safetensors writes files that nobody else may read
            if beside is not None:
                beside(temporary)
    except (OSError, SafetensorError) as e:
        raise PagodaError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None


def write_weights(model: GPT, path: Path | None, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """The safetensors files, and the index when there are several. One file is in memory at a time; without a path
    nothing is written."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]  # our parameters in each file
    total = size = 0
    table, weights = checkpoint_names(model), dict(weights_of(model))
    for param in table:
        n_bytes = n_elements(weights[param]) * dtype.itemsize
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(param)
        size, total = size + n_bytes, total + n_bytes
    weight_map = {}
    for i, params in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for param in params:
            weight = dense(weights[param], dtype)
            if path is None:
                continue
            weight = weight.T if is_transposed(model, param) else weight
            tensors |= checkpoint_tensors(weight.to("cpu", dtype), table[param])
        if path is None:
            continue
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1 and path is not None:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def checkpoint_tensors(weight: Tensor, parts: str | list[list[str]]) -> dict[str, Tensor]:
    """One of our parameters as the checkpoint's tensors, by name, each owning its bytes as save_file wants it."""
    if isinstance(parts, str):
        return {parts: weight.contiguous()}
    return {
        name: piece.clone()
        for group, stack in zip(parts, weight)
        for name, piece in zip(group, stack.chunk(len(group)))
    }
