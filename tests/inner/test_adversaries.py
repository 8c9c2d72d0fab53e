"""Adversaries beside the plain search: signed steps, warm starts, chosen sites, ablated directions, pairs of rows."""

import pytest
import torch
from tiny import HIDDEN, LAYERS, batch, collate, rows, shared_model, tiny_model
from toys import Toy
from watch import assert_unchanged, state_of

from trl_robust import ThreatModel, find_perturbation
from trl_robust.inner import Ablation, Perturbation, refusal_directions
from trl_robust.inner.injection import attack_mode
from trl_robust.inner.search import DUAL, Search
from trl_robust.inner.terms import attack_terms
from trl_robust.objectives import label_logits
from trl_robust.threat import decoder_layers, project, selected_ranks, vector_norms
from trl_robust.threat.positions import ranks

THREAT = ThreatModel([1, 3], radius=0.2)


def logits(model, found, **kwargs):
    return model(input_ids=found["input_ids"], attention_mask=found["attention_mask"], **kwargs).logits


def gradients_at(model, found, deltas, selected, away_coef=0.0):
    """Gradient of the attack's loss, a sum over rows, by autograd alone: no search, no cached prefix."""
    leaves = {site: delta.clone().requires_grad_() for site, delta in deltas.items()}
    total = 0.0
    for term in attack_terms(found, "targeted", 1.0, away_coef):
        with Perturbation(leaves, selected).installed(model):
            kept = label_logits(model, *(term.batch[key] for key in ("input_ids", "attention_mask", "labels")))
        total = total + term.row_losses(kept).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


# Signed steps


@pytest.mark.filterwarnings("ignore::trl_robust.inner.NonBindingRadiusWarning")
def test_inside_the_ball_a_signed_step_moves_every_perturbed_coordinate_by_the_learning_rate(llama):
    threat = ThreatModel(["embedding", 2], norm="linf", radius=10.0)
    found = find_perturbation(llama, batch(), threat, optimizer="sign", steps=1, learning_rate=1e-3)
    for delta in found.deltas.values():
        assert torch.equal(delta[found.selected].abs(), torch.full_like(delta[found.selected], 1e-3))
        assert (delta[~found.selected] == 0).all()
    twice = find_perturbation(llama, batch(), threat, optimizer="sign", steps=2, learning_rate=1e-3)
    for site, delta in twice.deltas.items():
        moved = (delta - found.deltas[site])[found.selected].abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("ball", ["token", "sequence"])
def test_the_signed_search_is_a_loop_of_signs_and_projections_written_by_hand(llama, norm, ball):
    radius = {"l1": 0.5, "l2": 0.12, "linf": 0.025}[norm]
    threat, made = ThreatModel([0, 2], norm=norm, radius=radius, ball=ball), batch(away=True)
    found = find_perturbation(llama, made, threat, optimizer="sign", steps=4, learning_rate=0.01, away_coef=0.5)
    deltas = {site: torch.zeros_like(delta) for site, delta in found.deltas.items()}
    for _ in range(4):
        for site, gradient in gradients_at(llama, made, deltas, found.selected, 0.5).items():
            stepped = deltas[site] - 0.01 * gradient.sign()
            deltas[site] = project(stepped, norm, radius, ball=ball, mask=found.selected)
    for site, delta in deltas.items():
        # A coordinate whose gradient is next to nothing may take its sign either way.
        apart = (found.deltas[site] - delta).abs() > 1e-5
        assert apart.float().mean() < 0.01, site
        assert found.boundary_fraction[site] > 0.5
    assert found.losses[-1] < found.losses[0] and len(found.losses) == 5


# Warm starts


def start_of(width, scale=0.01, seed=0):
    return scale * torch.randn(width, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [2, 7, 11], ids=["narrower", "as wide", "wider"])
def test_a_warm_search_of_no_steps_stands_at_its_start_on_the_selected_ranks_of_every_row(llama, width):
    start = {1: start_of(width), 3: start_of(width, seed=1)}
    found = find_perturbation(llama, batch(), THREAT, init="warm", start=start, steps=0)
    assert found.selected.shape == (4, 7)
    for site, delta in found.deltas.items():
        expected = torch.zeros(7, HIDDEN)
        expected[: min(7, width)] = start[site][:7]
        assert torch.equal(delta, expected * found.selected.unsqueeze(-1))
        assert (delta[~found.selected] == 0).all() and delta[0, 1].abs().max() > 0


