"""From a scorer of texts to a reward function with TRL's signature: the completion alone is scored, and one without a
word earns None.

The scorers themselves are minilm.py, ngrams.py and VADER's package; sentiment.py and toxicity.py put the two together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from quark_lm.errors import RewardError

Completion = str | list[dict[str, Any]]


class TextReward:
    """A reward function that scores completions, from 0 (worst) to 1 (best).

    >>> reward = TextReward("length_reward", "characters", "1", lambda texts: [min(len(t) / 100, 1.0) for t in texts])
    >>> reward(prompts=["Once"], completions=[" upon a time"])
    [0.12]

    Attributes:
        __name__: the reward function's name, in logs and tables.
        scorer_name, scorer_version: what scored, for a run's records; the version changes with every change of a score.
        threshold: a completion is wanted when its reward is above it; a threshold means another share for each scorer.
        scorer: what scores, if that is an object.
    """

    def __init__(
        self,
        name: str,
        scorer_name: str,
        scorer_version: str,
        score: Callable[[Sequence[str]], list[float | None]],
        threshold: float = 0.5,
        scorer: Any = None,
    ) -> None:
        self.__name__ = name
        self.scorer_name = scorer_name
        self.scorer_version = scorer_version
        self.threshold = threshold
        self.scorer = scorer
        self._score = score

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """One reward a completion; prompts and all other columns are left unread."""
        return self.score_texts([completion_text(completion) for completion in completions])

    def score_texts(self, texts: Sequence[str]) -> list[float | None]:
        """The reward of each text, as if it were a completion."""
        return self._score(texts)

    def wanted(self, values: Sequence[float | None]) -> list[bool]:
        """Whether each reward is that of a completion one wants; None is not."""
        return [value is not None and value > self.threshold for value in values]

    def __repr__(self) -> str:
        return f"<reward {self.__name__}: {self.scorer_name} {self.scorer_version}>"


_WORD = re.compile(r"\w")


def has_word(text: str) -> bool:
    """Whether there is a letter or a digit in it: what has none earns no reward."""
    return _WORD.search(text) is not None


def completion_text(completion: Completion) -> str:
    """The text of a completion: itself, or what its messages say, one a line."""
    if isinstance(completion, str):
        return completion
    try:
        return "\n".join(message["content"] for message in completion)
    except (KeyError, TypeError) as error:
        raise RewardError(
            f"A completion is {completion!r:.80}, which holds no text to score. Pass strings, or lists of messages "
            f"with a 'content' string."
        ) from error
