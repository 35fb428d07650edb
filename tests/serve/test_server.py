"""`pagoda serve` itself: a process from start to SIGTERM; adapters and checkpoints that come and go; a crowd."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import httpx
import pytest
import tiny
from standin import serving, wait_for

from pagoda.cli import main
from pagoda.engine.options import Weights
from pagoda.models.loader import load
from pagoda.peft.adapter import put_on
from pagoda.peft.files import save_adapter
from pagoda.peft.options import LoRA
from pagoda.serve.follow import follower, latest_of

KEY = {"Authorization": "Bearer secret"}
ASK = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def text(running, model=None, **more):
    answer = running.post("/v1/completions", json={**ASK, "model": model, **more}, headers=KEY)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    """Two LoRA adapters with random weights."""
    import torch

    paths = {}
    for seed, name in enumerate(["pirate", "poet"]):
        model = load(model_dir)
        method = put_on(model, LoRA(rank=4), torch.float32, None)
        generator = torch.Generator().manual_seed(seed)
        for p in method.named().values():
            p.data.normal_(0, 0.5, generator=generator)
        paths[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(model, paths[name])
    return paths


def test_a_process_serves_until_sigterm(model_dir, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "pagoda", "serve", str(model_dir), "--port", "0", "--kv_memory", "0.02"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--served_model_name", "mine"],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PAGODA_API_KEY": "secret", "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(lambda: "http://" in log.read_text() or process.poll() is not None, 60)
        url = log.read_text().split(" on ")[1].split()[0]
        assert url.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=url, headers=KEY, timeout=120) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
            body = {**ASK, "stream": True, "max_tokens": 400, "n": 20}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(120) == 0
        assert process.stdout.read() == b""
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "70000"], "port must be between"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["--adapters", "nameless"], "name=PATH"),
        (["--adapters", "a=/nowhere", "b=/nowhere"], "/nowhere"),
        (["--adapters", "tiny-model=/nowhere"], "cannot be called 'tiny-model'"),
        (["--tool_parser", "hermse"], "did you mean 'hermes'"),
        (["--template", "nosuch"], "unknown chat template"),
        (["--kv_memory", "-1"], "kv_memory"),
        (["--max_body_mb", "-1"], "max_body_mb"),
    ],
)
def test_mistakes_cost_one_line(args, words, model_dir, capsys):
    port = [] if "--port" in args else ["--port", "0"]
    assert main(["serve", str(model_dir), "--device", "cpu", *port, *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), words in err) == ("", 1, True)


def test_a_port_that_is_taken_costs_one_line(tiny_server, model_dir, capsys):
    port = tiny_server.url.rsplit(":", 1)[1]
    assert main(["serve", str(model_dir), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_missing_packages_are_named_with_their_extra():
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from pagoda.cli import main; sys.exit(main(['serve', 'x', '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == 'pagoda: the server needs prometheus_client: pip install "pagoda-llm[serve]"\n'


# Adapters -----------------------------------------------------------------------------------------------------------


def test_adapters_are_models_side_by_side(make_engine, adapters):
    with serving(make_engine(adapters=[f"{n}={p}" for n, p in adapters.items()])) as running:
        ids = [m["id"] for m in running.get("/v1/models").json()["data"]]
        assert ids == ["tiny", "pirate", "poet"]
        alone = {name: text(running, name) for name in ids}
        assert len(set(alone.values())) == 3
        together = {}

        def ask(name, i):
            together[name, i] = text(running, name)

        threads = [threading.Thread(target=ask, args=(name, i)) for i in range(4) for name in ids]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert together == {(name, i): alone[name] for i in range(4) for name in ids}
        body = {"input": "x", "model": "poet"}
        assert running.post("/v1/embeddings", json=body).status_code == 400


def test_adapters_come_and_go(make_engine, adapters):
    with serving(make_engine(), api_key="secret") as running:
        plain = text(running)
        load_it = {"lora_name": "pirate", "lora_path": str(adapters["pirate"])}
        told = running.post("/v1/load_lora_adapter", json=load_it, headers=KEY)
        assert (told.status_code, told.json()["models"]) == (200, ["tiny", "pirate"])
        assert text(running, "pirate") != plain
        again = running.post("/v1/load_lora_adapter", json=load_it, headers=KEY)
        assert (again.status_code, "already" in again.text) == (400, True)
        nowhere = {"lora_name": "x", "lora_path": "/nowhere"}
        assert running.post("/v1/load_lora_adapter", json=nowhere, headers=KEY).status_code == 400
        drop = {"lora_name": "pirate"}
        assert running.post("/v1/unload_lora_adapter", json=drop, headers=KEY).json()["models"] == ["tiny"]
        assert running.post("/v1/unload_lora_adapter", json=drop, headers=KEY).status_code == 404
        assert running.post("/v1/completions", json={**ASK, "model": "pirate"}, headers=KEY).status_code == 404
        assert text(running) == plain


# Following a run ----------------------------------------------------------------------------------------------------


def checkpoint(run, model_dir, step, seed):
    """A run's next checkpoint, as training leaves it."""
    folder = run / "checkpoints" / f"step-{step}"
    shutil.copytree(model_dir, folder)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tiny.randomize(model, seed)
    model.save_pretrained(folder)
    shutil.copy(model_dir / "config.json", folder)
    (run / "latest").write_text(folder.name)
    return folder


