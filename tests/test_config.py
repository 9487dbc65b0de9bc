"""QuarkConfig: presets and who wins over them, every refusal with its words, and that a round is an epoch."""

import dataclasses
import re
from pathlib import Path

import numpy as np
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
    assert (paper.early_stop, authors.early_stop) == (False, False)


def test_the_authors_preset_sets_every_field_of_the_table_of_differences():
    rows = (Path(__file__).parents[1] / "docs" / "differences.md").read_text().splitlines()
    named = {name for row in rows if row.startswith("| ") for name in re.findall(r"`(\w+)`", row.split(" | ")[-1])}
    fields = {field.name for field in dataclasses.fields(QuarkConfig)}
    # theirs has nothing of the kind, and neither has ours until the user gives it
    not_theirs = {"reward_weights", "reward_attributes"}
    assert len(named & fields) > 20
    assert (named & fields) - not_theirs <= set(PRESETS["authors"])


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
    *[({"best_share": s}, "would leave draw='ends' one end") for s in (0.0, 1.0, 0.05, float("nan"))],
    ({"best_share": 0.5, "draw": "all"}, "best_share=0.5 is a share of the two ends, and draw='all'"),
    ({"dial_min_p": 1.0}, "dial_min_p=1.0 is no share of the likeliest token's probability"),
    ({"dial_min_p": 0.1, "explore_strength": 1.0}, "dial_min_p=0.1 would do nothing with explore_strength=1.0"),
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
    ({"max_failed_rewards": 1.5}, r"max_failed_rewards=1.5 is not a share"),
    ({"max_failed_rewards": float("nan")}, "max_failed_rewards=nan is not a share"),
    ({"reward_batch_size": 0}, "reward_batch_size=0 is below 1"),
    ({"reward_retries": -1}, "reward_retries=-1 is below 0"),
    ({"min_completion_length": 9, "max_completion_length": 8}, "no completion could ever end"),
    ({"save_only_model": True}, "a resumed run would be another run"),
    ({"average_tokens_across_devices": False}, "would depend on the number of processes"),
    (
        {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True},
        "metric_for_best_model='loss' is not measured on held-out prompts",
    ),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "metric_for_best_model='loss' is not measured on held-out prompts"),
    ({"enable_jit_checkpoint": True}, "would take SIGTERM from Quark"),
    ({"push_to_hub": True}, "would publish the whole run folder, the pool"),
    ({"accelerator_config": {"dispatch_batches": True}}, "sets dispatch_batches, which would cut"),
    ({"accelerator_config": '{"split_batches": true}'}, "sets split_batches, which would cut"),
    ({"use_liger_kernel": True}, "replaces the model's forward"),
    ({"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}, "replaces the model's forward"),
    ({"num_train_epochs": 9}, "num_train_epochs=9 would do nothing: .* Set num_rounds"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 would do nothing: the loss"),
    ({"train_sampling_strategy": "group_by_length"}, "would do nothing: a round's draws .* Set draw"),
    ({"data_seed": 3}, "data_seed=3 would do nothing: .* Set seed"),
    ({"resume_from_checkpoint": "runs/a/checkpoint-3"}, "would do nothing: a run goes on .* by itself. Leave it out"),
    ({"remove_unused_columns": True}, "remove_unused_columns=True would do nothing"),
    ({"per_device_eval_batch_size": 4}, "Set generation_batch_size"),
    ({"prediction_loss_only": True}, "not run through Trainer's evaluation loop"),
    ({"include_for_metrics": ["inputs"]}, "not run through Trainer's evaluation loop"),
    ({"draw": "best", "reward_token_style": "embedding"}, "dials away from the worst token, which draw='best' never"),
    (
        {"explore_token": "random", "reward_token_style": "embedding", "explore_strength": 1.0},
        "explore_token='random' asks for tokens that draw='ends' never trains",
    ),
    ({"eval_strategy": "epoch"}, "eval_strategy='epoch' would do nothing that eval_every does not do"),
    ({"eval_steps": 5}, "eval_steps=5 would do nothing without eval_strategy='steps'"),
    ({"eval_delay": 1}, "eval_delay=1 would do nothing without"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end=True would do nothing without"),
    ({"metric_for_best_model": "eval_reward"}, "would do nothing without eval_strategy='steps'"),
    ({"save_strategy": "best"}, "save_strategy='best' would never save without"),
    ({"beta": "0.1"}, "beta='0.1' is of type str. Give a number"),
    ({"learning_rate": "1e-4"}, "learning_rate='1e-4' is of type str. Give a number"),
    ({"num_rounds": 2.0}, "num_rounds=2.0 is of type float. Give a whole number"),
    ({"num_rounds": None}, "num_rounds=None is of type NoneType. Give a whole number"),
    ({"num_rounds": True}, "num_rounds=True is of type bool. Give a whole number"),
    ({"draw": 1}, "draw=1 is of type int. Give text"),
    ({"mask_reward_tokens": "no"}, "mask_reward_tokens='no' is of type str. Give True or False"),
    ({"reward_weights": 2.0}, "reward_weights=2.0 is of type float. Give a list, each item a number"),
    ({"reward_token_texts": "abcde"}, "reward_token_texts='abcde' is of type str. Give a list"),
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


WORKS = [
    {"beta": 0},
    {"learning_rate": None},
    {"reward_weights": (1, 0.5)},
    {"pool_window": None, "prompts_per_round": None},
    {"max_failed_rewards": 1.0, "reward_retries": 0, "reward_batch_size": 16},
    {"min_completion_length": 8, "max_completion_length": 8},
    {"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 2},
    {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "best", "metric_for_best_model": "eval_reward"},
    {"accelerator_config": {"even_batches": False}},
    {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}},
    {"num_train_epochs": 3, "num_rounds": 5},
    {"dataloader_drop_last": True, "label_names": ["labels"], "neftune_noise_alpha": 5.0},
]


@pytest.mark.parametrize("changes", WORKS, ids=str)
def test_what_works_is_not_refused(tmp_path, changes):
    made = config(tmp_path, **changes)
    for name in changes.keys() - {"accelerator_config", "num_train_epochs", "learning_rate"}:
        assert getattr(made, name) == changes[name]


def test_numpy_s_integers_are_taken_and_become_plain_ones(tmp_path):
    assert type(config(tmp_path, num_rounds=np.int64(2), beta=np.float64(0.5)).num_rounds) is int


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
    assert made.ddp_find_unused_parameters is False  # it would walk the graph once more a step


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


@pytest.mark.parametrize("preset", PRESETS)
def test_a_parser_that_names_every_field_is_told_that_a_preset_would_change_nothing(tmp_path, preset):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--preset", preset, "--draw", "all"]
    with pytest.raises(ConfigError, match=f"preset='{preset}' came with every field named.*would stay") as caught:
        HfArgumentParser(QuarkConfig).parse_args_into_dataclasses(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_copy_of_a_config_keeps_its_values(tmp_path, preset):
    made = config(tmp_path, preset=preset, num_rounds=2)
    copy = dataclasses.replace(made, seed=1)
    differ = {f.name for f in dataclasses.fields(made) if getattr(made, f.name) != getattr(copy, f.name)}
    assert differ - {"accelerator_config"} == {"seed"}
    if preset:  # with a value that may be named or not, it cannot tell a copy from a parser
        with pytest.raises(ConfigError, match="For a copy of a config set preset=None"):
            dataclasses.replace(config(tmp_path, preset=preset, draw="ends"))


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
    expected += " log_completions num_completions_to_print model_init_kwargs chat_template_kwargs"
    assert set(expected.split()) <= names - theirs
