"""What `report` says in the terminal: where the page is and, to somebody who reads along, what it says."""

import sys
from typing import TYPE_CHECKING

from critic_train.figures import size
from critic_train_cli.terminal import is_terminal

if TYPE_CHECKING:
    from rich.console import Console

    from critic_train.reporting.report import Report


def draw_report(console: "Console", written: "Report", *, in_full: bool) -> None:
    """Print the page's place; on a terminal, where `in_full`, also the verdict and the charts of each source."""
    if in_full and is_terminal(sys.stdout):
        from critic_train_cli.charts import draw_charts
        from critic_train_cli.tables import draw_words

        for source in written.sources:
            if len(written.sources) > 1:
                console.print(source.label, style="bold")
            draw_words(console, source.evaluation.get("words") or ["no evaluation on held-out rollouts yet"])
            draw_charts(console, source.evaluation.data, [record.data for record in source.evaluations])
            console.print()
    # Unwrapped, so that it can be copied.
    console.print(f"{written.path} ({size(written.size_bytes)})", soft_wrap=True)
