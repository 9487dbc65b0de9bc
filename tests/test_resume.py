"""A run that is stopped anywhere and started again is the run that was never stopped: pool, metrics and weights."""

import contextlib
import functools
import json
import multiprocessing
import shutil
import signal
import types
import warnings

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import PROMPTS, graded, lora, make, metrics, stopped_at
from tiny import tiny_gpt2, tiny_llama
from transformers import TrainerCallback

import quark_lm.exploring as exploring
import quark_lm.measuring as measuring
import quark_lm.run_folder as run_folder
import quark_lm.trainer as trainer_module
from quark_lm import Pool, QuarkConfig, QuarkTrainer
from quark_lm.errors import ConfigError, RewardError
from quark_lm.generation.hf import HFCompleter
from quark_lm.pool import PartialRound
from quark_lm.rewards.text_reward import TextReward
from quark_lm.run_folder import MARKER, last_checkpoint, locked, what_is_wrong

# three steps teach the tokens nothing
pytestmark = pytest.mark.filterwarnings("ignore:The reward tokens")

# Figures that depend on the clock.
CLOCK = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
EVAL = {"eval_dataset": Dataset.from_dict({"prompt": ["a dog", "the sun", "one"]})}
SETTINGS = {
    "save_strategy": "epoch",
    "heldout_share": 0.3,
    "num_generations": 4,
    "steps_per_round": 3,
    "logging_steps": 2,
    "generation_batch_size": 8,
    "disable_dropout": False,
}


def run(folder, **given):
    return make(folder, model=tiny_gpt2(), given={**EVAL, **given}, **SETTINGS)


def told(folder):
    """metrics.jsonl without what the clock tells, the samples, and the last checkpoint's weights and optimizer."""
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in metrics(folder)]
    checkpoint, _ = last_checkpoint(folder)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return lines, Pool.open(folder).to_table().to_pylist(), load_file(checkpoint / "model.safetensors"), optimizer


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder).train()
    return told(folder)


def raises_at(where, count, monkeypatch, number=signal.SIGINT):
    """A signal as the named thing happens for the count-th time."""
    target, name = {
        "a generation batch": (HFCompleter, "_complete_batch"),
        "a chunk's scores": (exploring, "score"),
        "a batch that is kept": (PartialRound, "_add"),
    }[where]
    original, calls = getattr(target, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, counted)


# 12 prompts x 4 samples in batches of 8, guided in round 1 (two rows a sample); three held-out prompts twice
@pytest.mark.parametrize(
    ("where", "count"),
    [
        *(("a generation batch", n) for n in (1, 4, 7, 9, 14)),
        ("a chunk's scores", 1),
        ("a batch that is kept", 3),
        ("a batch that is kept", 9),
    ],
)
def test_a_stop_while_sampling_or_scoring_loses_nothing(where, count, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raises_at(where, count, patch)
        with pytest.raises(KeyboardInterrupt, match="stopped "):
            run(tmp_path).train()
    run(tmp_path).train()
    assert equal(told(tmp_path), whole)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
def test_a_stop_while_learning_loses_nothing_not_even_the_figures(step, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of 6, which is saved"):
        run(tmp_path, callbacks=[stopped_at(step)]).train()
    run(tmp_path).train()
    assert equal(told(tmp_path), whole)


def test_a_stop_while_learning_leaves_no_figures_where_they_are_told_once_a_round(tmp_path):
    once = {"logging_strategy": "epoch"}
    make(tmp_path / "whole", model=tiny_gpt2(), given=EVAL, **{**SETTINGS, **once}).train()
    stops = {**EVAL, "callbacks": [stopped_at(5)]}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", model=tiny_gpt2(), given=stops, **{**SETTINGS, **once}).train()
    make(tmp_path / "run", model=tiny_gpt2(), given=EVAL, **{**SETTINGS, **once}).train()
    assert equal(told(tmp_path / "run"), told(tmp_path / "whole"))


@pytest.mark.parametrize("round", [0, 1])
def test_a_stop_while_held_out_prompts_are_completed_keeps_the_rounds_learning(round, whole, tmp_path, monkeypatch):
    original, calls = HFCompleter.complete, []

    def complete(self, prompts, *args, **kwargs):
        if len(prompts) == 6:  # the held-out ones
            calls.append(1)
            if len(calls) == round + 2:  # the first is the base's
                signal.raise_signal(signal.SIGTERM)
        return original(self, prompts, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HFCompleter, "complete", complete)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path).train()
    assert last_checkpoint(tmp_path)[0].name == f"checkpoint-{3 * round + 3}"
    run(tmp_path).train()
    assert equal(told(tmp_path), whole)


def ends_with(folder, **settings):
    """(lines of metrics.jsonl, pool, weights) of a run that is trained to its end, whatever it saves."""
    trainer = make(folder, model=tiny_gpt2(), given=EVAL, **{**SETTINGS, **settings})
    trainer.train()
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in metrics(folder)]
    return lines, Pool.open(folder).to_table().to_pylist(), dict(trainer.model.state_dict())


