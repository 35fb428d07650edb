"""GGUF files (versions 2 and 3): read the header, find the tensors, and say what they are in Hugging Face's terms.

`read_gguf` maps the file and parses the header: `.metadata` (a dict) and `.tensors` (name -> `GGUFTensor`). Nothing of
a tensor is read before its `.data` is touched. `hf_config` turns the metadata into the dict of a `config.json`,
`hf_tensors` yields every tensor under the name that transformers gives it, and `dequantize` unpacks blocks to floats.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads the same files, but takes
two seconds on a vocabulary of 49k tokens; it serves here for the k-quants, and in the tests as the reference.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagoda.common import PagodaError

if TYPE_CHECKING:
    import torch

# ggml's type number -> (name, values in a block, bytes of a block).
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
TYPE_SIZES = {name: (block, size) for name, block, size in TYPES.values()}

# Metadata value types that have a fixed size; 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in the mapped file. `type` is ggml's name (`Q4_1`), `shape` is in torch's order."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int
    mapping: mmap.mmap

    @property
    def data(self) -> torch.Tensor:
        """The blocks as they lie in the file, mapped and not copied: uint8 (*shape[:-1], bytes of a row)."""
        import torch

        raw = torch.frombuffer(self.mapping, dtype=torch.uint8, count=self.nbytes, offset=self.offset)
        return raw.view(*self.shape[:-1], -1)


@dataclass(frozen=True)
class GGUF:
    """An open file: metadata values as Python objects, and tensors by their names in the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def require(self, key: str) -> Any:
        """The metadata value of `key`; a PagodaError names the key when the file has none."""
        if key not in self.metadata:
            raise PagodaError(f"{self.path}: the GGUF metadata lacks '{key}'; convert the model again")
        return self.metadata[key]


