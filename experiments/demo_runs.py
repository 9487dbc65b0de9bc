"""The demo's figures for several seeds, on its own held-out prompts and on others that it was not made for.

The others are OpenWebText prompts, for sentiment, where they are at hand. One run after another, never two at once; a
run that was cut off goes on, one that is done is skipped. Results go to docs/results/demo-<task>-seed<seed>.json.

    python experiments/demo_runs.py sentiment 0 1 2 --data DIR
    python experiments/demo_runs.py sentiment 0 1 2 --data DIR --train openwebtext --name owt-train \\
        --set explore_strength=4.0 --set dial_min_p=0.03 --set num_rounds=4 --set steps_per_round=45 \\
        --set best_share=0.5
    python experiments/demo_runs.py toxicity 0 --set beta=0.1 --name toxicity-beta01
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from rich.console import Console

from quark_lm import demo
from quark_lm.prompts import encode, load_prompts

RESULTS = Path(__file__).parents[1] / "docs" / "results"
# The negative and neutral prompts of the sentiment task (Liu et al. 2021), the first of each file: 192 in all.
OPENWEBTEXT = ("openwebtext_negative_prompts.jsonl", "openwebtext_neutral_prompts.jsonl")


def openwebtext(data: Path) -> Any:
    return concatenate_datasets(
        [load_prompts(data / name).select(range(96)).select_columns(["prompt"]) for name in OPENWEBTEXT]
    )


def openwebtext_train(data: Path, runs: Path) -> Path:
    """A file of the same two sets' other prompts; none is among those that are measured."""
    measured = set(openwebtext(data)["prompt"])
    sets = (load_prompts(data / name).select_columns(["prompt"]) for name in OPENWEBTEXT)
    texts = dict.fromkeys(text for rows in sets for text in rows["prompt"] if text not in measured)
    path = runs / "openwebtext-train.jsonl"
    runs.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def run(task: str, seed: int, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    name = f"{args.name or f'demo-{task}'}-seed{seed}"
    path = RESULTS / f"{name}.json"
    if path.exists():
        print(f"{name}: done")
        return
    folder = args.runs / name
    prompts = str(openwebtext_train(args.data, args.runs)) if args.train == "openwebtext" else None
    trainer, chosen, rewards = demo.make_trainer(task, folder, prompts=prompts, seed=seed, model=args.model, **settings)
    started = time.monotonic()
    trainer.train()
    seconds = folder / "seconds.txt"
    with seconds.open("a") as file:  # a run that went on has several lines
        file.write(f"{time.monotonic() - started:.0f}\n")
    console = Console(width=120)
    results = {}
    if args.train == "demo":
        results["demo"] = demo.measure(trainer, chosen, rewards, folder, 2, seed)
        demo.show(console, chosen, results["demo"], folder)
    if task == "sentiment" and args.data is not None:
        trainer.eval_prompts = encode(openwebtext(args.data), trainer.processing_class, trainer.reward_tokens.position)
        results["openwebtext"] = demo.measure(trainer, chosen, rewards, folder / "openwebtext", 2, seed)
        demo.show(console, chosen, results["openwebtext"], folder)
    for part in results.values():
        part.pop("samples")  # text stays out of the repository
    results |= {
        "task": task,
        "seed": seed,
        "command": f"python experiments/demo_runs.py {task} {seed}"
        + (" --data DIR" if "openwebtext" in results else "")
        + (" --train openwebtext" if args.train == "openwebtext" else "")
        + (f" --model {args.model}" if args.model != "smollm2" else "")
        + (f" --name {args.name}" if args.name else "")
        + "".join(f" --set {k}={v!r}" for k, v in settings.items()),
        "training_seconds": [int(line) for line in seconds.read_text().split()],
        "rounds": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=demo.TASKS)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--data", type=Path, help="folder with the OpenWebText prompts")
    parser.add_argument("--train", choices=["demo", "openwebtext"], default="demo", help="whose prompts to train on")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--name", help="of the results, in place of demo-<task>")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a QuarkConfig field")
    args = parser.parse_args()
    if args.train == "openwebtext" and args.data is None:
        parser.error("--train openwebtext reads the prompts in --data")
    settings = {}
    for item in args.set:
        key, _, value = item.partition("=")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    for seed in args.seeds:
        run(args.task, seed, args, settings)


if __name__ == "__main__":
    main()
