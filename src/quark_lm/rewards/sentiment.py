"""Two offline sentiment rewards: MiniLM under our adapter (to train with) and VADER's lexicon (to judge by: another
family, other labels).

VADER: Hutto and Gilbert 2014, in the package `nltk-vader-sentiment`, which needs no other. Good for a direction, not
for absolute shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from quark_lm.errors import ConfigError, RewardError
from quark_lm.rewards.minilm import MiniLMScorer
from quark_lm.rewards.text_reward import TextReward, has_word

Label = Literal["positive", "negative"]

# VADER's authors call a compound of at least .05 positive; compounds have four decimals, so that "above .04999" says
# the same.
_VADER_THRESHOLD = (0.04999 + 1) / 2


def sentiment_reward(label: Label = "positive") -> TextReward:
    """A reward function: P(label) of the completion by MiniLM; 1 is surely `label`, 0 surely the opposite, .5 neither.

    >>> reward = sentiment_reward("positive")
    >>> reward(prompts=["The film", "The film"], completions=[" was a delight.", " bored everyone."])
    [0.9996, 0.0062]

    Loads the model (about two seconds). Raises RewardError when it is neither installed nor in reach.
    """
    _check(label)
    scorer = MiniLMScorer("sentiment-minilm")

    def score(texts: Sequence[str]) -> list[float | None]:
        return _toward(label, scorer.score_texts(texts))

    return TextReward(f"sentiment_{label}", scorer.name, scorer.version, score, scorer=scorer)


def sentiment_independent(label: Label = "positive") -> TextReward:
    """A reward function: VADER's compound of the completion, brought to 0 .. 1; 1 is surely `label`, .5 neither.

    >>> reward = sentiment_independent("positive")
    >>> reward(prompts=["The film", "The film"], completions=[" was a delight.", " bored everyone."])
    [0.7997, 0.3634]

    A completion is wanted from a compound of .05 on. Raises RewardError when the package is missing.
    """
    _check(label)
    try:
        import vader
    except ImportError as error:
        raise RewardError(
            "nltk-vader-sentiment is not installed, and the independent sentiment scorer is its lexicon. Run: pip "
            "install nltk-vader-sentiment==1.0.0"
        ) from error
    analyzer = vader.SentimentIntensityAnalyzer()

    def score(texts: Sequence[str]) -> list[float | None]:
        values = [(analyzer.polarity_scores(text)["compound"] + 1) / 2 if has_word(text) else None for text in texts]
        return _toward(label, values)

    return TextReward(
        f"sentiment_{label}_independent", "vader", str(vader.__version__), score, threshold=_VADER_THRESHOLD
    )


def _toward(label: Label, positive: list[float | None]) -> list[float | None]:
    if label == "positive":
        return positive
    return [None if value is None else 1.0 - value for value in positive]


def _check(label: str) -> None:
    if label not in ("positive", "negative"):
        raise ConfigError(f"label={label!r} is no sentiment that the scorers know. Set 'positive' or 'negative'.")
