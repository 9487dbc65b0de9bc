"""`quark train`: a YAML file and flags become a run. The names are those of TRL's scripts.

Only the fields that somebody named reach `QuarkConfig`, so that a preset fills the others.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import ConfigError, QuarkError
from .files import first_line

if TYPE_CHECKING:
    from .config import QuarkConfig
    from .trainer import QuarkTrainer


@dataclass
class TrainArguments:
    """What a run needs beside `QuarkConfig`; the names are those of TRL's scripts."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model: a folder, a name on the hub, or 'smollm2' (the packaged one)."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "One or several rewards: a named scorer, a model's name, or module:function."},
    )
    prompts: str | None = field(
        default=None, metadata={"help": "Prompts to train on: a file with a `prompt` column, or a data set on the hub."}
    )
    eval_prompts: str | None = field(default=None, metadata={"help": "Held-out prompts, measured every `eval_every`."})
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Scorers that only measure the held-out prompts: training never sees them."}
    )
    initial_pool: str | None = field(
        default=None, metadata={"help": "Your own scored data as round 0: a file with prompt, completion and reward."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter in place of the whole model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's update is scaled by lora_alpha / lora_r."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get an adapter. Default: all linear ones."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the weights: 'bfloat16', 'float32', or 'auto': bfloat16 under an adapter where this machine is"
            " faster with it, else float32 (a whole model's small updates vanish in bfloat16)."
        },
    )


def run(config: Path | None, flags: list[str]) -> None:
    """Trains, or goes on with the run of output_dir; then writes model/ and results.json.

    Raises: ConfigError when a field is unknown or missing; what `QuarkTrainer` raises.
    """
    from .processes import first_tells, leave
    from .run_folder import check_folder, disk_errors, locked

    own, named = read_settings(config, flags)
    missing = [name for name in ("model_name_or_path", "reward_funcs", "prompts") if not own.get(name)]
    if missing:
        raise ConfigError(
            f"Nothing is named as {' and as '.join(missing)}, without which there is no run. Set it in the YAML file or"
            f" as --{missing[0]}."
        )
    settings = TrainArguments(**own)
    lora = [name for name in ("lora_r", "lora_alpha", "lora_target_modules") if name in own]
    if lora and not settings.use_peft:
        raise ConfigError(f"{lora[0]} is of an adapter, but use_peft is not set. Set it, or leave {lora[0]} out.")
    args = _quark_config(named)
    check_folder(Path(args.output_dir or "."))
    _check_trackers(args)
    # what the caller's model_init_kwargs say wins
    dtype = first_tells(lambda: _dtype(settings, args))  # measured, so that two processes could find two
    args.model_init_kwargs = {"dtype": dtype, **_as_dict(args.model_init_kwargs)}
    if args.process_index == 0 and sys.stderr.isatty():
        print(f"loading {settings.model_name_or_path} ...", file=sys.stderr, flush=True)
    trainer = _make_trainer(settings, args)
    trainer.add_callback(_writes_yaml({"output_dir": str(trainer.folder), **own, **named}))
    with locked(trainer.folder) if trainer.is_world_process_zero() else contextlib.nullcontext():
        trainer.train()
        with disk_errors(trainer.folder):
            _finish(settings, trainer)
    leave()


_FIELDS_FILE = resources.files("quark_lm").joinpath("data/train_fields.json")


def help_sections() -> list[tuple[str, list[tuple[str, str]]]]:
    """Every field with its help: (title, [(flag, help)]), ours before those of transformers.

    From a file, because the dataclasses take seconds to import; `python -m quark_lm.train_command` writes it anew.
    """
    return [(title, [(flag, text) for flag, text in members]) for title, members in _stored_fields()["sections"]]


def _stored_fields() -> dict[str, Any]:
    return dict(json.loads(_FIELDS_FILE.read_text(encoding="utf-8")))


def described_fields() -> dict[str, Any]:
    """What the file of `help_sections` holds, from the dataclasses and the transformers that are installed."""
    import transformers

    from .config import QuarkConfig, quark_fields

    ours = set(quark_fields())
    members = [f for f in fields(QuarkConfig) if f.init]
    sections: list[tuple[str, list[Any]]] = [
        ("The run (fields are flags and keys of the YAML)", list(fields(TrainArguments))),
        ("QuarkConfig", [f for f in members if f.name in ours]),
        ("transformers.TrainingArguments", [f for f in members if f.name not in ours]),
    ]
    return {
        "transformers": transformers.__version__,
        "sections": [[title, [[f"--{f.name}", _field_help(f)] for f in those]] for title, those in sections],
    }


