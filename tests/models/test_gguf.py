"""The GGUF reader against the `gguf` package and against transformers, on tiny files written here."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf import dequantize as reference_dequantize
from gguf.constants import GGML_QUANT_SIZES

from pagoda.common import PagodaError
from pagoda.models.gguf import TYPES, dequantize, hf_config, hf_name, hf_tensors, read_gguf, row_permutation
from pagoda.models.loader import GGUFFile, load, release_pages
from pagoda.ops.formats import PackedWeight


def write(path, tensors=(), metadata=(), arch="llama"):
    """A GGUF file; `metadata` holds (writer method, key, value)."""
    writer = GGUFWriter(path, arch)
    for method, key, value in metadata:
        getattr(writer, f"add_{method}")(key, value)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes make scales of inf and nan as well
@pytest.mark.parametrize("type_id", TYPES)
def test_every_type_dequantizes_as_the_gguf_package_does(tmp_path, type_id):
    name, block, size = TYPES[type_id]
    kind = GGMLQuantizationType(type_id)
    assert (kind.name, GGML_QUANT_SIZES[kind]) == (name, (block, size))
    rng = np.random.default_rng(type_id)
    raw = rng.integers(0, 256, (6, 512 // block * size), dtype=np.uint8)
    if type_id < 2:  # the writer takes these by their dtype
        raw = raw.view([np.float32, np.float16][type_id])
    tensor = read_gguf(write(tmp_path / "a.gguf", [("blk.0.ffn_up.weight", raw, kind)])).tensors["blk.0.ffn_up.weight"]
    assert (tensor.type, tensor.shape, tensor.data.shape) == (name, (6, 512), (6, 512 // block * size))
    np.testing.assert_array_equal(tensor.data.numpy().view(raw.dtype), raw)

    expected = reference_dequantize(raw.view(np.uint8), kind).astype(np.float32)
    np.testing.assert_array_equal(np.isfinite(dequantize(tensor).numpy()), np.isfinite(expected))
    np.testing.assert_allclose(dequantize(tensor).numpy(), expected, rtol=1e-6)
    rows = torch.tensor([3, 1, 5, 0, 4, 2])
    np.testing.assert_allclose(dequantize(tensor, rows=rows).numpy(), expected[rows], rtol=1e-6)
    out = torch.zeros(6, 512, dtype=torch.bfloat16)
    assert dequantize(tensor, out=out) is out
    torch.testing.assert_close(out, torch.from_numpy(expected).bfloat16(), equal_nan=True)


def test_dequantization_in_chunks_equals_one_chunk(tmp_path, monkeypatch):
    raw = np.random.default_rng(0).integers(0, 60, (50, 2 * 20), dtype=np.uint8)
    path = write(tmp_path / "a.gguf", [("t", raw, GGMLQuantizationType.Q4_1)])
    whole = dequantize(read_gguf(path).tensors["t"])
    monkeypatch.setattr("pagoda.models.gguf.CHUNK", 3 * 64)
    assert torch.equal(dequantize(read_gguf(path).tensors["t"]), whole)


def test_metadata_equals_the_gguf_packages(tmp_path):
    metadata = [
        ("uint8", "a.u8", 200),
        ("int8", "a.i8", -3),
        ("uint16", "a.u16", 60000),
        ("int16", "a.i16", -3000),
        ("uint32", "a.u32", 4_000_000_000),
        ("int32", "a.i32", -5),
        ("uint64", "a.u64", 1 << 60),
        ("int64", "a.i64", -(1 << 60)),
        ("float64", "a.f64", 0.1),
        ("bool", "a.yes", True),
        ("string", "a.text", "Grüße, 世界 \0 😀"),
        ("array", "a.ints", list(range(-5, 300))),
        ("array", "a.floats", [0.5, -2.0]),
        ("array", "a.flags", [True, False]),
        ("array", "a.words", ["", "a", "Ġ世", "x" * 255]),
        ("array", "a.long_words", ["b", "x" * 256, "c", "y" * 70000]),
        ("array", "a.zero_bytes", ["b", "\0", "c\0d"]),
        ("array", "tokenizer.ggml.tokens", [f"token{i}é" * (i % 17) for i in range(3000)]),
    ]
    path = write(tmp_path / "a.gguf", [("t", np.ones(3, np.float32), None)], metadata)
    got = read_gguf(path).metadata
    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items() if not key.startswith("GGUF.")}
    assert got == fields
    assert [key for _, key, _ in metadata] == list(got)[1:]


def test_float32_metadata_is_the_shortest_decimal(tmp_path):
    path = write(tmp_path / "a.gguf", [("t", np.ones(3, np.float32), None)], [("float32", "eps", 1e-5)])
    assert read_gguf(path).metadata["eps"] == 1e-5


def test_release_lets_go_of_the_pages(tmp_path):
    path = write(tmp_path / "a.gguf", [("t", np.ones((4096, 1024), np.float32), None)])
    tensor = read_gguf(path).tensors["t"]

    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("needs /proc")

    def resident():  # kilobytes of the mapping in memory
        text = smaps.read_text()
        return int(text[text.index(str(path)) :].split("Rss:")[1].split()[0])

    assert dequantize(tensor).sum() == 4096 * 1024
    assert resident() >= 16 * 1024
    release_pages(tensor.mapping, tensor.offset, tensor.offset + tensor.nbytes)
    assert resident() < 256
    assert dequantize(tensor).sum() == 4096 * 1024  # read again


# Models ---------------------------------------------------------------------------------------------------------------


def permuted(weight, n_head):
    """llama.cpp's `LlamaModel.permute`."""
    shape = weight.shape
    return weight.reshape(n_head, 2, shape[0] // n_head // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


GGUF_NAMES = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers", "blk"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("mlp.", "ffn_"),
    ("_proj.", "."),
]


