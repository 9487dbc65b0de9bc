"""HFCompleter against transformers' own generate, and the properties that resume and ranks rely on."""

import pytest
import torch
from test_policy import OTHERS, other

from quark_lm.errors import ConfigError, ModelError
from quark_lm.generation import DRAWS, GenerationSettings, complete_all, sample_seeds
from quark_lm.generation.hf import HFCompleter, draw_tokens
from quark_lm.steering import dial

PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11, 12, 13], [14]]


def complete(model, prompts=PROMPTS, rows=None, seeds=None, eos=(0,), **kwargs):
    settings = GenerationSettings(**{"max_completion_length": 8, **kwargs.pop("settings", {})})
    seeds = sample_seeds(1, num=len(prompts)) if seeds is None else seeds
    completer = HFCompleter(model, eos, rows)
    return complete_all(completer.complete(prompts, seeds, settings, **kwargs), len(prompts))


@pytest.mark.parametrize("name", OTHERS)
def test_greedy_completions_of_other_models_equal_those_of_generate(name):
    test_greedy_completions_equal_those_of_generate(other(name))


def test_greedy_completions_equal_those_of_generate(tiny_model):
    ours = complete(tiny_model, settings={"temperature": 0.0, "max_completion_length": 12}, eos=(0, 20, 33))
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = tiny_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=[0, 20, 33],
            pad_token_id=1,
        )
        assert completion == theirs[0, len(prompt) :].tolist()


def test_a_samples_tokens_depend_neither_on_its_batch_nor_on_the_order(tiny_model):
    seeds = sample_seeds(3, num=len(PROMPTS))
    whole = complete(tiny_model, seeds=seeds)
    assert complete(tiny_model, rows=1, seeds=seeds) == whole
    assert complete(tiny_model, rows=2, seeds=seeds) == whole
    assert complete(tiny_model, PROMPTS[::-1], seeds=seeds[::-1]) == whole[::-1]


def test_equal_prompts_with_other_seeds_give_other_completions(tiny_model):
    whole = complete(tiny_model, [[5, 6, 7]] * 6)
    assert len({tuple(c) for c in whole}) > 1


@pytest.mark.parametrize("dialled", [False, True])
def test_finished_rows_leave_and_the_others_go_on_unchanged(tiny_model, dialled):
    seeds = sample_seeds(4, num=40)
    prompts = [[5 + i % 7, 6, 7] for i in range(40)]
    eos = tuple(range(0, 60, 3))
    settings = {"max_completion_length": 16}
    dials = [([[20 + i % 5, *prompt] for i, prompt in enumerate(prompts)], 2.0)] if dialled else []
    free = complete(tiny_model, prompts, seeds=seeds, eos=(), settings=settings, dials=dials)
    ended = complete(tiny_model, prompts, seeds=seeds, eos=eos, settings=settings, dials=dials)
    assert len({len(c) for c in ended}) > 3
    for whole, part in zip(free, ended, strict=True):
        assert part == whole[: len(part)]
        assert len(part) == 16 or part[-1] in eos
        assert not set(part[:-1]) & set(eos)


def test_barred_tokens_and_early_ends_are_never_drawn(tiny_model):
    settings = {"barred": tuple(range(40, 119)), "min_completion_length": 3}
    for completion in complete(tiny_model, PROMPTS * 8, eos=(0, 2, 3, 4), settings=settings):
        assert max(completion) < 40
        assert not {0, 2, 3, 4} & set(completion[:3])


def test_strength_one_is_plain_sampling_and_zero_is_the_contrast(tiny_model):
    worst = [[20, *p] for p in PROMPTS]
    plain = complete(tiny_model)
    assert complete(tiny_model, dials=[(worst, 1.0)]) == plain
    assert complete(tiny_model, dials=[(worst, 0.0)]) == complete(tiny_model, worst)
    mixed = complete(tiny_model, dials=[(worst, [1.0, 0.0, 3.0, 1.0, 0.0])])
    assert [mixed[0], mixed[3]] == [plain[0], plain[3]]
    assert mixed[1] == complete(tiny_model, worst)[1]


def test_the_dial_mixes_the_logits_of_its_two_branches(tiny_model):
    prompt, worst = [5, 6, 7], [20, 5, 6, 7]
    with torch.no_grad():
        best_logits, worst_logits = (tiny_model(torch.tensor([p])).logits[0, -1] for p in (prompt, worst))
    wanted = int((worst_logits + 2.5 * (best_logits - worst_logits)).argmax())
    settings = {"temperature": 0.0, "max_completion_length": 1}
    assert complete(tiny_model, [prompt], dials=[([worst], 2.5)], settings=settings) == [[wanted]]


def test_the_dial_is_bit_for_bit_the_best_branch_at_one():
    best, worst = torch.randn(3, 50), torch.randn(3, 50)
    assert torch.equal(dial(best, [worst], [torch.ones(3, 1)]), best)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(tiny_model, strength):
    with pytest.raises(ConfigError, match="not a finite number"):
        complete(tiny_model, dials=[(PROMPTS, strength)])