@pytest.mark.parametrize("settings", [{"save_strategy": "steps", "save_steps": 500}, {"save_strategy": "no"}])
@pytest.mark.parametrize("fails", [False, True])
def test_what_stops_a_later_round_s_exploring_loses_no_step_before_it(settings, fails, tmp_path, monkeypatch):
    expected = ends_with(tmp_path / "whole", **settings)
    original, calls = exploring.score, []

    def score(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the held-out prompts of the base, round 1, the held-out prompts, round 2
            if fails:
                raise RewardError("the scorer is gone")
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(exploring, "score", score)
        with pytest.raises(RewardError if fails else KeyboardInterrupt):
            ends_with(tmp_path / "run", **settings)
    assert last_checkpoint(tmp_path / "run")[0].name == "checkpoint-3"
    assert equal(ends_with(tmp_path / "run", **settings), expected)


def test_a_stop_while_trainer_evaluates_within_a_round_loses_no_step(tmp_path, monkeypatch):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    expected = ends_with(tmp_path / "whole", **settings)
    original, calls = HFCompleter.complete, []

    def complete(self, prompts, *args, **kwargs):
        if len(prompts) == 6:  # the held-out ones
            calls.append(1)
            if len(calls) == 2:  # the first is the base's
                signal.raise_signal(signal.SIGINT)
        return original(self, prompts, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HFCompleter, "complete", complete)
        with pytest.raises(KeyboardInterrupt):
            ends_with(tmp_path / "run", **settings)
    assert last_checkpoint(tmp_path / "run")[0].name == "checkpoint-2"
    found = ends_with(tmp_path / "run", **settings)
    assert equal(found[1:], expected[1:])


def test_to_begin_anew_in_a_folder_with_samples_is_refused(tmp_path):
    make(tmp_path).train()
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=False begins anew, but .* holds a run's samples"):
        make(tmp_path).train(resume_from_checkpoint=False)


@pytest.mark.filterwarnings("ignore:.*distinct rewards:quark_lm.quantiles.FewQuantilesWarning")
def test_a_model_that_learned_all_that_the_reward_tells_goes_on(tmp_path):
    def solved(completions, trainer_state, **kwargs):
        return graded(completions) if trainer_state.global_step == 0 else [1.0] * len(completions)

    trainer = make(tmp_path, solved, pool_window=1)
    trainer.train()
    assert trainer.state.global_step == 4
    assert set(trainer.quantize().tolist()) == {-1, trainer.reward_tokens.best}


def test_a_sample_that_was_kept_is_not_sampled_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raises_at("a generation batch", 5, patch)  # the first is the base's, of held-out prompts
        with pytest.raises(KeyboardInterrupt, match=r"during round 1 explore; 32 of 48 samples are kept"):
            run(tmp_path).train()
    batches = []
    original = HFCompleter._complete_batch

    def counted(self, batch, *args):
        batches.append(batch)
        return original(self, batch, *args)

    monkeypatch.setattr(HFCompleter, "_complete_batch", counted)
    run(tmp_path).explore(0)
    assert list(map(len, batches)) == [8, 8]
    assert not list((tmp_path / "pool").glob("*.partial*"))


@pytest.mark.filterwarnings("ignore:.*is damaged. it is made again")
@pytest.mark.parametrize("damage", ["torn", "garbage", "other key", "empty"])
def test_what_was_kept_and_is_damaged_is_sampled_again(damage, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raises_at("a generation batch", 4, patch)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path).train()
    (path,) = (tmp_path / "pool").glob("*.partial.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        {
            "torn": "".join(lines)[:-30],
            "garbage": lines[0] + lines[1] + "\0\0{]\n" + lines[3],
            "other key": lines[0].replace("48", "49") + "".join(lines[1:]),
            "empty": "",
        }[damage]
    )
    run(tmp_path).train()
    assert equal(told(tmp_path), whole)


def test_a_reward_that_fails_costs_none_of_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(exploring, "_REWARD_ROWS", 16)
    calls = []

    def graded_until_it_fails(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            raise ConnectionError("rate limit")
        return graded(completions)

    settings = {**SETTINGS, "reward_retries": 0}
    with pytest.raises(RewardError, match="rate limit"):
        make(tmp_path, graded_until_it_fails, **settings).train()
    make(tmp_path, graded_until_it_fails, **settings).explore(0)
    assert calls == [16, 16, 16, 16]  # the first chunk is not scored again
    assert Pool.open(tmp_path).num_rounds == 1


def fails_for(share):
    """A reward that fails for good on its first calls, `share` of the chunks."""

    def sometimes(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) <= share * 3:
            raise ConnectionError("the server is gone")
        return graded(completions)

    calls = []
    return sometimes


def test_a_few_rewards_may_fail_and_their_samples_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(exploring, "_REWARD_ROWS", 16)
    settings = {**SETTINGS, "reward_retries": 0, "max_failed_rewards": 0.4}
    trainer = make(tmp_path, fails_for(1 / 3), **settings)
    with (
        pytest.warns(
            UserWarning,
            match=r"failed for 16 of 48 completions of round 1 \(sometimes: ConnectionError: the server is gone\)",
        ),
        pytest.warns(UserWarning, match="dropped 16 of 48"),
    ):
        trainer.explore(0)
    assert trainer.pool.to_table().column("reward").null_count == 16


def test_more_that_fail_stop_the_run_and_are_asked_again_when_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(exploring, "_REWARD_ROWS", 16)
    settings = {**SETTINGS, "reward_retries": 0, "max_failed_rewards": 0.4}
    trainer = make(tmp_path, fails_for(2 / 3), **settings)
    with pytest.raises(RewardError, match=r"sometimes failed \(ConnectionError.*left 32 of 48.*max_failed_rewards=0.4"):
        trainer.explore(0)
    again = make(tmp_path, fails_for(0), **settings)
    again.explore(0)
    assert again.pool.to_table().column("reward").null_count == 0


def test_a_finished_run_that_is_started_again_changes_no_file(tmp_path, capsys):
    run(tmp_path).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    again = run(tmp_path)
    again.train()
    assert "is finished: checkpoint-6 holds step 6 of 6" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path for path in after if before.get(path) != after[path]} <= {tmp_path / "environment.json"}
    assert again.state.global_step == 6


