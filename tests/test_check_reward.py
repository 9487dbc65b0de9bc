"""What `check` says of rewards that are good and of each kind that is not, and of tags."""

import functools
import json
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from quark_lm.check_reward import Report, check
from quark_lm.errors import ConfigError, DataError, ModelError, RewardError

PROMPTS = Dataset.from_dict({"prompt": [f"the {w} is {n}" for w in ("cat", "sun") for n in range(10)]})


def vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def checked_texts(reward, tmp_path, texts=None, **options) -> Report:
    """A report on the user's own completions, without a model: milliseconds."""
    texts = [f"{i % 7} aei{'x' * i}" for i in range(64)] if texts is None else texts
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps({"prompt": "so", "completion": text}) + "\n" for text in texts))
    return check(reward, completions=path, model=None, **options)


def warnings_of(report):
    return [finding.text for finding in report.findings if not finding.ok]


def test_a_graded_reward_has_nothing_to_mend(tmp_path):
    report = checked_texts(vowels, tmp_path)
    assert warnings_of(report) == []
    assert (report.none_share, report.completions, report.tags) == (0, 64, [])
    assert report.repeat_difference == report.order_difference == report.batch_difference == 0
    assert report.quantiles == 10
    assert 0 < report.minimum < report.mean < report.maximum
    assert report.texts_per_second > 0


def test_none_is_counted(tmp_path):
    def half(completions, **kwargs):
        return [None if text < "3" else len(text) for text in completions]

    report = checked_texts(half, tmp_path)
    assert report.none_share == sum(i % 7 < 3 for i in range(64)) / 64
    assert [w for w in warnings_of(report) if "get None" in w]
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_constant_reward_cannot_teach(tmp_path):
    report = checked_texts(lambda completions, **kwargs: [0.5] * len(completions), tmp_path)
    assert (report.distinct, report.tied_share, report.quantiles) == (1, 1.0, 1)
    assert "every reward is 0.5, so there is nothing to learn" in warnings_of(report)[0]


def test_a_reward_of_two_values_feeds_two_quantiles(tmp_path):
    def even(completions, **kwargs):
        return [float(text[0] in "024") for text in completions]

    report = checked_texts(even, tmp_path)
    assert report.quantiles == 2
    assert "Set num_quantiles=2" in warnings_of(report)[0]
    assert warnings_of(checked_texts(even, tmp_path, num_quantiles=2)) == []


def test_many_ties_leave_fewer_quantiles_than_distinct_values(tmp_path):
    # 20 distinct rewards, but nine completions in ten share one of them
    texts = ["a" * (i + 1) if i < 20 else "b" for i in range(200)]
    report = checked_texts(lambda completions, **kwargs: [len(t) for t in completions], tmp_path, texts)
    assert report.distinct == 20
    assert report.quantiles < 5
    assert report.tied_share == 181 / 200  # the one-letter "a" shares the reward of all "b"


def test_a_reward_that_depends_on_the_order_is_found(tmp_path):
    def by_rank(completions, **kwargs):
        return [float(i) for i in range(len(completions))]

    report = checked_texts(by_rank, tmp_path)
    assert report.repeat_difference == 0
    assert report.order_difference > 0.1
    assert [w for w in warnings_of(report) if w.startswith("the order of the texts changes rewards (up to ")]


def test_a_reward_that_is_normalised_over_its_batch_is_found(tmp_path):
    def normalised(completions, **kwargs):
        values = np.array(vowels(completions))
        return (values / values.max()).tolist()

    report = checked_texts(normalised, tmp_path)
    assert report.order_difference < 1e-12
    assert report.batch_difference > 0.1
    assert len(warnings_of(report)) == 1
    assert "the batch of the texts changes rewards" in warnings_of(report)[0]


def test_rounding_is_no_difference(tmp_path):
    def rounded(completions, **kwargs):
        return [v + 1e-5 * len(completions) / 64 for v in vowels(completions)]

    report = checked_texts(rounded, tmp_path)
    assert 0 < report.batch_difference < 1e-3
    assert warnings_of(report) == []


def test_a_random_reward_is_told_once_and_not_blamed_on_order(tmp_path):
    generator = random.Random(0)
    report = checked_texts(lambda completions, **kwargs: [generator.random() for _ in completions], tmp_path)
    assert len(warnings_of(report)) == 1
    assert "the same call twice gives other rewards" in warnings_of(report)[0]


