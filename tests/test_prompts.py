"""Prompts: every form that is read, every bad input, where the reward token goes, and the rule that holds some out."""

import json

import pytest
from datasets import Dataset, DatasetDict
from tiny import tiny_tokenizer

from quark_lm.errors import ConfigError, DataError, ModelError
from quark_lm.prompts import (
    EncodedPrompts,
    checked,
    completion_texts,
    encode,
    is_held_out,
    load_prompts,
    split_held_out,
)

TEXTS = ["the cat is", "an old hat", "rain"]
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def prompts(*values, **columns):
    return Dataset.from_dict({"prompt": list(values), **columns})


def written(path, content):
    path.write_text(content, encoding="utf-8")
    return path


# -- files


def test_each_kind_of_file_gives_its_prompts(tmp_path):
    dataset = prompts(*TEXTS, topic=["a", "b", "c"])
    dataset.to_json(tmp_path / "p.jsonl")
    dataset.to_parquet(tmp_path / "p.parquet")
    dataset.to_csv(tmp_path / "p.csv")
    written(tmp_path / "p.json", json.dumps(dataset.to_list()))
    written(tmp_path / "p.tsv", "prompt\ttopic\n" + "\n".join(f"{r['prompt']}\t{r['topic']}" for r in dataset))
    for ending in ("jsonl", "parquet", "csv", "json", "tsv"):
        loaded = load_prompts(tmp_path / f"p.{ending}")
        assert list(loaded["prompt"]) == TEXTS, ending
        assert list(loaded["topic"]) == ["a", "b", "c"], ending
    assert list(load_prompts(written(tmp_path / "p.txt", "\n".join(TEXTS) + "\n"))["prompt"]) == TEXTS


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfthe cat is\nrain\n")
    assert load_prompts(tmp_path / "p.txt")["prompt"] == ["the cat is", "rain"]


@pytest.mark.parametrize(
    ("prompt", "alone", "after"), [("the hotel was", "nice", " nice"), ("a\n", "nice", " nice"), (USER, "nice", "nice")]
)
def test_a_completion_keeps_the_space_that_its_decoder_leaves_out(prompt, alone, after):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁the", "▁hotel", "▁was", "▁nice", "▁a", "\n", "s"]  # as Llama's and Mistral's first tokenizers
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("\n", "isolated")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")
    text = prompt if isinstance(prompt, str) else "the hotel"
    encoded = EncodedPrompts([prompt], [text], [tokenizer(text)["input_ids"]], [0])
    assert tokenizer.decode([4, 7], skip_special_tokens=True) == alone + "s"
    assert completion_texts(tokenizer, encoded, [[4, 7, 0]]) == [after + "s"]
    assert completion_texts(tokenizer, encoded, [[7]]) == ["s"]
    assert completion_texts(tokenizer, encoded, [[]]) == [""]


def test_realtoxicityprompts_are_read_as_they_are_published(tmp_path):
    rows = [
        {"filename": f"{n}.txt", "challenging": n == 0, "prompt": {"text": text, "toxicity": n / 3, "profanity": None}}
        for n, text in enumerate(TEXTS)
    ]
    loaded = load_prompts(written(tmp_path / "rtp.jsonl", "\n".join(map(json.dumps, rows))))
    assert list(loaded["prompt"]) == TEXTS
    assert list(loaded["challenging"]) == [True, False, False]


def test_conversations_are_read_from_a_file(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in TEXTS]
    loaded = load_prompts(written(tmp_path / "chat.jsonl", "\n".join(map(json.dumps, rows))))
    assert list(loaded["prompt"]) == [row["prompt"] for row in rows]


def test_a_csv_keeps_prompts_that_look_like_missing_values_or_numbers(tmp_path):
    for name, values in (("none.csv", ["None", "NA", "the cat"]), ("years.csv", ["1984", "2001"])):
        loaded = load_prompts(written(tmp_path / name, "\n".join(["prompt", *values]) + "\n"))
        assert list(loaded["prompt"]) == values
    loaded = load_prompts(written(tmp_path / "missing.csv", "prompt,level\nNone,1\nrain,\nthe cat,3\n"))
    assert loaded.to_dict() == {"prompt": ["None", "rain", "the cat"], "level": [1.0, None, 3.0]}


def test_a_prompt_that_comes_again_with_another_column_stays():
    rows = [{"prompt": "the cat", "label": label} for label in "aba"]
    with pytest.warns(UserWarning, match="0 empty and 1 repeated of 3 prompts"):
        made = checked(rows)
    assert made.to_list() == rows[:2]


