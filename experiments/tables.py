"""Markdown tables of docs/results/*.json, so that no figure is typed by hand.

python experiments/tables.py demo-sentiment           # all seeds, and the mean over them
python experiments/tables.py demo-sentiment --short   # one row a system: the mean of the seeds and their range
python experiments/tables.py owt-train --part openwebtext
python experiments/tables.py --tasks                  # results/tasks.json, and the rows of docs/tasks.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FIGURES = [
    ("reward", lambda row: row["reward"]["wanted"], 100, "{:.1f}"),
    ("independent", lambda row: row["independent"]["wanted"], 100, "{:.1f}"),
    ("perplexity", lambda row: row["perplexity"], 1, "{:.1f}"),
    ("dist-2", lambda row: row["dist_2"], 1, "{:.2f}"),
    ("diversity", lambda row: row["diversity"], 1, "{:.2f}"),
]


# Which results stand for which task: (task, name, part, what its prompts are).
TASKS = [
    ("sentiment-positive", "demo-sentiment", "demo", "held-out demo prompts"),
    (
        "sentiment-positive",
        "demo-sentiment",
        "openwebtext",
        "OpenWebText, 96 negative and 96 neutral; trained on demo prompts",
    ),
    (
        "sentiment-positive",
        "owt-train",
        "openwebtext",
        "OpenWebText, 96 negative and 96 neutral; trained on others of them",
    ),
    ("toxicity", "demo-toxicity", "demo", "held-out demo prompts"),
    ("repetition", "demo-repetition", "demo", "held-out demo prompts"),
]


def tasks() -> list[dict[str, Any]]:
    """A row for each task, seed, kind of prompts and scorer: the share of completions that the scorer wants."""
    rows = []
    for task, name, part, prompts in TASKS:
        for path in sorted(RESULTS.glob(f"{name}-seed*.json")):
            run = json.loads(path.read_text())
            if part not in run:
                continue
            systems = {row["system"]: row for row in run[part]["systems"]}
            base, quark, dial2 = (systems[system] for system in ("base", "Quark", "Quark, dial at 2"))
            environment = run[part]["environment"]
            hardware = environment.get("cpu", environment["platform"])
            for role, scorer in run[part]["scorers"].items():
                rows.append(
                    {
                        "task": task,
                        "seed": run["seed"],
                        "prompts": prompts,
                        "scorer": f"{scorer['name']} {scorer['version']}",
                        "role": role,
                        "base": base[role]["wanted"],
                        "quark": quark[role]["wanted"],
                        "dial2": dial2[role]["wanted"],
                        # prompt by prompt; None in results that were made before it was measured
                        "quark_above_base": quark.get("against_base", {}).get(role),
                        "perplexity": {
                            "base": base["perplexity"]["mean"],
                            "quark": quark["perplexity"]["mean"],
                            "dial2": dial2["perplexity"]["mean"],
                        },
                        "command": run["command"],
                        "hardware": f"{environment['cpus']} CPU cores, {hardware}",
                        "version": environment["packages"]["quark-lm"],
                    }
                )
    return rows


def task_rows(rows: list[dict[str, Any]]) -> None:
    """The rows of docs/tasks.md: of each task, kind of prompts and scorer the mean over the seeds, and their range."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["prompts"], f"{row['scorer']} ({row['role']})"), []).append(row)
    last = None
    for (task, prompts, scorer), some in groups.items():
        if task != last:
            print(f"\n{task}\n")
            print("| prompts | scorer | seeds | base | Quark | dial at 2 | Quark - base, by prompt | perplexity |")
            print("|---" * 8 + "|")
        last = task
        shares = [spread([100 * row[key]["mean"] for row in some], "{:.1f}") for key in ("base", "quark", "dial2")]
        perplexity = [f"{np.mean([row['perplexity'][key] for row in some]):.1f}" for key in ("base", "quark", "dial2")]
        cells = [prompts, scorer, str(len(some)), *shares, above([row["quark_above_base"] for row in some])]
        cells.append(" / ".join(perplexity))
        print(f"| {' | '.join(cells)} |")


def above(differences: list[dict[str, float] | None]) -> str:
    """The mean of the seeds' differences in points, and the lowest and highest end of their 95% intervals."""
    known = [of for of in differences if of is not None]
    if len(known) < len(differences):
        return ""
    low, high = min(of["low"] for of in known), max(of["high"] for of in known)
    return f"{100 * np.mean([of['mean'] for of in known]):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def spread(values: list[float], form: str) -> str:
    """The mean of the seeds' figures, and the lowest and highest."""
    told = form.format(np.mean(values))
    return f"{told} ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of the results, without -seed<k>")
    parser.add_argument("--tasks", action="store_true", help="write docs/results/tasks.json")
    parser.add_argument("--short", action="store_true", help="a row a system: the mean of the seeds and their range")
    parser.add_argument("--part", default="demo", help="demo or openwebtext: the held-out prompts")
    args = parser.parse_args()
    if args.tasks:
        (RESULTS / "tasks.json").write_text(json.dumps(tasks(), indent=1) + "\n")
        task_rows(tasks())
        return
    if args.name is None:
        parser.error("name the results, such as demo-sentiment, or give --tasks")
    files = sorted(RESULTS.glob(f"{args.name}-seed*.json"))
    runs = {path.stem.rpartition("seed")[2]: json.loads(path.read_text()) for path in files}
    runs = {seed: run[args.part] for seed, run in runs.items() if args.part in run}
    print(f"| system | {'seeds' if args.short else 'seed'} | {' | '.join(name for name, *_ in FIGURES)} |")
    print("|---" * (len(FIGURES) + 2) + "|")
    for number, first in enumerate(next(iter(runs.values()))["systems"]):
        if args.short:
            values = [
                [times * f(run["systems"][number])["mean"] for run in runs.values()] for _, f, times, _ in FIGURES
            ]
            cells = [spread(some, form) for some, (*_, form) in zip(values, FIGURES, strict=True)]
            print(f"| {first['system']} | {len(runs)} | {' | '.join(cells)} |")
            continue
        for seed, run in runs.items():
            cells = []
            for _, figure, times, form in FIGURES:
                value = figure(run["systems"][number])
                mean, low, high = (form.format(times * value[key]) for key in ("mean", "low", "high"))
                cells.append(f"{mean} ({low} to {high})")
            print(f"| {first['system']} | {seed} | {' | '.join(cells)} |")
        if len(runs) > 1:
            means = [
                form.format(times * np.mean([figure(run["systems"][number])["mean"] for run in runs.values()]))
                for _, figure, times, form in FIGURES
            ]
            print(f"| **{first['system']}** | mean of {len(runs)} | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
