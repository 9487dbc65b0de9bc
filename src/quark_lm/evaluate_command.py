"""`quark evaluate` and `quark dial`: what is asked, of which model, and the files and tables that come of it.

The passes are evaluation/passes.py's, the figures summary.py's, the tables tables.py's, the dial's picture dial.py's.
A folder of an evaluation:

evaluation.json        what makes this evaluation this one: a folder of another is refused
parts/                 what is done so far, a line for each batch; gone at the end
completions.parquet    ids, texts, every score; written when all is generated, and again at the end
results.json           the figures (`dial.json` of `quark dial`), and all that they depend on
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from . import __version__
from .errors import ConfigError, DataError
from .files import first_line, parsed, sha256
from .generation import DRAWING, GenerationSettings, check_strength
from .progress import Display
from .reward_tokens import asked_quantile
from .run_folder import check_folder, disk_errors, environment, finite, locked, write_json

if TYPE_CHECKING:
    from .evaluation.completions import CompletionSet
    from .evaluation.passes import Asked, Evaluator, Scorer
    from .evaluation.tasks import EvaluationTask
    from .prompts import EncodedPrompts

DIAL_STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
# what else says which completions are drawn: with --from it must be as the file has it
_GENERATION = (
    "model",
    "revision",
    "prompts",
    "num_prompts",
    "num_generations",
    "quantile",
    "strengths",
    "from_token",
    "attribute",
    "num_beams",
)


@dataclass(frozen=True)
class Request:
    """What is asked for; the fields are the command's options. None: not named, so the task's or the default.

    Attributes:
        scorers: specs of `load_reward`; none: the task's two.
        evaluator: the model under which perplexity is taken; None: no perplexity.
        from_file: completions to score again in place of generating.
        strengths: of the dial; `quark evaluate` has one.
        attribute: whose dial they are, of a model that has several; None: of all of them.
        references: the prompts' column with the human continuation, which the model then follows.
        mauve: compare completions with the references, by features of the evaluator.
    """

    model: str | None = None
    task: str | None = None
    prompts: str | None = None
    num_prompts: int | None = None
    num_generations: int | None = None
    scorers: tuple[str, ...] = ()
    evaluator: str | None = None
    from_file: str | None = None
    quantile: str | None = None
    strengths: tuple[float, ...] | None = None
    from_token: str | None = None
    attribute: str | None = None
    num_beams: int | None = None
    max_completion_length: int | None = None
    min_completion_length: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    dial_min_p: float | None = None
    seed: int | None = None
    references: str | None = None
    mauve: bool = False
    revision: str | None = None
    evaluator_revision: str | None = None
    output_dir: str | None = None
    batch_rows: int | None = None


def evaluate(request: Request, console: Console | None = None) -> dict[str, Any]:
    """Measures, writes results.json and completions.parquet, prints the table, and returns what it wrote.

    The same call goes on with a stopped one. Raises: ConfigError for options that do not go together or a folder of
    another evaluation; DataError for prompts or completions that cannot be read; RewardError from a scorer.
    """
    from .evaluation.tables import show_evaluation

    run = EvaluationRun.make("evaluate", request)
    results = run.evaluate()
    with run.reading("results.json"):
        show_evaluation(console or Console(), results, run.folder)
    return results


def dial(request: Request, console: Console | None = None) -> dict[str, Any]:
    """Measures the curve of strengths, writes dial.json, dial.png and completions.parquet, and prints the table.

    Raises: as `evaluate`, and ConfigError when matplotlib is missing, before anything is generated.
    """
    from .evaluation.dial import draw, need_matplotlib
    from .evaluation.tables import show_dial

    need_matplotlib()
    strengths = tuple(dict.fromkeys(request.strengths or DIAL_STRENGTHS))
    run = EvaluationRun.make("dial", dataclasses.replace(request, strengths=strengths))
    results = run.dial()
    with run.reading("dial.json"):
        draw(results, run.folder / "dial.png")
        show_dial(console or Console(), results, run.folder)
    return results


# A run


@dataclass
class EvaluationRun:
    """One evaluation on its way, made ready by `make`: models and scorers loaded, nothing generated."""

    kind: str
    request: Request
    task: EvaluationTask | None
    folder: Path
    made: dict[str, Any]  # the settings that the completions come from
    scorers: list[Scorer]
    seed: int
    display: Display
    evaluator: Evaluator | None = None
    asked: Asked | None = None  # None: the completions are there already
    prompts: EncodedPrompts | None = None
    settings: GenerationSettings | None = None
    source: CompletionSet | None = None
    was_finished: bool = False  # by an earlier call, whose results are read

    @classmethod
    def make(cls, kind: str, request: Request) -> EvaluationRun:
        """Checks and loads everything: what can fail early does."""
        from .evaluation.passes import load_scorers
        from .evaluation.tasks import find_task

        task = find_task(request.task) if request.task else None
        check_strength(request.strengths if request.strengths is not None else (1.0,))
        if request.mauve and not (request.references and request.evaluator):
            raise ConfigError(
                "--mauve compares completions with references by an evaluator's features. Name --references and"
                " --evaluator too."
            )
        if request.mauve and importlib.util.find_spec("mauve") is None:
            raise ConfigError(
                "--mauve needs the package mauve-text, which is not installed. pip install 'quark-lm[mauve]'"
            )
        folder = Path(request.output_dir or _default_folder(kind, request, task)).expanduser()
        _check_own(folder)
        own = dict(task.scorers) if task else {}
        foreign = None
        if request.from_file is not None:
            foreign = _read_source(request)
        if foreign is not None and foreign.completion_ids is None and task and task.name == "repetition":
            own.pop("reward")  # it counts token ids, which are not known
        specs = list(request.scorers) or list(own.values())
        scorers = load_scorers(specs, {spec: role for role, spec in own.items()})
        run = cls(
            kind,
            request,
            task,
            folder,
            made={},
            scorers=scorers,
            seed=request.seed or 0,
            display=Display(console=Console(stderr=True)),
            source=foreign,
        )
        if foreign is None:
            run._ask()
        else:
            run.made = foreign.facts["made"]
            if request.references and not request.mauve:
                raise ConfigError(
                    f"references={request.references} asks how the model follows them, but --from loads no model."
                    " Leave it out, or add --mauve to compare the completions with them."
                )
            _reference_texts(request.references, foreign.columns)
        run.evaluator = _load_evaluator(request, run.asked, run.folder)
        return run

    def evaluate(self) -> dict[str, Any]:
        """All figures; results.json and completions.parquet are then written."""
        with self.own_folder():
            results = self.finished("results.json")
            if results is None:
                self.measure()
                results = self.finish("results.json", {**self.facts(), **self.figures(), **self.references()})
        return results

    def dial(self) -> dict[str, Any]:
        """The figures at each strength; dial.json and completions.parquet are then written."""
        with self.own_folder():
            results = self.finished("dial.json")
            if results is None:
                self.measure()
                curve = [{"strength": strength, **self.figures(strength)} for strength in self.made["strengths"]]
                results = self.finish("dial.json", {**self.facts(), "curve": curve})
        return results

    @contextlib.contextmanager
    def own_folder(self) -> Iterator[None]:
        """Holds the folder for this evaluation. Raises: ConfigError when it is another's, naming what differs."""
        from .packaged import PACKAGED

        path = self.folder / "evaluation.json"
        identity = json.loads(json.dumps(self._identity()))
        _check_own(self.folder)
        with locked(self.folder), disk_errors(self.folder):
            there = read_json(path) if path.is_file() else identity
            differing = [key for key in identity if there.get(key) != identity[key]]
            begun = (self.folder / "completions.parquet").exists() or (self.folder / "parts").exists()
            if differing and begun:
                named = "; ".join(f"{key}: {there.get(key)!r} there, {identity[key]!r} here" for key in differing[:3])
                raise ConfigError(
                    f"{self.folder} holds another evaluation ({named}), whose completions would be mixed with this"
                    " one's. Choose another --output-dir, or give that one's settings to go on with it."
                )
            measured = there.get("evaluator_dtype")  # what goes on reads in the dtype that it was begun with
            if self.evaluator is not None and self.request.evaluator == PACKAGED:
                measured = str(self.evaluator.model.dtype).removeprefix("torch.")
            write_json(path, {**identity, "evaluator_dtype": measured})
            yield

    def figures(self, strength: float | None = None) -> dict[str, Any]:
        """All figures of the completions, those at this strength alone."""
        from .evaluation.summary import summarise

        of_row = self.completions.strength
        return summarise(
            self.completions,
            {scorer.name: scorer.threshold for scorer in self.scorers},
            measures_toxicity=self.task is not None and self.task.measures_toxicity,
            seed=self.seed,
            keep=None if strength is None or of_row is None else of_row == strength,
        )

    @property
    def completions(self) -> CompletionSet:
        assert self.source is not None
        return self.source

    def finished(self, name: str) -> dict[str, Any] | None:
        """The results of an earlier call that finished with these very scorers, else None."""
        from .evaluation.completions import read_completions

        path = self.folder / "completions.parquet"
        if not path.is_file():
            return None
        self.source = kept = read_completions(path)
        now = {scorer.name: scorer.facts() for scorer in self.scorers}
        # a scorer that was mended scores anew; what was generated stays
        kept.scores = {n: v for n, v in kept.scores.items() if kept.facts.get("scorers", {}).get(n) == now.get(n)}
        if kept.facts.get("evaluator") != self._evaluator_facts():
            kept.nll = kept.nll_tokens = None
        is_whole = len(kept.scores) == len(self.scorers) and (kept.nll is not None) == (self.evaluator is not None)
        if not is_whole or not (self.folder / name).is_file():
            return None
        self.was_finished = True
        return read_json(self.folder / name)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Within it, what an earlier call's results lack is one clear error. Raises: DataError."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if not self.was_finished:
                raise
            raise _damaged(self.folder / name, f"{error!r:.80}") from error

    def measure(self) -> None:
        """Generates, scores and reads, from where an earlier call stopped."""
        from .evaluation.passes import generate, read_by, score
        from .export import to_device

        path = self.folder / "completions.parquet"
        parts = self.folder / "parts"
        if self.source is None:
            assert self.asked is not None
            assert self.prompts is not None
            assert self.settings is not None
            self.source = generate(
                self.asked,
                self.prompts,
                self.settings,
                self.made["num_generations"],
                self.made["strengths"],
                self.seed,
                parts,
                self.display,
                self.request.batch_rows,
            )
            self.source.facts = {"made": self.made}
        if not path.is_file():
            self.source.write(path)  # what comes now may fail
        done = self.source
        for scorer in self.scorers:
            if scorer.name not in done.scores:
                done.scores[scorer.name] = score(done, scorer, parts, self.display)
        done.scores = {scorer.name: done.scores[scorer.name] for scorer in self.scorers}  # in the order of the tables
        if self.evaluator is not None and done.nll is None:
            to_device(self.evaluator.model)
            done.nll, done.nll_tokens = read_by(self.evaluator, done, parts, self.display)
        done.facts |= {
            "scorers": {scorer.name: scorer.facts() for scorer in self.scorers},
            "evaluator": self._evaluator_facts(),
        }

    def references(self) -> dict[str, Any]:
        """What is measured against human continuations, when they are named."""
        from .evaluation import metrics
        from .evaluation.passes import after, features, follow
        from .evaluation.summary import reference_figures
        from .export import to_device

        done = self.completions
        texts = _reference_texts(self.request.references, done.columns)
        if texts is None:
            return {}
        out: dict[str, Any] = {}
        if self.asked is not None and self.prompts is not None:
            length = self.made["max_completion_length"]
            followed = follow(self.asked, self.prompts, texts, length, self.folder / "parts", self.display)
            out["references"] = reference_figures(*followed, self.seed)
        if self.request.mauve and self.evaluator is not None:
            to_device(self.evaluator.model)
            firsts = [group[0] for group in done.groups()]
            pairs = zip(done.texts, (done.completions[i] for i in firsts), texts, strict=True)
            wholes = [(prompt + completion, prompt + after(prompt, text)) for prompt, completion, text in pairs]
            theirs, ours = (features(self.evaluator, [w[k] for w in wholes], self.display) for k in (1, 0))
            value = metrics.mauve(ours, theirs, seed=self.seed)
            out["mauve"] = {"mean": value, "low": None, "high": None}  # of two sets: it has no value a prompt
        return out

    def facts(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        return {
            "name": self.kind,
            "task": self.task.name if self.task else None,
            "made": self.made,
            "scorers": {scorer.name: scorer.facts() for scorer in self.scorers},
            "evaluator": self._evaluator_facts(),
            "seed": self.seed,
            "command": _command(self.kind, self.request),
            "version": __version__,
            "environment": environment(),
        }

    def finish(self, name: str, results: dict[str, Any]) -> dict[str, Any]:
        """Writes the results, and the completions with their scores; the parts are no longer needed."""
        results = finite(results)
        self.completions.write(self.folder / "completions.parquet")
        write_json(self.folder / name, results)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        return results

    # -- how it is made

    def _ask(self) -> None:
        """Loads the model and the prompts; sets asked, prompts, settings, made."""
        from .evaluation.passes import Asked, tokenizer_digest, weights_digest
        from .evaluation.tasks import PAPER_SAMPLING
        from .export import load, to_device
        from .packaged import PACKAGED, hub_commit
        from .policy import check_head
        from .prompts import encode
        from .steering import context_length, eos_ids

        request = self.request
        if request.model is None:
            raise ConfigError("There is no model to generate with. Name one, or completions with --from.")
        dataset, prompts_name = _prompts(request, self.task)
        _reference_texts(request.references, {name: dataset[name] for name in dataset.column_names})
        sampling = {**PAPER_SAMPLING, **(self.task.sampling if self.task else {})}
        sampling |= {name: value for name in DRAWING if (value := getattr(request, name)) is not None}
        num_beams = request.num_beams or 1
        if num_beams > 1:
            nothing: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
            drawn = [name for name, value in nothing.items() if getattr(request, name) not in (None, value)]
            if drawn:
                raise ConfigError(
                    f"num_beams={num_beams} takes the likeliest beam and draws nothing, so {drawn[0]} would do"
                    " nothing. Leave one of them out."
                )
            sampling |= nothing
        self.settings = settings = GenerationSettings(**sampling)
        draws = settings.temperature > 0
        default = (self.task.num_generations if self.task else 25) if self.kind == "evaluate" else 4
        num_generations = request.num_generations or (default if draws else 1)
        if num_generations > 1 and not draws:
            raise ConfigError(
                f"num_generations={num_generations} at temperature 0 is {num_generations} times the same completion."
                " Set it to 1, or raise the temperature."
            )
        options: dict[str, Any] = {}
        if request.model == PACKAGED:  # another one is a difference, which `own_folder` tells
            options["dtype"] = _dtype_of(self.folder, "dtype")
        if request.revision is not None:
            options["revision"] = request.revision
        model, tokenizer, tokens = load(request.model, **options)
        check_head(model)
        if self.kind == "dial" and tokens is None:
            raise ConfigError(
                f"{request.model} was not trained by Quark, so it has no reward tokens to dial between. Give the folder"
                " of a run."
            )
        to_device(model)
        strengths = request.strengths if request.strengths is not None else (1.0,)
        quantile = asked_quantile(request.quantile or "best", tokens, strengths, request.model)
        from_token = request.from_token or "worst"
        check_from_token(from_token, request.model)
        named = "from_token" if from_token == "none" else "attribute" if request.attribute is not None else None
        if named and tokens is not None and set(strengths) == {1.0}:
            raise ConfigError(f"{named} says how the dial is turned, and strength 1 turns none. Give a strength too.")
        check_limits_a_dial(settings.dial_min_p, strengths)
        check_turns(quantile, from_token, strengths)
        if request.attribute is not None and (tokens is None or request.attribute not in tokens.attributes):
            there = ", ".join(tokens.attributes) if tokens is not None else ""
            raise ConfigError(
                f"attribute={request.attribute!r} is none of the model's ({there or 'it has one dial alone'}). Mend the"
                " name, or leave it out."
            )
        if request.attribute is not None and from_token == "none":
            raise ConfigError("from_token='none' leaves out the tokens of all attributes. Leave --attribute out.")
        code = quantile if tokens is None else tokens.in_all(quantile)
        self.asked = Asked(model, tokenizer, tokens, code, from_token, num_beams, request.attribute)
        room = context_length(model) - settings.max_completion_length - (tokens.longest if tokens is not None else 0)
        self.prompts = encode(dataset, tokenizer, self.asked.position, max_length=room)
        self.made = {
            "model": _name(request.model),
            "revision": request.revision or hub_commit(request.model),
            "weights": weights_digest(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(tokenizer, tokens),
            "eos_ids": eos_ids(model, tokenizer),
            "reward_tokens": list(tokens.texts) if tokens is not None else None,
            "reward_attributes": list(tokens.attributes) if tokens is not None else [],
            "quantile": quantile,
            "strengths": [float(s) for s in strengths],
            "from_token": from_token,
            "attribute": request.attribute,
            "prompts": prompts_name,
            "prompts_digest": _digest([self.prompts.prompts, self.prompts.columns]),
            "num_prompts": len(self.prompts),
            "num_generations": num_generations,
            "num_beams": num_beams,
            **{name: getattr(settings, name) for name in DRAWING},
            "seed": self.seed,
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "task": self.task.name if self.task else None,
            **self.made,
            "seed": self.seed,
            "scorers": [scorer.spec for scorer in self.scorers],
            "evaluator": self.request.evaluator and _name(self.request.evaluator),
            "evaluator_revision": self.request.evaluator_revision,
            "references": self.request.references,
            "mauve": self.request.mauve,
        }

    def _evaluator_facts(self) -> dict[str, Any] | None:
        from .evaluation.passes import weights_digest
        from .packaged import hub_commit

        if self.evaluator is None:
            return None
        model, revision = self.evaluator.model, self.request.evaluator_revision
        keeps_ids = self.source is not None and self.evaluator.keeps_ids(self.source)
        return {
            "model": self.evaluator.name,
            "revision": revision or hub_commit(self.evaluator.name),
            "weights": weights_digest(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokens": "as they were drawn" if keeps_ids else "the evaluator's own: the text was tokenized again",
        }


# What is asked


def _read_source(request: Request) -> CompletionSet:
    """The completions of --from. Raises: ConfigError when an option asks for other ones than the file holds."""
    from .evaluation.completions import read_completions
    from .evaluation.tables import shown

    assert request.from_file is not None
    path = Path(request.from_file).expanduser()
    source = read_completions(path)
    path = path / "completions.parquet" if path.is_dir() else path
    named = {name: getattr(request, name) for name in (*_GENERATION, *DRAWING) if getattr(request, name) is not None}
    made = source.facts.get("made")
    if made is None:
        if named:
            name, value = next(iter(named.items()))
            raise ConfigError(
                f"{path} does not say how its completions were made, so {name}={shown(value)} changes nothing and"
                " cannot be checked. Leave it out."
            )
        source.facts = {"made": {"file": path.name, "file_digest": sha256(path)[:12]}}
        return source
    strengths = made.get("strengths") or [1.0]  # others' completions, scored before, name none
    if not isinstance(strengths, list) or len(strengths) > 1:
        raise ConfigError(
            f"{path} holds completions at {shown(strengths)}, several strengths of the dial, which one table would mix."
            " Give a file of `quark evaluate`."
        )
    for name, value in named.items():
        there = made.get(name)
        if name == "strengths":
            value = [float(s) for s in value]
        elif name in ("model", "prompts"):
            value = _name(value)
        elif name == "quantile":
            each = len(made.get("reward_attributes") or [""])
            last = len(made["reward_tokens"]) // each - 1 if made.get("reward_tokens") else None
            value = {"best": last, "worst": 0, "none": None}.get(value, value)
            there = str(there) if isinstance(value, str) else there
        if value != there:
            raise ConfigError(
                f"{path} was made with {name}={shown(there)}, and {name}={shown(value)} is asked for: other"
                " completions, which scoring again does not give. Leave it out, or generate without --from."
            )
    source.scores, source.nll, source.nll_tokens = {}, None, None
    source.facts = {"made": made}
    return source


def _prompts(request: Request, task: EvaluationTask | None) -> tuple[Any, str]:
    """(data set, its name)."""
    from .demo import demo_prompts
    from .prompts import load_prompts, split_held_out

    if request.prompts is not None:
        dataset, name = load_prompts(request.prompts), _name(request.prompts)
    elif task is not None:
        dataset, name = split_held_out(demo_prompts(task.prompts))[1], f"quark-lm {task.prompts} (held out)"
    else:
        raise DataError("There is no prompt to complete. Name --prompts, or a --task, which has some.")
    if request.num_prompts is not None:
        dataset = dataset.select(range(min(request.num_prompts, len(dataset))))
    return dataset, name


def _dtype_of(folder: Path, key: str) -> Any:
    """In what the packaged model, which has no dtype of its own, computes: what is fast here, or as it was begun."""
    from .packaged import fastest_dtype

    path = folder / "evaluation.json"
    dtype = read_json(path).get(key) if path.is_file() else None
    return dtype if dtype in ("float32", "bfloat16", "float16") else fastest_dtype()


def _load_evaluator(request: Request, asked: Asked | None, folder: Path) -> Evaluator | None:
    from .evaluation.passes import Evaluator
    from .export import load
    from .packaged import PACKAGED
    from .policy import check_head

    if request.evaluator is None:
        return None
    same = (request.evaluator, request.evaluator_revision) == (request.model, request.revision)
    if same and asked is not None and asked.tokens is None:  # a model that judges itself is loaded once
        return Evaluator(_name(request.evaluator), asked.model, asked.tokenizer)
    options: dict[str, Any] = {"dtype": _dtype_of(folder, "evaluator_dtype")} if request.evaluator == PACKAGED else {}
    if request.evaluator_revision is not None:
        options["revision"] = request.evaluator_revision
    model, tokenizer, tokens = load(request.evaluator, **options)
    check_head(model)
    return Evaluator(_name(request.evaluator), model, tokenizer, tokens)


def check_turns(quantile: int | None, from_token: str, strengths: Iterable[float]) -> None:
    """Raises a ConfigError for a dial from the worst token to the worst, which would do nothing."""
    if from_token == "worst" and quantile == 0 and set(strengths) != {1.0}:
        raise ConfigError(
            "quantile=worst is where the dial starts, so every strength gives the same text. Leave --quantile out, or"
            " name a better one."
        )


def check_limits_a_dial(dial_min_p: float | None, strengths: Iterable[float]) -> None:
    """Raises a ConfigError for a `dial_min_p` that would do nothing at these strengths."""
    if dial_min_p and max(strengths) <= 1:
        raise ConfigError(
            f"dial_min_p={dial_min_p} limits a dial above 1, and none is asked for. Give a strength above 1 too."
        )


def check_from_token(from_token: str, model: str) -> None:
    """Raises: ConfigError when the run's settings say that the branch without a token was never trained."""
    import yaml

    from .steering import check_start

    check_start(from_token)
    if from_token == "worst":
        return
    for folder in (Path(model).expanduser(), Path(model).expanduser().parent):
        if (folder / "config.yaml").is_file():
            try:
                config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(f"{folder / 'config.yaml'} is damaged ({first_line(error)}). Restore it.") from error
            if isinstance(config, dict) and "token_dropout" in config:
                if not config["token_dropout"]:
                    raise ConfigError(
                        f"from_token='none' dials from the branch without a reward token, which {model} never trained"
                        " (token_dropout=0). Use 'worst', or train with token_dropout=0.1."
                    )
                return


def _reference_texts(column: str | None, columns: dict[str, Any]) -> list[str] | None:
    """The human continuations, one a prompt; None when none are asked for."""
    if column is None:
        return None
    if column not in columns or column == "prompt":
        known = ", ".join(name for name in columns if name != "prompt") or "none"
        raise DataError(f"The prompts have no column {column!r} (their other columns: {known}). Name one of them.")
    texts: list[str] = []
    for value in columns[column]:
        value = (
            value.get("text") if isinstance(value, dict) else value
        )  # RealToxicityPrompts wraps its text in a record
        if not isinstance(value, str):
            raise DataError(f"Column {column!r} holds {value!r:.60}, which is no text to compare with. Name another.")
        texts.append(value)
    return texts


def _check_own(folder: Path) -> None:
    """Raises: ConfigError for a folder that cannot be written, or holds what is no evaluation's."""
    check_folder(folder)
    if not (folder / "evaluation.json").is_file() and folder.is_dir() and any(folder.iterdir()):
        name = sorted(entry.name for entry in folder.iterdir())[0]
        raise ConfigError(f"{folder} holds {name}, which is no evaluation's. Choose an empty --output-dir.")


def _default_folder(kind: str, request: Request, task: EvaluationTask | None) -> str:
    source = Path(request.from_file or request.model or "none")
    if source.suffix in (".parquet", ".jsonl"):
        source = source.with_suffix("")
    # a run's own parts are told by the run's name
    is_part = source.name in ("completions", "model") or source.name.startswith("checkpoint-")
    name = (source.parent if is_part and source.parent.name else source).name
    name = name.removeprefix("evaluate-") if request.from_file else name
    parts = [kind, name, "again" if request.from_file else "", task.name if task else ""]
    if request.quantile not in (None, "best"):
        parts.append(str(request.quantile))
    if request.attribute is not None:
        parts.append(request.attribute)
    if request.from_token == "none":
        parts.append("unconditional")
    if (request.num_beams or 1) > 1:
        parts.append(f"beams{request.num_beams}")
    if kind == "evaluate" and request.strengths not in (None, (1.0,)):
        parts.append(f"strength{request.strengths[0]:g}")
    return "runs/" + "-".join(filter(None, parts))


def read_json(path: Path) -> dict[str, Any]:
    """Raises: DataError for a file that holds no table."""
    try:
        data = parsed(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}")
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    return data


def _damaged(path: Path, how: str) -> DataError:
    return DataError(f"{path} is damaged ({how}). Delete it, or choose another --output-dir.")


def _name(source: str) -> str:
    """As it is told and compared: a path without its doubled or trailing slashes."""
    return str(Path(source)) if Path(source).expanduser().exists() else source


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, default=str).encode()).hexdigest()[:12]


def _command(kind: str, request: Request) -> str:
    """The command that gives these results, with what was named."""
    words = ["quark", kind]
    flags = {"scorers": "--scorer", "from_file": "--from", "strengths": "--strength"}
    for member in dataclasses.fields(request):
        value = getattr(request, member.name)
        if value == member.default or (kind == "dial" and value == DIAL_STRENGTHS):
            continue
        flag = flags.get(member.name, f"--{member.name.replace('_', '-')}")
        if member.name == "model":
            words.append(value)
        elif value is True:
            words.append(flag)
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [flag, str(one)]
    return shlex.join(words)
