"""The chunked loss against a naive one on full logits, on four tiny models; the terms against five-line versions."""

import pytest
import torch

from quark_lm.collator import Collator, Draw
from quark_lm.loss import LossSettings, forward_kl, quark_loss, reverse_kl, token_log_probs, token_terms
from quark_lm.policy import Policy, completion_states
from quark_lm.reward_tokens import RewardTokens

TOKENS = RewardTokens("embedding", "first", ("a", "b"), ((30,), (31,)), (30, 31))


def batch():
    draws = [
        Draw(prompt_ids=[5, 6, 7], completion_ids=[8, 9], token_at=0, quantile=1),
        Draw(prompt_ids=[10, 11], completion_ids=[12, 13, 14, 0], token_at=0, quantile=0),
        Draw(prompt_ids=[15], completion_ids=[16], token_at=1, quantile=None),
    ]
    return Collator(TOKENS, 1)(draws)


def naive(model, reference, batch, settings):
    """Full logits over every position, left to autograd."""
    logits = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
    ).logits.flatten(0, 1)[batch["rows"]]
    with torch.no_grad():
        other = reference(
            batch["reference_input_ids"],
            attention_mask=batch["reference_attention_mask"],
            position_ids=batch["reference_position_ids"],
        ).logits.flatten(0, 1)[batch["reference_rows"]]
    logits, other = logits / settings.temperature, other / settings.temperature
    keep = [i for i in range(logits.shape[1]) if i not in settings.barred]
    logp, logq = logits[:, keep].log_softmax(1), other[:, keep].log_softmax(1)
    whole = logits.clone()
    if settings.mask_reward_tokens:
        whole[:, list(settings.barred)] = -torch.inf
    logw = whole.log_softmax(1)
    nll = -logw[range(len(logw)), batch["targets"]]
    kl = (
        (logq.exp() * (logq - logp)).sum(1)
        if settings.kl_direction == "forward"
        else (logp.exp() * (logp - logq)).sum(1)
    )
    entropy = -(logw.exp() * logw.clamp_min(-1e30)).sum(1)
    return (nll + settings.beta * kl - settings.entropy_coef * entropy).mean()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("chunk_rows", "temperature"), [(1, 1.0), (3, 0.4), (1000, 1.0)])
def test_the_chunked_loss_and_its_gradients_equal_the_naive_ones(
    tiny_model, direction, masked, chunk_rows, temperature
):
    policy = Policy(tiny_model)
    with policy.reference() as (reference, reference_head):
        for parameter in tiny_model.parameters():  # move away from the reference, so that the KL is not 0
            parameter.data += 0.05 * torch.randn_like(parameter)
        settings = LossSettings(
            beta=0.3,
            kl_direction=direction,
            entropy_coef=0.1,
            mask_reward_tokens=masked,
            barred=TOKENS.barred,
            chunk_elements=chunk_rows * tiny_model.config.vocab_size,
            temperature=temperature,
        )
        inputs = batch()
        with torch.enable_grad():
            expected = naive(tiny_model, reference, inputs, settings)
            expected.backward()
        gradients = {n: p.grad.clone() for n, p in tiny_model.named_parameters() if p.grad is not None}
        tiny_model.zero_grad()
        reference_states = completion_states(reference, inputs, "reference_")
    states = completion_states(tiny_model, inputs)
    result = quark_loss(
        states, reference_states, inputs["targets"], policy.head, reference_head, policy.head.parameters(), settings, 7
    )
    assert len(inputs["targets"]) == 7
    torch.testing.assert_close(result.loss, expected)
    result.loss.backward()
    for name, parameter in tiny_model.named_parameters():
        if parameter.grad is not None or name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_reward_tokens_get_no_probability_and_no_nan():
    policy, reference = torch.randn(4, 10), torch.randn(4, 10)
    settings = LossSettings(barred=(8, 9), beta=1.0, entropy_coef=1.0)
    targets = torch.tensor([0, 1, 2, 3])
    terms = token_terms(policy, reference, targets, settings)
    moved = policy.clone()
    moved[:, 8:] += 100.0
    for term, after in zip(terms, token_terms(moved, reference, targets, settings), strict=True):
        assert torch.isfinite(term).all()
        torch.testing.assert_close(term, after)


