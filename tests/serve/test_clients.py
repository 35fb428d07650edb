"""The openai and langchain-openai clients against the server: a real engine on a tiny model, or a script."""

import asyncio
import base64
import json

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from standin import Scripted, chat, serving

HELLO = [{"role": "user", "content": "hello"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
CALL = 'I add.<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def client(tiny_server):
    return tiny_server.client()


@pytest.fixture(scope="module")
def tokenizer(tiny_server):
    return tiny_server.here.tokenizer


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("tiny").id, model.owned_by) == ("tiny", "tiny", "pagoda")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_a_stream_says_what_the_whole_answer_says(client):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 40, "logprobs": True, "top_logprobs": 2}
    ask["extra_body"] = {"ignore_eos": True}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    choice = whole.choices[0]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert [t.logprob for c in chunks[:-1] if c.choices[0].logprobs for t in c.choices[0].logprobs.content] == [
        t.logprob for t in choice.logprobs.content
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, choice.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 40
    first = choice.logprobs.content[0]
    assert len(first.top_logprobs) == 2
    assert first.top_logprobs[0].logprob == first.logprob


def test_completions_equal_the_engine_alone(client, tiny_server, tokenizer):
    from pagoda import Sampling
    from pagoda.engine.engine import Engine
    from pagoda.engine.request import Request

    served, texts = tiny_server.here.inner, ["one", "another prompt"]
    done = client.completions.create(model="tiny", prompt=texts, max_tokens=12, temperature=0)
    tokens = [[], []]
    requests = [Request(tokenizer.encode(t), Sampling(temperature=0, max_new_tokens=12)) for t in texts]
    alone = Engine(served.model, tokenizer, served.options)  # the served one has a thread of its own
    alone.run(requests, lambda i, piece: tokens[i].extend(piece.token_ids))
    assert [c.text for c in done.choices] == [tokenizer.decode(t) for t in tokens]
    assert done.usage.prompt_tokens == sum(map(len, texts))
    ids = client.completions.create(model="tiny", prompt=tokenizer.encode("one"), max_tokens=12, temperature=0)
    assert ids.choices[0].text == done.choices[0].text


def test_several_answers_keep_their_places(client):
    ask = {"model": "tiny", "prompt": ["a", "b"], "n": 3, "max_tokens": 8, "seed": 5, "temperature": 1}
    whole = client.completions.create(**ask)
    texts = [""] * 6
    for chunk in client.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [c.text for c in whole.choices] == texts
    assert [c.index for c in whole.choices] == list(range(6))
    assert len(set(texts)) > 3
    best = client.completions.create(model="tiny", prompt="a", n=1, best_of=4, max_tokens=4)
    assert len(best.choices) == 1


def test_echo_scores_the_prompt(client, tokenizer):
    done = client.completions.create(model="tiny", prompt="hey", echo=True, max_tokens=0, logprobs=3, temperature=0)
    choice = done.choices[0]
    assert (choice.text, choice.logprobs.tokens, choice.logprobs.text_offset) == ("hey", ["h", "e", "y"], [0, 1, 2])
    assert choice.logprobs.token_logprobs[0] is None
    assert all(p < 0 for p in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.top_logprobs[1]["e"] == choice.logprobs.token_logprobs[1]
    assert done.usage.completion_tokens == 0
    whole = {"ignore_eos": True}  # answers are drawn: none may end early
    ask = dict(model="tiny", prompt="hey", echo=True, max_tokens=2, logprobs=0, n=2, extra_body=whole)
    more = client.completions.create(**ask).choices
    assert [len(c.logprobs.tokens) for c in more] == [5, 5]
    assert more[1].logprobs.token_logprobs[1] == choice.logprobs.token_logprobs[1]


def test_stop_and_logit_bias(client):
    bias = {str(ord("x")): 100}
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=9, logit_bias=bias)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("x" * 9, "length")
    done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, logit_bias=bias, stop=["xx"])
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("", "stop")


@pytest.mark.parametrize("more", [{"top_k": 1}, {"use_beam_search": True, "beam_width": 2}, {"min_p": 1.0}])
def test_extensions_reach_the_sampler(client, more):
    ask = {"model": "tiny", "prompt": "abc", "max_tokens": 6}
    greedy = client.completions.create(**ask, temperature=0).choices[0].text
    same = client.completions.create(**ask, temperature=1, extra_body={**more, "ignore_eos": True}).choices[0].text
    assert (same == greedy) or "use_beam_search" in more


def test_guided_answers(client):
    def ask(**more):
        done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=60, **more)
        return done.choices[0].message.content

    assert ask(extra_body={"guided_choice": ["yes", "no"]}) in ("yes", "no")
    assert ask(extra_body={"guided_regex": "[0-9]{3}"}).isdigit()
    assert ask(extra_body={"guided_grammar": 'start: "a" "b"'}) == "ab"
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    assert isinstance(json.loads(ask(response_format=wanted))["ok"], bool)


def test_structured_output_is_parsed(client):
    class Answer(BaseModel):
        yes: bool

    done = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Answer, max_tokens=60)
    assert isinstance(done.choices[0].message.parsed, Answer)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_tool_is_called(client, choice):
    ask = {"model": "tiny", "messages": HELLO, "tools": [ADD], "tool_choice": choice, "parallel_tool_calls": False}
    ask |= {"max_tokens": 120, "temperature": 0}
    done = client.chat.completions.create(**ask).choices[0]
    (call,) = done.message.tool_calls
    assert (call.function.name, done.finish_reason, done.message.content) == ("add", "tool_calls", None)
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    parts = [c.choices[0].delta for c in client.chat.completions.create(**ask, stream=True)]
    arguments = "".join(d.tool_calls[0].function.arguments for d in parts if d.tool_calls)
    assert arguments == call.function.arguments


