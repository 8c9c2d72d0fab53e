"""LAP's inner problem on losses whose optimum is known (lap.md 11 and 13)."""

import math

import pytest
import torch

from trl_robust.inner import ConstrainedSearch, LagrangianSettings, preset_settings

RAW = {
    "augmented": 0.0,
    "max_log_step": math.inf,
    "lambda_min": 0.0,
    "lambda_max": math.inf,
    "clip": False,
    "damped": False,
    "backoff": False,
    "token_cap": math.inf,
}
CLAMPED = {"backoff": False, "token_cap": math.inf}


def quadratic(*stiffness):
    weights = torch.tensor(stiffness)
    return lambda delta: 0.5 * (weights * delta.square()).sum(-1)


def search(loss, start, steps, *, epsilon=0.05, caps=None, **settings):
    """One row of one token, its clean loss 0."""
    chosen = LagrangianSettings(**{"optimizer": "sgd", "learning_rate": 0.05, **settings})
    found = ConstrainedSearch(
        lambda deltas: loss(deltas["toy"].flatten(1)),
        torch.zeros(1),
        {"toy": torch.tensor(start, dtype=torch.float32).reshape(1, 1, -1)},
        torch.ones(1, 1, dtype=torch.bool),
        epsilon=epsilon,
        settings=chosen,
        caps=caps,
    ).run(steps)
    return found, found.deltas["toy"].flatten()


def lam(found):
    return found.log_lambda.exp().item()


