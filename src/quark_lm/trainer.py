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
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]  # it ships no py.typed
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from . import export, loading, measuring, quantiles, resuming
from .collator import Collator, Draw
from .config import QuarkConfig
from .errors import ConfigError, DataError, GenerationError, ModelError, QuarkError, RewardError, TrainingError
from .exploring import DROPOUT, InitialPool, Watch, aside, explored_columns, held_out_columns
from .generation import DRAWING, Completer, GenerationSettings, complete_all
from .generation.hf import HFCompleter
from .loss import LossSettings, quark_loss
from .packaged import PACKAGED, base_name
from .policy import Policy, causal_lm, check_head, completion_states, disable_dropout, local_part
from .pool import PartialRound, Pool, partial_path
from .processes import check_hardware, first_tells, shard_on_cpu
from .progress import Display, LearnBar
from .prompts import EncodedPrompts, checked, encode
from .reward_tokens import RewardTokens
from .rewards import load_reward
from .rewards.runner import RewardRunner
from .rounds import Draws, Rounds
from .run_folder import (
    HELD_OUT,
    MARKER,
    UNFINISHED,
    MetricsFile,
    claim,
    describe,
    disk_errors,
    fixed_dtypes,
    fixed_rows,
    has_round,
    last_whole_checkpoint,
    locked,
    put_in_place,
    rotate,
    warn_of_other_sources,
    what_is_wrong,
    write_json,
)
from .steering import branches, context_length, eos_ids

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .generation.vllm import VLLMColocated, VLLMServer

