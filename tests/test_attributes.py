"""Several attributes at once: each reward function ranked by itself, with reward tokens and a dial of its own."""

import json

import numpy as np
import pytest
import torch
from test_trainer import PROMPTS, graded, lora, make, metrics
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from quark_lm import Pool, QuarkTrainer, RewardTokens, evaluate_command, export
from quark_lm.errors import ConfigError, ModelError, RewardError
from quark_lm.evaluate_command import Request
from quark_lm.generation import GenerationSettings
from quark_lm.generation.hf import HFCompleter
from quark_lm.measuring import round_figures
from quark_lm.quantiles import FewQuantilesWarning, assign
from quark_lm.steering import dial, generate

NAMES = ["vowels", "length"]


def vowels(completions, **kwargs):
    return [
        sum(text.count(v) for v in "aeiou") + 1e-3 * g for text, g in zip(completions, graded(completions), strict=True)
    ]


def length(completions, **kwargs):
    return [len(set(text)) + 1e-3 * g for text, g in zip(completions, graded(completions), strict=True)]


def attributed(folder, **changes):
    options = {
        "reward_attributes": NAMES,
        "prompts_first_round": 96,
        "prompts_per_round": 24,
        "draw": "ends",
        **changes,
    }
    return make(folder, [vowels, length], **options)


def tokens(num=3, **options):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    return RewardTokens.create(model, tokenizer, num_quantiles=num, attributes=NAMES, **options)


# -- the tokens


def test_a_quantile_is_one_number_for_all_attributes():
    made = tokens()
    assert (made.num_quantiles, made.num_codes, made.worst, made.best) == (3, 9, 0, 8)
    assert [made.levels(code) for code in (0, 1, 3, 5, 8)] == [(0, 0), (0, 1), (1, 0), (1, 2), (2, 2)]
    assert [made.code(made.levels(code)) for code in range(9)] == list(range(9))
    assert made.turned_down(8, 0) == made.code((0, 2))
    assert made.turned_down(8, 1) == made.code((2, 0))
    assert made.turned_down(8, 1) + made.turned_up(1) == 8
    found = made.all_levels(np.array([-1, 0, 5, 8]))
    assert found.tolist() == [[-1, 0, 1, 2], [-1, 0, 2, 2]]


def test_one_rank_alone_has_quantiles_for_codes():
    made = RewardTokens.create(tiny_llama(), tiny_tokenizer(), num_quantiles=4)
    assert made.num_codes == made.num_quantiles == 4
    assert [made.levels(k) for k in range(4)] == [(0,), (1,), (2,), (3,)]
    assert made.all_levels(np.array([-1, 0, 3])).tolist() == [[-1, 0, 3]]
    assert made.text(3) == made.texts[3]


@pytest.mark.parametrize("style", ["text", "embedding"])
def test_a_prompt_gets_a_token_of_each_in_their_order(style):
    made = tokens(style=style)
    assert len(made.ids) == 6
    assert made.insert([50, 51], made.code((2, 1)), 1) == [50, *made.ids[2], *made.ids[3 + 1], 51]
    assert made.insert([50, 51], None, 1) == [50, 51]
    assert len(made.insert([50], made.best, 0)) - 1 <= made.longest
    if style == "text":
        assert made.text(made.best) == "Vowels: excellent.\nLength: excellent.\n"


def test_they_come_back_from_disk_and_a_damaged_file_is_told(tmp_path):
    made = tokens(style="embedding")
    made.save(tmp_path)
    assert RewardTokens.load(tmp_path) == made
    path = tmp_path / "reward_tokens.json"
    path.write_text(path.read_text().replace('"vowels"', '"vowels", "third", "fourth"'))
    with pytest.raises(ModelError, match="damaged"):
        RewardTokens.load(tmp_path)


# -- the dials


