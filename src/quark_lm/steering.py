"""The strength dial: logits = worst + strength x (best - worst), at inference and while exploring.

Strength 1 is plain Quark, 0 the worst token, above 1 stronger than what was learnt. It is classifier-free guidance
between two reward tokens. A model that was trained on several attributes has a dial for each beside the one for all:
logits = best + sum over those named of (strength - 1) x (best - the same with this attribute at its worst).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .generation import Dial
    from .prompts import EncodedPrompts
    from .reward_tokens import RewardTokens


def dial(best: torch.Tensor, contrasts: Sequence[torch.Tensor], strengths: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits (B, V) of a branch (B, V), turned from each of its contrasts (B, V) by a strength (B, 1).

    A row whose strengths are all 1 is the branch bit for bit; one whose only contrast has 0 is the contrast.
    """
    # the branches' constants (logits are known up to one) cancel in the softmax, whatever the strengths
    mixed = best
    for number, (contrast, strength) in enumerate(zip(contrasts, strengths, strict=True)):
        moved = contrast + strength * (best - contrast) if number == 0 else mixed + (strength - 1) * (best - contrast)
        mixed = moved.where(strength != 1, mixed)
    return mixed


def implausible(
    own: torch.Tensor, strengths: Sequence[torch.Tensor], min_p: float, barred: Sequence[int] = ()
) -> torch.Tensor:
    """Which tokens the dial may not draw: bool (B, V), or (B, V) False for a row that no dial turns above 1.

    The dial multiplies a difference of log-probabilities, also between two tokens that neither prompt would be followed
    by. So only those stay that the asked prompt gives at least min_p of its likeliest token's probability: the
    plausibility constraint of contrastive decoding (Li et al. 2022, whose alpha is 0.1).

    Args: own: logits (B, V) of the asked branch; strengths: (B, 1) of each dial; barred: ids that cannot be drawn.
    """
    import torch

    allowed = own.index_fill(1, torch.tensor(barred, device=own.device), -torch.inf) if barred else own
    is_turned_up = functools.reduce(torch.logical_or, [strength > 1 for strength in strengths])
    return (own < allowed.amax(1, keepdim=True) + math.log(min_p)) & is_turned_up


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    reward_tokens: RewardTokens | None = None,
    quantile: int | None = -1,
    strength: float | Sequence[float] | Mapping[str, float] = 1.0,
    from_token: str = "worst",
    seed: int = 0,
    max_completion_length: int = 20,
    min_completion_length: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    dial_min_p: float = 0.0,
    batch_rows: int | None = None,
    on_token: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The completions of the prompts, as text.

    Args:
        prompts: a list of texts or conversations.
        reward_tokens: of the model; None: a model without Quark, sampled as it is.
        quantile: whose token to put in: 0 the worst to K-1 the best, or from the end: -1 the best; None none. Of a
            model with several attributes: `RewardTokens.code` of one quantile each.
        strength: of the dial between that token and the worst, one for all or one a prompt; or one number by the name
            of each attribute that is turned by itself.
        from_token: "worst", or "none": the dial starts from the prompt without a token, which training with
            `token_dropout` keeps apart.
        dial_min_p: above strength 1 only tokens that the prompt with its token gives at least this share of its
            likeliest one's probability.
        on_token: called with (index of the prompt, its completion so far) as tokens come.

    Raises: ConfigError for a quantile that there is not, or a dial without two tokens; DataError for prompts that are
        no list, or too long for the model's context.

    Example:
        ```python
        model, tokenizer, tokens = quark_lm.export.load("runs/demo/model")
        generate(model, tokenizer, ["The hotel was"], reward_tokens=tokens, strength=2.0)
        ```
    """
    completions = generate_batches(
        model,
        tokenizer,
        prompts,
        reward_tokens=reward_tokens,
        quantile=quantile,
        strength=strength,
        from_token=from_token,
        seed=seed,
        max_completion_length=max_completion_length,
        min_completion_length=min_completion_length,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        dial_min_p=dial_min_p,
        batch_rows=batch_rows,
        on_token=on_token,
    )
    return [text for _, text in sorted(completions)]


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    reward_tokens: RewardTokens | None = None,
    quantile: int | None = -1,
    strength: float | Sequence[float] | Mapping[str, float] = 1.0,
    from_token: str = "worst",
    seed: int = 0,
    batch_rows: int | None = None,
    on_token: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> Iterator[tuple[int, str]]:
    """As `generate`, but (index, completion) as batches are done; what is wrong is raised before the first.

    settings: those of `GenerationSettings`.
    """
    import torch

    from .errors import ConfigError, DataError
    from .generation import GenerationSettings, check_strength, sample_seeds
    from .generation.hf import HFCompleter
    from .prompts import as_dataset, completion_texts, encode

    if isinstance(prompts, str):
        raise DataError("prompts is one text, whose letters would be completed one by one. Give a list: [prompt].")
    check_names(reward_tokens, strength)
    for turn in strength.values() if isinstance(strength, Mapping) else [strength]:
        check_strength(turn)
    check_start(from_token)
    if from_token == "none" and isinstance(strength, Mapping):
        raise ConfigError("from_token='none' leaves out the tokens of all attributes. Give one strength for all.")
    plain = reward_tokens is None or quantile is None
    if plain and not (isinstance(strength, (int, float)) and strength == 1.0):
        raise ConfigError(
            f"strength={strength} needs two reward tokens to dial between. Give reward_tokens and a quantile."
        )
    generation = GenerationSettings(barred=reward_tokens.barred if reward_tokens is not None else (), **settings)
    position, room = "first", context_length(model) - generation.max_completion_length
    if reward_tokens is not None:
        num = reward_tokens.num_codes
        if quantile is not None and not -num <= quantile < num:
            raise ConfigError(
                f"quantile={quantile} is none of the {num} that the reward tokens name. Set 0 (worst) to {num - 1}"
                f" (best), or -1 (best) to {-num}."
            )
        position, room = reward_tokens.position, room - reward_tokens.longest
    encoded = encode(as_dataset(list(prompts), "prompts"), tokenizer, position, room)
    ids: list[list[int]] = encoded.ids
    dials: list[Dial] = []
    if reward_tokens is not None and quantile is not None:
        wanted = quantile % reward_tokens.num_codes
        ids, dials = branches(reward_tokens, encoded, [wanted] * len(encoded), strength, from_token)
    completer = HFCompleter(model, eos_ids(model, tokenizer), batch_rows)
    so_far: dict[int, list[int]] = {}

    def show(index: int, step: int, token: int) -> None:
        so_far.setdefault(index, [])[step:] = [token]
        assert on_token is not None
        on_token(index, completion_texts(tokenizer, encoded.select([index]), [so_far[index]])[0])

    def batches() -> Iterator[tuple[int, str]]:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for indices, completions in completer.complete(
                    ids,
                    sample_seeds(seed, num=len(ids)),
                    generation,
                    dials=dials,
                    on_token=show if on_token is not None else None,
                ):
                    texts = completion_texts(tokenizer, encoded.select(indices), completions)
                    yield from zip(indices, texts, strict=True)
        finally:
            model.train(was_training)

    return batches()


def check_start(from_token: str) -> None:
    """Raises: ConfigError for a start of the dial that there is not."""
    from .errors import ConfigError

    if from_token not in ("worst", "none"):
        raise ConfigError(f"from_token={from_token!r} is neither 'worst' nor 'none'. Choose one of them.")


def check_names(reward_tokens: RewardTokens | None, strength: Any) -> None:
    """Raises: ConfigError for a strength by name that names no attribute, or gives one more than a number."""
    from .errors import ConfigError

    if not isinstance(strength, Mapping):
        return
    names = reward_tokens.attributes if reward_tokens is not None else ()
    for name, value in strength.items():
        if name not in names:
            there = f"not one of {', '.join(names)}" if names else "no attribute: the model has none to dial apart"
            raise ConfigError(f"strength names {name!r}, which is {there}. Mend the name, or give a number.")
        if not isinstance(value, (int, float)):
            raise ConfigError(f"strength of {name!r} is {value!r}, which is not a number. Give one for all prompts.")


def branches(
    reward_tokens: RewardTokens,
    prompts: EncodedPrompts,
    quantiles: Sequence[int | None],
    strength: float | Sequence[float] | Mapping[str, float] = 1.0,
    from_token: str = "worst",
) -> tuple[list[list[int]], list[Dial]]:
    """Each prompt's ids with the token of its quantile, and the dials: from the worst in all, or in each that is named.

    from_token: "none": from the prompt without a token.

    A prompt with the quantile None gets no token anywhere, so that no strength moves it.
    """
    triples = list(zip(prompts.ids, quantiles, prompts.token_at, strict=True))
    ids = [reward_tokens.insert(prompt, quantile, at) for prompt, quantile, at in triples]
    if not isinstance(strength, Mapping):
        if isinstance(strength, (int, float)) and strength == 1.0:
            return ids, []
        worst = reward_tokens.worst if from_token == "worst" else None
        return ids, [([reward_tokens.insert(p, None if q is None else worst, at) for p, q, at in triples], strength)]
    dials: list[Dial] = []
    for name, value in strength.items():
        number = reward_tokens.attributes.index(name)
        down = [None if q is None else reward_tokens.turned_down(q, number) for q in quantiles]
        contrast = [reward_tokens.insert(p, q, at) for (p, _, at), q in zip(triples, down, strict=True)]
        dials.append((contrast, float(value)))
    return ids, dials


def context_length(model: Any) -> int:
    """The most tokens that the model reads; 2**30 where it does not tell, as one with ALiBi."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: the tokenizer's, and those that the model's generation config adds.

    Chat models have several.
    """
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])}
    return sorted(i for i in ids if i is not None)