def _field_help(member: Any) -> str:
    text = " ".join(str(member.metadata.get("help", "")).split())
    is_plain = isinstance(member.default, (bool, int, float, str)) and member.default != ""
    return f"{text} [default: {member.default}]" if is_plain else text


# Fields


def read_settings(config: Path | None, flags: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(of TrainArguments, of QuarkConfig): only what a YAML file and then the flags name, each in its field's type.

    Raises: ConfigError for a file that is no YAML mapping, an unknown field (naming the near one) or a wrong type.
    """
    parser = _Fields()
    named = {**parser.from_yaml(config), **parser.from_flags(flags)}
    own = {f.name for f in fields(TrainArguments)}
    return {k: v for k, v in named.items() if k in own}, {k: v for k, v in named.items() if k not in own}


class _Fields:
    """Every field of a run and its type; turns text into values as transformers' own parser does."""

    def __init__(self) -> None:
        from typing import get_args, get_type_hints

        from transformers import HfArgumentParser

        from .config import QuarkConfig

        classes: list[Any] = [TrainArguments, QuarkConfig]
        self.parser = HfArgumentParser(classes, allow_abbrev=False, add_help=False, exit_on_error=False)
        hints: dict[str, Any] = {}
        for cls in classes:
            of_class = get_type_hints(cls)
            hints |= {f.name: of_class[f.name] for f in fields(cls) if f.init}
        self.help = {f.name: _first_sentence(f) for cls in classes for f in fields(cls)}
        self.kinds = {name: get_args(hint) or (hint,) for name, hint in hints.items()}

    def from_yaml(self, path: Path | None) -> dict[str, Any]:
        if path is None:
            return {}
        import yaml

        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}). Give a YAML file of fields.") from error
        # a tag whose value does not fit raises Python's own errors
        except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is no YAML ({' '.join(str(error).split())}). Mend it there.") from error
        _check_size(data, path)
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}, not fields. Write `name: value` lines.")
        for name in data:
            self._check_name(str(name), str(path))
        return {name: self._from_yaml_value(name, value) for name, value in data.items()}

    def _from_yaml_value(self, name: str, value: Any) -> Any:
        kinds = self.kinds[name]
        is_list = any(getattr(kind, "__origin__", kind) is list for kind in kinds)
        if value is None:
            if type(None) not in kinds:
                raise ConfigError(f"{name} is empty, but it needs a value: {self.help[name]} Set it, or leave it out.")
            return None
        if isinstance(value, dict):
            if not any(getattr(kind, "__origin__", kind) is dict for kind in kinds):
                raise ConfigError(f"{name} holds fields of its own, but it takes one value: {self.help[name]}")
            return value
        if isinstance(value, list):
            if not is_list:
                raise ConfigError(f"{name} holds {len(value)} values, but it takes one: {self.help[name]}")
            if all(isinstance(item, str) for item in value) and list[str] in kinds:
                return value
            return self._parsed([f"--{name}", *map(_as_text, value)])[name]
        return self._parsed([f"--{name}={_as_text(value)}"])[name]

    def from_flags(self, flags: list[str]) -> dict[str, Any]:
        # "--no_field" and "--no-field" are the parser's own for a field that is on by default
        for flag in flags:
            if flag.startswith("--") and flag != "--":
                name = flag[2:].split("=", 1)[0].replace("-", "_")
                self._check_name(name.removeprefix("no_") if name not in self.kinds else name, "the flags", ["config"])
        none, rest = self._without_none(flags)
        values = self._parsed(rest)
        for name in ("reward_token_texts",):  # a shell has no simple way to write a newline
            if name in values:
                values[name] = [text.replace("\\n", "\n") for text in values[name]]
        return {**values, **none}

    def _without_none(self, flags: list[str]) -> tuple[dict[str, None], list[str]]:
        """Flags such as `--pool_window none`, and the others. report_to has a "none" of its own."""
        none: dict[str, None] = {}
        rest: list[str] = []
        position = 0
        while position < len(flags):
            flag, width = flags[position], 1
            name, equals, value = flag.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if flag.startswith("--") and not equals and position + 1 < len(flags):
                value, width = flags[position + 1], 2
            kinds = self.kinds.get(name, ())
            if value.lower() in ("none", "null") and type(None) in kinds and name != "report_to":
                none[name] = None
                position += width
            else:
                rest.append(flag)
                position += 1
        return none, rest

    def _parsed(self, flags: list[str]) -> dict[str, Any]:
        import argparse

        unset = object()
        try:
            found, rest = self.parser.parse_known_args(flags, argparse.Namespace(**dict.fromkeys(self.kinds, unset)))
        except argparse.ArgumentError as error:
            name = str(error.argument_name).split("/")[0].lstrip("-")
            raise ConfigError(f"{name}: {error.message}. It is: {self.help.get(name, '')}") from error
        if rest:
            raise ConfigError(f"{rest[0]!r} belongs to no field. Write --field value; quote a value that has spaces.")
        return {name: value for name, value in vars(found).items() if value is not unset}

    def _check_name(self, name: str, where: str, others: Sequence[str] = ()) -> None:
        if name in self.kinds:
            return
        near = difflib.get_close_matches(name, [*self.kinds, *others], n=1, cutoff=0.75)
        advice = f"Did you mean {near[0]}?" if near else "quark train --help lists the fields."
        advice = _OF_TRL.get(name, advice)
        raise ConfigError(f"{name} in {where} is no field of a run. {advice}")


