"""Diversity as a reward: how little a completion repeats itself. The measure is evaluation/metrics.py's.

Source: Lu et al. 2022, the repetition task; Su et al. 2022 for diversity.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

from quark_lm.errors import ConfigError
from quark_lm.evaluation.metrics import diversity
from quark_lm.rewards.text_reward import Completion, TextReward, completion_text, has_word

_NS = (2, 3, 4)


def repetition_reward(unit: Literal["words", "tokens"] = "words") -> TextReward:
    """A reward function: the completion's diversity; 1 when nothing repeats, near 0 when it loops.

    The product over n = 2, 3, 4 of (1 - rep-n / 100), where rep-n is the percentage of n-grams that stood before.

    >>> repetition_reward()(prompts=["So", "So"], completions=[" we went home at last.", " it is what it is what it
    is."]) [1.0, 0.3]

    Args: unit, what repeats: "words", split on white space, or "tokens", the completion's ids.

    A completion too short for an n leaves that n out; one with no pair at all, or without a word, earns None. Short
    completions
    hardly repeat, so the reward favours them: keep `min_new_tokens` up, or ban the end of text, where that matters.
    """
    if unit == "words":
        return TextReward("repetition_reward", "diversity of words", "1", _of_texts)
    if unit == "tokens":
        return _TokenDiversity("repetition_reward", "diversity of tokens", "1", _of_texts)
    raise ConfigError(f"unit={unit!r} is nothing whose repetition can be counted. Set 'words' or 'tokens'.")


class _TokenDiversity(TextReward):
    """As TextReward, over the completions' token ids; without ids (`score_texts`) over words."""

    def __call__(  # type: ignore[override]
        self, *, completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        return [_diversity(ids) if has_word(text) else None for text, ids in zip(texts, completion_ids, strict=True)]


def _of_texts(texts: Sequence[str]) -> list[float | None]:
    return [_diversity(text.split()) if has_word(text) else None for text in texts]


def _diversity(items: Sequence[Hashable]) -> float | None:
    # here: skip an n that has no n-gram; the metric, which compares texts of one length, gives no value
    ns = [n for n in _NS if len(items) >= n]
    return diversity(items, ns) if ns else None