def test_a_warm_start_outside_the_ball_is_projected_onto_it(llama):
    start = {1: start_of(7, scale=1.0), 3: start_of(7)}
    found = find_perturbation(llama, batch(), THREAT, init="warm", start=start, steps=0)
    lengths = found.deltas[1].norm(dim=-1)[found.selected]
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.2))
    directions = found.deltas[1][2, :7] / 0.2
    torch.testing.assert_close(directions, start[1] / start[1].norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert found.boundary_fraction == {1: 1.0, 3: 0.0}


def test_sites_without_a_start_begin_at_zero_and_a_start_at_another_site_is_not_used(llama):
    found = find_perturbation(llama, batch(), THREAT, init="warm", start={3: start_of(7), 2: start_of(7)}, steps=0)
    assert set(found.deltas) == {1, 3}
    assert (found.deltas[1] == 0).all() and found.deltas[3].abs().max() > 0
    cold = find_perturbation(llama, batch(), THREAT, steps=3)
    nothing = find_perturbation(llama, batch(), THREAT, init="warm", steps=3)
    assert all(torch.equal(cold.deltas[site], nothing.deltas[site]) for site in cold.deltas)


@pytest.mark.filterwarnings("ignore::trl_robust.inner.NonBindingRadiusWarning")
def test_a_warm_search_goes_on_from_its_start_and_leaves_the_start_alone(llama):
    slow, threat = {"steps": 2, "learning_rate": 0.005}, ThreatModel([1, 3], radius=1.0)
    first = find_perturbation(llama, batch(1), threat, **slow)
    start = {site: delta[0].clone() for site, delta in first.deltas.items()}
    kept = {site: delta.clone() for site, delta in start.items()}
    second = find_perturbation(llama, batch(1), threat, init="warm", start=start, **slow)
    assert second.losses[0] == pytest.approx(first.losses[-1], rel=1e-5)
    assert second.losses[-1] < first.losses[-1] < first.losses[0]
    assert all(torch.equal(start[site], kept[site]) for site in start)


# The choice of sites

FOUND = {
    "input_ids": torch.tensor([[0, 1, 1], [1, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "labels": torch.tensor([[-100, -100, 1], [-100, 0, -100]]),
}


def search_of(model, found, threat, away_coef=0.0):
    return Search(model, attack_terms(found, "targeted", 1.0, away_coef), threat)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("ball", ["token", "sequence"])
def test_the_gain_of_a_site_is_its_radius_times_the_dual_norm_of_the_gradient(norm, ball):
    """On the toy every site has the same gradient: the direction, times how sure the model is of the other token."""
    toy = Toy()
    radii = {"embedding": 0.1, 0: 0.4, 2: 0.2}
    gains = search_of(toy, FOUND, ThreatModel(list(radii), norm=norm, radius=radii, ball=ball)).gains()
    with torch.no_grad():
        found = toy(**{key: FOUND[key] for key in ("input_ids", "attention_mask")}).logits
    direction = toy.direction.detach()
    # Row 0 predicts token 1 after two prompt tokens, row 1 token 0 after one.
    slopes = [2 * found[0, 1].softmax(-1)[0].item(), 2 * found[1, 0].softmax(-1)[1].item()]
    order = {"l1": float("inf"), "l2": 2, "linf": 1}[norm]
    dual = 0.0
    for slope, tokens in zip(slopes, (2, 1), strict=True):
        size = direction.norm(order).item()
        together = torch.cat([direction] * tokens).norm(order).item()
        dual += slope * (tokens * size if ball == "token" else together)
    for site, radius in radii.items():
        assert gains[site] == pytest.approx(radius * dual / 2, rel=1e-5), site


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_gain_is_what_the_loss_falls_by_to_first_order_when_a_small_ball_is_used_up(norm):
    # To first order: the smaller the ball, the nearer; float32 wants it not too small.
    model, radius = tiny_model().double(), {"l1": 1e-2, "l2": 5e-3, "linf": 2e-4}[norm]
    found = batch(away=True)
    for site in ("embedding", 2):
        threat = ThreatModel([site], norm=norm, radius=radius)
        with attack_mode(model):
            search = search_of(model, found, threat, away_coef=0.5)
            gain = search.gains()[site]
            (gradient,) = search.loss_and_gradients()[1]
            before = search.loss().item()
            # The exact worst point of every token's ball, for l1 one coordinate.
            if norm == "l2":
                step = gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            elif norm == "linf":
                step = gradient.sign()
            else:
                top = gradient.abs().argmax(-1, keepdim=True)
                step = torch.zeros_like(gradient).scatter(-1, top, gradient.gather(-1, top).sign())
            search.deltas[site].detach().copy_(-radius * step * search.selected.unsqueeze(-1))
            assert before - search.loss().item() == pytest.approx(gain, rel=0.05)
            assert gain > 1e-4


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_sites_with_the_largest_gains_are_attacked_and_no_others(llama, number, norm):
    sites = ["embedding", 0, 1, 2, 3]
    threat = ThreatModel(sites, norm=norm, radius=dict(zip(sites, (0.0003, 0.01, 0.06, 0.05, 0.1), strict=True)))
    found = batch(away=True)
    zero = {site: torch.zeros(4, 7, HIDDEN) for site in sites}
    selected = selected_ranks(found, "prompt")
    gains = {
        site: threat.radius_at(site) * vector_norms(gradient, DUAL[norm], mask=selected).sum().item() / 4
        for site, gradient in gradients_at(llama, found, zero, selected, 0.5).items()
    }
    with attack_mode(llama):
        assert search_of(llama, found, threat, away_coef=0.5).gains() == pytest.approx(gains, rel=1e-4, abs=1e-7)
    top = sorted(sites, key=lambda site: -gains[site])[:number]
    chosen = find_perturbation(llama, found, threat, steps=3, away_coef=0.5, num_sites=number)
    assert set(chosen.deltas) == set(top)
    assert top != sites[:number]
    # What follows is the search on these sites alone, from its first step on.
    alone = ThreatModel(top, norm=norm, radius={site: threat.radius_at(site) for site in top})
    expected = find_perturbation(llama, found, alone, steps=3, away_coef=0.5)
    assert chosen.losses == expected.losses
    for site in top:
        assert torch.equal(chosen.deltas[site], expected.deltas[site])
        assert chosen.norms[site] == expected.norms[site]


def test_as_many_sites_as_there_are_cost_no_choice(llama):
    plain = find_perturbation(llama, batch(), THREAT, steps=2)
    for number in (2, 5):
        found = find_perturbation(llama, batch(), THREAT, steps=2, num_sites=number)
        assert found.forward_passes == plain.forward_passes and found.losses == plain.losses


@pytest.mark.parametrize(("sites", "back"), [(["embedding", 1, 3], 1.0), ([1, 3], 1 / 2)])
def test_a_choice_costs_one_step_over_all_sites_and_the_rest_what_the_chosen_site_costs(llama, sites, back):
    threat = ThreatModel(sites, radius={site: 0.3 if site == 3 else 1e-3 for site in sites}, positions="all")
    ran = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(decoder_layers(llama))
    ]
    found = find_perturbation(llama, batch(), threat, steps=3, num_sites=1)
    for hook in hooks:
        hook.remove()
    assert list(found.deltas) == [3]
    # The choice: a whole pass, and one back to the lowest site. Then a first pass that fills the cache of the chosen
    # site; two more steps and a last look resume above layer 3, at the head.
    assert found.forward_passes == 4 * (1 + back) + 4
    assert ran == 2 * list(range(LAYERS))


# Ablated directions


def direction_at(seed):
    drawn = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def states_after(model, site, found, change=None, stream="layer"):
    """Hidden states just above a site, as the model goes on with them."""
    layers, seen = decoder_layers(model), []
    if site == "embedding":
        hook = layers[0].input_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    elif stream == "mlp":
        # The residual stream is left alone, so what the MLP added is read off as a difference.
        inside = []
        first = layers[site].post_attention_layernorm.register_forward_pre_hook(lambda m, args: inside.append(args[0]))
        hook = layers[site + 1].input_layernorm.register_forward_pre_hook(
            lambda module, args: seen.append(args[0] - inside[-1])
        )
    else:
        hook = layers[site + 1].input_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    if change is None:
        logits(model, found)
    else:
        with change.installed(model):
            logits(model, found)
    hook.remove()
    if site != "embedding" and stream == "mlp":
        first.remove()
    return seen[-1].detach()


PLACES = [("embedding", "layer"), (0, "layer"), (2, "layer"), (1, "mlp")]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("site", "stream"), PLACES)
def test_an_ablation_takes_the_direction_out_of_selected_tokens_and_leaves_the_others_alone(llama, site, stream, side):
    found, direction = batch(side=side), direction_at(0)
    selected = selected_ranks(found, "prompt")
    clean = states_after(llama, site, found, stream=stream)
    seen = states_after(llama, site, found, Ablation({site: direction}, selected, stream), stream)
    rank, real = ranks(found["attention_mask"]), found["attention_mask"].bool()
    chosen = real & (rank < 7) & selected.gather(1, rank.clamp(max=6))
    expected = clean[chosen] - (clean[chosen] @ direction)[:, None] * direction  # h - r r.h
    torch.testing.assert_close(seen[chosen], expected, rtol=1e-5, atol=1e-5)
    assert (clean[chosen] @ direction).abs().max() > 0.05
    assert (seen[chosen] @ direction).abs().max() < 1e-5
    if stream == "layer":
        assert torch.equal(seen[~chosen], clean[~chosen])
    else:
        torch.testing.assert_close(seen[~chosen], clean[~chosen], rtol=0, atol=1e-5)


def test_an_ablation_of_two_sites_changes_what_the_model_says(llama):
    found = batch()
    given = Ablation({"embedding": direction_at(0), 2: direction_at(1)}, selected_ranks(found, "prompt"))
    assert given.sites == ("embedding", 2)
    expected = logits(llama, found)
    with given.installed(llama):
        assert (logits(llama, found) - expected)[found["labels"] != -100].abs().max() > 1e-3


@pytest.mark.parametrize(("site", "stream"), PLACES)
def test_an_ablation_done_twice_is_the_ablation_done_once(llama, site, stream):
    found = batch()
    given = Ablation({site: direction_at(0)}, selected_ranks(found, "all"), stream)
    with given.installed(llama):
        once = logits(llama, found)
        with given.installed(llama):
            twice = logits(llama, found)
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)
    assert (once - logits(llama, found)).abs().max() > 1e-2


def test_layers_that_return_tuples_are_ablated_like_layers_that_return_tensors():
    found = {key: FOUND[key] for key in ("input_ids", "attention_mask")}
    given = Ablation({"embedding": direction_at(0)[:6], 1: direction_at(1)[:6]}, torch.ones(2, 3, dtype=torch.bool))
    seen = []
    for as_tuple in (False, True):
        toy = Toy(as_tuple=as_tuple, identity=False)
        with given.installed(toy):
            seen.append(toy(**found).logits)
        assert not torch.equal(seen[-1], toy(**found).logits)
    assert torch.equal(*seen)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "opt", "mixtral"])
