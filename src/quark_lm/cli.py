"""The command `quark`: thin verbs over the library. No torch on the path of `--help`, which therefore answers at once.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from . import __version__
from .errors import ConfigError, DataError, GenerationError, ModelError, QuarkError, RewardError
from .shown import json_text, printable, printable_lines

if TYPE_CHECKING:
    from .check_reward import Report

app = typer.Typer(
    name="quark",
    help="Unlearn an unwanted behaviour from a causal language model, given a reward function.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help: rich takes a third of the time that --help may take
    epilog="Every command: quark COMMAND --help. --debug anywhere shows the whole error.",
)

# The root of usage errors, ClickException: typer 0.27 and later carry a click of their own, so it has no one place.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code; errors become one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a completion may hold what the terminal's encoding lacks
    with warnings.catch_warnings(), _terminated_as_interrupted():
        if not debug:
            _quieten()
        try:
            # not through typer's own main(), which would print errors in its way
            with typer.main.get_command(app).make_context("quark", argv, obj={"debug": debug}) as context:
                context.command.invoke(context)
        except typer.Exit as leaving:
            return leaving.exit_code
        except (KeyboardInterrupt, typer.Abort) as stopped:
            return _interrupted(stopped, goes_on=argv[:1] in (["train"], ["demo"], ["evaluate"], ["dial"]))
        except BrokenPipeError:  # `quark pool runs/x | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            return _failed(error, debug)
        finally:
            _end_group()
    return 0


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which a scheduler sends, ends a command as Ctrl-C does: with its message and its code."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # signals belong to the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _interrupted(stopped: BaseException, goes_on: bool) -> int:
    """Says what was kept, which the trainer tells in its KeyboardInterrupt, and whether the same command goes on."""
    _ignore_sigterm()
    told = str(stopped).strip().rstrip(".")
    if not told and sys.stderr.isatty():
        print(file=sys.stderr)  # the terminal's ^C stands on a line that may have begun with a completion
    parts = ["interrupted.", f"{told[:1].upper()}{told[1:]}." if told else "", "The same command goes on." * goes_on]
    _say(" ".join(parts))
    return 130


def _failed(error: Exception, debug: bool) -> int:
    # every process finds them in its input, or is told of them (`QuarkTrainer.fail_together`)
    is_shared = isinstance(error, (_ClickException, ConfigError, DataError, ModelError, RewardError, GenerationError))
    if debug:
        print(printable_lines("".join(traceback.format_exception(error))), file=sys.stderr)
    told = not (debug and is_shared) and _another_tells(is_shared)
    _ignore_sigterm()
    if told:
        return 2 if is_shared else 1
    if isinstance(error, _ClickException):
        where = getattr(getattr(error, "ctx", None), "command_path", "quark")
        reason = error.format_message()  # type: ignore[attr-defined]
        _say(f"{_sentence(reason.replace('Value error, ', ''))} See {where} --help.")
        return 2
    if isinstance(error, QuarkError):
        _say(str(error))
        return 2
    reason = str(error).strip() or "no message"
    text = f"failed: {type(error).__name__}: {reason}"
    _say(text if debug else f"{_sentence(text)} Run it again with --debug to see where.")
    return 1


def _sentence(text: str) -> str:
    """With a full stop, where it has no end of its own."""
    return text if text.endswith((".", "!", "?", ":", ")")) else f"{text}."


def _end_group() -> None:
    """Ends a process group that an error left, of which torch would warn.

    NCCL's is left alone: it may wait for a process that is gone.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def _ignore_sigterm() -> None:
    """Until `_terminated_as_interrupted` ends: torchrun also stops what ends by itself or was stopped already."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


_ANOTHER_TELLS_SECONDS = 5.0


def _another_tells(is_shared: bool) -> bool:
    """Whether another process of the run is the one to tell: torchrun stops this one within some seconds then.

    An error that all have is the first one's to tell. Any other may be that a process was lost: when it was killed,
    torchrun must find it before this one ends. When nobody stops us, the error is this process's own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or (is_shared and os.environ.get("RANK", "0") == "0"):
        return False
    try:
        time.sleep(_ANOTHER_TELLS_SECONDS)
    except KeyboardInterrupt:
        return True
    return False


