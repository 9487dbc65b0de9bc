"""The dial, measured: strength 1 is plain Quark bit for bit, strengths mix in a batch, beams, and the curve's files."""

import json
import math
import sys
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from test_evaluate import PROMPTS, generate_set, write_lines
from test_evaluate_command import REWARDS, quiet_libraries  # noqa: F401 - a fixture
from tiny import TINY_MODELS, tiny_gpt2, tiny_tokenizer
from transformers import GenerationConfig

from quark_lm import export
from quark_lm.errors import ConfigError
from quark_lm.evaluate_command import Request, dial, evaluate
from quark_lm.evaluation.beams import BeamCompleter, DialLogitsProcessor
from quark_lm.evaluation.passes import Asked
from quark_lm.evaluation.tables import show_dial
from quark_lm.generation import GenerationSettings
from quark_lm.generation.hf import HFCompleter
from quark_lm.reward_tokens import RewardTokens

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
SAMPLINGS = {"greedy": {"temperature": 0.0}, "sampled": {}, "top-p": {"top_p": 0.8}}


@pytest.fixture(params=TINY_MODELS)
def asked(request):
    """A tiny GPT-2 or Llama, tied or untied, asked for its best token; new tokens on two of the four."""
    model, tokenizer = TINY_MODELS[request.param](), tiny_tokenizer()
    style = "text" if request.param.endswith("-tied") else "embedding"
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=3, style=style)
    return Asked(model, tokenizer, tokens, quantile=2)


def ids_by_strength(made):
    return {s: [ids for ids, at in zip(made.completion_ids, made.strength, strict=True) if at == s] for s in STRENGTHS}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_strengths_mix_in_a_batch_and_1_is_no_dial_at_all(tmp_path, asked, sampling):
    options = SAMPLINGS[sampling]
    mixed = ids_by_strength(generate_set(asked, tmp_path / "mixed", strengths=STRENGTHS, batch_rows=16, **options))
    plain = generate_set(asked, tmp_path / "plain", **options)
    assert mixed[1.0] == plain.completion_ids
    for strength in (0.0, 0.5, 2.0):
        alone = generate_set(asked, tmp_path / str(strength), strengths=(strength,), **options)
        assert mixed[strength] == alone.completion_ids, strength
    worst = Asked(asked.model, asked.tokenizer, asked.tokens, quantile=0)
    assert mixed[0.0] == generate_set(worst, tmp_path / "worst", **options).completion_ids
    assert mixed[2.0] != mixed[1.0]


def test_every_strength_draws_the_same_random_numbers(tmp_path, asked):
    # from the worst token to the worst token every strength asks the same
    still = Asked(asked.model, asked.tokenizer, asked.tokens, quantile=0)
    made = ids_by_strength(generate_set(still, tmp_path, strengths=STRENGTHS, seed=5))
    assert made[0.0] == made[0.5] == made[1.0] == made[2.0]


def test_the_dial_may_start_from_no_token(tmp_path, asked):
    none = Asked(asked.model, asked.tokenizer, asked.tokens, quantile=2, from_token="none")
    made = ids_by_strength(generate_set(none, tmp_path / "none", strengths=STRENGTHS))
    without = Asked(asked.model, asked.tokenizer, asked.tokens, quantile=None)
    assert made[0.0] == generate_set(without, tmp_path / "without").completion_ids
    assert made[1.0] == generate_set(asked, tmp_path / "best").completion_ids
    from_worst = ids_by_strength(generate_set(asked, tmp_path / "worst", strengths=STRENGTHS))
    assert made[2.0] != from_worst[2.0]


# Beams


def beams_of(asked, prompt, strength, barred=None, num_beams=3, length=4):
    barred = asked.barred if barred is None else barred
    settings = GenerationSettings(max_completion_length=length, temperature=0.0, barred=barred)
    ids = asked.tokenizer(prompt)["input_ids"]
    best, worst = (asked.tokens.insert(ids, quantile, 0) for quantile in (2, 0))
    completer = BeamCompleter(asked.model, [asked.tokenizer.eos_token_id], num_beams)
    ((_, completions),) = completer.complete([best], [0], settings, dials=[([worst], strength)])
    return best, worst, completions[0]


@torch.no_grad()
def naive_beams(model, best, worst, strength, barred, num_beams, length):
    """A beam search over dialled log-probabilities, each from two whole forwards; ends are not looked for."""
    beams = [((), 0.0)]
    for _ in range(length):
        longer = []
        for tokens, total in beams:
            b, w = (model(torch.tensor([[*start, *tokens]])).logits[0, -1] for start in (best, worst))
            logits = w + strength * (b - w)
            logits[list(barred)] = -torch.inf
            values, ids = logits.log_softmax(-1).topk(num_beams)
            longer += [((*tokens, i), total + v) for v, i in zip(values.tolist(), ids.tolist(), strict=True)]
        beams = sorted(longer, key=lambda beam: -beam[1])[:num_beams]
    return list(beams[0][0])


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_beams_under_the_dial_are_those_of_a_naive_search(asked, strength):
    barred = (*asked.barred, asked.tokenizer.eos_token_id)  # no beam ends early
    for prompt in PROMPTS:
        best, worst, completion = beams_of(asked, prompt, strength, barred)
        assert completion == naive_beams(asked.model, best, worst, strength, barred, 3, 4)