def test_none_in_one_batch_and_a_number_in_another_is_a_difference(tmp_path):
    def alone(completions, **kwargs):
        return [None] if len(completions) == 1 else vowels(completions)

    report = checked_texts(alone, tmp_path)
    assert math.isinf(report.batch_difference)
    assert "None in one, a number in the other" in warnings_of(report)[0]


def test_columns_and_ids_reach_the_reward(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"completion": f"a b a {i}", "target": i} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def near(completions, completion_ids, target, **kwargs):
        seen.append((completions[0], completion_ids[0], target[0]))
        return [float(t) for t in target]

    check(near, completions=path, model=None)
    assert seen[0] == ("a b a 0", [0, 1, 0, 2], 0)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, functools.partial(tiny_llama, tie=False)])
def test_completions_are_sampled_and_tags_tried(build):
    model, tokenizer = build(), tiny_tokenizer()
    words = len(tokenizer)
    told = []
    report = check(
        vowels,
        PROMPTS,
        model=(model, tokenizer),
        num=64,
        tag_sets=[["few: ", "many: "], ["x", "y", "z"]],
        max_completion_length=6,
        tell=told.append,
    )
    assert report.samples_per_second > 0
    assert [tag.texts for tag in report.tags] == [["few: ", "many: "], ["x", "y", "z"], None]
    for tag in report.tags:
        assert 0 <= tag.auc <= 1
        assert 0 < tag.auc_se < 0.5
        assert 0 < tag.drift < math.inf
        assert 0 <= tag.reward <= 1
        assert tag.plain_reward == report.tags[0].plain_reward
    assert "trying reward tokens: 3 of 3" in told
    # the caller's model and tokenizer got no new tokens
    assert len(tokenizer) == words == model.get_input_embeddings().weight.shape[0]
    assert json.loads(json.dumps(report.to_dict()))["tags"][0]["drift"] == report.tags[0].drift


def test_the_same_seed_gives_the_same_report():
    reports = [
        check(vowels, PROMPTS, model=(tiny_llama(), tiny_tokenizer()), num=32, num_quantiles=3, max_completion_length=5)
        for _ in range(2)
    ]
    assert reports[0].tags == reports[1].tags
    assert reports[0].mean == reports[1].mean


def test_a_tag_that_the_model_understands_has_a_high_auc_and_the_reverse_a_low_one(monkeypatch):
    """The model's log-probabilities are replaced: best and worst tag differ by the number of vowels."""
    from quark_lm import policy

    tokenizer = tiny_tokenizer()
    good, bad = tokenizer(["good", "bad"], add_special_tokens=False)["input_ids"]

    def log_probs(model, head, prompts, completions, pad_id, barred=()):
        out = []
        for prompt, ids in zip(prompts, completions, strict=True):
            count = sum(c in "aeiou" for c in tokenizer.decode(ids))
            sign = 1 if prompt[: len(good)] == good else -1 if prompt[: len(bad)] == bad else 0
            out.append(-3.0 * len(ids) + sign * count)
        return np.array(out)

    monkeypatch.setattr(policy, "completion_log_probs", log_probs)
    report = check(
        vowels, PROMPTS, model=(tiny_gpt2(), tokenizer), num=100, tag_sets=[["bad", "good"], ["good", "bad"]]
    )
    right, wrong, _ = report.tags
    assert right.auc > 0.9
    assert wrong.auc < 0.1
    assert right.drift == pytest.approx(1.0)
    findings = report.findings[-3:]
    assert [finding.ok for finding in findings] == [True, False, True]
    assert "the wrong way round" in findings[1].text


def test_a_tag_that_lowers_the_reward_by_itself_is_found(monkeypatch):
    from quark_lm.check_reward import TagFigures, _judge_tags

    report = Report("r", 128, 0, 99, 0, 0.6, 0.1, 0, 1, 1e4, 10.0, 0, 0, 0, 10, 5)
    report.tags = [
        TagFigures(["a", "b"], 0.8, 0.05, 33.0, 30.0, 0.3, 0.6),
        TagFigures(["c", "d"], 0.8, 0.05, 33.0, 30.0, 0.59, 0.6),
        TagFigures(["e", "f"], 0.8, 0.05, 90.0, 30.0, 0.61, 0.6),
        TagFigures(["g", "h"], 0.51, 0.05, 33.0, 30.0, None, None),
        TagFigures(["i", "j"], 0.6, 0.08, 33.0, 30.0, None, None),
    ]
    _judge_tags(report)
    assert [finding.ok for finding in report.findings] == [False, True, False, False, False]
    assert "lowers the reward" in report.findings[0].text
    assert "perplexity x 3.00" in report.findings[2].text
    assert "hardly mean anything" in report.findings[3].text
    assert "128 completions cannot tell this from 0.5, which is nothing: check 330" in report.findings[4].text


