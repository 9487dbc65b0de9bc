"""Reward functions: loading by name, models and functions as rewards, and the runner, which calls them as TRL does."""

import asyncio
import functools
import gc
import math
import subprocess
import sys
import threading
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCAB, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from quark_lm import packaged, rewards
from quark_lm.errors import ConfigError, DataError, ModelError, RewardError
from quark_lm.evaluation.metrics import diversity
from quark_lm.rewards import NAMED_REWARDS, load_reward
from quark_lm.rewards.classifier import classifier_reward, model_reward
from quark_lm.rewards.repetition import repetition_reward
from quark_lm.rewards.runner import Failure, RewardRunner

PROMPTS = ["Once", "Once", "The end"]
COMPLETIONS = [" upon a time", "", " is near"]
IDS = [[1, 2, 3, 4], [], [5, 6]]


def chat(texts, role):
    return [[{"role": role, "content": text}] for text in texts]


def score(functions, columns=None, trainer_state=None, **options):
    return RewardRunner(functions, **options).score(PROMPTS, COMPLETIONS, IDS, columns or {}, trainer_state)


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def returns(value):
    def fixed_reward(**kwargs):
        return value

    return fixed_reward


def same(values, expected):
    return list(values) == pytest.approx(expected, nan_ok=True)


# Calling as TRL does


def test_a_function_gets_exactly_trl_s_keywords():
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [0.0, 0.0, 0.0]

    state = types.SimpleNamespace(global_step=7)
    columns = {"topic": ["a", "b", "c"], "prompt": PROMPTS, "completion": COMPLETIONS}
    score(spy, columns, state)
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "topic", "trainer_state", "log_extra", "log_metric",
    }  # fmt: skip
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (PROMPTS, COMPLETIONS, IDS)
    assert seen["topic"] == ["a", "b", "c"]
    assert seen["trainer_state"] is state


def test_one_function_is_its_own_total():
    batch = score(length_reward)
    assert same(batch.total, [12, 0, 8])
    assert same(batch.per_function["length_reward"], [12, 0, 8])
    assert batch.total.dtype == np.float64
    assert batch.num_dropped == 0


def test_several_functions_are_summed_with_their_weights():
    batch = score([length_reward, returns([1, 2, 3])], reward_weights=[0.5, 10.0])
    assert same(batch.total, [16, 20, 34])
    assert list(batch.per_function) == ["length_reward", "fixed_reward"]


def test_none_from_one_function_is_ignored_and_from_all_drops_the_completion():
    batch = score([returns([1.0, None, None]), returns([None, 2.0, None])])
    assert same(batch.total, [1, 2, math.nan])
    assert same(batch.per_function["fixed_reward"], [1, math.nan, math.nan])
    assert same(batch.per_function["fixed_reward_2"], [math.nan, 2, math.nan])
    assert batch.num_dropped == 1


