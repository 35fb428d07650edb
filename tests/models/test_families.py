"""Every family against transformers: logits, greedy tokens with the cache, the round trip through `save`, gradients."""

import dataclasses
import json
from functools import cache

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from tiny import VARIATIONS

from pagoda.common import PagodaError
from pagoda.models.batch import Batch
from pagoda.models.loader import load, save
from pagoda.models.registry import (
    count_parameters,
    families,
    from_hf_config,
    known_config,
    known_models,
    read_config,
)

TOLERANCE = dict(atol=1e-4, rtol=0)
# What ALiBi and the scalings by length make of a text depends on its length: these go beyond the original context.
LENGTHS = (23, 9, 40)

# transformers' generate is slow: one of each kind, and those where only it keeps the right cache.
GENERATED = (
    *("llama", "llama-dynamic", "mistral-window", "mixtral", "qwen2-window", "qwen3_moe", "gpt_neox", "gpt2", "phi"),
    *("phi3-longrope", "phi3-longrope-partial", "gemma2", "gemma3", "bloom", "falcon-40b", "falcon-rw", "opt-350m"),
)

every_variation = pytest.mark.parametrize("name", VARIATIONS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they give on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' model, ours, its directory) of a variation, made once."""

    @cache
    def get(name):
        path = tmp_path_factory.mktemp(name)
        theirs = tiny.saved(name, path)
        return theirs, load(path), path

    return get


def fresh(name):
    """transformers' model without the state that dynamic and longrope scaling keep from earlier calls."""
    return tiny.make(name)


@every_variation
def test_logits_match_transformers(name, pair):
    _, ours, _ = pair(name)
    for length in LENGTHS:
        ids = tiny.prompt(length, seed=length)
        torch.testing.assert_close(ours(ids), tiny.hf_logits(fresh(name), ids), **TOLERANCE)


@every_variation
def test_sequences_of_a_batch_do_not_see_each_other(name, pair):
    _, ours, _ = pair(name)
    prompts = [tiny.prompt(n, seed=n) for n in LENGTHS]
    together = ours(torch.cat(prompts), Batch.of([len(p) for p in prompts])).split([len(p) for p in prompts])
    for p, logits in zip(prompts, together):
        torch.testing.assert_close(logits, ours(p), **TOLERANCE)


@every_variation
def test_greedy_tokens_with_cache_are_the_likeliest_by_transformers(name, pair):
    _, ours, _ = pair(name)
    if "dynamic" in name or "longrope" in name:
        pytest.skip("whose logits of a whole text are not those of its parts: see the next test")
    prompts = [tiny.prompt(n, seed=n) for n in (5, 20)]
    for p, new in zip(prompts, tiny.greedy(ours, prompts, 32)):
        logits = tiny.hf_logits(fresh(name), torch.cat([p, torch.tensor(new)]))
        assert logits[len(p) - 1 : -1].argmax(-1).tolist() == new


@pytest.mark.parametrize("name", GENERATED)
def test_greedy_tokens_with_cache_match_generate_of_transformers(name, pair):
    _, ours, _ = pair(name)
    prompts = [tiny.prompt(n, seed=n) for n in (5, 20)]
    expected = [tiny.hf_greedy(fresh(name), p, 32) for p in prompts]
    assert tiny.greedy(ours, prompts, 32) == expected


@pytest.mark.parametrize(
    "name", ["llama", "llama-dynamic", "mistral-window", "gemma2", "bloom", "opt", "qwen3_moe", "phi3-longrope"]
)
def test_greedy_tokens_with_chunked_prefill_and_small_pages(name, pair):
    _, ours, _ = pair(name)
    prompts = [tiny.prompt(n, seed=n) for n in (21, 3, 12)]
    assert tiny.greedy(ours, prompts, 16, page_size=4, chunk=5) == tiny.greedy(ours, prompts, 16)


@every_variation
def test_saved_again_it_opens_in_transformers(name, pair, tmp_path):
    theirs, ours, path = pair(name)
    save(ours, tmp_path / "again")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values())
    ids = tiny.prompt(12)
    torch.testing.assert_close(tiny.hf_logits(back, ids), tiny.hf_logits(fresh(name), ids), atol=1e-6, rtol=0)
    assert stored(tmp_path / "again") == stored(path)
    assert dict(back.named_parameters()).keys() == dict(theirs.named_parameters()).keys()