def test_beams_know_nothing_of_the_model_s_own_generation_config(asked, monkeypatch):
    expected = [beams_of(asked, prompt, 1.0)[2] for prompt in PROMPTS]
    own = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    monkeypatch.setattr(asked.model, "generation_config", own)
    assert [beams_of(asked, prompt, 1.0)[2] for prompt in PROMPTS] == expected
    assert asked.model.generation_config is own


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, 40.0])
def test_a_strong_dial_draws_only_what_the_best_token_finds_plausible(asked, strength):
    barred = (*asked.barred, asked.tokenizer.eos_token_id)
    for prompt in PROMPTS:
        ids = asked.tokenizer(prompt)["input_ids"]
        best, worst = (asked.tokens.insert(ids, quantile, 0) for quantile in (2, 0))
        for min_p in (0.0, 0.7):
            settings = GenerationSettings(max_completion_length=6, temperature=0.0, barred=barred, dial_min_p=min_p)
            expected: list[int] = []
            for _ in range(6):
                b, w = (asked.model(torch.tensor([[*start, *expected]])).logits[0, -1] for start in (best, worst))
                b[list(barred)] = -torch.inf
                logits = b + (strength - 1) * (b - w)
                if min_p and strength > 1:
                    logits[b.softmax(-1) < min_p * b.softmax(-1).max()] = -torch.inf
                logits[list(barred)] = -torch.inf
                expected.append(int(logits.argmax()))
            for completer in (HFCompleter(asked.model, ()), BeamCompleter(asked.model, [], 1)):
                ((_, made),) = completer.complete([best], [0], settings, dials=[([worst], strength)])
                assert made[0] == expected, (type(completer), min_p)


def test_min_p_changes_a_strong_dial_and_no_other(asked, tmp_path):
    plain, limited = (
        ids_by_strength(generate_set(asked, tmp_path / str(min_p), strengths=STRENGTHS, dial_min_p=min_p))
        for min_p in (0.0, 0.9)
    )
    assert [plain[s] == limited[s] for s in (0.0, 0.5, 1.0, 2.0)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"dial_min_p": p}, "no share of the likeliest token's probability") for p in (-0.1, 1.0, math.nan)],
        *[({"top_p": p}, "not a probability above 0") for p in (0.0, 1.5, math.nan)],
        ({"top_k": -1}, "no number of tokens"),
        ({"max_completion_length": 0}, "leaves nothing to draw"),
        ({"max_completion_length": 4, "min_completion_length": 9}, "no completion could ever end"),
        ({"temperature": math.inf}, "temperature=inf divides the logits"),
    ],
)
def test_settings_that_draw_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**settings)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_beams_at_strength_1_and_0_are_transformers_own_of_the_best_and_the_worst_token(asked, strength):
    best, worst, completion = beams_of(asked, "the cat", strength)
    ids = torch.tensor([best if strength else worst])
    plain = asked.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=3,
        do_sample=False,
        max_new_tokens=4,
        suppress_tokens=sorted(asked.barred) or None,
        pad_token_id=0,
    )
    assert completion == plain[0, ids.shape[1] :].tolist()


def test_what_is_suppressed_stays_so_at_strength_0(asked):
    processor = DialLogitsProcessor(asked.model, 2, [([5, 6, 7], 0.0)])
    scores = torch.zeros(1, asked.model.config.vocab_size).log_softmax(-1)
    scores[0, 3] = -torch.inf
    out = processor(torch.tensor([[8, 9, 10]]), scores)
    assert out[0, 3] == -torch.inf
    assert not out.isnan().any()
    assert out.exp().sum().item() == pytest.approx(1.0, abs=1e-4)


def test_beams_draw_nothing(asked):
    completer = BeamCompleter(asked.model, [0], 2)
    with pytest.raises(ConfigError, match="draws nothing"):
        list(completer.complete([[5]], [0], GenerationSettings(temperature=1.0)))


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("dial")
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=3, style="text")
    export.save(model, tokenizer, tokens, folder / "run" / "model")
    (folder / "rewards.py").write_text(REWARDS)
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return folder


def ask(files, output_dir, **more):
    named = {
        "model": str(files / "run"),
        "prompts": str(files / "prompts.jsonl"),
        "num_generations": 2,
        "max_completion_length": 6,
        "scorers": (f"{files / 'rewards.py'}:vowels", f"{files / 'rewards.py'}:consonants"),
        "evaluator": str(files / "base"),
        "output_dir": str(output_dir),
        **more,
    }
    return Request(**named)


def run(request):
    out = StringIO()
    return dial(request, Console(file=out, width=80)), out.getvalue()


