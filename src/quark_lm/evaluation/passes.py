"""The passes of an evaluation: generate, score, read by an evaluator, follow the references; each kept batch by batch.

What to ask and of whom is evaluate_command.py's job; what the numbers come to is summary.py's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..generation import GenerationSettings, check_strength, sample_seeds
from ..pool import Journal
from ..prompts import EncodedPrompts, as_completion, completion_texts
from .completions import CompletionSet, finite_or_none

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..progress import Display
    from ..reward_tokens import RewardTokens

# Completions that one call of a scorer, and one line of its journal, are of.
_CHUNK = 256
_TEXTS = 16  # references, or texts whose features are wanted, in one forward


@dataclass(frozen=True)
class Asked:
    """A model and how it is asked.

    Attributes:
        tokens: its reward tokens; None: Quark did not train it.
        quantile: whose reward token is put in; None none.
        from_token: what the dial starts from: "worst", or "none", the unconditional branch that token dropout trains.
        attribute: whose dial is turned, where there are several; None: the one from the worst in all of them.
        num_beams: 1: greedy or sampled.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: RewardTokens | None = None
    quantile: int | None = None
    from_token: str = "worst"
    num_beams: int = 1
    attribute: str | None = None

    @property
    def position(self) -> str:
        return self.tokens.position if self.tokens is not None else "first"

    @property
    def barred(self) -> tuple[int, ...]:
        return self.tokens.barred if self.tokens is not None else ()

    def conditioned(self, prompts: EncodedPrompts) -> list[list[int]]:
        """The prompts' ids with the reward token."""
        return [self._insert(ids, self.quantile, at) for ids, at in zip(prompts.ids, prompts.token_at, strict=True)]

    def contrast(self, prompts: EncodedPrompts) -> list[list[int]]:
        """The same with what the dial starts from."""
        start: int | None = None
        if self.tokens is not None and self.quantile is not None and self.from_token == "worst":
            start = self.tokens.worst
            if self.attribute is not None:
                start = self.tokens.turned_down(self.quantile, self.tokens.attributes.index(self.attribute))
        return [self._insert(ids, start, at) for ids, at in zip(prompts.ids, prompts.token_at, strict=True)]

    def _insert(self, ids: list[int], quantile: int | None, at: int) -> list[int]:
        return list(ids) if self.tokens is None else self.tokens.insert(ids, quantile, at)


def generate(
    asked: Asked,
    prompts: EncodedPrompts,
    settings: GenerationSettings,
    num_generations: int,
    strengths: Sequence[float],
    seed: int,
    parts: Path,
    display: Display,
    batch_rows: int | None = None,
) -> CompletionSet:
    """`num_generations` completions of each prompt at each strength, all strengths in the same batches.

    The completion of (prompt, number) draws the same random numbers at every strength. What `parts` holds from a
    stopped call is not drawn again; the others come in the batches in which they would have come.
    """
    check_strength(strengths)
    repeats = len(prompts) * num_generations
    index = np.arange(len(strengths) * repeats)
    prompt_of = index % repeats // num_generations
    strength = np.repeat(np.asarray(strengths, dtype=np.float64), repeats)
    seeds = sample_seeds(seed, num=repeats) * len(strengths)
    settings = dataclasses.replace(settings, barred=asked.barred)
    ends = asked.conditioned(prompts)
    conditioned = [ends[p] for p in prompt_of]
    dials = []
    if (strength != 1.0).any():
        starts = asked.contrast(prompts)
        dials = [([starts[p] for p in prompt_of], strength.tolist())]
    if asked.num_beams > 1:
        from .beams import BeamCompleter

        completer: Any = BeamCompleter(asked.model, _eos_ids(asked), asked.num_beams)
    else:
        from ..generation.hf import HFCompleter

        completer = HFCompleter(asked.model, _eos_ids(asked), batch_rows)
    journal = Journal(
        parts / "generate.jsonl",
        lambda: {"batch_rows": completer.batch_rows or completer.fitting_rows(conditioned, settings)},
    )
    with journal.reading():
        completer.batch_rows = int(journal.begun["batch_rows"])
        drawn = _drawn(journal)
    with display.bar("generate", len(index), "completions") as advance:
        advance(len(drawn))
        batches = completer.complete(conditioned, seeds, settings, dials=dials, skip=drawn.keys())
        for rows, ids in batches:
            journal.add(rows=list(rows), ids=ids)
            advance(len(rows))
    drawn = _drawn(journal)
    completion_ids = [drawn[i] for i in range(len(index))]
    return CompletionSet(
        prompts=prompts.prompts,
        texts=prompts.texts,
        prompt_of=prompt_of,
        number=index % num_generations,
        completions=completion_texts(asked.tokenizer, prompts.select(prompt_of.tolist()), completion_ids),
        completion_ids=completion_ids,
        prompt_ids=prompts.ids,
        columns=prompts.columns,
        strength=strength,
    )


