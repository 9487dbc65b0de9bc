"""The command `quark`: end to end on a tiny model, its exit codes, and one line for every bad input."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from tiny import USE_CPU, tiny_gpt2, tiny_tokenizer
from typer.main import get_command

from quark_lm import cli, run_folder, train_command
from quark_lm.cli import main
from quark_lm.config import QuarkConfig
from quark_lm.errors import ConfigError
from quark_lm.pool import Pool
from quark_lm.train_command import TrainArguments, read_settings

REWARDS = """
import os, signal
from pathlib import Path

def vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]

def consonants(completions, **kwargs):
    return [1 - value for value in vowels(completions)]

def interrupting(completions, trainer_state, **kwargs):
    flag = Path(__file__).with_suffix(".flag")
    if trainer_state.global_step > 0 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGINT)
    return vowels(completions)

def two_values(completions, **kwargs):
    return [float(len(text) % 2) for text in completions]

def raising(completions, **kwargs):
    raise KeyError("no such score")

def too_few(completions, **kwargs):
    return [0.5]

def words(completions, **kwargs):
    return ["good"] * len(completions)

def nan(completions, **kwargs):
    return [float("nan")] * len(completions)

def none(completions, **kwargs):
    return [None] * len(completions)

def constant(completions, **kwargs):
    return [0.5] * len(completions)
