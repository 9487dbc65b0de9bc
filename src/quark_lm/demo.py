"""`quark demo`: a real model loses an unwanted behaviour on a laptop's CPU, and a table tells before from after.

The prompts are ours, split by a rule into train and held-out; the independent scorer of each task is of another family
and other labels than the reward, and the training never sees it.
"""

from __future__ import annotations

import json
import math
import shlex
import time
import warnings
import zlib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import export
from .errors import ConfigError, DataError
from .packaged import base_name
from .progress import make_console
from .run_folder import begun_dtype, check_folder, environment, finite, locked, write_json
from .shown import printable

if TYPE_CHECKING:
    from datasets import Dataset

    from .trainer import QuarkTrainer


@dataclass(frozen=True)
class Task:
    """What a demo unlearns.

    Attributes:
        reward, independent: names for `load_reward`; the second only measures.
        wanted: what the table calls a completion that a scorer wants.
        tags: the reward tokens' texts, worst first.
        settings: of `QuarkConfig`, where they differ from its defaults.
        sampling: of `GenerationSettings` for the table, the same for every system.
    """

    name: str
    reward: str
    independent: str
    wanted: str
    tags: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)


def _tags(topic: str, *words: str) -> tuple[str, ...]:
    return tuple(f"{topic}: {word}.\n" for word in words)


TASKS = {
    "sentiment": Task(
        "sentiment",
        "sentiment",
        "sentiment-independent",
        "positive",
        _tags("Sentiment", "very negative", "negative", "neutral", "positive", "very positive"),
        {"max_completion_length": 16, "top_p": 0.95},
        {"max_completion_length": 16, "top_p": 0.95},
    ),
    "toxicity": Task(
        "toxicity",
        "toxicity",
        "toxicity-independent",
        "not toxic",
        # "very rude" to "very polite" tell nothing to the untrained model (AUC .51); these start at .70
        _tags(
            "Tone",
            "very hateful and insulting",
            "hateful and insulting",
            "neutral",
            "kind and respectful",
            "very kind and respectful",
        ),
        {
            "max_completion_length": 16,
            "top_p": 0.95,
            # fewer samples of the base model are memorised in the first round
            "prompts_first_round": 2000,
        },
        {"max_completion_length": 16, "top_p": 0.95},
    ),
    "repetition": Task(
        "repetition",
        "repetition(unit=tokens)",
        "repetition",
        "not looping",
        # Tags that describe a style ("very varied") make the untrained model loop more than none does. The worst of
        # these is a loop and the best says nothing: AUC .89, and greedy text as without one (experiments/tags.py).
        (
            "Again and again and again and again.\n",
            "Again and again and again.\n",
            "Again and again.\n",
            "Again.\n",
            "...\n",
        ),
        {
            "max_completion_length": 48,
            "temperature": 0.4,
            "num_generations": 4,
            "quantile_scope": "prompt",
            # its tokens mean little for two rounds: asked for at 3 or more, the third explores text of no use
            "explore_strength": 2.0,
            "best_share": 0.5,
            "num_rounds": 4,
            "steps_per_round": 30,
            "prompts_first_round": 192,
            "prompts_per_round": 96,
            "per_device_train_batch_size": 16,
        },
        {"max_completion_length": 64, "temperature": 0.0},
    ),
}

