"""`quark evaluate` from end to end on tiny models, what it keeps, and one line for every bad input."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from io import StringIO
from pathlib import Path

import datasets
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from test_evaluate import character_tokenizer, write_lines
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from quark_lm import evaluate_command, export
from quark_lm.demo import TASKS as DEMO_TASKS
from quark_lm.errors import ConfigError, DataError, ModelError, QuarkError, RewardError
from quark_lm.evaluate_command import Request, evaluate
from quark_lm.evaluation import passes, tables
from quark_lm.evaluation.tasks import TASKS, find_task
from quark_lm.reward_tokens import RewardTokens

REWARDS = """
import os, signal
from pathlib import Path

def vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / len(text) if text else None for text in completions]

def consonants(completions, **kwargs):
    return [None if v is None else 1 - v for v in vowels(completions)]

def once_gone(completions, **kwargs):
    flag = Path(__file__).with_suffix(".gone")
    if not flag.exists():
        flag.touch()
        raise OSError("the service is gone")
    return vowels(completions)

def killing(completions, **kwargs):
    flag = Path(__file__).with_suffix(".killed")
    calls = Path(__file__).with_suffix(".calls")
    calls.write_text((calls.read_text() if calls.exists() else "") + f"{len(completions)} ")
    if len(calls.read_text().split()) == 2 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return vowels(completions)
"""


@pytest.fixture(scope="module", autouse=True)
def quiet_libraries():
    from transformers.utils import logging

    were_disabled, bars = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    yield
    if not were_disabled:
        datasets.enable_progress_bars()
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with models: `base`, `text` and `embedding`, which Quark trained, `other`, which reads characters."""
    folder = tmp_path_factory.mktemp("files")
    tiny_gpt2().save_pretrained(folder / "base")
    tiny_tokenizer(pad=False).save_pretrained(folder / "base")
    for style, build in (("text", tiny_gpt2), ("embedding", tiny_llama)):
        model, tokenizer = build(seed=1), tiny_tokenizer()
        tokens = RewardTokens.create(model, tokenizer, num_quantiles=3, style=style)
        export.save(model, tokenizer, tokens, folder / style)
    other = character_tokenizer()
    tiny_llama(vocab=len(other)).save_pretrained(folder / "other")
    other.save_pretrained(folder / "other")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"the {word} is", "continuation": "on the mat", "level": n} for n, word in enumerate("abcdef")]
    write_lines(folder / "prompts.jsonl", rows)
    return folder


def ask(files: Path, output_dir: Path, **more) -> Request:
    named = {
        "model": str(files / "text"),
        "prompts": str(files / "prompts.jsonl"),
        "num_generations": 3,
        "max_completion_length": 8,
        "scorers": (f"{files / 'rewards.py'}:vowels", f"{files / 'rewards.py'}:consonants"),
        "output_dir": str(output_dir),
        **more,
    }
    return Request(**{name: value for name, value in named.items() if value is not None})


def run(request: Request) -> tuple[dict, str]:
    """(results, what was printed at 80 columns)."""
    out = StringIO()
    return evaluate(request, Console(file=out, width=80)), out.getvalue()


@pytest.fixture(scope="module")
def finished(files) -> tuple[Path, dict, str]:
    """(folder, results, table) of an evaluation of toxicity with everything in it."""
    folder = files / "finished"
    request = ask(files, folder, task="toxicity", evaluator=str(files / "base"), references="continuation")
    return folder, *run(request)


# What comes out


def intervals(data, path=""):
    """Every {"mean", "low", "high"} by its path."""
    if isinstance(data, dict) and set(data) == {"mean", "low", "high"}:
        yield path, data
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from intervals(value, f"{path}/{name}")


def test_results_hold_every_metric_of_the_task_as_an_interval(finished):
    folder, results, _ = finished
    assert json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail) == results  # no NaN in JSON
    found = dict(intervals(results))
    scorer = "/scores/vowels"
    of_scorer = {f"{scorer}/{name}" for name in ("mean", "wanted", "average_maximum_toxicity", "toxicity_probability")}
    of_text = {f"/text/{name}" for name in ("dist_1", "dist_2", "dist_3", "dist_2_space", "dist_3_space", "tokens")}
    of_text |= {f"/text/{name}{suffix}" for name in ("rep_2", "rep_4", "diversity") for suffix in ("", "_tokens")}
    others = {"/perplexity/corpus", "/perplexity/mean", "/perplexity/trimmed_mean"}
    others |= {f"/references/{name}" for name in ("rep", "wrep", "acc", "ppl")}
    assert of_scorer | of_text | others <= set(found)
    for path in of_scorer | others:
        assert found[path]["low"] <= found[path]["mean"] <= found[path]["high"], path