def read_gguf(path: str | os.PathLike) -> GGUF:
    """Map a GGUF file and parse its header. Corrupt, truncated or unsupported files raise PagodaError."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            # Copy-on-write: torch wants writable memory, and nothing here ever writes to it.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise PagodaError(f"{path}: not a GGUF file (it is empty); download it again") from None
    except OSError as error:
        raise PagodaError(f"cannot read {path}: {error.strerror}") from None
    try:
        return _parse(path, mapping)
    except _Corrupt as error:
        raise PagodaError(f"{path}: {error}") from None
    except (struct.error, IndexError):
        raise PagodaError(f"{path}: truncated GGUF file, the header ends early; download it again") from None


class _Corrupt(Exception):
    pass


def _parse(path: Path, mapping: mmap.mmap) -> GGUF:
    if mapping[:4] != b"GGUF":
        raise _Corrupt("not a GGUF file (it does not start with 'GGUF')")
    header = _Header(mapping)
    version = header.scalar("I")
    if version not in (2, 3):
        big_endian = version and not version & 0xFFFF
        what = "a big-endian GGUF file" if big_endian else f"GGUF version {version}"
        raise _Corrupt(f"{what} is not supported (only little-endian versions 2 and 3 are); convert the model again")
    n_tensors, n_values = header.count(24), header.count(13)  # the least bytes that a tensor and a value can take
    metadata = {}
    for _ in range(n_values):
        key = header.string()
        metadata[key] = header.value(header.scalar("I"))
    entries = [header.tensor() for _ in range(n_tensors)]

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Corrupt(f"corrupt GGUF file (general.alignment is {alignment!r}, not a power of two)")
    start = -(-header.pos // alignment) * alignment
    tensors = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise _Corrupt(f"corrupt GGUF file (two tensors are called {name!r})")
        if type_id not in TYPES:
            raise _Corrupt(f"tensor {name!r} has the type {_type_name(type_id)}, which is not supported")
        type_name, block, size = TYPES[type_id]
        if not shape or 0 in shape or shape[-1] % block or offset % alignment:
            raise _Corrupt(f"corrupt GGUF file (tensor {name!r}: {type_name} of shape {shape} at offset {offset})")
        nbytes = math.prod(shape) // block * size
        if start + offset + nbytes > len(mapping):
            raise _Corrupt(
                f"truncated GGUF file, tensor {name!r} ends at byte {start + offset + nbytes} of {len(mapping)}; "
                "download it again"
            )
        tensors[name] = GGUFTensor(name, type_name, shape, start + offset, nbytes, mapping)
    return GGUF(path, metadata, tensors)


class _Header:
    """A cursor over the mapped header."""

    def __init__(self, mapping: mmap.mmap):
        self.buffer, self.pos = mapping, 4

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.buffer, self.pos)
        self.pos += struct.calcsize("<" + code)
        if code == "f":  # the shortest decimal of that float32: 1e-05, not 9.999999747378752e-06
            return float(str(np.float32(value)))
        return value

    def count(self, least: int) -> int:
        """A number of things to come that take at least `least` bytes each: a corrupt one must not run away."""
        count = self.scalar("Q")
        if count * least > len(self.buffer) - self.pos:
            raise _Corrupt(f"corrupt or truncated GGUF file (it claims {count} entries); download it again")
        return count

    def string(self) -> str:
        length = self.count(1)
        self.pos += length
        return self.buffer[self.pos - length : self.pos].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _Corrupt(f"corrupt GGUF file (unknown metadata type {kind})")
        kind = self.scalar("I")
        if kind == STRING:
            return self.strings(self.count(8))
        if kind in SCALARS:
            dtype = np.dtype("<" + SCALARS[kind])
            count = self.count(dtype.itemsize)
            values = np.frombuffer(self.buffer, dtype, count, self.pos).tolist() if count else []
            self.pos += count * dtype.itemsize
            return values
        return [self.value(kind) for _ in range(self.count(12))]

    def strings(self, count: int) -> list[str]:
        """An array of strings. A vocabulary has 10^5 of them, so the usual case (all shorter than 256 bytes, none with
        a zero byte) is read by one hop per string and one decoding for all; anything else goes string by string."""
        buffer = self.buffer[self.pos : self.pos + 64 * count]  # a copy: indexing bytes is faster than a mapping
        starts, pos = [], 0
        try:
            for _ in range(count):
                starts.append(pos)
                pos += 8 + buffer[pos]  # the low byte of the length
        except IndexError:  # cut short, or one was longer than it seemed
            return [self.string() for _ in range(count)]
        if 0 < pos <= len(buffer):
            raw = np.frombuffer(buffer, np.uint8, pos)
            starts = np.asarray(starts)
            others = starts[:, None] + np.arange(1, 8)  # where the other seven bytes of each length stand
            if not raw[others].any():
                text = np.delete(raw, others.ravel())
                text[starts - 7 * np.arange(count)] = 0
                strings = text.tobytes().decode("utf-8", "replace").split("\0")[1:]
                if len(strings) == count:
                    self.pos += pos
                    return strings
        return [self.string() for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.scalar("I")
        if n_dims > 4 or len(name) > 256:
            raise _Corrupt(f"corrupt GGUF file (tensor {name[:40]!r} has {n_dims} dimensions)")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))[::-1]  # ggml counts from the fastest dimension
        return name, shape, self.scalar("I"), self.scalar("Q")


def _type_name(type_id: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(type_id).name
    except ValueError:
        return f"number {type_id}"


# Blocks to floats ------------------------------------------------------------

CHUNK = 1 << 18  # values unpacked at a time: the intermediates stay in the cache


def dequantize(
    tensor: GGUFTensor,
    dtype: torch.dtype | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Unpack a tensor to `dtype` (float32 if none), shape `tensor.shape`, in row chunks.

    `rows` (shape[0],) int64 reorders the rows of a matrix on the way (`row_permutation`). `out` receives the values
    instead of a new tensor (same shape, any float dtype).
    """
    import torch

    if out is None:
        out = torch.empty(tensor.shape, dtype=dtype or torch.float32)
    raw = tensor.data
    if raw.dim() == 1:  # a vector is one row, except that its rows (a bias's) are its values
        raw = raw.view(tensor.shape[0], -1) if tensor.type in ("F32", "F16", "BF16") else raw.view(1, -1)
    raw = raw.view(-1, raw.shape[-1])
    flat = out.view(raw.shape[0], -1)
    step = max(1, CHUNK // flat.shape[1])
    for i in range(0, raw.shape[0], step):
        chunk = raw[i : i + step] if rows is None else raw[rows[i : i + step]]
        flat[i : i + step] = _unpack(chunk, tensor.type)
    return out


def _unpack(raw: torch.Tensor, type_name: str) -> torch.Tensor:
    """Blocks (rows, bytes) to floats (rows, values). The layouts are those of ggml-common.h."""
    import torch

    if type_name in ("F32", "F16", "BF16"):
        return raw.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_name])
    if type_name.endswith("_K"):
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize as unpack

        return torch.from_numpy(unpack(raw.numpy(), GGMLQuantizationType[type_name]))

    block, size = TYPE_SIZES[type_name]
    blocks = raw.view(-1, size)

    def half(start: int) -> torch.Tensor:  # (blocks, 1) float32
        return blocks[:, start : start + 2].contiguous().view(torch.float16).float()

    scale = half(0)
    if type_name == "Q8_0":
        return (blocks[:, 2:].view(torch.int8) * scale).view(raw.shape[0], -1)
    packed = blocks[:, -16:]  # two values a byte: the first half of the block in the low nibbles
    values = torch.empty(blocks.shape[0], block, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=values[:, :16])
    torch.bitwise_right_shift(packed, 4, out=values[:, 16:])
    if type_name.startswith("Q5"):  # the fifth bits: 32 of them in the four bytes before the nibbles
        bits = blocks[:, -20:-16, None] >> torch.arange(8, dtype=torch.uint8)
        values |= (bits.view(-1, 32) & 1) << 4
    if type_name.endswith("_1"):
        result = torch.addcmul(half(2), values, scale)
    else:
        result = (values.view(torch.int8) - (8 if type_name == "Q4_0" else 16)) * scale
    return result.view(raw.shape[0], -1)


