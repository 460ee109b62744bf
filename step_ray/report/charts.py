"""Loss curves and forest plots as coordinates for an SVG; the template only draws them.

Takes metric lines and intervals, gives tick and line positions in pixels. It drops no point
silently: those that cannot be drawn are counted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step_ray.types import Interval

WIDTH, HEIGHT = 960, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44
"""Margins around the plot, for the labels; pixels."""
FOREST_LEFT, FOREST_RIGHT, FOREST_LINE = 240, 200, 26
"""Of a forest plot: room for labels, for numbers, and the height of a line; pixels."""
SMOOTHING = 40
"""The running mean spans 1/SMOOTHING of the points of a line."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values laid on a range of pixels."""

    low: float
    high: float
    start: float
    """Pixel of `low`."""
    end: float
    log: bool = False

    def place(self, values: Array) -> Array:
        """Pixels of values."""
        low, high = self.low, self.high
        if self.log:
            low, high, values = math.log(low), math.log(high), np.log(values)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixel and label of each tick."""
        values = log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)
        pixels = self.place(np.array(values)).round(1).tolist()
        return [(pixel, f"{value:,.6g}") for pixel, value in zip(pixels, values, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One arm of a chart."""

    arm: str
    raw: str
    """Points of an SVG polyline."""
    mean: str
    """The same, smoothed."""
    last: float
    """Last value of the running mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What the template needs to draw one chart."""

    x: Axis
    y: Axis
    lines: list[Line]
    num_left_out: int
    """Points that cannot be drawn: not finite, or not positive on a log axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestRow:
    """One interval of a forest plot; pixels."""

    label: str
    text: str
    """The numbers, in percentage points."""
    y: float
    dot: float
    low: float
    high: float
    open_low: bool
    """The interval goes on beyond the plot."""
    open_high: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """Differences with their intervals, one below the other, around a line at 0."""

    x: Axis
    rows: list[ForestRow]
    zero: float
    height: int


def forest(differences: Sequence[tuple[str, Interval]]) -> Forest | None:
    """Differences of rates (-1 to 1) as a forest plot in percentage points; None without any.

    The axis holds every estimate and every bound within 100 points; what lies beyond is cut at the
    edge and marked as open.
    """
    if not differences:
        return None
    ends = [100 * v for _, i in differences for v in (i.low, i.estimate, i.high)]
    reach = max(5.0, *(min(abs(end), 100.0) for end in ends)) * 1.05
    x = Axis(low=-reach, high=reach, start=FOREST_LEFT, end=WIDTH - FOREST_RIGHT)
    rows = [
        _forest_row(label, interval, x, TOP + FOREST_LINE * (number + 0.5))
        for number, (label, interval) in enumerate(differences)
    ]
    zero = float(x.place(np.array(0.0)))
    height = TOP + FOREST_LINE * len(rows) + BOTTOM
    return Forest(x=x, rows=rows, zero=zero, height=height)


def _forest_row(label: str, interval: Interval, x: Axis, y: float) -> ForestRow:
    ends = np.array([interval.estimate, interval.low, interval.high]) * 100
    dot, low, high = x.place(np.clip(ends, x.low, x.high)).round(1).tolist()
    return ForestRow(
        label=label,
        text=f"{ends[0]:+.1f} [{ends[1]:+.1f}, {ends[2]:+.1f}]",
        y=y,
        dot=dot,
        low=low,
        high=high,
        open_low=bool(ends[1] < x.low),
        open_high=bool(ends[2] > x.high),
    )


def loss_chart(training: Mapping[str, Sequence[Mapping[str, Any]]], *, log_y: bool) -> Chart | None:
    """Training loss over optimizer steps, one line per arm; None when there is nothing to draw.

    Args:
        training: Arm -> metric lines; lines without `step` and `loss` (summaries, evaluations)
            are of another sort and not looked at.
        log_y: Logarithmic loss axis.
    """
    found = {arm: _points(metrics) for arm, metrics in training.items()}
    drawn = {arm: points[_drawable(points, log_y)] for arm, points in found.items()}
    everything = np.concatenate([np.empty((0, 2)), *drawn.values()])
    if not len(everything):
        return None
    steps, losses = everything.T
    x = Axis(low=0.0, high=float(steps.max()) or 1.0, start=LEFT, end=WIDTH - RIGHT)
    low, high = _padded(float(losses.min()), float(losses.max()), log_y)
    y = Axis(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP, log=log_y)
    return Chart(
        x=x,
        y=y,
        lines=[_line(arm, points, x, y) for arm, points in drawn.items() if len(points)],
        num_left_out=sum(map(len, found.values())) - len(everything),
    )


def _points(metrics: Sequence[Mapping[str, Any]]) -> Array:
    """Steps and losses, shape (N, 2); a missing number (None) becomes NaN, to be counted."""
    rows = [(m["step"], m["loss"]) for m in metrics if "step" in m and "loss" in m]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _drawable(points: Array, log_y: bool) -> NDArray[np.bool_]:
    drawable: NDArray[np.bool_] = np.isfinite(points[:, 0]) & np.isfinite(points[:, 1])
    if log_y:
        drawable &= points[:, 1] > 0
    return drawable


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """A little air above and below; a linear loss axis starts at 0, where a loss is best."""
    if log:
        return low / 1.15, high * 1.15
    low, high = min(low, 0.0), max(high, 0.0)
    return low, high + 0.05 * (high - low or 1.0)


def _line(arm: str, points: Array, x: Axis, y: Axis) -> Line:
    means = points.copy()
    means[:, 1] = running_mean(points[:, 1], max(1, len(points) // SMOOTHING))
    return Line(arm=arm, raw=_path(points, x, y), mean=_path(means, x, y), last=means[-1, 1])


def _path(points: Array, x: Axis, y: Axis) -> str:
    pixels = zip(x.place(points[:, 0]), y.place(points[:, 1]), strict=True)
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in pixels)


def running_mean(values: Array, width: int) -> Array:
    """Mean of each value and up to `width - 1` values before it; shape (N,) to (N,)."""
    # No differences of running sums: they cancel, and a log axis needs means above 0.
    sums = np.convolve(values, np.ones(width))[: len(values)]
    means: Array = sums / np.minimum(np.arange(1, len(values) + 1), width)
    return means


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round values (1, 2 or 5 times a power of ten apart) from low to high."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there is room; linear in a narrow range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        values = [float(f"{m}e{p}") for p in powers for m in factors]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) <= 8:
            break
    return ticks if len(ticks) > 2 else linear_ticks(low, high)
