"""What a server must withstand: mistakes, strangers, crowds, clients that leave, and its own end."""

import json
import threading
import time
from http.client import HTTPConnection

import httpx
import openai
import pytest
from standin import Scripted, chat, serving, wait_for

KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def scripted():
    with serving(Scripted("hello there")) as running:
        yield running


def refused(answer, status, *words):
    """The error of an answer, in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    for word in words:
        assert word in error["message"]
    return error


# Mistakes -----------------------------------------------------------------------------------------------------------

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = {"prompt": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}
MISTAKES = [
    (COMPLETIONS, "{", 400, "no valid JSON"),
    (COMPLETIONS, "[" * 100_000, 400, "body"),
    (COMPLETIONS, "[]", 400, "JSON object"),
    (COMPLETIONS, "1" * 5000, 400, "body"),
    (COMPLETIONS, b"\xff\xfe", 400, "body"),
    (COMPLETIONS, {}, 400, "prompt: Field required"),
    (COMPLETIONS, {"prompt": 3}, 400, "prompt should be"),
    (COMPLETIONS, {"prompt": []}, 400, "1 to 2048 texts"),
    (COMPLETIONS, {"prompt": [[1, -1]]}, 400, "prompt should be"),
    (COMPLETIONS, {"prompt": "\ud800"}, 400, "surrogate"),
    (COMPLETIONS, {"prompt": "y" * 5000}, 400, "context is 4096"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "at least 1"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 1e30}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "temperature": float("inf")}, 400, "temperature: Input should be a finite number"),
    (COMPLETIONS, {"prompt": "x", "temperature": float("nan")}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "x", "temperature": -0.1}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "x", "temperature": True}, 400, "temperature"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0}, 400, "top_p"),
    (COMPLETIONS, {"prompt": "x", "n": 10**9}, 400, "n: "),
    (COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 1}, 400, "best_of"),
    (COMPLETIONS, {"prompt": "x", "best_of": 2, "stream": True}, 400, "best_of cannot stream"),
    (COMPLETIONS, {"prompt": "x", "stop": [""]}, 400, "empty text"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"x": 1}}, 400, "no token id"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 1e9}}, 400, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "seed": -1}, 400, "seed"),
    (COMPLETIONS, {"prompt": "x", "model": "gpt-4"}, 404, "no model 'gpt-4'"),
    (COMPLETIONS, {"prompt": "x", "model": "\udfff" * 2000}, 404, "no model"),
    (COMPLETIONS, {"prompt": "x", "guided_json": {}, "guided_regex": "a"}, 400, "exactly one"),
    (COMPLETIONS, {"prompt": "x", "guided_choice": []}, 400, "exactly one"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages"),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs needs logprobs"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice needs tools"),
    (CHAT, chat(tools=[TOOL], tool_choice="perhaps"), 400, "tool_choice"),
    (CHAT, chat(tools=[{"function": {"name": "no spaces"}}]), 400, "tools.0.function.name"),
    (CHAT, chat(response_format={"type": "json_schema"}), 400, "needs a json_schema"),
    (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type"),
    (CHAT, chat(response_format={"type": "json_object"}, guided_regex="a"), 400, "response_format"),
    (CHAT, chat(max_completion_tokens=0), 400, "at least 1"),
    ("/v1/embeddings", {"input": []}, 400, "1 to 2048 texts"),
    ("/tokenize", {}, 400, "one of them"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), MISTAKES)
def test_mistakes_get_one_clear_message(scripted, path, body, status, words):
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    refused(scripted.post(path, content=content, headers={"Content-Type": "application/json"}), status, words)
    assert scripted.post(COMPLETIONS, json=ASKED).status_code == 200  # it lives on


def test_other_paths_and_methods_have_the_same_shape(scripted):
    assert refused(scripted.get("/v2/models"), 404)["type"] == "not_found_error"
    answer = scripted.get(CHAT)
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "schema", [{"type": 7}, {"type": "object", "properties": {"a": {"type": "integr"}}}, {"$ref": "#/x"}]
)
def test_impossible_schemas_are_refused(tiny_server, schema):
    refused(tiny_server.post(COMPLETIONS, json={**ASKED, "guided_json": schema}), 400, "makes no sense")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused(tiny_server.post(CHAT, json=chat(response_format=wanted)), 400, "makes no sense")


@pytest.mark.parametrize("more", [{"temperature": 5e-324}, {"temperature": 1e308}, {"top_p": 1e-300}, {"min_p": 1}])
def test_extreme_numbers_sample_all_the_same(tiny_server, more):
    answer = tiny_server.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 4, **more})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prompt": [5000]}, "vocabulary"),
        ({"prompt": [3] * 600}, "context is 512"),
        ({"prompt": ""}, "empty"),
        ({"logit_bias": {"5000": 1}}, "vocabulary"),
        ({"guided_regex": "("}, "makes no sense"),
        ({"guided_grammar": "start: nothing"}, "makes no sense"),
        ({"use_beam_search": True, "guided_regex": "a"}, "beam search"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(tiny_server, more, words):
    refused(tiny_server.post(COMPLETIONS, json={**ASKED, **more}), 400, words)


def test_huge_bodies_are_refused(scripted):
    with serving(Scripted(), max_body_mb=0.01) as running:
        refused(running.post(COMPLETIONS, json={"prompt": "x" * 20_000}), 413, "larger than 0.01 MB")
        in_pieces = (b'{"prompt": "' + b"x" * 5000 for _ in range(4))  # without a Content-Length
        headers = {"Content-Type": "application/json"}
        refused(running.post(COMPLETIONS, content=in_pieces, headers=headers), 413, "larger than 0.01 MB")
        assert running.post(COMPLETIONS, json=ASKED).status_code == 200


def test_a_model_without_a_template_says_so():
    with serving(Scripted(template=None)) as running:
        refused(running.post(CHAT, json=chat()), 400, "no chat template")
    with serving(Scripted(template="{{ messages[0].content }}")) as running:
        assert running.post(CHAT, json=chat()).status_code == 200
        refused(running.post(CHAT, json=chat(tools=[TOOL])), 400, "chat template has no tools")


def test_a_failing_request_fails_alone():
    engine = Scripted("hello")
    with serving(engine) as running:
        engine.error = "the guide lost its way"
        assert refused(running.post(COMPLETIONS, json=ASKED), 500, "lost its way")["type"] == "server_error"
        lines = running.post(COMPLETIONS, json={**ASKED, "stream": True}).text.split("\n\n")
        assert "lost its way" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        with pytest.raises(openai.APIError, match="lost its way"):
            list(running.client().completions.create(model="tiny", prompt="x", stream=True))
        engine.error = ""
        assert running.post(COMPLETIONS, json=ASKED).status_code == 200
        assert engine.open == 0


def test_a_bug_is_a_500_and_one_request_only(caplog):
    engine = Scripted()
    with serving(engine) as running:
        engine.stats = None
        refused(running.get("/metrics"), 500, "something went wrong")
        assert running.get("/health").status_code == 200


# Who may ask --------------------------------------------------------------------------------------------------------


def test_a_key_guards_everything_but_health_and_the_page():
    with serving(Scripted(), api_key="secret") as running:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "secret"},
                {"Authorization": "Bearer é"},
            ):
                refused(running.get(path, headers={k: v.encode() for k, v in headers.items()}), 401, "API key")
            assert running.get(path, headers=KEY).status_code in (200, 404)
        refused(running.post(COMPLETIONS, json=ASKED), 401)
        refused(running.post("/page", json={}), 401)
        assert running.get("/health").status_code == 200
        assert running.get("/").status_code == 200
        assert running.client("secret").completions.create(model="tiny", prompt="x").choices[0].text == "hello"


def test_the_key_is_compared_in_constant_time(monkeypatch):
    import hmac

    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    with serving(Scripted(), api_key="secret") as running:
        assert running.get("/v1/models", headers=KEY).status_code == 200
    assert compared == [(b"secret", b"secret")]


def test_adapters_change_only_with_a_key(scripted):
    body = {"lora_name": "x", "lora_path": "/"}
    refused(scripted.post("/v1/load_lora_adapter", json=body), 403, "API key")
    refused(scripted.post("/v1/unload_lora_adapter", json=body), 403, "API key")


def test_other_origins_only_where_wanted(scripted):
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in scripted.get("/v1/models", headers=asking).headers
    with serving(Scripted(), cors=["https://a.example"], api_key="secret") as running:
        told = running.http.options(CHAT, headers=asking)
        assert (told.status_code, told.headers["access-control-allow-origin"]) == (200, "https://a.example")


def test_the_page_and_no_other_file(scripted):
    page = scripted.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "text/html" in page.headers["content-type"]
    assert scripted.get("/page/index.html").text == page.text
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/..%2fapp.py", "/docs", "/page/"):
        refused(scripted.get(path), 404)


# Crowds, and those who leave ----------------------------------------------------------------------------------------


def test_beyond_the_queue_clients_come_back_later():
    engine = Scripted("hello there", held=True, most=2)
    with serving(engine) as running:
        many = [threading.Thread(target=running.post, args=(COMPLETIONS,), kwargs={"json": ASKED}) for _ in range(2)]
        for each in many:
            each.start()
        wait_for(lambda: engine.open == 2)
        answer = running.post(COMPLETIONS, json=ASKED)
        refused(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        refused(running.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}), 429)
        engine.held = False
        for each in many:
            each.join()
        refused(running.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}), 429)  # all of them or none
        assert engine.open == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
def test_the_work_ends_when_the_client_leaves(stream, prompt):
    engine = Scripted("hello there", held=True)
    with serving(engine) as running:
        client = HTTPConnection(running.url.removeprefix("http://"), timeout=60)
        body = {"prompt": prompt, "stream": stream}
        client.request("POST", COMPLETIONS, json.dumps(body), {"content-type": "application/json"})
        wait_for(lambda: engine.open == len(prompt))
        if stream:
            with client.getresponse() as answer:
                assert answer.readline().startswith(b"data: ")
        client.close()
        wait_for(lambda: engine.cancelled == len(prompt))
        assert engine.open == 0


def test_figures_for_prometheus(tiny_server):
    def figures():
        lines = [line for line in tiny_server.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = figures()
    for stream in (False, True):
        body = {"prompt": "y" * 200, "max_tokens": 7, "stream": stream, "ignore_eos": True}
        assert tiny_server.post(COMPLETIONS, json=body).status_code == 200
    tiny_server.get("/nothing/here")
    after = figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["pagoda_prompt_tokens_total"] == 400
    assert grown["pagoda_generation_tokens_total"] == 14
    assert grown["pagoda_prefix_cache_queries_total"] == 400
    assert 0 < grown["pagoda_prefix_cache_hits_total"] < 200
    assert grown["pagoda_time_to_first_token_seconds_count"] == 2
    assert grown["pagoda_time_between_tokens_seconds_count"] == 12
    assert grown["pagoda_request_seconds_count"] == 2
    assert grown['pagoda_requests_total{path="/v1/completions",status="200"}'] == 2
    assert grown['pagoda_requests_total{path="other",status="404"}'] == 1
    assert after["pagoda_kv_blocks"] > 0
    assert after["pagoda_kv_blocks_used"] == 0


def test_a_cached_prefix_is_told_of(tiny_server):
    ask = {"prompt": "z" * 200, "max_tokens": 1}
    first, second = (tiny_server.post(COMPLETIONS, json=ask).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] >= 64


# The end ------------------------------------------------------------------------------------------------------------


def test_the_end_waits_for_what_runs_and_refuses_the_rest():
    engine = Scripted("hello there", held=True)
    with (
        serving(engine) as running,
        running.http.stream("POST", COMPLETIONS, json={**ASKED, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        running.server.handle_exit(15, None)
        with httpx.Client(base_url=running.url) as another:
            refused(another.post(COMPLETIONS, json=ASKED), 503, "shutting down")
            refused(another.get("/health"), 503)
        engine.held = False
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert engine.cancelled == 0


def test_the_end_waits_no_longer_than_told(make_engine):
    engine = make_engine()
    step = engine.engine.step
    engine.engine.step = lambda: time.sleep(0.1) or step()
    with serving(engine, shutdown=0.3) as running:
        body = {**ASKED, "stream": True, "max_tokens": 500, "ignore_eos": True}
        with running.http.stream("POST", COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.server.handle_exit(15, None)
            assert "shutting down" in [line for line in lines if line][-1]
    assert engine.stats()["kv_blocks_used"] == 0
