"""What each choice is worth, on one fixed pool: the same samples, other ways to learn from them.

The samples are the base model's own of the sentiment demo's prompts, scored once. Each trial learns from them for one
round and reports what a small budget can tell apart without sampling: `token_auc` on held-out prompts' rows (.5 is
nothing; the standard error is about .025, but all trials see the same rows, so differences are surer), the NLL of drawn
and of held-out rows (their gap is memorising), and the KL to the base. Three minutes a trial on two cores; a trial that
is done is not done again; a GPU is used where there is one. Figures: docs/results/ablations.json.

    python experiments/ablations.py --seeds 0
    python experiments/ablations.py --seeds 0 1 2 --only draw beta
    python experiments/ablations.py --table
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from quark_lm import demo
from quark_lm.run_folder import hardware

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "ablations.json"
NUM_SAMPLES, STEPS, POOL_SEED = 3072, 25, 1000
TASK = demo.TASKS["sentiment"]
WORDS = [" terrible", " bad", " okay", " good", " wonderful"]
COMMON = {
    "num_rounds": 1,
    "steps_per_round": STEPS,
    "eval_every": 0,
    "heldout_share": 0.33,
    "meaning_rows": 1024,
    "save_strategy": "no",
}
# What differs from the default, by the question that it answers.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {"default": {}},
    "token style": {
        "new token, random row": {"reward_token_style": "embedding"},
        "new token, row of a word": {
            "reward_token_style": "embedding",
            "reward_token_init": "words",
            "reward_token_texts": WORDS,
        },
        "tag of one word": {"reward_token_texts": WORDS},
    },
    "position": {"tag before the completion": {"reward_token_position": "before_completion"}},
    "draw": {
        "all quantiles": {"draw": "all"},
        "balanced": {"draw": "balanced"},
        "best only": {"draw": "best"},
        "three draws in four of the best": {"best_share": 0.75},
    },
    "quantiles": {
        "K = 2": {"num_quantiles": 2, "reward_token_texts": [TASK.tags[0], TASK.tags[-1]]},
        "K = 3": {"num_quantiles": 3, "reward_token_texts": list(TASK.tags[::2])},
        "K = 10": {
            "num_quantiles": 10,
            "reward_token_texts": [TASK.tags[0], *(f"Sentiment: {i} of 10.\n" for i in range(1, 9)), TASK.tags[-1]],
        },
    },
    "beta": {"beta 0": {"beta": 0.0}, "beta 0.2": {"beta": 0.2}},
    "KL": {"reverse KL": {"kl_direction": "reverse"}},
    "entropy": {"entropy 0.06": {"entropy_coef": 0.06}},
    "token dropout": {"token dropout 0.1": {"token_dropout": 0.1}},
    "learning rate": {"lr 2e-4": {"learning_rate": 2e-4}, "lr 1e-3": {"learning_rate": 1e-3}},
    "data": {"512 samples": {"num_samples": 512}, "1,536 samples": {"num_samples": 1536}},
    "steps": {"50 steps": {"steps_per_round": 50}, "100 steps": {"steps_per_round": 100}},
    # the AUC's own rows are then the best and worst of each prompt's samples, a harder question than the others'
    "scope": {"quantiles of each prompt": {"quantile_scope": "prompt", "num_generations": 2}},
}


def in_equal_parts(settings: dict[str, Any]) -> dict[str, Any]:
    """With the two ends drawn equally often, the default before what these trials found."""
    return {**({"best_share": 0.5} if settings.get("draw", "ends") == "ends" else {}), **settings}


def make_pool(folder: Path, model: str) -> Dataset:
    """The base model's samples of the demo's training prompts with their rewards, made once."""
    path = folder / "pool.jsonl"
    if not path.exists():
        trainer, *_ = demo.make_trainer(
            TASK.name, folder / "sampling", seed=POOL_SEED, model=model, **COMMON, prompts_first_round=NUM_SAMPLES
        )
        trainer.explore(0)
        table = trainer.open_pool().to_table().select(["prompt", "completion", "reward"])
        rows = [row for row in table.to_pylist() if row["reward"] is not None]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])


def trial_folder(runs: Path, script: str, name: str, seed: int) -> Path:
    """Where a trial's run is kept; `loops.py` has variants of the same names."""
    return runs / script / f"{''.join(c if c.isalnum() else '-' for c in name)}-seed{seed}"