def test_each_dial_moves_from_its_own_contrast_and_one_is_the_branch_bit_for_bit():
    best, a, b = torch.randn(3, 5, 20)
    one = torch.ones(5, 1)
    assert torch.equal(dial(best, [a, b], [one, one]), best)
    assert torch.equal(dial(best, [a, b], [0 * one, one]), a)
    torch.testing.assert_close(dial(best, [a, b], [one, 0 * one]), b)
    torch.testing.assert_close(dial(best, [a, b], [3 * one, 2 * one]), best + 2 * (best - a) + (best - b))


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_two_dials_in_one_batch_with_strengths_of_their_own(build):
    model = build()
    prompts, a, b = ([[*head, 5, 6 + i] for i in range(4)] for head in ([], [20], [30, 31]))
    with torch.no_grad():
        logits = [[model(torch.tensor([p])).logits[0, -1] for p in branch] for branch in (prompts, a, b)]
    strengths = ([1.0, 2.0, 1.0, 3.0], [1.0, 1.0, 0.0, 2.0])
    wanted = [
        int((best + (s - 1) * (best - x) + (t - 1) * (best - y)).argmax())
        for best, x, y, s, t in zip(*logits, *strengths, strict=True)
    ]
    settings = GenerationSettings(max_completion_length=1, temperature=0.0)
    completer = HFCompleter(model, (0,), 6)  # two samples a batch
    found = {}
    for indices, completions in completer.complete(
        prompts, [0] * 4, settings, dials=list(zip((a, b), strengths, strict=True))
    ):
        found |= dict(zip(indices, completions, strict=True))
    assert [found[i][0] for i in range(4)] == wanted


def test_a_strength_by_name_turns_that_attribute_alone():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    made = RewardTokens.create(model, tokenizer, num_quantiles=3, attributes=NAMES)

    def completed(strength, quantile=-1):
        return generate(model, tokenizer, PROMPTS, reward_tokens=made, strength=strength, quantile=quantile, seed=3)

    plain = completed(1.0)
    assert completed({"length": 1.0}) == plain
    assert completed({"vowels": 0.0}) == completed(1.0, made.code((0, 2)))
    assert completed({"vowels": 3.0}) != plain != completed({"length": 3.0})
    assert completed(0.0) == completed(1.0, 0)  # a plain number is the dial of all, from the worst in all
    assert completed(2.0) != completed({"vowels": 2.0, "length": 2.0})
    with pytest.raises(ConfigError, match="names 'rude', which is not one of vowels, length"):
        completed({"rude": 2.0})
    with pytest.raises(ConfigError, match="Give one for all prompts"):
        completed({"vowels": [1.0, 2.0]})
    with pytest.raises(ConfigError, match="none to dial apart"):
        generate(model, tokenizer, PROMPTS, strength={"vowels": 2.0})


# -- a run


def test_each_reward_is_ranked_by_itself(tmp_path):
    trainer = attributed(tmp_path)
    trainer.explore(0)
    found = trainer.reward_tokens.all_levels(trainer.quantize(0))
    table = trainer.open_pool().to_table()
    for levels, name in zip(found, ("vowels", "length"), strict=True):
        assert levels.tolist() == assign(table.column(f"reward/{name}").to_numpy(), 3).tolist()


def test_draws_take_the_ends_of_each_attribute_in_turn(tmp_path):
    trainer = attributed(tmp_path, steps_per_round=12)
    trainer.explore(0)
    trainer.quantize(0)
    trainer._draw(0)
    drawn = trainer.reward_tokens.all_levels(np.array([draw["quantile"] for draw in trainer.draws]))
    assert set(drawn[0, ::2].tolist()) == set(drawn[1, 1::2].tolist()) == {0, 2}
    assert (drawn[0, ::2] == 2).sum() * 4 == 3 * drawn[0, ::2].size
    assert 1 in drawn[1, ::2]  # the other attribute's token names what the row is


def test_a_run_explores_with_the_best_of_all_and_tells_what_each_means(tmp_path):
    trainer = attributed(tmp_path, heldout_share=0.4, explore_strength=2.0)
    with pytest.warns(UserWarning, match="of (vowels|length) hardly mean anything yet"):  # two steps teach nothing
        trainer.train()
    table = trainer.open_pool().to_table([1])
    assert set(table.column("explored_with").to_pylist()) == {8}
    lines = metrics(tmp_path)
    told = next(line for line in lines if "initial_token_auc" in line)
    assert told["reward/vowels"] + told["reward/length"] == pytest.approx(told["reward"])
    each = [told[f"initial_token_auc/{name}"] for name in NAMES]
    assert told["initial_token_auc"] == min(each)
    assert told["quantiles_used"] == 3
    assert any("token_auc/length" in line for line in lines)


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    whole = attributed(tmp_path / "whole")
    whole.train()
    first = attributed(tmp_path / "stopped", save_strategy="epoch")

    def stops(self, args, state, control, **kwargs):
        control.should_training_stop = True

    first.learn_bar.__class__ = type("Stopping", (type(first.learn_bar),), {"on_epoch_end": stops})
    first.train()
    assert first.state.global_step == 2
    attributed(tmp_path / "stopped", save_strategy="epoch").train()
    for name in ("nll", "kl", "loss", "reward", "token_auc"):
        told, of_whole = ([line[name] for line in metrics(tmp_path / n) if name in line] for n in ("stopped", "whole"))
        assert told == of_whole, name
    pools = [Pool.open(tmp_path / n).to_table().to_pylist() for n in ("stopped", "whole")]
    assert pools[0] == pools[1]


