"""The search for the longest perturbation that a loss hardly notices (lap.md 13, items 6 to 9 and 13)."""

import math

import pytest
import torch
from tiny import ARCHITECTURES, HIDDEN, LAYERS, batch, collate, lora, row_of, rows, shared_model, tiny_model
from watch import assert_unchanged, state_of

from trl_robust import find_paraphrase, find_perturbation
from trl_robust.inner import Perturbation
from trl_robust.inner.terms import completion_term
from trl_robust.objectives import PreferenceLoss, label_logits
from trl_robust.threat import decoder_layers
from trl_robust.threat.positions import ranks

SETTINGS = {"layer": 1, "epsilon": 0.2, "steps": 6}


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@torch.no_grad()
def hidden(model, found):
    tokens = {key: found[key] for key in ("input_ids", "attention_mask")}
    return model(**tokens, output_hidden_states=True).hidden_states


def losses_under(model, found, paraphrase):
    with paraphrase.installed(model), torch.no_grad():
        made = label_logits(model, found["input_ids"], found["attention_mask"], found["labels"])
        return completion_term(found).row_losses(made)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_stays_within_epsilon_and_the_perturbation_is_long_on_every_architecture(name):
    model, found = shared_model(name), batch()
    paraphrase = find_paraphrase(model, found, **SETTINGS, generator=seeded())
    assert paraphrase.feasible.all()
    clean = losses_under(model, found, Perturbation({1: torch.zeros_like(paraphrase.delta)}, paraphrase.selected))
    assert torch.allclose(paraphrase.clean_losses, clean, atol=1e-5)
    assert torch.allclose(losses_under(model, found, paraphrase), paraphrase.perturbed_losses, atol=1e-4)
    assert ((paraphrase.perturbed_losses - clean).abs() <= 0.2 + 1e-4).all()
    # Steps of 5 % of the hidden states' norm: it has gone somewhere.
    assert (paraphrase.relative_norms > 0.05).all()


