"""Quark against TRL's GRPO: the same model, adapter, prompts, reward, sampling and sample budget; one process each.

Each process trains, and measures the same held-out prompts as it goes, outside the clock: by the reward, by a scorer
that training never saw, and the perplexity under the original model. Told are the seconds and samples until a held-out
reward is reached, the end's figures, and the peak memory.

    python benchmarks/against_grpo.py --json FILE
    python benchmarks/against_grpo.py --grpo-learning-rate 3e-5 --samples 1920

GRPO asks the policy without a tag; Quark asks it for the best token, and with the dial at 2. TRL is in the extra `trl`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from quark_lm import QuarkConfig, QuarkTrainer, load_reward
from quark_lm.demo import TASKS, demo_prompts
from quark_lm.generation import GenerationSettings, complete_all, sample_seeds
from quark_lm.generation.hf import HFCompleter
from quark_lm.packaged import fastest_dtype, load_model
from quark_lm.policy import Head, completion_log_probs
from quark_lm.prompts import encode, split_held_out
from quark_lm.run_folder import hardware
from quark_lm.steering import eos_ids

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Measure(TrainerCallback):
    """Measures the held-out prompts every so many steps; its own time is taken off the clock."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any, held_out: Any, tokens: Any = None) -> None:
        self.args, self.tokenizer, self.tokens = args, tokenizer, tokens
        task = TASKS[args.task]
        self.scorers = {"reward": load_reward(task.reward), "independent": load_reward(task.independent)}
        self.prompts = encode(held_out, tokenizer)
        self.settings = GenerationSettings(max_completion_length=args.tokens, top_p=0.95)
        self.points: list[dict[str, Any]] = []
        self.explored: list[float] | None = None
        self.original: Any = None
        self.started = time.perf_counter()
        self.away = 0.0

    def measure(self, model: Any, step: int, samples: int) -> None:
        began = time.perf_counter()
        point = {"step": step, "samples": samples, "seconds": began - self.started - self.away}
        ways = (
            {"": (None, 1.0)}
            if self.tokens is None
            else {"": (self.tokens.best, 1.0), "dial2_": (self.tokens.best, 2.0)}
        )
        was_training = model.training
        model.eval()
        for prefix, (quantile, strength) in ways.items():
            ids, dials = self.prompts.ids, []
            if self.tokens is not None:
                pairs = list(zip(self.prompts.ids, self.prompts.token_at, strict=True))
                ids = [self.tokens.insert(p, quantile, at) for p, at in pairs]
                dials = [([self.tokens.insert(p, self.tokens.worst, at) for p, at in pairs], strength)]
            completer = HFCompleter(model, eos_ids(model, self.tokenizer))
            seeds = sample_seeds(11, num=len(ids))
            with torch.no_grad():
                batches = completer.complete(ids, seeds, self.settings, dials=dials)
                completions = complete_all(batches, len(ids))
                with self.reference(model) as (original, head):
                    nll = -completion_log_probs(
                        original, head, self.prompts.ids, completions, self.tokenizer.eos_token_id
                    )
            texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
            for name, scorer in self.scorers.items():
                values = scorer(prompts=self.prompts.texts, completions=texts, completion_ids=completions)
                point[f"{prefix}{name}"] = float(np.nanmean([np.nan if v is None else v for v in values]))
                point[f"{prefix}{name}_wanted"] = float(np.mean(scorer.wanted(values)))
            point[f"{prefix}perplexity"] = float(np.exp(nll.sum() / sum(map(len, completions))))
        model.train(was_training)
        self.points.append(point)
        print(json.dumps(point), file=sys.stderr, flush=True)
        self.away += time.perf_counter() - began

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        self.away = 0.0
        self.measure(model, 0, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.args.every == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step, self.samples(state))

    @contextlib.contextmanager
    def reference(self, model: Any) -> Iterator[tuple[Any, Head]]:
        """(model, head) of the original model: the adapter off, or a copy that was made before the first step."""
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield model, Head(model)
            return
        if self.original is None:
            self.original = copy.deepcopy(model).eval()
        yield self.original, Head(self.original)

    def samples(self, state: Any) -> int:
        raise NotImplementedError


def quark(args: argparse.Namespace, folder: Path) -> Measure:
    """Our default at the demo's strength of exploring, under the adapter that GRPO gets too."""
    texts = list(TASKS[args.task].tags)
    settings = {"explore_strength": args.explore_strength, "best_share": args.best_share}
    return _quark(args, folder, LoraConfig(**LORA), top_p=0.95, reward_token_texts=texts, **settings)