def test_an_ablation_can_be_disabled_and_is_gone_after_the_block_also_after_an_exception(name):
    model, found, other = shared_model(name), batch(4), batch(3)
    before, expected, of_other = state_of(model), logits(model, found), logits(model, other)
    given = Ablation({"embedding": direction_at(0), 2: direction_at(1)}, selected_ranks(found, "prompt"))
    with given.installed(model):
        assert not torch.equal(logits(model, found), expected)
        with given.disabled():
            assert torch.equal(logits(model, found), expected)
            assert torch.equal(logits(model, other), of_other)
        assert not torch.equal(logits(model, found), expected)
        with pytest.raises(RuntimeError, match="3 rows reached a perturbation of 4 rows"):
            logits(model, other)
    assert_unchanged(model, before)
    with pytest.raises(KeyboardInterrupt), given.installed(model), given.disabled():
        raise KeyboardInterrupt
    assert_unchanged(model, before)
    with given.installed(model):  # the exception left it enabled
        assert not torch.equal(logits(model, found), expected)


def test_an_ablation_keeps_the_dtype_of_the_model_and_its_graph():
    model, found = tiny_model().bfloat16(), batch()
    given = Ablation({1: direction_at(0)}, selected_ranks(found, "prompt"))
    with given.installed(model):
        seen = logits(model, found)
        assert seen.dtype == torch.bfloat16
        seen.float().sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


