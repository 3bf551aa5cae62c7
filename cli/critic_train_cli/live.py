"""The live view: a few lines on a terminal that are redrawn in place, below lines that stay.

A thread of rich redraws them four times a second from the view's `RunState`; the job's own thread only updates it.
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
LABEL_WIDTH = 10
GAP = "   "
MAX_BAR_WIDTH = 50


class LiveView(PlainView):
    """Redraws the newest state; evaluations, notices and the run's start stay above it as plain lines.

    Args:
        output, stopping, before_first_step, is_alone: see View.
        console: where to draw; by default stderr.
    """

    def __init__(
        self,
        output: Output,
        *,
        stopping: str,
        before_first_step: str | None = None,
        is_alone: bool = True,
        console: "Console | None" = None,
    ) -> None:
        super().__init__(output, stopping=stopping, before_first_step=before_first_step, is_alone=is_alone)
        from rich.live import Live

        self.unicode = is_unicode(sys.stderr)
        self.console = console or console_on(sys.stderr, redraw=True)
        self._is_stopping = False
        self._live = Live(
            console=self.console,
            get_renderable=self.frame,
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
        # After an error the last frame stays; otherwise the summary takes its place.
        self._live.transient = error is None
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()

    def lines_of(self, event: Event) -> list[str]:
        """The lines to write for an event; steps, stages and checkpoints show in the frame instead."""
        return [] if isinstance(event, StepEnded | Progress | CheckpointSaved) else super().lines_of(event)

    def stopping(self) -> None:
        """Show the message of the first signal from the next frame on. Called in the signal handler."""
        self._is_stopping = True

    def leaving(self) -> None:
        """Show the cursor again, which rich has hidden."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), b"\x1b[?25h\n")

    def frame(self) -> "Text":
        """The current state as text."""
        from rich.text import Text

        frame = Text(no_wrap=True, overflow="crop")
        rows = [*self._run_rows(), *self._stage_row()]
        for label, chunks in rows:
            frame.append_text(self._row(label, chunks))
        if self._is_stopping:
            for line in textwrap.wrap(self.stopping_message, self.console.width - 1):
                frame.append(line + "\n", style="yellow")
        frame.rstrip()
        return frame

    def _run_rows(self) -> list[tuple[str, list[str]]]:
        state, run = self.state, self.state.run
        if run is None:
            return []
        metrics, timing = state.metrics, state.timing
        epoch, epochs, done, steps = state.epoch
        rows = [("step", [self._bar(state.step, run.total_steps)])]
        if epochs > 1:
            rows.append((f"epoch {epoch}/{epochs}", [self._bar(done, steps)]))
        curve = sparkline(state.losses.points, self._bar_width() // 2, unicode=self.unicode)
        loss = f"{short(metrics.get('value_loss')):<8} {curve}".rstrip()
        norm, lr = short(metrics.get("grad_norm")), short(metrics.get("lr"))
        rows.append(("loss", [loss, f"grad norm {norm}", f"lr {lr}"]))
        saturation = f"saturation {percent(metrics.get('saturation'))}"
        rows.append(("clip", [f"clipfrac {percent(metrics.get('clipfrac'))}", saturation]))
        rows.append(("held out", self._held_out()))
        rollout = f"{count(timing.get('rollout_tokens_per_second'))} rollout tokens/s"
        computed = f"{count(timing.get('computed_tokens_per_second'))} computed tokens/s"
        rows.append(("speed", [rollout, computed, f"memory {format_bytes(timing.get('memory_bytes'))}"]))
        times = [f"{duration(state.elapsed_seconds)} elapsed", f"{duration(state.left_seconds)} left"]
        if state.checkpoint:
            times.append(f"checkpoint at step {state.checkpoint.step}")
        rows.append(("time", times))
        return rows

    def _held_out(self) -> list[str]:
        newest, best = self.state.evaluation, self.state.best
        if newest is None:
            return ["not evaluated yet"]
        metrics = newest.metrics
        value = with_interval(metrics.get("explained_variance"), metrics.get("explained_variance_interval"))
        chunks = [f"explained variance {value}"]
        if number(metrics.get("explained_variance_within_group")) is not None:
            chunks.append(f"within prompts {with_interval(metrics['explained_variance_within_group'], None)}")
        if best is newest:
            chunks.append("the best so far")
        elif best is not None:
            best_value = with_interval(best.metrics.get("explained_variance"), None)
            chunks.append(f"best {best_value} at step {best.step}")
        return chunks

    def _stage_row(self) -> list[tuple[str, list[str]]]:
        stage = self.state.stage
        if stage is None:
            return [] if self.state.run else [("", ["starting"])]
        if stage.total <= 0:
            return [("", [progress_line(stage)])]
        width = self._bar_width() - len(stage.stage) - len(GAP) - len(stage.unit)
        return [("", [stage.stage, self._bar(stage.done, stage.total, stage.unit, width=max(4, width))])]

    def _bar_width(self) -> int:
        return max(4, min(MAX_BAR_WIDTH, self.console.width - LABEL_WIDTH - 24))

    def _bar(self, done: int, total: int, unit: str = "", *, width: int | None = None) -> str:
        """A progress bar with its numbers: `####....  412/1,200  34 %`."""
        share = min(1.0, done / total) if total > 0 else 0.0
        full, empty = ("━", "·") if self.unicode else ("#", ".")
        width = width or self._bar_width()
        filled = int(share * width)
        numbers = f"{done:,}/{total:,} {unit}".rstrip()
        return f"{full * filled}{empty * (width - filled)}  {numbers}  {100 * share:.0f} %"

    def _row(self, label: str, chunks: list[str]) -> "Text":
        """A labelled row; chunks that do not fit on the first line go to further ones below."""
        from rich.text import Text

        # The last column stays free: some terminals wrap a line that fills it, and the frame would move down.
        width = max(8, self.console.width - 1)
        indent = LABEL_WIDTH if width >= 4 * LABEL_WIDTH else 0
        if label and not indent:
            label, chunks = "", [f"{label}: {chunks[0]}", *chunks[1:]]
        lines: list[str] = []
        for chunk in chunks:
            for piece in textwrap.wrap(chunk, width - indent, break_on_hyphens=False):
                if lines and len(lines[-1]) + len(GAP) + len(piece) <= width - indent:
                    lines[-1] += GAP + piece
                else:
                    lines.append(piece)
        text = Text(f"{label:<{indent}}", style="cyan")
        for index, line in enumerate(lines):
            text.append((" " * indent if index else "") + line + "\n", style="default")
        return text