def _drawn(journal: Journal) -> dict[int, list[int]]:
    return {row: ids for line in journal.lines for row, ids in zip(line["rows"], line["ids"], strict=True)}


def _eos_ids(asked: Asked) -> list[int]:
    from ..steering import eos_ids

    return eos_ids(asked.model, asked.tokenizer)


# Scores


@dataclass(frozen=True)
class Scorer:
    """One scorer of an evaluation, under the name that tables give it.

    Attributes:
        role: "reward": the training's; "independent": another, that it never saw; None: not told.
        threshold: a completion is wanted above it; None: the scorer names none.
        version: of a function of the user's own, that of the file that holds it.
    """

    name: str
    spec: str
    function: Callable[..., Any]
    role: str | None = None

    @property
    def threshold(self) -> float | None:
        return getattr(self.function, "threshold", None)

    @property
    def version(self) -> str | None:
        version = getattr(self.function, "scorer_version", None)
        if version is not None:
            return str(version)
        try:
            source = Path(inspect.getsourcefile(inspect.unwrap(self.function)) or "").read_bytes()
        except (OSError, TypeError):
            return None
        return f"source {hashlib.sha256(source).hexdigest()[:12]}"

    def facts(self) -> dict[str, Any]:
        """What a result tells of it."""
        told = str(getattr(self.function, "scorer_name", self.name))
        scope = "prompt+completion" if "prompt+completion" in told else "completion"
        return {
            "spec": self.spec,
            "scorer": told,
            "version": self.version,
            "role": self.role,
            "threshold": self.threshold,
            "scope": scope if hasattr(self.function, "scorer_name") else None,
        }


def load_scorers(specs: Sequence[str], roles: dict[str, str]) -> list[Scorer]:
    """The scorers that these specs of `load_reward` name. Raises: ConfigError when one is given twice."""
    from ..rewards import NAMED_REWARDS, load_reward

    scorers: list[Scorer] = []
    for spec in specs:
        function = load_reward(spec)
        # what the user wrote tells more than __name__, but for a path or a long list of options
        is_short = spec.partition("(")[0] in {*NAMED_REWARDS} - {"classifier", "http"}
        name = spec if is_short else getattr(function, "__name__", type(function).__name__)
        if spec in [scorer.spec for scorer in scorers]:
            raise ConfigError(f"scorer {spec} is named twice, and a table has one column for each. Leave one out.")
        if name in [scorer.name for scorer in scorers]:  # another file's function, or another server's path
            name = spec
        scorers.append(Scorer(name, spec, function, roles.get(spec)))
    return scorers


def score(completions: CompletionSet, scorer: Scorer, parts: Path, display: Display) -> NDArray[np.float64]:
    """The scorer's value of each completion, float64 (N,); NaN where it gave none.

    Raises: RewardError from the scorer; what it had scored stays in `parts`, for this version of it.
    """
    from ..rewards.runner import RewardRunner

    runner = RewardRunner(scorer.function, names=[scorer.name])
    key = hashlib.sha256(f"{scorer.spec} {scorer.version}".encode()).hexdigest()[:12]
    journal = Journal(parts / f"score-{key}.jsonl", lambda: {"scorer": scorer.spec, "version": scorer.version})
    values = np.full(len(completions), np.nan)
    with journal.reading():
        for line in journal.lines:
            values[line["start"] : line["start"] + len(line["values"])] = line["values"]
        done = {line["start"] for line in journal.lines}
    with display.bar(f"score {scorer.name}", len(completions), "completions") as advance:
        for start in range(0, len(completions), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(completions)))
            if start not in done:
                batch = runner.score(**_arguments(completions, rows))
                values[start : rows.stop] = batch.total
                journal.add(start=start, values=finite_or_none(batch.total))
            advance(len(rows))
    return values


