"""What every method keeps to, in PEFT or not: what trains, what stays, files, merging, generation, bad input."""

import json

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pagoda.cli import main
from pagoda.common import PagodaError
from pagoda.engine.options import Sampling
from pagoda.models.batch import Batch, Cache
from pagoda.models.layers import dense, weights_of
from pagoda.models.loader import load
from pagoda.ops.formats import PackedWeight
from pagoda.peft import adapter
from pagoda.peft.files import load_adapter, save_adapter
from pagoda.peft.options import METHODS, BitFit, Houlsby, LoRA, Parallel, Pfeiffer, Prefix, Prompt, named

SMALL = {
    "lora": dict(rank=3, dropout=0.1, plus_ratio=4.0),
    "qlora": dict(rank=3, dora=True, targets="all-linear"),
    "adalora": dict(rank=2, init_rank=3, total_steps=9),
    "prefix": dict(n_virtual=3),
    "prompt": dict(n_virtual=3),
    "p_tuning": dict(n_virtual=3),
    "p_tuning_v2": dict(n_virtual=3),
    **{name: dict(size=6) for name in ("houlsby", "pfeiffer", "parallel")},
    **{name: dict(length=4, layers=1) for name in ("llama_adapter", "adapter_v2")},
}
COMBINATIONS = {"mam": "prefix,parallel", "unipelt": "lora,prefix,pfeiffer", "both": "lora,prompt"}
WORDS = [*METHODS, *COMBINATIONS]


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


CASES = [(f, m) for f in ("llama", "gpt2") for m in WORDS if (f, m) != ("llama", "bitfit")]
CASES += [pytest.param("gpt_neox", m, marks=pytest.mark.slow) for m in WORDS]
CASES += [("mixtral", "lora"), ("mixtral", "houlsby"), ("qwen2", "bitfit"), ("gemma3", "llama_adapter")]