def trial(name: str, settings: dict[str, Any], seed: int, args: argparse.Namespace, pool: Dataset) -> dict[str, Any]:
    settings = in_equal_parts(settings)
    num = settings.pop("num_samples", len(pool))
    rows = np.random.default_rng(seed).permutation(len(pool))[:num]
    folder = trial_folder(args.runs, "one-pool", name, seed)
    trainer, *_ = demo.make_trainer(
        TASK.name,
        folder,
        seed=seed,
        model=args.model,
        initial_pool=pool.select(rows.tolist()),
        **{**COMMON, **settings},
    )
    trainer.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = {key: value for line in lines for key, value in line.items()}
    keys = ["initial_token_auc", "token_auc", "token_auc_se", "nll", "heldout_nll"]
    keys += ["kl"] if trainer.args.beta else []  # without its weight the KL is not computed
    return {key: round(told[key], 4) for key in keys if told.get(key) is not None}


def table(found: list[dict[str, Any]]) -> None:
    """As Markdown: the mean over the seeds, and the difference to the default on the same seeds."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found:
        by_name.setdefault(row["name"], {})[row["seed"]] = row
    base = by_name.get("default", {})
    print("| question | variant | seeds | token_auc before | after | against the default | NLL drawn / held out | KL |")
    print("|---|---|---|---|---|---|---|---|")
    for question, variants in VARIANTS.items():
        for name in variants:
            rows = by_name.get(name)
            if not rows:
                continue

            def mean(key: str, rows: dict[int, dict[str, Any]] = rows) -> float:
                return float(np.mean([row.get(key, math.nan) for row in rows.values()]))

            shared = [rows[s]["token_auc"] - base[s]["token_auc"] for s in rows if s in base]
            low, high = (f"{f(shared):+.3f}" if shared else "" for f in (min, max))
            kl = "not told" if math.isnan(mean("kl")) else f"{mean('kl'):.2f}"
            change = "" if name == "default" else low if low == high else f"{low} to {high}"
            print(
                f"| {question} | {name} | {len(rows)} | {mean('initial_token_auc'):.3f} | {mean('token_auc'):.3f} |"
                f" {change} | {mean('nll'):.2f} / {mean('heldout_nll'):.2f} | {kl} |"
            )


def run_trials(
    text: str | None,
    results: Path,
    variants: dict[str, dict[str, dict[str, Any]]],
    seeds: list[int],
    trial: Callable[..., dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], None],
) -> None:
    """The command line of a script of trials: each variant and seed that `results` lacks, one after another."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--only", nargs="+", choices=list(variants), help="questions; the default is always there")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--results", type=Path, default=results, help="one file a process, where several share a GPU")
    parser.add_argument("--table", action="store_true", help="print what was found, run nothing")
    args = parser.parse_args()
    if args.results != results and args.runs == parser.get_default("runs"):
        parser.error("--results is for one of several processes, which needs --runs of its own too")
    results = args.results
    found = json.loads(results.read_text()) if results.exists() else []
    if args.table:
        table(found)
        return
    pool = make_pool(args.runs, args.model)
    for seed in args.seeds:
        for question, named in variants.items():
            if args.only and question not in ("default", *args.only):
                continue
            for name, settings in named.items():
                if any(row["name"] == name and row["seed"] == seed for row in found):
                    continue
                row = {
                    "question": question,
                    "name": name,
                    "seed": seed,
                    **trial(name, settings, seed, args, pool),
                    "hardware": hardware(),
                }
                print(str(row)[:400], flush=True)
                found.append(row)
                results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_trials(__doc__, RESULTS, VARIANTS, [0, 1, 2], trial, table)