def _arguments(completions: CompletionSet, rows: range) -> dict[str, Any]:
    of = completions.prompt_of[rows.start : rows.stop].tolist()
    prompts = [completions.prompts[p] for p in of]
    texts = completions.completions[rows.start : rows.stop]
    ids = completions.completion_ids
    return {
        "prompts": prompts,
        "completions": [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        "completion_ids": ids[rows.start : rows.stop] if ids is not None else [[] for _ in rows],
        "columns": {name: [values[p] for p in of] for name, values in completions.columns.items()},
    }


# Perplexity under an evaluator


@dataclass(frozen=True)
class Evaluator:
    """The language model under which completions are read, without a reward token."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: RewardTokens | None = None

    def keeps_ids(self, completions: CompletionSet) -> bool:
        """Whether it reads the ids as they were drawn: it has the tokenizer of the model that drew them."""
        made = completions.facts.get("made", {})
        known = completions.completion_ids is not None and completions.prompt_ids is not None
        return known and made.get("tokenizer") == tokenizer_digest(self.tokenizer, self.tokens)


def read_by(
    evaluator: Evaluator, completions: CompletionSet, parts: Path, display: Display
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(nll, tokens) of each completion given its prompt: nats, NaN without a value; how many tokens, 0 without one.

    NLL(prompt + completion) - NLL(prompt), as published. The end-of-text token is left out. With the evaluator's own
    tokenizer, prompt and completion are tokenized together; where that joins their border into one token, both sides
    are counted from the last token that the two agree on. No value: a completion without a token, or longer with its
    prompt than the evaluator reads.
    """
    from ..policy import Head, completion_log_probs
    from ..steering import context_length

    model, tokenizer = evaluator.model, evaluator.tokenizer
    keeps_ids = evaluator.keeps_ids(completions)
    pairs = _ids_as_drawn(completions, evaluator) if keeps_ids else _ids_of_texts(completions, tokenizer)
    nll, tokens = np.full(len(completions), np.nan), np.zeros(len(completions), dtype=np.int64)
    longest = context_length(model)
    rows = [i for i, pair in enumerate(pairs) if pair.num_tokens > 0 and len(pair.whole) <= longest]
    rows.sort(key=lambda i: (-len(pairs[i].whole), i))  # the longest first, so that memory fails early
    head, barred = Head(model), evaluator.tokens.barred if evaluator.tokens is not None else ()
    journal = Journal(
        parts / f"evaluator-{weights_digest(model)}.jsonl", lambda: {"evaluator": evaluator.name, "ids": keeps_ids}
    )
    with journal.reading():
        for line in journal.lines:
            nll[rows[line["start"] : line["start"] + len(line["nll"])]] = line["nll"]
        done = {line["start"] for line in journal.lines}

    def total(contexts: list[list[int]], targets: list[list[int]]) -> NDArray[np.float64]:
        return -completion_log_probs(model, head, contexts, targets, 0, barred)  # padding is masked: any id serves

    with display.bar("perplexity", len(rows), "completions") as advance:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            if start not in done:
                ours = [pairs[i] for i in chunk]
                values = total([p.whole[: p.shared] for p in ours], [p.whole[p.shared :] for p in ours])
                joined = [k for k, p in enumerate(ours) if p.shared < len(p.prompt)]
                if joined:
                    over = [ours[k] for k in joined]
                    values[joined] -= total([p.prompt[: p.shared] for p in over], [p.prompt[p.shared :] for p in over])
                nll[chunk] = values
                journal.add(start=start, nll=finite_or_none(values))
            advance(len(chunk))
    read = np.isfinite(nll)
    tokens[read] = np.array([pair.num_tokens for pair in pairs], dtype=np.int64)[read]
    return nll, tokens


@dataclass(frozen=True)
class _Pair:
    """A prompt's ids, those of prompt and completion together, and how many of the first ids the two share."""

    prompt: list[int]
    whole: list[int]
    shared: int

    @property
    def num_tokens(self) -> int:
        # the first token of all has no context; published figures leave it out too
        return len(self.whole) - max(1, len(self.prompt))


def _ids_as_drawn(completions: CompletionSet, evaluator: Evaluator) -> list[_Pair]:
    from ..steering import eos_ids

    assert completions.prompt_ids is not None
    assert completions.completion_ids is not None
    # a tuned model may end in another token of the vocabulary that it shares with its base
    ends = {*eos_ids(evaluator.model, evaluator.tokenizer), *(completions.facts["made"].get("eos_ids") or ())}
    pairs = []
    for p, ids in zip(completions.prompt_of.tolist(), completions.completion_ids, strict=True):
        prompt = completions.prompt_ids[p]
        ids = ids[:-1] if ids and ids[-1] in ends else ids
        pairs.append(_Pair(prompt, [*prompt, *ids], len(prompt)))
    return pairs


def _ids_of_texts(completions: CompletionSet, tokenizer: PreTrainedTokenizerBase) -> list[_Pair]:
    def encoded(texts: list[str]) -> list[list[int]]:
        rows: Any = tokenizer(texts)["input_ids"] if texts else []
        # some tokenizers close every text
        return [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in rows]

    prompts = encoded(completions.texts)
    of = completions.prompt_of.tolist()
    wholes = encoded([completions.texts[p] + text for p, text in zip(of, completions.completions, strict=True)])
    pairs = []
    for p, whole in zip(of, wholes, strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(prompts[p], whole, strict=False)) if a != b), None)
        shared = min(len(prompts[p]), len(whole)) if shared is None else shared
        pairs.append(_Pair(prompts[p], whole, max(1, shared)))
    return pairs


