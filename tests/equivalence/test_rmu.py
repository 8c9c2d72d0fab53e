"""LAT on RMU: what is steered, what is kept, what is trained; padding, splitting and resuming change nothing."""

import contextlib

import pytest
import torch
from datasets import Dataset
from runs import STOCK, assert_same, distance, losses, weights
from tiny import lora_config, make_tokenizer, preference_data, tiny_model
from transformers import PrinterCallback

from trl_robust import LATRMUConfig, LATRMUTrainer
from trl_robust.data import DataError, pair_corpora
from trl_robust.inner import Perturbation, hidden_after
from trl_robust.threat import decoder_layers
from trl_robust.trainers import adversary

ATTACK = {"attack_sites": ["1"], "attack_radius": 0.3, "attack_steps": 2}
SGD = {"optim": "sgd", "learning_rate": 1e-3, "max_steps": 1}


def corpora(count=16, topics=("a", "b")):
    rows = preference_data(count)
    forget = [row["prompt"] + row["rejected"] for row in rows]
    texts = {"text": forget, "topic": [topics[number % len(topics)] for number in range(count)]}
    retain = Dataset.from_dict({"text": [row["prompt"] + row["chosen"] for row in rows]})
    return pair_corpora(Dataset.from_dict(texts), retain)


def make(folder, *, model=None, data=None, dropout=None, **changes):
    torch.manual_seed(0)
    settings = {**STOCK, "rmu_layer": "2", "trained_modules": ["down_proj"], "rmu_retain_coef": 10.0, **changes}
    trainer = LATRMUTrainer(
        model=tiny_model() if model is None else model,
        args=LATRMUConfig(str(folder), **settings),
        train_dataset=corpora() if data is None else data,
        processing_class=make_tokenizer(),
        peft_config=None if dropout is None else lora_config(dropout),
    )
    with contextlib.suppress(ValueError):
        trainer.remove_callback(PrinterCallback)
    return trainer


def train(folder, **changes):
    trainer = make(folder, **changes)
    trainer.train()
    return trainer


def changed(trainer, start):
    return {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])}


def test_only_the_named_modules_of_the_named_layers_are_trained(tmp_path):
    trainer = make(tmp_path, **ATTACK)
    start = weights(trainer)
    trainer.train()
    assert changed(trainer, start) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1, 2)}


def test_adapters_are_trained_up_to_the_layer_and_the_base_is_the_model_without_them(tmp_path):
    trainer = make(tmp_path, **ATTACK, dropout=0.0)
    start = weights(trainer)
    trainer.train()
    moved = changed(trainer, start)
    assert moved and all("lora" in name and any(f"layers.{layer}." in name for layer in (0, 1, 2)) for name in moved)
    assert losses(trainer, "retain_loss")[0] == 0.0 and losses(trainer, "retain_loss")[-1] > 0