def options(word):
    return [METHODS[name](**SMALL.get(name, {})) for name in named(COMBINATIONS.get(word, word))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Loads a tiny base by family; each is written once."""
    root = tmp_path_factory.mktemp("bases")

    def get(family, **how):
        if not (root / family).exists():
            tiny.saved(family, root / family)
        return load(root / family, **how)

    get.root = root
    return get


def worn(base, family, word, **how):
    """A model whose adapter has been moved away from where it starts."""
    model = base(family, **how)  # which draws numbers when it is written
    torch.manual_seed(1)
    adapter.attach(model, options(word))
    with torch.no_grad():
        for _, p in adapter.trainable_parameters(model):
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def step_of(model, optimizer, step):
    ids = tiny.prompt(24)
    batch = Batch.of([10, 14])
    loss = model(ids, batch, targets=ids.roll(-1)).mean()
    (loss + adapter.extra_loss(model)).backward()
    optimizer.step()
    adapter.after_step(model, step)
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(("family", "word"), CASES)
def test_training_moves_the_adapter_and_nothing_else(base, family, word, tmp_path):
    model = adapter.attach(base(family), options(word)).train()
    trains = dict(adapter.trainable_parameters(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = [{"params": [p], "lr": 1e-2 * adapter.lr_scale(model, name)} for name, p in trains.items()]
    optimizer = torch.optim.Adam(rates)
    losses = [step_of(model, optimizer, step) for step in range(6)]
    assert losses[-1] < losses[0]
    own = {id(p) for m in adapter.adapters(model) for p in m.named().values()}
    for name, p in model.named_parameters():
        assert (id(p) in own) == (name in trains), name
        assert name in trains or torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in trains.items())

    save_adapter(model, tmp_path / "a", "base")
    again = load_adapter(base(family), tmp_path / "a")
    assert not adapter.trainable_parameters(again)
    ids = tiny.prompt(9)
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model.eval()(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("word", [w for w in WORDS if w != "bitfit"])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(base, word):
    def run(model, steps, optimizer):
        for step in steps:
            step_of(model, optimizer, step)

    def fresh():
        model = base("llama")  # which draws numbers when it is written
        torch.manual_seed(0)
        adapter.attach(model, options(word)).eval()
        return model, torch.optim.SGD([p for _, p in adapter.trainable_parameters(model)], lr=0.1)

    whole, optimizer = fresh()
    run(whole, range(9), optimizer)
    first, optimizer = fresh()
    run(first, range(4), optimizer)
    saved = {name: t.clone() for name, t in adapter.progress(first).items()}
    torch.manual_seed(5)
    second = adapter.attach(base("llama"), options(word)).eval()
    adapter.restore(second, saved)
    run(second, range(4, 9), torch.optim.SGD([p for _, p in adapter.trainable_parameters(second)], lr=0.1))
    for name, p in adapter.trainable_parameters(whole):
        assert torch.equal(p, second.get_parameter(name)), name


@pytest.mark.parametrize("how", ["mixed", "nf4", *slow("bf16")])
@pytest.mark.parametrize("word", WORDS)
def test_parameters_stay_float32_where_the_stream_is_narrower(base, word, how):
    dtype = torch.float32 if how == "mixed" else torch.bfloat16
    model = base("qwen2", dtype=dtype, quantize="nf4" if how == "nf4" else None)
    model.compute_dtype = torch.bfloat16 if how == "mixed" else None
    adapter.attach(model, options(word)).train()
    optimizer = torch.optim.Adam([p for _, p in adapter.trainable_parameters(model)], lr=1e-2)
    losses = [step_of(model, optimizer, step) for step in range(8)]
    assert losses[-1] < losses[0]
    norms = ("norm_1", "norm_2", "norm.")  # Adapter v2 trains the base's own, in their type
    for name, p in adapter.trainable_parameters(model):
        assert p.dtype == torch.float32 or any(n in name for n in norms), name
    with torch.no_grad():
        assert model.eval()(tiny.prompt(5)).isfinite().all()


@pytest.mark.parametrize("word", ["lora", "qlora", "adalora", "ia3", "bitfit"])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "qwen2"])
def test_merged_is_what_was_worn(base, family, word, tmp_path):
    model = worn(base, family, word)
    ids = tiny.prompt(12)
    with torch.no_grad():
        expected = model(ids)
        adapter.merge(model)
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    assert not adapter.adapters(model)
    assert {n for n, _ in weights_of(model)} == {n for n, _ in weights_of(base(family))}


@pytest.mark.parametrize("word", ["prefix", "prompt", "houlsby", "llama_adapter", "adapter_v2", "unipelt"])
def test_what_cannot_be_merged_says_so_and_stays(base, word):
    model = worn(base, "llama", word)
    ids = tiny.prompt(12)
    with torch.no_grad():
        expected = model(ids)
        with pytest.raises(PagodaError, match="cannot be merged"):
            adapter.merge(model)
        assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("word", [w for w in WORDS if w not in ("bitfit", "qlora")])
@pytest.mark.parametrize("family", ["llama-dynamic", *slow("gpt2", "bloom", "mistral-window")])
def test_generation_with_a_cache_is_generation_without(base, family, word):
    model = worn(base, family, word)
    prompts = [tiny.prompt(n, seed=n).tolist() for n in (5, 9)]
    greedy = Sampling(max_new_tokens=6, temperature=0)
    new = tiny.generate(model, prompts, greedy, torch.float32)
    for prompt, tokens in zip(prompts, new):
        ids = list(prompt)
        with torch.no_grad():
            for _ in tokens:
                ids.append(int(model(torch.tensor(ids))[-1].argmax()))
        assert ids[len(prompt) :] == tokens


@pytest.mark.parametrize("word", ["prefix", "prompt"])
def test_a_prompt_that_goes_in_by_chunks_meets_its_virtual_tokens_once(base, word):
    model = worn(base, "llama", word)
    ids = tiny.prompt(12)
    cache = Cache(model.cache_specs(), 2, 16, torch.float32, torch.device("cpu"))
    table, n = torch.tensor([[1, 0]], dtype=torch.int32), model.n_virtual
    slots = torch.tensor([(16, 0)[p // 16] + p % 16 for p in range(n, n + 12)])
    with torch.no_grad():
        parts = [
            model(ids[a:b], Batch.of([b - a], past=[n + a], cache=cache, slots=slots[a:b], block_table=table))
            for a, b in ((0, 5), (5, 6), (6, 12))
        ]
        torch.testing.assert_close(torch.cat(parts), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("word", ["lora", "qlora", "ia3", "prefix"])
def test_a_packed_base_gives_the_gradients_of_its_dequantized_self(base, word, format):
    packed = worn(base, "llama", word, quantize=format)
    plain = worn(base, "llama", word, quantize=format)
    for name, w in list(weights_of(plain)):
        if isinstance(w, PackedWeight):
            module = plain.get_submodule(name.rpartition(".")[0])
            del module.weight
            module.weight = torch.nn.Parameter(dense(w, torch.float32), requires_grad=False)
            packed.get_submodule(name.rpartition(".")[0]).weight.exact = True
    bits = {n: t.clone() for n, t in packed.named_buffers()}
    ids = tiny.prompt(12)
    for model in (packed, plain):
        model(ids, targets=ids.roll(-1)).mean().backward()
    for (name, p), (_, q) in zip(adapter.trainable_parameters(packed), adapter.trainable_parameters(plain)):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert all(torch.equal(t, bits[n]) for n, t in packed.named_buffers())


def exactly(model):
    """Let no kernel round the activations."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.exact = True


def test_merging_into_a_packed_base_gives_plain_weights(base):
    model = worn(base, "llama", "lora", quantize="nf4")
    assert isinstance(model.layers[0].mlp.up_proj.weight, PackedWeight)
    exactly(model)
    ids = tiny.prompt(12)
    with torch.no_grad():
        expected = model(ids)
        adapter.merge(model)
        torch.testing.assert_close(model(ids), expected, rtol=2e-2, atol=2e-2)
    assert not isinstance(model.layers[0].mlp.up_proj.weight, PackedWeight)


def test_dropout_is_that_of_the_seed(base):
    model = adapter.attach(base("llama"), LoRA(dropout=0.5))
    adapter.adapters(model)[0].layers["model.layers.0.mlp.up_proj"].lora_B.data.fill_(1.0)
    ids = tiny.prompt(12)

    def logits(seed):
        torch.manual_seed(seed)
        return model(ids).detach()

    model.train()
    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


def test_lora_plus_trains_b_faster(base):
    model = adapter.attach(base("llama"), LoRA(plus_ratio=16.0))
    for name, _ in adapter.trainable_parameters(model):
        assert adapter.lr_scale(model, name) == (16.0 if name.endswith("lora_B") else 1.0)


@pytest.mark.parametrize("word", ["houlsby", "pfeiffer", "parallel", "llama_adapter", "lora", "ia3", "adapter_v2"])
def test_a_fresh_adapter_changes_nothing(base, word):
    ids = tiny.prompt(12)
    with torch.no_grad():
        model = base("gpt_neox")
        expected = model(ids)
        torch.testing.assert_close(adapter.attach(model, options(word))(ids), expected)


def behind(bottleneck, x, y):
    return y + bottleneck.up(torch.nn.functional.gelu(bottleneck.down(y)))


def beside(bottleneck, x, y):
    return y + 4 * bottleneck.up(torch.relu(bottleneck.down(x)))


@pytest.mark.parametrize(
    ("kind", "places", "formula"),
    [(Houlsby, {"attn", "mlp"}, behind), (Pfeiffer, {"mlp"}, behind), (Parallel, {"mlp"}, beside)],
)
@torch.no_grad()
def test_a_bottleneck_is_its_formula(base, kind, places, formula):
    model, plain = adapter.attach(base("llama"), kind(size=5)), base("llama")
    bottlenecks = adapter.adapters(model)[0].bottlenecks
    assert {path.split(".")[2] for path in bottlenecks} == places
    for path, bottleneck in bottlenecks.items():
        for p in bottleneck.parameters():
            p.add_(0.1 * torch.randn_like(p))
        module = plain.get_submodule(path.rpartition(".")[0])
        module.register_forward_hook(lambda _, args, y, b=bottleneck: formula(b, args[0], y))
    ids = tiny.prompt(12)
    torch.testing.assert_close(model(ids), plain(ids))


@pytest.mark.parametrize(
    ("family", "worn", "words"),
    [
        ("llama", LoRA(targets="q_prj"), "no linear layer matches 'q_prj'; did you mean 'q_proj'"),
        (
            "llama",
            LoRA(targets="all_linear"),
            "; there are q_proj, k_proj, v_proj, o_proj, gate_proj",
        ),
        ("llama", LoRA(targets="q_proj,(("), "'((' is not a regular expression"),
        ("llama", BitFit(), "this Llama has no biases"),
        ("opt-350m", Prompt(), "virtual tokens do not fit this OPT"),
        ("llama", [Prompt(), Prefix()], "one method of virtual tokens"),
        ("llama", [LoRA(), LoRA()], "two of these methods want the same linear layer"),
        ("llama", METHODS["llama_adapter"](layers=9), "layers is 9, but the model has 2"),
        ("llama", METHODS["adalora"](), "total_steps"),
    ],
)
def test_what_a_family_cannot_wear(base, family, worn, words):
    with pytest.raises(PagodaError) as e:
        adapter.attach(base(family), worn)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoRA(rank=0), "rank must be a whole number above 0"),
        (lambda: LoRA(dropout=1.0), "dropout must be at least 0 and below 1"),
        (lambda: Prompt(init="text"), "init must be one of vocab, random"),
        (lambda: named("lorra"), "unknown method 'lorra'; did you mean 'lora'"),
    ],
)
def test_options_that_make_no_sense(make, words):
    with pytest.raises(PagodaError) as e:
        make()
    assert words in str(e.value)


