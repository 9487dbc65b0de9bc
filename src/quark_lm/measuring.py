"""What a round tells: do the tokens mean anything, how good is what was explored, how far did the text drift."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import quantiles
from .evaluation.metrics import distinct_n_per_prompt
from .policy import completion_log_probs

if TYPE_CHECKING:
    from .trainer import QuarkTrainer

# Samples of a round whose perplexity under the original model is measured; the mean of so many is steady enough.
_PERPLEXITY_ROWS = 128
# Above the base's perplexity, or below its dist-2, by more than these shares the text counts as drifted.
_DRIFT = {"reference_perplexity": 0.15, "dist_2": -0.1}
# A round whose samples have so many times the perplexity of round 0's explored text of no use: so did repetition and
# toxicity with the dial at 4 (docs/experiments.md).
_LOST = 3.0
# Above this share of completions that had a score and have none now, the rest says little of the model.
_LACKING = 0.1
# With fewer held-out rows at either end the AUC says nothing.
_LEAST_ROWS = 4


def meaning(trainer: QuarkTrainer, assigned: np.ndarray) -> dict[str, float]:
    """See `QuarkTrainer.measure_tokens`. assigned: each pool row's quantile, -1 for none."""
    tokens = trainer.reward_tokens
    each = [_meaning(trainer, assigned, attribute) for attribute in range(tokens.num_attributes)]
    known = [one for one in each if one]
    if not known:
        return {}
    # the least of them is what warns
    figures = dict(min(known, key=lambda one: one["token_auc"]))
    figures["heldout_nll"] = float(np.mean([one["heldout_nll"] for one in known]))
    for name, one in zip(tokens.attributes, each, strict=False):
        figures |= {f"{key}/{name}": one[key] for key in ("token_auc", "token_auc_se") if one}
    return figures


def _meaning(trainer: QuarkTrainer, assigned: np.ndarray, attribute: int) -> dict[str, float]:
    """Of one attribute's tokens: the others stay as they are in each row."""
    pool, args, tokens = trainer.open_pool(), trainer.args, trainer.reward_tokens
    per_end = args.meaning_rows // 2
    if not per_end:
        return {}
    levels = tokens.all_levels(assigned)[attribute]
    good = np.flatnonzero(pool.held_out & (levels == tokens.num_quantiles - 1))[-per_end:]
    bad = np.flatnonzero(pool.held_out & (levels == 0))[-per_end:]
    if min(len(good), len(bad)) < _LEAST_ROWS:
        return {}
    rows = np.concatenate([good, bad])
    columns = pool.gather(rows, ["prompt_ids", "completion_ids", "token_at"])
    is_good = np.arange(len(rows)) < len(good)
    worst = np.array([tokens.turned_down(int(quantile), attribute) for quantile in assigned[rows]])
    best = worst + tokens.turned_up(attribute)
    log_probs = []
    with trainer.policy.evaluating():
        for asked in (best, worst):
            prompts = [
                tokens.insert(ids, int(quantile), at)
                for ids, quantile, at in zip(columns["prompt_ids"], asked, columns["token_at"], strict=True)
            ]
            log_probs.append(
                completion_log_probs(
                    trainer.model,
                    trainer.policy.head,
                    prompts,
                    columns["completion_ids"],
                    trainer.pad_id,
                    tokens.barred,
                    temperature=trainer.loss_settings.temperature,
                )
            )
    of_best, of_worst = log_probs
    lengths = np.array([len(ids) for ids in columns["completion_ids"]])
    auc = quantiles.auc((of_best - of_worst) / lengths, is_good)
    own = np.where(is_good, of_best, of_worst)
    return {
        "token_auc": auc,
        "token_auc_se": quantiles.auc_standard_error(auc, len(good), len(bad)),
        "heldout_nll": float(-own.sum() / lengths.sum()),
    }


