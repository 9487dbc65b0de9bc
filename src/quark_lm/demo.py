"""`quark demo`: a real model loses an unwanted behaviour on a laptop's CPU, and a table tells before from after.

The prompts are ours, split by a rule into train and held-out; the independent scorer of each task is of another family
and other labels than the reward, and the training never sees it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import export
from .errors import ConfigError
from .progress import printable
from .run_folder import begun_dtype, environment, write_json

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
            "num_generations": 4,
            "prompts_first_round": 500,
            "prompts_per_round": 192,
        },
        {"max_completion_length": 16, "top_p": 0.95},
    ),
    "repetition": Task(
        "repetition",
        "repetition(unit=tokens)",
        "repetition",
        "not looping",
        # tags about style ("very varied") make the untrained model loop more than it does without one
        (
            "Dull text that repeats itself again and again.\n",
            "Dull text that repeats itself.\n",
            "Plain text.\n",
            "Well-written text that says something new.\n",
            "Well-written text that always says something new.\n",
        ),
        {
            "max_completion_length": 48,
            "temperature": 0.4,
            "num_generations": 4,
            "quantile_scope": "prompt",
            "prompts_first_round": 192,
            "prompts_per_round": 96,
            "per_device_train_batch_size": 16,
            "steps_per_round": 40,
            "num_rounds": 3,
        },
        {"max_completion_length": 64, "temperature": 0.0},
    ),
}

# Half an hour on two busy cores; about ten minutes is the aim on idle ones, not measured yet.
BUDGET = {
    "num_rounds": 4,
    "steps_per_round": 45,
    "num_generations": 2,
    "prompts_first_round": 768,
    "prompts_per_round": 384,
}
# What `short` changes: three to seven minutes in all on two busy cores, for a first look and for CI.
SHORT = {"num_rounds": 2, "steps_per_round": 20, "prompts_first_round": 192, "prompts_per_round": 96}
_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


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
    console = console or Console()
    folder = Path(output_dir or f"runs/demo-{task}{'-short' if short else ''}{f'-seed{seed}' if seed else ''}")
    trainer, chosen, rewards = make_trainer(task, folder, seed=seed, short=short, **options)
    console.print(
        f"quark demo: {task}. A small language model learns to be {chosen.wanted}, from its own samples and a reward."
        f" Everything is kept in {folder}; Ctrl-C stops, the same command goes on.",
        highlight=False,
    )
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    results = {"task": task, "seed": seed, "short": short, "training_seconds_this_session": round(seconds, 1)}
    results |= measure(trainer, chosen, rewards, folder, num_generations, seed)
    write_json(folder / "results.json", results)
    export.save(trainer.model, trainer.processing_class, trainer.reward_tokens, folder / "model")
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
    **settings: Any,
) -> tuple[QuarkTrainer, Task, dict[str, Any]]:
    """(trainer, task, its two scorers), ready to train.

    Args:
        prompts, eval_prompts: files of the user's own, in place of those that Quark ships; without eval_prompts a
            fifth is held out.
        num_eval_prompts: held-out prompts of the table.
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
    train, held_out = split_held_out(load_prompts(prompts) if prompts else demo_prompts(task))
    if eval_prompts:
        held_out = load_prompts(eval_prompts)
    held_out = held_out.select(range(min(num_eval_prompts, len(held_out))))
    rewards = {"reward": load_reward(chosen.reward), "independent": load_reward(chosen.independent)}
    args = QuarkConfig(
        str(folder),
        **{
            "seed": seed,
            "reward_token_texts": list(chosen.tags),
            "eval_every": 0,
            "use_cpu": not torch.cuda.is_available(),
            **BUDGET,
            **chosen.settings,
            **(SHORT if short else {}),
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
    )
    return trainer, chosen, rewards


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
    from .evaluation.evaluate import Completions, complete_system, figures
    from .generation import GenerationSettings

    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    settings = GenerationSettings(barred=trainer.reward_tokens.barred, **task.sampling)
    assert trainer.eval_prompts is not None
    rows, samples = [], []
    for number, system in enumerate(systems(trainer.args.num_quantiles)):
        path = folder / "evaluation" / f"{number}.json"
        if path.is_file():
            result = Completions(**json.loads(path.read_text(encoding="utf-8")))
        else:
            result = complete_system(trainer, system, trainer.eval_prompts, rewards, settings, num_generations, seed)
            write_json(path, asdict(result))
        rows.append(figures(result, {name: reward.wanted for name, reward in rewards.items()}, seed))
        samples.append(result)
    base, quark = samples[0], samples[2]
    # the prompts on which the independent scorer liked the base least, so that there is something to see
    order = sorted(
        range(0, len(base.completions), num_generations),
        key=lambda i: (base.scores["independent"][i] is None, base.scores["independent"][i] or 0.0),
    )
    shown = [
        {"prompt": base.prompts[i // num_generations], "base": base.completions[i], "quark": quark.completions[i]}
        for i in order[: 3 * 8 : 8]
    ]
    return {
        "systems": rows,
        "samples": shown,
        "held_out_prompts": len(base.prompts),
        "completions_per_prompt": num_generations,
        "sampling": task.sampling,
        "scorers": {
            role: {"name": reward.scorer_name, "version": reward.scorer_version} for role, reward in rewards.items()
        },
        "model": trainer.policy.name,
        "settings": {name: getattr(trainer.args, name) for name in _TOLD},
        "environment": environment(),
    }


_TOLD = (
    "num_rounds", "steps_per_round", "prompts_first_round", "prompts_per_round", "num_generations",
    "per_device_train_batch_size", "learning_rate", "beta", "kl_direction", "draw", "explore_strength", "num_quantiles",
    "reward_token_style", "temperature", "top_p",
)  # fmt: skip


def show(console: Console, task: Task, results: dict[str, Any], folder: Path) -> None:
    table = Table(
        title=f"{results['held_out_prompts']} held-out prompts, {results['completions_per_prompt']} completions each;"
        " 95% intervals over prompts",
        caption="reward: the training's scorer. independent: another scorer, never trained on."
        " perplexity: under the original model.",
    )
    table.add_column("")
    for heading in (
        "mean reward",
        f"% {task.wanted}\nreward",
        f"% {task.wanted}\nindependent",
        "perplexity",
        "dist-2 / 3",
        "diversity",
    ):
        table.add_column(heading, justify="right")
    for row in results["systems"]:
        table.add_row(
            row["system"],
            f"{row['reward']['mean']['mean']:.3f}",
            _percent(row["reward"]["wanted"]),
            _percent(row["independent"]["wanted"]),
            f"{row['perplexity']['mean']:.1f}",
            f"{row['dist_2']['mean']:.2f} / {row['dist_3']['mean']:.2f}",
            f"{row['diversity']['mean']:.2f}",
        )
    console.print(table)
    for sample in results["samples"]:
        console.print(f"[bold]{escape(printable(sample['prompt']))}[/bold]", highlight=False)
        for name in ("base", "quark"):
            console.print(f"  {name:<6}{escape(printable(sample[name]))}", highlight=False)
    console.print(
        f"\nThe run is in {folder}: results.json, metrics.jsonl, pool/, model/ (a plain checkpoint). Next:\n"
        f'  quark generate {folder} "{results["samples"][0]["prompt"]}" --strength 2\n'
        f"  quark pool {folder}\n"
        "  quark train --help",
        highlight=False,
        markup=False,
    )


def _percent(interval: dict[str, float]) -> str:
    return f"{100 * interval['mean']:.1f} ({100 * interval['low']:.0f}-{100 * interval['high']:.0f})"
