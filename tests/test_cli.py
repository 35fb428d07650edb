"""The `pagoda` command as a user meets it: output where it belongs, one line and exit code 2 for what they can mend."""

import io
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch

from pagoda import Sampling, cli, common
from pagoda.cli import COMMANDS, main
from pagoda.data.vocabulary import byte_tokenizer
from pagoda.evaluate.bench import bench, decode_bytes
from pagoda.models.layers import dense, weights_of
from pagoda.models.loader import load, save
from pagoda.ops import cpu
from pagoda.ops.cpu.record import Recording


@pytest.mark.parametrize("args", [["--help"], *([*name.split(), "--help"] for name in COMMANDS)])
def test_help_imports_no_torch(args):
    code = (
        f"import sys; from pagoda.cli import main\ntry: main({args!r})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: pagoda" in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generat"], "did you mean 'generate'"),
        (["generate", "smollm2-135-instruct", "--prompt", "x"], "smollm2-135m-instruct"),
        (["generate", "{tmp}", "--prompt", "x"], "config.json"),
        (["generate", "{default}", "--prompt", "x", "--temperature", "-1"], "temperature must be 0 or more"),
        (["generate", "{default}", "--prompt", "x", "--temperature", "hot"], "temperature"),
        (["generate", "{default}", "--prompt", "x", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["generate", "{default}", "--prompt", "x", "--device", "toaster"], "unknown device 'toaster'"),
        (["generate", "{default}", "--prompt", "x " * 9000], "context is 8192"),
        (["generate", "{default}", "--prompt", "x", "--device", "meta"], "device 'meta' is not supported"),
        (["generate", "{default}", "--prompt", "caf\udce9"], "not valid Unicode"),
        (["evaluate", "perplexity", "{default}", "--text", "x", "--kv_dtype", "int8"], "leave --kv_dtype out"),
        (["generate", "{default}", "--no_such_option", "1"], "no_such_option"),
        (["convert", "{default}", "{tmp}", "--max_shard_size", "huge"], "'huge' is not a size"),
    ],
)
def test_mistakes_cost_one_line(args, words, tmp_path, default_model, capsys):
    (tmp_path / "keep").touch()
    code = main([a.format(tmp=tmp_path, default=default_model) for a in args])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("pagoda: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temperature: null", "temperature must not be null"),
        ("temperature: hot", "temperature: expected number, not hot"),
        ("seed: x", "seed: expected whole number or null, not x"),
        ("stop: x", "stop: expected list, not x"),
        ("top_q: 1", "'top_q' is not accepted"),
        ("top_p: 7", "top_p must be above 0"),
        ("", "--config file must hold"),
        ("a: [", "parsing"),
    ],
)
def test_mistakes_in_a_configuration_file_cost_one_line(text, words, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["generate", "smollm2-135m-instruct", "--prompt", "x", "--config", str(tmp_path / "c.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("text", ["# a heading", "null", "[INST]", "- item", "a: {b}", '"quoted"', "x ", "é🙂\n"])
def test_texts_on_the_command_line_are_taken_as_they_are(text, monkeypatch):
    seen = []

    def generate(model: str, sampling: Sampling, prompt: str = "-"):
        """Stands in."""
        seen.extend([prompt, sampling.stop])

    monkeypatch.setitem(cli.COMMANDS, "generate", generate)
    assert main(["generate", "m", "--prompt", text, "--stop", text, f"--stop={text}"]) == 0
    assert seen == [text, [text, text]]


def test_a_file_that_may_not_be_read_costs_one_line(monkeypatch, capsys):
    def download(name):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("pagoda.models.download.download", download)
    assert main(["download", "x"]) == 2
    assert capsys.readouterr().err == "pagoda: Permission denied: /some/file\n"


def test_python_m_pagoda_is_the_command():
    done = subprocess.run([sys.executable, "-m", "pagoda", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("pagoda ")


def test_generating_does_not_wait_for_the_compiler(default_model):
    code = (
        "import sys; from pagoda import LLM\n"
        f"LLM.load({str(default_model)!r}).generate('One', max_new_tokens=3)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_prints_the_completion_alone(default_model, capsys):
    args = ["--temperature", "0", "--max_new_tokens", "5", "--dtype", "float32"]
    assert main(["generate", str(default_model), "--prompt", "The capital of France is", *args]) == 0
    out, err = capsys.readouterr()
    assert out == " Paris.\n\nThe\n"
    assert "tokens/s" in err


def test_generate_json_reads_standard_input(default_model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The capital of France is"))
    args = ["--temperature", "0", "--max_new_tokens", "40", "--stop", ".", "--dtype", "float32", "--json"]
    assert main(["generate", str(default_model), *args]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["text"] == " Paris"
    assert done["finish_reason"] == "stop"
    assert done["prompt_tokens"] == 5


def test_options_come_from_a_file_and_are_shown(default_model, tmp_path, capsys):
    (tmp_path / "short.yaml").write_text("max_new_tokens: 2\ntemperature: 0.0\n")
    args = ["generate", str(default_model), "--config", str(tmp_path / "short.yaml"), "--prompt", "Hi"]
    with pytest.raises(SystemExit):
        main([*args, "--print_config"])
    assert "max_new_tokens: 2" in capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 2


def test_chat_reads_a_pipe(default_model, tmp_path, capsys, monkeypatch):
    saved = tmp_path / "talk.json"
    lines = ["What is the capital of France?", f"/save {saved}", "/reset", "/help", "Say hello."]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(default_model), "--temperature", "0", "--max_new_tokens", "30"]) == 0
    out, err = capsys.readouterr()
    assert "Paris" in out
    assert "/reset" in err
    talk = json.loads(saved.read_text())
    assert [m["role"] for m in talk] == ["user", "assistant"]
    assert "Paris" in talk[1]["content"]


def test_models_lists_sizes_with_parameters(capsys):
    assert main(["models", "--json"]) == 0
    sizes = {(row := json.loads(line))["name"]: row["parameters"] for line in capsys.readouterr().out.splitlines()}
    assert sizes["SmolLM2-135M"] == 134515008
    assert sizes["Llama-2-7b-hf"] == 6738415616


def test_convert_writes_a_directory_that_transformers_opens(default_model, tmp_path, capsys):
    target = tmp_path / "hf"
    args = ["convert", str(default_model), str(target), "--dtype", "bf16", "--max_shard_size", "200MB"]
    assert main(args) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert len(list(target.glob("model-*-of-*.safetensors"))) == 2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tok = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert str(model.dtype) == "torch.bfloat16"
    assert model.generation_config.eos_token_id in (tok.eos_token_id, [tok.eos_token_id])
    assert tok("Hello 🙂 world").input_ids == tok.encode("Hello 🙂 world")
    assert main(args) == 2  # never over what is there
    assert "exists already" in capsys.readouterr().err


def test_bench_counts_the_bytes_and_the_time_of_a_step(tmp_path, capsys):
    config = tiny.saved("llama", tmp_path).config
    assert main(["bench", str(tmp_path), "--prompt_tokens", "20", "--new_tokens", "8", "--repeats", "1", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)
    weights = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    cache = 24 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert 0.8 * (weights + cache) < speed["decode_bytes_per_step"] < weights + cache  # without the embedding's rows
    assert speed["prefill_tok_s"] * speed["first_token_s"] == pytest.approx(20, rel=0.01)
    if cpu.kernels is not None:
        assert {"attention", "linear", "rms_norm"} <= set(speed["decode_step_ms"])
        assert min(speed["decode_step_ms"].values()) > 0


def test_of_experts_only_those_that_can_be_chosen_are_read(tmp_path):
    config = tiny.saved("mixtral", tmp_path).config  # 4 experts, of which 2 take each token
    sizes = {}
    for quantize in (None, "float32"):
        model = load(tmp_path, torch.float32, quantize=quantize)
        assert model.n_params() == sum(p.numel() for p in tiny.make("mixtral").parameters())
        sizes[quantize] = [decode_bytes(model, torch.float32, 1, batch) for batch in (1, 2, 100)]
    one = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size * 4
    cache = sum(spec.page_bytes(1, torch.float32) for spec in model.cache_specs())
    a, b, c = sizes[None]
    assert b - a == 2 * one + cache
    assert c - b == 98 * cache
    if cpu.kernels is not None:
        assert sizes["float32"][1] > sizes["float32"][0] + one


def test_a_mixture_of_packed_experts_is_saved(tmp_path):
    tiny.saved("mixtral", tmp_path / "m")
    model = load(tmp_path / "m", torch.float32, quantize="nf4")
    save(model, tmp_path / "again")
    for (name, ours), (_, theirs) in zip(weights_of(load(tmp_path / "again")), weights_of(model)):
        assert torch.equal(ours, dense(theirs)), name


def test_the_directory_that_one_is_in_can_be_written(tmp_path, monkeypatch, capsys):
    tiny.saved("llama", tmp_path / "m")
    byte_tokenizer().save(tmp_path / "m")
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    assert main(["convert", str(tmp_path / "m"), "."]) == 0
    assert (tmp_path / "new" / "config.json").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_standard_output_costs_one_line():
    command = [sys.executable, "-m", "pagoda", "models"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "pagoda: No space left on device: standard output\n"


def test_pages_of_files_are_no_used_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("8000000\n")
    (tmp_path / "memory.current").write_text("7000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 5000000\nactive_file 1000000\n")
    monkeypatch.setattr(common, "CGROUP", tmp_path)
    assert common.free_memory(torch.device("cpu")) == 7_000_000


def test_bench_times_the_step_of_all_sequences(tmp_path, monkeypatch):
    """More prompts than one step reads: some sequences end before the others, with recordings of their own."""
    if cpu.kernels is None:
        pytest.skip("no kernels")
    timed = []
    seconds = Recording.seconds
    monkeypatch.setattr(Recording, "seconds", lambda self: timed.append(self.output.shape[0]) or seconds(self))
    tiny.saved("llama", tmp_path)
    bench(load(tmp_path), torch.float32, prompt_tokens=40, new_tokens=8, batch=60, repeats=1)
    assert timed == [60]