# The refusal direction

ORDINARY = [([10, 11, 12], [20]), ([13, 14], [21, 22]), ([15, 16, 17, 18], [23])]


def requests(kind, side="right"):
    """Three requests of different lengths; `harmful` and `harmless` end with different tokens."""
    ends = {"harmful": 40, "harmless": 50}
    return collate([([*prompt, ends[kind] + n], answer) for n, (prompt, answer) in enumerate(ORDINARY)], side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stream", ["layer", "mlp"])
def test_the_refusal_direction_is_the_difference_of_means_at_the_last_prompt_token(llama, side, stream):
    sites = [0, 2] if stream == "mlp" else ["embedding", 0, 2]
    kinds = ("harmful", "harmless")
    found = refusal_directions(llama, *([requests(kind, side)] for kind in kinds), ThreatModel(sites, stream=stream))
    assert list(found) == sites
    for site, direction in found.items():
        means = []
        for kind in kinds:
            # Row by row without padding: the token before the answer.
            last = []
            for prompt, _ in ORDINARY:
                number = len(last)
                one = collate([([*prompt, {"harmful": 40, "harmless": 50}[kind] + number], [])])
                last.append(states_after(llama, site, one, stream=stream)[0, -1])
            means.append(torch.stack(last).mean(0))
        expected = (means[0] - means[1]) / (means[0] - means[1]).norm()
        assert direction.dtype == torch.float32 and direction.norm().item() == pytest.approx(1.0)
        torch.testing.assert_close(direction, expected, rtol=1e-3, atol=1e-4)


def test_batches_of_requests_count_by_their_rows_and_answers_do_not_count(llama):
    threat = ThreatModel(["embedding", 2])
    whole = refusal_directions(llama, [requests("harmful")], [requests("harmless")], threat)
    # The same rows in uneven batches, with other answers.
    parts = []
    for kind in ("harmful", "harmless"):
        ends = {"harmful": 40, "harmless": 50}[kind]
        pairs = [([*prompt, ends + n], [33] * (n + 1)) for n, (prompt, _) in enumerate(ORDINARY)]
        parts.append([collate(pairs[:1]), collate(pairs[1:])])
    apart = refusal_directions(llama, *parts, threat)
    for site, direction in whole.items():
        torch.testing.assert_close(apart[site], direction, rtol=1e-4, atol=1e-5)


def test_once_ablated_the_two_kinds_of_requests_no_longer_differ_along_the_direction(llama):
    both = [requests("harmful"), requests("harmless")]
    directions = refusal_directions(llama, [both[0]], [both[1]], ThreatModel([2]))
    means = []
    for found in both:
        given = Ablation(directions, selected_ranks(found, "prompt"))
        rank = selected_ranks(found, "prompt").sum(1) - 1
        means.append(states_after(llama, 2, found, given)[torch.arange(3), rank].mean(0))
    # The whole difference of the means lies along the direction.
    assert (means[0] - means[1]).norm() < 1e-4


def test_measuring_a_direction_leaves_the_model_as_it_was_also_when_it_is_refused():
    model = tiny_model(attention_dropout=0.5).train()
    before = state_of(model)
    threat = ThreatModel(["embedding", 1])
    found = [refusal_directions(model, [requests("harmful")], [requests("harmless")], threat) for _ in range(2)]
    assert torch.equal(found[0][1], found[1][1])  # without dropout
    assert not found[0][1].requires_grad
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="same mean hidden states at embedding"):
        refusal_directions(model, [requests("harmful")], [requests("harmful")], threat)
    assert_unchanged(model, before)


