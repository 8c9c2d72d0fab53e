"""Projections against independent oracles, their defining properties, steepest directions, random points."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_robust.threat import boundary_fraction, project, random_point, steepest, vector_norms

NORMS = ["l1", "l2", "linf"]
ORDER = {"l1": 1, "l2": 2, "linf": math.inf}
SHAPE = (2, 3, 5)
MASK = torch.tensor([[True, False, True], [False, True, True]])

norms = st.sampled_from(NORMS)
balls = st.sampled_from(["token", "sequence"])
radii = st.floats(0.01, 100.0)
# Zeros and ties come up often: they are where sorting and signs go wrong.
numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-100, 100, width=32))


@st.composite
def deltas(draw):
    size = math.prod(SHAPE)
    return torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size))).view(SHAPE)


def norm_of(delta, norm, ball):
    vectors = delta.double().flatten(-2).unsqueeze(1) if ball == "sequence" else delta.double()
    return torch.linalg.vector_norm(vectors, ord=ORDER[norm], dim=-1)


def l1_by_bisection(vector, radius):
    """Soft-thresholding whose level is found by bisection on the multiplier, in float64."""
    vector = vector.double()
    if vector.abs().sum() <= radius:
        return vector
    low, high = 0.0, vector.abs().max().item()
    for _ in range(200):
        level = (low + high) / 2
        if (vector.abs() - level).clamp(min=0).sum() > radius:
            low = level
        else:
            high = level
    return vector.sign() * (vector.abs() - high).clamp(min=0)


@given(st.lists(numbers, min_size=1, max_size=12), radii)
def test_the_l1_projection_is_that_of_bisection_on_the_multiplier(values, radius):
    vector = torch.tensor(values)
    projected = project(vector.view(1, 1, -1), "l1", radius).flatten()
    torch.testing.assert_close(projected.double(), l1_by_bisection(vector, radius), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("hidden", [1, 2, 24, 1000])
def test_the_l1_projection_is_that_of_bisection_in_float64(hidden):
    generator = torch.Generator().manual_seed(hidden)
    delta = torch.randn(1, 4, hidden, generator=generator, dtype=torch.float64)
    delta[0, 3] = delta[0, 3].sign()  # all coordinates tied
    for radius in (0.3, 1.0, 5.0, 1e4):
        projected = project(delta, "l1", radius)
        expected = torch.stack([l1_by_bisection(vector, radius) for vector in delta[0]])
        torch.testing.assert_close(projected[0], expected, rtol=1e-10, atol=1e-12)


def test_written_out_projections():
    delta = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [-6.0, 1.0], [0.0, 0.0]]])
    expected = {
        "l2": [[0.6, 0.8], [0.3, 0.4], [-6 / 37**0.5, 1 / 37**0.5], [0.0, 0.0]],
        "linf": [[1.0, 1.0], [0.3, 0.4], [-1.0, 1.0], [0.0, 0.0]],
        "l1": [[0.0, 1.0], [0.3, 0.4], [-1.0, 0.0], [0.0, 0.0]],
    }
    for norm, vectors in expected.items():
        torch.testing.assert_close(project(delta, norm, 1.0), torch.tensor([vectors]))


@given(deltas(), norms, balls, radii)
def test_a_projection_lies_inside(delta, norm, ball, radius):
    assert (norm_of(project(delta, norm, radius, ball=ball), norm, ball) <= radius * (1 + 1e-5) + 1e-4).all()


@given(deltas(), norms, balls, radii)
def test_a_point_inside_comes_back_bit_for_bit(delta, norm, ball, radius):
    inside = norm_of(delta, norm, ball) < radius * (1 - 1e-6)
    rows = inside.all(-1) if ball == "token" else inside[:, 0]
    assert torch.equal(project(delta, norm, radius, ball=ball)[rows], delta[rows])


@given(deltas(), norms, balls, radii)
def test_projecting_twice_is_projecting_once(delta, norm, ball, radius):
    once = project(delta, norm, radius, ball=ball)
    torch.testing.assert_close(project(once, norm, radius, ball=ball), once, rtol=1e-5, atol=1e-4)


@given(deltas(), deltas(), norms, balls, radii)
def test_a_projection_brings_no_two_points_further_apart(one, other, norm, ball, radius):
    apart = norm_of(one - other, "l2", ball)
    brought = norm_of(project(one, norm, radius, ball=ball) - project(other, norm, radius, ball=ball), "l2", ball)
    assert (brought <= apart * (1 + 1e-5) + 1e-4).all()


@given(deltas(), norms, balls, radii, st.sampled_from([0.25, 4.0, 64.0]))
def test_scaling_point_and_radius_scales_the_projection(delta, norm, ball, radius, factor):
    scaled = project(factor * delta, norm, factor * radius, ball=ball)
    torch.testing.assert_close(scaled, factor * project(delta, norm, radius, ball=ball), rtol=1e-5, atol=1e-5 * factor)


@given(deltas(), norms, balls, radii)
def test_unselected_tokens_come_back_bit_for_bit_and_take_no_part_in_the_norm(delta, norm, ball, radius):
    projected = project(delta, norm, radius, ball=ball, mask=MASK)
    assert torch.equal(projected[~MASK], delta[~MASK])
    alone = torch.where(MASK.unsqueeze(-1), delta, torch.zeros(()))
    expected = project(alone, norm, radius, ball=ball)
    torch.testing.assert_close(projected[MASK], expected[MASK], rtol=1e-6, atol=1e-6)


@given(deltas(), norms, radii)
def test_the_ball_of_a_sequence_is_the_ball_of_one_long_token(delta, norm, radius):
    flat = project(delta.flatten(1).unsqueeze(1), norm, radius)
    assert torch.equal(project(delta, norm, radius, ball="sequence").flatten(1), flat.squeeze(1))


@pytest.mark.parametrize("norm", NORMS)
def test_no_random_feasible_point_is_nearer_than_the_projection(norm):
    generator = torch.Generator().manual_seed(0)
    hidden = 4
    for scale in (0.5, 2.0, 10.0):
        point = scale * torch.randn(hidden, generator=generator)
        nearest = (project(point.view(1, 1, -1), norm, 1.0).flatten() - point).norm()
        for on_boundary in (False, True):
            others = random_point((1, 10_000, hidden), norm, 1.0, on_boundary=on_boundary, generator=generator)
            assert nearest <= (others - point).norm(dim=-1).min() + 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ball", ["token", "sequence"])
def test_a_radius_of_zero_gives_zero_and_the_zero_vector_is_safe(norm, ball):
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(project(delta, norm, 0.0, ball=ball), torch.zeros(SHAPE))
    for radius in (0.0, 1.0):
        assert torch.equal(project(torch.zeros(SHAPE), norm, radius, ball=ball), torch.zeros(SHAPE))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ball", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_projected_in_float32_and_comes_back_in_its_own_dtype(norm, ball, dtype):
    delta = (30 * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    for mask in (None, MASK):
        projected = project(delta, norm, 2.0, ball=ball, mask=mask)
        assert projected.dtype == dtype
        assert torch.equal(projected, project(delta.float(), norm, 2.0, ball=ball, mask=mask).to(dtype))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("radius", [0.1, 1e6])
@pytest.mark.parametrize("mask", [None, MASK, torch.zeros_like(MASK)])
def test_the_projection_is_a_new_tensor_and_leaves_its_input_alone(norm, radius, mask):
    delta = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    before = delta.clone()
    for ball in ("token", "sequence"):
        projected = project(delta, norm, radius, ball=ball, mask=mask)
        projected.add_(1.0)
        assert torch.equal(delta, before)


def test_the_l1_projection_stays_inside_at_the_width_of_a_large_model():
    delta = torch.randn(1, 4, 4096, generator=torch.Generator().manual_seed(0))
    for radius in (0.5, 5.0, 50.0, 500.0):
        lengths = norm_of(project(delta, "l1", radius), "l1", "token")
        assert (lengths <= radius * (1 + 1e-5)).all(), lengths / radius


@pytest.mark.parametrize("arguments", [("l3", 1.0, "token"), ("l2", 1.0, "row")])
def test_an_unknown_norm_or_ball_is_refused_with_the_choices(arguments):
    norm, radius, ball = arguments
    with pytest.raises(ValueError, match="choose one of"):
        project(torch.zeros(SHAPE), norm, radius, ball=ball)


@pytest.mark.parametrize("radius", [-0.1, float("nan")])
def test_a_radius_below_zero_or_not_a_number_is_refused(radius):
    with pytest.raises(ValueError, match="at least 0"):
        project(torch.zeros(SHAPE), "l2", radius)


# Steepest directions


@given(deltas(), st.sampled_from([("l2", 2), ("linf", 1), ("l1", math.inf)]), balls)
def test_the_steepest_direction_reaches_the_dual_norm(gradient, norm_and_dual, ball):
    norm, dual = norm_and_dual
    direction = steepest(gradient, norm, ball=ball, l1_fraction=1e-9)
    vectors = gradient.flatten(-2).unsqueeze(1) if ball == "sequence" else gradient
    along = direction.flatten(-2).unsqueeze(1) if ball == "sequence" else direction
    best = torch.linalg.vector_norm(vectors, ord=dual, dim=-1)
    torch.testing.assert_close((vectors * along).sum(-1), best, rtol=1e-5, atol=1e-5)
    lengths = torch.linalg.vector_norm(along, ord=ORDER[norm], dim=-1)
    assert torch.allclose(lengths[best > 1e-30], torch.ones(()))
    assert (lengths[best == 0] == 0).all()


def test_the_l1_step_is_spread_evenly_over_the_largest_coordinates():
    gradient = torch.tensor([[[5.0, -4.0, 1.0, 0.5, 0.1, 0.0, -3.0, 0.2, 0.2, 0.1]]])
    third = torch.tensor([[[1.0, -1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0]]]) / 3
    torch.testing.assert_close(steepest(gradient, "l1", l1_fraction=0.3), third)


def test_the_steepest_direction_is_zero_at_unselected_tokens_and_ignores_their_gradient():
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    louder = torch.where(MASK.unsqueeze(-1), gradient, torch.tensor(1e6))
    for norm in NORMS:
        for ball in ("token", "sequence"):
            direction = steepest(louder, norm, ball=ball, mask=MASK, l1_fraction=0.1)
            assert (direction[~MASK] == 0).all()
            assert torch.equal(direction, steepest(gradient, norm, ball=ball, mask=MASK, l1_fraction=0.1))


# Random points


def uniform_distance(values):
    """Kolmogorov-Smirnov distance from the uniform distribution on [0, 1], times the root of the sample size."""
    values = values.sort().values
    steps = torch.arange(1, len(values) + 1) / len(values)
    return (values - steps).abs().max().item() * len(values) ** 0.5


KS_LIMIT = 1.95
"""Exceeded by one sample in a thousand. The seeds are fixed, so the tests either always pass or never."""


@pytest.mark.parametrize("norm", NORMS)
def test_the_radius_of_a_random_point_is_distributed_as_inside_a_uniform_ball(norm):
    hidden, radius = 3, 2.5
    points = random_point((1, 5000, hidden), norm, radius, generator=torch.Generator().manual_seed(0))
    depth = torch.linalg.vector_norm(points, ord=ORDER[norm], dim=-1).flatten() / radius
    assert (depth <= 1 + 1e-6).all()
    assert uniform_distance(depth**hidden) < KS_LIMIT


def test_the_radius_of_a_random_sequence_counts_only_selected_tokens():
    mask = torch.tensor([[True, False, True, False]]).expand(4000, -1)
    for norm in NORMS:
        points = random_point(
            (4000, 4, 3), norm, 1.0, ball="sequence", mask=mask, generator=torch.Generator().manual_seed(1)
        )
        assert (points[~mask] == 0).all()
        depth = torch.linalg.vector_norm(points.flatten(1), ord=ORDER[norm], dim=-1)
        assert uniform_distance(depth ** (2 * 3)) < KS_LIMIT, norm


def test_the_directions_of_random_points_favour_no_axis():
    generator = torch.Generator().manual_seed(0)
    # On a sphere in three dimensions every coordinate is uniform (Archimedes); in an l1 ball of three dimensions the
    # share of one coordinate in the norm has distribution function 1 - (1 - s)^2.
    sphere = random_point((1, 5000, 3), "l2", 1.0, on_boundary=True, generator=generator)[0]
    octahedron = random_point((1, 5000, 3), "l1", 1.0, on_boundary=True, generator=generator)[0]
    for axis in range(3):
        assert uniform_distance((sphere[:, axis] + 1) / 2) < KS_LIMIT
        assert uniform_distance((1 - octahedron[:, axis].abs()) ** 2) < KS_LIMIT
    assert (octahedron.sign().mean(0).abs() < 0.05).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ball", ["token", "sequence"])
def test_a_random_boundary_point_lies_on_the_boundary_and_has_no_unselected_part(norm, ball):
    point = random_point(
        (2, 3, 64), norm, 0.7, ball=ball, mask=MASK, on_boundary=True, generator=torch.Generator().manual_seed(0)
    )
    assert (point[~MASK] == 0).all()
    lengths = norm_of(point, norm, ball)
    counted = MASK if ball == "token" else torch.ones(2, 1, dtype=torch.bool)
    torch.testing.assert_close(lengths[counted], torch.full_like(lengths[counted], 0.7), rtol=1e-5, atol=0)
    assert boundary_fraction(point, norm, 0.7, ball=ball, mask=MASK) == 1.0


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_point_is_that_of_its_seed(norm):
    def draw(seed):
        return random_point(SHAPE, norm, 1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


# Norms and the boundary


@given(deltas(), norms, balls)
def test_vector_norms_are_those_of_float64(delta, norm, ball):
    alone = torch.where(MASK.unsqueeze(-1), delta, torch.zeros(()))
    torch.testing.assert_close(
        vector_norms(delta, norm, ball=ball, mask=MASK).double(), norm_of(alone, norm, ball), rtol=1e-5, atol=1e-5
    )


def test_the_boundary_fraction_counts_selected_vectors_only():
    delta = torch.tensor([[[1.0, 0.0], [0.5, 0.0], [0.9995, 0.0], [1.0, 0.0]]])
    mask = torch.tensor([[True, True, True, False]])
    assert boundary_fraction(delta, "l2", 1.0) == 0.75
    assert boundary_fraction(delta, "l2", 1.0, mask=mask) == pytest.approx(2 / 3)
    assert boundary_fraction(delta, "l2", 1.0, ball="sequence", mask=mask) == 1.0
    assert boundary_fraction(delta, "l2", 2.0, ball="sequence", mask=mask) == 0.0
    assert boundary_fraction(delta, "l2", 1.0, mask=torch.zeros_like(mask)) == 0.0
