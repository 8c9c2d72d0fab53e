"""The bilevel solver against problems whose answers are known (seal.md 8), in float64."""

import pytest
import torch
from bilevel import DOUBLE, Ridge, Scalar, auroc, descend, numbers

from trl_robust.selection import CyclingStream, SelectorLearner, model_loss, selection_signal

ROWS = torch.arange(6)
SCALAR, RIDGE = Scalar(), Ridge()


def close(found, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=DOUBLE)
    assert torch.allclose(torch.as_tensor(found, dtype=DOUBLE), expected, rtol=0, atol=tolerance), (found, expected)


class TestScalar:
    gamma = 0.4

    def signals(self, weights):
        theta, own = SCALAR.penalised(weights, self.gamma), SCALAR.optimum(weights)
        return SCALAR.losses(theta), SCALAR.losses(own)

    def test_first_step_of_both_algorithms(self):
        learner = SelectorLearner(3)
        losses, auxiliary = self.signals(learner.weights())
        close(losses, (0.98, 0.18, 3.38))
        close(auxiliary, (2, 0, 2))
        rows = torch.arange(3)
        first = self.gamma * learner.gradient(rows, selection_signal(losses, auxiliary))
        close(first, (-0.16, 0, 0.16))
        close(first, self.gamma * (1 - self.gamma) * numbers(-2 / 3, 0, 2 / 3))  # the true gradient, scaled
        second = self.gamma * learner.gradient(rows, selection_signal(losses, None))
        close(second, (-0.0711111, -0.1777778, 0.2488889), 1e-7)

    @pytest.mark.parametrize("gamma", [0.03, 0.4, 0.9])
    def test_the_gradient_of_algorithm_1_is_that_of_the_closed_form_for_every_penalty(self, gamma):
        # min over theta of the penalised objective is gamma (1 - gamma) F(theta*(w)), whatever w.
        logits = numbers(0.3, -0.2, 0.7).requires_grad_()
        weights = 3 * logits.softmax(0)
        value = gamma * (1 - gamma) * SCALAR.upper(SCALAR.optimum(weights))
        (truth,) = torch.autograd.grad(value, logits)
        learner = SelectorLearner(3)
        learner.logits.copy_(logits.detach())
        weights = learner.weights()
        losses, own = SCALAR.losses(SCALAR.penalised(weights, gamma)), SCALAR.losses(SCALAR.optimum(weights))
        close(gamma * learner.gradient(torch.arange(3), selection_signal(losses, own)), truth)

    def test_what_dropping_the_auxiliary_model_adds_in_closed_form(self):
        logits = numbers(0.3, -0.2, 0.7).requires_grad_()
        share = logits.softmax(0)
        mean = (share * SCALAR.a).sum()
        spread = (share * (SCALAR.a - mean).square()).sum()
        extra = self.gamma / 2 * spread
        (expected,) = torch.autograd.grad(extra, logits)
        learner = SelectorLearner(3)
        learner.logits.copy_(logits.detach())
        losses, own = self.signals(learner.weights())
        rows = torch.arange(3)
        difference = learner.gradient(rows, selection_signal(losses, None)) - learner.gradient(
            rows, selection_signal(losses, own)
        )
        close(self.gamma * difference, expected)

    def test_algorithm_1_finds_the_optimum_and_algorithm_2_does_not(self):
        first = descend(SCALAR, self.gamma, 4000, auxiliary=True, learning_rate=0.5).weights()
        close(first / 3, (0.634878225, 0.230243550, 0.134878225), 5e-9)
        close(SCALAR.upper(SCALAR.optimum(first)), 0)
        second = descend(SCALAR, self.gamma, 4000, auxiliary=False, learning_rate=0.5).weights()
        assert second[1] / 3 > 0.999
        close(SCALAR.upper(SCALAR.optimum(second)), 0.5, 1e-3)  # as with all weights at 1


