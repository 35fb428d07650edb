"""`pagoda serve` under load: Poisson arrivals, or a storm of clients.

usage: python benchmarks/serve.py [--rates 0.5 1 2 4] [--seconds 30] [--new_tokens 64] [--picture serve.png] [SERVE ...]
       python benchmarks/serve.py --storm 256 --seconds 60 --kv_memory 0.05

Without --url a server for smollm2-135m-instruct is started, with all further options (`--quantize int4`).
Arrivals: at each rate clients come at random, whether or not the ones before have been served; they stream their
answers. Printed are the throughput and, in milliseconds, the time to the first token, between tokens, and to the end.
Storm: so many clients ask over and over, some leave in the middle; every answer is compared with what the same request
gave alone, and in the end no block of the cache may be in use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field

TOPICS = ["rivers", "castles", "bread", "winter", "chess", "whales", "maps", "violins", "deserts", "clocks", "bridges"]
QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Answer:
    """What a client saw. times: when each piece came; status: of HTTP."""

    start: float
    status: int = 0
    text: str = ""
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0
    error: str = ""


async def ask(address: tuple[str, int], body: dict, leave_after: int | None = None) -> Answer:
    """Stream a chat over a connection of its own. Bare sockets: the clients share the machine with the server."""
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(*address)
    try:
        content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        answer.status = int((await reader.readline()).split()[1])
        done = False
        async for line in reader:  # the sizes of chunks stand on lines of their own
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                answer.error = chunk["error"]["message"]
            if chunk.get("usage"):
                answer.tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk.get("choices", []):
                if piece := choice["delta"].get("content"):
                    answer.text += piece
                    answer.times.append(time.perf_counter())
            if leave_after is not None and len(answer.times) > leave_after:
                return answer
        if not done and not answer.error:
            answer.error = f"status {answer.status}" if answer.status != 200 else "the stream broke off"
    except OSError as e:
        answer.error = str(e)
    finally:
        writer.close()
        answer.end = time.perf_counter()
    return answer


def request(i: int, new_tokens: int) -> dict:
    rng = random.Random(i)
    one, two = rng.sample(TOPICS, 2)
    message = {"role": "user", "content": f"Story {i}: write about {one} and {two}."}
    return {"messages": [message], "max_tokens": new_tokens, "temperature": 0.8, "seed": i, "ignore_eos": True}


# Arrivals -----------------------------------------------------------------------------------------------------------


async def arrivals(address: tuple[str, int], rate: float, seconds: float, new_tokens: int) -> list[Answer]:
    """Clients at random times, `rate` of them a second on average."""
    rng, clients = random.Random(rate), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        clients.append(asyncio.ensure_future(ask(address, request(len(clients), new_tokens))))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*clients))


def summary(rate: float, answers: list[Answer]) -> dict:
    good = [a for a in answers if not a.error]
    seconds = max(a.end for a in answers) - min(a.start for a in answers)
    row = {"requests/s": rate, "answered": len(good), "errors": len(answers) - len(good)}
    row["tokens/s"] = sum(a.tokens for a in good) / seconds
    kinds = {
        "first": [a.times[0] - a.start for a in good],
        "between": [b - a for answer in good for a, b in zip(answer.times, answer.times[1:])],
        "whole": [a.end - a.start for a in good],
    }
    for kind, values in kinds.items():
        for q in QUANTILES:
            row[f"{kind} p{round(100 * q)}"] = 1000 * quantile(values, q)
    return row


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)] if values else float("nan")


def show(rows: list[dict]) -> None:
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{row[n]:.0f}" if n != "requests/s" else f"{row[n]:g}" for n in names) + " |")


def draw(rows: list[dict], file: str) -> None:
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    rates = [row["requests/s"] for row in rows]
    places[0].plot(rates, [row["tokens/s"] for row in rows], "o-")
    places[0].set_title("tokens/s")
    for place, kind in zip(places[1:], ("first", "between", "whole")):
        for q in QUANTILES:
            name = f"p{round(100 * q)}"
            place.plot(rates, [row[f"{kind} {name}"] for row in rows], "o-", label=name)
        place.set_title(
            {"first": "to the first token", "between": "between tokens", "whole": "to the end"}[kind] + ", ms"
        )
        place.set_yscale("log")
        place.legend()
    for place in places:
        place.set_xlabel("requests/s")
        place.set_xlim(left=0)
    figure.savefig(file, dpi=120)


# Storm --------------------------------------------------------------------------------------------------------------


async def storm(address: tuple[str, int], clients: int, seconds: float, kinds: int = 32) -> Counter:
    """How it went: answers that were right, wrong, broken; clients that left; refusals."""
    bodies = [request(i, 16 + i % 3 * 16) for i in range(kinds)]
    alone = [await ask(address, body) for body in bodies]
    if broken := [a.error for a in alone if a.error]:
        sys.exit(f"a client alone: {broken[0]}")
    counts, end = Counter(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() < end:
            i = rng.randrange(kinds)
            leave = rng.randrange(12) if rng.random() < 0.15 else None
            answer = await ask(address, bodies[i], leave)
            if answer.status == 429:
                counts["refused (429)"] += 1
                await asyncio.sleep(1)
            elif answer.error:
                counts[f"broken: {answer.error}"] += 1
            elif answer.text == alone[i].text and answer.tokens == alone[i].tokens:
                counts["right"] += 1
            elif leave is not None and alone[i].text.startswith(answer.text):
                counts["left"] += 1
            else:
                counts["WRONG"] += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return counts


def figures(url: str) -> dict[str, float]:
    lines = urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines()
    return {name: float(v) for name, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2, 4])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--picture", help="a PNG file to draw (needs matplotlib)")
    parser.add_argument("--storm", type=int, help="so many clients at once")
    args, rest = parser.parse_known_args()
    server, url = None, args.url
    if url is None:
        start = time.perf_counter()
        command = [sys.executable, "-m", "pagoda", "serve", "smollm2-135m-instruct", "--port", "0", *rest]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = server.stderr.readline()
        if " on http" not in line:
            sys.exit(line)
        url = line.split(" on ")[1].split()[0]
    host, port = url.rpartition("/")[2].split(":")
    address = (host, int(port))
    try:
        first = asyncio.run(ask(address, request(0, 1)))
        if server:
            print(f"from the command to the first answer: {first.end - start:.1f} s")
        if args.storm:
            counts = asyncio.run(storm(address, args.storm, args.seconds))
            told = figures(url)
            end = time.monotonic() + 10
            while told["pagoda_kv_blocks_used"] and time.monotonic() < end:
                time.sleep(0.1)
                told = figures(url)
            for what, n in counts.most_common():
                print(f"{n:6} {what}")
            print(f"{told['pagoda_preemptions_total']:6.0f} preemptions, {told['pagoda_kv_blocks']:.0f} blocks")
            print(f"{told['pagoda_kv_blocks_used']:6.0f} blocks in use afterwards")
            sys.exit(told["pagoda_kv_blocks_used"] > 0 or set(counts) - {"right", "left", "refused (429)"} != set())
        rows = [summary(r, asyncio.run(arrivals(address, r, args.seconds, args.new_tokens))) for r in args.rates]
        show(rows)
        if args.picture:
            draw(rows, args.picture)
    finally:
        if server:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