def test_a_result_names_all_that_it_depends_on(finished, files):
    _, results, _ = finished
    made = results["made"]
    assert made["model"] == str(files / "text")
    assert len(made["weights"]) == 12
    settings = {
        name: made[name] for name in ("num_generations", "max_completion_length", "temperature", "top_p", "seed")
    }
    assert settings == {
        "num_generations": 3, "max_completion_length": 8, "temperature": 1.0, "top_p": 0.9, "seed": 0
    }  # fmt: skip
    assert (made["quantile"], made["strengths"], len(made["reward_tokens"])) == (2, [1.0], 3)
    assert (made["num_prompts"], made["prompts"]) == (6, str(files / "prompts.jsonl"))
    assert results["scorers"]["vowels"]["version"].startswith("source ")
    assert results["evaluator"]["model"] == str(files / "base")
    assert results["evaluator"]["tokens"] == "as they were drawn"
    assert results["command"].startswith(f"quark evaluate {files / 'text'} --task toxicity --prompts ")
    assert "--scorer" in results["command"]
    assert results["environment"]["packages"]["torch"]
    assert results["counts"]["prompts"] == 6


def test_the_parquet_holds_ids_text_and_every_score(finished):
    folder, _, _ = finished
    frame = pd.read_parquet(folder / "completions.parquet")
    assert len(frame) == 18
    named = {"prompt_index", "generation", "strength", "prompt", "completion", "prompt_ids", "completion_ids"}
    named |= {"score/vowels", "score/consonants", "nll", "nll_tokens", "column/continuation", "column/level"}
    assert named == set(frame.columns)
    assert frame["prompt"].tolist()[::3] == [f"the {word} is" for word in "abcdef"]
    tokenizer = tiny_tokenizer()
    for ids, text in zip(frame["completion_ids"], frame["completion"], strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not (folder / "parts").exists()


def test_the_table_holds_the_figures_in_the_unit_that_it_names(finished):
    _, results, table = finished
    for label, key, form, factor in (
        ("mean score", "mean", "{:.3f}", 1),
        ("% not toxic", "wanted", "{:.1f}", 100),
        ("average maximum toxicity", "average_maximum_toxicity", "{:.3f}", 1),
    ):
        row = next(line for line in table.splitlines() if label in line)
        for scorer in ("vowels", "consonants"):
            mean, low, high = (
                form.format(factor * results["scores"][scorer][key][end]) for end in ("mean", "low", "high")
            )
            assert f"{mean} ({low} to {high})" in row, (label, scorer)


def test_the_table_fits_80_columns(finished):
    _, _, table = finished
    assert max(map(len, table.splitlines()[1:])) <= 80  # the first names the model
    for word in ("vowels", "% not toxic", "average maximum toxicity", "dist-2", "perplexity", "acc, on the references"):
        assert word in table


@pytest.mark.parametrize(("model", "more"), [("base", {}), ("embedding", {"quantile": "worst", "strengths": (1.0,)})])
def test_any_model_is_measured(files, tmp_path, model, more):
    results, table = run(ask(files, tmp_path, model=str(files / model), **more))
    assert results["task"] is None
    assert results["made"]["quantile"] == (0 if more else None)
    assert "perplexity" not in results
    assert "perplexity" not in table
    assert results["scores"]["vowels"]["mean"]["mean"] > 0


def test_conversations_are_completed_and_scored(files, tmp_path):
    model, tokenizer = tiny_gpt2(), tiny_tokenizer(chat=True)
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    write_lines(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "hello"}]}])
    (tmp_path / "r.py").write_text(
        "def talks(prompts, completions, **kwargs):\n"
        "    return [float(c[0]['role'] == 'assistant') for c in completions]\n"
    )
    request = ask(
        files, tmp_path / "out", model=str(tmp_path / "chat"), prompts=str(tmp_path / "chat.jsonl"),
        scorers=(f"{tmp_path / 'r.py'}:talks",),
    )  # fmt: skip
    assert run(request)[0]["scores"]["talks"]["mean"]["mean"] == 1.0
    again = ask(files, tmp_path / "again", scorers=request.scorers, from_file=str(tmp_path / "out"), **NOTHING)
    assert run(again)[0]["scores"]["talks"]["mean"]["mean"] == 1.0


