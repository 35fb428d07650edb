"""The server: uvicorn, which lets running requests finish before it leaves."""

from __future__ import annotations

import socket
import sys
import time

import uvicorn

from pagoda.serve.app import create_app
from pagoda.serve.service import Service


class Server(uvicorn.Server):
    """uvicorn, which first lets running requests finish."""

    def __init__(self, here: Service, background: list):
        app = create_app(here, background)
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        self.here, self.deadline = here, float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{self.here.name} on {address} (a page to chat on; OpenAI's API: {address}/v1)", file=sys.stderr)
        if not host.startswith("127.") and host != "::1" and not self.here.options.api_key:
            print("anybody who reaches this machine can use it: give --api_key", file=sys.stderr)

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.here.draining:
            self.should_exit = self.force_exit = True
        else:
            self.here.draining = True
            self.deadline = time.monotonic() + self.here.options.shutdown

    async def on_tick(self, counter: int) -> bool:
        if self.here.draining and not self.should_exit:
            if late := time.monotonic() > self.deadline:
                await self.here.engine.close(0)  # who waits still is told that the answer breaks off
            self.should_exit = late or not self.here.active
        return await super().on_tick(counter)
