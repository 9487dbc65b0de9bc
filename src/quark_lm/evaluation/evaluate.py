"""Measures systems on held-out prompts: completes, scores with several scorers, sums up with intervals over prompts.

A system is a model with a way to ask it: without a reward token, with one, or with the dial. All are sampled alike.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QuarkError
from ..files import parsed
from ..packaged import base_name
from ..run_folder import write_json
from . import metrics

if TYPE_CHECKING:
    from ..generation import GenerationSettings
    from ..prompts import EncodedPrompts
    from ..trainer import QuarkTrainer


@dataclass(frozen=True)
class System:
    """One row of the table: how the model is asked.

    Attributes:
        trained: the policy; False the original model.
        quantile: whose reward token is put in; None none.
        strength: of the dial.
    """

    name: str
    trained: bool = True
    quantile: int | None = None
    strength: float = 1.0


@dataclass
class Completions:
    """G completions of each of P prompts, flat (prompt p's are rows p x G to p x G + G - 1), and what was measured.

    Attributes:
        scores: for each scorer one value a completion, None where it gave none.
        nll: each completion's total under the original model in nats, without a reward token.
    """

    system: str
    prompts: list[str]
    num_generations: int
    completion_ids: list[list[int]]
    completions: list[str]
    nll: list[float]
    scores: dict[str, list[float | None]] = field(default_factory=dict)


def measure_systems(
    trainer: QuarkTrainer,
    systems: list[System],
    scorers: dict[str, Callable[..., Any]],
    settings: GenerationSettings,
    num_generations: int,
    seed: int,
    folder: Path | None = None,
) -> tuple[list[dict[str, Any]], list[Completions]]:
    """(each system's figures, its completions) on the trainer's held-out prompts.

    Args:
        scorers: by the name that the figures get; which values it wants tells only one that has `wanted`.
        folder: keeps the completions, so that a stopped call does not measure a system again. None: keeps nothing.
    """
    from ..resuming import digest

    assert trainer.eval_prompts is not None
    wanted = {name: getattr(function, "wanted", _nobody_knows) for name, function in scorers.items()}
    rows, samples = [], []
    for number, system in enumerate(systems):
        key = {
            "prompts": zlib.crc32(json.dumps(trainer.eval_prompts.texts).encode()),
            "num_generations": num_generations,
            "sampling": asdict(settings),
            "seed": seed,
            "scorers": {name: scorer_facts(name, function) for name, function in scorers.items()},
            "system": asdict(system),
            "step": trainer.state.global_step if system.trained else None,
            "run": digest(trainer) if system.trained and trainer.pool is not None else None,
            "model": base_name(trainer.model),
        }
        path = folder / f"{number}.json" if folder is not None else None
        result = _kept(path, key)
        if result is None:
            result = complete_system(trainer, system, trainer.eval_prompts, scorers, settings, num_generations, seed)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"key": key, "completions": asdict(result)})
        row = figures(result, wanted, seed)
        for name, function in scorers.items():
            if not hasattr(function, "wanted"):
                row[name].pop("wanted", None)
        rows.append(row)
        samples.append(result)
    return rows, samples


def scorer_facts(name: str, function: Any) -> dict[str, Any]:
    """What results tell of a scorer: its name and version, which of a user's own function is that of its file."""
    from .passes import Scorer

    return {"name": getattr(function, "scorer_name", name), "version": Scorer(name, name, function).version}


def complete_system(
    trainer: QuarkTrainer,
    system: System,
    prompts: EncodedPrompts,
    scorers: dict[str, Callable[..., Any]],
    settings: GenerationSettings,
    num_generations: int,
    seed: int,
) -> Completions:
    """Completes and scores; the completion of (prompt, number, seed) draws the same random numbers for every system.

    Each process its share of the prompts; all get the whole. The scorers are called as the rewards of a round: as many
    completions at once, again where one raises, with random numbers of their own.
    Raises: what a scorer raises, in every process.
    """
    from ..exploring import aside, chunk_size, gathered, own_samples, plain, score
    from ..generation import sample_seeds
    from ..policy import completion_log_probs
    from ..prompts import completion_texts
    from ..rewards.runner import RewardRunner

    if trainer.pool is not None:  # else the run has no folder yet
        trainer.fix_what_is_measured()
    num = len(prompts) * num_generations
    mine = own_samples(trainer, num, num_generations)
    own = prompts.select((mine // num_generations).tolist())
    seeds = np.array(sample_seeds(seed, 17, num=num))[mine].tolist()
    barred = trainer.reward_tokens.barred

    def complete() -> list[list[int]]:
        return trainer.complete(
            own,
            seeds,
            [system.quantile] * len(own),
            strength=system.strength,
            settings=settings,
            verb=system.name,
        )

    if system.trained:
        ids = complete()
    else:
        with trainer.as_reference():
            ids = complete()
    texts = completion_texts(trainer.processing_class, own, ids)
    with trainer.policy.evaluating(), trainer.policy.reference() as (reference, head):
        nll = -completion_log_probs(reference, head, own.ids, ids, trainer.pad_id, barred)
    part = {"ids": ids, "text": texts, "nll": nll.tolist(), "order": mine.tolist()}
    failed: QuarkError | None = None
    chunk = chunk_size(trainer, num_generations)
    try:
        for number, (name, function) in enumerate(scorers.items()):
            runner = RewardRunner([function], retries=trainer.args.reward_retries)
            part[f"score/{name}"] = []
            for start in range(0, len(texts), chunk):
                rows = range(start, min(start + chunk, len(texts)))
                with aside(seed, 17, number, trainer.accelerator.process_index, start):
                    batch = score(trainer, runner, own.select(rows), [texts[i] for i in rows], [ids[i] for i in rows])
                part[f"score/{name}"] += plain(batch.total)
    except QuarkError as error:
        failed = error
    trainer.fail_together(failed)
    whole = gathered(part, trainer.accelerator.num_processes)
    scores = {name: whole[f"score/{name}"] for name in scorers}
    return Completions(system.name, prompts.texts, num_generations, whole["ids"], whole["text"], whole["nll"], scores)


def figures(
    result: Completions, wanted: dict[str, Callable[[Sequence[float | None]], list[bool]]], seed: int = 0
) -> dict[str, Any]:
    """The table's figures of one system: every one as {"mean", "low", "high"}, a 95% bootstrap interval over prompts.

    For each scorer its mean and the share of completions that it wants; the perplexity under the original model
    (corpus: total NLL over total tokens, which outliers do not own), dist-2, dist-3, and the diversity within a
    completion.
    """
    groups = _grouped(result)
    out: dict[str, Any] = {"system": result.system, "completions": len(result.completions)}
    for name, values in result.scores.items():
        out[name] = {
            "mean": metrics.bootstrap_interval([metrics.mean_of([values[i] for i in g]) for g in groups], seed),
            "wanted": metrics.bootstrap_interval(_wanted_by_prompt(result, name, wanted[name]), seed),
            "missing": sum(v is None for v in values),
        }
    nll = np.array(result.nll)
    tokens = np.array([len(ids) for ids in result.completion_ids])
    group_nll = np.array([nll[g].sum() for g in groups])
    group_tokens = np.array([tokens[g].sum() for g in groups])
    out["perplexity"] = metrics.bootstrap_interval(
        len(groups), seed, statistic=lambda rows: float(np.exp(group_nll[rows].sum() / group_tokens[rows].sum()))
    )
    out["perplexity_trimmed_mean"] = metrics.conditional_perplexity(nll, tokens).trimmed_mean
    texts = [[result.completions[i] for i in g] for g in groups]
    for n in (2, 3):
        out[f"dist_{n}"] = metrics.bootstrap_interval(metrics.distinct_n_per_prompt(texts, n), seed)
    within = [[metrics.diversity(t) for t in group] for group in texts]
    out["diversity"] = metrics.bootstrap_interval([metrics.mean_of(group) for group in within], seed)
    return out


def wanted_against(
    result: Completions,
    base: Completions,
    wanted: dict[str, Callable[[Sequence[float | None]], list[bool]]],
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """For each scorer by how much the share of completions that it wants is above the base's, prompt by prompt.

    Both are of the same prompts. Each as `metrics.paired_bootstrap` has it.
    """
    by_prompt = {
        name: [_wanted_by_prompt(one, name, flags) for one in (result, base)] for name, flags in wanted.items()
    }
    return {name: metrics.paired_bootstrap(ours, theirs, seed) for name, (ours, theirs) in by_prompt.items()}


def _wanted_by_prompt(
    result: Completions, name: str, wanted: Callable[[Sequence[float | None]], list[bool]]
) -> list[float]:
    values = result.scores[name]
    flags = [None if v is None else w for v, w in zip(values, wanted(values), strict=True)]
    return [metrics.mean_of([flags[i] for i in group]) for group in _grouped(result)]


def _grouped(result: Completions) -> list[list[int]]:
    size = result.num_generations
    return [list(range(p * size, (p + 1) * size)) for p in range(len(result.prompts))]


def _kept(path: Path | None, key: dict[str, Any]) -> Completions | None:
    """The completions of this file, when they are those of the key."""
    if path is None:
        return None
    try:
        kept = parsed(path.read_bytes())
        if kept["key"] != json.loads(json.dumps(key)):
            return None
        result = Completions(**kept["completions"])
        result.nll = [math.nan if value is None else float(value) for value in result.nll]  # JSON has no NaN
        columns: list[list[Any]] = [result.completions, result.completion_ids, result.nll, *result.scores.values()]
        is_whole = {len(result.prompts) * result.num_generations} == set(map(len, columns))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):  # a damaged file
        return None
    return result if is_whole else None


def _nobody_knows(values: Any) -> list[bool]:
    return [False] * len(values)