@given(st.lists(st.lists(st.none() | st.floats(-9, 9), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_total_is_torch_s_weighted_nansum(outputs):
    weights = [0.5 + i for i in range(len(outputs))]
    table = torch.tensor([[math.nan if r is None else r for r in row] for row in outputs], dtype=torch.float64).T
    expected = (table * torch.tensor(weights, dtype=torch.float64)).nansum(dim=1)
    expected[table.isnan().all(dim=1)] = math.nan
    assert same(score([returns(row) for row in outputs], reward_weights=weights).total, expected.tolist())


def test_conversations_reach_the_function_as_messages():
    def last_words(completions, **kwargs):
        return [len(completion[0]["content"]) for completion in completions]

    batch = RewardRunner(last_words).score(chat(["Hi"], "user"), chat(["Hello"], "assistant"), [[1]], {})
    assert same(batch.total, [5])


def test_no_completions_call_no_function():
    batch = RewardRunner(returns("never called")).score([], [], [], {"topic": []})
    assert len(batch.total) == 0
    assert len(batch.per_function["fixed_reward"]) == 0


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ((1, 0, 2.5), 2.5),
        ([True, False, np.bool_(True)], 1.0),
        (np.array([1.0, 0.0, 2.5], dtype=np.float32), 2.5),
        ([np.float32(1), np.int64(0), np.array(2.5)], 2.5),
        (torch.tensor([1.0, 0.0, 2.5], dtype=torch.bfloat16), 2.5),
        (torch.tensor([1.0, 0.0, 2.5], requires_grad=True), 2.5),
        ([torch.tensor(1.0), torch.tensor(0), torch.tensor(True)], 1.0),
    ],
    ids=["tuple", "bools", "array", "numpy-scalars", "tensor", "tensor-with-grad", "tensor-scalars"],
)
def test_numbers_of_every_kind_are_taken(values, last):
    assert same(score(returns(values)).total, [1, 0, last])


def test_a_generator_is_taken():
    assert same(score(lambda **kwargs: (i for i in range(3))).total, [0, 1, 2])


# Names


def test_without_a_run_a_function_gets_the_state_of_one_at_its_start():
    def reads_the_step(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    assert score([reads_the_step]).total.tolist() == [0.0] * len(COMPLETIONS)


def test_names_that_are_taken_are_not_given_again():
    assert RewardRunner([length_reward], taken=["length_reward", "reward"]).names == ["length_reward_2"]


def test_names_are_trl_s():
    class Callable:
        def __call__(self, **kwargs):
            return [0, 0, 0]

    runner = RewardRunner([length_reward, functools.partial(length_reward, x=1), Callable()])
    assert runner.names == ["length_reward", "length_reward_2", "Callable"]
    assert list(score([length_reward], names=["short"]).per_function) == ["short"]


def test_what_is_told_of_functions_tells_them_apart_by_no_address(tmp_path, monkeypatch):
    class Judge:
        def __call__(self, **kwargs):
            return [0, 0, 0]

    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "b/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("def f(**kwargs):\n    return [0, 0, 0]\n")
    classifier = tiny_classifier()
    by = [classifier_reward(classifier, 1, how, processing_class=tiny_tokenizer()) for how in ("softmax", "sigmoid")]
    (tmp_path / "elsewhere.py").write_text("def f(**kwargs):\n    return [0, 0, 0]\n")
    files = ["a.py:f", "./b/c.py:f", f"{tmp_path}/elsewhere.py:f"]  # where it lies is this machine's alone
    servers = ["http://me:secret@a:81/score?key=hidden", "http://b/other"]
    runner = RewardRunner([*files, *servers, *by, "repetition", functools.partial(length_reward, x=1), Judge()])
    told = runner.told
    here = test_what_is_told_of_functions_tells_them_apart_by_no_address.__qualname__
    assert told[:5] == [
        "a.py:f",
        "c.py:f",
        "elsewhere.py:f",
        "http /score unpinned",
        "http /other unpinned",
    ]
    assert "softmax" in told[5]
    assert told[6] == told[5].replace("softmax", "sigmoid")
    assert told[7].startswith("diversity")
    assert told[8:] == [f"{__name__}:length_reward", f"{__name__}:{here}.<locals>.Judge"]


def test_names_weights_and_functions_must_be_as_many():
    with pytest.raises(ConfigError, match="reward_weights has 2 entries for 1 reward functions"):
        RewardRunner(length_reward, reward_weights=[1, 2])
    with pytest.raises(ConfigError, match="names has 0 entries"):
        RewardRunner(length_reward, names=[])
    with pytest.raises(ConfigError, match="not all finite"):
        RewardRunner(length_reward, reward_weights=[math.nan])
    with pytest.raises(ConfigError, match="no reward function"):
        RewardRunner([])


# Async functions


def test_async_functions_wait_together():
    meeting = []

    def waits_for(me, other):
        async def wait(completions, **kwargs):
            meeting.append(me)
            while other not in meeting:  # only ends if both run at once
                await asyncio.sleep(0.001)
            return [float(me)] * len(completions)

        return wait

    batch = score([waits_for(1, 2), waits_for(2, 1), length_reward], names=["one", "two", "length"])
    assert same(batch.per_function["one"], [1, 1, 1])
    assert same(batch.per_function["two"], [2, 2, 2])
    assert same(batch.total, [15, 3, 11])


def test_an_async_callable_object_and_a_partial_are_awaited():
    class Judge:
        async def __call__(self, completions, **kwargs):
            return [0.5] * len(completions)

    async def scaled(completions, scale, **kwargs):
        return [scale] * len(completions)

    assert same(score([Judge(), functools.partial(scaled, scale=2.0)]).total, [2.5] * 3)


def test_all_calls_share_one_loop_outside_the_main_thread():
    loops = []

    async def judge(completions, **kwargs):
        loops.append((asyncio.get_running_loop(), threading.current_thread()))
        return [0.0] * len(completions)

    runner = RewardRunner(judge)
    for _ in range(2):
        runner.score(PROMPTS, COMPLETIONS, IDS, {})
    assert loops[0] == loops[1]
    assert loops[0][1] is not threading.main_thread()


def test_async_functions_work_inside_a_running_loop():
    async def judge(completions, **kwargs):
        return [0.25] * len(completions)

    async def notebook():
        return score(judge)

    assert same(asyncio.run(notebook()).total, [0.25] * 3)


def test_the_loop_ends_with_its_runner():
    async def judge(completions, **kwargs):
        return [0.0] * len(completions)

    before = threading.active_count()
    runner = RewardRunner(judge)
    runner.score(PROMPTS, COMPLETIONS, IDS, {})
    assert threading.active_count() == before + 1
    del runner
    gc.collect()
    assert threading.active_count() == before


def test_an_async_function_that_raises_is_named_and_the_others_are_left_clean():
    async def broken(**kwargs):
        raise TimeoutError("no answer")

    async def fine(completions, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="Reward function broken raised TimeoutError: no answer") as caught:
        score([fine, broken])
    assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.filterwarnings("error")
def test_a_failure_before_the_async_ones_start_leaves_no_unawaited_coroutine():
    async def judge(completions, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="fixed_reward"):
        score([judge, returns(None)])
    gc.collect()


def test_an_async_function_that_exits_does_not_hang():
    async def leaves(**kwargs):
        sys.exit(3)

    with pytest.raises(RewardError, match="leaves raised SystemExit: 3"):
        score(leaves)


# What they log


def test_log_extra_and_log_metric_are_collected():
    def logs(completions, log_extra, log_metric, **kwargs):
        log_extra("words", [len(completion.split()) for completion in completions])
        log_metric("accuracy", 0.5)
        log_metric("accuracy", torch.tensor(1.0))
        return [0.0] * len(completions)

    batch = score(logs)
    assert batch.extra == {"words": [3, 0, 2]}
    assert batch.metrics == {"rewards/accuracy": 0.75}
    assert batch.metric_sums == {"rewards/accuracy": (1.5, 2)}


@pytest.mark.parametrize("name", ["round", "loss", "reward", "step", "rewards/x", "reward/length_reward"])
def test_no_metric_of_a_reward_takes_the_name_of_one_of_ours(name):
    def logs(completions, log_metric, **kwargs):
        log_metric(name, 55)
        return [0.0] * len(completions)

    assert score(logs).metrics == {f"rewards/{name}": 55.0}


def test_metrics_of_several_functions_under_one_name_are_one_mean():
    def logs(value):
        def reward(completions, log_metric, **kwargs):
            log_metric("x", value)
            return [0.0] * len(completions)

        return reward

    assert score([logs(1), logs(4)]).metric_sums == {"rewards/x": (5.0, 2)}


def test_log_extra_may_come_in_pieces():
    def logs(completions, log_extra, **kwargs):
        for completion in completions:
            log_extra("text", [completion])
        return [0.0] * len(completions)

    assert score(logs).extra == {"text": COMPLETIONS}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (lambda log_extra, log_metric: log_extra("x", [1]), r"log_extra\('x'\) got 1 values for 3 completions"),
        (lambda log_extra, log_metric: log_extra("x", "abc"), r"logs gave log_extra\('x'\) 'abc', which is no list"),
        (
            lambda log_extra, log_metric: log_metric("x", "high"),
            r"logs gave log_metric\('x'\) 'high', which is no number",
        ),
    ],
    ids=["short", "text", "no-number"],
)
def test_bad_logs_are_named(log, message):
    def logs(log_extra, log_metric, **kwargs):
        log(log_extra, log_metric)
        return [0.0] * 3

    with pytest.raises(RewardError, match=message):
        score(logs)