class TestRidge:
    ones = torch.ones(6, dtype=DOUBLE)

    def test_solutions_and_hypergradient(self):
        close(RIDGE.optimum(self.ones), (-1.430707876371, -0.852442671984))
        close(RIDGE.upper(RIDGE.optimum(self.ones)), 8.039438638223)
        hyper = RIDGE.hypergradient(self.ones)
        close(
            hyper,
            (0.121439381755, 0.072548076554, -0.746120168923, -2.334565354677, 1.075430464329, 2.143779707697),
        )
        # The learner's chain through the softmax, of mean(w a) with a = 6 dF/dw.
        expected = (0.066020697300, 0.017129392098, -0.801538853379, -2.389984039133, 1.020011779873, 2.088361023241)
        close(SelectorLearner(6).gradient(ROWS, 6 * hyper), expected)
        close(RIDGE.penalised(self.ones, 0.03), (0.880953640086, 1.760233266233))
        close(RIDGE.penalised(self.ones, 0.9), (-1.244443736358, -0.763458505266))

    def test_the_hypergradient_is_that_of_finite_differences(self):
        weights, step = numbers(0.5, 1.5, 0.8, 1.2, 0.7, 1.3), 1e-6
        for row, slope in enumerate(RIDGE.hypergradient(weights)):
            moved = torch.zeros(6, dtype=DOUBLE)
            moved[row] = step
            up, down = (RIDGE.upper(RIDGE.optimum(weights + sign * moved)) for sign in (1, -1))
            close((up - down) / (2 * step), slope, 1e-6)

    @pytest.mark.parametrize(
        ("gamma", "distance"),
        [(0.5, 1.0935), (0.9, 0.21012), (0.99, 0.020889), (0.999, 0.0020878), (0.9999, 0.00020877)],
    )
    def test_the_penalty_estimates_the_hypergradient_to_first_order_in_one_minus_gamma(self, gamma, distance):
        gap = selection_signal(RIDGE.losses(RIDGE.penalised(self.ones, gamma)), RIDGE.losses(RIDGE.optimum(self.ones)))
        estimate = gamma / (1 - gamma) * gap / 6
        close((estimate - RIDGE.hypergradient(self.ones)).abs().max(), distance, 5e-5 * max(distance, 0.1))

    @pytest.mark.parametrize(("gamma", "cosine"), [(0.03, 0.8696), (0.5, 0.9600), (0.9, 0.9985), (0.99, 0.99999)])
    def test_direction_of_the_estimate(self, gamma, cosine):
        gap = selection_signal(RIDGE.losses(RIDGE.penalised(self.ones, gamma)), RIDGE.losses(RIDGE.optimum(self.ones)))
        learner = SelectorLearner(6)
        found = learner.gradient(ROWS, gap), learner.gradient(ROWS, RIDGE.hypergradient(self.ones))
        close(torch.nn.functional.cosine_similarity(*found, dim=0), cosine, 6e-5)

    def test_algorithm_2_has_the_wrong_sign_at_a_large_penalty(self):
        learner = SelectorLearner(6)
        at = {
            gamma: learner.gradient(ROWS, selection_signal(RIDGE.losses(RIDGE.penalised(self.ones, gamma)), None))
            for gamma in (0.03, 0.9)
        }
        close(at[0.9], (0.0905, -0.7850, -0.3876, 1.2825, -0.3935, 0.1932), 6e-5)
        assert at[0.9][3] > 0 > at[0.9][4]  # a clean row goes down, a bad one up
        close(at[0.03], (-3.627, -3.636, -3.636, -3.627, 3.728, 10.798), 6e-4)

    @pytest.mark.parametrize(
        ("gamma", "upper"), [(0.03, 0.00830998), (0.5, 0.00828670), (0.9, 0.00827946), (0.99, 0.00827926)]
    )
    def test_algorithm_1_converges_close_to_the_bilevel_optimum_for_every_penalty(self, gamma, upper):
        learner = descend(
            RIDGE, gamma, 8000, auxiliary=True, learning_rate=0.5 / (1 - gamma), optimizer="exponentiated_gradient"
        )
        weights = learner.weights()
        close(RIDGE.upper(RIDGE.optimum(weights)), upper, 6e-9)
        assert weights[4:].max() < 1e-9

    @pytest.mark.parametrize(("steps", "upper"), [(2000, 0.02305), (20_000, 0.01003)])
    def test_single_loop(self, steps, upper):
        theta, own = torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
        learner, gamma, rate = SelectorLearner(6, learning_rate=0.05), 0.5, 0.05
        for step in range(steps):
            weights = learner.weights()
            signal = selection_signal(RIDGE.losses(theta), RIDGE.losses(own))
            moved = []
            for point, loss in (
                (theta, lambda point, w: model_loss(_safe(point), RIDGE.losses(point), w, gamma)),
                (own, lambda point, w: (w * RIDGE.losses(point)).mean()),
            ):
                weight = gamma if point is theta else 1.0
                variable = point.clone().requires_grad_()
                value = loss(variable, weights) + weight * RIDGE.decay / 2 * variable.square().sum()
                moved.append(point - rate * torch.autograd.grad(value, variable)[0])
            theta, own = moved
            learner.step(ROWS, signal, step)
        weights = learner.weights()
        close(RIDGE.upper(RIDGE.optimum(weights)), upper, 6e-6)
        assert weights[4:].max() < 0.015

    def test_single_loop_without_the_auxiliary_model_collapses_on_a_row(self):
        learner = descend(RIDGE, 0.5, 4000, auxiliary=False, learning_rate=0.5)
        assert learner.weights().max() > 5
        assert RIDGE.upper(RIDGE.optimum(learner.weights())) > 1


def _safe(theta):
    return (RIDGE.safe_x @ theta - RIDGE.safe_y).square() / 2


