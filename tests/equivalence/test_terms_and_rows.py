"""Other terms of the loss, other rows, part of a model: each as its definition says, and however a batch is split."""

import pytest
import torch
from datasets import Dataset
from runs import ATTACK, EVERYTHING, benign_data, distance, losses, make, train, trained, weights
from tiny import WORDS, lora, preference_data, tiny_model

from trl_robust.data import pair_corpora
from trl_robust.threat import ranks

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}


def by_hand(model, batch, change=None, prefix=""):
    """Log-probabilities `(N, V)` at the labelled tokens of a batch, the tokens, and the row of each."""
    ids, mask, labels = (batch[f"{prefix}{key}"] for key in ("input_ids", "attention_mask", "labels"))
    with torch.no_grad():
        if change is None:
            logits = model(input_ids=ids, attention_mask=mask, position_ids=ranks(mask)).logits
        else:
            with change.installed(model):
                logits = model(input_ids=ids, attention_mask=mask, position_ids=ranks(mask)).logits
    shown = labels[:, 1:] != -100
    return logits[:, :-1][shown].log_softmax(-1), labels[:, 1:][shown], shown.nonzero()[:, 0]


def cross_entropies(model, batch, change=None, prefix=""):
    said, targets, rows = by_hand(model, batch, change, prefix)
    return -said.gather(1, targets[:, None])[:, 0], rows


def unlikelihood(values):
    """`-log(1 - p)` from cross-entropies, 0 where p is below e^-5."""
    return torch.where(values <= 5, -torch.log1p(-torch.exp(-values)), 0.0)


# Gradient ascent and the cut-offs


@pytest.mark.parametrize("away_cutoff", [float("inf"), 3.6])
@pytest.mark.parametrize("toward_cutoff", [0.0, 4.6])
def test_gradient_ascent_and_both_cutoffs_are_those_of_a_computation_by_hand(
    tmp_path, attacks_made, away_cutoff, toward_cutoff
):
    settings = {**ATTACK, "away_coef": 0.5, "away_loss": "gradient_ascent", "learning_rate": 0.0, "max_steps": 1}
    model = lora(tiny_model())
    trainer = train(
        tmp_path, **settings, away_cutoff=away_cutoff, toward_cutoff=toward_cutoff, dropout=None, model=model
    )
    ((batch, _, _, found),) = attacks_made
    terms = {}
    for name, prefix, sign, cutoff in (("toward", "away_", 1, toward_cutoff), ("away", "", -1, away_cutoff)):
        values, rows = cross_entropies(model.eval(), batch, found, prefix)
        total, crossed = 0.0, 0
        for row in range(4):
            mean, count = values[rows == row].mean().item(), int((rows == row).sum())
            # 2405.15589: 0.5 + 0.001 CE below 0.5; -5 - 0.001 CE above 5
            done = mean < cutoff if sign == 1 else mean > cutoff
            crossed += done
            total += count * (sign * (cutoff + 1e-3 * mean) if done else sign * mean)
        terms[name] = total / len(values)
        assert 0 < crossed < 4 if 0 < cutoff < float("inf") else crossed == 0, (name, crossed)
    log = trainer.state.log_history[0]
    assert log["toward_loss"] == pytest.approx(terms["toward"], rel=1e-4)
    assert log["away_loss"] == pytest.approx(terms["away"], rel=1e-4)
    assert log["loss"] == pytest.approx(terms["toward"] + 0.5 * terms["away"], rel=1e-4)


def test_a_completion_that_counts_as_done_is_trained_a_thousand_times_less(tmp_path):
    settings = {
        **ATTACK,
        **SGD,
        "dropout": None,
        "away_loss": "gradient_ascent",
        "away_coef": 1.0,
        "max_grad_norm": 0.0,
        "learning_rate": 10.0,
    }
    start = trained(make(tmp_path, **settings, model=lora(tiny_model())))
    updates = []
    for cutoffs in ({}, {"toward_cutoff": 50.0, "away_cutoff": 0.01}):
        trainer = train(tmp_path, **settings, **cutoffs, model=lora(tiny_model()))
        updates.append({name: value - start[name] for name, value in trained(trainer).items()})
    assert distance({name: 1000 * value for name, value in updates[1].items()}, updates[0]) < 1e-2


# Texts to forget and to retain


def corpora(count=16):
    rows = preference_data(count)
    forget, retain = (
        Dataset.from_dict({"text": [row["prompt"] + row[kind] for row in rows]}) for kind in ("rejected", "chosen")
    )
    return pair_corpora(forget, retain)


UNLEARN = {"attack_sites": ["1"], "attack_positions": "all", "attack_radius": 0.3, "attack_steps": 2}
UNLEARN |= {"attack_away_coef": 1.0, "away_coef": 1.0}


