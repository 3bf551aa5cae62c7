"""What `check` found, on one screen."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from critic_train.text import count, number, short, with_interval
from critic_train_cli.table_columns import new_table
from critic_train_cli.terminal import sparkline

if TYPE_CHECKING:
    from rich.console import Console

HISTOGRAM_WIDE = 20
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


def draw_check(console: "Console", found: dict[str, Any], shown: int) -> None:
    """Print what was found.

    Args:
        console: where.
        found: see `doctor.check`.
        shown: bad rows shown one by one.
    """
    console.print(headline(found), style="bold")
    console.print()
    for line in (schema_line(found), size_line(found)):
        console.print(line)
    console.print()
    console.print(distributions(console, found))
    console.print()
    for sentence in sentences(found):
        console.print(f"- {sentence}")
    for line in bad_lines(found, shown):
        console.print(line)
    console.print("\nSuggested", style="bold")
    for item in found["advice"]:
        if item["why"]:
            console.print(f"  {' '.join(item['flags'])}: {item['why']}")
    # Unwrapped, so that it can be copied.
    console.print(f"  {found['command']}", soft_wrap=True)


def headline(found: dict[str, Any]) -> str:
    """Whether the data set can be trained on as it is."""
    if found["sound"]:
        return "Sound: every row can be used."
    faults = []
    if found["bad_files"]["count"]:
        faults.append(f"{found['bad_files']['count']:,} files cannot be used")
    if found["bad_rows"]["count"]:
        faults.append(f"{found['bad_rows']['count']:,} rows cannot be used")
    if found["leak"] and found["leak"]["prompts"]:
        faults.append(f"{found['leak']['prompts']:,} prompts stand in --against as well")
    return f"Not sound: {', '.join(faults)}."


def schema_line(found: dict[str, Any]) -> str:
    """Which column is read as what."""
    pairs = [name if name == column else f"{name} (from {column})" for name, column in found["schema"].items()]
    return "columns: " + ", ".join(pairs)


def size_line(found: dict[str, Any]) -> str:
    """How much there is."""
    parts = [
        f"{found['files']:,} files",
        f"{found['rollouts']:,} rollouts",
        f"{found['prompt_groups']:,} prompt groups",
        f"{count(found['tokens'])} tokens",
        f"{count(found['response_tokens'])} of them response tokens",
    ]
    return ", ".join(parts)


def distributions(console: "Console", found: dict[str, Any]) -> Any:
    """A row a quantity: extremes, quantiles, mean and shape."""
    with_shape = console.width >= SHAPE_NEEDS
    headings = ["min", "5 %", "median", "95 %", "max", "mean"]
    table = new_table("", headings)
    if with_shape:
        table.add_column("shape", no_wrap=True)
    for key, name in DISTRIBUTIONS.items():
        told = found[key]
        if told and told.get("min") is not None:
            cells = [short(told.get(part)) for part in ("min", "p5", "p50", "p95", "max", "mean")]
            counts = (told.get("histogram") or {}).get("counts") or []
            shape = sparkline(counts, HISTOGRAM_WIDE, unicode=console.encoding.startswith("utf"))
            table.add_row(name, *cells, *([shape] if with_shape else []))
    return table


def sentences(found: dict[str, Any]) -> Iterator[str]:
    """What decides how to train, in words."""
    yield returns_sentence(found)
    stored, mean = found["stored_values"], found["group_mean"]
    if stored and number(stored["explained_variance"]) is not None:
        figure = with_interval(stored["explained_variance"], stored["explained_variance_interval"])
        other = with_interval(mean["explained_variance"], mean["explained_variance_interval"])
        yield f"the stored values explain {figure} of the returns' variance; the prompt group's mean {other}"
    if found["sharing"]:
        whose = "" if found["sample"]["is_everything"] else f" (seen on {found['sample']['rollouts']:,} rollouts)"
        yield f"sharing prefixes saves {found['sharing']['saved_share']:.0%} of the tokens{whose}"
    if found["mask_share"] is not None and found["mask_share"] < 1:
        yield f"the mask takes {found['mask_share']:.1%} of the tokens from the first response token on"
    if found["truncated"]:
        yield f"{found['truncated']:,} rollouts are marked truncated"
    if found["duplicates"]:
        yield f"{found['duplicates']:,} rollouts have the very tokens of another"
    leaked = found["leak"]
    if leaked is not None:
        yield (
            f"{leaked['prompts']:,} of {leaked['of_prompts']:,} prompts stand in --against as well "
            f"({leaked['rollouts']:,} rollouts)"
        )


def returns_sentence(found: dict[str, Any]) -> str:
    """Which returns these are."""
    match = found["returns_match"]
    if not found["returns"]:
        return "there are no returns" + ("; they can be made from the rewards" if found["rewards"] else ", nor rewards")
    if match is None:
        return "there are no rewards, so nobody can say how the returns were made"
    pair = f"gamma {match['gamma']:g} and lambda {match['lam']:g}"
    if not match["found"]:
        closest = f"closest {pair}, off by {match['error']:.0%}"
        return f"no match: the returns follow from the rewards by no gamma and lambda ({closest})"
    kind = ", Monte-Carlo" if match["lam"] == 1 else ""
    cut = ", with a bootstrap behind truncated rollouts" if match["bootstrapped"] else ""
    return f"the returns match {pair}{kind}{cut}"


def bad_lines(found: dict[str, Any], shown: int) -> Iterator[str]:
    """The files and rows that cannot be used."""
    for file in found["bad_files"]["files"]:
        yield f"\n{file['file']}: {file['fault']}"
    rows = found["bad_rows"]
    if rows["count"]:
        kinds = "; ".join(f"{number:,} with {reason}" for reason, number in rows["reasons"].items())
        yield f"\n{rows['count']:,} rows cannot be used: {kinds}"
        yield from (f"  {row}" for row in rows["first"][:shown])
        if rows["count"] > shown:
            yield f"  ... and {rows['count'] - shown:,} more (--json lists them, --show N shows N)"
