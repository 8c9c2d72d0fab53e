"""The search for the worst perturbation: its gradient, its optimum where that is known, and what it leaves behind."""

import warnings
from itertools import pairwise

import pytest
import torch
from tiny import ARCHITECTURES, HIDDEN, batch, lora, row_of, shared_model, tiny_model
from toys import Toy
from watch import assert_unchanged, state_of

from trl_robust import ThreatModel, find_perturbation
from trl_robust.inner import NonBindingRadiusWarning, Perturbation, attack_mode, median_norms
from trl_robust.inner.search import Search
from trl_robust.inner.terms import attack_terms
from trl_robust.objectives import away, label_logits, toward
from trl_robust.threat import boundary_fraction, decoder_layers, selected_ranks, vector_norms
from trl_robust.threat.positions import ranks

THREAT = ThreatModel([1, 3], radius=0.2)


def loss_at(model, found, deltas, selected, toward_coef=1.0, away_coef=0.0):
    """The attack's loss, as lat.md 2.1 writes it: sum over rows of means over labels."""
    total = 0.0
    with Perturbation(deltas, selected).installed(model):
        for prefix, coefficient, term in (("", toward_coef, toward), ("away_", away_coef, away)):
            if coefficient:
                keys = [found[f"{prefix}{key}"] for key in ("input_ids", "attention_mask", "labels")]
                kept = label_logits(model, *keys)
                total = total + coefficient * kept.row_means(term(kept.logits, kept.targets)).sum()
    return total


def search_of(model, found, threat=THREAT, toward_coef=1.0, away_coef=0.0):
    return Search(model, attack_terms(found, "targeted", toward_coef, away_coef), threat)


