"""QuarkTrainer's rounds on tiny models: what is sampled, ranked, drawn and written, and what is refused.

That its losses are those of the algorithm is tests/invariants.
"""

import copy
import dataclasses
import json
import math
import random
import re
import signal
import types
import warnings
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from test_policy import naive_log_probs
from tiny import USE_CPU, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

import quark_lm.trainer as trainer_module
from quark_lm import Pool, QuarkConfig, QuarkTrainer, RewardTokens
from quark_lm.errors import ConfigError, DataError, ModelError, PoolError, QuarkError, RewardError, TrainingError
from quark_lm.evaluation.evaluate import System, complete_system
from quark_lm.exploring import own_samples
from quark_lm.generation.hf import HFCompleter
from quark_lm.loss import LossSettings
from quark_lm.measuring import held_out_figures
from quark_lm.prompts import is_held_out
from quark_lm.quantiles import FewQuantilesWarning
from quark_lm.run_folder import MARKER, MetricsFile, last_checkpoint

PROMPTS = [
    f"{who} {what}" for who in ("the cat", "an old man", "rain", "her hat") for what in ("is", "sat in the", "or")
]


def graded(completions, **kwargs):
    """A value of its own for almost every text."""
    return [zlib.crc32(str(completion).encode()) / 2**32 for completion in completions]


def settings(folder, **changes):
    base = {
        "num_rounds": 2,
        "steps_per_round": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 5,
        "prompts_first_round": None,
        "prompts_per_round": None,
        "num_quantiles": 3,
        "heldout_share": 0.0,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "reward_retries": 0,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": USE_CPU,
        "disable_tqdm": True,
    }
    return QuarkConfig(str(folder), **{**base, **changes})


def make(folder, reward=graded, model=None, tokenizer=None, prompts=PROMPTS, given=(), **changes):
    """A trainer; `changes` are QuarkConfig's, `given` QuarkTrainer's own arguments."""
    dataset = prompts if isinstance(prompts, Dataset) else Dataset.from_dict({"prompt": prompts})
    return QuarkTrainer(
        tiny_llama() if model is None else model,
        reward,
        settings(folder, **changes),
        dataset,
        processing_class=tiny_tokenizer() if tokenizer is None else tokenizer,
        **dict(given),
    )


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def explored(monkeypatch):
    """What the completer was asked: a list of dicts, one a call."""
    calls = []
    original = HFCompleter.complete

    def complete(self, prompts, seeds, settings, *, dials=(), **kwargs):
        skip = list(kwargs.get("skip", ()))
        calls.append(
            {
                "prompts": prompts,
                "contrast": dials[0][0] if dials else None,
                "strength": dials[0][1] if dials else 1.0,
                "settings": settings,
                "skip": skip,
            }
        )
        return original(self, prompts, seeds, settings, dials=dials, **kwargs)

    monkeypatch.setattr(HFCompleter, "complete", complete)
    return calls


# -- explore


def test_round_0_samples_without_a_token_and_later_rounds_with_the_best(tmp_path, explored):
    trainer = make(tmp_path, explore_strength=1.0)
    trainer.train()
    plain = sorted(trainer.prompts.ids)
    best = list(trainer.reward_tokens.ids[-1])
    assert [sorted(call["prompts"]) for call in explored] == [plain, sorted([*best, *ids] for ids in plain)]
    assert [call["contrast"] for call in explored] == [None, None]
    told = trainer.pool.to_table().select(["explored_with", "strength"]).to_pylist()
    assert told[: len(plain)] == [{"explored_with": None, "strength": 1.0}] * len(plain)
    assert told[len(plain) :] == [{"explored_with": 2, "strength": 1.0}] * len(plain)


def test_guided_exploration_dials_from_the_worst_token_in_every_round_but_the_first(tmp_path, explored):
    trainer = make(tmp_path, explore_strength=2.0)
    trainer.train()
    first, second = explored
    assert (first["contrast"], first["strength"], second["strength"]) == (None, 1.0, 2.0)
    best, worst = (list(trainer.reward_tokens.ids[q]) for q in (-1, 0))
    assert [ids[len(best) :] for ids in second["prompts"]] == [ids[len(worst) :] for ids in second["contrast"]]
    assert all(ids[: len(worst)] == worst for ids in second["contrast"])


def test_random_exploration_asks_for_every_quantile(tmp_path):
    trainer = make(tmp_path, explore_token="random")
    trainer.train()
    assert set(trainer.pool.to_table([1]).column("explored_with").to_pylist()) == {0, 1, 2}


def test_exploring_a_round_that_is_on_disk_changes_nothing(tmp_path, explored):
    trainer = make(tmp_path)
    trainer.explore(0)
    hashes = trainer.pool.hashes()
    trainer.explore(0)
    again = make(tmp_path)
    again.explore(0)
    assert again.pool.hashes() == hashes
    assert len(explored) == 1


def test_a_round_samples_as_many_prompts_as_it_is_told_each_as_often(tmp_path):
    trainer = make(tmp_path, prompts_first_round=5, prompts_per_round=3, num_generations=2)
    trainer.train()
    for round, prompts in ((0, 5), (1, 3)):
        seen = trainer.pool.to_table([round]).column("prompt").to_pylist()
        assert len(seen) == 2 * prompts
        assert len(set(seen)) == prompts


def test_every_round_samples_other_prompts(tmp_path):
    trainer = make(tmp_path, prompts_first_round=3, prompts_per_round=3, num_rounds=4)
    trainer.train()
    rounds = [frozenset(trainer.pool.to_table([round]).column("prompt").to_pylist()) for round in range(4)]
    assert len(set(rounds)) > 1
    assert len(frozenset.union(*rounds[1:])) > 3


def test_a_reward_sees_all_samples_of_a_prompt_at_once(tmp_path):
    seen = []

    def compared(prompts, completions, **kwargs):
        seen.append([prompts.count(prompt) for prompt in dict.fromkeys(prompts)])
        return graded(completions)

    make(tmp_path, compared, num_generations=3, reward_batch_size=4).explore(0)
    assert len(seen) == len(PROMPTS)
    assert seen == [[3]] * len(PROMPTS)


def test_a_prompts_samples_belong_to_one_process():
    parts = []
    for rank in range(2):
        accelerator = types.SimpleNamespace(num_processes=2, process_index=rank)
        parts.append(own_samples(types.SimpleNamespace(accelerator=accelerator), 15, 3).tolist())
    assert parts == [[0, 1, 2, 6, 7, 8, 12, 13, 14], [3, 4, 5, 9, 10, 11]]


