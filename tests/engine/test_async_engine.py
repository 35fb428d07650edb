"""The engine behind an event loop: many streams, some of which stop listening; a full queue; an end."""

import asyncio
import time

import pytest
import tiny
import torch
from test_engine import GREEDY, PROMPTS, answers, engine_of, make

from pagoda import PagodaError, Sampling
from pagoda.engine.async_engine import AsyncEngine, QueueFull
from pagoda.engine.request import Request


@pytest.fixture(scope="module")
def model():
    return make()


def serve(engine, scenario):
    """Run scenario(async_engine) in a loop of its own."""

    async def main():
        served = AsyncEngine(engine)
        served.start()
        try:
            return await asyncio.wait_for(scenario(served), 60)
        finally:
            await served.close(1)

    return asyncio.run(main())


async def collect(stream):
    return [t async for piece in stream for t in piece.token_ids]


def test_streams_are_the_offline_answers(model):
    requests = [Request(p, Sampling(temperature=1.0, seed=i, max_new_tokens=9)) for i, p in enumerate(PROMPTS * 4)]
    expected = [tokens for tokens, _ in answers(engine_of(model), requests)]

    async def scenario(served):
        return await asyncio.gather(*(collect(served.submit(r)) for r in requests))

    assert serve(engine_of(model), scenario) == expected


def test_who_stops_listening_frees_the_blocks(model):
    async def scenario(served):
        kept = served.submit(Request(PROMPTS[0], GREEDY))
        gone = [served.submit(Request(p, Sampling(max_new_tokens=300, ignore_eos=True))) for p in PROMPTS]
        async for _ in gone[0]:
            break  # closes the generator, as a vanished client does
        for stream in gone:
            stream.cancel()
        tokens = await collect(kept)
        await served.run(lambda engine: None)
        return tokens, served.stats()

    tokens, stats = serve(engine_of(model), scenario)
    assert tokens == tiny.generate(model, [PROMPTS[0]], GREEDY)[0]
    assert stats["kv_blocks_used"] == stats["open"] == 0


def test_a_full_queue_and_impossible_requests_are_refused_at_once(model):
    async def scenario(served):
        with pytest.raises(PagodaError, match="empty"):
            served.submit(Request([], GREEDY))
        streams = [served.submit(Request([5], GREEDY)) for _ in range(3)]
        with pytest.raises(QueueFull, match="retry later"):
            served.submit(Request([5], GREEDY))
        await asyncio.gather(*map(collect, streams))
        return await collect(served.submit(Request([5], GREEDY)))

    assert len(serve(engine_of(model, max_num_seqs=2, max_queue=1), scenario)) == 12


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(model):
    engine = engine_of(model)
    run = engine.runner.run

    def broken(*_, **__):
        engine.runner.run = run
        raise RuntimeError("no luck")

    engine.runner.run = broken

    async def scenario(served):
        pieces = [p async for p in served.submit(Request([5], Sampling(n=2)))]
        return pieces, await collect(served.submit(Request([5], GREEDY)))

    pieces, tokens = serve(engine, scenario)
    assert [(p.finish_reason, p.error) for p in pieces] == [("error", "no luck")] * 2
    assert tokens == tiny.generate(model, [[5]], GREEDY)[0]
    assert engine.scheduler.blocks.used == 0


def test_functions_run_between_steps_and_their_errors_come_back(model):
    async def scenario(served):
        with pytest.raises(PagodaError, match="no adapter_config"):
            await served.run(lambda engine: engine.load_adapter("a", "/nowhere"))
        return await served.run(lambda engine: engine.embed([[5, 6]]))

    torch.testing.assert_close(serve(engine_of(model), scenario), engine_of(model).embed([[5, 6]]))


def test_closing_lets_the_running_finish_within_its_time(model):
    async def main(seconds, a_step):
        engine = engine_of(model)
        step = engine.step
        engine.step = lambda: time.sleep(a_step) or step()
        served = AsyncEngine(engine)
        served.start()
        stream = served.submit(Request([5], Sampling(temperature=0, max_new_tokens=390, ignore_eos=True)))
        begun = asyncio.Event()
        reader = asyncio.create_task(last(stream, begun))
        await begun.wait()
        await served.close(seconds)
        with pytest.raises(PagodaError, match="closing"):
            served.submit(Request([5], GREEDY))
        return await reader

    async def last(stream, begun):
        async for piece in stream:
            begun.set()
            reason = piece.finish_reason
        return reason

    assert asyncio.run(main(60, 0)) == "length"
    assert asyncio.run(main(0.1, 0.1)) == "abort"
