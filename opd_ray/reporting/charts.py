"""Charts as SVG text: curves over steps, and a timeline of who worked when. Colours are the page's CSS classes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from opd_ray.pipeline import Window

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 420, 180, 52, 24, 8, 12
_LANE, _AXIS, _LABEL = 22, 24, 96
_NUM_TICKS = 4
_ROUNDING = 1e-6  # of a value: what differs by less is the same
PHASES = ("generate", "score", "learn", "publish")
NUM_COLOURS = 8
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Two linear axes of a chart."""

    x0: float
    x1: float
    y0: float
    y1: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    form: Callable[[float], str] = "{:g}".format

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies in the drawing."""
        across = (x - self.x0) / ((self.x1 - self.x0) or 1) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - self.y0) / ((self.y1 - self.y0) or 1) * (_HEIGHT - _BOTTOM - _TOP)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    def frame(self) -> str:
        """Return the grid and the numbers at its sides."""
        parts = []
        for value in self.y_ticks:
            _, y = self.at(self.x0, value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{self.form(value)}</text>')
        for value in self.x_ticks:
            x, _ = self.at(value, self.y0)
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{self.form(value)}</text>')
        return "".join(parts)

    def line(self, points: Points, *, css: str) -> str:
        """Return a line through points; a single one is a dot."""
        places = [self.at(*point) for point in points]
        if len(places) == 1:
            ((x, y),) = places
            return f'<circle class="{css} dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<polyline class="{css}" points="{path}"/>'


def figure(title: str, content: str) -> str:
    """Return a drawing with its title."""
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{content}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def curves(title: str, series: Mapping[str, Points]) -> str:
    """Return a line of (step, value) points for each series, in the order of the colours; hovering tells its name."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x0, x1, y_ticks = min(xs), max(xs), ticks(min(ys), max(ys))
    x_ticks = [x for x in ticks(x0, x1) if x0 <= x <= x1]
    axes = Axes(x0=x0, x1=x1, y0=y_ticks[0], y1=y_ticks[-1], x_ticks=x_ticks, y_ticks=y_ticks)
    lines = [
        f"<g><title>{escape(name)}</title>{axes.line(points, css=f'curve s{i}')}</g>"
        for i, (name, points) in enumerate(series.items())
        if points
    ]
    return figure(title, axes.frame() + "".join(lines))


def legend(names: Sequence[str]) -> str:
    """Return which colour is whose in `curves`."""
    keys = (f'<span class="key"><i class="series s{i}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f"<p>{''.join(keys)}</p>"


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers, evenly spaced, from at most `low` to at least `high`."""
    span = high - low
    if span <= _ROUNDING * abs(high):
        low, span = min(high, 0.0), abs(high) or 1.0  # a constant is shown against 0
        high = low + span
    raw = span / _NUM_TICKS
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def timeline(windows: Sequence[Window]) -> str:
    """Return a chart of lanes, one a worker, with what each did in the windows; hovering tells when and how long."""
    lanes = sorted({span.lane for window in windows for span in window.spans}, key=_lane_order)
    start, end = windows[0].start, windows[-1].end
    width, height = 980, _AXIS + _LANE * len(lanes) + _AXIS
    scale = (width - _LABEL - 8) / ((end - start) or 1)

    def at(moment: float) -> float:
        return _LABEL + (moment - start) * scale

    parts = []
    for window in windows:
        a, b = at(window.start), at(window.end)
        parts.append(
            f'<rect class="window" x="{a:.1f}" width="{b - a:.1f}" y="{_AXIS}" height="{_LANE * len(lanes)}"/>'
            f'<text x="{(a + b) / 2:.1f}" y="{_AXIS - 8}" text-anchor="middle">step {window.step}</text>'
        )
    for row, lane in enumerate(lanes):
        y = _AXIS + row * _LANE
        parts.append(f'<text x="{_LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(lane)}</text>')
        for span in (span for window in windows for span in window.spans if span.lane == lane):
            words = f"{lane}: {span.phase} {span.end - span.start:.3f} s, from {span.start - start:.3f} s"
            parts.append(
                f'<rect class="{escape(span.phase)}" x="{at(span.start):.1f}" y="{y + 3}" height="{_LANE - 6}"'
                f' width="{max((span.end - span.start) * scale, 0.5):.1f}"><title>{escape(words)}</title></rect>'
            )
    for value in ticks(0, end - start):
        if value <= end - start:
            parts.append(f'<text x="{at(start + value):.1f}" y="{height - 6}" text-anchor="middle">{value:g} s</text>')
    legend = "".join(f'<span class="key"><i class="{phase}"></i>{phase}</span>' for phase in PHASES)
    svg = f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
    return f'<div class="legend">{legend}</div><div class="wide">{svg}</div>'


def _lane_order(lane: str) -> tuple[int, str]:
    pools = ("rollout", "teacher", "learner")
    pool = lane.split("-")[0]
    return (pools.index(pool) if pool in pools else len(pools), lane)