"""


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries():
    """What main() asks of other libraries by the environment before they are imported; here they already are."""
    import datasets
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    were_disabled = datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
    if not were_disabled:
        datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """A folder with a tiny model `base`, rewards and prompts."""
    folder = tmp_path_factory.mktemp("files")
    tiny_gpt2().save_pretrained(folder / "base")
    tiny_tokenizer(pad=False).save_pretrained(folder / "base")  # GPT-2's own has no padding and no beginning either
    (folder / "rewards.py").write_text(REWARDS)
    prompts = [f"the {word} is {n}" for word in ("cat", "sun", "rain") for n in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    held_out = [f"an {word} in {n}" for word in ("ant", "hour", "end") for n in range(12)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in held_out))
    return folder


@pytest.fixture(scope="session")
def finished_run(files) -> Path:
    """A run of two tiny rounds that `quark train` finished."""
    assert main(["train", *train_flags(files, files / "run", eval_prompts=str(files / "held_out.jsonl"))]) == 0
    return files / "run"


def train_settings(files: Path, output_dir: Path, **more) -> dict:
    return {
        "model_name_or_path": str(files / "base"),
        "reward_funcs": f"{files / 'rewards.py'}:vowels",
        "prompts": str(files / "prompts.jsonl"),
        "output_dir": str(output_dir),
        "num_rounds": 2,
        "steps_per_round": 2,
        "prompts_first_round": 24,
        "prompts_per_round": 12,
        "num_quantiles": 3,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "use_cpu": USE_CPU,
        **more,
    }


def train_flags(files: Path, output_dir: Path, **more) -> list[str]:
    return [f"--{name}={value}" for name, value in train_settings(files, output_dir, **more).items()]


def run_line(capsys, argv, code=2) -> str:
    """The one line on stderr of a command that ends with this code and prints nothing else but what it begins."""
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [
        line for line in captured.err.splitlines() if not re.fullmatch(r"round \d+ \w+: \d+ (samples|steps)", line)
    ]
    assert len(lines) == 1, lines
    assert lines[0].startswith("quark: ")
    assert "Traceback" not in captured.err
    return lines[0]


# Help


def test_help_imports_nothing_that_takes_long():
    code = (
        "import sys; from quark_lm.cli import main; code = main(['--help']); "
        "print(sorted({'torch', 'transformers', 'rich', 'numpy', 'pyarrow'} & set(sys.modules)), code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize("command", ["demo", "train", "generate", "check-reward", "pool"])
def test_help_of_a_command_imports_no_torch(command):
    code = (
        f"import sys; from quark_lm.cli import main; code = main(['{command}', '--help']); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[] 0"


def test_the_list_of_commands_cuts_no_line(capsys):
    assert main(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_the_file_of_fields_is_what_the_dataclasses_say():
    import transformers

    stored, described = train_command._stored_fields(), train_command.described_fields()
    advice = "write it anew: python -m quark_lm.train_command"
    assert stored["sections"][:2] == described["sections"][:2], advice
    if stored["transformers"] == transformers.__version__:  # its own fields differ between versions
        assert stored == described, advice
    page = Path(__file__).parents[1] / "docs" / "fields.md"
    assert page.read_text(encoding="utf-8") == train_command.fields_page(), advice


def test_help_of_train_lists_every_field_with_its_help(capsys):
    assert main(["train", "--help"]) == 0
    words = capsys.readouterr().out.split()
    text = " ".join(words)
    for member in [*fields(TrainArguments), *(f for f in fields(QuarkConfig) if f.init)]:
        assert f"--{member.name}" in words
    for member in fields(TrainArguments):
        assert " ".join(member.metadata["help"].split()) in text
    assert "[default: 0.05]" in text


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    assert "check-reward" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"quark-lm \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_documentation_names_every_command_and_option():
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in get_command(cli.app).commands.items():
        section = page.partition(f"## quark {name}")[2].partition("\n## ")[0]
        assert section, f"docs/cli.md has no section on quark {name}"
        for parameter in command.params:
            for flag in parameter.opts:
                if flag.startswith("--") and flag != "--help":
                    assert f"`{flag}" in section, f"docs/cli.md: quark {name} lacks {flag}"
    section = page.partition("## quark train")[2].partition("\n## ")[0]
    for member in fields(TrainArguments):
        assert f"`{member.name}`" in section


# Settings


def settings_of(tmp_path, data, flags=()):
    (tmp_path / "run.yaml").write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return read_settings(tmp_path / "run.yaml", list(flags))


def test_flags_win_over_the_yaml_and_only_what_is_named_is_passed_on(tmp_path):
    own, named = settings_of(
        tmp_path,
        "model_name_or_path: a\nreward_funcs: sentiment\nnum_rounds: 3\nlearning_rate: 1e-4\npool_window:\n",
        ["--num-rounds", "5", "--reward_funcs", "a:b", "toxicity", "--no_disable_dropout", "--log_completions"],
    )
    assert own == {"model_name_or_path": "a", "reward_funcs": ["a:b", "toxicity"]}
    assert named == {
        "num_rounds": 5,
        "learning_rate": 1e-4,  # YAML 1.1 reads 1e-4 as text
        "pool_window": None,
        "disable_dropout": False,
        "log_completions": True,
    }


def test_a_preset_fills_what_is_not_named(tmp_path):
    _, named = settings_of(tmp_path, {"preset": "paper", "num_rounds": 7}, ["--beta=0.2"])
    args = train_command._quark_config({"output_dir": str(tmp_path), "use_cpu": True, **named})
    assert (args.num_rounds, args.beta, args.steps_per_round, args.draw) == (7, 0.2, 500, "all")


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--pool_window", "none"], {"pool_window": None}),
        (["--prompts-per-round=None"], {"prompts_per_round": None}),
        (["--report_to", "none"], {"report_to": "none"}),  # a tracker's name, not nothing
        (["--reward_weights", "1", "-0.5"], {"reward_weights": [1.0, -0.5]}),
        (["--explore_strength=-1"], {"explore_strength": -1.0}),
        (
            ["--reward_token_texts", r"Tone: rude.\n", r"Tone: kind.\n"],
            {"reward_token_texts": ["Tone: rude.\n", "Tone: kind.\n"]},
        ),
        (["--mask_reward_tokens", "false"], {"mask_reward_tokens": False}),
        (["--model_init_kwargs", '{"a": 1}'], {"model_init_kwargs": '{"a": 1}'}),
        (["--warmup_steps", "3", "--warmup_steps", "4"], {"warmup_steps": 4.0}),
    ],
)
def test_flags_become_values_of_their_fields_types(flags, value):
    assert read_settings(None, flags)[1] == value


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ({"report_to": ["tensorboard", "wandb"]}, ["tensorboard", "wandb"]),
        ({"reward_weights": [1, 2]}, [1.0, 2.0]),
        ({"reward_weights": 1}, [1.0]),
        ({"reward_token_texts": ["--a\n", "b"]}, ["--a\n", "b"]),
        ({"model_init_kwargs": {"revision": "main"}}, {"revision": "main"}),
        ({"log_completions": True}, True),
        ({"temperature": 1}, 1.0),
    ],
)
def test_yaml_values_become_values_of_their_fields_types(data, value, tmp_path):
    assert settings_of(tmp_path, data)[1] == {next(iter(data)): value}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"num_quantile": 4}, r"num_quantile in .*run.yaml is no field of a run\. Did you mean num_quantiles\?"),
        ({"zzzzz": 4}, "quark train --help lists the fields"),
        ({"num_rounds": "two"}, "num_rounds: invalid int value: 'two'. It is: Rounds of explore"),
        ({"num_rounds": 2.5}, "num_rounds: invalid int value: '2.5'"),
        ({"num_rounds": [1, 2]}, "num_rounds holds 2 values, but it takes one"),
        ({"num_rounds": {"a": 1}}, "num_rounds holds fields of its own"),
        ({"num_rounds": None}, "num_rounds is empty, but it needs a value"),
        ({"log_completions": "maybe"}, "log_completions: .*Truthy value expected"),
        ("- a\n- b\n", "holds a list, not fields"),
        ("a: [1\n", "is no YAML"),
    ],
)
def test_a_wrong_yaml_is_an_error_that_names_the_field(data, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as caught:
        settings_of(tmp_path, data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--confg", "run.yaml"], r"confg in the flags is no field of a run. Did you mean config\?"),
        (["--lora_alfa", "4"], "lora_alfa in the flags is no field of a run. Did you mean lora_alpha"),
        (["--dataset_name", "a/b"], "dataset_name in the flags is no field of a run. It is prompts here"),
        (["--attn_implementation", "sdpa"], r"Write model_init_kwargs: \{attn_implementation"),
        (["--frobnicate", "1"], "quark train --help lists the fields"),
        (["--num_rounds", "x"], "num_rounds: invalid int value"),
        (["--num_rounds"], "num_rounds: expected one argument"),
        (["--num_rounds", "3", "4"], "'4' belongs to no field"),
        (["three"], "'three' belongs to no field"),
        (["--pool_window", "zero"], "pool_window: invalid int value"),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_it(flags, words):
    with pytest.raises(ConfigError, match=words):
        read_settings(None, flags)


def test_an_empty_yaml_names_nothing(tmp_path):
    assert settings_of(tmp_path, "# nothing\n") == ({}, {})


# Train


def test_train_leaves_a_model_and_results_and_the_same_command_goes_on(files, finished_run, capsys):
    results = json.loads((finished_run / "results.json").read_text())
    [(name, scorer)] = results["scorers"].items()
    assert (name, scorer["use"], scorer["name"]) == ("vowels", "reward", "vowels")
    assert scorer["version"].startswith("source ")
    assert results["seed"] == 42
    assert (results["rounds"], results["steps"], results["last_round"]["round"]) == (2, 4, 1)
    assert 0 <= results["last_round"]["eval_vowels"] <= 1
    assert (finished_run / "model" / "model.safetensors").is_file()
    rows = len(Pool.open(finished_run))
    saved = (finished_run / "model" / "model.safetensors").stat().st_mtime_ns

    flags = train_flags(files, finished_run, eval_prompts=str(files / "held_out.jsonl"))
    assert main(["train", *flags]) == 0
    assert f"The model is in {finished_run / 'model'}" in capsys.readouterr().out
    assert len(Pool.open(finished_run)) == rows
    # nothing is made anew
    assert json.loads((finished_run / "results.json").read_text()) == results
    assert (finished_run / "model" / "model.safetensors").stat().st_mtime_ns == saved


def test_the_results_of_train_tell_base_from_quark_on_the_held_out_prompts(finished_run):
    results = json.loads((finished_run / "results.json").read_text())
    assert [row["system"] for row in results["systems"]] == ["base", "Quark"]
    for row in results["systems"]:
        assert row["completions"] == 36 * results["completions_per_prompt"]
        assert row["vowels"]["mean"].keys() == row["perplexity"].keys() == {"mean", "low", "high"}
        assert row["vowels"]["mean"]["low"] < row["vowels"]["mean"]["mean"] < row["vowels"]["mean"]["high"]
        assert "wanted" not in row["vowels"]  # nobody said which values it wants
    # the same prompts, asked in the same way, a moment before
    assert results["systems"][1]["vowels"]["mean"]["mean"] == pytest.approx(
        results["last_round"]["eval_vowels"], abs=0.1
    )
    assert "| Quark | 72 |" in (finished_run / "model" / "README.md").read_text()


def test_the_results_of_train_have_no_table_without_held_out_prompts(files, tmp_path):
    assert main(["train", *train_flags(files, tmp_path / "run", num_rounds=1)]) == 0
    assert "systems" not in json.loads((tmp_path / "run" / "results.json").read_text())


def test_the_yaml_in_the_run_folder_is_the_same_run(files, finished_run):
    own, named = read_settings(finished_run / "train.yaml", [])
    settings = train_settings(files, finished_run, eval_prompts=str(files / "held_out.jsonl"))
    assert {**own, **named} == {**settings, "reward_funcs": [settings["reward_funcs"]]}
    assert main(["train", "--config", str(finished_run / "train.yaml")]) == 0


def test_an_adapter_with_new_tokens_trains_from_yaml_by_a_function_of_a_module(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_rewards_of_test_cli.py").write_text(REWARDS)
    rewards = [f"my_rewards_of_test_cli:{name}" for name in ("vowels", "consonants")]
    settings = train_settings(files, Path("out"), reward_funcs=rewards)
    settings |= {"reward_weights": [1, 0.5], "eval_reward_funcs": "my_rewards_of_test_cli:two_values"}
    settings |= {
        "use_peft": True,
        "lora_r": 2,
        "reward_token_style": "embedding",
        "eval_prompts": str(files / "held_out.jsonl"),
    }
    settings["meaning_rows"] = 0  # so few samples tell nothing of the tokens, and that is warned of
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", "run.yaml"]) == 0
    assert "warning" not in capsys.readouterr().err
    results = json.loads(Path("out/results.json").read_text())
    assert {name: scorer["use"] for name, scorer in results["scorers"].items()} == {
        "vowels": "reward",
        "consonants": "reward",
        "two_values": "evaluation",
    }
    assert "eval_two_values" in results["last_round"]
    assert json.loads(Path("out/model/generation_config.json").read_text())["suppress_tokens"]
    # the last checkpoint holds the adapter, and gives the same text as the finished model
    argv = ["generate", "out", "the cat", "--temperature", "0"]
    assert main(argv) == 0
    finished = capsys.readouterr().out
    Path("out/model").rename("model")
    assert main(argv) == 0
    assert capsys.readouterr().out == finished
    # whatever a measurement would say now, the run keeps the weights' dtype
    dtype = json.loads(Path("out/run.json").read_text())["dtype"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    monkeypatch.setattr("quark_lm.packaged.fastest_dtype", lambda: f"torch.{other}")
    assert main(["train", "--config", "run.yaml"]) == 0


def test_a_scorer_that_fails_in_the_last_measuring_costs_no_model(files, tmp_path, capsys):
    rewards = tmp_path / "late.py"
    rewards.write_text(REWARDS + LATE)
    flags = train_flags(files, tmp_path / "run", eval_prompts=str(files / "held_out.jsonl"), reward_retries=0)
    flags += [f"--eval_reward_funcs={rewards}:late"]
    assert main(["train", *flags]) == 2
    assert "late raised OSError: the quota is used up" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()
    assert "| base |" not in (tmp_path / "run" / "model" / "README.md").read_text()
    assert main(["generate", str(tmp_path / "run"), "the cat"]) == 0
    rewards.with_suffix(".flag").touch()
    assert main(["train", *flags]) == 0
    assert "| base |" in (tmp_path / "run" / "model" / "README.md").read_text()


LATE = """
def late(completions, trainer_state, **kwargs):
    if not (trainer_state.global_step < 4 or Path(__file__).with_suffix(".flag").exists()):
        late.calls += 1
        if late.calls > 1:  # after the last round's own held-out prompts
            raise OSError("the quota is used up")
    return vowels(completions)