def edited(path, **config):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def drop(path, name):
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if name not in n}, path / "adapter_model.safetensors")


def add(path, name, *shape):
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({**tensors, f"base_model.model.{name}": torch.ones(shape)}, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: (p / "adapter_config.json").unlink(), "no adapter_config.json there; an adapter is a directory"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "no file adapter_model.safetensors there"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"12345678"), "not a readable safetensors file"),
        (lambda p: edited(p, peft_type="VERA"), "peft_type 'VERA' is not supported; there are"),
        (lambda p: edited(p, modules_to_save=["lm_head"]), "modules_to_save = ['lm_head'] is not supported"),
        (lambda p: edited(p, init_lora_weights="pissa"), "began as 'pissa' changed its base"),
        (lambda p: edited(p, lora_alpha=None), "'lora_alpha' is missing"),
        (lambda p: add(p, "model.embed_tokens.lora_embedding_A", 3, 96), "holds model.embed_tokens.lora_embedding_A"),
        (lambda p: add(p, "lm_head.lora_A.weight", 3, 32), "the head (lm_head) of this Llama wears no adapter"),
        (lambda p: drop(p, "layers.0.mlp.up_proj.lora_B"), "lacks model.layers.0.mlp.up_proj.lora_B.weight"),
    ],
)
def test_a_spoiled_adapter(base, spoil, words, tmp_path):
    save_adapter(worn(base, "llama", "lora"), tmp_path)
    spoil(tmp_path)
    with pytest.raises(PagodaError) as e:
        load_adapter(base("llama"), tmp_path)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma3", "model.layers.0.self_attn.k_proj.lora_B.weight has shape (16, 3), this Gemma3 takes (32, 3)"),
        ("gpt2", "this GPT2 has no layer model.layers.0.mlp.down_proj"),
    ],
)
def test_an_adapter_for_another_model(base, family, words, tmp_path):
    save_adapter(worn(base, "llama", "lora"), tmp_path)
    with pytest.raises(PagodaError) as e:
        load_adapter(base(family), tmp_path)
    assert "an adapter for another model" in str(e.value)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("word", "family", "words"),
    [
        ("prompt", "bloom-six-heads", r"shape \(3, 32\), this Bloom takes \(3, 48\)"),
        ("p_tuning_v2", "gemma3", r"shape \(3, 64\), this Gemma3 takes \(3, 256\)"),
    ],
)
def test_virtual_tokens_for_another_model(base, word, family, words, tmp_path):
    save_adapter(worn(base, "llama", word), tmp_path)
    with pytest.raises(PagodaError, match=words):
        load_adapter(base(family), tmp_path)


