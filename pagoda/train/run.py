"""The folder of a run: what it was told, what it measured, and checkpoints that it can go on from.

    RUN/config.yaml                  the exact configuration
    RUN/metrics.jsonl                one line per step and per evaluation
    RUN/latest                       the name of the newest checkpoint
    RUN/checkpoints/step-N/          a Hugging Face directory (model and tokenizer), and beside the weights
    RUN/checkpoints/step-N/trainer/  the optimizer and the random states (torch.distributed.checkpoint), progress.json

A checkpoint appears under its name when it is complete, `latest` follows, and only then are older ones removed: a run
that is killed at any moment goes on from the newest complete one.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor, nn

from pagoda.common import PagodaError, replacing
from pagoda.models.gpt import GPT
from pagoda.models.loader import save
from pagoda.peft import adapter
from pagoda.train.options import Train
from pagoda.train.parallel import Workers

# What a resumed run may change. The first leave the arithmetic alone (data may lie elsewhere: its fingerprint counts),
# the second change only the order of roundings.
FREE_OPTIONS = ("max_time", "save_interval", "keep_last", "keep_every", "eval_interval", "eval_first", "eval_rows")
FREE_OPTIONS += ("sample_prompt", "sample_tokens", "tensorboard", "wandb")
ROUNDING_OPTIONS = ("micro_batch_size", "checkpointing", "compile", "sharding", "cpu_offload")
FREE = {"resume", "dry_run", "data", "val_data"} | {f"train.{name}" for name in FREE_OPTIONS}
ROUNDING = {"devices", "device"} | {f"train.{name}" for name in ROUNDING_OPTIONS}


@dataclass
class Progress:
    """How far a run is. seconds: of training, over all sittings."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Run:
    """One run folder, seen from one process."""

    def __init__(
        self,
        path: Path,
        options: Train,
        workers: Workers,
        beside: Callable[[Path], None] | None = None,
        save_adapter: Callable[[GPT, Path], None] | None = None,
    ):
        """beside        writes into a checkpoint what belongs to the model besides its weights (the tokenizer)
        save_adapter  writes what the model wears, in the model's place
        """
        self.path, self.options, self.workers, self.beside = path, options, workers, beside
        self.save_adapter = save_adapter

    # The beginning

    def open(self, config: dict[str, Any], fingerprint: str, resume: str) -> Path | None:
        """Begin a run, or find the checkpoint to go on from. config is all that the run was told.

        resume  `auto` goes on where there is something to go on from; `no` wants an empty folder; `must` wants a
                checkpoint
        """
        checkpoint = latest_checkpoint(self.path)
        config = {**config, "data_fingerprint": fingerprint}
        known = self.path / "config.yaml"
        if checkpoint and resume == "no":
            raise PagodaError(f"{self.path} holds a run already: give --resume auto to go on, or another --out_dir")
        if not checkpoint and resume == "must":
            raise PagodaError(f"{self.path} holds no checkpoint to resume from")
        if checkpoint and not known.is_file():
            raise PagodaError(f"{self.path} holds checkpoints, but no {known.name}: give another --out_dir")
        if checkpoint:
            before = yaml.safe_load(known.read_text(encoding="utf-8"))
            self._compare(flat(before), flat(config))
        if self.workers.main:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in (self.path / "checkpoints").glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            with replacing(known) as temporary:
                temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return checkpoint

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Refuse what would make another run of this one."""
        changed = [
            f"{key} from {before.get(key)!r} to {now.get(key)!r}"
            for key in {**before, **now}
            if key not in FREE | ROUNDING and before.get(key) != now.get(key)
        ]
        if changed:
            raise PagodaError(
                f"{self.path} was started with another configuration; changed: {', '.join(changed)}; "
                "start a new run with another --out_dir, or give the old values"
            )

    # Checkpoints

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted after this step."""
        every = self.options.save_interval
        return every > 0 and step % every == 0

    def save(self, model: GPT, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write checkpoints/step-N, then point `latest` at it, then remove what is not to be kept."""
        final = self.path / "checkpoints" / f"step-{progress.step}"
        temporary = final.with_name(f".{final.name}.partial")
        try:
            if self.workers.main:
                shutil.rmtree(temporary, ignore_errors=True)
            self.workers.wait()
            self._save_model(model, temporary)
            self.workers.wait()
            state = self._state(model, optimizer)
            with quiet():
                dcp.save(state, checkpoint_id=temporary / "trainer", no_dist=self.workers.size == 1)
            if self.workers.main:
                groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
                told = {**asdict(progress), "processes": self.workers.size, "groups": groups}
                (temporary / "trainer" / "progress.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                with replacing(self.path / "latest") as latest:
                    latest.write_text(final.name)
                self._prune(progress.step)
            self.workers.wait()
        except (PagodaError, OSError, dcp.api.CheckpointException) as e:
            if self.workers.main:
                shutil.rmtree(temporary, ignore_errors=True)
            good = latest_checkpoint(self.path)
            raise PagodaError(
                f"cannot save step {progress.step} ({reason(e)}); "
                + (f"the last good checkpoint is {good}: --resume auto goes on from it" if good else "nothing was kept")
            ) from None
        return final

    def _save_model(self, model: GPT, path: Path) -> None:
        if self.save_adapter is None:
            save(model, path, beside=self.beside, write=self.workers.main)
        elif self.workers.main:
            self.save_adapter(model, path)
            if self.beside is not None:
                self.beside(path)

    def _state(self, model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = {"optimizer": flatten_state(model, optimizer), "random": random_states(self.workers)}
        if self.save_adapter is not None:
            state["adapter"] = adapter.progress(model)
        return state

    def _prune(self, newest: int) -> None:
        steps = sorted(int(p.name.removeprefix("step-")) for p in (self.path / "checkpoints").glob("step-*"))
        keep = set(steps[-self.options.keep_last :]) | {newest}
        if every := self.options.keep_every:
            keep |= {s for s in steps if s % every == 0}
        for step in steps:
            if step not in keep:
                shutil.rmtree(self.path / "checkpoints" / f"step-{step}", ignore_errors=True)

    def restore(self, checkpoint: Path, model: GPT, optimizer: torch.optim.Optimizer) -> Progress:
        """Optimizer, random states and progress of a checkpoint, and what trains of a model with adapters; other
        weights are read when the model is built. States are made and filled: no step has to make room for them."""
        told = json.loads((checkpoint / "trainer" / "progress.json").read_text(encoding="utf-8"))
        for group, saved in zip(optimizer.param_groups, told["groups"]):
            group.update(saved)
            for p in group["params"]:
                optimizer.state[p] = optimizer.new_state(p, group)
        state = self._state(model, optimizer)
        if self.workers.rank >= told["processes"]:
            del state["random"]  # this process was not there
        if "adapter" in state:  # what its methods remember is not there yet
            for key, entry in dcp.FileSystemReader(checkpoint / "trainer").read_metadata().state_dict_metadata.items():
                part, _, name = key.partition(".")
                if part == "adapter":
                    state[part].setdefault(name, torch.empty(entry.size, dtype=entry.properties.dtype))
        with quiet():
            dcp.load(state, checkpoint_id=checkpoint / "trainer", no_dist=self.workers.size == 1)
        if "adapter" in state:
            adapter.restore(model, state["adapter"])
        if "random" in state:
            torch.set_rng_state(state["random"][str(self.workers.rank)])
        return Progress(told["step"], told["tokens"], told["seconds"])


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    steps = [p for p in (run / "checkpoints").glob("step-*") if (p / "trainer" / "progress.json").is_file()]
    return max(steps, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} as {"train.lr": 1}."""
    out = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def reason(e: Exception) -> str:
    """What went wrong, in the words of the operating system where they are somewhere in there."""
    text = getattr(e, "strerror", None) or str(e)
    match = re.search(r"No space left on device|Permission denied|Disk quota exceeded|Read-only file system", text)
    return match[0] if match else " ".join(text.split())[:200]


def flatten_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by names, {"layers.0.mlp.weight|exp_avg": tensor, ...}: it fits any number of processes."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}|{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def random_states(workers: Workers) -> dict[str, Tensor]:
    return {str(workers.rank): torch.get_rng_state()}