def test_lap_13_1_one_step_by_hand():
    found, delta = search(quadratic(1.0, 1.0), [0.3, 0.4], 1, alpha=2.0, **RAW)
    assert delta.tolist() == pytest.approx([0.3285, 0.4380], abs=1e-6)
    assert found.losses.item() == pytest.approx(0.149878, abs=1e-6)
    assert lam(found) == pytest.approx(0.1020176, abs=1e-7)


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        (0.01, [0.1000, 0.1000, 0.1006, 0.1012, 0.1020, 0.1030, 0.1041, 0.1054]),
        (0.05, [0.1000, 0.1000, 0.0998, 0.0996, 0.0996, 0.0997, 0.1000, 0.1004]),
        (0.10, [0.1000, 0.1000, 0.0988, 0.0977, 0.0967, 0.0959, 0.0952, 0.0946]),
    ],
)
def test_lap_13_2_the_papers_multiplier_curve_is_replayed(epsilon, expected):
    # The clean pass is not among them: the first is at the start, the second after the step whose update is skipped.
    changes = iter([0.0, 0.0, 0.0385, 0.0424, 0.0483, 0.0555, 0.0632, 0.0706, 0.0])

    def loss(delta):
        return delta.sum(-1) * 0 + next(changes)

    found, _ = search(loss, [1e-6] * 3, 8, epsilon=epsilon, **RAW, violation="signed", skip_first_update=True)
    assert found.records["lambda"][:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_papers_preset_has_what_its_curves_reveal():
    paper, rms = preset_settings("paper", {}), preset_settings("paper_rms", {})
    assert (paper.lambda_init, paper.alpha, paper.norm_weight, paper.violation) == (0.1, 2.0, 0.1, "signed")
    assert (paper.optimizer, paper.learning_rate, paper.norm) == ("sgd", 0.5, "l2")
    assert (rms.optimizer, rms.learning_rate, rms.norm) == ("adamw", 0.05, "rms")
    assert paper.skip_first_update and not paper.clip and not paper.backoff and paper.augmented == 0


@pytest.mark.parametrize("violation", ["abs", "signed"])
@pytest.mark.parametrize("change", [-0.2, -0.05, -0.01, 0.0, 0.01, 0.05, 0.2])
def test_lap_13_3_lambda_rises_iff_violated_and_stays_positive(violation, change):
    found, _ = search(lambda delta: delta.sum(-1) * 0 + change, [0.1], 1, violation=violation, **RAW)
    amount = (abs(change) if violation == "abs" else change) - 0.05
    assert lam(found) > 0
    assert math.isclose(math.log(lam(found) / 0.1), 2.0 * 0.1 * amount, abs_tol=1e-7)


def test_lap_13_3_signed_and_absolute_move_apart_exactly_where_the_loss_falls_too_far():
    def moves(change, violation):
        found, _ = search(lambda delta: delta.sum(-1) * 0 + change, [0.1], 1, violation=violation, **RAW)
        return math.copysign(1, math.log(lam(found) / 0.1))

    for change in (-0.2, -0.06, -0.04, 0.04, 0.06):
        assert (moves(change, "abs") != moves(change, "signed")) == (change < -0.05)


def test_lap_13_3_on_a_loss_that_falls_abs_converges_and_signed_lets_lambda_fall():
    def falls(delta):
        return -0.5 * delta.square().sum(-1)

    found, delta = search(falls, [0.05, 0.05], 1000, violation="abs", **CLAMPED)
    assert delta.norm().item() == pytest.approx(math.sqrt(0.1), abs=2e-3)
    assert found.losses.item() == pytest.approx(-0.05, abs=1e-3)
    wild, far = search(falls, [0.05, 0.05], 200, violation="signed", **{**CLAMPED, "augmented": 0.0})
    assert lam(wild) < 0.01 and far.norm() > 5


def test_lap_13_4_on_a_loss_that_does_not_change_every_step_is_as_long_as_eta_times_c():
    for weight in (1.0, 0.1):
        start = torch.tensor([0.003, -0.001, 0.002])
        found, delta = search(lambda d: d.sum(-1) * 0, start.tolist(), 10, **{**RAW, "norm_weight": weight})
        assert delta.norm().item() == pytest.approx(start.norm().item() + 10 * 0.05 * weight, rel=1e-5)
        steps = found.records["length"][:, 0].diff()
        assert torch.allclose(steps, torch.full_like(steps, 0.05 * weight), atol=1e-6)


def test_lap_13_4_without_a_multiplier_the_direction_never_changes():
    start = torch.tensor([0.03, -0.01, 0.02])
    found, delta = search(quadratic(1.0, 5.0, 9.0), start.tolist(), 20, **{**RAW, "lambda_init": 0.0})
    assert torch.cosine_similarity(delta, start, dim=0).item() == pytest.approx(1, abs=1e-6)
    assert delta.norm().item() == pytest.approx(start.norm().item() + 20 * 0.05, rel=1e-5)
    assert lam(found) == 0


def test_lap_13_5_the_unclamped_rule_behaves_as_the_specification_says():
    found, delta = search(quadratic(1.0, 2.0, 3.0, 4.0), [1e-3] * 4, 8, **RAW)
    assert delta.norm().item() == pytest.approx(0.385, abs=1e-3)
    assert found.losses.item() == pytest.approx(0.180, abs=1e-3)
    assert lam(found) == pytest.approx(0.104, abs=1e-3)
    assert (delta[0] / delta.norm()).item() == pytest.approx(0.52, abs=5e-3)
    found, delta = search(quadratic(1.0, 2.0, 3.0, 4.0), [1e-3] * 4, 400, **RAW)
    assert found.records["lambda"].max().item() == pytest.approx(11.59, abs=0.01)
    assert int(found.records["lambda"].argmax()) == 22
    assert found.records["loss"].max().item() == pytest.approx(0.668, abs=1e-3)
    assert delta.norm().item() == pytest.approx(math.sqrt(0.1), abs=1e-5)
    assert lam(found) == pytest.approx(math.sqrt(10), abs=1e-4)
    assert (delta[0] / delta.norm()).item() == pytest.approx(1, abs=1e-5)


TOYS = {
    "three alike": (quadratic(2.0, 2.0, 2.0), [1e-3, -1e-3, 5e-4]),
    "a free direction": (quadratic(0.0, 1.0), [1e-3, 1e-3]),
    "linear": (lambda delta: 2 * delta[:, 0], [1e-3]),
}


@pytest.mark.parametrize("name", TOYS)
def test_lap_13_5_the_raw_rule_diverges_and_the_row_is_given_up_and_counted(name):
    loss, start = TOYS[name]
    found, delta = search(loss, start, 1000, **RAW)
    assert found.nonfinite.all()
    assert delta.isfinite().all() and found.losses.isfinite().all()
    assert found.losses.abs().item() <= 0.05


@pytest.mark.parametrize(
    ("name", "steps", "length", "multiplier"), [("three alike", 1000, 0.22361, 2.23607), ("linear", 2000, 0.025, 0.5)]
)
def test_lap_13_5_where_it_diverges_the_robust_preset_reaches_the_optimum(name, steps, length, multiplier):
    loss, start = TOYS[name]
    found, delta = search(loss, start, steps, **CLAMPED)
    assert not found.nonfinite.any()
    assert delta.norm().item() == pytest.approx(length, abs=1e-4)
    assert lam(found) == pytest.approx(multiplier, rel=1e-3)
    # Karush-Kuhn-Tucker: -c delta / |delta| + lambda * gradient of the loss = 0.
    leaf = delta.clone().reshape(1, -1).requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf).abs().sum(), leaf)
    residual = -delta / delta.norm() + lam(found) * slope.flatten()
    assert residual.norm() < 1e-3


