"""The loss of the learning step on packed completion rows, in chunks: no logits larger than a chunk ever exist.

Axes: N completion tokens of the batch (packed, no padding, no prompt), H hidden, V words.
Source: Lu et al. 2022, eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

HeadFn = Callable[[torch.Tensor], torch.Tensor]

# Stands for "never" in a softmax; finite, so that 0 x it is 0 and not NaN.
_NEVER = -1e9
# Logits that exist at once, in float32 64 MiB. On a CPU 16: they stay in its cache, and the C library hands such a
# block out again where it gives a larger one back to the system, which then clears every page of the next.
_CHUNK, _CPU_CHUNK = 1 << 24, 1 << 22


@dataclass(frozen=True)
class LossSettings:
    """What the learning step minimises; the fields are those of `QuarkConfig`.

    Attributes:
        barred: ids of the reward tokens in the vocabulary. They are outside the KL always, and outside the NLL and the
            entropy when `mask_reward_tokens` (the authors' code leaves them in there).
        temperature: divides the logits, as it did when the samples were drawn: what is learned is the distribution that
            they come from. Samples of temperature .4 learned at 1 would make the next ones those of about .4 x .4.
        chunk_elements: logits (rows x words) that exist at once; None: as many as are fast, see `_chunk_rows`.
    """

    beta: float = 0.05
    kl_direction: str = "forward"
    entropy_coef: float = 0.0
    mask_reward_tokens: bool = True
    barred: tuple[int, ...] = ()
    chunk_elements: int | None = None
    temperature: float = 1.0


def nll(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of the target at each token, in nats. log_probs: float (N, V); targets: int (N,). Returns (N,)."""
    return -log_probs.gather(1, targets[:, None]).squeeze(1)


def forward_kl(policy_log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """KL(reference || policy) at each token, in nats.

    Args: both float (N, V), normalised over the original vocabulary.
    Returns: (N,), never negative up to rounding.
    Source: paper, eq. 2. The authors' code has the other direction: `reverse_kl`.
    """
    return (reference_log_probs.exp() * (reference_log_probs - policy_log_probs)).sum(1)


def reverse_kl(policy_log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) at each token, in nats. Shapes as in `forward_kl`. Source: the authors' code."""
    return (policy_log_probs.exp() * (policy_log_probs - reference_log_probs)).sum(1)


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropy at each token, in nats. log_probs: float (N, V). Returns (N,)."""
    return -(log_probs.exp() * log_probs).sum(1)


def without(logits: torch.Tensor, barred: Sequence[int]) -> torch.Tensor:
    """float32 logits (N, V) in which the barred words cannot happen."""
    logits = logits.float()
    if not barred:
        return logits
    return logits.index_fill(1, torch.tensor(barred, device=logits.device), _NEVER)


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1 else logits.float() / temperature


def token_terms(
    policy_logits: torch.Tensor,
    reference_logits: torch.Tensor | None,
    targets: torch.Tensor,
    settings: LossSettings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(NLL, KL, entropy) at each completion token, in nats; each float32 (N,).

    Args:
        policy_logits, reference_logits: (N, V); no reference: the KL is 0.
        targets: int (N,), the tokens that were sampled.
    """
    policy_logits = _tempered(policy_logits, settings.temperature)
    original = torch.log_softmax(without(policy_logits, settings.barred), 1)
    # paper and here: one softmax, without the reward tokens. authors' code: NLL and entropy with them.
    whole = original if settings.mask_reward_tokens else torch.log_softmax(policy_logits.float(), 1)
    token_nll = nll(whole, targets)
    token_entropy = entropy(whole) if settings.entropy_coef else torch.zeros_like(token_nll)
    if reference_logits is None:
        return token_nll, torch.zeros_like(token_nll), token_entropy
    reference_logits = _tempered(reference_logits, settings.temperature)
    reference = torch.log_softmax(without(reference_logits, settings.barred), 1)
    kl = {"forward": forward_kl, "reverse": reverse_kl}[settings.kl_direction]
    return token_nll, kl(original, reference), token_entropy


@dataclass
class LossSums:
    """The batch's loss (with its gradient) and the sums over its N tokens that make it, detached, in nats."""

    loss: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    num_tokens: int


def quark_loss(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    targets: torch.Tensor,
    head: HeadFn,
    reference_head: HeadFn,
    head_parameters: Sequence[nn.Parameter],
    settings: LossSettings,
    denominator: torch.Tensor | float,
) -> LossSums:
    """sum over tokens of (NLL + beta x KL - entropy_coef x entropy) / denominator.

    The gradient is made in the same pass, chunk by chunk: backward only hands it on, and nothing is computed twice.

    Args:
        hidden: (N, H), the policy's states that predict the targets.
        reference_hidden: (N, H), the original model's, or None for no KL.
        head, reference_head: states (n, H) to logits (n, V).
        head_parameters: the parameters inside `head` that learn.
        denominator: completion tokens of the whole optimizer step, over all micro-batches and ranks: one mean over
            them all.
    """
    sums = torch.zeros(3, device=hidden.device)
    loss = _ChunkedLoss.apply(
        hidden, reference_hidden, targets, head, reference_head, settings, denominator, sums, *head_parameters
    )
    return LossSums(loss, sums[0], sums[1], sums[2], len(targets))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        reference_hidden: torch.Tensor | None,
        targets: torch.Tensor,
        head: HeadFn,
        reference_head: HeadFn,
        settings: LossSettings,
        denominator: torch.Tensor | float,
        sums: torch.Tensor,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if hidden.requires_grad else None
        # float32: adding many chunks' gradients in bfloat16 would lose the small ones
        parameter_grads = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        step = _chunk_rows(head, hidden, settings.chunk_elements, learns=bool(parameters))
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            reference_logits = None if reference_hidden is None else reference_head(reference_hidden[rows])
            with torch.enable_grad():
                chunk = hidden[rows].detach().requires_grad_()
                terms = token_terms(head(chunk), reference_logits, targets[rows], settings)
                token_nll, token_kl, token_entropy = terms
                loss = token_nll.sum()
                if reference_logits is not None and settings.beta:
                    loss = loss + settings.beta * token_kl.sum()
                if settings.entropy_coef:
                    loss = loss - settings.entropy_coef * token_entropy.sum()
            if hidden_grad is not None or parameters:
                chunk_grad, *rest = torch.autograd.grad(loss, [chunk, *parameters])
                # divided only now: under fp16 autocast a word's gradient of p / denominator would round to 0
                if hidden_grad is not None:
                    hidden_grad[rows] = chunk_grad / denominator
                for grad, new in zip(parameter_grads, rest, strict=True):
                    grad += new
            total += loss.detach() / denominator
            sums += torch.stack([term.detach().sum() for term in terms])
        ctx.hidden_grad = hidden_grad
        ctx.parameter_grads = [
            g.div_(denominator).to(p.dtype) for g, p in zip(parameter_grads, parameters, strict=True)
        ]
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        hidden_grad = None if ctx.hidden_grad is None else ctx.hidden_grad.mul_(grad)
        parameter_grads = [g.mul_(grad) for g in ctx.parameter_grads]
        ctx.hidden_grad = ctx.parameter_grads = None
        return (hidden_grad, *[None] * 7, *parameter_grads)


def _chunk_rows(head: HeadFn, hidden: torch.Tensor, chunk_elements: int | None, learns: bool = False) -> int:
    """The rows whose logits are a chunk.

    learns: the head has a gradient as large as itself, to which each chunk adds: few chunks are best.
    """
    if chunk_elements is None:
        chunk_elements = _CPU_CHUNK if hidden.device.type == "cpu" and not learns else _CHUNK
    # a head around a linear layer knows its width; asking for a row of logits reads the whole layer
    words = getattr(getattr(head, "module", head), "out_features", None)
    if words is None:
        words = head(hidden[:1]).shape[1] if len(hidden) else 1
    return max(1, chunk_elements // words)


def token_log_probs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: HeadFn,
    barred: Sequence[int] = (),
    chunk_elements: int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log p of each target, float32 (N,), without gradients and without logits larger than a chunk."""
    out = torch.empty(len(targets), device=hidden.device)
    with torch.no_grad():
        step = _chunk_rows(head, hidden, chunk_elements)
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            logits = without(_tempered(head(hidden[rows]), temperature), barred)
            out[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - logits.logsumexp(1)
    return out
