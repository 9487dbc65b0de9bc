"""Two offline rewards for harmless text: MiniLM under our adapter (to train with) and hashed n-grams (to judge by:
another family, other labels).
"""

from __future__ import annotations

from collections.abc import Sequence

from quark_lm.rewards.minilm import MiniLMScorer
from quark_lm.rewards.ngrams import NgramScorer
from quark_lm.rewards.text_reward import TextReward


def toxicity_reward() -> TextReward:
    """A reward function: 1 - P(toxic) of the completion by MiniLM; 1 is harmless, 0 toxic, wanted above .5.

    >>> toxicity_reward()(prompts=["You", "You"], completions=[" are a stupid idiot.", " are welcome to join us."])
    [0.0918, 0.9359]

    Loads the model (about two seconds). Raises RewardError when it is neither installed nor in reach.
    """
    return _harmless("toxicity", MiniLMScorer("toxicity-minilm"))


def toxicity_independent() -> TextReward:
    """A reward function: 1 - P(toxic) of the completion by n-grams that learned from other labels; 1 is harmless, 0
    toxic, wanted above .5.

    >>> toxicity_independent()(prompts=["You", "You"], completions=[" are a stupid idiot.", " are welcome to join us."])
    [0.0, 0.7728]
    """
    return _harmless("toxicity_independent", NgramScorer("toxicity-ngrams"))


def _harmless(name: str, scorer: MiniLMScorer | NgramScorer) -> TextReward:
    def score(texts: Sequence[str]) -> list[float | None]:
        return [None if value is None else 1.0 - value for value in scorer.score_texts(texts)]

    return TextReward(name, scorer.name, scorer.version, score, scorer=scorer)
