"""Value and gradient of every objective against formulae in plain numbers and finite differences, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import HIDDEN, batch, lora, tiny_model

from trl_robust import ThreatModel
from trl_robust.inner import Perturbation
from trl_robust.inner.injection import attack_mode
from trl_robust.inner.search import Search
from trl_robust.inner.terms import attack_terms
from trl_robust.objectives import (
    LabelLogits,
    PreferenceLoss,
    away,
    floored,
    kl_divergence,
    label_logits,
    self_normalised,
    steering_error,
    toward,
)

STEP = 1e-6


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choices(count, among, seed=0):
    return torch.randint(among, (count,), generator=torch.Generator().manual_seed(seed))


def central_differences(function, point, step=STEP):
    """Gradient of a scalar function, coordinate by coordinate."""
    found = torch.zeros_like(point)
    with torch.no_grad():
        for index in range(point.numel()):
            moved = [point.clone() for _ in range(2)]
            for values, sign in zip(moved, (1, -1), strict=True):
                values.view(-1)[index] += sign * step
            found.view(-1)[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return found


def gradient_of(function, point):
    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


def assert_gradient(function, point, rtol=1e-6, atol=1e-8, least=1e-3):
    """The gradient is that of central differences, and not zero."""
    gradient = gradient_of(function, point)
    torch.testing.assert_close(gradient, central_differences(function, point), rtol=rtol, atol=atol)
    assert gradient.abs().max() > least
    return gradient


# The terms of a language model


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_the_gradient_of_toward_is_the_distribution_less_the_target(scale):
    logits, targets = normal(6, 7, scale=scale), choices(6, 7)
    gradient = assert_gradient(lambda z: toward(z, targets).sum(), logits, atol=1e-7, least=1e-2)
    torch.testing.assert_close(gradient, logits.softmax(-1) - F.one_hot(targets, 7), rtol=1e-9, atol=1e-12)


def logits_with(probability, vocabulary=5):
    """One row of logits whose first token has the given log-odds, the others unlike one another."""
    others = torch.linspace(-1, 1, vocabulary - 1, dtype=torch.float64)
    score = math.log(probability / (1 - probability)) + others.logsumexp(-1).item()
    return torch.cat([torch.tensor([score], dtype=torch.float64), others])[None]


def away_by_brute_force(logits):
    """`-log(1 - p)` of the first token, from the sum over the others."""
    top = max(logits)
    weights = [math.exp(score - top) for score in logits]
    return -math.log(sum(weights[1:]) / sum(weights))


FIRST = torch.zeros(1, dtype=torch.long)
THRESHOLD = math.exp(-5)


@pytest.mark.parametrize("probability", [0.02, 0.5, 0.9, 0.999, 1 - 1e-9, THRESHOLD * 1.01])
def test_value_and_gradient_of_away_are_those_of_brute_force_from_the_threshold_to_one(probability):
    logits = logits_with(probability)
    value = away(logits, FIRST)
    assert value.item() == pytest.approx(away_by_brute_force(logits[0].tolist()), rel=1e-9)
    assert value.item() == pytest.approx(-math.log1p(-probability), rel=1e-6)
    gradient = assert_gradient(lambda z: away(z, FIRST).sum(), logits, rtol=1e-5, least=THRESHOLD)
    assert gradient[0, 0].item() == pytest.approx(probability, rel=1e-6)


@pytest.mark.parametrize("gap", [50.0, 700.0, 1e4])
def test_away_grows_with_the_logit_and_its_gradient_stays_one_where_no_float_can_tell_p_from_one(gap):
    logits = torch.tensor([[gap, 0.0, 0.0]], dtype=torch.float64)
    assert 1 - logits.softmax(-1)[0, 0] < 1e-15
    assert away(logits, FIRST).item() == pytest.approx(gap - math.log(2), rel=1e-12)
    gradient = assert_gradient(lambda z: away(z, FIRST).sum(), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -0.5, -0.5]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_away_ends_at_the_threshold_with_its_gradient_and_not_before(dtype):
    above, below = (logits_with(THRESHOLD * factor).to(dtype) for factor in (1 + 1e-4, 1 - 1e-4))
    assert away(above, FIRST).item() == pytest.approx(-math.log1p(-THRESHOLD), rel=1e-3)
    assert gradient_of(lambda z: away(z, FIRST).sum(), above)[0, 0].item() == pytest.approx(THRESHOLD, rel=1e-3)
    assert away(below, FIRST).item() == 0
    assert (gradient_of(lambda z: away(z, FIRST).sum(), below) == 0).all()


def test_a_token_below_the_threshold_still_counts_in_the_mean_of_its_row():
    """lat.md 2.1: the denominator counts all completion tokens."""
    logits = torch.cat([logits_with(0.5), logits_with(THRESHOLD / 2)])
    found = LabelLogits(logits, torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), 1)
    assert found.row_means(away(logits, found.targets)).item() == pytest.approx(math.log(2) / 2)


def gradient_ascent(logits, targets, rows, cutoff):
    """The away loss `gradient_ascent`: minus the mean cross-entropy of every row, floored."""
    found = LabelLogits(logits, targets, rows, int(rows.max()) + 1)
    return floored(-found.row_means(toward(logits, targets)), -cutoff)


def test_gradient_ascent_has_minus_the_gradient_of_toward_and_a_thousandth_of_it_past_the_cutoff():
    rows, targets = torch.tensor([0, 0, 1, 1, 1]), torch.zeros(5, dtype=torch.long)
    # The targets of row 0 are likely, those of row 1 are not: cross-entropies of about 0.7 and 9.
    logits = normal(5, 4)
    logits[:2, 0] += 2.0
    logits[2:, 0] -= 8.0
    plain = gradient_of(lambda z: LabelLogits(z, targets, rows, 2).row_means(toward(z, targets)).sum(), logits)
    means = LabelLogits(logits, targets, rows, 2).row_means(toward(logits, targets))
    assert means[0] < 5 < means[1]
    for cutoff, slopes in ((float("inf"), (1.0, 1.0)), (5.0, (1.0, 1e-3)), (0.1, (1e-3, 1e-3))):
        values = gradient_ascent(logits, targets, rows, cutoff)
        gradient = assert_gradient(
            lambda z, cutoff=cutoff: gradient_ascent(z, targets, rows, cutoff).sum(), logits, least=1e-5
        )
        for row, slope in enumerate(slopes):
            torch.testing.assert_close(gradient[rows == row], -slope * plain[rows == row], rtol=1e-9, atol=1e-12)
            # 2405.15589: -5 - 0.001 CE once the cross-entropy is above 5
            expected = -means[row] if slope == 1.0 else -cutoff - 1e-3 * means[row]
            torch.testing.assert_close(values[row], expected)


def test_the_cutoff_of_the_wanted_completion_leaves_half_a_nat_and_a_thousandth_of_the_slope():
    losses = torch.tensor([0.2, 0.49, 0.51, 3.0], dtype=torch.float64)
    torch.testing.assert_close(floored(losses, 0.5), torch.tensor([0.5002, 0.50049, 0.51, 3.0], dtype=torch.float64))
    gradient = assert_gradient(lambda values: floored(values, 0.5).sum(), losses)
    torch.testing.assert_close(gradient, torch.tensor([1e-3, 1e-3, 1.0, 1.0], dtype=torch.float64))
    assert torch.equal(floored(losses, 0.0), losses)


# The divergence


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_value_and_gradient_of_the_divergence_are_those_of_its_definition(scale):
    logits, reference = normal(4, 6, scale=scale), normal(4, 6, seed=1, scale=scale)
    p, q = logits.softmax(-1), reference.softmax(-1)
    expected = [
        sum(a * math.log(a / b) for a, b in zip(*row, strict=True)) for row in zip(p.tolist(), q.tolist(), strict=True)
    ]
    torch.testing.assert_close(kl_divergence(logits, reference), torch.tensor(expected, dtype=torch.float64))
    assert_gradient(lambda z: kl_divergence(z, reference).sum(), logits, least=1e-2 * scale)


def test_the_pull_of_the_divergence_fades_where_the_models_agree_and_that_of_its_logarithm_grows():
    """Defect D8: the plain form is the default since its pull is in proportion to what is missing."""
    reference, change = normal(4, 6), normal(4, 6, seed=1)

    def pulls(form):
        return [
            gradient_of(lambda z: form(kl_divergence(z, reference).mean()), reference + size * change).norm().item()
            for size in (1e-1, 1e-2, 1e-3)
        ]

    plain, log = pulls(lambda value: value), pulls(lambda value: self_normalised(value, 0))
    for nearer, farther in ((plain[1], plain[0]), (plain[2], plain[1])):
        assert nearer == pytest.approx(farther / 10, rel=0.2)
    for nearer, farther in ((log[1], log[0]), (log[2], log[1])):
        assert nearer == pytest.approx(farther * 10, rel=0.2)


def test_the_self_normalised_divergence_is_one_and_has_the_gradient_of_the_logarithm():
    logits, reference = normal(4, 6), normal(4, 6, seed=1)

    def divergence(values):
        return kl_divergence(values, reference).mean()

    assert self_normalised(divergence(logits), 6).item() == pytest.approx(1.0, abs=1e-6)
    gradient = gradient_of(lambda z: self_normalised(divergence(z), 6), logits)
    by_hand = central_differences(lambda z: divergence(z).log(), logits)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-5, atol=1e-8)
    assert gradient.abs().max() > 1e-2


def test_the_self_normalised_divergence_and_its_gradient_are_zero_where_the_models_are_the_same():
    logits = normal(4, 6)

    def loss(values):
        return self_normalised(kl_divergence(values, logits).mean(), 6)

    assert loss(logits).item() == 0
    assert gradient_of(loss, logits).abs().max() < 1e-6  # rounding, divided by 1e-8 x vocabulary
    # Of the value that is divided by, the reference code adds 1e-8 to a mean over the vocabulary.
    near = torch.tensor(3e-8 * 6, dtype=torch.float64)
    assert self_normalised(near, 6).item() == pytest.approx(0.75)


# Preferences

LENGTHS = (torch.tensor([3, 1, 4]), torch.tensor([2, 5, 4]))


def by_trl(kind, beta, smoothing, chosen, rejected):
    """The per-sequence loss as trl/trainer/dpo_trainer.py (1.16) writes it, for one pair in plain numbers."""
    delta_score = chosen - rejected

    def log_sigmoid(value):
        return -math.log1p(math.exp(-value))

    if kind == "sigmoid":
        return -log_sigmoid(beta * delta_score)
    clean = -(1 - smoothing) * log_sigmoid(beta * delta_score)
    flipped = -smoothing * log_sigmoid(-beta * delta_score)
    return (clean - flipped) / (1 - 2 * smoothing)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.0), ("robust", 0.3)])
def test_value_and_gradient_of_the_preference_losses_are_those_of_trls_formulae(kind, smoothing, beta):
    loss = PreferenceLoss(kind, beta, smoothing)
    chosen, rejected = normal(3, scale=3.0), normal(3, seed=1, scale=3.0)
    values = loss(chosen, rejected, *LENGTHS)
    for number, (one, other) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        if kind == "ipo":
            delta = one / LENGTHS[0][number].item() - other / LENGTHS[1][number].item()
            expected = (delta - 1 / (2 * beta)) ** 2
        else:
            expected = by_trl(kind, beta, smoothing, one, other)
        assert values[number].item() == pytest.approx(expected, rel=1e-9)
    both = torch.stack([chosen, rejected])
    gradient = assert_gradient(lambda pair: loss(pair[0], pair[1], *LENGTHS).sum(), both, least=1e-2 * beta)
    if kind != "ipo":
        torch.testing.assert_close(gradient[0], -gradient[1])
        assert smoothing or (gradient[0] < 0).all()


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.2)])
def test_the_preference_losses_are_those_of_a_batch_of_trls_own_trainer(tmp_path, kind, smoothing):
    from tiny import make_tokenizer, preference_data
    from trl import DPOConfig, DPOTrainer

    settings = {"loss_type": kind, "label_smoothing": smoothing, "beta": 0.3, "use_cpu": True, "bf16": False}
    trainer = DPOTrainer(
        model=lora(tiny_model()),
        args=DPOConfig(str(tmp_path), report_to="none", per_device_train_batch_size=4, **settings),
        train_dataset=preference_data(4),
        processing_class=make_tokenizer(),
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    # Adapters that are trained further have a frozen copy as reference; moved, the ratios are not 0.
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.add_(0.1)
        theirs = trainer.compute_loss(trainer.model.eval(), dict(inputs))

        def log_probs(model):
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            found = label_logits(model, inputs["input_ids"], inputs["attention_mask"], labels)
            return found.row_sums(-toward(found.logits, found.targets)), found.row_counts

        said, counts = log_probs(trainer.model)
        trainer.model.set_adapter("ref")
        reference, _ = log_probs(trainer.model)
    ratios = said - reference
    assert ratios.abs().max() > 0.05
    ours = PreferenceLoss(kind, 0.3, smoothing)(*ratios.chunk(2), *counts.chunk(2)).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


# Representations


def test_value_and_gradient_of_the_steering_error_and_none_reaches_the_target():
    states, target = normal(5, 6), normal(6, seed=1)
    expected = [sum((a - b) ** 2 for a, b in zip(row, target.tolist(), strict=True)) / 6 for row in states.tolist()]
    torch.testing.assert_close(steering_error(states, target), torch.tensor(expected, dtype=torch.float64))
    gradient = assert_gradient(lambda h: steering_error(h, target).sum(), states)
    torch.testing.assert_close(gradient, (states - target) / 3)
    target.requires_grad_()
    steering_error(states.requires_grad_(), target).sum().backward()
    assert target.grad is None and states.grad is not None


# The searches


def search_batch():
    found = batch(away=True, side="left")
    counts = [(found[f"{prefix}labels"] != -100).sum(1) for prefix in ("", "away_")]
    # References near what the tiny model says, so that the sigmoid is not saturated.
    references = [-4.0 * count + normal(4, seed=seed) for seed, count in enumerate(counts)]
    return found | dict(zip(("ref_log_probs", "away_ref_log_probs"), references, strict=True))


SEARCHES = {
    "targeted": {"objective": "targeted", "toward_coef": 0.7, "away_coef": 0.4},
    "toward alone": {"objective": "targeted", "toward_coef": 1.0, "away_coef": 0.0},
    "away alone": {"objective": "targeted", "toward_coef": 0.0, "away_coef": 1.0},
    "untargeted": {"objective": "untargeted", "toward_coef": 1.0, "away_coef": 0.0},
    "swapped": {"objective": "swapped", "toward_coef": 1.0, "away_coef": 0.0},
    "swapped ipo": {"preference": PreferenceLoss("ipo", 0.5)},
    "swapped robust": {"preference": PreferenceLoss("robust", 0.2, 0.1)},
}


@pytest.fixture
def in_float64(monkeypatch):
    """The models compute norms and softmaxes in float32 by name, and the search keeps its deltas in it. Not here."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("stream", ["layer", "mlp"])