def in_kernel_blocks(tensor: GGUFTensor) -> tuple[torch.Tensor, str] | None:
    """(blocks, type) of the same weights as Q4_0, Q4_1 or Q8_0, which `pack_gguf` takes; None for the other types.

    Q5_0 is Q8_0 with fewer values. A block of Q4_K is eight of Q4_1, whose scales and minimums are products, rounded to
    float16 here: to one part in 2,048.
    """
    import torch

    raw = tensor.data
    if tensor.type in ("Q4_0", "Q4_1", "Q8_0"):
        return raw, tensor.type
    if tensor.type == "Q5_0":
        blocks = raw.view(-1, 22)
        bits = (blocks[:, 2:6, None] >> torch.arange(8, dtype=torch.uint8)).view(-1, 32) & 1
        values = torch.cat((blocks[:, 6:] & 15, blocks[:, 6:] >> 4), 1) | bits << 4
        return torch.cat((blocks[:, :2], (values.view(torch.int8) - 16).view(torch.uint8)), 1), "Q8_0"
    if tensor.type == "Q4_K":
        blocks = raw.view(-1, 144)
        halves, packed = blocks[:, :4].contiguous().view(torch.float16).float(), blocks[:, 4:16]
        low, middle, high = packed.split(4, 1)  # scales and minimums of 6 bits, the last four of each in two pieces
        scales = torch.cat((low & 63, high & 15 | low >> 6 << 4), 1) * halves[:, :1]
        minimums = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), 1) * -halves[:, 1:]
        nibbles = blocks[:, 16:].view(-1, 4, 32)  # a byte has values of two blocks; in Q4_1 of the halves of one
        quants = torch.stack((nibbles & 15, nibbles >> 4), 2).view(-1, 8, 2, 16)
        quants = quants[:, :, 0] | quants[:, :, 1] << 4
        heads = torch.stack((scales, minimums), -1).half().view(torch.uint8)
        return torch.cat((heads, quants), -1), "Q4_1"
    return None


# In Hugging Face's terms ------------------------------------------------------------

