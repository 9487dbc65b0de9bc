"""Every recipe is a run that `quark train` takes, and its prompts can be made."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from quark_lm import demo
from quark_lm.config import PRESETS, QuarkConfig
from quark_lm.evaluation.tasks import TASKS
from quark_lm.rewards import NAMED_REWARDS, _split_options
from quark_lm.train_command import TrainArguments, read_settings

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))
OF_DEMO = {"sentiment-positive": "sentiment", "toxicity": "toxicity", "repetition": "repetition"}

spec = importlib.util.spec_from_file_location("make_prompts", RECIPES / "make_prompts.py")
make_prompts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_prompts)


TWO = "sentiment-and-toxicity.yaml"


def test_there_are_four_recipes_in_both_forms_and_one_of_two_attributes():
    assert sorted(FILES) == sorted([TWO, *(f"{form}{task}.yaml" for form in ("", "paper/") for task in TASKS)])


def test_the_recipe_of_two_attributes_has_the_tags_of_its_two_tasks():
    own, named = read_settings(RECIPES / TWO, [])
    tasks = [demo.TASKS[name] for name in named["reward_attributes"]]
    assert named["reward_token_texts"] == [tag for task in tasks for tag in task.tags]
    assert own["reward_funcs"] == [task.reward for task in tasks]
    assert own["eval_reward_funcs"] == [task.independent for task in tasks]


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_read_and_makes_a_config(tmp_path, name):
    own, named = read_settings(RECIPES / name, [])
    settings = TrainArguments(**own)
    args = QuarkConfig(**{**named, "output_dir": str(tmp_path)})
    assert settings.model_name_or_path == ("gpt2-large" if name.startswith("paper/") else "smollm2")
    assert settings.prompts
    assert settings.eval_prompts
    for scorer in (*settings.reward_funcs, *settings.eval_reward_funcs):
        reward, _ = _split_options(scorer, {})
        assert reward in NAMED_REWARDS
    assert settings.reward_funcs != settings.eval_reward_funcs  # who judges did not teach
    if name.startswith("paper/"):
        assert args.preset == "paper"
        assert args.reward_token_style == PRESETS["paper"]["reward_token_style"]
        assert args.per_device_train_batch_size == 128
        assert "Not run here" in (RECIPES / name).read_text()


@pytest.mark.parametrize("name", OF_DEMO)
def test_a_recipe_for_the_packaged_model_has_the_demo_s_settings(name):
    own, named = read_settings(RECIPES / f"{name}.yaml", [])
    task = demo.TASKS[OF_DEMO[name]]
    expected = {**demo.BUDGET, **task.settings, "reward_token_texts": list(task.tags), "seed": 0}
    assert {key: named[key] for key in expected} == expected
    assert set(named) - set(expected) == {"output_dir"}
    assert own["reward_funcs"] == [task.reward]
    assert own["eval_reward_funcs"] == [task.independent]
    lora = {key: own[key] for key in ("lora_r", "lora_alpha")}
    assert lora == {"lora_r": demo._LORA["r"], "lora_alpha": demo._LORA["lora_alpha"]}


def test_the_negative_recipe_is_the_positive_one_turned_round():
    (own, named), (other, turned) = (
        read_settings(RECIPES / f"sentiment-{w}.yaml", []) for w in ("positive", "negative")
    )
    assert named["reward_token_texts"] == turned["reward_token_texts"][::-1]
    different = {"reward_token_texts", "output_dir"}
    assert {k: v for k, v in named.items() if k not in different} == {
        k: v for k, v in turned.items() if k not in different
    }
    assert other["reward_funcs"] == ["sentiment(label=negative)"]
    assert own["prompts"] == other["prompts"]


def test_the_demo_s_prompts_are_written_in_two_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_prompts.py", "demo", "--folder", str(tmp_path)])
    make_prompts.main()
    for task in demo.TASKS:
        parts = []
        for part in ("train", "held-out"):
            lines = (tmp_path / f"{task}-{part}.jsonl").read_text().splitlines()
            parts.append({json.loads(line)["prompt"] for line in lines})
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == set(demo.demo_prompts(task)["prompt"])
    for name in FILES:  # the recipes for the packaged model name these files
        own, _ = read_settings(RECIPES / name, [])
        if not name.startswith("paper/"):
            assert (tmp_path / Path(own["prompts"]).name).is_file()
            assert (tmp_path / Path(own["eval_prompts"]).name).is_file()


def test_published_records_become_prompts(tmp_path, capsys):
    record = {"prompt": {"text": "The cat", "toxicity": 0.25}, "continuation": {"text": " sat.", "toxicity": 0.1}}
    rows = list(make_prompts.realtoxicityprompts([record]))
    assert rows == [{"prompt": "The cat", "toxicity": 0.25, "continuation": " sat."}]
    text = "Short one. This sentence has exactly ten words in it, quite honestly. It was."
    rows = list(make_prompts.openwebtext([{"text": text}]))
    assert rows == [{"prompt": "This sentence has exactly ten", "continuation": "words in it, quite honestly."}]
    lines = [{"text": " = Heading = "}, {"text": "ab"}, {"text": "abcdefghijklmnop" * 4}]
    (row,) = make_prompts.wikitext(lines, tiny_tokenizer(), prefix=3, after=5)
    assert lines[2]["text"].startswith(row["prompt"] + row["continuation"])
    make_prompts.write(
        "x", [{"prompt": str(n)} for n in range(9)], tmp_path, lambda row: int(row["prompt"]) % 3 == 0, 2
    )
    assert len((tmp_path / "x-train.jsonl").read_text().splitlines()) == 6
    assert len((tmp_path / "x-held-out.jsonl").read_text().splitlines()) == 2