def test_more_prompts_than_there_are_are_each_sampled_several_times(tmp_path):
    trainer = make(tmp_path, prompts_first_round=30)
    trainer.explore(0)
    rows = trainer.pool.to_table([0]).to_pylist()
    times = [sum(row["prompt"] == prompt for row in rows) for prompt in PROMPTS]
    assert (sum(times), set(times)) == (30, {2, 3})
    assert len({(row["prompt"], row["completion"]) for row in rows}) > 20  # with other draws


def test_samples_are_kept_as_they_were_drawn(tmp_path):
    tokenizer = tiny_tokenizer()
    trainer = make(tmp_path, tokenizer=tokenizer, prompts=PROMPTS, num_generations=40, num_rounds=1)
    trainer.explore(0)
    rows = trainer.pool.to_table().to_pylist()
    ended = [row for row in rows if row["completion_ids"][-1] == tokenizer.eos_token_id]
    assert 0 < len(ended) < len(rows)
    for row in rows:
        assert 1 <= len(row["completion_ids"]) <= 5
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    assert any(tokenizer(row["completion"])["input_ids"] != row["completion_ids"] for row in rows)


def test_exploring_leaves_the_random_state_of_the_run_alone_even_if_the_reward_is_random(tmp_path):
    def noisy(completions, **kwargs):
        return [torch.rand(1).item() + random.random() + np.random.rand() for _ in completions]  # noqa: NPY002

    trainer = make(tmp_path, noisy)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    trainer.explore(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    torch.rand(3)
    other = make(tmp_path / "other", noisy)
    other.explore(0)
    assert other.pool.rewards.tolist() == trainer.pool.rewards.tolist()


def test_other_columns_and_the_state_reach_the_reward_function(tmp_path):
    seen = []

    def reward(prompts, completions, topic, trainer_state, **kwargs):
        seen.append((prompts, topic, trainer_state.global_step))
        return graded(completions)

    topics = [f"topic of {prompt}" for prompt in PROMPTS]
    trainer = make(tmp_path, reward, prompts=Dataset.from_dict({"prompt": PROMPTS, "topic": topics}))
    trainer.train()
    assert [step for _, _, step in seen] == [0, 2]
    for prompts, topic, _ in seen:
        assert topic == [f"topic of {prompt}" for prompt in prompts]


def test_several_rewards_are_weighted_and_kept_apart_in_the_pool(tmp_path):
    def long(completions, log_extra, log_metric, **kwargs):
        log_extra("first letter", [completion[:1] for completion in completions])
        log_metric("letters", sum(map(len, completions)))
        return [float(len(completion)) for completion in completions]

    trainer = make(tmp_path, [graded, long], reward_weights=[2.0, 0.5])
    trainer.train()
    table = trainer.pool.to_table([0])
    parts = np.array([table.column(f"reward/{name}").to_pylist() for name in ("graded", "long")])
    np.testing.assert_allclose(table.column("reward").to_pylist(), 2 * parts[0] + 0.5 * parts[1])
    assert table.column("extra/first letter").to_pylist() == [c[:1] for c in table.column("completion").to_pylist()]
    assert metrics(tmp_path)[0]["rewards/letters"] == sum(parts[1])


def test_samples_without_a_reward_are_counted_kept_and_never_drawn(tmp_path):
    def some(completions, **kwargs):
        return [None if i % 3 == 0 else value for i, value in enumerate(graded(completions))]

    trainer = make(tmp_path, some, num_rounds=1)
    with pytest.warns(UserWarning, match="dropped 4 of 12 completions: the reward returned None"):
        trainer.train()
    assert np.isnan(trainer.pool.rewards).tolist() == [i % 3 == 0 for i in range(12)]
    assert (trainer.quantize() < 0).tolist() == [i % 3 == 0 for i in range(12)]
    assert metrics(tmp_path)[0]["dropped"] == 4


def test_conversations_go_through_the_chat_template_and_rewards_get_messages(tmp_path):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return graded(completions)

    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    trainer = make(tmp_path, reward, tokenizer=tiny_tokenizer(chat=True), prompts=prompts)
    trainer.train()
    assert all(prompt in prompts for prompt, _ in seen)
    assert all(
        len(completion) == 1 and completion[0]["role"] == "assistant" and isinstance(completion[0]["content"], str)
        for _, completion in seen
    )
    assert trainer.prompts.texts[0] == f"<|user|>{PROMPTS[0]}<|assistant|>"
    assert trainer.prompts.token_at[0] == 1  # the token opens the user's message


def test_a_users_own_scored_data_is_round_0(tmp_path, explored):
    data = {
        "prompt": PROMPTS[:4],
        "completion": [" a", " warm and", " dry", ""],
        "reward": [0.1, 0.9, None, 0.5],
    }
    with pytest.warns(UserWarning, match="left out 1 completions without a token"):
        trainer = make(tmp_path, given={"initial_pool": Dataset.from_dict(data)}, num_quantiles=2)
    with pytest.warns(UserWarning, match="dropped 1 of 3 completions"):
        trainer.explore(0)
    rows = trainer.pool.to_table().to_pylist()
    assert not explored
    assert [row["completion"] for row in rows] == [" a", " warm and", " dry"]
    assert [row["reward"] for row in rows] == [0.1, 0.9, None]
    assert [row["prompt_index"] for row in rows] == [0, 1, 2]
    # as if sampled: what is shorter than a completion may be has ended
    assert tiny_tokenizer().decode(rows[0]["completion_ids"]) == " a<|end|>"
    assert tiny_tokenizer().decode(rows[1]["completion_ids"]) == " warm and"


def test_quantiles_within_a_prompt_keep_the_prompts_of_scored_data_apart(tmp_path):
    data = {
        "prompt": [f"other {i // 3}" for i in range(9)],
        "completion": [f" {i}" for i in range(9)],
        "reward": [i / 10 for i in range(9)],
    }
    given = {"initial_pool": Dataset.from_dict(data)}
    trainer = make(tmp_path, given=given, quantile_scope="prompt", num_generations=3)
    trainer.explore(0)
    assert trainer.quantize().tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"prompt": ["the " * 200], "completion": [" a"], "reward": [1.0]}, "has 400 tokens, but only"),
        ({"prompt": ["the"], "completion": ["a " * 200], "reward": [1.0]}, "completion of row 0 have 4.. tokens, but"),
        ({"prompt": ["the"], "completion": [""], "reward": [1.0]}, "no completion has a token"),
    ],
)
@pytest.mark.filterwarnings("ignore:initial_pool")
def test_scored_data_that_does_not_fit_the_model_is_refused_before_the_run_begins(tmp_path, data, words):
    with pytest.raises(DataError, match=words):
        make(tmp_path, given={"initial_pool": Dataset.from_dict(data)})
    assert not list(tmp_path.iterdir())