def write_model(path, model, arch, quantize=None, extra=(), metadata=()):
    """A transformers model as llama.cpp's converter writes it, its matrices in the type `quantize`."""
    config, tensors = model.config, []
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy()
        if arch == "llama" and "q_proj" in name:
            array = permuted(array, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            array = permuted(array, config.num_key_value_heads)
        for theirs, ours in GGUF_NAMES:
            name = name.replace(theirs, ours)
        kind = None
        if quantize is not None and array.ndim == 2:
            from gguf.quants import quantize as pack

            array, kind = pack(array, quantize), quantize
        tensors.append((name, array, kind))
    values = [
        ("uint32", "block_count", config.num_hidden_layers),
        ("uint32", "context_length", config.max_position_embeddings),
        ("uint32", "embedding_length", config.hidden_size),
        ("uint32", "feed_forward_length", config.intermediate_size),
        ("uint32", "attention.head_count", config.num_attention_heads),
        ("uint32", "attention.head_count_kv", config.num_key_value_heads),
        ("float32", "attention.layer_norm_rms_epsilon", config.rms_norm_eps),
        ("float32", "rope.freq_base", config.rope_parameters["rope_theta"]),
    ]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if arch == "llama":
        values += [("uint32", "rope.dimension_count", head_dim)]
    elif arch == "qwen3":
        values += [("uint32", "attention.key_length", head_dim), ("uint32", "attention.value_length", head_dim)]
    values = [(method, f"{arch}.{key}", value) for method, key, value in values]
    values += [("string", "general.name", "tiny"), ("uint32", "tokenizer.ggml.bos_token_id", 1)]
    values += [("uint32", "tokenizer.ggml.eos_token_id", 2)]
    values += [("array", "tokenizer.ggml.tokens", [f"t{i}" for i in range(config.vocab_size)])]
    return write(path, [*tensors, *extra], [*values, *metadata], arch)


def tiny(arch, **options):
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = getattr(transformers, names[arch] + "Config")(**(shape | options))
    torch.manual_seed(0)
    model = getattr(transformers, names[arch] + "ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # norms and biases begin as ones and zeros
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("arch", "tied", "kind"),
    [
        ("llama", True, "Q8_0"),
        ("llama", False, None),
        ("qwen2", False, "Q4_0"),
        ("qwen2", True, None),
        ("qwen3", True, None),
    ],
)
def test_weights_and_configuration_equal_transformers(tmp_path, arch, tied, kind):
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = tiny(arch, tie_word_embeddings=tied, rope_theta=5e5, **({"head_dim": 128} if arch == "qwen3" else {}))
    path = write_model(tmp_path / "m.gguf", model, arch, None if kind is None else GGMLQuantizationType[kind])
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    gguf = read_gguf(path)
    got = {name: dequantize(tensor, rows=rows) for name, tensor, rows in hf_tensors(gguf)}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=0, msg=name)

    config = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    ours = hf_config(gguf)
    assert ours.pop("rope_scaling") is None
    assert ours.pop("architectures") == [type(model).__name__]
    if arch == "qwen2":
        assert ours.pop("head_dim") == 16
    ours["rms_norm_eps"] = pytest.approx(ours["rms_norm_eps"])
    assert ours == {key: config[key] for key in ours}