def test_an_adapter_for_a_deeper_model(base, tmp_path):
    save_adapter(worn(base, "gemma2", "lora"), tmp_path)
    with pytest.raises(PagodaError, match=r"layers\.2\S+ \(.*\), this Gemma has 2 layers"):
        load_adapter(base("gemma"), tmp_path)


@pytest.fixture
def merging(base, tmp_path):
    """A base with a tokenizer, and an adapter for it: the arguments of `pagoda merge`."""
    worn_model = worn(base, "gpt2", "lora")
    Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0")).save(str(base.root / "gpt2/tokenizer.json"))
    save_adapter(worn_model, tmp_path / "adapter", "gpt2")
    return [str(base.root / "gpt2"), str(tmp_path / "adapter"), str(tmp_path / "out")]


@torch.no_grad()
def test_merge_writes_a_directory_that_transformers_opens(merging, capsys):
    _, dir, out = merging
    assert main(["merge", *merging]) == 0
    printed, said = capsys.readouterr()
    assert printed.strip() == out
    assert "logits differ by" in said
    expected = peft.PeftModel.from_pretrained(tiny.make("gpt2"), dir)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = tiny.prompt(12)[None]
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("w7") == 7


@torch.no_grad()
def test_merge_from_a_quantized_base_keeps_its_rounded_weights(merging, base, capsys):
    assert main(["merge", *merging, "--quantize", "nf4"]) == 0
    expected = load_adapter(base("gpt2", quantize="nf4"), merging[1])
    exactly(expected)
    ids = tiny.prompt(12)
    torch.testing.assert_close(load(merging[2])(ids), expected(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda src, dir, out: ["{tmp}/nowhere", dir, out], "nowhere"),
        (lambda src, dir, out: [src, src, out], "no adapter_config.json there"),
        (lambda src, dir, out: [src, dir, src], "exists already"),
        (lambda src, dir, out: [src, dir, out, "--dtype", "int3"], "unknown dtype"),
        (lambda src, dir, out: [src, dir, out, "--quantize", "int3"], "unknown quantization"),
    ],
)
def test_mistakes_in_merging_cost_one_line(merging, spoil, words, tmp_path, capsys):
    assert main(["merge", *(a.format(tmp=tmp_path) for a in spoil(*merging))]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert not (tmp_path / "out").exists()


def test_merging_what_cannot_be_merged_costs_one_line(merging, base, tmp_path, capsys):
    save_adapter(worn(base, "gpt2", "prefix"), tmp_path / "prefix")
    assert main(["merge", merging[0], str(tmp_path / "prefix"), merging[2]]) == 2
    assert "PREFIX_TUNING cannot be merged into the weights" in capsys.readouterr().err
