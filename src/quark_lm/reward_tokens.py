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

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE_NAME = "reward_tokens.json"
STYLES = ("text", "embedding")
POSITIONS = ("first", "before_bos", "before_completion")

# Worst to best; K of them are taken evenly.
_SCALE = ("terrible", "very bad", "bad", "poor", "average", "decent", "good", "very good", "excellent")


def default_texts(num_quantiles: int, attribute: str = "quality") -> list[str]:
    """One tag a quantile, worst first, for a reward about which nothing is known but that more is better."""
    name = attribute[:1].upper() + attribute[1:]
    if num_quantiles > len(_SCALE):
        return [f"{name}: {k + 1} of {num_quantiles}.\n" for k in range(num_quantiles)]
    last = len(_SCALE) - 1
    return [f"{name}: {_SCALE[round(k * last / (num_quantiles - 1))]}.\n" for k in range(num_quantiles)]


@dataclass(frozen=True)
class RewardTokens:
    """The K reward tokens of a run; quantile 0 is the worst, K-1 the best.

    A run that ranks several attributes apart has K for each, and a prompt gets one of each, in their order. Its
    quantiles in all attributes are then one number, as of digits in base K: `code` and `levels` turn the one into the
    other, 0 is the worst in all and `best` the best in all.

    Example:
        ```python
        tokens = RewardTokens.create(model, tokenizer, num_quantiles=5)
        tokens.insert(prompt_ids, tokens.best, at=0)  # the prompt, asked for its best completion
        ```

    Attributes:
        ids: for each quantile the token ids that stand for it (one new token, or those of its text).
        barred: ids that may never be sampled and belong to no softmax (the new tokens; none in style "text").
        attributes: names of what is ranked apart, whose tokens stand in `texts` and `ids` one after the other; empty
            where there is one rank alone.
    """

    style: str
    position: str
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    barred: tuple[int, ...] = field(default=())
    attributes: tuple[str, ...] = field(default=())

    @property
    def num_attributes(self) -> int:
        return max(1, len(self.attributes))

    @property
    def num_quantiles(self) -> int:
        """K, of each attribute."""
        return len(self.ids) // self.num_attributes

    @property
    def num_codes(self) -> int:
        """Quantiles that can be asked for: K, or K to the power of the number of attributes."""
        return int(self.num_quantiles**self.num_attributes)

    @property
    def best(self) -> int:
        return self.num_codes - 1

    @property
    def worst(self) -> int:
        return 0

    def levels(self, quantile: int) -> tuple[int, ...]:
        """The quantile in each attribute, (number of attributes,); with one rank alone the quantile itself."""
        num = self.num_quantiles
        return tuple(quantile // num**power % num for power in reversed(range(self.num_attributes)))

    def all_levels(self, quantiles: NDArray[np.int64]) -> NDArray[np.int64]:
        """`levels` of many, int64 (number of attributes, N); a quantile of -1 is -1 in each."""
        num = self.num_quantiles
        powers = num ** np.arange(self.num_attributes - 1, -1, -1)
        return np.where(quantiles < 0, -1, quantiles // powers[:, None] % num)

    def code(self, levels: Sequence[Any]) -> Any:
        """What `levels` came from; of arrays an array."""
        quantile: Any = 0
        for level in levels:
            quantile = quantile * self.num_quantiles + level
        return quantile

    def in_all(self, level: int | None) -> int | None:
        """The quantile that is `level` in every attribute; None stays None."""
        return None if level is None else int(self.code([level] * self.num_attributes))

    def turned_down(self, quantile: int, attribute: int) -> int:
        """The same, but the worst in this attribute: what its dial starts from."""
        return int(self.code([0 if a == attribute else level for a, level in enumerate(self.levels(quantile))]))

    def turned_up(self, attribute: int) -> int:
        """What to add to a quantile that is the worst in this attribute, to make it the best in it."""
        last = self.num_quantiles - 1
        return int(self.code([last if a == attribute else 0 for a in range(self.num_attributes)]))

    def insert(self, prompt_ids: Sequence[int], quantile: int | None, at: int) -> list[int]:
        """The prompt's ids with the reward token of `quantile` put before its id number `at`; unchanged for None."""
        if quantile is None:
            return list(prompt_ids)
        num = self.num_quantiles
        tokens = [i for a, level in enumerate(self.levels(quantile)) for i in self.ids[a * num + level]]
        return [*prompt_ids[:at], *tokens, *prompt_ids[at:]]

    def text(self, quantile: int) -> str:
        """What stands for a quantile, as text."""
        return "".join(self.texts[a * self.num_quantiles + level] for a, level in enumerate(self.levels(quantile)))

    @property
    def longest(self) -> int:
        """The most ids that a prompt gets."""
        num = self.num_quantiles
        return sum(max(map(len, self.ids[a * num : (a + 1) * num])) for a in range(self.num_attributes))

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
        attributes: Sequence[str] = (),
    ) -> RewardTokens:
        """Reward tokens for a model; style "embedding" adds K tokens to the tokenizer and K rows to the model.

        Args:
            texts: K texts, worst first: the tags themselves, or the words from whose rows new tokens start; of several
                attributes K of each, one attribute after the other.
            init: of new rows; "random" draws each from N(mean, std), per dimension, of the rows that are there
                (authors' code), "words" takes the mean of the rows of its text.
            seed: of the random rows.

        Raises: ModelError if the tokenizer already holds the names of the new tokens; ConfigError if a text has no
            tokens.
        """
        if texts is None:
            texts = [t for name in attributes or ("quality",) for t in default_texts(num_quantiles, name)]
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
            return cls(style, position, tuple(texts), tuple(text_ids), attributes=tuple(attributes))
        names = [f"<|quark_{k}|>" for k in range(num_quantiles)]
        if attributes:
            names = [f"<|quark_{a}_{k}|>" for a in range(len(attributes)) for k in range(num_quantiles)]
        held = sorted(set(names) & set(tokenizer.get_vocab()))
        if held:
            raise ModelError(
                f"The tokenizer already holds {held[0]}, so this model was trained by Quark before, or given to another"
                " QuarkTrainer, and its reward tokens would be overwritten. Load the original model anew, or use"
                " reward_token_style='text'."
            )
        ids = _add_tokens(model, tokenizer, names, text_ids if init == "words" else None, seed)
        return cls(style, position, tuple(names), tuple((i,) for i in ids), tuple(ids), tuple(attributes))

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
                tuple(map(str, _list(data.get("attributes", [])))),
            )
            if tokens.style not in STYLES or tokens.position not in POSITIONS:
                raise ValueError(f"style {tokens.style[:20]!r}, position {tokens.position[:20]!r}")
            of_one = len(tokens.ids) / tokens.num_attributes
            if not 2 <= of_one == tokens.num_quantiles or len(tokens.ids) != len(tokens.texts) or not all(tokens.ids):
                raise ValueError(f"{len(tokens.texts)} texts and {len(tokens.ids)} ids")
            return tokens
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path} is damaged ({error!r}). Copy it again from the run, or train again.") from error


def asked_quantile(text: str, tokens: RewardTokens | None, strengths: Sequence[float], model: str) -> int | None:
    """The quantile that a command names: "best", "worst", "none", or a number; `in_all` attributes it is meant.

    Args: strengths: of the dial, which needs a token.
    Raises: ConfigError.
    """
    turned = [strength for strength in strengths if strength != 1.0]
    if tokens is None:
        if turned or text not in ("best", "none"):
            what = f"strength={turned[0]}" if turned else f"quantile={text}"
            raise ConfigError(f"{what} needs reward tokens, but {model} was not trained by Quark. Leave it out.")
        return None
    if text == "none":
        if turned:
            raise ConfigError(
                f"strength={turned[0]} turns a reward token up, and quantile=none asks for none. Leave one of them out."
            )
        return None
    last = tokens.num_quantiles - 1
    number = {"best": last, "worst": 0}.get(text, int(text) if text.isdecimal() else -1)
    if not 0 <= number <= last:
        raise ConfigError(f"quantile={text} is not best, worst, none, or 0 to {last}. Choose one of them.")
    return number


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"attributes is {str(value)[:20]}")
    return value


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
