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


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn; the fields are those of `QuarkConfig`.

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
        check_min_p(self.dial_min_p)


def check_min_p(dial_min_p: float) -> None:
    """Raises: ConfigError for what is no share that leaves a choice."""
    if not 0 <= dial_min_p < 1:
        raise ConfigError(
            f"dial_min_p={dial_min_p} is no share of the likeliest token's probability. Set it to 0 (no limit) or more"
            " and below 1; 0.05 is a start."
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
