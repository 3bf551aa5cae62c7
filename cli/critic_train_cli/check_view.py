"""The result of `check`, on one screen."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from critic_train.text import count, number, short, with_interval
from critic_train_cli.terminal import sparkline
from critic_train_cli.verdict_tables import fits, new_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HISTOGRAMS_WIDE = (20, 14, 8, 0)
"""Columns of a histogram, the first that there is room for."""
SHAPE_NEEDS = 70
"""Columns below which the histograms are left out."""
DISTRIBUTIONS = {
    "prompt_length": "prompt length",
    "response_length": "response length",
    "group_size": "rollouts a prompt",
    "returns": "returns",
    "values": "stored values",
    "rewards": "reward of a rollout",
}


def draw_check(console: "Console", result: dict[str, Any], shown: int) -> None:
    """Print the result of `check`.

    Args:
        console: where to print.
        result: of `check`, see there.
        shown: bad rows shown one by one.
    """
    console.print(headline(result), style="bold")
    console.print()
    for line in (schema_line(result), size_line(result)):
        console.print(line)
    console.print()
    draw_distributions(console, result)
    console.print()
    for sentence in sentences(result):
        console.print(f"- {sentence}")
    for line in bad_lines(result, shown):
        console.print(line)
    for line, is_policy in example_lines(result["example"]):
        console.print(line, style="bold" if is_policy else "dim", markup=False, highlight=False)
    console.print("\nSuggested", style="bold")
    for item in result["advice"]:
        if item["why"]:
            console.print(f"  {' '.join(item['flags'])}: {item['why']}")
    # Unwrapped, so that it can be copied.
    console.print(f"  {result['command']}", soft_wrap=True)


def example_lines(parts: list[dict[str, Any]]) -> Iterator[tuple[str, bool]]:
    """One rollout, part by part: a line, and whether the policy wrote it."""
    if parts:
        yield "\nThe first rollout, what the policy wrote between >> and <<:", True
    for part in parts:
        content = part["text"] if "text" in part else " ".join(map(str, part["ids"]))
        yield f">>{content}<<" if part["policy"] else content, part["policy"]


def headline(result: dict[str, Any]) -> str:
    """Whether the data set can be trained on as it is."""
    if result["sound"]:
        return "Sound: every row can be used."
    problems = []
    if result["bad_files"]["count"]:
        problems.append(f"{result['bad_files']['count']:,} files cannot be used")
    if result["bad_rows"]["count"]:
        problems.append(f"{result['bad_rows']['count']:,} rows cannot be used")
    if result["leak"] and result["leak"]["prompts"]:
        problems.append(f"{result['leak']['prompts']:,} prompts are in --against as well")
    return f"Not sound: {', '.join(problems)}."


def schema_line(result: dict[str, Any]) -> str:
    """Which column is read as what."""
    pairs = [name if name == column else f"{name} (from {column})" for name, column in result["schema"].items()]
    return "columns: " + ", ".join(pairs)


def size_line(result: dict[str, Any]) -> str:
    """How much there is."""
    parts = [
        f"{result['files']:,} files",
        f"{result['rollouts']:,} rollouts",
        f"{result['prompt_groups']:,} prompt groups",
        f"{count(result['tokens'])} tokens",
        f"{count(result['response_tokens'])} of them response tokens",
    ]
    return ", ".join(parts)


PARTS = {"min": "min", "p5": "5 %", "p50": "median", "p95": "95 %", "max": "max", "mean": "mean"}
"""Part of a summary -> its heading."""


def draw_distributions(console: "Console", result: dict[str, Any]) -> None:
    """Print the quantities: as a table, or, where its figures would be broken, a few lines each."""
    shown = {name: result[key] for key, name in DISTRIBUTIONS.items() if (result[key] or {}).get("min") is not None}
    in_two_lines = {"\n".join(name.rsplit(" ", 1)): summary for name, summary in shown.items()}
    shapes = HISTOGRAMS_WIDE if console.width >= SHAPE_NEEDS else (0,)
    candidates = [distributions(console, rows, shape) for shape in shapes for rows in (shown, in_two_lines)]
    table = next((table for table in candidates if fits(console, table)), None)
    if table is not None:
        console.print(table)
        return
    for name, summary in shown.items():
        console.print(name, style="bold")
        line = ""
        for part, heading in PARTS.items():
            figure = f"{heading} {short(summary.get(part))}"
            if line and len(line) + len(figure) + 5 > console.width:
                console.print(f"  {line},", soft_wrap=True)
                line = ""
            line += f", {figure}" if line else figure
        console.print(f"  {line}", soft_wrap=True)


def distributions(console: "Console", shown: dict[str, dict[str, Any]], shape: int) -> "Table":
    """A row a quantity: extremes, quantiles, mean, and its shape in so many columns, if any."""
    table = new_table("", list(PARTS.values()))
    if shape:
        table.add_column("shape", no_wrap=True)
    for name, summary in shown.items():
        cells = [short(summary.get(part)) for part in PARTS]
        counts = (summary.get("histogram") or {}).get("counts") or []
        table.add_row(
            name, *cells, *([sparkline(counts, shape, unicode=console.encoding.startswith("utf"))] if shape else [])
        )
    return table


def sentences(result: dict[str, Any]) -> Iterator[str]:
    """Sentences on what decides how to train."""
    yield returns_sentence(result)
    stored, mean = result["stored_values"], result["group_mean"]
    if stored and number(stored["explained_variance"]) is not None:
        figure = with_interval(stored["explained_variance"], stored["explained_variance_interval"])
        other = with_interval(mean["explained_variance"], mean["explained_variance_interval"])
        alone = "no prompt has a second rollout, so that there is no group's mean"
        beside = alone if number(mean["explained_variance"]) is None else f"the prompt group's mean {other}"
        yield f"the stored values explain {figure} of the returns' variance; {beside}"
    if result["sharing"]:
        whose = "" if result["sample"]["is_everything"] else f" (seen on {result['sample']['rollouts']:,} rollouts)"
        yield f"sharing prefixes saves {result['sharing']['saved_share']:.0%} of the tokens{whose}"
    if result["mask_share"] is not None and result["mask_share"] < 1:
        yield f"the mask takes {result['mask_share']:.1%} of the tokens from the first response token on"
    if result["truncated"]:
        yield f"{result['truncated']:,} rollouts are marked truncated"
    if result["duplicates"]:
        yield f"{result['duplicates']:,} rollouts have exactly the tokens of another"
    leaked = result["leak"]
    if leaked is not None:
        yield (
            f"{leaked['prompts']:,} of {leaked['of_prompts']:,} prompts are in --against as well "
            f"({leaked['rollouts']:,} rollouts)"
        )


def returns_sentence(result: dict[str, Any]) -> str:
    """How the returns were computed."""
    match = result["returns_match"]
    if not result["returns"]:
        return "there are no returns" + (
            "; they can be made from the rewards" if result["rewards"] else ", nor rewards"
        )
    if match is None:
        return "there are no rewards, so it is unknown how the returns were made"
    pair = f"gamma {match['gamma']:g} and lambda {match['lam']:g}"
    if not match["found"]:
        closest = f"closest {pair}, off by {match['error']:.0%}"
        return f"no match: the returns follow from the rewards by no gamma and lambda ({closest})"
    kind = ", Monte-Carlo" if match["lam"] == 1 else ""
    cut = ", with a bootstrap behind truncated rollouts" if match["bootstrapped"] else ""
    return f"the returns match {pair}{kind}{cut}"


def bad_lines(result: dict[str, Any], shown: int) -> Iterator[str]:
    """The files and rows that cannot be used."""
    for file in result["bad_files"]["files"]:
        yield f"\n{file['file']}: {file['fault']}"
    rows = result["bad_rows"]
    if rows["count"]:
        kinds = "; ".join(f"{number:,} with {reason}" for reason, number in rows["reasons"].items())
        yield f"\n{rows['count']:,} rows cannot be used: {kinds}"
        yield from (f"  {row}" for row in rows["first"][:shown])
        if rows["count"] > shown:
            yield f"  ... and {rows['count'] - shown:,} more (--json lists them, --show N shows N)"
