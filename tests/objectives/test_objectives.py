"""The losses against brute force in float64, closed forms and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, batch, shared_model

from trl_robust.objectives import AWAY_THRESHOLD, LabelLogits, away, kl_divergence, label_logits, toward
from trl_robust.threat import ranks


def logits_of(seed, count=50, vocabulary=7, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocabulary, (count,), generator=generator)


def away_by_brute_force(logits, targets):
    """`-log(1 - p)` as a sum over the other tokens, in Python's floats; 0 below the threshold."""
    values = []
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        top = max(row)
        weights = [math.exp(score - top) for score in row]
        # A score 80 above the rest leaves about 1e-35, which a float64 holds; 1 - p would be exactly 0.
        others = sum(weight for number, weight in enumerate(weights) if number != target)
        log_prob = math.log(weights[target] / sum(weights)) if weights[target] > 0 else -math.inf
        values.append(-math.log(others / sum(weights)) if log_prob >= AWAY_THRESHOLD else 0.0)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_lat_9_7_the_away_loss_is_that_of_brute_force_in_float64(dtype, scale):
    logits, targets = logits_of(0, count=400, scale=scale, dtype=dtype)
    expected = away_by_brute_force(logits, targets)
    # Logits go to 60, where float32 has steps of 4e-6.
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-5, 1e-5)
    torch.testing.assert_close(away(logits, targets).double(), expected, rtol=rtol, atol=atol)
    if scale > 1:
        assert (expected == 0).any() and (expected > 3).any()


def test_lat_9_7_the_away_loss_is_finite_as_the_probability_goes_to_one():
    logits = torch.tensor([[80.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0], [30.0, 0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.zeros(3, dtype=torch.long)
    loss = away(logits, targets)
    # log(1 - p) is log 3 - logit, up to what exp(-logit) is worth.
    torch.testing.assert_close(loss, logits.detach()[:, 0] - math.log(3))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]).expand(3, -1))


def test_lat_9_7_a_token_below_the_threshold_contributes_nothing_and_has_no_gradient():
    score = math.log(math.exp(AWAY_THRESHOLD) / (1 - math.exp(AWAY_THRESHOLD)))  # log p is the threshold exactly
    logits = torch.tensor([[score + 0.01, 0.0], [score - 0.01, 0.0], [-50.0, 0.0]], requires_grad=True)
    loss = away(logits, torch.zeros(3, dtype=torch.long))
    loss.sum().backward()
    assert loss[0] > 0.006 and (loss[1:] == 0).all()
    assert logits.grad[0].abs().min() > 0 and (logits.grad[1:] == 0).all()


def test_the_gradient_of_the_away_loss_is_the_closed_form():
    logits, targets = logits_of(1)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(away(leaf, targets).sum(), leaf)
    probabilities = logits.softmax(-1)
    said = probabilities.gather(1, targets[:, None])
    expected = (-said * probabilities / (1 - said)).scatter(1, targets[:, None], said)
    expected = expected * (said.log() >= AWAY_THRESHOLD)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient.gather(1, targets[:, None]).abs().max() <= 1


@pytest.mark.parametrize("loss", [toward, away])
def test_the_gradients_are_those_of_finite_differences(loss):
    logits, targets = logits_of(2, count=20, scale=1.0)
    assert torch.autograd.gradcheck(lambda values: loss(values, targets), logits.requires_grad_())


def test_the_gradient_of_the_divergence_is_that_of_finite_differences_and_none_reaches_the_reference():
    logits, _ = logits_of(3, count=10, scale=1.0)
    reference, _ = logits_of(4, count=10, scale=1.0)
    assert torch.autograd.gradcheck(lambda values: kl_divergence(values, reference), logits.requires_grad_())
    reference.requires_grad_()
    kl_divergence(logits, reference).sum().backward()
    assert reference.grad is None


def test_toward_is_minus_the_log_probability():
    logits, targets = logits_of(5)
    expected = -logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(toward(logits, targets), expected)


@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_the_divergence_is_that_of_torch_distributions_from_model_to_reference(seed, scale):
    logits, reference = (logits_of(number, count=5, scale=scale)[0] for number in (seed, seed + 1))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=reference)
    )
    torch.testing.assert_close(kl_divergence(logits, reference), expected, rtol=1e-8, atol=1e-12)
    assert (kl_divergence(logits, logits) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, targets = logits_of(6, dtype=dtype)
    reference = logits.flip(0)
    for values, exact in (
        (toward(logits, targets), toward(logits.float(), targets)),
        (away(logits, targets), away(logits.float(), targets)),
        (kl_divergence(logits, reference), kl_divergence(logits.float(), reference.float())),
    ):
        assert values.dtype == torch.float32
        assert torch.equal(values, exact)


def test_lat_9_7_labels_that_are_all_ignored_give_zero_and_no_nan(llama):
    found = batch()
    found["labels"] = torch.full_like(found["labels"], -100)
    for term in (toward, away, lambda logits, targets: kl_divergence(logits, logits.detach())):
        kept = label_logits(llama, found["input_ids"], found["attention_mask"], found["labels"])
        assert kept.logits.shape == (0, llama.config.vocab_size)
        values = term(kept.logits, kept.targets)
        assert values.shape == (0,) and values.sum() == 0
        assert torch.equal(kept.row_means(values), torch.zeros(4))
        (gradient,) = torch.autograd.grad(kept.row_means(values).sum(), llama.model.embed_tokens.weight)
        assert (gradient == 0).all()


def test_row_means_are_means_over_the_labels_of_a_row_and_zero_without_any():
    found = LabelLogits(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 2, 0]), 3)
    means = found.row_means(torch.tensor([1.0, 2.0, 5.0, 6.0]))
    assert torch.equal(means, torch.tensor([3.0, 0.0, 5.0]))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_label_logits_are_the_full_logits_gathered_before_every_label(name, side):
    model, found = shared_model(name), batch(side=side)
    kept = label_logits(model, found["input_ids"], found["attention_mask"], found["labels"])
    positions = ranks(found["attention_mask"])
    full = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"], position_ids=positions).logits
    logits, targets, numbers = [], [], []
    for row in range(4):
        for token in range(1, found["labels"].shape[1]):
            if found["labels"][row, token] != -100:
                logits.append(full[row, token - 1])
                targets.append(found["labels"][row, token])
                numbers.append(row)
    torch.testing.assert_close(kept.logits, torch.stack(logits), rtol=1e-5, atol=1e-5)
    assert torch.equal(kept.targets, torch.stack(targets))
    assert kept.rows.tolist() == numbers and kept.num_rows == 4


def test_a_label_at_the_first_token_is_nobodys_prediction(llama):
    found = batch(1)
    found["labels"] = found["input_ids"].clone()
    kept = label_logits(llama, found["input_ids"], found["attention_mask"], found["labels"])
    assert torch.equal(kept.targets, found["input_ids"][0, 1:])