def test_requests_without_a_prompt_are_refused(llama):
    found = requests("harmless")
    found["labels"][1] = found["input_ids"][1].masked_fill(found["attention_mask"][1] == 0, -100)
    with pytest.raises(ValueError, match="a row has no prompt"):
        refusal_directions(llama, [requests("harmful")], [found], ThreatModel([1]))


# Pairs


def stacked(side):
    """A batch of pairs as DPO has it, the chosen completions above the rejected ones, and the two halves."""
    made = rows()
    pairs = [[(prompt, completion) for prompt, completion, _ in made], [(prompt, away) for prompt, _, away in made]]
    return collate(pairs[0] + pairs[1], side), [collate(half, side) for half in pairs]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["perturbation", "ablation"])
def test_two_copies_give_both_halves_of_a_pair_the_same_change(llama, kind, side):
    both, halves = stacked(side)
    selected = selected_ranks(halves[0], "prompt")
    if kind == "ablation":
        given = Ablation({"embedding": direction_at(0), 2: direction_at(1)}, selected)
    else:
        generator = torch.Generator().manual_seed(0)
        deltas = {site: torch.randn(*selected.shape, HIDDEN, generator=generator) for site in ("embedding", 2)}
        given = Perturbation(deltas, selected)
    positions = [ranks(part["attention_mask"]) for part in (both, *halves)]
    with given.installed(llama, copies=2):
        together = logits(llama, both, position_ids=positions[0])
    plain = logits(llama, both, position_ids=positions[0])
    for number, half in enumerate(halves):
        with given.installed(llama):
            alone = logits(llama, half, position_ids=positions[number + 1])
        for row in range(4):
            # Padding is as wide as the longer half makes it, so compare the real tokens.
            one = together[4 * number + row][both["attention_mask"][4 * number + row].bool()]
            other = alone[row][half["attention_mask"][row].bool()]
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            untouched = plain[4 * number + row][both["attention_mask"][4 * number + row].bool()]
            assert (one - untouched).abs().max() > 1e-2