def test_a_run_that_goes_on_says_so(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[stopped_at(4)]).train()
    capsys.readouterr()
    run(tmp_path).train()
    assert "goes on in round 2: checkpoint-4 holds step 4 of 6" in capsys.readouterr().err


def test_a_run_may_be_made_longer(tmp_path):
    make(tmp_path, save_strategy="epoch").train()
    longer = make(tmp_path, save_strategy="epoch", num_rounds=3)
    longer.train()
    assert longer.state.global_step == 6
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    straight = make(tmp_path / "straight", save_strategy="epoch", num_rounds=3)
    straight.train()
    for key, weight in straight.model.state_dict().items():
        assert torch.equal(weight, longer.model.state_dict()[key]), key


def test_a_run_whose_learning_rate_ends_with_it_may_not(tmp_path):
    make(tmp_path, save_strategy="epoch", lr_scheduler_type="linear").train()
    with pytest.raises(ConfigError, match="num_rounds: 2 there, 3 here"):
        make(tmp_path, save_strategy="epoch", lr_scheduler_type="linear", num_rounds=3).train()


def test_a_setting_that_another_version_did_not_know_is_no_difference(tmp_path):
    make(tmp_path, save_strategy="epoch").train()
    path = tmp_path / "run.json"
    identity = json.loads(path.read_text())
    identity["of_another_version"] = identity.pop("entropy_coef")
    path.write_text(json.dumps(identity))
    before = metrics(tmp_path)
    make(tmp_path, save_strategy="epoch").train()
    assert metrics(tmp_path) == before
    identity["seed"] += 1  # what both know is one
    path.write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match="holds another run"):
        make(tmp_path, save_strategy="epoch").train()


def test_a_first_attempt_that_failed_gives_its_folder_away(tmp_path, monkeypatch):
    def constant(completions, **kwargs):
        return [0.5 for _ in completions]

    with pytest.raises(RewardError):
        make(tmp_path, constant).train()
    (journal,) = (tmp_path / "pool").glob("*.partial.jsonl")
    assert '"rewards"' not in journal.read_text()
    lines = list(map(json.loads, journal.read_text().splitlines()))
    kept = [ids for line in lines for ids in line.get("completions", ())]
    with pytest.raises(ConfigError, match=r"temperature: 1.0 there, 0.5 here"):
        make(tmp_path, graded, temperature=0.5).train()  # its samples may still be of use
    with monkeypatch.context() as patch:  # what would draw the same ones takes them over
        patch.setattr(HFCompleter, "_complete_batch", lambda *args: pytest.fail("sampled again"))
        make(tmp_path, graded, beta=0.2).explore(0)
    assert json.loads((tmp_path / "run.json").read_text())["reward_funcs"] == ["graded"]
    pool = Pool.open(tmp_path)
    assert pool.rewards[0] != 0.5
    assert sorted(pool.to_table()["completion_ids"].to_pylist()) == sorted(kept)


def test_a_first_attempt_without_a_sample_gives_its_folder_away(tmp_path):
    make(tmp_path, temperature=0.5).open_pool()
    PartialRound(tmp_path / "pool", 0, 0, {"rows": 1})
    make(tmp_path, seed=9).explore(0)
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 9


@pytest.mark.filterwarnings("ignore:32 samples that were kept of round 1 are scored again")
def test_another_reward_batch_size_samples_nothing_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raises_at("a chunk's scores", 2, patch)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, model=tiny_gpt2(), **SETTINGS, reward_batch_size=16).train()
    sampled = []
    monkeypatch.setattr(HFCompleter, "_complete_batch", lambda self, batch, *args: sampled.append(batch))
    make(tmp_path, model=tiny_gpt2(), **SETTINGS, reward_batch_size=32).explore(0)
    assert not sampled
    assert Pool.open(tmp_path).num_rounds == 1


def test_what_a_kill_left_beside_a_round_that_is_there_is_removed(tmp_path):
    trainer = make(tmp_path)
    trainer.explore(0)
    for rank in (0, 1):  # of a part with more processes
        PartialRound(tmp_path / "pool", 0, rank, {"rows": 1})
    trainer.explore(0)
    assert not list((tmp_path / "pool").glob("*.partial*"))


def test_another_scorer_of_the_same_name_is_another_run(tmp_path):
    pool = make(tmp_path, "http://127.0.0.1:9/a/score").open_pool()
    pool.append(0, {"completion_ids": [[5]], "reward": [0.5]})
    with pytest.raises(ConfigError, match=r"scorers: \['http /a/score unpinned'\] there, .*/b/score"):
        make(tmp_path, "http://127.0.0.1:9/b/score").open_pool()
    make(tmp_path, "http://127.0.0.2:10/a/score").open_pool()  # the server has moved
    path = tmp_path / "run.json"  # as an older version wrote it
    new = ("scorers", "eval_scorers", "revision", "neftune_noise_alpha")
    identity = {key: value for key, value in json.loads(path.read_text()).items() if key not in new}
    path.write_text(json.dumps(identity))
    make(tmp_path, "http://127.0.0.1:9/b/score").open_pool()


def test_a_reward_function_that_is_written_otherwise_is_told_of(tmp_path):
    def vowels(completions, **kwargs):
        return graded(completions)

    def others(completions, **kwargs):
        return [1 - value for value in graded(completions)]

    others.__name__, others.__qualname__ = "vowels", vowels.__qualname__
    make(tmp_path, others).open_pool()  # nothing is scored yet
    make(tmp_path, vowels).explore(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, vowels).open_pool()
    with pytest.warns(UserWarning, match="vowels is written otherwise, or given other values, than when the run in"):
        make(tmp_path, others).open_pool()


