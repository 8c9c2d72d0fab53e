"""Defects D13 to D18 of the reference code (lat.md 8), one sentence each that must hold here."""

import re

import pytest
import torch
from datasets import Dataset
from dpo_runs import make as make_dpo
from runs import ATTACK, EVERYTHING, STOCK, assert_same, benign_data, losses, make, train, trained, weights
from test_defects import corpora, make_rmu
from tiny import (
    batch,
    lora_config,
    make_tokenizer,
    preference_data,
    tiny_model,
)

from trl_robust import (
    LATDPOConfig,
    LATDPOTrainer,
    LATRMUConfig,
    LATRMUTrainer,
    LATSFTConfig,
    LATSFTTrainer,
    ThreatModel,
    find_perturbation,
)
from trl_robust.data import DataError, LATDataCollator, generic_label_rows, pair_corpora
from trl_robust.inner import hidden_after
from trl_robust.objectives import away, label_logits, toward


def padded_on_the_left(inputs):
    """The same batch with its padding on the other side."""
    moved = dict(inputs)
    for prefix in ("", "away_"):
        order = torch.argsort(inputs[f"{prefix}attention_mask"], dim=1, stable=True)
        for key in ("input_ids", "attention_mask", "labels"):
            moved[prefix + key] = inputs[prefix + key].gather(1, order)
    return moved


