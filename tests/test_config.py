"""QuarkConfig: presets and who wins over them, every refusal with its words, and that a round is an epoch."""

import dataclasses

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from quark_lm import QuarkConfig
from quark_lm.config import PRESETS, quark_fields
from quark_lm.errors import ConfigError, QuarkError


def config(tmp_path, **changes):
    return QuarkConfig(str(tmp_path), use_cpu=True, **changes)


# -- presets


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_all_its_fields(tmp_path, preset):
    made = config(tmp_path, preset=preset)
    for name, value in PRESETS[preset].items():
        assert getattr(made, name) == value, name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_field_that_is_named_wins_over_its_preset_even_with_our_default(tmp_path, preset):
    ours = {"draw": "ends", "explore_strength": 2.0, "per_device_train_batch_size": 4, "reward_token_style": "text"}
    made = config(tmp_path, preset=preset, reward_token_position="first", **ours)
    for name, value in ours.items():
        assert getattr(made, name) == value
    assert made.beta == 0.05
    assert made.quantile_scope == "global"


def test_the_presets_are_the_figures_of_the_paper_and_of_its_authors_code(tmp_path):
    paper, authors = config(tmp_path, preset="paper"), config(tmp_path, preset="authors")
    for made in (paper, authors):
        assert (made.num_quantiles, made.beta, made.learning_rate, made.adam_epsilon) == (5, 0.05, 1e-5, 1e-5)
        assert (made.per_device_train_batch_size, made.warmup_steps, made.steps_per_round) == (128, 500, 500)
        assert (made.max_completion_length, made.temperature, made.top_p, made.top_k) == (20, 1.0, 1.0, 0)
        assert (made.max_grad_norm, made.weight_decay, made.disable_dropout) == (0.0, 0.0, True)
        assert (made.reward_token_style, made.draw, made.pool_window) == ("embedding", "all", None)
    assert (paper.kl_direction, paper.entropy_coef, paper.mask_reward_tokens) == ("forward", 0.0, True)
    assert (authors.kl_direction, authors.entropy_coef, authors.mask_reward_tokens) == ("reverse", 0.06, False)
    assert (authors.reward_token_position, authors.min_completion_length) == ("before_bos", 3)


def test_presets_name_only_fields_that_exist():
    names = {field.name for field in dataclasses.fields(QuarkConfig)}
    for preset in PRESETS.values():
        assert set(preset) <= names


def test_without_a_preset_ours_are_in_force(tmp_path):
    made = config(tmp_path)
    assert (made.reward_token_style, made.draw, made.explore_strength) == ("text", "ends", 2.0)
    assert made.preset is None


# -- refusals

