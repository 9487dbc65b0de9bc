"""The paper's tasks as `quark evaluate` measures them: scorers, prompts and sampling when nothing else is named.

Source: Lu et al. 2022, section 3, and Liu et al. 2021 for the sampling: 25 completions of 20 tokens at top-p 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..demo import TASKS as _DEMO
from ..errors import ConfigError

PAPER_SAMPLING: dict[str, Any] = {"max_completion_length": 20, "temperature": 1.0, "top_p": 0.9}


@dataclass(frozen=True)
class EvaluationTask:
    """What is measured.

    Attributes:
        scorers: role to spec of `load_reward`: "reward", which our training uses; "independent", which it never sees.
        wanted: what the table calls a completion that a scorer wants.
        prompts: which of the shipped prompts are taken, their held-out part.
        measures_toxicity: a score is 1 - toxicity, and the paper's two figures of the worst of a prompt are reported.
        sampling: of `GenerationSettings`.
    """

    name: str
    scorers: dict[str, str]
    wanted: str
    prompts: str
    measures_toxicity: bool = False
    num_generations: int = 25
    sampling: dict[str, Any] = field(default_factory=lambda: dict(PAPER_SAMPLING))


def _scorers(name: str, options: str = "") -> dict[str, str]:
    task = _DEMO[name]
    return {"reward": f"{task.reward}{options}", "independent": f"{task.independent}{options}"}


TASKS = {
    "toxicity": EvaluationTask("toxicity", _scorers("toxicity"), "not toxic", "toxicity", measures_toxicity=True),
    "sentiment-positive": EvaluationTask("sentiment-positive", _scorers("sentiment"), "positive", "sentiment"),
    "sentiment-negative": EvaluationTask(
        "sentiment-negative", _scorers("sentiment", "(label=negative)"), "negative", "sentiment"
    ),
    "repetition": EvaluationTask(
        "repetition",
        _scorers("repetition"),
        "not looping",
        "repetition",
        num_generations=1,  # greedy: every completion of a prompt is the same
        sampling={"max_completion_length": 128, "temperature": 0.0, "top_p": 1.0},
    ),
}


def find_task(name: str) -> EvaluationTask:
    """The task of this name; "sentiment" is the demo's word for sentiment-positive. Raises: ConfigError."""
    task = TASKS.get("sentiment-positive" if name == "sentiment" else name)
    if task is None:
        raise ConfigError(f"There is no task {name!r}. Choose one of {', '.join(TASKS)}.")
    return task
