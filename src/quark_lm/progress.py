"""What a person watches: a bar for explore, score and learn with what is left to do, and one line a round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import QuarkTrainer

# The figures of a round's line: key in the metrics, heading, format.
_ROUND_LINE = [
    ("reward", "reward", "{:.3f}"),
    ("share_above_best", "above last best", "{:.0%}"),
    ("nll", "NLL", "{:.2f}"),
    ("kl", "KL", "{:.3f}"),
    ("reference_perplexity", "perplexity", "{:.1f}"),
    ("token_auc", "token AUC", "{:.2f}"),
    ("eval_reward", "held-out reward", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
]


class Display:
    """Bars and lines on a console; silent on ranks other than the first, and without bars when they are disabled."""

    def __init__(self, enabled: bool = True, bars: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.enabled = enabled
        self.bars = enabled and bars and self.console.is_terminal

    @contextmanager
    def bar(self, verb: str, total: int, unit: str = "") -> Iterator[Any]:
        """A bar whose yielded function adds n done; it goes away when it is full."""
        if not self.bars:
            yield lambda n=1: None
            return
        columns = [
            TextColumn("[bold]{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(verb, total=total)
            yield lambda n=1: progress.advance(task, n)

    def line(self, text: str) -> None:
        """One line of plain text; markup and control characters in it are shown, not obeyed."""
        if self.enabled:
            self.console.print(printable(text), markup=False, highlight=False)

    def round_line(self, round: int, num_rounds: int, metrics: dict[str, Any]) -> None:
        parts = [
            f"{name} {form.format(metrics[key])}" for key, name, form in _ROUND_LINE if metrics.get(key) is not None
        ]
        self.line(f"round {round + 1}/{num_rounds}  " + "  ".join(parts))

    def completions(self, title: str, rows: list[tuple[str, str, float | None]]) -> None:
        """A table of (prompt, completion, reward)."""
        if not self.enabled:
            return
        table = Table("prompt", "completion", "reward", title=title, show_lines=False, expand=True)
        for prompt, completion, reward in rows:
            table.add_row(
                escape(printable(prompt)), escape(printable(completion)), "none" if reward is None else f"{reward:.3f}"
            )
        self.console.print(table)


def printable(text: str) -> str:
    """The text without control characters (a completion may hold a terminal's escapes); newlines become signs."""
    return "".join(c if c.isprintable() else {"\n": "⏎", "\t": " "}.get(c, "�") for c in text)


class LearnBar(TrainerCallback):
    """The bar of the learning steps of one round."""

    def __init__(self, trainer: QuarkTrainer) -> None:
        self.trainer = trainer
        self._bar: Any = None
        self._advance: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is None and state.global_step < state.max_steps:
            round, done = divmod(state.global_step, args.steps_per_round)
            self._bar = self.trainer.display.bar(f"round {round + 1} learn", args.steps_per_round, "steps")
            self._advance = self._bar.__enter__()
            self._advance(done)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._advance is not None:
            self._advance(1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = self._advance = None