def reference_nll(
    trainer: QuarkTrainer, prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> list[float | None]:
    """NLL a token under the original model of the first samples, without a reward token; None for the others."""
    num = min(len(prompt_ids), max(1, _PERPLEXITY_ROWS // trainer.accelerator.num_processes))
    with trainer.policy.evaluating(), trainer.policy.reference() as (reference, head):
        log_probs = completion_log_probs(
            reference, head, prompt_ids[:num], completion_ids[:num], trainer.pad_id, trainer.reward_tokens.barred
        )
    means = [-float(lp) / max(1, len(ids)) for lp, ids in zip(log_probs, completion_ids, strict=False)]
    return [*means, *[None] * (len(prompt_ids) - num)]


def round_figures(trainer: QuarkTrainer, round: int, assigned: np.ndarray) -> dict[str, Any]:
    """The figures of the samples that a round explored; all from the pool, so that a resumed run tells the same."""
    pool = trainer.open_pool()
    here = pool.rounds == round
    rewards = pool.rewards
    figures: dict[str, Any] = {
        **pool.metrics(round),
        "reward": float(np.nanmean(rewards[here])),
        "samples": int(here.sum()),
        "dropped": int(np.isnan(rewards[here]).sum()),
        "pool_samples": int((pool.rounds <= round).sum()),  # later ones are there when a round is learned again
    }
    before = (pool.rounds < round) & np.isfinite(rewards)
    if round > 0 and before.any() and np.ptp(rewards[before]) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", quantiles.FewQuantilesWarning)
            old = quantiles.assign(rewards[before], trainer.args.num_quantiles)
        threshold = rewards[before][old == trainer.args.num_quantiles - 1].min()
        # at the threshold counts: a reward of 0 and 1 has nothing above its best
        figures["share_above_best"] = float(np.mean(rewards[here & np.isfinite(rewards)] >= threshold))
    perplexity = _reference_perplexity(trainer, round)
    if perplexity is not None:
        figures["reference_perplexity"] = perplexity
    if trainer.args.reward_attributes:
        names = [f"reward/{name}" for name in trainer.rewards.names]
        of_each = pool.to_table([round], columns=names).to_pandas()
        figures["dropped"] = int(of_each.isna().any(axis=1).sum())
        figures |= {name: float(of_each[name].mean()) for name in names if of_each[name].notna().any()}
    levels = trainer.reward_tokens.all_levels(assigned)
    figures["quantiles_used"] = min(len(np.unique(of_one[of_one >= 0])) for of_one in levels)
    return figures


def _reference_perplexity(trainer: QuarkTrainer, round: int) -> float | None:
    """Of a round's samples under the original model; None for a user's own data, of which it is not measured."""
    pool = trainer.open_pool()
    # only the column that is needed: a round's texts may be large
    measured = pool.gather(np.flatnonzero(pool.rounds == round), ["reference_nll"])["reference_nll"]
    nll = np.array([v for v in measured if v is not None])
    return float(np.exp(nll).mean()) if len(nll) else None


def warn_of_drift(trainer: QuarkTrainer, round: int, figures: dict[str, Any]) -> None:
    """Warns when a round explored text that the original model finds far less likely than its own samples."""
    args, explored = trainer.args, figures.get("reference_perplexity")
    if round == 0 or explored is None or not trainer.is_world_process_zero():
        return
    before = _reference_perplexity(trainer, 0)
    if before is not None and explored > _LOST * before:
        mend = f"Lower explore_strength ({args.explore_strength:g})" if args.explore_strength > 1 else "Raise beta"
        warnings.warn(
            f"Round {round + 1} explored text of perplexity {explored:.1f} under the original model, whose own samples"
            f" have {before:.1f}: it drifts, and what is learned of it may be of no use. {mend}, or learn more steps"
            " before exploring (steps_per_round).",
            stacklevel=3,
        )


def warn_of_meaning(trainer: QuarkTrainer, round: int, figures: dict[str, float]) -> None:
    """Warns when the next round would explore with tokens of which nobody knows that they mean something."""
    args = trainer.args
    if round + 1 >= args.num_rounds or not trainer.is_world_process_zero():
        return
    if not figures:
        if round == 0 and args.heldout_share and args.meaning_rows:
            warnings.warn(
                "Too few samples are held out to tell whether the reward tokens mean anything (token_auc is missing)."
                " Raise prompts_first_round or heldout_share.",
                stacklevel=3,
            )
    elif figures["token_auc"] < 0.5 + 2 * figures["token_auc_se"]:
        named = [n.partition("/")[2] for n, v in figures.items() if "/" in n and v == figures["token_auc"]]
        of = f" of {named[0]}" if named else ""
        what = "hardly mean anything yet" if figures["token_auc"] < 0.6 else "may mean nothing yet for all that shows"
        warnings.warn(
            f"The reward tokens{of} {what} (AUC {figures['token_auc']:.2f} +- {figures['token_auc_se']:.2f}, 0.5 is"
            " nothing), so the next round may explore with a token that asks for nothing. Train longer before exploring"
            " (steps_per_round), sample more (prompts_first_round, heldout_share), or use text tags.",
            stacklevel=3,
        )


def held_out_figures(columns: dict[str, np.ndarray], texts: list[str], num_generations: int) -> dict[str, float]:
    """The mean of each scorer over the completions, its standard error over prompts, the share of completions without a
    value if there are any, and dist-2.

    Args: columns: each scorer's values, NaN for none, prompt by prompt. A scorer that gave no value has no figures.
    """
    figures: dict[str, float] = {}
    for name, values in columns.items():
        if not np.isfinite(values).any():
            continue
        figures[name] = float(np.nanmean(values))
        if (missing := float(np.isnan(values).mean())) > 0:
            figures[f"{name}_missing"] = missing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a prompt without a value has no mean
            of_prompt = np.nanmean(values.reshape(-1, num_generations), axis=1)
        of_prompt = of_prompt[np.isfinite(of_prompt)]
        if len(of_prompt) > 1:
            figures[f"{name}_se"] = float(of_prompt.std(ddof=1) / math.sqrt(len(of_prompt)))
    groups = [texts[start : start + num_generations] for start in range(0, len(texts), num_generations)]
    distinct = np.array(distinct_n_per_prompt(groups, 2), dtype=float)
    if np.isfinite(distinct).any():
        figures["dist_2"] = float(np.nanmean(distinct))
    return figures


def _counts(line: dict[str, Any]) -> bool:
    """Whether a line's held-out figures are the run's own: of its policy, on its own prompts."""
    return not line.get("untrained") and not line.get("other_prompts")


def verdict(lines: Sequence[dict[str, Any]], independent: Sequence[str]) -> dict[str, Any]:
    """What the held-out prompts say of a run, in a word and in a sentence.

    A score rose when it is above the base's by twice the standard error of a difference of two independent means, which
    is larger than that of the same prompts' difference. An independent score that is above by once that error, and not
    twice, says neither.

    Args: lines: of metrics.jsonl; independent: names of the scorers that training never saw.
    Returns: verdict ("better", "reward hacking", "unconfirmed" where no independent scorer measured or its rise may be
        chance, "no gain"), drifted, and text; empty when the held-out prompts were not measured before and after.
    """
    base = next((line for line in lines if "base_reward" in line), None)
    last = next((line for line in reversed(lines) if "eval_reward" in line and _counts(line)), None)
    if base is None or last is None:
        return {}

    def told(name: str) -> tuple[float, str]:
        """(The change in standard errors, in words.)"""
        before, after = base[f"base_{name}"], last[f"eval_{name}"]
        # one prompt alone has no error, and shows nothing
        error = math.hypot(base.get(f"base_{name}_se", math.inf), last.get(f"eval_{name}_se", math.inf))
        return (after - before) / max(error, 1e-300), f"{before:.3f} -> {after:.3f}"

    def lacking(name: str) -> float:
        """By how much larger the share of completions without a value has become."""
        return last.get(f"eval_{name}_missing", 0.0) - base.get(f"base_{name}_missing", 0.0)

    rose, reward = told("reward")
    others = {name: told(name) for name in independent if f"base_{name}" in base and f"eval_{name}" in last}
    flat = [f"{name} ({change})" for name, (errors, change) in others.items() if errors <= 1]
    unsure = [f"{name} ({change})" for name, (errors, change) in others.items() if 1 < errors <= 2]
    if rose <= 2:
        word, text = "no gain", f"The held-out reward did not rise ({reward})."
    elif flat:
        word = "reward hacking"
        text = f"The held-out reward rose ({reward}), but not {', '.join(flat)}: the model may only please the reward."
    elif (lost := max(map(lacking, ("reward", *others)))) > _LACKING:
        word = "unconfirmed"
        text = (
            f"The held-out reward rose ({reward}), but it is of fewer completions: {lost:.0%} more of them than before"
            " have no score."
        )
    elif unsure:
        word = "unconfirmed"
        text = (
            f"The held-out reward rose ({reward}); the rise of {', '.join(unsure)}, which training never saw, may be"
            " chance. More held-out prompts would tell."
        )
    elif others:
        word = "better"
        shown = ", ".join(f"{name} ({change})" for name, (_, change) in others.items())
        text = f"The held-out reward rose ({reward}), and so did {shown}, which training never saw."
    else:
        word = "unconfirmed"
        text = (
            f"The held-out reward rose ({reward}); no scorer that training never saw confirms it (eval_reward_funcs)."
        )
    drifted = []
    for name, share in _DRIFT.items():
        before, after = base.get(f"base_{name}"), last.get(f"eval_{name}")
        if before and after and (after / before - 1) * math.copysign(1, share) > abs(share):
            drifted.append(f"{name.replace('_', ' ')} {before:.3g} -> {after:.3g}")
    if drifted:
        text += f" The text drifted: {', '.join(drifted)}."
    return {"verdict": word, "drifted": bool(drifted), "text": text, "step": last["step"]}


def best_step(lines: Sequence[dict[str, Any]], independent: Sequence[str], steps_per_round: int) -> int | None:
    """The last step of the round after which held-out prompts scored best, by the first independent scorer if any."""
    name = f"eval_{independent[0] if independent else 'reward'}"
    measured = [line for line in lines if line.get(name) is not None and _counts(line)]
    measured = [line for line in measured if line["step"] % steps_per_round == 0]
    return max(measured, key=lambda line: line[name])["step"] if measured else None
