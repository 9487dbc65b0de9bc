"""All that depends on how the model is built and wrapped: body and head, a function inside the forward, the reference.

The loss must run inside the wrapped model's forward: around it, DDP's ranks get different gradients without an error
and FSDP2 crashes. Under FSDP2 every forward is a joint one: each rank must go through it, `Joint` sees to that.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, cache_utils

from .collator import view
from .errors import ConfigError, ModelError, TrainingError
from .files import checksum
from .loss import token_log_probs

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]  # it ships no py.typed
    from transformers import PreTrainedModel

# A sharded model is gathered whole on each rank to sample and measure when it takes no more than this share of the
# free memory; the samples' caches need the rest.
_WHOLE_SHARE = 0.5


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself: under a PEFT wrapper, the model into which the adapter's layers were put."""
    # not `peft_config`, which PEFT sets on the inner model as well
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,return-value]


def word_embeddings(model: nn.Module) -> torch.Tensor:
    """The rows (V, H) of the model's words at its input before any adapter, padding and new tokens among them."""
    embedding: Any = causal_lm(model).get_input_embeddings()
    # the layer that PEFT puts around it makes its `weight` anew at each look, which sharded weights do not allow
    weight: Any = getattr(embedding, "original_module", embedding).weight
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
        # without FSDP's hooks: each call would reduce its gradients for itself. The body has gathered the head's
        # weights by now, and they stay: see `Joint`.
        logits = self.module.forward(hidden) if isinstance(self.module, FSDPModule) else self.module(hidden)
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
    if isinstance(model, FSDPModule) and not model.runs_inside:
        return _through_root(model, functools.partial(_run_body, model, input_ids, **kwargs))
    return _run_body(model, input_ids, **kwargs)


def _run_body(model: nn.Module, input_ids: torch.Tensor, **kwargs: Any) -> Any:
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