@pytest.mark.parametrize("name", SEARCHES)
def test_the_gradient_of_every_search_is_that_of_central_differences(in_float64, name, stream):
    settings = {"objective": "swapped", "toward_coef": 1.0, "away_coef": 0.0, **SEARCHES[name]}
    sites = ["embedding", 2] if stream == "layer" else [1, 3]
    model = tiny_model().double()
    with attack_mode(model):
        search = Search(model, attack_terms(search_batch(), **settings), ThreatModel(sites, stream=stream, radius=0.3))
        search.draw(torch.Generator().manual_seed(0))
        assert all(delta.dtype == torch.float64 for delta in search.deltas.values())
        value, gradients = search.loss_and_gradients()
        assert value.item() == pytest.approx(search.loss().item(), rel=1e-12)
        rows = search.shape[0]
        for site, gradient in zip(search.sites, gradients, strict=True):
            leaf = search.deltas[site].detach()
            start = leaf.clone()
            # Along random directions, and along every row alone: a row must not see another.
            for seed in range(3):
                direction = normal(rows, *search.shape[1:], seed=seed + 5) * search.selected.unsqueeze(-1)
                for row in [None, *range(rows)]:
                    way = direction if row is None else torch.zeros_like(direction)
                    if row is not None:
                        way[row] = direction[row]
                    ends = []
                    for sign in (1, -1):
                        leaf.copy_(start + sign * 1e-6 * way)
                        ends.append(search.loss() * rows)
                    leaf.copy_(start)
                    difference = (ends[0] - ends[1]) / 2e-6
                    torch.testing.assert_close((gradient * way).sum(), difference, rtol=1e-6, atol=2e-8)
            assert gradient[search.selected].abs().max() > 1e-3
            assert (gradient[~search.selected] == 0).all()