REFUSED = [
    ({"preset": "papers"}, r"preset='papers' is unknown. Use 'paper' or 'authors'"),
    ({"draw": "uniform"}, r"draw='uniform' is not one of 'all', 'balanced', 'ends', 'best'"),
    ({"reward_token_style": "tag"}, "reward_token_style='tag' is not one of"),
    ({"reward_token_init": "zeros"}, "reward_token_init='zeros' is not one of"),
    ({"reward_token_position": "last"}, "reward_token_position='last' is not one of"),
    ({"quantile_scope": "batch"}, "quantile_scope='batch' is not one of"),
    ({"explore_token": "worst"}, "explore_token='worst' is not one of"),
    ({"kl_direction": "both"}, "kl_direction='both' is not one of"),
    ({"num_quantiles": 1}, "num_quantiles=1 is below 2"),
    ({"num_rounds": 0}, "num_rounds=0 is below 1"),
    ({"steps_per_round": 0}, "steps_per_round=0 is below 1"),
    ({"num_generations": 0}, "num_generations=0 is below 1"),
    ({"max_completion_length": 0}, "max_completion_length=0 is below 1"),
    ({"min_completion_length": -1}, "min_completion_length=-1 is below 0"),
    ({"prompts_per_round": 0}, "prompts_per_round=0 is below 1"),
    ({"pool_window": 0}, "pool_window=0 is below 1"),
    ({"temperature": -0.5}, r"temperature=-0.5 is below 0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"beta": -1.0}, r"beta=-1.0 is below 0"),
    ({"top_k": -1}, "top_k=-1 is below 0"),
    ({"top_p": 0.0}, r"top_p=0.0 is not a probability above 0"),
    ({"top_p": 1.5}, r"top_p=1.5 is not a probability"),
    ({"token_dropout": 1.0}, r"token_dropout=1.0 is not a share"),
    ({"heldout_share": -0.1}, r"heldout_share=-0.1 is not a share"),
    ({"explore_strength": float("inf")}, "explore_strength=inf is not a number"),
    ({"explore_strength": float("nan")}, "explore_strength=nan is not a number"),
    ({"reward_token_texts": ["bad", "good"]}, "reward_token_texts has 2 texts, but num_quantiles=5"),
    ({"quantile_scope": "prompt", "num_generations": 1}, "num_generations=1 gives nothing to rank"),
    ({"reward_token_position": "before_bos"}, "puts words before the beginning-of-text token"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True restarts the loop"),
    ({"ignore_data_skip": True}, "ignore_data_skip=True would draw"),
    ({"dataloader_num_workers": 2}, "Workers of a data loader would keep the pool"),
    ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "Workers of a data loader"),
    ({"max_steps": 7}, "max_steps=7 would cut a round. Set num_rounds and steps_per_round"),
    ({"num_quantile": 5}, "no field 'num_quantile'.*Did you mean 'num_quantiles'"),
    ({"num_generation": 5, "preset": "paper"}, "no field 'num_generation'.*Did you mean 'num_generations'"),
    ({"xyzzy": 1}, "no field 'xyzzy'"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        config(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, QuarkError)
    assert isinstance(caught.value, ValueError)


# -- Trainer's own


@pytest.mark.parametrize("rounds", [1, 7])
def test_one_round_is_one_epoch(tmp_path, rounds):
    assert config(tmp_path, num_rounds=rounds).num_train_epochs == rounds
    assert config(tmp_path, preset="paper", num_rounds=rounds).num_train_epochs == rounds


def test_trainers_traps_are_set_otherwise(tmp_path):
    made = config(tmp_path)
    assert made.logging_nan_inf_filter is False
    assert made.disable_dropout is True
    assert made.max_grad_norm == 0
    assert made.weight_decay == 0
    assert made.remove_unused_columns is False
    assert made.save_strategy == "epoch"
    assert made.report_to == []  # no tracker, no telemetry


def test_the_learning_rate_remembers_whether_it_was_named(tmp_path):
    default, named = config(tmp_path), config(tmp_path, learning_rate=2e-5)
    assert (default.learning_rate, default.learning_rate_is_default) == (1e-5, True)
    assert (named.learning_rate, named.learning_rate_is_default) == (2e-5, False)


def test_it_parses_from_flags_as_trls_scripts_do(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--num_quantiles", "3", "--pool_window", "2"]
    flags += ["--reward_token_texts", "bad", "so so", "good", "--beta", "0.2", "--draw", "all"]
    (made,) = HfArgumentParser(QuarkConfig).parse_args_into_dataclasses(flags)
    assert (made.num_quantiles, made.pool_window, made.beta, made.draw) == (3, 2, 0.2, "all")
    assert made.reward_token_texts == ["bad", "so so", "good"]


def test_it_round_trips_through_yaml(tmp_path):
    made = config(tmp_path, num_rounds=3, reward_weights=[1.0, 0.5])
    written = yaml.safe_load(yaml.safe_dump(made.to_dict()))
    assert {name: written[name] for name in quark_fields()} == {name: made.to_dict()[name] for name in quark_fields()}


def test_every_field_of_ours_says_what_it_is():
    for field in dataclasses.fields(QuarkConfig):
        if field.name in quark_fields():
            assert len(field.metadata.get("help", "")) > 15, field.name


def test_fields_that_trl_has_too_bear_its_names():
    names, theirs = ({field.name for field in dataclasses.fields(kind)} for kind in (QuarkConfig, TrainingArguments))
    expected = "num_generations max_completion_length temperature top_p top_k beta reward_weights disable_dropout"
    expected += " log_completions num_completions_to_print model_init_kwargs"
    assert set(expected.split()) <= names - theirs
