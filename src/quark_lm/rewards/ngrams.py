"""P(label) of a text by a logistic regression on hashed words and characters: numpy only, thousands of texts a second,
and no relative of MiniLM.

The weights stand in `weights/` with a card; scorers/train_toxicity_independent.py makes them. Buckets come from
CRC-32, so that a text falls into the same ones in every process and on every platform (Python's own hash is salted).
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np

from quark_lm.errors import RewardError
from quark_lm.rewards.text_reward import has_word

WEIGHTS = Path(__file__).parent / "weights"

_NOT_TEXT = re.compile(r"https?://\S+|@\w+:?|\brt\b|&\w+;|&#\d+;")  # addresses, mentions and entities of tweets
_TOKEN = re.compile(r"\w[\w*@$]*|[!?]+")
_CHARACTERS = range(3, 6)  # lengths of the character n-grams inside a word


class NgramScorer:
    """Scores texts from 0 to 1 with one file of weights.

    >>> NgramScorer("toxicity-ngrams").score_texts(["You stupid idiot!", "See you at noon.", "..."])
    [1.0, 0.4103, None]

    Args: weights: the name of a file of `weights/` without its ending, or a path to a safetensors file of the same
        form.
    """

    def __init__(self, weights: str | Path) -> None:
        from safetensors import safe_open

        path = Path(weights) if str(weights).endswith(".safetensors") else WEIGHTS / f"{weights}.safetensors"
        if not path.is_file():
            raise RewardError(
                f"No scorer weights at {path}, so nothing can be scored. Reinstall quark-lm, or make them with "
                f"scorers/train_*.py."
            )
        self.name = path.stem
        self.version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        with safe_open(str(path), framework="numpy") as file:
            self._weight = file.get_tensor("weight").astype(np.float32)
            bias, slope, offset = (float(file.get_tensor(name)[0]) for name in ("bias", "slope", "offset"))
        self._scale, self._offset = slope, slope * bias + offset  # the calibration is a line on the logit
        self._hasher = NgramHasher(len(self._weight))

    def score_texts(self, texts: Sequence[str]) -> list[float | None]:
        """P(label) of each text, in the order given; None for a text without a word."""
        return [self._score(text) if has_word(text) else None for text in texts]

    def _score(self, text: str) -> float:
        buckets = self._hasher.buckets(text)
        logit = self._offset
        if len(buckets):
            logit += self._scale * float(self._weight[buckets].sum()) / len(buckets) ** 0.5
        return float(1 / (1 + np.exp(-logit)))


class NgramHasher:
    """The buckets of a text's features: its words, pairs of neighbouring words, and the characters inside words in
    threes to fives.

    The features of one word are remembered, since words come back: hashing then takes about 60 microseconds a text.
    """

    def __init__(self, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        self._of_word: dict[str, list[int]] = {}

    def buckets(self, text: str) -> np.ndarray:
        """The distinct buckets, int64, sorted: a feature counts once however often it occurs, so that repetition
        changes nothing.
        """
        words = tokens(text)
        found: set[int] = set()
        for word in words:
            known = self._of_word.get(word)
            if known is None:
                known = self._features(word)
                if len(self._of_word) < 200_000:  # bounds the memory
                    self._of_word[word] = known
            found.update(known)
        for first, second in pairwise(words):
            found.add(crc32(f"2 {first} {second}".encode()) % self.num_buckets)
        return np.array(sorted(found), dtype=np.int64)

    def _features(self, word: str) -> list[int]:
        padded = f" {word} "
        names = [f"1 {word}"]
        names += [f"c {padded[i : i + n]}" for n in _CHARACTERS for i in range(len(padded) - n + 1)]
        return [crc32(name.encode()) % self.num_buckets for name in names]


def tokens(text: str) -> list[str]:
    """Lower-cased words and runs of ! and ?, apostrophes dropped ("don't" -> "dont"), without addresses and
    mentions.
    """
    text = html.unescape(text).lower()
    text = _NOT_TEXT.sub(" ", text).replace("’", "'").replace(" n't", "nt").replace("'", "")
    return _TOKEN.findall(text)
