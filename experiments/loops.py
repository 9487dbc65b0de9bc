"""What each choice is worth in the whole loop, where `ablations.py` (one fixed pool) cannot tell: exploring, and the
paper's findings about it, the draws, the number of quantiles and the KL's weight.

A small budget, the same for all: the same 768 samples of the base model as round 0, then two rounds of 384 samples, 15
steps of 32 draws a round. Each trial is measured as the demo is, on its held-out prompts by both scorers, and against
the default prompt by prompt. Five to nine minutes a trial on two cores; a trial that was cut off goes on, one that is
done is not done again; a GPU is used where there is one. Figures: docs/results/loops.json.

    python experiments/loops.py --seeds 0
    python experiments/loops.py --seeds 0 1 --only beta
    python experiments/loops.py --table
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ablations import COMMON, TASK, in_equal_parts, run_trials, trial_folder

from quark_lm import demo
from quark_lm.evaluation.evaluate import Completions, measure_systems
from quark_lm.evaluation.metrics import paired_bootstrap

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "loops.json"
NUM_SAMPLES, NUM_GENERATIONS = 768, 2
BUDGET = {
    **COMMON,
    "explore_strength": 2.0,
    "num_rounds": 3,
    "steps_per_round": 15,
    "prompts_per_round": 384,
    "heldout_share": 0.1,
    "save_strategy": "epoch",
    "early_stop": False,
}
PLAIN = {"explore_strength": 1.0}
# What differs from the default, by the question that it answers. For `explore_temperature` and `keep` see `trial`.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {"guided at 2, both ends, K = 5, beta .05": {}},
    "exploring": {
        "best token (the paper's)": PLAIN,
        "random token (the paper's losing one)": {**PLAIN, "explore_token": "random"},
        "guided at 4": {"explore_strength": 4.0},
    },
    "draw": {
        "all quantiles (the paper's)": {"draw": "all"},
        "best quantile only": {"draw": "best"},
        "three draws in four of the best": {"best_share": 0.75},
    },
    "beta": {"beta 0.2": {"beta": 0.2}, "beta 0": {"beta": 0.0}},
    "quantiles, all drawn": {
        "K = 2": {"draw": "all", "num_quantiles": 2, "reward_token_texts": [TASK.tags[0], TASK.tags[-1]]},
        "K = 10": {
            "draw": "all",
            "num_quantiles": 10,
            "reward_token_texts": [TASK.tags[0], *(f"Sentiment: {i} of 10.\n" for i in range(1, 9)), TASK.tags[-1]],
        },
    },
    "rounds": {"5 of 192 samples and 9 steps": {"num_rounds": 5, "prompts_per_round": 192, "steps_per_round": 9}},
    "other exploring": {
        "best token, temperature 1.3": {**PLAIN, "explore_temperature": 1.3},
        "best token, best of 4 kept": {**PLAIN, "num_generations": 4, "prompts_per_round": 96, "keep": "best"},
        "best token, newer of 2 kept": {**PLAIN, "num_generations": 2, "prompts_per_round": 192, "keep": "new"},
    },
    "steps": {"30 steps a round": {"steps_per_round": 30}},
    "window": {"the last round only": {"pool_window": 1}},
}
KEYS = ("reward", "kl", "nll", "token_auc", "share_above_best", "reference_perplexity")


def keeping(reward: Callable[..., list[float | None]], keep: str, each: int) -> Callable[..., list[float | None]]:
    """The reward, None for all but one completion of each prompt: the 'best', or the one with the most 'new' pairs of
    words, which nothing sampled before it had."""
    seen: set[tuple[str, str]] = set()

    def pairs(text: str) -> set[tuple[str, str]]:
        words = text.lower().split()
        return set(itertools.pairwise(words))

    def kept(completions: list[str], **more: Any) -> list[float | None]:
        values = reward(completions=completions, **more)
        if keep == "best":
            ranks = [-np.inf if value is None else value for value in values]
        else:
            ranks = []
            for text in completions:
                ranks.append(len(pairs(text) - seen) / max(1, len(pairs(text))))
                seen.update(pairs(text))
        out: list[float | None] = [None] * len(values)
        for start in range(0, len(values), each):
            best = start + int(np.argmax(ranks[start : start + each]))
            out[best] = values[best]
        return out

    kept.scorer = getattr(reward, "scorer", None)  # type: ignore[attr-defined]  # whose dtype the run keeps
    return kept


def counts(result: Completions, scorer: str, wanted: Callable[[list[float | None]], list[bool]]) -> str:
    """How many completions of each prompt the scorer wants, a digit a prompt."""
    flags = np.array(wanted(result.scores[scorer])).reshape(-1, result.num_generations)
    return "".join(map(str, flags.sum(axis=1)))


def trial(name: str, settings: dict[str, Any], seed: int, args: argparse.Namespace, pool: Any) -> dict[str, Any]:
    settings = in_equal_parts(settings)
    keep, temperature = settings.pop("keep", None), settings.pop("explore_temperature", None)
    rows = np.random.default_rng(seed).permutation(len(pool))[:NUM_SAMPLES]
    folder = trial_folder(args.runs, "loops", name, seed)
    trainer, chosen, rewards = demo.make_trainer(
        TASK.name,
        folder,
        seed=seed,
        model=args.model,
        initial_pool=pool.select(rows.tolist()),
        **{**BUDGET, **settings},
    )
    if temperature is not None:  # while exploring only: the field would be the loss's temperature too
        trainer.generation_settings = dataclasses.replace(trainer.generation_settings, temperature=temperature)
    if keep is not None:
        trainer.rewards.functions = [keeping(rewards["reward"], keep, trainer.args.num_generations)]
    trainer.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sampling = dataclasses.replace(trainer.generation_settings, temperature=1.0, **chosen.sampling)
    systems = demo.systems(trainer.args.num_quantiles)
    wanted = [system for system in systems if system.trained or (name in VARIANTS["default"] and not system.quantile)]
    found, samples = measure_systems(trainer, wanted, rewards, sampling, NUM_GENERATIONS, seed, folder / "evaluation")
    return {
        "rounds": [{key: round(line[key], 4) for key in KEYS if line.get(key) is not None} for line in lines],
        "systems": [
            {
                "system": row["system"],
                **{role: row[role]["wanted"] for role in rewards},
                "perplexity": row["perplexity"],
                "dist_2": row["dist_2"],
                "counts": {role: counts(result, role, scorer.wanted) for role, scorer in rewards.items()},
            }
            for row, result in zip(found, samples, strict=True)
        ],
    }


def table(found: list[dict[str, Any]]) -> None:
    """As Markdown: % wanted by the reward and the independent scorer, and the difference to the default by prompt."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found:
        by_name.setdefault(row["name"], {})[row["seed"]] = {s["system"]: s for s in row["systems"]}
    [default] = VARIANTS["default"]
    print("| question | variant | system | seeds | reward | independent | against the default | perplexity | dist-2 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for question, variants in VARIANTS.items():
        for name in variants:
            of_seed = by_name.get(name, {})
            for system in dict.fromkeys(s for rows in of_seed.values() for s in rows):
                rows = {seed: systems[system] for seed, systems in of_seed.items()}

                def mean(key: str, rows: dict[int, dict[str, Any]] = rows) -> float:
                    return float(np.mean([row[key]["mean"] for row in rows.values()]))

                change = ""
                shared = [seed for seed in rows if system in by_name.get(default, {}).get(seed, {})]
                if shared and name != default:
                    of = [np.mean([digits(rows[s]["counts"]) for s in shared], axis=0)]
                    of.append(np.mean([digits(by_name[default][s][system]["counts"]) for s in shared], axis=0))
                    by = paired_bootstrap(*of)
                    change = f"{100 * by['mean']:+.1f} ({100 * by['low']:+.1f} to {100 * by['high']:+.1f})"
                print(
                    f"| {question} | {name} | {system} | {len(rows)} | {100 * mean('reward'):.1f} |"
                    f" {100 * mean('independent'):.1f} | {change} | {mean('perplexity'):.1f} | {mean('dist_2'):.2f} |"
                )


def digits(of: dict[str, str]) -> np.ndarray:
    """Each prompt's share of completions that the independent scorer wants."""
    return np.array([int(digit) for digit in of["independent"]]) / NUM_GENERATIONS


if __name__ == "__main__":
    run_trials(__doc__, RESULTS, VARIANTS, [0], trial, table)