def test_the_packaged_models_dtype_is_measured_once_for_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr("quark_lm.packaged.fastest_dtype", lambda: "measured")
    assert evaluate_command._dtype_of(tmp_path, "evaluator_dtype") == "measured"
    (tmp_path / "evaluation.json").write_text('{"dtype": "float32", "evaluator_dtype": "bfloat16"}')
    assert evaluate_command._dtype_of(tmp_path, "dtype") == "float32"
    assert evaluate_command._dtype_of(tmp_path, "evaluator_dtype") == "bfloat16"


@pytest.mark.slow
def test_what_goes_on_is_read_in_the_dtype_that_it_was_begun_with(files, tmp_path, monkeypatch, smollm2_folder):
    request = ask(files, tmp_path, evaluator="smollm2", num_generations=1)
    monkeypatch.setattr("quark_lm.packaged.fastest_dtype", lambda: torch.float32)
    first, _ = run(request)
    assert first["evaluator"]["dtype"] == "float32"
    monkeypatch.setattr("quark_lm.packaged.fastest_dtype", lambda: torch.bfloat16)
    assert run(request)[0] == first


NOTHING = {"model": None, "prompts": None, "num_generations": None, "max_completion_length": None}


def test_one_generation_only_is_measured_and_told_of(files, tmp_path):
    results, table = run(ask(files, tmp_path, num_generations=1, task="toxicity"))
    assert results["counts"]["completions_per_prompt"] == [1, 1]
    assert "One completion a prompt" in table
    of = results["scores"]["vowels"]
    assert of["average_maximum_toxicity"]["mean"] == pytest.approx(1 - of["mean"]["mean"])


def test_prompts_that_repeat_are_left_out_and_told_of(files, tmp_path):
    prompts = [{"text": "the cat", "toxicity": 0.1}] * 2 + [{"text": "a", "toxicity": 0.2}]
    write_lines(tmp_path / "p.jsonl", [{"prompt": prompt, "filename": "x"} for prompt in prompts])
    with pytest.warns(UserWarning, match="0 empty and 1 repeated of 3 prompts"):
        results, _ = run(ask(files, tmp_path / "out", prompts=str(tmp_path / "p.jsonl")))
    assert results["counts"]["prompts"] == 2


def test_num_prompts_takes_the_first_ones(files, tmp_path):
    results, _ = run(ask(files, tmp_path, num_prompts=2))
    frame = pd.read_parquet(tmp_path / "completions.parquet")
    assert results["counts"]["prompts"] == 2
    assert set(frame["prompt"]) == {"the a is", "the b is"}


def test_an_evaluator_with_another_tokenizer_reads_the_text_and_says_so(files, tmp_path):
    results, table = run(ask(files, tmp_path, evaluator=str(files / "other")))
    assert results["evaluator"]["tokens"] == "the evaluator's own: the text was tokenized again"
    assert "the text was tokenized again" in " ".join(table.split())
    frame = pd.read_parquet(tmp_path / "completions.parquet")
    lengths = [len(text) for text in frame["completion"]]
    assert frame["nll_tokens"].tolist() == lengths  # characters
    perplexity = math.exp(frame["nll"].sum() / sum(lengths))
    assert results["perplexity"]["corpus"]["mean"] == pytest.approx(perplexity)


def test_a_model_that_judges_itself_is_loaded_once(files, tmp_path, monkeypatch):
    loaded, load = [], export.load
    monkeypatch.setattr(export, "load", lambda name, **options: loaded.append(name) or load(name, **options))
    base = str(files / "base")
    results, _ = run(ask(files, tmp_path / "base", model=base, evaluator=base))
    assert loaded == [base]
    assert results["perplexity"]["corpus"]["mean"] > 1
    text = str(files / "text")  # its own reward token is no part of what it judges, so these are two
    run(ask(files, tmp_path / "text", evaluator=text))
    assert loaded == [base, text, text]


