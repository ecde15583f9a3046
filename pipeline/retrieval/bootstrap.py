"""Figures of ranks with their intervals: the percentile bootstrap over the queries."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.retrieval.photos import Array

RESAMPLES = 1000
TAILS = (2.5, 97.5)  # percent: the interval holds 95 %
DIGITS = 6
FIGURES = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")


def of_queries(ranks: Array) -> Array:
    """What each query adds to each of FIGURES, float64 (4, queries)."""
    return np.stack([*(ranks <= at for at in (1, 5, 10)), 1 / ranks]).astype(np.float64)


def figures(ranks: Array, seed: int) -> dict[str, dict[str, Any]]:
    """`value`, `low` and `high` of each of FIGURES."""
    return _intervals(of_queries(ranks), seed)


def differences(ranks: Array, base: Array, seed: int) -> dict[str, dict[str, Any]]:
    """How much higher each figure is than at `base`, for the same queries, resampled together.

    `real`: the interval leaves out 0.
    """
    found = _intervals(of_queries(ranks) - of_queries(base), seed)
    return {
        name: each | {"real": each["low"] > 0 or each["high"] < 0} for name, each in found.items()
    }


def _intervals(values: Array, seed: int) -> dict[str, dict[str, Any]]:
    draw, queries = np.random.default_rng(seed), values.shape[1]
    means = np.empty((RESAMPLES, len(values)))
    for row in range(RESAMPLES):
        times = np.bincount(draw.integers(0, queries, queries), minlength=queries)
        means[row] = values @ times / queries
    low, high = np.percentile(means, TAILS, axis=0)
    return {
        name: {"value": _round(value), "low": _round(a), "high": _round(b)}
        for name, value, a, b in zip(FIGURES, values.mean(axis=1), low, high, strict=True)
    }


def _round(value: float) -> float:
    return round(float(value), DIGITS)


def said(figure: Mapping[str, Any]) -> str:
    """'0.81 (0.75 to 0.87)'."""
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def said_difference(figure: Mapping[str, Any]) -> str:
    """'+0.02 (-0.01 to +0.05)'."""
    return f"{figure['value']:+.2f} ({figure['low']:+.2f} to {figure['high']:+.2f})"
