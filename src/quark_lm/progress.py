"""What a person watches: a bar for explore, score and learn with what is left to do, and one line a round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from .shown import printable

if TYPE_CHECKING:
    from .trainer import QuarkTrainer

# The figures of a round's line: key in the metrics, heading, format. Where the terminal is too narrow the last give way
# first; metrics.jsonl has them all.
_ROUND_LINE = [
    ("reward", "reward", "{:.3f}"),
    ("eval_reward", "eval", "{:.3f}"),
    ("independent", "indep", "{}"),
    ("reference_perplexity", "ppl", "{:.1f}"),
    ("kl", "KL", "{:.2f}"),
    ("token_auc", "AUC", "{:.2f}"),
    ("share_above_best", "above best", "{:.0%}"),
    ("nll", "NLL", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
]


def make_console(stderr: bool = False, width: int = 120) -> Console:
    """A console as wide as the terminal; in a pipe or a log, where rich takes 80 columns, `width`."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=width)


class Display:
    """Bars and lines on a console; silent on ranks other than the first, and without bars when they are disabled.

    Attributes:
        independent_names: the scorers that only measure, whose means on held-out prompts a round's line shows too.
    """

    def __init__(self, enabled: bool = True, bars: bool = True, console: Console | None = None) -> None:
        self.console = console or make_console(stderr=True)
        self.enabled = enabled
        self.bars = enabled and bars and self.console.is_terminal
        self.tells = enabled and bars and not self.bars
        self.independent_names: Sequence[str] = ()

    @contextmanager
    def bar(self, verb: str, total: int, unit: str = "") -> Iterator[Any]:
        """A bar whose yielded function adds n done; it goes away when it is full. In a pipe or a log a line instead."""
        if self.tells:
            self.line(f"{verb}: {total:,} {unit}".rstrip())
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
            task = progress.add_task(escape(printable(verb)), total=total)  # it may name a scorer
            yield lambda n=1: progress.advance(task, n)

    def line(self, text: str) -> None:
        """One line of plain text; markup and control characters in it are shown, not obeyed."""
        if self.enabled:
            # soft_wrap: a line stays one in a pipe and in a log
            self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def round_line(self, round: int, num_rounds: int, metrics: dict[str, Any]) -> None:
        """A round's figures on one line, as many as the console is wide.

        eval: the reward's mean on held-out prompts; indep: the same by each scorer that training does not see.
        """
        values = [metrics.get(f"eval_{name}") for name in self.independent_names]
        independent = "/".join(f"{value:.3f}" for value in values if value is not None) or None
        told = metrics | {"independent": independent}
        parts = [f"{name} {form.format(told[key])}" for key, name, form in _ROUND_LINE if told.get(key) is not None]
        line = f"round {round + 1}/{num_rounds}"
        for part in parts:
            if len(line) + 2 + len(part) > self.console.width:
                break
            line += f"  {part}"
        self.line(line)

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


class LearnBar(TrainerCallback):
    """The bar of the learning steps of one round."""

    def __init__(self, trainer: QuarkTrainer) -> None:
        self.trainer = trainer
        trainer.display.independent_names = trainer.eval_rewards.names if trainer.eval_rewards else ()
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