# Calling again


def fails(times, error=ConnectionError, asynchronous=False):
    """A reward that raises the first `times` times, logging something each time."""
    calls = []

    def judge(completions, log_extra, log_metric, **kwargs):
        calls.append(1)
        log_extra("call", [len(calls)] * len(completions))
        log_metric("calls", len(calls))
        if len(calls) <= times:
            raise error("no answer\nand more")
        return [1.0] * len(completions)

    async def judge_later(**kwargs):
        await asyncio.sleep(0)
        return judge(**kwargs)

    return judge_later if asynchronous else judge, calls


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_function_that_raises_is_called_again_and_logs_once(asynchronous):
    function, calls = fails(2, asynchronous=asynchronous)
    with pytest.warns(UserWarning, match=r"raised ConnectionError: no answer\. It is called again in 0\.0 s"):
        batch = score([function, length_reward], retries=2, pause=0.001)
    assert len(calls) == 3
    assert same(batch.total, [13, 1, 9])
    assert batch.extra == {"call": [3, 3, 3]}
    assert batch.metrics == {"rewards/calls": 3.0}
    assert batch.failures == []


@pytest.mark.filterwarnings("ignore:Reward function judge")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_that_raises_to_the_end_is_named_with_the_number_of_its_calls(asynchronous):
    function, calls = fails(9, asynchronous=asynchronous)
    with pytest.raises(RewardError, match=r"raised ConnectionError: no answer at each of 3 calls\. Mend it") as caught:
        score([length_reward, function], retries=2, pause=0.001)
    assert len(calls) == 3
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Reward function judge")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_that_may_fail_leaves_its_batch_without_a_reward_and_the_reason(asynchronous):
    function, _ = fails(9, asynchronous=asynchronous)
    function.__name__ = "judge"
    batch = score([length_reward, function], retries=1, may_fail=True, pause=0.001)
    assert batch.failures == [Failure("judge", "ConnectionError: no answer", 3)]
    assert (batch.num_dropped, batch.num_failed) == (3, 3)  # a sum without its part would rank as a low one
    assert same(batch.per_function["length_reward"], [12, 0, 8])
    assert same(batch.per_function["judge"], [math.nan] * 3)
    assert (batch.extra, batch.metrics) == ({}, {})
    assert score(length_reward, may_fail=True).num_failed == 0