def test_d13_in_rmu_padding_on_either_side_is_neither_attacked_nor_part_of_an_error(tmp_path):
    trainer = make_rmu(tmp_path, attack_optimizer="steepest")  # AdamW would blow rounding up
    trainer.model.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # away from the start, or the retain term would be zero
            parameter.add_(0.01)
    inputs = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    assert (inputs["attention_mask"] == 0).any() and (inputs["away_attention_mask"] == 0).any()
    found = []
    for given in (inputs, padded_on_the_left(inputs)):
        for prefix in ("", "away_"):  # what stands in the padding must not matter
            pads = given[f"{prefix}attention_mask"] == 0
            given = {**given, f"{prefix}input_ids": given[f"{prefix}input_ids"].masked_fill(pads, 9 + len(found))}
        with trainer.adversary.attacking(trainer._attack_batch(given), 0, 1):
            change = trainer.adversary.current
            found.append((trainer.compute_loss(trainer.model, given).item(), change))
    (right, one), (left, other) = found
    assert left == pytest.approx(right, rel=1e-4)
    assert torch.equal(one.selected, other.selected)
    torch.testing.assert_close(one.deltas[1], other.deltas[1], rtol=1e-3, atol=2e-3)
    real = torch.maximum(inputs["attention_mask"].sum(1), inputs["away_attention_mask"].sum(1))
    assert torch.equal(one.selected.sum(1), real)
    # The states at the padding itself are those of a pass without the attack.
    pads = inputs["away_attention_mask"] == 0
    forget = {key: inputs[f"away_{key}"] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        clean = hidden_after(trainer.model, forget, 1)
        with one.installed(trainer.model):
            attacked = hidden_after(trainer.model, forget, 1)
    assert torch.equal(attacked[pads], clean[pads]) and not torch.equal(attacked, clean)


def test_d14_forget_is_forgotten_no_topic_is_dropped_or_doubled_and_empty_lines_are_left_out():
    texts = {"bio": ["b1", "", "b2"], "cyber": ["c1", "c2"]}
    rows = [{"text": text, "topic": topic, "title": "x"} for topic, found in texts.items() for text in found]
    retain = Dataset.from_dict({"text": ["", "r1", " \n", "r2", "r3"], "source": ["wiki"] * 5})
    pairs = pair_corpora(Dataset.from_list(rows), retain)
    assert pairs.column_names == ["forget", "retain", "topic"]
    assert list(zip(pairs["forget"], pairs["topic"], strict=True)) == [
        ("b1", "bio"), ("b2", "bio"), ("c1", "cyber"), ("c2", "cyber")
    ]  # fmt: skip
    assert set(pairs["retain"]) == {"r1", "r2", "r3"}


@pytest.mark.parametrize("limit", [None, 6, 4, 2])
def test_d15_rows_with_generic_labels_have_a_logit_for_every_label_cut_or_not(llama, limit):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    given = [
        ([7, 8, 9, 10, 11], [30, 31, -100, 33, 34]),
        ([12, 13, 14, 15, 16, 17, 18], [40, -100, 42, 43, 44, 45, 46]),
    ]
    data = Dataset.from_dict({"tokens": [tokens for tokens, _ in given], "labels": [labels for _, labels in given]})
    made = LATDataCollator(DataCollatorForLanguageModeling(pad_token_id=0))(list(generic_label_rows(data, limit)))
    for prefix in ("", "away_"):
        kept = label_logits(llama, *(made[f"{prefix}{key}"] for key in ("input_ids", "attention_mask", "labels")))
        values = [
            [label for label in (labels if not prefix else tokens)[1:limit] if label != -100]
            for tokens, labels in given
        ]
        assert kept.targets.tolist() == [label for row in values for label in row]
        assert kept.row_counts.tolist() == list(map(len, values))
        assert len(kept.logits) == len(kept.targets) > 0


def test_d16_a_prompt_that_leaves_no_room_for_its_completion_is_refused_with_its_row(tmp_path):
    long = {"prompt": " ".join(["w1"] * 70), "chosen": " w2", "rejected": " w3"}
    short = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    data = Dataset.from_list([short, long, short, long])
    benign = data.remove_columns("rejected").rename_column("chosen", "completion")
    message = r"has a prompt longer than the limit in 2 rows \(1, 3\): 64 tokens .*Raise `max_length`"
    for maker in (make, make_dpo):
        with pytest.raises(DataError, match=f"train dataset|training|{message}") as caught:
            maker(tmp_path, data=data)
        assert re.search(message, str(caught.value))
        with pytest.raises(DataError, match=f"benign dataset {message}"):
            maker(tmp_path, benign=benign)


def test_d16_rows_without_a_label_are_worth_zero_and_never_not_a_number(tmp_path, llama):
    found = batch(2)
    found["labels"][0] = -100
    kept = label_logits(llama, found["input_ids"], found["attention_mask"], found["labels"])
    for loss in (toward, away):
        means = kept.row_means(loss(kept.logits, kept.targets))
        assert means[0] == 0 and means.isfinite().all()
    worst = find_perturbation(llama, found, ThreatModel([1], radius=0.2, positions="all"), steps=2)
    assert all(torch.tensor(worst.losses).isfinite()) and (worst.deltas[1][0] == 0).all()
    data = Dataset.from_dict({"tokens": [[6, 7, 8], [9, 10, 11]], "labels": [[-100] * 3, [-100] * 3]})
    settings = {"attack_positions": "all", "attack_sites": ["1"], "attack_steps": 1, "attack_radius": 0.2}
    settings |= {"data": data, "per_device_train_batch_size": 1, "max_steps": 2, "dropout": None}
    settings |= {"logging_nan_inf_filter": False}  # which would log a zero in place of it
    for more in ({}, {"toward_cutoff": 0.5}):
        trainer = train(tmp_path, **settings, **more)
        assert losses(trainer) == [0.0, 0.0] and all(value.isfinite().all() for value in weights(trainer).values())


@pytest.mark.parametrize("updates", [1, 2])
def test_d17_every_epoch_brings_every_row_in_a_new_order(tmp_path, updates):
    settings = {**ATTACK, "attack_steps": 1, "updates_per_attack": updates, "learning_rate": 0.0, "dropout": None}
    trainer = make(tmp_path, **settings, data=preference_data(8), max_steps=-1, num_train_epochs=3)
    seen, real = [], trainer.compute_loss

    def compute(model, inputs, *args, **kwargs):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))
        return real(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute
    trainer.train()
    epochs = [seen[start : start + 8 * updates] for start in range(0, 24 * updates, 8 * updates)]
    assert len(seen) == 24 * updates
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_d18_a_checkpoint_holds_what_a_resumed_run_needs_and_training_changes_no_setting(tmp_path):
    settings = {**EVERYTHING, "benign": benign_data(), "max_steps": 3, "attack_init": "random", "report_to": "none"}
    trainer = make(tmp_path / "whole", **settings, save_strategy="steps", save_steps=2)
    given = trainer.args.to_dict()
    trainer.train()
    assert trainer.args.to_dict() == given
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    needed = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    needed |= {"trainer_state.json", "lat_state.json"}
    assert needed <= {path.name for path in checkpoint.iterdir()}
    resumed = make(tmp_path / "resumed", **settings)
    torch.rand(99)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(trained(resumed), trained(trainer))
    assert losses(resumed) == losses(trainer) and len(losses(resumed)) == 3


@pytest.mark.parametrize("config", [LATSFTConfig, LATDPOConfig, LATRMUConfig])
@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
def test_d18_a_trainer_leaves_the_settings_it_is_given_as_they_are(tmp_path, config, adapters):
    more = {
        LATSFTConfig: {},
        LATDPOConfig: {"precompute_ref_log_probs": True},
        LATRMUConfig: {"rmu_layer": "2", "attack_sites": ["1"]},
    }[config]
    args = config(str(tmp_path), **STOCK, **more)
    given = args.to_dict()
    trainer = {LATSFTConfig: LATSFTTrainer, LATDPOConfig: LATDPOTrainer, LATRMUConfig: LATRMUTrainer}[config]
    trainer(
        model=tiny_model(),
        args=args,
        train_dataset=corpora() if config is LATRMUConfig else preference_data(4),
        processing_class=make_tokenizer(),
        peft_config=lora_config() if adapters else None,
    )
    assert args.to_dict() == given


def test_d18_what_is_logged_is_the_mean_over_all_micro_batches_of_a_step(tmp_path):
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = make(tmp_path, **EVERYTHING, **split, benign=benign_data(16))
    recorded, real = {}, trainer._record
    trainer._record = trainer.adversary.record = lambda name, value: (
        recorded.setdefault(name, []).append(float(value)),
        real(name, value),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    for name in ("attack_loss_before", "attack_loss_after", "toward_loss", "away_loss", "sft_loss"):
        assert len(set(recorded[name])) == 4
        assert log[name] == pytest.approx(sum(recorded[name]) / 4, rel=1e-5)
    # The attack's losses are those of the perturbation that is trained against, before and after the search.
    both = zip(recorded["attack_loss_before"], recorded["attack_loss_after"], strict=True)
    assert all(after < before for before, after in both)