@pytest.mark.parametrize("loss", [PreferenceLoss(), PreferenceLoss("ipo", 0.5), PreferenceLoss("robust", 0.3, 0.2)])
def test_the_loss_of_the_swapped_search_is_the_preference_loss_of_the_pair_the_other_way_round(llama, loss):
    found = search_batch()
    with attack_mode(llama):
        search = Search(
            llama, attack_terms(found, "swapped", 1.0, 0.0, loss), ThreatModel(["embedding", 2], radius=0.3)
        )
        search.draw(torch.Generator().manual_seed(0))
        value = search.loss().item()
    deltas = {site: delta.detach() for site, delta in search.deltas.items()}
    assert deltas[2].shape[-1] == HIDDEN
    ratios, counts = [], []
    with torch.no_grad(), Perturbation(deltas, search.selected).installed(llama):
        for prefix in ("", "away_"):
            kept = label_logits(llama, *(found[f"{prefix}{key}"] for key in ("input_ids", "attention_mask", "labels")))
            said = kept.row_sums(-toward(kept.logits, kept.targets))
            ratios.append(said - found[f"{prefix}ref_log_probs"].to(said))
            counts.append(kept.row_counts)
    assert value == pytest.approx(loss(*ratios, *counts).mean().item(), rel=1e-5)