def test_a_hub_s_data_set_may_be_named_with_its_split(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split))
        return prompts(*TEXTS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source in ("owner/name", "owner/name[test]", "owner/name:part[train[:2000]]"):
        load_prompts(source)
    assert asked == [
        ("owner/name", None, "train"), ("owner/name", None, "test"), ("owner/name", "part", "train[:2000]")
    ]  # fmt: skip


BAD_FILES = {
    "missing": ("none.jsonl", None, "There is no file .*none.jsonl"),
    "empty": ("empty.jsonl", "", "empty.jsonl is empty, so there is nothing to sample from"),
    "only blanks": ("blank.txt", " \n\n \t\n", "blank.txt is empty"),
    "no prompt column": ("other.jsonl", '{"text": "a"}\n', r"other.jsonl has no column `prompt` \(its columns: text\)"),
    "broken": ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', "broken.jsonl could not be read as json .line 2: "),
    "broken throughout": ("all.jsonl", '{"prompt": \n', r"all.jsonl could not be read as json \(Expecting value"),
    "unknown ending": ("prompts.doc", "a", r"prompts.doc ends with none of \.jsonl"),
    "only empty prompts": ("nothing.jsonl", '{"prompt": ""}\n{"prompt": " "}\n', "nothing.jsonl holds no prompt"),
    "a csv without a header": ("plain.csv", "the cat\nrain\n", "plain.csv has no column `prompt`"),
    "not parquet": ("fake.parquet", "the cat", "fake.parquet could not be read as parquet"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_in_one_line(tmp_path, kind):
    name, content, words = BAD_FILES[kind]
    if content is not None:
        written(tmp_path / name, content)
    with pytest.raises(DataError, match=words) as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_name_that_is_nowhere_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder, and prompts are read from one file"):
        load_prompts(tmp_path)
    with pytest.raises(
        DataError, match="nobody/nothing is neither a file here nor a data set that could be loaded"
    ) as caught:
        load_prompts("nobody/nothing")
    assert "\n" not in str(caught.value)


# -- what is left out


def test_repeated_and_empty_prompts_are_left_out_and_counted():
    dataset = prompts("a", "b", "a", "", "  ", None, "a", topic=list("tutwxyt"))
    with pytest.warns(UserWarning, match="mine: left out 3 empty and 2 repeated of 7 prompts"):
        kept = checked(dataset, "mine")
    assert list(kept["prompt"]) == ["a", "b"]
    assert list(kept["topic"]) == ["t", "u"]


def test_prompts_that_differ_in_blanks_or_case_are_different():
    assert len(checked(prompts("a b", "a  b", "A b", "a b "))) == 4


def test_repeated_conversations_are_left_out_too():
    with pytest.warns(UserWarning, match="0 empty and 1 repeated of 3"):
        assert len(checked(prompts(USER, USER, [*USER, {"role": "assistant", "content": "hi"}]))) == 2


@pytest.mark.parametrize("dataset", [Dataset.from_dict({"question": ["a"]}), Dataset.from_dict({})])
def test_a_data_set_without_a_prompt_column_is_refused(dataset):
    with pytest.raises(DataError, match="train_dataset has no column `prompt`"):
        checked(dataset)


@pytest.mark.parametrize("values", [[], [""], [None]])
def test_a_data_set_without_a_prompt_is_refused(values):
    with pytest.raises(DataError, match="train_dataset holds no prompt"):
        checked(Dataset.from_dict({"prompt": values}))


# -- what is no data set


def test_a_list_of_prompts_or_of_records_is_a_data_set():
    assert list(checked(TEXTS)["prompt"]) == TEXTS
    assert list(checked(tuple(TEXTS))["prompt"]) == TEXTS
    assert list(checked([USER, USER[:1] + USER])["prompt"]) == [USER, USER[:1] + USER]
    records = [{"prompt": "a", "topic": "x"}, {"prompt": "b"}, {"prompt": "c", "topic": "z", "level": 3}]
    made = checked(records)
    assert list(made["prompt"]) == ["a", "b", "c"]
    assert list(made["topic"]) == ["x", None, "z"]
    assert list(made["level"]) == [None, None, 3]


def test_a_path_is_read(tmp_path):
    path = written(tmp_path / "p.txt", "\n".join(TEXTS))
    assert list(checked(str(path))["prompt"]) == list(checked(path)["prompt"]) == TEXTS
    with pytest.raises(DataError, match=r"There is no file .*none\.jsonl"):
        checked(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (prompts(*TEXTS).to_iterable_dataset(), r"is an IterableDataset, which cannot say .*it\.take"),
        (
            DatasetDict(train=prompts("a"), test=prompts("b")),
            r"holds 2 data sets \(train, test\).*eval_dataset\['train'\]",
        ),
        ({"train": prompts("a")}, "holds 1 data sets"),
        ({"prompt": TEXTS}, "is of type dict. Give a datasets.Dataset, a list of prompts or records"),
        (7, "is of type int"),
        ([], "holds no prompt"),
        ([{"text": "a"}], r"no column `prompt` \(its columns: text\)"),
        (["a", USER], "values of several types in one column"),
        (["a", 7], "values of several types in one column"),
    ],
    ids=[
        "iterable",
        "splits",
        "dict-of-sets",
        "columns",
        "number",
        "empty",
        "other-column",
        "mixed",
        "text-and-number",
    ],
)
def test_what_is_no_data_set_is_named_in_one_line(data, words):
    with pytest.raises(DataError, match=words) as caught:
        checked(data, "eval_dataset")
    assert str(caught.value).startswith("eval_dataset")
    assert "\n" not in str(caught.value)


# -- ids, and where the token goes


@pytest.mark.parametrize(
    ("bos", "position", "at"),
    [
        (False, "first", 0),
        (False, "before_bos", 0),
        (False, "before_completion", None),
        (True, "first", 1),
        (True, "before_bos", 0),
        (True, "before_completion", None),
    ],
)
def test_the_token_goes_where_it_is_told(bos, position, at):
    tokenizer = tiny_tokenizer(bos=bos)
    encoded = encode(prompts(*TEXTS), tokenizer, position)
    assert encoded.ids == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [ids[0] == tokenizer.bos_token_id for ids in encoded.ids] == [bos] * 3
    assert encoded.token_at == [len(ids) if at is None else at for ids in encoded.ids]
    assert encoded.texts == encoded.prompts == TEXTS


def test_a_tokenizer_that_closes_every_text_does_not_close_a_prompt():
    tokenizer = tiny_tokenizer()
    original = type(tokenizer).__call__

    class Closing(type(tokenizer)):
        def __call__(self, text, **kwargs):
            encoded = original(self, text, **kwargs)
            encoded["input_ids"] = [*encoded["input_ids"], self.eos_token_id]
            return encoded

    tokenizer.__class__ = Closing
    assert encode(prompts("rain"), tokenizer).ids == [tiny_tokenizer()("rain")["input_ids"]]


LONG_TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "rain"},
    {"role": "assistant", "content": "is wet"},
    {"role": "user", "content": "rain"},
]


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        (USER, "<|user|>"),
        ([{"role": "user", "content": "  hello "}], "<|user|>"),
        (
            LONG_TALK,
            "<|system|>be kind<|user|>rain<|assistant|>is wet<|end|><|user|>",
        ),  # the last message, not the first
    ],
)
def test_in_a_conversation_first_is_the_start_of_the_last_user_message(prompt, before):
    tokenizer = tiny_tokenizer(chat=True)
    encoded = encode(prompts(prompt), tokenizer)
    ids, at = encoded.ids[0], encoded.token_at[0]
    assert encoded.texts[0].endswith("<|assistant|>")
    assert tokenizer.decode(ids[:at]) == before
    assert tokenizer.decode(ids) == encoded.texts[0]
    assert encoded.prompts[0] == prompt


