"""What a run may do differently: the reference code's way, another divergence, other adversaries."""

import pytest
import torch
from runs import ATTACK, EVERYTHING, assert_same, benign_data, distance, losses, make, train, trained, weights
from tiny import lora, preference_data, tiny_model
from transformers import TrainerCallback

from trl_robust import LATSFTConfig
from trl_robust.inner import Ablation, Perturbation
from trl_robust.threat import decoder_layers
from trl_robust.trainers import adversary

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
TWO_OF_FOUR = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 3}


def changes_of(trainer):
    """The change that is installed in every forward pass of `compute_loss`, and the tokens of its rows."""
    seen, real = [], trainer.compute_loss

    def compute(model, inputs, *args, **kwargs):
        seen.append((trainer.adversary.current, inputs["input_ids"]))
        return real(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute
    return seen


def resumed_is_whole(folder, **settings):
    """Trains five updates, and again the last two from the checkpoint after three; gives the whole run."""
    settings = {**settings, "max_steps": 5}
    whole = train(folder / "whole", **settings, **SAVING)
    resumed = make(folder / "resumed", **settings)
    torch.rand(99)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    assert_same(weights(resumed), weights(whole))
    for key in ("loss", "attack_loss_after", "forward_passes"):
        assert losses(resumed, key) == losses(whole, key), key
    return whole


# The reference code's way


class Counters(TrainerCallback):
    """How many steps AdamW thinks it has made, after every update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        counted = {int(entry["step"]) for entry in optimizer.state.values()}
        assert len(counted) == 1
        self.seen.append(counted.pop())


@pytest.mark.parametrize("updates", [1, 2])
def test_faithful_trains_the_last_micro_batch_of_an_accumulated_step_under_attack_and_no_other(
    tmp_path, attacks_made, updates
):
    trainer = make(
        tmp_path,
        **ATTACK,
        faithful=True,
        updates_per_attack=updates,
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    seen = changes_of(trainer)
    trainer.train()
    assert len(seen) == 16 and len(attacks_made) == 4 // updates
    for number, (change, tokens) in enumerate(seen):
        if number % 4 < 3:
            assert change is None
        else:
            batch, _, _, found = attacks_made[number // 4 // updates]
            assert change is found and torch.equal(tokens, batch["away_input_ids"])


def test_the_last_micro_batch_of_a_step_that_an_epoch_cuts_short_is_attacked_too(tmp_path):
    settings = {**ATTACK, **TWO_OF_FOUR, "data": preference_data(6), "max_steps": -1, "num_train_epochs": 2}
    trainer = make(tmp_path, **settings, faithful=True)
    seen = changes_of(trainer)
    trainer.train()
    assert [change is not None for change, _ in seen] == [False, True, True] * 2


def test_faithful_divides_coefficients_by_their_sum_as_published():
    def settings(**changes):
        return LATSFTConfig(
            "unused", use_cpu=True, bf16=False, faithful=True, toward_coef=0.5, away_coef=0.5, **changes
        )

    # lat.md 3: {sft 1.5, toward .5, away .5} and {kl .1, toward .5, away .5}
    assert settings(sft_coef=1.5).weights(True) == pytest.approx({"toward": 0.2, "away": 0.2, "sft": 0.6, "kl": 0.0})
    rounded = {name: round(value, 3) for name, value in settings(sft_coef=0.0, kl_coef=0.1).weights(True).items()}
    assert rounded == {"toward": 0.455, "away": 0.455, "sft": 0.0, "kl": 0.091}
    # Without benign rows their coefficients take no share.
    assert settings(sft_coef=1.5).weights(False) == {"toward": 0.5, "away": 0.5}
    assert settings(attack_toward_coef=1.0, attack_away_coef=3.0).attack_weights == (0.25, 0.75)
    plain = LATSFTConfig("unused", use_cpu=True, bf16=False, toward_coef=0.5, sft_coef=1.5, attack_away_coef=3.0)
    assert plain.weights(True) == {"toward": 0.5, "away": 0.0, "sft": 1.5, "kl": 0.0}
    assert plain.attack_weights == (1.0, 3.0)


def test_faithful_trains_on_the_divided_terms_and_attacks_with_divided_weights_and_decay(tmp_path, attacks_made):
    settings = {**EVERYTHING, "benign": benign_data(), "dropout": None, "max_steps": 2}
    trainer = train(tmp_path, **settings, model=lora(tiny_model()), faithful=True)
    total = 1.0 + 0.5 + 0.7 + 0.3
    for log in trainer.state.log_history[:2]:
        expected = log["toward_loss"] + 0.5 * log["away_loss"] + 0.7 * log["sft_loss"] + 0.3 * log["kl_loss"]
        assert log["loss"] == pytest.approx(expected / total, rel=1e-4)
        assert log["kl_loss"] == pytest.approx(1.0, abs=1e-3)  # D8
        assert log["kl_divergence"] > 1e-2
    plain = train(tmp_path, **settings, model=lora(tiny_model()))
    assert plain.state.log_history[0]["kl_loss"] == pytest.approx(
        trainer.state.log_history[0]["kl_divergence"], rel=1e-3
    )
    faithful, own = attacks_made[0][2], attacks_made[2][2]
    assert (faithful["toward_coef"], faithful["away_coef"]) == pytest.approx((2 / 3, 1 / 3))
    assert (own["toward_coef"], own["away_coef"]) == (1.0, 0.5)
    assert (faithful["weight_decay"], own["weight_decay"]) == (0.01, 0.0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"updates_per_attack": 2}, [1, 2, 3, 4, 5]),
        ({"reset_optimizer": True}, [1, 1, 1, 1, 1]),
        ({"faithful": True}, [1, 1, 1, 1, 1]),
        ({"reset_optimizer": True, "updates_per_attack": 2}, [1, 2, 1, 2, 1]),
        ({"faithful": True, "updates_per_attack": 3}, [1, 2, 3, 1, 2]),
        ({"reset_optimizer": True, "updates_per_attack": 2, "attack_radius": 0.0}, [1, 2, 1, 2, 1]),
    ],
    ids=str,
)
def test_the_optimiser_forgets_its_state_before_every_attack_only_where_that_is_asked_for(
    tmp_path, changes, expected, accumulation
):
    counters = Counters()
    settings = {**ATTACK, **changes, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    train(tmp_path, **settings, max_steps=5, callbacks=[counters])
    assert counters.seen == expected


@pytest.mark.parametrize("updates", [1, 2])
def test_faithful_is_the_fixed_training_where_none_of_the_differences_can_show(tmp_path, updates):
    """One micro-batch, no divergence, coefficients that sum to 1, a search without AdamW, the optimiser reset."""
    settings = {**ATTACK, "toward_coef": 0.5, "away_coef": 0.5, "attack_toward_coef": 0.5, "attack_away_coef": 0.5}
    settings |= {"attack_optimizer": "steepest", "updates_per_attack": updates}
    faithful = train(tmp_path, **settings, faithful=True)
    fixed = train(tmp_path, **settings, reset_optimizer=True)
    assert_same(weights(faithful), weights(fixed))
    assert losses(faithful) == losses(fixed)


@pytest.mark.parametrize("more", [{"toward_coef": 1.0}, {"attack_optimizer": "adamw"}, TWO_OF_FOUR], ids=str)
def test_each_difference_of_faithful_training_shows_as_soon_as_it_can(tmp_path, more):
    settings = {**ATTACK, "toward_coef": 0.5, "away_coef": 0.5, "attack_toward_coef": 0.5, "attack_away_coef": 0.5}
    settings |= {"attack_optimizer": "steepest", **SGD, "dropout": 0.0}
    faithful, fixed = (trained(train(tmp_path, **{**settings, **more}, faithful=switch)) for switch in (True, False))
    assert distance(faithful, fixed) > 1e-8


@pytest.mark.parametrize("switch", ["faithful", "reset_optimizer"])
def test_a_resumed_run_with_a_reset_optimiser_is_the_run_that_was_not_interrupted(tmp_path, switch):
    settings = {**EVERYTHING, **TWO_OF_FOUR, "benign": benign_data(), "updates_per_attack": 2, switch: True}
    resumed_is_whole(tmp_path, **settings)


# The divergence in its other form


def test_the_log_form_has_the_update_of_the_divergence_divided_by_its_value(tmp_path):
    settings = {**ATTACK, **SGD, "toward_coef": 0.0, "away_coef": 0.0, "sft_coef": 0.0, "kl_coef": 0.5}
    settings |= {"benign": benign_data(), "dropout": None, "learning_rate": 1.0}
    start = trained(make(tmp_path, **settings, model=lora(tiny_model())))
    runs = [
        train(tmp_path, **settings, model=lora(tiny_model()), kl_form=form, max_grad_norm=0.0)
        for form in ("mean", "log")
    ]
    updates = [{name: value - start[name] for name, value in trained(run).items()} for run in runs]
    divergence = losses(runs[0], "kl_loss")[0]
    assert losses(runs[0]) == [pytest.approx(0.5 * divergence, rel=1e-5)]
    assert losses(runs[1]) == [pytest.approx(0.5, rel=1e-3)]
    assert losses(runs[1], "kl_divergence") == [pytest.approx(divergence, rel=1e-5)]
    assert losses(runs[0], "kl_divergence") == []
    scaled = {name: value / divergence for name, value in updates[0].items()}
    assert distance(updates[1], scaled) < 1e-3
    assert max(value.abs().max() for value in updates[1].values()) > 1e-3


def test_the_log_form_begins_at_zero_with_new_adapters_and_is_one_from_then_on(tmp_path):
    trainer = train(tmp_path, **EVERYTHING, benign=benign_data(), dropout=0.0, kl_form="log", max_steps=3)
    found = losses(trainer, "kl_loss")
    assert found[0] == 0.0 and found[1:] == pytest.approx([1.0, 1.0], abs=1e-2)
    assert all(torch.tensor(losses(trainer, "grad_norm")).isfinite())


# Warm starts


def mean_by_rank(perturbations, site):
    """Mean over all rows that have a perturbed token of that rank."""
    width = max(found.selected.shape[1] for found in perturbations)
    mean = torch.zeros(width, perturbations[0].deltas[site].shape[-1])
    for rank in range(width):
        values = [
            found.deltas[site][row, rank]
            for found in perturbations
            if rank < found.selected.shape[1]
            for row in range(found.selected.shape[0])
            if found.selected[row, rank]
        ]
        if values:
            mean[rank] = torch.stack(values).mean(0)
    return mean


@pytest.mark.parametrize("updates", [1, 2])
def test_a_warm_attack_starts_at_the_mean_by_rank_of_the_last_ones_perturbations(tmp_path, attacks_made, updates):
    train(tmp_path, **ATTACK, **TWO_OF_FOUR, attack_init="warm", updates_per_attack=updates, max_steps=2 * updates + 1)
    assert len(attacks_made) == 3 * 2  # three attacks on two micro-batches
    for number, (_, _, settings, found) in enumerate(attacks_made):
        start = settings["start"]
        if number < 2:
            assert start == {} and settings["init"] == "warm"
            continue
        before = [entry[3] for entry in attacks_made[number // 2 * 2 - 2 : number // 2 * 2]]
        assert set(start) == set(found.deltas) == {"embedding", 2}
        for site, mean in start.items():
            torch.testing.assert_close(mean, mean_by_rank(before, site), rtol=1e-5, atol=1e-7)
            assert mean.abs().max() > 1e-2


def test_a_site_that_was_not_attacked_last_time_starts_where_it_was_left(tmp_path, attacks_made):
    settings = {**ATTACK, "attack_sites": ["embedding", "1", "2"], "attack_site_choice": "random"}
    train(tmp_path, **settings, attack_init="warm", max_steps=6)
    last = {}
    for _, _, given, found in attacks_made:
        assert set(given["start"]) == set(last)
        for site, mean in given["start"].items():
            torch.testing.assert_close(mean, mean_by_rank([last[site]], site), rtol=1e-5, atol=1e-7)
        last |= dict.fromkeys(found.deltas, found)
    assert len(last) > 1


# The choice of sites

CANDIDATES = {**ATTACK, "attack_sites": ["embedding", "0", "1", "2"], "attack_num_sites": 2}


def test_random_sites_are_the_same_for_all_micro_batches_of_a_step_and_those_of_the_seed(tmp_path, attacks_made):
    settings = {**CANDIDATES, **TWO_OF_FOUR, "attack_site_choice": "random", "max_steps": 6}
    runs = []
    for seed in ({}, {}, {"seed": 8}):
        attacks_made.clear()
        trainer = train(tmp_path, **settings, **seed)
        chosen = [tuple(found.deltas) for *_, found in attacks_made]
        assert len(chosen) == 12 and chosen[::2] == chosen[1::2]
        assert all(len(sites) == 2 and set(sites) < {"embedding", 0, 1, 2} for sites in chosen)
        runs.append((chosen, trained(trainer)))
        for step, log in enumerate(trainer.state.log_history[:6]):
            shares = {site: log[f"site_share/{site}"] for site in ("embedding", 0, 1, 2)}
            assert shares == {site: float(site in chosen[2 * step]) for site in shares}
            assert all((log[f"delta_norm/{site}"] > 0) == (share > 0) for site, share in shares.items())
    assert len(set(runs[0][0])) > 2
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert_same(runs[0][1], runs[1][1])


def test_the_changes_that_are_installed_are_perturbations_of_the_rows_in_hand(tmp_path, attacks_made):
    trainer = make(tmp_path, **CANDIDATES, **TWO_OF_FOUR, attack_site_choice="gradient", max_steps=2)
    seen = changes_of(trainer)
    trainer.train()
    for (change, tokens), (batch, *_, found) in zip(seen, attacks_made, strict=True):
        assert isinstance(change, Perturbation) and change is found
        assert torch.equal(tokens, batch["away_input_ids"])


def test_every_candidate_has_its_own_unit_where_the_radius_is_relative(tmp_path, attacks_made):
    settings = {**CANDIDATES, "attack_site_choice": "random", "attack_radius": 0.02, "attack_radius_unit": "relative"}
    trainer = train(tmp_path, **settings, max_steps=4)
    assert set(trainer.adversary.median_norms) == {"embedding", 0, 1, 2}
    for _, threat, _, found in attacks_made:
        for site in found.deltas:
            assert threat.radius_at(site) == 0.02 * trainer.adversary.median_norms[site]


def test_gradient_sites_are_those_of_the_largest_gain_of_every_micro_batch(tmp_path, attacks_made):
    from trl_robust import find_perturbation

    trainer = make(
        tmp_path, **CANDIDATES, **TWO_OF_FOUR, attack_site_choice="gradient", max_steps=3, learning_rate=0.0
    )
    trainer.train()
    assert len(attacks_made) == 6
    for batch, threat, settings, found in attacks_made:
        assert settings["num_sites"] == 2 and threat.resolve_sites(trainer.model) == ("embedding", 0, 1, 2)
        again = find_perturbation(trainer.model, batch, threat, **settings)
        assert list(again.deltas) == list(found.deltas) and len(found.deltas) == 2
    for log in trainer.state.log_history[:3]:
        assert sum(log[f"site_share/{site}"] for site in ("embedding", 0, 1, 2)) == 2
    plain = train(tmp_path, **{**ATTACK, "attack_sites": ["embedding", "0", "1", "2"]}, max_steps=1)
    assert "site_share/0" not in plain.state.log_history[0]


@pytest.mark.parametrize(
    "more",
    [
        {"attack_init": "warm"},
        {"attack_init": "warm", "updates_per_attack": 2, **TWO_OF_FOUR},
        {"attack_site_choice": "random", **TWO_OF_FOUR},
        {
            "attack_site_choice": "random",
            "attack_init": "warm",
            "attack_radius": 0.02,
            "attack_radius_unit": "relative",
        },
        {"attack_site_choice": "random", "updates_per_attack": 2},
        {"attack_site_choice": "gradient", "attack_init": "warm"},
        {"attack_optimizer": "sign", "attack_learning_rate": 0.02},
        {"away_loss": "gradient_ascent", "away_cutoff": 5.0, "toward_cutoff": 0.5},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted_bit_for_bit(tmp_path, more):
    sites = CANDIDATES if "attack_site_choice" in more else ATTACK
    resumed_is_whole(tmp_path, **{**sites, **more, "benign": benign_data()})


# The refusal direction

REFUSAL = {"attack_objective": "refusal_direction", "attack_sites": ["embedding", "2"], "refusal_direction_prob": 1.0}


@pytest.fixture
def measured(monkeypatch):
    """Every measuring: the requests of both kinds, and the directions found."""
    made = []
    real = adversary.refusal_directions

    def measure(model, harmful, harmless, threat):
        made.append((harmful, harmless, real(model, harmful, harmless, threat)))
        return made[-1][2]

    monkeypatch.setattr(adversary, "refusal_directions", measure)
    return made


def test_the_refusal_direction_is_gone_from_the_prompts_of_the_training_rows(tmp_path, measured):
    trainer = make(tmp_path, **REFUSAL, away_coef=0.5, benign=benign_data(), dropout=None, max_steps=1)
    layers, seen = decoder_layers(trainer.model), []
    layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: (
            seen.append((args[0] if args else kwargs["hidden_states"]).detach()) if trainer.model.training else None
        ),
        with_kwargs=True,
    )
    given, real = [], trainer.adversary._ablation
    trainer.adversary._ablation = lambda batch, *rest: (given.append(batch), real(batch, *rest))[1]
    trainer.train()
    ((harmful, harmless, directions),) = measured
    assert sum(batch["input_ids"].shape[0] for batch in harmful) == 16  # all rows, up to 32
    assert sum(batch["input_ids"].shape[0] for batch in harmless) == 16
    wanted = {tuple(row["input_ids"]) for row in trainer.train_dataset}
    for batch in harmful:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert tuple(ids[mask.bool()].tolist()) in wanted
    assert len(seen) == 3 and len(given) == 1
    for states, prefix in zip(seen[:2], ("away_", ""), strict=True):
        labels, mask = given[0][f"{prefix}labels"], given[0][f"{prefix}attention_mask"].bool()
        prompt = mask & ((labels != -100).cumsum(1) == 0)
        along = states @ directions[2]
        assert along[prompt].abs().max() < 1e-4
        assert along[mask & ~prompt].abs().max() > 1e-2
    assert (seen[2] @ directions[2]).abs().max() > 1e-2  # the benign rows


@pytest.mark.parametrize(("share", "least", "most"), [(0.5, 25, 55), (0.1, 1, 20), (1.0, 80, 80)])
def test_the_refusal_direction_is_removed_from_that_share_of_the_micro_batches(tmp_path, measured, share, least, most):
    settings = {**REFUSAL, "refusal_direction_prob": share, "benign": benign_data()}
    drawn = []
    for _ in range(2):
        trainer = make(tmp_path, **settings)
        trainer.model.train()
        batch = trainer._attack_batch(next(iter(trainer.get_train_dataloader())))
        seen = []
        for step in range(20):
            for _ in range(4):
                with trainer.adversary.attacking(batch, step, 4):
                    seen.append(trainer.adversary.current)
        assert all(change is None or isinstance(change, Ablation) for change in seen)
        drawn.append([change is not None for change in seen])
    assert least <= sum(drawn[0]) <= most
    assert drawn[0] == drawn[1]
    assert len(measured) == 2 * 5  # after every fourth update, drawn or not


def test_the_refusal_direction_is_measured_anew_every_so_many_updates(tmp_path, measured):
    settings = {**REFUSAL, "benign": benign_data(), "learning_rate": 3e-2, **TWO_OF_FOUR}
    trainer = make(tmp_path, **settings, refusal_direction_every=2, max_steps=5)
    seen = changes_of(trainer)
    trainer.train()
    assert len(measured) == 3
    for number, (change, _) in enumerate(seen):
        assert change.directions[2] is measured[number // 4][2][2]  # two updates of two micro-batches each
    assert not torch.equal(measured[0][2][2], measured[1][2][2])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_run_resumed_between_two_measurings_does_not_measure_and_is_the_whole_run(tmp_path, measured, share):
    settings = {**REFUSAL, "benign": benign_data(), "refusal_direction_every": 4, "refusal_direction_prob": share}
    whole = train(tmp_path / "whole", **settings, max_steps=6, **SAVING)
    assert len(measured) == 2
    resumed = make(tmp_path / "resumed", **settings, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(measured) == 3  # after four updates
    assert_same(weights(resumed), weights(whole))
    assert losses(resumed) == losses(whole)


def test_the_refusal_direction_needs_benign_rows_and_no_weight_on_them(tmp_path):
    with pytest.raises(ValueError, match=r"`attack_objective: refusal_direction`.*no `benign_dataset`"):
        make(tmp_path, **REFUSAL)
    trainer = train(tmp_path, **REFUSAL, benign=benign_data(), sft_coef=0.0, max_steps=2)
    assert len(losses(trainer)) == 2 and not losses(trainer, "sft_loss")


# Evaluation

IN_EVALUATION = {
    "random start": {**ATTACK, "attack_init": "random"},
    "warm start": {**ATTACK, "attack_init": "warm"},
    "random sites": {**CANDIDATES, "attack_site_choice": "random"},
    "gradient sites": {**CANDIDATES, "attack_site_choice": "gradient"},
    "refusal direction": {**REFUSAL, "attack_sites": ["embedding", "0", "1", "2"], "attack_site_choice": "random"},
}


@pytest.mark.parametrize("name", IN_EVALUATION)
def test_evaluation_under_attack_gives_the_same_number_whenever_it_is_asked(tmp_path, name):
    settings = {**IN_EVALUATION[name], "benign": benign_data(), "eval_dataset": preference_data(8, seed=9)}
    settings |= {"eval_under_attack": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer = train(tmp_path, **settings, dropout=0.0, max_steps=4)
    found = [*losses(trainer, "eval_loss"), trainer.evaluate()["eval_loss"]]
    assert len(found) == 5 and found == [found[0]] * 5


@pytest.mark.parametrize("name", IN_EVALUATION)
def test_evaluation_under_attack_changes_nothing_in_training(tmp_path, name):
    settings = {**IN_EVALUATION[name], "benign": benign_data(), "eval_dataset": preference_data(8, seed=9)}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 3}
    runs = [train(tmp_path, **settings, eval_under_attack=switch) for switch in (False, True)]
    assert_same(weights(runs[0]), weights(runs[1]))
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0], "eval_loss") != losses(runs[1], "eval_loss")