def test_own_completions_with_a_model_try_the_tags_too(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": f"the cat {i}", "completion": f" eats {'a' * (i % 9)}{i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(vowels, completions=path, model=(tiny_llama(), tiny_tokenizer()), max_completion_length=5)
    assert len(report.tags) == 2
    assert report.samples_per_second is None


def test_conversations_reach_the_reward_as_messages():
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"say {i}"}] for i in range(20)]})
    seen = []

    def content(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    check(content, prompts, model=(tiny_gpt2(), tiny_tokenizer(chat=True)), num=20, max_completion_length=5)
    assert seen[0][0][0]["role"] == "user"
    assert seen[0][1][0]["role"] == "assistant"


def test_rewards_that_fail_are_errors_of_one_line(tmp_path):
    def raises(completions, **kwargs):
        raise KeyError("missing")

    for reward, words in [
        (raises, "raised KeyError"),
        (lambda completions, **kwargs: [1.0], "returned 1 rewards for"),
        (lambda completions, **kwargs: ["good"] * len(completions), "is no number"),
        (lambda completions, **kwargs: [math.nan] * len(completions), "returned nan"),
        (lambda completions, **kwargs: [None] * len(completions), "gave None for all 64 completions"),
    ]:
        with pytest.raises(RewardError, match=words) as caught:
            checked_texts(reward, tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [("", "holds 0 completions"), ("{", "line 1, is no JSON"), ('{"text": "a"}', "no text as its `completion`")],
)
def test_bad_completions_are_named_by_their_line(line, words, tmp_path):
    (tmp_path / "c.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=words):
        check(vowels, completions=tmp_path / "c.jsonl", model=None)


def test_completions_that_are_no_utf_8_are_one_clear_line(tmp_path):
    (tmp_path / "c.jsonl").write_bytes('{"completion": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="Give a JSONL file in UTF-8"):
        check(vowels, completions=tmp_path / "c.jsonl", model=None)


def test_published_prompts_are_read_and_a_mix_with_conversations_is_refused(tmp_path):
    rows = [{"prompt": {"text": "the cat", "toxicity": 0.1}, "completion": "ae" + "x" * i} for i in range(40)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": (tiny_gpt2(), tiny_tokenizer(chat=True)), "tag_sets": [["x", "y"]]}
    assert check(vowels, completions=path, **options).completions == 40
    rows[1]["prompt"] = [{"role": "user", "content": "the cat"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="Give every prompt as text, or every prompt as messages"):
        check(vowels, completions=path, **options)


def test_a_completion_may_hold_any_line_break(tmp_path):
    row = json.dumps({"completion": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds 2 completions, too few"):
        check(vowels, completions=tmp_path / "c.jsonl", model=None)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither prompts nor completions"):
        check(vowels, model=None)
    with pytest.raises(ConfigError, match="nobody to complete"):
        check(vowels, PROMPTS, model=None)
    with pytest.raises(ConfigError, match="fewer than two quantiles"):
        check(vowels, PROMPTS, tag_sets=[["one"]])
    with pytest.raises(ConfigError, match="num=3"):
        check(vowels, PROMPTS, num=3)
    with pytest.raises(DataError, match="There is no file"):
        check(vowels, completions=tmp_path / "none.jsonl", model=None)
    with pytest.raises(DataError, match="no column `prompt`"):
        check(vowels, Dataset.from_dict({"text": ["a"]}), model=(tiny_gpt2(), tiny_tokenizer()))
    with pytest.raises(ModelError, match="could not be loaded"):
        check(vowels, PROMPTS, model="nobody/no-such-model")
    too_long = Dataset.from_dict({"prompt": ["word " * 200]})
    with pytest.raises(DataError, match="tokens, but only"):
        check(vowels, too_long, model=(tiny_gpt2(), tiny_tokenizer()))


def test_bf16_models_are_read_in_their_own_dtype():
    model = tiny_llama().to(torch.bfloat16)
    report = check(vowels, PROMPTS, model=(model, tiny_tokenizer()), num=64, max_completion_length=4)
    assert len(report.tags) > 1
    assert all(0.5 < tag.drift < 2 for tag in report.tags)  # random weights hardly see what they read