def test_the_adversary_goes_toward_the_text_to_forget_and_the_defence_to_the_one_to_retain(tmp_path, attacks_made):
    model, data = lora(tiny_model()), corpora()
    trainer = train(tmp_path, **UNLEARN, data=data, dropout=None, model=model, learning_rate=0.0, max_steps=1)
    ((batch, _, settings, found),) = attacks_made
    tokenizer, pairs = trainer.processing_class, {(row["forget"], row["retain"]) for row in data}
    for row in range(4):
        forget, retain = (
            tokenizer.decode(batch[f"{prefix}input_ids"][row], skip_special_tokens=True) for prefix in ("", "away_")
        )
        assert (forget, retain) in pairs
    for prefix in ("", "away_"):
        real = batch[f"{prefix}attention_mask"].bool()
        assert torch.equal(batch[f"{prefix}labels"][real], batch[f"{prefix}input_ids"][real])
    assert (settings["objective"], settings["toward_coef"], settings["away_coef"]) == ("targeted", 1.0, 1.0)
    assert found.losses[-1] < found.losses[0]
    retained, _ = cross_entropies(model.eval(), batch, found, "away_")
    forgotten, _ = cross_entropies(model, batch, found)
    log = trainer.state.log_history[0]
    assert log["toward_loss"] == pytest.approx(retained.mean().item(), rel=1e-4)
    assert log["away_loss"] == pytest.approx(unlikelihood(forgotten).mean().item(), rel=1e-4)
    assert log["loss"] == pytest.approx(log["toward_loss"] + log["away_loss"], rel=1e-4)


def test_gradient_ascent_makes_the_text_to_forget_unlikely_and_keeps_the_one_to_retain(tmp_path):
    settings = {**UNLEARN, "away_loss": "gradient_ascent", "away_cutoff": 8.0, "max_steps": 20, "dropout": None}
    trainer = make(tmp_path, **settings, data=corpora(8), learning_rate=3e-3)
    rows = trainer.data_collator([trainer.train_dataset[number] for number in range(8)])
    means = []
    for moment in ("before", "after"):
        if moment == "after":
            trainer.train()
        means.append([cross_entropies(trainer.model.eval(), rows, None, prefix)[0].mean() for prefix in ("", "away_")])
    (retain, forget), (retain_after, forget_after) = means
    assert retain_after < retain - 0.3 and forget_after > forget + 0.3


@pytest.mark.parametrize("kind", ["forget", "labels"])
def test_benign_prompts_are_no_labels_beside_rows_without_prompts(tmp_path, kind):
    """The benign term is the cross-entropy of completions, whatever the rows that the benign ones are joined to."""
    data, benign = corpora() if kind == "forget" else labelled(), benign_data()
    trainer = make(tmp_path, **UNLEARN, data=data, benign=benign)
    tokenizer = trainer.processing_class
    answers = {(row["prompt"], row["completion"].strip()) for row in benign}
    for row in trainer.train_dataset:
        (ids,), (labels,) = row["benign_input_ids"], row["benign_labels"]
        prompt = [token for token, label in zip(ids, labels, strict=True) if label == -100]
        answer = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        said = tuple(tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, answer))
        assert said in answers


# Generic labels


def labelled(count=16):
    """Texts as tokens, and for each token another that could stand there; they agree at every fifth."""
    generator = torch.Generator().manual_seed(3)
    made = {"tokens": [], "labels": []}
    for number in range(count):
        tokens = torch.randint(6, 6 + len(WORDS), (4 + number % 5,), generator=generator)
        generic = torch.randint(6, 6 + len(WORDS), tokens.shape, generator=generator)
        generic[4::5] = tokens[4::5]
        made["tokens"].append(tokens.tolist())
        made["labels"].append(generic.tolist())
    return Dataset.from_dict(made)


def test_the_adversary_brings_out_the_tokens_and_the_defence_their_generic_labels(tmp_path, attacks_made):
    model, data = lora(tiny_model()), labelled()
    trainer = train(
        tmp_path, **{**UNLEARN, "attack_away_coef": 0.0}, data=data, dropout=None, model=model, learning_rate=0.0,
        max_steps=1, benign=benign_data(),
    )  # fmt: skip
    ((batch, _, _, found),) = attacks_made
    pairs = {(tuple(row["tokens"]), tuple(row["labels"][1:])) for row in data}
    for row in range(4):
        real = batch["attention_mask"][row].bool()
        tokens = batch["input_ids"][row][real].tolist()
        assert batch["labels"][row][real].tolist() == [-100, *tokens[1:]]
        assert batch["away_labels"][row][real][0] == -100
        assert (tuple(tokens), tuple(batch["away_labels"][row][real][1:].tolist())) in pairs
        assert torch.equal(batch["away_input_ids"][row], batch["input_ids"][row])
    assert found.losses[-1] < found.losses[0]
    generic, _ = cross_entropies(model.eval(), batch, found, "away_")
    true, _ = cross_entropies(model, batch, found)
    log = trainer.state.log_history[0]
    assert log["toward_loss"] == pytest.approx(generic.mean().item(), rel=1e-4)
    assert log["away_loss"] == pytest.approx(unlikelihood(true).mean().item(), rel=1e-4)
    assert log["loss"] == pytest.approx(log["toward_loss"] + log["away_loss"] + log["sft_loss"], rel=1e-4)
    assert found.losses[0] == pytest.approx(
        sum(values[rows == row].mean().item() for values, rows in [cross_entropies(model, batch)] for row in range(4))
        / 4,
        rel=1e-4,
    )