@pytest.mark.parametrize("content", ["s", "user", "Assistant", "e"])
def test_a_message_whose_text_stands_in_the_template_too_is_not_taken_for_it(content):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] | trim }}\nAssistant:{% endfor %}"
    encoded = encode(prompts([{"role": "user", "content": content}]), tokenizer)
    assert tokenizer.decode(encoded.ids[0][: encoded.token_at[0]]) == "User: "


def test_in_a_conversation_the_other_positions_are_the_two_ends():
    tokenizer = tiny_tokenizer(chat=True)
    end = encode(prompts(LONG_TALK), tokenizer, "before_completion")
    assert end.token_at == [len(end.ids[0])]
    assert encode(prompts(LONG_TALK), tokenizer, "before_bos").token_at == [0]


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "system", "content": "be kind"}],  # no user
        [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],  # parts in place of text
    ],
)
def test_a_conversation_without_the_text_of_a_user_gets_the_token_in_front(prompt):
    assert encode(prompts(prompt), tiny_tokenizer(chat=True)).token_at == [0]


def test_a_tokenizer_that_merges_across_the_border_gets_the_token_in_front():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}t{{ m['content'] }}{% endfor %}"  # "t" + "he cat": "the" is one piece
    )
    encoded = encode(prompts([{"role": "user", "content": "he cat"}]), tokenizer)
    assert encoded.ids == [tokenizer("the cat")["input_ids"]]
    assert encoded.token_at == [0]


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(ModelError, match="the tokenizer has no chat template") as caught:
        encode(prompts(USER), tiny_tokenizer())
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_the_room_is_named():
    tokenizer = tiny_tokenizer()
    encode(prompts("rain", "xyz xyz"), tokenizer, max_length=7)
    with pytest.raises(DataError, match=r"Prompt 1 has 7 tokens, but only 6 fit beside the reward token") as caught:
        encode(prompts("rain", "xyz xyz"), tokenizer, max_length=6)
    assert "\n" not in str(caught.value)


