"""Charts as SVG text: curves over steps, and a timeline of who worked when. Colours are the page's CSS classes."""

import math
from collections.abc import Sequence
from html import escape

from opd_ray.pipeline import Window

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 420, 180, 52, 24, 8
_LANE, _AXIS, _LABEL = 22, 24, 96
_NUM_TICKS = 4
PHASES = ("generate", "score", "learn", "publish")


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """Return a line through (step, value) points, with ticks at round numbers."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, y_ticks = [x for x in ticks(xs[0], xs[-1]) if xs[0] <= x <= xs[-1]], ticks(min(ys), max(ys))
    x0, x1 = xs[0], xs[-1]
    y0, y1 = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1) * (_WIDTH - _LEFT - 12)
        up = (y - y0) / ((y1 - y0) or 1) * (_HEIGHT - _BOTTOM - _TOP)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = []
    for value in y_ticks:
        _, y = at(x0, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x, _ = at(value, y0)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{value:g}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    parts.append(f'<polyline class="curve" points="{path}"/>')
    if len(points) == 1:
        x, y = at(*points[0])
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers, evenly spaced, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
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
