"""`quark compare`: the differences of two evaluations of tiny models, prompt by prompt, and one line for bad input."""

import json
import shutil
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_evaluate import write_lines
from test_evaluate_command import ask, files, quiet_libraries, run  # noqa: F401 (fixtures)

from quark_lm.cli import main
from quark_lm.compare_command import compare
from quark_lm.errors import ConfigError, DataError
from quark_lm.evaluation.completions import read_completions


def compared(base, other, width=200, **more) -> tuple[dict, str]:
    out = StringIO()
    return compare(str(base), str(other), console=Console(file=out, width=width), **more), out.getvalue()


@pytest.fixture(scope="module")
def two(files):  # noqa: F811
    """Folders of one evaluation of the base model, and of one of the trained one."""
    folders = []
    for model in ("base", "text"):
        folders.append(files / f"two-{model}")
        more = {"task": "toxicity", "evaluator": str(files / "base")}
        run(ask(files, folders[-1], model=str(files / model), **more))
    return folders


def test_differences_are_those_of_the_prompts(two):
    results, table = compared(*two)
    assert (results["prompts"], results["left_out"]) == (6, 0)
    sets = [read_completions(folder) for folder in two]
    by_prompt = [np.array([np.nanmean(one.scores["vowels"][g]) for g in one.groups()]) for one in sets]
    found = results["scores"]["vowels"]["mean"]
    assert found["base"] == pytest.approx(by_prompt[0].mean())
    assert found["other"] == pytest.approx(by_prompt[1].mean())
    assert found["difference"]["mean"] == pytest.approx((by_prompt[1] - by_prompt[0]).mean())
    assert found["difference"]["low"] <= found["difference"]["mean"] <= found["difference"]["high"]
    whole = [json.loads((folder / "results.json").read_text()) for folder in two]
    for key in ("wanted", "average_maximum_toxicity", "toxicity_probability"):
        for name, one in zip(("base", "other"), whole, strict=True):
            assert results["scores"]["vowels"][key][name] == pytest.approx(one["scores"]["vowels"][key]["mean"])
    for name, one in zip(("base", "other"), whole, strict=True):
        assert results["perplexity"][name] == pytest.approx(one["perplexity"]["corpus"]["mean"])
        for key in ("dist_2", "dist_3", "diversity"):
            assert results["text"][key][name] == pytest.approx(one["text"][key]["mean"])
    ratio = results["perplexity"]["difference"]
    assert ratio["mean"] == pytest.approx(results["perplexity"]["other"] / results["perplexity"]["base"])
    assert ratio["low"] <= ratio["mean"] <= ratio["high"]
    assert results["text"]["tokens"]["base"] == pytest.approx(whole[0]["text"]["tokens"]["mean"])
    assert compared(*two, width=80)[1].splitlines()[2:] == table.splitlines()[2:]  # no cell is wrapped
    for word in ("vowels", "toxicity probability", "perplexity (a ratio)", "diversity within"):
        assert word in table


def test_an_evaluation_does_not_differ_from_itself(two):
    results, _ = compared(two[0], two[0] / "results.json")
    for figures in [*results["scores"].values(), results["text"]]:
        for figure in figures.values():
            difference = figure["difference"]
            if figure["base"] is not None:
                assert [difference[end] for end in ("mean", "low", "high", "p_value")] == [0.0, 0.0, 0.0, 1.0]
    assert results["perplexity"]["difference"]["mean"] == 1.0
    assert results["notes"] == ["Only 6 prompts: the intervals are over prompts, and say little of so few."]


