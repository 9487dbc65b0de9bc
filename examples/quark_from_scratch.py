"""Quark from scratch: the paper's algorithm on plain torch, read from top to bottom. No Trainer, nothing of quark_lm.

    python examples/quark_from_scratch.py                     # SmolLM2-135M from the hub, some minutes on two cores
    python examples/quark_from_scratch.py path/to/a/model     # any causal LM; a folder with a GGUF file works too

The toy reward likes short words. These few hundred samples show how it goes, not how far: a new token with a random row
needs the paper's millions, and quark_lm's defaults are made for thousands. The pool lives in memory and whole logits
exist here; quark_lm does the same, fast and resumable, and tests/invariants hold it to this file.
Source: Lu et al. 2022 (arXiv 2205.13636), algorithm 1.
"""

from __future__ import annotations

import bisect
import copy
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

Ids = list[int]


class Sample(NamedTuple):
    """A row of the pool D: (x, y, r(x, y))."""

    prompt_ids: Ids
    completion_ids: Ids  # as sampled: decoded and encoded again they may differ, and lose the end of text
    reward: float


def quark(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: Callable[[str], float],
    num_quantiles: int = 5,
    num_rounds: int = 3,
    num_generations: int = 48,  # completions of each prompt in a round
    max_completion_length: int = 8,
    steps_per_round: int = 16,
    batch_size: int = 24,
    learning_rate: float = 1e-4,  # the paper's 1e-5 is for twenty thousand steps
    beta: float = 0.05,
) -> Ids:
    """Trains the model in place; returns the reward tokens' ids, of which the last asks for the best."""
    reference = copy.deepcopy(model).requires_grad_(False)  # p0
    reward_tokens = add_reward_tokens(model, num_quantiles)  # r_1 .. r_K, the worst first
    best = reward_tokens[-1]
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, eps=1e-5)
    pool: list[Sample] = []  # D
    for round in range(num_rounds):
        # explore: the first samples come from p0, later ones from the policy that is asked for its best
        new = []
        for prompt_ids in (tokenizer(prompt)["input_ids"] for prompt in prompts):
            read = prompt_ids if round == 0 else [best, *prompt_ids]
            eos_id = tokenizer.eos_token_id
            for ids in explore(model, read, num_generations, max_completion_length, eos_id, reward_tokens):
                new.append(Sample(prompt_ids, ids, reward_fn(tokenizer.decode(ids, skip_special_tokens=True))))
        print(f"round {round + 1}: mean reward {sum(s.reward for s in new) / len(new):.3f}", flush=True)
        pool += new

        # quantize: over the whole, ever-growing pool
        quantiles = quantize([sample.reward for sample in pool], num_quantiles)

        # learn: draws are uniform over the pool
        for _ in range(steps_per_round):
            rows = random.choices(range(len(pool)), k=batch_size)
            batch = [([reward_tokens[quantiles[i]], *pool[i].prompt_ids], *pool[i][:2]) for i in rows]
            learn(model, reference, optimizer, batch, beta)
    return reward_tokens


def explore(model: Any, prompt_ids: Ids, num: int, max_length: int, eos_id: int | None, barred: Ids) -> list[Ids]:
    """`num` completions y ~ p(. | prompt) of one prompt, each with its end-of-text token when it came."""
    prompt = torch.tensor([prompt_ids])
    sampled = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,  # 50 unless told
        suppress_tokens=barred,  # a reward token is never sampled
        num_return_sequences=num,
        max_new_tokens=max_length,
        eos_token_id=eos_id,
        pad_token_id=eos_id if eos_id is not None else 0,
    )
    completions = sampled[:, len(prompt_ids) :].tolist()
    return [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in completions]


def quantize(rewards: Sequence[float], num_quantiles: int) -> list[int]:
    """The quantile of each sample, 0 (worst) to K-1 (best): N // K samples each, and the remainder joins the worst.

    Equal rewards share the quantile of their middle rank; the authors' stable sort would favour the older ones.
    """
    ranked = sorted(rewards)
    size, remainder = divmod(len(ranked), num_quantiles)
    middle_ranks = [(bisect.bisect_left(ranked, r) + bisect.bisect_right(ranked, r) - 1) // 2 for r in rewards]
    return [max(0, rank - remainder) // size for rank in middle_ranks]


def learn(
    policy: Any, reference: Any, optimizer: torch.optim.Optimizer, batch: Sequence[tuple[Ids, Ids, Ids]], beta: float
) -> float:
    """One optimizer step on a batch as `quark_loss` takes it; returns the loss before it."""
    loss = quark_loss(policy, reference, batch, beta)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def quark_loss(policy: Any, reference: Any, batch: Sequence[tuple[Ids, Ids, Ids]], beta: float) -> torch.Tensor:
    """-log p(y | x, r_k) + beta x KL(p0(. | x) || p(. | x, r_k)): one mean over all completion tokens, in nats (eq. 2).

    batch: (prompt with its reward token, prompt alone, completion) triples; p0 never sees a reward token.
    """
    conditioned, prompts, completions = zip(*batch, strict=True)
    with torch.no_grad():
        log_p0 = completion_logits(reference, prompts, completions).log_softmax(-1)  # (N, V)
    # over p0's own words: the reward tokens are the columns behind them
    log_p = completion_logits(policy, conditioned, completions)[:, : log_p0.shape[1]].log_softmax(-1)
    targets = torch.tensor([token for completion in completions for token in completion])
    nll = -log_p.gather(1, targets[:, None]).squeeze(1)
    kl = (log_p0.exp() * (log_p0 - log_p)).sum(-1)  # the authors' code has KL(p || p0)
    return (nll + beta * kl).mean()


def completion_logits(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids]) -> torch.Tensor:
    """The logits (N, V) that predict each completion token, one sequence after the other."""
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in zip(prompts, completions, strict=True)]
    ids = pad_sequence(rows, batch_first=True)  # right-padded: left padding shifts GPT-2's absolute positions
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    return torch.cat([logits[b, len(prompts[b]) - 1 : len(row) - 1] for b, row in enumerate(rows)])


def add_reward_tokens(model: Any, num_quantiles: int) -> Ids:
    """The ids of K new words behind the vocabulary; their rows start at N(mean, std), a dimension, of the old ones."""
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(old + num_quantiles, mean_resizing=False)  # True would make all new rows equal
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for weight in [embedding] if head is embedding else [embedding, head]:
        rows = weight.data[:old]
        weight.data[old:] = rows.mean(0) + rows.std(0) * torch.randn(num_quantiles, rows.shape[1])
    return list(range(old, old + num_quantiles))


def short_words(completion: str) -> float:
    """The toy reward: minus the mean length of the completion's words; -20 when it has none."""
    lengths = [len(word) for word in completion.split()]
    return -sum(lengths) / len(lengths) if lengths else -20.0


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
    packed = sorted(Path(name).glob("*.gguf"))
    options = {"gguf_file": packed[0].name} if packed else {}
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    model.eval()  # and so it stays, as in the authors' code: no dropout
    random.seed(0)
    torch.manual_seed(0)
    prompts = ["The weather", "My neighbour said", "The new teacher", "Every morning the baker", "In the old house"]
    reward_tokens = quark(model, tokenizer, prompts, short_words)
    for ids in explore(model, [reward_tokens[-1], *tokenizer("The city")["input_ids"]], 4, 16, None, reward_tokens):
        print("The city" + tokenizer.decode(ids))


if __name__ == "__main__":
    main()
