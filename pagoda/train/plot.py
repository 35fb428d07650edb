"""`pagoda plot`: loss curves of runs, into the terminal (braille, 2 x 4 dots a character) and into a PNG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagoda.common import PagodaError, optional, replacing
from pagoda.train.watch import METRICS, read_metrics

Points = tuple[np.ndarray, np.ndarray]  # steps and losses


@dataclass
class Curves:
    """What a run measured. train and validation may be empty, not both."""

    name: str
    train: Points
    validation: Points


def read_curves(runs: list[str]) -> list[Curves]:
    """The curves of run folders (or metrics.jsonl files); raises PagodaError for one without losses."""
    paths = [Path(run) for run in runs]
    names = [(p.parent if p.name == METRICS else p).resolve().name for p in paths]
    curves = []
    for path, name in zip(paths, names):
        file = path / METRICS if path.is_dir() else path
        if not file.is_file():
            raise PagodaError(f"no metrics in {path}: expected the folder of a run, with a {METRICS}")
        records = read_metrics(file)
        train, validation = points(records, "loss"), points(records, "val_loss")
        if not len(train[0]) + len(validation[0]):
            raise PagodaError(f"no metrics in {path}: {METRICS} holds no losses (yet)")
        curves.append(Curves(name if names.count(name) == 1 else str(path), train, validation))
    return curves


def points(records: list[dict], key: str) -> Points:
    """The finite values of a key, by step."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    steps, values = zip(*found) if found else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """A mean over a twentieth of the curve around each value, more where it has few: centred, so that it does not lag
    behind; over less at the beginning, where the loss falls fast."""
    n, i = len(values), np.arange(len(values))
    reach = np.minimum(max(n // 40, min(math.isqrt(n), 8)), i // 2)
    first, behind = i - reach, np.minimum(i + reach + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[behind] - sums[first]) / (behind - first)


def limits(curves: list[Curves]) -> tuple[float, float, float, bool]:
    """The last step, the lowest and the highest value of the smooth curves, and whether the axis is logarithmic."""
    values = np.concatenate([v for c in curves for v in (smooth(c.train[1]), c.validation[1])])
    low, high = float(values.min()), float(values.max())
    last = max(float(s.max()) for c in curves for s in (c.train[0], c.validation[0]) if len(s))
    return last, low, high, low > 0 and high > 3 * low


# --- into a PNG


def draw_png(curves: list[Curves], out: Path) -> None:
    """Faint: every step. Solid: smoothed, paler where there is validation, which is dashed and what counts. Raises
    PagodaError without matplotlib."""
    optional("matplotlib", "plot")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    if out.suffix.lower() != ".png":
        raise PagodaError(f"--out {out}: the picture is a PNG, name it so")
    _, low, high, logarithmic = limits(curves)
    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    legend = []
    for i, curve in enumerate(curves):
        color = f"C{i % 10}"
        if len(curve.train[0]):
            steps, losses = curve.train
            pale = 0.45 if len(curve.validation[0]) else 1.0
            axes.plot(steps, losses, color=color, alpha=0.3 * pale, linewidth=0.8)
            axes.plot(steps, smooth(losses), color=color, alpha=pale, linewidth=1.8)
        axes.plot(
            *curve.validation, color=color, linestyle="--", linewidth=1.8, marker="o", markersize=5, clip_on=False
        )
        legend.append(Line2D([], [], color=color, linewidth=1.8, label=curve.name))
    if any(len(c.validation[0]) for c in curves):
        legend.append(Line2D([], [], color="0.4", linestyle="--", marker="o", markersize=5, label="validation"))
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    elif high > low:  # what is smooth must fit: a single step's loss may leave the picture
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=legend, frameon=False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")


# --- into the terminal


def draw_text(curves: list[Curves], width: int = 80, height: int = 18) -> str:
    """The smooth curves as lines, each with a letter behind its end, validation as `o`, and a line about each run."""
    last, low, high, logarithmic = limits(curves)
    margin, columns = 8, max(width, 40) - 8 - 2  # behind the last column a letter
    scale = math.log if logarithmic else float

    def row_of(value: float) -> float:
        """From 0 at the top to 1 at the bottom."""
        spread = scale(high) - scale(low)
        return min(max((scale(high) - scale(value)) / spread, 0.0), 1.0) if spread else 0.5

    dots = np.zeros((height, columns), dtype=np.uint8)
    cells = [[""] * (columns + 2) for _ in range(height)]
    ends = []
    for curve in curves:
        steps, losses = curve.train[0], smooth(curve.train[1])
        before = None
        for x in range(2 * columns) if len(steps) else ():
            step = x / (2 * columns - 1) * last
            if not steps[0] <= step <= steps[-1]:
                continue
            y = round(row_of(float(np.interp(step, steps, losses))) * (4 * height - 1))
            before = y if before is None else before
            for dot in range(min(y, before), max(y, before) + 1):
                dots[dot // 4, x // 2] |= BRAILLE[dot % 4][x % 2]
            before = y
        for step, value in zip(*curve.validation):
            cells[round(row_of(value) * (height - 1))][round(step / max(last, 1) * (columns - 1))] = "o"
        ends.append((steps[-1], losses[-1]) if len(steps) else (curve.validation[0][-1], curve.validation[1][-1]))
    for letter, (step, value) in zip(letters(), ends):
        row, column = round(row_of(value) * (height - 1)), round(step / max(last, 1) * (columns - 1)) + 2
        while cells[row][column] in letters() and cells[row][column]:  # beside another run's: the next row
            row = (row + 1) % height
        cells[row][column] = letter
    ticks = {round(f * (height - 1)): f for f in (0, 0.25, 0.5, 0.75, 1)}
    lines = []
    for row in range(height):
        label = ""
        if row in ticks:
            value = scale(high) + (scale(low) - scale(high)) * ticks[row]
            label = f"{math.exp(value) if logarithmic else value:.4g}"
        drawn = "".join(cell or chr(0x2800 + dot) for cell, dot in zip(cells[row], [*dots[row].tolist(), 0, 0]))
        lines.append(f"{label:>{margin - 2}} {'┤' if label else '│'}{drawn}".replace(chr(0x2800), " ").rstrip())
    lines.append(" " * (margin - 1) + "└" + "─" * columns)
    middle, right = f"{last / 2:,.0f}", f"{last:,.0f}"
    lines.append(" " * margin + f"{0:<{columns // 2 - len(middle) // 2}}{middle}".ljust(columns - len(right)) + right)
    lines.append("")
    return "\n".join(lines + [summary(letter, curve) for letter, curve in zip(letters(), curves)])


BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # the bit of a dot, by row and column


def letters() -> str:
    return "abcdefghijklmnopqrstuvwxyz" * 8


def summary(letter: str, curve: Curves) -> str:
    """`a  run`, and below `step 1,000: loss 2.1312, o val_loss 2.2034 (lowest 2.1999 at step 900)`"""
    words = []
    if len(curve.train[0]):
        words.append(f"step {curve.train[0][-1]:,.0f}: loss {smooth(curve.train[1])[-1]:.4f}")
    if len(curve.validation[0]):
        steps, values = curve.validation
        lowest = int(values.argmin())
        words.append(f"o val_loss {values[-1]:.4f} (lowest {values[lowest]:.4f} at step {steps[lowest]:,.0f})")
    return f"{letter}  {curve.name}\n   {', '.join(words)}"
