"""QuarkConfig: every knob of a run, its unit, default and reason. What a knob does lives in the room that it names.

Source of the presets: Lu et al. 2022 ("paper") and the script that its authors published ("authors").
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from .errors import ConfigError
from .generation import DRAWING, GenerationSettings

# What each preset sets; a field that the caller names wins over its preset.
PRESETS: dict[str, dict[str, Any]] = {
    # The paper's equations: a new random token in front of the prompt, every quantile drawn, KL(reference || policy).
    "paper": {
        "reward_token_style": "embedding",
        "reward_token_init": "random",
        "reward_token_position": "first",
        "draw": "all",
        "pool_window": None,
        "quantile_scope": "global",
        "num_quantiles": 5,
        "explore_strength": 1.0,
        "dial_min_p": 0.0,
        "explore_token": "best",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.05,
        "kl_direction": "forward",
        "entropy_coef": 0.0,
        "token_dropout": 0.0,
        "num_generations": 1,
        "prompts_per_round": None,
        "prompts_first_round": None,
        "heldout_share": 0.0,
        "steps_per_round": 500,
        "max_completion_length": 20,
        "per_device_train_batch_size": 128,
        "learning_rate": 1e-5,
        "adam_epsilon": 1e-5,
        "warmup_steps": 500,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "disable_dropout": True,
        "early_stop": False,
    },
}
# The authors' script differs from the paper's equations in these, and in what no field sets (docs/differences.md).
PRESETS["authors"] = {
    **PRESETS["paper"],
    "kl_direction": "reverse",
    "entropy_coef": 0.06,
    "mask_reward_tokens": False,
    "reward_token_position": "before_bos",
    "min_completion_length": 3,
}

_CHOICES = {
    "reward_token_style": ("text", "embedding"),
    "reward_token_init": ("random", "words"),
    "reward_token_position": ("first", "before_bos", "before_completion"),
    "draw": ("all", "balanced", "ends", "best"),
    "quantile_scope": ("global", "prompt"),
    "explore_token": ("best", "random"),
    "kl_direction": ("forward", "reverse"),
    "vllm_mode": ("colocate", "server"),
}

# Fields that only one mode of vLLM reads.
_VLLM_FIELDS = {
    "server": ("vllm_server_base_url", "vllm_server_timeout", "vllm_group_port"),
    "colocate": (
        "vllm_gpu_memory_utilization",
        "vllm_tensor_parallel_size",
        "vllm_max_model_length",
        "vllm_enable_sleep_mode",
    ),
}

# Fields of TrainingArguments that Quark's own loop never reads, each with what to do instead.
_NO_EFFECT = {
    "label_smoothing_factor": "the loss is Quark's own. Leave it out",
    "train_sampling_strategy": "a round's draws are Quark's own. Set draw",
    "data_seed": "the draws depend on seed alone. Set seed",
    "resume_from_checkpoint": "a run goes on from its newest whole checkpoint by itself. Leave it out; for another one"
    " call QuarkTrainer.train(resume_from_checkpoint=...)",
    "remove_unused_columns": "the reward functions get every column. Remove columns from the data set",
    "per_device_eval_batch_size": "held-out prompts are completed in generation's batches. Set generation_batch_size",
    **dict.fromkeys(
        (
            "batch_eval_metrics",
            "bf16_full_eval",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "fp16_full_eval",
            "include_for_metrics",
            "prediction_loss_only",
        ),
        "held-out prompts are completed and scored, not run through Trainer's evaluation loop. Leave it out",
    ),
}

# What the pool's column for the reward token that a sample was asked with can number.
_MOST_CODES = 2**15

# The types that our own annotations name, and what to call them.
_KINDS: dict[str, tuple[type, str]] = {
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "text"),
}


@dataclass
class QuarkConfig(TrainingArguments):
    """The settings of one run: those of `transformers.TrainingArguments`, and Quark's own.

    `preset="authors"` restores the authors' code in every row of docs/differences.md that names a field. A preset needs
    to know which fields were named: `HfArgumentParser` names them all, so with it a preset is refused unless it changes
    nothing. `quark train` passes on only what was named.

    Example:
        ```python
        from quark_lm import QuarkConfig

        QuarkConfig("runs/polite", num_rounds=6, num_quantiles=5, beta=0.05)
        QuarkConfig("runs/paper", preset="paper", num_rounds=47)  # the paper's settings, but for what you name
        ```

    Raises: ConfigError when a value, or two values together, cannot work.
    """

    preset: str | None = field(
        default=None,
        metadata={
            "help": "'paper' or 'authors' (in every row of docs/differences.md that names a field): their settings for"
            " every field that you do not name. None: ours."
        },
    )

    # -- rounds: explore, quantize, learn
    num_rounds: int = field(default=4, metadata={"help": "Rounds of explore, quantize, learn. One round is one epoch."})
    steps_per_round: int = field(
        default=40,
        metadata={"help": "Optimizer steps between two explorations. The paper's 500 are for millions of samples."},
    )
    prompts_per_round: int | None = field(
        default=768,
        metadata={
            "help": "Prompts that a round explores, without repeats as far as there are as many. None: all of them."
        },
    )
    prompts_first_round: int | None = field(
        default=1536,
        metadata={
            "help": "The same for round 0, which samples the untrained model: it gives the tokens their meaning."
        },
    )

    # -- explore (TRL's names)
    num_generations: int = field(default=1, metadata={"help": "Completions of one prompt in one round."})
    max_completion_length: int = field(default=20, metadata={"help": "Most tokens of a completion. The paper's 20."})
    min_completion_length: int = field(
        default=0, metadata={"help": "The end-of-text token is barred for this many tokens. The authors' code: 3."}
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Divides the logits while exploring, and while learning from it; 0 explores greedily."},
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Exploring draws from the smallest set of tokens with this probability."}
    )
    top_k: int = field(default=0, metadata={"help": "Exploring draws from the k likeliest tokens; 0: from all."})
    explore_strength: float = field(
        default=2.0,
        metadata={
            "help": "The dial while exploring: logits = worst + strength x (best - worst). 1 is the paper's plain best"
            " token; 2 draws samples better than the policy's own, at two forward rows a sample."
        },
    )
    dial_min_p: float = field(
        default=0.0,
        metadata={
            "help": "With explore_strength above 1: draw only tokens that the prompt with its token gives at least this"
            " share of its likeliest token's probability, so that a strong dial drifts less. 0: no limit."
        },
    )
    explore_token: str = field(
        default="best", metadata={"help": "'best', or 'random' (the paper's losing ablation): whose samples to draw."}
    )
    merge_adapter: bool = field(
        default=True,
        metadata={
            "help": "Sample with the adapter merged into a copy of its layers' weights: faster, for the memory of that"
            " copy while sampling."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of one generation batch. None: as many as fitted the memory when the run was begun."},
    )

    # -- explore by vLLM (TRL's names; docs/vllm.md)
    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "vLLM samples the completions, in place of the model in this process; it knows no dial, so set"
            " explore_strength=1."
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": "'colocate': in this process, on the same GPU; 'server': a running `vllm serve`."},
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "Of that server, without /v1. None: http://127.0.0.1:8000."}
    )
    vllm_server_timeout: float = field(
        default=240.0,
        metadata={"help": "Seconds that it may take for one answer, and that it is waited for when it is not there."},
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port of this machine where a server with NCCL weight transfer meets the run."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that a colocated vLLM takes."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "GPUs over which a colocated vLLM spreads the model; needs a run of one process."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Most tokens that a colocated vLLM reads. None: the model's context."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "A colocated vLLM gives its memory back while the model learns."}
    )

    # -- quantize
    num_quantiles: int = field(default=5, metadata={"help": "K: quantile 0 is the worst, K-1 the best."})
    quantile_scope: str = field(
        default="global",
        metadata={"help": "'global': ranked among the whole pool. 'prompt': among the samples of the same prompt."},
    )
    pool_window: int | None = field(
        default=None, metadata={"help": "Only the last R rounds are ranked and drawn. None: all, as in the paper."}
    )
    draw: str = field(
        default="ends",
        metadata={
            "help": "Rows that a step draws: 'all' uniformly (paper), 'balanced' over the quantiles, 'ends' (worst and"
            " best only: more signal a sample), 'best' only (AlpacaFarm's variant)."
        },
    )
    best_share: float = field(
        default=0.75, metadata={"help": "With draw='ends': the share of a step's rows that are of the best quantile."}
    )
    heldout_share: float = field(
        default=0.1,
        metadata={"help": "Share of the prompts whose rows are never drawn; they measure if the tokens mean anything."},
    )
    meaning_rows: int = field(
        default=256, metadata={"help": "At most so many held-out rows are scored a round for that measure (the AUC)."}
    )

    # -- reward tokens
    reward_token_style: str = field(
        default="text",
        metadata={"help": "'text': a tag that the model already half understands. 'embedding': a new token (paper)."},
    )
    reward_token_texts: list[str] | None = field(
        default=None,
        metadata={
            "help": "The K tags, worst first, or the K words from whose rows new tokens start. None: 'Quality: ...'."
        },
    )
    reward_token_init: str = field(
        default="random",
        metadata={"help": "New rows: 'random' as N(mean, std) of the old ones (paper), or from 'words'."},
    )
    reward_token_position: str = field(
        default="first",
        metadata={"help": "'first' (after a beginning-of-text token), 'before_bos' (authors), or 'before_completion'."},
    )
    token_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of the draws trained without a reward token: keeps an unconditional branch."},
    )

    # -- learn
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL to the original model. The paper's 0.05."})
    kl_direction: str = field(
        default="forward",
        metadata={"help": "'forward' KL(reference || policy), as in the paper; 'reverse', as in the authors' code."},
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "Weight of an entropy bonus. The paper has none; the authors' code 0.06."}
    )
    mask_reward_tokens: bool = field(
        default=True,
        metadata={"help": "Leave reward tokens out of every softmax. The authors' code only does so in the KL."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "No dropout while learning, as in the authors' code."}
    )
    loss_chunk_elements: int | None = field(
        default=None,
        metadata={
            "help": "Logits that exist at once while learning, rows x words. None: as many as are fast, 16 to 64 MiB."
        },
    )

    # -- rewards
    reward_attributes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names, one a reward function: each is ranked by itself, and has reward tokens and a dial of its"
            " own. None: the weighted sum is ranked."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function in the sum. None: 1 each."}
    )
    reward_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that the rewards get at once, rounded to whole groups of num_generations; None: 256."
            " What is scored is kept if the run stops."
        },
    )
    reward_retries: int = field(
        default=2,
        metadata={
            "help": "How often a reward that raises is called again, with growing pauses, before its batch counts as"
            " having none."
        },
    )
    max_failed_rewards: float = field(
        default=0.0,
        metadata={
            "help": "Share of a round's completions whose reward may fail before the run stops; 0: the first failure"
            " stops it."
        },
    )

    # -- held-out prompts
    eval_every: int = field(
        default=1, metadata={"help": "The held-out prompts are completed and scored every so many rounds; 0: never."}
    )
    num_eval_generations: int = field(default=2, metadata={"help": "Completions of each held-out prompt then."})
    early_stop: bool = field(
        default=True,
        metadata={
            "help": "End the run after a round of which no sample was as good as the best quantile of the rounds"
            " before: there is nothing new to learn."
        },
    )

    # -- model and logs
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained when the model is given by its name."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Values for the chat template, such as {enable_thinking: false}. They become part of the"
            " tokenizer's template, so that whatever loads the model asks it as it was trained."
        },
    )
    log_completions: bool = field(default=False, metadata={"help": "Show a few completions of each round."})
    num_completions_to_print: int = field(default=4, metadata={"help": "How many of them."})

    # -- TrainingArguments' own, with other defaults
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "None: 6e-4 for an adapter, 1e-5 (the paper's) for the whole model."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Draws in one micro-batch."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "The learning rate's schedule."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps in which the learning rate rises from 0."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "No clipping, as in the authors' code; Trainer's is 1."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of metrics."})
    save_strategy: str = field(default="epoch", metadata={"help": "'epoch' saves a checkpoint each round."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "A NaN loss must be seen, not averaged over."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns pass through to the rewards."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "A draw is small; pinning it buys nothing."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "A step uses every parameter that learns; looking for others walks the graph once more. True for"
            " models that leave some out, such as mixtures of experts."
        },
    )
    # in this order: HfArgumentParser (transformers 5.24) takes the second of the three as the flag's type
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers, such as 'tensorboard'."}
    )

    # theirs is the class's too, but has no annotation that says so
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
    ]

    def __post_init__(self) -> None:
        self._check_types()
        self._check_quark_fields()
        self._check_trainer_fields()
        # One round is one epoch: Trainer's own counters, schedules and checkpoints then count rounds.
        self.num_train_epochs = self.num_rounds
        self.learning_rate_is_default = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = 1e-5  # QuarkTrainer raises it for an adapter
        super().__post_init__()
        self._check_parsed_fields()

    def to_dict(self) -> dict[str, Any]:
        # Trainer takes every field whose name ends in "_token" for a secret
        return super().to_dict() | {"explore_token": self.explore_token}

    def _check_types(self) -> None:
        """Raises: ConfigError for a value that is of another type than our field, such as text for a number."""
        for name, annotation in QuarkConfig.__annotations__.items():
            kind = annotation.removesuffix(" | None")  # annotations are text here
            item = kind.removeprefix("list[").removesuffix("]")
            value = getattr(self, name)
            if item not in _KINDS or (value is None and kind != annotation):
                continue
            expected, words = _KINDS[item]
            values = [value]
            if kind != item:
                words = f"a list, each item {words}"
                values = list(value) if isinstance(value, (list, tuple)) else [None]
            # True is a number to Python
            if not all(isinstance(v, expected) and (item == "bool" or not isinstance(v, bool)) for v in values):
                raise ConfigError(f"{name}={value!r} is of type {type(value).__name__}. Give {words}.")
            if kind == item == "int":
                setattr(self, name, int(value))  # numpy's integers are no JSON

    def _check_quark_fields(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                options = ", ".join(map(repr, choices))
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {options}. Choose one of them.")
        at_least = {
            "num_rounds": 1,
            "steps_per_round": 1,
            "num_generations": 1,
            "max_completion_length": 1,
            "min_completion_length": 0,
            "num_quantiles": 2,
            "meaning_rows": 0,
            "eval_every": 0,
            "num_eval_generations": 1,
            "loss_chunk_elements": 1,
            "temperature": 0.0,
            "beta": 0.0,
            "top_k": 0,
            "prompts_per_round": 1,
            "prompts_first_round": 1,
            "pool_window": 1,
            "generation_batch_size": 1,
            "reward_batch_size": 1,
            "reward_retries": 0,
            "vllm_group_port": 1,
            "vllm_tensor_parallel_size": 1,
            "vllm_max_model_length": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(
                    f"{name}={value} is {f'below {least}' if value == value else 'no number'}, where it has no meaning."
                    f" Set it to {least} or more."
                )
        GenerationSettings(**{name: getattr(self, name) for name in DRAWING})  # which checks them
        for name in ("token_dropout", "heldout_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name)} is not a share. Set it to 0 or more and below 1.")
        if not 0.0 <= self.max_failed_rewards <= 1.0:
            raise ConfigError(f"max_failed_rewards={self.max_failed_rewards} is not a share. Set it from 0 to 1.")
        if not math.isfinite(self.explore_strength):
            raise ConfigError(f"explore_strength={self.explore_strength} is not a number. Set it to 1 for plain Quark.")
        if self.dial_min_p and self.explore_strength <= 1:
            raise ConfigError(
                f"dial_min_p={self.dial_min_p} would do nothing with explore_strength={self.explore_strength}, for it"
                " limits a dial above 1. Leave it out, or raise explore_strength."
            )
        self._check_attributes()
        num_texts = self.num_quantiles * len(self.reward_attributes or ("",))
        if self.reward_token_texts is not None and len(self.reward_token_texts) != num_texts:
            each = f" of each of {len(self.reward_attributes)} attributes" if self.reward_attributes else ""
            raise ConfigError(
                f"reward_token_texts has {len(self.reward_token_texts)} texts, but num_quantiles={self.num_quantiles}:"
                f" each quantile{each} needs one. Give one text a quantile, the worst first."
            )
        if self.reward_token_style == "embedding":  # a text tag means something before any step; a new token nothing
            if self.draw == "best" and self.explore_strength != 1:
                raise ConfigError(
                    f"explore_strength={self.explore_strength} dials away from the worst token, which draw='best' never"
                    " trains. Set explore_strength=1, or another draw."
                )
            if self.draw in ("ends", "best") and self.explore_token == "random":
                raise ConfigError(
                    f"explore_token='random' asks for tokens that draw={self.draw!r} never trains. Set draw='all'."
                )
        if not 1 / 16 <= self.best_share <= 15 / 16:
            raise ConfigError(
                f"best_share={self.best_share} would leave draw='ends' one end. Set it from 0.0625 to 0.9375, or"
                " draw='best'."
            )
        if self.best_share != type(self).best_share and self.draw != "ends":
            raise ConfigError(
                f"best_share={self.best_share} is a share of the two ends, and draw={self.draw!r} draws others. Leave"
                " it out, or set draw='ends'."
            )
        if self.quantile_scope == "prompt" and self.num_generations < 2:
            raise ConfigError(
                f"quantile_scope='prompt' ranks a prompt's own samples, but num_generations={self.num_generations}"
                " gives nothing to rank. Set num_generations to 2 or more."
            )
        if self.reward_token_style == "text" and self.reward_token_position == "before_bos":
            raise ConfigError(
                "reward_token_position='before_bos' puts words before the beginning-of-text token, which no model has"
                " seen. Use 'first'."
            )

        self._check_vllm_fields()

    def _check_attributes(self) -> None:
        names = self.reward_attributes
        if names is None:
            return
        if len(names) < 2:
            raise ConfigError(
                f"reward_attributes={names!r} names {len(names)}: one rank needs no name. Leave it out, or name two."
            )
        for name in names:
            alike = [other for other in names if other.casefold() == name.casefold()]
            if not re.fullmatch(r"[\w -]*\w", name) or len(alike) > 1:
                raise ConfigError(
                    f"reward_attributes has {name!r}, by which a dial could not be named. Give each a name of its own,"
                    " of letters, digits, spaces and -."
                )
        if self.num_quantiles ** len(names) > _MOST_CODES:
            raise ConfigError(
                f"num_quantiles={self.num_quantiles} in each of {len(names)} attributes are more than {_MOST_CODES:,}"
                " combinations. Lower num_quantiles, or rank a weighted sum."
            )

    def _check_vllm_fields(self) -> None:
        for mode, names in _VLLM_FIELDS.items():
            for name in ("vllm_mode", *names):
                value = getattr(self, name)
                if value == getattr(QuarkConfig, name) or (self.use_vllm and self.vllm_mode == mode):
                    continue
                if not self.use_vllm:
                    raise ConfigError(
                        f"{name}={value!r} would do nothing without use_vllm=True. Set it, or leave {name} out."
                    )
                if name != "vllm_mode":
                    raise ConfigError(
                        f"{name}={value!r} would do nothing with vllm_mode={self.vllm_mode!r}. Leave it out, or set"
                        f" vllm_mode={mode!r}."
                    )
        if not 0.0 < self.vllm_gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"vllm_gpu_memory_utilization={self.vllm_gpu_memory_utilization} is not a share of the memory. Set it"
                " above 0, to 1 at most."
            )
        if not 0.0 < self.vllm_server_timeout < math.inf:
            raise ConfigError(
                f"vllm_server_timeout={self.vllm_server_timeout} is no number of seconds. Set it above 0."
            )
        if self.use_vllm and self.explore_strength != 1.0:
            raise ConfigError(
                f"explore_strength={self.explore_strength} mixes the logits of two prompts at each token, and vLLM's"
                " public API gives those of one. With use_vllm=True set explore_strength=1 (the paper's); or leave"
                " use_vllm out."
            )

    def _check_trainer_fields(self) -> None:
        """Raises: ConfigError for what Trainer offers and here would do nothing, or harm."""
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if f.name in _NO_EFFECT and getattr(self, f.name) != default:
                raise ConfigError(f"{f.name}={getattr(self, f.name)!r} would do nothing: {_NO_EFFECT[f.name]}.")
        if self.num_train_epochs not in (TrainingArguments.num_train_epochs, self.num_rounds):
            raise ConfigError(
                f"num_train_epochs={self.num_train_epochs} would do nothing: one round is one epoch. Set num_rounds."
            )
        self._check_eval_fields()
        if self.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size=True restarts the loop with fewer draws a step, so a round would not be the same"
                " round. Set per_device_train_batch_size and gradient_accumulation_steps."
            )
        if self.ignore_data_skip:
            raise ConfigError(
                "ignore_data_skip=True would draw a resumed round's first rows twice. Leave it False: skipping is free."
            )
        if self.save_only_model:
            raise ConfigError(
                "save_only_model=True leaves the optimizer out of a checkpoint, so a resumed run would be another run."
                " Leave it False; model/ is the model alone."
            )
        if self.enable_jit_checkpoint:
            raise ConfigError(
                "enable_jit_checkpoint=True would take SIGTERM from Quark, which saves a checkpoint then already. Leave"
                " it False."
            )
        if not self.average_tokens_across_devices:
            raise ConfigError(
                "average_tokens_across_devices=False would weigh each process's tokens by how few it has, so that the"
                " loss would depend on the number of processes. Leave it True."
            )
        if self.push_to_hub:
            raise ConfigError(
                "push_to_hub=True would publish the whole run folder, the pool with every prompt and completion too."
                " Publish the model alone when the run is done: hf upload OWNER/NAME RUN/model."
            )
        if self.full_determinism and self.device.type == "cuda":
            raise ConfigError(
                "full_determinism=True lets torch refuse the running sums on a GPU by which tokens are drawn. Leave it"
                " False: a sample's random numbers depend on its seed alone."
            )
        if self.dataloader_num_workers or self.dataloader_persistent_workers:
            raise ConfigError(
                "Workers of a data loader would keep the pool of the round in which they were started. Set"
                " dataloader_num_workers=0 and dataloader_persistent_workers=False: a draw costs microseconds."
            )
        if self.max_steps > 0:
            raise ConfigError(
                f"max_steps={self.max_steps} would cut a round. Set num_rounds and steps_per_round;"
                " their product is it."
            )

    def _check_eval_fields(self) -> None:
        if self.eval_strategy == "epoch":
            raise ConfigError(
                "eval_strategy='epoch' would do nothing that eval_every does not do. Leave it out; to measure more"
                " often, or for load_best_model_at_end, set eval_strategy='steps' and eval_steps."
            )
        if self.eval_strategy != "steps":
            for name in ("eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} would do nothing without eval_strategy='steps'. Set that and"
                        " eval_steps too, or leave it out: eval_every counts rounds."
                    )
            if self.save_strategy == "best":
                raise ConfigError(
                    "save_strategy='best' would never save without eval_strategy='steps'. Set that, eval_steps and"
                    " metric_for_best_model too, or save_strategy='epoch'."
                )

        chooses = self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau"
        metric = self.metric_for_best_model or ("loss" if chooses else None)  # as Trainer would have it
        if metric in ("loss", "eval_loss"):
            raise ConfigError(
                f"metric_for_best_model={metric!r} is not measured on held-out prompts. Set eval_strategy='steps' and"
                " metric_for_best_model='eval_reward', or 'eval_' and an independent scorer's name."
            )

    def _check_parsed_fields(self) -> None:
        """What TrainingArguments has read from JSON by now. Raises: ConfigError."""
        for name in ("dispatch_batches", "split_batches"):
            if getattr(self.accelerator_config, name):
                raise ConfigError(
                    f"accelerator_config sets {name}, which would cut a batch's packed completion tokens as if they"
                    " were its rows. Leave it out: each process draws its own batch."
                )
        liger: Any = self.liger_kernel_config or {}
        if self.use_liger_kernel and liger.get("fused_linear_cross_entropy", True):
            raise ConfigError(
                "use_liger_kernel=True replaces the model's forward, in which Quark's loss runs. Set"
                " liger_kernel_config={'fused_linear_cross_entropy': False} too: Quark's loss makes no large logits"
                " anyway."
            )


def _with_preset(init: Any) -> Any:
    """The dataclass's __init__, in which a preset fills the fields that the caller did not name."""

    @functools.wraps(init)
    def __init__(self: QuarkConfig, *args: Any, **kwargs: Any) -> None:
        names = [f.name for f in fields(self) if f.init]
        unknown = next((name for name in kwargs if name not in names), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, names, n=1)
            advice = f"Did you mean {near[0]!r}?" if near else "Leave it out."
            raise ConfigError(f"QuarkConfig has no field {unknown!r}, so it would change nothing. {advice}")
        preset = kwargs.get("preset")
        if preset is not None:
            if preset not in PRESETS:
                raise ConfigError(
                    f"preset={preset!r} is unknown. Use {' or '.join(map(repr, PRESETS))}, or leave it out."
                )
            if len(args) + len(kwargs) == len(names):
                _check_preset_is_in(preset, {**dict(zip(names, args, strict=False)), **kwargs})
            kwargs = {**PRESETS[preset], **kwargs}
        init(self, *args, **kwargs)

    return __init__


def _check_preset_is_in(preset: str, values: dict[str, Any]) -> None:
    """Raises: ConfigError when a field has our default, which may have been named or not, where a preset differs.

    Whoever names every field is a parser, or a copy of another config, whose preset is in its values already.
    """
    for name, wanted in PRESETS[preset].items():
        if values[name] == getattr(QuarkConfig, name) != wanted:
            raise ConfigError(
                f"preset={preset!r} came with every field named, as HfArgumentParser does, so {name} would stay"
                f" {values[name]!r} in place of {wanted!r}. Name only what you mean: quark train, or"
                f" QuarkConfig(preset={preset!r}, ...). For a copy of a config set preset=None."
            )


QuarkConfig.__init__ = _with_preset(QuarkConfig.__init__)  # type: ignore[method-assign]


def quark_fields() -> list[str]:
    """The names of the fields that Quark adds to, or gives another default than, `TrainingArguments`."""
    theirs = {f.name: f.default for f in fields(TrainingArguments)}
    return [f.name for f in fields(QuarkConfig) if f.name not in theirs or f.default != theirs[f.name]]