def test_a_reward_that_was_mended_within_the_first_round_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(exploring, "_REWARD_ROWS", 16)
    settings = {**SETTINGS, "reward_retries": 0}
    first, mended = failing_at(2, "mine"), fails_for(0)
    mended.__name__, mended.__qualname__ = "mine", first.__qualname__
    with pytest.raises(RewardError, match="gone"):
        make(tmp_path, first, **settings).explore(0)
    with pytest.warns(UserWarning, match="mine is written otherwise.*keep the rewards that they got"):
        make(tmp_path, mended, **settings).explore(0)


def test_other_values_in_a_partial_are_told_of(tmp_path):
    def longest(completions, most, **kwargs):
        return [min(len(text), most) + value for text, value in zip(completions, graded(completions), strict=True)]

    make(tmp_path, functools.partial(longest, most=3)).explore(0)
    with pytest.warns(UserWarning, match="longest is written otherwise, or given other values"):
        make(tmp_path, functools.partial(longest, most=4)).open_pool()


def test_a_later_round_of_which_no_sample_has_a_reward_keeps_the_learning_before_it(tmp_path):
    def silent(completions, trainer_state, **kwargs):
        return [None] * len(completions) if trainer_state.global_step else graded(completions)

    with pytest.raises(RewardError, match="gave None for all"):
        make(tmp_path, silent, **{**SETTINGS, "save_strategy": "no"}).train()
    assert last_checkpoint(tmp_path)[0].name == "checkpoint-3"


def test_only_a_share_of_the_whole_round_stops_it(tmp_path, monkeypatch):
    monkeypatch.setattr(exploring, "_REWARD_ROWS", 16)
    trainer = make(tmp_path, fails_for(2 / 3), **{**SETTINGS, "reward_retries": 0, "max_failed_rewards": 0.4})
    original = exploring._scored
    # as if another process had as many samples, of which none fails
    monkeypatch.setattr(exploring, "_scored", lambda *given: original(*given[:-1], 2 * given[-1]))
    with (
        pytest.warns(UserWarning, match="failed for 32 of 96 completions"),
        pytest.warns(UserWarning, match="dropped 32 of 48"),
    ):
        trainer.explore(0)


def test_what_changes_the_weights_makes_another_run(tmp_path):
    make(tmp_path).explore(0)
    with pytest.raises(ConfigError, match=r"neftune_noise_alpha: None there, 5\.0 here"):
        make(tmp_path, neftune_noise_alpha=5.0).open_pool()
    other = make(tmp_path)
    other.args.model_init_kwargs = {"revision": "abc"}  # as of a model that is given by its name
    with pytest.raises(ConfigError, match="revision: None there, 'abc' here"):
        other.open_pool()


def worse_each_round(completions, trainer_state, **kwargs):
    return [value - trainer_state.global_step for value in graded(completions)]


@pytest.mark.parametrize("stop", [None, 4])
def test_a_round_that_found_nothing_new_is_the_last_also_when_the_run_was_stopped(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_EARLY_STOP_ROWS", 2)  # these rounds are small
    settings = {"save_strategy": "epoch", "num_rounds": 4}
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, worse_each_round, given={"callbacks": [stopped_at(stop)]}, **settings).train()
    trainer = make(tmp_path, worse_each_round, **settings)
    trainer.train()
    assert (trainer.state.global_step, trainer.pool.num_rounds) == (4, 2)
    again = make(tmp_path, worse_each_round, **settings)
    again.train()
    assert (again.state.global_step, again.pool.num_rounds) == (4, 2)
    on = make(tmp_path / "on", worse_each_round, early_stop=False, **settings)
    on.train()
    assert on.state.global_step == 8
    after_all = make(tmp_path, worse_each_round, early_stop=False, **settings)
    after_all.train()
    assert after_all.state.global_step == 8
    monkeypatch.setattr(trainer_module, "_EARLY_STOP_ROWS", 10)
    on = make(tmp_path / "small", worse_each_round, **settings)
    on.train()
    assert on.state.global_step == 8  # so few samples may miss the best by chance


OTHER_RUNS = {
    "another adapter": ({}, {"peft_config": lora(lora_alpha=64)}, r"adapter: .*'lora_alpha': 8.*'lora_alpha': 64"),
    "other held-out prompts": (
        {},
        {"eval_dataset": Dataset.from_dict({"prompt": ["a bird"]})},
        "eval_prompts: '3, crc",
    ),
    "other held-out scorers": ({}, {"eval_reward_funcs": [worse_each_round]}, "eval_reward_funcs: .*worse_each_round"),
    "other scored data": (
        {},
        {
            "initial_pool": Dataset.from_dict(
                {"prompt": ["a"] * 9, "completion": list("abcdefghi"), "reward": [0.5] * 9}
            )
        },
        "initial_pool: None there",
    ),
    "another token to explore with": (
        {"explore_token": "random", "draw": "all"},
        {},
        "explore_token: 'best' there, 'random'",
    ),
    "weights of another dtype": ({"model": tiny_llama().to(torch.bfloat16)}, {}, "dtype: 'float32' there, 'bfloat16'"),
}


def test_a_run_whose_token_was_hidden_as_a_secret_goes_on(tmp_path):
    make(tmp_path).explore(0)
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "explore_token": "<EXPLORE_TOKEN>"})
    )  # before it was told
    make(tmp_path).open_pool()
    assert "explore_token: best" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_what_differs_makes_another_run_and_is_named(other, tmp_path):
    changes, given, named = OTHER_RUNS[other]
    begun = {"peft_config": lora(), **EVAL, "eval_reward_funcs": [graded]}
    make(tmp_path, given=begun).explore(0)
    make(tmp_path, given=begun).open_pool()
    with pytest.raises(ConfigError, match=named):
        make(tmp_path, given={**begun, **given}, **changes).open_pool()


