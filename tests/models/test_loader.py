"""Checkpoints in and out: what is refused and how it is said, and how much memory loading takes."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pagoda.common import PagodaError
from pagoda.models.loader import load, save
from pagoda.models.registry import from_hf_config


@pytest.fixture
def directory(tmp_path):
    tiny.saved("llama", tmp_path / "model")
    return tmp_path / "model"


def change_config(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_weights(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(path, *said):
    with pytest.raises(PagodaError) as e:
        load(path)
    message = str(e.value)
    assert "\n" not in message
    for words in said:
        assert words in message
    return message


def test_unsupported_architecture_is_named(directory):
    change_config(directory, model_type="mamba2", architectures=["Mamba2ForCausalLM"])
    refused(directory, "architecture 'mamba2' is not supported", "llama")


def test_architecture_alone_is_enough(directory):
    config = json.loads((directory / "config.json").read_text())
    del config["model_type"]
    (directory / "config.json").write_text(json.dumps(config))
    assert type(load(directory)).__name__ == "Llama"


def test_directory_without_config(directory):
    (directory / "config.json").unlink()
    refused(directory, str(directory), "no config.json")


def test_broken_config(directory):
    (directory / "config.json").write_text('{"model_type": "llama", ')
    refused(directory, "config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "48"), ("vocab_size", None), ("num_hidden_layers", -1), ("rope_parameters", "x")],
)
def test_config_values_of_the_wrong_kind(directory, key, value):
    change_config(directory, **{key: value})
    refused(directory, str(directory), repr(value) if key != "rope_parameters" else "makes no sense")


def test_config_that_is_no_object(directory):
    (directory / "config.json").write_text("[]")
    refused(directory, "config.json: not a JSON object")


def test_config_without_a_size(directory):
    config = json.loads((directory / "config.json").read_text())
    del config["hidden_size"]
    (directory / "config.json").write_text(json.dumps(config))
    refused(directory, "'hidden_size' is missing")


def test_truncated_safetensors(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(directory, "model.safetensors", "not a readable safetensors file", "download or copy it again")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 4096, b"\x10" + bytes(7) + b"{not json at all"])
def test_corrupt_safetensors(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    refused(directory, "model.safetensors", "not a readable safetensors file")


def test_missing_weights_are_listed(directory):
    change_weights(directory, lambda t: [t.pop(f"model.layers.1.mlp.{m}_proj.weight") for m in ("up", "down")])
    refused(directory, "missing weights: model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.up_proj.weight")


def test_unexpected_weights_are_listed(directory):
    change_weights(directory, lambda t: t.update({f"model.layers.0.extra_{i}.weight": torch.ones(2) for i in range(9)}))
    refused(directory, "unexpected weights: model.layers.0.extra_0.weight", "and 4 more")


def test_wrong_shapes_name_the_weight(directory):
    change_weights(directory, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    refused(directory, "model.norm.weight has shape (7,), the configuration asks for (32,)")


def test_wrong_shapes_of_experts_name_the_weight(tmp_path):
    tiny.saved("mixtral", tmp_path)
    for changed in ("0.w1", "2.w3"):
        name = f"model.layers.1.block_sparse_moe.experts.{changed}.weight"
        change_weights(tmp_path, lambda t, name=name: t.update({name: torch.ones(7, 32)}))
        refused(tmp_path, "block_sparse_moe.experts.", "has shape")


def test_pickled_weights_are_refused_with_the_way_out(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    refused(directory, "only pickled weights (pytorch_model.bin)", "save_pretrained")


def test_directory_without_weights(directory):
    (directory / "model.safetensors").unlink()
    refused(directory, "no *.safetensors file")


def test_missing_shard(tmp_path):
    tiny.saved("llama", tmp_path, max_shard_size="10KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(tmp_path, gone.name, "missing")


def test_index_without_map(tmp_path):
    tiny.saved("llama", tmp_path, max_shard_size="10KB")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, "model.safetensors.index.json", "no weight_map")


UNSUPPORTED = {
    "llama": [
        ({"hidden_act": "snake"}, "activation 'snake' is not supported"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rotary scaling 'spiral' is not supported"),
        ({"rope_parameters": None, "partial_rotary_factor": 0.5}, "llama with partial_rotary_factor = 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
    ],
    "gpt2": [({"add_cross_attention": True}, "add_cross_attention = True")],
    "phi": [({"qk_layernorm": True}, "qk_layernorm = True")],
    "gemma": [({"use_bidirectional_attention": True}, "use_bidirectional_attention = True")],
    "gemma2": [({"layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention'")],
    "gemma3": [({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0")],
    "bloom": [({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True")],
    "falcon-40b": [({"parallel_attn": False}, "parallel_attn = False")],
    "opt": [({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False")],
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_options_that_would_change_the_results_are_refused(name):
    model_type, options = tiny.VARIATIONS[name]
    for change, said in UNSUPPORTED[name]:
        with pytest.raises(PagodaError, match="here: ") as e:
            from_hf_config({"model_type": model_type, **options, **change}, "here")
        assert said in str(e.value)


def test_save_refuses_an_existing_target(directory, tmp_path):
    model = load(directory)
    before = sorted(f.name for f in directory.iterdir())
    with pytest.raises(PagodaError, match="exists already"):
        save(model, directory)
    assert sorted(f.name for f in directory.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PagodaError, match="exists already"):
        save(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_save_leaves_nothing(directory, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        (args[1].parent / "half-written").write_text("")
        raise OSError("disk full")

    model = load(directory)
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(PagodaError, match="disk full"):
        save(model, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]


def test_an_unwritable_target_is_said_so_and_readable_files_are_left(directory, tmp_path):
    model = load(directory)
    (tmp_path / "file").touch()
    with pytest.raises(PagodaError, match=r"cannot write .*: (File exists|Not a directory)"):
        save(model, tmp_path / "file" / "model")
    save(model, tmp_path / "new")
    modes = {f.stat().st_mode for f in (tmp_path / "new").iterdir()}
    assert len(modes) == 1  # safetensors alone would write files for their owner only


def test_an_empty_directory_may_be_saved_into(directory, tmp_path):
    (tmp_path / "out").mkdir()
    save(load(directory), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_loaded_parameters_are_views_unless_they_train(directory):
    """A view of the mapped file is private: writing to it changes neither the file nor another model."""
    one, other, trained = load(directory), load(directory), load(directory, trainable=True)
    assert not any(p.requires_grad for p in one.parameters())
    assert all(p.requires_grad for p in trained.parameters())
    with torch.no_grad():
        one.norm.weight.zero_()
    assert other.norm.weight.abs().sum() > 0
    assert load(directory).norm.weight.abs().sum() > 0


MEASURE = """
import sys, torch
from pagoda.models.loader import load

