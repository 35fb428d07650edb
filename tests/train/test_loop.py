"""The loop against a plain transformers + torch loop, and against itself: interrupted, divided, repeated."""

import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from helpers import LLAMA, Noise, losses, make_job, metrics, options, weights
from tiny import GPT2, KV, NEOX

from pagoda.common import PagodaError
from pagoda.data.shards import Rows
from pagoda.models.batch import Batch
from pagoda.models.loader import load
from pagoda.ops import cpu
from pagoda.train.loop import gradient_norm, train
from pagoda.train.repeat import Repeated
from pagoda.train.run import latest_checkpoint


class Uneven(Noise):
    """Now and then, twice or three times in a row, rows of another shape."""

    def rows(self, first: int, n: int) -> Rows:
        return Noise(parts=(5, 11) if first // 2 in (4, 5, 8, 9, 10) else (16,)).rows(first, n)


FAMILIES = {"llama": KV, "gpt_neox": NEOX, "gpt2": {**GPT2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}}


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_equal_transformers_and_torch(family, tmp_path):
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path / "start")
    o = options(max_steps=20, global_batch_size=4, clip=0.5, schedule="constant", warmup_steps=0, save_interval=0)
    o.lr = 1e-3
    o.eps = 1e-5  # key biases have no gradient but rounding, which AdamW would blow up to full steps
    data = Noise()
    job = make_job(tmp_path / "run", o, start=tmp_path / "start", data=data)
    decay = [p for p in theirs.parameters() if p.dim() > 1]
    plain = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    expected = []
    for step in range(20):
        rows = data.rows(step * 4, 4)
        logits = theirs.train()(input_ids=rows.tokens.view(4, -1)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adam.step()
        adam.zero_grad()
        expected.append(loss.item())
    train(job)
    torch.testing.assert_close(losses(tmp_path / "run"), expected, rtol=0, atol=1e-4)
    trained = transformers.AutoModelForCausalLM.from_pretrained(latest_checkpoint(tmp_path / "run"))
    for (name, p), q in zip(theirs.named_parameters(), trained.parameters()):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-4, msg=name)