HALVES = {"Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def any_blocks(kind, n_rows, n_columns):
    """Random bytes (n_rows, bytes of a row) as blocks of a type, whose scales and minimums are near 0.01."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.random.default_rng(0).integers(0, 256, (n_rows, n_columns // block, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = np.random.default_rng(at).uniform(-0.01, 0.01, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(n_rows, -1)


@pytest.mark.parametrize("kind", HALVES)
def test_blocks_without_a_kernel_of_their_own_are_packed_in_another(tmp_path, kind):
    """Q5_0 exactly, Q4_K but for the rounding of its scales, the others to half a step of 8 bits."""
    raw = any_blocks(kind, 24, 512)
    path = write(tmp_path / "a.gguf", [("t", raw, GGMLQuantizationType[kind])])
    exact = torch.from_numpy(reference_dequantize(raw, GGMLQuantizationType[kind]))
    rows = torch.randperm(24)
    file = GGUFFile.__new__(GGUFFile)
    file._tensors = {"t": (read_gguf(path).tensors["t"], rows)}
    packed = file.packed("t", torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert packed.format == ("q4_1" if kind == "Q4_K" else "q8_0")
    largest = exact.view(24, -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(24, 512)
    step = {"Q5_0": 0, "Q4_K": 2**-9}.get(kind, 1.01 / 254)
    assert ((packed.dequantize() - exact[rows]).abs() <= step * largest[rows]).all()


@pytest.mark.parametrize(("kind", "format"), [("BF16", "bf16"), ("F16", "float32"), (None, "float32")])
def test_floats_keep_their_numbers(tmp_path, kind, format):
    model = tiny("llama", tie_word_embeddings=False)
    path = write_model(tmp_path / "m.gguf", model, "llama", kind and GGMLQuantizationType[kind])
    loaded, expected = load(path, torch.float32, quantize="own"), load(path, torch.float32).state_dict()
    weights = {name: m for name, m in loaded.named_modules() if isinstance(m, PackedWeight)}
    assert len(weights) > 10
    for name, weight in weights.items():
        assert weight.format == format
        assert torch.equal(weight.dequantize(), expected[name])


def test_row_permutation_undoes_llama_cpps():
    weight = np.random.default_rng(0).normal(size=(48, 5))
    np.testing.assert_array_equal(permuted(weight, 3)[row_permutation(3, 48)], weight)


def test_biases_of_llama_are_permuted_too(tmp_path):
    model = tiny("llama", attention_bias=True)
    gguf = read_gguf(write_model(tmp_path / "m.gguf", model, "llama"))
    got = {name: dequantize(tensor, rows=rows) for name, tensor, rows in hf_tensors(gguf)}
    assert hf_config(gguf)["attention_bias"] is True
    name = "model.layers.1.self_attn.k_proj.bias"
    torch.testing.assert_close(got[name], model.state_dict()[name])


@pytest.mark.parametrize("original", [8192, 64])
def test_llama3_scaling_comes_back_from_the_tensor_of_factors(tmp_path, original):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = original
    model = tiny("llama", rope_theta=10000.0)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters=scaling | {"rope_theta": 10000.0},
        max_position_embeddings=512,
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = [("rope_freqs.weight", (plain / wanted).float().numpy(), None)]
    gguf = read_gguf(write_model(tmp_path / "m.gguf", model, "llama", extra=factors))
    assert "rope_freqs.weight" not in {name for name, _, _ in hf_tensors(gguf)}
    got = hf_config(gguf)["rope_scaling"]
    if original == 8192:
        assert got == scaling
    # Whatever it is called, transformers computes the same frequencies from it.
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters=got | {"rope_theta": 10000.0},
        max_position_embeddings=128,
    )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[got["rope_type"]](config, "cpu", seq_len=8)
    torch.testing.assert_close(frequencies, wanted, rtol=1e-4, atol=0)
    assert attention_factor == 1.0


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_from_metadata(tmp_path, kind):
    values = [("string", "llama.rope.scaling.type", kind), ("float32", "llama.rope.scaling.factor", 4.0)]
    values += [("uint32", "llama.rope.scaling.original_context_length", 32)]
    gguf = read_gguf(write_model(tmp_path / "m.gguf", tiny("llama"), "llama", metadata=values))
    expected = {"rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        expected["original_max_position_embeddings"] = 32
    assert hf_config(gguf)["rope_scaling"] == expected


def test_unknown_names_stay_visible():
    assert hf_name("blk.3.attn_output.weight") == "model.layers.3.self_attn.o_proj.weight"
    assert hf_name("blk.3.attn_sinks.weight") == "blk.3.attn_sinks.weight"


# Bad files ------------------------------------------------------------------------------------------------------------


def test_unsupported_architectures_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", [("t", np.ones(3, np.float32), None)], arch="rwkv6")
    with pytest.raises(PagodaError, match="unsupported GGUF architecture 'rwkv6'"):
        hf_config(read_gguf(path))


def test_missing_metadata_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", [("t", np.ones(3, np.float32), None)])
    with pytest.raises(PagodaError, match=r"lacks 'llama\.block_count'"):
        hf_config(read_gguf(path))


@pytest.mark.parametrize(
    ("value", "message"), [(0, "'num_attention_heads' is 0"), ([4, 2], "'num_attention_heads' differs between layers")]
)
def test_impossible_sizes_are_named(tmp_path, value, message):
    gguf = read_gguf(write_model(tmp_path / "m.gguf", tiny("llama"), "llama"))
    gguf.metadata["llama.attention.head_count"] = value
    with pytest.raises(PagodaError, match=message):
        hf_config(gguf)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 10**9, "1000000000 layers and 21 tensors"),
        ("llama.rope.freq_base", 0.0, "freq_base' is 0.0"),
        ("llama.rope.freq_base", float("nan"), "freq_base' is nan"),
    ],
)
def test_corrupt_metadata_is_named(tmp_path, key, value, message):
    gguf = read_gguf(write_model(tmp_path / "m.gguf", tiny("llama"), "llama"))
    gguf.metadata[key] = value
    with pytest.raises(PagodaError, match=message):
        hf_config(gguf)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = write_model(tmp_path / "m.gguf", tiny("llama"), "llama")
    whole, cut = path.read_bytes(), tmp_path / "cut.gguf"
    last = max(tensor.offset + tensor.nbytes for tensor in read_gguf(path).tensors.values())
    sizes = [0, 3, 4, 10, 23, *np.random.default_rng(0).integers(24, last, 60).tolist(), last - 1]
    for size in sizes:
        cut.write_bytes(whole[:size])
        with pytest.raises(PagodaError, match=r"cut\.gguf: .*(truncated|not a GGUF file|corrupt)"):
            read_gguf(cut)


def test_a_file_with_flipped_bytes_never_crashes(tmp_path):
    path = write_model(tmp_path / "m.gguf", tiny("llama"), "llama")
    whole = bytearray(path.read_bytes())
    header = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    rng = np.random.default_rng(0)
    for position in rng.integers(0, header, 100):
        broken = bytearray(whole)
        broken[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with contextlib.suppress(PagodaError):
            hf_config(read_gguf(path))


def header(version=3, tensors=(), metadata=b"", n_metadata=0):
    data = b"GGUF" + struct.pack("<IQQ", version, len(tensors), n_metadata) + metadata
    for name, shape, type_id, offset in tensors:
        data += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        data += struct.pack("<IQ", type_id, offset)
    return data + b"\0" * (-len(data) % 32 + 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 and so on", "not a GGUF file"),
        (header(version=1), "version 1 is not supported"),
        (header(version=3 << 24), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(64), "claims"),
        (header(metadata=struct.pack("<Q", 1) + b"k" + struct.pack("<I", 77), n_metadata=1), "metadata type 77"),
        (header(tensors=[(b"t", (32,), 99, 0)]), "'t' has the type number 99"),
        (header(tensors=[(b"t", (32,), 20, 0)]), "'t' has the type IQ4_NL"),
        (header(tensors=[(b"t", (33,), 2, 0)]), "corrupt GGUF file"),
        (header(tensors=[(b"t", (4,), 0, 7)]), "corrupt GGUF file"),
        (header(tensors=[(b"t", (4,), 0, 0), (b"t", (4,), 0, 32)]), "two tensors are called 't'"),
        (header(tensors=[(b"t", (4,), 0, 1 << 40)]), "truncated GGUF file, tensor 't' ends at byte"),
        (header(tensors=[(b"t", (1 << 40, 1 << 40), 0, 0)]), "truncated GGUF file, tensor 't' ends at byte"),
    ],
)
def test_corrupt_files_say_what_is_wrong(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(PagodaError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_an_error():
    with pytest.raises(PagodaError, match="cannot read nowhere"):
        read_gguf("nowhere.gguf")