def test_flipped_labels_lose_their_weight_under_algorithm_1():
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        points = torch.randn(count, 5, generator=generator, dtype=DOUBLE)
        return points, (points @ numbers(1, -2, 0.5, 1.5, -1) > 0).double()

    (x, y), (safe_x, safe_y) = rows(200), rows(100)
    y[:40] = 1 - y[:40]
    bad = torch.arange(200) < 40

    def losses(theta, points, labels):
        return torch.nn.functional.softplus(-(2 * labels - 1) * (points @ theta))

    def slope(theta, points, labels, weights):
        signs = 2 * labels - 1
        return -(weights * signs * torch.sigmoid(-signs * (points @ theta))) @ points / len(points)

    learner, gamma, decay = SelectorLearner(200, learning_rate=20.0), 0.3, 0.01
    theta, own = torch.zeros(5, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)
    ones = torch.ones(100, dtype=DOUBLE)
    for step in range(3000):
        weights = learner.weights()
        signal = selection_signal(losses(theta, x, y), losses(own, x, y))
        down = (1 - gamma) * slope(theta, safe_x, safe_y, ones) + gamma * slope(theta, x, y, weights)
        theta, own = (
            theta - 0.5 * (down + gamma * decay * theta),
            own - 0.5 * (slope(own, x, y, weights) + decay * own),
        )
        learner.step(torch.arange(200), signal, step)
    weights = learner.weights()
    assert weights[bad].mean() < 0.05 < 1.2 < weights[~bad].mean()
    assert auroc(learner.logits, bad) >= 0.95


class TestLoaderTable:
    """20 % bad rows of higher loss, Algorithm 2 on losses that stand still: what the order of visits does to it."""

    rows, batch, epochs = 20_000, 64, 3

    def seen(self, learner):
        """Ranks of the last visits."""
        return learner.last_visit_step.argsort(stable=True).argsort().double()

    def ranked(self, optimizer, rate, share=1.0, average=False):
        generator = torch.Generator().manual_seed(0)
        bad = torch.arange(self.rows) < self.rows // 5
        noise = torch.randn(self.rows, generator=generator, dtype=DOUBLE)
        losses = torch.where(bad, 2 * (0.35 * noise).exp(), 0.75 * (0.7 * noise).exp())
        stream = CyclingStream(self.rows, seed=1)
        drawn = int(self.rows * share)
        updates = -(-drawn // self.batch)
        start_of_mean = (self.epochs - 1) * updates if average else None
        learner = SelectorLearner(self.rows, optimizer=optimizer, learning_rate=rate, average_from=start_of_mean)
        for epoch in range(self.epochs):
            for number in range(updates):
                start = number * self.batch
                picked = torch.tensor(stream.take(epoch * self.rows + start, min(self.batch, drawn - start)))
                learner.note(picked, losses[picked], None, epoch * updates + number)
                learner.step(picked, losses[picked], epoch * updates + number)
        return auroc(-losses, bad), auroc(learner.logits, bad), learner

    def lead_of_the_last_seen(self, learner):
        """How far the rows of the last 5 % of the updates are above the others, in standard deviations."""
        seen = learner.last_visit_step.double()
        late = learner.logits[seen > 0.95 * seen.max()].mean()
        return ((late - learner.logits.mean()) / learner.logits.std()).item()

    def test_sgd_that_visits_every_row_ranks_as_well_as_the_losses_themselves(self):
        static, found, learner = self.ranked("sgd", 0.25 * self.batch / self.epochs)
        assert static == pytest.approx(0.893, abs=0.01)
        assert found == pytest.approx(static, abs=0.01) and found >= 0.88
        assert learner.visits.unique().tolist() == [self.epochs]
        assert abs(self.lead_of_the_last_seen(learner)) < 0.15

    def test_averaging_over_the_last_epoch_makes_sgd_rank_by_time(self):
        _, _, learner = self.ranked("sgd", 0.25 * self.batch / self.epochs, average=True)
        last, mean = (
            torch.corrcoef(torch.stack([values.argsort().argsort().double(), self.seen(learner)]))[0, 1]
            for values in (learner.logits, learner.result)
        )
        assert abs(last) < 0.03 and mean == pytest.approx(0.12, abs=0.04)

    def test_adam_ranks_rows_by_when_they_were_seen(self):
        _, found, learner = self.ranked("adam", 5e-3)
        assert found == pytest.approx(0.818, abs=0.02)
        assert self.lead_of_the_last_seen(learner) > 0.7

    def test_epochs_that_end_with_the_shorter_loader_put_unseen_rows_on_top(self):
        _, found, learner = self.ranked("adam", 5e-3, share=0.2)
        assert found == pytest.approx(0.521, abs=0.03)
        unseen = learner.visits == 0
        assert unseen.sum() > self.rows / 3
        assert learner.logits[unseen].min() > learner.logits[~unseen].max()