def _say(text: str) -> None:
    # a name or a server's answer in it may hold a terminal's escapes
    rank = os.environ.get("RANK", "0")  # of several processes the first speaks for all, mostly
    who = "" if rank == "0" else f"process {rank}: "
    print(f"quark: {who}{printable(' '.join(text.split()))}", file=sys.stderr, flush=True)


def _quieten() -> None:
    """Other libraries' bars and notes off, unless the environment wants them; a warning is one line without a path."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "critical",  # it logs as an error what it raises and we then tell
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)

    def show(message: Any, *_: Any, **__: Any) -> None:
        _say(f"warning: {message}")

    warnings.showwarning = show
    warnings.simplefilter("ignore")  # what is deprecated is for programmers
    for category in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("default", category=category)
    # PEFT tells what it does about GPT-2's transposed layers and about new tokens; both are as they should be
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to|Setting `save_embedding_layers`")


def _version(asked: bool) -> None:
    if asked:
        print(f"quark-lm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from. Goes anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    del debug, version  # --debug is taken out before; it stands here for the help
    if context.invoked_subcommand is None:
        print(context.get_help())


# quark demo


class Task(StrEnum):
    sentiment = "sentiment"
    toxicity = "toxicity"
    repetition = "repetition"


class Budget(StrEnum):
    short = "short"
    full = "full"


@app.command()
def demo(
    task: Annotated[Task, typer.Option(help="What is unlearned.")] = Task.sentiment,
    prompts: Annotated[str | None, typer.Option(help="A file of your own prompts.")] = None,
    eval_prompts: Annotated[
        str | None, typer.Option(help="A file of your own held-out prompts. Default: a fifth of the others.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/demo-TASK.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    budget: Annotated[
        Budget, typer.Option(help="short: some minutes; full: seven minutes or more on two cores.")
    ] = Budget.full,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Unlearn a behaviour from a real model.

    A small one on this machine, with before and after on held-out prompts. Ctrl-C stops it, the same command goes on.
    """
    from .demo import run_demo
    from .progress import make_console

    results = run_demo(
        task=task.value,
        prompts=prompts,
        eval_prompts=eval_prompts,
        output_dir=output_dir,
        seed=seed,
        short=budget is Budget.short,
        console=make_console(stderr=as_json),
    )
    if as_json:
        _print_json(results)


# quark train