def test_a_users_own_scored_data_that_is_better_than_the_model_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_EARLY_STOP_ROWS", 1)
    data = {"prompt": ["the cat is"] * 9, "completion": list("abcdefghi"), "reward": [2.0 + i / 9 for i in range(9)]}
    trainer = make(tmp_path, given={"initial_pool": Dataset.from_dict(data)}, num_rounds=3)
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_run_from_before_there_was_a_best_share_drew_both_ends_equally(tmp_path):
    make(tmp_path, best_share=0.5).explore(0)
    path = tmp_path / "run.json"
    identity = json.loads(path.read_text())
    del identity["best_share"]
    path.write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match=r"best_share: 0\.5 there, 0\.75 here"):
        make(tmp_path).open_pool()
    make(tmp_path, best_share=0.5).open_pool()
    make(tmp_path / "all", draw="all").explore(0)
    assert "best_share" not in json.loads((tmp_path / "all" / "run.json").read_text())


def test_the_best_rounds_checkpoint_stays(tmp_path):
    values = iter([0.0, 0.1, 0.9, 0.5, 0.4, 0.3])  # the base's, then each round's

    def independent(completions, **kwargs):
        value = next(values)
        return [value for _ in completions]

    given = {**EVAL, "eval_reward_funcs": [independent]}
    trainer = make(tmp_path, given=given, save_strategy="epoch", num_rounds=5, save_total_limit=2)
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-10"}
    assert trainer.verdict()["verdict"] == "no gain"  # its reward changed by chance alone


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint*"))


@pytest.mark.parametrize("where", ["save_model", "_save_rng_state", "write_marker"])
def test_an_older_checkpoint_stays_until_the_new_one_is_whole(where, whole, tmp_path, monkeypatch):
    owner = run_folder if where == "write_marker" else QuarkTrainer
    original, calls = getattr(owner, where), []
    settings = {**SETTINGS, "save_total_limit": 1}

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, killed)
        with pytest.raises(RuntimeError, match="killed"):
            make(tmp_path, model=tiny_gpt2(), given=EVAL, **settings).train()
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint.partial"][: 1 if where == "save_model" else 2]
    assert what_is_wrong(tmp_path / "checkpoint-3") is None
    named = pytest.warns(UserWarning, match=r"partial/checkpoint-6 was not finished when its run stopped, and is not")
    with contextlib.nullcontext() if where == "save_model" else named:
        make(tmp_path, model=tiny_gpt2(), given=EVAL, **settings).train()
    assert equal(told(tmp_path), whole)
    assert checkpoints(tmp_path) == ["checkpoint-6"]


def test_a_kill_right_after_the_last_checkpoint_leaves_no_line_out(whole, tmp_path, monkeypatch):
    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("quark_lm.trainer.rotate", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path).train()
    run(tmp_path).train()
    assert equal(told(tmp_path), whole)


@pytest.mark.filterwarnings("ignore:.*was not finished")
def test_torn_checkpoints_do_not_count_and_are_removed(tmp_path):
    make(tmp_path, save_strategy="epoch").train()
    for step in (1, 5):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / MARKER).unlink()
    make(tmp_path, save_strategy="epoch", num_rounds=3).train()
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_with_one_checkpoint_kept_neither_a_stops_nor_the_last_is_deleted_for_the_best(tmp_path):
    values = iter([0.0, 0.9, 0.5, 0.4])  # the base's, then each round's

    def independent(completions, **kwargs):
        value = next(values)
        return [value for _ in completions]

    given = {**EVAL, "eval_reward_funcs": [independent]}
    settings = {"save_strategy": "epoch", "num_rounds": 3, "save_total_limit": 1}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, given={**given, "callbacks": [stopped_at(5)]}, **settings).train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    make(tmp_path, given=given, **settings).train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-6"]


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_a_stop_saves_its_step_once(step, strategy, tmp_path, monkeypatch):
    saved, original = [], QuarkTrainer.save_model

    def counted(self, *args, **kwargs):
        saved.append(self.state.global_step)
        if saved.count(step) > 1:
            raise RuntimeError("killed")  # while it writes over what was marked as whole
        return original(self, *args, **kwargs)

    monkeypatch.setattr(QuarkTrainer, "save_model", counted)
    settings = {**SETTINGS, "save_strategy": strategy}
    with pytest.raises(KeyboardInterrupt, match=f"after step {step} of 6, which is saved"):
        make(tmp_path, given={**EVAL, "callbacks": [stopped_at(step)]}, **settings).train()
    assert saved == [step]
    assert what_is_wrong(tmp_path / f"checkpoint-{step}") is None


class StopBetween(TrainerCallback):
    """Ctrl-C after the first micro-batch of the step of this number."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGINT)


HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def whole_of_halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    make(folder, model=tiny_gpt2(), given=EVAL, **SETTINGS, **HALVES).train()
    return told(folder)


@pytest.mark.parametrize("strategy", ["epoch", "no"])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_stop_between_micro_batches_drops_the_step_and_nothing_else(step, strategy, whole_of_halves, tmp_path):
    settings = {**SETTINGS, **HALVES, "save_strategy": strategy, "num_rounds": 2}
    before = "before the first step was done" if step == 1 else f"after step {step - 1} of 6, which is saved"
    with pytest.raises(KeyboardInterrupt, match=f"stopped {before}"):
        make(tmp_path, model=tiny_gpt2(), given={**EVAL, "callbacks": [StopBetween(step)]}, **settings).train()
    assert checkpoints(tmp_path)[-1:] == ([] if step == 1 else [f"checkpoint-{step - 1}"])
    settings["save_strategy"] = "epoch"
    again = make(tmp_path, model=tiny_gpt2(), given=EVAL, **settings)
    again.train()
    assert equal(told(tmp_path), whole_of_halves)


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that were sampled; the second item says how many rows fit the memory."""
    sizes, fits, original = [], [8], HFCompleter._complete_batch

    def counted(self, batch, *args):
        sizes.append(len(batch))
        return original(self, batch, *args)

    monkeypatch.setattr(HFCompleter, "_complete_batch", counted)
    monkeypatch.setattr(HFCompleter, "fitting_rows", lambda self, prompts, settings: fits[0])
    return sizes, fits


