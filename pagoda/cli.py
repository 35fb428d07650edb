"""The `pagoda` command: one function per subcommand, its signature and docstring are its options and its help.

Results go to standard output, everything else to standard error. What a user can mend ends in one line and exit code 2.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json as json_module
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pagoda.common import PagodaError, did_you_mean, read_text
from pagoda.data.options import InstructionOptions, Preparation, Reading
from pagoda.engine.options import REQUEST_ONLY, EngineOptions, Sampling, Weights
from pagoda.peft.options import METHODS, Options
from pagoda.serve.options import Serving
from pagoda.train.options import Finetune, Start, Train


def generate(
    model: str,
    sampling: Sampling,
    weights: Weights,
    prompt: str = "-",
    json: bool = False,
) -> None:
    """Complete a text (no chat template is applied; `pagoda chat` does).

    Args:
        model: a name (`pagoda models`), a directory, a GGUF file or a Hub id.
        sampling: how tokens are chosen.
        weights: how the model is loaded.
        prompt: the text to go on from; - is standard input.
        json: print one JSON object with the text, the token ids and the figures.
    """
    if prompt == "-":
        if sys.stdin.isatty():
            raise PagodaError('no prompt: give --prompt "..." or a text on standard input')
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError:
            raise PagodaError("standard input is not UTF-8 text") from None
    from pagoda.engine.llm import LLM

    llm = LLM.load(model, **vars(weights))
    if json:
        done = llm.generate(prompt, sampling)
        figures = dataclasses.asdict(done) | dataclasses.asdict(llm.timing)
        print(json_module.dumps(figures, ensure_ascii=False))
        return
    for piece in llm.stream(prompt, sampling):
        print(piece, end="", flush=True)
    print()
    note(llm.timing.summary())


def chat(
    model: str,
    sampling: Sampling,
    weights: Weights,
    system: str = "",
) -> None:
    """Talk to a model. A pipe on standard input is read as one message per line.

    Args:
        model: a name (`pagoda models`), a directory, a GGUF file or a Hub id.
        sampling: how tokens are chosen.
        weights: how the model is loaded.
        system: the instruction that opens the conversation (the template's own without it).
    """
    from pagoda.engine.chat import converse
    from pagoda.engine.llm import LLM

    converse(LLM.load(model, **vars(weights)), sampling, system)


def models(json: bool = False) -> None:
    """List the families and the sizes that can be built by name, with their parameter counts.

    Args:
        json: print one JSON object per size.
    """
    from pagoda.models.registry import count_parameters, families

    for family in families():
        rows = [(name, count_parameters(hf)) for name, hf in family.sizes.items()]
        if json:
            for name, n in rows:
                print(json_module.dumps({"family": family.__name__, "name": name, "parameters": n}))
            continue
        print(f"{family.__name__} ({', '.join(family.model_types)})")
        for name, n in rows:
            print(f"  {name:40} {human_count(n):>8}")
    if not json:
        note("smollm2-135m-instruct is ready to use (`pagoda download`); the others are shapes, or Hub ids: org/name")


def download(name: str) -> None:
    """Fetch a model and print where it is.

    Args:
        name: smollm2-135m-instruct, or a Hub id (org/name), with @revision or :file.gguf behind it.
    """
    from pagoda.models.download import download as fetch

    print(fetch(name))


def convert(src: str, dst: Path, dtype: str = "auto", max_shard_size: str = "5GB") -> None:
    """Write a model as a Hugging Face directory: from GGUF, with another dtype, or sharded anew.

    Args:
        src: a name, a directory, a GGUF file or a Hub id.
        dst: the directory to write; it must not hold anything yet.
        dtype: float32, bf16, float16, or auto for the checkpoint's own (bf16 for quantized GGUF weights).
        max_shard_size: the largest safetensors file, such as 500MB or 5GB.
    """
    from pagoda.common import parse_bytes, resolve_dtype
    from pagoda.data.tokenizer import load_tokenizer
    from pagoda.models.download import resolve
    from pagoda.models.loader import load, save

    size = parse_bytes(max_shard_size)
    kind = None if dtype == "auto" else resolve_dtype(dtype)
    path = resolve(src)
    save(load(path, kind), dst, max_shard_bytes=size, beside=load_tokenizer(path).save)
    print(dst)


def bench(
    model: str,
    weights: Weights,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    repeats: int = 3,
    json: bool = False,
) -> None:
    """Measure prefill and decode speed, and their share of the machine's measured ceilings.

    Args:
        model: a name (`pagoda models`), a directory, a GGUF file or a Hub id.
        weights: how the model is loaded.
        prompt_tokens: length of each prompt.
        new_tokens: tokens generated behind it.
        batch: sequences at once.
        repeats: runs, of which the median counts.
        json: print one JSON object.
    """
    from pagoda.engine.llm import load_model
    from pagoda.evaluate.bench import bench as measure

    gpt, cache_dtype, _ = load_model(model, weights)
    speed = measure(gpt, cache_dtype, prompt_tokens, new_tokens, batch, repeats)
    if json:
        print(json_module.dumps(dataclasses.asdict(speed)))
        return
    print(f"prefill      {speed.prefill_tok_s:8.1f} tokens/s   {speed.prefill_share_of_gemm:6.1%} of ", end="")
    print(f"{speed.gemm_gflop_s:.0f} GFLOP/s")
    print(f"decode       {speed.decode_tok_s:8.1f} tokens/s   {speed.decode_share_of_bandwidth:6.1%} of ", end="")
    print(f"{speed.read_gb_s:.1f} GB/s ({speed.decode_bytes_per_step / 1e6:.1f} MB a step)")
    if speed.decode_step_ms:
        print("  a step:    " + ", ".join(f"{name} {ms:.2f}" for name, ms in speed.decode_step_ms.items()) + " ms")
    print(f"first token  {speed.first_token_s * 1000:8.1f} ms")
    print(f"peak memory  {speed.peak_memory_gib:8.2f} GiB")


def evaluate_perplexity(
    model: str,
    weights: Weights,
    text: Path | None = None,
    window: int = 1024,
    max_windows: int | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a text file, in windows without overlap whose first token is not scored.

    Args:
        model: a name (`pagoda models`), a directory, a GGUF file or a Hub id.
        weights: how the model is loaded.
        text: a UTF-8 text file.
        window: tokens of a window.
        max_windows: score the first windows only.
        json: print one JSON object.
    """
    if text is None:
        raise PagodaError("no text: give --text FILE")
    if weights.kv_dtype != "auto":
        raise PagodaError("windows are scored without a cache: leave --kv_dtype out")
    content = read_text(text)
    from pagoda.engine.llm import LLM
    from pagoda.evaluate.perplexity import perplexity

    result = perplexity(LLM.load(model, **vars(weights)), content, window, max_windows)
    if json:
        print(json_module.dumps(dataclasses.asdict(result)))
    else:
        print(f"perplexity {result.perplexity:.4f} ({result.tokens} tokens in {result.windows} windows)")


def pretrain(
    train: Train,
    start: Start,
    data: list[str] | None = None,
    model_name: str = "",
    init_from: str = "",
    model_overrides: dict | None = None,
) -> None:
    """Train a model on text that `pagoda prepare` has turned into tokens.

    Args:
        train: how it is trained.
        start: where the run lives and how it begins.
        data: a folder of prepared tokens, with :WEIGHT behind it in a mixture of several (`--data A:2 --data B:1`).
        model_name: the shape to build from scratch (`pagoda models` lists them).
        init_from: a checkpoint, a run or a known model to go on from instead.
        model_overrides: keys of the model's config.json that shall be other than usual.
    """
    from pagoda.train.job import pretrain as begin

    if not data:
        raise PagodaError("no data: give --data DIR, a folder that `pagoda prepare` wrote")
    done = begin(data, train, start, model_name, init_from, model_overrides)
    if done:
        print(done)


def data_show(
    file: str,
    instructions: InstructionOptions,
    tokenizer: str = "smollm2-135m-instruct",
    seq_len: int = 1024,
    n: int = 3,
    json: bool = False,
) -> None:
    """Show instruction data as a model would see it, with what is trained on in colour (or in [[...]]).

    Args:
        file: JSON, JSONL, CSV or Parquet, a folder of them, or a Hub data set (org/name[/config][@revision][:split]).
        instructions: how rows become tokens.
        tokenizer: the model whose tokenizer and chat template are used.
        seq_len: tokens of a row; longer examples are cut.
        n: how many examples to show.
        json: print one JSON object.
    """
    from pagoda.data.instruct import InstructionRows, read_instructions
    from pagoda.data.show import as_json, as_text
    from pagoda.data.tokenizer import load_tokenizer
    from pagoda.models.download import resolve

    own = load_tokenizer(resolve(tokenizer))
    found = read_instructions(file, own, instructions)
    rows = InstructionRows(found.examples, seq_len, packing=instructions.packing)
    if json:
        print(json_module.dumps(as_json(found, rows, own, n), ensure_ascii=False))
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(as_text(found, rows, own, n, colour))
    for line in found.notes():
        note(line)


def prepare(src: list[str], out: Path, reading: Reading, preparation: Preparation, json: bool = False) -> None:
    """Turn text into shards of tokens to pretrain on. A killed run goes on where it was when started again.

    Args:
        src: files, folders and Hub data sets (org/name[/config][@revision][:split]) of text, JSONL, Parquet or Arrow.
        out: the folder to write.
        reading: how documents are found in files.
        preparation: how they become shards.
        json: print the manifest.
    """
    from pagoda.data.prepare import prepare as start
    from pagoda.data.prepare import summary

    manifest = start(src, out, reading, preparation)
    if skipped := manifest["skipped"]:
        note(f"{len(skipped)} files are no UTF-8 text and were skipped, such as {skipped[0]}")
    for split, part in manifest["splits"].items():
        if not part["documents"] and preparation.val_fraction:
            note(f"no document fell to {split}: try another --val_fraction, or --split_by position")
    print(json_module.dumps(manifest) if json else summary(manifest))


def tokenizer_train(
    src: list[str],
    out: Path,
    reading: Reading,
    kind: str = "bpe",
    vocab_size: int = 32_000,
    special_tokens: list[str] | None = None,
) -> None:
    """Train a vocabulary on text and write it as a Hugging Face directory.

    Args:
        src: files, folders and Hub data sets (org/name[/config][@revision][:split]) of text, JSONL, Parquet or Arrow.
        out: the directory to write.
        reading: how documents are found in files.
        kind: bpe (byte-level), sentencepiece (its BPE, as Llama 2's), or unigram (SentencePiece's other model).
        vocab_size: how many tokens, special ones included.
        special_tokens: one more special token (may be given several times).
    """
    from pagoda.data.corpus import all_documents, list_units
    from pagoda.data.vocabulary import train_tokenizer

    texts = all_documents(list_units(src, reading), reading)
    train_tokenizer(texts, out, kind, vocab_size, special_tokens or [])
    print(out)


def tokenizer_extend(model: str, new_tokenizer: str, out: Path) -> None:
    """Add the tokens of another vocabulary to a model, their rows made of those of the pieces they were written with.

    Args:
        model: a name, a directory, a GGUF file or a Hub id.
        new_tokenizer: a directory (such as `pagoda tokenizer train` writes) or a model with the new tokens.
        out: the directory to write; it must not hold anything yet.
    """
    from pagoda.data.vocabulary import extend

    note(f"{extend(model, new_tokenizer, out):,} tokens are new")
    print(out)


def plot(runs: list[str], out: Path | None = None, width: int = 80) -> None:
    """Draw the loss curves of training runs into the terminal, and into a PNG.

    Args:
        runs: run folders.
        out: a PNG file to write as well.
        width: columns of the drawing in the terminal.
    """
    from pagoda.train.plot import draw_png, draw_text, read_curves

    curves = read_curves(runs)
    print(draw_text(curves, width))
    if out is not None:
        draw_png(curves, out)
        note(f"wrote {out}")


def merge(
    base: str, adapter: Path, out: Path, dtype: str = "auto", quantize: str | None = None, max_shard_size: str = "5GB"
) -> None:
    """Fold an adapter into its base and write a plain Hugging Face directory. Says what the folding changed.

    Args:
        base: a name, a directory, a GGUF file or a Hub id.
        adapter: a directory with adapter_config.json, ours or PEFT's.
        out: the directory to write; it must not hold anything yet.
        dtype: float32, bf16, float16, or auto for the base's own (bf16 for quantized GGUF weights).
        quantize: what the base was packed to when the adapter was trained (nf4 for QLoRA, int8, int4); its rounded
            weights are what the adapter is added to.
        max_shard_size: the largest safetensors file, such as 500MB or 5GB.
    """
    from pagoda.common import parse_bytes, resolve_dtype
    from pagoda.data.tokenizer import load_tokenizer
    from pagoda.models.download import resolve
    from pagoda.models.loader import load, save
    from pagoda.peft.adapter import merge_and_compare
    from pagoda.peft.files import load_adapter

    size = parse_bytes(max_shard_size)
    path = resolve(base)
    model = load(path, None if dtype == "auto" else resolve_dtype(dtype), quantize=quantize)
    load_adapter(model, adapter, trainable=True)  # in float32, whatever the base has
    change, size_of_logits = merge_and_compare(model)
    save(model, out, max_shard_bytes=size, beside=load_tokenizer(path).save)
    note(f"the merged model's logits differ by {change:.1g} on average, where a logit is {size_of_logits:.1f}")
    print(out)


def finetune(
    model: str,
    train: Finetune,
    start: Start,
    instructions: InstructionOptions,
    methods: dict[str, Options],
    data: str = "",
    method: str = "lora",
    quantize: str | None = None,
    val_data: str = "",
    val_fraction: float = 0.05,
    epochs: float = 3.0,
) -> None:
    """Train a model on instructions: all of its weights, or an adapter.

    Args:
        model: a name (`pagoda models`), a directory, a GGUF file or a Hub id.
        train: how it is trained.
        start: where the run lives and how it begins.
        instructions: how rows become tokens.
        methods: the options of each method.
        data: a file, a folder or a Hub data set of instructions (`pagoda data show` shows how it is read).
        method: full, lora, qlora, adalora, ia3, bitfit, houlsby, pfeiffer, parallel, llama_adapter, adapter_v2, prefix,
            prompt, p_tuning or p_tuning_v2; several adapters with commas between.
        quantize: pack the frozen base of an adapter to int8, int4 or nf4 (qlora: nf4).
        val_data: validation data of its own.
        val_fraction: else this much of the data is held out (0: none).
        epochs: how often the data is seen (0: as train.max_steps says).
    """
    from pagoda.train.finetune import finetune as begin

    if not data:
        raise PagodaError("no data: give --data FILE (`pagoda data show FILE --tokenizer MODEL` shows how it is read)")
    done = begin(
        model, data, train, start, instructions, methods, method, quantize, val_data, val_fraction, epochs
    )  # fmt: skip
    if done:
        print(done)


def serve(model: str, serving: Serving, engine: EngineOptions, weights: Weights) -> None:
    """Answer OpenAI's HTTP API, and chat in a browser. A training run is followed: its newest checkpoint is served.

    Args:
        model: a name (`pagoda models`), a directory, a run, a GGUF file or a Hub id.
        serving: how the server answers.
        engine: how requests share the machine.
        weights: how the model is loaded.
    """
    serving.api_key = serving.api_key or os.environ.get("PAGODA_API_KEY", "")
    from pagoda.serve.start import serve as start

    start(model, serving, engine, weights)


def env() -> None:
    """Say what this installation runs on: versions, devices, the kernels in use."""
    import platform

    import torch

    from pagoda import __version__
    from pagoda.common import cache_dir, resolve_device
    from pagoda.ops.cpu import kernel_path

    print(f"pagoda   {__version__}")
    print(f"python   {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch    {torch.__version__}, {torch.get_num_threads()} threads, device {resolve_device()}")
    print(f"kernels  {kernel_path()}")
    print(f"cache    {cache_dir()}")


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "chat": chat,
    "models": models,
    "download": download,
    "convert": convert,
    "bench": bench,
    "evaluate perplexity": evaluate_perplexity,
    "prepare": prepare,
    "tokenizer train": tokenizer_train,
    "tokenizer extend": tokenizer_extend,
    "pretrain": pretrain,
    "finetune": finetune,
    "data show": data_show,
    "plot": plot,
    "merge": merge,
    "serve": serve,
    "env": env,
}
# Parameters whose fields are options of their own; NESTED, by their type, with their name in front: --train.lr
GROUPS = {"sampling": Sampling, "weights": Weights, "instructions": InstructionOptions}
GROUPS |= {"serving": Serving, "engine": EngineOptions}
GROUPS |= {"start": Start, "reading": Reading, "preparation": Preparation}
NESTED = {"Train": Train, "Finetune": Finetune}


