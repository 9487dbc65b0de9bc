"""QuarkTrainer: the algorithm on `transformers.Trainer`. One round is one epoch.

    for each round:
        explore    prompts -> Completer -> completions -> rewards -> Pool     (round 0 without a reward token)
        quantize   Pool -> ranks -> quantiles, each named by a reward token
        learn      draws -> collator -> policy -> loss                         (steps_per_round optimizer steps)

Explore and quantize happen in `on_epoch_begin`, which fires on every rank after the model is wrapped and before the
loader is read.
Source: Lu et al. 2022, algorithm 1.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]  # it ships no py.typed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from . import quantiles
from .collator import Collator, Draw
from .config import QuarkConfig
from .errors import ConfigError, DataError, PoolError, RewardError
from .generation import GenerationSettings, complete_all, sample_seeds
from .generation.hf import HFCompleter
from .loss import LossSettings, quark_loss
from .policy import Policy, causal_lm, check_head, completion_log_probs, completion_states, disable_dropout
from .pool import Pool, read_initial
from .progress import Display, LearnBar
from .prompts import EncodedPrompts, checked, encode, is_conversational, is_held_out
from .reward_tokens import RewardTokens
from .rewards import load_reward
from .rewards.runner import RewardBatch, RewardRunner
from .run_folder import MARKER, MetricsFile, claim, describe, write_json
from .steering import eos_ids

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RewardFunc = str | Callable[..., Any]

# Keys of the random streams, so that no two things share one.
_PROMPTS, _SAMPLES, _DROPOUT, _EVAL, _RANDOM_TOKEN, _ASIDE = range(1, 7)
# Samples of a round whose perplexity under the original model is measured; the mean of so many is steady enough.
_PERPLEXITY_ROWS = 128


class QuarkTrainer(Trainer):
    """Trains a causal language model by Quark.

    Example:
        ```python
        def reward_short(completions, **kwargs):
            return [-float(len(c)) for c in completions]

        trainer = QuarkTrainer("HuggingFaceTB/SmolLM2-135M", reward_short, QuarkConfig("runs/short"), prompts)
        trainer.train()
        ```

    Args:
        model: a causal LM, or its name.
        reward_funcs: one or several: a function with TRL's signature, a named scorer, a model's name, or
            "module:function".
        args: the settings; None: `QuarkConfig("quark_output")`.
        train_dataset: with a `prompt` column (text or messages); other columns reach the reward functions.
        eval_dataset: held-out prompts, completed and scored every `eval_every` rounds.
        processing_class: the tokenizer; None: the one of the model's name.
        reward_processing_classes: tokenizers of reward models; None: their own.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: an adapter's settings; the reference is then the model with the adapter off, and costs nothing.
        eval_reward_funcs: scorers that only measure the held-out prompts, so that a rise of the reward alone is seen.
        reward_tokens: made by the caller; None: made from `args`.
        initial_pool: a user's own scored data as round 0: a file, data set or table with prompt, completion and reward.

    Raises: ConfigError, DataError, ModelError or RewardError, each with what to do.
    """

    # compute_loss divides by the tokens of the whole step (transformers >= 5.19 reads this)
    loss_is_scaled_for_ga = True

    # Trainer's own, which it also allows to be None, to be set late, or to be an image processor
    model: nn.Module
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        args: QuarkConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        *,
        eval_reward_funcs: RewardFunc | Sequence[RewardFunc] = (),
        reward_tokens: RewardTokens | None = None,
        initial_pool: Any = None,
    ) -> None:
        args = args or QuarkConfig("quark_output")
        model, tokenizer = _load(model, processing_class, args)
        check_head(model)
        if train_dataset is None:
            raise DataError("train_dataset is missing, so there is nothing to sample from. Give a data set of prompts.")
        train_dataset = checked(train_dataset)
        eval_dataset = checked(eval_dataset, "eval_dataset") if eval_dataset is not None else None

        if hasattr(model, "peft_config") and reward_tokens is None and args.reward_token_style == "embedding":
            raise ConfigError(
                "The model has an adapter already, which would leave the rows of new reward tokens as they start. Give"
                " the bare model and a peft_config, or use reward_token_style='text'."
            )
        self.reward_tokens = reward_tokens or RewardTokens.create(
            model,
            tokenizer,
            num_quantiles=args.num_quantiles,
            style=args.reward_token_style,
            texts=args.reward_token_texts,
            init=args.reward_token_init,
            position=args.reward_token_position,
            seed=args.seed,
        )
        if self.reward_tokens.num_quantiles != args.num_quantiles:
            raise ConfigError(
                f"num_quantiles={args.num_quantiles}, but the given reward_tokens name"
                f" {self.reward_tokens.num_quantiles} quantiles. Make the two equal."
            )
        room = _context_length(model) - args.max_completion_length - self.reward_tokens.longest
        position = self.reward_tokens.position
        self.prompts = encode(train_dataset, tokenizer, position, room)
        self.eval_prompts = encode(eval_dataset, tokenizer, position, room) if eval_dataset is not None else None

        if peft_config is not None:
            model = _with_adapter(model, peft_config, self.reward_tokens, args.seed)
        if hasattr(model, "peft_config"):
            # peft 0.21 would ask the hub at each save if the vocabulary grew; the new rows are saved by themselves
            keep_rows = functools.partial(model.save_pretrained, save_embedding_layers=False)
            model.save_pretrained = keep_rows  # type: ignore[method-assign]
        if args.disable_dropout:
            disable_dropout(model)
        if args.learning_rate_is_default and hasattr(model, "peft_config"):
            args.learning_rate = 6e-4

        pad_id = tokenizer.pad_token_id
        if pad_id is None:  # padding is masked everywhere, so any id serves
            pad_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        self.pad_id = int(pad_id)
        super().__init__(
            model,
            args,
            data_collator=Collator(self.reward_tokens, self.pad_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Trainer then counts the labels of a step, over micro-batches and ranks, and hands the number to compute_loss
        self.model_accepts_loss_kwargs = True
        self.args: QuarkConfig = args
        self.policy = Policy(self.model)
        self.loss_settings = LossSettings(
            beta=args.beta,
            kl_direction=args.kl_direction,
            entropy_coef=args.entropy_coef,
            mask_reward_tokens=args.mask_reward_tokens,
            barred=self.reward_tokens.barred,
            chunk_elements=args.loss_chunk_elements,
        )
        self.rewards = RewardRunner(_reward_functions(reward_funcs, reward_processing_classes), args.reward_weights)
        measuring = _reward_functions(eval_reward_funcs, None)
        self.eval_rewards = RewardRunner(measuring) if measuring else None
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        self.completer = HFCompleter(self.model, eos_ids(model, tokenizer), args.generation_batch_size, autocast)
        self.initial_pool = initial_pool

        self.folder = Path(cast(str, args.output_dir))  # TrainingArguments has put its default in None's place
        self.metrics_file = MetricsFile(self.folder / "metrics.jsonl")
        self.display = Display(self.is_world_process_zero(), bars=not args.disable_tqdm)
        self.pool: Pool | None = None
        self.draws: list[Draw] = []
        self.round_metrics: dict[str, Any] = {}
        self.interrupted = False
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._quantiles = np.zeros(0, np.int64)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.learn_bar = LearnBar(self)
        self.add_callback(self.learn_bar)
        self.add_callback(_Rounds(self))

    # -- explore

    def explore(self, round: int) -> None:
        """Samples the round's prompts, scores the samples and adds them to the pool; a round that is there stays.

        Round 0 samples the model as it is; later rounds ask for the best quantile, with the dial at `explore_strength`.
        """
        pool = self._open_pool()
        if pool.has_round(round):
            return
        with _aside(self.args.seed, round, self.accelerator.process_index):
            if round == 0 and self.initial_pool is not None:
                columns = self._initial_columns()
            else:
                columns = self._explore_columns(round)
        self._check_rewards(round, columns["reward"])  # before they are on disk: a mended reward can then go on
        if self.is_world_process_zero():
            pool.append(round, columns)
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            self.pool = Pool.open(self.folder / "pool")

    def _explore_columns(self, round: int) -> dict[str, list[Any]]:
        args = self.args
        wanted = args.prompts_first_round if round == 0 else args.prompts_per_round
        order = np.random.default_rng([args.seed, round, _PROMPTS]).permutation(len(self.prompts))
        chosen = np.repeat(order[:wanted], args.num_generations)
        seeds = np.array(sample_seeds(args.seed, round, _SAMPLES, num=len(chosen)))
        quantile = np.full(len(chosen), self.reward_tokens.best)
        if args.explore_token == "random":
            quantile = np.random.default_rng([args.seed, round, _RANDOM_TOKEN]).integers(
                self.reward_tokens.num_quantiles, size=len(chosen)
            )
        # each rank its own samples; a sample's draws come from its seed, so the ranks do not change them
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        prompts = self.prompts.select(chosen[mine].tolist())
        started = time.monotonic()
        completions = self.complete(
            prompts,
            seeds[mine].tolist(),
            [None if round == 0 else int(q) for q in quantile[mine]],
            strength=1.0 if round == 0 else args.explore_strength,
            verb=f"round {round + 1} explore",
        )
        seconds = time.monotonic() - started
        part = self._scored(prompts, completions, verb=f"round {round + 1} score")
        reference_nll = self._reference_nll(part["prompt_ids"], part["completion_ids"])
        part |= {
            "prompt_index": chosen[mine].tolist(),
            "reference_nll": reference_nll,
            "explored_with": [None if round == 0 else int(q) for q in quantile[mine]],
            "strength": [1.0 if round == 0 else args.explore_strength] * len(completions),
            "order": list(range(len(chosen)))[mine],
        }
        columns = _gathered(part, self.accelerator.num_processes)
        tokens = sum(map(len, columns["completion_ids"]))
        self.round_metrics["tokens_per_second"] = tokens / max(seconds, 1e-9)
        return columns

    def complete(
        self,
        prompts: EncodedPrompts,
        seeds: Sequence[int],
        quantile: Sequence[int | None],
        *,
        strength: float = 1.0,
        settings: GenerationSettings | None = None,
        verb: str = "generate",
    ) -> list[list[int]]:
        """The completions' token ids of the prompts, each with its quantile's reward token (None: without one)."""
        args, tokens = self.args, self.reward_tokens
        settings = settings or GenerationSettings(
            max_completion_length=args.max_completion_length,
            min_completion_length=args.min_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            barred=tokens.barred,
        )
        triples = list(zip(prompts.ids, quantile, prompts.token_at, strict=True))
        conditioned = [tokens.insert(ids, q, at) for ids, q, at in triples]
        contrast = None
        if strength != 1.0:
            contrast = [tokens.insert(ids, None if q is None else tokens.worst, at) for ids, q, at in triples]
        with self.policy.evaluating(), self.display.bar(verb, len(prompts), "samples") as advance:
            batches = self.completer.complete(conditioned, seeds, settings, contrast=contrast, strength=strength)
            return complete_all(self._watched(batches, advance), len(prompts))

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, `complete` samples the original model in place of the policy."""
        with self.policy.reference() as (reference, head):
            before = self.completer.model, self.completer.head
            self.completer.model, self.completer.head = reference, head
            try:
                yield
            finally:
                self.completer.model, self.completer.head = before

    def _watched(self, batches: Iterator[Any], advance: Any) -> Iterator[Any]:
        for indices, completions in batches:
            advance(len(indices))
            self._stop_if_asked()
            yield indices, completions

    def _scored(self, prompts: EncodedPrompts, completions: list[list[int]], verb: str) -> dict[str, list[Any]]:
        """The pool's columns of these samples."""
        texts = self.processing_class.batch_decode(completions, skip_special_tokens=True)
        with self.display.bar(verb, len(texts), "samples") as advance:
            batch = self._score(self.rewards, prompts, texts, completions)
            advance(len(texts))
        for name, value in batch.metrics.items():
            self.round_metrics[name] = value
        return {
            "prompt_ids": prompts.ids,
            "completion_ids": completions,
            "token_at": prompts.token_at,
            "prompt": prompts.texts,
            "completion": texts,
            "reward": [None if math.isnan(r) else r for r in batch.total.tolist()],
            "held_out": [is_held_out(p, self.args.heldout_share, "pool") for p in prompts.texts],
            **{
                f"reward/{name}": [None if math.isnan(r) else r for r in values.tolist()]
                for name, values in batch.per_function.items()
            },
            **{f"extra/{name}": [str(v) for v in values] for name, values in batch.extra.items()},
        }

    def _score(
        self, runner: RewardRunner, prompts: EncodedPrompts, texts: list[str], ids: list[list[int]]
    ) -> RewardBatch:
        completions: list[Any] = [
            [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
            for prompt, text in zip(prompts.prompts, texts, strict=True)
        ]
        return runner.score(prompts.prompts, completions, ids, prompts.columns, self.state)

    def _initial_columns(self) -> dict[str, list[Any]]:
        data = read_initial(self.initial_pool)
        from datasets import Dataset as Prompts

        encoded = encode(
            Prompts.from_dict({"prompt": data["prompt"]}), self.processing_class, self.reward_tokens.position, None
        )
        ids = [self.processing_class(c, add_special_tokens=False)["input_ids"] for c in data["completion"]]
        full = [i for i, tokens in enumerate(ids) if tokens]
        if len(full) < len(ids):
            warnings.warn(f"initial_pool: left out {len(ids) - len(full)} completions without a token.", stacklevel=2)
        encoded = encoded.select(full)
        return {
            "prompt_index": [-1] * len(full),
            "prompt_ids": encoded.ids,
            "completion_ids": [ids[i] for i in full],
            "token_at": encoded.token_at,
            "prompt": encoded.texts,
            "completion": [data["completion"][i] for i in full],
            "reward": [data["reward"][i] for i in full],
            "explored_with": [None] * len(full),
            "strength": [1.0] * len(full),
            "held_out": [is_held_out(p, self.args.heldout_share, "pool") for p in encoded.texts],
        }

    def _check_rewards(self, round: int, rewards: list[float | None]) -> None:
        dropped = sum(r is None for r in rewards)
        if dropped == len(rewards):
            raise RewardError(
                f"The reward functions gave None for all {len(rewards)} completions of round {round}, so there is"
                " nothing to rank. Try the reward alone: quark check-reward."
            )
        if round == 0:
            _check_differ(np.array([r for r in rewards if r is not None]))
        if dropped and self.is_world_process_zero():
            warnings.warn(
                f"dropped {dropped:,} of {len(rewards):,} completions: the reward returned None", stacklevel=2
            )
        self.round_metrics["dropped"] = dropped

    # -- quantize

    def quantize(self, round: int | None = None) -> np.ndarray:
        """The quantile of every row of the pool, int64 (rows,): 0 worst, K-1 best, -1 not ranked.

        A row without a reward or out of the window is not ranked.

        round: the current one, for the window; None: the pool's last.
        Raises: RewardError when all rewards are equal.
        """
        pool = self._open_pool()
        round = pool.num_rounds - 1 if round is None else round
        rewards = pool.rewards
        ranked = np.isfinite(rewards) & quantiles.in_window(pool.rounds, round, self.args.pool_window)
        _check_differ(rewards[ranked])
        out = np.full(len(rewards), -1, np.int64)
        if self.args.quantile_scope == "prompt":
            out[ranked] = quantiles.assign_per_group(
                rewards[ranked], pool.prompt_indices[ranked], self.args.num_quantiles
            )
        else:
            out[ranked] = quantiles.assign(rewards[ranked], self.args.num_quantiles)
        self._quantiles = out
        return out

    def _draw(self, round: int) -> None:
        """The round's draws: a pure function of (seed, round) and the pool."""
        args, pool = self.args, self._open_pool()
        drawable = np.where(pool.held_out, -1, self._quantiles)
        if (drawable < 0).all():
            raise DataError(
                "Every sample of the pool belongs to held-out prompts or has no quantile, so there is nothing to learn"
                " from. Give more prompts, or lower heldout_share."
            )
        num = args.steps_per_round * self.get_total_train_batch_size(args)
        rows = quantiles.draw(drawable, num, args.seed, round, args.draw, args.num_quantiles)
        dropped = np.random.default_rng([args.seed, round, _DROPOUT]).random(num) < args.token_dropout
        columns = pool.gather(rows, ["prompt_ids", "completion_ids", "token_at"])
        self.draws = [
            Draw(
                prompt_ids=columns["prompt_ids"][i],
                completion_ids=columns["completion_ids"][i],
                token_at=columns["token_at"][i],
                quantile=None if dropped[i] else int(self._quantiles[rows[i]]),
            )
            for i in range(num)
        ]

    # -- learn

    def get_train_dataloader(self) -> DataLoader:
        """Reads the current round's draws in order; Accelerate gives each rank its batches."""
        loader = DataLoader(_Draws(self), batch_size=self._train_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self, args: Any) -> int:
        return self._train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One mean over all completion tokens of the step: NLL + beta x KL - entropy_coef x entropy, in nats."""
        denominator = len(inputs["targets"]) if num_items_in_batch is None else num_items_in_batch
        loss, sums = model(inside=self._loss_inside, batch=inputs, denominator=denominator)
        self._sums += sums.double().cpu()
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the wrapper averages the ranks' gradients
        return (loss, {}) if return_outputs else loss

    def _loss_inside(self, batch: dict[str, torch.Tensor], denominator: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, sums (4,): NLL, KL, entropy, tokens); called within the wrapped model's forward."""
        reference_hidden, reference_head = None, self.policy.head
        if self.args.beta:
            with self.policy.reference() as (reference, reference_head):
                reference_hidden = completion_states(reference, batch, "reference_")
        hidden = completion_states(self.model, batch)
        sums = quark_loss(
            hidden,
            reference_hidden,
            batch["targets"],
            self.policy.head,
            reference_head,
            self.policy.head.parameters(),
            self.loss_settings,
            denominator,
        )
        tokens = torch.tensor(sums.num_tokens, device=hidden.device, dtype=torch.float32)
        return sums.loss, torch.stack([sums.nll, sums.kl, sums.entropy, tokens])

    # -- what a round tells

    def measure_tokens(self) -> dict[str, float]:
        """Do the tokens mean anything yet? Measured on held-out rows of the pool, whose prompts are never drawn.

        Returns: token_auc, with which log p(y | x, best) - log p(y | x, worst), a token, tells the best quantile's rows
            from the worst one's (0.5 is nothing), its standard error, and heldout_nll; empty when too few rows are
            held out.
        """
        pool = self._open_pool()
        best, worst = self.args.num_quantiles - 1, 0
        per_end = self.args.meaning_rows // 2
        held = pool.held_out & (self._quantiles >= 0)
        good = np.flatnonzero(held & (self._quantiles == best))[-per_end:]
        bad = np.flatnonzero(held & (self._quantiles == worst))[-per_end:]
        if min(len(good), len(bad)) < 4:
            return {}
        rows = np.concatenate([good, bad])
        columns = pool.gather(rows, ["prompt_ids", "completion_ids", "token_at"])
        log_probs = {q: self._log_probs(columns, q) for q in (best, worst)}
        lengths = np.array([len(ids) for ids in columns["completion_ids"]])
        scores = (log_probs[best] - log_probs[worst]) / lengths
        auc = quantiles.auc(scores, np.arange(len(rows)) < len(good))
        own = np.where(np.arange(len(rows)) < len(good), log_probs[best], log_probs[worst])
        return {
            "token_auc": auc,
            "token_auc_se": quantiles.auc_standard_error(auc, len(good), len(bad)),
            "heldout_nll": float(-own.sum() / lengths.sum()),
        }

    def _log_probs(self, columns: dict[str, list[Any]], quantile: int | None) -> np.ndarray:
        """log p(completion | prompt with the quantile's token) of each row, in nats."""
        prompts = [
            self.reward_tokens.insert(ids, quantile, at)
            for ids, at in zip(columns["prompt_ids"], columns["token_at"], strict=True)
        ]
        with self.policy.evaluating():
            return completion_log_probs(
                self.model, self.policy.head, prompts, columns["completion_ids"], self.pad_id, self.reward_tokens.barred
            )

    def _reference_nll(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float | None]:
        """NLL a token under the original model of the first samples, without a reward token; None for the others."""
        num = min(len(prompt_ids), max(1, _PERPLEXITY_ROWS // self.accelerator.num_processes))
        with self.policy.evaluating(), self.policy.reference() as (reference, head):
            log_probs = completion_log_probs(
                reference, head, prompt_ids[:num], completion_ids[:num], self.pad_id, self.reward_tokens.barred
            )
        means = [-float(lp) / max(1, len(ids)) for lp, ids in zip(log_probs, completion_ids, strict=False)]
        return [*means, *[None] * (len(prompt_ids) - num)]

    def _round_figures(self, round: int) -> dict[str, Any]:
        """The figures of the samples that a round explored; all from the pool, so that a resumed run tells the same."""
        pool = self._open_pool()
        here = pool.rounds == round
        rewards = pool.rewards
        figures: dict[str, Any] = {
            "reward": float(np.nanmean(rewards[here])),
            "samples": int(here.sum()),
            "pool_samples": len(pool),
        }
        before = (pool.rounds < round) & np.isfinite(rewards)
        if round > 0 and before.any() and np.ptp(rewards[before]) > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", quantiles.FewQuantilesWarning)
                old = quantiles.assign(rewards[before], self.args.num_quantiles)
            threshold = rewards[before][old == self.args.num_quantiles - 1].min()
            figures["share_above_best"] = float(np.mean(rewards[here & np.isfinite(rewards)] > threshold))
        # only the column that is needed: a round's texts may be large
        measured = pool.gather(np.flatnonzero(here), ["reference_nll"])["reference_nll"]
        nll = np.array([v for v in measured if v is not None])
        if len(nll):  # a user's own data has none
            figures["reference_perplexity"] = float(np.exp(nll).mean())
        figures["quantiles_used"] = len(np.unique(self._quantiles[self._quantiles >= 0]))
        return figures

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Completes held-out prompts with the best token and scores them, with the independent scorers too.

        Returns: eval_reward and eval_<function>: means over completions; eval_reference_perplexity.
        """
        del ignore_keys
        prompts = self.eval_prompts
        if eval_dataset is not None:
            prompts = encode(checked(eval_dataset, "eval_dataset"), self.processing_class, self.reward_tokens.position)
        if prompts is None:
            raise DataError("evaluate() needs held-out prompts. Give QuarkTrainer an eval_dataset.")
        repeated = prompts.select(np.repeat(np.arange(len(prompts)), self.args.num_eval_generations).tolist())
        seeds = sample_seeds(self.args.seed, _EVAL, num=len(repeated))
        ids = self.complete(repeated, seeds, [self.reward_tokens.best] * len(repeated), verb="held-out prompts")
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        with _aside(self.args.seed, _EVAL, self.accelerator.process_index):
            batch = self._score(self.rewards, repeated, texts, ids)
            columns = {"reward": batch.total, **batch.per_function}
            if self.eval_rewards:
                columns |= self._score(self.eval_rewards, repeated, texts, ids).per_function
        metrics = {
            f"{metric_key_prefix}_{name}": float(np.nanmean(values))
            for name, values in columns.items()
            if np.isfinite(values).any()  # a scorer that gave only None has no mean
        }
        nll = [v for v in self._reference_nll(repeated.ids, ids) if v is not None]
        metrics[f"{metric_key_prefix}_reference_perplexity"] = float(np.exp(nll).mean())
        self.round_metrics |= metrics
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Adds the learning step's own means since the last line, and writes the line to metrics.jsonl too."""
        if "loss" in logs:
            nll, kl, entropy, tokens = self.accelerator.reduce(self._sums.to(self.args.device).float()).tolist()
            self._sums.zero_()
            if tokens:
                logs |= {"nll": nll / tokens, "kl": kl / tokens}
                if self.args.entropy_coef:
                    logs["entropy"] = entropy / tokens
                self.round_metrics |= {"nll": logs["nll"], "kl": logs["kl"]}
        super().log(logs, start_time)
        if self.is_world_process_zero():
            step = self.state.global_step
            round = min(max(step - ("loss" in logs), 0) // self.args.steps_per_round, self.args.num_rounds - 1)
            self.metrics_file.append({"round": self.round_metrics.get("round", round), "step": step, **logs})

    # -- the run

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Runs all rounds. Ctrl-C or SIGTERM saves a checkpoint at the next step, and raises KeyboardInterrupt.

        resume_from_checkpoint: True or None take the newest complete checkpoint of the folder, if there is one; False
            starts anew in an empty folder; or a path.
        """
        from .run_folder import last_checkpoint

        if resume_from_checkpoint is None or resume_from_checkpoint is True:
            newest, torn = last_checkpoint(self.folder)
            for path in torn:
                warnings.warn(f"{path} was not finished when its run stopped, and is not used.", stacklevel=2)
            resume_from_checkpoint = str(newest) if newest else False
        self._check_pool(resume_from_checkpoint)
        if self.is_world_process_zero():
            step = int(Path(resume_from_checkpoint).name.split("-")[-1]) if resume_from_checkpoint else -1
            next_round, inside = divmod(step, self.args.steps_per_round)
            self.metrics_file.keep_until(step, before_round=None if inside else next_round)
        with self._signals():
            try:
                output = super().train(resume_from_checkpoint or None, *args, **kwargs)
            finally:
                self.learn_bar.close()
        self._stop_if_asked()
        return output

    def _open_pool(self) -> Pool:
        if self.pool is None:
            if self.is_world_process_zero():
                identity = {
                    name: value
                    for name, value in self.args.to_dict().items()
                    if name not in _NOT_IDENTITY and not name.startswith(_NOT_IDENTITY_PREFIXES)
                }
                identity["model"] = self.policy.name
                identity["dtype"] = str(causal_lm(self.model).dtype).removeprefix("torch.")
                identity["adapter"] = _adapter_identity(self.model)
                identity["reward_tokens"] = list(self.reward_tokens.texts)
                identity["reward_funcs"] = self.rewards.names
                identity["prompts"] = f"{len(self.prompts)}, crc {_crc(self.prompts.texts)}"
                claim(self.folder, identity)
                describe(self.folder, self.args.to_dict())
                self.reward_tokens.save(self.folder)
                Pool.open(self.folder / "pool", create=True)
                if not (self.folder / "pool" / "manifest.json").exists():
                    write_json(self.folder / "pool" / "manifest.json", {"rounds": []})
            self.accelerator.wait_for_everyone()
            self.pool = Pool.open(self.folder / "pool")
        return self.pool

    def _check_pool(self, checkpoint: str | Literal[False]) -> None:
        """Raises: PoolError when the pool on disk is not as the run wrote it, or not the one of the checkpoint."""
        pool = self._open_pool()
        if self.is_world_process_zero():
            pool.verify()
        marker = Path(checkpoint) / MARKER if checkpoint else None
        if marker is not None and marker.is_file():
            saw = json.loads(marker.read_text(encoding="utf-8"))["pool_sha256"]
            if pool.hashes()[: len(saw)] != saw:
                raise PoolError(
                    f"{checkpoint} saw another pool than the one in {pool.folder}, so its next losses would be of other"
                    " samples. Give a checkpoint of this run, or put its pool back."
                )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks to stop, the second one stops at once."""

        def ask(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            self.display.line("Stopping after this step, to save it. Once more stops at once.")

        try:
            old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # signals belong to the main thread; elsewhere the caller's handlers stay
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _all_stop(self) -> bool:
        """Whether any rank was asked to stop: all then stop after the same step, or the others would wait for it."""
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(float(self.interrupted), device=self.args.device)
            self.interrupted = bool(self.accelerator.reduce(asked) > 0)
        return self.interrupted

    def _stop_if_asked(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt("stopped, and saved up to the last step")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.reward_tokens.save(output_dir or cast(str, self.args.output_dir))


class _Draws(Dataset):
    """The current round's draws."""

    def __init__(self, trainer: QuarkTrainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        args = self.trainer.args
        return args.steps_per_round * self.trainer.get_total_train_batch_size(args)

    def __getitem__(self, index: int) -> Draw:
        return self.trainer.draws[index]


class _Rounds(TrainerCallback):
    """Calls the verbs at the borders of a round, and tells what happened."""

    def __init__(self, trainer: QuarkTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        round = state.global_step // args.steps_per_round
        trainer.round_metrics = {"round": round}
        trainer.explore(round)
        trainer.quantize(round)
        trainer._draw(round)
        figures = trainer._round_figures(round)
        if state.global_step == 0:
            figures |= {f"initial_{name}": value for name, value in trainer.measure_tokens().items()}
        trainer.round_metrics |= figures
        if state.global_step % args.steps_per_round == 0:
            trainer.log({name: value for name, value in trainer.round_metrics.items() if name != "round"})
        if args.log_completions:
            table = trainer._open_pool().to_table([round]).slice(0, args.num_completions_to_print)
            rows = list(zip(*(table.column(c).to_pylist() for c in ("prompt", "completion", "reward")), strict=True))
            trainer.display.completions(f"round {round + 1}", rows)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.steps_per_round == 0:
            control.should_log = True  # a round's last figures belong to it
        if self.trainer._all_stop():
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.interrupted or state.global_step % args.steps_per_round:
            return
        round = state.global_step // args.steps_per_round - 1
        figures = trainer.measure_tokens()
        trainer.round_metrics |= figures
        if figures:
            trainer.log(dict(figures))
        if trainer.eval_prompts is not None and args.eval_every and (round + 1) % args.eval_every == 0:
            trainer.evaluate()
        trainer.display.round_line(round, args.num_rounds, trainer.round_metrics)
        if figures and round + 1 < args.num_rounds and figures["token_auc"] < 0.5 + 2 * figures["token_auc_se"]:
            message = (
                f"The reward tokens hardly mean anything yet (AUC {figures['token_auc']:.2f}, 0.5 is nothing), so the"
                " next round explores with a token that asks for nothing. Train longer before exploring"
                " (steps_per_round), sample more (prompts_first_round), or use text tags."
            )
            if trainer.is_world_process_zero():
                warnings.warn(message, stacklevel=2)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks the checkpoint as complete: each rank calls this when Trainer has written its part."""
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            pool = self.trainer._open_pool()
            write_json(folder / MARKER, {"step": state.global_step, "pool_sha256": pool.hashes()})


# Fields that may change between the parts of one run.
_NOT_IDENTITY = {
    "output_dir", "disable_tqdm", "log_completions", "num_completions_to_print", "report_to", "run_name", "logging_dir",
    "save_total_limit", "generation_batch_size", "local_rank", "hub_token", "push_to_hub", "project",
    "trackio_space_id", "resume_from_checkpoint", "overwrite_output_dir",
}  # fmt: skip
_NOT_IDENTITY_PREFIXES = ("log_", "logging_", "hub_", "dataloader_", "skip_", "ddp_", "_")


# -- helpers


def _load(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: QuarkConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from .packaged import load_model

    if isinstance(model, str):
        # TrainingArguments has read a string of JSON
        options = cast(dict[str, Any] | None, args.model_init_kwargs) or {}
        model, own = load_model(model, **options)
        return model, tokenizer or own
    if args.model_init_kwargs:
        raise ConfigError(
            "model_init_kwargs is for a model given by its name, but a loaded model was given. Leave one out."
        )
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(causal_lm(model).config.name_or_path)
    return model, tokenizer


def _reward_functions(reward_funcs: Any, processing_classes: Any) -> list[Callable[..., Any]]:
    specs = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs)
    classes = processing_classes if isinstance(processing_classes, (list, tuple)) else [processing_classes] * len(specs)
    if len(classes) != len(specs):
        raise ConfigError(
            f"There are {len(specs)} reward functions, but {len(classes)} reward_processing_classes. Give one each,"
            " None where a reward has none."
        )
    return [
        load_reward(spec) if tokenizer is None else load_reward(spec, processing_class=tokenizer)
        for spec, tokenizer in zip(specs, classes, strict=True)
    ]


def _with_adapter(model: PreTrainedModel, config: PeftConfig, tokens: RewardTokens, seed: int) -> PreTrainedModel:
    """The model under a PEFT wrapper, which answers as the model itself does."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigError("The model has an adapter already and peft_config asks for another. Give one of the two.")
    if tokens.barred:
        # only the new rows of the embedding learn; modules_to_save=["embed_tokens"] would break a tied head
        if getattr(config, "trainable_token_indices", None):
            raise ConfigError("peft_config.trainable_token_indices is set by Quark to the reward tokens. Leave it out.")
        config = copy.deepcopy(config)  # the caller's own may serve another trainer
        config.trainable_token_indices = list(tokens.barred)
    torch.manual_seed(seed)  # the adapter's first weights too depend on the run's seed alone
    return get_peft_model(model, config)


def _check_differ(rewards: np.ndarray) -> None:
    """Raises: RewardError unless two rewards differ."""
    if not len(rewards) or np.ptp(rewards) == 0:
        value = f"{rewards[0]:.6g}" if len(rewards) else "missing"
        raise RewardError(
            f"All {len(rewards):,} rewards of the pool are equal ({value}), so no sample is better than another and"
            " there is nothing to learn. Use a graded reward, or prompts on which it differs."
        )


@contextlib.contextmanager
def _aside(*key: int) -> Iterator[None]:
    """Random numbers that are a function of the key alone; after it the run's own go on as if none had been drawn.

    A reward function may draw some; a resumed run, which finds its rewards on disk, would then drop out other units.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            set_seed(sample_seeds(*key, _ASIDE, num=1)[0] % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _adapter_identity(model: Any) -> dict[str, Any] | None:
    """What makes an adapter's weights fit: another rank could not load a checkpoint."""
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config[model.active_adapter].to_dict()
    wanted = {
        name: config.get(name) for name in ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
    }
    modules = wanted["target_modules"]
    return wanted | {"target_modules": modules if isinstance(modules, str) or modules is None else sorted(modules)}


def _context_length(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _crc(texts: Sequence[str]) -> int:
    import zlib

    crc = 0
    for text in texts:
        crc = zlib.crc32(text.encode(), crc)
    return crc


def _gathered(part: dict[str, list[Any]], num_processes: int) -> dict[str, list[Any]]:
    """The columns of all ranks in the order of the samples."""
    parts = gather_object([part]) if num_processes > 1 else [part]
    order = np.argsort(np.concatenate([p["order"] for p in parts]), kind="stable")
    merged = {name: [value for p in parts for value in p[name]] for name in part if name != "order"}
    return {name: [values[i] for i in order] for name, values in merged.items()}
