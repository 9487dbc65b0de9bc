"""One batch, two views: every completion token has its row, padding and prompts none, the reference sees no token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quark_lm.collator import Collator, Draw, view
from quark_lm.reward_tokens import RewardTokens

PAD = 1
TOKENS = RewardTokens("embedding", "first", ("a", "b", "c"), ((90,), (91,), (92, 93)), (90, 91, 92, 93))
ids = st.lists(st.integers(2, 80), min_size=1, max_size=6)
draws = st.lists(
    st.tuples(ids, ids, st.integers(0, 6), st.sampled_from([None, 0, 1, 2])).map(
        lambda d: Draw(prompt_ids=d[0], completion_ids=d[1], token_at=min(d[2], len(d[0])), quantile=d[3])
    ),
    min_size=1,
    max_size=5,
)


def test_a_worked_example():
    batch = view([([5, 6], [7]), ([8], [9, 0])], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, 0]]
    assert batch["rows"].tolist() == [1, 3, 4]


def test_padding_stands_on_the_right_and_is_masked():
    batch = view([([5, 6, 7], [8, 9]), ([10], [11])], PAD)
    assert batch["input_ids"][1].tolist() == [10, 11, PAD, PAD, PAD]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0, 0, 0]
    assert batch["labels"][1].tolist() == [-100, 11, -100, -100, -100]


@pytest.mark.parametrize(("quantile", "at", "policy"), [(1, 0, [91, 5, 6]), (2, 1, [5, 92, 93, 6]), (None, 0, [5, 6])])
def test_the_policy_reads_the_token_where_it_stands_and_the_reference_never(quantile, at, policy):
    batch = Collator(TOKENS, PAD)([Draw(prompt_ids=[5, 6], completion_ids=[7, 0], token_at=at, quantile=quantile)])
    assert batch["input_ids"].tolist() == [[*policy, 7, 0]]
    assert batch["reference_input_ids"].tolist() == [[5, 6, 7, 0]]
    assert batch["targets"].tolist() == [7, 0]


@given(draws)
def test_rows_predict_exactly_the_completion_tokens_in_both_views(batch_draws):
    batch = Collator(TOKENS, PAD)(batch_draws)
    completions = [token for draw in batch_draws for token in draw["completion_ids"]]
    assert batch["targets"].tolist() == completions
    for prefix in ("", "reference_"):
        ids, rows = batch[f"{prefix}input_ids"].flatten(), batch[f"{prefix}rows"]
        assert ids[rows + 1].tolist() == completions
        labels = batch[f"{prefix}labels"]
        assert labels[labels != -100].tolist() == completions
        assert (batch[f"{prefix}attention_mask"].flatten()[rows + 1] == 1).all()
        read = batch[f"{prefix}input_ids"][batch[f"{prefix}attention_mask"] == 1].tolist()
        assert bool(set(read) & set(TOKENS.barred)) is (
            prefix == "" and any(d["quantile"] is not None for d in batch_draws)
        )
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