def test_packed_documents_equal_the_same_documents_apart(tmp_path):
    model = make_job(tmp_path, options()).model
    rows = Noise(parts=(5, 1, 10)).rows(0, 2)
    packed = model(rows.tokens, Batch.of(rows.lengths), targets=rows.targets)
    apart = torch.cat(
        [model(t, targets=y) for t, y in zip(rows.tokens.split(rows.lengths), rows.targets.split(rows.lengths))]
    )
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)
    gradients = []
    for loss in (packed.sum(), apart.sum()):
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_micro_batches_make_no_difference(tmp_path):
    data = Noise(parts=(7, 9))
    for name, n in (("one", 4), ("four", 1)):
        train(make_job(tmp_path / name, options(micro_batch_size=n, global_batch_size=4), data=data))
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "four"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("precision", ["float32", "mixed", "bf16"])
def test_a_resumed_run_gives_the_same_bits(optimizer, precision, tmp_path):
    o = options(precision=precision, keep_last=0, lr=1e-3)
    train(make_job(tmp_path / "whole", o, optimizer=optimizer))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-6")
    job = make_job(tmp_path / "resumed", o, optimizer=optimizer)
    assert job.progress.step == 3
    train(job)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "resumed")
    assert weights(tmp_path / "whole/checkpoints/step-6") == weights(tmp_path / "resumed/checkpoints/step-6")


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_nothing_but_memory(checkpointing, tmp_path):
    train(make_job(tmp_path / "plain", options()))
    train(make_job(tmp_path / "again", options(checkpointing=checkpointing)))
    torch.testing.assert_close(losses(tmp_path / "plain"), losses(tmp_path / "again"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_released_gradients_give_the_same_bits(optimizer, precision, tmp_path):
    for name, release in (("kept", False), ("released", True)):
        job = make_job(
            tmp_path / name, options(clip=0, precision=precision, release_gradients=release), optimizer=optimizer
        )
        train(job)
        assert all(p.grad is None for p in job.model.parameters())
    last = "checkpoints/step-6"
    assert weights(tmp_path / "kept" / last) == weights(tmp_path / "released" / last)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tmp_path):
    train(make_job(tmp_path / "plain", options()))
    train(make_job(tmp_path / "compiled", options(compile=True)))
    torch.testing.assert_close(losses(tmp_path / "plain"), losses(tmp_path / "compiled"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", ["float32", "mixed", "bf16"])
def test_precision_says_what_is_stored(precision, tmp_path):
    job = make_job(tmp_path, options(precision=precision, max_steps=2))
    train(job)
    stored = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in job.model.parameters()} == {stored}
    assert {s["exp_avg"].dtype for s in job.optimizer.state.values()} == {stored}
    assert load(latest_checkpoint(tmp_path)).dtype == stored


def test_it_learns(tmp_path):
    data = Noise()
    data.rows = lambda first, n: Noise().rows(0, n)  # the same rows for ever
    train(make_job(tmp_path, options(max_steps=60, micro_batch_size=4, precision="mixed"), data=data))
    assert losses(tmp_path)[0] > 4.4
    assert losses(tmp_path)[-1] < 1.0


def test_sigterm_saves_and_ends(tmp_path):
    o = options(max_steps=100, save_interval=0)
    job = make_job(tmp_path, o)
    rows, calls = job.data.rows, []

    def counted(first, n):
        calls.append(first)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows(first, n)

    job.data.rows = counted
    progress = train(job)
    assert progress.step in (4, 5)
    assert latest_checkpoint(tmp_path).name == f"step-{progress.step}"


def test_the_norm_of_narrow_gradients_is_not_rounded(tmp_path):
    model = make_job(tmp_path, options(precision="bf16")).model
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    expected = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    assert abs(gradient_norm([p.grad for p in model.parameters()], 0.0) - expected) < 1e-5 * expected


def test_time_and_tokens_end_a_run(tmp_path):
    assert train(make_job(tmp_path / "tokens", options(max_steps=100, max_tokens=100))).step == 4  # of 32 tokens
    assert train(make_job(tmp_path / "time", options(max_steps=10**6, max_time="0.2s", save_interval=0))).step < 10**6


def test_old_checkpoints_go(tmp_path):
    train(make_job(tmp_path, options(max_steps=8, save_interval=1, keep_last=2, keep_every=3)))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-6", "step-7", "step-8"]
    assert (tmp_path / "latest").read_text() == "step-8"


@pytest.mark.parametrize("precision", ["float32", "bf16", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_repeated_steps_give_the_same_bits(family, precision, tmp_path, monkeypatch):
    """Steps by recorded calls and steps by Python, evaluations between them, and now and then rows of another shape."""

    o = options(max_steps=14, save_interval=7, precision=precision, eval_interval=5, z_loss=1e-3)
    hf = {**FAMILIES[family], "model_type": family}
    ends = []
    for name in ("recorded", "plain"):
        job = make_job(tmp_path / name, o, hf=hf, data=Uneven())
        job.evaluate = lambda job: {"val_loss": float(job.objective(job.model, job.data.rows(500, 3)).detach())}
        if name == "plain":
            monkeypatch.setattr("pagoda.train.loop.repeats", lambda *_: False)
        train(job)
        repeated = name == "recorded" and cpu.kernels is not None
        assert isinstance(job.gradients, Repeated) == repeated
        assert not repeated or job.gradients.recording is not None
        ends.append((metrics(tmp_path / name), weights(latest_checkpoint(tmp_path / name))))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("of", ["module", "gradient"])
def test_hooks_are_called_in_every_step(of, tmp_path):
    job, calls = make_job(tmp_path, options(max_steps=5)), []
    if of == "module":
        job.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    else:
        job.model.embed.weight.register_hook(lambda grad: calls.append(1))
    train(job)
    assert len(calls) == 5


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    job = make_job(tmp_path, options(max_steps=8, save_interval=2))
    objective, calls = job.objective, []

    def broken(model, rows):
        calls.append(1)
        return objective(model, rows) * (float("nan") if len(calls) == 4 else 1)

    job.objective = broken
    with pytest.raises(PagodaError, match=r"loss of step 4 is not a number; the last good checkpoint is .*step-2"):
        train(job)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    job, save = make_job(tmp_path, options()), dcp.save

    def full(state, checkpoint_id, **more):
        if "step-6" in str(checkpoint_id):
            raise OSError(28, "No space left on device")
        save(state, checkpoint_id=checkpoint_id, **more)

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(PagodaError, match=r"cannot save step 6 \(No space left on device\); the last good .*step-3"):
        train(job)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    monkeypatch.undo()
    assert train(make_job(tmp_path, options())).step == 6


def test_another_configuration_or_other_data_are_refused(tmp_path):
    o = options()
    train(make_job(tmp_path, o))
    with pytest.raises(PagodaError, match=r"changed: train\.lr from 0\.01 to 0\.02, data_f.* from 'noise' to 'other'"):
        make_job(tmp_path, replace(o, lr=0.02), data=Noise(fingerprint="other"))
    make_job(tmp_path, replace(o, save_interval=1, micro_batch_size=1))  # these make no other run of it
    with pytest.raises(PagodaError, match="holds a run already"):
        make_job(tmp_path, o, resume="no")
    with pytest.raises(PagodaError, match="no checkpoint"):
        make_job(tmp_path / "empty", o, resume="must")


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(PagodaError, match="global_batch_size 5 is not a multiple"):
        make_job(tmp_path, options(global_batch_size=5))


def test_every_family_trains(tmp_path):
    for i, (kind, more) in enumerate((("gemma", {"head_dim": 8}), ("phi3", {}), ("bloom", {}), ("mixtral", {}))):
        hf = {**LLAMA, "model_type": kind, **more}
        if kind == "bloom":
            hf |= dict(n_layer=2, n_head=4, seq_length=64)
        if kind == "mixtral":
            hf |= dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
        train(make_job(tmp_path / str(i), options(max_steps=3, save_interval=0), hf=hf))
        assert losses(tmp_path / str(i))[-1] < losses(tmp_path / str(i))[0] + 1