def test_its_model_is_asked_by_its_card_and_from_the_command_line(tmp_path, capsys):
    trainer = attributed(tmp_path / "run", given={"peft_config": lora()})
    trainer.train()
    folder = export.save(trainer.model, trainer.processing_class, trainer.reward_tokens, tmp_path / "model")
    card = (folder / "README.md").read_text()
    assert "of `vowels` are" in card
    assert "of `length` are" in card
    _, tokenizer, made = export.load(folder)
    snippet = card.partition("```python")[2].partition("```")[0].replace('folder = "."', f"folder = {str(folder)!r}")
    told = {}
    exec(snippet.partition("output =")[0], told)  # the card's own lines, up to what it generates
    prompt = tokenizer("The hotel was")["input_ids"]
    assert told["ids"].tolist() == [made.insert(prompt, made.best, 0)]
    from quark_lm.cli import main

    def run(*words):
        capsys.readouterr()
        code = main(["generate", str(folder), "the cat", *words])
        out = capsys.readouterr()
        return code, out.out, " ".join(out.err.split())

    plain, turned = run(), run("--strength", "vowels=3", "--strength", "length=0")
    assert plain[0] == turned[0] == 0
    assert plain[1] != turned[1] != ""
    assert run("--strength", "vowels=1")[:2] == plain[:2]
    for words, told in (
        (["--strength", "rude=2"], "not one of vowels, length"),
        (["--strength", "much"], "neither a number nor NAME=NUMBER"),
        (["--strength", "2", "--strength", "length=2"], "given twice"),
        (["--strength", "=2"], "neither a number nor NAME=NUMBER"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert told in err


# -- measuring


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attributes") / "model"
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    made = RewardTokens.create(model, tokenizer, num_quantiles=3, attributes=NAMES)
    return export.save(model, tokenizer, made, folder)


@pytest.fixture
def request_of(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat is\nrain or\n")

    def make_request(name, **options):
        return Request(
            model=str(trained),
            prompts=str(tmp_path / "prompts.txt"),
            scorers=("repetition",),
            num_generations=2,
            max_completion_length=4,
            output_dir=str(tmp_path / name),
            **options,
        )

    return make_request


def test_each_attributes_dial_is_measured_and_its_folder_is_its_own(request_of, trained, tmp_path):
    curves = {}
    for name in (None, *NAMES):
        options = {} if name is None else {"attribute": name}
        results = evaluate_command.dial(request_of(f"dial-{name}", strengths=(0.0, 1.0), **options))
        curves[name] = [point["scores"]["repetition"]["mean"]["mean"] for point in results["curve"]]
    assert curves[None][1] == curves["vowels"][1] == curves["length"][1]  # 1 is plain whoever is turned
    made = json.loads((tmp_path / "dial-vowels" / "dial.json").read_text())["made"]
    assert (made["attribute"], made["quantile"], made["reward_attributes"]) == ("vowels", 2, NAMES)
    with pytest.raises(ConfigError, match="attribute"):
        evaluate_command.dial(request_of("dial-vowels", strengths=(0.0, 1.0)))
    with pytest.raises(ConfigError, match="none of the model's"):
        evaluate_command.dial(request_of("dial-rude", attribute="rude"))
    assert not (tmp_path / "dial-rude").exists()


def test_completions_of_a_quantile_in_all_are_scored_again_as_such(request_of, tmp_path):
    evaluate_command.evaluate(request_of("best"))
    source = str(tmp_path / "best" / "completions.parquet")
    for quantile in ("best", "2"):
        again = Request(
            from_file=source, scorers=("repetition",), quantile=quantile, output_dir=str(tmp_path / quantile)
        )
        assert evaluate_command.evaluate(again)["scores"]["repetition"]
    with pytest.raises(ConfigError, match="quantile"):
        evaluate_command.evaluate(Request(from_file=source, scorers=("repetition",), quantile="1", output_dir="x"))


# -- bad input


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reward_attributes": ["one"]}, "one rank needs no name"),
        ({"reward_attributes": ["a", "A"]}, "a name of its own"),
        ({"reward_attributes": ["a", "b=c"]}, "letters, digits"),
        ({"reward_attributes": ["a", "../b"]}, "letters, digits"),
        ({"reward_attributes": ["a", "b", "c"]}, "Name one for each reward function"),
        ({"num_quantiles": 200}, "more than 32,768"),
        ({"reward_token_texts": ["a", "b", "c"]}, "each quantile of each of 2 attributes needs one"),
        ({"given": {"initial_pool": [{"prompt": "a", "completion": "b", "reward": 1.0}]}}, "one reward a row"),
        (
            {"given": {"reward_tokens": tokens(style="text").__class__("text", "first", "abc", ((3,), (4,), (5,)))}},
            "equal",
        ),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        attributed(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_an_attribute_that_is_constant_stops_the_run(tmp_path, monkeypatch):
    def flat(completions, **kwargs):
        return [1.0] * len(completions)

    def rewards(second):
        monkeypatch.setattr(second, "__name__", "second")
        return make(tmp_path, [vowels, second], reward_attributes=NAMES)

    with pytest.raises(RewardError, match="rewards of length of the pool are equal"):
        rewards(flat).train()
    rewards(length).train()  # mended, it takes the same folder


def test_attributes_whose_sum_is_constant_are_ranked_all_the_same(tmp_path):
    def other(completions, **kwargs):
        return [-value for value in length(completions)]

    trainer = make(tmp_path, [length, other], reward_attributes=NAMES)
    trainer.explore(0)
    best, worst = trainer.reward_tokens.all_levels(trainer.quantize(0))
    assert (best + worst == 2).mean() > 0.9  # but for ties of a middle rank


def test_a_weight_below_zero_turns_its_attribute_round(tmp_path):
    trainer = attributed(tmp_path, reward_weights=[1.0, -1.0])
    trainer.explore(0)
    levels = trainer.reward_tokens.all_levels(trainer.quantize(0))[1]
    rewards = trainer.open_pool().to_table().column("reward/length").to_numpy()
    assert rewards[levels == 2].mean() < rewards[levels == 0].mean()


def test_within_prompts_a_prompt_that_tells_nothing_in_one_is_not_ranked(tmp_path):
    def of_prompt(prompts, **kwargs):
        return [float(len(prompt)) for prompt in prompts]

    options = {"reward_attributes": NAMES, "quantile_scope": "prompt", "num_generations": 4, "prompts_first_round": 8}
    trainer = make(tmp_path / "flat", [vowels, of_prompt], **options)
    trainer.explore(0)
    with pytest.warns(FewQuantilesWarning):
        assert (trainer.quantize(0) == -1).all()
    trainer = make(tmp_path / "graded", [vowels, length], **options)
    trainer.explore(0)
    found = trainer.quantize(0)
    assert found.min() >= 0
    assert found.max() < 9


@pytest.mark.parametrize(("explore_token", "codes"), [("best", {8}), ("random", set(range(9)))])
def test_exploring_asks_for_the_best_of_all_or_for_any(tmp_path, explore_token, codes):
    trainer = attributed(tmp_path, explore_token=explore_token, prompts_per_round=96)
    trainer.explore(0)
    trainer.explore(1)
    assert set(trainer.open_pool().to_table([1]).column("explored_with").to_pylist()) == codes


def test_a_row_that_one_reward_leaves_out_is_not_ranked(tmp_path):
    def some(completions, **kwargs):
        return [None if i % 3 == 0 else value for i, value in enumerate(length(completions))]

    trainer: QuarkTrainer = make(tmp_path, [vowels, some], reward_attributes=NAMES, prompts_first_round=48)
    with pytest.warns(UserWarning, match="dropped"):  # though TRL's rule makes a sum of the rewards that are there
        trainer.explore(0)
    assigned = trainer.quantize(0)
    missing = np.isnan(trainer.open_pool().to_table().column("reward/some").to_numpy())
    assert round_figures(trainer, 0, assigned)["dropped"] == missing.sum()
    assert missing.any()
    assert ((assigned < 0) == missing).all()
