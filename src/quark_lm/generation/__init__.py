"""Completers: token ids in, token ids out. `hf.py` runs the model in this process, `vllm.py` asks vLLM.

A sample's draws depend on its own seed only: not on its batch, the batch size, the rank, or the order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import ConfigError

# The fields of `QuarkConfig` that say how completions are drawn.
DRAWING = ("max_completion_length", "min_completion_length", "temperature", "top_p", "top_k", "dial_min_p")


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn; the fields are those of `QuarkConfig`. Raises: ConfigError for what draws nothing.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p, top_k: draw from the smallest set of tokens with probability top_p, from the k likeliest (0: all).
        barred: ids that are never drawn (the reward tokens).
        dial_min_p: with the dial above 1, draw only tokens that the asked prompt by itself gives at least this share of
            its likeliest token's probability; see `steering.implausible`.
    """

    max_completion_length: int = 20
    min_completion_length: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    barred: tuple[int, ...] = ()
    dial_min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature} divides the logits into nothing that can be drawn from. Set it to a"
                " finite number; 1 is the model as it is, 0 takes the likeliest token."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p={self.top_p} is not a probability above 0. Set it between 0 and 1 (1: no filter)."
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} is no number of tokens. Set it to 0 (no filter) or more.")
        if self.max_completion_length < 1:
            raise ConfigError(
                f"max_completion_length={self.max_completion_length} leaves nothing to draw. Set it to 1 or more."
            )
        if self.min_completion_length > self.max_completion_length:
            raise ConfigError(
                f"min_completion_length={self.min_completion_length} is above max_completion_length="
                f"{self.max_completion_length}, so no completion could ever end. Lower it."
            )
        if not 0 <= self.dial_min_p < 1:
            raise ConfigError(
                f"dial_min_p={self.dial_min_p} is no share of the likeliest token's probability. Set it to 0 (no limit)"
                " or more and below 1; 0.03 is a start."
            )


# A dial of the strength: (the prompts of its other branch, the strength, one for all or one a prompt).
Dial = tuple[Sequence[Sequence[int]], float | Sequence[float]]


class Completer(Protocol):
    """Completes prompts; see `hf.HFCompleter.complete` for the arguments.

    Attributes: batch_rows: forward rows of a batch; None: as many as `fitting_rows` says.
    """

    batch_rows: int | None

    def fitting_rows(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> int: ...

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: GenerationSettings,
        *,
        dials: Sequence[Dial] = (),
        skip: Collection[int] = (),
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yields (indices into `prompts`, their completions' token ids) batch by batch, each index once.

        skip: indices that a stopped call had yielded; the others come in the batches that they would have come in.
        """
        ...


def complete_all(batches: Iterator[tuple[list[int], list[list[int]]]], num: int) -> list[list[int]]:
    """The completions of all batches in the order of their prompts."""
    out: list[list[int]] = [[] for _ in range(num)]
    for indices, completions in batches:
        for i, completion in zip(indices, completions, strict=True):
            out[i] = completion
    return out


def sample_seeds(*key: int, num: int) -> list[int]:
    """`num` 63-bit seeds that are a pure function of the key, such as (seed, round)."""
    return np.random.default_rng(list(key)).integers(0, 2**63, size=num, dtype=np.int64).tolist()


# Random numbers for each token: top-p draws again when a draw falls outside (see hf.py).
DRAWS = 4


def uniforms(seed: int, num: int) -> np.ndarray:
    """float32 (num, DRAWS) in [0, 1): the draws of the sample with this seed, a row a token."""
    return np.random.Generator(np.random.Philox(key=seed)).random((num, DRAWS), dtype=np.float32)


def turned(dials: Sequence[Dial], num: int) -> list[tuple[Sequence[Sequence[int]], np.ndarray]]:
    """The dials that change anything, each with a strength a prompt, float32 (num,); at 1 one changes nothing.

    Raises: ConfigError for a strength that is not a finite number.
    """
    out = []
    for contrast, strength in dials:
        check_strength(strength)
        strengths = np.broadcast_to(np.asarray(strength, dtype=np.float32), (num,))
        if not bool((strengths == 1.0).all()):
            out.append((contrast, strengths))
    return out


def check_strength(strength: float | Sequence[float] | np.ndarray) -> None:
    """Raises: ConfigError unless every strength of the dial is a finite number."""
    values = np.atleast_1d(np.asarray(strength, dtype=np.float64))
    if not np.isfinite(values).all():
        raise ConfigError(
            "The strength of the dial is not a finite number. Use 0 (worst token) to about 3; 1 is plain Quark."
        )