def test_a_runs_batches_are_those_that_fitted_when_it_was_begun(batches, tmp_path):
    sizes, fits = batches
    settings = {**SETTINGS, "generation_batch_size": None}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, given={**EVAL, "callbacks": [stopped_at(2)]}, **settings).train()
    first = list(sizes)
    fits[0] = 5
    make(tmp_path, given=EVAL, **settings).train()  # guided: two forward rows a sample
    assert first == [6, *[8] * 6]
    assert sizes[len(first) :] == [6, *[4] * 12, 6]
    assert json.loads((tmp_path / "run.json").read_text())["generation_rows"] == 8


def test_a_runs_scorers_compute_in_what_was_faster_when_it_was_begun(tmp_path):
    def scored(dtype):
        scorer = types.SimpleNamespace(dtype=dtype, measures_dtype=True)

        def score(texts):
            return [value + (scorer.dtype == "bfloat16") for value in graded(texts)]

        return TextReward("a_scorer", "a-scorer", "1", score, scorer=scorer), scorer

    reward, first = scored("bfloat16")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, reward, given={**EVAL, "callbacks": [stopped_at(2)]}, **SETTINGS).train()
    reward, second = scored("float32")
    trainer = make(tmp_path, reward, given=EVAL, **SETTINGS)
    trainer.train()
    assert (first.dtype, second.dtype) == ("bfloat16", "bfloat16")
    assert json.loads((tmp_path / "run.json").read_text())["scorer_dtypes"] == {"a_scorer": "bfloat16"}
    assert trainer.pool.to_table().column("reward").to_numpy().min() >= 1
    assert min(line["eval_reward"] for line in metrics(tmp_path) if "eval_reward" in line) > 1