def weights_digest(model: PreTrainedModel) -> str:
    """12 hex digits that change when training changes a model: its parameters' names, shapes and a thousand values."""
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // 1000)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + values.tobytes())
    return digest.hexdigest()[:12]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, tokens: RewardTokens | None) -> str:
    """12 hex digits of a vocabulary, reward tokens left out: models with the same one read the same ids."""
    barred = set(tokens.barred) if tokens is not None else set()
    words = sorted((i, word) for word, i in tokenizer.get_vocab().items() if i not in barred)
    return hashlib.sha256(repr(words).encode()).hexdigest()[:12]


# References


def follow(
    asked: Asked, prompts: EncodedPrompts, references: Sequence[str], num_tokens: int, parts: Path, display: Display
) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """(predicted ids, gold ids, nll) of the references under the model as it is asked: see `token_repetition`.

    The gold ids are those of the prompt, without a reward token, and of the first `num_tokens` of its reference; what
    is predicted, teacher-forced, are the reference's.
    """
    import torch

    from ..collator import view
    from ..loss import without
    from ..policy import Head, completion_states

    conditioned = asked.conditioned(prompts)
    texts = [after(prompt, reference) for prompt, reference in zip(prompts.texts, references, strict=True)]
    gold: list[list[int]] = [
        list(asked.tokenizer(text, add_special_tokens=False)["input_ids"])[:num_tokens] for text in texts
    ]
    predicted: list[list[int]] = [[] for _ in gold]
    nll: list[list[float]] = [[] for _ in gold]
    head, device = Head(asked.model), next(asked.model.parameters()).device
    rows = sorted((i for i, ids in enumerate(gold) if ids), key=lambda i: -len(conditioned[i]) - len(gold[i]))
    journal = Journal(parts / "references.jsonl")
    with journal.reading():
        done = {line["start"] for line in journal.lines}
    with display.bar("references", len(rows), "texts") as advance, torch.no_grad():
        for start in range(0, len(rows), _TEXTS):
            chunk = rows[start : start + _TEXTS]
            advance(len(chunk))
            if start in done:
                continue
            batch = {k: v.to(device) for k, v in view([(conditioned[i], gold[i]) for i in chunk], 0).items()}
            states = completion_states(asked.model, batch).split([len(gold[i]) for i in chunk])
            line: dict[str, Any] = {"start": start, "predicted": [], "nll": []}
            for i, hidden in zip(chunk, states, strict=True):  # one text's logits at a time
                logits = without(head(hidden), asked.barred)
                targets = torch.tensor(gold[i], device=device)[:, None]
                line["predicted"].append(logits.argmax(1).tolist())
                line["nll"].append((logits.logsumexp(1) - logits.gather(1, targets).squeeze(1)).tolist())
            journal.add(**line)
    for line in journal.lines:
        for i, ids, values in zip(rows[line["start"] :], line["predicted"], line["nll"], strict=False):
            predicted[i], nll[i] = ids, values
    return predicted, [[*p, *g] for p, g in zip(prompts.ids, gold, strict=True)], nll


def features(evaluator: Evaluator, texts: Sequence[str], display: Display) -> NDArray[np.float32]:
    """The last token's hidden state of each text under the evaluator, float32 (N, H): what MAUVE compares."""
    import torch

    from ..collator import view
    from ..policy import run_body
    from ..steering import context_length

    model = evaluator.model
    longest = min(context_length(model), 1024)  # the MAUVE paper's
    encoded: Any = evaluator.tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    out: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(encoded)
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    with display.bar("features", len(order), "texts") as advance, torch.no_grad():
        for start in range(0, len(order), _TEXTS):
            chunk = order[start : start + _TEXTS]
            batch = {k: v.to(device) for k, v in view([(encoded[i], []) for i in chunk], 0).items()}
            names = ("input_ids", "attention_mask", "position_ids")
            states = run_body(model, **{name: batch[name] for name in names}, use_cache=False).last_hidden_state
            for row, i in enumerate(chunk):
                out[i] = states[row, len(encoded[i]) - 1].float().cpu().numpy()
            advance(len(chunk))
    return np.stack(out)


def after(prompt: str, reference: str) -> str:
    """The reference as it follows the prompt: some data sets leave the space between the two out."""
    joins = not prompt or prompt[-1].isspace() or not reference or not reference[0].isalnum()
    return reference if joins else f" {reference}"