def test_a_context_without_room_for_a_prompt_is_told_by_how_much():
    with pytest.raises(
        ConfigError, match=r"are 390 tokens too many for the model's context.*Lower max_completion_length"
    ):
        encode(prompts("rain"), tiny_tokenizer(), max_length=-389)


def test_a_prompt_that_is_neither_text_nor_messages_is_refused():
    with pytest.raises(DataError, match=r"A prompt is of type int. Give text, or a list of messages"):
        encode(prompts(1, 2), tiny_tokenizer())


def test_a_prompt_without_a_token_is_refused():
    class Mute(type(tiny_tokenizer())):
        def __call__(self, text, **kwargs):
            return {"input_ids": []}

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Mute
    with pytest.raises(ModelError, match="Prompt 0 has no tokens"):
        encode(prompts("a"), tokenizer)


def test_selecting_keeps_all_that_belongs_to_a_prompt_together():
    encoded = encode(prompts(*TEXTS, topic=["a", "b", "c"]), tiny_tokenizer())
    chosen = encoded.select([2, 0, 2])
    assert isinstance(chosen, EncodedPrompts)
    assert len(chosen) == 3
    assert chosen.prompts == [TEXTS[2], TEXTS[0], TEXTS[2]]
    assert chosen.ids == [encoded.ids[i] for i in (2, 0, 2)]
    assert chosen.columns == {"topic": ["c", "a", "c"]}


# -- the held-out rule


def test_the_rule_looks_at_the_prompt_alone():
    many = [f"prompt number {n}" for n in range(2000)]
    held = {prompt for prompt in many if is_held_out(prompt, 0.2)}
    assert 0.17 < len(held) / len(many) < 0.23
    train, test = split_held_out(prompts(*reversed(many)), 0.2)
    assert set(test["prompt"]) == held
    assert set(train["prompt"]) == set(many) - held
    assert not any(is_held_out(prompt, 0.0) for prompt in many)
    assert held < {prompt for prompt in many if is_held_out(prompt, 0.4)}  # a larger share holds out more, not others


def test_what_is_held_out_for_one_purpose_says_nothing_about_another():
    many = [f"prompt number {n}" for n in range(4000)]
    left = [prompt for prompt in many if not is_held_out(prompt, 0.2)]
    share = sum(is_held_out(prompt, 0.1, "pool") for prompt in left) / len(left)
    assert 0.08 < share < 0.12


def test_a_worked_example_of_the_rule_stays():
    """A changed rule would train on what earlier runs held out."""
    assert [n for n in range(40) if is_held_out(f"prompt number {n}", 0.2)] == [1, 14, 15, 23, 33, 35]


@pytest.mark.parametrize("others", [{}, {"challenging": [True, False]}])
def test_records_after_an_empty_one_are_flattened_too(others):
    with pytest.warns(UserWarning, match="left out 1 empty"):
        data = checked(Dataset.from_dict({"prompt": [None, {"text": "rain"}], **others}))
    assert data["prompt"][:] == ["rain"]


@pytest.mark.parametrize("others", [{}, {"challenging": [True, False]}])
def test_records_with_a_text_are_flattened_with_and_without_other_columns(others):
    records = [{"text": "the cat", "toxicity": 0.1}, {"text": "rain", "toxicity": 0.9}]
    data = checked(Dataset.from_dict({"prompt": records, **others}))
    assert data["prompt"][:] == ["the cat", "rain"]
    assert set(data.column_names) == {"prompt", *others}
