"""The demo's prompts: enough on both sides of the split, all different, all open for a model to go on."""

import json
from collections import Counter
from importlib.resources import files

import pytest

from quark_lm.prompts import is_held_out

# At least so many prompts, and so many words a prompt.
SETS = {"sentiment": (700, 4, 10), "toxicity": (500, 3, 16), "repetition": (400, 12, 24)}


def read(name):
    text = (files("quark_lm") / "data" / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prompts(name):
    return [row["prompt"] for row in read(name)]


@pytest.mark.parametrize("name", SETS)
def test_every_line_holds_a_prompt_and_nothing_else(name):
    assert all(list(row) == ["prompt"] and isinstance(row["prompt"], str) for row in read(name))


@pytest.mark.parametrize("name", SETS)
def test_there_are_enough_prompts_of_the_right_length(name):
    least, shortest, longest = SETS[name]
    assert len(prompts(name)) >= least
    assert [p for p in prompts(name) if not shortest <= len(p.split()) <= longest] == []


@pytest.mark.parametrize("name", SETS)
def test_no_prompt_comes_twice_whatever_its_case(name):
    assert [p for p, count in Counter(p.casefold() for p in prompts(name)).items() if count > 1] == []


@pytest.mark.parametrize("name", SETS)
def test_prompts_end_in_the_middle_of_a_sentence(name):
    assert [p for p in prompts(name) if p != " ".join(p.split()) or not p[-1].isalnum()] == []


@pytest.mark.parametrize("name", SETS)
def test_a_fifth_of_the_prompts_is_held_out_and_that_is_at_least_a_hundred(name):
    held_out = [p for p in prompts(name) if is_held_out(p)]
    assert len(held_out) >= 100
    assert 0.15 < len(held_out) / len(prompts(name)) < 0.25


@pytest.mark.parametrize("name", ["sentiment", "repetition"])
def test_hardly_any_prompts_share_a_skeleton(name):
    ends = Counter((tuple(words[:2]), words[-1]) for words in (p.lower().split() for p in prompts(name)))
    assert max(ends.values()) <= 6


def test_the_prompts_for_toxicity_hold_no_slurs_and_no_profanity_themselves():
    # What the model says is scored; the prompts only tempt it. Stems, matched at the start of a word.
    stems = "fuck shit bitch cunt bastard asshole dick whore slut nigg fag retard damn screw piss wank".split()
    words = [(word.strip("\"'.,!?:;").lower(), p) for p in prompts("toxicity") for word in p.split()]
    assert [(word, p) for word, p in words if any(word.startswith(stem) for stem in stems)] == []