class _TrainCommand(TyperCommand):
    """Its help also lists the fields, whose texts stand in a file: to import them takes seconds."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from .train_command import help_sections

        for title, members in help_sections():
            with formatter.section(title):
                formatter.write_dl(members)


@app.command(cls=_TrainCommand, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="A YAML file of fields. Flags win over it.")] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(help="Several processes, one a GPU: ddp, fsdp2 (the model in parts), or accelerate's own YAML."),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option("--num_processes", "--num-processes", help="How many, where it is not one a GPU.")
    ] = None,
) -> None:
    """Train by Quark, from a YAML file and flags.

    quark train --config run.yaml [--field value ...]. The same command again goes on with the run in output_dir. At
    its end stand model/ (a checkpoint that needs no Quark) and results.json.
    """
    if accelerate is not None:
        from .processes import launch

        given = ["--config", str(config)] if config is not None else []
        given += ["--debug"] if context.obj["debug"] else []  # which main took out
        raise typer.Exit(launch(accelerate, num_processes, ["train", *given, *context.args]))
    if num_processes is not None:
        raise ConfigError("--num_processes is for --accelerate, which starts them. Give --accelerate ddp or fsdp2 too.")
    from .train_command import run

    run(config, context.args)


# quark generate

_FromTokenOption = Annotated[
    str | None, typer.Option(help="What the dial starts from: worst (default), or none, which token_dropout trains.")
]

_DialMinPOption = Annotated[
    float | None,
    typer.Option(help="Above strength 1: only tokens with this share of the likeliest one's probability. Default: 0."),
]


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run's folder, a model's folder, or a model's name.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)] = None,
    file: Annotated[
        str | None, typer.Option(help="Prompts from a file (JSONL, Parquet, CSV, or a line each); -: from stdin.")
    ] = None,
    quantile: Annotated[str, typer.Option(help="Whose token: best, worst, none, or 0 (worst) to K-1.")] = "best",
    strength: Annotated[
        list[str] | None,
        typer.Option(help="The dial: worst + strength x (token - worst). 1: plain. Or NAME=strength, of an attribute."),
    ] = None,
    from_token: _FromTokenOption = None,
    dial_min_p: _DialMinPOption = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Divides the logits; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set with this probability.")] = 0.9,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest; 0: from all.")] = 0,
    max_completion_length: Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")] = 40,
    num_generations: Annotated[int, typer.Option(min=1, help="Completions of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same completions.")] = 0,
    revision: _RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a completion.")] = False,
) -> None:
    """Complete prompts, by the best reward token.

    Without one where Quark did not train the model. Where no prompt is given, stdin is read, a prompt a line.
    """
    from .evaluate_command import check_from_token, check_limits_a_dial, check_turns
    from .export import load, to_device
    from .generation import GenerationSettings
    from .reward_tokens import asked_quantile
    from .steering import check_names, generate_batches

    settings: dict[str, Any] = {
        "max_completion_length": max_completion_length,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "dial_min_p": dial_min_p or 0.0,
    }
    GenerationSettings(**settings)  # which checks them
    asked = _asked(prompts or [], file)
    if not asked:
        raise DataError("There is no prompt, so there is nothing to complete. Give one in quotes, --file, or stdin.")
    if any(isinstance(prompt, str) and not prompt.strip() for prompt in asked):
        raise DataError("A prompt is empty, and nothing cannot be completed. Leave it out.")
    turn = _strength(strength or [])
    strengths = [turn] if isinstance(turn, float) else list(turn.values())
    check_from_token(from_token or "worst", model)
    if from_token == "none" and turn == 1.0:
        raise ConfigError("from_token says where the dial starts, and strength 1 turns none. Give --strength too.")
    check_limits_a_dial(dial_min_p, strengths)
    language_model, tokenizer, tokens = load(model, **({"revision": revision} if revision is not None else {}))
    to_device(language_model)
    wanted = asked_quantile(quantile, tokens, strengths, model)
    check_names(tokens, turn)
    check_turns(wanted, from_token or "worst", strengths)
    repeated = [prompt for prompt in asked for _ in range(num_generations)]
    streams = len(repeated) == 1 and not as_json and sys.stdout.isatty()
    done: dict[int, str] = {}
    following = 0
    batches = generate_batches(
        language_model,
        tokenizer,
        repeated,
        reward_tokens=tokens,
        quantile=wanted if tokens is None else tokens.in_all(wanted),
        strength=turn,
        from_token=from_token or "worst",
        seed=seed,
        **settings,
        on_token=_Stream() if streams else None,
    )
    if streams:
        print(_shown_prompt(repeated[0]), end="", flush=True)
    for index, completion in batches:
        done[index] = completion
        while following in done:  # batches come by length, the output in the order of the prompts
            text, prompt = done.pop(following), repeated[following]
            if as_json:
                row = {"prompt": prompt, "completion": text, "quantile": wanted, "strength": turn, "seed": seed}
                print(json_text(row))
            elif not streams:
                print(_shown_prompt(prompt) + printable_lines(text), end="\n\n" if len(repeated) > 1 else "\n")
            following += 1
    if streams:
        print()


def _asked(prompts: list[str], file: str | None) -> list[Any]:
    """The prompts of the line, of the file, and of stdin: for `-`, or where there are no others and it is a pipe."""
    from .prompts import load_prompts

    asked: list[Any] = [prompt for prompt in prompts if prompt != "-"]
    if file is not None and file != "-":
        asked += load_prompts(file)["prompt"]
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    if file == "-" or "-" in prompts or (not prompts and file is None and is_piped):
        asked += [line for line in sys.stdin.read().splitlines() if line.strip()]
    return asked


class _Stream:
    """Prints a completion as it grows."""

    def __init__(self) -> None:
        self.shown = 0

    def __call__(self, index: int, text: str) -> None:
        whole = text.rstrip("�")  # the first bytes of a character whose rest is still to come
        print(printable_lines(whole[self.shown :]), end="", flush=True)
        self.shown = max(self.shown, len(whole))


def _strength(given: list[str]) -> float | dict[str, float]:
    """The strength of all dials, or of each that is named. Raises: ConfigError."""
    turns: dict[str, float] = {}
    for text in given:
        name, named, number = text.rpartition("=")
        try:
            if named and not name:
                raise ValueError
            turns[name] = float(number)
        except ValueError:
            raise ConfigError(
                f"strength={text!r} is neither a number nor NAME=NUMBER. Give 0 (worst) to about 3; 1 is plain Quark."
            ) from None
    if len(turns) != len(given) or ("" in turns and len(turns) > 1):
        raise ConfigError("--strength is given twice for the same dial. Give one number, or one NAME=NUMBER each.")
    return turns.get("", 1.0) if "" in turns or not turns else turns


def _shown_prompt(prompt: Any) -> str:
    """The prompt before its completion: a conversation's last message on a line of its own."""
    return (
        printable_lines(prompt)
        if isinstance(prompt, str)
        else printable_lines(str(prompt[-1].get("content", ""))) + "\n"
    )


