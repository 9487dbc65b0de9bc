"""Measures systems on held-out prompts: completes, scores with several scorers, sums up with intervals over prompts.

A system is a model with a way to ask it: without a reward token, with one, or with the dial. All are sampled alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QuarkError
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


def complete_system(
    trainer: QuarkTrainer,
    system: System,
    prompts: EncodedPrompts,
    scorers: dict[str, Callable[..., list[float | None]]],
    settings: GenerationSettings,
    num_generations: int,
    seed: int,
) -> Completions:
    """Completes and scores; the completion of (prompt, number, seed) draws the same random numbers for every system.

    Each process its share of the prompts; all get the whole. Raises: what a scorer raises, in every process.
    """
    from ..exploring import gathered, own_samples
    from ..generation import sample_seeds
    from ..policy import completion_log_probs

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
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    with trainer.policy.evaluating(), trainer.policy.reference() as (reference, head):
        nll = -completion_log_probs(reference, head, own.ids, ids, trainer.pad_id, barred)
    part = {"ids": ids, "text": texts, "nll": nll.tolist(), "order": mine.tolist()}
    failed: QuarkError | None = None
    try:
        for name, scorer in scorers.items() if texts else ():
            values = scorer(
                prompts=own.prompts,
                completions=texts,
                completion_ids=ids,
                **own.columns,
                trainer_state=trainer.state,
            )
            part[f"score/{name}"] = [None if v is None else float(v) for v in values]
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