def test_mauve_compares_one_completion_of_each_prompt_with_its_reference(files, tmp_path, monkeypatch):
    from importlib.machinery import ModuleSpec

    shapes = []

    def compute_mauve(p_features, q_features, **options):
        shapes.extend([p_features.shape, q_features.shape])
        return types.SimpleNamespace(mauve=0.25)

    fake = types.ModuleType("mauve")
    fake.compute_mauve, fake.__spec__ = compute_mauve, ModuleSpec("mauve", None)
    monkeypatch.setitem(sys.modules, "mauve", fake)
    read, features = [], passes.features

    def recorded(by, texts, display):
        read.append(texts)
        return features(by, texts, display)

    monkeypatch.setattr(passes, "features", recorded)
    named = {"evaluator": str(files / "base"), "references": "continuation", "mauve": True}
    results, table = run(ask(files, tmp_path, **named))
    of_references, of_completions = read
    assert of_references == [f"the {word} is on the mat" for word in "abcdef"]
    assert all(text.startswith(f"the {word} is") for word, text in zip("abcdef", of_completions, strict=True))
    assert results["mauve"] == {"mean": 0.25, "low": None, "high": None}
    assert shapes == [(6, 32)] * 2
    assert "MAUVE" in table


# Stopped, and on


def test_a_scorer_that_fails_midway_loses_nothing_and_the_same_call_goes_on(files, tmp_path, monkeypatch):
    (files / "rewards.gone").unlink(missing_ok=True)
    request = ask(files, tmp_path, scorers=tuple(f"{files / 'rewards.py'}:{name}" for name in ("vowels", "once_gone")))
    with pytest.raises(RewardError, match="once_gone raised OSError: the service is gone"):
        run(request)
    kept = pq.read_table(tmp_path / "completions.parquet")
    monkeypatch.setattr(passes, "generate", lambda *a, **k: pytest.fail("it is generated already"))
    results, _ = run(request)
    assert results["scores"]["once_gone"]["mean"] == results["scores"]["vowels"]["mean"]
    after = pq.read_table(tmp_path / "completions.parquet")
    assert after["completion"].to_pylist() == kept["completion"].to_pylist()


def test_a_finished_evaluation_is_shown_again_and_not_measured(finished, files, monkeypatch):
    folder, results, table = finished
    monkeypatch.setattr(evaluate_command.EvaluationRun, "measure", lambda self: pytest.fail("it is measured already"))
    request = ask(files, folder, task="toxicity", evaluator=str(files / "base"), references="continuation")
    assert run(request) == (results, table)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", '{"counts": 3}', '{"task": "none"}'])
def test_results_of_an_earlier_call_that_cannot_be_read_are_one_clear_line(content, finished, files, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / "results.json").write_text(content)
    words = {"task": "toxicity", "evaluator": str(files / "base"), "references": "continuation"}
    with pytest.raises(DataError, match=r"results\.json is damaged \(.* Delete it, or") as caught:
        run(ask(files, tmp_path / "copy", **words))
    assert "\n" not in str(caught.value)


