"""Explore: prompts -> Completer -> completions -> rewards -> the columns of a round of the pool; held-out prompts too.

What is sampled and scored is kept on disk batch by batch (`pool.PartialRound`), so that a stop, a kill or a reward that
fails costs one batch at most. A sample's draws are a function of (seed, round, its number), whatever the ranks.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]  # it ships no py.typed
from transformers import set_seed

from .errors import DataError, QuarkError, RewardError
from .files import checksum
from .generation import sample_seeds
from .policy import learned_digest
from .pool import PartialRound, read_initial
from .prompts import EncodedPrompts, as_completion, completion_texts, encode, is_held_out
from .rewards.runner import RewardBatch, RewardRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .reward_tokens import RewardTokens
    from .trainer import QuarkTrainer

# Keys of the random streams, so that no two things share one; 1 and 2 are those of quantiles.draw, since a seed's
# missing numbers count as zeros.
PROMPTS, SAMPLES, DROPOUT, EVAL, RANDOM_TOKEN, ASIDE = range(11, 17)
# Completions that the rewards get at once, when nothing else is set.
_REWARD_ROWS = 256


def explored_columns(trainer: QuarkTrainer, round: int) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """(the columns of what a round samples, its figures that the rows do not tell), the same on every rank.

    Raises: KeyboardInterrupt when the run was told to stop; what is done by then is kept.
    """
    args, tokens, accelerator = trainer.args, trainer.reward_tokens, trainer.accelerator
    wanted = args.prompts_first_round if round == 0 else args.prompts_per_round
    order = np.random.default_rng([args.seed, round, PROMPTS]).permutation(len(trainer.prompts))
    # more than there are: each prompt several times, with other draws
    chosen = np.repeat(np.resize(order, wanted or len(order)), args.num_generations)
    seeds = np.array(sample_seeds(args.seed, round, SAMPLES, num=len(chosen)))
    quantile = np.full(len(chosen), tokens.best)
    if args.explore_token == "random":
        quantile = np.random.default_rng([args.seed, round, RANDOM_TOKEN]).integers(tokens.num_codes, size=len(chosen))
    mine = own_samples(trainer, len(chosen), args.num_generations)
    prompts = trainer.prompts.select(chosen[mine].tolist())
    asked = [None if round == 0 else int(q) for q in quantile[mine]]
    strength = 1.0 if round == 0 else args.explore_strength
    trainer.fix_what_is_measured()
    kept = _kept(trainer, "round", round, len(chosen), prompts, chunk_size(trainer))
    with _batches_of(trainer, kept):
        completions = trainer.complete(
            prompts,
            seeds[mine].tolist(),
            asked,
            strength=strength,
            verb=f"round {round + 1} explore",
            kept=kept,
        )
    part, figures_of = _scored(trainer, prompts, completions, round, kept, len(chosen))
    part |= {
        "prompt_index": chosen[mine].tolist(),
        "reference_nll": trainer.reference_nll(part["prompt_ids"], part["completion_ids"]),
        "explored_with": asked,
        "strength": [strength] * len(completions),
        "order": mine.tolist(),
    }
    columns = gathered(part, accelerator.num_processes)
    told = [(kept.seconds, figures_of)]
    parts = gather_object(told) if accelerator.num_processes > 1 else told
    figures = _means([sums for _, sums in parts])
    sampled = sum(map(len, columns["completion_ids"]))
    return columns, {"tokens_per_second": sampled / max(1e-9, *(seconds for seconds, _ in parts)), **figures}


def own_samples(trainer: QuarkTrainer, num: int, each: int) -> np.ndarray:
    """Which of `num` samples, `each` of a prompt one after another, are this rank's: int64, rising.

    A prompt's samples stay together: a reward may compare them. `gathered` puts the ranks' parts together.
    """
    accelerator = trainer.accelerator
    return np.flatnonzero(np.arange(num) // each % accelerator.num_processes == accelerator.process_index)


def held_out_columns(
    trainer: QuarkTrainer, prompts: EncodedPrompts, quantile: int | None, keep: bool
) -> tuple[dict[str, np.ndarray], list[str], list[float]]:
    """(each scorer's values, NaN for none; texts; NLL a token of the first under the original model) of completions of
    held-out prompts, prompt by prompt, the same on every rank.

    Args: keep: whether batches are kept on disk as they come, until a checkpoint holds their figures.
    Raises: RewardError, GenerationError on every rank when one has it; KeyboardInterrupt when the run was told to stop.
    """
    args, accelerator = trainer.args, trainer.accelerator
    each = args.num_eval_generations
    seeds = np.array(sample_seeds(args.seed, EVAL, num=len(prompts) * each))
    mine = own_samples(trainer, len(seeds), each)
    own = prompts.select((mine // each).tolist())
    size = chunk_size(trainer, each)
    kept = None
    if keep:
        of = "base" if quantile is None else "step"
        sources = trainer.rewards.sources | (trainer.eval_rewards.sources if trainer.eval_rewards else {})
        # after a kill a GPU may learn other weights to this step than before it
        learned = learned_digest(trainer.model) if quantile is not None else None
        more = {"learned": learned, "reward_sources": checksum(sources)}
        kept = _kept(trainer, of, trainer.state.global_step, len(seeds), own, size, **more)
    with _batches_of(trainer, kept):
        ids = trainer.complete(own, seeds[mine].tolist(), [quantile] * len(mine), verb="held-out prompts", kept=kept)
    texts = completion_texts(trainer.processing_class, own, ids)

    def score_rows(rows: range) -> tuple[dict[str, Any], bool]:
        return _held_out_scores(trainer, own.select(rows), [texts[i] for i in rows], [ids[i] for i in rows]), True

    lines = _chunk_by_chunk(trainer, len(texts), size, (args.seed, EVAL), score_rows, kept, "held-out scores")
    # a function of the total's name may be one of several
    told = [{**line["rewards"], "reward": line["reward"]} for line in lines]
    part: dict[str, list[Any]] = {
        **{f"score/{name}": [value for of in told for value in of[name]] for name in (told[0] if told else ())},
        "text": texts,
        "nll": trainer.reference_nll(own.ids, ids),
        "order": mine.tolist(),
    }
    columns = gathered(part, accelerator.num_processes)
    texts, nll = columns.pop("text"), columns.pop("nll")
    arrays = {name.removeprefix("score/"): np.array(of, dtype=float) for name, of in columns.items()}
    return arrays, texts, [value for value in nll if value is not None]


def _held_out_scores(
    trainer: QuarkTrainer, prompts: EncodedPrompts, texts: list[str], ids: list[list[int]]
) -> dict[str, Any]:
    """`reward`, and by name the `rewards` of the training's scorers and of the independent ones."""
    batch = score(trainer, trainer.rewards, prompts, texts, ids)
    if batch.failures:  # a mean over what did not fail would be compared with one over all
        first = batch.failures[0]
        raise RewardError(
            f"Reward function {first.function} failed on the held-out prompts ({first.reason}), so there is"
            " nothing to compare. Mend it and give the same command again."
        )
    by_name = dict(batch.per_function)
    if trainer.eval_rewards:
        by_name |= score(trainer, trainer.eval_rewards, prompts, texts, ids).per_function
    return {"reward": plain(batch.total), "rewards": {name: plain(values) for name, values in by_name.items()}}


def _kept(
    trainer: QuarkTrainer, of: str, number: int, samples: int, own: EncodedPrompts, chunk: int, **more: Any
) -> PartialRound:
    """What is on disk already of a round's samples, or of the held-out ones of a step or of the base.

    Args: own: a rank's own part of the samples; more: what else they depend on.
    """
    completer, accelerator = trainer.completer, trainer.accelerator
    rows = completer.batch_rows or completer.fitting_rows(own.ids, trainer.generation_settings)
    key = {"samples": samples, "processes": accelerator.num_processes, "chunk": chunk, "rows": rows, **more}
    folder = trainer.pool_folder if of == "round" else trainer.held_out_folder
    return PartialRound(folder, number, accelerator.process_index, key, of)


@contextlib.contextmanager
def _batches_of(trainer: QuarkTrainer, kept: PartialRound | None) -> Iterator[None]:
    """Within it, completions come in batches of the rows with which `kept` was begun: others would round other digits.

    But who sets their size may have run out of memory with those.
    """
    completer = trainer.completer
    before = completer.batch_rows
    if kept is not None:
        completer.batch_rows = trainer.args.generation_batch_size or kept.key["rows"]
    try:
        yield
    finally:
        completer.batch_rows = before


def chunk_size(trainer: QuarkTrainer, each: int | None = None) -> int:
    """Completions that the rewards get at once: whole groups of one prompt's, `each` of them."""
    each = each or trainer.args.num_generations
    rows = trainer.args.reward_batch_size or _REWARD_ROWS
    return max(1, rows // each) * each


def _means(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    """The mean of each figure, of which every part has [sum, count]."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in parts:
        for name, (total, count) in part.items():
            sums[name][0] += total
            sums[name][1] += count
    return {name: total / count for name, (total, count) in sums.items() if count and math.isfinite(total)}


def _scored(
    trainer: QuarkTrainer,
    prompts: EncodedPrompts,
    completions: list[list[int]],
    round: int,
    kept: PartialRound,
    num_samples: int,
) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
    """(the pool's columns of these samples, [sum, count] of each figure that the rewards told), chunk by chunk.

    Args: num_samples: of the round, those of the other ranks too.
    Raises: RewardError when the rewards failed for more than `max_failed_rewards` of the round's, on every rank.
    """
    args, size = trainer.args, chunk_size(trainer)
    texts = completion_texts(trainer.processing_class, prompts, completions)
    failed, reason = 0, ""

    def too_many(failed: int, reason: str) -> RewardError | None:
        if failed <= args.max_failed_rewards * num_samples:
            return None
        name, _, why = reason.partition(": ")
        return RewardError(
            f"Reward function {name} failed ({why}) and left {failed} of {num_samples} completions of round"
            f" {round + 1} without a reward, more than max_failed_rewards={args.max_failed_rewards}. Mend it and give"
            " the same command again: what is scored is kept."
        )

    def score_rows(rows: range) -> tuple[dict[str, Any], bool]:
        nonlocal failed, reason
        of_rows = [texts[i] for i in rows], [completions[i] for i in rows]
        batch = score(trainer, trainer.rewards, prompts.select(rows), *of_rows)
        failed += batch.num_failed
        if batch.failures:
            first = batch.failures[0]
            reason = reason or f"{first.function}: {first.reason}"
            if error := too_many(failed, reason):
                raise error
        return _as_json(batch), not batch.failures  # else the next attempt, if there is one, asks again

    lines = _chunk_by_chunk(trainer, len(texts), size, (args.seed, round), score_rows, kept, f"round {round + 1} score")
    if trainer.accelerator.num_processes > 1:
        of_ranks = gather_object([(failed, reason)])
        failed, reason = sum(num for num, _ in of_ranks), next((why for _, why in of_ranks if why), "")
        trainer.fail_together(too_many(failed, reason))
    if failed and trainer.is_world_process_zero():
        warnings.warn(
            f"the rewards failed for {failed:,} of {num_samples:,} completions of round {round + 1} ({reason})",
            stacklevel=2,
        )
    columns: dict[str, list[Any]] = {
        "prompt_ids": prompts.ids,
        "completion_ids": completions,
        "token_at": prompts.token_at,
        "prompt": prompts.texts,
        "completion": texts,
        "reward": [value for line in lines for value in line["reward"]],
        "held_out": [is_held_out(p, args.heldout_share, "pool") for p in prompts.texts],
    }
    for kind in ("reward", "extra"):  # a chunk whose reward failed has no extras
        for name in dict.fromkeys(name for line in lines for name in line[f"{kind}s"]):
            values = [line[f"{kind}s"].get(name, [None] * len(line["reward"])) for line in lines]
            columns[f"{kind}/{name}"] = [value for part in values for value in part]
    parts = [line["figures"] for line in lines]
    return columns, {n: [sum(p[n][i] for p in parts if n in p) for i in (0, 1)] for n in {n for p in parts for n in p}}


def _chunk_by_chunk(
    trainer: QuarkTrainer,
    num: int,
    size: int,
    key: tuple[int, ...],
    score_rows: Callable[[range], tuple[dict[str, Any], bool]],
    kept: PartialRound | None,
    verb: str,
) -> list[dict[str, Any]]:
    """What `score_rows` tells of each `size` of `num` rows: (figures, whether they may be kept); kept ones are not
    asked for again.

    Raises: KeyboardInterrupt when the run was told to stop; what score_rows raised on one rank, on every rank.
    """
    scores = dict(kept.scores) if kept is not None else {}
    gave_up: QuarkError | None = None
    with trainer.display.bar(verb, num, "samples") as advance:
        for chunk, start in enumerate(range(0, num, size)):
            rows = range(start, min(start + size, num))
            if chunk not in scores:
                if trainer.interrupted:
                    break
                try:
                    with aside(*key, trainer.accelerator.process_index, chunk):
                        scores[chunk], may_be_kept = score_rows(rows)
                    if kept is not None and may_be_kept:
                        kept.add_scores(chunk, scores[chunk])
                except QuarkError as error:  # told to the other ranks below
                    gave_up = error
                    break
            advance(len(rows))
    trainer.fail_together(gave_up)
    there = sum(len(line["reward"]) for line in kept.scores.values()) if kept is not None else 0
    trainer.stop_together(f"during {verb}; {there} of {num} are kept")
    return [scores[chunk] for chunk in sorted(scores)]


def plain(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _as_json(batch: RewardBatch) -> dict[str, Any]:
    return {
        "reward": plain(batch.total),
        "rewards": {name: plain(values) for name, values in batch.per_function.items()},
        "extras": {name: [str(value) for value in values] for name, values in batch.extra.items()},
        "figures": {name: list(sums) for name, sums in batch.metric_sums.items() if math.isfinite(sums[0])},
    }


def score(
    trainer: QuarkTrainer, runner: RewardRunner, prompts: EncodedPrompts, texts: list[str], ids: list[list[int]]
) -> RewardBatch:
    """The rewards of these completions; a conversation's completion reaches the functions as a message."""
    completions = [as_completion(prompt, text) for prompt, text in zip(prompts.prompts, texts, strict=True)]
    return runner.score(prompts.prompts, completions, ids, prompts.columns, trainer.state)


def gathered(part: dict[str, list[Any]], num_processes: int) -> dict[str, list[Any]]:
    """The columns of all ranks in the order that each tells in its column `order`; the same on every rank."""
    parts = gather_object([part]) if num_processes > 1 else [part]
    order = np.argsort(np.concatenate([p["order"] for p in parts]), kind="stable")
    names = list(dict.fromkeys(name for p in parts for name in p if name != "order"))  # an idle rank has no extras
    merged = {name: [value for p in parts for value in p.get(name, [None] * len(p["order"]))] for name in names}
    return {name: [values[i] for i in order] for name, values in merged.items()}


@dataclass(frozen=True)
class InitialPool:
    """A user's own scored data, ready to be round 0."""

    columns: dict[str, list[Any]]

    @classmethod
    def read(
        cls,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        tokens: RewardTokens,
        prompts: EncodedPrompts,
        room: int,
        max_completion_length: int,
        heldout_share: float,
        eos: Sequence[int],
    ) -> InitialPool:
        """Reads and encodes the data.

        A completion that is shorter than `max_completion_length` gets the end-of-text token at its end, as a sampled
        one has; a longer one is kept whole, without.

        Args: prompts: of training, whose numbers equal prompts get; room: the most token ids of a prompt.
        Raises: DataError when a row cannot be used.
        """
        from datasets import Dataset

        data = read_initial(source)
        encoded = encode(Dataset.from_dict({"prompt": data["prompt"]}), tokenizer, tokens.position, room)
        ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in data["completion"]]
        full = [i for i, completion in enumerate(ids) if completion]
        if not full:
            raise DataError("initial_pool: no completion has a token, so round 0 would be empty. Give texts.")
        if len(full) < len(ids):
            warnings.warn(f"initial_pool: left out {len(ids) - len(full)} completions without a token.", stacklevel=2)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(eos), None)
        for i in full:
            if len(ids[i]) < max_completion_length and eos and ids[i][-1] not in eos:
                ids[i].append(end)
            if len(encoded.ids[i]) + len(ids[i]) > room + max_completion_length:
                raise DataError(
                    f"initial_pool: the prompt and the completion of row {i} have {len(encoded.ids[i]) + len(ids[i])}"
                    f" tokens, but only {room + max_completion_length} fit beside the reward token in the model's"
                    " context. Shorten the row or leave it out."
                )
        encoded = encoded.select(full)
        numbers = {text: number for number, text in reversed(list(enumerate(prompts.texts)))}
        for text in encoded.texts:
            numbers.setdefault(text, -2 - len(numbers))  # -1 is nobody's
        columns: dict[str, list[Any]] = {
            "prompt_index": [numbers[text] for text in encoded.texts],
            "prompt_ids": encoded.ids,
            "completion_ids": [ids[i] for i in full],
            "token_at": encoded.token_at,
            "prompt": encoded.texts,
            "completion": [data["completion"][i] for i in full],
            "reward": [data["reward"][i] for i in full],
            "explored_with": [None] * len(full),
            "strength": [1.0] * len(full),
            "held_out": [is_held_out(p, heldout_share, "pool") for p in encoded.texts],
        }
        return cls(columns)

    @property
    def told(self) -> list[str]:
        """What makes it this data and no other, as text."""
        rows = zip(*(self.columns[name] for name in ("prompt", "completion", "reward")), strict=True)
        return [repr(row) for row in rows]


@contextlib.contextmanager
def aside(*key: int) -> Iterator[None]:
    """Random numbers that are a function of the key alone; after it the run's own go on as if none had been drawn.

    A reward function may draw some; a resumed run, which finds its rewards on disk, would then drop out other units.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            set_seed(sample_seeds(*key, ASIDE, num=1)[0] % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class Watch:
    """Times what is sampled and hands it to `kept` as it comes; stops between two batches when asked to."""

    def __init__(self, trainer: QuarkTrainer, kept: PartialRound | None) -> None:
        self.trainer = trainer
        self.kept = kept

    def __call__(
        self, batches: Iterator[tuple[list[int], list[list[int]]]], advance: Any
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        started = time.monotonic()
        while not self.trainer.interrupted:
            batch = next(batches, None)
            if batch is None:
                return
            if self.kept is not None:
                self.kept.add_completions(*batch, time.monotonic() - started)
            advance(len(batch[0]))
            yield batch
            started = time.monotonic()