# Fields of TRL's scripts that are called otherwise here, or are not.
_OF_TRL = {
    "dataset_name": "It is prompts here.",
    "dataset_train_split": "Name the split in prompts: owner/name[train].",
    "dataset_test_split": "Name it as eval_prompts: owner/name[test].",
    "model_revision": "Write model_init_kwargs: {revision: ...}.",
    "attn_implementation": "Write model_init_kwargs: {attn_implementation: ...}.",
    "load_in_4bit": "A quantized model is loaded by QuarkTrainer's model argument.",
    "load_in_8bit": "A quantized model is loaded by QuarkTrainer's model argument.",
    "torch_dtype": "It is dtype here.",
    "lora_dropout": "An adapter has no dropout here; QuarkTrainer takes a peft_config of your own.",
    "reward_model_name_or_path": "It is one of reward_funcs here.",
}


def _check_size(data: Any, path: Path) -> None:
    """Raises: ConfigError when aliases make a short file grow beyond every use."""
    left, values = 100_000, [data]
    while values and left:
        value = values.pop()
        left -= 1
        if isinstance(value, (dict, list, tuple, set)):
            values += [*value, *value.values()] if isinstance(value, dict) else list(value)
    if values:
        raise ConfigError(f"{path} holds more than 100,000 values, aliases counted. Name fewer.")


def _first_sentence(member: Any) -> str:
    text = " ".join(str(member.metadata.get("help", "")).split())
    return text.partition(". ")[0].rstrip(".") + "."


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_dict(value: Any) -> dict[str, Any]:
    return json.loads(value) if isinstance(value, str) else dict(value or {})


# The run


def _quark_config(named: dict[str, Any]) -> QuarkConfig:
    from .config import QuarkConfig

    # Trainer turns bars off where its library is quiet; the bars here are our own
    named = {"output_dir": "quark_output", "disable_tqdm": False, **named}
    if str(named.get("fsdp")).lower() == "true":
        named["fsdp"] = True  # the field takes text as well, of which only older names are known
    try:
        return QuarkConfig(**named)
    except QuarkError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # TrainingArguments' own checks
        raise ConfigError(f"The settings do not work: {first_line(error)}") from error