def test_the_pauses_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    function, _ = fails(9)
    with pytest.warns(UserWarning, match="called again"), pytest.raises(RewardError):
        score(function, retries=8)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RewardError, ModelError, SystemExit])
def test_what_another_call_cannot_mend_is_raised_at_once(error, asynchronous):
    function, calls = fails(9, error, asynchronous)
    raised = RewardError if error is SystemExit else error
    with pytest.raises(raised):
        score(function, retries=5)
    assert len(calls) == 1


def test_only_what_a_reward_itself_may_meet_counts_as_a_failure():
    assert score(fails(9, RewardError)[0], may_fail=True).failures == [Failure("judge", "no answer", 3)]
    for error in (ConfigError, ModelError, DataError, KeyboardInterrupt):
        with pytest.raises(error):
            score(fails(9, error)[0], may_fail=True)
    with pytest.raises(RewardError, match="returned 1 rewards for 3"):  # a mistake, which stays one
        score(returns([1.0]), may_fail=True)


def test_what_is_wrong_before_any_call_calls_nothing():
    function, calls = fails(0)
    with pytest.raises(RewardError, match="needs 'solution'"):
        score([function, lambda completions, solution, **kwargs: [0.0] * 3])
    assert calls == []


# What goes wrong


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.0, math.nan, 0.0], "fixed_reward returned nan at index 1, which has no rank"),
        (torch.tensor([0.0, 0.0, math.nan]), "returned nan at index 2"),
        ([0.0, 0.0, math.inf], "returned inf at index 2"),
        ([-math.inf, 0.0, 0.0], "returned -inf at index 0"),
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([1.0] * 4, "returned 4 rewards for 3 completions"),
        ([], "returned 0 rewards for 3 completions"),
        (["0.5", 0.1, 0.2], r"returned '0.5' \(str\) at index 0, which is no number"),
        ([0.1, [0.2], 0.3], r"returned \[0.2\] \(list\) at index 1"),
        (torch.zeros(3, 1), r"returned \[0.0\] \(list\) at index 0"),
        ([1j, 0, 0], r"returned 1j \(complex\) at index 0"),
        ("abc", r"returned 'abc' \(str\), not a list"),
        (None, "returned None, not a list"),
        (0.5, r"returned 0.5 \(float\), not a list"),
        (torch.tensor(0.5), "returned one number"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, r"\(dict\), not a list"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_ranked_is_one_clear_line(value, message):
    with pytest.raises(RewardError, match=message) as caught:
        score([length_reward, returns(value)])
    assert "\n" not in str(caught.value)
    assert "fixed_reward" in str(caught.value)


def test_a_very_long_spec_is_refused_like_another():
    for spec in ("long(" + "a" * 5000 + ")", "mod" * 2000 + ":function"):
        with pytest.raises(ConfigError):
            load_reward(spec)


def test_a_function_that_raises_is_named_with_its_first_line():
    def broken(**kwargs):
        raise KeyError("solution\nand more")

    with pytest.raises(RewardError, match="Reward function broken raised KeyError") as caught:
        score(broken)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_quark_error_of_a_reward_passes_as_it_is():
    def ours(**kwargs):
        raise ModelError("No model. Install it.")

    with pytest.raises(ModelError, match=r"^No model\. Install it\.$"):
        score(ours)


def test_ctrl_c_inside_a_reward_is_not_a_reward_error():
    def interrupted(**kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


def test_a_function_without_kwargs_is_told_to_take_them():
    def narrow(completions):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"narrow does not take 'prompts', .*'log_metric'.* Add \*\*kwargs"):
        score(narrow)


def test_a_function_that_names_all_keywords_needs_no_kwargs():
    def full(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
        return [1.0] * len(prompts)

    assert same(score(full).total, [1, 1, 1])


def test_a_missing_column_is_named():
    def needs_solution(completions, solution, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"needs 'solution', which .* \(its other columns: topic\)\. Add the column"):
        score(needs_solution, {"topic": ["a", "b", "c"]})


def test_a_slip_in_a_parameter_is_pointed_out():
    def slip(prompt, completions, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="Did you mean 'prompts'"):
        score(slip)


def test_a_column_named_like_an_argument_is_refused():
    with pytest.raises(DataError, match="column 'completions', which is an argument"):
        score(length_reward, {"completions": ["x", "y", "z"]})


def test_columns_of_another_length_are_refused():
    with pytest.raises(DataError, match="column 'topic' has 2 rows for 3 completions"):
        score(length_reward, {"topic": ["a", "b"]})


# TRL's own functions


def test_trl_s_own_rewards_run_unchanged():
    import trl.rewards as trl_rewards

    runner = RewardRunner(
        [
            trl_rewards.think_format_reward,
            trl_rewards.get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=4),
            trl_rewards.get_repetition_penalty_reward(ngram_size=2),
        ]
    )
    completions = chat(["<think>so</think> yes", "no thought"], "assistant")
    batch = runner.score(chat(["Q", "Q"], "user"), completions, [[1, 2, 3, 4], [5, 5, 5, 5, 5]], {"topic": ["a", "b"]})
    assert runner.names == [
        "think_format_reward",
        "soft_overlong_punishment_reward",
        "repetition_penalty_reward",
    ]
    assert same(batch.per_function["think_format_reward"], [1, 0])
    assert same(batch.per_function["soft_overlong_punishment_reward"], [-0.5, -0.75])
    assert same(batch.per_function["repetition_penalty_reward"], [0, -0.75])
    assert same(batch.total, [0.5, -1.5])


def test_trl_s_accuracy_reward_runs_with_a_column_and_logs():
    import trl.rewards as trl_rewards

    batch = RewardRunner(trl_rewards.accuracy_reward).score(
        chat(["2+2?", "1+1?"], "user"), chat([r"\boxed{4}", r"\boxed{3}"], "assistant"), [[1], [2]],
        {"solution": [r"\boxed{4}", r"\boxed{2}"]},
    )  # fmt: skip
    assert same(batch.total, [1, 0])
    assert "solution" in batch.extra


# Repetition


def test_the_repetition_reward_is_diversity():
    text = "it is what it is what it is"
    assert repetition_reward()(prompts=[""], completions=[text]) == [pytest.approx(diversity(text))]
    assert repetition_reward()(prompts=["So"], completions=[" we went home at last."]) == [1.0]


def test_the_repetition_reward_s_docstring_holds():
    values = repetition_reward()(
        prompts=["So", "So"], completions=[" we went home at last.", " it is what it is what it is."]
    )
    assert [round(value, 2) for value in values] == [1.0, 0.3]


def test_repetition_in_tokens_reads_the_ids():
    values = repetition_reward("tokens")(
        prompts=["", ""], completions=["a b", "c"], completion_ids=[[7] * 6, [1, 2, 3, 4]]
    )
    assert values == [pytest.approx(diversity([7] * 6)), 1.0]


@pytest.mark.parametrize("unit", ["words", "tokens"])
def test_a_completion_without_a_word_or_a_pair_earns_none(unit):
    reward = repetition_reward(unit)
    assert (
        reward(prompts=[""] * 3, completions=["", " ... !!", "one"], completion_ids=[[], [1, 2, 3], [4]]) == [None] * 3
    )


def test_a_short_completion_leaves_out_what_it_cannot_have():
    assert repetition_reward()(prompts=["", ""], completions=["so so so", "so it"]) == [pytest.approx(0.5), 1.0]


def test_repetition_of_conversations_reads_the_message():
    assert repetition_reward()(prompts=chat(["Q"], "user"), completions=chat(["a b c d"], "assistant")) == [1.0]


def test_another_unit_is_refused():
    with pytest.raises(ConfigError, match="unit='letters'"):
        repetition_reward("letters")


# Classifiers


def test_an_unpinned_classifier_tells_the_commit_that_the_hub_gave(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789" * 4
    cached = tmp_path / "models--somebody--rude"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    model.save_pretrained(cached / "snapshots" / commit)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", lambda name, **_: model)
    for name, options, told in [
        ("somebody/rude", {}, commit),
        ("somebody/rude", {"revision": "v1"}, "v1"),
        (str(tmp_path), {}, "unpinned"),
    ]:
        assert classifier_reward(name, 0, processing_class=tokenizer, **options).scorer_version == told
    model.config._name_or_path = "somebody/rude"  # it may have been changed since
    assert classifier_reward(model, 0, processing_class=tokenizer).scorer_version == "unpinned"
    assert packaged.hub_commit("somebody/kind") is None
    assert packaged.hub_commit("no name: of the hub") is None
    assert packaged.hub_commit(str(tmp_path)) is None


def tiny_classifier(labels=("NEGATIVE", "NEUTRAL", "POSITIVE"), kind="gpt2", seed=0):
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    small = {"vocab_size": VOCAB, "num_labels": len(labels), "initializer_range": 0.3, **names}
    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(n_positions=128, n_embd=32, n_layer=1, n_head=2, **small))
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, **small,
        )  # fmt: skip
        return LlamaForSequenceClassification(config)
    if kind == "roberta":
        config = RobertaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=66, pad_token_id=1, **small,
        )  # fmt: skip
        return RobertaForSequenceClassification(config)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        **small,
    )
    return BertForSequenceClassification(config)