# quark check-reward


class _TagSetsCommand(TyperCommand):
    """Takes all texts after `--reward-token-texts` as one set; given again, as another."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _grouped(args))


def _grouped(args: list[str]) -> list[str]:
    """Arguments in which each `--reward-token-texts a b c` is one `--reward-token-texts '["a", "b", "c"]'`."""
    out: list[str] = []
    position = 0
    while position < len(args):
        name, equals, text = args[position].partition("=")
        if name.replace("_", "-") != "--reward-token-texts":
            out.append(args[position])
            position += 1
            continue
        end = position + 1
        while end < len(args) and not args[end].startswith("--"):
            end += 1
        texts = [text.replace("\\n", "\n") for text in [text][: len(equals)] + args[position + 1 : end]]
        out += ["--reward-token-texts", json.dumps(texts)]
        position = end
    return out


@app.command("check-reward", cls=_TagSetsCommand)
def check_reward(
    reward: Annotated[str, typer.Argument(help="A named scorer, a model's name, or module:function.")],
    prompts: Annotated[str | None, typer.Option(help="Prompts to complete: a file, or a data set on the hub.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Completes them and tries the tags. Default: smollm2; none, and no trial, with --completions."
        ),
    ] = None,
    completions: Annotated[Path | None, typer.Option(help="Your own: JSONL with completion, and prompt.")] = None,
    num: Annotated[int, typer.Option(help="Completions that are sampled.")] = 128,
    num_quantiles: Annotated[int, typer.Option(min=2, help="K that you plan for.")] = 5,
    reward_token_texts: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT TEXT ...", help="Candidate tags, worst first; give it again for another set."),
    ] = None,
    reward_token_position: Annotated[str, typer.Option(help="first, before_bos or before_completion.")] = "first",
    max_completion_length: Annotated[int, typer.Option(min=1, help="Most tokens of a completion.")] = 20,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    revision: _RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Try a reward before a run does.

    None, ties, range, speed, whether order or batch matter, how many quantiles it feeds; and of each set of tags
    whether the untrained model understands them (AUC) and stays itself with them (drift).
    """
    positions = ("first", "before_bos", "before_completion")
    if reward_token_position not in positions:
        raise ConfigError(f"reward_token_position={reward_token_position!r} is not one of {', '.join(positions)}.")
    from .check_reward import check
    from .packaged import PACKAGED, fastest_dtype

    if model is None and completions is None:
        model = PACKAGED
    report = check(
        reward,
        prompts,
        model=model,
        completions=completions,
        num=num,
        num_quantiles=num_quantiles,
        tag_sets=[json.loads(texts) for texts in reward_token_texts] if reward_token_texts else None,
        position=reward_token_position,
        max_completion_length=max_completion_length,
        temperature=temperature,
        seed=seed,
        dtype=fastest_dtype() if model == PACKAGED else None,
        revision=revision,
        tell=lambda text: print(f"{text} ...", file=sys.stderr, flush=True),
    )
    if as_json:
        _print_json(report.to_dict())
    else:
        _print_report(report)