def _check_trackers(args: QuarkConfig) -> None:
    """Raises: ConfigError for a tracker that is not installed, which Trainer would tell after the model was loaded."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in args.report_to or ():
        try:
            [callback] = get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ConfigError(f"report_to={name}: {first_line(error)} Choose one of them, or leave it out.") from error
        try:
            callback()
        except (RuntimeError, ImportError) as error:
            raise ConfigError(
                f"report_to={name} cannot be used ({first_line(error)}). Install what it needs (pip install {name}),"
                " or leave it out."
            ) from error


def _make_trainer(settings: TrainArguments, args: QuarkConfig) -> QuarkTrainer:
    from .prompts import load_prompts
    from .rewards import load_reward
    from .trainer import QuarkTrainer

    peft_config = None
    if settings.use_peft:
        from peft import LoraConfig

        modules = settings.lora_target_modules or ["all-linear"]
        peft_config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            target_modules=modules[0] if modules == ["all-linear"] else modules,
            task_type="CAUSAL_LM",
        )
    # what may be wrong in a second comes before the model, which may take minutes
    prompts = load_prompts(settings.prompts or "")
    eval_prompts = load_prompts(settings.eval_prompts) if settings.eval_prompts else None
    rewards = [load_reward(spec) for spec in settings.reward_funcs or ()]
    eval_rewards = [load_reward(spec) for spec in settings.eval_reward_funcs or ()]
    try:
        return QuarkTrainer(
            settings.model_name_or_path or "",
            rewards,
            args,
            prompts,
            eval_prompts,
            peft_config=peft_config,
            eval_reward_funcs=eval_rewards,
            initial_pool=settings.initial_pool,
        )
    except ValueError as error:
        if settings.lora_target_modules and "target modules" in str(error).lower():
            raise ConfigError(
                f"lora_target_modules={settings.lora_target_modules} are no layers of this model. Leave it out for all"
                " linear ones."
            ) from error
        raise


def _dtype(settings: TrainArguments, args: QuarkConfig) -> str:
    """The weights' dtype as text; a run that goes on keeps the one that it began with, whatever is measured now."""
    from .packaged import fastest_dtype
    from .run_folder import begun_dtype

    if settings.dtype not in ("auto", "bfloat16", "float32"):
        raise ConfigError(f"dtype={settings.dtype!r} is not one of 'auto', 'bfloat16', 'float32'. Choose one of them.")
    if settings.dtype == "bfloat16" and not settings.use_peft:
        warnings.warn(
            "dtype=bfloat16 without use_peft: small updates vanish in bfloat16 weights. Use float32, or an adapter.",
            stacklevel=2,
        )
    if settings.dtype != "auto":
        return settings.dtype
    if not settings.use_peft:
        return "float32"
    return begun_dtype(Path(args.output_dir or ".")) or str(fastest_dtype()).removeprefix("torch.")


