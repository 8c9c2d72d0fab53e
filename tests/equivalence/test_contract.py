"""What every configuration must do: prepare its rows, train, log, save, and be read back."""

import pytest
import torch
from runs import ATTACK, EVERYTHING, STOCK, benign_data, losses, make, train
from tiny import ARCHITECTURES, LAYERS, batch, lora_config, make_tokenizer, preference_data, tiny_model

from trl_robust import LATSFTConfig, LATSFTTrainer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_under_attack(tmp_path, name):
    trainer = train(tmp_path, **EVERYTHING, benign=benign_data(), model=tiny_model(name), dropout=None, max_steps=2)
    for before, after in zip(losses(trainer, "attack_loss_before"), losses(trainer, "attack_loss_after"), strict=True):
        assert after < before
    assert all(torch.tensor(losses(trainer)).isfinite())
    assert len(losses(trainer, "kl_loss")) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"attack_norm": "l1", "attack_radius": 1.0},
        {"attack_norm": "linf", "attack_radius": 0.05},
        {"attack_ball": "sequence"},
        {"attack_positions": "completion"},
        {"attack_positions": "all"},
        {"attack_stream": "mlp", "attack_sites": ["1", "-1"], "activation_checkpointing": False},
        {"attack_radius": 0.05, "attack_radius_unit": "relative"},
        {"attack_optimizer": "steepest", "attack_init": "random"},
    ],
)
def test_every_kind_of_threat_is_trained_against(tmp_path, changes):
    trainer = train(tmp_path, **{**ATTACK, "max_steps": 2, **changes})
    for before, after in zip(losses(trainer, "attack_loss_before"), losses(trainer, "attack_loss_after"), strict=True):
        assert after < before
    assert len(losses(trainer)) == 2


def test_the_last_user_turn_of_conversations_is_perturbed(tmp_path, monkeypatch):
    data = preference_data(conversational=True)
    trainer = make(tmp_path, **ATTACK, data=data, attack_positions="last_user", shuffle_dataset=True, max_steps=2)
    seen = []
    real = trainer.adversary._find

    def find(batch, *draw):
        seen.append((batch, real(batch, *draw)))
        return seen[-1][1]

    monkeypatch.setattr(trainer.adversary, "_find", find)
    trainer.train()
    asked = {row["prompt"][-1]["content"] for row in data}
    tokenizer = make_tokenizer()
    for inputs, found in seen:
        for row in range(4):
            chosen = found.selected[row].nonzero().flatten()
            assert tokenizer.decode(inputs["input_ids"][row, chosen]) in asked
            assert (found.deltas[2][row].abs().sum(-1) > 0).nonzero().flatten().tolist() == chosen.tolist()


@pytest.mark.parametrize("conversational", [False, True])
def test_the_completions_of_a_row_stay_together_also_when_trl_shuffles(tmp_path, conversational):
    data = preference_data(conversational=conversational)
    trainer = make(tmp_path, **ATTACK, data=data, shuffle_dataset=True)
    tokenizer = make_tokenizer()

    def said(ids, labels):
        text = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
        return text.replace("<eos>", "").replace("<asst>", "").split()

    def words(value):
        return (value if isinstance(value, str) else value[-1]["content"]).split()

    pairs = {(tuple(words(row["chosen"])), tuple(words(row["rejected"]))) for row in data}
    made = [
        (tuple(said(row["input_ids"], row["labels"])), tuple(said(row["away_input_ids"], row["away_labels"])))
        for row in trainer.train_dataset
    ]
    assert set(made) == pairs and len(made) == len(data)
    order = [words(row["chosen"]) for row in data]
    assert [list(chosen) for chosen, _ in made] != order  # they were shuffled


def test_benign_rows_reach_the_batches_with_their_labels(tmp_path):
    benign = benign_data(8)
    trainer = make(tmp_path, **EVERYTHING, benign=benign, benign_per_example=2)
    tokenizer = make_tokenizer()
    given = {row["prompt"] + row["completion"] for row in benign}
    seen = []
    for found in trainer.get_train_dataloader():
        rows = found["benign"]
        assert rows["input_ids"].shape[0] == 8
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            completion = tokenizer.decode(ids[labels != -100], skip_special_tokens=True)
            row = next(row for row in benign if row["prompt"] + row["completion"] == text)
            assert row["completion"].strip() == completion
            seen.append(text)
    assert set(seen) == given and {seen.count(text) for text in given} == {4}


def test_benign_rows_without_a_coefficient_are_not_joined(tmp_path):
    trainer = make(tmp_path, benign=benign_data(), sft_coef=0.0)
    assert not any("benign" in name for name in trainer.train_dataset.column_names)


def test_the_saved_adapter_is_read_back_by_peft_and_the_card_names_the_threat(tmp_path):
    from peft import PeftModel

    trainer = train(tmp_path, **ATTACK, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "adapter"))
    read = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    found = batch()
    arguments = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
    assert torch.equal(read(**arguments).logits, trainer.model.eval()(**arguments).logits)
    assert not torch.equal(read(**arguments).logits, tiny_model()(**arguments).logits)
    card = (tmp_path / "checkpoint-2" / "README.md", tmp_path / "README.md")
    text = next(path for path in card if path.is_file() and "## Threat model" in path.read_text()).read_text()
    assert "radius 0.3 (absolute, one ball a token); search: targeted, 2 steps of adamw" in text


def test_a_four_bit_model_has_the_gradient_after_evaluation_that_it_had_before(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "model")
    trainer = LATSFTTrainer(
        model=str(tmp_path / "model"),
        args=LATSFTConfig(str(tmp_path), **{**STOCK, **ATTACK, "eval_under_attack": True, "max_steps": 2}),
        train_dataset=preference_data(),
        eval_dataset=preference_data(4, seed=9),
        processing_class=make_tokenizer(),
        peft_config=lora_config(),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    packed = [module for module in trainer.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(packed) == 7 * LAYERS
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it

    def gradient():
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, dict(inputs))
        return [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]

    before = gradient()
    trainer.evaluate()
    after = gradient()
    assert any(g.abs().max() > 0 for g in before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    trainer.train()
    assert len(losses(trainer)) == 2