def test_lap_13_5_in_a_free_direction_the_search_stops_at_the_cap():
    loss, start = TOYS["a free direction"]
    cap = {"toy": torch.full((1, 1), 2.0)}
    found, delta = search(loss, start, 400, caps=cap, backoff=False)
    assert delta.norm().item() == pytest.approx(2.0, abs=1e-4)
    assert found.losses.item() <= 0.05 + 1e-6
    assert delta[0].abs() > 1.9


def test_zero_never_moves_which_is_why_the_search_starts_beside_it():
    _, delta = search(quadratic(1.0, 1.0), [0.0, 0.0], 50, **CLAMPED)
    assert delta.norm() == 0


@pytest.mark.parametrize("name", [*TOYS, "stiff"])
def test_what_violates_is_shortened_until_it_does_not_and_not_more_than_needed(name):
    loss, start = TOYS.get(name, (quadratic(200.0, 300.0), [1e-3, 1e-3]))
    # Far too few steps for the multiplier to act: the search alone ends beyond the border.
    without, far = search(loss, start, 12, learning_rate=0.3, **{**CLAMPED, "augmented": 0.0})
    found, delta = search(loss, start, 12, learning_rate=0.3, augmented=0.0, token_cap=math.inf)
    if name != "a free direction":
        assert not without.feasible.all()
    assert found.feasible.all()
    assert 0.5 * 0.05 <= found.losses.abs().item() <= 0.05 or delta.norm() >= far.norm()
    assert loss(delta.reshape(1, -1)).item() == pytest.approx(found.losses.item(), abs=1e-6)


def test_backing_off_takes_at_most_six_passes():
    calls = []

    def loss(delta):
        calls.append(1)
        return (delta.abs().sum(-1) > 0.013).float() * 9 + delta.sum(-1) * 0  # no slope to guess from

    search(loss, [1e-3], 3, learning_rate=1.0, token_cap=math.inf)
    assert len(calls) <= 3 + 1 + 6


def test_the_longest_feasible_perturbation_of_the_search_is_kept():
    # Longer and longer, and feasible only in the middle of the way.
    def loss(delta):
        return torch.where(delta.abs().sum(-1).detach() > 0.32, 9.0, 0.0) + delta.sum(-1) * 0

    found, delta = search(loss, [0.01], 20, token_cap=math.inf)
    assert found.feasible.all() and 0.3 <= delta.norm() <= 0.32


@pytest.mark.parametrize("norm", ["l2", "rms", "l2_token_mean"])
def test_norms_grow_along_their_own_gradient(norm):
    generator = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(3, 4, 5, generator=generator)
    selected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]).bool()
    made = ConstrainedSearch(
        lambda deltas: deltas["x"].sum((1, 2)) * 0,
        torch.zeros(3),
        {"x": start},
        selected,
        epsilon=0.05,
        settings=LagrangianSettings(optimizer="sgd", norm=norm, learning_rate=1e-3, token_cap=math.inf),
    )
    leaf = (start * selected.unsqueeze(-1)).double().requires_grad_()
    flat = leaf.flatten(1)
    counts = selected.sum(-1)
    values = {
        "l2": flat.norm(dim=-1),
        "rms": flat.norm(dim=-1) / (counts * 5).sqrt(),
        "l2_token_mean": torch.stack(
            [row[chosen].norm(dim=-1).mean() for row, chosen in zip(leaf, selected, strict=True)]
        ),
    }[norm]
    assert torch.allclose(made._norms().double(), values, atol=1e-6)
    (expected,) = torch.autograd.grad(values.sum(), leaf)
    assert torch.allclose(made._norm_gradients()[0].double(), expected.nan_to_num(), atol=1e-6)


def test_settings_that_cannot_be_are_refused_all_at_once_by_name():
    with pytest.raises(ValueError, match=r"`optimizer` is 'lion'.*`learning_rate` is -1.*`alpha` is inf"):
        LagrangianSettings(optimizer="lion", learning_rate=-1.0, alpha=math.inf)
    with pytest.raises(ValueError, match="`lambda_int` is no setting of the search; did you mean `lambda_init`"):
        preset_settings("robust", {"lambda_int": 1.0})
    with pytest.raises(ValueError, match="`preset` is 'sturdy'"):
        preset_settings("sturdy", {})
