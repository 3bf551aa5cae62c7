"""The live view: a few lines on a terminal, drawn over in place while lines worth keeping scroll above them.

A thread of rich's redraws four times a second from what the course has stored; the job's own thread stores
and returns.
"""

import contextlib
import os
import sys
import textwrap
from types import TracebackType
from typing import TYPE_CHECKING, Self

from critic_train.events import CheckpointSaved, Event, Progress, StepEnded
from critic_train.text import count, duration, format_bytes, number, percent, short, with_interval
from critic_train_cli.output import Output
from critic_train_cli.plain_view import PlainView, progress_line
from critic_train_cli.terminal import console_on, is_unicode, sparkline

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

REDRAWS_A_SECOND = 4
LABEL_WIDE = 10
GAP = "   "
BAR_WIDEST = 50


class LiveView(PlainView):
    """Draws the newest state; evaluations, notices and the run's start stay above it as plain lines."""

    def __init__(self, output: Output, *, stopping: str, console: "Console | None" = None) -> None:
        super().__init__(output, stopping=stopping)
        from rich.live import Live

        self.unicode = is_unicode(sys.stderr)
        self.console = console or console_on(sys.stderr, redraw=True)
        self._asked_to_stop = False
        self._live = Live(
            console=self.console,
            get_renderable=self.picture,
            refresh_per_second=REDRAWS_A_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the last state is worth reading; after an end the summary replaces it.
        self._live.transient = error is None
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()

    def lines_of(self, event: Event) -> list[str]:
        """Steps, stages and checkpoints show in the picture, and need no line of their own."""
        return [] if isinstance(event, StepEnded | Progress | CheckpointSaved) else super().lines_of(event)

    def stopping(self) -> None:
        """Runs in the signal handler: only leaves word for the next picture."""
        self._asked_to_stop = True

    def leaving(self) -> None:
        """Rich hid the cursor; nobody else will show it again."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), b"\x1b[?25h\n")

    def picture(self) -> "Text":
        """The state as it is now."""
        from rich.text import Text

        picture = Text(no_wrap=True, overflow="crop")
        rows = [*self._run_rows(), *self._stage_row()]
        for label, chunks in rows:
            picture.append_text(self._row(label, chunks))
        if self._asked_to_stop:
            for line in textwrap.wrap(self.stopping_words, self.console.width - 1):
                picture.append(line + "\n", style="yellow")
        picture.rstrip()
        return picture

    def _run_rows(self) -> list[tuple[str, list[str]]]:
        course, run = self.course, self.course.run
        if run is None:
            return []
        metrics, timing = course.metrics, course.timing
        epoch, epochs, done, steps = course.epoch
        rows = [("step", [self._bar(course.step, run.total_steps)])]
        if epochs > 1:
            rows.append((f"epoch {epoch}/{epochs}", [self._bar(done, steps)]))
        curve = sparkline(course.losses.points, self._bar_wide() // 2, unicode=self.unicode)
        loss = f"{short(metrics.get('value_loss')):<8} {curve}".rstrip()
        norm, lr = short(metrics.get("grad_norm")), short(metrics.get("lr"))
        rows.append(("loss", [loss, f"grad norm {norm}", f"lr {lr}"]))
        saturation = f"saturation {percent(metrics.get('saturation'))}"
        rows.append(("clip", [f"clipfrac {percent(metrics.get('clipfrac'))}", saturation]))
        rows.append(("held out", self._held_out()))
        rollout = f"{count(timing.get('rollout_tokens_per_second'))} rollout tokens/s"
        computed = f"{count(timing.get('computed_tokens_per_second'))} computed tokens/s"
        rows.append(("speed", [rollout, computed, f"memory {format_bytes(timing.get('memory_bytes'))}"]))
        times = [f"{duration(course.elapsed_seconds)} elapsed", f"{duration(course.left_seconds)} left"]
        if course.checkpoint:
            times.append(f"checkpoint at step {course.checkpoint.step}")
        rows.append(("time", times))
        return rows

    def _held_out(self) -> list[str]:
        newest, best = self.course.evaluation, self.course.best
        if newest is None:
            return ["not evaluated yet"]
        metrics = newest.metrics
        figure = with_interval(metrics.get("explained_variance"), metrics.get("explained_variance_interval"))
        chunks = [f"explained variance {figure}"]
        if number(metrics.get("explained_variance_within_group")) is not None:
            chunks.append(f"within prompts {with_interval(metrics['explained_variance_within_group'], None)}")
        if best is newest:
            chunks.append("the best so far")
        elif best is not None:
            best_figure = with_interval(best.metrics.get("explained_variance"), None)
            chunks.append(f"best {best_figure} at step {best.step}")
        return chunks

    def _stage_row(self) -> list[tuple[str, list[str]]]:
        stage = self.course.stage
        if stage is None:
            return [] if self.course.run else [("", ["starting"])]
        if stage.total <= 0:
            return [("", [progress_line(stage)])]
        wide = self._bar_wide() - len(stage.stage) - len(GAP) - len(stage.unit)
        return [("", [stage.stage, self._bar(stage.done, stage.total, stage.unit, wide=max(4, wide))])]

    def _bar_wide(self) -> int:
        return max(4, min(BAR_WIDEST, self.console.width - LABEL_WIDE - 24))

    def _bar(self, done: int, total: int, unit: str = "", *, wide: int | None = None) -> str:
        """A bar and its figures: `####....  412/1,200  34 %`."""
        part = min(1.0, done / total) if total > 0 else 0.0
        full, empty = ("━", "·") if self.unicode else ("#", ".")
        wide = wide or self._bar_wide()
        filled = int(part * wide)
        figures = f"{done:,}/{total:,} {unit}".rstrip()
        return f"{full * filled}{empty * (wide - filled)}  {figures}  {100 * part:.0f} %"

    def _row(self, label: str, chunks: list[str]) -> "Text":
        """A labelled row; chunks that do not fit go to further lines under the first."""
        from rich.text import Text

        # The last column stays free: some terminals wrap a line that fills it, and the picture would creep.
        wide = max(8, self.console.width - 1)
        indent = LABEL_WIDE if wide >= 4 * LABEL_WIDE else 0
        if label and not indent:
            label, chunks = "", [f"{label}: {chunks[0]}", *chunks[1:]]
        lines: list[str] = []
        for chunk in chunks:
            for piece in textwrap.wrap(chunk, wide - indent, break_on_hyphens=False):
                if lines and len(lines[-1]) + len(GAP) + len(piece) <= wide - indent:
                    lines[-1] += GAP + piece
                else:
                    lines.append(piece)
        text = Text(f"{label:<{indent}}", style="cyan")
        for index, line in enumerate(lines):
            text.append((" " * indent if index else "") + line + "\n", style="default")
        return text