def test_lap_13_6_without_steps_the_logits_are_bit_equal(llama):
    found = batch()
    paraphrase = find_paraphrase(llama, found, layer=1, epsilon=0.2, steps=0)
    assert paraphrase.delta.abs().max() == 0
    expected = llama(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
    with paraphrase.installed(llama):
        assert torch.equal(
            llama(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits, expected
        )


@pytest.mark.parametrize("site", ["embedding", 0, LAYERS - 1])
def test_lap_13_6_what_is_installed_is_added_to_the_stream_that_leaves_the_layer(llama, site):
    found = batch()
    paraphrase = find_paraphrase(llama, found, layer=site, epsilon=0.5, steps=2, positions="all", generator=seeded())
    placed = paraphrase.delta.gather(
        1, ranks(found["attention_mask"]).clamp(max=paraphrase.delta.shape[1] - 1).unsqueeze(-1).expand(-1, -1, HIDDEN)
    )
    inside = ranks(found["attention_mask"]) < paraphrase.delta.shape[1]
    placed = placed * (inside & found["attention_mask"].bool()).unsqueeze(-1)
    layers = decoder_layers(llama)

    def add(module, args, output):
        return output + placed

    hook = (llama.get_input_embeddings() if site == "embedding" else layers[site]).register_forward_hook(add)
    expected = llama(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
    hook.remove()
    with paraphrase.installed(llama):
        seen = llama(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
    real = found["attention_mask"].bool()
    assert torch.allclose(seen[real], expected[real], atol=1e-6)


@pytest.mark.parametrize("positions", ["prompt", "completion", "all", "last_user", "all_user"])
def test_lap_13_7_nothing_is_put_where_the_loss_does_not_look(llama, positions):
    found = batch()
    found["last_user_span"] = torch.tensor([[1, 3], [0, 1], [4, 6], [1, 2]])
    found["user_spans"] = torch.tensor([[[0, 1], [1, 3]], [[0, 1], [0, 0]], [[0, 2], [4, 6]], [[1, 2], [0, 0]]])
    paraphrase = find_paraphrase(llama, found, **SETTINGS, positions=positions, generator=seeded())
    moved = paraphrase.delta.abs().sum(-1) > 0
    assert torch.equal(moved, paraphrase.selected)
    rank = torch.arange(moved.shape[1])
    prompts = torch.tensor([len(prompt) for prompt, _, _ in rows(4)]).unsqueeze(-1)
    lengths = found["attention_mask"].sum(-1, keepdim=True)
    spans = found["last_user_span"].unsqueeze(1) if positions == "last_user" else found["user_spans"]
    in_spans = ((rank >= spans[..., :1]) & (rank < spans[..., 1:])).any(1)
    expected = {
        "prompt": rank < prompts,
        "completion": (rank >= prompts) & (rank < lengths - 1),
        "all": rank < lengths - 1,
    }.get(positions, in_spans)
    assert torch.equal(moved, expected)


def test_lap_13_7_the_gradient_is_exactly_zero_from_the_last_label_on(llama):
    found = batch()
    whole = torch.ones_like(found["attention_mask"]).bool()
    deltas = torch.zeros(*whole.shape, HIDDEN, requires_grad=True)
    perturbation = Perturbation({1: deltas}, whole)
    with perturbation.installed(llama):
        made = label_logits(llama, found["input_ids"], found["attention_mask"], found["labels"])
        (gradient,) = torch.autograd.grad(completion_term(found).row_losses(made).sum(), deltas)
    seen = gradient.abs().sum(-1) > 0
    last = found["attention_mask"].sum(-1, keepdim=True) - 1
    assert torch.equal(seen, torch.arange(whole.shape[1]) < last)


@pytest.mark.parametrize("preset", ["robust", "paper", "paper_rms"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_lap_13_8_a_batch_is_its_rows_one_by_one_on_either_side_of_the_padding(llama, preset, side):
    found = batch(side=side)
    settings = {"layer": 1, "epsilon": 0.2, "steps": 4, "preset": preset}
    whole = find_paraphrase(llama, found, **settings, generator=seeded())
    for number in range(4):
        alone = find_paraphrase(llama, row_of(found, number), **settings, generator=seeded())
        width = alone.delta.shape[1]
        scale = alone.delta.norm()
        assert (whole.delta[number, :width] - alone.delta[0]).norm() < 1e-3 * scale
        assert whole.delta[number, width:].abs().max() == 0 if width < whole.delta.shape[1] else True
        assert math.isclose(whole.log_lambda[number], alone.log_lambda[0], abs_tol=1e-4)


def test_lap_13_9_the_model_is_left_as_it_was_also_after_an_exception(monkeypatch):
    model = lora(tiny_model(), dropout=0.5).train()
    before = state_of(model)
    find_paraphrase(model, batch(), **SETTINGS)
    assert_unchanged(model, before)
    from trl_robust.inner import lagrangian

    def fail(self, losses):
        raise RuntimeError("stop")

    monkeypatch.setattr(lagrangian.ConstrainedSearch, "_loss_gradients", fail)
    with pytest.raises(RuntimeError, match="stop"):
        find_paraphrase(model, batch(), **SETTINGS)
    assert_unchanged(model, before)


def test_lap_13_9_dropout_is_off_inside():
    model = lora(tiny_model(), dropout=0.9).train()
    first, second = (find_paraphrase(model, batch(), **SETTINGS, generator=seeded()) for _ in range(2))
    assert torch.equal(first.delta, second.delta)
    assert torch.equal(first.clean_losses, second.clean_losses)


def test_lap_13_13_a_seed_decides_the_result_and_another_gives_another(llama):
    found = batch()
    one, same, other = (find_paraphrase(llama, found, **SETTINGS, generator=seeded(n)) for n in (0, 0, 1))
    assert torch.equal(one.delta, same.delta) and one.history == same.history
    assert not torch.allclose(one.delta, other.delta, atol=1e-3)


def test_the_history_has_an_entry_for_every_step_and_begins_at_the_start(llama):
    paraphrase = find_paraphrase(llama, batch(), **SETTINGS, preset="paper_rms", generator=seeded())
    assert {len(values) for values in paraphrase.history.values()} == {6}
    assert all(math.isfinite(value) for values in paraphrase.history.values() for value in values)
    assert paraphrase.history["lambda"][:2] == pytest.approx([0.1, 0.1])
    assert paraphrase.history["norm"][0] < 2e-3 < 0.04 < paraphrase.history["norm"][1]
    lengths = paraphrase.history["length"]
    counts = paraphrase.selected.sum(-1) * HIDDEN
    assert lengths[0] == pytest.approx((paraphrase.history["rms"][0] * counts.sqrt()).mean().item(), rel=0.3)
    assert len(paraphrase.losses) == 7


def test_the_robust_preset_is_capped_at_the_norm_of_every_hidden_state(llama):
    found = batch()
    paraphrase = find_paraphrase(
        llama, found, layer=1, epsilon=1e6, steps=8, learning_rate=1.0, token_cap=0.5, generator=seeded()
    )
    states = llama(**{k: found[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True).hidden_states[
        2
    ]
    width = paraphrase.selected.shape[1]
    share = paraphrase.delta.norm(dim=-1) / states[:, :width].norm(dim=-1)
    assert share[paraphrase.selected].max() <= 0.5 + 1e-5
    assert share[paraphrase.selected].max() > 0.49


def test_several_layers_share_one_multiplier_and_count_each_in_its_own_size(llama):
    found = batch()
    both = find_paraphrase(llama, found, layer=[0, 2], epsilon=0.2, steps=6, generator=seeded())
    assert set(both.deltas) == {0, 2} and both.log_lambda.shape == (4,)
    assert both.feasible.all()
    with pytest.raises(ValueError, match="take them from `deltas`"):
        _ = both.delta
    # On a loss that never binds, the first steps grow each layer in proportion to its hidden states.
    free = find_paraphrase(llama, found, layer=[0, 2], epsilon=1e6, steps=1, generator=seeded(), lambda_init=0.0)
    states = hidden(llama, found)
    width = free.selected.shape[1]
    for row in range(4):
        chosen = free.selected[row, :, None]
        shares = [
            (free.deltas[site][row].norm() / (states[site + 1][row, :width] * chosen).norm()).item() for site in (0, 2)
        ]
        assert shares[0] == pytest.approx(shares[1], rel=0.3)  # but for what the start drew
        # Equal budget: together they are as long as one layer alone would be after one step of 5 %.
        assert sum(share**2 for share in shares) ** 0.5 == pytest.approx(0.05, rel=0.05)
        assert free.relative_norms[row].item() == pytest.approx(0.05, rel=0.05)


def test_a_pair_shares_one_perturbation_under_its_preference_loss(llama):
    found = batch(away=True)
    reference = {"ref_log_probs": torch.full((4,), -9.0), "away_ref_log_probs": torch.full((4,), -9.0)}
    preference = PreferenceLoss(beta=0.5)
    paraphrase = find_paraphrase(
        llama, {**found, **reference}, layer=1, epsilon=0.1, steps=6, preference=preference, generator=seeded()
    )
    assert paraphrase.feasible.all() and paraphrase.delta.shape[0] == 4
    log_probs = []
    for prefix in ("", "away_"):
        keys = [found[f"{prefix}{key}"] for key in ("input_ids", "attention_mask", "labels")]
        with paraphrase.installed(llama), torch.no_grad():
            made = label_logits(llama, *keys)
        log_probs.append(
            made.row_sums(made.logits.log_softmax(-1).gather(-1, made.targets.unsqueeze(-1)).squeeze(-1)) + 9.0
        )
    expected = preference(*log_probs, torch.ones(4), torch.ones(4))
    assert torch.allclose(paraphrase.perturbed_losses, expected, atol=1e-4)
    with pytest.raises(ValueError, match="`preference` is given, but the batch lacks"):
        find_paraphrase(llama, found, layer=1, epsilon=0.1, steps=1, preference=preference)


def test_checkpointing_changes_no_bit():
    model = tiny_model()
    expected = find_paraphrase(model, batch(), **SETTINGS, generator=seeded())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = find_paraphrase(model, batch(), **SETTINGS, generator=seeded())
    assert torch.equal(found.delta, expected.delta)


def test_entries_that_the_cast_to_bfloat16_loses_are_counted():
    model, found = tiny_model().bfloat16(), batch()
    long = find_paraphrase(model, found, layer=1, epsilon=5.0, steps=4, generator=seeded())
    tiny = find_paraphrase(model, found, layer=1, epsilon=5.0, steps=1, learning_rate=1e-6, generator=seeded())
    assert long.delta.dtype == torch.float32
    assert long.cast_lost < 0.2 < 0.5 < tiny.cast_lost
    exact = find_paraphrase(tiny_model(), found, layer=1, epsilon=5.0, steps=4, generator=seeded())
    assert exact.cast_lost == 0


def test_the_cost_is_that_of_the_layers_that_run(llama):
    found = batch()
    # One clean pass of all layers; then the two above layer 1 after each step, with backward passes from all but the
    # last.
    paraphrase = find_paraphrase(llama, found, layer=1, epsilon=1e6, steps=3, generator=seeded())
    assert paraphrase.forward_passes == 4 * (1 + 0.5 * (3 * 2 - 1))


def test_the_paraphrase_is_longer_at_the_same_loss_than_an_attack_that_raises_it(llama):
    found = batch()
    paraphrase = find_paraphrase(llama, found, layer=1, epsilon=0.2, steps=30, generator=seeded())
    from trl_robust import ThreatModel

    radius = 0.5 * paraphrase.norms[1]
    attack = find_perturbation(
        llama, found, ThreatModel([1], radius=radius), objective="untargeted", steps=8, optimizer="steepest"
    )
    # Half as long, the attack has moved the loss further.
    assert (
        -attack.losses[-1] - paraphrase.clean_losses.mean()
        > (paraphrase.perturbed_losses - paraphrase.clean_losses).abs().mean()
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epsilon": 0.0}, "`epsilon` is 0.0"),
        ({"steps": -1}, "`steps` is -1"),
        ({"layer": 9}, "Layer 9 does not exist"),
        ({"positions": "last_user"}, "needs `last_user_span`"),
        ({"delta_opt": "sgd"}, "`delta_opt` is no setting"),
    ],
)
def test_what_cannot_be_is_refused(llama, changes, said):
    with pytest.raises(ValueError, match=said):
        find_paraphrase(llama, batch(), **{**SETTINGS, **changes})


def test_a_batch_without_a_token_to_perturb_is_refused(llama):
    found = collate([([], [7, 8, 9])])
    with pytest.raises(ValueError, match="No token of the batch may be perturbed"):
        find_paraphrase(llama, found, **SETTINGS)
