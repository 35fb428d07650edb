"""`pagoda serve RUN` while the run goes on: a newer checkpoint takes the place of the served one, without a restart."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from pagoda.common import PagodaError
from pagoda.engine.llm import load_model
from pagoda.engine.options import Weights
from pagoda.serve.service import Service
from pagoda.serve.start import latest_of


def follower(run: str, weights: Weights) -> Callable[[Service], Awaitable[None]]:
    """What watches a run, every `follow` seconds. What is being answered ends on the weights it began with."""

    async def follow(here: Service) -> None:
        tried = here.checkpoint
        while True:
            await asyncio.sleep(here.options.follow)
            newest = latest_of(run)
            if newest in (None, tried):
                continue
            tried = newest
            try:
                model, *_ = await asyncio.to_thread(load_model, Path(run) / "checkpoints" / newest, weights)
                await here.engine.run(lambda engine, model=model: engine.replace(model))
            except (PagodaError, OSError) as error:
                print(f"{run}: {newest} cannot be served ({error}); {here.checkpoint} stays", file=sys.stderr)
                continue
            here.checkpoint = newest
            print(f"{run}: serving {newest}", file=sys.stderr)

    return follow
