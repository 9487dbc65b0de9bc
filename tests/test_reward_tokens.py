"""Reward tokens: their rows, that they are never sampled or read, that they come back from disk, and hostile files."""

import json

import pytest
import torch
from tiny import TINY_MODELS, VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer

from quark_lm import RewardTokens
from quark_lm.errors import ConfigError, ModelError
from quark_lm.generation import GenerationSettings, complete_all, sample_seeds
from quark_lm.generation.hf import HFCompleter
from quark_lm.reward_tokens import FILE_NAME, default_texts

WORDS = ["the rain", "a hat", "in"]


def embedding(model, tokenizer=None, **options):
    tokenizer = tokenizer or tiny_tokenizer()
    return RewardTokens.create(model, tokenizer, **{"num_quantiles": 3, "style": "embedding", **options})


# -- new rows


def test_new_tokens_stand_behind_the_vocabulary_of_model_and_tokenizer(tiny_model, tokenizer):
    tokens = embedding(tiny_model, tokenizer)
    assert tokens.barred == (VOCAB, VOCAB + 1, VOCAB + 2)
    assert tokens.ids == ((VOCAB,), (VOCAB + 1,), (VOCAB + 2,))
    assert (tokens.worst, tokens.best, tokens.num_quantiles, tokens.longest) == (0, 2, 3, 1)
    assert len(tokenizer) == VOCAB + 3
    assert tiny_model.get_input_embeddings().weight.shape[0] == VOCAB + 3
    assert tiny_model.get_output_embeddings().weight.shape[0] == VOCAB + 3
    assert tokenizer.convert_tokens_to_ids(list(tokens.texts)) == list(tokens.barred)


def test_the_old_rows_and_the_tie_stay(tiny_model):
    before = tiny_model.get_input_embeddings().weight.detach().clone()
    tied = tiny_model.config.tie_word_embeddings
    embedding(tiny_model)
    weight = tiny_model.get_input_embeddings().weight
    assert torch.equal(weight[:VOCAB], before)
    assert (tiny_model.get_output_embeddings().weight is weight) is tied


@pytest.mark.parametrize("name", TINY_MODELS)
def test_random_rows_follow_the_mean_and_spread_of_each_dimension(name):
    model = TINY_MODELS[name]()
    weights = {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}
    for number, weight in enumerate(weights.values()):  # dimensions that differ, and an untied head that differs too
        if number == 0 or weight is not weights["in"]:
            weight.data = weight.data * torch.linspace(0.1, 3, 32) + torch.linspace(-2, 2, 32) * (1 + number)
    old = {side: (weight.mean(0), weight.std(0)) for side, weight in weights.items()}
    tokens = embedding(model, num_quantiles=400)
    for side, weight in (("in", model.get_input_embeddings().weight), ("out", model.get_output_embeddings().weight)):
        new, (mean, std) = weight[list(tokens.barred)], old[side]
        assert ((new.mean(0) - mean).abs() < 5 * std / 20).all(), side  # 20: the root of 400 rows
        assert ((new.std(0) / std - 1).abs() < 0.2).all(), side
        assert len(new.unique(dim=0)) == 400


def test_the_rows_depend_on_the_seed_alone():
    rows = {}
    for key, seed in (("a", 3), ("b", 3), ("c", 4)):
        model = tiny_gpt2()
        torch.seed()
        tokens = embedding(model, seed=seed)
        rows[key] = model.get_input_embeddings().weight[list(tokens.barred)]
    assert torch.equal(rows["a"], rows["b"])
    assert not torch.equal(rows["a"], rows["c"])


def test_rows_from_words_are_the_means_of_their_words(tiny_model, tokenizer):
    ids = [tokenizer(word)["input_ids"] for word in WORDS]
    tokens = embedding(tiny_model, tokenizer, init="words", texts=WORDS)
    for weight in (tiny_model.get_input_embeddings().weight, tiny_model.get_output_embeddings().weight):
        for row, word_ids in zip(tokens.barred, ids, strict=True):
            torch.testing.assert_close(weight[row], weight[word_ids].mean(0))


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_padded_vocabulary_gives_its_room_and_its_padding_has_no_say(build):
    model = build(vocab=VOCAB + 8)
    model.get_input_embeddings().weight.data[VOCAB:] = 1000.0  # what a padded row holds is nobody's business
    tokens = embedding(model)
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 8
    assert tokens.barred == (VOCAB, VOCAB + 1, VOCAB + 2)
    assert model.get_input_embeddings().weight[list(tokens.barred)].abs().max() < 10


def test_a_tokenizer_that_holds_the_names_is_refused(tokenizer):
    embedding(tiny_llama(), tokenizer)
    model = tiny_llama()
    with pytest.raises(
        ModelError, match=r"already holds <\|quark_0\|>, so this model was trained by Quark before"
    ) as caught:
        embedding(model, tokenizer)
    assert "\n" not in str(caught.value)
    assert model.get_input_embeddings().weight.shape[0] == VOCAB
    RewardTokens.create(model, tokenizer, num_quantiles=3, style="text")  # the way out that the error names


