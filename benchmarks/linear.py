"""Products with packed weights at few and many rows, and what share of the rate of 512 rows that is; prints a table.

usage: python benchmarks/linear.py [--size 4096] [--copies 8]

So many matrices of size x size are multiplied in turns, that their weights come from memory; medians, bf16 activations.
GB/s are the weights' bytes over the time.
"""

import argparse
import statistics
import time

import torch

from pagoda.ops.formats import Arena, pack
from pagoda.ops.linear import linear

ROWS = (1, 8, 16, 32, 64, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--copies", type=int, default=8)
    args = parser.parse_args()
    print("| format | " + " | ".join(f"{n} rows" for n in ROWS) + " |\n|" + "---|" * (len(ROWS) + 1))
    for format in ("int8", "int4", "nf4", "bf16"):
        arena = Arena()  # as a loaded model's
        weights = [pack(torch.randn(args.size, args.size), format)._apply(arena) for _ in range(args.copies)]
        rates, bytes_per_second = {}, {}
        for n in ROWS:
            seconds = measure(weights, torch.randn(n, args.size).bfloat16(), 3 if n == 512 else 9)
            rates[n] = 2 * n * args.size**2 / seconds / 1e9
            bytes_per_second[n] = weights[0].nbytes / seconds / 1e9
        cells = (f"{rates[n]:.0f} ({rates[n] / rates[512]:.0%}, {bytes_per_second[n]:.0f} GB/s)" for n in ROWS)
        print(f"| {format} | " + " | ".join(cells) + " |", flush=True)


@torch.inference_mode()
def measure(weights: list, x: torch.Tensor, times: int) -> float:
    """Seconds of one product."""
    took = []
    for _ in range(times + 1):
        start = time.perf_counter()
        for w in weights:
            linear(x, w)
        took.append((time.perf_counter() - start) / len(weights))
    return statistics.median(took[1:])


if __name__ == "__main__":
    main()