def _writes_yaml(named: dict[str, Any]) -> Any:
    """A callback that writes train.yaml: what was named, so that `quark train --config FOLDER/train.yaml` is this run.

    When the run begins: not until then does the folder belong to it.
    """
    import yaml
    from transformers import TrainerCallback

    from .files import written_whole
    from .run_folder import without_secrets

    class WritesYaml(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            path = Path(args.output_dir) / "train.yaml"
            if state.is_world_process_zero:  # anew each time: a run may be made longer
                with written_whole(path) as temporary:
                    text = yaml.safe_dump(without_secrets(named), sort_keys=False, allow_unicode=True)
                    temporary.write_text(text, encoding="utf-8")

    return WritesYaml()


def _finish(settings: TrainArguments, trainer: QuarkTrainer) -> None:
    """Writes model/ and results.json, and says where they are. Every rank calls it: the measuring is a joint work."""
    from . import export
    from .processes import first_tells
    from .resuming import digest
    from .run_folder import write_json

    folder = trainer.folder
    facts = {
        "name": "train",
        "model": settings.model_name_or_path,
        "prompts": settings.prompts,
        "eval_prompts": settings.eval_prompts,
        "scorers": _scorers(trainer),
        "seed": trainer.args.seed,
        "rounds": trainer.args.num_rounds,
        "steps": trainer.state.global_step,
        "quark_version": __version__,
        "run": first_tells(lambda: digest(trainer)),
    }
    if not first_tells(lambda: _is_done(folder, facts)):
        results: dict[str, Any] = {**facts, "last_round": _last_round(folder / "metrics.jsonl")}
        results["verdict"] = trainer.verdict()
        if results["verdict"]:  # the prompts are those of `systems`, the completions others
            results["verdict"]["figures"] = "metrics.jsonl"
        model = trainer.policy.whole()  # of a sharded model every rank holds a part
        if trainer.is_world_process_zero():
            # before the measuring: a scorer that fails there must not cost the model
            tokenizer: Any = trainer.processing_class
            export.save(model, tokenizer, trainer.reward_tokens, folder / "model", card=results)
        results |= _held_out(trainer)
        if trainer.is_world_process_zero():
            export.save_card(trainer.reward_tokens, folder / "model", results)
            write_json(folder / "results.json", results)
    if trainer.is_world_process_zero():
        _tell(folder)


def _is_done(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the same command has finished here before."""
    from .files import parsed

    path = folder / "results.json"
    try:
        there = parsed(path.read_bytes())
        if not isinstance(there, dict):
            raise ValueError("it holds no figures")
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({first_line(error)}), and is measured and written anew.", stacklevel=2)
        return False
    return (folder / "model" / "config.json").is_file() and all(there.get(k) == v for k, v in facts.items())


def _held_out(trainer: QuarkTrainer) -> dict[str, Any]:
    """Base and Quark on the held-out prompts by all scorers, in the form of a demo's results; nothing without prompts.

    All sampled as while exploring.
    """
    from .evaluation.evaluate import System, measure_systems

    if trainer.eval_prompts is None:
        return {}
    systems = [System("base", trained=False), System("Quark", quantile=trainer.reward_tokens.best)]
    scorers = {
        name: function
        for runner in (trainer.rewards, trainer.eval_rewards)
        if runner is not None
        for name, function in zip(runner.names, runner.functions, strict=True)
    }
    settings, args = trainer.generation_settings, trainer.args
    rows, _ = measure_systems(trainer, systems, scorers, settings, args.num_eval_generations, args.seed)
    return {
        "systems": rows,
        "held_out_prompts": len(trainer.eval_prompts),
        "completions_per_prompt": args.num_eval_generations,
        "sampling": {
            name: getattr(settings, name) for name in ("max_completion_length", "temperature", "top_p", "top_k")
        },
    }


def _tell(folder: Path) -> None:
    """The figures on the held-out prompts, a line a system, and where everything is."""
    from .export import flat

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if results.get("systems"):
        num, each = results["held_out_prompts"], results["completions_per_prompt"]
        print(f"On {num * each} new completions of the {num} held-out prompts, perplexity over all their tokens:")
    for row in results.get("systems", ()):
        figures = flat({name: value for name, value in row.items() if name not in ("system", "completions")})
        wanted = [f"{name.removesuffix(' mean')} {text}" for name, text in figures.items() if _is_told(name)]
        print(f"{row['system']:<6}" + ", ".join(wanted))
    print(f"The model is in {folder / 'model'}, the figures are in {folder / 'results.json'}.")
    print(f'Next: quark generate {folder} "Your prompt" --strength 2, or quark pool {folder}')


def _is_told(name: str) -> bool:
    return name.endswith(" mean") or name == "perplexity"


def _last_round(path: Path) -> dict[str, Any]:
    """The figures of the last round, all lines of metrics.jsonl together: the later line wins."""
    from .run_folder import MetricsFile

    lines = MetricsFile(path).lines()
    last = max((line["round"] for line in lines if "round" in line), default=0)
    figures: dict[str, Any] = {}
    for line in lines:
        if line.get("round") == last:
            figures |= line
    return figures


def _scorers(trainer: QuarkTrainer) -> dict[str, dict[str, Any]]:
    """By the name of the reward function."""
    from .evaluation.evaluate import scorer_facts

    runners = [("reward", trainer.rewards), ("evaluation", trainer.eval_rewards)]
    return {
        name: {
            "use": use,
            **scorer_facts(name, function),
        }
        for use, runner in runners
        if runner is not None
        for name, function in zip(runner.names, runner.functions, strict=True)
    }


def fields_page() -> str:
    """docs/fields.md: Quark's own fields and those whose default it changes."""
    lines = [
        "# The fields of a run",
        "",
        "Written by `python -m quark_lm.train_command`. Each is a key of the YAML and a flag of `quark train`; those of"
        " `QuarkConfig` are its arguments in Python too. It is a `transformers.TrainingArguments` and has its other"
        " fields as well: `quark train --help` lists all.",
    ]
    for title, members in help_sections()[:2]:
        lines += ["", f"## {title.partition(' (')[0]}", "", "| field | what it is | default |", "|---|---|---|"]
        for flag, text in members:
            told, _, default = text.removesuffix("]").partition(" [default: ")
            shown = f"`{default}`" if default else ""
            lines.append(f"| `{flag.removeprefix('--')}` | {told.replace('|', chr(92) + '|')} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(str(_FIELDS_FILE)).write_text(json.dumps(described_fields(), indent=1) + "\n", encoding="utf-8")
    Path("docs/fields.md").write_text(fields_page(), encoding="utf-8")