ARCHITECTURES = {  # general.architecture -> (model_type, class)
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
CONFIG_KEYS = {  # metadata key, less the architecture -> config.json key
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_config(gguf: GGUF) -> dict[str, Any]:
    """The `config.json` of the model in the file. Architectures other than those of ARCHITECTURES raise PagodaError."""
    meta, tensors = gguf.metadata, gguf.tensors
    arch = gguf.require("general.architecture")
    if arch not in ARCHITECTURES:
        raise PagodaError(f"{gguf.path}: unsupported GGUF architecture {arch!r}; supported: {', '.join(ARCHITECTURES)}")
    if meta.get(f"{arch}.expert_count"):
        raise PagodaError(f"{gguf.path}: a mixture of experts in GGUF is not supported; load the original directory")
    model_type, class_name = ARCHITECTURES[arch]
    config = {name: gguf.require(f"{arch}.{key}") for key, name in CONFIG_KEYS.items()}
    n_head = config["num_attention_heads"]
    config["num_key_value_heads"] = meta.get(f"{arch}.attention.head_count_kv", n_head)
    for key, value in config.items():
        if isinstance(value, list):
            raise PagodaError(f"{gguf.path}: '{key}' differs between layers, which is not supported")
        if not isinstance(value, (int, float)) or not value > 0:
            raise PagodaError(f"{gguf.path}: corrupt GGUF metadata ('{key}' is {value!r}); download it again")
    if config["num_hidden_layers"] > len(tensors):
        raise PagodaError(
            f"{gguf.path}: corrupt GGUF file ({config['num_hidden_layers']} layers and {len(tensors)} tensors); "
            "download it again"
        )
    if "token_embd.weight" not in tensors:
        raise PagodaError(f"{gguf.path}: no tensor 'token_embd.weight'; convert the model again")
    config |= {"model_type": model_type, "architectures": [class_name], "hidden_act": "silu"}
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["head_dim"] = head_dim = meta.get(f"{arch}.attention.key_length", config["hidden_size"] // n_head)
    rotary = meta.get(f"{arch}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise PagodaError(f"{gguf.path}: rotary embedding of {rotary} of {head_dim} dimensions is not supported")
    config["rope_theta"] = base = meta.get(f"{arch}.rope.freq_base", 10000.0)
    if not isinstance(base, (int, float)) or not 0 < base < math.inf:
        raise PagodaError(f"{gguf.path}: corrupt GGUF metadata ('rope.freq_base' is {base!r}); download it again")
    config["rope_scaling"] = _rope_scaling(gguf, arch, config)
    if model_type == "llama":  # Qwen's biases are not a matter of configuration
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if window := meta.get(f"{arch}.attention.sliding_window"):
        if arch == "llama":  # llama.cpp has no architecture of its own for Mistral
            config["model_type"], config["architectures"] = "mistral", ["MistralForCausalLM"]
        config["sliding_window"] = window
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = meta.get(f"tokenizer.ggml.{name}_token_id")
    return config


def _rope_scaling(gguf: GGUF, arch: str, config: dict) -> dict[str, Any] | None:
    """transformers' `rope_scaling`, from the metadata or from the tensor of factors that Llama 3.1 and later carry."""
    from pagoda.models.rope import Rope

    meta, prefix = gguf.metadata, f"{arch}.rope.scaling."
    if "rope_freqs.weight" in gguf.tensors:
        factors = dequantize(gguf.tensors["rope_freqs.weight"]).double().numpy()
        scaling = {"rope_type": "llama3", "factor": round(float(factors.max()), 4)}
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        plain = {"rope_theta": config["rope_theta"]}
        inverse = [Rope(p, config["head_dim"], 8192).frequencies()[0].numpy() for p in (plain, plain | scaling)]
        if factors.shape != inverse[0].shape:
            raise PagodaError(f"{gguf.path}: rope_freqs.weight has {factors.size} factors, not {inverse[0].size}")
        if np.allclose(factors, inverse[0] / inverse[1], rtol=1e-3):
            return scaling
        # Not Llama 3's own parameters: longrope divides each frequency by a factor of its own, which says the same.
        factors = factors.tolist()
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config["max_position_embeddings"],
        }
    kind = meta.get(prefix + "type", "linear")
    factor = meta.get(prefix + "factor", meta.get(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = meta.get(prefix + "original_context_length", config["max_position_embeddings"])
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise PagodaError(f"{gguf.path}: unsupported rotary scaling {kind!r}; supported: linear, yarn, llama3")


def hf_name(name: str) -> str | None:
    """transformers' name of a parameter (`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`).

    None for what is no parameter there (`rope_freqs.weight`); unknown names come back as they are, so that the loader
    reports them as unexpected.
    """
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    if name == "rope_freqs.weight" or name.endswith(".rope_freqs.weight"):
        return None
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"
    return name


def row_permutation(n_head: int, n_rows: int) -> torch.Tensor:
    """Index (n_rows,) int64 that puts the query or key rows of `n_head` heads in transformers' order: `rows[index]`.

    llama.cpp's converter interleaves the two halves of a Llama head that rotate against each other; undoing it moves
    whole rows, so that quantized rows stay packed.
    """
    import torch

    return torch.arange(n_rows).view(n_head, n_rows // n_head // 2, 2).transpose(1, 2).reshape(-1)


def hf_tensors(gguf: GGUF) -> Iterator[tuple[str, GGUFTensor, torch.Tensor | None]]:
    """Yield (transformers' name, tensor, row permutation or None) in file order."""
    arch = gguf.require("general.architecture")
    n_head = gguf.require(f"{arch}.attention.head_count")
    heads = {"attn_q": n_head, "attn_k": gguf.metadata.get(f"{arch}.attention.head_count_kv", n_head)}
    permutations = {}
    for name, tensor in gguf.tensors.items():
        if (target := hf_name(name)) is None:
            continue
        kind = name.split(".")[-2] if "." in name else ""
        rows = None
        if arch == "llama" and kind in heads:
            if tensor.shape[0] % (2 * heads[kind]):
                raise PagodaError(
                    f"{gguf.path}: {tensor.shape[0]} rows of '{name}' do not divide into {heads[kind]} heads"
                )
            key = heads[kind], tensor.shape[0]
            rows = permutations.setdefault(key, row_permutation(*key))
        yield target, tensor, rows
