"""An engine that answers from a script, behind the interface of `AsyncEngine`; and a server in a thread."""

import asyncio
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx

from pagoda.data.vocabulary import byte_tokenizer
from pagoda.engine.async_engine import QueueFull
from pagoda.engine.request import Output
from pagoda.serve.options import Serving
from pagoda.serve.server import Server
from pagoda.serve.service import Service
from pagoda.serve.start import listen

# ChatML with tools in Hermes's words, as Qwen2.5 has them
TEMPLATE = """\
{%- if tools %}{{ 'Tools: ' ~ (tools | tojson) ~ ' Say <tool_call>\n' }}{% endif %}
{%- for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name ~ (call.function.arguments | tojson) }}{% endfor %}{{ '\n' }}
{%- endfor %}{{ '<assistant>' if add_generation_prompt }}"""


class Scripted:
    """answers: what to say, one after the other, the last one again and again; while `held`, only their first tokens.
    `seen` are the requests; `cancelled` counts streams that ended early."""

    def __init__(self, *answers: str, held: bool = False, most: int = 1000, template: str | None = TEMPLATE):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        self.answers, self.held, self.most = list(answers) or ["hello"], held, most
        self.engine = SimpleNamespace(tokenizer=tokenizer, context=4096, adapters=SimpleNamespace(names=["pirate"]))
        self.thread = SimpleNamespace(is_alive=lambda: True)
        self.seen, self.open, self.cancelled = [], 0, 0
        self.error = ""

    def start(self):
        pass

    async def close(self, seconds):
        pass

    def submit(self, request):
        if self.open >= self.most:
            raise QueueFull("too many requests wait")
        self.seen.append(request)
        self.open += 1
        return Stream(self, request, self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])

    def stats(self):
        names = ("running", "waiting", "kv_blocks_used", "kv_blocks_total", "prefix_query_tokens", "prefix_hit_tokens")
        return dict.fromkeys([*names, "preemptions", "prompt_tokens", "new_tokens"], 0) | {"running": self.open}


class Stream:
    def __init__(self, owner, request, text):
        self.owner, self.request, self.text, self.done = owner, request, text, False

    async def __aiter__(self):
        sampling = self.request.sampling
        tokens = self.owner.engine.tokenizer.encode(self.text)[: sampling.max_new_tokens]
        reason = "length" if len(tokens) == sampling.max_new_tokens else "stop"
        try:
            for index in range(sampling.n):
                stream = self.owner.engine.tokenizer.stream()
                for token in tokens:
                    await asyncio.sleep(0)
                    yield Output(index, stream.push(token), [token])
                    while self.owner.held:
                        await asyncio.sleep(0.01)
                if self.owner.error:
                    yield Output(index, finish_reason="error", error=self.owner.error)
                    return
                yield Output(index, stream.flush(), finish_reason=reason)
            self.done = True
            self.owner.open -= 1
        finally:
            self.cancel()

    def cancel(self):
        if not self.done:
            self.done = True
            self.owner.open -= 1
            self.owner.cancelled += 1


@contextmanager
def serving(engine, name: str = "tiny", background=(), **options):
    """The address of a server for an engine, while the block runs. `api_key` and so on are the server's options."""
    here = Service(engine, name, Serving(port=0, **options))
    server = Server(here, list(background))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", here, server)
    finally:
        here.draining = True
        thread.join()


class Running:
    """A server that runs: plain requests to it, and its clients."""

    def __init__(self, url, here, server):
        self.url, self.here, self.server = url, here, server
        self.http = httpx.Client(base_url=url, timeout=120)
        self.get, self.post = self.http.get, self.http.post

    def client(self, key="none", kind=None, **options):
        import openai

        return (kind or openai.OpenAI)(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **options)


def wait_for(condition, seconds: float = 10.0):
    """Until it holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def chat(text: str = "hi", **more) -> dict:
    return {"messages": [{"role": "user", "content": text}], **more}
