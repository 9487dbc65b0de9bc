"""Tries a reward function, and the tags that are to name its quantiles, before anyone spends hours on them.

A reward must have a value for nearly every completion, enough different ones, the same one in any order and batch, in
less time than sampling takes. A tag must be half understood by the untrained model, which must stay itself with it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import quantiles
from .errors import ConfigError, DataError, RewardError
from .packaged import PACKAGED
from .prompts import EncodedPrompts, as_completion, as_dataset, checked, encode, flat, load_prompts
from .reward_tokens import RewardTokens, default_texts
from .rewards.runner import RewardRunner

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Differences below this share of the rewards' range move no quantile: sums in another order, bfloat16's above all.
_TOLERANCE = 1e-2
_SINGLES = 16  # texts that are scored one by one
_DRIFT_ROWS = 64  # completions sampled with a candidate tag
_MOST_QUANTILES = 10
# The tags of measured runs that worked start at 1.5 to 1.8 times the plain perplexity, bare new tokens at 1.6.
_MOST_DRIFT = 2.5
_FEWEST_ROWS = 8  # in the best or worst quantile; an AUC of fewer says nothing


@dataclass
class Finding:
    """One verdict: `ok`, or what to do about it."""

    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok     ' if self.ok else 'warning'}  {self.text}"


@dataclass
class TagFigures:
    """What a set of reward tokens does to the untrained model.

    Attributes:
        texts: worst first; None: bare new tokens.
        auc, auc_se: with which log p(y | x, best) - log p(y | x, worst), a token, tells the best quantile's
            samples from the worst one's.
        perplexity, plain_perplexity: under the plain model, of completions sampled with the best token and without one.
        drift: their quotient.
        reward, plain_reward: means of the same completions.
    """

    texts: list[str] | None
    auc: float | None
    auc_se: float | None
    perplexity: float
    plain_perplexity: float
    reward: float | None
    plain_reward: float | None

    @property
    def drift(self) -> float:
        return self.perplexity / self.plain_perplexity

    @property
    def name(self) -> str:
        return (
            "a bare new token"
            if self.texts is None
            else f"the tags {self.texts[0].strip()!r} ... {self.texts[-1].strip()!r}"
        )


@dataclass
class Report:
    """What `check` found. Shares are of all completions; the figures of rewards are of those that got one."""

    reward: str
    completions: int
    none_share: float
    distinct: int
    tied_share: float
    mean: float | None
    std: float | None
    minimum: float | None
    maximum: float | None
    texts_per_second: float
    samples_per_second: float | None
    repeat_difference: float  # the largest, over the range of the rewards; infinite where None and a number meet
    order_difference: float
    batch_difference: float
    quantiles: int  # the most that the rewards fill evenly enough
    num_quantiles: int  # as wanted
    tags: list[TagFigures] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        data = asdict(self)
        for tag, figures in zip(data["tags"], self.tags, strict=True):
            tag["drift"] = figures.drift
        return data


def check(
    reward: Any,
    prompts: str | Path | Dataset | None = None,
    *,
    model: str | tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = PACKAGED,
    completions: str | Path | None = None,
    num: int = 128,
    num_quantiles: int = 5,
    tag_sets: Sequence[Sequence[str]] | None = None,
    position: str = "first",
    max_completion_length: int = 20,
    temperature: float = 1.0,
    seed: int = 0,
    dtype: Any = None,
    revision: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Report:
    """A report on a reward function, by completions of `num` prompts or by the user's own.

    Example:
        ```python
        report = check("sentiment", "prompts.jsonl", tag_sets=[["Sentiment: negative.\\n", "Sentiment: positive.\\n"]])
        print(*report.findings, sep="\\n")
        ```

    Args:
        reward: what `load_reward` takes, or a list of it.
        prompts: a file, hub name or data set; may be None when `completions` are given.
        model: samples the completions and tries the tags; a name, or (model, tokenizer). None: the tags are not tried.
        completions: a JSONL file with `completion`, and maybe `prompt`; its other columns reach the reward.
        tag_sets: candidate reward tokens, each worst first; None: the default tags.
        position: where a reward token stands, as `QuarkConfig.reward_token_position`.
        dtype, revision: of a model that is loaded by its name.
        tell: is called with a line at the start of each stage.
    Raises: RewardError when the reward fails or gives nothing; ConfigError, DataError, ModelError for bad input.
    """
    for texts in tag_sets or ():
        if len(texts) < 2:
            raise ConfigError(f"The tag set {list(texts)} names fewer than two quantiles. Give two or more.")
    if num < 2 * _FEWEST_ROWS:
        raise ConfigError(f"num={num} completions say nothing about a reward. Set it to {2 * _FEWEST_ROWS} or more.")
    if completions is None and prompts is None:
        raise DataError("There are neither prompts nor completions, so there is nothing to score. Give one of them.")
    if completions is not None and prompts is not None:
        raise ConfigError("Your own completions bring their prompts, and no others are read. Give one of the two.")
    if completions is None and model is None:
        raise ConfigError("Without a model there is nobody to complete the prompts. Give a model, or completions.")
    if revision is not None and not isinstance(model, str):
        raise ConfigError(f"revision={revision!r} is of no model that is loaded here. Name the model, or leave it out.")
    # what may be wrong in a second comes before the model
    rows = _read_rows(completions) if completions is not None else []
    dataset = load_prompts(prompts) if isinstance(prompts, (str, Path)) else prompts
    runner = RewardRunner(reward)
    if any(getattr(function, "cache_path", None) is not None for function in runner.functions):
        raise ConfigError(
            "The reward answers from a cache, which would make every repeated call agree. Leave cache out to check it."
        )
    trial = None
    if model is not None:
        tell("loading the model")
        trial = _Trial(model, position, max_completion_length, temperature, seed, dtype, revision)
    samples_per_second = None
    if rows:
        samples = _as_samples(rows, trial)
    else:
        assert trial is not None
        encoded = trial.encode(checked(dataset, "prompts"))
        order = np.random.default_rng(seed).permutation(len(encoded))
        encoded = encoded.select(np.resize(order, num).tolist())  # again from the start when there are fewer
        tell(f"sampling {num} completions")
        started = time.perf_counter()
        samples = trial.sample(encoded)
        samples_per_second = num / (time.perf_counter() - started)
    tell(f"scoring {len(samples)} completions, in several orders and batches")
    report, rewards = _check_rewards(runner, samples, num_quantiles, samples_per_second, seed)
    _judge_reward(report)
    if trial is not None and report.distinct > 1 and samples.prompts is not None:
        sets = list(tag_sets) if tag_sets is not None else [default_texts(num_quantiles)]
        plain = trial.sample(samples.prompts.select(range(min(_DRIFT_ROWS, len(samples)))))
        for number, texts in enumerate([*sets, None]):
            tell(f"trying reward tokens: {number + 1} of {len(sets) + 1}")
            if texts is None:  # new tokens would stay in the caller's model
                trial = trial.with_own_model()
            report.tags.append(trial.try_tokens(texts, samples, rewards, plain, runner, num_quantiles))
        _judge_tags(report)
    return report


# What is scored


@dataclass
class _Samples:
    """Completions and what belongs to them; `prompts` is None where nobody knows what was completed."""

    texts: list[str]
    ids: list[list[int]]
    prompts: EncodedPrompts | None
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.texts)

    def score(self, runner: RewardRunner, rows: Sequence[int] | None = None) -> np.ndarray:
        """The rewards of these rows, float64, NaN for None."""
        rows = range(len(self)) if rows is None else rows
        prompts = self.prompts.prompts if self.prompts is not None else [""] * len(self)
        return runner.score(
            [prompts[i] for i in rows],
            [as_completion(prompts[i], self.texts[i]) for i in rows],
            [self.ids[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
        ).total


def _read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of completions, each checked."""
    from .evaluation.completions import json_lines

    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"There is no file {path}. Give a JSONL file with a completion a line.")
    rows = []
    for number, row in json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise DataError(f'Line {number} of {path} has no text as its `completion`. Write {{"completion": "..."}}.')
        rows.append({**row, "prompt": flat(row["prompt"])} if "prompt" in row else row)
    if len(rows) < 2 * _FEWEST_ROWS:
        raise DataError(f"{path} holds {len(rows)} completions, too few to judge. Give {2 * _FEWEST_ROWS} or more.")
    return rows