def authors(args: argparse.Namespace, folder: Path) -> Measure:
    """The authors' schedule: new random tokens, every quantile drawn, the whole model trained, its samples plain."""
    # their batch of 128 as four of 32, and at least as many draws; of so few steps their warm-up is less than one
    return _quark(
        args, folder, None, preset="authors", learning_rate=args.authors_learning_rate, warmup_steps=0,
        per_device_train_batch_size=32, gradient_accumulation_steps=4, steps_per_round=-(-args.steps // 16),
    )  # fmt: skip


def _quark(args: argparse.Namespace, folder: Path, peft_config: Any, **settings: Any) -> Measure:
    model, tokenizer = load_model(args.model, dtype=fastest_dtype() if peft_config else torch.float32)
    train, held_out = split_held_out(demo_prompts(args.task))
    config = QuarkConfig(
        str(folder),
        **{
            "num_rounds": 4,
            "steps_per_round": args.steps // 4,
            "prompts_first_round": args.samples * 2 // 5,
            "prompts_per_round": args.samples // 5,
            "max_completion_length": args.tokens,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "seed": args.seed,
            **settings,
        },
    )
    task = TASKS[args.task]
    trainer = QuarkTrainer(
        model, load_reward(task.reward), config, train, processing_class=tokenizer, peft_config=peft_config
    )

    class Sampled(Measure):
        def samples(self, state: Any) -> int:
            return len(trainer.open_pool())

    measure = Sampled(args, tokenizer, held_out.select(range(min(args.held_out, len(held_out)))), trainer.reward_tokens)
    steps = config.num_rounds * config.steps_per_round
    measure.args = argparse.Namespace(**{**vars(args), "every": max(1, steps * args.every // args.steps)})
    trainer.add_callback(measure)
    trainer.train()
    measure.explored = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    return measure


def grpo(args: argparse.Namespace, folder: Path) -> Measure:
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load_model(args.model, dtype=fastest_dtype())
    train, held_out = split_held_out(demo_prompts(args.task))
    batch = 32
    config = GRPOConfig(
        str(folder),
        max_steps=args.samples // batch,
        per_device_train_batch_size=batch,
        num_generations=args.grpo_generations,
        max_completion_length=args.tokens,
        learning_rate=args.grpo_learning_rate,
        beta=args.grpo_beta,
        top_p=0.95,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,  # TRL's default recomputes each forward, for memory; Quark's does not
        seed=args.seed,
    )
    reward = load_reward(TASKS[args.task].reward)
    trainer = GRPOTrainer(model, reward, config, train, processing_class=tokenizer, peft_config=LoraConfig(**LORA))

    class Sampled(Measure):
        def samples(self, state: Any) -> int:
            return state.global_step * batch

    measure = Sampled(args, tokenizer, held_out.select(range(min(args.held_out, len(held_out)))))
    # its own count of the steps differs from Quark's: the same number of measurements
    measure.args = argparse.Namespace(**{**vars(args), "every": max(1, config.max_steps // (args.steps // args.every))})
    trainer.add_callback(measure)
    trainer.train()
    return measure


def one(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        measure = {"quark": quark, "grpo": grpo, "authors": authors}[args.method](args, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    told = {"method": args.method, "points": measure.points, "explored": measure.explored, "peak_gib": peak}
    print(json.dumps(told))


def reached(points: list[dict[str, Any]], name: str, target: float) -> float | None:
    """Seconds until the figure passed the target, on the line between two measurements; None if it never did."""
    before = None
    for point in points:
        if point[name] >= target:
            if before is None or point[name] == before[name]:
                return point["seconds"]
            share = (target - before[name]) / (point[name] - before[name])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def compared(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios of the seconds to the same held-out reward: the lower of the two ends, which both reached.

    None where that end is no higher than the model's own reward: nothing was reached.
    """
    end = min(ours[-1]["reward"], others[-1]["reward"])
    rose = end > max(ours[0]["reward"], others[0]["reward"])
    seconds = {
        "quark": reached(ours, "reward", end),
        "quark_dial2": reached(ours, "dial2_reward", end),
        "other": reached(others, "reward", end),
    }

    def ratio(name: str) -> float | None:
        mine, other = seconds[name], seconds["other"]
        return mine / other if rose and mine is not None and other else None

    def at_end(point: dict[str, Any]) -> dict[str, float]:
        return {key: value for key, value in point.items() if key not in ("step",)}

    return {
        "ratio": ratio("quark"),
        "ratio_dial2": ratio("quark_dial2"),
        "held_out_reward": end,
        "seconds": seconds,
        "at_the_end": {"quark": at_end(ours[-1]), "other": at_end(others[-1])},
    }


def main(other: str = "grpo", name: str = "against_grpo", about: str | None = None) -> None:
    """Runs ours and the other, each in a process, and compares; the other is "grpo" or "authors"."""
    parser = argparse.ArgumentParser(description=about or __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", default="sentiment", choices=TASKS)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=3840)
    parser.add_argument("--steps", type=int, default=120, help="Quark's; GRPO takes one for 32 samples")
    parser.add_argument("--every", type=int, default=15, help="Quark's steps between two measurements")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--explore-strength", type=float, default=3.0, help="the dial while Quark explores")
    parser.add_argument("--best-share", type=float, default=0.75, help="of Quark's draws, those of the best quantile")
    parser.add_argument("--grpo-learning-rate", type=float, default=1e-4)
    parser.add_argument("--grpo-beta", type=float, default=0.0, help="TRL's default")
    parser.add_argument("--grpo-generations", type=int, default=8, help="TRL's default")
    parser.add_argument("--authors-learning-rate", type=float, default=1e-5, help="theirs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("quark", "grpo", "authors"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        one(args)
        return
    runs = {}
    for method in ("quark", other):  # one after the other: side by side each would slow the other
        command = [sys.executable, sys.argv[0], *(a for a in sys.argv[1:]), "--method", method]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ}).stdout
        runs[method] = json.loads(out.splitlines()[-1])
    result = {
        "name": name,
        **compared(runs["quark"]["points"], runs[other]["points"]),
        "memory_ratio": runs["quark"]["peak_gib"] / runs[other]["peak_gib"],
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "method")},
        "runs": runs,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