@pytest.mark.parametrize("asked", [2, None])
def test_a_batch_size_that_is_asked_for_holds_in_a_round_that_was_begun_with_another(asked, batches, tmp_path):
    sizes, _ = batches
    settings = {**SETTINGS, "generation_batch_size": 8}
    with pytest.MonkeyPatch.context() as patch:
        raises_at("a batch that is kept", 3, patch)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, **settings).train()
    done = len(sizes)
    make(tmp_path, **{**settings, "generation_batch_size": asked}).explore(0)
    left = 48 - 8 * done
    assert sizes[done:] == ([2] * (left // 2) if asked else [8] * (left // 8))


def failing_at(call, name="independent", asked=None):
    """A scorer that fails when it is called for the `call`-th time; `asked` gets (step, completions) of each call."""
    asked = [] if asked is None else asked

    def scorer(completions, trainer_state, **kwargs):
        asked.append((trainer_state.global_step, list(completions)))
        if len(asked) == call:
            raise ConnectionError("gone")
        return graded(completions)

    scorer.__name__ = name
    return scorer


def test_a_scorer_that_fails_on_held_out_prompts_keeps_the_rounds_learning(tmp_path):
    independent = failing_at(2)  # the base's is the first
    settings = {"save_strategy": "epoch", "given": {**EVAL, "eval_reward_funcs": [independent]}}
    with pytest.raises(RewardError, match="gone"):
        make(tmp_path, **settings).train()
    assert last_checkpoint(tmp_path)[0].name == "checkpoint-2"
    make(tmp_path, **settings).train()
    steps = [line["step"] for line in metrics(tmp_path) if "eval_independent" in line]
    assert steps == [2, 4]


def held_out_run(folder, asked, fails_at=None):
    """A run that asks an independent scorer for two completions at once; `asked` gets (step, completions) of each."""
    given = {**EVAL, "eval_reward_funcs": [failing_at(fails_at, asked=asked)]}
    small = {"generation_batch_size": 2, "reward_batch_size": 2, "num_eval_generations": 2}
    return make(folder, model=tiny_gpt2(), given=given, **{**SETTINGS, **small})


# three held-out prompts, two completions each: chunks 1 to 3 are the base's, 4 to 6 those of round 1
@pytest.mark.parametrize("fails_at", [2, 3, 5, 6])
def test_what_was_kept_of_held_out_prompts_is_not_sampled_or_scored_again(fails_at, tmp_path, monkeypatch):
    everything = []
    held_out_run(tmp_path / "whole", everything).train()
    before, after, batches = [], [], []
    with pytest.raises(RewardError, match="gone"):
        held_out_run(tmp_path / "run", before, fails_at).train()
    kept = sorted(path.name for path in (tmp_path / "run" / "held-out.partial").iterdir())
    assert kept[-1] == f"{'base-00000' if fails_at <= 3 else 'step-00003'}.rank-0.partial.jsonl"
    original = HFCompleter._complete_batch

    def counted(self, batch, *args):
        batches.append(batch)
        return original(self, batch, *args)

    monkeypatch.setattr(HFCompleter, "_complete_batch", counted)
    trainer = held_out_run(tmp_path / "run", after)
    trainer.train()
    assert before[:-1] + after == everything  # the one that failed is asked for again, no other
    # 48 samples of a round in batches of two, in round 1 of one guided sample; six held-out ones in batches of two
    assert len(batches) == (24 + 3 + 48 + 3 if fails_at <= 3 else 48 + 3)
    assert equal(told(tmp_path / "run"), told(tmp_path / "whole"))
    assert not (tmp_path / "run" / "held-out.partial").exists()
    after.clear()
    trainer.evaluate()  # the caller may have changed the weights: nothing is kept
    assert len(after) == 3
    assert not (tmp_path / "run" / "held-out.partial").exists()


class Nudge(TrainerCallback):
    """Other weights after the first step, as a GPU may learn them the second time."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                next(model.parameters()).mul_(1.001)


def test_held_out_prompts_that_other_weights_completed_are_completed_again(tmp_path):
    asked = []
    with pytest.raises(RewardError, match="gone"):
        held_out_run(tmp_path, [], fails_at=5).train()
    shutil.rmtree(tmp_path / "checkpoint-3")  # as a kill leaves it, which comes before the checkpoint
    trainer = held_out_run(tmp_path, asked)
    trainer.add_callback(Nudge())
    with pytest.warns(
        UserWarning,
        match=r"6 samples that were kept of held-out prompts at step 3 are sampled and scored again \(learned: ",
    ):
        trainer.train()
    assert [step for step, _ in asked] == [3] * 3 + [6] * 3  # the base's are kept


def test_trainer_s_own_evaluation_before_the_first_step_is_the_policys_and_not_the_bases(tmp_path):
    given = {"eval_strategy": "steps", "eval_steps": 100, "eval_on_start": True}
    trainer = make(tmp_path, model=tiny_gpt2(), given=EVAL, **{**SETTINGS, **given, "num_rounds": 1})
    trainer.train()
    line = next(line for line in metrics(tmp_path) if "base_reward" in line)
    first = next(line for line in metrics(tmp_path) if "eval_reward" in line)
    assert (line["step"], first["step"]) == (0, 0)
    assert first["eval_reward"] != line["base_reward"]  # with the best token, without one


@pytest.mark.parametrize("independent", [False, True])
def test_a_mended_reward_scores_the_kept_held_out_prompts_anew(independent, tmp_path):
    """`independent`: the scorer that training never saw is mended, after it failed; else the reward, which was flat."""

    def flat(completions, **kwargs):
        return [0.0] * len(completions)

    def failing(completions, **kwargs):
        failing.calls += 1
        if failing.calls == 2:
            raise ConnectionError("gone")
        return [9.0] * len(completions)

    failing.calls = 0

    def mended(completions, **kwargs):
        return graded(completions)

    def reward_run(reward, scorer):
        given = {**EVAL, "eval_reward_funcs": [scorer]}
        changes = {**SETTINGS, "reward_batch_size": 2, "num_eval_generations": 2, "early_stop": False}
        return make(tmp_path, reward, model=tiny_gpt2(), given=given, **changes)

    before = (mended, failing) if independent else (flat, graded)
    # the same place in the file, written otherwise
    mended.__qualname__, mended.__name__ = before[independent].__qualname__, before[independent].__name__
    with pytest.raises(RewardError, match="gone" if independent else "rewards of the pool are equal"):
        reward_run(*before).train()
    kept = (tmp_path / "held-out.partial" / "base-00000.rank-0.partial.jsonl").read_text()
    assert '"indices"' in kept
    again = pytest.warns(UserWarning, match="kept of the base on held-out prompts are scored again")
    with again if independent else contextlib.nullcontext():
        reward_run(*((mended, mended) if independent else (mended, graded))).train()
    line = next(line for line in metrics(tmp_path) if "base_reward" in line)
    assert 0 < line["base_failing" if independent else "base_reward"] < 1


def test_a_checkpoint_that_another_metric_than_the_verdicts_chose_stays(tmp_path):
    given = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "num_rounds": 3}
    given |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_least", "save_total_limit": 1}

    def least(completions, trainer_state, **kwargs):  # the first is the best by it, the last by the reward
        return [float(-trainer_state.global_step)] * len(completions)

    def rising(completions, trainer_state, **kwargs):
        return [value + trainer_state.global_step for value in graded(completions)]

    scorers = {**EVAL, "eval_reward_funcs": [least]}
    trainer = make(tmp_path, rising, model=tiny_gpt2(), given=scorers, **{**SETTINGS, **given})
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_metric == -3.0
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_best_checkpoint_is_one_of_a_rounds_end():
    lines = [{"eval_reward": 0.9, "step": 2}, {"eval_reward": 0.85, "step": 4}, {"eval_reward": 0.8, "step": 8}]
    assert measuring.best_step(lines, (), 4) == 4


@pytest.mark.filterwarnings("ignore:Too few samples are held out")
def test_a_run_whose_metrics_were_deleted_goes_on_where_measurements_are_owed(tmp_path):
    """As docs/faults.md has it for a damaged file."""
    gone = failing_at(2, "gone")  # the base's is the first
    own = {
        "prompt": PROMPTS,
        "completion": [f" sat {n}" for n in range(len(PROMPTS))],
        "reward": [*range(len(PROMPTS))],
    }
    given = {**EVAL, "eval_reward_funcs": [gone], "initial_pool": Dataset.from_dict(own)}
    with pytest.raises(RewardError, match="gone"):
        make(tmp_path, model=tiny_gpt2(), given=given, **SETTINGS).train()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match="goes on without the figures of what is done"):
        make(tmp_path, model=tiny_gpt2(), given=given, **SETTINGS).train()
    assert [(line["round"], line["step"]) for line in metrics(tmp_path) if "eval_gone" in line] == [(0, 3), (1, 6)]


def test_a_folder_that_came_to_no_round_forgets_the_held_out_prompts_of_other_settings(tmp_path):
    asked = []
    with pytest.raises(RewardError, match="gone"):
        held_out_run(tmp_path, asked, fails_at=2).train()
    other = {"eval_dataset": Dataset.from_dict({"prompt": ["her hat", "a man", "two"]})}
    trainer = make(tmp_path, model=tiny_gpt2(), given=other, **SETTINGS)
    trainer.open_pool()
    assert not (tmp_path / "held-out.partial").exists()


def test_other_prompts_and_columns_do_not_mix_with_the_runs_own(tmp_path):
    def of_label(completions, label, **kwargs):
        return [value + number for value, number in zip(graded(completions), label, strict=True)]

    def labelled(label):
        return Dataset.from_dict({"prompt": PROMPTS, "label": [label] * len(PROMPTS)})

    trainer = make(tmp_path, of_label, prompts=labelled(0), save_strategy="epoch")
    trainer.train()
    with pytest.raises(ConfigError, match="prompts: '12, crc"):
        make(tmp_path, of_label, prompts=labelled(9), save_strategy="epoch").train()
    run(tmp_path / "other").train()
    told = run(tmp_path / "other")
    before = told.verdict()
    told.evaluate(Dataset.from_dict({"prompt": ["one", "two"]}))
    assert told.verdict() == before != {}


def test_an_owed_measurement_is_made_once(whole, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[stopped_at(6)]).train()
    run(tmp_path).train()
    assert equal(told(tmp_path), whole)
    monkeypatch.setattr(HFCompleter, "_complete_batch", None)  # nothing is sampled any more
    run(tmp_path).train()


def test_fewer_rounds_than_were_learned_are_refused(tmp_path):
    make(tmp_path, save_strategy="epoch").train()
    with pytest.raises(
        ConfigError, match=r"ends at step 2, but the run .* at step 4 already. Give num_rounds=2 or more"
    ):
        make(tmp_path, save_strategy="epoch", num_rounds=1).train()


@pytest.mark.parametrize("step", [0, 1, 3])
def test_the_same_trainer_goes_on_after_a_stop(step, whole, tmp_path):
    class Once(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step and not done:
                done.append(1)
                signal.raise_signal(signal.SIGINT)

    done = []
    trainer = run(tmp_path, callbacks=[Once()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 6
    assert equal(told(tmp_path), whole)


def test_the_same_trainer_goes_on_after_a_stop_and_an_evaluation(tmp_path):
    trainer = run(tmp_path, callbacks=[stop := stopped_at(1)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.evaluate()
    trainer.train()
    assert trainer.state.global_step == 6


def test_an_evaluation_before_training_is_kept_beside_the_runs_own(tmp_path):
    trainer = run(tmp_path)
    before = trainer.evaluate()
    trainer.train()
    lines = metrics(tmp_path)
    assert lines[0]["eval_reward"] == before["eval_reward"] != lines[1]["base_reward"]
    assert (lines[0]["step"], lines[0]["untrained"]) == (0, True)
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 3, 6]


def hold(folder, ready, done):
    with locked(folder):
        ready.set()
        done.wait(60)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ConfigError, match="Another process trains in"):
            make(tmp_path).train()
    finally:
        done.set()
        other.join()
    make(tmp_path).train()


def test_a_killed_process_does_not_hold_its_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    other.kill()
    other.join()
    make(tmp_path, num_rounds=1).train()


def test_the_trainer_changes_no_setting_of_its_caller(tmp_path):
    args = QuarkConfig(str(tmp_path), report_to="none", use_cpu=True)
    from quark_lm import QuarkTrainer

    prompts = Dataset.from_dict({"prompt": PROMPTS})
    from tiny import tiny_tokenizer

    trainer = QuarkTrainer(
        tiny_gpt2(), graded, args, prompts, processing_class=tiny_tokenizer(), peft_config=lora(fan_in_fan_out=True)
    )
    assert (args.learning_rate, trainer.args.learning_rate) == (1e-5, 6e-4)


BASE = {"base_reward": 0.4, "base_reward_se": 0.02, "base_other": 0.3, "base_other_se": 0.02,
        "base_reference_perplexity": 20.0, "base_dist_2": 0.9, "step": 0}  # fmt: skip
LAST = {"eval_reward": 0.6, "eval_reward_se": 0.02, "eval_other": 0.5, "eval_other_se": 0.02,
        "eval_reference_perplexity": 21.0, "eval_dist_2": 0.88, "step": 9}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "independent", "word", "drifted"),
    [
        ({}, ["other"], "better", False),
        ({}, [], "unconfirmed", False),
        ({"eval_other": 0.2}, ["other"], "reward hacking", False),
        ({"eval_other": 0.32}, ["other"], "reward hacking", False),  # the error of the difference is .028
        ({"eval_other": 0.34}, ["other"], "unconfirmed", False),
        ({"eval_other": 0.339, "eval_other_se": 0.0}, ["other"], "unconfirmed", False),  # 2 x .02 is not passed
        ({"eval_other": 0.341, "eval_other_se": 0.0}, ["other"], "better", False),
        ({"eval_reward": 0.45}, ["other"], "no gain", False),
        ({"eval_reference_perplexity": 23.5}, ["other"], "better", True),
        ({"eval_dist_2": 0.8}, ["other"], "better", True),
    ],
)
def test_the_verdict_says_what_the_held_out_prompts_show(changes, independent, word, drifted):
    told = measuring.verdict([BASE, {**LAST, "eval_reward": 0.1}, {**LAST, **changes}], independent)
    assert (told["verdict"], told["drifted"]) == (word, drifted)
    assert told["text"].endswith(".")
    assert measuring.verdict([BASE], independent) == {}