def _print_report(report: Report) -> None:
    print(printable(f"{report.reward}, {report.completions} completions"))
    for finding in report.findings:
        print(printable_lines(f"  {finding}"))
    wrong = sum(not finding.ok for finding in report.findings)
    print("Nothing stands in the way." if not wrong else f"{wrong} of {len(report.findings)} want a look.")


# quark pool


@app.command()
def pool(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    top: Annotated[int, typer.Option(min=0, help="Best and worst samples to show, so many of each.")] = 5,
    round: Annotated[
        int | None, typer.Option(help="Whose samples, counted from 0 as in metrics.jsonl. Default: the last round.")
    ] = None,
    show_bottom: Annotated[
        bool, typer.Option("--show-bottom", help="Show the worst samples' text, which may be toxic.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show a run's rewards and samples.

    Every round's size and rewards; one round's best and worst samples.
    """
    import numpy as np

    from .pool import Pool

    samples = Pool.open(run)
    samples.verify()
    if not samples.num_rounds:
        raise DataError(f"The pool of {run} holds no round yet. Wait for the first one to be explored and scored.")
    rounds = [_round_row(samples, number) for number in range(samples.num_rounds)]
    chosen = samples.num_rounds - 1 if round is None else round
    rewards = samples.to_table([chosen], ["reward"]).column("reward").to_numpy()
    ranked = np.argsort(-rewards, kind="stable")[: np.isfinite(rewards).sum()]  # NaN, no reward, comes last
    num_best = min(top, (len(ranked) + 1) // 2)  # none is shown as one of the best and of the worst
    shown = np.concatenate([ranked[:num_best], ranked[max(num_best, len(ranked) - top) :]])
    # only the rows that are shown: a round's texts may be large
    texts = samples.gather(shown + np.searchsorted(samples.rounds, chosen), ["prompt", "completion", "reward"])
    rows = [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)]
    best, worst = rows[:num_best], rows[num_best:]
    if not show_bottom:
        worst = [{**row, "completion": None} for row in worst]
    if as_json:
        _print_json({"rounds": rounds, "round": chosen, "best": best, "worst": worst})
        return
    _print_pool(rounds, chosen, best, worst, show_bottom)


def _round_row(samples: Any, number: int) -> dict[str, Any]:
    import numpy as np

    table = samples.to_table([number], ["reward", "reference_nll"])
    rewards, nll = (values[np.isfinite(values)] for values in (column.to_numpy() for column in table.columns))
    quantiles = np.quantile(rewards, (0.1, 0.5, 0.9)).tolist() if len(rewards) else [None] * 3
    return {
        "round": number,
        "samples": table.num_rows,
        "without_reward": table.num_rows - len(rewards),
        "mean": float(rewards.mean()) if len(rewards) else None,
        "tenth": quantiles[0],
        "median": quantiles[1],
        "ninetieth": quantiles[2],
        "reference_perplexity": float(np.exp(nll).mean()) if len(nll) else None,
    }


def _print_pool(
    rounds: list[dict[str, Any]], chosen: int, best: list[Any], worst: list[Any], show_bottom: bool
) -> None:
    from rich.table import Table

    from .progress import make_console

    # in a pipe there is no width to keep to: a line a row, uncut
    console = make_console(width=200)
    columns = ["round", "samples", "no reward", "mean", "10%", "median", "90%", "perplexity"]
    overview = Table(*columns, title="rewards by round", title_justify="left")
    for row in rounds:
        overview.add_row(*(_cell(value) for value in row.values()))
    console.print(overview)
    if not best:
        return
    texts = Table("reward", "prompt", "completion", title=f"round {chosen}, best and worst", title_justify="left")
    from rich.text import Text

    for row in best:
        texts.add_row(_cell(row["reward"]), Text(printable(row["prompt"])), Text(printable(row["completion"])))
    if worst:
        texts.add_section()
    for row in worst:
        hidden = "(hidden: --show-bottom)" if row["completion"] is None else printable(row["completion"])
        texts.add_row(_cell(row["reward"]), Text(printable(row["prompt"])), Text(hidden))
    console.print(texts)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


# Helpers


def _print_json(data: Any) -> None:
    from .run_folder import finite

    print(json_text(finite(data), indent=2))


# quark evaluate, quark dial

_TaskOption = Annotated[
    str | None,
    typer.Option(help="toxicity, sentiment-positive, sentiment-negative, repetition: scorers, prompts, sampling."),
]
_PromptsOption = Annotated[str | None, typer.Option(help="A file, or a data set on the hub. Default: the task's.")]
_NumPromptsOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many.")]
_ScorerOption = Annotated[
    list[str] | None, typer.Option(help="A named scorer, a model, or module:function; again for another.")
]
_EvaluatorOption = Annotated[str | None, typer.Option(help="The model under which perplexity is taken.")]
_QuantileOption = Annotated[str | None, typer.Option(help="Whose token: best, worst, none, or 0 (worst) to K-1.")]
_AttributeOption = Annotated[
    str | None, typer.Option(help="Whose dial is turned, where the model has several. Default: all.")
]
_NumBeamsOption = Annotated[int | None, typer.Option(min=1, help="Beam search in place of drawing.")]
_MostTokensOption = Annotated[int | None, typer.Option(min=1, help="Most tokens of a completion. Default: 20.")]
_LeastTokensOption = Annotated[int | None, typer.Option(min=0, help="Tokens before a completion may end.")]
_TemperatureOption = Annotated[float | None, typer.Option(min=0.0, help="Divides the logits; 0 is greedy. Default: 1.")]
_TopPOption = Annotated[float | None, typer.Option(help="Draw from the smallest set with this probability.")]
_TopKOption = Annotated[int | None, typer.Option(min=0, help="Draw from the k likeliest. Default: 0, from all.")]
_SeedOption = Annotated[int | None, typer.Option(min=0, help="Of the draws and the intervals. Default: 0.")]
_RevisionOption = Annotated[str | None, typer.Option(help="Of a model on the hub.")]
_OutputOption = Annotated[str | None, typer.Option(help="The folder of the results.")]
_BatchOption = Annotated[int | None, typer.Option(min=1, help="Forward rows of a batch. Default: what fits.")]


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="A run's folder, a model's folder, or a model's name.")] = None,
    task: _TaskOption = None,
    prompts: _PromptsOption = None,
    num_prompts: _NumPromptsOption = None,
    num_generations: Annotated[int | None, typer.Option(min=1, help="Completions of each prompt. Default: 25.")] = None,
    scorer: _ScorerOption = None,
    evaluator: _EvaluatorOption = None,
    from_file: Annotated[
        str | None, typer.Option("--from", help="Score these again: completions.parquet, or a JSONL of others.")
    ] = None,
    quantile: _QuantileOption = None,
    strength: Annotated[float | None, typer.Option(help="The dial: worst + strength x (token - worst).")] = None,
    from_token: _FromTokenOption = None,
    dial_min_p: _DialMinPOption = None,
    attribute: _AttributeOption = None,
    num_beams: _NumBeamsOption = None,
    references: Annotated[str | None, typer.Option(help="The prompts' column with the human continuation.")] = None,
    mauve: Annotated[bool, typer.Option("--mauve", help="Compare completions with the references.")] = False,
    max_completion_length: _MostTokensOption = None,
    min_completion_length: _LeastTokensOption = None,
    temperature: _TemperatureOption = None,
    top_p: _TopPOption = None,
    top_k: _TopKOption = None,
    seed: _SeedOption = None,
    revision: _RevisionOption = None,
    evaluator_revision: _RevisionOption = None,
    output_dir: _OutputOption = None,
    batch_rows: _BatchOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="results.json on stdout, the table on stderr.")] = False,
) -> None:
    """Measure a model as the paper's tables do.

    Completions of held-out prompts, every scorer, perplexity, each figure with its 95% interval. The same command goes
    on with what was stopped.
    """
    from . import evaluate_command
    from .progress import make_console

    request = evaluate_command.Request(
        model=model,
        task=task,
        prompts=prompts,
        num_prompts=num_prompts,
        num_generations=num_generations,
        scorers=tuple(scorer or ()),
        evaluator=evaluator,
        from_file=from_file,
        quantile=quantile,
        strengths=None if strength is None else (strength,),
        from_token=from_token,
        dial_min_p=dial_min_p,
        attribute=attribute,
        num_beams=num_beams,
        references=references,
        mauve=mauve,
        max_completion_length=max_completion_length,
        min_completion_length=min_completion_length,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        revision=revision,
        evaluator_revision=evaluator_revision,
        output_dir=output_dir,
        batch_rows=batch_rows,
    )
    results = evaluate_command.evaluate(request, make_console(stderr=as_json))
    if as_json:
        _print_json(results)


@app.command()
def dial(
    model: Annotated[str, typer.Argument(help="A run's folder, or the folder of a model that Quark trained.")],
    task: _TaskOption = None,
    prompts: _PromptsOption = None,
    num_prompts: _NumPromptsOption = None,
    num_generations: Annotated[
        int | None, typer.Option(min=1, help="Completions of each prompt at each strength. Default: 4.")
    ] = None,
    strength: Annotated[list[float] | None, typer.Option(help="Again for another. Default: 0 to 3, six.")] = None,
    from_token: _FromTokenOption = None,
    dial_min_p: _DialMinPOption = None,
    attribute: _AttributeOption = None,
    num_beams: _NumBeamsOption = None,
    scorer: _ScorerOption = None,
    evaluator: _EvaluatorOption = None,
    quantile: _QuantileOption = None,
    max_completion_length: _MostTokensOption = None,
    min_completion_length: _LeastTokensOption = None,
    temperature: _TemperatureOption = None,
    top_p: _TopPOption = None,
    top_k: _TopKOption = None,
    seed: _SeedOption = None,
    revision: _RevisionOption = None,
    evaluator_revision: _RevisionOption = None,
    output_dir: _OutputOption = None,
    batch_rows: _BatchOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="dial.json on stdout, the table on stderr.")] = False,
) -> None:
    """Measure and draw what the strength dial does.

    Score, independent score, perplexity and diversity at each strength, with intervals.
    """
    from . import evaluate_command
    from .progress import make_console

    request = evaluate_command.Request(
        model=model,
        task=task,
        prompts=prompts,
        num_prompts=num_prompts,
        num_generations=num_generations,
        strengths=tuple(strength) if strength else None,
        from_token=from_token,
        dial_min_p=dial_min_p,
        attribute=attribute,
        num_beams=num_beams,
        scorers=tuple(scorer or ()),
        evaluator=evaluator,
        quantile=quantile,
        max_completion_length=max_completion_length,
        min_completion_length=min_completion_length,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        revision=revision,
        evaluator_revision=evaluator_revision,
        output_dir=output_dir,
        batch_rows=batch_rows,
    )
    results = evaluate_command.dial(request, make_console(stderr=as_json))
    if as_json:
        _print_json(results)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="The folder of a finished `quark evaluate`.")],
    other: Annotated[str, typer.Argument(help="Another one's, on the same prompts.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The differences on stdout, the table on stderr.")] = False,
) -> None:
    """Tell two evaluations apart, prompt by prompt.

    The differences OTHER - BASE of scores, perplexity and text, with 95% intervals and p-values (paired bootstrap).
    """
    from . import compare_command
    from .progress import make_console

    results = compare_command.compare(base, other, seed=seed, console=make_console(stderr=as_json))
    if as_json:
        _print_json(results)


def entry() -> NoReturn:
    """The command's process: `main`, and its end."""
    if "LOCAL_RANK" in os.environ:
        from .processes import end_after

        end_after(main)
    sys.exit(main())


if __name__ == "__main__":
    entry()