def status(key):  # bytes, mapped pages counted (ru_maxrss would begin with the parent's)
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))

dtype = {"none": None, "float32": torch.float32}[sys.argv[2]]
# The code itself must be in memory before the weights are: load a small model first.
load(sys.argv[3], dtype=dtype)(torch.arange(4))
before = status("VmRSS")
model = load(sys.argv[1], dtype=dtype)
total = sum(p.numel() * p.element_size() for p in model.parameters())
for p in model.parameters():
    p.view(-1)[::256].float().sum()  # every page is touched
print((status("VmHWM") - before) / total, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(("stored", "wanted"), [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "float32")])
def test_loading_raises_peak_memory_by_little_more_than_the_weights(name, stored, wanted, directory, tmp_path):
    model_type, options = tiny.VARIATIONS[name]
    big = dict(hidden_size=512, intermediate_size=2048, vocab_size=16000, num_hidden_layers=6)
    if name == "mixtral":
        big = dict(hidden_size=512, intermediate_size=1024, vocab_size=8000, num_hidden_layers=4)
    torch.manual_seed(0)
    model = from_hf_config({"model_type": model_type, **options, **big})
    model.init_weights()
    save(model, tmp_path / "big", dtype=getattr(torch, stored))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "big", wanted, directory], capture_output=True, text=True, check=True
    )
    ratio, total = map(float, run.stdout.split())
    assert total > 60e6
    assert 0.9 < ratio < 1.2