def test_reward_tokens_are_never_sampled_even_if_they_are_the_likeliest(tiny_model, tokenizer):
    tokens = embedding(tiny_model, tokenizer)
    with torch.no_grad():
        states = tiny_model(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states[-1][0, -1]
        tiny_model.get_output_embeddings().weight[list(tokens.barred)] = 100 * states
    prompts = [[5, 6]] * 8 + [[*tokens.ids[2], 5, 6]] * 8
    for temperature in (0.0, 1.0):
        settings = GenerationSettings(max_completion_length=4, temperature=temperature, barred=tokens.barred)
        batches = HFCompleter(tiny_model, [0]).complete(prompts, sample_seeds(0, num=16), settings)
        drawn = {token for completion in complete_all(batches, 16) for token in completion}
        assert drawn
        assert not drawn & set(tokens.barred)


def test_decoding_leaves_them_out(tokenizer):
    tokens = embedding(tiny_llama(), tokenizer)
    ids = [*tokens.ids[2], *tokenizer("the cat")["input_ids"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat"


# -- tags


def test_tags_are_ordinary_text_and_bar_nothing(tokenizer):
    model = tiny_llama()
    tokens = RewardTokens.create(model, tokenizer, num_quantiles=3, texts=["bad ", "so so ", "good "])
    assert tokens.style == "text"
    assert tokens.barred == ()
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == VOCAB
    assert [tokenizer.decode(list(ids)) for ids in tokens.ids] == ["bad ", "so so ", "good "]
    assert tokens.longest == max(map(len, tokens.ids)) > 1


def test_tags_get_no_beginning_of_text_of_their_own():
    tokenizer = tiny_tokenizer(bos=True)
    tokens = RewardTokens.create(tiny_llama(), tokenizer, num_quantiles=2)
    assert all(tokenizer.bos_token_id not in ids for ids in tokens.ids)


@pytest.mark.parametrize("num_quantiles", [2, 3, 5, 8, 9, 10, 30])
def test_default_texts_differ_and_run_from_worst_to_best(num_quantiles):
    texts = default_texts(num_quantiles)
    assert len(set(texts)) == num_quantiles
    if num_quantiles <= 9:
        assert ("terrible" in texts[0], "excellent" in texts[-1]) == (True, True)
    else:
        assert f"{num_quantiles} of {num_quantiles}" in texts[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"texts": ["a", "", "c"]}, r"text '' has no tokens"),
        ({"texts": ["a", "b", "a"]}, "Two reward token texts are equal"),
        ({"texts": ["a", "", "c"], "style": "embedding", "init": "words"}, r"text '' has no tokens"),
    ],
)
def test_texts_that_name_nothing_or_the_same_are_refused(tokenizer, options, words):
    with pytest.raises(ConfigError, match=words):
        RewardTokens.create(tiny_llama(), tokenizer, num_quantiles=3, **options)


# -- where they stand


def test_a_token_is_put_where_it_is_told_and_none_leaves_the_prompt():
    tokens = RewardTokens("text", "first", ("w", "b"), ((30, 31), (32,)))
    assert tokens.insert([1, 2, 3], 1, 0) == [32, 1, 2, 3]
    assert tokens.insert([1, 2, 3], 0, 1) == [1, 30, 31, 2, 3]
    assert tokens.insert([1, 2, 3], 1, 3) == [1, 2, 3, 32]
    prompt = [1, 2, 3]
    same = tokens.insert(prompt, None, 0)
    assert same == prompt
    assert same is not prompt


# -- on disk


@pytest.mark.parametrize("style", ["text", "embedding"])
def test_they_come_back_from_disk_as_they_were(tmp_path, tokenizer, style):
    tokens = RewardTokens.create(tiny_llama(), tokenizer, num_quantiles=3, style=style, position="before_completion")
    tokens.save(tmp_path)
    assert RewardTokens.load(tmp_path) == tokens


def test_a_folder_without_them_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no reward_tokens.json, so it was not made by Quark"):
        RewardTokens.load(tmp_path)


GOOD = {"style": "embedding", "position": "first", "texts": ["a", "b"], "ids": [[5], [6]], "barred": [5, 6]}
HOSTILE = {
    "no JSON": "{",
    "nothing": "",
    "not UTF-8": b"\xff\xfe",
    "a list": "[]",
    "null": "null",
    "nested beyond reading": "[" * 100_000,
    "a key is missing": json.dumps({k: v for k, v in GOOD.items() if k != "barred"}),
    "an unknown style": json.dumps({**GOOD, "style": "os.system"}),
    "an unknown position": json.dumps({**GOOD, "position": "everywhere"}),
    "ids are words": json.dumps({**GOOD, "ids": [["x"], [6]]}),
    "ids are broken numbers": json.dumps({**GOOD, "ids": [[5.5], [6]]}),
    "an id is infinite": json.dumps(GOOD).replace("[5]", "[1e999]"),
    "an id is negative": json.dumps({**GOOD, "ids": [[-1], [6]]}),
    "a barred id is negative": json.dumps({**GOOD, "barred": [-1]}),
    "no quantile": json.dumps({**GOOD, "texts": [], "ids": []}),
    "one quantile": json.dumps({**GOOD, "texts": ["a"], "ids": [[5]]}),
    "a quantile without ids": json.dumps({**GOOD, "ids": [[], [6]]}),
    "more texts than quantiles": json.dumps({**GOOD, "texts": ["a", "b", "c"]}),
    "texts are no list": json.dumps({**GOOD, "texts": 7}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_hostile_file_is_one_clear_error(tmp_path, kind):
    content = HOSTILE[kind]
    (tmp_path / FILE_NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=r"reward_tokens.json is damaged") as caught:
        RewardTokens.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_the_file_of_the_hostile_cases_is_good_before_it_is_changed(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps(GOOD))
    assert RewardTokens.load(tmp_path).best == 1
