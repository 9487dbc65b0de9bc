"""Reward tokens: what names a quantile to the model, where it stands in a prompt, and that it is never sampled.

Two styles. "embedding" adds K new tokens to the vocabulary, as in the paper. "text" uses K short tags of ordinary
tokens ("Sentiment: very positive.") that the model already half understands, which needs thousands of samples where a
new token needs millions.
Source: Lu et al. 2022, section 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE_NAME = "reward_tokens.json"
STYLES = ("text", "embedding")
POSITIONS = ("first", "before_bos", "before_completion")

# Worst to best; K of them are taken evenly.
_SCALE = ("terrible", "very bad", "bad", "poor", "average", "decent", "good", "very good", "excellent")


def default_texts(num_quantiles: int) -> list[str]:
    """One tag a quantile, worst first, for a reward about which nothing is known but that more is better."""
    if num_quantiles > len(_SCALE):
        return [f"Quality: {k + 1} of {num_quantiles}.\n" for k in range(num_quantiles)]
    last = len(_SCALE) - 1
    return [f"Quality: {_SCALE[round(k * last / (num_quantiles - 1))]}.\n" for k in range(num_quantiles)]


@dataclass(frozen=True)
class RewardTokens:
    """The K reward tokens of a run; quantile 0 is the worst, K-1 the best.

    Example:
        ```python
        tokens = RewardTokens.create(model, tokenizer, num_quantiles=5)
        tokens.insert(prompt_ids, tokens.best, at=0)  # the prompt, asked for its best completion
        ```

    Attributes:
        ids: for each quantile the token ids that stand for it (one new token, or those of its text).
        barred: ids that may never be sampled and belong to no softmax (the new tokens; none in style "text").
    """

    style: str
    position: str
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    barred: tuple[int, ...] = field(default=())

    @property
    def num_quantiles(self) -> int:
        return len(self.ids)

    @property
    def best(self) -> int:
        return len(self.ids) - 1

    @property
    def worst(self) -> int:
        return 0

    def insert(self, prompt_ids: Sequence[int], quantile: int | None, at: int) -> list[int]:
        """The prompt's ids with the reward token of `quantile` put before its id number `at`; unchanged for None."""
        if quantile is None:
            return list(prompt_ids)
        return [*prompt_ids[:at], *self.ids[quantile], *prompt_ids[at:]]

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))

    @classmethod
    def create(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_quantiles: int = 5,
        style: str = "text",
        texts: Sequence[str] | None = None,
        init: str = "random",
        position: str = "first",
        seed: int = 0,
    ) -> RewardTokens:
        """Reward tokens for a model; style "embedding" adds K tokens to the tokenizer and K rows to the model.

        Args:
            texts: K texts, worst first: the tags themselves, or the words from whose rows new tokens start.
            init: of new rows; "random" draws each from N(mean, std), per dimension, of the rows that are there
                (authors' code), "words" takes the mean of the rows of its text.
            seed: of the random rows.

        Raises: ModelError if the tokenizer already holds the names of the new tokens; ConfigError if a text has no
            tokens.
        """
        texts = list(texts) if texts is not None else default_texts(num_quantiles)
        text_ids = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        if (style == "text" or init == "words") and not all(text_ids):
            raise ConfigError(
                f"The reward token text {texts[text_ids.index(())]!r} has no tokens. Give every quantile words."
            )
        if style == "text":
            if len(set(text_ids)) < len(text_ids):
                raise ConfigError(
                    "Two reward token texts are equal, so the model could not tell their quantiles apart."
                )
            return cls(style, position, tuple(texts), tuple(text_ids))
        names = [f"<|quark_{k}|>" for k in range(num_quantiles)]
        held = sorted(set(names) & set(tokenizer.get_vocab()))
        if held:
            raise ModelError(
                f"The tokenizer already holds {held[0]}, so this model was trained by Quark before and its reward"
                " tokens would be overwritten. Start from the original model, or use reward_token_style='text'."
            )
        ids = _add_tokens(model, tokenizer, names, text_ids if init == "words" else None, seed)
        return cls(style, position, tuple(names), tuple((i,) for i in ids), tuple(ids))

    def save(self, folder: str | Path) -> None:
        """Writes reward_tokens.json, which `load` reads."""
        (Path(folder) / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> RewardTokens:
        """The reward tokens of a folder that Quark saved. Raises: ModelError when it has none, or they are damaged."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ModelError(
                f"{folder} has no {FILE_NAME}, so it was not made by Quark. Give the folder of a run's model."
            )
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            tokens = cls(
                str(data["style"]),
                str(data["position"]),
                tuple(map(str, data["texts"])),
                tuple(tuple(_id(i) for i in ids) for ids in data["ids"]),
                tuple(_id(i) for i in data["barred"]),
            )
            if tokens.style not in STYLES or tokens.position not in POSITIONS:
                raise ValueError(f"style {tokens.style[:20]!r}, position {tokens.position[:20]!r}")
            if not 2 <= len(tokens.ids) == len(tokens.texts) or not all(tokens.ids):
                raise ValueError(f"{len(tokens.texts)} texts and {len(tokens.ids)} ids")
            return tokens
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path} is damaged ({error!r}). Copy it again from the run, or train again.") from error


def _id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a token id is {str(value)[:20]}")
    return value


def _add_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    word_ids: list[tuple[int, ...]] | None,
    seed: int,
) -> list[int]:
    import torch
    from tokenizers import AddedToken

    from .policy import word_embeddings

    old_rows = len(word_embeddings(model))
    old_words = len(tokenizer)
    # special: decode(skip_special_tokens=True) then leaves them out
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if len(tokenizer) > old_rows:  # some vocabularies are padded and have the room
        # mean_resizing would give all new rows one and the same value (transformers 5.24)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # cast: its type covers one token too, and a list gives a list
    ids = cast(list[int], tokenizer.convert_tokens_to_ids(names))
    generator = torch.Generator().manual_seed(seed)
    weights = [word_embeddings(model)]
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        # an untied head has rows of its own: the same rule on its own statistics
        weights.append(head.weight)
    with torch.no_grad():
        for weight in weights:
            rows = weight[: min(old_rows, old_words)].float()
            mean, std = rows.mean(0), rows.std(0)
            for k, i in enumerate(ids):
                if word_ids is None:
                    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
                    weight[i] = (mean + std * noise).to(weight.dtype)
                else:
                    weight[i] = rows[list(word_ids[k])].mean(0).to(weight.dtype)
    return ids