def _as_samples(rows: list[dict[str, Any]], trial: _Trial | None) -> _Samples:
    names = sorted(set.intersection(*(set(row) for row in rows)) - {"prompt", "completion"})
    columns = {name: [row[name] for row in rows] for name in names}
    texts = [row["completion"] for row in rows]
    with_prompts = all("prompt" in row for row in rows)
    if trial is None:
        # no tokenizer: a word is a token, which is enough for a reward that counts or compares them
        words: dict[str, int] = {}
        ids = [[words.setdefault(word, len(words)) for word in text.split()] for text in texts]
        prompts = None
        if with_prompts:
            prompts = EncodedPrompts([row["prompt"] for row in rows], [], [], [])
        return _Samples(texts, ids, prompts, columns)
    ids = [list(trial.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    prompts = trial.encode(as_dataset([row["prompt"] for row in rows], "completions")) if with_prompts else None
    return _Samples(texts, ids, prompts, columns)


def _check_rewards(
    runner: RewardRunner, samples: _Samples, num_quantiles: int, samples_per_second: float | None, seed: int
) -> tuple[Report, np.ndarray]:
    num = len(samples)
    samples.score(runner, range(min(8, num)))  # what is loaded late is not counted as slow
    started = time.perf_counter()
    rewards = samples.score(runner)
    seconds = time.perf_counter() - started
    valid = rewards[~np.isnan(rewards)]
    if not len(valid):
        raise RewardError(
            f"The reward {', '.join(runner.names)} gave None for all {num} completions, so there is nothing to rank."
            " Look at what it is called with: completions are text, or messages for conversational prompts."
        )
    order = np.random.default_rng(seed).permutation(num)
    shuffled = np.empty(num)
    shuffled[order] = samples.score(runner, order.tolist())
    singles = order[:_SINGLES]
    single = np.concatenate([samples.score(runner, [int(i)]) for i in singles])
    values, counts = np.unique(valid, return_counts=True)
    spread = float(values[-1] - values[0])
    report = Report(
        reward=", ".join(runner.names),
        completions=num,
        none_share=1 - len(valid) / num,
        distinct=len(values),
        tied_share=float(counts[counts > 1].sum() / num),
        mean=float(valid.mean()),
        std=float(valid.std()),
        minimum=float(values[0]),
        maximum=float(values[-1]),
        texts_per_second=num / max(seconds, 1e-6),
        samples_per_second=samples_per_second,
        repeat_difference=_difference(rewards, samples.score(runner), spread),
        order_difference=_difference(rewards, shuffled, spread),
        batch_difference=_difference(rewards[singles], single, spread),
        quantiles=_most_quantiles(valid),
        num_quantiles=num_quantiles,
    )
    return report, rewards


def _difference(one: np.ndarray, other: np.ndarray, spread: float) -> float:
    """The largest difference, as a share of the range; infinite where only one of them is a number."""
    if (np.isnan(one) != np.isnan(other)).any():
        return float("inf")
    both = ~np.isnan(one)
    return float(np.abs(one[both] - other[both]).max(initial=0.0) / (spread or 1.0))


def _most_quantiles(rewards: np.ndarray) -> int:
    """The largest K for which every quantile holds at least half of its even share; 1 when all rewards are equal."""
    for num in range(min(_MOST_QUANTILES, len(np.unique(rewards))), 1, -1):
        sizes = np.bincount(quantiles.assign(rewards, num), minlength=num)
        if sizes.min() >= len(rewards) / num / 2:
            return num
    return 2 if len(np.unique(rewards)) > 1 else 1


# What reward tokens do to the untrained model


class _Trial:
    """An untrained model that completes prompts and reads candidate tags."""

    def __init__(
        self,
        model: str | tuple[PreTrainedModel, PreTrainedTokenizerBase],
        position: str,
        max_completion_length: int,
        temperature: float,
        seed: int,
        dtype: Any,
        revision: str | None = None,
    ) -> None:
        from .export import load, to_device
        from .generation import GenerationSettings
        from .generation.hf import HFCompleter
        from .policy import check_head
        from .steering import eos_ids

        self.is_ours = isinstance(model, str)
        self._arguments = (position, max_completion_length, temperature, seed, dtype)
        if isinstance(model, str):
            options = {"dtype": dtype, "revision": revision}
            self.model, self.tokenizer, _ = load(model, **{name: value for name, value in options.items() if value})
        else:
            self.model, self.tokenizer = model
        check_head(self.model)
        to_device(self.model)
        self.position, self.seed = position, seed
        self.settings = GenerationSettings(max_completion_length=max_completion_length, temperature=temperature)
        self.completer = HFCompleter(self.model, eos_ids(self.model, self.tokenizer))
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.pad_id = int(next((i for i in (pad, eos) if i is not None), 0))

    def with_own_model(self) -> _Trial:
        """This trial on a model that it may change."""
        if self.is_ours:
            return self
        return _Trial((copy.deepcopy(self.model), copy.deepcopy(self.tokenizer)), *self._arguments)

    def encode(self, dataset: Dataset) -> EncodedPrompts:
        from .steering import context_length

        # 32: room for a tag
        room = context_length(self.model) - self.settings.max_completion_length - 32
        return encode(dataset, self.tokenizer, self.position, room)

    def sample(self, prompts: EncodedPrompts, tokens: RewardTokens | None = None) -> _Samples:
        """Completions, with the best reward token where tokens are given."""
        from .generation import complete_all, sample_seeds
        from .prompts import completion_texts

        ids = prompts.ids
        settings = self.settings
        if tokens is not None:
            ids = [tokens.insert(p, tokens.best, at) for p, at in zip(prompts.ids, prompts.token_at, strict=True)]
            settings = replace(settings, barred=tokens.barred)
        self.model.eval()
        batches = self.completer.complete(ids, sample_seeds(self.seed, num=len(ids)), settings)
        completions = complete_all(batches, len(ids))
        texts = completion_texts(self.tokenizer, prompts, completions)
        return _Samples(texts, completions, prompts, prompts.columns)

    def log_probs(
        self, samples: _Samples, rows: Sequence[int], tokens: RewardTokens | None, quantile: int | None
    ) -> np.ndarray:
        """log p(completion | prompt with the quantile's token), in nats, of these rows."""
        from .policy import Head, completion_log_probs

        assert samples.prompts is not None
        prompts, at = samples.prompts.ids, samples.prompts.token_at
        read = [prompts[i] if tokens is None else tokens.insert(prompts[i], quantile, at[i]) for i in rows]
        barred = tokens.barred if tokens is not None else ()
        return completion_log_probs(
            self.model, Head(self.model), read, [samples.ids[i] for i in rows], self.pad_id, barred
        )

    def try_tokens(
        self,
        texts: Sequence[str] | None,
        samples: _Samples,
        rewards: np.ndarray,
        plain: _Samples,
        runner: RewardRunner,
        num_quantiles: int,
    ) -> TagFigures:
        """The figures of a tag set, or of bare new tokens (None), which this model keeps from then on.

        plain: completions without a token, whose prompts are completed again with the best one, by the same draws.
        """
        from .generation.hf import HFCompleter

        assert plain.prompts is not None
        tokens = RewardTokens.create(
            self.model,
            self.tokenizer,
            num_quantiles=num_quantiles if texts is None else len(texts),
            style="embedding" if texts is None else "text",
            texts=texts,
            position=self.position,
            seed=self.seed,
        )
        if texts is None:  # new rows may have replaced the head
            self.completer = HFCompleter(self.model, self.completer.eos_ids)
        auc, auc_se = self._auc(tokens, samples, rewards, num_quantiles)
        asked = self.sample(plain.prompts, tokens)
        return TagFigures(
            texts=None if texts is None else list(texts),
            auc=auc,
            auc_se=auc_se,
            perplexity=self._perplexity(asked, tokens),
            plain_perplexity=self._perplexity(plain, tokens),
            reward=_mean(asked.score(runner)),
            plain_reward=_mean(plain.score(runner)),
        )

    def _auc(
        self, tokens: RewardTokens, samples: _Samples, rewards: np.ndarray, num_quantiles: int
    ) -> tuple[float | None, float | None]:
        ranked = np.flatnonzero(~np.isnan(rewards) & [len(ids) > 0 for ids in samples.ids])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", quantiles.FewQuantilesWarning)  # the report says it in its own words
            assigned = quantiles.assign(rewards[ranked], num_quantiles)
        good, bad = ranked[assigned == num_quantiles - 1], ranked[assigned == 0]
        if min(len(good), len(bad)) < _FEWEST_ROWS:
            return None, None
        rows = [*good.tolist(), *bad.tolist()]
        gain = self.log_probs(samples, rows, tokens, tokens.best) - self.log_probs(samples, rows, tokens, tokens.worst)
        auc = quantiles.auc(gain / [len(samples.ids[i]) for i in rows], np.arange(len(rows)) < len(good))
        return auc, quantiles.auc_standard_error(auc, len(good), len(bad))

    def _perplexity(self, samples: _Samples, tokens: RewardTokens) -> float:
        """exp(total NLL / total tokens) under the model without a tag, which outliers do not own."""
        rows = [i for i in range(len(samples)) if samples.ids[i]]
        # the quantile None leaves the tag out; new tokens stay out of the softmax
        total = self.log_probs(samples, rows, tokens, None).sum()
        return float(np.exp(-total / max(1, sum(len(samples.ids[i]) for i in rows))))


def _mean(rewards: np.ndarray) -> float | None:
    valid = rewards[~np.isnan(rewards)]
    return float(valid.mean()) if len(valid) else None


# Verdicts


def _finding(fact: str, advice: str = "") -> Finding:
    """A fact that is well, or with advice one that is not."""
    return Finding(not advice, f"{fact} {advice}".rstrip())


def _judge_reward(report: Report) -> None:
    few_rewarded = report.none_share > 0.1
    told = [
        _finding(
            f"{report.none_share:.1%} of the completions get None and are dropped."
            if report.none_share
            else "every completion gets a reward.",
            "They are sampled for nothing: give them a value, or make completions longer." if few_rewarded else "",
        )
    ]
    if report.distinct == 1:
        told.append(
            _finding(
                f"every reward is {report.minimum:.6g}, so there is nothing to learn.",
                "Use a graded reward, or prompts on which it differs.",
            )
        )
    else:
        few = report.quantiles < report.num_quantiles
        told += [
            _finding(
                f"rewards run from {report.minimum:.4g} to {report.maximum:.4g} (mean {report.mean:.4g}, standard"
                f" deviation {report.std:.4g}); only their order counts."
            ),
            _finding(
                f"{report.distinct} distinct rewards ({report.tied_share:.0%} of the completions share theirs) can feed"
                f" {report.quantiles} quantiles, where {report.num_quantiles} are planned.",
                f"Set num_quantiles={report.quantiles}, or use a graded reward." if few else "",
            ),
        ]
    if report.repeat_difference > _TOLERANCE:
        # what is random differs in any order and batch, so these say nothing of their own
        difference = _by_how_much(report.repeat_difference)
        told.append(_finding(f"the same call twice gives other rewards ({difference}).", "Seed it, or average it."))
    else:
        told += [
            _same("order", report.order_difference, "Return the rewards in the order of the completions."),
            _same("batch", report.batch_difference, "Score each text by itself; look at padding and batch statistics."),
        ]
    speed, sampling = report.texts_per_second, report.samples_per_second
    fact = f"it scores {speed:,.0f} texts/s" + (f"; sampling gives {sampling:,.1f}/s." if sampling else ".")
    slow = sampling is not None and speed < sampling
    told.append(_finding(fact, "It would take most of the time: batch it, or use a smaller one." if slow else ""))
    report.findings += told


def _same(what: str, difference: float, mend: str) -> Finding:
    if difference <= _TOLERANCE:
        return _finding(f"the {what} of the texts does not change a reward.")
    return _finding(f"the {what} of the texts changes rewards ({_by_how_much(difference)}).", mend)


def _by_how_much(difference: float) -> str:
    return "None in one, a number in the other" if np.isinf(difference) else f"up to {difference:.1%} of their range"


def _judge_tags(report: Report) -> None:
    for tag in report.tags:
        if tag.auc is None or tag.auc_se is None:
            fact = f"{tag.name}: the best or worst quantile holds under {_FEWEST_ROWS} completions, too few for an AUC."
            report.findings.append(_finding(fact, "Check more of them."))
            continue
        figures = f"starting AUC {tag.auc:.2f} +- {tag.auc_se:.2f}, perplexity x {tag.drift:.2f}"
        if tag.reward is not None and tag.plain_reward is not None:
            figures += f", reward {tag.plain_reward:.3f} -> {tag.reward:.3f}"
        if tag.texts is None:
            fact = f"{tag.name}, to compare with: {figures}. Its row is random, so another seed gives another."
            report.findings.append(_finding(fact))
            continue
        advice = []
        if tag.auc < 0.5 - 2 * tag.auc_se:
            advice.append("The model reads them the wrong way round: list the worst first, or find other words.")
        elif tag.auc <= 0.5 + 2 * tag.auc_se:
            # the standard error falls with the square root of the completions
            enough = report.completions * (2 * tag.auc_se / max(tag.auc - 0.5, 1e-3)) ** 2
            if enough < 2000:
                told = f"{report.completions} completions cannot tell this from 0.5, which is nothing"
                advice.append(f"{told}: check {int(-(-enough // 10) * 10)}.")
            else:
                advice.append("They hardly mean anything yet: find words nearer to what is rewarded, or sample many.")
        if not 1 / _MOST_DRIFT < tag.drift < _MOST_DRIFT:
            advice.append("They move the model by themselves: find words that fit the prompts' kind of text.")
        if _fell(report, tag):
            advice.append("The best one by itself lowers the reward: find other words.")
        report.findings.append(_finding(f"{tag.name}: {figures}.", " ".join(advice)))


def _fell(report: Report, tag: TagFigures) -> bool:
    """Whether the best tag's mean reward is below the plain one by more than two standard errors."""
    if tag.reward is None or tag.plain_reward is None or not report.std:
        return False
    return tag.reward < tag.plain_reward - 2 * report.std * float(np.sqrt(2 / min(_DRIFT_ROWS, report.completions)))