# Layers of a cache that hold a state; no such class in a transformers without them.
_LINEAR: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compares our body and head with the model's own logits on a short input.

    Raises: ModelError if they differ, or the model is none that samples from a cache of keys and values.
    """
    inner = causal_lm(model)
    config = inner.config
    if (
        not getattr(config.get_text_config(), "num_attention_heads", None)
        or config.model_type == "recurrent_gemma"  # under left padding other words, in transformers' generate too
        # of attention and a state, whose rows no cache of transformers selects
        or any(isinstance(layer, _LINEAR) for layer in DynamicCache(config=config).layers)
    ):
        raise ModelError(
            f"{type(inner).__name__} samples from a state and not from a cache of keys and values alone, which Quark"
            " does not batch. Choose a transformer."
        )
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
        if inside is None:
            return forward(self, *args, **kwargs)
        self.runs_inside = True
        try:
            return inside(**kwargs)
        finally:
            self.runs_inside = False

    model.runs_inside = False  # type: ignore[assignment]
    forward_or_inside.takes_inside = True  # type: ignore[attr-defined]
    # bound: a deep copy of the model then runs on the copy's weights, not on these
    model.forward = types.MethodType(forward_or_inside, model)


def _through_root(model: Any, run: Callable[[], Any]) -> Any:
    """What `run` gives within the forward of a sharded model, which gathers its weights."""
    joint: Joint | None = getattr(model, "joint", None)
    if joint is not None:
        joint.go(model)
    # in a list, which FSDP neither casts to the dtype of its outputs nor searches for tensors
    out: list[Any] = []
    model(inside=lambda: out.append(run()))
    if joint is not None:
        joint.went()
    return out[0]


class Joint:
    """Ranks that hold parts of a model (FSDP2) go forward together, though some have more to do than others.

    In a forward each rank gathers from all others, so one that goes alone waits for ever. Where the whole model fits
    each rank's memory, the first forward of a rank gathers it, once, and later ones need nobody. Else all ranks agree
    before each forward, and a rank that has nothing left goes through it with a token of its own (`wait`).

    Args:
        models: the sharded models that may be run; which one it is, all ranks agree upon.
        reshards: whether training lets a layer's weights go after its forward; restored by `let_go`.
    """

    def __init__(self, models: Sequence[nn.Module], accelerator: Accelerator, reshards: bool) -> None:
        self.models = list(models)
        self.accelerator = accelerator
        self.reshards = reshards
        self.whole: list[nn.Module] = []  # gathered, on every rank
        self.parts: list[nn.Module] = []  # too large for that
        self._is_going = False

    def go(self, model: nn.Module) -> None:
        """Before a forward of the model: returns when all ranks are about to go through it."""
        if self._is_whole(model):  # needs nobody, so that one that failed may be tried again
            return
        if self._is_going:
            raise TrainingError(
                "A forward of the sharded model failed on one rank in the middle, and the others wait within it. Free"
                " memory: lower generation_batch_size."
            )
        self._together(model)
        self._is_going = not self._is_whole(model)

    def went(self) -> None:
        self._is_going = False

    def wait(self) -> None:
        """Goes along with the other ranks until none has anything left."""
        while (model := self._together(None)) is not None:
            if any(model is part for part in self.parts):
                self._go_along(model)

    def let_go(self) -> None:
        """The models are in parts again."""
        for model in self.models:
            if self._is_whole(model):
                self._set_reshards(model, self.reshards)
            reshard(model)

    def _is_whole(self, model: nn.Module) -> bool:
        return any(model is whole for whole in self.whole)

    def _together(self, model: nn.Module | None) -> nn.Module | None:
        """The model that some rank is about to run, gathered whole if it fits; None when no rank has anything left."""
        # a rank with nothing to do says 0; those that have run the same model within one `Policy.evaluating`
        number = 0 if model is None else 1 + [m is model for m in self.models].index(True)
        agreed = int(self._largest(number))
        if not agreed:
            return None
        if number not in (0, agreed):
            raise AssertionError("two ranks run two models at once")
        model = self.models[agreed - 1]
        if not any(model is known for known in (*self.whole, *self.parts)):
            fits = self._largest(self._size(model) > _WHOLE_SHARE * free_memory(self.accelerator.device)) == 0
            (self.whole if fits else self.parts).append(model)
            if fits:
                self._set_reshards(model, False)
                self._go_along(model)  # a forward after which no weight is let go
        return model

    def _size(self, model: nn.Module) -> int:
        """Bytes of the model when it is gathered whole."""
        mixed = self.accelerator.state.fsdp_plugin.mixed_precision_policy
        dtype = None if mixed is None else mixed.param_dtype
        return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())

    def _largest(self, value: float) -> float:
        number = torch.tensor(float(value), device=self.accelerator.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return float(number)

    @torch.no_grad()
    def _go_along(self, model: Any) -> None:
        token = torch.zeros(1, 1, dtype=torch.long, device=self.accelerator.device)
        model(inside=lambda: (_run_body(model, token, position_ids=token, use_cache=False), None)[1])

    def _set_reshards(self, model: nn.Module, value: bool) -> None:
        for module in sharded_modules(model):
            module.set_reshard_after_forward(value, recurse=False)
        # Accelerate keeps these two: their weights are needed again at once
        for needed in (causal_lm(model).get_output_embeddings(), model):
            if isinstance(needed, FSDPModule):
                needed.set_reshard_after_forward(False, recurse=False)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules whose weights FSDP2 gathers and lets go as one; none for a model that is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Lets the gathered weights go; needs no other rank."""
    for module in sharded_modules(model):
        module.reshard()


def learned_digest(model: nn.Module) -> int:
    """A checksum that changes when a weight that learns does, however little; of this rank's part of sharded ones."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = [local_part(p.detach()) for p in model.parameters() if p.requires_grad]
    sums = [int(part.contiguous().view(bits[part.element_size()]).sum(dtype=torch.int64)) for part in parts]
    return checksum({"sums": sums})


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def free_memory(device: torch.device) -> float:
    """Bytes that this process may take: on a GPU with what torch's allocator holds unused, on a CPU a rank's share."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's ranks share it


