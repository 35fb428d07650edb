"""Every method that PEFT has: the same weights and batch give PEFT's loss and gradients, and files go both ways."""

import copy

import peft
import pytest
import tiny
import torch

from pagoda.models.loader import load
from pagoda.peft.adapter import adapters, attach, extra_loss
from pagoda.peft.files import load_adapter, save_adapter
from pagoda.peft.options import LoRA, Prefix, PTuning

LM = {"task_type": "CAUSAL_LM"}
QKV = {"llama": ["q_proj", "v_proj"], "gpt_neox": ["query_key_value"], "gpt2": ["c_attn", "mlp.c_proj"]}
CONFIGS = {
    "lora": lambda f: peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **LM),
    "lora-some": lambda f: peft.LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=QKV.get(f), **LM),
    "lora-pattern": lambda f: peft.LoraConfig(target_modules=r".*\.1\..*(q_proj|query_key_value|c_attn)", **LM),
    "lora-ranks": lambda f: peft.LoraConfig(r=4, rank_pattern={r".*\.0\..*": 2}, target_modules="all-linear", **LM),
    "dora": lambda f: peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", **LM),
    "adalora": lambda f: peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, **LM),
    "ia3": lambda f: peft.IA3Config(**LM),
    "adaption": lambda f: peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, **LM),
    "prefix": lambda f: peft.PrefixTuningConfig(num_virtual_tokens=5, **LM),
    "prompt": lambda f: peft.PromptTuningConfig(num_virtual_tokens=5, **LM),
}
MAIN = ("llama", "gpt_neox", "gpt2")
MORE = ("mistral-window", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "bloom", "falcon-40b", "opt")
CASES = [(f, m) for f in MAIN for m in CONFIGS if (f, m) != ("gpt_neox", "adaption")]
CASES += [(f, "lora") for f in MORE] + [("mistral-window", "adaption")]
CASES += [pytest.param(f, "dora", marks=pytest.mark.slow) for f in MORE]
CASES += [(f, m) for f in ("mistral-window", "gemma2", "bloom", "opt") for m in ("prefix", "prompt")]


def wear(family, config, path):
    """A tiny model of transformers with PEFT's adapter on it, no parameter of which is where it started."""
    model = peft.get_peft_model(tiny.saved(family, path / "base"), config).eval()  # no dropout of GPT-2's and OPT's own
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def batch():
    """Two sequences. Their first tokens are not scored: PEFT's prompts would, from the last virtual token."""
    ids = tiny.prompt(24).view(2, 12)
    labels = ids.clone()
    labels[:, 0] = -100
    return ids, labels


def our_loss(model):
    ids, labels = batch()
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    return model(ids, targets=targets).sum() / (targets >= 0).sum() + extra_loss(model)


def their_gradients(model):
    """By our names."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.replace(".default", "").removeprefix("base_model.model.")
            name = name.replace("prompt_encoder.", "encoder.").replace("magnitude_vector.weight", "magnitude_vector")
            found[name] = p.grad
    if list(found) == ["encoder.embedding.weight"]:
        found = {"prompt_embeddings": found["encoder.embedding.weight"]}
    return found


def check_same_step(theirs, ours):
    ids, labels = batch()
    loss = theirs(input_ids=ids, labels=labels).loss
    loss.backward()
    own = our_loss(ours)
    own.backward()
    assert own.item() == pytest.approx(loss.item(), abs=1e-5)
    expected, found = their_gradients(theirs), adapters(ours)[0].named()
    assert set(expected) == set(found)
    for name, p in found.items():
        torch.testing.assert_close(
            p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("family", "method"), CASES)
def test_loss_and_gradients_are_pefts_and_files_go_both_ways(family, method, tmp_path):
    theirs = wear(family, CONFIGS[method](family), tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(load(tmp_path / "base"), tmp_path / "theirs", trainable=True)
    check_same_step(theirs, ours)

    save_adapter(ours, tmp_path / "ours", "base")
    base = tiny.make(family)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ids, _ = batch()
    with torch.no_grad():
        expected, found = again(input_ids=ids).logits[:, -12:], ours(ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (
            peft.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24, **LM),
            Prefix(n_virtual=5, hidden=24),
        ),
        (peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24, **LM), PTuning(5, "mlp", 24)),
        (
            peft.PromptEncoderConfig(
                num_virtual_tokens=5, encoder_hidden_size=24, encoder_reparameterization_type="LSTM", **LM
            ),
            PTuning(5, "lstm", 24),
        ),
    ],
    ids=["prefix", "p_tuning-mlp", "p_tuning-lstm"],
)
@pytest.mark.parametrize("family", MAIN)
def test_encoders_train_as_pefts_and_peft_reads_what_they_make(family, config, options, tmp_path):
    theirs = wear(family, copy.deepcopy(config), tmp_path)
    ours = attach(load(tmp_path / "base"), copy.deepcopy(options))
    own = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in adapters(ours)[0].named().items():
            p.copy_(own[name.replace("encoder.", "prompt_encoder.default.")])
    check_same_step(theirs, ours)

    save_adapter(ours, tmp_path / "ours", "base")
    again = peft.PeftModel.from_pretrained(tiny.make(family), tmp_path / "ours").eval()
    ids, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), again(input_ids=ids).logits[:, -12:], rtol=1e-4, atol=1e-4)
    resumed = load_adapter(load(tmp_path / "base"), tmp_path / "ours", trainable=True)
    assert {n for n, p in resumed.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        assert torch.equal(resumed(ids), ours(ids))


def test_adalora_takes_the_same_ranks_away_in_the_same_steps(tmp_path):
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=1, tfinal=2, total_step=8, deltaT=2, target_modules=["q_proj", "down_proj"], **LM
    )
    theirs = wear("llama", config, tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(load(tmp_path / "base"), tmp_path / "theirs", trainable=True)
    method = adapters(ours)[0]
    ids, labels = batch()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (theirs, ours)]
    for step in range(8):
        theirs(input_ids=ids, labels=labels).loss.backward()
        our_loss(ours).backward()
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        method.after_step(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = {
            n.replace(".default", "").removeprefix("base_model.model."): p for n, p in theirs.named_parameters()
        }
        for name, p in method.named().items():
            torch.testing.assert_close(p.detach(), expected[name].detach(), rtol=1e-3, atol=1e-5)
    kept = {name: mask.tolist() for name, mask in method.kept.items()}
    assert sum(sum(mask) for mask in kept.values()) == 2 * 4
    pattern = theirs.peft_config["default"].rank_pattern
    assert {n.removesuffix(".lora_E.default"): mask for n, mask in pattern.items()} == kept

    theirs.save_pretrained(tmp_path / "their end")
    save_adapter(ours, tmp_path / "our end")
    with torch.no_grad():
        expected = ours(ids)
        for end in ("their end", "our end"):
            torch.testing.assert_close(load_adapter(load(tmp_path / "base"), tmp_path / end)(ids), expected)
            again = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / end).eval()
            torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_lora_starts_as_peft_does(tmp_path):
    """The same distribution: A uniform within 1 / sqrt(n_in), B zero."""
    tiny.saved("llama", tmp_path / "base")
    model = attach(load(tmp_path / "base"), LoRA(rank=64))
    for name, p in adapters(model)[0].named().items():
        if name.endswith("lora_A.weight"):
            bound = p.shape[1] ** -0.5
            assert p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            assert not p.any()
