"""Finetuning as users start it: every way to train learns, goes on, answers, and says what it refuses."""

import shutil

import pytest
import torch
from helpers import finetuning, metrics, weights

from pagoda import LLM
from pagoda.cli import main
from pagoda.models.loader import load
from pagoda.peft.adapter import merge
from pagoda.peft.files import load_adapter
from pagoda.train.run import latest_checkpoint


def finetune(*told, **options):
    return main(finetuning(*told, **options))


def values(run):
    return [r["val_loss"] for r in metrics(run) if "val_loss" in r]


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "ia3", "prefix,parallel", "prompt", "adalora"])
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_every_way_learns_and_answers(method, precision, base, rows, tmp_path, capsys):
    assert finetune(base, rows, tmp_path / "run", method=method, precision=precision, eval_interval=4) == 0
    done = latest_checkpoint(tmp_path / "run")
    assert capsys.readouterr().out.strip() == str(done)
    assert values(tmp_path / "run")[-1] < values(tmp_path / "run")[0]
    assert (done / "adapter_config.json").is_file() == (method != "full")
    assert (done / "config.json").is_file() == (method == "full")
    llm = LLM.load(tmp_path / "run", device="cpu")
    messages = [{"role": "user", "content": "say cat and dog"}]
    assert llm.chat(messages, max_new_tokens=4, temperature=0).token_ids  # the template came along


def test_the_first_evaluation_is_of_the_untrained_model(base, rows, tmp_path):
    run = tmp_path / "run"
    assert finetune(base, rows, run, eval_interval=6) == 0
    assert [r["step"] for r in metrics(run) if "val_loss" in r] == [0, 6, 12]
    alone = tmp_path / "alone"  # LoRA starts as nothing: a rate of nearly 0 leaves the model as it is
    assert finetune(base, rows, alone, max_steps=1, lr=1e-12) == 0
    assert values(alone)[0] == values(run)[0] == pytest.approx(values(alone)[1], abs=1e-6)
    told = metrics(run)
    shutil.rmtree(run / "checkpoints")  # as if it had been killed before the first
    assert finetune(base, rows, run, eval_interval=6) == 0
    assert metrics(run) == told


def test_a_resumed_adapter_gives_the_same_bits(base, rows, tmp_path):
    for method in ("lora", "adalora"):
        whole, resumed = tmp_path / f"{method}-whole", tmp_path / f"{method}-resumed"
        told = ["--lora.dropout", "0.3", "--lora.plus_ratio", "4"]
        assert finetune(base, rows, whole, *told, method=method, keep_last=0) == 0
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / "checkpoints/step-12")
        assert finetune(base, rows, resumed, *told, method=method, keep_last=0) == 0
        assert metrics(whole) == metrics(resumed)
        file = "checkpoints/step-12/adapter_model.safetensors"
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()


def test_what_is_trained_is_what_is_loaded(base, rows, tmp_path, capsys):
    assert finetune(base, rows, tmp_path / "run") == 0
    capsys.readouterr()
    done, start = latest_checkpoint(tmp_path / "run"), latest_checkpoint(base)
    assert main(["merge", str(start), str(done), str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    tokens = torch.arange(40)
    worn = load_adapter(load(start), done)
    expected = worn(tokens)
    assert not torch.allclose(expected, load(start)(tokens), atol=1e-2)
    torch.testing.assert_close(merge(worn)(tokens), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(load(tmp_path / "merged")(tokens), expected, rtol=0, atol=1e-5)


def test_low_memory_ways_of_full_finetuning(base, rows, tmp_path):
    for optimizer in ("adafactor", "adamw8bit"):
        more = ["--optimizer", optimizer, "--train.release_gradients", "--train.clip", "0"]
        assert finetune(base, rows, tmp_path / optimizer, *more, method="full", lr=3e-3, eval_interval=4) == 0
        assert values(tmp_path / optimizer)[-1] < values(tmp_path / optimizer)[0]


def test_full_finetuning_changes_the_model_and_not_its_base(base, rows, tmp_path):
    before = weights(latest_checkpoint(base))
    assert finetune(base, rows, tmp_path / "run", method="full") == 0
    assert weights(latest_checkpoint(base)) == before != weights(latest_checkpoint(tmp_path / "run"))


def test_bad_input_is_one_line(base, rows, tmp_path, capsys):
    def refused(*more, base=base, rows=rows, **changes):
        assert finetune(base, rows, tmp_path / "run", *more, **changes) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n')
    assert "--skip_bad_rows" in refused(rows=bad)
    assert "did you mean 'lora'" in refused(method="lorra")
    assert "name it alone" in refused(method="full,lora")
    assert "leave out --quantize" in refused("--quantize", "nf4", method="full")
    assert "share of the data" in refused("--val_fraction", "2")
    assert "epochs must be 0 or more" in refused("--epochs", "-1")
    assert "there are q_proj" in refused("--lora.targets", "query")
    assert "no such file" in refused(rows=tmp_path / "none.json").lower()
    assert "did you mean 'alpaca'" in refused("--template", "alpaka")
    assert "virtual tokens before it exceeds" in refused("--prefix.n_virtual", "9000", method="prefix")
    assert "bias" in refused(method="bitfit")
    assert "several processes" in refused(sharding="zero3")
    assert not (tmp_path / "run").exists()