late.calls = 0
"""


def test_what_an_earlier_run_left_in_a_folder_is_not_a_new_runs(files, tmp_path, capsys):
    flags = train_flags(files, tmp_path / "run", eval_prompts=str(files / "held_out.jsonl"))
    assert main(["train", *flags]) == 0
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "pool")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert main(["train", *flags, "--learning_rate=0.5"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != weights


def test_the_folder_is_held_until_the_model_and_its_figures_are_written(files, tmp_path, monkeypatch):
    from filelock import FileLock, Timeout

    held = []

    def looked(trainer):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "run" / ".lock", timeout=0).acquire()  # as another process
        held.append(trainer.folder)
        return {}

    monkeypatch.setattr(train_command, "_held_out", looked)
    assert main(["train", *train_flags(files, tmp_path / "run")]) == 0
    assert held == [tmp_path / "run"]
    FileLock(tmp_path / "run" / ".lock", timeout=0).acquire()


def test_none_empties_a_field_of_text(tmp_path):
    (tmp_path / "run.yaml").write_text("eval_prompts: held-out.jsonl\nrun_name: mine\n")
    own, named = read_settings(
        tmp_path / "run.yaml", ["--eval_prompts", "none", "--run_name=None", "--report_to", "none"]
    )
    assert own["eval_prompts"] is None
    assert (named["run_name"], named["report_to"]) == (None, "none")


def test_an_interrupted_run_says_so_and_goes_on(files, tmp_path, capsys):
    rewards = tmp_path / "interrupting.py"
    rewards.write_text(REWARDS)
    flags = train_flags(files, tmp_path / "run", reward_funcs=f"{rewards}:interrupting")
    assert main(["train", *flags]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert re.fullmatch(r"quark: interrupted\. Stopped .*round 2.* kept\. The same command goes on\.", last)
    assert not (tmp_path / "run" / "results.json").exists()
    assert main(["train", *flags]) == 0
    assert (tmp_path / "run" / "results.json").is_file()


def test_few_distinct_rewards_warn_in_one_line_without_a_path(files, tmp_path, capsys):
    flags = train_flags(files, tmp_path / "run", reward_funcs=f"{files / 'rewards.py'}:two_values")
    assert main(["train", *flags]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "num_quantiles=3 needs at least 3" in line]
    assert lines
    assert all(line.startswith("quark: warning: ") and ".py" not in line for line in lines)


def test_own_scored_data_is_round_0(files, tmp_path):
    rows = [{"prompt": f"the cat {i}", "completion": f" eats {i}", "reward": i / 40} for i in range(40)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["train", *train_flags(files, tmp_path / "run", initial_pool=str(tmp_path / "scored.jsonl"))]) == 0
    assert Pool.open(tmp_path / "run").to_table([0]).column("completion").to_pylist() == [r["completion"] for r in rows]


# What is set ({files}: the shared folder, {tmp}: this test's), and words of the one line that comes of it.
BAD_TRAININGS = {
    "no prompts file": ({"prompts": "{tmp}/none.jsonl"}, "There is no file"),
    "empty prompts": ({"prompts": "{tmp}/empty.jsonl"}, "empty.jsonl"),
    "no prompt column": ({"prompts": "{tmp}/texts.jsonl"}, "no column `prompt`"),
    "a prompt longer than the context": ({"prompts": "{tmp}/long.jsonl"}, "tokens, but only"),
    "a reward that raises": (
        {"reward_funcs": "{files}/rewards.py:raising", "reward_retries": 0},
        "raising raised KeyError: 'no such score'",
    ),
    "a reward of another length": ({"reward_funcs": "{files}/rewards.py:too_few"}, "returned 1 rewards for 24 comp"),
    "a reward of strings": ({"reward_funcs": "{files}/rewards.py:words"}, "is no number"),
    "a reward of NaN": ({"reward_funcs": "{files}/rewards.py:nan"}, "returned nan"),
    "a reward of None": ({"reward_funcs": "{files}/rewards.py:none"}, "gave None for all 24 completions"),
    "a constant reward": ({"reward_funcs": "{files}/rewards.py:constant"}, "rewards of the pool are equal (0.5)"),
    "no such reward": ({"reward_funcs": "{files}/rewards.py:vowel"}, "Did you mean 'vowels'?"),
    "no such model": ({"model_name_or_path": "{tmp}/nowhere"}, "could not be loaded"),
    "the reward tokens are taken": (
        {"model_name_or_path": "{tmp}/taken", "reward_token_style": "embedding"},
        "already holds <|quark_0|>",
    ),
    "another run's folder": ({"output_dir": "{run}", "seed": 7}, "holds another run ("),
    "a stranger's folder": ({"output_dir": "{tmp}/other"}, "no run.json that says whose"),
    "a wrong choice": ({"draw": "some"}, "draw='some' is not one of"),
    "a wrong schedule": ({"lr_scheduler_type": "sideways"}, "The settings do not work: sideways is not"),
    "a wrong dtype": ({"dtype": "int8"}, "dtype='int8' is not one of"),
    "an adapter's field without one": ({"lora_r": 8}, "lora_r is of an adapter, but use_peft is not set"),
    "wrong layers": ({"use_peft": True, "lora_target_modules": "q_zzz"}, "are no layers of this model"),
    "two weights for one reward": ({"reward_weights": [1, 2]}, "2 entries for 1 reward"),
    "no initial pool": ({"initial_pool": "{tmp}/none.jsonl"}, "There is no file"),
    "a file as the run's folder": ({"output_dir": "{tmp}/empty.jsonl"}, "is a file, and results need a folder"),
    "a folder in a file": ({"output_dir": "{tmp}/empty.jsonl/run"}, "empty.jsonl, which is a file"),
    "a tracker that is not installed": ({"report_to": "clearml"}, "report_to=clearml cannot be used ("),
    "no such tracker": ({"report_to": "paper"}, "report_to=paper: paper is not supported"),
    "no prompts named": ({"prompts": None}, "Nothing is named as prompts"),
}


@pytest.mark.parametrize("what", BAD_TRAININGS)
def test_bad_input_of_train_is_one_line_and_code_2(what, files, finished_run, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 200}) + "\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("{}\n")
    if what == "the reward tokens are taken":
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<|quark_0|>"])
        tiny_gpt2(vocab=len(tokenizer)).save_pretrained(tmp_path / "taken")
        tokenizer.save_pretrained(tmp_path / "taken")
    changes, words = BAD_TRAININGS[what]
    places = {"files": files, "tmp": tmp_path, "run": finished_run}
    changes = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**train_settings(files, tmp_path / "run"), **changes}))
    assert words in run_line(capsys, ["train", "--config", str(tmp_path / "run.yaml")])


def test_a_folder_that_may_not_be_written_is_one_line_and_code_2(files, tmp_path, capsys, monkeypatch):
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: Path(path) != tmp_path / "closed")
    flags = train_flags(files, tmp_path / "closed" / "run")
    assert f"nothing may be written in {tmp_path / 'closed'}" in run_line(capsys, ["train", *flags])


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(files, tmp_path, capsys, monkeypatch):
    import pyarrow.parquet as pq

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    flags = train_flags(files, tmp_path / "run")
    monkeypatch.setattr(pq, "write_table", full)
    assert "No space left on device" in run_line(capsys, ["train", *flags])
    # neither a round nor a part of one, but what was sampled for it
    assert not list((tmp_path / "run" / "pool").glob("*.parquet*"))
    monkeypatch.undo()
    assert main(["train", *flags]) == 0


# Generate


def test_generate_completes_prompts_in_their_order(finished_run, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("the long tail of a cat\n")
    argv = ["generate", str(finished_run), "the sun", "a", "--file", str(tmp_path / "more.txt")]
    assert main([*argv, "--num-generations", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == [p for p in ("the sun", "a", "the long tail of a cat") for _ in range(2)]
    assert {row["quantile"] for row in rows} == {2}  # the best of three
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("the sun")


def test_generate_is_a_function_of_its_seed(finished_run, capsys):
    outputs = []
    for seed in (1, 1, 2):
        assert main(["generate", str(finished_run), "the sun", "--seed", str(seed)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_the_quantile_and_the_dial_change_what_is_said(finished_run, capsys):
    def said(*flags):
        assert main(["generate", str(finished_run), "the sun", "--temperature", "0", *flags]) == 0
        return capsys.readouterr().out

    assert said() == said("--quantile", "best") == said("--quantile", "2")
    assert said("--quantile", "worst") == said("--quantile", "0") == said("--strength", "0")
    assert main(["generate", str(finished_run), "the cat", "--quantile", "worst", "--strength", "3"]) == 2
    assert "every strength gives the same text" in capsys.readouterr().err
    assert len({said(), said("--quantile", "worst"), said("--quantile", "none"), said("--strength", "4")}) >= 3


@pytest.mark.parametrize("argv", [[], ["-"], ["--file", "-"]])
def test_generate_reads_a_prompt_a_line_from_stdin(argv, finished_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the sun\n\na cat\r\n"))
    assert main(["generate", str(finished_run), *argv, "--json"]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["the sun", "a cat"]


def test_generate_leaves_stdin_alone_where_it_has_a_prompt_and_adds_it_for_a_dash(finished_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the sun"))
    assert main(["generate", str(finished_run), "a", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["generate", str(finished_run), "-", "a", "--json"]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["a", "the sun"]


def test_one_prompt_streams_to_a_terminal_what_it_prints_elsewhere(finished_run, capsys, monkeypatch):
    argv = ["generate", str(finished_run), "the sun"]
    assert main(argv) == 0
    whole = capsys.readouterr().out
    pieces = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    assert main(argv) == 0
    monkeypatch.undo()
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 10


def test_a_stream_waits_for_the_rest_of_a_character(capsys):
    stream = cli._Stream()
    for text in ("a", "a\ufffd", "aé", "aé\x1b["):
        stream(0, text)
    assert capsys.readouterr().out == "aé\ufffd["


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{run}"], "There is no prompt"),
        (["{run}", " "], "A prompt is empty"),
        (["{run}", "a", "--quantile", "3"], "quantile=3 is not best, worst, none, or 0 to 2"),
        (["{run}", "a", "--quantile", "good"], "quantile=good is not"),
        (["{run}", "a", "--quantile", "none", "--strength", "2"], "strength=2.0 turns a reward token up"),
        (["{run}", "a", "--max-completion-length", "500"], "tokens too many for the model's context"),
        (["{run}", "a", "--strength", "nan"], "not a finite number"),
        (["{run}", "a", "--dial-min-p", "0.1"], "dial_min_p=0.1 limits a dial above 1"),
        (["{run}", "a", "--dial-min-p", "0.1", "--strength", "0.5"], "dial_min_p=0.1 limits a dial above 1"),
        (["{run}", "a", "--top-p", "0"], "top_p=0.0 is not a probability"),
        (["{run}", "a", "--temperature", "-1"], "--temperature"),
        (["{run}", "word " * 200], "tokens, but only"),
        (["{run}", "--file", "{files}/none.txt"], "There is no file"),
        (["{files}/base", "a", "--strength", "2"], "was not trained by Quark"),
        (["{files}/base", "a", "--quantile", "1"], "was not trained by Quark"),
        (["{files}", "a"], "holds no model"),
        (["nobody/nothing", "a"], "There is no folder nobody/nothing here"),
        ([], "Missing argument"),
        (["{run}", "a", "--topp", "1"], "No such option"),
    ],
)
def test_bad_input_of_generate_is_one_line_and_code_2(argv, words, files, finished_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    argv = [argument.format(run=finished_run, files=files) for argument in argv]
    assert words in run_line(capsys, ["generate", *argv])


def test_a_model_without_quark_is_sampled_as_it_is(files, capsys):
    assert main(["generate", str(files / "base"), "the sun"]) == 0
    assert capsys.readouterr().out.startswith("the sun")


# Check-reward


def test_check_reward_reports_with_a_verdict_a_line(files, capsys):
    argv = ["check-reward", f"{files / 'rewards.py'}:vowels", "--prompts", str(files / "prompts.jsonl")]
    argv += ["--model", str(files / "base"), "--num", "48", "--num-quantiles", "3", "--max-completion-length", "5"]
    sets = ["--reward-token-texts", r"few: \n", "many: ", "--reward_token_texts", "bad", "fair", "good"]
    assert main([*argv, *sets]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "vowels, 48 completions"
    assert all(line.startswith(("  ok       ", "  warning  ")) for line in out[1:-1])
    assert main([*argv, *sets, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [tag["texts"] for tag in report["tags"]] == [["few: \n", "many: "], ["bad", "fair", "good"], None]


def test_check_reward_reads_own_completions_without_a_model(files, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"completion": "aei" + "x" * i}) + "\n" for i in range(40)))
    argv = ["check-reward", f"{files / 'rewards.py'}:vowels", "--completions", str(tmp_path / "own.jsonl")]
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Nothing stands in the way."


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{files}/rewards.py:vowels"], "neither prompts nor completions"),
        (["vowels_of_nobody!", "--prompts", "{files}/prompts.jsonl"], "is no name, model id or module:function"),
        (["{files}/rewards.py:vowels", "--prompts", "{files}/none.jsonl"], "There is no file"),
        (["{files}/rewards.py:vowels", "--completions", "{files}/none.jsonl"], "There is no file"),
        (["{files}/rewards.py:vowels", "--reward-token-position", "last"], "reward_token_position='last'"),
        (["{files}/rewards.py:vowels", "--reward-token-texts", "one"], "fewer than two"),
        (["{files}/rewards.py:vowels", "--reward-token-texts=one"], "fewer than two"),
        (
            ["{files}/rewards.py:vowels", "--prompts", "{files}/prompts.jsonl", "--completions", "{files}/none.jsonl"],
            "Give one of the two",
        ),
        ([], "Missing argument"),
    ],
)
def test_bad_input_of_check_reward_is_one_line_and_code_2(argv, words, files, capsys):
    assert words in run_line(capsys, ["check-reward", *(argument.format(files=files) for argument in argv)])


@pytest.mark.parametrize("name", ["raising", "too_few", "words", "nan", "none"])
def test_a_reward_that_fails_is_one_line_and_code_2(name, files, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"completion": f"{i}"}) + "\n" for i in range(40)))
    argv = ["check-reward", f"{files / 'rewards.py'}:{name}", "--completions", str(tmp_path / "own.jsonl")]
    assert main(argv) == 2
    assert sum(line.startswith("quark: ") for line in capsys.readouterr().err.splitlines()) == 1


# Pool


@pytest.fixture
def small_pool(tmp_path) -> Path:
    """A pool of one round whose texts try to colour the terminal; rewards 0, 1, 2 ... and one None."""
    pool = Pool.open(tmp_path / "run" / "pool", create=True)
    texts = [f"[bold]no {i}\x1b[31m" for i in range(9)]
    columns = {"prompt": ["[/red]so\n"] * 9, "completion": texts, "reward": [*map(float, range(8)), None]}
    pool.append(0, {**columns, "held_out": [False] * 9, "prompt_index": list(range(9))})
    return tmp_path / "run"


def test_pool_shows_the_best_and_hides_the_worst_texts(small_pool, capsys):
    assert main(["pool", str(small_pool), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "[bold]no 7\ufffd[31m" in out  # shown, not obeyed
    assert "[/red]so⏎" in out
    assert "\x1b" not in out
    assert "no 0" not in out
    assert out.count("(hidden: --show-bottom)") == 2
    assert main(["pool", str(small_pool), "--top", "2", "--show-bottom"]) == 0
    out = capsys.readouterr().out
    assert "no 0" in out
    assert "no 1" in out
    assert "no 2" not in out


def test_pool_never_shows_a_sample_as_both(small_pool, capsys):
    assert main(["pool", str(small_pool), "--top", "100", "--json", "--show-bottom"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["reward"] for row in data["best"]] == [7, 6, 5, 4]
    assert [row["reward"] for row in data["worst"]] == [3, 2, 1, 0]
    [row] = data["rounds"]
    assert (row["samples"], row["without_reward"], row["mean"], row["median"]) == (9, 1, 3.5, 3.5)


def test_pool_lists_every_round_of_a_run(finished_run, capsys):
    assert main(["pool", str(finished_run), "--json", "--round", "0"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["samples"] for row in data["rounds"]] == [24, 12]
    assert data["round"] == 0
    assert data["worst"][0]["completion"] is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{files}/nowhere"], "holds no pool"),
        (["{run}", "--round", "9"], "has no round 9, only 0 to 1"),
        (["{run}", "--top", "-1"], "--top"),
        (["{empty}"], "holds no round yet"),
    ],
)
def test_bad_input_of_pool_is_one_line_and_code_2(argv, words, files, finished_run, tmp_path, capsys):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "manifest.json").write_text('{"rounds": []}')
    places = {"run": finished_run, "files": files, "empty": tmp_path}
    assert words in run_line(capsys, ["pool", *(argument.format(**places) for argument in argv)])


# Demo


def test_demo_passes_its_options_on(monkeypatch, capsys):
    from quark_lm import demo

    calls = []

    def run_demo(**options):
        options["console"].print("a table")
        calls.append(options)
        return {"task": options["task"], "figure": float("nan")}

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert main(["demo"]) == 0
    assert capsys.readouterr().out == "a table\n"
    assert main(["demo", "--task", "toxicity", "--seed", "3", "--budget", "short", "--prompts", "p.txt", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out, parse_constant=pytest.fail) == {"task": "toxicity", "figure": None}
    assert captured.err == "a table\n"
    assert [(c["task"], c["seed"], c["short"], c["prompts"]) for c in calls] == [
        ("sentiment", 0, False, None),
        ("toxicity", 3, True, "p.txt"),
    ]


def test_an_unknown_task_is_one_line_and_code_2(capsys):
    line = run_line(capsys, ["demo", "--task", "sarcasm"])
    assert "'--task': 'sarcasm' is not one of" in line
    assert line.endswith("See quark demo --help.")


# Exit codes


def test_an_unknown_command_is_one_line_and_code_2(capsys):
    assert "No such command" in run_line(capsys, ["trian"])


@pytest.mark.parametrize("place", [0, 1, 4])
def test_debug_shows_where_an_error_came_from(place, capsys):
    argv = ["pool", "nowhere", "--top", "3"]
    argv.insert(place, "--debug")
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "pool.py" in err
    assert err.splitlines()[-1].startswith("quark: nowhere holds no pool")


def test_what_nobody_foresaw_is_one_line_and_code_1(capsys, monkeypatch):
    from quark_lm import export

    def broken(*args, **kwargs):
        raise RuntimeError("the first line\nand the second")

    monkeypatch.setattr(export, "load", broken)
    line = run_line(capsys, ["generate", "any", "a"], code=1)
    assert line.startswith("quark: failed: RuntimeError: the first line and the second")
    assert "--debug" in line
    assert main(["--debug", "generate", "any", "a"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_outside_of_a_run_promises_nothing(capsys, monkeypatch):
    from quark_lm import export

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "load", interrupted)
    assert run_line(capsys, ["generate", "any", "a"], code=130) == "quark: interrupted."


def test_ctrl_c_says_what_is_kept_and_that_the_same_command_goes_on(capsys):
    told = KeyboardInterrupt("stopped during round 2 explore; 96 of 384 samples are kept")
    assert cli._interrupted(told, goes_on=True) == 130
    assert cli._interrupted(KeyboardInterrupt(), goes_on=True) == 130
    assert capsys.readouterr().err.splitlines() == [
        "quark: interrupted. Stopped during round 2 explore; 96 of 384 samples are kept. The same command goes on.",
        "quark: interrupted. The same command goes on.",
    ]


def test_ctrl_c_on_a_terminal_begins_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli._interrupted(KeyboardInterrupt(), goes_on=False) == 130
    assert capsys.readouterr().err == "\nquark: interrupted.\n"


def test_exit_codes_of_the_process_itself(files, small_pool):
    def code(*argv, **options):
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "quark_lm.cli", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=environment, **options)

    assert code("--version").returncode == 0
    wrong = code("pool", "nowhere")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 1
    # the other libraries are quiet from the start
    noisy = code("generate", str(files / "base"), "word " * 200)
    assert (noisy.returncode, noisy.stdout) == (2, "")
    assert len(noisy.stderr.splitlines()) == 1
    broken = files / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    noisy = code("generate", str(files / "base"), "--file", str(broken))
    assert (noisy.returncode, noisy.stdout) == (2, "")
    assert len(noisy.stderr.splitlines()) == 1
    # an output that closes early, as `| head` does
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        command = [sys.executable, "-m", "quark_lm.cli", "pool", str(small_pool)]
        piped = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in piped.stderr
    assert piped.returncode == 1
