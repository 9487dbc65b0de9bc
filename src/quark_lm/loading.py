"""What the caller hands in becomes a model that can learn: by its name, loaded, bare, or under an adapter."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any, cast

import torch

from .errors import ConfigError, ModelError
from .policy import causal_lm, run_body, word_embeddings

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import QuarkConfig
    from .reward_tokens import RewardTokens


def load(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: QuarkConfig,
    peft_config: PeftConfig | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of what the caller gave: a name, or a loaded model with or without its tokenizer.

    A model that learns as a whole is loaded in float32 unless `model_init_kwargs` say otherwise: small updates vanish
    in bfloat16 weights.
    """
    from .packaged import load_model

    if isinstance(model, str):
        # TrainingArguments has read a string of JSON
        options = dict(cast(dict[str, Any] | None, args.model_init_kwargs) or {})
        if peft_config is None and "torch_dtype" not in options:
            options.setdefault("dtype", "float32")
        model, own = load_model(model, **options)
        return model, tokenizer or own
    if args.model_init_kwargs:
        raise ConfigError(
            "model_init_kwargs is for a model given by its name, but a loaded model was given. Leave one out."
        )
    if hasattr(model, "peft_config"):
        check_fresh(model)
    if tokenizer is None:
        from transformers import AutoTokenizer

        name = causal_lm(model).config.name_or_path
        if not name:
            raise ConfigError(
                "The model does not tell its name, so its tokenizer cannot be found. Give it as processing_class."
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return model, tokenizer


@torch.no_grad()
def check_fresh(model: Any) -> None:
    """Refuses a model whose adapter was trained: with the adapter off, the reference would be another model.

    Raises: ModelError.
    """
    embedding = word_embeddings(model)
    ids = (torch.arange(6, device=embedding.device) * 7 % len(embedding))[None]
    positions = torch.arange(6, device=embedding.device)[None]
    was_training = model.training
    model.eval()
    try:
        with_adapter = run_body(model, ids, position_ids=positions, use_cache=False).last_hidden_state
        with model.disable_adapter():
            without = run_body(model, ids, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        model.train(was_training)
    if not torch.allclose(with_adapter, without, rtol=1e-3, atol=1e-3):
        raise ModelError(
            "The model's adapter was trained before, and Quark stays close to the model with the adapter off, which is"
            " another one. Merge it first (model = model.merge_and_unload()) and give a new peft_config."
        )


def with_adapter(model: PreTrainedModel, config: PeftConfig, tokens: RewardTokens, seed: int) -> PreTrainedModel:
    """The model under a PEFT wrapper, which answers as the model itself does."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigError("The model has an adapter already and peft_config asks for another. Give one of the two.")
    if config.is_prompt_learning:
        raise ConfigError(
            f"peft_config is a {type(config).__name__}, whose virtual tokens Quark's forward does not read, so nothing"
            " would learn. Use LoraConfig."
        )
    if tokens.barred:
        # only the new rows of the embedding learn; modules_to_save=["embed_tokens"] would break a tied head
        if getattr(config, "trainable_token_indices", None):
            raise ConfigError("peft_config.trainable_token_indices is set by Quark to the reward tokens. Leave it out.")
        config = copy.deepcopy(config)  # the caller's own may serve another trainer
        config.trainable_token_indices = list(tokens.barred)
    torch.manual_seed(seed)  # the adapter's first weights too depend on the run's seed alone
    return get_peft_model(model, config)


def keep_rows_apart(model: Any) -> None:
    """New rows are saved by themselves: peft 0.21 would ask the hub at each save if the vocabulary grew."""
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def adapter_identity(model: Any) -> dict[str, Any] | None:
    """What makes an adapter's weights fit: another rank could not load a checkpoint."""
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config[model.active_adapter].to_dict()
    wanted = {
        name: config.get(name) for name in ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
    }
    modules = wanted["target_modules"]
    return wanted | {"target_modules": modules if isinstance(modules, str) or modules is None else sorted(modules)}
