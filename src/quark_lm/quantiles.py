"""Quantiles of the pool: which reward token each sample earns, and which samples a round draws.

Numpy only; files are pool.py's job.

Quantile 0 is the worst and `num_quantiles - 1` the best. -1 stands for a sample that is not drawn.
Source: Lu et al. 2022, section 2, and the authors' code for the sizes.
"""

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quark_lm.errors import ConfigError, DataError

DRAW_MODES = ("all", "balanced", "ends", "best")

NOT_DRAWN = -1


class FewQuantilesWarning(UserWarning):
    """The rewards hold fewer distinct values than there are quantiles, so some reward tokens stay unused."""


# Quantize


def assign(rewards: ArrayLike, num_quantiles: int) -> NDArray[np.int64]:
    """The quantile of each sample, 0 (worst) to `num_quantiles - 1` (best).

    Without ties the sizes are the authors': N // K samples in each of the quantiles 1 to K - 1, and the remainder joins
    the worst. Equal rewards share one quantile, the one of their middle rank; the best reward always earns K - 1, the
    worst 0.
    authors' code: a stable sort that gives the older of two equal samples the better token, a bias.

    With fewer distinct rewards than K they are spread evenly, best to K - 1 and worst to 0, with a
    `FewQuantilesWarning`; when all are equal, all are the best.

    Args: rewards, float (N,), finite. num_quantiles, K, at least 2.
    Returns: int64 (N,). `assign([0.1, 0.9, 0.5, 0.9], 2)` gives `[0, 1, 0, 1]`.
    Raises: DataError for no rewards or one that is not finite; ConfigError for K below 2.
    """
    rewards = _checked_rewards(rewards)
    _check_num_quantiles(num_quantiles)
    order = np.argsort(rewards)
    ranked = rewards[order]
    # One group for each distinct reward: where it starts in the ranking, and its size.
    is_start = np.empty(len(ranked), dtype=bool)
    is_start[0] = True
    np.not_equal(ranked[1:], ranked[:-1], out=is_start[1:])
    starts = np.flatnonzero(is_start)
    sizes = np.diff(starts, append=len(ranked))
    if len(starts) < num_quantiles:
        _warn_few(ranked[starts], num_quantiles)
    group_quantiles = _quantile_of_group(
        middle_rank=starts + (sizes - 1) // 2,
        num_samples=len(ranked),
        position=np.arange(len(starts)),
        num_groups=len(starts),
        num_quantiles=num_quantiles,
    )
    quantiles = np.empty(len(ranked), dtype=np.int64)
    quantiles[order] = np.repeat(group_quantiles, sizes)
    return quantiles


def assign_per_group(rewards: ArrayLike, groups: ArrayLike, num_quantiles: int) -> NDArray[np.int64]:
    """The quantile of each sample among the samples of its own group (its prompt), by the rule of `assign`.

    A group whose rewards are all equal compares nothing: its samples get -1, are not drawn, and are the caller's to
    count (`(quantiles < 0).sum()`). Groups with fewer distinct rewards than K are the usual case here, so a
    `FewQuantilesWarning` comes only when no group at all has K of them.

    Args: rewards, float (N,), finite. groups, (N,), integers or strings, one a prompt. num_quantiles, K, at least 2.
    Returns: int64 (N,). `assign_per_group([0.1, 0.2, 0.8, 0.9], [7, 7, 8, 8], 2)` gives `[0, 1, 0, 1]`.
    Raises: DataError, ConfigError as `assign`, and DataError for lengths that differ.
    """
    rewards = _checked_rewards(rewards)
    _check_num_quantiles(num_quantiles)
    groups = np.asarray(groups)
    if groups.shape != rewards.shape:
        raise DataError(
            f"groups has shape {groups.shape} but rewards has {rewards.shape}, so samples have no prompt of their own. "
            "Give one group a reward."
        )
    if not np.issubdtype(groups.dtype, np.integer):
        groups = np.unique(groups, return_inverse=True)[1]
    num_samples = len(rewards)
    order = np.lexsort((rewards, groups))
    ranked, ranked_groups = rewards[order], groups[order]
    is_first = np.empty(num_samples, dtype=bool)  # the first sample of a prompt
    is_first[0] = True
    np.not_equal(ranked_groups[1:], ranked_groups[:-1], out=is_first[1:])
    is_start = is_first.copy()  # the first sample of a distinct reward of a prompt
    is_start[1:] |= ranked[1:] != ranked[:-1]

    prompt_starts = np.flatnonzero(is_first)
    prompt_sizes = np.diff(prompt_starts, append=num_samples)
    starts = np.flatnonzero(is_start)
    sizes = np.diff(starts, append=num_samples)
    prompt_of_start = np.cumsum(is_first)[starts] - 1
    num_distinct = np.bincount(prompt_of_start)  # distinct rewards of each prompt
    first_group = np.cumsum(num_distinct) - num_distinct

    if num_distinct.max() < num_quantiles:
        warnings.warn(
            f"num_quantiles={num_quantiles} within each prompt needs a prompt with at least {num_quantiles} distinct "
            f"rewards, but none has more than {num_distinct.max()}, so some reward tokens stay unused. "
            f"Set num_quantiles={max(num_distinct.max(), 2)}, or raise num_generations.",
            FewQuantilesWarning,
            stacklevel=2,
        )
    group_quantiles = _quantile_of_group(
        middle_rank=starts - prompt_starts[prompt_of_start] + (sizes - 1) // 2,
        num_samples=prompt_sizes[prompt_of_start],
        position=np.arange(len(starts)) - first_group[prompt_of_start],
        num_groups=num_distinct[prompt_of_start],
        num_quantiles=num_quantiles,
    )
    group_quantiles[num_distinct[prompt_of_start] == 1] = NOT_DRAWN
    quantiles = np.empty(num_samples, dtype=np.int64)
    quantiles[order] = np.repeat(group_quantiles, sizes)
    return quantiles


