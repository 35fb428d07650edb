"""Weight formats: what rounding may cost, GGUF's bits against the gguf package, NF4 against numbers of bitsandbytes."""

import copy

import gguf
import pytest
import torch

from pagoda.common import PagodaError
from pagoda.ops.formats import FORMATS, PackedWeight, pack, pack_gguf, pack_integers

SHAPES = [(37, 100), (16, 64), (5, 7), (1, 1), (1100, 96)]
GGUF = ["Q4_0", "Q4_1", "Q8_0"]


def gguf_blocks(type, *shape):
    kind = gguf.GGMLQuantizationType[type]
    blocks = gguf.quants.quantize(torch.randn(shape).numpy(), kind)
    return torch.from_numpy(blocks), torch.from_numpy(gguf.quants.dequantize(blocks, kind))


@pytest.mark.parametrize("type", GGUF)
@pytest.mark.parametrize("shape", [(37, 96), (1100, 32), (16, 576)])
def test_gguf_bits_give_the_values_of_the_gguf_package(type, shape):
    blocks, values = gguf_blocks(type, *shape)
    assert torch.equal(pack_gguf(blocks, type, shape).dequantize(), values)
    rows = torch.randperm(shape[0])
    assert torch.equal(pack_gguf(blocks.flatten(), type, shape, rows).dequantize(), values[rows])


@pytest.mark.parametrize("type", GGUF)
def test_any_bytes_are_a_gguf_block(type):
    """Every quant and any float16 scale, subnormal and negative ones too; -128 occurs in files."""
    kind = gguf.GGMLQuantizationType[type]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = torch.randint(0, 256, (48, 3 * size), dtype=torch.uint8)
    for at in (1, 3) if type == "Q4_1" else (1,):  # keeps the exponents of scale and minimum below infinity's
        blocks.view(48, 3, size)[..., at] &= 0xBB
    values = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))
    assert torch.equal(pack_gguf(blocks, type, (48, 96)).dequantize(), values)