def by_hand(model, tokenizer, text, **options):
    ids = tokenizer(text, return_tensors="pt", **options)["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0].double()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_a_label_s_value_is_the_model_s_text_by_text(kind, activation):
    model, tokenizer = tiny_classifier(kind=kind), tiny_tokenizer()
    reward = classifier_reward(model, "positive", activation, processing_class=tokenizer, batch_size=2)
    texts = [" a fine day", " no", " the rain in spain stays", " so it goes on", " no"]
    function = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}[activation]
    expected = [function(by_hand(model, tokenizer, text))[2].item() for text in texts]
    assert reward(prompts=["x"] * 5, completions=texts) == pytest.approx(expected, abs=1e-5)


def test_labels_are_found_by_name_in_either_case_or_by_index():
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    by_name = classifier_reward(model, "Positive", processing_class=tokenizer)
    by_index = classifier_reward(model, 2, processing_class=tokenizer)
    assert by_name(prompts=[""], completions=["so"]) == by_index(prompts=[""], completions=["so"])
    assert by_name.__name__.startswith("POSITIVE_")


def test_an_absent_label_lists_those_that_there_are():
    with pytest.raises(ConfigError, match=r"label='toxic' .* \(0: NEGATIVE, 1: NEUTRAL, 2: POSITIVE\)"):
        classifier_reward(tiny_classifier(), "toxic", processing_class=tiny_tokenizer())
    with pytest.raises(ConfigError, match="label=3 is none of"):
        classifier_reward(tiny_classifier(), 3, processing_class=tiny_tokenizer())


