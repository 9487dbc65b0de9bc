"""Completions by the model in this process, at twice the speed of `generate` or more.

What makes it fast, each measured by benchmarks/explore.py: the head on contiguous rows (on a slice it is copied once a
row), an inverse-CDF draw that serves top-p too (`multinomial` is forty times slower at 49k words, sorting ten times),
batches of prompts of like length, one prefill a prompt shared by its completions, finished rows leaving early.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from ..errors import ModelError
from ..policy import Head, causal_lm, free_memory, run_body, word_embeddings
from ..steering import dial, implausible
from . import Dial, GenerationSettings, turned, uniforms

# Rows that still gain speed when they are added, measured on two cores; a GPU takes more.
_MOST_ROWS = {"cpu": 128, "cuda": 512}
# Compacting the cache copies it, so it waits until this share of the rows has finished.
_LEAVE_SHARE = 0.25
_Turns = list[tuple[Sequence[Sequence[int]], np.ndarray]]  # the dials that change anything, see `turned`
# Words whose weights are summed before one of them is drawn.
_BLOCK = 256


class HFCompleter:
    """Completes prompts with a transformers model; put the model into eval mode first.

    Example:
        ```python
        completer = HFCompleter(model, eos_ids=[tokenizer.eos_token_id])
        for indices, completions in completer.complete([[1, 2, 3]], seeds=[0], settings=GenerationSettings()):
            print(tokenizer.batch_decode(completions))
        ```

    Args:
        eos_ids: tokens that end a completion; they stay its last id.
        batch_rows: forward rows of a batch (the dial takes two a sample); None: fitted to the free memory.
        autocast: dtype in which the forward runs when it is not the weights' own.
    """

    def __init__(
        self,
        model: nn.Module,
        eos_ids: Sequence[int],
        batch_rows: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.head = Head(model)
        self.eos_ids = tuple(eos_ids)
        self.batch_rows = batch_rows
        self.autocast = autocast
        self.most_rows: int | None = None  # what memory held when it ran out; the batches are split to it from then on

    @property
    def device(self) -> torch.device:
        return word_embeddings(self.model).device

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: GenerationSettings,
        *,
        dials: Sequence[Dial] = (),
        skip: Collection[int] = (),
        on_token: Callable[[int, int, int], None] | None = None,
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yields (indices, completions) batch by batch, each index once.

        Args:
            prompts: token ids, with their reward tokens. Equal prompts share one prefill.
            seeds: one a prompt; a sample's draws depend on nothing else.
            dials: each the same prompts with the worst token (or none), and its strength, one for all or one a prompt;
                logits = prompt + sum over dials of (strength - 1) x (prompt - contrast). One that is 1 everywhere runs
                no contrast at all.
            skip: indices that are left out; the batches are those of a call without it, so that a call which goes on
                with a stopped one's `batch_rows` gives its completions bit for bit.
            on_token: called with (index, step, token id) as each token is drawn; a batch that ran out of memory begins
                again from step 0.
        """
        turns = turned(dials, len(prompts))
        rows = self.batch_rows or self.fitting_rows(prompts, settings)
        for whole in self._batches(prompts, rows // (1 + len(turns))):
            batch = [i for i in whole if i not in skip]
            if not batch:
                continue
            yield from self._complete_or_halve(batch, prompts, seeds, settings, turns, on_token)

    def _batches(self, prompts: Sequence[Sequence[int]], samples: int) -> Iterator[list[int]]:
        """Indices in batches: equal prompts side by side, like lengths together.

        The longest come first, so that memory fails early.
        """
        samples = max(1, samples)
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i]), i))
        for start in range(0, len(order), samples):
            yield order[start : start + samples]

    def fitting_rows(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> int:
        """Forward rows of a batch that fit the free memory, and did so far; as many as still gain speed, at most."""
        config = causal_lm(self.model).config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = word_embeddings(self.model)
        length = max(map(len, prompts), default=1) + settings.max_completion_length
        cache = 2 * config.num_hidden_layers * heads * head_size * length * weight.element_size()
        # the cache is copied as it grows; logits exist as they are, in float32, and as what is summed up
        per_row = 2 * cache + 4 * 4 * weight.shape[0]
        most = min(_MOST_ROWS.get(weight.device.type, 128), self.most_rows or 1 << 30)
        return int(max(1, min(most, 0.4 * free_memory(weight.device) // per_row)))

    def _complete_or_halve(
        self,
        batch: list[int],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: GenerationSettings,
        turns: _Turns,
        on_token: Callable[[int, int, int], None] | None,
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        each = 1 + len(turns)
        half = len(batch) // 2
        if self.most_rows is None or len(batch) == 1 or len(batch) * each <= self.most_rows:
            try:
                with self._autocast():  # around all steps: it casts a weight once
                    completions = self._complete_batch(batch, prompts, seeds, settings, turns, on_token)
            except (RuntimeError, MemoryError) as error:  # the CPU's allocator raises a plain RuntimeError
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise ModelError(
                        "Out of memory with one completion a batch, so none can be sampled. Lower"
                        " max_completion_length, shorten the prompts, or free memory."
                    ) from error
            else:
                yield batch, completions
                return
            # outside the except block, whose traceback would keep the failed batch's tensors alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.most_rows = half * each
            warnings.warn(
                f"Out of memory with {len(batch)} completions a batch: going on with {half}, and with no more than"
                f" {self.most_rows} forward rows from here on.",
                stacklevel=2,
            )
        for part in (batch[:half], batch[half:]):
            yield from self._complete_or_halve(part, prompts, seeds, settings, turns, on_token)

    @torch.no_grad()
    def _complete_batch(
        self,
        batch: list[int],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: GenerationSettings,
        turns: _Turns,
        on_token: Callable[[int, int, int], None] | None,
    ) -> list[list[int]]:
        device = self.device
        steps = settings.max_completion_length
        draws = torch.from_numpy(np.stack([uniforms(seeds[i], steps) for i in batch])).to(device)  # (S, steps, DRAWS)
        # -- prefill: each different prompt once; of_sample says which one a sample continues from
        branches = [prompts, *(contrast for contrast, _ in turns)]
        unique: dict[tuple[int, tuple[int, ...]], int] = {}
        of_sample = torch.tensor(
            [
                unique.setdefault((number, tuple(branch[i])), len(unique))
                for number, branch in enumerate(branches)
                for i in batch
            ],
            device=device,
        )
        ids, mask = _left_padded([list(prompt) for _, prompt in unique], device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache(config=causal_lm(self.model).config)
        last = self._forward(ids, mask, positions, cache)
        if len(unique) < len(of_sample) or not torch.equal(of_sample, torch.arange(len(of_sample), device=device)):
            cache.batch_select_indices(of_sample)
            last, mask = last[of_sample], mask[of_sample]
        lengths = mask.sum(1)
        # -- decode: alive[j] is the sample of row j; its contrasts' rows stand len(alive) rows below, each the other
        alive = torch.arange(len(batch), device=device)
        gammas = [torch.tensor(strengths[batch], device=device)[:, None] for _, strengths in turns]
        eos = torch.tensor(self.eos_ids, device=device)
        out = torch.full((len(batch), steps), -1, device=device)
        done = torch.zeros(len(batch), dtype=torch.bool, device=device)
        for step in range(steps):
            with torch.autocast(device.type, enabled=False):  # the head has a dtype of its own
                own, *contrasts = self.head(last).float().split(len(alive))
            turned_by = [gamma[alive] for gamma in gammas]
            logits = dial(own, contrasts, turned_by)
            barred = [*settings.barred, *(self.eos_ids if step < settings.min_completion_length else ())]
            if settings.dial_min_p and turned_by:
                logits = logits.masked_fill(implausible(own, turned_by, settings.dial_min_p, barred), -torch.inf)
            if barred:
                logits[:, barred] = -torch.inf
            tokens = draw_tokens(logits, draws[alive, step], settings)  # (rows,)
            tokens = torch.where(done[alive], -1, tokens)
            out[alive, step] = tokens
            if on_token is not None:
                for sample, token in zip(alive.tolist(), tokens.tolist(), strict=True):
                    if token >= 0:
                        on_token(batch[sample], step, token)
            done[alive] |= torch.isin(tokens, eos)
            live = ~done[alive]
            if step + 1 == steps or not live.any():
                break
            if (~live).float().mean() >= _LEAVE_SHARE:
                keep = live.nonzero().squeeze(1)
                rows = torch.cat([keep + n * len(alive) for n in range(len(branches))])
                cache.batch_select_indices(rows)
                mask, lengths, tokens, alive = mask[rows], lengths[rows], tokens[keep], alive[keep]
            tokens = tokens.clamp_min(0).repeat(len(branches))  # both branches read what was drawn
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            last = self._forward(tokens[:, None], mask, (lengths + step)[:, None], cache)
        return [[t for t in row if t >= 0] for row in out.tolist()]

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """The last states (B, H), contiguous, in the head's dtype; the cache grows by what was read."""
        output = run_body(self.model, ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        return output.last_hidden_state[:, -1].contiguous().to(next(self.head.module.parameters()).dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or numpy found no memory, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def draw_tokens(logits: torch.Tensor, draws: torch.Tensor, settings: GenerationSettings) -> torch.Tensor:
    """One token a row: int64 (B,).

    Args: logits: float32 (B, V), -inf where barred; draws: (B, DRAWS) in [0, 1), unused when greedy.
    """
    if settings.temperature == 0:
        tokens = logits.argmax(1)
        _check_finite(logits.gather(1, tokens[:, None]))  # a NaN would be the largest
        return tokens
    if settings.temperature != 1:
        logits = logits / settings.temperature
    if settings.top_k:
        return _draw_sorted(logits, draws[:, 0], settings)
    # inverse CDF on unnormalised weights: the draw is scaled in place of the row
    weights = (logits - logits.amax(1, keepdim=True)).exp_()
    sums = _block_sums(weights)
    tokens = _invert(weights, sums, draws[:, 0])
    if settings.top_p == 1:
        return tokens
    # top-p without sorting, which costs ten times as much: draw from all, and again where the likelier tokens by
    # themselves hold top_p already; what is kept is distributed as if only the set had been drawn from
    rows = torch.arange(len(tokens), device=tokens.device)
    some, some_sums = weights, sums  # of these rows; most draws are kept at once, so that later copies are small
    for attempt in range(1, draws.shape[1]):
        drawn = some.gather(1, tokens[rows, None])
        again = some.masked_fill(some <= drawn, 0.0).sum(1) >= settings.top_p * some_sums.sum(1)
        rows = rows[again]
        if not len(rows):
            return tokens
        if attempt < draws.shape[1] - 1:
            some, some_sums = some[again], some_sums[again]
            tokens[rows] = _invert(some, some_sums, draws[rows, attempt])
    tokens[rows] = _draw_sorted(logits[rows], draws[rows, -1], settings)
    return tokens


def _draw_sorted(logits: torch.Tensor, draws: torch.Tensor, settings: GenerationSettings) -> torch.Tensor:
    """Draws (B,) from the top-k, and from the top-p of these as transformers has it."""
    top, ids = logits.topk(min(logits.shape[1], settings.top_k or logits.shape[1]), dim=1)
    weights = top.softmax(1)
    outside = weights.cumsum(1) - weights >= settings.top_p  # the tokens before it hold top_p; the first never is
    weights = weights.masked_fill_(outside, 0.0)
    return ids.gather(1, _invert(weights, _block_sums(weights), draws)[:, None]).squeeze(1)


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    """The sums of each _BLOCK words (B, blocks); the last block may be shorter."""
    whole = weights.shape[1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(2) if whole else weights[:, :0]
    return sums if whole == weights.shape[1] else torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], 1)


def _check_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            "The model gives logits that are not finite, so nothing can be drawn from them. Use float32 or bfloat16"
            " weights, or an earlier checkpoint."
        )


def _invert(weights: torch.Tensor, sums: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulated weight exceeds draw x total, so that a word of weight 0 is never drawn.

    First the block, then the word in it: a running sum over all words would take ten times as long.

    Raises: ModelError for a row without a finite total, whose index would be that of no word.
    """
    cdf = sums.cumsum(1)
    total = cdf[:, -1:]
    _check_finite(total)
    point = torch.minimum(draws[:, None] * total, _below(total))
    block = torch.searchsorted(cdf, point, right=True)
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    ids = block * _BLOCK + torch.arange(min(_BLOCK, weights.shape[1]), device=weights.device)
    last = weights.shape[1] - 1
    inside = weights.gather(1, ids.clamp_max(last)).masked_fill_(ids > last, 0.0).cumsum(1)
    rest = torch.minimum(point - before, _below(inside[:, -1:]))
    return (block * _BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(1)


def _below(total: torch.Tensor) -> torch.Tensor:
    """The next smaller number: rounding could give the total itself, above which there is no index."""
    return torch.nextafter(total, torch.zeros_like(total))


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), int64 (B, T): left-padded, so that every row's next token stands in the last column."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