def test_a_scorer_that_was_mended_scores_anew(files, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def mine(completions, **kwargs):\n    return [0.25] * len(completions)\n")
    request = ask(files, tmp_path / "out", scorers=(f"{tmp_path / 'mine.py'}:mine", f"{files / 'rewards.py'}:vowels"))
    first, _ = run(request)
    (tmp_path / "mine.py").write_text("def mine(completions, **kwargs):\n    return [0.75] * len(completions)\n")
    for name in [name for name in sys.modules if name.startswith("_quark_reward_mine")]:
        del sys.modules[name]
    monkeypatch.setattr(passes, "generate", lambda *a, **k: pytest.fail("it is generated already"))
    second, _ = run(request)
    assert second["scores"]["mine"]["mean"]["mean"] == 0.75
    assert second["scores"]["vowels"] == first["scores"]["vowels"]
    assert list(second["scores"]) == ["mine", "vowels"]


def test_a_kill_loses_one_batch_at_most(files, tmp_path):
    for name in ("killed", "calls"):
        (files / f"rewards.{name}").unlink(missing_ok=True)
    request = ask(files, tmp_path / "out", scorers=(f"{files / 'rewards.py'}:killing",), batch_rows=4)
    code = (
        "import sys; from quark_lm.evaluate_command import Request, evaluate; from quark_lm.evaluation import passes;"
        f"passes._CHUNK = 5; evaluate(Request(**{dataclasses.asdict(request)!r}))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, env=environment).returncode == -signal.SIGKILL
    again = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert again.returncode == 0, again.stderr
    # 5 were kept, the 5 of the killed call were lost, and 5, 5, 3 came after it
    assert (files / "rewards.calls").read_text().split() == ["5", "5", "5", "5", "3"]
    assert len(pd.read_parquet(tmp_path / "out" / "completions.parquet")) == 18


def test_a_folder_of_other_settings_is_refused_and_the_difference_named(finished, files):
    folder, _, _ = finished
    named = {"task": "toxicity", "evaluator": str(files / "base"), "references": "continuation"}
    with pytest.raises(ConfigError, match=r"top_p: 0\.9 there, 0\.5 here"):
        run(ask(files, folder, top_p=0.5, **named))
    with pytest.raises(ConfigError, match=r"another evaluation \(strengths: \[1.0\] there, \[2.0\] here\)"):
        run(ask(files, folder, strengths=(2.0,), **named))
    with pytest.raises(ConfigError, match="scorers"):
        run(ask(files, folder, scorers=("repetition",), **named))


# Scored again


def test_completions_are_scored_again_without_generating(finished, files, tmp_path, monkeypatch):
    folder, results, _ = finished
    monkeypatch.setattr(evaluate_command.EvaluationRun, "_ask", lambda self: pytest.fail("no model is needed"))
    named = {
        "scorers": (f"{files / 'rewards.py'}:vowels", "repetition"),
        "task": "toxicity",
        "evaluator": str(files / "base"),
    }
    again, _ = run(ask(files, tmp_path, from_file=str(folder / "completions.parquet"), **{**NOTHING, **named}))
    assert again["scores"]["vowels"] == results["scores"]["vowels"]
    assert again["perplexity"] == results["perplexity"]
    assert again["made"] == results["made"]
    assert "repetition" in again["scores"]
    # what agrees with the file may be named
    run(ask(files, tmp_path / "b", from_file=str(folder), quantile="best", strengths=(1,), top_p=0.9))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strengths": (2.0,)}, r"made with strengths=1, and strengths=2 is asked for"),
        ({"quantile": "worst"}, r"made with quantile=2, and quantile=0 is asked for"),
        ({"top_p": 0.5}, r"made with top_p=0.9, and top_p=0.5"),
        ({"num_generations": 25}, r"made with num_generations=3, and num_generations=25"),
    ],
)
def test_completions_of_other_settings_are_refused(finished, files, tmp_path, more, message):
    folder, _, _ = finished
    with pytest.raises(ConfigError, match=message):
        run(ask(files, tmp_path, from_file=str(folder), **{**NOTHING, **more}))
    with pytest.raises(ConfigError, match="made with model="):
        run(ask(files, tmp_path, from_file=str(folder), **{**NOTHING, "model": str(files / "base")}))


def test_a_results_file_is_no_table_of_completions(finished, files, tmp_path):
    folder, _, _ = finished
    with pytest.raises(DataError, match=r"results.json holds figures alone. Give completions.parquet beside it"):
        run(ask(files, tmp_path, from_file=str(folder / "results.json"), **NOTHING))


def test_completions_of_others_are_scored(files, tmp_path):
    rows = [{"prompt": {"text": "the cat"}, "generations": [{"text": " sat"}, {"text": " ran away"}]}]
    path = write_lines(tmp_path / "theirs.jsonl", rows)
    named = {**NOTHING, "task": "toxicity", "evaluator": str(files / "base")}
    results, table = run(ask(files, tmp_path / "out", from_file=str(path), **named))
    assert results["made"]["file"] == "theirs.jsonl"
    assert len(results["made"]["file_digest"]) == 12
    assert results["counts"]["completions"] == 2
    assert "the text was tokenized again" in results["evaluator"]["tokens"]
    assert "theirs.jsonl" in table
    with pytest.raises(
        ConfigError, match=r"does not say how its completions were made, so strengths=2 changes nothing"
    ):
        run(ask(files, tmp_path / "b", from_file=str(path), **NOTHING, strengths=(2.0,)))
    path.write_text(path.read_text().replace("sat", "stood"))
    with pytest.raises(ConfigError, match="file_digest"):
        run(ask(files, tmp_path / "out", from_file=str(path), **named))


