"""What a run says that it will need: near what it then uses, and settings that fit where it does not."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import LLAMA, make_job, options

from pagoda.common import PagodaError
from pagoda.models.registry import from_hf_config
from pagoda.train import memory
from pagoda.train.loop import forecast
from pagoda.train.parallel import Workers, micro_batches

SHAPE = (
    '{"num_hidden_layers":4,"hidden_size":512,"intermediate_size":1536,"num_attention_heads":8,"num_key_value_heads":8}'
)


@pytest.mark.parametrize(
    ("precision", "compiled"), [("bf16", False), ("mixed", False), pytest.param("bf16", True, marks=pytest.mark.slow)]
)
def test_the_estimate_is_near_what_the_run_uses(precision, compiled, data, tmp_path):
    command = ["pretrain", "--model_name", "SmolLM2-135M", "--model_overrides", SHAPE, "--data", str(data)]
    told = dict(seq_len=256, micro_batch_size=8, max_steps=2, precision=precision)
    command += [w for k, v in told.items() for w in (f"--train.{k}", str(v))]
    command += ["--train.compile"] * compiled
    command = [sys.executable, "-m", "pagoda", *command, "--device", "cpu", "--out_dir", str(tmp_path)]
    text = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
    used = re.findall(r"peak memory ([\d.]+) GiB", text)[-1]
    # Holes of the heap, which are not estimated, are more of a small run than of those in benchmarks/memory.py.
    assert float(re.search(r"peak +([\d.]+) GiB", text)[1]) == pytest.approx(float(used), rel=0.2)


def test_what_does_not_fit_is_refused_with_settings_that_do(monkeypatch):
    with torch.device("meta"):
        model = from_hf_config(LLAMA | {"hidden_size": 128, "vocab_size": 512})
    o, workers = options(seq_len=64, micro_batch_size=12), Workers("cpu")
    micro_batches(o, workers)
    need = memory.check_memory(model, "adamw", o, workers)
    needed = need.peak - need.program
    for share in (0.9, 0.4, 0.2):
        monkeypatch.setattr(memory, "free_memory", lambda device, share=share: int(share * needed))
        with pytest.raises(PagodaError, match="this would fit") as refusal:
            memory.check_memory(model, "adamw", o, workers)
        advice = dict(re.findall(r"--(?:train\.)?(\w+) (\w+)", str(refusal.value)))
        optimizer, rows = advice.pop("optimizer"), int(advice.pop("micro_batch_size"))
        assert 12 % rows == 0
        memory.check_memory(model, optimizer, replace(o, micro_batch_size=rows, **advice), workers)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**10)
    with pytest.raises(PagodaError, match="no setting fits"):
        memory.check_memory(model, "adamw", o, workers)


def test_the_forecast_counts_the_rows_that_are_validated(tmp_path):
    job = make_job(tmp_path, options(max_steps=20, eval_interval=5, eval_rows=60))
    job.progress.step = 4
    assert "16 more take about 2:40" in forecast(job, 10.0)
    job.eval_rows = 6  # a step's work each time: 6 rows at a third of the work, 2 rows a step
    assert "16 more take about 3:20" in forecast(job, 10.0)  # behind steps 5, 10, 15 and 20