# -- quantize and draw


def test_held_out_prompts_are_never_drawn(tmp_path):
    trainer = make(tmp_path, heldout_share=0.4, steps_per_round=8, meaning_rows=0)
    trainer.explore(0)
    trainer.quantize(0)
    trainer._draw(0)
    held = {
        tuple(ids)
        for ids, text in zip(trainer.prompts.ids, trainer.prompts.texts, strict=True)
        if is_held_out(text, 0.4, "pool")
    }
    drawn = {tuple(draw["prompt_ids"]) for draw in trainer.draws}
    assert 0 < len(held) < len(PROMPTS)
    assert not held & drawn
    assert trainer.pool.held_out.sum() == len(held)


def test_a_round_draws_its_steps_times_the_batch_with_the_quantiles_of_the_pool(tmp_path):
    trainer = make(tmp_path, steps_per_round=3, gradient_accumulation_steps=2, draw="all")
    trainer.explore(0)
    quantile = trainer.quantize(0)
    trainer._draw(0)
    assert len(trainer.draws) == 3 * 2 * 4
    rows = {
        (tuple(row["prompt_ids"]), tuple(row["completion_ids"])): q
        for row, q in zip(trainer.pool.to_table().to_pylist(), quantile, strict=True)
    }
    for draw in trainer.draws:
        assert rows[tuple(draw["prompt_ids"]), tuple(draw["completion_ids"])] == draw["quantile"]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_token_dropout_leaves_the_token_out_of_its_share_of_the_draws(tmp_path, share):
    trainer = make(tmp_path, token_dropout=share, steps_per_round=200)
    trainer.explore(0)
    trainer.quantize(0)
    trainer._draw(0)
    assert np.mean([draw["quantile"] is None for draw in trainer.draws]) == pytest.approx(share, abs=0.05 * (share > 0))


def test_the_window_forgets_older_rounds(tmp_path):
    trainer = make(tmp_path, num_rounds=3, pool_window=2)
    trainer.train()
    quantile = trainer.quantize(2)
    assert (quantile[trainer.pool.rounds == 0] == -1).all()
    assert (quantile[trainer.pool.rounds > 0] >= 0).all()


def test_quantiles_within_a_prompt_rank_its_own_samples(tmp_path):
    trainer = make(tmp_path, num_generations=6, quantile_scope="prompt", num_rounds=1)
    trainer.train()
    quantile, rewards = trainer.quantize(0), trainer.pool.rewards
    for prompt in range(len(PROMPTS)):
        here = trainer.pool.prompt_indices == prompt
        assert set(quantile[here]) == {0, 1, 2}
        assert quantile[here][rewards[here].argmax()] == 2


def test_fewer_distinct_rewards_than_quantiles_warns_and_names_them(tmp_path):
    def two(completions, **kwargs):
        return [float(i % 2) for i, _ in enumerate(completions)]

    trainer = make(tmp_path, two)
    with pytest.warns(FewQuantilesWarning, match=r"num_quantiles=3 needs at least 3 distinct rewards.*2 \(0 and 1\)"):
        trainer.train()
    assert metrics(tmp_path)[0]["quantiles_used"] == 2
    # half of the new samples reach the last best threshold, which is the best that there is
    assert [line["share_above_best"] for line in metrics(tmp_path) if "share_above_best" in line] == [0.5]


def raises(completions, **kwargs):
    raise ZeroDivisionError("division by zero")


BAD_REWARDS = {
    "raises": (raises, "raises raised ZeroDivisionError: division by zero"),
    "wrong length": (lambda completions, **kwargs: [1.0], "returned 1 rewards for 12 completions"),
    "strings": (lambda completions, **kwargs: ["good" for _ in completions], "is no number"),
    "NaN": (lambda completions, **kwargs: [math.nan for _ in completions], "returned nan at index 0"),
    "infinite": (lambda completions, **kwargs: [math.inf for _ in completions], "returned inf at index 0"),
    "all None": (
        lambda completions, **kwargs: [None for _ in completions],
        "gave None for all 12 completions of round 1",
    ),
    "constant": (lambda completions, **kwargs: [0.25 for _ in completions], r"rewards .* are equal \(0.25\)"),
    "nothing": (lambda completions, **kwargs: None, "returned None, not a list"),
}


@pytest.mark.parametrize("kind", BAD_REWARDS)
def test_a_bad_reward_is_one_clear_line_and_leaves_no_round_behind(tmp_path, kind, explored):
    reward, words = BAD_REWARDS[kind]
    trainer = make(tmp_path, reward)
    with pytest.raises(RewardError, match=words) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    # the reward can be mended and the same command given again: what was sampled is not sampled anew
    assert Pool.open(tmp_path).num_rounds == 0
    explored.clear()
    good = graded
    good = type(good)(good.__code__, good.__globals__, reward.__name__)
    good.__qualname__ = reward.__qualname__
    mended = make(tmp_path, good)
    mended.train()
    assert mended.state.global_step == 4
    assert len(explored[0]["skip"]) == len(PROMPTS)
    assert mended.pool.to_table([0]).column("reward").null_count == 0
    assert not list((tmp_path / "pool").glob("*.partial*"))


# -- learn


def test_the_logged_loss_is_made_of_its_parts(tmp_path):
    make(tmp_path, beta=0.5, entropy_coef=0.1).train()
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert line["loss"] == pytest.approx(line["nll"] + 0.5 * line["kl"] - 0.1 * line["entropy"], rel=1e-5)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_step_and_names_its_rows(tmp_path, what):
    trainer = make(tmp_path, save_strategy="epoch")
    at_step_3 = {}

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                at_step_3.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
                norm = trainer.model.model.norm.weight
                if what == "loss":
                    norm.data[0] = float("nan")
                    at_step_3["model.norm.weight"] = norm.data.clone()
                else:
                    norm.register_hook(lambda gradient: gradient * float("inf"))

    trainer.add_callback(Spoil())
    with pytest.raises(TrainingError, match=r"gradient of step 3 is not finite.*not-finite-step-3.json"):
        trainer.train()
    for key, weight in trainer.model.state_dict().items():
        assert torch.equal(weight.nan_to_num(), at_step_3[key].nan_to_num()), key
    told = json.loads((tmp_path / "not-finite-step-3.json").read_text())
    pool = trainer.pool.gather(np.array([row["pool_row"] for row in told["rows"]]), ["completion_ids"])
    assert (told["round"], len(told["rows"])) == (1, 4)
    assert [row["completion_ids"] for row in told["rows"]] == pool["completion_ids"]
    assert last_checkpoint(tmp_path)[0].name == "checkpoint-2"