def test_a_tool_call_goes_round():
    engine = Scripted(CALL, CALL, "It is 3.")
    with serving(engine) as running:
        client = running.client()
        ask = {"model": "tiny", "messages": HELLO, "tools": [ADD]}
        message = client.chat.completions.create(**ask).choices[0].message
        assert (message.content, message.tool_calls[0].function.name) == ("I add.", "add")
        with client.chat.completions.stream(**ask) as stream:
            final = stream.get_final_completion().choices[0]
        assert (final.finish_reason, final.message.tool_calls[0].function.arguments) == (
            "tool_calls",
            '{"a": 1, "b": 2}',
        )
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}
        last = client.chat.completions.create(**{**ask, "messages": [*HELLO, message.model_dump(), result]})
        assert last.choices[0].message.content == "It is 3."
    prompt = bytes(engine.seen[-1].prompt).decode()
    assert '"name": "add"' in prompt
    assert '<assistant>I add.add{"a": 1, "b": 2}\n<tool>3\n<assistant>' in prompt


def test_embeddings_in_both_encodings(client):
    floats = client.embeddings.create(model="tiny", input=["one", "two words"], encoding_format="float")
    packed = client.embeddings.create(model="tiny", input=["one", "two words"])  # base64 is the client's own choice
    assert np.allclose([d.embedding for d in floats.data], [d.embedding for d in packed.data], atol=1e-6)
    assert np.linalg.norm(floats.data[1].embedding) == pytest.approx(1, abs=1e-4)
    alone = client.embeddings.create(model="tiny", input="two words", extra_body={"pooling": "last"})
    assert np.dot(alone.data[0].embedding, floats.data[1].embedding) < 0.999
    assert floats.usage.prompt_tokens == 12


def test_embeddings_are_little_endian_floats(tiny_server):
    body = tiny_server.post("/v1/embeddings", json={"input": "one", "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    plain = tiny_server.post("/v1/embeddings", json={"input": "one"}).json()["data"][0]["embedding"]
    assert np.array_equal(vector, np.array(plain, "f4"))


def test_async_clients_share_the_engine(tiny_server):
    async def main():
        async with tiny_server.client(kind=AsyncOpenAI) as client:

            async def ask(i):
                stream = await client.completions.create(
                    model="tiny", prompt=f"number {i}", max_tokens=20, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            alone = [await ask(i) for i in range(3)]
            return alone, await asyncio.gather(*(ask(i) for i in range(3)))

    alone, together = asyncio.run(main())
    assert alone == together


def test_tokenize_and_detokenize(tiny_server):
    told = tiny_server.post("/tokenize", json={"prompt": "héllo"}).json()
    assert (told["tokens"], told["count"], told["max_model_len"]) == (list("héllo".encode()), 6, 512)
    assert tiny_server.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "héllo"}
    of_chat = tiny_server.post("/tokenize", json=chat("hi")).json()["tokens"]
    assert bytes(of_chat) == b"<user>hi\n<assistant>"


def test_template_variables_and_content_parts(tiny_server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "developer", "content": parts}]}
    assert bytes(tiny_server.post("/tokenize", json=body).json()["tokens"]) == b"<system>ab\n<assistant>"
    for name in ("messages", "template", "self"):
        told = tiny_server.post("/v1/chat/completions", json=chat(chat_template_kwargs={name: "x"}))
        assert (told.status_code, name in told.json()["error"]["message"]) == (400, True)


# langchain ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def langchain(tiny_server):
    from langchain_openai import ChatOpenAI

    def make(running=tiny_server, **more):
        return ChatOpenAI(base_url=f"{running.url}/v1", api_key="none", model="tiny", max_tokens=100, **more)

    return make


def test_langchain_invokes_and_streams(langchain):
    model = langchain(temperature=0)
    whole = model.invoke("hello")
    assert "".join(chunk.content for chunk in model.stream("hello")) == whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert [m.content for m in model.batch(["hello", "hello"])] == [whole.content] * 2


def test_langchain_has_structured_output(langchain):
    class Yes(BaseModel):
        """Whether it is so."""

        yes: bool

    for method in ("json_schema", "function_calling"):
        assert isinstance(langchain().with_structured_output(Yes, method=method, strict=True).invoke("is it?"), Yes)


def test_langchain_calls_tools(langchain):
    with serving(Scripted(CALL)) as running:
        message = langchain(running).bind_tools([ADD]).invoke("add")
        assert [(c["name"], c["args"]) for c in message.tool_calls] == [("add", {"a": 1, "b": 2})]
        total = None
        for chunk in langchain(running).bind_tools([ADD]).stream("add"):
            total = chunk if total is None else total + chunk
        assert total.tool_calls[0]["args"] == {"a": 1, "b": 2}


def test_langchain_embeds(tiny_server):
    from langchain_openai import OpenAIEmbeddings

    url = f"{tiny_server.url}/v1"
    embed = OpenAIEmbeddings(base_url=url, api_key="none", model="tiny", check_embedding_ctx_length=False)
    assert len(embed.embed_query("hello")) == 32
