"""Plots as SVG inside a page: they take the page's colours, in dark mode and in print too."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "listing-vectors"}

from matplotlib.figure import Figure  # noqa: E402  after its backend

INK, FIRST = "#123456", "#0b57d1"  # stand for the page's own, which change in dark mode
SECOND = "#c4570a"
HATCH = ("", "///")  # the series are told apart without colour, too


def histogram(series: Mapping[str, Sequence[float]], label: str) -> Markup:
    """How often each value is, a series beside the other, each as shares of its own."""
    figure, axes = _figure(label, "share")
    low = min(min(values) for values in series.values())
    edges = [low + (1 - low) * i / 40 for i in range(41)]
    for (name, values), colour, hatch in zip(series.items(), (FIRST, SECOND), HATCH, strict=False):
        weights = [1 / len(values)] * len(values)
        axes.hist(values, edges, weights=weights, label=name, color=colour, alpha=0.6, hatch=hatch)
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure)


def bars(values: Mapping[str, float], label: str) -> Markup:
    """A bar for each, the first on top."""
    figure, axes = _figure(label, "")
    names = list(values)[::-1]
    drawn = axes.barh(names, [values[name] for name in names], color=FIRST)
    axes.bar_label(drawn, fmt="%.1f", padding=3, color=INK)
    return _svg(figure)


def line(points: Sequence[tuple[float, float]], across: str, up: str) -> Markup:
    """Values over time."""
    figure, axes = _figure(across, up)
    axes.plot(*zip(*points, strict=True), color=FIRST, marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    return _svg(figure)


def intervals(points: Sequence[tuple[str, Mapping[str, float]]], across: str, up: str) -> Markup:
    """A figure for each name: its `value`, and a bar from `low` to `high`."""
    figure, axes = _figure(across, up)
    values = [each["value"] for _, each in points]
    below = [each["value"] - each["low"] for _, each in points]
    above = [each["high"] - each["value"] for _, each in points]
    names = [name for name, _ in points]
    axes.errorbar(names, values, (below, above), color=FIRST, marker="o", markersize=4, capsize=3)
    axes.set_ylim(0, 1.02)
    return _svg(figure)


def _figure(across: str, up: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    axes.tick_params(colors=INK)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(FIRST, "var(--accent)")
    return Markup(text)
