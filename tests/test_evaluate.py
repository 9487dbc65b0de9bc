"""The parts of an evaluation: files of completions, the passes and what they keep, and the figures."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import TINY_MODELS, tiny_gpt2, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from quark_lm.errors import ConfigError, DataError, RewardError
from quark_lm.evaluation import metrics, passes
from quark_lm.evaluation.completions import CompletionSet, read_completions
from quark_lm.evaluation.passes import Asked, Evaluator, Scorer, follow, load_scorers, read_by, score, tokenizer_digest
from quark_lm.evaluation.summary import reference_figures, summarise
from quark_lm.generation import GenerationSettings
from quark_lm.pool import Journal
from quark_lm.progress import Display
from quark_lm.prompts import encode
from quark_lm.reward_tokens import RewardTokens
from quark_lm.steering import generate as complete

QUIET = Display(enabled=False)
PROMPTS = ["the cat", "an hour later", "it is near the", "on"]


def encoded(tokenizer, position="first", prompts=PROMPTS, **columns):
    return encode(Dataset.from_dict({"prompt": prompts, **columns}), tokenizer, position)


def a_set(completions, prompt_of=None, prompts=None, **more):
    prompt_of = np.arange(len(completions)) if prompt_of is None else np.array(prompt_of)
    prompts = prompts or [f"prompt {p}" for p in range(max(prompt_of) + 1)]
    texts = [p if isinstance(p, str) else str(p) for p in prompts]
    return CompletionSet(prompts, texts, prompt_of, np.zeros(len(completions), int), list(completions), **more)


def length_score(completions, **kwargs):
    return [len(text) / 100 for text in completions]


# Files of completions


def test_completions_survive_their_file(tmp_path):
    chat = [{"role": "user", "content": "hello"}]
    made = a_set(
        ["a b", "", "c"],
        [0, 0, 1],
        ["plain", chat],
        completion_ids=[[1, 2], [], [3]],
        prompt_ids=[[5], [6, 7]],
        columns={"level": [1, None], "note": [{"x": 1.5}, {"x": 2.0}]},
        strength=np.array([1.0, 1.0, 2.0]),
        scores={"mine": np.array([0.5, np.nan, 1.0])},
        nll=np.array([2.0, np.nan, 1.0]),
        nll_tokens=np.array([2, 0, 1]),
        facts={"made": {"model": "x"}},
    )
    made.write(tmp_path / "completions.parquet")
    back = read_completions(tmp_path)  # the folder stands for its file
    assert (back.prompts, back.completions, back.facts) == (made.prompts, made.completions, made.facts)
    assert (back.completion_ids, back.prompt_ids, back.columns) == (made.completion_ids, made.prompt_ids, made.columns)
    for name in ("prompt_of", "number", "strength", "nll", "nll_tokens"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name))
    np.testing.assert_array_equal(back.scores["mine"], made.scores["mine"])


def test_groups_are_the_rows_of_each_prompt():
    made = a_set("abcde", [1, 0, 1, 0, 2])
    assert [g.tolist() for g in made.groups()] == [[1, 3], [0, 2], [4]]
    keep = np.array([True, True, False, False, True])
    assert [g.tolist() for g in made.groups(keep)] == [[1], [0], [4]]


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_completions_of_others_are_read_row_by_row_and_as_realtoxicityprompts_has_them(tmp_path):
    rows = [
        {"prompt": "b", "completion": " one", "level": 3},
        {"prompt": "a", "completion": " two"},
        {"prompt": "b", "completion": " three"},
    ]
    made = read_completions(write_lines(tmp_path / "rows.jsonl", rows))
    assert made.prompts == ["b", "a"]
    assert made.completions == [" one", " three", " two"]
    assert (made.prompt_of.tolist(), made.number.tolist()) == ([0, 0, 1], [0, 1, 0])
    assert made.columns == {"level": [3, None]}
    rows = [{"prompt": {"text": "b", "toxicity": 0.1}, "generations": [{"text": " one"}, {"text": ""}]}]
    made = read_completions(write_lines(tmp_path / "generations.jsonl", rows))
    assert (made.prompts, made.completions) == (["b"], [" one", ""])
    assert made.completion_ids is None


def test_a_parquet_of_others_is_read_too(tmp_path):
    Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"]}).to_parquet(tmp_path / "theirs.parquet")
    assert read_completions(tmp_path / "theirs.parquet").completions == ["x", "y"]


def test_prompts_that_come_again_are_taken_together_and_told_of(tmp_path):
    rows = [{"prompt": "a", "generations": ["x", "y"]}, {"prompt": "a", "generations": ["z"]}]
    with pytest.warns(UserWarning, match="1 prompts come again"):
        made = read_completions(write_lines(tmp_path / "theirs.jsonl", rows))
    assert (made.prompts, made.completions) == (["a"], ["x", "y", "z"])


def test_what_differs_between_completions_of_a_prompt_reaches_no_scorer(tmp_path):
    rows = [{"prompt": p, "completion": c, "topic": p, "level": n} for n, (p, c) in enumerate(["ax", "ay", "bz"])]
    rows[2]["late"] = 1
    with pytest.warns(UserWarning, match="level differ between completions of one prompt"):
        made = read_completions(write_lines(tmp_path / "theirs.jsonl", rows))
    assert made.columns == {"topic": ["a", "b"], "late": [None, 1]}


def test_prompts_without_a_completion_are_left_out_and_told_of(tmp_path):
    rows = [{"prompt": "a", "generations": []}, {"prompt": "b", "generations": ["x"]}]
    with pytest.warns(UserWarning, match="left out 1 prompts without a completion"):
        made = read_completions(write_lines(tmp_path / "theirs.jsonl", rows))
    assert (made.prompts, made.completions) == (["b"], ["x"])


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.jsonl", [{"prompt": p, "completion": "b", "id": i} for p, i in (("a", 1), ("b", "two"))], "id has values"),
        ("a.jsonl", [{"prompt": "a", "completion": "b"}, "{torn"], r"line 2, is no JSON"),
        ("a.jsonl", [{"prompt": "a"}], r"line 1, has no prompt with a completion or generations"),
        ("a.jsonl", ["[1]"], r"line 1, has no prompt with a completion"),
        ("a.jsonl", [{"prompt": 3, "completion": "b"}], r"neither text nor messages"),
        ("a.jsonl", [{"prompt": "a", "completion": None}], r"a completion that is no text"),
        ("a.jsonl", [{"prompt": "a", "generations": "b"}], r"a completion that is no text"),
        ("a.jsonl", [], r"holds no completion"),
        ("results.json", [{}], r"results.json holds figures alone. Give completions.parquet beside it"),
        ("a.csv", [], r"neither .parquet nor .jsonl"),
        ("a.parquet", ["no parquet"], r"cannot be read"),
    ],
)
def test_a_file_that_holds_no_completions_is_refused(tmp_path, name, rows, message):
    with pytest.raises(DataError, match=message):
        read_completions(write_lines(tmp_path / name, rows))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        read_completions(tmp_path / "completions.parquet")


# The journal


def test_a_torn_line_is_dropped_and_the_next_one_stands_whole(tmp_path):
    journal = Journal(tmp_path / "parts" / "x.jsonl", lambda: {"rows": 4})
    journal.add(start=0, values=[1.0, None])
    whole = journal.path.read_bytes()
    for torn in (b'{"start": 1, "val', b'{"start": 1}', b"garbage\n"):
        journal.path.write_bytes(whole + torn)
        again = Journal(journal.path, lambda: {"rows": 5})
        assert (again.begun, again.lines) == ({"rows": 4}, [{"start": 0, "values": [1.0, None]}])
        again.add(start=2)
        assert Journal(journal.path).lines[1:] == [{"start": 2}]


def test_a_journal_that_was_torn_at_its_first_line_begins_anew(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"rows"')
    assert Journal(tmp_path / "x.jsonl", lambda: {"rows": 5}).begun == {"rows": 5}
    (line,) = (tmp_path / "x.jsonl").read_text().splitlines()
    assert json.loads(line)["rows"] == 5  # and the line's checksum


def test_a_full_disk_is_told_in_one_line(tmp_path):
    journal = Journal(tmp_path / "x.jsonl")
    journal.path = tmp_path  # cannot be appended to
    with pytest.raises(DataError, match="could not be kept"):
        journal.add(start=0)


# Generation


def generate_set(asked, parts, num_generations=3, strengths=(1.0,), seed=0, batch_rows=4, prompts=PROMPTS, **settings):
    settings = GenerationSettings(**{"max_completion_length": 6, **settings})
    prompts = encoded(asked.tokenizer, asked.position, prompts)
    return passes.generate(asked, prompts, settings, num_generations, strengths, seed, parts, QUIET, batch_rows)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_completions_are_those_of_generate(tmp_path, name):
    model, tokenizer = TINY_MODELS[name](), tiny_tokenizer()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=3, style="embedding")
    asked = Asked(model, tokenizer, tokens, quantile=2)
    made = generate_set(asked, tmp_path, seed=7, top_p=0.9)
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    expected = complete(model, tokenizer, repeated, reward_tokens=tokens, seed=7, max_completion_length=6, top_p=0.9)
    assert made.completions == expected
    assert made.prompt_of.tolist() == np.repeat(np.arange(4), 3).tolist()
    assert made.number.tolist() == [0, 1, 2] * 4
    assert not set(tokens.barred) & {i for ids in made.completion_ids for i in ids}


def test_a_plain_model_is_completed_without_a_reward_token(tmp_path):
    model, tokenizer = tiny_gpt2(), tiny_tokenizer(bos=True)
    made = generate_set(Asked(model, tokenizer), tmp_path, num_generations=1)
    assert made.completions == complete(model, tokenizer, PROMPTS, max_completion_length=6)
    assert made.prompt_ids[0][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("batches", [1, 2])
def test_a_stopped_generation_goes_on_with_the_same_completions(tmp_path, monkeypatch, batches):
    asked = Asked(tiny_llama(), tiny_tokenizer())
    whole = generate_set(asked, tmp_path / "whole")
    add, kept = Journal.add, []

    def add_and_stop(journal, **line):
        if len(kept) == batches:
            raise KeyboardInterrupt
        add(journal, **line)
        kept.append(line)

    monkeypatch.setattr(Journal, "add", add_and_stop)
    with pytest.raises(KeyboardInterrupt):
        generate_set(asked, tmp_path / "stopped")
    monkeypatch.setattr(Journal, "add", add)
    path = tmp_path / "stopped" / "generate.jsonl"
    assert len(path.read_text().splitlines()) == 1 + batches
    path.write_bytes(path.read_bytes()[:-3])  # and killed while it wrote
    # another size of batch would give other roundings: the one that it was begun with is kept
    assert generate_set(asked, tmp_path / "stopped", batch_rows=3).completion_ids == whole.completion_ids
    rows = [line["rows"] for line in Journal(path).lines]
    assert sorted(row for batch in rows for row in batch) == list(range(12))


def test_completions_of_a_prompt_share_its_prefill(tmp_path, monkeypatch):
    from quark_lm.generation.hf import HFCompleter

    shapes = []
    forward = HFCompleter._forward

    def counted(self, ids, *rest):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *rest)

    monkeypatch.setattr(HFCompleter, "_forward", counted)
    asked = Asked(tiny_gpt2(), tiny_tokenizer())
    generate_set(asked, tmp_path, num_generations=25, batch_rows=25, prompts=["the cat sat"], max_completion_length=3)
    length = len(asked.tokenizer("the cat sat")["input_ids"])
    assert shapes[0] == (1, length)
    assert {shape[1] for shape in shapes[1:]} == {1}


# Scores


def test_a_scorer_that_fails_midway_keeps_what_it_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "_CHUNK", 4)
    calls = []

    def failing(completions, **kwargs):
        calls.append(list(completions))
        if len(calls) == 3:
            raise OSError("the service is gone")
        return length_score(completions)

    made = a_set(["x" * n for n in range(10)])
    scorer = Scorer("failing", "failing", failing)
    with pytest.raises(RewardError, match="failing raised OSError: the service is gone"):
        score(made, scorer, tmp_path, QUIET)
    assert score(made, scorer, tmp_path, QUIET).tolist() == [n / 100 for n in range(10)]
    assert [len(call) for call in calls] == [4, 4, 2, 2]  # the two finished ones are not called for again


def test_another_version_of_a_scorer_scores_anew(tmp_path):
    made = a_set(["x", "xx"])
    first, second = (lambda completions, **kwargs: [0.0, 0.0]), length_score
    first.scorer_version = "1"
    score(made, Scorer("mine", "mine", first), tmp_path, QUIET)
    assert score(made, Scorer("mine", "mine", second), tmp_path, QUIET).tolist() == [0.01, 0.02]


def test_a_scorer_is_called_as_a_reward_function_is(tmp_path):
    seen = {}

    def seeing(prompts, completions, completion_ids, level, trainer_state, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, level=level)
        return [None, 0.5, None]

    chat = [{"role": "user", "content": "hello"}]
    made = a_set(["a", "b", "c"], [0, 1, 1], ["plain", chat], completion_ids=[[1], [2], [3]], columns={"level": [7, 8]})
    values = score(made, Scorer("seeing", "seeing", seeing), tmp_path, QUIET)
    assert [None if math.isnan(v) else v for v in values] == [None, 0.5, None]
    assert seen["prompts"] == ["plain", chat, chat]
    assert seen["completions"] == ["a", *([{"role": "assistant", "content": text}] for text in "bc")]
    assert (seen["ids"], seen["level"]) == ([[1], [2], [3]], [7, 8, 8])


def test_scorers_are_named_as_they_were_asked_for(tmp_path):
    (tmp_path / "mine.py").write_text("def short(completions, **kwargs):\n    return [0.5] * len(completions)\n")
    scorers = load_scorers(
        [f"{tmp_path}/mine.py:short", "repetition(unit=tokens)"], {"repetition(unit=tokens)": "reward"}
    )
    assert [scorer.name for scorer in scorers] == ["short", "repetition(unit=tokens)"]
    own, ours = (scorer.facts() for scorer in scorers)
    assert own["version"].startswith("source ")  # of the file: it changes when the file does
    assert (ours["scorer"], ours["version"], ours["role"]) == ("diversity of tokens", "1", "reward")
    (tmp_path / "mine.py").write_text("def short(completions, **kwargs):\n    return [0.6] * len(completions)\n")
    assert scorers[0].facts()["version"] != own["version"]
    with pytest.raises(ConfigError, match="named twice"):
        load_scorers(["repetition", "repetition"], {})


def test_scorers_of_one_function_name_are_told_by_what_names_them(tmp_path):
    specs = [f"{tmp_path}/{name}.py:short" for name in "ab"]
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("def short(completions, **kwargs):\n    return [0.5] * len(completions)\n")
    assert [scorer.name for scorer in load_scorers(specs, {})] == ["short", specs[1]]


# Perplexity


def naive_nll(model, tokenizer, prompt, completion):
    """The published loop: the loss of prompt and completion less that of the prompt, each without its first token."""
    totals, lengths = [], []
    for text in (prompt + completion, prompt):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        totals.append(-log_probs.gather(1, ids[0, 1:, None]).sum().item())
        lengths.append(ids.shape[1])
    return totals[0] - totals[1], lengths[0] - lengths[1]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@torch.no_grad()
def test_another_tokenizer_reads_the_text_anew_as_the_published_loop_does(tmp_path, monkeypatch, build, bos):
    monkeypatch.setattr(passes, "_CHUNK", 3)
    model, tokenizer = build(), tiny_tokenizer(bos=bos)
    # "t" + "he" and "i" + "n the": the border falls into a token; "t" alone has no token before it
    prompts = ["the cat", "a t", "an hour i", "t"]
    completions = [" sat on it", "he end", "n the rain", "h", "", " or not"]
    made = a_set(completions, [0, 1, 2, 3, 0, 0], prompts)
    nll, tokens = read_by(Evaluator("e", model, tokenizer), made, tmp_path, QUIET)
    for i, text in enumerate(completions):
        expected, length = naive_nll(model, tokenizer, prompts[made.prompt_of[i]], text)
        if length <= 0:
            assert math.isnan(nll[i])
            assert tokens[i] == 0
        else:
            assert (nll[i], tokens[i]) == (pytest.approx(expected, abs=1e-3), length)
    assert math.isnan(nll[4])  # no token


@torch.no_grad()
def test_the_same_tokenizer_reads_the_ids_as_they_were_drawn(tmp_path):
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    made = generate_set(Asked(tiny_gpt2(seed=1), tokenizer), tmp_path / "made", max_completion_length=12)
    made.facts = {"made": {"tokenizer": tokenizer_digest(tokenizer, None)}}
    evaluator = Evaluator("e", model, tokenizer)
    assert evaluator.keeps_ids(made)
    nll, tokens = read_by(evaluator, made, tmp_path, QUIET)
    for i, ids in enumerate(made.completion_ids):
        prompt = made.prompt_ids[made.prompt_of[i]]
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # the end of text is no part of the text
        assert tokens[i] == len(ids)
        if ids:
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = -logits.gather(1, torch.tensor(ids)[:, None]).sum().item()
            assert nll[i] == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_the_end_of_text_of_the_model_that_drew_is_no_part_of_the_text(tmp_path):
    tokenizer = tiny_tokenizer()
    other = tokenizer.convert_tokens_to_ids(" the")  # as a tuned model ends in a token of its own
    ids = tokenizer(" a cat")["input_ids"]
    drawn = {"prompt_ids": [tokenizer("the cat")["input_ids"]], "completion_ids": [ids, [*ids, other]]}
    made = a_set([" a cat", " a cat"], [0, 0], ["the cat"], **drawn)
    made.facts = {"made": {"tokenizer": tokenizer_digest(tokenizer, None), "eos_ids": [other]}}
    nll, tokens = read_by(Evaluator("e", tiny_gpt2(), tokenizer), made, tmp_path, QUIET)
    assert tokens.tolist() == [len(ids)] * 2
    assert nll[0] == pytest.approx(nll[1])


def test_reward_tokens_do_not_make_another_tokenizer():
    model, tokenizer, plain = tiny_gpt2(), tiny_tokenizer(), tiny_tokenizer()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=3, style="embedding")
    assert tokenizer_digest(tokenizer, tokens) == tokenizer_digest(plain, None)
    assert tokenizer_digest(character_tokenizer(), None) != tokenizer_digest(plain, None)


def character_tokenizer():
    """Another vocabulary: characters alone."""
    pieces = ["<|end|>", "\n", *map(chr, range(32, 127))]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False)


@torch.no_grad()
def test_after_an_empty_prompt_the_first_token_is_context_and_not_counted(tmp_path):
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    made = a_set(["the cat sat", "a"], [0, 0], [""])
    nll, tokens = read_by(Evaluator("e", model, tokenizer), made, tmp_path, QUIET)
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    assert nll[0] == pytest.approx(-log_probs.gather(1, ids[0, 1:, None]).sum().item(), abs=1e-3)
    assert tokens.tolist() == [ids.shape[1] - 1, 0]
    assert math.isnan(nll[1])  # one token alone has no context


def test_a_text_beyond_the_evaluator_s_reach_has_no_value(tmp_path):
    made = a_set(["a" * 200, "a"], [0, 0])  # the tiny models read 128 tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nll, tokens = read_by(Evaluator("e", tiny_gpt2(), tiny_tokenizer()), made, tmp_path, QUIET)
    assert np.isnan(nll).tolist() == [True, False]
    assert tokens.tolist() == [0, 1]


def test_a_stopped_evaluator_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "_CHUNK", 2)
    made = a_set(["the sea", "an or", "ing", "at", "is it"])
    evaluator = Evaluator("e", tiny_gpt2(), tiny_tokenizer())
    nll, tokens = read_by(evaluator, made, tmp_path / "a", QUIET)
    path = next((tmp_path / "a").iterdir())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    again, counts = read_by(evaluator, made, tmp_path / "a", QUIET)
    np.testing.assert_allclose(again, nll)
    assert counts.tolist() == tokens.tolist()
    other = Evaluator("e", tiny_gpt2(seed=1), tiny_tokenizer())  # other weights under the same name
    assert not np.allclose(read_by(other, made, tmp_path / "a", QUIET)[0], nll)


# References


@torch.no_grad()
def test_references_are_followed_as_the_naive_loop_does(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=3, style="text")
    asked = Asked(model, tokenizer, tokens, quantile=2)
    prompts, references = encoded(tokenizer), ["sat on it", ", and then", "", "near the end"]
    predicted, gold, nll = follow(asked, prompts, references, 5, tmp_path, QUIET)
    texts = [" sat on it", ", and then", "", " near the end"]  # a space where the data set left it out
    for i, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"][:5]
        assert gold[i] == [*prompts.ids[i], *ids]
        before = tokens.insert(prompts.ids[i], 2, prompts.token_at[i])
        logits = model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        if ids:
            assert predicted[i] == logits.argmax(1).tolist()
            expected = -logits.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
            np.testing.assert_allclose(nll[i], expected, atol=1e-3)
    figures = reference_figures(predicted, gold, nll)
    expected = metrics.token_repetition(predicted, gold, nll)
    assert {name: figures[name]["mean"] for name in expected} == pytest.approx(expected)
    assert (figures["texts"], figures["without_a_token"]) == (3, 1)
    assert figures["ppl"]["low"] <= figures["ppl"]["mean"] <= figures["ppl"]["high"]


# Figures


def test_toxicity_is_above_what_is_left_of_the_threshold():
    made = a_set(["a", "b"], scores={"s": np.array([0.7, 0.9])})
    figures = summarise(made, {"s": 0.8}, measures_toxicity=True)["scores"]["s"]
    assert (figures["wanted"]["mean"], figures["toxicity_probability"]["mean"]) == (0.5, 0.5)


def test_figures_are_those_of_the_metrics():
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abc"), size=8)) for _ in range(12)]
    scores = generator.random(12)
    scores[3] = np.nan
    nll, tokens = generator.random(12) * 30, generator.integers(1, 9, size=12)
    ids = [generator.integers(0, 5, size=9).tolist() for _ in range(12)]
    made = a_set(texts, np.repeat([0, 1, 2], 4), completion_ids=ids, scores={"s": scores}, nll=nll, nll_tokens=tokens)
    figures = summarise(made, {"s": None}, measures_toxicity=True)
    groups = np.split(np.arange(12), 3)
    toxicity = [(1 - scores[g]).tolist() for g in groups]
    assert figures["scores"]["s"]["average_maximum_toxicity"]["mean"] == pytest.approx(
        metrics.average_maximum(toxicity)
    )
    assert figures["scores"]["s"]["toxicity_probability"]["mean"] == metrics.toxicity_probability(toxicity)
    wanted = metrics.share_wanted([scores[g].tolist() for g in groups])
    assert figures["scores"]["s"]["wanted"]["mean"] == pytest.approx(wanted)
    assert figures["scores"]["s"]["missing"] == {"completions": 1, "prompts": 0}
    grouped = [[texts[i] for i in g] for g in groups]
    assert figures["text"]["dist_2"]["mean"] == pytest.approx(metrics.distinct_n(grouped, 2))
    assert figures["text"]["dist_3_space"]["mean"] == pytest.approx(metrics.distinct_n(grouped, 3, "space"))
    assert figures["text"]["rep_4_tokens"]["mean"] == pytest.approx(metrics.seq_rep_n(ids, 4))  # groups of one size
    assert figures["text"]["diversity"]["mean"] == pytest.approx(np.mean([metrics.diversity(t) for t in texts]))
    whole = metrics.conditional_perplexity(nll, tokens)
    for name in ("corpus", "mean", "trimmed_mean"):
        interval = figures["perplexity"][name]
        assert interval["mean"] == pytest.approx(getattr(whole, name))
        assert interval["low"] <= interval["mean"] <= interval["high"]


def test_a_completion_without_words_and_a_lost_prompt_are_counted_and_left_out():
    made = a_set(["a b", " ...", ""], [0, 1, 1], scores={"s": np.array([0.8, np.nan, np.nan])})
    figures = summarise(made, {"s": 0.5})
    assert figures["counts"]["without_words"] == 2
    assert figures["scores"]["s"]["mean"] == {"mean": 0.8, "low": 0.8, "high": 0.8}
    assert figures["scores"]["s"]["missing"] == {"completions": 2, "prompts": 1}
    assert figures["notes"] == ["Prompts have 1 to 2 completions: their maxima are of different numbers."]


def test_one_completion_a_prompt_is_told_of_where_it_changes_the_meaning():
    made = a_set(["a b c d", "b"], scores={"s": np.array([0.2, 0.9])})
    figures = summarise(made, {"s": 0.5}, measures_toxicity=True)
    assert figures["scores"]["s"]["average_maximum_toxicity"]["mean"] == pytest.approx(0.45)
    assert figures["notes"] == ["One completion a prompt: its toxicity is the maximum. Published figures take 25."]


def test_one_prompt_has_no_interval_and_an_assumed_threshold_is_told():
    made = a_set(["a b c d", "b"], [0, 0], scores={"s": np.array([0.2, 0.9])})
    assumed, named = summarise(made, {"s": None}), summarise(made, {"s": 0.5})
    assert assumed["notes"] == ["One prompt: intervals are over prompts, so these have no width and say nothing."]
    assert [figures["scores"]["s"]["threshold_assumed"] for figures in (assumed, named)] == [True, False]
    assert assumed["scores"]["s"]["wanted"] == named["scores"]["s"]["wanted"]


def test_scores_outside_0_and_1_have_no_share_and_no_toxicity():
    made = a_set(["a", "b"], scores={"logit": np.array([-3.0, 2.0])})
    figures = summarise(made, {"logit": None}, measures_toxicity=True)["scores"]["logit"]
    assert figures["wanted"] is None
    assert "average_maximum_toxicity" not in figures
    assert figures["mean"]["mean"] == -0.5
    assert summarise(made, {"logit": 0.0})["scores"]["logit"]["wanted"]["mean"] == 0.5


def test_a_scorer_that_gave_nothing_is_told_of():
    figures = summarise(a_set(["a", "b"], scores={"s": np.full(2, np.nan)}), {"s": None})
    assert figures["notes"] == ["s gave no score for any of the 2 completions."]
    assert math.isnan(figures["scores"]["s"]["mean"]["mean"])


def test_a_hopeless_completion_makes_the_mean_infinite_and_nothing_else():
    made = a_set(["a", "b"], nll=np.array([5000.0, 1.0]), nll_tokens=np.array([1, 1]))
    figures = summarise(made, {})["perplexity"]
    assert figures["mean"]["mean"] == math.inf
    assert figures["trimmed_mean"]["mean"] == pytest.approx(math.e)
    assert figures["over_1e4"] == 1