def test_rows_with_generic_labels_are_cut_to_the_limit_and_keep_their_benign_rows(tmp_path):
    data = labelled()
    benign = Dataset.from_dict({"prompt": ["w1 w2", "w3"], "completion": [" w4 w5", " w6 w7 w8 w9"]})
    trainer = make(tmp_path, **{**UNLEARN, "max_length": 5}, data=data, benign=benign, benign_per_example=2)
    assert max(map(len, data["tokens"])) > 5
    for given, row in zip(data, trainer.train_dataset, strict=True):
        assert row["input_ids"] == row["away_input_ids"] == given["tokens"][:5]
        assert row["labels"] == [-100, *given["labels"][1:5]] and row["away_labels"] == [-100, *given["tokens"][1:5]]
        assert sorted(row["benign_labels"]) == [[-100, -100, 10, 11, 2], [-100, 12, 13, 14, 15]]
    trainer.train()
    assert len(losses(trainer, "sft_loss")) == 5


# Part of the model


@pytest.mark.parametrize(
    ("changes", "layers", "ends"),
    [
        ({"trained_layers": ["1", "-1"]}, {1, 3}, None),
        ({"trained_layers": ["0.5"]}, {2}, None),
        ({"trained_modules": ["down_proj"]}, {0, 1, 2, 3}, ("mlp.down_proj.weight",)),
        (
            {"trained_layers": ["2"], "trained_modules": ["down_proj", "self_attn"]},
            {2},
            ("mlp.down_proj.weight", *(f"self_attn.{name}_proj.weight" for name in "qkvo")),
        ),
    ],
    ids=str,
)
def test_only_the_named_layers_and_modules_change_and_the_optimiser_has_no_others(tmp_path, changes, layers, ends):
    trainer = make(tmp_path, **EVERYTHING, **changes, benign=benign_data(), dropout=None, max_steps=2)
    start = weights(trainer)
    trainer.train()
    expected = {
        name
        for name in start
        if any(f"layers.{layer}." in name for layer in layers) and (ends is None or name.endswith(ends))
    }
    assert {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])} == expected
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in trainer.model.named_parameters() if name in expected}
    assert losses(trainer, "kl_loss")[0] == pytest.approx(0.0, abs=1e-7) and losses(trainer, "kl_loss")[1] > 0


@pytest.mark.parametrize("changes", [{"trained_layers": ["1"]}, {"trained_modules": ["down_proj"]}])
@pytest.mark.parametrize("how", ["peft_config", "PeftModel"])
def test_part_of_a_model_with_adapters_cannot_be_trained(tmp_path, changes, how):
    given = {"dropout": 0.0} if how == "peft_config" else {"dropout": None, "model": lora(tiny_model())}
    with pytest.raises(ValueError, match="it has adapters, which are all that is trained"):
        make(tmp_path, **ATTACK, **changes, **given)


def test_modules_that_the_layers_do_not_have_are_refused_with_those_they_have(tmp_path):
    with pytest.raises(ValueError, match=r"\['up_prog'\] are the end of no module's name.*self_attn\.q_proj"):
        make(tmp_path, **ATTACK, trained_modules=["up_prog"], dropout=None)
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        make(tmp_path, **ATTACK, trained_layers=["9"], dropout=None)


# Micro-batches

SPLIT = {
    "texts to forget": {**UNLEARN, "data": corpora},
    "gradient ascent on texts": {**UNLEARN, "data": corpora, "away_loss": "gradient_ascent"},
    "generic labels": {**UNLEARN, "data": labelled},
    "cut-offs": {**ATTACK, "away_loss": "gradient_ascent", "away_cutoff": 3.6, "toward_cutoff": 4.6},
    "random sites": {**ATTACK, "attack_sites": ["embedding", "0", "1", "2"], "attack_site_choice": "random"},
    "warm start": {**ATTACK, "attack_init": "warm", "max_steps": 2},
    "signed steps": {**ATTACK, "attack_optimizer": "sign", "attack_learning_rate": 0.02},
    "refusal direction": {**ATTACK, "attack_objective": "refusal_direction", "refusal_direction_prob": 1.0},
    "reset": {**ATTACK, "reset_optimizer": True, "max_steps": 2},
}


@pytest.mark.parametrize("name", SPLIT)
def test_four_micro_batches_of_one_give_the_update_of_one_batch_of_four(tmp_path, name):
    settings = {**SGD, "benign": benign_data(), "kl_coef": 0.3, **SPLIT[name], "dropout": None}
    settings["data"] = settings["data"]() if "data" in settings else None
    start = trained(make(tmp_path, **settings, model=lora(tiny_model())))
    updates = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        after = trained(train(tmp_path, **settings, **split, model=lora(tiny_model())))
        updates.append({key: after[key] - value for key, value in start.items()})
    assert max(update.abs().max() for update in updates[0].values()) > 1e-3
    for update in updates[1:]:
        assert distance(update, updates[0]) < 2e-5