RewardFunc = str | Callable[..., Any]


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
            A completion that is shorter than max_completion_length ends with the end-of-text token, as a sampled one.

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
        if args is not None and not isinstance(args, QuarkConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}, which has none of Quark's settings. Give a QuarkConfig."
            )
        args = copy.copy(args or QuarkConfig("quark_output"))  # what is set below is this run's, not the caller's
        check_hardware(args)
        if train_dataset is None:
            raise DataError("train_dataset is missing, so there is nothing to sample from. Give a data set of prompts.")
        train_dataset = checked(train_dataset)
        eval_dataset = checked(eval_dataset, "eval_dataset") if eval_dataset is not None else None
        model, tokenizer = loading.load(model, processing_class, args, peft_config)
        check_head(model)

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
            attributes=args.reward_attributes or (),
        )
        if self.reward_tokens.num_quantiles != args.num_quantiles:
            raise ConfigError(
                f"num_quantiles={args.num_quantiles}, but the given reward_tokens name"
                f" {self.reward_tokens.num_quantiles} quantiles. Make the two equal."
            )
        if self.reward_tokens.attributes != tuple(args.reward_attributes or ()):
            raise ConfigError(
                f"reward_attributes={args.reward_attributes!r}, but the given reward_tokens are of"
                f" {list(self.reward_tokens.attributes)!r}. Make the two equal."
            )
        context = context_length(model)
        room = context - args.max_completion_length - self.reward_tokens.longest
        if room < 1:
            raise ConfigError(
                f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the model's context"
                f" of {context} tokens. Lower it."
            )
        position = self.reward_tokens.position
        self.room = room  # most token ids of a prompt
        self.prompts = encode(train_dataset, tokenizer, position, room)
        self.eval_prompts = encode(eval_dataset, tokenizer, position, room) if eval_dataset is not None else None
        shared = set(self.prompts.texts) & set(self.eval_prompts.texts) if self.eval_prompts is not None else ()
        if shared and args.process_index == 0:
            warnings.warn(
                f"{len(shared)} of {len(self.eval_prompts or ())} held-out prompts are trained on too, so their figures"
                " do not tell how the model does on new ones. Leave them out of one of the two.",
                stacklevel=2,
            )
        eos = eos_ids(model, tokenizer)
        self.initial_pool = None
        if initial_pool is not None:
            if args.reward_attributes:
                raise ConfigError(
                    "initial_pool gives one reward a row, and reward_attributes ranks several. Leave one of them out."
                )
            length, share = args.max_completion_length, args.heldout_share
            self.initial_pool = InitialPool.read(
                initial_pool, tokenizer, self.reward_tokens, self.prompts, room, length, share, eos
            )

        if peft_config is not None:
            model = loading.with_adapter(model, peft_config, self.reward_tokens, args.seed)
        if hasattr(model, "peft_config"):
            loading.keep_rows_apart(model)
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
        self.policy = Policy(self.model, accelerator=self.accelerator)
        self.loss_settings = LossSettings(
            beta=args.beta,
            kl_direction=args.kl_direction,
            entropy_coef=args.entropy_coef,
            mask_reward_tokens=args.mask_reward_tokens,
            barred=self.reward_tokens.barred,
            chunk_elements=args.loss_chunk_elements,
            temperature=args.temperature or 1.0,  # greedy text is learned as it is
        )
        self.rewards = RewardRunner(
            _reward_functions(reward_funcs, reward_processing_classes),
            args.reward_weights,
            retries=args.reward_retries,
            may_fail=args.max_failed_rewards > 0,
        )
        if args.reward_attributes and len(args.reward_attributes) != len(self.rewards.names):
            raise ConfigError(
                f"There are {len(self.rewards.names)} reward functions, but {len(args.reward_attributes)}"
                " reward_attributes. Name one for each reward function, in their order."
            )
        scorers = _reward_functions(eval_reward_funcs, None)
        # `reward` is the weighted total's name
        taken = [*self.rewards.names, "reward"]
        self.eval_rewards = RewardRunner(scorers, retries=args.reward_retries, taken=taken) if scorers else None
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        self.hf_completer = HFCompleter(self.model, eos, args.generation_batch_size, autocast)
        self.completer: Completer = self.hf_completer
        self.generation_settings = GenerationSettings(
            **{name: getattr(args, name) for name in DRAWING}, barred=self.reward_tokens.barred
        )

        self.folder = Path(cast(str, args.output_dir))  # TrainingArguments has put its default in None's place
        self.pool_folder = self.folder / "pool"
        self.held_out_folder = self.folder / HELD_OUT
        self.metrics_file = MetricsFile(self.folder / "metrics.jsonl")
        self.display = Display(self.is_world_process_zero(), bars=not args.disable_tqdm)
        self.vllm: VLLMColocated | VLLMServer | None = None
        if args.use_vllm:
            from .generation.vllm import vllm_completer  # with its HTTP client, which other runs need not load

            if self.is_fsdp_enabled:
                raise ConfigError(
                    "use_vllm=True saves the policy for vLLM, and FSDP gives each process a part of it. Use DDP, or"
                    " leave use_vllm out."
                )
            if export.on_quantized(self.model):
                raise ConfigError(
                    "use_vllm=True saves the merged policy for vLLM, and a quantized model cannot take an adapter in."
                    " Leave use_vllm out, or load the model unquantized."
                )
            name = base_name(self.model)
            dtype = autocast or causal_lm(self.model).dtype
            self.vllm = self.completer = vllm_completer(
                args,
                eos,
                dtype=dtype,
                num_processes=self.accelerator.num_processes,
                # the base has no rows for new reward tokens
                served=() if self.reward_tokens.barred or name in ("", PACKAGED) else (name,),
                tell=self.display.line,
            )
        self.pool: Pool | None = None
        self.draws: list[Draw] = []
        self.round_metrics: dict[str, Any] = {}
        self.interrupted = False
        self._trains = self._is_finished = self._stops_early = False
        self._fixed = False  # what a start measures
        self._keeps_held_out = False
        self._joint: BaseException | None = None  # what stopped all ranks at one place
        self._failed: QuarkError | None = None  # of a round's last measurements
        self._measured_at = -1  # the step at which a round's last measurements were made
        self._saved_at = -1  # the step of the newest checkpoint
        self._owed: int | None = None  # the round whose last measurements a stopped run did not make
        # since the last line of metrics: NLL, KL, entropy, tokens, loss, steps
        self._sums = torch.zeros(6, dtype=torch.float64)
        self._quantiles = np.zeros(0, np.int64)
        self._drawn = np.zeros(0, np.int64)  # the pool's rows of the round's draws
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.learn_bar = LearnBar(self)
        self.add_callback(self.learn_bar)
        self.add_callback(Rounds(self))

    # -- explore

    def explore(self, round: int) -> None:
        """Samples the round's prompts, scores the samples and adds them to the pool; a round that is there stays.

        Round 0 samples the model as it is; later rounds ask for the best quantile, with the dial at `explore_strength`.
        """
        pool = self.open_pool()
        if pool.has_round(round):
            self._sweep(round)  # a kill may have come between the round and this
            return
        figures: dict[str, float] = {}
        if round == 0 and self.initial_pool is not None:
            columns = self.initial_pool.columns
        else:
            columns, figures = explored_columns(self, round)
        try:
            self._check_rewards(round, columns)
        except RewardError as error:  # a mended reward can then go on with the same completions
            self._joint = error  # of the whole round's rewards, which every rank has
            journal = partial_path(self.pool_folder, round, self.accelerator.process_index)
            # a user's own scored data has no journal; the base's held-out prompts were scored by the same function
            held_out = self.held_out_folder.glob(f"*.rank-{self.accelerator.process_index}.*")
            for path in filter(Path.is_file, [journal, *held_out]):
                PartialRound.forget_scores(path)
            raise
        if self.is_world_process_zero():
            pool.append(round, columns, figures)
        self.accelerator.wait_for_everyone()
        self._sweep(round)
        if not self.is_world_process_zero():
            pool.catch_up()

    def complete(
        self,
        prompts: EncodedPrompts,
        seeds: Sequence[int],
        quantile: Sequence[int | None],
        *,
        strength: float = 1.0,
        settings: GenerationSettings | None = None,
        verb: str = "generate",
        kept: PartialRound | None = None,
    ) -> list[list[int]]:
        """The completions' token ids of the prompts, each with its quantile's reward token (None: without one).

        Every rank must call it the same number of times.

        kept: where batches are kept as they come; what it holds already is not sampled again.
        Raises: KeyboardInterrupt when the run was told to stop; GenerationError on every rank when one has it.
        """
        # vLLM knows no dial; the model is here as well
        completer = self.hf_completer if strength != 1.0 else self.completer
        if completer is self.vllm:
            self._give_weights()
        conditioned, dials = branches(self.reward_tokens, prompts, quantile, strength)
        done = dict(kept.completions) if kept is not None else {}
        merges = self.args.merge_adapter and completer is self.hf_completer
        merged = self.policy.merged() if merges else contextlib.nullcontext()
        with self.policy.evaluating(), merged, self.display.bar(verb, len(prompts), "samples") as advance:
            advance(len(done))
            batches = completer.complete(
                conditioned,
                seeds,
                settings or self.generation_settings,
                dials=dials,
                skip=done,
            )
            failed: QuarkError | None = None
            completions: list[list[int]] = []
            try:
                completions = complete_all(Watch(self, kept)(batches, advance), len(prompts))
            except QuarkError as error:
                if self.is_fsdp_enabled and not isinstance(error, GenerationError):
                    # the others wait within a joint forward, where nothing can be told or saved: the launcher ends them
                    raise RuntimeError(str(error)) from error
                failed = error
        num = f"; {len(kept.completions)} of {len(prompts)} samples are kept" if kept is not None else ""
        self.stop_together(f"during {verb}{num}")
        self.fail_together(failed)
        return [done.get(i, completion) for i, completion in enumerate(completions)]

    def fix_what_is_measured(self) -> None:
        """Fixes, for the whole run and all ranks, what each start measures; every rank calls it at the same place.

        The rows of the model's generation batches: another process finds other memory free, and batches of other rows
        round other digits. The dtypes of scorers that take the faster one.
        """
        hf = self.hf_completer
        if hf.batch_rows is None:
            prompts = [*self.prompts.ids, *(self.eval_prompts.ids if self.eval_prompts is not None else [])]
            longest = max(map(len, prompts), default=1) + self.reward_tokens.longest
            fitting = hf.fitting_rows([[0] * longest], self.generation_settings)
            if self.accelerator.num_processes > 1:
                fitting = min(gather_object([fitting]))
            hf.batch_rows = first_tells(lambda: fixed_rows(self.folder, fitting))
        if not self._fixed:
            scorers = self.rewards.measuring | (self.eval_rewards.measuring if self.eval_rewards else {})
            if scorers:
                measured = {name: scorer.dtype for name, scorer in scorers.items()}
                for name, dtype in first_tells(lambda: fixed_dtypes(self.folder, measured)).items():
                    scorers[name].dtype = dtype
            self._fixed = True

    def _give_weights(self) -> None:
        """Gives vLLM the policy's weights when they have changed since; every rank calls it at the same place."""
        assert self.vllm is not None
        step = self.state.global_step if self._trains else None  # outside train() the caller may have changed them
        if step is not None and self.vllm.holds == step:
            return
        folder = self.folder / "vllm"
        self.accelerator.wait_for_everyone()  # no rank still samples from the weights before
        if self.is_world_process_zero() and self.vllm.needs_checkpoint and (step is None or self.vllm.saved != step):
            export.save(self.model, self.processing_class, self.reward_tokens, folder)
        self.accelerator.wait_for_everyone()
        failed: QuarkError | None = None
        try:
            with aside(self.args.seed):  # a vLLM in this process seeds its random numbers
                version = f"{folder.resolve()} step {self.state.global_step}"
                self.vllm.load(folder, version, self.model, first=self.is_world_process_zero())
        except QuarkError as error:  # the server may also be another model's
            failed = error
        self.fail_together(failed)
        self.vllm.holds = self.vllm.saved = step

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, `complete` samples the original model in place of the policy, always in this process."""
        completer, hf = self.completer, self.hf_completer
        with self.policy.reference() as (reference, head):
            before = hf.model, hf.head
            hf.model, hf.head = reference, head
            self.completer = hf
            try:
                yield
            finally:
                hf.model, hf.head = before
                self.completer = completer

    def _sweep(self, round: int) -> None:
        """Removes what was kept of a round that is there."""
        if self.is_world_process_zero():
            PartialRound.remove(self.pool_folder, round)

    @contextlib.contextmanager
    def keeping_held_out(self) -> Iterator[None]:
        """Within it, held-out prompts are kept as they come: elsewhere a caller may evaluate any weights at a step."""
        self._keeps_held_out = True
        try:
            yield
        finally:
            self._keeps_held_out = False

    def sweep_held_out(self) -> None:
        """Removes what was kept of held-out prompts whose figures are saved."""
        if self.is_world_process_zero():
            shutil.rmtree(self.held_out_folder, ignore_errors=True)

    def _check_rewards(self, round: int, columns: dict[str, list[Any]]) -> None:
        names = [f"reward/{name}" for name in self.rewards.names] if self.args.reward_attributes else ["reward"]
        rewards = np.array([columns[name] for name in names], dtype=float)  # None becomes NaN
        known = np.isfinite(rewards).all(0)
        if not known.any():
            raise RewardError(
                f"The reward functions gave None for all {len(known)} completions of round {round + 1}, so there is"
                " nothing to rank. Try the reward alone: quark check-reward."
                if len(names) == 1
                else f"None of the {len(known)} completions of round {round + 1} has a reward in all of"
                f" {', '.join(self.args.reward_attributes or ())}, so there is nothing to rank. Mend the one that"
                " gives None."
            )
        if round == 0:
            for values, name in zip(rewards, self.args.reward_attributes or ("",), strict=True):
                _check_differ(values[known], name)
        dropped = int((~known).sum())
        if dropped and self.is_world_process_zero():
            warnings.warn(f"dropped {dropped:,} of {len(known):,} completions: the reward returned None", stacklevel=2)

    # -- quantize

    def quantize(self, round: int | None = None) -> np.ndarray:
        """The quantile of every row of the pool, int64 (rows,): 0 worst, K-1 best, -1 not ranked.

        A row without a reward or out of the window is not ranked. Of several attributes `RewardTokens.code` of each.

        round: the current one, for the window; None: the pool's last.
        Raises: RewardError when all rewards of round 0 are equal; later, when the model has learned all that the reward
            tells, all are the best.
        """
        pool, args = self.open_pool(), self.args
        round = pool.num_rounds - 1 if round is None else round
        columns = [pool.rewards]
        if args.reward_attributes:  # by what the weighted sum would count: a weight below 0 turns its reward round
            names = [f"reward/{name}" for name in self.rewards.names]
            told = pool.to_table(columns=names)
            columns = [w * told.column(n).to_numpy() for w, n in zip(self.rewards.weights, names, strict=True)]
        ranked = quantiles.in_window(pool.rounds, round, args.pool_window)
        for rewards in columns:
            ranked &= np.isfinite(rewards)
        levels = []
        for rewards, name in zip(columns, args.reward_attributes or ("",), strict=True):
            if round == 0 or args.quantile_scope == "prompt":
                _check_differ(rewards[ranked], name)
            if args.quantile_scope == "prompt":
                groups = pool.prompt_indices[ranked]
                levels.append(quantiles.assign_per_group(rewards[ranked], groups, args.num_quantiles))
            else:
                levels.append(quantiles.assign(rewards[ranked], args.num_quantiles))
        out = np.full(len(pool), -1, np.int64)
        if len(levels) == 1:
            out[ranked] = levels[0]
        else:  # a prompt whose samples are equal in one attribute is not ranked in any
            out[ranked] = np.where(np.min(levels, axis=0) < 0, -1, self.reward_tokens.code(levels))
        self._quantiles = out
        return out

    def _draw(self, round: int) -> None:
        """The round's draws: a pure function of (seed, round) and the pool."""
        args, pool = self.args, self.open_pool()
        drawable = np.where(pool.held_out, -1, self._quantiles)
        if (drawable < 0).all():
            raise DataError(
                "Every sample of the pool belongs to held-out prompts or has no quantile, so there is nothing to learn"
                " from. Give more prompts, or lower heldout_share."
            )
        num = args.steps_per_round * self.get_total_train_batch_size(args)
        # with several attributes each draws by its own quantiles, in turn
        attributes = self.reward_tokens.num_attributes
        each = [
            quantiles.draw(
                levels,
                -(-num // attributes),
                args.seed,
                round,
                args.draw,
                args.num_quantiles,
                attribute,
                args.best_share,
            )
            for attribute, levels in enumerate(self.reward_tokens.all_levels(drawable))
        ]
        rows = np.stack(each, axis=1).reshape(-1)[:num]
        dropped = np.random.default_rng([args.seed, round, DROPOUT]).random(num) < args.token_dropout
        columns = pool.gather(rows, ["prompt_ids", "completion_ids", "token_at"])
        self._drawn = rows
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

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def get_train_dataloader(self) -> DataLoader:
        """Reads the current round's draws in order; Accelerate gives each rank its batches."""
        loader = DataLoader(Draws(self), batch_size=self._train_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self, args: Any) -> int:
        return self._train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One mean over all completion tokens of the step: NLL + beta x KL - entropy_coef x entropy, in nats."""
        denominator = len(inputs["targets"]) if num_items_in_batch is None else num_items_in_batch
        # out of the wrapper's sight: FSDP under bfloat16 would round what the forward gives
        told: list[torch.Tensor] = []
        loss = model(inside=functools.partial(self._loss_inside, told), batch=inputs, denominator=denominator)
        self.policy.let_reference_go()
        self._sums[:5] += told[0].cpu().double()
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the wrapper averages the ranks' gradients
        return (loss, {}) if return_outputs else loss

    def _loss_inside(self, told: list[torch.Tensor], batch: dict[str, torch.Tensor], denominator: Any) -> torch.Tensor:
        """The loss; called within the wrapped model's forward. Adds (5,): NLL, KL, entropy, tokens, loss to `told`."""
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
        told.append(torch.stack([sums.nll, sums.kl, sums.entropy, tokens, sums.loss.detach().float()]))
        return sums.loss

    def check_finite(self) -> None:
        """Stops every rank before the optimizer takes a step with a loss or a gradient that is not finite.

        Raises: TrainingError that names the step and a file with the rows of the pool that it drew.
        """
        finite = bool(torch.isfinite(self._sums[4]))
        if finite and not self.args.fp16:  # fp16's scaler has infinite gradients now and then, and skips them
            # a rank's own part of sharded ones: their norm would wait for a rank whose loss is not finite
            gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
            finite = bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        if self.accelerator.num_processes > 1:
            finite = bool(self.accelerator.reduce(torch.tensor(float(not finite), device=self.args.device)) == 0)
        if finite:
            return
        args, step = self.args, self.state.global_step
        batch = self.get_total_train_batch_size(args)
        first = step % args.steps_per_round * batch
        path = self.folder / f"not-finite-step-{step + 1}.json"
        if self.is_world_process_zero():
            drawn = range(first, first + batch)
            rows = [{"pool_row": int(self._drawn[i]), **self.draws[i]} for i in drawn]
            write_json(path, {"step": step + 1, "round": step // args.steps_per_round, "rows": rows})
        raise TrainingError(
            f"The loss or a gradient of step {step + 1} is not finite, so the step was not taken; the {batch} rows that"
            f" it drew are in {path}. Lower learning_rate, raise warmup_steps or use float32 weights, in a new"
            " output_dir."
        )

    # -- what a round tells

    def measure_tokens(self) -> dict[str, float]:
        """Do the tokens mean anything yet? Measured on held-out rows of the pool, whose prompts are never drawn.

        Returns: token_auc, with which log p(y | x, best) - log p(y | x, worst), a token, tells the best quantile's rows
            from the worst one's (0.5 is nothing), its standard error, and heldout_nll; empty when too few rows are
            held out.
        """
        return measuring.meaning(self, self._quantiles)

    def reference_nll(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float | None]:
        """NLL a token under the original model of the first samples, without a reward token; None for the others."""
        return measuring.reference_nll(self, prompt_ids, completion_ids)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Completes held-out prompts with the best token and scores them, with the independent scorers too.

        Returns: eval_reward and eval_<function>: means over completions, and their standard errors over prompts
            (eval_..._se); eval_reference_perplexity; eval_dist_2.
        """
        del ignore_keys
        prompts = self.eval_prompts
        if eval_dataset is not None:
            position = self.reward_tokens.position
            prompts = encode(checked(eval_dataset, "eval_dataset"), self.processing_class, position, self.room)
        if prompts is None:
            raise DataError("evaluate() needs held-out prompts. Give QuarkTrainer an eval_dataset.")
        metrics = self._held_out(prompts, self.reward_tokens.best, metric_key_prefix, eval_dataset is not None)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_base(self) -> dict[str, float]:
        """As `evaluate`, of the original model without a reward token; the names begin with base_."""
        assert self.eval_prompts is not None
        with self.as_reference():
            return self._held_out(self.eval_prompts, None, "base")

    def _held_out(
        self, prompts: EncodedPrompts, quantile: int | None, prefix: str, others: bool = False
    ) -> dict[str, float]:
        """others: the prompts are not the run's own, so that its verdict leaves the figures out."""
        self.open_pool()  # the folder is this run's from here on, and may hold its figures
        self.fix_what_is_measured()
        columns, texts, nll = held_out_columns(self, prompts, quantile, self._keeps_held_out)
        figures = measuring.held_out_figures(columns, texts, self.args.num_eval_generations)
        figures["reference_perplexity"] = float(np.exp(nll).mean())
        metrics = {f"{prefix}_{name}": value for name, value in figures.items()}
        if not others:
            self.round_metrics |= metrics
        self.log({**metrics, "other_prompts": True} if others else dict(metrics))
        return metrics

    def verdict(self) -> dict[str, Any]:
        """What the held-out prompts say of the run so far; see `measuring.verdict`."""
        return measuring.verdict(self.metrics_file.lines(), self.eval_rewards.names if self.eval_rewards else ())

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Adds the learning step's own means since the last line, and writes the line to metrics.jsonl too."""
        if "loss" in logs:
            # ours, not Trainer's own mean: it goes on where a stopped run left it
            nll, kl, entropy, tokens, loss, steps = self._all_sums().tolist()
            self._sums.zero_()
            if tokens:
                logs |= {"loss": loss / steps, "nll": nll / tokens, "kl": kl / tokens}
                if self.args.entropy_coef:
                    logs["entropy"] = entropy / tokens
                self.round_metrics |= {"nll": logs["nll"], "kl": logs["kl"]}
        super().log(logs, start_time)
        step = self.state.global_step
        if self.is_world_process_zero() and not (self._is_finished and self._has_ended(step)):
            round = min(max(step - ("loss" in logs), 0) // self.args.steps_per_round, self.args.num_rounds - 1)
            untrained = {} if self._trains or step else {"untrained": True}
            self.metrics_file.append(
                {"round": self.round_metrics.get("round", round), "step": step, **logs, **untrained}
            )

    def _has_ended(self, step: int) -> bool:
        """Whether the run's last line is there: a kill may have come between it and the last checkpoint."""
        return any("train_runtime" in line and line.get("step") == step for line in self.metrics_file.lines())

    def _all_sums(self) -> torch.Tensor:
        """The sums since the last line over all ranks; the steps are one rank's."""
        if self.accelerator.num_processes == 1:
            return self._sums
        device = self.args.device
        sums = self._sums.to(device, torch.float32 if device.type == "mps" else torch.float64)
        sums = self.accelerator.reduce(sums).cpu().double()
        sums[5] = self._sums[5]
        return sums

    # -- the run

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Runs all rounds. Ctrl-C or SIGTERM saves a checkpoint at the next step, and raises KeyboardInterrupt.

        resume_from_checkpoint: True or None take the newest complete checkpoint of the folder, if there is one; False
            starts anew in an empty folder; or a path.
        Raises: ConfigError for False in a folder that holds samples.
        """
        anew = resume_from_checkpoint is False
        with locked(self.folder) if self.is_world_process_zero() else contextlib.nullcontext():
            if resume_from_checkpoint is None or resume_from_checkpoint is True:
                newest, wrong = first_tells(lambda: last_whole_checkpoint(self.folder))
                for path, why in wrong.items():
                    warnings.warn(f"{path} {why}, and is not used.", stacklevel=2)
                resume_from_checkpoint = str(newest) if newest else False
            elif resume_from_checkpoint and (reason := what_is_wrong(Path(resume_from_checkpoint))):
                if not (Path(resume_from_checkpoint) / MARKER).is_file():
                    reason = f"has no {MARKER}, so it is not Quark's or was not finished"
                raise ModelError(f"{resume_from_checkpoint} {reason}. Give another checkpoint, or none for the newest.")
            if anew and has_round(self.folder):
                raise ConfigError(
                    f"resume_from_checkpoint=False begins anew, but {self.folder} holds a run's samples, which would be"
                    " mixed with the new ones. Choose another output_dir, or leave it out to go on with that run."
                )
            if resume_from_checkpoint:
                resuming.check_sharding(self, Path(resume_from_checkpoint))
                with resuming.no_pickles(resume_from_checkpoint):
                    resuming.check_sharded_files(Path(resume_from_checkpoint))
            with disk_errors(self.folder):
                resuming.check_pool(self, resume_from_checkpoint)
                if self.is_world_process_zero() and Path(resume_from_checkpoint or "").parent.name != UNFINISHED:
                    shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
                resuming.go_on_from(self, resume_from_checkpoint)
            self._trains, self._failed = True, None
            if self.vllm is not None:
                self.vllm.holds = self.vllm.saved = None  # the weights become those of the checkpoint
            try:
                with self._signals(), disk_errors(self.folder), resuming.no_pickles(resume_from_checkpoint):
                    with self._saved_when_all_stop():
                        output = super().train(resume_from_checkpoint or None, *args, **kwargs)
                    if self._failed is not None:
                        raise self._failed
                    step = self.state.global_step
                    saved = f"after step {step} of {self.state.max_steps}, which is saved"
                    self.stop_together(saved if step else "before the first step was done")
                    self.sweep_held_out()
            finally:
                self._trains = self._is_finished = False
                self.learn_bar.close()
        return output

    @contextlib.contextmanager
    def _saved_when_all_stop(self) -> Iterator[None]:
        """What stops all ranks between two steps, while they explore or measure, loses none of the steps before it."""
        try:
            yield
        except (KeyboardInterrupt, QuarkError) as stopped:
            if stopped is self._joint:
                self._save_checkpoint(self.model, None)
            raise

    def open_pool(self) -> Pool:
        """The run's pool; the folder becomes this run's when it is first asked for. Raises: ConfigError, PoolError."""
        if self.pool is None:
            if self.is_world_process_zero():
                claim(self.folder, resuming.identity(self))
                warn_of_other_sources(self.folder, self.rewards.sources)
                describe(self.folder, self.args.to_dict())
                self.reward_tokens.save(self.folder)
                Pool.open(self.pool_folder, create=True)
                if not (self.pool_folder / "manifest.json").exists():
                    write_json(self.pool_folder / "manifest.json", {"rounds": []})
            self.accelerator.wait_for_everyone()
            self.pool = Pool.open(self.pool_folder)
            # one that opened it later would find round 0 of a user's own data there, and not wait for it in `explore`
            self.accelerator.wait_for_everyone()
        return self.pool

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks to stop, the second one stops at once."""
        self.interrupted = False

        came: list[float] = []

        def ask(number: int, frame: Any) -> None:
            came.append(time.monotonic())
            # torchrun hands on what the terminal or the scheduler has sent to every process already
            again = self.accelerator.num_processes == 1 or came[-1] - came[0] > 5
            if self.interrupted and again:
                raise KeyboardInterrupt
            self.interrupted = True
            self.display.line("Stopping as soon as what is under way is saved. Once more stops at once.")

        try:
            old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # signals belong to the main thread; elsewhere the caller's handlers stay
            old = {}
        try:
            yield
        finally:
            self.interrupted = False
            for number, handler in old.items():  # None: it was set by no Python code, and cannot be set again
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def all_stop(self) -> bool:
        """Whether any rank was asked to stop: all then stop at the same place, or the others would wait for it."""
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(float(self.interrupted), device=self.args.device)
            agreed = bool(self.accelerator.reduce(asked) > 0)
            self.interrupted |= agreed  # a signal that came during the reduce is for the next time
            return agreed
        return self.interrupted

    def stop_together(self, when: str) -> None:
        """Raises: KeyboardInterrupt on every rank when one was asked to stop."""
        if self.all_stop():
            self._joint = KeyboardInterrupt(f"stopped {when}")
            raise self._joint

    def fail_together(self, failed: QuarkError | None) -> None:
        """Raises what a rank failed of on every rank, which else waited for it; each must call it at the same place."""
        if self.accelerator.num_processes > 1:
            told = next((error for error in gather_object([failed]) if error is not None), None)
            failed = failed or told  # one's own has its traceback
        if failed is not None:
            self._joint = failed
            raise failed

    def finish_round(self, round: int) -> None:
        """What is measured when a round has learned: the meaning of its tokens, the held-out prompts, its line."""
        args = self.args
        figures = self.measure_tokens()
        self.round_metrics |= figures
        if figures:
            self.log(dict(figures))
        if self.eval_prompts is not None and args.eval_every and (round + 1) % args.eval_every == 0:
            with self.keeping_held_out():
                self.evaluate()
            names = self.eval_rewards.names if self.eval_rewards else ()
            if args.metric_for_best_model is None:
                # Trainer then keeps that round's checkpoint, whatever save_total_limit says; it also waits for all
                # ranks when there is one, so that all must know it
                self.state.best_global_step = first_tells(
                    lambda: measuring.best_step(self.metrics_file.lines(), names, args.steps_per_round)
                )
        self._measured_at = self.state.global_step
        self.display.round_line(round, args.num_rounds, self.round_metrics)
        measuring.warn_of_meaning(self, round, figures)
        self._stops_early = self._nothing_new(self.round_metrics)
        if self._stops_early and round + 1 < args.num_rounds:
            self.display.line(
                f"Stopping after round {round + 1} of {args.num_rounds}: none of its samples was as good as the best"
                " quantile of the rounds before, so the next ones would learn nothing new (early_stop)."
            )

    def metrics_digest(self, measured: bool) -> list[Any]:
        """The length and SHA-256 of those lines of metrics.jsonl that stay when the run goes on from this step."""
        step = self.state.global_step
        round, inside = divmod(step, self.args.steps_per_round)
        return list(self.metrics_file.kept_digest(step, None if inside else round, measured or bool(inside)))

    def _nothing_new(self, figures: dict[str, Any]) -> bool:
        """Whether a round found nothing better: by chance a small one has none of the best K-th, and a user's own round
        0 may be better than what any model says."""
        ranked = figures.get("samples", 0) - figures.get("dropped", 0)
        enough = ranked >= _EARLY_STOP_ROWS * self.args.num_quantiles
        of_its_own = self.initial_pool is None or figures.get("round", 0) > 1
        return bool(self.args.early_stop) and enough and of_its_own and figures.get("share_above_best") == 0.0

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes a checkpoint: beside its place, and where it finds no other that it would delete."""
        return str(self.folder / UNFINISHED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes the checkpoint, marks it, puts it in its place, and only then deletes older ones."""
        step, state = self.state.global_step, self.state
        if step in (0, self._saved_at):  # a stop asks again at the end of its epoch
            return
        name, best = f"checkpoint-{step}", f"checkpoint-{state.best_global_step}"
        super()._save_checkpoint(model, trial)
        if best == name or (self.folder / best).is_dir():
            state.best_model_checkpoint = str(self.folder / best)
        self.accelerator.wait_for_everyone()
        sums = self._all_sums().tolist()
        if self.is_world_process_zero():
            written = self.folder / UNFINISHED / name
            state.save_to_json(str(written / TRAINER_STATE_NAME))  # Trainer's names `written` as the best one's place
            measured = self._measured_at == step
            marker = {
                "step": step,
                "pool_sha256": self.open_pool().hashes(),
                "measured": measured,
                "stops_early": self._stops_early,
                "base": base_name(self.model),
                "sums": sums,
                "metrics": self.metrics_digest(measured),
            }
            put_in_place(written, self.folder / name, marker)
            rotate(self.folder, self.args.save_total_limit, [name, Path(state.best_model_checkpoint or "").name])
            if measured or step % self.args.steps_per_round:
                self.sweep_held_out()
        self._saved_at = step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or cast(str, self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)  # FSDP's sharded checkpoints come later than this
            self.reward_tokens.save(folder)


# -- helpers

# Ranked samples of a round, for each quantile, from which on none of the best is no chance: (1 - 1/K)^(10 K) < .0001.
_EARLY_STOP_ROWS = 10


def _reward_functions(reward_funcs: Any, processing_classes: Any) -> list[Callable[..., Any]]:
    specs = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs or ())
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


def _check_differ(rewards: np.ndarray, attribute: str = "") -> None:
    """Raises: RewardError unless two rewards differ."""
    if not len(rewards) or np.ptp(rewards) == 0:
        value = f"{rewards[0]:.6g}" if len(rewards) else "missing"
        of = f" of {attribute}" if attribute else ""
        raise RewardError(
            f"All {len(rewards):,} rewards{of} of the pool are equal ({value}), so no sample is better than another and"
            " there is nothing to learn. Use a graded reward, or prompts on which it differs."
        )
