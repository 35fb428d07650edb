"""Weight formats: how a matrix is held in fewer bits, and what its numbers mean.

`pack(weight, format)` rounds a matrix, `pack_gguf(blocks, type)` takes the bits of a GGUF file as they are; both give a
`PackedWeight`, which `ops.linear` and `ops.embedding` accept in place of a matrix. `dequantize` is the definition of a
format in plain PyTorch; the CPU kernels (`ops/cpu/linear.cpp`) read the same tensors.

| format | value of a weight | scales |
|---|---|---|
| `float32`, `bf16` | itself | |
| `int8` | q * scale, q in -127..127 | one float32 per row |
| `int4` | q * scale + minimum, or (q - 8) * scale with `symmetric`, q in 0..15 | float16 per 32, 64 or 128 of a row |
| `nf4` | NF4[q] * scale (Dettmers et al. 2023, "QLoRA"), bit for bit what bitsandbytes gives | 8 bits per 64 of a row |
| `q4_0`, `q4_1`, `q8_0` | (q - 8) * scale, q * scale + minimum, q * scale (GGUF) | float16 per 32 |

Layout. 16 rows make a tile; inside it k runs slowest, then the 16 rows, then the few elements of k that share a 32-bit
word. So a vector of 16 lanes holds the same k of 16 rows, and one form serves one row of activations and thousands.
Rows are padded to a multiple of 16 and k to the format's unit; padding is cut off or multiplied by zeros.

`bf16` takes 12 bits where the kernels pack it (`ops/cpu/pack_bf16.cpp`), bit for bit what it was: a tile's 16 most
frequent exponents in a table, 4 bits to say which, and the few others (one in 10,000 of a trained matrix) in a list.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from pagoda.common import PagodaError, use_huge_pages
from pagoda.ops import cpu

TILE = 16  # rows of a tile
BLOCK = 32  # elements of k whose integer products are summed before they are scaled
CHUNK = 64  # tiles that are packed or dequantized at a time: bounds the memory beyond the result
FORMATS = ("float32", "bf16", "int8", "int4", "nf4", "q4_0", "q4_1", "q8_0")
GGUF_BLOCK = {"q4_0": 18, "q4_1": 20, "q8_0": 34}  # bytes of a block of 32 weights

_KIND = {"float32": 0, "bf16": 1, "nf4": 2, "int4": 3, "q4_0": 3, "q4_1": 3, "int8": 4, "q8_0": 4}  # as in linear.cpp
_SHORT = 5  # bf16 in 12 bits
_TENSORS = ("quants", "scales", "minimums", "codes", "absmax", "mean", "escapes", "starts")  # in the kernels' order
_UNIT = {"float32": 1, "bf16": 2, "nf4": 64}  # what k is padded to, BLOCK for the others

# The quantiles of a normal distribution that NF4 stands for (QLoRA, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _flag(name: str) -> property:
    """An attribute that the kernels read too."""
    return property(
        lambda self: self.__dict__[f"_{name}"],
        lambda self, value: self.__dict__.update({f"_{name}": value, "_view": None}),
    )


class PackedWeight(nn.Module):
    """A matrix (n_out, n_in) in one of FORMATS. Its tensors are buffers, so it moves, saves and loads like any module.

    quants, and where the format has them scales and minimums, start with the tile. nf4 has three tensors more: `codes`
    (256,), `absmax` (one per 256 block scales) and `mean` (1,); scale = codes[scales] * absmax + mean. bf16 in 12 bits
    has the exponents of each tile as scales, and lists those that are not among them: `escapes`, a tile's from
    `starts`[tile] on, as (k // 2 * 32 + row of the tile * 2 + k % 2) << 8 | exponent, and -1 behind the last.

    group_size: elements of a row that share a scale, 0 for the whole row.
    dtype: what `embedding` returns, the dtype of the matrix that was packed; `.to(dtype)` changes it and nothing else.
    exact: multiply unrounded float32 activations on the CPU. Without it the integer formats round activations to int8
    (per row and block of 32; with the bits of a GGUF file an eighth of the blocks to twice as many), and bf16 weights
    round them to bf16 where the CPU has AVX512_BF16.
    invariant: the bits of a row's result do not depend on how many rows there are. Without it nf4 on a CPU with
    AMX is multiplied in another way for one row than for more; all else is invariant anyway.
    """

    exact, invariant = (_flag(name) for name in ("exact", "invariant"))

    def __init__(self, format: str, shape: tuple[int, int], group_size: int, dtype: torch.dtype, **tensors: Tensor):
        super().__init__()
        self.format, self.shape, self.group_size, self.dtype = format, torch.Size(shape), group_size, dtype
        self.exact = self.invariant = False
        for name in _TENSORS:
            self.register_buffer(name, tensors.get(name))

    @property
    def device(self) -> torch.device:
        return self.quants.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding included."""
        return sum(t.nbytes for t in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.format}, {tuple(self.shape)}, {8 * self.nbytes / self.shape.numel():.2f} bits per weight"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (n_out, n_in). Computed in float32, tile by tile."""
        n_out, n_in = self.shape
        out = torch.empty(n_out, n_in, dtype=dtype, device=self.device)
        for rows, part in self.chunks():
            out[rows] = part
        return out

    def chunks(self):
        """Pairs of a slice of rows and their values, float32 (at most 1,024 rows, n_in)."""
        n_out = self.shape[0]
        for tile in range(0, -(-n_out // TILE), CHUNK):
            rows = slice(tile * TILE, min(n_out, (tile + CHUNK) * TILE))
            yield rows, self._tiles(slice(tile, tile + CHUNK)).flatten(0, 1)[: rows.stop - rows.start]

    def rows(self, ids: Tensor) -> Tensor:
        """Rows by ids (N,) int64: (N, n_in) float32."""
        parts = [
            self._tiles(part // TILE)[torch.arange(len(part), device=part.device), part % TILE]
            for part in ids.split(CHUNK)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.shape[1], device=self.device)

    def _tiles(self, index) -> Tensor:
        """Tiles by a slice or a tensor of numbers: (n, 16, n_in) float32."""
        if self.format == "bf16" and self.scales is not None:
            return self._short_tiles(index)
        quants = self.quants[index]
        if self.format == "nf4":
            quants = torch.stack([quants & 15, quants >> 4], -1).flatten(-2)
            quants = quants.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
            values = _nf4(self.device)[quants.int()]
        elif self.format in ("int4", "q4_0", "q4_1"):
            values = torch.stack([quants & 15, quants >> 4], 2).flatten(1, 3).float()
            values -= 8 if self.minimums is None else 0
        else:
            values = quants.float()
        values = values.transpose(1, 2).flatten(2)  # (n, k, 16, elements) to (n, 16, k)
        if self.scales is not None:
            values *= self._spread(self._block_scales(index) if self.format == "nf4" else self.scales[index])
        if self.minimums is not None:
            values += self._spread(self.minimums[index])
        return values[..., : self.shape[1]]

    def _spread(self, per_group: Tensor) -> Tensor:
        """(n, groups, 16), a number for every group of k, as (n, 16, k)."""
        per_group = per_group.float().transpose(1, 2)
        if self.group_size == 0:
            return per_group
        unit = _UNIT.get(self.format, BLOCK)
        return per_group.repeat_interleave(self.group_size, -1)[..., : -(-self.shape[1] // unit) * unit]

    def _short_tiles(self, index) -> Tensor:
        """Tiles of bf16 in 12 bits: (n, 16, n_in) float32."""
        tiles = torch.arange(len(self.scales), device=self.device)[index]
        codes, *rest = (self.quants[tiles // 2, :, tiles % 2].view(torch.int16).int() & 0xFFFF).unbind(2)
        exponents, pairs = self.scales[index].int(), []
        for i in range(4):
            code, low = codes >> 4 * i & 15, rest[i // 2] >> i % 2 * 8
            exponent = exponents.gather(1, code.flatten(1).long()).view(code.shape)
            pairs.append((low & 0x80) << 8 | exponent << 7 | low & 0x7F)
        bits = torch.stack(pairs, 2).flatten(1)  # (n, k / 2 * 16 * 2)
        first, last = self.starts[tiles].long(), self.starts[tiles + 1].long()
        owner = torch.arange(len(tiles), device=self.device).repeat_interleave(last - first)
        before = (last - first).cumsum(0) - (last - first)
        escapes = self.escapes[torch.arange(len(owner), device=self.device) + (first - before)[owner]]
        owner, escapes = owner[escapes >= 0], escapes[escapes >= 0]
        place = escapes.long() >> 8
        bits[owner, place] = bits[owner, place] & 0x807F | (escapes & 255) << 7
        values = bits.to(torch.int16).view(torch.bfloat16).view(len(tiles), 4 * codes.shape[1], TILE, 2)
        return values.float().transpose(1, 2).flatten(2)[..., : self.shape[1]]

    def _block_scales(self, index) -> Tensor:
        """nf4's second quantization undone: (n, blocks, 16)."""
        codes = self.scales[index]
        tiles = torch.arange(len(self.quants), device=self.device)[index]
        rows = tiles[:, None, None] * TILE + torch.arange(TILE, device=self.device)
        blocks = rows * codes.shape[1] + torch.arange(codes.shape[1], device=self.device)[:, None]
        return self.codes[codes.int()] * self.absmax[(blocks // 256).clamp_max(len(self.absmax) - 1)] + self.mean

    def kernel_view(self) -> tuple[int, int, int]:
        """(address, n_out, n_in). The address is of what the kernels read, struct Weight of linear.cpp, and 0 where the
        tensors are not on the CPU. Made anew after the tensors have moved."""
        if self._view is None:
            tensors = list(self._buffers.values())
            pointers = [0 if t is None else t.data_ptr() for t in tensors]
            zero_point = 8 if _KIND[self.format] == 3 and self.minimums is None else 0
            fine = self.format in GGUF_BLOCK
            options = self.exact, self.invariant, fine, self.group_size // BLOCK, zero_point
            short = self.format == "bf16" and self.scales is not None
            words = [_SHORT if short else _KIND[self.format], *self.shape, *options, *pointers]
            self._words = torch.tensor(words, dtype=torch.int64)
            readable = all(t is None or (t.is_cpu and t.is_contiguous()) for t in tensors)
            self._view = (self._words.data_ptr() if readable else 0, *self.shape)
        return self._view

    def _apply(self, fn, recurse=True):
        """Moves the tensors as `.to` and its like ask, but keeps their dtypes: they are bits, not numbers."""
        self._view = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(lambda t: moved if (moved := fn(t)).dtype == t.dtype else t.to(moved.device), recurse)

    def _load_from_state_dict(self, state, prefix, *args):
        self._view = None
        if self.format == "bf16" and prefix + "quants" in state:  # 12 bits or 16, and however many escapes
            for name in _TENSORS:
                t = state.get(prefix + name)
                self._buffers[name] = None if t is None else torch.empty_like(t, device=self.device)
        super()._load_from_state_dict(state, prefix, *args)

    def __getstate__(self):  # copies and pickles must not share the addresses, nor take an arena along
        buffers = {name: None if t is None else t.clone() for name, t in self._buffers.items()}
        return {**self.__dict__, "_buffers": buffers, "_view": None, "_words": None}


class Arena:
    """Where the weights of a model lie one behind the other, in pages of 2 MB where the system has them: the processor
    then finds their addresses with less searching, and on a virtual machine they come up to a quarter faster."""

    SIZE = 2**25 + 2**22  # more than glibc ever takes from its heap: it goes back to the system

    def __init__(self):
        self.free = torch.empty(0, dtype=torch.uint8)

    def __call__(self, t: Tensor) -> Tensor:
        """A copy of t in here, on a cache line."""
        n = -(-t.nbytes // 64) * 64
        if n > len(self.free):
            memory = torch.empty(max(self.SIZE, n + 2**21), dtype=torch.uint8)
            use_huge_pages(memory.data_ptr(), memory.nbytes)
            self.free = memory[-memory.data_ptr() % 2**21 :]
        place, self.free = self.free[:n], self.free[n:]
        return place[: t.nbytes].view(t.dtype).view(t.shape).copy_(t)


def pack(weight: Tensor, format: str, group_size: int = 32, symmetric: bool = False) -> PackedWeight:
    """Rounds a matrix (n_out, n_in) to a format. group_size (32, 64 or 128) and symmetric are int4's.

    Works a thousand rows at a time. Raises PagodaError for an unknown format or group, and where a scale is not finite.
    """
    if format not in FORMATS:
        raise PagodaError(f"unknown weight format '{format}': use one of {', '.join(FORMATS)}")
    if group_size not in (32, 64, 128):
        raise PagodaError(f"group_size {group_size}: int4 takes groups of 32, 64 or 128")
    if weight.dim() != 2 or not weight.numel():
        raise PagodaError(f"a weight of shape {tuple(weight.shape)} cannot be packed: it is no matrix, or empty")
    weight = weight.detach()
    if format == "nf4":
        return _pack_nf4(weight)
    if format == "bf16" and cpu.kernels is not None and weight.is_cpu:
        short = _pack_short(weight)
        if short is not None:
            return short
    group = {"int8": 0, "int4": group_size}.get(format, BLOCK)
    symmetric = symmetric if format == "int4" else format == "q4_0"
    parts = (_tiles(format, *_quantize(part, format, group, symmetric)) for part in weight.split(CHUNK * TILE))
    return _assemble(format, weight.shape, group, parts, weight.dtype)


def pack_integers(
    quants: Tensor, scales: Tensor, minimums: Tensor | None, format: str, dtype: torch.dtype = torch.float32
) -> PackedWeight:
    """int4 or int8 weights that something else has rounded (GPTQ, AWQ, a checkpoint), with no second rounding.

    quants (n_out, n_in): int8 for `int8`, 0..15 for `int4`. scales and minimums (n_out, groups): one group for `int8`,
    groups of 32, 64 or 128 elements for `int4`, stored as float16. A value is quant * scale + minimum; without minimums
    `int4` means (quant - 8) * scale.
    """
    n_in = quants.shape[1]
    group = 0 if format == "int8" else next((g for g in (32, 64, 128) if -(-n_in // g) == scales.shape[1]), None)
    if group is None or format not in ("int8", "int4"):
        raise PagodaError(
            f"{format} weights in {scales.shape[1]} groups of a row of {n_in}: groups are of 32, 64 or 128"
        )
    return _assemble(format, quants.shape, group, [_tiles(format, quants, scales, minimums)], dtype)


def pack_gguf(
    blocks: Tensor, type: str, shape: tuple[int, int], rows: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> PackedWeight:
    """The weight of a GGUF file in its own bits: `dequantize` gives what `gguf.quants.dequantize` gives.

    blocks: the tensor's bytes, uint8, any shape. type: q4_0, q4_1 or q8_0. rows (n_out,): row i of the result is row
    rows[i] of the file (llama.cpp permutes the rows of q and k of Llama). dtype: see PackedWeight.
    """
    type = type.lower()
    if type not in GGUF_BLOCK:
        raise PagodaError(f"GGUF type '{type}' is not kept packed: dequantize it and use pack")
    (n_out, n_in), size = shape, GGUF_BLOCK[type]
    if n_in % BLOCK or blocks.numel() != n_out * n_in // BLOCK * size:
        raise PagodaError(f"{blocks.numel()} bytes do not hold a {type} matrix of shape {tuple(shape)}")
    blocks = blocks.view(n_out, n_in // BLOCK, size)
    n_scales = 2 if type == "q4_1" else 1

    def parts():
        for first in range(0, n_out, CHUNK * TILE):
            part = slice(first, first + CHUNK * TILE)
            chunk = blocks[part if rows is None else rows[part]]
            scales = chunk[..., : 2 * n_scales].contiguous().view(torch.float16)
            quants = _tile_words(chunk[..., 2 * n_scales :].flatten(1))
            if type == "q8_0":
                quants = quants.view(torch.int8)
            else:  # the halves of a block share bytes in the file as they do in a tile
                quants = quants.unflatten(1, (-1, 4))
            yield quants, *(_tile_scales(s, type) for s in scales.unbind(-1))

    return _assemble(type, shape, BLOCK, parts(), dtype)


def _quantize(weight: Tensor, format: str, group: int, symmetric: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows rounded to a format: quants (n, n_in), scales and minimums (n, groups), rounded before they are used."""
    if format in ("float32", "bf16"):
        return weight.to(torch.float32 if format == "float32" else torch.bfloat16), None, None
    n, n_in = weight.shape
    group = group or n_in
    groups = nn.functional.pad(weight.float(), (0, -n_in % group), value=0.0).view(n, -1, group)
    minimums = None
    if format in ("int8", "q8_0"):
        scales = groups.abs().amax(-1) / 127
    elif symmetric:  # the element furthest from zero becomes -8
        scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8
    else:
        if n_in % group:  # padding must not widen the last group
            groups[:, -1, n_in % group :] = groups[:, -1, :1]
        minimums = groups.amin(-1).half()
        scales = (groups.amax(-1) - minimums.float()) / 15
    scales = scales.float() if format == "int8" else scales.half()
    if not all(t is None or t.isfinite().all() for t in (scales, minimums)):
        raise PagodaError(f"a weight that is not finite, or too large for float16 scales, cannot be packed as {format}")
    divisor = torch.where(scales == 0, 1, scales.float())[..., None]
    if format in ("int8", "q8_0"):
        quants = (groups / divisor).round().clamp(-127, 127).to(torch.int8)
    else:
        offset = 8 if symmetric else -minimums.float()[..., None] / divisor
        quants = (groups / divisor + offset).round().clamp(0, 15).to(torch.uint8)
    return quants.flatten(1)[:, :n_in], scales, minimums


def _assemble(format: str, shape, group: int, parts: Iterable, dtype: torch.dtype) -> PackedWeight:
    """Parts of quants, scales and minimums, in tiles, as one PackedWeight."""
    n_tiles, first, tensors = -(-shape[0] // TILE), 0, {}
    for part in parts:
        for name, x in zip(("quants", "scales", "minimums"), part):
            if x is None:
                continue
            if name not in tensors:
                tensors[name] = x.new_empty((n_tiles, *x.shape[1:]))
            tensors[name][first : first + len(x)] = x
        first += len(part[0])
    return PackedWeight(format, shape, group, dtype, **tensors)


def _tiles(format: str, quants: Tensor, *scales: Tensor | None) -> tuple[Tensor | None, ...]:
    return _tile_quants(quants, format), *(None if s is None else _tile_scales(s, format) for s in scales)


def _tile_quants(quants: Tensor, format: str) -> Tensor:
    """(n, n_in) as tiles (n / 16, k, 16, elements of a word); see Layout."""
    unit = _UNIT.get(format, BLOCK)
    elements = {"float32": 1, "bf16": 2, "nf4": 8}.get(format, 4)
    quants = nn.functional.pad(quants, (0, -quants.shape[1] % unit, 0, -len(quants) % TILE))
    if format in ("float32", "bf16", "int8", "q8_0"):
        return _tile_words(quants)
    tiles = quants.view(-1, TILE, quants.shape[1] // elements, elements).transpose(1, 2)
    if format == "nf4":  # k is even in the low half of a word and odd in the other
        tiles = tiles.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
        return tiles[..., 0::2] | tiles[..., 1::2] << 4
    halves = tiles.unflatten(1, (-1, 2, 4))  # of a block of 32, the first 16 in the low nibbles and the others above
    return halves[:, :, 0] | halves[:, :, 1] << 4


def _tile_words(rows: Tensor) -> Tensor:
    """Rows of whole 32-bit words as tiles (n / 16, words, 16, elements of a word): words are moved as they are."""
    rows = nn.functional.pad(rows, (0, 0, 0, -len(rows) % TILE)).contiguous()
    words = rows.view(torch.int32).view(-1, TILE, rows.shape[1] * rows.itemsize // 4).transpose(1, 2).contiguous()
    return words.view(rows.dtype).unflatten(-1, (TILE, -1))


def _tile_scales(scales: Tensor, format: str) -> Tensor:
    """(n, groups) as (n / 16, groups, 16)."""
    scales = nn.functional.pad(scales, (0, 0, 0, -len(scales) % TILE))
    stored = {"int8": torch.float32, "nf4": torch.uint8}.get(format, torch.float16)
    return scales.to(stored).view(-1, TILE, scales.shape[1]).transpose(1, 2).contiguous()


def _pack_short(weight: Tensor) -> PackedWeight | None:
    """bf16 in 12 bits; None where more than one exponent in 64 would be an escape, or rows are longer than places."""
    n_out, n_in = weight.shape
    n_tiles = -(-n_out // TILE)
    exponents, counts = torch.empty(n_tiles, TILE, dtype=torch.uint8), torch.empty(n_tiles, dtype=torch.int32)

    def parts():
        for tile in range(0, n_tiles, CHUNK):
            part = weight[tile * TILE : (tile + CHUNK) * TILE].to(torch.bfloat16)
            part = part if part.stride(1) == 1 else part.contiguous()
            yield slice(tile, tile + CHUNK), (part.data_ptr(), *part.shape, part.stride(0)), part

    for tiles, matrix, _ in parts():
        cpu.kernels.bf16_exponents(exponents[tiles].data_ptr(), counts[tiles].data_ptr(), *matrix)
    if counts.sum() * 64 > weight.numel() or n_in >= 2**19:
        return None
    starts = nn.functional.pad((counts + 1).cumsum(0), (1, 0)).int()
    quants = torch.zeros(-(-n_tiles // 2), -(-n_in // 8), 2, 3, TILE * 4, dtype=torch.uint8)
    escapes = torch.empty(int(starts[-1]), dtype=torch.int32)
    for tiles, matrix, _ in parts():
        first = starts[tiles].data_ptr(), exponents[tiles].data_ptr()
        cpu.kernels.bf16_lines(quants[tiles.start // 2 :].data_ptr(), escapes.data_ptr(), *first, *matrix)
    return PackedWeight(
        "bf16", weight.shape, BLOCK, weight.dtype, quants=quants, scales=exponents, escapes=escapes, starts=starts
    )


@cache
def _nf4(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)


def _pack_nf4(weight: Tensor) -> PackedWeight:
    """Blocks of 64, the scales rounded again in blocks of 256 (Dettmers et al. 2023, "QLoRA", section 3): bitsandbytes'
    quantize_4bit. Its blocks run on from row to row, ours end with the row: the same where n_in is a multiple of 64."""
    table = _nf4(weight.device)
    quants, absmax = [], []
    for part in weight.split(CHUNK * TILE):
        blocks = nn.functional.pad(part.float(), (0, -part.shape[1] % 64)).view(len(part), -1, 64)
        absmax.append(blocks.abs().amax(-1))
        quants.append(_tile_quants(_nearest(blocks, absmax[-1], table).flatten(1), "nf4"))
    absmax = torch.cat(absmax)
    if not absmax.isfinite().all():
        raise PagodaError("a weight that is not finite cannot be packed as nf4")
    mean, codes = absmax.mean(), _dynamic_codes().to(weight.device)
    centered = (absmax - mean).flatten()
    blocks = nn.functional.pad(centered, (0, -len(centered) % 256)).view(-1, 256)
    factors = blocks.abs().amax(-1)
    # bitsandbytes looks this code up by 16 bits of the scaled number, so that is what is rounded (on CUDA it is exact:
    # there 2 scales in 1,000, which lie halfway between two codes, fall to the other one).
    grid = ((blocks / factors[:, None].clamp_min(1e-38) + 1) * 0.5 * 65535 + 0.5).int() / 65535 * 2 - 1
    scales = _nearest(grid, torch.ones_like(factors), codes).flatten()[: len(centered)].view(absmax.shape)
    tensors = {"quants": torch.cat(quants), "scales": _tile_scales(scales, "nf4")}
    return PackedWeight("nf4", weight.shape, 64, weight.dtype, codes=codes, absmax=factors, mean=mean[None], **tensors)


def _nearest(blocks: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """The index in a sorted table of the value nearest to each block / absmax; a tie goes to the lower one. uint8."""
    scaled = (blocks * (1 / absmax.clamp_min(1e-38))[..., None]).clamp(-1, 1)
    return torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def _dynamic_codes() -> Tensor:
    """The 256 numbers of an 8-bit code with a dynamic exponent (Dettmers 2016, arXiv:1511.04561), sorted. The decades
    10^-6..1 have 1, 2, 4 ... 64 of either sign, in the middle of equal intervals of 0.1..1 of them; then 0 and 1."""
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive.append(10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(positive)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values