def stored(path):
    """Names, shapes and types of the tensors in a directory's files."""
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found |= {name: (f.get_slice(name).get_shape(), f.get_slice(name).get_dtype()) for name in f.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_sharded_directories_in_both_directions(name, tmp_path):
    theirs = tiny.saved(name, tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load(tmp_path / "theirs")
    ids = tiny.prompt(12)
    torch.testing.assert_close(ours(ids), tiny.hf_logits(theirs, ids), **TOLERANCE)
    save(ours, tmp_path / "ours", max_shard_bytes=10_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(tiny.hf_logits(back, ids), tiny.hf_logits(theirs, ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma", "mixtral", "gpt2"])
def test_loading_and_saving_in_another_dtype(name, pair, tmp_path):
    theirs, _, path = pair(name)
    half = load(path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save(half, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    for (param, a), b in zip(back.named_parameters(), theirs.parameters()):
        assert torch.equal(a, b.bfloat16()), param
    save(load(tmp_path / "half"), tmp_path / "wide", dtype=torch.float32)
    assert {dtype for _, dtype in stored(tmp_path / "wide").values()} == {"F32"}


# --- Training: losses, gradients, embeddings as input


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-350m", "bloom", "gpt2"])
def test_embeddings_as_input_equal_ids(name, pair):
    theirs, ours, _ = pair(name)
    ids = tiny.prompt(12)
    torch.testing.assert_close(ours(ours.embed(ids)), ours(ids), atol=1e-6, rtol=0)
    # and they mean what transformers means by inputs_embeds
    torch.testing.assert_close(ours.embed(ids), theirs.get_input_embeddings()(ids), atol=1e-6, rtol=0)
    two = ids.view(2, 6)
    torch.testing.assert_close(ours(ours.embed(two)), ours(two), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2-low-caps", "phi", "opt-350m", "gpt2", "falcon-rw"])
def test_losses_of_targets_match_cross_entropy(name, pair):
    _, ours, _ = pair(name)
    ids = tiny.prompt(24).view(2, 12)
    targets = tiny.prompt(24, seed=5).view(2, 12)
    targets[0, 3] = targets[1, :2] = -100
    expected = F.cross_entropy(ours(ids).flatten(0, 1), targets.flatten(), reduction="none").view(2, 12)
    torch.testing.assert_close(ours(ids, targets=targets), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied-biases-head_dim",
        "mixtral",
        "qwen3_moe-mixed",
        "gpt_neox",
        "gpt2",
        "phi3",
        "gemma3-scaled-capped",
        "bloom",
        "falcon-40b",
        "opt-350m",
    ],
)
def test_gradients_match_transformers(name, tmp_path):
    theirs = tiny.saved(name, tmp_path / "theirs")
    ours = load(tmp_path / "theirs", trainable=True)
    ids = tiny.prompt(26).view(2, 13)
    logits = theirs(ids[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    ours(ids[:, :-1], targets=ids[:, 1:]).mean().backward()

    # Gradients take the way of the weights: put them in the weights' place, and save.
    for model in (theirs, ours):
        for param in model.parameters():
            param.data = param.grad
    save(ours, tmp_path / "ours-grad")
    theirs.save_pretrained(tmp_path / "theirs-grad")
    a, b = (load(tmp_path / place) for place in ("ours-grad", "theirs-grad"))
    for (param, x), y in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3, msg=lambda m, p=param: f"{p}: {m}")


def test_initial_weights_have_transformers_spread():
    hf = {"model_type": "llama", **tiny.VARIATIONS["llama"][1], "hidden_size": 256, "initializer_range": 0.05}
    ours = from_hf_config(hf)
    ours.init_weights(torch.Generator().manual_seed(0))
    assert ours.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(ours.norm.weight, torch.ones(256))


# --- Configurations


@pytest.mark.parametrize("family", families(), ids=lambda f: f.__name__)
def test_defaults_are_those_of_transformers(family):
    fields = dataclasses.fields(type(transformers.AutoConfig.for_model(family.model_types[0])))
    theirs = {f.name: f.default for f in fields}
    ours = {**family.defaults, **getattr(family, "text_defaults", {})}
    assert ours == {key: theirs[key] for key in ours}


@pytest.mark.parametrize(
    "name", ["llama", "mixtral", "qwen3", "gpt_neox", "phi", "phi3", "gemma", "gemma3", "falcon-7b"]
)
def test_default_rotary_parameters_are_those_of_transformers(name):
    model_type, options = VARIATIONS[name]
    theirs = transformers.AutoConfig.for_model(model_type, **options).rope_parameters
    _, config = read_config({"model_type": model_type, **options})
    if name == "gemma3":
        assert config.rope_local["rope_theta"] == theirs["sliding_attention"]["rope_theta"]
        theirs = theirs["full_attention"]
    assert config.rope["rope_theta"] == theirs["rope_theta"]
    assert config.rope["partial_rotary_factor"] == theirs.get("partial_rotary_factor", 1.0)


OLD_SPELLINGS = {
    "llama-linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-llama3": {
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "gpt_neox-sequential": {"rotary_pct": 1.0, "rotary_emb_base": 10000},
    "phi-tied": {"partial_rotary_factor": 0.75, "rope_theta": 10000.0},
    "phi3-longrope": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 3.0, 4.0],
        },
    },
    "gemma3-scaled-capped": {
        "rope_theta": 5000.0,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_old_spelling_of_rotary_parameters_means_the_same(name, pair, tmp_path):
    _, ours, path = pair(name)
    hf = json.loads((path / "config.json").read_text())
    del hf["rope_parameters"]
    hf |= OLD_SPELLINGS[name]
    model = from_hf_config(hf)
    model.load_state_dict(ours.state_dict())
    ids = tiny.prompt(30)
    assert torch.equal(model(ids), ours(ids))
    # transformers reads the old spelling the same way
    (tmp_path / "config.json").write_text(json.dumps(hf))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids), tiny.hf_logits(theirs, ids), **TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [
        "TinyLlama-1.1B-Chat-v1.0",
        "Mistral-7B-v0.3",
        "Mixtral-8x7B-v0.1",
        "Qwen2.5-0.5B",
        "Qwen3-0.6B",
        "Qwen3-30B-A3B",
        "pythia-14m",
        "gpt2",
        "phi-2",
        "Phi-3-mini-4k-instruct",
        "gemma-2b",
        "gemma-2-2b",
        "gemma-3-1b-pt",
        "bloom-560m",
        "falcon-7b",
        "falcon-rw-1b",
        "falcon-11B",
        "opt-350m",
    ],
)
def test_known_sizes_have_transformers_parameter_count(name):
    hf = known_models()[name]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))
    assert count_parameters(hf) == sum(p.numel() for p in theirs.parameters())


# Parameters as papers and model cards give them.
PUBLISHED = {
    "Llama-2-7b-hf": 6.74e9,
    "Llama-2-70b-hf": 68.98e9,
    "Meta-Llama-3-8B": 8.03e9,
    "Mixtral-8x7B-v0.1": 46.7e9,
    "Mixtral-8x22B-v0.1": 140.6e9,
    "Qwen3-30B-A3B": 30.5e9,
    "Qwen3-235B-A22B": 235.1e9,
    "Qwen2.5-7B": 7.62e9,
    "pythia-12b": 11.85e9,
    "gpt2-xl": 1.558e9,
    "phi-2": 2.78e9,
    "phi-4": 14.66e9,
    "gemma-7b": 8.54e9,
    "gemma-2-27b": 27.2e9,
    "gemma-3-27b-pt": 27.0e9,
    "bloom": 176.2e9,
    "falcon-11B": 11.1e9,
    "opt-66b": 65.7e9,
}


def test_known_sizes_have_published_parameter_count():
    known = known_models()
    for name, published in PUBLISHED.items():
        assert count_parameters(known[name]) == pytest.approx(published, rel=0.005), name


def test_counting_parameters_without_all_layers_is_exact():
    for name in ("pythia-14m", "Qwen3-0.6B", "opt-350m"):
        with torch.device("meta"):
            assert count_parameters(known_models()[name]) == from_hf_config(known_models()[name]).n_params()


def test_families_and_known_sizes_are_listed_once():
    assert len({f.__name__ for f in families()}) == len(families())
    assert sum(len(f.sizes) for f in families()) == len(known_models())


def test_every_known_size_is_readable():
    for name, hf in known_models().items():
        _, config = read_config(hf, name)
        assert len(config.windows) == config.n_layer, name


# --- Peculiarities of checkpoints on the hub


def rename(source, target, change):
    """Copy a directory's only weight file, its tensors named by change(name), None to leave one out."""
    from safetensors.torch import load_file, save_file

    tensors = {change(k): v for k, v in load_file(source / "model.safetensors").items()}
    target.mkdir()
    save_file({k: v for k, v in tensors.items() if k}, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")])
def test_names_without_the_base_models_prefix(name, prefix, pair, tmp_path):
    _, ours, path = pair(name)
    other = load(rename(path, tmp_path / "hub", lambda n: n.removeprefix(prefix)))
    ids = tiny.prompt(12)
    assert torch.equal(other(ids), ours(ids))


def test_old_buffers_are_ignored(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    for name, extra in {
        "gpt2": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
        "gpt_neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"],
        "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
    }.items():
        _, ours, path = pair(name)
        target = tmp_path / name
        target.mkdir()
        tensors = load_file(path / "model.safetensors") | {n: torch.ones(2) for n in extra}
        save_file(tensors, target / "model.safetensors")
        (target / "config.json").write_bytes((path / "config.json").read_bytes())
        ids = tiny.prompt(12)
        assert torch.equal(load(target)(ids), ours(ids))


def test_a_head_beside_a_tied_embedding_must_be_the_embedding(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    _, ours, path = pair("gpt2")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["transformer.wte.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    ids = tiny.prompt(12)
    assert torch.equal(load(tmp_path)(ids), ours(ids))
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(PagodaError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_text_part_of_a_multimodal_gemma3(prefix, tmp_path):
    text = {**tiny.GEMMA3, "model_type": "gemma3_text"}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    tiny.randomize(theirs)
    theirs.save_pretrained(tmp_path / "saved")
    names = stored(tmp_path / "saved")
    used = (
        "model.language_model."
        if any(n.startswith("model.language_model.") for n in names)
        else "language_model.model."
    )
    ours = load(rename(tmp_path / "saved", tmp_path / "renamed", lambda n: n.replace(used, prefix)))
    ids = tiny.prompt(12)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids[None]).logits[0], **TOLERANCE)
    save(ours, tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "gemma3_text"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    torch.testing.assert_close(ours(ids), tiny.hf_logits(back, ids), **TOLERANCE)


def test_a_model_is_built_from_its_name():
    with torch.device("meta"):
        assert from_hf_config(known_config("EleutherAI/Pythia-14M")).n_params() == count_parameters(
            known_config("pythia-14m")
        )
    with pytest.raises(PagodaError, match="did you mean 'pythia-14m'"):
        known_config("pythia-14n")


@every_variation
def test_mixed_precision_reaches_every_block(name, tmp_path):
    tiny.saved(name, tmp_path)
    model = load(tmp_path, torch.float32)
    model.compute_dtype = torch.bfloat16
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda block, args, out: seen.append(out.dtype))
    model(tiny.prompt(8))
    assert set(seen) == {torch.bfloat16}
