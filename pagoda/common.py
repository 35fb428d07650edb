"""The ground under every floor: errors, devices, paths. Small, and free of torch at import."""

from __future__ import annotations

import ctypes
import difflib
import importlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
# The precision names of every command (torch dtype names by what users type).
CGROUP = Path("/sys/fs/cgroup")
DTYPES = {"float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16", "float16": "float16", "fp16": "float16"}


class PagodaError(Exception):
    """Something that a user can mend: one line that says what went wrong and what to do. Commands exit with code 2."""


def cache_dir() -> Path:
    """Where downloads live: `$PAGODA_CACHE`, else `pagoda` in the user's cache folder."""
    if path := os.environ.get("PAGODA_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pagoda"


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` takes the first accelerator that works (cuda, then mps), else the CPU. Devices are named nowhere else."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PagodaError(f"unknown device '{name}': use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise PagodaError(f"device '{name}' is not supported: use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PagodaError("no CUDA device is usable here: use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise PagodaError("no MPS device is usable here: use --device cpu")
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """A precision name (`float32`, `bf16`, `float16`) as torch's dtype."""
    import torch

    if name not in DTYPES:
        raise PagodaError(f"unknown dtype '{name}': use one of {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def did_you_mean(name: str, known: Iterable[str], n: int = 3) -> str:
    """A clause such as `; did you mean 'pythia-14m'?`, or nothing when no known name is close."""
    lower = {k.lower(): k for k in known}
    close = [lower[k] for k in difflib.get_close_matches(name.lower(), lower, n=n, cutoff=0.5)]
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def one_of(option: str, value: str, known: Iterable[str]) -> str:
    """`value`, where it is one of the known ones."""
    known = list(known)
    if value not in known:
        raise PagodaError(f"{option} must be one of {', '.join(known)}, not '{value}'{did_you_mean(value, known)}")
    return value


def demand(options: object, **rules: tuple[bool, str]) -> None:
    """PagodaError unless each of these options is good (and finite); the text says what it must be."""
    for name, (good, what) in rules.items():
        value = getattr(options, name)
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            raise PagodaError(f"{name} must be {what}, not {value}")


def optional(package: str, extra: str = "") -> Any:
    """A package that not everybody needs, imported; PagodaError says how to get it (by which extra of ours, if any)."""
    try:
        return importlib.import_module(package)
    except ImportError:
        wanted = f"'pagoda-llm[{extra}]'" if extra else package
        raise PagodaError(f"this needs {package}: pip install {wanted}") from None


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, without the mark that some editors put in front."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise PagodaError(f"{path} is not UTF-8 text (byte {e.start}): convert it first") from None
    except OSError as e:
        raise PagodaError(f"cannot read {path}: {e.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not path.is_file():
        raise PagodaError(f"{path.parent}: no {path.name} there")
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise PagodaError(f"{path}: not valid JSON ({e}); download or copy it again") from None
    if not isinstance(data, dict):
        raise PagodaError(f"{path}: not a JSON object; download or copy it again")
    return data


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file or a directory beside its final place, and rename it there only when the block ends well.

    Yields the temporary path. Nothing half-written is ever seen under `path`; on an error the temporary is removed.
    An existing file is replaced at once; an existing directory must be empty.
    """
    path = Path(os.path.abspath(path))  # `.` has no name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def parse_bytes(text: str) -> int:
    """`500MB`, `5GB`, `2GiB` or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise PagodaError(f"'{text}' is not a size: write 500MB, 5GB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))


def progress(items: Iterable[Item], what: str, total: int, done: int = 0) -> Iterator[Item]:
    """The items, with a bar on standard error that says how many of `total` are through, `done` of them before."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)


def free_memory(device: torch.device) -> int:
    """Bytes that the machine (or the container, or the device) still has to give."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 2**62
    if (meminfo := Path("/proc/meminfo")).is_file():
        kib = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(kib.split()[1]) * 1024
    if (CGROUP / "memory.max").is_file() and (most := (CGROUP / "memory.max").read_text().strip()).isdigit():
        used = int((CGROUP / "memory.current").read_text())
        kept = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(kept.get("inactive_file", 0)) + int(kept.get("active_file", 0))  # pages of files give way
        free = min(free, int(most) - used)
    return free


def keep_heap() -> None:
    """Let glibc keep what is freed for what comes next. By itself it maps large blocks anew each time, and the system
    pays with a page fault for every 4 KB: a third of a prefill."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its most
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def use_huge_pages(address: int, size: int) -> None:
    """Ask for pages of 2 MB where that memory is touched for the first time; where there are none nothing happens."""
    first, end = -(-address // 2**21) * 2**21, (address + size) // 2**21 * 2**21
    if sys.platform == "linux" and first < end and hasattr(libc := ctypes.CDLL(None), "madvise"):
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), 14)  # MADV_HUGEPAGE


def trim_heap() -> None:
    """Give freed memory back to the system: glibc keeps it, also the holes between what is still in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
