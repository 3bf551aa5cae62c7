"""The figures of a prediction: every metric of the list computed, with intervals."""

from typing import Any

from critic_train.evaluation import metrics
from critic_train.evaluation.metric_sums import Sums
from critic_train.evaluation.metrics import Kind, Table
from critic_train.evaluation.moments import Floats
from critic_train.evaluation.resampling import Resampling

Samples = dict[str, Floats]
"""Metric -> its figure in each resample, float64 [resamples]."""


def samples_of(sums: Sums, kind: Kind) -> Samples:
    """The metrics of one prediction in each resample; those that were not resampled are left out."""
    drawn = {m.name: m.samples(sums) for m in metrics.METRICS if m.samples is not None and kind in m.kinds}
    return {name: samples for name, samples in drawn.items() if samples is not None}


def figures_of(
    sums: Sums, kind: Kind, samples: Samples, resampling: Resampling, table: Table | None = None
) -> dict[str, Any]:
    """Metric -> figure, each that has an interval followed by NAME_interval.

    Args:
        sums: of one prediction.
        kind: what it is.
        samples: from `samples_of`.
        resampling: of the prompt groups.
        table: only the metrics of this table.
    """
    figures: dict[str, Any] = {}
    for metric in metrics.METRICS:
        if kind in metric.kinds and (table is None or table in metric.tables):
            figures[metric.name] = figure = metric.figure(sums)
            if metric.has_interval:
                drawn = None if figure is None else samples.get(metric.name)
                bounds = None if drawn is None or figure is None else metric.bounds(sums, resampling, figure, drawn)
                figures[f"{metric.name}_interval"] = bounds
    return figures


def row_figures(sums: Sums, table: Table, kind: Kind) -> dict[str, float | None]:
    """Metric -> figure of the metrics that a row of a table has, without intervals."""
    return {m.name: m.figure(sums) for m in metrics.METRICS if table in m.tables and kind in m.kinds}


def difference(
    a: float | None, b: float | None, samples_a: Floats | None, samples_b: Floats | None, resampling: Resampling
) -> dict[str, Any]:
    """A figure of one prediction less that of another, with the interval of the paired difference.

    Args:
        a, b: the figures.
        samples_a, samples_b: the same in each resample, float64 [resamples]; None where nothing was resampled.
        resampling: of the prompt groups.
    """
    if a is None or b is None:
        return {"difference": None, "interval": None}
    paired = None if samples_a is None or samples_b is None else resampling.interval(a - b, samples_a - samples_b)
    return {"difference": a - b, "interval": paired}