def test_an_unwanted_label_is_turned_round():
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    for activation, turned in (("softmax", lambda p: 1 - p), ("sigmoid", lambda p: 1 - p), ("none", lambda z: -z)):
        plain = classifier_reward(model, 0, activation, processing_class=tokenizer)
        less = classifier_reward(model, 0, activation, processing_class=tokenizer, minimize=True)
        (value,) = plain(prompts=[""], completions=["rain"])
        assert less(prompts=[""], completions=["rain"]) == [pytest.approx(turned(value))]
        assert less.__name__.startswith("not_NEGATIVE")


def test_the_prompt_is_read_only_in_its_scope():
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    alone = classifier_reward(model, processing_class=tokenizer)
    whole = classifier_reward(model, scope="prompt+completion", processing_class=tokenizer)
    assert alone(prompts=["A"], completions=[" b"]) == alone(prompts=["Z"], completions=[" b"])
    assert whole(prompts=["A"], completions=[" b"]) == [
        pytest.approx(by_hand(model, tokenizer, "A b").softmax(-1)[2].item())
    ]


def test_a_long_prompt_loses_its_start_and_a_long_completion_its_end():
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    whole = classifier_reward(model, scope="prompt+completion", max_length=8, processing_class=tokenizer)
    assert whole(prompts=["XXXXXXXX"], completions=["abcdefgh"]) == pytest.approx(
        whole(prompts=[""], completions=["abcdefgh"])
    )
    alone = classifier_reward(model, max_length=8, processing_class=tokenizer)
    assert alone(prompts=[""], completions=["abcdefghXXX"]) == pytest.approx(
        alone(prompts=[""], completions=["abcdefgh"])
    )
    assert tokenizer.truncation_side == "right"
    assert len(alone(prompts=[""], completions=["word " * 500])) == 1


def test_a_completion_without_a_word_earns_none_from_a_classifier():
    for scope in ("completion", "prompt+completion"):
        reward = classifier_reward(tiny_classifier(), scope=scope, processing_class=tiny_tokenizer())
        values = reward(prompts=["Once"] * 3, completions=["", "so", "..."])
        assert [value is None for value in values] == [True, False, True]
        assert reward(prompts=["Once"], completions=["?"]) == [None]


