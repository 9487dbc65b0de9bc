"""Beam search under the dial, by transformers' own: a completer like generation/hf.py's, for measuring only.

Nothing is cached for the branch that the dial starts from, since a beam search moves rows about: it is read anew at
each token. Right, and slow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..errors import ConfigError
from ..generation import Dial, GenerationSettings, turned
from ..policy import Head, run_body
from ..steering import dial, implausible

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BeamCompleter:
    """The best of `num_beams` beams for each prompt; the arguments of `complete` are those of `HFCompleter`."""

    def __init__(self, model: PreTrainedModel, eos_ids: Sequence[int], num_beams: int) -> None:
        self.model = model
        self.eos_ids = list(eos_ids)
        self.num_beams = num_beams
        self.batch_rows: int | None = num_beams  # a prompt is a batch

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: GenerationSettings,
        *,
        dials: Sequence[Dial] = (),
        skip: Collection[int] = (),
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yields ([index], [completion]); seeds are unread: a beam search draws nothing."""
        if settings.temperature != 0 or settings.top_p != 1 or settings.top_k != 0:
            raise ConfigError(
                "A beam search takes the likeliest beam and draws nothing. Set temperature 0, or one beam."
            )
        turns = turned(dials, len(prompts))
        for i, prompt in enumerate(prompts):
            if i in skip:
                continue
            processors = LogitsProcessorList()
            pairs = [(contrast[i], float(strengths[i])) for contrast, strengths in turns if strengths[i] != 1]
            if pairs:
                processors.append(DialLogitsProcessor(self.model, len(prompt), pairs, settings.dial_min_p))
            ids = torch.tensor([list(prompt)], device=self.model.device)
            with _no_settings_of_its_own(self.model) as model:
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    num_beams=self.num_beams,
                    do_sample=False,
                    max_new_tokens=settings.max_completion_length,
                    min_new_tokens=settings.min_completion_length or None,
                    suppress_tokens=sorted(settings.barred) or None,
                    eos_token_id=self.eos_ids,
                    pad_token_id=self.eos_ids[0] if self.eos_ids else 0,
                    logits_processor=processors,
                )
            completion = output[0, len(prompt) :].tolist()
            end = next((n for n, token in enumerate(completion, 1) if token in self.eos_ids), len(completion))
            yield [i], [completion[:end]]


@contextlib.contextmanager
def _no_settings_of_its_own(model: Any) -> Iterator[Any]:
    """Within it the model's generation config is empty: `generate` would fill what is left out from a model's own,
    a repetition penalty for example, which sampling here does not know."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


class DialLogitsProcessor(LogitsProcessor):
    """The dials inside `generate`, on log-probabilities; see `steering.dial`.

    Args:
        prompt_length: of the prompt that `generate` was given.
        dials: (the ids that stand in its place in the other branch, the strength) each.
        min_p: of `steering.implausible`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_length: int,
        dials: Sequence[tuple[Sequence[int], float]],
        min_p: float = 0.0,
    ) -> None:
        self.model, self.head, self.min_p = model, Head(model), min_p
        self.prompt_length, self.dials = prompt_length, [(list(ids), strength) for ids, strength in dials]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        others = []
        for contrast, _ in self.dials:
            start = torch.tensor(contrast, device=input_ids.device).expand(len(input_ids), -1)
            ids = torch.cat([start, input_ids[:, self.prompt_length :]], 1)
            states = run_body(self.model, ids, use_cache=False).last_hidden_state[:, -1].contiguous()
            others.append(self.head(states).float().log_softmax(-1))
        strengths = [torch.tensor(strength, device=scores.device) for _, strength in self.dials]
        mixed = dial(scores.float(), others, strengths)
        if self.min_p:  # what is suppressed is -inf in the scores already
            mixed = mixed.masked_fill(implausible(scores.float(), strengths, self.min_p), -torch.inf)
        # what is suppressed stays so, also where strength 0 would make it a NaN; beams compare log-probabilities
        out: Any = mixed.masked_fill(scores.isneginf(), -torch.inf).log_softmax(-1)
        return out