def test_the_curve_is_written_drawn_and_printed(files, tmp_path):
    results, table = run(ask(files, tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "dial.json").read_text(), parse_constant=pytest.fail)
    assert written == results
    assert [point["strength"] for point in results["curve"]] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    for point in results["curve"]:
        for interval in (point["scores"]["vowels"]["mean"], point["perplexity"]["corpus"], point["text"]["dist_2"]):
            assert interval["low"] <= interval["mean"] <= interval["high"]
        assert point["counts"]["completions"] == 8
    assert (tmp_path / "out" / "dial.png").read_bytes().startswith(b"\x89PNG")
    frame = pd.read_parquet(tmp_path / "out" / "completions.parquet")
    assert frame.groupby("strength").size().tolist() == [8] * 6
    assert max(map(len, table.splitlines()[1:])) <= 80
    for point in results["curve"]:
        assert f"{point['scores']['vowels']['mean']['mean']:.3f}".removeprefix("0") in table
        assert f"{point['perplexity']['corpus']['mean']:.1f}" in table
    # a point of the curve is the evaluation at that strength
    alone = evaluate(ask(files, tmp_path / "alone", strengths=(2.0,)), Console(file=StringIO()))
    at_2 = next(point for point in results["curve"] if point["strength"] == 2.0)
    assert at_2["scores"] == alone["scores"]
    assert at_2["perplexity"]["corpus"] == pytest.approx(alone["perplexity"]["corpus"])
    with pytest.raises(ConfigError, match=r"1\.5, 2, 3, several strengths of the dial, which one table would mix"):
        evaluate(Request(from_file=str(tmp_path / "out"), output_dir=str(tmp_path / "again")))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"num_beams": 2}])
def test_greedy_and_beams_have_one_completion_a_prompt(files, tmp_path, options):
    named = {"num_generations": None, "evaluator": None, "scorers": (), "strengths": (0.0, 1.0, 2.0, 1.0)}
    results, table = run(ask(files, tmp_path, **named, **options))
    assert results["made"]["num_generations"] == 1
    assert results["made"]["temperature"] == 0.0
    assert len(pd.read_parquet(tmp_path / "completions.parquet")) == 3 * len(PROMPTS)
    assert "perplexity" not in table


def test_a_stopped_dial_goes_on_with_the_same_completions(files, tmp_path, monkeypatch):
    from quark_lm.pool import Journal

    request = ask(files, tmp_path / "stopped", batch_rows=8, strengths=(0.0, 2.0))
    add, kept = Journal.add, []

    def add_and_stop(journal, **line):
        if len(kept) == 2:
            raise KeyboardInterrupt
        add(journal, **line)
        kept.append(line)

    monkeypatch.setattr(Journal, "add", add_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(request)
    monkeypatch.setattr(Journal, "add", add)
    results, _ = run(request)
    whole, _ = run(ask(files, tmp_path / "whole", batch_rows=8, strengths=(0.0, 2.0)))
    assert results["curve"] == whole["curve"]


def test_a_model_without_reward_tokens_has_no_dial(files, tmp_path):
    with pytest.raises(ConfigError, match="was not trained by Quark, so it has no reward tokens to dial between"):
        run(ask(files, tmp_path / "out", model=str(files / "base")))
    assert not (tmp_path / "out").exists()


def test_what_a_strong_dial_left_out_is_told_strength_by_strength(files, tmp_path):
    results, _ = run(ask(files, tmp_path, strengths=(0.0, 2.0)))
    point = results["curve"][1]
    point["counts"] |= {"without_words": 5, "too_short": 1}
    name = next(iter(point["scores"]))
    point["scores"][name]["missing"]["completions"] = 4
    out = Console(file=StringIO(), width=100)
    show_dial(out, results, tmp_path)
    assert "At strength 2 5 completions hold no word." in out.file.getvalue()
    assert "At strength 2 1 completion is too short for a diversity." in out.file.getvalue()
    assert f"At strength 2 {name} gave no score for 4 completions." in out.file.getvalue()
    assert "At strength 0" not in out.file.getvalue()


def test_a_dial_that_starts_where_it_ends_is_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="every strength gives the same text"):
        run(ask(files, tmp_path / "out", quantile="worst"))
    assert not (tmp_path / "out").exists()


def test_a_strength_that_is_no_number_is_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="not a finite number"):
        run(ask(files, tmp_path, strengths=(1.0, np.nan)))


@pytest.mark.parametrize("name", ["run", "run/model"])
def test_the_branch_without_a_token_must_have_been_trained(files, tmp_path, name):
    config = files / "run" / "config.yaml"
    config.write_text(yaml.safe_dump({"token_dropout": 0.0}))
    with pytest.raises(ConfigError, match=r"never trained \(token_dropout=0\)"):
        run(ask(files, tmp_path, model=str(files / name), from_token="none"))
    config.write_text(yaml.safe_dump({"token_dropout": 0.1}))
    results, table = run(ask(files, tmp_path, model=str(files / name), from_token="none", strengths=(0.0, 1.0)))
    assert results["made"]["from_token"] == "none"
    assert "from no token" in " ".join(table.split())
    config.unlink()
    with pytest.raises(ConfigError, match="neither 'worst' nor 'none'"):
        run(ask(files, tmp_path / "b", from_token="best"))


def test_without_matplotlib_nothing_begins(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"quark-lm\[plot\]"):
        run(ask(files, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