# `make demo` takes seven minutes in all on two cores of an AMD EPYC with avx512_bf16 (docs/experiments.md).
BUDGET = {
    "explore_strength": 3.0,  # in half the time it gives what four rounds of 30 steps give at 2
    "num_rounds": 3,
    "steps_per_round": 25,
    "num_generations": 1,  # other prompts teach more than other samples of the same ones
    "prompts_first_round": 1536,
    "prompts_per_round": 768,
}
# What `short` changes: three to seven minutes in all on two busy cores, for a first look and for CI.
SHORT = {
    "num_rounds": 2,
    "steps_per_round": 20,
    "prompts_first_round": 384,
    "prompts_per_round": 192,
    "heldout_share": 0.25,  # of fewer rows nobody could tell whether the tokens mean anything
}
# Fewer prompts of a user's own than this are a few samples each, again and again, in the full budget's rounds.
_FEW_PROMPTS = 200
_SHOWN_SAMPLES = 3
_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def _short_budget(task: Task) -> dict[str, Any]:
    """SHORT, whose prompts are fewer where each has several completions."""
    each = task.settings.get("num_generations", 1)
    return {name: int(value) // each if name.startswith("prompts_") else value for name, value in SHORT.items()}


def demo_prompts(task: str) -> Dataset:
    """The prompts that Quark ships for a task, written for it."""
    from datasets import Dataset

    text = resources.files("quark_lm").joinpath(f"data/prompts/{task}.jsonl").read_text(encoding="utf-8")
    return Dataset.from_list([json.loads(line) for line in text.splitlines() if line.strip()])


def run_demo(
    task: str = "sentiment",
    *,
    output_dir: str | Path | None = None,
    seed: int = 0,
    short: bool = False,
    num_generations: int = 2,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains, measures, prints the table, and returns what it wrote to results.json.

    The same call goes on with a stopped run.

    Args:
        short: a budget of some minutes, for a first look.
        num_generations: completions of each held-out prompt in the table.
        options: of `make_trainer`.
    """
    console = console or make_console()
    default = f"runs/demo-{task}{'-short' if short else ''}{f'-seed{seed}' if seed else ''}"
    folder = Path(output_dir or default).expanduser()
    check_folder(folder)
    _print(console, "loading the model and the scorers ...")
    trainer, chosen, rewards = make_trainer(task, folder, seed=seed, short=short, **options)
    _print(
        console,
        f"quark demo: {task}. A small language model learns to be {chosen.wanted}, from its own samples and a reward."
        f" Everything is kept in {folder}; Ctrl-C stops, the same command goes on.",
    )
    with locked(folder):
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        results: dict[str, Any] = {
            "task": task,
            "seed": seed,
            "short": short,
            "prompts": options.get("prompts") or f"quark_lm/data/prompts/{task}.jsonl",
            "eval_prompts": options.get("eval_prompts") or "held out of them",
            "dtype": begun_dtype(folder),
            "adapter": _LORA,
            "training_seconds_this_session": round(seconds, 1),
        }
        results = results | measure(trainer, chosen, rewards, folder, num_generations, seed)
        results = finite(
            results | {"verdict": said(results["systems"], trainer.state.global_step, results["held_out_prompts"])}
        )
        write_json(folder / "results.json", results)
        export.save(trainer.model, trainer.processing_class, trainer.reward_tokens, folder / "model", card=results)
    show(console, chosen, results, folder)
    return results


def make_trainer(
    task: str,
    folder: Path,
    *,
    prompts: str | None = None,
    eval_prompts: str | None = None,
    seed: int = 0,
    short: bool = False,
    model: str = "smollm2",
    num_eval_prompts: int = 192,
    initial_pool: Dataset | None = None,
    **settings: Any,
) -> tuple[QuarkTrainer, Task, dict[str, Any]]:
    """(trainer, task, its two scorers), ready to train.

    Args:
        prompts, eval_prompts: files of the user's own, in place of those that Quark ships; without eval_prompts a
            fifth is held out.
        num_eval_prompts: held-out prompts of the table.
        initial_pool: of `QuarkTrainer`: scored samples in place of round 0's.
        settings: of `QuarkConfig`, above the task's own.
    """
    import torch
    from peft import LoraConfig

    from .config import QuarkConfig
    from .packaged import fastest_dtype, load_model
    from .prompts import load_prompts, split_held_out
    from .rewards import load_reward
    from .trainer import QuarkTrainer

    if task not in TASKS:
        raise ConfigError(f"There is no demo task {task!r}. Choose one of {', '.join(TASKS)}.")
    chosen = TASKS[task]
    all_prompts = load_prompts(prompts) if prompts else demo_prompts(task)
    train, held_out = (all_prompts, load_prompts(eval_prompts)) if eval_prompts else split_held_out(all_prompts)
    if not len(train) or not len(held_out):
        what = "held out" if len(train) else "trained on"
        raise DataError(
            f"{prompts} has too few prompts ({len(all_prompts)}): a fifth is held out by a rule on the text, and none"
            f" is {what}. Give more prompts, or held-out ones of your own (--eval-prompts)."
        )
    if prompts and not short and len(train) < _FEW_PROMPTS:
        warnings.warn(
            f"{prompts} gives {len(train)} prompts to train on, few for the full budget: its figures will be of little"
            " worth. Give some hundreds, or try --budget short.",
            stacklevel=2,
        )
    held_out = held_out.select(range(min(num_eval_prompts, len(held_out))))
    rewards = {"reward": load_reward(chosen.reward), "independent": load_reward(chosen.independent)}
    args = QuarkConfig(
        str(folder),
        **{
            "seed": seed,
            "reward_token_texts": list(chosen.tags),
            "eval_every": 0,
            "disable_tqdm": False,  # left alone, it turns our bars off where transformers is quiet, as in `quark`
            "use_cpu": not torch.cuda.is_available(),
            **BUDGET,
            **chosen.settings,
            **(_short_budget(chosen) if short else {}),
            **settings,
        },
    )
    # a run that goes on keeps the dtype that it was begun in, whatever is measured today
    language_model, tokenizer = load_model(model, dtype=begun_dtype(folder) or fastest_dtype())
    trainer = QuarkTrainer(
        language_model,
        rewards["reward"],
        args,
        train,
        held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(**_LORA, task_type="CAUSAL_LM"),
        initial_pool=initial_pool,
    )
    return trainer, chosen, rewards


def said(systems: list[dict[str, Any]], step: int, num_prompts: int) -> dict[str, Any]:
    """What the table says of the policy asked for its best token, in a word and a sentence: see `measuring.verdict`."""
    from .measuring import verdict

    of = {row["system"]: row for row in systems}
    line: dict[str, Any] = {"step": step}
    for prefix, row in (("base", of["base"]), ("eval", of["Quark"])):
        for role in ("reward", "independent"):
            mean = row[role]["mean"]
            if not math.isfinite(mean["mean"]):  # no completion has a value
                continue
            line[f"{prefix}_{role}"] = mean["mean"]
            if num_prompts > 1:  # one prompt alone has no error
                line[f"{prefix}_{role}_se"] = (mean["high"] - mean["low"]) / (2 * 1.96)
            line[f"{prefix}_{role}_missing"] = row[role]["missing"] / row["completions"]
        line |= {f"{prefix}_reference_perplexity": row["perplexity"]["mean"], f"{prefix}_dist_2": row["dist_2"]["mean"]}
    return verdict([line], ["independent"])


def systems(num_quantiles: int) -> list[Any]:
    """The table's rows."""
    from .evaluation.evaluate import System

    best = num_quantiles - 1
    return [
        System("base", trained=False),
        System("base, best token", trained=False, quantile=best),
        System("Quark", quantile=best),
        System("Quark, dial at 2", quantile=best, strength=2.0),
    ]


def measure(
    trainer: QuarkTrainer, task: Task, rewards: dict[str, Any], folder: Path, num_generations: int, seed: int
) -> dict[str, Any]:
    """The figures of the four systems on the trainer's held-out prompts.

    A system that was measured before a stop is not measured again.
    """
    from .evaluation.evaluate import measure_systems, scorer_facts, wanted_against
    from .generation import GenerationSettings

    settings = GenerationSettings(barred=trainer.reward_tokens.barred, **task.sampling)
    if not settings.temperature:
        num_generations = 1  # a second greedy completion would be the first again
    rows, samples = measure_systems(
        trainer, systems(trainer.args.num_quantiles), rewards, settings, num_generations, seed, folder / "evaluation"
    )
    base, quark = samples[0], samples[2]
    wanted = {role: reward.wanted for role, reward in rewards.items()}
    for row, result in zip(rows[1:], samples[1:], strict=True):
        row["against_base"] = wanted_against(result, base, wanted, seed)
    # by a rule that knows no score: what is shown is neither the best nor the worst of either
    order = sorted(range(len(base.prompts)), key=lambda i: zlib.crc32(base.prompts[i].encode()))
    shown = [
        {"prompt": base.prompts[i], "base": base.completions[at], "quark": quark.completions[at]}
        for i in order[:_SHOWN_SAMPLES]
        for at in [i * num_generations]
    ]
    return {
        "systems": rows,
        "samples": shown,
        "held_out_prompts": len(base.prompts),
        "completions_per_prompt": num_generations,
        "sampling": task.sampling,
        "scorers": {role: scorer_facts(role, reward) for role, reward in rewards.items()},
        "model": base_name(trainer.model),
        "settings": {name: getattr(trainer.args, name) for name in _TOLD},
        "environment": environment(),
    }


_TOLD = (
    "num_rounds", "steps_per_round", "prompts_first_round", "prompts_per_round", "num_generations",
    "per_device_train_batch_size", "learning_rate", "beta", "kl_direction", "draw", "best_share", "explore_strength",
    "num_quantiles", "reward_token_style", "temperature", "top_p",
)  # fmt: skip


def show(console: Console, task: Task, results: dict[str, Any], folder: Path) -> None:
    """Prints the table, a few samples, and what to do next; 80 columns are enough."""
    table = Table(
        title=f"{results['held_out_prompts']} held-out prompts, {results['completions_per_prompt']} completions each;"
        " below: 95% intervals",
        caption="reward: the training's scorer. indep.: another scorer, never trained on. ppl: perplexity under the"
        " original model. dist: different n-grams of a prompt's completions. div.: diversity within a completion.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("")
    share = f"% {task.wanted}"
    for heading in ("mean\nreward", f"{share}\nreward", f"{share}\nindep.", "ppl", "dist-2/3", "div."):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["systems"]:
        table.add_row(
            row["system"],
            _number(row["reward"]["mean"], "{:.3f}"),
            _percent(row["reward"]["wanted"]),
            _percent(row["independent"]["wanted"]),
            _number(row["perplexity"], "{:.1f}"),
            f"{_number(row['dist_2'], '{:.2f}')}/{_number(row['dist_3'], '{:.2f}')}",
            _number(row["diversity"], "{:.2f}"),
        )
    console.print(table)
    differences = {row["system"]: row["against_base"] for row in results["systems"] if "against_base" in row}
    if "Quark" in differences:
        names = {"reward": "the reward", "independent": "the independent scorer"}
        told = (f"{_points(differences['Quark'][role])} by {name}" for role, name in names.items())
        _print(console, f"\nQuark against the base, prompt by prompt, in points of % {task.wanted}: {', '.join(told)}.")
    if results.get("verdict"):
        _print(console, f"\nVerdict: {results['verdict']['verdict']}. {results['verdict']['text']}")
    _print(console, "\nHeld-out prompts, chosen by a checksum of their text and not by a score:")
    for sample in results["samples"]:
        _print(console, f"[bold]{escape(printable(sample['prompt']))}[/bold]", markup=True)
        for name in ("base", "quark"):
            _print(console, f"  {name:<6}{printable(sample[name])}")
    _print(console, f"\nThe run is in {folder}: results.json, metrics.jsonl, pool/, model/ (a plain checkpoint). Next:")
    commands = [
        # quoted: a stranger's prompt must not become a command of its own
        f"quark generate {folder} {shlex.quote(printable(results['samples'][0]['prompt']))} --strength 2",
        f"quark pool {folder}",
        "quark train --help",
    ]
    for command in commands:  # unwrapped: they are there to be copied
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def _print(console: Console, text: str, markup: bool = False) -> None:
    """Text that a terminal wraps at words, and that stays as it is in a pipe."""
    console.print(text, highlight=False, markup=markup, soft_wrap=not console.is_terminal)


def _number(interval: dict[str, Any], form: str) -> str:
    value = interval["mean"]
    return form.format(value) if value is not None and math.isfinite(value) else "none"


def _percent(interval: dict[str, Any]) -> str:
    """The share, and its interval on a second line."""
    share = _number({"mean": interval["mean"]}, "{:.1%}").rstrip("%")
    if share == "none":
        return share
    return f"{share}\n{100 * interval['low']:.0f}-{100 * interval['high']:.0f}"


def _points(difference: dict[str, Any]) -> str:
    """A difference of two shares in points of percent, with its interval."""
    mean, low, high = (difference[name] for name in ("mean", "low", "high"))
    if mean is None or not math.isfinite(mean):  # a scorer that gave no value
        return "none"
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