def test_the_loss_is_what_the_definition_says_under_the_perturbation(tmp_path, monkeypatch):
    found = []
    real = adversary.find_perturbation

    def find(model, batch, threat, **settings):
        found.append((batch, real(model, batch, threat, **settings)))
        return found[-1][1]

    monkeypatch.setattr(adversary, "find_perturbation", find)
    model = tiny_model(seed=3)
    trainer = make(tmp_path, **ATTACK, **SGD, model=tiny_model(seed=3))
    seen = []
    real_step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (seen.append(inputs), real_step(model, inputs, *rest))[1]
    trainer.train()
    ((batch, worst),) = found
    # The adversary goes toward the text to forget and away from the one to retain.
    assert torch.equal(batch["input_ids"], seen[0]["away_input_ids"])
    assert torch.equal(batch["away_input_ids"], seen[0]["input_ids"])
    assert worst.losses[-1] < worst.losses[0]
    with torch.no_grad():
        kept = {}
        hook = decoder_layers(model)[2].register_forward_hook(lambda module, args, output: kept.update(h=output))
        with Perturbation(worst.deltas, worst.selected).installed(model):
            hook.remove()
            hook = decoder_layers(model)[2].register_forward_hook(lambda module, args, output: kept.update(h=output))
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        hook.remove()
    real_tokens = batch["attention_mask"].bool()
    targets = trainer._targets(seen[0]["topic"], kept["h"])[:, None].expand_as(kept["h"])
    expected = (kept["h"][real_tokens] - targets[real_tokens]).square().mean()
    assert losses(trainer, "steering_loss")[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses(trainer, "retain_loss")[0] == 0.0
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_topic_has_one_vector_through_the_whole_run_of_the_given_length_and_another_topic_another(tmp_path):
    """Catches defect D12 of the reference code: a new random target for every batch."""
    trainer = train(tmp_path, **ATTACK, max_steps=3)
    states = torch.zeros(3, 4, 24)
    first = trainer._targets(["a", "b", "a"], states)
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.allclose(first.norm(dim=-1), torch.full((3,), 6.5))
    other = make(tmp_path, **ATTACK)  # a resumed run: nothing but the seed and the name of the topic decides
    assert torch.equal(other._targets(["a", "b", "a"], states), first)
    assert (first > 0).all()
    assert not torch.equal(make(tmp_path, seed=8)._targets(["a"], states), first[:1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part_on_either_side(tmp_path, side):
    """Catches defect D13: padding was attacked and entered both errors."""
    trainer = make(tmp_path, **ATTACK)
    rows = [trainer.train_dataset[number] for number in range(4)]
    alone = []
    trainer.model.train()
    for row in rows:
        alone.append(trainer.compute_loss(trainer.model, trainer.data_collator([row])).item())
    lengths = [len(row["away_input_ids"]) for row in rows]
    inputs = trainer.data_collator(rows)
    if side == "left":
        for prefix in ("", "away_"):
            mask = inputs[f"{prefix}attention_mask"]
            order = torch.argsort(mask, dim=1, stable=True)
            for key in ("input_ids", "attention_mask", "labels"):
                inputs[prefix + key] = inputs[prefix + key].gather(1, order)
    together = trainer.compute_loss(trainer.model, inputs).item()
    expected = sum(loss * length for loss, length in zip(alone, lengths, strict=True)) / sum(lengths)
    assert len(set(lengths)) > 1
    assert together == pytest.approx(expected, rel=1e-4)


def test_four_micro_batches_of_one_give_the_update_of_one_batch_of_four(tmp_path):
    settings = {**ATTACK, **SGD, "dropout": 0.0, "learning_rate": 1.0}
    start = weights(make(tmp_path, **settings))
    updates = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = train(
            tmp_path, **settings, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        after = weights(trainer)
        updates.append({name: after[name] - value for name, value in start.items() if "lora_B" in name})
    assert max(update.abs().max() for update in updates[0].values()) > 1e-4
    for update in updates[1:]:
        assert distance(update, updates[0]) < 1e-5


@pytest.mark.parametrize("more", [{}, {"updates_per_attack": 2}], ids=str)
@pytest.mark.parametrize("dropout", [None, 0.1], ids=["down_proj", "lora"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted_bit_for_bit(tmp_path, more, dropout):
    settings = {**ATTACK, **more, "dropout": dropout, "max_steps": 5}
    whole = train(tmp_path / "whole", **settings, save_strategy="steps", save_steps=3)
    resumed = make(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(resumed), weights(whole))
    assert losses(resumed, "retain_loss")[-2:] == losses(whole, "retain_loss")[-2:]


def test_training_steers_the_forget_rows_and_checkpointing_changes_no_bit(tmp_path):
    settings = {**ATTACK, "trained_modules": [], "max_steps": 10, "learning_rate": 1e-2, "rmu_retain_coef": 1.0}
    runs = [make(tmp_path, **settings, activation_checkpointing=on) for on in (True, False)]
    rows = runs[0].train_dataset
    before = runs[0].evaluate(rows)["eval_steering_loss"]
    for run in runs:
        run.train()
    assert_same(weights(runs[0]), weights(runs[1]))
    assert runs[0].evaluate(rows)["eval_steering_loss"] < 0.9 * before


def test_evaluation_measures_both_terms_with_and_without_the_attack(tmp_path):
    trainer = make(tmp_path, **ATTACK, eval_under_attack=True)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    attacked = trainer.evaluate()
    trainer.args.eval_under_attack = False
    clean = trainer.evaluate()
    assert attacked["eval_loss"] != clean["eval_loss"]
    assert clean["eval_steering_loss"] > 0


def test_the_layers_above_are_not_run_and_the_states_are_those_of_a_whole_pass():
    model = tiny_model()
    tokens = torch.randint(6, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    ran = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    states = hidden_after(model, batch, 1)
    assert ran == [0, 1]
    whole = model(**batch, output_hidden_states=True).hidden_states[2]
    assert torch.equal(states, whole)
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rmu_layer": "9"}, "Layer 9 does not exist"),
        ({"trained_layers": ["3"]}, "go above `rmu_layer`"),
        ({"trained_modules": ["up_prog"]}, "are the end of no module's name"),
        ({"rmu_layer": "embedding"}, "`rmu_layer` names a decoder layer"),
        ({"rmu_steering_coef": -1.0}, "`rmu_steering_coef` is -1.0"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=r"[Ll]ayer|module|rmu") as caught:
        make(tmp_path, **changes)
    assert words in str(caught.value)


def test_rows_that_are_no_corpora_are_refused(tmp_path):
    with pytest.raises(DataError, match="retain"):
        make(tmp_path, data=Dataset.from_dict({"forget": ["w1 w2"], "retain": [""]}))
    with pytest.raises(DataError):
        make(tmp_path, data=Dataset.from_dict({"text": ["w1 w2"]}))
    with pytest.raises(DataError, match="of which it has none"):
        make(tmp_path, attack_positions="prompt")