def test_a_run_is_followed(make_engine, model_dir, tmp_path, capsys):
    run = tmp_path / "run"
    first = checkpoint(run, model_dir, 10, 1)
    engine = make_engine(run)
    watch = follower(str(run), Weights(device="cpu"))
    with serving(engine, "run", [watch], follow=0.05) as running:
        running.here.checkpoint = latest_of(str(run))
        old = text(running)
        long = {**ASK, "max_tokens": 450, "stream": True}
        whole = text(running, max_tokens=450)
        with running.http.stream("POST", "/v1/completions", json=long) as answer:
            lines = answer.iter_lines()
            streamed = [next(lines)]
            second = checkpoint(run, model_dir, 20, 2)
            streamed += list(lines)
        assert "".join(json.loads(s[6:])["choices"][0]["text"] for s in streamed if s.startswith("data: {")) == whole
        wait_for(lambda: running.here.checkpoint == "step-20")
        assert running.get("/v1/models").json()["data"][0]["checkpoint"] == "step-20"
        new = text(running)
        with serving(make_engine(second)) as fresh:
            assert text(fresh) == new != old
        with serving(make_engine(first)) as fresh:
            assert text(fresh) == old
        (run / "latest").write_text("step-30")  # which is not there
        wait_for(lambda: "step-30 cannot be served" in capsys.readouterr().err)
        assert text(running) == new
        assert running.here.checkpoint == "step-20"


def test_a_run_over_an_adapter_is_followed(make_engine, model_dir, adapters, tmp_path):
    for step, name in ((10, "pirate"), (20, "poet")):
        shutil.copytree(adapters[name], tmp_path / f"checkpoints/step-{step}")
        config = tmp_path / f"checkpoints/step-{step}/adapter_config.json"
        told = json.loads(config.read_text())
        config.write_text(json.dumps({**told, "base_model_name_or_path": str(model_dir)}))
    (tmp_path / "latest").write_text("step-10")
    watch = follower(str(tmp_path), Weights(device="cpu"))
    with serving(make_engine(tmp_path), "run", [watch], follow=0.05) as running:
        running.here.checkpoint = "step-10"
        old = text(running)
        (tmp_path / "latest").write_text("step-20")
        wait_for(lambda: running.here.checkpoint == "step-20")
        new = text(running)
    with serving(make_engine(adapters=[f"{name}={path}" for name, path in adapters.items()])) as running:
        assert (old, new) == (text(running, "pirate"), text(running, "poet"))
        assert text(running) not in (old, new)


def test_what_is_no_run_is_not_followed(model_dir):
    assert latest_of(str(model_dir)) is None
    assert latest_of("smollm2-135m-instruct") is None


# A crowd ------------------------------------------------------------------------------------------------------------


def test_a_crowd_gets_what_each_would_get_alone_and_leaves_nothing(make_engine):
    """More clients than the cache holds; every third leaves in the middle."""
    engine = make_engine(max_num_seqs=16, kv_memory=0.001)

    async def ask(client, i, stop_after=None):
        body = {"prompt": f"client {i}", "max_tokens": 30, "seed": i, "temperature": 0.8, "ignore_eos": True}
        got = ""
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    got += json.loads(line[6:])["choices"][0]["text"]
                if stop_after is not None and len(got) > stop_after:
                    return None
        return got

    async def crowd(url):
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            alone = [await ask(client, i) for i in range(0, 60, 7)]
            together = await asyncio.gather(*(ask(client, i, 5 if i % 3 == 2 else None) for i in range(60)))
        return alone, together

    with serving(engine) as running:
        alone, together = asyncio.run(crowd(running.url))
        for place, i in enumerate(range(0, 60, 7)):
            assert together[i] in ((None,) if i % 3 == 2 else (alone[place],))
        wait_for(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
        assert engine.stats()["kv_blocks_used"] == 0
        assert engine.stats()["open"] == 0