def test_gguf_sizes_are_those_of_the_file():
    for type, bits in (("Q4_0", 4.5), ("Q4_1", 5), ("Q8_0", 8.5)):
        blocks, _ = gguf_blocks(type, 64, 128)
        assert pack_gguf(blocks, type, (64, 128)).nbytes == blocks.nbytes == 64 * 128 * bits / 8


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_is_at_most_half_a_step(shape):
    weight = torch.randn(shape)
    group = torch.nn.functional.pad(weight, (0, -shape[1] % 32)).view(shape[0], -1, 32)
    spread = lambda t: t.repeat_interleave(32, -1)[:, : shape[1]]  # noqa: E731
    absmax, span = spread(group.abs().amax(-1)), spread(group.amax(-1) - group.amin(-1))
    steps = {
        "float32": torch.zeros(shape),
        "bf16": weight.abs() / 128,
        "int8": weight.abs().amax(-1, keepdim=True) / 127,
        "q8_0": absmax / 127,
        "q4_0": absmax / 4,  # the end opposite to the largest element is cut off at 7
        "int4": span / 15,
        "q4_1": span / 15,
    }
    for format, step in steps.items():
        error = (pack(weight, format).dequantize() - weight).abs()
        slack = 0.51 * step + 4e-3 * absmax * (format not in ("float32", "bf16"))  # float16 scales and minimums
        assert (error <= slack).all(), format


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_groups(group_size, symmetric):
    weight = torch.randn(20, 300)
    packed = pack(weight, "int4", group_size, symmetric)
    assert packed.scales.shape == (2, -(-300 // group_size), 16)
    assert (packed.minimums is None) == symmetric
    error = (packed.dequantize() - weight).norm() / weight.norm()
    assert error < 0.11
    # Packing what is already in the format changes nothing.
    if not symmetric:
        again = pack(packed.dequantize(), "int4", group_size)
        assert (again.dequantize() - packed.dequantize()).abs().max() < 2e-3


def test_ready_made_integers_are_kept():
    quants = torch.randint(0, 16, (19, 70), dtype=torch.uint8)
    scales, minimums = torch.rand(19, 3).half(), torch.randn(19, 3).half()
    spread = lambda t: t.float().repeat_interleave(32, -1)[:, :70]  # noqa: E731
    packed = pack_integers(quants, scales, minimums, "int4")
    assert torch.equal(packed.dequantize(), quants * spread(scales) + spread(minimums))
    packed = pack_integers(quants, scales, None, "int4")
    assert torch.equal(packed.dequantize(), (quants.float() - 8) * spread(scales))
    quants, scales = torch.randint(-128, 128, (19, 70), dtype=torch.int8), torch.rand(19, 1)
    assert torch.equal(pack_integers(quants, scales, None, "int8").dequantize(), quants * scales)


def test_nf4_gives_the_numbers_of_bitsandbytes():
    """bitsandbytes 0.50.2 on a CPU: quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")."""
    i = torch.arange(6 * 192, dtype=torch.float64)
    weight = (torch.sin(i * 0.7391) + 0.3 * torch.sin(i * i * 0.01)) * (1 + (i // 64) % 7) * 0.01
    packed = pack(weight.float().view(6, 192), "nf4")
    codes = [15, 36, 57, 181, 210, 231, 255, 15, 36, 57, 192, 212, 232, 251, 15, 36, 58, 190]
    assert packed.scales[0, :, :6].T.flatten().tolist() == codes
    assert packed.mean.item() == pytest.approx(0.04699020832777023, rel=1e-7)
    assert packed.absmax.tolist() == pytest.approx([0.04367411881685257], rel=1e-7)
    nibbles = torch.stack([packed.quants & 15, packed.quants >> 4], -1)[0, :3, 0].view(3, 2, 4).mT.flatten().tolist()
    assert nibbles[:24] == [
        n for byte in (125, 238, 147, 18, 92, 255, 232, 50, 56, 222, 198, 16) for n in divmod(byte, 16)
    ]
    values = packed.dequantize()
    expected = [
        -0.0386307091,
        -0.0202839449,
        0.0,
        0.0170249324,
        0.029412983,
        0.0176658276,
        -0.0047599934,
        -0.0274502262,
    ]
    assert values[3, 60:68].tolist() == pytest.approx(expected, rel=1e-7)
    assert values.double().sum().item() == pytest.approx(0.2757239870261401, rel=1e-6)
    assert values.double().abs().sum().item() == pytest.approx(27.67030775663443, rel=1e-6)


def test_nf4_bits_per_weight():
    assert pack(torch.randn(256, 2048), "nf4").nbytes * 8 / (256 * 2048) == pytest.approx(4.15, abs=0.02)


def bf16_matrices():
    """By name: what training leaves, what pruning leaves, rows that have died, and every kind of number there is."""
    torch.manual_seed(0)
    weight = torch.randn(200, 300).bfloat16()
    pruned, dead, odd = weight.clone(), weight.clone(), weight.clone()
    pruned[torch.rand_like(weight) < 0.5] = 0
    dead[::16] *= 1e-20
    odd[3, 5:9] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    odd[190:, 299] = torch.tensor([2.0**-130, -(2.0**-133), 3e38, 0, 1e-30, 1, 2, 3, 4, 5])  # two of them subnormal
    small = {"small": weight[:5, :7], "one": weight[:1, :1]}
    return {"trained": weight, "pruned": pruned, "dead": dead, "odd": odd, **small}


@pytest.mark.parametrize("name", bf16_matrices())
def test_bf16_in_12_bits_is_the_same_numbers(kernels, name):
    weight = bf16_matrices()[name]
    for part in (weight, weight.t(), weight[:, 1:], weight.float()):
        if not part.numel():
            continue
        packed = pack(part, "bf16")
        assert packed.scales is not None
        values = packed.dequantize(torch.bfloat16)
        assert torch.equal(values.view(torch.int16), part.bfloat16().contiguous().view(torch.int16))


def test_bf16_takes_12_bits_where_the_exponents_are_few(kernels):
    bits = lambda weight: 8 * pack(weight, "bf16").nbytes / weight.numel()  # noqa: E731
    assert bits(torch.randn(512, 1024) * 0.02) < 12.1
    scattered = torch.randn(512, 1024) * 2.0 ** torch.randint(-60, 60, (512, 1024))
    assert bits(scattered) == 16
    assert torch.equal(pack(scattered, "bf16").dequantize(), scattered.bfloat16().float())
    assert pack(torch.ones(1, 2**19), "bf16").scales is None  # longer than the place of an escape can say
    assert pack(torch.ones(1, 2**19 - 1), "bf16").scales is not None


@pytest.mark.parametrize("format", FORMATS)
def test_rows_and_dtypes(format):
    packed = pack(torch.randn(37, 100), format)
    ids = torch.tensor([0, 36, 5, 5, 16])
    assert torch.equal(packed.rows(ids), packed.dequantize()[ids])
    assert packed.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert packed.rows(ids[:0]).shape == (0, 100)


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_weight_moves_copies_and_saves_as_a_module(format):
    packed = pack(torch.randn(20, 70), format)
    values = packed.dequantize()
    address = packed.kernel_view()[0]
    twin = copy.deepcopy(packed)
    assert twin.kernel_view()[0] != address
    assert torch.equal(twin.dequantize(), values)
    twin.to(torch.bfloat16)
    assert twin.dtype == torch.bfloat16
    assert torch.equal(twin.dequantize(), values)
    other = pack(torch.zeros(20, 70), format)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dequantize(), values)
    meta = PackedWeight(format, packed.shape, packed.group_size, torch.float32, **packed.state_dict()).to("meta")
    assert meta.quants.is_meta
    assert meta.kernel_view()[0] == 0


def test_what_cannot_be_packed_is_an_error():
    weight = torch.randn(4, 64)
    with pytest.raises(PagodaError, match="unknown weight format"):
        pack(weight, "int3")
    with pytest.raises(PagodaError, match="group"):
        pack(weight, "int4", group_size=48)
    for empty in (weight[:0], weight[:, :0], weight[0]):
        for format in FORMATS:
            with pytest.raises(PagodaError, match="cannot be packed"):
                pack(empty, format)
    with pytest.raises(PagodaError, match="not kept packed"):
        pack_gguf(torch.zeros(210, dtype=torch.uint8), "Q6_K", (1, 256))
    with pytest.raises(PagodaError, match="bytes do not hold"):
        pack_gguf(torch.zeros(17, dtype=torch.uint8), "Q4_0", (1, 32))
    with pytest.raises(PagodaError, match="groups"):
        pack_integers(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 5), None, "int4")
    weight[1, 2] = torch.inf
    for format in ("int8", "int4", "q4_0", "q8_0", "nf4"):
        with pytest.raises(PagodaError, match="not finite"):
            pack(weight, format)