# The gradient


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("sites", [("embedding", 2), (1, 3)])
def test_the_gradient_is_that_of_finite_differences_in_float64(name, sites, monkeypatch):
    model = tiny_model(name).double().requires_grad_(False)
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the fused experts know no float64
    # The models compute norms and softmaxes in float32 by name. Not here.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    found = batch(away=True, side="left")
    selected = selected_ranks(found, "prompt")
    generator = torch.Generator().manual_seed(0)
    shape = (*selected.shape, HIDDEN)
    deltas, directions = (
        {site: 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for site in sites} for _ in range(2)
    )
    leaves = {site: delta.clone().requires_grad_() for site, delta in deltas.items()}
    gradients = torch.autograd.grad(loss_at(model, found, leaves, selected, 0.7, 0.4), list(leaves.values()))
    for site, gradient in zip(sites, gradients, strict=True):
        step = 1e-5
        moved = [
            loss_at(model, found, {**deltas, site: deltas[site] + sign * step * directions[site]}, selected, 0.7, 0.4)
            for sign in (1, -1)
        ]
        difference = (moved[0] - moved[1]) / (2 * step)
        torch.testing.assert_close((gradient * directions[site]).sum(), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_of_the_search_is_that_of_plain_autograd_with_and_without_the_cached_prefix(name):
    model, found = shared_model(name), batch(away=True)
    search = search_of(model, found, away_coef=0.5)
    with attack_mode(model):
        search.draw(torch.Generator().manual_seed(0))
        values = [delta.detach().clone() for delta in search.deltas.values()]
        first, resumed = search.loss_and_gradients(), search.loss_and_gradients()
    leaves = dict(zip(search.deltas, (value.requires_grad_() for value in values), strict=True))
    expected_loss = loss_at(model, found, leaves, search.selected, away_coef=0.5)
    expected = torch.autograd.grad(expected_loss, list(leaves.values()))
    assert search.terms[0][1].output is not None
    assert torch.equal(first[0], resumed[0])
    torch.testing.assert_close(first[0], expected_loss.detach() / 4, rtol=1e-6, atol=1e-6)
    for one, other, plain in zip(first[1], resumed[1], expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-6)
        assert one.abs().max() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lat_9_9_checkpointing_changes_no_bit_of_the_search(name):
    found, seen, recomputed = batch(away=True), [], []
    for checkpointing in (False, True):
        model = tiny_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        last = decoder_layers(model)[-1]
        attention = next(module for key, module in last.named_children() if "attn" in key or "attention" in key)
        passes = []
        attention.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        seen.append(find_perturbation(model, found, THREAT, steps=3, away_coef=0.5))
        recomputed.append(len(passes))
    assert recomputed == [8, 14]  # three steps and a last look at two shares; the steps run twice
    assert seen[0].losses == seen[1].losses
    for site in THREAT.sites:
        assert torch.equal(seen[0].deltas[site], seen[1].deltas[site])


def test_lat_9_9_checkpointing_changes_no_bit_of_a_search_on_mlps():
    threat = ThreatModel([1, 3], stream="mlp", radius=0.5)
    seen = []
    for checkpointing in (False, True):
        model = tiny_model("gemma2").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        seen.append(find_perturbation(model, batch(away=True), threat, steps=3, away_coef=0.5))
    assert torch.equal(seen[0].deltas[1], seen[1].deltas[1])
    assert seen[0].losses == seen[1].losses


# What it leaves behind


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lat_9_4_hooks_modes_gradients_and_weights_are_left_as_they_were(name, checkpointing):
    model = tiny_model(name).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    parameters[1].requires_grad_(False)
    before = state_of(model)
    relative = ThreatModel(["embedding", 2], radius=0.01, radius_unit="relative")
    for threat in (THREAT, relative):
        found = find_perturbation(model, batch(away=True), threat, steps=2, away_coef=0.5)
        assert_unchanged(model, before)
        assert not any(delta.requires_grad or delta.grad is not None for delta in found.deltas.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("at", ["first pass", "resumed pass", "calibration"])
def test_lat_9_1_nothing_is_left_behind_by_a_search_that_raises(name, at, monkeypatch):
    model = tiny_model(name).train()
    before = state_of(model)
    calls = []
    head = model.get_output_embeddings()

    def fail(*_):
        calls.append(1)
        if len(calls) == (3 if at == "resumed pass" else 1):
            raise KeyboardInterrupt

    hook = head.register_forward_pre_hook(fail)
    unit = "relative" if at == "calibration" else "absolute"
    threat = ThreatModel([1, 3], radius=0.5, radius_unit=unit)
    with pytest.raises(KeyboardInterrupt):
        find_perturbation(model, batch(), threat, steps=5)
    hook.remove()
    assert len(calls) == (3 if at == "resumed pass" else 1)
    assert_unchanged(model, before)


def test_lat_9_4_deltas_are_never_parameters_of_the_model():
    model = lora(tiny_model()).train()
    names, count = [n for n, _ in model.named_parameters()], sum(p.numel() for p in model.parameters())
    found = find_perturbation(model, batch(), THREAT, steps=2)
    with found.installed(model):
        assert [n for n, _ in model.named_parameters()] == names
        assert sum(p.numel() for p in model.parameters()) == count
        assert len(model.state_dict()) == len(lora(tiny_model()).state_dict())


def test_a_search_inside_no_grad_is_the_same_search(llama):
    expected = find_perturbation(llama, batch(), THREAT, steps=3)
    with torch.no_grad():
        seen = find_perturbation(llama, batch(), THREAT, steps=3)
        assert not torch.is_grad_enabled()
    assert torch.equal(seen.deltas[1], expected.deltas[1])


def test_a_search_draws_nothing_from_the_global_generator():
    model = lora(tiny_model(attention_dropout=0.5), dropout=0.5).train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for objective, init in (("targeted", "random"), ("random", "zero")):
        find_perturbation(
            model, batch(), THREAT, steps=2, objective=objective, init=init, generator=torch.Generator().manual_seed(1)
        )
    assert torch.equal(torch.get_rng_state(), state)


# The optimum where it is known

TOY_BATCH = {
    "input_ids": torch.tensor([[0, 1, 1], [1, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "labels": torch.tensor([[-100, -100, 1], [-100, 0, -100]]),
}


def best_point(direction, norm, radius):
    """The point of a ball at which `<direction, .>` is largest."""
    if norm == "l2":
        return radius * direction / direction.norm()
    if norm == "linf":
        return radius * direction.sign()
    return radius * torch.nn.functional.one_hot(direction.abs().argmax(), len(direction)) * direction.sign()


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("site", ["embedding", 0, 2])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_steepest_search_finds_the_worst_point_known_in_closed_form(norm, site, as_tuple):
    toy = Toy(as_tuple=as_tuple)
    threat = ThreatModel([site], norm=norm, radius=0.3)
    found = find_perturbation(toy, TOY_BATCH, threat, optimizer="steepest", steps=5)
    expected = best_point(toy.direction.detach(), norm, 0.3)
    # Token 1 has the lower logit: the attack goes against the direction in row 0, along it in row 1.
    for row, sign in ((0, -1), (1, 1)):
        for token in range(2):
            wanted = sign * expected if found.selected[row, token] else torch.zeros_like(expected)
            torch.testing.assert_close(found.deltas[site][row, token], wanted, rtol=1e-4, atol=1e-6)
    assert found.selected.tolist() == [[True, True], [True, False]]
    assert found.boundary_fraction[site] == 1.0


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_untargeted_search_finds_the_opposite_point(norm):
    toy = Toy()
    threat = ThreatModel([1], norm=norm, radius=0.3)
    away_from = find_perturbation(toy, TOY_BATCH, threat, objective="untargeted", optimizer="steepest", steps=5)
    expected = best_point(toy.direction.detach(), norm, 0.3)
    torch.testing.assert_close(away_from.deltas[1][0, 0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(away_from.deltas[1][1, 0], -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_in_the_ball_of_a_sequence_the_worst_point_is_spread_over_its_tokens(norm):
    toy = Toy()
    threat = ThreatModel([1], norm=norm, radius=0.3, ball="sequence")
    found = find_perturbation(toy, TOY_BATCH, threat, optimizer="steepest", steps=5)
    direction = toy.direction.detach()
    both = -best_point(torch.cat([direction, direction]), norm, 0.3).view(2, -1)
    torch.testing.assert_close(found.deltas[1][0], both, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.deltas[1][1, 0], best_point(direction, norm, 0.3), rtol=1e-4, atol=1e-6)


def test_adamw_comes_to_the_corner_that_the_signs_of_the_gradient_name():
    """That corner is the worst point of an linf ball. Of an l2 ball it is not: Adam evens out the coordinates."""
    toy = Toy()
    signs = -toy.direction.detach().sign()
    for norm, corner in (("linf", 0.3 * signs), ("l2", 0.3 * signs / len(signs) ** 0.5)):
        threat = ThreatModel([1], norm=norm, radius=0.3)
        found = find_perturbation(toy, TOY_BATCH, threat, steps=300, learning_rate=0.02)
        torch.testing.assert_close(found.deltas[1][0, 0], corner, rtol=0, atol=0.02)


def test_every_site_has_a_ball_and_a_radius_of_its_own():
    toy = Toy()
    threat = ThreatModel(["embedding", 1], radius={"embedding": 0.1, 1: 0.4})
    found = find_perturbation(toy, TOY_BATCH, threat, optimizer="steepest", steps=5)
    for site, radius in threat.radius.items():
        expected = -best_point(toy.direction.detach(), "l2", radius)
        torch.testing.assert_close(found.deltas[site][0, 0], expected, rtol=1e-4, atol=1e-6)


# The course of the attack


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_lat_9_2_the_attack_loss_does_not_rise_over_small_steps_and_ends_below_its_start(name, norm):
    model, found = shared_model(name), batch(away=True)
    radius = {"l1": 0.01, "l2": 0.003, "linf": 0.0006}[norm]
    threat = ThreatModel(["embedding", 2], norm=norm, radius=radius)
    losses = find_perturbation(model, found, threat, optimizer="steepest", steps=12, away_coef=0.5).losses
    assert len(losses) == 13
    fall = losses[0] - losses[-1]
    assert fall > 5e-3
    # A hair above zero: on the boundary the projection undoes most of a step, and what is left is rounding.
    allowed = 1e-3 * fall
    assert all(later <= earlier + allowed for earlier, later in pairwise(losses))


@pytest.mark.filterwarnings("ignore::trl_robust.inner.NonBindingRadiusWarning")
def test_lat_9_2_small_adamw_steps_inside_the_ball_never_raise_the_loss(llama):
    found = find_perturbation(llama, batch(), ThreatModel([1], radius=1.0), steps=8, learning_rate=6e-3)
    assert found.boundary_fraction == {1: 0.0}
    assert found.losses == sorted(found.losses, reverse=True)


def test_the_losses_are_those_of_the_deltas(llama):
    found = batch(away=True)
    worst = find_perturbation(llama, found, THREAT, steps=4, toward_coef=0.7, away_coef=0.3)
    zero = {site: torch.zeros_like(delta) for site, delta in worst.deltas.items()}
    for deltas, loss in ((zero, worst.losses[0]), (worst.deltas, worst.losses[-1])):
        expected = loss_at(llama, found, deltas, worst.selected, 0.7, 0.3).item() / 4
        assert loss == pytest.approx(expected, rel=1e-5)


def test_an_untargeted_attack_raises_the_cross_entropy(llama):
    found = batch()
    worst = find_perturbation(llama, found, ThreatModel([1], radius=0.5), objective="untargeted", steps=6)
    zero = {site: torch.zeros_like(delta) for site, delta in worst.deltas.items()}
    before, after = (loss_at(llama, found, deltas, worst.selected).item() for deltas in (zero, worst.deltas))
    assert after > before + 0.5
    assert worst.losses[-1] == pytest.approx(-after / 4, rel=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_random_perturbation_lies_on_the_boundary_and_is_that_of_its_seed(llama, norm):
    threat = ThreatModel(["embedding", 2], norm=norm, radius=0.3)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return find_perturbation(llama, batch(), threat, objective="random", generator=generator)

    one, again, other = draw(0), draw(0), draw(1)
    assert one.boundary_fraction == {"embedding": 1.0, 2: 1.0}
    assert torch.equal(one.deltas[2], again.deltas[2])
    assert not torch.equal(one.deltas[2], other.deltas[2])
    assert not torch.equal(one.deltas[2], one.deltas["embedding"])
    assert len(one.losses) == 2 and one.losses[0] != one.losses[1]


def test_a_random_start_is_inside_the_ball_and_that_of_its_seed(llama):
    def start(seed):
        generator = torch.Generator().manual_seed(seed)
        return find_perturbation(llama, batch(), THREAT, init="random", steps=0, generator=generator).deltas[1]

    assert torch.equal(start(0), start(0)) and not torch.equal(start(0), start(1))
    lengths = vector_norms(start(0), "l2")[selected_ranks(batch(), "prompt")]
    assert (lengths > 0).all() and (lengths <= 0.2).all()


def test_no_steps_from_zero_leave_the_perturbation_at_zero(llama):
    found = find_perturbation(llama, batch(), THREAT, steps=0)
    assert all((delta == 0).all() for delta in found.deltas.values())
    assert len(found.losses) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "steepest"])
def test_a_radius_of_zero_leaves_the_perturbation_at_zero(llama, optimizer):
    found = find_perturbation(llama, batch(), ThreatModel([1], radius=0.0), optimizer=optimizer, steps=2)
    assert (found.deltas[1] == 0).all()


# Batches


@pytest.mark.parametrize("optimizer", ["adamw", "steepest"])
@pytest.mark.parametrize("ball", ["token", "sequence"])
def test_a_batch_of_four_is_four_batches_of_one(llama, optimizer, ball):
    threat = ThreatModel(["embedding", 2], radius=0.5, ball=ball)
    settings = {"steps": 5, "optimizer": optimizer, "away_coef": 0.5}
    found = batch(away=True)
    together = find_perturbation(llama, found, threat, **settings)
    losses = []
    for number in range(4):
        alone = find_perturbation(llama, row_of(found, number), threat, **settings)
        losses.append(alone.losses[-1])
        for site, delta in alone.deltas.items():
            torch.testing.assert_close(delta[0], together.deltas[site][number, : delta.shape[1]], rtol=1e-3, atol=1e-4)
    assert sum(losses) / 4 == pytest.approx(together.losses[-1], rel=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lat_9_5_left_and_right_padding_give_the_same_deltas_and_losses(name):
    model = shared_model(name)
    threat = ThreatModel(["embedding", 2], radius=0.3, positions="all")
    right, left = (
        find_perturbation(model, batch(side=side, away=True), threat, steps=4, away_coef=0.5, optimizer="steepest")
        for side in ("right", "left")
    )
    assert right.losses == pytest.approx(left.losses, rel=1e-4)
    for site in right.deltas:
        torch.testing.assert_close(right.deltas[site], left.deltas[site], rtol=1e-3, atol=1e-3)


def test_lat_9_5_the_deltas_are_exactly_zero_at_unselected_ranks(llama):
    for positions in ("prompt", "completion"):
        for optimizer in ("adamw", "steepest"):
            threat = ThreatModel(["embedding", 2], radius=0.3, positions=positions)
            found = find_perturbation(llama, batch(), threat, steps=3, optimizer=optimizer)
            for delta in found.deltas.values():
                assert (delta[~found.selected] == 0).all()
                assert (delta[found.selected].abs().sum(-1) > 0).any()


def test_the_completions_of_a_pair_share_one_delta(llama):
    found = batch(away=True)
    worst = find_perturbation(llama, found, ThreatModel([1], radius=0.5, positions="all"), steps=3, away_coef=0.5)
    assert worst.deltas[1].shape[0] == 4
    union = [selected_ranks(found, "all"), selected_ranks({k[5:]: v for k, v in found.items() if "away_" in k}, "all")]
    for row in range(4):
        assert worst.selected[row].sum() == max(mask[row].sum() for mask in union)
    both = loss_at(llama, found, worst.deltas, worst.selected, 1.0, 0.5).item() / 4
    assert worst.losses[-1] == pytest.approx(both, rel=1e-5)


def test_the_last_user_turn_is_perturbed_and_nothing_else(llama):
    found = {**batch(), "last_user_span": torch.tensor([[1, 3], [0, 1], [4, 6], [1, 2]])}
    worst = find_perturbation(llama, found, ThreatModel([1], radius=0.2, positions="last_user"), steps=2)
    rank = torch.arange(worst.selected.shape[1])
    expected = (rank >= found["last_user_span"][:, :1]) & (rank < found["last_user_span"][:, 1:])
    assert torch.equal(worst.selected, expected)
    assert torch.equal(worst.deltas[1].abs().sum(-1) > 0, expected)


def test_lat_9_11_the_deltas_are_float32_of_batch_ranks_and_hidden_whatever_the_model(llama):
    for model in (llama, tiny_model().bfloat16(), tiny_model().double(), lora(tiny_model("qwen2"))):
        found = find_perturbation(model, batch(), ThreatModel(["embedding", 2], radius=0.2), steps=2)
        for delta in found.deltas.values():
            assert delta.dtype == torch.float32
            assert delta.shape == (4, 7, HIDDEN)  # the longest prompt has seven tokens
        with found.installed(model):
            seen = model(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits
        assert seen.dtype == next(model.parameters()).dtype


def test_a_bfloat16_model_keeps_steps_that_bfloat16_would_lose():
    """At 1 a step of 1e-4 vanishes in bfloat16; a perturbation kept in float32 still goes there (defect D6)."""
    model, threat = tiny_model().bfloat16(), ThreatModel([1], norm="linf", radius=10.0)
    start, found = (
        find_perturbation(
            model,
            batch(),
            threat,
            steps=steps,
            learning_rate=1e-4,
            init="random",
            generator=torch.Generator().manual_seed(0),
        )
        for steps in (0, 4)
    )
    moved = (found.deltas[1] - start.deltas[1])[found.selected].abs()
    assert (moved > 5e-5).float().mean() > 0.9


# The reach of the search


@pytest.mark.parametrize(("norm", "reach"), [("l1", HIDDEN), ("l2", HIDDEN**0.5), ("linf", 1.0)])
def test_lat_9_12_a_radius_that_cannot_bind_is_warned_of_and_one_that_can_is_not(llama, norm, reach):
    def search(factor):
        return find_perturbation(
            llama, batch(), ThreatModel([1], norm=norm, radius=factor * 4 * 0.01 * reach), steps=4, learning_rate=0.01
        )

    with pytest.warns(NonBindingRadiusWarning, match=r"at 1 cannot bind: 4 steps .* Raise the attack's learning rate"):
        assert search(1.1).boundary_fraction[1] == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", NonBindingRadiusWarning)
        search(0.9)
        find_perturbation(llama, batch(), ThreatModel([1], radius=50.0), steps=4, optimizer="steepest")
        find_perturbation(llama, batch(), ThreatModel([1], radius=50.0), objective="random")
        find_perturbation(llama, batch(), ThreatModel([1], radius=50.0), steps=4, init="random")


def test_lat_9_12_the_boundary_fraction_tells_whether_the_radius_binds(llama):
    small = find_perturbation(llama, batch(), ThreatModel([1], radius=0.2), steps=6, learning_rate=0.05)
    with pytest.warns(NonBindingRadiusWarning):
        large = find_perturbation(llama, batch(), ThreatModel([1], radius=3.0), steps=6, learning_rate=0.05)
    assert small.boundary_fraction[1] == 1.0
    assert large.boundary_fraction[1] == 0.0
    assert small.norms[1] == pytest.approx(0.2, rel=1e-3)
    expected = boundary_fraction(small.deltas[1], "l2", 0.2, mask=small.selected)
    assert small.boundary_fraction[1] == expected


def test_the_steepest_search_reaches_the_boundary_whatever_its_steps(llama):
    for steps in (1, 3, 16):
        found = find_perturbation(llama, batch(), ThreatModel([1], radius=0.05), steps=steps, optimizer="steepest")
        assert found.boundary_fraction[1] == 1.0


def test_a_relative_radius_is_a_multiple_of_the_median_norm_of_the_perturbed_tokens(llama):
    found = batch()
    states = {}
    hooks = [
        decoder_layers(llama)[0].register_forward_pre_hook(
            lambda module, args, kwargs: states.__setitem__("embedding", args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        decoder_layers(llama)[2].register_forward_hook(lambda m, a, output: states.__setitem__(2, output)),
    ]
    llama(
        input_ids=found["input_ids"],
        attention_mask=found["attention_mask"],
        position_ids=ranks(found["attention_mask"]),
    )
    for hook in hooks:
        hook.remove()
    prompt = found["attention_mask"].bool() & (found["labels"] == -100)
    threat = ThreatModel(["embedding", 2], radius=0.1, radius_unit="relative")
    measured = median_norms(llama, [found], threat)
    for site, hidden in states.items():
        assert measured[site] == pytest.approx(hidden[prompt].norm(dim=-1).median().item(), rel=1e-5)
    worst = find_perturbation(llama, found, threat, steps=3, optimizer="steepest")
    for site, unit in measured.items():
        lengths = worst.deltas[site][worst.selected].norm(dim=-1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.1 * unit), rtol=1e-3, atol=0)


def test_the_cost_counts_forward_and_backward_passes_of_rows(llama):
    threats = {"embedding": 1.0, 0: 3 / 4, 3: 0.0}
    for site, share in threats.items():
        found = find_perturbation(llama, batch(), ThreatModel([site], radius=0.5), steps=3)
        # The first pass is whole; two more resume; a backward pass costs what its forward ran; a last look.
        whole = 4 * (1 + share) if site != "embedding" else 8.0
        assert found.forward_passes == pytest.approx(whole + 2 * 8 * share + 4 * share)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "target"}, r"`objective` is 'target'; choose one of"),
        ({"optimizer": "sgd"}, r"`optimizer` is 'sgd'; choose one of"),
        ({"init": "ones"}, r"`init` is 'ones'; choose one of"),
        ({"steps": -1}, r"`steps` is -1; it must be at least 0"),
        ({"toward_coef": 0.0}, r"`toward_coef` and `away_coef` are both 0"),
        ({"away_coef": 0.5}, r"the batch lacks \['away_input_ids'"),
        ({"objective": "untargeted", "away_coef": 0.5}, r"`away_coef` belongs to the targeted attack"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(llama, changes, message):
    with pytest.raises(ValueError, match=message):
        find_perturbation(llama, batch(), THREAT, **changes)


def test_a_batch_without_labels_is_refused(llama):
    found = batch()
    del found["labels"]
    with pytest.raises(ValueError, match=r"The batch lacks \['labels'\]"):
        find_perturbation(llama, found, THREAT)


def test_a_batch_without_a_token_to_perturb_is_refused(llama):
    found = batch()
    found["labels"] = found["input_ids"]
    with pytest.raises(ValueError, match="No token of the batch may be perturbed with positions='prompt'"):
        find_perturbation(llama, found, THREAT)


def test_a_layer_that_does_not_exist_is_refused(llama):
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        find_perturbation(llama, batch(), ThreatModel([9]))


def test_a_gradient_that_is_not_finite_is_refused_and_nothing_is_left_behind():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
    before = state_of(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        find_perturbation(model, batch(), THREAT, steps=2)
    assert_unchanged(model, before)