def test_a_forward_pass_that_does_not_hold_the_copies_is_refused_with_both_numbers(llama):
    both, halves = stacked("right")
    selected = selected_ranks(halves[0], "prompt")
    given = Perturbation({1: torch.ones(*selected.shape, HIDDEN)}, selected)
    with given.installed(llama, copies=2):
        with pytest.raises(RuntimeError, match="4 rows reached a perturbation of 4 rows x 2"):
            logits(llama, halves[0])
        logits(llama, both)
    with given.installed(llama), pytest.raises(RuntimeError, match="8 rows reached a perturbation of 4 rows,"):
        logits(llama, both)


def test_the_swapped_search_finds_one_delta_a_pair_and_needs_the_references(llama):
    found = batch(away=True)
    with pytest.raises(ValueError, match="lacks `ref_log_probs` or `away_ref_log_probs`"):
        find_perturbation(llama, found, THREAT, objective="swapped")
    found |= {"ref_log_probs": torch.full((4,), -9.0), "away_ref_log_probs": torch.full((4,), -9.0)}
    worst = find_perturbation(llama, found, THREAT, objective="swapped", steps=3)
    assert worst.deltas[1].shape == (4, 7, HIDDEN)
    assert worst.losses[-1] < worst.losses[0]
    with pytest.raises(ValueError, match=r"'swapped', but the batch lacks \['away_input_ids'"):
        find_perturbation(llama, batch(), THREAT, objective="swapped")


def test_a_site_where_all_prompts_end_alike_has_no_direction_and_the_others_have_theirs():
    model = shared_model("llama")
    harmful, harmless = batch(4, seed=1), batch(4, seed=2)
    for found in (harmful, harmless):
        last = (found["labels"] != -100).int().argmax(-1) - 1  # as a chat template ends every prompt
        found["input_ids"][torch.arange(4), last] = 5
    directions = refusal_directions(model, [harmful], [harmless], ThreatModel(["embedding", 1, 2]))
    assert set(directions) == {1, 2}
    with pytest.raises(ValueError, match="at embedding, so there is no refusal direction"):
        refusal_directions(model, [harmful], [harmless], ThreatModel(["embedding"]))
