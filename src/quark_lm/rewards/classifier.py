"""Any sequence-classification model as a reward: a named label of a classifier, or a reward model with TRL's meaning.

`classifier_reward` is ours: one label, an activation, the completion alone unless told. `model_reward` is what a bare
model id means in TRL's GRPOTrainer: one logit, of prompt and completion. Importing this file imports neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quark_lm.errors import ConfigError, ModelError, RewardError
from quark_lm.files import first_line
from quark_lm.packaged import hub_commit
from quark_lm.rewards.text_reward import Completion, completion_text, has_word

Activation = Literal["softmax", "sigmoid", "none"]
Scope = Literal["completion", "prompt+completion"]


def classifier_reward(
    model: str | Path | Any,
    label: str | int = "positive",
    activation: Activation = "softmax",
    scope: Scope = "completion",
    batch_size: int = 32,
    trust_remote_code: bool = False,
    revision: str | None = None,
    *,
    minimize: bool = False,
    processing_class: Any = None,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> ClassifierReward:
    """A reward function: P(label) by any sequence-classification model; 1 is surely `label`, 0 surely not.

    >>> reward = classifier_reward("distilbert/distilbert-base-uncased-finetuned-sst-2-english", "positive")
    >>> reward(prompts=["The film", "The film"], completions=[" was a delight.", " bored everyone."])
    # P(POSITIVE) of each completion

    Args:
        model: a model id, a folder, or a loaded model (then give `processing_class`, its tokenizer).
        label: the label's name in the model's config, in upper or lower case, or its index.
        activation: "softmax" where the labels exclude each other, "sigmoid" where each stands alone (multi-label
            models), "none" for the logit itself.
        scope: what is read: the completion, or prompt and completion (conversations through the model's chat template).
        minimize: the label is unwanted, such as "toxic": the reward is 1 - P(label), or the logit with its sign turned.
        max_length: tokens that are read, the model's own limit if None. Of longer texts the end of the completion is
            cut, or, with the prompt in scope, the start of the prompt.
        device: None takes a GPU where there is one, and leaves a loaded model where it is.
    A completion without a word earns None. Raises ConfigError for a label that the model lacks, naming those it has;
    ModelError when the model cannot be loaded.
    """
    loaded = _Classifier(model, processing_class, revision, trust_remote_code, device, dtype, batch_size)
    return ClassifierReward(loaded, label, activation, scope, minimize, max_length)


def model_reward(
    model: str | Path | Any,
    processing_class: Any = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    revision: str | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
) -> ModelReward:
    """A reward function with the meaning that a model has in TRL's GRPOTrainer: its one logit, of prompt + completion.

    Plain texts are joined; conversations go through the chat template of the model's tokenizer. No special tokens are
    added and nothing is cut, as in TRL. Any real number; higher is better.

    Args: model, a model id, a folder, or a loaded model; processing_class, its tokenizer, loaded with it if None.
    Raises: ModelError for a model with another number of labels, or that cannot be loaded.
    """
    loaded = _Classifier(model, processing_class, revision, trust_remote_code, device, dtype, batch_size)
    if loaded.num_labels != 1:
        raise ModelError(
            f"{loaded.name} has {loaded.num_labels} labels ({', '.join(loaded.labels)}), but a bare model is a reward "
            f"by its one logit. Use classifier_reward(model, label=...), or the string "
            f"'classifier(model={loaded.name}, label={loaded.labels[-1]})'."
        )
    return ModelReward(loaded)


class ClassifierReward:
    """What `classifier_reward` returns.

    Attributes: `__name__`, `scorer_name`, `scorer_version` (the revision asked for, else the
    commit that the hub gave) and `threshold`, as TextReward has them.
    """

    def __init__(
        self,
        classifier: _Classifier,
        label: str | int,
        activation: Activation | None,
        scope: Scope,
        minimize: bool,
        max_length: int | None,
    ) -> None:
        if activation is None:  # what "none" is in a string such as classifier(model=..., activation=none)
            activation = "none"
        if activation not in ("softmax", "sigmoid", "none"):
            raise ConfigError(
                f"activation={activation!r} is none that logits go through. Set softmax, sigmoid or none."
            )
        if scope not in ("completion", "prompt+completion"):
            raise ConfigError(f"scope={scope!r} is no text to read. Set 'completion' or 'prompt+completion'.")
        if activation == "softmax" and classifier.num_labels == 1:
            raise ConfigError(
                f"{classifier.name} has one label, and a softmax over one is always 1. "
                "Set activation='sigmoid' or 'none'."
            )
        self._classifier, self._activation, self._scope, self._minimize = classifier, activation, scope, minimize
        self._index = classifier.label_index(label)
        self._max_length = classifier.checked_length(max_length)
        label_name = classifier.labels[self._index]
        self.__name__ = f"{'not_' if minimize else ''}{label_name}_{classifier.name.rsplit('/', 1)[-1]}"
        cut = f", {max_length} tokens" if max_length is not None else ""
        self.scorer_name = f"{classifier.name} ({activation} of {label_name}, {scope}{cut})"
        self.scorer_version = classifier.revision
        self.threshold = 0.0 if activation == "none" else 0.5

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """One reward a completion; other columns are left unread."""
        texts = [completion_text(completion) for completion in completions]
        with_word = [has_word(text) for text in texts]
        if self._scope == "prompt+completion":
            texts = self._classifier.joined(prompts, completions)
        return self._scored(texts, with_word)

    def score_texts(self, texts: Sequence[str]) -> list[float | None]:
        """The reward of each text, read as it is."""
        return self._scored(texts, [has_word(text) for text in texts])

    def wanted(self, values: Sequence[float | None]) -> list[bool]:
        """Whether each reward is that of a completion one wants; None is not."""
        return [value is not None and value > self.threshold for value in values]

    def _scored(self, texts: Sequence[str], with_word: Sequence[bool]) -> list[float | None]:
        rows = [row for row, has in enumerate(with_word) if has]
        side: Literal["left", "right"] = "right" if self._scope == "completion" else "left"
        logits = self._classifier.logits([texts[row] for row in rows], self._max_length, side)
        values = _activated(logits, self._activation)[:, self._index]
        if self._minimize:
            values = -values if self._activation == "none" else 1.0 - values
        rewards: list[float | None] = [None] * len(texts)
        for row, value in zip(rows, values.tolist(), strict=True):
            rewards[row] = value
        return rewards

    def __repr__(self) -> str:
        return f"<reward {self.__name__}: {self.scorer_name}>"


class ModelReward:
    """What `model_reward` returns. Attributes: `__name__`, as TRL names it, `scorer_name` and `scorer_version`."""

    def __init__(self, classifier: _Classifier) -> None:
        self._classifier = classifier
        self.__name__ = classifier.name.rsplit("/", 1)[-1]
        self.scorer_name = f"{classifier.name} (logit, prompt+completion)"
        self.scorer_version = classifier.revision

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
        """One reward a completion; other columns are left unread."""
        return self._classifier.logits(self._classifier.joined(prompts, completions), None)[:, 0].tolist()

    def __repr__(self) -> str:
        return f"<reward {self.__name__}: {self.scorer_name}>"


# The model behind both


class _Classifier:
    """A sequence-classification model and its tokenizer: texts in, logits out."""

    def __init__(
        self,
        model: Any,
        processing_class: Any,
        revision: str | None,
        trust_remote_code: bool,
        device: str | None,
        dtype: str,
        batch_size: int,
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} scores nothing. Set it to 1 or more.")
        where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        is_loaded = isinstance(model, torch.nn.Module)
        self.name: str = (model.config.name_or_path or type(model).__name__) if is_loaded else str(model)
        self.batch_size = batch_size
        try:
            if not is_loaded:
                model = AutoModelForSequenceClassification.from_pretrained(str(model), dtype=dtype, **where)
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(self.name, **where)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"{self.name} could not be loaded as a sequence-classification model with its tokenizer"
                f" ({first_line(error)}). "
                "Check the id or folder, the revision and the connection; a loaded model needs its processing_class."
            ) from error
        self._tokenizer: Any = processing_class
        if device is not None or not is_loaded:
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = model.eval()
        # a folder has no commit, and a model that the caller loaded may have changed since
        self.revision = revision or (None if is_loaded else hub_commit(self.name)) or "unpinned"
        self.num_labels: int = self._model.config.num_labels
        self.labels = [str(self._model.config.id2label.get(i, f"LABEL_{i}")) for i in range(self.num_labels)]
        if self._tokenizer.pad_token_id is None:
            if self._tokenizer.eos_token is None:
                raise ModelError(
                    f"{self.name} has neither a pad nor an end-of-text token, and a batch needs padding. Set one."
                )
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # a decoder's logit is the last token's that is no padding
        self._model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or 10**6
        tables = [m for n, m in self._model.named_modules() if n.endswith("position_embeddings")]
        padding = [p for table in tables if (p := getattr(table, "padding_idx", None)) is not None]
        positions -= max(padding, default=-1) + 1  # RoBERTa's first positions are the padding's
        self.longest = min(positions, self._tokenizer.model_max_length)

    def label_index(self, label: str | int) -> int:
        known = ", ".join(f"{i}: {name}" for i, name in enumerate(self.labels))
        if isinstance(label, int) and not isinstance(label, bool):
            if not 0 <= label < self.num_labels:
                raise ConfigError(f"label={label} is none of {self.name}'s labels ({known}). Choose one of them.")
            return label
        for fold in (str, lambda name: str(name).lower()):
            found = [i for i, name in enumerate(self.labels) if fold(name) == fold(label)]
            if len(found) == 1:
                return found[0]
        raise ConfigError(f"label={label!r} is none of {self.name}'s labels ({known}). Choose one by name or index.")

    def checked_length(self, max_length: int | None) -> int:
        if max_length is not None and not 2 < max_length <= self.longest:
            raise ConfigError(
                f"max_length={max_length}, but {self.name} reads from 3 to {self.longest} tokens. Set one of these."
            )
        return max_length or self.longest

    def joined(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[str]:
        """Prompt and completion as one text each."""
        if not prompts or isinstance(prompts[0], str):
            return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if self._tokenizer.chat_template is None:
            raise ModelError(
                f"{self.name}'s tokenizer has no chat template, and the prompts are conversations. Use a model that "
                "has one, a processing_class with one, or classifier_reward(..., scope='completion')."
            )
        return [
            self._tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def logits(
        self, texts: Sequence[str], max_length: int | None, side: Literal["left", "right"] = "right"
    ) -> NDArray[np.float64]:
        """float64 (B, labels), in the order given.

        With `max_length` special tokens are added and longer texts lose tokens on `side`; without, texts are read as
        they are.
        """
        import torch

        values = np.zeros((len(texts), self.num_labels))
        unique = list(dict.fromkeys(texts))  # equal texts are scored once
        if not unique:
            return values
        if max_length is None:
            encoded = self._tokenizer(unique, add_special_tokens=False)["input_ids"]
            longest = max(map(len, encoded))
            if longest > self.longest:
                raise RewardError(
                    f"A prompt with its completion has {longest} tokens, and {self.name} reads {self.longest}. "
                    "Shorten the prompts or max_completion_length, or use a reward model with a longer context."
                )
        else:
            old_side, self._tokenizer.truncation_side = self._tokenizer.truncation_side, side
            try:
                encoded = self._tokenizer(unique, truncation=True, max_length=max_length)["input_ids"]
            finally:
                self._tokenizer.truncation_side = old_side
        rows = np.zeros((len(unique), self.num_labels))
        order = sorted(range(len(unique)), key=lambda i: len(encoded[i]))  # a batch holds texts of one length
        pad = self._tokenizer.pad_token_id
        device = next(self._model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            width = max(1, *(len(encoded[i]) for i in batch))
            input_ids = torch.full((len(batch), width), pad, dtype=torch.long)
            mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):  # right-padded, as in TRL
                input_ids[row, : len(encoded[i])] = torch.tensor(encoded[i], dtype=torch.long)
                mask[row, : len(encoded[i])] = 1
            with torch.inference_mode():
                output = self._model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
            rows[batch] = output.float().cpu().numpy()
        place = {text: i for i, text in enumerate(unique)}
        return rows[[place[text] for text in texts]]


def _activated(logits: NDArray[np.float64], activation: Activation) -> NDArray[np.float64]:
    if activation == "none":
        return logits
    if activation == "sigmoid":
        return 0.5 * (1.0 + np.tanh(0.5 * logits))  # without the overflow of exp(-logits)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