def note(text: str) -> None:
    print(text, file=sys.stderr)


def human_count(n: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if n >= size:
            return f"{n / size:.{1 if n >= 10 * size else 2}f} {unit}"
    return str(n)


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {inspect.getdoc(f).splitlines()[0]}" for name, f in COMMANDS.items()]
    return "\n".join(
        ["usage: pagoda COMMAND ...", "", "Own a large language model, from raw text to a served assistant.", ""]
        + ["commands:", *lines, "", "`pagoda COMMAND --help` says more."]
    )


def run(command: str, args: list[str]) -> None:
    """Parse the arguments of a command by its signature, and call it."""
    from jsonargparse import ArgumentError, ArgumentParser

    function = COMMANDS[command]
    parser = ArgumentParser(prog=f"pagoda {command}", description=inspect.getdoc(function).split("\nArgs:")[0].strip())
    parser.exit_on_error = False
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parameters = inspect.signature(function).parameters
    groups = {name: options for name, options in GROUPS.items() if name in parameters}
    nested = {name: NESTED[p.annotation] for name, p in parameters.items() if p.annotation in NESTED}
    methods = {name: options for name, options in METHODS.items() if "methods" in parameters and name != "qlora"}
    parser.add_function_arguments(function, as_positional=True, skip={*groups, *nested, "methods"}, as_group=False)
    for group in groups.values():
        parser.add_class_arguments(group, as_group=False, skip=REQUEST_ONLY if group is Sampling else set())
    dotted = {**nested, **methods}
    for name, group in dotted.items():
        parser.add_class_arguments(group, name)
    kinds = {f"--{name}": p.annotation for name, p in parameters.items()}
    kinds |= {f"--{f.name}": f.type for group in groups.values() for f in dataclasses.fields(group)}
    kinds |= {
        f"--{name}.{f.name}": f.type for name, group in {**nested, **methods}.items() for f in dataclasses.fields(group)
    }
    try:
        required = [p.annotation for p in parameters.values() if p.default is p.empty]
        options = vars(parser.parse_args(gather(spell_out(args, kinds), required)))
    except ArgumentError as e:
        raise PagodaError(f"{complaint(str(e))} (`pagoda {command} --help` lists the options)") from None
    options.pop("config", None)
    for option, value in options.items():  # a file may say null for anything
        if value is None and parser.get_default(option) is not None:
            raise PagodaError(f"{option} must not be null (`pagoda {command} --help` lists the options)")
    for name, group in groups.items():
        options[name] = group(**{f.name: options.pop(f.name) for f in dataclasses.fields(group) if f.name in options})
    for name, group in dotted.items():
        options[name] = group(**vars(options[name])) if name in options else group()
    if methods:
        options["methods"] = {name: options.pop(name) for name in methods}
        options["methods"]["qlora"] = options["methods"]["lora"]
    if "start" in groups and options["start"].devices > 1 and "RANK" not in os.environ:
        from pagoda.train.parallel import launch

        sys.exit(launch(options["start"].devices, [*command.split(), *args]))
    function(**options)


def spell_out(args: list[str], kinds: dict[str, str]) -> list[str]:
    """`--json` alone means `--json=true`; `--stop A --stop B` are two texts, taken as they are: `[INST]` is no list.

    kinds: the annotation of every option.
    """
    spelled, rest = [], list(args)
    while rest:
        arg = rest.pop(0)
        option, equals, value = arg.partition("=")
        kind = str(kinds.get(option, ""))
        if kind == "bool" and not equals and rest[:1] not in (["true"], ["false"]):
            arg += "=true"
        elif kind.startswith("list[str]"):
            values = [value] if equals else rest[:1] if rest and not rest[0].startswith("--") else []
            del rest[: 0 if equals else len(values)]
            while option == "--adapters" and rest and "=" in rest[0] and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if values:
                arg = f"{option}+=" + json_module.dumps(values, ensure_ascii=False)
        spelled.append(arg)
    return spelled


def gather(args: list[str], kinds: list[str]) -> list[str]:
    """`A B OUT` as `["A", "B"] OUT`, where the first of the parameters without a default (`kinds`) is a list."""
    if kinds[:1] != ["list[str]"]:
        return args
    places, i = [], 0
    while i < len(args):
        if not args[i].startswith("--"):
            places.append(i)
        elif "=" not in args[i] and args[i] not in ("--help", "--print_config"):
            i += 1  # its value
        i += 1
    several = places[: len(places) - sum(kind in ("str", "Path") for kind in kinds)]
    if not several:
        return args
    texts = json_module.dumps([args[i] for i in several])
    return [texts if i == several[0] else arg for i, arg in enumerate(args) if i not in several[1:]]


def complaint(error: str) -> str:
    """What jsonargparse says about a value, without its own vocabulary."""
    error = " ".join(error.split())
    key = re.search(r'Parser key "(\w+)"', error)
    kinds = list(dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", error)))
    value = re.search(r"(?:Got value|Given value): (.*)", error)
    if key and kinds and value:
        words = {"NoneType": "null", "int": "whole number", "float": "number", "str": "text", "bool": "true or false"}
        return f"{key[1]}: expected {' or '.join(words.get(k, k) for k in kinds)}, not {value[1]}"
    if error.startswith("Unexpected config"):
        return "the --config file must hold lines such as `temperature: 0`"
    return error.replace("Parser key ", "").replace('"config": ', "")


def main(argv: list[str] | None = None) -> int:
    """Entry point: returns the exit code (0; 2 for what a user can mend; 130 when interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        from pagoda import __version__

        print(f"pagoda {__version__}")
        return 0
    try:
        name = next((name for name in COMMANDS if name.split() == argv[: len(name.split())]), None)
        if name is None:
            close = did_you_mean(argv[0], COMMANDS)
            raise PagodaError(f"unknown command '{argv[0]}'{close} (`pagoda --help` lists all)")
        run(name, argv[len(name.split()) :])
        sys.stdout.flush()
    except PagodaError as e:
        note(f"pagoda: {e}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as e:  # a file that may not be read, a full disk
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        note(f"pagoda: {e.strerror}: {e.filename or 'standard output'}")
        if e.filename is None:  # what is still to be written would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