def frequencies(logits, settings, num=20_000):
    draws = torch.rand(num, DRAWS, generator=torch.Generator().manual_seed(0))
    draws[:, 0] = (torch.arange(num) + 0.5) / num  # evenly spread: without a second draw the shares are exact
    return torch.bincount(draw_tokens(logits.expand(num, -1).clone(), draws, settings), minlength=logits.shape[1]) / num


def test_draws_follow_the_softmax():
    logits = torch.randn(1, 30) * 2
    for temperature in (1.0, 0.5):
        shares = frequencies(logits, GenerationSettings(temperature=temperature))
        torch.testing.assert_close(shares, (logits / temperature).softmax(1)[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 4), (0.6, 5)])
def test_filtered_draws_follow_what_transformers_filters(top_p, top_k):
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 3000) * 3
    warpers = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits.clone()).softmax(1)[0]
    shares = frequencies(logits, GenerationSettings(top_p=top_p, top_k=top_k))
    assert not shares[expected == 0].any()
    # five standard errors of a share, where top-p draws again; exact where it never does
    tolerance = 5 * (expected * (1 - expected) / 20_000).sqrt() + 2e-4 if top_p < 1 and not top_k else 2e-4
    assert ((shares - expected).abs() <= tolerance).all()


def test_a_flat_distribution_needs_more_than_the_first_guess_of_top_p():
    logits = torch.randn(1, 20_000) * 0.1
    shares = frequencies(logits, GenerationSettings(top_p=0.9), num=2_000)
    kept = logits.softmax(1).sort(descending=True).values.cumsum(1).lt(0.9).sum() + 1
    assert logits[0][shares > 0].min() >= logits.sort(descending=True).values[0, kept - 1]


def test_a_word_without_probability_is_never_drawn_not_even_at_the_ends():
    logits = torch.full((3, 6), -torch.inf)
    logits[:, 2:4] = 0.0
    draws = torch.tensor([0.0, 0.5, 1.0 - 1e-8])[:, None].expand(3, DRAWS)
    assert set(draw_tokens(logits, draws, GenerationSettings()).tolist()) <= {2, 3}
    assert set(draw_tokens(logits, draws, GenerationSettings(top_p=0.9)).tolist()) <= {2, 3}


def test_top_p_falls_back_on_sorting_where_every_draw_fell_outside():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(2, 4)
    draws = torch.tensor([[0.05, 0.05, 0.05, 0.9], [0.05, 0.95, 0.1, 0.1]])  # .05 is token 0, which top_p leaves out
    # of the set {3, 2} in this order, .9 is token 2; the second row draws 0, then 3
    assert draw_tokens(logits, draws, GenerationSettings(top_p=0.6)).tolist() == [2, 3]


def test_what_was_done_is_left_out_and_the_rest_comes_in_the_same_batches(tiny_model):
    seeds = sample_seeds(1, num=len(PROMPTS))
    completer = HFCompleter(tiny_model, (0,), 2)
    settings = GenerationSettings(max_completion_length=8)
    whole = list(completer.complete(PROMPTS, seeds, settings))
    done = {i for indices, _ in whole[:2] for i in indices}
    assert list(completer.complete(PROMPTS, seeds, settings, skip=done)) == whole[2:]


def test_out_of_memory_halves_the_batch_and_says_so(tiny_model, monkeypatch):
    whole = complete(tiny_model, PROMPTS * 4)
    original = HFCompleter._complete_batch

    def fails_above_five(self, batch, *args):
        if len(batch) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, batch, *args)

    monkeypatch.setattr(HFCompleter, "_complete_batch", fails_above_five)
    with pytest.warns(UserWarning, match="completions a batch: going on with"):
        assert complete(tiny_model, PROMPTS * 4) == whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token(temperature, wrong):
    logits = torch.zeros(2, 6)
    logits[1, 3] = wrong
    with pytest.raises(ModelError, match="not finite"):
        draw_tokens(logits, torch.full((2, 4), 0.5), GenerationSettings(temperature=temperature))


@pytest.mark.parametrize("words", [1, 5, 255, 256, 257, 700])
def test_a_draw_is_the_inverse_of_the_running_sum_whatever_the_number_of_words(words):
    generator = torch.Generator().manual_seed(words)
    logits = 3 * torch.randn(400, words, generator=generator)
    never = torch.rand(400, words, generator=generator) < 0.5
    never[:, words // 2] = False
    logits[never] = -torch.inf
    draws = torch.rand(400, 4, generator=generator)
    draws[:4, 0] = torch.tensor([0.0, 1.0 - 2**-24, 0.5, 2**-20])
    drawn = draw_tokens(logits.clone(), draws, GenerationSettings())
    assert not never.gather(1, drawn[:, None]).any()
    cdf = logits.double().softmax(1).cumsum(1)
    above = cdf.gather(1, drawn[:, None]).squeeze(1)
    below = torch.where(drawn > 0, cdf.gather(1, (drawn - 1).clamp_min(0)[:, None]).squeeze(1), 0.0)
    assert (below <= draws[:, 0] + 1e-6).all()
    assert (above >= draws[:, 0] - 1e-6).all()