def test_without_beta_there_is_no_reference_forward(tmp_path):
    trainer = make(tmp_path, beta=0.0, num_rounds=1)
    trainer.explore(0)
    trainer.policy._copy.forward = trainer.policy._copy.model.forward = None
    trainer.train()
    assert all(line["kl"] == 0 for line in metrics(tmp_path) if "loss" in line)


def test_the_reference_under_an_adapter_has_no_dropout(tmp_path, monkeypatch):
    """With dropout on in the policy: at the first step the adapter adds nothing, so the KL must be dropout's alone."""
    modes = []
    original = trainer_module.completion_states

    def noted(model, batch, prefix=""):
        modes.append((prefix, model.training))
        return original(model, batch, prefix)

    monkeypatch.setattr(trainer_module, "completion_states", noted)
    given = {"peft_config": lora(fan_in_fan_out=True, lora_dropout=0.1)}
    make(tmp_path, model=tiny_gpt2(), given=given, disable_dropout=False, num_rounds=1).train()
    assert modes == [("reference_", False), ("", True)] * 2


@pytest.mark.parametrize("position", ["first", "before_completion"])
def test_the_reference_never_sees_a_reward_token_and_the_policy_does(tmp_path, position):
    tokens = {"reward_token_style": "embedding", "reward_token_position": position, "draw": "balanced"}
    trainer = make(tmp_path, model=tiny_gpt2(), **tokens)
    seen = {"policy": set(), "reference": set()}
    for name, model in (("policy", trainer.model), ("reference", trainer.policy._copy)):
        hook = lambda module, inputs, name=name: seen[name].update(inputs[0].flatten().tolist())  # noqa: E731
        model.get_input_embeddings().register_forward_pre_hook(hook)
    trainer.train()
    assert len(trainer.reward_tokens.barred) == 3
    assert set(trainer.reward_tokens.barred) <= seen["policy"]
    assert seen["reference"]
    assert not set(trainer.reward_tokens.barred) & seen["reference"]


def test_the_adapter_is_off_when_the_reference_reads_and_it_sees_no_reward_token(tmp_path, monkeypatch):
    trainer = make(tmp_path, given={"peft_config": lora()}, reward_token_style="embedding")
    reads = []
    original = trainer_module.completion_states

    def states(model, batch, prefix=""):
        layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
        reads.append((prefix, layer.disable_adapters, set(batch[f"{prefix}input_ids"].flatten().tolist())))
        return original(model, batch, prefix)

    monkeypatch.setattr(trainer_module, "completion_states", states)
    trainer.train()
    assert {(prefix, off) for prefix, off, _ in reads} == {("reference_", True), ("", False)}
    for prefix, _, ids in reads:
        assert bool(ids & set(trainer.reward_tokens.barred)) is (prefix == "")


def test_an_adapter_learns_only_itself_and_the_new_rows_and_they_come_back_from_a_checkpoint(tmp_path):
    options = {"reward_token_style": "embedding", "save_strategy": "epoch", "draw": "balanced"}
    trainer = make(tmp_path, given={"peft_config": lora()}, **options)
    barred = list(trainer.reward_tokens.barred)
    old = trainer.model.get_input_embeddings().weight.detach().clone()
    learning = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in learning)
    assert sum(trainer.model.get_parameter(n).numel() for n in learning if "trainable_tokens" in n) == 3 * old.shape[1]
    trainer.train()
    merged = copy.deepcopy(trainer.model).merge_and_unload().get_input_embeddings().weight
    moved = (merged - old).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == barred

    newest, _ = last_checkpoint(tmp_path)
    tokenizer = tiny_tokenizer()
    base = tiny_llama()
    tokens = RewardTokens.load(newest)
    assert tokens == trainer.reward_tokens
    again = RewardTokens.create(
        base, tokenizer, num_quantiles=3, style="embedding", seed=7
    )  # other rows: they are saved
    assert again.ids == tokens.ids
    loaded = PeftModel.from_pretrained(base, newest)
    ids = torch.tensor([[*tokens.ids[2], 20, 21]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_a_model_that_comes_with_its_adapter_trains(tmp_path):
    trainer = make(tmp_path, model=get_peft_model(tiny_llama(), lora()))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_model_whose_adapter_was_trained_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), lora())
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
    with pytest.raises(ModelError, match=r"was trained before.*merge_and_unload"):
        make(tmp_path, model=model, reward_token_style="text")


def test_two_trainers_with_one_seed_start_from_the_same_adapter(tmp_path):
    weights = []
    config = lora()
    for part in ("a", "b"):
        torch.seed()
        trainer = make(tmp_path / part, given={"peft_config": config}, reward_token_style="embedding")
        weights.append({n: p for n, p in trainer.model.named_parameters() if "lora_" in n})
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert config.trainable_token_indices is None  # the caller's own stays as it was


def test_activation_checkpointing_changes_no_loss(tmp_path):
    plain = make(tmp_path / "plain", model=tiny_gpt2())
    plain.train()
    saving = make(tmp_path / "saving", model=tiny_gpt2(), activation_checkpointing=True)
    saving.train()
    np.testing.assert_allclose(losses(plain), losses(saving), rtol=1e-6)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The losses in float32, of a user's own data."""
    trainer = make(tmp_path_factory.mktemp("exact"), num_rounds=1, given={"initial_pool": own_data()})
    trainer.train()
    return losses(trainer)


def own_data():
    rewards = [n / len(PROMPTS) for n in range(len(PROMPTS))]
    return Dataset.from_dict({"prompt": PROMPTS, "completion": [f" {p[:5]}" for p in PROMPTS], "reward": rewards})


