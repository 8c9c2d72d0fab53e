"""A run that was interrupted and resumed is the run that was not (lat.md 9, item 10)."""

import json

import pytest
import torch
from runs import ATTACK, EVERYTHING, assert_same, benign_data, distance, losses, make, train, weights

SETTINGS = {
    "lora dropout": {},
    "full": {"dropout": None},
    "relative radius and random start": {
        "attack_radius": 0.02,
        "attack_radius_unit": "relative",
        "attack_init": "random",
    },
    "random control": {"attack_objective": "random"},
    "between two updates against one perturbation": {
        "updates_per_attack": 2,
        "attack_init": "random",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "between two updates, relative": {
        "updates_per_attack": 2,
        "attack_radius": 0.03,
        "attack_radius_unit": "relative",
    },
    "over the end of an epoch": {"per_device_train_batch_size": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_lat_9_10_resuming_reproduces_losses_and_weights_bit_for_bit(tmp_path, name):
    settings = {**EVERYTHING, "benign": benign_data(), "max_steps": 5, **SETTINGS[name]}
    whole = train(tmp_path / "whole", **settings, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = make(tmp_path / "resumed", **settings)
    torch.rand(99)  # what the process that resumes has drawn by then must not matter
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed), weights(whole))
    for key in (
        "loss",
        "toward_loss",
        "away_loss",
        "kl_loss",
        "attack_loss_after",
        "boundary_fraction",
        "forward_passes",
    ):
        if key in whole.state.log_history[0]:
            assert losses(resumed, key) == losses(whole, key), key
    assert len(losses(resumed)) == 5


def test_a_resumed_run_does_not_measure_its_radius_again(tmp_path, monkeypatch):
    settings = {**ATTACK, "attack_radius": 0.03, "attack_radius_unit": "relative", "max_steps": 4}
    whole = train(tmp_path / "whole", **settings, save_strategy="steps", save_steps=2)
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / "lat_state.json").read_text())
    assert state["schema"] == 1
    radii = {site: 0.03 * state["median_norms"][str(site)] for site in whole.adversary.threat.sites}
    assert whole.adversary.threat.radius == radii  # bit for bit, so that a resumed run has the very same radius
    resumed = make(tmp_path / "resumed", **settings)
    monkeypatch.setattr("trl_robust.trainers.adversary.median_norms", lambda *args: pytest.fail("measured again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.adversary.threat == whole.adversary.threat


def test_perturbations_are_saved_only_where_the_next_update_needs_them(tmp_path):
    settings = {**ATTACK, "updates_per_attack": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    train(tmp_path, **settings)
    found = sorted(path.parent.name for path in tmp_path.glob("checkpoint-*/perturbations-0.safetensors"))
    assert found == ["checkpoint-1", "checkpoint-3"]


def test_forgetting_the_held_perturbations_would_be_seen(tmp_path):
    """The comparison above is one that can fail."""
    settings = {**ATTACK, "updates_per_attack": 2, "max_steps": 4, "attack_init": "random"}
    whole = train(tmp_path / "whole", **settings, save_strategy="steps", save_steps=3)
    held = tmp_path / "whole" / "checkpoint-3" / "perturbations-0.safetensors"
    resumed = make(tmp_path / "resumed", **settings)
    real = resumed._load_from_checkpoint

    def load(*args, **kwargs):
        real(*args, **kwargs)
        for perturbation in resumed.adversary.held:
            for delta in perturbation.deltas.values():
                delta.zero_()

    resumed._load_from_checkpoint = load
    assert held.is_file()
    resumed.train(resume_from_checkpoint=str(held.parent))
    assert distance(weights(resumed), weights(whole)) > 1e-5