def in_window(rounds: ArrayLike, current_round: int, window: int | None) -> NDArray[np.bool_]:
    """Which samples belong to the last `window` rounds, the current one included; all rounds up to it if None.

    A round later than the current one never counts: a run resumed from an earlier checkpoint may find some on disk.
    """
    if window is not None and window < 1:
        raise ConfigError(
            f"pool_window={window} would leave no round to learn from. Set it to 1 or more, or to None for all rounds."
        )
    rounds = np.asarray(rounds)
    mask = rounds <= current_round
    if window is not None:
        mask &= rounds > current_round - window
    return mask


# Draw


def draw(
    quantiles: ArrayLike, num_draws: int, seed: int, round: int, mode: str = "all", num_quantiles: int = 5
) -> NDArray[np.int64]:
    """The rows that a round learns from, in the order in which its steps take them.

    A pure function of its arguments, and the first draws do not depend on how many follow. Rows come without
    replacement until all have been drawn, then in a new order. With several quantiles, each run of as many draws as
    there are quantiles holds one from each in random order, so every batch is balanced up to its remainder.

    Args:
        quantiles: int (N,), as `assign` gives them; a row with -1 is never drawn.
        mode: "all" draws uniformly, as in the paper; "balanced" equally often from each quantile that holds a sample;
            "ends" half from the worst and half from the best (from one of them if the other is empty); "best" from the
            best only.
    Returns: int64 (num_draws,), indices into `quantiles`.
    Raises: DataError when no row is left to draw; ConfigError for an unknown mode.
    """
    if mode not in DRAW_MODES:
        raise ConfigError(f"draw={mode!r} is not a way to draw samples. Choose one of {', '.join(DRAW_MODES)}.")
    quantiles = np.asarray(quantiles)
    if mode == "all":
        strata = [np.flatnonzero(quantiles >= 0)]
    else:
        wanted = {"balanced": range(num_quantiles), "ends": (0, num_quantiles - 1), "best": (num_quantiles - 1,)}[mode]
        strata = [np.flatnonzero(quantiles == quantile) for quantile in wanted]
    # Each stratum keeps its own stream, so that an empty one does not move the others.
    streams = [(number, rows) for number, rows in enumerate(strata) if len(rows)]
    if not streams:
        raise DataError(
            f"draw={mode!r} found no sample to learn from among {len(quantiles):,} rows: all were dropped, or lie in "
            "other quantiles. Check the rewards with `quark check-reward`."
        )
    num_blocks = -(-num_draws // len(streams))
    columns = [_endless(rows, num_blocks, [seed, round, _DRAW_STREAM, number]) for number, rows in streams]
    blocks = np.stack(columns, axis=1)
    if len(streams) > 1:
        places = np.random.default_rng([seed, round, _ORDER_STREAM]).random(blocks.shape).argsort(axis=1)
        blocks = np.take_along_axis(blocks, places, axis=1)
    return blocks.reshape(-1)[:num_draws]


# Whether the tokens mean anything yet


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The chance that a positive scores above a negative, ties counted half: the area under the ROC curve.

    0.5 tells nothing apart; 1 orders every pair rightly. The share of either class does not matter.

    Args: scores, float (N,), infinities allowed. labels, (N,), true (or 1) for the positives.
    Raises: DataError for NaN, lengths that differ, or one class only.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise DataError(
            f"scores has shape {scores.shape} and labels {labels.shape}, so they cannot be paired. "
            "Give one label a score."
        )
    num_positive = int(labels.sum())
    num_negative = len(labels) - num_positive
    _check_both_classes(num_positive, num_negative)
    if np.isnan(scores).any():
        raise DataError(f"{np.isnan(scores).sum()} of {len(scores)} scores are NaN and have no rank. Drop them first.")
    order = np.argsort(scores)
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    sizes = np.diff(starts, append=len(ranked))
    middle_ranks = np.repeat(starts + (sizes - 1) / 2, sizes)  # counted from 0
    rank_sum = middle_ranks[labels[order]].sum()
    return float((rank_sum - num_positive * (num_positive - 1) / 2) / (num_positive * num_negative))


def auc_standard_error(auc: float, num_positive: int, num_negative: int) -> float:
    """The standard error of an AUC over independent samples; it is 0 at an AUC of 0 or 1.

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve", with their Q1 and Q2.
    """
    _check_both_classes(num_positive, num_negative)
    q1 = auc / (2 - auc)  # two positives both above one negative
    q2 = 2 * auc**2 / (1 + auc)  # one positive above two negatives
    variance = auc * (1 - auc) + (num_positive - 1) * (q1 - auc**2) + (num_negative - 1) * (q2 - auc**2)
    return float(np.sqrt(max(variance, 0.0) / (num_positive * num_negative)))


# Helpers

_DRAW_STREAM, _ORDER_STREAM = 1, 2  # apart from each other, and from any other stream seeded by (seed, round)


def _quantile_of_group(
    middle_rank: NDArray[np.int64],
    num_samples: int | NDArray[np.int64],
    position: NDArray[np.int64],
    num_groups: int | NDArray[np.int64],
    num_quantiles: int,
) -> NDArray[np.int64]:
    """The quantile of each group of equal rewards: by its middle rank, or spread evenly if groups are fewer than K."""
    size, remainder = np.divmod(num_samples, num_quantiles)
    by_rank = np.maximum(middle_rank - remainder, 0) // np.maximum(size, 1)
    by_rank = np.where(position == 0, 0, np.where(position == num_groups - 1, num_quantiles - 1, by_rank))
    # round(position * (K - 1) / (groups - 1)) in integers; the steps are longer than 1, so no two groups meet
    steps = np.maximum(np.asarray(num_groups) - 1, 1)
    spread = (2 * position * (num_quantiles - 1) + steps) // (2 * steps)
    spread = np.where(position == num_groups - 1, num_quantiles - 1, spread)  # a lone group is the best
    return np.where(np.asarray(num_groups) < num_quantiles, spread, by_rank).astype(np.int64)


def _endless(rows: NDArray[np.int64], num_draws: int, seed: list[int]) -> NDArray[np.int64]:
    """The first `num_draws` of an endless walk over `rows`: each pass takes all of them in a new random order."""
    generator = np.random.default_rng(seed)
    num_passes = max(-(-num_draws // len(rows)), 1)
    return np.concatenate([generator.permutation(rows) for _ in range(num_passes)])[:num_draws]


def _checked_rewards(rewards: ArrayLike) -> NDArray[np.float64]:
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1:
        raise DataError(f"rewards has shape {rewards.shape}, so samples have no single rank. Give one number a sample.")
    if not len(rewards):
        raise DataError(
            "There are no rewards to rank: every sample was dropped, or none was made. Check the reward function."
        )
    is_bad = ~np.isfinite(rewards)
    if is_bad.any():
        raise DataError(
            f"{is_bad.sum():,} of {len(rewards):,} rewards are NaN or infinite (the first at index {is_bad.argmax()}) "
            "and have no rank. Drop those samples, or mend the reward function."
        )
    return rewards


def _check_num_quantiles(num_quantiles: int) -> None:
    if num_quantiles < 2:
        raise ConfigError(
            f"num_quantiles={num_quantiles} compares nothing with anything. Set it to 2 or more; the paper has 5."
        )


def _check_both_classes(num_positive: int, num_negative: int) -> None:
    if num_positive < 1 or num_negative < 1:
        raise DataError(
            f"There are {num_positive} positives and {num_negative} negatives, and AUC compares the ones with the "
            "others. Give some of both."
        )


def _warn_few(distinct: NDArray[np.float64], num_quantiles: int) -> None:
    values = [f"{value:.6g}" for value in distinct]
    shown = " and ".join(values) if len(values) < 3 else f"{values[0]} to {values[-1]}"
    mend = (
        f"Set num_quantiles={len(values)}, or use a graded reward."
        if len(values) > 1
        else "Use a reward that tells samples apart."
    )
    warnings.warn(
        f"num_quantiles={num_quantiles} needs at least {num_quantiles} distinct rewards, but the pool has "
        f"{len(values)} ({shown}), so some reward tokens stay unused. {mend}",
        FewQuantilesWarning,
        stacklevel=3,
    )
