"""What the caller hands in becomes a model that can learn: by its name, loaded, bare, or under an adapter."""

from __future__ import annotations

import copy
import functools
import warnings
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
        _check_whole(model)
        return model, with_template_settings(tokenizer or own, args.chat_template_kwargs)
    if args.model_init_kwargs:
        raise ConfigError(
            "model_init_kwargs is for a model given by its name, but a loaded model was given. Leave one out."
        )
    _check_whole(model)
    if hasattr(model, "peft_config"):
        check_fresh(model)
    elif peft_config is None and model.dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"The model is in {str(model.dtype).removeprefix('torch.')} and trained as a whole: small updates vanish"
            " there. Load it in float32 (dtype='float32'), or give a peft_config.",
            stacklevel=3,
        )
    if tokenizer is None:
        from transformers import AutoTokenizer

        name = causal_lm(model).config.name_or_path
        if not name:
            raise ConfigError(
                "The model does not tell its name, so its tokenizer cannot be found. Give it as processing_class."
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return model, with_template_settings(tokenizer, args.chat_template_kwargs)


def with_template_settings(tokenizer: PreTrainedTokenizerBase, settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy whose chat template sets these values before all else.

    Raises: ConfigError when there is no template, or a name or value that no template can set.
    """
    if not settings:
        return tokenizer
    if not isinstance(tokenizer.chat_template, str):
        raise ConfigError(
            f"chat_template_kwargs={settings} set values for the chat template, and the tokenizer has"
            f" {'none' if tokenizer.chat_template is None else 'several'}. Leave it out, or set"
            " tokenizer.chat_template."
        )
    wrong = [name for name, value in settings.items() if not name.isidentifier() or not _is_literal(value)]
    if wrong:
        raise ConfigError(
            f"chat_template_kwargs[{wrong[0]!r}]={settings[wrong[0]]!r} cannot be written into a template. Give names"
            " with true, false, a number or a text."
        )
    tokenizer = copy.deepcopy(tokenizer)  # the caller's own may serve another model
    values = "".join(f"{{% set {name} = {value!r} %}}" for name, value in settings.items())  # Jinja reads Python's
    tokenizer.chat_template = values + tokenizer.chat_template
    return tokenizer


def _is_literal(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _check_whole(model: Any) -> None:
    """Raises: ConfigError for a model that is spread over devices, or holds an adapter that no PeftModel wraps."""
    from peft import PeftModel

    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ConfigError(
            f"device_map spreads the model over {len(devices)} devices, where its parts are not found again. Leave it"
            " out; a model that fits no GPU is split by --accelerate fsdp2."
        )
    if hasattr(model, "peft_config") and not isinstance(model, PeftModel):
        raise ConfigError(
            f"{model.config.name_or_path or 'The model'} comes with an adapter that transformers put into it, so the"
            " model itself, to which Quark stays close, cannot be asked. Give the base model, or merge the adapter"
            " first: PeftModel.from_pretrained(base, adapter).merge_and_unload()."
        )


@torch.no_grad()
def check_fresh(model: Any) -> None:
    """Refuses a model whose adapter was trained: with the adapter off, the reference would be another model.

    Raises: ModelError; ConfigError for one that could not be merged.
    """
    _check_mergeable(model)
    with_adapter = _states(model)
    with model.disable_adapter():
        without = _states(model)
    if not torch.allclose(with_adapter, without, rtol=1e-3, atol=1e-3):
        raise ModelError(
            "The model's adapter was trained before, and Quark stays close to the model with the adapter off, which is"
            " another one. Merge it first (model = model.merge_and_unload()) and give a new peft_config."
        )


@torch.no_grad()
def _states(model: Any) -> torch.Tensor:
    """The last states of a few tokens, by which two models are told apart."""
    embedding = word_embeddings(model)
    ids = (torch.arange(6, device=embedding.device) * 7 % len(embedding))[None]
    positions = torch.arange(6, device=embedding.device)[None]
    was_training = model.training
    model.eval()
    try:
        states = run_body(model, ids, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        model.train(was_training)
    return cast(torch.Tensor, states)


def with_adapter(model: PreTrainedModel, config: PeftConfig, tokens: RewardTokens, seed: int) -> PreTrainedModel:
    """The model under a PEFT wrapper, which answers as the model itself does, and with the adapter off always will.

    Raises: ConfigError for a config under which it would not: the KL would be to another model.
    """
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
    if getattr(config, "bias", "none") != "none":
        raise ConfigError(
            f"peft_config.bias={config.bias!r} trains biases of the model itself, to which Quark stays close. Set"
            " bias='none'."
        )
    before = _states(model)
    torch.manual_seed(seed)  # the adapter's first weights too depend on the run's seed alone
    adapted = get_peft_model(model, config)
    _check_mergeable(adapted)
    with adapted.disable_adapter():
        after = _states(adapted)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"peft_config (init_lora_weights={getattr(config, 'init_lora_weights', None)!r}) changes the weights of the"
            " model itself, to which Quark stays close. Use an adapter that starts beside them:"
            " init_lora_weights=True."
        )
    return adapted


def _check_mergeable(adapted: Any) -> None:
    """Raises: ConfigError for an adapter that the weights could not take in when the run ends."""
    from .export import on_quantized

    if on_quantized(adapted):  # it is then saved by itself
        return
    learned = [module for module in adapted.modules() if any(getattr(module, "lora_bias", {}).values())]
    if any(getattr(layer.get_base_layer(), "bias", None) is None for layer in learned):
        raise ConfigError(
            "peft_config.lora_bias=True trains a bias for layers that have none, which could not take it in when the"
            " trained model is saved as an ordinary one. Leave it False."
        )


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
