"""The top of the page: one answer to each critic, its tiles of figures, and the table that compares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from critic_train.report.compared_critics import Subject, baselines_of
from critic_train.report.report_sources import Cell, Record
from critic_train.text import count, fixed, interval, percent, short, signed, three


@dataclass(frozen=True, slots=True)
class Answer:
    """May PPO start with this critic? `mark` is "yes", "partly", "no" or "unknown"; the words say it."""

    mark: str
    words: str


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure that deserves to be large."""

    name: str
    figure: Cell
    interval: Cell
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is said of one critic.

    Attributes:
        subject: the critic.
        answer: in a line.
        progress: where its run stands, empty for an evaluation.
        tiles: its figures.
        counts: what it was judged on.
    """

    subject: Subject
    answer: Answer
    progress: str
    tiles: Sequence[Tile]
    counts: Sequence[tuple[str, Cell]] = field(default_factory=list)


def card(subject: Subject) -> Card:
    """Everything the top of the page says of a critic."""
    return Card(
        subject=subject,
        answer=answer(subject.metrics),
        progress=progress(subject),
        tiles=tiles(subject.metrics),
        counts=counts(subject.verdict),
    )


def answer(metrics: Record) -> Answer:
    """By the intervals, never by the figures alone."""
    if not metrics:
        return Answer("unknown", "Not judged yet: there is no evaluation on held-out rollouts.")
    against_constant = _sign(metrics.get("explained_variance_interval"))
    against_group = _sign(metrics.part("explained_variance_minus").part("group_mean").get("interval"))
    if metrics.get("explained_variance") is None:
        return Answer("unknown", "Cannot tell: the returns do not vary.")
    if against_constant is None:
        return Answer("unknown", "Cannot tell: one prompt group is too few for an interval.")
    if against_constant < 0:
        return Answer("no", "No: PPO would do better with a constant in its place.")
    if against_constant == 0:
        return Answer("no", "Not yet: it is not shown to be better than a constant.")
    if against_group is None:
        return Answer("yes", "Yes: it is better than a constant.")
    if against_group > 0:
        return Answer("yes", "Yes: it lowers the variance of advantages by more than GRPO's baseline would.")
    if against_group < 0:
        return Answer("partly", "Better than a constant, but GRPO's baseline would do more.")
    return Answer("partly", "Better than a constant; not shown to be better than GRPO's baseline.")


def progress(subject: Subject) -> str:
    """Where a run stands."""
    source = subject.source
    if not source.is_run:
        return ""
    total = source.result.get("total_steps") or source.started.part("resolved").get("steps")
    last = source.steps[-1].get("step") if source.steps else 0
    judged = subject.verdict.get("step") if subject.verdict else subject.metrics.get("step")
    words = f"step {last} of {total}" if total else f"step {last}"
    return words + (f"; judged as of step {judged}" if judged is not None else "")


def tiles(metrics: Record) -> list[Tile]:
    """The figures that exist, the most telling first."""
    nothing = Cell("")
    minus = metrics.part("explained_variance_minus")
    monte_carlo = metrics.part("monte_carlo")
    candidates = [
        ("explained variance", metrics, "explained_variance", "0 a constant, 1 perfect"),
        ("within prompts", metrics, "explained_variance_within_group", "what it knows beyond the prompt"),
        ("AUC within prompts", metrics, "auc_within_group", "right above wrong, 0.5 a coin"),
        ("AUC", metrics, "auc", "over all rollouts"),
        ("variance reduction", metrics, "variance_reduction", "of advantages, against GRPO's baseline"),
        ("calibration error", metrics, "expected_calibration_error", "mean distance of value and return"),
        ("against Monte-Carlo returns", monte_carlo, "explained_variance", "no critic's values in the target"),
    ]
    found = [
        Tile(name, record.cell(key), record.bounds(f"{key}_interval"), about)
        for name, record, key, about in candidates
        if record.get(key) is not None and (record is not monte_carlo or _differs(record, metrics, key))
    ]
    for other, about in (("group_mean", "over GRPO's baseline"), ("stored", "over the stored values")):
        part = minus.part(other)
        if part.get("difference") is not None:
            cell = part.cell("difference", lambda value: f"{value:+.3f}")
            found.insert(min(2, len(found)), Tile(about, cell, part.bounds("interval"), "difference, paired by prompt"))
    for name, key, how in (("mean squared error", "mse", three), ("bias", "bias", signed)):
        if metrics.get(key) is not None:
            found.append(Tile(name, metrics.cell(key, how), nothing, "values less returns" if key == "bias" else ""))
    return found


def counts(verdict: Record) -> list[tuple[str, Cell]]:
    """What was judged on."""
    found = [
        (name, verdict.cell(key, lambda value: f"{value:,}"))
        for key, name in (
            ("rollouts", "rollouts"),
            ("prompt_groups", "prompt groups"),
            ("response_tokens", "response tokens"),
        )
        if verdict.get(key) is not None
    ]
    returns = verdict.part("returns")
    names = {"mean": "mean return", "std": "its deviation", "min": "least", "max": "greatest"}
    found += [(name, returns.cell(key, short)) for key, name in names.items() if returns.get(key) is not None]
    return found


FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("explained variance", "explained_variance", fixed),
    ("95 % interval", "explained_variance_interval", interval),
    ("within prompts", "explained_variance_within_group", fixed),
    ("95 % interval", "explained_variance_within_group_interval", interval),
    ("AUC", "auc", fixed),
    ("AUC within prompts", "auc_within_group", fixed),
    ("Pearson", "pearson", fixed),
    ("Spearman", "spearman", fixed),
    ("MSE", "mse", three),
    ("MAE", "mae", three),
    ("bias", "bias", signed),
    ("calibration error", "expected_calibration_error", three),
    ("advantage variance", "advantage_variance", three),
    ("value loss", "value_loss", three),
    ("clipfrac", "clipfrac", percent),
    ("saturation", "saturation", percent),
)


def comparison(subjects: Sequence[Subject]) -> list[list[Any]]:
    """One column a critic and a baseline; headings first. Figures that nobody has are left out."""
    columns = [(subject.name, subject.metrics) for subject in subjects if subject.metrics]
    if not columns:
        return []
    columns += [(name, metrics) for name, _, metrics in baselines_of(subjects)]
    rows: list[list[Any]] = [["", *(name for name, _ in columns)]]
    for name, key, how in FIGURES:
        if any(metrics.get(key) is not None for _, metrics in columns):
            rows.append([name, *(metrics.cell(key, how) for _, metrics in columns)])
    return rows


def differences(subjects: Sequence[Subject]) -> list[list[Any]]:
    """By how much the critics of one evaluation differ from each other, paired by prompt group."""
    found: list[list[Any]] = []
    for verdict in {id(s.verdict.data): s.verdict for s in subjects}.values():
        for pair, part in verdict.part("differences").parts().items():
            for figure, record in {"explained_variance": part, **part.parts()}.items():
                if record.get("difference") is not None:
                    cell = record.cell("difference", lambda value: f"{value:+.3f}")
                    found.append([pair, figure.replace("_", " "), cell, record.bounds("interval")])
    return [["", "figure", "difference", "95 % interval"], *found] if found else []


def groups(subject: Subject) -> list[tuple[str, list[list[Any]]]]:
    """The prompt groups it does best and worst on, as titled tables."""
    found = []
    for key, title in (("worst", "Furthest off"), ("best", "Closest")):
        rows = subject.metrics.part("groups").rows(key)
        if rows:
            table: list[list[Any]] = [["prompt group", "rollouts", "tokens", "MSE", "mean value", "mean return"]]
            table += [
                [
                    str(row.get("uid")),
                    row.cell("rollouts", count),
                    row.cell("tokens", count),
                    row.cell("mse", three),
                    row.cell("mean_value"),
                    row.cell("mean_return"),
                ]
                for row in rows
            ]
            found.append((title, table))
    return found


def _differs(one: Record, other: Record, key: str) -> bool:
    """Whether two figures differ by more than rounding."""
    a, b = one.get(key), other.get(key)
    return b is None or abs(a - b) > 1e-9


def _sign(bounds: Any) -> int | None:
    """1 where the whole interval is above 0, -1 where it is below, 0 across it; None where there is none."""
    if not bounds:
        return None
    return int(bounds[0] > 0) - int(bounds[1] < 0)