def test_neither_order_nor_batch_changes_a_classifier_s_value():
    model, tokenizer = tiny_classifier(kind="gpt2"), tiny_tokenizer(pad=False)
    texts = [" a", " the rain", " in spain stays mainly", " in the plain of gold and sand"]
    one = classifier_reward(model, processing_class=tokenizer, batch_size=1)(prompts=texts, completions=texts)
    all_at_once = classifier_reward(model, processing_class=tokenizer, batch_size=9)(
        prompts=texts, completions=texts[::-1]
    )
    assert one == pytest.approx(all_at_once[::-1], abs=1e-6)


def test_a_classifier_is_loaded_from_a_folder(tmp_path):
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(f"classifier(model={tmp_path}, label=neutral, activation=sigmoid, batch_size=4)")
    assert reward(prompts=[""], completions=["so"]) == pytest.approx(
        [by_hand(model, tokenizer, "so").sigmoid()[1].item()]
    )
    assert reward.wanted([0.6, 0.4, None]) == [True, False, False]
    assert str(tmp_path) in reward.scorer_name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation='relu'"),
        ({"scope": "prompt"}, "scope='prompt'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 9999}, "max_length=9999, but .* reads from 3 to 128 tokens"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_bad_options_of_a_classifier_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        classifier_reward(tiny_classifier(), processing_class=tiny_tokenizer(), **options)


def test_a_softmax_over_one_label_is_refused():
    with pytest.raises(ConfigError, match="a softmax over one is always 1"):
        classifier_reward(tiny_classifier(["score"]), "score", processing_class=tiny_tokenizer())


def test_a_model_that_cannot_be_loaded_is_one_line():
    with pytest.raises(
        ModelError, match="nobody/nothing could not be loaded as a sequence-classification model"
    ) as caught:
        load_reward("nobody/nothing")
    assert "\n" not in str(caught.value)


# A bare model: TRL's meaning


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_bare_model_is_its_logit_of_prompt_and_completion(kind):
    model, tokenizer = tiny_classifier(["LABEL_0"], kind), tiny_tokenizer(bos=True)
    reward = model_reward(model, tokenizer, batch_size=2)
    expected = [
        by_hand(model, tokenizer, prompt + completion, add_special_tokens=False)[0].item()
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, topic=[1, 2, 3]) == pytest.approx(expected, abs=1e-5)


def test_a_bare_model_reads_conversations_through_its_chat_template():
    model, tokenizer = tiny_classifier(["LABEL_0"]), tiny_tokenizer(chat=True)
    reward = load_reward(model, processing_class=tokenizer)
    values = reward(prompts=chat(["hi", "hello there"], "user"), completions=chat(["yes", "no"], "assistant"))
    texts = ["<|user|>hi<|assistant|>yes<|end|>", "<|user|>hello there<|assistant|>no<|end|>"]
    expected = [by_hand(model, tokenizer, text, add_special_tokens=False)[0].item() for text in texts]
    assert values == pytest.approx(expected, abs=1e-5)


def test_a_bare_model_equals_trl_s_own_lines():
    """The lines of `GRPOTrainer._calculate_rewards` (trl 1.16) on the same batch."""
    from trl import data_utils

    model, tokenizer = tiny_classifier(["LABEL_0"]).eval(), tiny_tokenizer(chat=True)
    prompts, completions = chat(["hi", "hello there"], "user"), chat(["yes", "no"], "assistant")
    ours = load_reward(model, processing_class=tokenizer)(prompts=prompts, completions=completions)
    messages = [{"messages": p + c} for p, c in zip(prompts, completions, strict=True)]
    texts = [data_utils.apply_chat_template(x, tokenizer)["text"] for x in messages]
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.inference_mode():
        theirs = model(**inputs).logits[:, 0].tolist()
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_conversations_without_a_chat_template_are_refused():
    reward = model_reward(tiny_classifier(["LABEL_0"]), tiny_tokenizer())
    with pytest.raises(ModelError, match="no chat template"):
        reward(prompts=chat(["hi"], "user"), completions=chat(["yes"], "assistant"))


def test_a_bare_model_with_several_labels_names_classifier_reward(tmp_path):
    tiny_classifier(["toxic", "fine"]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has 2 labels \(toxic, fine\).*classifier_reward"):
        load_reward(str(tmp_path))


def test_a_bare_model_folder_runs_in_the_runner_under_trl_s_name(tmp_path):
    folder = tmp_path / "my-reward"
    tiny_classifier(["LABEL_0"]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    batch = score([str(folder), length_reward])
    assert list(batch.per_function) == ["my-reward", "length_reward"]
    assert batch.num_dropped == 0  # an empty completion has a logit too, as in TRL


def test_a_text_longer_than_the_reward_model_is_refused():
    reward = model_reward(tiny_classifier(["LABEL_0"]), tiny_tokenizer())
    with pytest.raises(RewardError, match="has 300 tokens, and GPT2ForSequenceClassification reads 128"):
        reward(prompts=["Z" * 200], completions=["Z" * 100])


def test_a_tokenizer_without_padding_pads_with_the_end_of_text():
    tokenizer = tiny_tokenizer(pad=False)
    model = tiny_classifier(["LABEL_0"])
    model_reward(model, tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.config.pad_token_id == tokenizer.eos_token_id


# Loading by name


def test_every_named_reward_has_its_function():
    assert set(NAMED_REWARDS) == {
        "sentiment", "sentiment-independent", "toxicity", "toxicity-independent", "repetition", "classifier", "http",
    }  # fmt: skip


def test_options_come_as_arguments_or_in_brackets():
    as_argument = load_reward("repetition", unit="tokens")
    in_brackets = load_reward("repetition(unit=tokens)")
    assert as_argument.scorer_name == in_brackets.scorer_name == "diversity of tokens"
    assert load_reward("repetition()").scorer_name == "diversity of words"
    assert load_reward("repetition( unit = 'tokens' )").scorer_name == "diversity of tokens"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sentimnt", "no reward named 'sentimnt'. Did you mean 'sentiment'"),
        ("Repetition", "Did you mean 'repetition'"),
        ("sentiment:negative", r"Write sentiment\(label=negative\)"),
        ("repetition(units=words)", r"no option 'units', did you mean 'unit'\? It has: unit"),
        ("repetition(words)", "'words' sets nothing"),
        ("classifier", r"needs model\. Write classifier\(model=\.\.\.\)"),
        ("no_such_module_here:f", "there is no module no_such_module_here"),
        ("math:squirt", "math has no 'squirt'. Did you mean 'sqrt'"),
        ("math:pi", "which cannot be called"),
        ("nowhere/rewards.py:f", "there is no file .*rewards.py"),
        ("two words", "is no name, model id or module:function"),
        (3, "A reward is 3, which cannot be called"),
    ],
)
def test_a_wrong_spec_says_what_is_right(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)


def test_a_function_is_returned_as_it_is():
    assert load_reward(length_reward) is length_reward
    assert load_reward(length_reward, processing_class=tiny_tokenizer()) is length_reward  # unread, as in TRL
    with pytest.raises(ConfigError, match=r"takes no options\. Set label inside it"):
        load_reward(length_reward, label="x")


def test_a_roberta_reads_as_many_tokens_as_it_has_positions_for():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token_id = 1  # as its config has it: positions are counted from there
    reward = classifier_reward(tiny_classifier(kind="roberta"), "POSITIVE", processing_class=tokenizer)
    [value] = reward(prompts=[""], completions=["the cat " * 100])
    assert 0 <= value <= 1


def test_options_are_read_as_what_they_are(monkeypatch):
    read = {}
    monkeypatch.setattr(rewards, "_made", lambda factory, name, options: read.update(options) or length_reward)
    for spec, options in [
        ("classifier(model=a/b, revision=1.0, label=2, minimize=true)",
         {"model": "a/b", "revision": "1.0", "label": 2, "minimize": True}),
        ("a/b(revision=none)", {"model": "a/b", "processing_class": None, "revision": None}),
        ("http(url='http://h/score?a=1,2', cache=7)", {"url": "http://h/score?a=1,2", "cache": "7"}),
        ("http://h:80/score(cache=a.db, timeout=5)", {"url": "http://h:80/score", "cache": "a.db", "timeout": 5}),
    ]:  # fmt: skip
        read.clear()
        load_reward(spec)
        assert read == options, spec


def test_a_function_of_a_module_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(
        "def short(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert same(score("rewards_of_mine:short").total, [1, 1, 1])
    with pytest.raises(ConfigError, match="takes no options"):
        load_reward("rewards_of_mine:short", scale=2)


def test_a_function_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
        "def one(**kwargs):\n    return [A().x] * 3\n"
    )
    assert load_reward(f"{path}:one") is load_reward(f"{path}:one")
    assert same(score(f"{path}:one").total, [1, 1, 1])


def test_a_module_that_fails_to_import_says_why(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="raised ZeroDivisionError"):
        load_reward(f"{tmp_path / 'bad.py'}:f")
    (tmp_path / "needs.py").write_text("import package_that_nobody_has\n")
    with pytest.raises(ConfigError, match="package_that_nobody_has"):
        load_reward(f"{tmp_path / 'needs.py'}:f")


def test_importing_rewards_imports_no_torch():
    code = "import sys, quark_lm.rewards\n"
    code += "from quark_lm.rewards import classifier, repetition, runner\n"
    code += "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_keeps_warnings_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(score([returns([None, None, None])]).total, [math.nan] * 3)