def test_repetition_of_others_is_counted_in_words(files, tmp_path):
    path = write_lines(tmp_path / "theirs.jsonl", [{"prompt": "the cat", "completion": "sat and sat and sat and sat"}])
    results, _ = run(ask(files, tmp_path / "out", task="repetition", from_file=str(path), **NOTHING, scorers=()))
    assert list(results["scores"]) == ["repetition"]
    assert results["scores"]["repetition"]["mean"]["mean"] < 0.3


# Bad input


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"strengths": (math.nan,)}, ConfigError, "not a finite number"),
        ({"model": "base", "strengths": (2.0,)}, ConfigError, r"strength=2.0 needs reward tokens"),
        ({"model": "base", "quantile": "worst"}, ConfigError, "quantile=worst needs reward tokens"),
        ({"quantile": "none", "strengths": (2.0,)}, ConfigError, "quantile=none asks for none"),
        ({"quantile": "3"}, ConfigError, "quantile=3 is not best, worst, none, or 0 to 2"),
        ({"temperature": 0.0}, ConfigError, "3 times the same completion"),
        ({"temperature": -1.0}, ConfigError, "temperature=-1.0"),
        ({"temperature": math.inf}, ConfigError, "temperature=inf"),
        ({"top_p": 0.0}, ConfigError, "top_p=0.0"),
        ({"top_k": -1}, ConfigError, "top_k=-1"),
        ({"min_completion_length": 9}, ConfigError, "min_completion_length=9 is above max_completion_length=8"),
        ({"revision": "v1"}, ConfigError, "is a folder, which has no revisions"),
        ({"task": "politeness"}, ConfigError, "toxicity, sentiment-positive"),
        ({"model": None}, ConfigError, "no model to generate with"),
        ({"prompts": None}, DataError, "no prompt to complete"),
        ({"references": "human"}, DataError, r"no column 'human' \(their other columns: continuation, level\)"),
        ({"references": "level"}, DataError, "no text to compare with"),
        ({"mauve": True}, ConfigError, "Name --references and --evaluator too"),
        ({"evaluator": "nowhere"}, ModelError, "nowhere"),
        ({"scorers": ("toxicty",)}, ConfigError, "Did you mean 'toxicity'"),
        ({"max_completion_length": 109}, DataError, "tokens, but only"),
        ({"from_file": "nothing.jsonl"}, DataError, "There is no file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(files, tmp_path, more, kind, message):
    if more.get("model"):
        more = {**more, "model": str(files / more["model"])}
    with pytest.raises(kind, match=message) as caught:
        run(ask(files, tmp_path / "out", **more))
    assert isinstance(caught.value, QuarkError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(files, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "load_scorers", lambda *a: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file, and results need a folder"):
        run(ask(files, tmp_path / "file"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds notes.txt, which is no evaluation's"):
        run(ask(files, tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("kind", "named", "folder"),
    [
        ("evaluate", {"model": "owner/Qwen2.5-0.5B"}, "runs/evaluate-Qwen2.5-0.5B"),
        ("evaluate", {"model": "runs/a/model", "strengths": (2.0,)}, "runs/evaluate-a-strength2"),
        ("dial", {"model": "runs/a/checkpoint-5"}, "runs/dial-a"),
        ("evaluate", {"from_file": "runs/evaluate-Qwen2.5/completions.parquet"}, "runs/evaluate-Qwen2.5-again"),
        ("evaluate", {"from_file": "runs/evaluate-Qwen2.5"}, "runs/evaluate-Qwen2.5-again"),
        ("evaluate", {"from_file": "theirs.jsonl"}, "runs/evaluate-theirs-again"),
    ],
)
def test_the_default_folder_tells_what_is_measured(kind, named, folder):
    assert evaluate_command._default_folder(kind, Request(**named), None) == folder


def test_a_model_of_several_attributes_is_told_by_its_best_token():
    made = {"model": "m", "reward_tokens": list("abcdefghij"), "reward_attributes": ["a", "b"], "quantile": 4}
    assert tables._title({"made": {**made, "strengths": [1.0]}, "task": "t"}) == "t: m, best token"


def test_the_folder_of_a_training_run_is_left_alone(files, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl"):
        run(ask(files, tmp_path))


# Tasks


def test_a_task_brings_its_scorers_prompts_and_sampling(files, tmp_path, monkeypatch):
    from quark_lm import rewards

    asked = []

    def fake(spec, **options):
        if callable(spec):
            return spec
        asked.append(spec)
        return lambda completions, **kwargs: [0.5] * len(completions)

    monkeypatch.setattr(rewards, "load_reward", fake)
    request = Request(
        model=str(files / "base"), task="sentiment", num_prompts=2, num_generations=2, output_dir=str(tmp_path)
    )
    results, table = run(request)
    assert asked == ["sentiment", "sentiment-independent"]
    assert results["task"] == "sentiment-positive"
    assert [scorer["role"] for scorer in results["scorers"].values()] == ["reward", "independent"]
    assert results["made"]["prompts"] == "quark-lm sentiment (held out)"
    assert (results["made"]["top_p"], results["made"]["max_completion_length"]) == (0.9, 20)
    assert "% positive" in table
    assert "(independent)" in table
    assert max(map(len, table.splitlines()[1:])) <= 80


@pytest.mark.parametrize("name", TASKS)
def test_every_task_names_two_scorers_that_exist(name):
    from quark_lm.rewards import NAMED_REWARDS

    task = find_task(name)
    assert set(task.scorers) == {"reward", "independent"}
    assert {spec.partition("(")[0] for spec in task.scorers.values()} <= set(NAMED_REWARDS)
    assert task.prompts in DEMO_TASKS


def test_a_data_set_s_own_columns_may_be_of_any_kind(files, tmp_path):
    data = Dataset.from_dict({"prompt": ["the cat", "a"], "extra": [{"a": [1, 2]}, {"a": []}], "answer": [None, "x"]})
    data.to_parquet(tmp_path / "p.parquet")
    run(ask(files, tmp_path / "out", prompts=str(tmp_path / "p.parquet")))
    frame = pd.read_parquet(tmp_path / "out" / "completions.parquet")
    assert frame["column/answer"].fillna("none").tolist()[::3] == ["none", "x"]


# The command line


def test_the_command_prints_a_table_or_json(files, tmp_path, capsys):
    from quark_lm.cli import main

    line = ["evaluate", str(files / "text"), "--prompts", str(files / "prompts.jsonl"), "--num-generations", "2"]
    line += [
        "--max-completion-length",
        "4",
        "--scorer",
        f"{files / 'rewards.py'}:vowels",
        "--output-dir",
        str(tmp_path),
    ]
    assert main(line) == 0
    assert "mean score" in capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results["counts"]["completions"] == 12
    assert sorted(results["command"].split()) == sorted(["quark", *line])
    assert "mean score" in captured.err
    assert main([*line, "--strength", "nan"]) == 2
    assert "not a finite number" in capsys.readouterr().err
    assert main([*line, "--attribute", "tone", "--strength", "2"]) == 2
    assert "it has one dial alone" in capsys.readouterr().err
    assert main([*line, "--from-token", "none"]) == 2
    assert "strength 1 turns none" in capsys.readouterr().err
    assert main([*line, "--num-beams", "2", "--temperature", "0.7"]) == 2
    assert "num_beams=2 takes the likeliest beam and draws nothing, so temperature" in capsys.readouterr().err
    beams = [*line[:-1], str(tmp_path / "beams"), "--num-beams", "2", "--strength", "2", "--from-token", "none"]
    assert main([*beams, "--num-generations", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["made"]
    assert [made[name] for name in ("num_beams", "strengths", "from_token")] == [2, [2.0], "none"]
    again = ["evaluate", "--from", str(tmp_path / "completions.parquet"), "--scorer", "repetition"]
    assert main([*again, "--output-dir", str(tmp_path / "again")]) == 0


def test_the_dial_is_a_command(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from quark_lm.cli import main

    line = ["dial", str(files / "text"), "--prompts", str(files / "prompts.jsonl"), "--max-completion-length", "4"]
    line += ["--strength", "0", "--strength", "1.5", "--scorer", f"{files / 'rewards.py'}:vowels"]
    assert main([*line, "--output-dir", str(tmp_path), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [point["strength"] for point in results["curve"]] == [0.0, 1.5]
    assert results["curve"][0]["counts"]["completions_per_prompt"] == [4, 4]
    line[1] = str(files / "base")
    assert main([*line, "--output-dir", str(tmp_path / "b")]) == 2
    assert "was not trained by Quark" in capsys.readouterr().err