@pytest.mark.filterwarnings("ignore:The model is in bfloat16 and trained as a whole")
@pytest.mark.parametrize("how", ["weights", "autocast", "weights under an adapter"])
def test_bfloat16_learns_about_the_same(tmp_path, how, exact):
    model = tiny_llama().to(torch.bfloat16) if "weights" in how else None
    given = {"initial_pool": own_data(), "peft_config": lora() if "adapter" in how else None}
    rough = make(tmp_path, model=model, given=given, bf16=how == "autocast", num_rounds=2)
    rough.train()  # the second round samples, too
    assert losses(rough)[0] == pytest.approx(exact[0], rel=0.02)
    assert np.isfinite(losses(rough)).all()


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_a_preset_runs(tmp_path, preset):
    small = {"steps_per_round": 2, "per_device_train_batch_size": 4, "max_completion_length": 4}
    trainer = QuarkTrainer(
        tiny_gpt2(),
        graded,
        QuarkConfig(
            str(tmp_path), preset=preset, num_rounds=2, use_cpu=USE_CPU, disable_tqdm=True, save_strategy="no", **small
        ),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert len(trainer.reward_tokens.barred) == 5
    assert trainer.loss_settings.kl_direction == {"paper": "forward", "authors": "reverse"}[preset]


# -- models and arguments


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("special", [{"pad": False}, {"bos": True}, {"bos": True, "pad": False}])
def test_models_without_padding_or_beginning_of_text_train(tmp_path, build, special):
    trainer = make(tmp_path, model=build(), tokenizer=tiny_tokenizer(**special), num_rounds=1)
    trainer.train()
    assert trainer.prompts.token_at == [int(special.get("bos", False))] * len(PROMPTS)
    assert np.isfinite(losses(trainer)).all()


def test_an_empty_prompt_needs_a_beginning_of_text(tmp_path):
    with (
        pytest.warns(UserWarning, match="left out 1 empty and 0 repeated of 2"),
        pytest.raises(RewardError, match="equal"),
    ):
        make(tmp_path, lambda completions, **kwargs: [1.0] * len(completions), prompts=["", "a"]).train()


def test_a_prompt_that_does_not_fit_the_context_is_named(tmp_path):
    with pytest.raises(DataError, match=r"Prompt 1 has 13\d tokens, but only \d+ fit") as caught:
        make(tmp_path, prompts=["the cat", "x y z " * 23])
    assert "\n" not in str(caught.value)


def arguments(tmp_path, **changes):
    base = {
        "model": tiny_llama(),
        "reward_funcs": graded,
        "args": settings(tmp_path),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
        "processing_class": tiny_tokenizer(),
    }
    return {**base, **changes}


def test_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(DataError, match="train_dataset is missing"):
        QuarkTrainer(**arguments(tmp_path, train_dataset=None))
    tokens = RewardTokens.create(tiny_llama(), tiny_tokenizer(), num_quantiles=4)
    with pytest.raises(ConfigError, match="num_quantiles=3, but the given reward_tokens name 4"):
        QuarkTrainer(**arguments(tmp_path), reward_tokens=tokens)
    with pytest.raises(ConfigError, match="model_init_kwargs is for a model given by its name"):
        QuarkTrainer(**arguments(tmp_path, args=settings(tmp_path, model_init_kwargs={"dtype": "bfloat16"})))
    adapted = get_peft_model(tiny_llama(), lora())
    with pytest.raises(ConfigError, match="has an adapter already and peft_config asks for another"):
        QuarkTrainer(**arguments(tmp_path, model=adapted, peft_config=lora()))
    with pytest.raises(ConfigError, match="has an adapter already, which would leave the rows"):
        QuarkTrainer(**arguments(tmp_path, model=adapted, args=settings(tmp_path, reward_token_style="embedding")))
    new_rows = arguments(tmp_path, args=settings(tmp_path, reward_token_style="embedding"))
    with pytest.raises(ConfigError, match="trainable_token_indices is set by Quark"):
        QuarkTrainer(**new_rows, peft_config=lora(trainable_token_indices=[3]))
    with pytest.raises(ConfigError, match="1 reward functions, but 2 reward_processing_classes"):
        QuarkTrainer(**arguments(tmp_path), reward_processing_classes=[None, None])
    with pytest.raises(ConfigError, match="reward_weights has 2 entries for 1 reward functions"):
        QuarkTrainer(**arguments(tmp_path, args=settings(tmp_path, reward_weights=[1.0, 2.0])))
    with pytest.raises(DataError, match="needs held-out prompts"):
        QuarkTrainer(**arguments(tmp_path)).evaluate()


def test_a_model_that_quark_trained_before_is_refused_in_style_embedding(tmp_path):
    tokenizer = tiny_tokenizer()
    make(tmp_path / "a", tokenizer=tokenizer, reward_token_style="embedding")
    with pytest.raises(ModelError, match=r"already holds <\|quark_0\|>"):
        make(tmp_path / "b", tokenizer=tokenizer, reward_token_style="embedding")


def test_a_model_by_its_folder_brings_its_tokenizer(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = QuarkTrainer(
        str(tmp_path / "base"), graded, settings(tmp_path / "run", num_rounds=1), Dataset.from_dict({"prompt": PROMPTS})
    )
    trainer.train()
    assert trainer.processing_class("the cat")["input_ids"] == tiny_tokenizer()("the cat")["input_ids"]
    with pytest.raises(ModelError, match=r"There is no folder .*none here"):
        QuarkTrainer(str(tmp_path / "none"), graded, settings(tmp_path / "x"), Dataset.from_dict({"prompt": PROMPTS}))


def test_a_model_by_its_name_learns_in_float32_unless_it_is_told_or_an_adapter_learns(tmp_path):
    saved = tmp_path / "model"
    tiny_llama().to(torch.bfloat16).save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    for given, changes, dtype in [
        ({}, {}, torch.float32),
        ({}, {"model_init_kwargs": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"peft_config": lora()}, {}, torch.bfloat16),
    ]:
        trainer = make(tmp_path / "run", model=str(saved), given=given, **changes)
        assert trainer_module.causal_lm(trainer.model).dtype == dtype


def test_virtual_tokens_which_nothing_reads_are_refused(tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(ConfigError, match=r"PromptTuningConfig.*Use LoraConfig"):
        make(tmp_path, given={"peft_config": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")})


def test_the_learning_rate_depends_on_what_learns_unless_it_is_named(tmp_path):
    assert make(tmp_path, learning_rate=None).args.learning_rate == 1e-5
    assert make(tmp_path, learning_rate=None, given={"peft_config": lora()}).args.learning_rate == 6e-4
    assert make(tmp_path, learning_rate=1e-5, given={"peft_config": lora()}).args.learning_rate == 1e-5


def test_trls_own_reward_functions_run_unchanged(tmp_path):
    rewards = pytest.importorskip("trl.rewards")
    long = rewards.get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=5)
    repeated = rewards.get_repetition_penalty_reward(ngram_size=1)
    trainer = make(tmp_path, [long, repeated], num_generations=4, num_rounds=1, num_quantiles=2)
    trainer.train()
    assert trainer.rewards.names == ["soft_overlong_punishment_reward", "repetition_penalty_reward"]
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    conversation = make(
        tmp_path / "chat", [rewards.think_format_reward, graded], prompts=prompts, tokenizer=tiny_tokenizer(chat=True)
    )
    conversation.train()
    table = conversation.pool.to_table()
    said = [[{"role": "assistant", "content": text}] for text in table.column("completion").to_pylist()]
    summed = [a + b for a, b in zip(rewards.think_format_reward(said), graded(said), strict=True)]
    assert table.column("reward").to_pylist() == pytest.approx(summed)


# -- what a run tells and writes


def test_every_metric_line_has_its_round_and_step(tmp_path):
    trainer = make(tmp_path, given={"eval_dataset": Dataset.from_dict({"prompt": ["a dog"]})}, heldout_share=0.0)
    trainer.train()
    lines = metrics(tmp_path)
    assert [(line["round"], line["step"]) for line in lines if "loss" in line] == [(0, 1), (0, 2), (1, 3), (1, 4)]
    assert [(line["round"], line["step"]) for line in lines if "samples" in line] == [(0, 0), (1, 2)]
    assert [(line["round"], line["step"]) for line in lines if "eval_reward" in line] == [(0, 2), (1, 4)]
    assert all({"round", "step"} <= set(line) for line in lines)
    assert [(line["round"], line["step"]) for line in lines if "base_reward" in line] == [(0, 0)]
    first = next(line for line in lines if "samples" in line)
    assert first["reward"] == pytest.approx(trainer.pool.to_table([0]).column("reward").to_numpy().mean())
    assert first["pool_samples"] == 12
    assert "share_above_best" in next(line for line in lines if line["round"] == 1)


def test_figures_that_are_not_finite_are_null(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").append({"round": 0, "step": 1, "grad_norm": math.inf, "x": math.nan})
    assert metrics(tmp_path) == [{"round": 0, "step": 1, "grad_norm": None, "x": None}]


def test_metrics_are_strict_json_whatever_the_figures(tmp_path):
    def none_for_a_dog(prompts, completions, **kwargs):
        return [None if "dog" in p else r for p, r in zip(prompts, graded(completions), strict=True)]

    make(tmp_path, none_for_a_dog, given={"eval_dataset": Dataset.from_dict({"prompt": ["a dog"]})}).train()

    def refuse(constant):
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_held_out_prompts_are_asked_for_the_best_token_and_the_base_without_one(tmp_path, explored):
    given = {"eval_dataset": Dataset.from_dict({"prompt": ["a dog", "the sun"]})}
    trainer = make(tmp_path, given=given, num_eval_generations=2)
    best = list(trainer.reward_tokens.ids[-1])
    trainer.evaluate()
    held_out = sorted(ids for ids in trainer.eval_prompts.ids for _ in range(2))
    assert sorted(explored[-1]["prompts"]) == [[*best, *ids] for ids in held_out]
    trainer.evaluate_base()
    assert sorted(explored[-1]["prompts"]) == held_out


def moved(trainer):
    """The policy is far from the original model."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return trainer


def test_the_base_is_the_original_model_and_perplexity_is_under_it(tmp_path):
    trainer = moved(make(tmp_path))
    original, greedy = tiny_llama(), dataclasses.replace(trainer.generation_settings, temperature=0.0)
    ids = {}
    for system in (System("base", trained=False), System("policy"), System("asked", quantile=2)):
        result = complete_system(trainer, system, trainer.prompts, {"graded": graded}, greedy, 1, 0)
        np.testing.assert_allclose(
            result.nll, -naive_log_probs(original, trainer.prompts.ids, result.completion_ids), rtol=1e-4
        )
        ids[system.name] = result.completion_ids
        assert result.scores["graded"] == graded(result.completions)
    complete = HFCompleter(original, trainer.hf_completer.eos_ids).complete
    (places, alone), *_ = complete(trainer.prompts.ids, [0] * len(PROMPTS), greedy)
    assert ids["base"] == [alone[places.index(i)] for i in range(len(PROMPTS))]
    assert ids["base"] != ids["policy"] != ids["asked"]


def test_scorers_of_the_last_measuring_are_called_as_rewards_are(tmp_path, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    sizes, drawn = [], []

    def fails_at_first(completions, completion_ids, prompts, level, **kwargs):
        sizes.append((len(completions), len(completion_ids), len(prompts), len(level)))
        drawn.append(torch.rand(1).item())
        if len(sizes) == 1:
            raise ConnectionError("not now")
        return [None, *graded(completions)[1:]]

    rows = {"prompt": ["a dog", "the sun", "rain"], "level": [1, 2, 3], "completion_ids": [[1], [2], [3]]}
    given = {"eval_dataset": Dataset.from_dict(rows)}
    trainer = make(tmp_path, given=given, reward_batch_size=4, reward_retries=1)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="fails_at_first raised ConnectionError: not now. It is called again"):
        result = complete_system(
            trainer, System("policy"), trainer.eval_prompts, {"mine": fails_at_first}, trainer.generation_settings, 2, 0
        )
    assert sizes == [(4, 4, 4, 4), (4, 4, 4, 4), (2, 2, 2, 2)]
    expected = graded(result.completions)
    assert result.scores["mine"] == [None, *expected[1:4], None, expected[5]]
    assert torch.equal(torch.get_rng_state(), before)  # of its own, and again the same in a call that goes on
    assert drawn[1] != drawn[2]


def test_what_is_explored_has_its_nll_under_the_original_model_without_a_token(tmp_path):
    trainer = moved(make(tmp_path))
    prompts, completions = trainer.prompts.ids[:3], [[20, 21], [22, 23, 24], [25]]
    told = [-nll * len(ids) for nll, ids in zip(trainer.reference_nll(prompts, completions), completions, strict=True)]
    np.testing.assert_allclose(told, naive_log_probs(tiny_llama(), prompts, completions), rtol=1e-4)


def test_errors_of_held_out_figures_are_over_prompts():
    missing = held_out_figures({"f": np.array([0.0, np.nan, 1.0, 1.0])}, ["a b"] * 4, 2)
    assert (missing["f_missing"], missing["f"]) == (0.25, pytest.approx(2 / 3))
    told = held_out_figures({"f": np.array([0.0, 0.0, 1.0, 1.0])}, ["a b"] * 4, 2)
    assert "f_missing" not in told
    assert (told["f"], told["f_se"]) == (0.5, 0.5)  # over the completions it would be .29


def test_the_fields_of_the_loss_reach_it(tmp_path):
    fields = {"temperature": 0.4, "mask_reward_tokens": False, "beta": 0.3, "entropy_coef": 0.1}
    given = {"kl_direction": "reverse", "loss_chunk_elements": 99, "reward_token_style": "embedding"}
    trainer = make(tmp_path, **fields, **given)
    assert trainer.loss_settings == LossSettings(
        **fields, kl_direction="reverse", chunk_elements=99, barred=trainer.reward_tokens.barred
    )
    assert trainer.loss_settings.barred


def test_held_out_prompts_are_scored_by_the_reward_and_by_others(tmp_path):
    def length(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    given = {"eval_dataset": Dataset.from_dict({"prompt": ["a dog", "the sun"]}), "eval_reward_funcs": length}
    trainer = make(tmp_path, given=given, eval_every=2, num_eval_generations=3)
    trainer.train()
    told = [line for line in metrics(tmp_path) if "eval_reward" in line]
    assert [line["round"] for line in told] == [1]
    assert told[0]["eval_reward"] == told[0]["eval_graded"]
    assert told[0]["eval_length"] > 1
    assert told[0]["eval_reference_perplexity"] > 1
    assert trainer.evaluate()["eval_reward"] == told[0]["eval_reward"]  # the same samples each time


def test_held_out_scorers_have_names_of_their_own_and_the_total_is_the_weighted_sum(tmp_path):
    def reward(completions, **kwargs):
        return [1.0 / (1 + len(text)) for text in completions]

    def other(completions, **kwargs):
        return [10.0] * len(completions)

    given = {"eval_dataset": Dataset.from_dict({"prompt": ["a dog"]}), "eval_reward_funcs": [reward, other]}
    trainer = make(tmp_path, reward=[reward, other], given=given, reward_weights=[1.0, 0.5])
    assert trainer.eval_rewards.names == ["reward_2", "other_2"]
    told = trainer.evaluate()
    assert told["eval_reward"] == pytest.approx(told["eval_reward_2"] + 5)
    assert told["eval_other_2"] == told["eval_other"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.* changes the weights of the model itself"),
        ({"bias": "all"}, "bias='all' trains biases of the model itself"),
        ({"lora_bias": True}, "a bias for layers that have none"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # PEFT's own, which goes on
def test_an_adapter_that_could_not_be_kept_apart_or_merged_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, given={"peft_config": lora(**options)})


def test_an_adapter_that_transformers_put_in_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="comes with an adapter that transformers put into it"):
        make(tmp_path / "run", model=str(tmp_path / "adapter"))


def test_a_model_that_is_spread_over_devices_is_refused(tmp_path):
    model = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ConfigError, match="device_map spreads the model over 2 devices"):
        make(tmp_path, model=model)


def test_a_whole_model_in_half_precision_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="in bfloat16 and trained as a whole: small updates vanish"):
        make(tmp_path, model=tiny_llama().bfloat16())


def test_settings_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="args is a TrainingArguments, which has none of Quark's settings"):
        QuarkTrainer(tiny_llama(), graded, TrainingArguments(str(tmp_path)), Dataset.from_dict({"prompt": PROMPTS}))


def test_settings_of_the_chat_template_go_with_the_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template += "{% if add_generation_prompt and not thinks %}no thought {% endif %}"
    before = tokenizer.chat_template
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]})
    options = {"tokenizer": tokenizer, "prompts": prompts}
    plain = make(tmp_path / "plain", **options, chat_template_kwargs={"thinks": True})
    assert plain.prompts.texts == [f"<|user|>{prompt}<|assistant|>" for prompt in PROMPTS]
    trainer = make(tmp_path / "run", **options, chat_template_kwargs={"thinks": False, "other": "it's"})
    assert trainer.prompts.texts == [f"<|user|>{prompt}<|assistant|>no thought " for prompt in PROMPTS]
    trainer.processing_class.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.apply_chat_template(prompts[0]["prompt"], tokenize=False, add_generation_prompt=True).endswith("ght ")
    assert tokenizer.chat_template == before  # the caller's own
    with pytest.raises(ConfigError, match=r"chat_template_kwargs\['a'\]=\[1\] cannot be written into a template"):
        make(tmp_path / "bad", **options, chat_template_kwargs={"a": [1]})
    with pytest.raises(ConfigError, match="set values for the chat template, and the tokenizer has none"):
        make(tmp_path / "none", chat_template_kwargs={"thinks": False})


def test_no_secret_is_written_into_the_run_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "run", model=str(tmp_path / "base"), model_init_kwargs={"token": "hf_SECRET"})
    trainer.open_pool()
    assert "token: (hidden)" in (tmp_path / "run" / "config.yaml").read_text()
    assert not any("hf_SECRET" in path.read_text() for path in (tmp_path / "run").rglob("*.*") if path.is_file())


def test_held_out_prompts_that_are_trained_on_are_told_of(tmp_path):
    given = {"eval_dataset": Dataset.from_dict({"prompt": [*PROMPTS[:2], "another one"]})}
    with pytest.warns(UserWarning, match="2 of 3 held-out prompts are trained on too"):
        make(tmp_path, given=given)


def test_the_meaning_of_the_tokens_is_measured_on_held_out_rows_and_a_lack_of_it_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"mean (any|no)thing yet.*\(AUC 0\.\d\d \+- 0\.\d\d, 0.5 is nothing\)"):
        make(tmp_path, num_generations=4, heldout_share=0.5, learning_rate=1e-9).train()
    lines = metrics(tmp_path)
    assert 0 <= lines[0]["initial_token_auc"] <= 1
    told = [line for line in lines if "token_auc" in line]
    assert [(line["round"], line["step"]) for line in told] == [(0, 2), (1, 4)]
    assert all(line["token_auc_se"] > 0 and line["heldout_nll"] > 0 for line in told)


@pytest.mark.parametrize("meaning_rows", [0, 1])
def test_without_rows_for_it_the_meaning_of_the_tokens_is_not_measured(meaning_rows, tmp_path):
    trainer = make(tmp_path, num_generations=4, heldout_share=0.5, meaning_rows=meaning_rows)
    trainer.explore(0)
    trainer.quantize(0)
    assert trainer.open_pool().held_out.sum() > 8
    assert trainer.measure_tokens() == {}


@pytest.mark.parametrize(
    ("strength", "nll", "told"),
    [(3.0, 2.2, r"Lower explore_strength \(3\), or learn"), (1.0, 2.2, "Raise beta, or learn"), (3.0, 2.0, None)],
)
def test_a_round_that_explored_text_of_no_use_is_told(strength, nll, told, tmp_path, monkeypatch):
    def reference_nll(trainer, prompt_ids, completion_ids):
        return [1.0 if trainer.state.global_step == 0 else nll] * len(completion_ids)

    monkeypatch.setattr(QuarkTrainer, "reference_nll", reference_nll)
    trainer = make(tmp_path, explore_strength=strength)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(one.message) for one in caught if "it drifts" in str(one.message)]
    assert len(texts) == int(told is not None)
    if told is not None:
        assert re.search(rf"Round 2 explored text of perplexity 9.0 .* have 2.7: it drifts.* {told}", texts[0])


def test_too_few_held_out_rows_to_tell_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"Too few samples are held out to tell.*Raise prompts_first_round"):
        make(tmp_path, heldout_share=0.3).train()


def test_tokens_that_mean_something_have_a_high_auc(tmp_path):
    def starts_low(completions, **kwargs):
        return [
            -ord(completion[0]) + zlib.crc32(completion.encode()) / 2**32 if completion else -200.0
            for completion in completions
        ]

    trainer = make(
        tmp_path,
        starts_low,
        num_generations=30,
        heldout_share=0.3,
        num_rounds=1,
        steps_per_round=60,
        per_device_train_batch_size=32,
        max_completion_length=1,
        learning_rate=1e-2,
        draw="ends",
        best_share=0.5,
    )
    trainer.train()
    before, after = (
        next(line[name] for line in metrics(tmp_path) if name in line) for name in ("initial_token_auc", "token_auc")
    )
    assert after > 0.85 > before


def test_callbacks_see_rounds_as_epochs(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            seen.append(("begin", state.global_step))

        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append(("end", state.global_step))

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(("evaluate", state.global_step))

    given = {"callbacks": [Watch()], "eval_dataset": Dataset.from_dict({"prompt": ["a dog"]})}
    make(tmp_path, given=given).train()
    assert [s for s in seen if s[0] != "evaluate"] == [("begin", 0), ("end", 2), ("begin", 2), ("end", 4)]
    assert [s for s in seen if s[0] == "evaluate"] == [("evaluate", 2), ("evaluate", 4)]


def test_completions_are_shown_when_asked(tmp_path, capsys):
    trainer = make(tmp_path, log_completions=True, num_completions_to_print=2, num_rounds=1)
    told = []
    original = trainer.display.completions
    trainer.display.completions = lambda title, rows: (told.append((title, rows)), original(title, rows))
    trainer.train()
    columns = (trainer.pool.to_table().column(name).to_pylist() for name in ("prompt", "completion", "reward"))
    [(title, rows)] = told
    assert (title, rows) == ("round 1", list(zip(*columns, strict=True))[:2])
    shown = capsys.readouterr().err
    assert all(prompt in shown for prompt, _, _ in rows)
    make(tmp_path / "quiet", num_rounds=1).train()
    assert "completion" not in capsys.readouterr().err


def test_a_runs_folder_explains_itself(tmp_path):
    trainer = make(tmp_path, save_strategy="epoch")
    trainer.train()
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "run.json",
        "metrics.jsonl",
        "pool",
        "checkpoint-2",
        "checkpoint-4",
    } <= names
    marker = json.loads((tmp_path / "checkpoint-2" / MARKER).read_text())
    assert (marker["step"], marker["pool_sha256"]) == (2, trainer.pool.hashes()[:1])
    assert RewardTokens.load(tmp_path / "checkpoint-4") == trainer.reward_tokens
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"] == torch.__version__


# -- resume


def test_another_runs_folder_is_refused_and_what_differs_is_named(tmp_path):
    make(tmp_path).explore(0)
    for changes, words in [
        ({"beta": 0.1}, "beta: 0.05 there, 0.1 here"),
        ({"prompts": PROMPTS[:5]}, "prompts: '12, crc"),
        ({"reward": lambda completions, **kwargs: graded(completions)}, "reward_funcs: "),
        ({"seed": 1}, "seed: 42 there, 1 here"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            make(tmp_path, **changes).train()
        assert "\n" not in str(caught.value)
    make(tmp_path, logging_steps=5, save_total_limit=1).train()  # what does not change the samples may change


def test_a_folder_with_strange_files_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"holds metrics.jsonl, but no run.json"):
        make(tmp_path).train()
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def stopped_at(step, number=signal.SIGINT):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                signal.raise_signal(number)

    return Stop()


def test_no_process_goes_on_before_all_have_opened_the_pool(tmp_path, monkeypatch):
    trainer, calls, opened = make(tmp_path), [], Pool.open
    monkeypatch.setattr(Pool, "open", lambda *args, **kwargs: (calls.append("open"), opened(*args, **kwargs))[1])
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: calls.append("wait"))
    trainer.open_pool()
    assert calls[-3:] == ["wait", "open", "wait"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_next_trainer_goes_on(tmp_path, number):
    trainer = make(tmp_path)
    trainer.add_callback(stopped_at(3, number))
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-3", [])
    assert signal.getsignal(number) == before
    make(tmp_path).train()
    steps = [(line["round"], line["step"]) for line in metrics(tmp_path) if "loss" in line]
    assert steps == [(0, 1), (0, 2), (1, 3), (1, 4)]


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_writes_no_metric_twice(tmp_path, stop):
    """It goes back to the checkpoint at the round's border, after which lines had been written."""
    trainer = make(tmp_path, save_strategy="epoch", num_rounds=3)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop + 1:
                raise RuntimeError("killed")

    trainer.add_callback(Kill())
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    make(tmp_path, save_strategy="epoch", num_rounds=3).train()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [(line["round"], line["step"]) for line in lines if "samples" in line] == [(0, 0), (1, 2), (2, 4)]


def test_a_signal_while_exploring_stops_between_two_batches(tmp_path, monkeypatch):
    batches = []
    original = HFCompleter._complete_batch

    def counted(self, batch, *args):
        batches.append(batch)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch, *args)

    monkeypatch.setattr(HFCompleter, "_complete_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, generation_batch_size=1).train()
    assert len(batches) == 2
    assert Pool.open(tmp_path).num_rounds == 0
    make(tmp_path).train()


def test_a_torn_checkpoint_is_named_and_not_used(tmp_path):
    make(tmp_path, save_strategy="epoch").train()
    (tmp_path / "checkpoint-4" / MARKER).unlink()
    again = make(tmp_path, save_strategy="epoch")
    with pytest.warns(UserWarning, match="checkpoint-4 was not finished when its run stopped, and is not used"):
        again.train()
    assert again.state.global_step == 4
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", [])


def test_a_checkpoint_without_a_marker_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"has no complete\.json, so it is not Quark's or was not finished. Give"):
        make(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_pool_that_is_not_the_checkpoints_is_refused(tmp_path):
    trainer = make(tmp_path)
    trainer.add_callback(stopped_at(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    path = tmp_path / "pool" / "round-00000.parquet"
    path.write_bytes((tmp_path / "pool" / "round-00001.parquet").read_bytes())
    with pytest.raises(PoolError, match=r"round-00000.parquet is not the file that the run wrote"):
        make(tmp_path).train()


def test_a_checkpoint_of_another_pool_is_refused(tmp_path):
    for folder, seed in (("a", 1), ("b", 2)):
        trainer = make(tmp_path / folder, seed=seed)
        trainer.add_callback(stopped_at(3))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    with pytest.raises(PoolError, match="saw another pool"):
        make(tmp_path / "a", seed=1).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))


def test_all_errors_are_quarks_own():
    for error in (ConfigError, DataError, ModelError, PoolError, RewardError, TrainingError):
        assert issubclass(error, QuarkError)
