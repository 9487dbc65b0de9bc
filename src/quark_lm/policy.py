"""All that depends on how the model is built and wrapped: body and head, a function inside the forward, the reference.

The loss must run inside the wrapped model's forward: around it, DDP's ranks get different gradients without an error
and FSDP2 crashes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .collator import view
from .errors import ModelError
from .loss import token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself: under a PEFT wrapper, the model into which the adapter's layers were put."""
    # not `peft_config`, which PEFT sets on the inner model as well
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,return-value]


def word_embeddings(model: nn.Module) -> torch.Tensor:
    """The rows (V, H) that the model's words have at its input, padding and new tokens among them."""
    weight: Any = causal_lm(model).get_input_embeddings().weight  # of a bare nn.Module a checker knows no more
    return weight


class Head:
    """Turns hidden states into logits as the model itself does, without its slicing.

    `lm_head(h[:, -1:])` on a slice copies the whole head once a row; here the rows are flat and contiguous.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = causal_lm(model)
        config = inner.config.get_text_config()
        self.module: nn.Module = inner.get_output_embeddings()
        if self.module is None:
            raise ModelError(
                f"{type(inner).__name__} has no output head, so it is no language model. Load a causal LM."
            )
        # Gemma 2, Cohere and Granite change the logits after the head; `check_head` finds a model that does otherwise
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale: float = getattr(config, "logit_scale", None) or 1.0 / (
            getattr(config, "logits_scaling", None) or 1.0
        )

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) of hidden states (N, H), in the head's dtype."""
        logits = self.module(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def parameters(self) -> list[nn.Parameter]:
        """The head's parameters that learn (a tied head's are the embedding's)."""
        return [p for p in self.module.parameters() if p.requires_grad]


def run_body(model: nn.Module, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    """The model without its head: an output whose `last_hidden_state` is (B, T, H)."""
    inner = causal_lm(model)
    body = inner.base_model
    taken = _arguments(type(body).forward)
    if "position_ids" in kwargs and "position_ids" not in taken:
        kwargs.pop("position_ids")  # models without positions of their own (ALiBi) take none
    if "cache" in kwargs and "cache" not in taken:
        kwargs["past_key_values"] = kwargs.pop("cache")  # its name before transformers 5.24
    return body(input_ids=input_ids, **kwargs)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compares our body and head with the model's own logits on a short input. Raises: ModelError if they differ."""
    inner = causal_lm(model)
    was_training = inner.training
    inner.eval()
    words, device = len(word_embeddings(inner)), word_embeddings(inner).device
    ids = (torch.arange(6, device=device) * 7 % words)[None]
    positions = torch.arange(6, device=device)[None]
    own = inner(input_ids=ids).logits.float()
    hidden = run_body(inner, ids, position_ids=positions, use_cache=False).last_hidden_state
    ours = Head(inner)(hidden.flatten(0, 1)).float().view_as(own)
    inner.train(was_training)
    tolerance = 1e-3 if own.dtype == torch.float32 and hidden.dtype == torch.float32 else 0.05
    if not torch.allclose(own, ours, atol=tolerance * max(1.0, own.abs().max().item()), rtol=0):
        raise ModelError(
            f"{type(inner).__name__} makes its logits in a way that Quark does not know, so its loss would be wrong."
            " Please report the model's name; until then choose another model."
        )


def allow_functions_inside(model: nn.Module) -> None:
    """Lets `model(inside=fn, **inputs)` call `fn(**inputs)` within the forward of whatever wraps the model later."""
    if getattr(model.forward, "takes_inside", False):
        return
    forward = type(model).forward

    # inspect.signature still shows the model's own arguments, which Trainer and generate read
    @functools.wraps(forward)
    def forward_or_inside(self: Any, *args: Any, inside: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) if inside is None else inside(**kwargs)

    forward_or_inside.takes_inside = True  # type: ignore[attr-defined]
    # bound: a deep copy of the model then runs on the copy's weights, not on these
    model.forward = types.MethodType(forward_or_inside, model)


class Policy:
    """The model that learns and the reference that does not.

    With an adapter the reference is the same model with the adapter off and costs no memory; otherwise it is a frozen
    copy.
    """

    def __init__(self, model: nn.Module, needs_reference: bool = True) -> None:
        self.model = model
        self.has_adapter = hasattr(model, "peft_config")
        self.head = Head(model)
        self._copy: nn.Module | None = None
        self._copy_head = self.head
        if needs_reference and not self.has_adapter:
            self._copy = copy.deepcopy(causal_lm(model)).eval().requires_grad_(False)
            self._copy_head = Head(self._copy)
        allow_functions_inside(model)

    @property
    def name(self) -> str:
        """The original model's name or folder."""
        return str(causal_lm(self.model).config.name_or_path)

    @contextmanager
    def reference(self) -> Iterator[tuple[nn.Module, Head]]:
        """(model, head) of the original model, without gradients."""
        with torch.no_grad():
            if self._copy is not None:
                self._copy.to(next(self.model.parameters()).device)
                yield self._copy, self._copy_head
            elif self.has_adapter:
                was_training = self.model.training
                self.model.eval()  # a copy would be: the reference has neither dropout nor noise
                try:
                    with self.model.disable_adapter():  # type: ignore[operator]
                        yield self.model, self.head
                finally:
                    self.model.train(was_training)
            else:
                raise ModelError("This policy was made without a reference model.")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout and no gradients; puts the mode back."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)


def completion_states(model: Any, batch: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    """The states (N, H) that predict the completion tokens of a collated batch, packed and contiguous."""
    output = run_body(
        model,
        batch[f"{prefix}input_ids"],
        attention_mask=batch[f"{prefix}attention_mask"],
        position_ids=batch[f"{prefix}position_ids"],
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)[batch[f"{prefix}rows"]]


def completion_log_probs(
    model: Any,
    head: Head,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    barred: Sequence[int] = (),
    batch_size: int = 64,
) -> np.ndarray:
    """log p(completion | prompt), in nats, float64 (number of prompts,): the sum over the completion's tokens."""
    out = np.zeros(len(prompts))
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))  # little padding
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = {k: v.to(device) for k, v in view([(prompts[i], completions[i]) for i in rows], pad_id).items()}
        with torch.no_grad():
            states = completion_states(model, batch)
            targets = batch["labels"][batch["labels"] != -100]
            log_probs = token_log_probs(states, targets, head, barred).double().cpu().numpy()
        lengths = [len(completions[i]) for i in rows]
        out[rows] = [part.sum() for part in np.split(log_probs, np.cumsum(lengths)[:-1])]
    return out


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of the model to 0, its configuration's too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # some modules keep a float of their own and hand it to a function: attention_dropout, BLOOM's hidden_dropout
        # and some read their configuration at each forward (Falcon)
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if isinstance(value, float) and "drop" in name:
                    setattr(holder, name, 0.0)