@pytest.mark.parametrize("kl", [forward_kl, reverse_kl])
def test_kl_is_zero_for_equal_and_positive_for_different_distributions(kl):
    p, q = torch.randn(5, 9).log_softmax(1), torch.randn(5, 9).log_softmax(1)
    torch.testing.assert_close(kl(p, p), torch.zeros(5))
    assert (kl(p, q) > 0).all()


def test_the_two_kl_directions_swap_their_arguments():
    p, q = torch.randn(5, 9).log_softmax(1), torch.randn(5, 9).log_softmax(1)
    torch.testing.assert_close(forward_kl(p, q), reverse_kl(q, p))


def test_token_log_probs_equal_log_softmax_whatever_the_chunk(tiny_model):
    policy = Policy(tiny_model)
    inputs = batch()
    states = completion_states(tiny_model, inputs).detach()
    expected = policy.head(states).log_softmax(1)[range(7), inputs["targets"]].detach()
    for elements in (1, 250, 1 << 20):
        torch.testing.assert_close(token_log_probs(states, inputs["targets"], policy.head, (), elements), expected)


class Counting(torch.nn.Linear):
    """A head that counts the rows that it is asked for."""

    rows = 0

    def forward(self, hidden):
        self.rows += len(hidden)
        return super().forward(hidden)


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_row_of_logits_is_made_only_to_learn_their_width(wrapped):
    head, hidden, targets = Counting(4, 9, bias=False), torch.randn(5, 4), torch.arange(5)

    class Wrapper:
        module = head

        def __call__(self, states):
            return head(states)

    call = Wrapper() if wrapped else head
    expected = torch.log_softmax(hidden @ head.weight.T, 1)[range(5), targets]
    assert torch.allclose(token_log_probs(hidden, targets, call, (), 2 * 9), expected)
    assert head.rows == 5
    settings = LossSettings(chunk_elements=2 * 9)
    made = quark_loss(hidden, None, targets, call, call, [head.weight], settings, 5.0)
    assert head.rows == 10
    assert torch.allclose(made.loss, -expected.mean())
    bare = quark_loss(hidden, None, targets, lambda states: head(states), call, [head.weight], settings, 5.0)
    assert torch.equal(bare.loss, made.loss)


def test_half_precision_keeps_the_gradient_of_unlikely_words():
    """Under fp16 autocast p / denominator is below what fp16 can hold: each word's pull away would round to 0."""
    words, tokens = 20_000, 400
    head = torch.nn.Linear(32, words, bias=False)
    torch.nn.init.normal_(head.weight, std=0.05)
    hidden, reference = torch.randn(tokens, 32), torch.randn(tokens, 32)
    targets = torch.randint(0, words, (tokens,))

    def gradients(autocast):
        states = hidden.clone().requires_grad_()
        head.weight.grad = None
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            # 2**14 stands for the tokens of a large step
            made = quark_loss(states, reference, targets, head, head, [head.weight], LossSettings(), float(2**14))
        (made.loss * 2**16).backward()  # as a GradScaler does
        return states.grad, head.weight.grad

    for half, whole in zip(gradients(True), gradients(False), strict=True):
        assert (half - whole).norm() < 2e-3 * whole.norm()


def test_log_probs_at_a_temperature_are_those_that_samples_are_drawn_with():
    states, head = torch.randn(6, 4), torch.nn.Linear(4, 9, bias=False)
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    found = token_log_probs(states, targets, head, barred=(8,), chunk_elements=2 * 9, temperature=0.5)
    expected = (head(states)[:, :8] / 0.5).log_softmax(1)[range(6), targets]
    torch.testing.assert_close(found, expected.detach())


def test_samples_of_a_temperature_teach_the_distribution_that_drew_them():
    """With a free row of logits, learning from samples of temperature .4 gives back what drew them, no sharper."""
    torch.manual_seed(0)
    drawn_from = torch.randn(1, 6)
    targets = torch.multinomial((drawn_from / 0.4).softmax(1), 4000, replacement=True)[0]
    shares = torch.bincount(targets, minlength=6) / len(targets)
    for temperature in (0.4, 1.0):
        logits = torch.zeros(1, 6, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=100)
        settings = LossSettings(beta=0.0, temperature=temperature)

        def closure(logits=logits, optimizer=optimizer, settings=settings):
            optimizer.zero_grad()
            loss = token_terms(logits.expand(len(targets), -1), None, targets, settings)[0].mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        again = (logits.detach() / 0.4).softmax(1)[0]  # what the next round would sample
        assert ((again - shares).abs().max() < 0.01) == (temperature == 0.4)
