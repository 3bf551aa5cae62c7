"""What critics are worth in rollouts, drawn: the variance of advantages against the number of rollouts a prompt."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from critic_train.evaluation.metrics import group_size
from critic_train.report.compared_critics import PageCritic, baseline_key
from critic_train.report.svg_charts import Chart, Key, colour, dash, svg
from critic_train.report.verdict_model import FUSED, Series, worth_series
from critic_train.text import three

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def worth_chart(critics: Sequence[PageCritic]) -> Chart | None:
    """The variance with GRPO's baseline, with each critic alone, and with each fused, by rollouts a prompt.

    GRPO's baseline is that of the rollouts that the first critic was judged on.
    """
    shown = [critic for critic in critics if len(worth_series(critic.metrics, FUSED).x) > 1]
    if not shown:
        return None
    group_mean = worth_series(shown[0].metrics, "group_mean")
    several = len(shown) > 1

    def draw(axes: "Axes") -> None:
        _line(axes, group_mean, "group-mean", dash("group-mean"), banded=True)
        for critic in shown:
            alone = critic.metrics.part("worth").part("critic").get("advantage_variance")
            if alone is not None:
                axes.axhline(alone, color=colour(critic.colour), linewidth=1.4, linestyle=dash("stored"))
            fused = worth_series(critic.metrics, FUSED)
            _line(axes, fused, critic.colour if several else "fused", "solid", banded=not several)
        axes.set_ylim(bottom=0)

    keys = [baseline_key("group_mean")]
    if several:
        keys += [Key(text=critic.name, colour=critic.colour) for critic in shown]
    else:
        keys.append(Key(text="this critic alone", colour=shown[0].colour, mark="stored"))
        keys.append(Key(text="fused with that mean", colour="fused"))
    note = "Lower is better. With fewer rollouts: every subset of a prompt's, on average."
    return Chart(
        title="Worth in rollouts: variance of advantages",
        svg=svg(
            draw,
            name="worth",
            described="Variance of advantages by rollouts a prompt",
            x_label="rollouts a prompt",
            integer_ticks=True,
        ),
        note=f"{note} Dashed: each critic alone; with points: fused with the group's mean." if several else note,
        keys=keys,
        table=_table(shown, group_mean),
    )


def _line(axes: "Axes", series: Series, style: str, line: Any, *, banded: bool) -> None:
    if banded and all(series.intervals):
        low, high = zip(*(bounds for bounds in series.intervals if bounds), strict=True)
        axes.fill_between(series.x, low, high, color=colour(style), alpha=0.12, linewidth=0)
    axes.plot(series.x, series.y, color=colour(style), linestyle=line, linewidth=1.8, marker="o", markersize=4)


def _table(critics: Sequence[PageCritic], group_mean: Series) -> list[list[Any]]:
    """A row for each number of rollouts a prompt."""
    names = [f"{critic.name}, " if len(critics) > 1 else "" for critic in critics]
    heading = ["rollouts a prompt", "prompt group's mean", "95 % interval"]
    for name in names:
        heading += [f"{name}fused", "95 % interval", "equals a group of"]
    rows: list[list[Any]] = [heading]
    for index, (k, part) in enumerate(zip(group_mean.x, group_mean.rows, strict=True)):
        row = [f"{k:g}", part.cell("advantage_variance", three), part.bounds("advantage_variance_interval")]
        for critic in critics:
            own = worth_series(critic.metrics, FUSED)
            if index >= len(own.rows) or own.x[index] != k:
                row += ["", "", ""]
                continue
            fused = own.rows[index]
            row += [
                fused.cell("advantage_variance", three),
                fused.bounds("advantage_variance_interval"),
                fused.cell("equals_group_of", group_size),
            ]
        rows.append(row)
    alone: list[Any] = ["a critic alone", "", ""]
    for critic in critics:
        own_part = critic.metrics.part("worth").part("critic")
        alone += [
            own_part.cell("advantage_variance", three),
            own_part.bounds("advantage_variance_interval"),
            critic.metrics.cell("worth_in_rollouts", group_size),
        ]
    return [*rows, alone]
