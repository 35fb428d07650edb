"""Products with packed weights at few and many rows, and what share of the rate of 512 rows that is; prints a table.
And the products of a training step, forward, back to the input and to the weight, beside PyTorch's.

usage: python benchmarks/linear.py [--size 4096] [--copies 8]

So many matrices of size x size are multiplied in turns, that their weights come from memory; bf16 activations. For
each number of rows GFLOP/s, and in brackets the share of the rate of 512 rows, the weights' bytes over the time, and
the share of what bounds it: of a sum's reading of as many bytes (bus), or of the same product with a part of the
weights that the caches hold (cores), whichever is lower. All numbers of rows, both ways, and the sum take turns, nine
times: shares are the medians of the turns'. Training's are multiplied by turns, on warm caches: the best of nine.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pagoda.evaluate.bench import memory_to_read, read_bandwidth
from pagoda.ops import cpu
from pagoda.ops.cpu.record import Recording
from pagoda.ops.formats import Arena, PackedWeight, pack
from pagoda.ops.linear import linear, multiplies, multiply

ROWS = (1, 8, 16, 32, 64, 512)
CACHED = 512  # outputs, which the caches hold; half as many are still divided between two cores by outputs
REPEATED = 20  # products with them
LAYERS = {  # rows, n_in, n_out
    "nanoGPT's preset": [(768, 128, 384), (768, 128, 128), (768, 128, 512), (768, 512, 128)],
    "SmolLM2-135M": [(1024, 576, 576), (1024, 576, 192), (1024, 576, 1536), (1024, 1536, 576)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--copies", type=int, default=8)
    args = parser.parse_args()
    if cpu.kernels is None:
        parser.error("there are no kernels to measure: `pagoda env` says why")
    print("| format | " + " | ".join(f"{n} rows" for n in ROWS) + " |\n|" + "---|" * (len(ROWS) + 1))
    much = memory_to_read(torch.device("cpu"))
    for format in ("int8", "int4", "nf4", "bf16"):
        arena = Arena()  # as a loaded model's
        weights = [pack(torch.randn(args.size, args.size), format)._apply(arena) for _ in range(args.copies)]
        inputs = {n: torch.randn(n, args.size).bfloat16() for n in ROWS}
        parts = [pack(torch.randn(n, args.size), format)._apply(arena) for n in (CACHED, CACHED // 2)]
        cached = {n: [repeated(x, part) for part in parts] for n, x in inputs.items()}
        turns = [turn(weights, inputs, cached, args.size / CACHED, much) for _ in range(10)][1:]
        cells = []
        for n in ROWS:
            rate, share, gb_s, of_bus, of_cores = (statistics.median(column) for column in zip(*(t[n] for t in turns)))
            bound = f"{of_bus:.0%} of the bus" if of_bus > of_cores else f"{of_cores:.0%} of the cores"
            cells.append(f"{rate:.0f} ({share:.0%}, {gb_s:.0f} GB/s, {bound})")
        read = statistics.median(t[0] for t in turns)
        print(f"| {format}, a sum reads {read:.0f} GB/s | " + " | ".join(cells) + " |", flush=True)
    print("\n| products of training, GFLOP/s | pagoda | PyTorch | ratio |\n|---|---|---|---|")
    for name, shapes in LAYERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            compare(name, shapes, dtype)


def compare(name: str, shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """The products of a layer one after the other, both ways of multiplying in turns."""
    ours = theirs = operations = 0.0
    for rows, n_in, n_out in shapes:
        x, weight, grad = (torch.randn(s).to(dtype) for s in ((rows, n_in), (n_out, n_in), (rows, n_out)))
        for a, b in ((x, weight.T), (grad, weight), (grad.T, x)):
            if not multiplies(a, b):
                print(f"| {name}, {dtype} | PyTorch's here | | |")
                return
            best = [min(pair) for pair in zip(*[(once(multiply, a, b), once(torch.mm, a, b)) for _ in range(9)])]
            ours, theirs, operations = ours + best[0], theirs + best[1], operations + 2 * rows * n_in * n_out
    rates = f"{operations / ours / 1e9:.0f} | {operations / theirs / 1e9:.0f} | {theirs / ours:.2f}"
    print(f"| {name}, {str(dtype).removeprefix('torch.')} | {rates} |", flush=True)


def once(product: Callable, a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of one product, of ten."""
    start = time.perf_counter()
    for _ in range(10):
        product(a, b)
    return (time.perf_counter() - start) / 10


def repeated(x: torch.Tensor, weight: PackedWeight) -> Recording:
    return Recording(lambda: [linear(x, weight) for _ in range(REPEATED)][-1])


@torch.inference_mode()
def turn(weights: list, inputs: dict[int, torch.Tensor], cached: dict, times: float, much: torch.Tensor) -> dict:
    """For each number of rows GFLOP/s, the share of 512 rows' rate, GB/s of weights, and the shares of what a sum would
    take to read them and of the rate in the cache; at 0 what a sum reads, in GB/s. The cache holds one `times`-th of
    the outputs, and to tell them from what is done for the rows alone, half of it is multiplied too."""
    seconds, seconds_cached = {}, {}
    for n, x in inputs.items():
        start = time.perf_counter()
        for w in weights:
            linear(x, w)
        seconds[n] = (time.perf_counter() - start) / len(weights)
        whole, half = (part.seconds(times=3)["linear"] / REPEATED for part in cached[n])
        seconds_cached[n] = whole + 2 * (whole - half) * (times - 1)
    read = read_bandwidth(much, times=3) / 1e9
    found = {0: read}
    operations, size = 2 * weights[0].shape[0] * weights[0].shape[1], weights[0].nbytes
    for n, took in seconds.items():
        gb_s = size / took / 1e9
        share = n / took / (512 / seconds[512])
        found[n] = operations * n / took / 1e9, share, gb_s, gb_s / read, seconds_cached[n] / took
    return found


if __name__ == "__main__":
    main()