class Policy:
    """The model that learns and the reference that does not.

    With an adapter the reference is the same model with the adapter off and costs no memory; otherwise it is a frozen
    copy, which FSDP2 shards as it does the model.

    Args:
        accelerator: what will wrap the model; None: nothing shards it.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator | None = None) -> None:
        self.model = model
        self.has_adapter = hasattr(model, "peft_config")
        self.head = Head(model)
        self.accelerator = accelerator if accelerator is not None and accelerator.is_fsdp2 else None
        if self.accelerator is not None and self.has_adapter:
            _check_new_rows(model)
        self._copy: nn.Module | None = None
        self._copy_head = self.head
        # the same modules without memory, for `whole`: a sharded model can be neither copied nor saved as it is
        self._skeleton = copied(model, _without_values) if self.accelerator is not None else None
        if not self.has_adapter:
            self._copy = copy.deepcopy(causal_lm(model)).eval().requires_grad_(False)
            self._copy_head = Head(self._copy)
            allow_functions_inside(self._copy)
        allow_functions_inside(model)

    @contextmanager
    def reference(self) -> Iterator[tuple[nn.Module, Head]]:
        """(model, head) of the original model, without gradients."""
        with torch.no_grad():
            if self._copy is not None:
                self._place(self._copy)
                yield self._copy, self._copy_head
            else:
                was_training = self.model.training
                self.model.eval()  # a copy would be: the reference has neither dropout nor noise
                try:
                    with self.model.disable_adapter():  # type: ignore[operator]
                        yield self.model, self.head
                finally:
                    self.model.train(was_training)

    def _place(self, copied: nn.Module) -> None:
        """The copy stands where the model does: on its device, and in parts when the model is."""
        if isinstance(self.model, FSDPModule):
            if not isinstance(copied, FSDPModule):
                from accelerate.utils import fsdp2_prepare_model  # type: ignore[import-untyped]

                fsdp2_prepare_model(self.accelerator, copied)
        else:
            copied.to(next(self.model.parameters()).device)

    def let_reference_go(self) -> None:
        """After a learning step: FSDP keeps a frozen copy's head, which no backward ever lets go."""
        if self._copy is not None:
            reshard(self._copy)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout and no gradients; puts the mode back. Every rank must enter it, but may do more or less in it."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self._jointly():
                yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it the adapter is merged into copies of its layers' weights, which samples half as fast again.

        The weights come back bit for bit. Nothing happens without an adapter or while it is off (`reference`), and to
        layers that cannot be merged so: quantized, in parts (FSDP), or with a weight that another layer uses too.
        """
        layers = self._mergeable()
        before = [layer.get_base_layer().weight.data for layer in layers]
        try:
            for layer, weight in zip(layers, before, strict=True):
                layer.get_base_layer().weight.data = weight.clone()
                layer.merge()
            yield
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.get_base_layer().weight.data = weight  # unmerging would leave rounding errors
                layer.merged_adapters.clear()

    def _mergeable(self) -> list[Any]:
        if not self.has_adapter or isinstance(self.model, FSDPModule):
            return []
        from peft.tuners.lora import Linear

        words = word_embeddings(self.model)
        modules: Iterator[Any] = self.model.modules()
        return [
            module
            for module in modules
            if type(module) is Linear
            and not module.disable_adapters
            and not module.merged
            and not any(module.use_dora.values())
            and not any(module.lora_bias.values())
            and module.get_base_layer().weight.is_floating_point()
            and module.get_base_layer().weight is not words  # a tied head: the embedding must not learn its adapter
        ]

    @contextmanager
    def _jointly(self) -> Iterator[None]:
        if self.accelerator is None or not isinstance(self.model, FSDPModule):
            yield
            return
        models: list[Any] = [self.model] if self._copy is None else [self.model, self._copy]
        joint = Joint(models, self.accelerator, bool(self.accelerator.state.fsdp_plugin.reshard_after_forward))
        for model in models:
            model.joint = joint
        try:
            yield
            joint.wait()
        finally:
            for model in models:
                model.joint = None
            joint.let_go()

    def whole(self) -> nn.Module | None:
        """The model as an ordinary one, to be saved: itself unless it is sharded; then rank 0's copy, None elsewhere.

        Every rank must call it.
        """
        if self.accelerator is None or not isinstance(self.model, FSDPModule):
            return self.model
        state = self.accelerator.get_state_dict(self.model)
        if not self.accelerator.is_main_process:
            return None
        plain = copy.deepcopy(self._skeleton)
        assert plain is not None
        plain.load_state_dict(state, assign=True)
        causal_lm(plain).tie_weights()
        return plain


def _check_new_rows(model: nn.Module) -> None:
    """Raises: ConfigError for new tokens' rows that an adapter of a tied model trains.

    PEFT 0.21 shares them between two layers, which Accelerate 1.15 does not put into one group.
    """
    inner = causal_lm(model)
    if hasattr(inner.get_input_embeddings(), "token_adapter") and inner.config.get_text_config().tie_word_embeddings:
        raise ConfigError(
            "FSDP cannot split the new rows of reward tokens that an adapter trains when the head is tied to the"
            " embedding. Use reward_token_style='text', DDP, or train the whole model."
        )


def copied(model: Any, values: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy whose parameters hold what `values` gives of each; those that are one here are one there."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(values(p.detach()), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _without_values(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(parameter, device="meta")


@contextmanager
def adapter_in_weights_dtype(model: Any) -> Iterator[None]:
    """Within it a float32 LoRA beside bfloat16 weights is multiplied in bfloat16; it still learns in float32.

    PEFT by itself casts every layer's input to float32, multiplies in it and keeps it for the backward: on a CPU a
    learning step then takes half as long again. On a GPU nothing changes: autocast has other rules there, by which
    norms give float32.
    """
    if word_embeddings(model).device.type != "cpu" or torch.is_autocast_enabled("cpu") or not _has_float32_lora(model):
        yield
        return
    # as peft.helpers.disable_input_dtype_casting, which takes every kind of layer to have the switch (0.21)
    layers = [module for module in model.modules() if getattr(module, "cast_input_dtype_enabled", False)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def _has_float32_lora(model: Any) -> bool:
    """Whether it is a LoRA in float32, of the plain kind, beside bfloat16 weights, and in one piece."""
    config = getattr(model, "peft_config", {}).get(str(getattr(model, "active_adapter", None)))
    if config is None or isinstance(model, FSDPModule) or word_embeddings(model).dtype != torch.bfloat16:
        return False
    learns = {p.dtype for p in model.parameters() if p.requires_grad}
    return config.peft_type == "LORA" and not config.use_dora and learns == {torch.float32}


def completion_states(model: Any, batch: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    """The states (N, H) that predict the completion tokens of a collated batch, packed and contiguous."""
    with adapter_in_weights_dtype(model):
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
    temperature: float = 1.0,
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
            log_probs = token_log_probs(states, targets, head, barred, temperature=temperature).double().cpu().numpy()
        lengths = [len(completions[i]) for i in rows]
        out[rows] = [part.sum() for part in np.split(log_probs, np.cumsum(lengths)[:-1])]
    return out


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of the model to 0, its configuration's too: `own_dropout` knows what they were."""
    inner: Any = causal_lm(model)
    inner.dropout_before = {
        name: value for name, value in vars(inner.config).items() if isinstance(value, float) and "drop" in name
    }
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # some modules keep a float of their own and hand it to a function: attention_dropout, BLOOM's hidden_dropout
        # and some read their configuration at each forward (Falcon)
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if isinstance(value, float) and "drop" in name:
                    setattr(holder, name, 0.0)


@contextmanager
def own_dropout(model: Any) -> Iterator[None]:
    """Within it the model's configuration has its dropout back, for whoever trains what is saved."""
    before = getattr(model, "dropout_before", {})
    vars(model.config).update(before)
    try:
        yield
    finally:
        vars(model.config).update(dict.fromkeys(before, 0.0))