def test_prompts_of_one_alone_are_left_out_and_what_does_not_compare_is_told(two, files, tmp_path):  # noqa: F811
    rows = [json.loads(line) for line in (files / "prompts.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "p.jsonl", [rows[3], rows[1], {"prompt": "a dog", "continuation": "runs", "level": 7}])
    more = {"prompts": str(tmp_path / "p.jsonl"), "num_generations": 2, "temperature": 0.5}
    more |= {"scorers": (f"{files / 'rewards.py'}:vowels",), "evaluator": str(files / "other")}
    run(ask(files, tmp_path / "out", **more))
    results, table = compared(two[0], tmp_path / "out")
    assert (results["prompts"], results["left_out"]) == (2, 5)
    base = read_completions(two[0])
    expected = [np.nanmean(base.scores["vowels"][base.groups()[at]]) for at in (1, 3)]
    assert results["scores"]["vowels"]["mean"]["base"] == pytest.approx(np.mean(expected))
    assert "consonants" not in results["scores"]
    assert "perplexity" not in results
    told = " ".join(table.split())
    for word in (
        "5 prompts that only one of the two has are left out",
        "not sampled alike: temperature is 1.0 and 0.5",
        "different numbers of completions",
        "Only 2 prompts",
        "perplexities do not compare, for their evaluators have weights",
    ):
        assert word in told


def changed(folder, copy, change):
    """A copy of an evaluation whose results somebody changed."""
    shutil.copytree(folder, copy)
    results = json.loads((copy / "results.json").read_text())
    change(results)
    (copy / "results.json").write_text(json.dumps(results))
    return copy


def test_a_scorer_of_another_version_is_not_compared(two, tmp_path):
    def change(results):
        for facts in results["scorers"].values():
            facts["version"] = "another"

    found, table = compared(two[0], changed(two[1], tmp_path / "old", change))
    assert found["scores"] == {}
    assert "vowels is of another version in the second" in " ".join(table.split())
    assert "only the text's figures compare" in " ".join(table.split())


def test_thresholds_versions_and_sampling_that_are_not_told_are_notes(two, tmp_path):
    def unknown(results):
        results["scorers"]["vowels"]["version"] = None
        results["scores"]["consonants"]["threshold"] = 0.25
        results["made"] = {"file": "theirs.jsonl"}

    found, table = compared(changed(two[0], tmp_path / "a", unknown), changed(two[1], tmp_path / "b", unknown))
    assert "vowels tells no version" in table
    assert table.count("does not say how its completions were sampled") == 2
    assert "not sampled alike" not in table
    found, table = compared(two[0], changed(two[1], tmp_path / "c", lambda results: unknown(results)))
    assert "consonants has a threshold of 0.5 and of 0.25: % wanted is left out" in table
    assert list(found["scores"]["consonants"]) == ["mean"]


def test_toxicity_is_compared_only_where_both_measured_it(two, tmp_path):
    def plain(results):
        for figures in results["scores"].values():
            del figures["toxicity_probability"], figures["average_maximum_toxicity"]

    other = changed(two[1], tmp_path / "plain", plain)
    for pair in ((two[0], other), (other, two[0])):
        assert list(compared(*pair)[0]["scores"]["vowels"]) == ["mean", "wanted"]


def test_base_and_other_are_means_over_the_prompts_that_have_both(two, tmp_path):
    shutil.copytree(two[1], tmp_path / "gone")
    completions = read_completions(tmp_path / "gone")
    completions.scores["vowels"][completions.groups()[0]] = np.nan
    completions.write(tmp_path / "gone" / "completions.parquet")
    found = compared(two[0], tmp_path / "gone")[0]["scores"]["vowels"]["mean"]
    assert found["prompts"] == 5
    assert found["other"] - found["base"] == pytest.approx(found["difference"]["mean"])


@pytest.mark.parametrize(
    "change",
    [
        lambda results: results.update(scorers={"vowels": 1}),
        lambda results: results.update(scores={}),
        lambda results: results["scores"].update(vowels=None),
        lambda results: results["scores"]["vowels"].update(threshold="0.5"),
        lambda results: results.update(evaluator=[1]),
    ],
)
def test_results_that_somebody_changed_are_one_clear_line(change, two, tmp_path):
    folders = [changed(folder, tmp_path / folder.name, change) for folder in two]
    with pytest.raises(DataError, match="do not go together") as caught:
        compared(*folders)
    assert "\n" not in str(caught.value)


def test_completions_without_our_metadata_are_one_clear_line(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "pandas")
    table = pd.read_parquet(two[0] / "completions.parquet")
    table.to_parquet(tmp_path / "pandas" / "completions.parquet")
    with pytest.raises(DataError, match="do not go together"):
        compared(tmp_path / "pandas", two[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no results.json"),
        ("{", "is damaged"),
        ("[]", "is damaged .it holds a list"),
        ('{"systems": []}', "is no `quark evaluate`'s .name: None"),
        ('{"name": "dial"}', "is no `quark evaluate`'s .name: dial"),
        ('{"name": "evaluate", "scorers": {}, "scores": 3}', "is no `quark evaluate`'s"),
    ],
)
def test_a_folder_that_is_no_evaluation_is_one_clear_line(content, message, two, tmp_path):
    (tmp_path / "completions.parquet").touch()
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        compared(two[0], tmp_path)
    assert "\n" not in str(caught.value)


def test_no_prompt_in_common_is_refused(two, files, tmp_path):  # noqa: F811
    write_lines(tmp_path / "p.jsonl", [{"prompt": "a dog"}])
    run(ask(files, tmp_path / "out", prompts=str(tmp_path / "p.jsonl")))
    with pytest.raises(DataError, match="no prompt in common"):
        compared(two[0], tmp_path / "out")


def test_the_command_prints_a_table_or_json(two, capsys):
    line = ["compare", *map(str, two)]
    assert main(line) == 0
    assert "difference" in capsys.readouterr().out
    assert main([*line, "--json", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["seed"] == 3
    assert "difference" in captured.err
    assert main(["compare", "nowhere", str(two[0])]) == 2
    assert "There is no folder nowhere" in capsys.readouterr().err
