"""LAT on DPO: stock TRL without an attack, one perturbation a pair, a reference that sees none."""

import math

import pytest
import torch
from dpo_runs import ATTACK, make, train
from runs import assert_same, benign_data, distance, losses, trained, weights
from tiny import lora, preference_data, tiny_model

from trl_robust import LATDPOConfig
from trl_robust.inner import Perturbation
from trl_robust.trainers import adversary, lat_dpo

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}


@pytest.fixture
def searches(monkeypatch):
    """Every search: the batch that it was given, and the perturbation found."""
    made = []
    real = adversary.find_perturbation

    def find(model, batch, threat, **settings):
        found = real(model, batch, threat, **settings)
        made.append((batch, found))
        return found

    monkeypatch.setattr(adversary, "find_perturbation", find)
    return made


# Without an attack


@pytest.mark.parametrize(
    "loss", [{"loss_type": "sigmoid"}, {"loss_type": "ipo"}, {"loss_type": "robust", "label_smoothing": 0.1}], ids=str
)
@pytest.mark.parametrize("settings", [{"attack_radius": 0.0}, {"attack_steps": 0}], ids=["radius", "steps"])
def test_with_a_radius_of_zero_or_no_steps_five_updates_are_those_of_dpo_trainer_bit_for_bit(tmp_path, loss, settings):
    stock = train(tmp_path, stock=True, **loss)
    ours = train(tmp_path, **loss, **settings)
    assert_same(weights(ours), weights(stock))
    for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert losses(ours, key) == losses(stock, key), key
    assert len(losses(stock)) == 5


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dropout", [0.1, None], ids=["lora", "full"])
def test_precomputed_references_full_training_and_accumulation_are_stock_too(tmp_path, dropout, accumulation):
    settings = {
        "dropout": dropout,
        "precompute_ref_log_probs": True,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
    }
    stock = train(tmp_path, stock=True, **settings)
    ours = train(tmp_path, attack_radius=0.0, **settings)
    assert_same(weights(ours), weights(stock))


def test_a_perturbation_of_zero_that_is_searched_and_installed_changes_no_more_than_rounding(tmp_path, monkeypatch):
    monkeypatch.setattr(LATDPOConfig, "attacks", property(lambda self: True))
    settings = {"dropout": 0.0, "max_steps": 3}
    stock = train(tmp_path, stock=True, **settings)
    ours = train(tmp_path, attack_radius=0.0, attack_sites=["embedding", "2"], attack_steps=1, **settings)
    start = trained(make(tmp_path, **settings))
    assert distance(trained(ours), trained(stock)) < 1e-5
    assert distance(trained(stock), start) > 1e-3


# The loss and its reference


def test_lat_9_8_with_adapters_at_zero_the_loss_is_log_2_and_the_cached_reference_equals_the_recomputed(tmp_path):
    trainer = make(tmp_path, dropout=0.0)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    ours = trainer.reference_log_probs(inputs)
    theirs = torch.cat(trainer.compute_ref_log_probs(trainer.model, inputs))
    cached = make(tmp_path, dropout=0.0, precompute_ref_log_probs=True)
    again = cached._prepare_inputs(next(iter(cached.get_train_dataloader())))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(ours, torch.cat([again["ref_chosen_logps"], again["ref_rejected_logps"]]), atol=1e-5)


def test_an_attack_never_changes_the_references_log_probabilities(tmp_path):
    trainer = make(tmp_path, **{**ATTACK, "attack_radius": 5.0}, dropout=0.0, model=tiny_model())
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    clean = trainer.reference_log_probs(inputs)
    batch = trainer._attack_batch(trainer._with_references(inputs))
    with trainer.adversary.attacking(batch, 0, 1, copies=2):
        attacked = trainer.reference_log_probs(inputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        keys = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        policy = trainer.model(**keys, labels=labels, fused_lm_head=True).log_probs.sum(1)
    assert torch.equal(attacked, clean)
    # The adapters are new, so that without the perturbation the policy would say the same as the reference.
    assert (policy - clean).abs().max() > 0.1


def test_the_reference_is_asked_once_for_every_micro_batch_of_an_update(tmp_path, monkeypatch):
    asked = []
    real = lat_dpo.LATDPOTrainer.reference_log_probs
    monkeypatch.setattr(
        lat_dpo.LATDPOTrainer, "reference_log_probs", lambda self, inputs: asked.append(1) or real(self, inputs)
    )
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.use_adapter", lambda *args, **kwargs: pytest.fail("TRL asked the reference as well")
    )
    train(tmp_path, **ATTACK, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert len(asked) == 6


def test_the_logged_loss_is_the_dpo_loss_under_the_perturbation(tmp_path, searches):
    trainer = train(tmp_path, **ATTACK, **SGD, dropout=None, model=lora(tiny_model()), beta=0.3)
    (batch, found), *_ = searches
    model = lora(tiny_model()).eval()

    def log_probs(prefix, perturbed):
        ids, mask, labels = (batch[f"{prefix}{key}"] for key in ("input_ids", "attention_mask", "labels"))
        with torch.no_grad():
            if perturbed:
                with Perturbation(found.deltas, found.selected).installed(model):
                    logits = model(input_ids=ids, attention_mask=mask).logits
            else:  # adapters that are trained further: the reference is their copy
                logits = model(input_ids=ids, attention_mask=mask).logits
        said = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return (said * (labels[:, 1:] != -100)).sum(1)

    # The attack's batch has the roles reversed: its own completions are the rejected ones.
    chosen = log_probs("away_", True) - log_probs("away_", False)
    rejected = log_probs("", True) - log_probs("", False)
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-4)
    swapped = -torch.nn.functional.logsigmoid(0.3 * (rejected - chosen)).mean()
    assert log["attack_loss_after"] == pytest.approx(swapped.item(), rel=1e-4)
    assert log["attack_loss_before"] == pytest.approx(math.log(2), rel=1e-4)
    assert log["attack_loss_after"] < log["attack_loss_before"]


# One perturbation a pair


def test_both_completions_of_a_pair_are_trained_under_the_same_perturbation(tmp_path, searches):
    from trl_robust.threat import decoder_layers

    trainer = make(tmp_path, **{**ATTACK, "attack_sites": ["2"]}, max_steps=1, benign=benign_data())
    layers, clean, added = decoder_layers(trainer.model), [], []
    layers[2].register_forward_hook(lambda module, args, output: clean.append(output.detach()))
    layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: (
            added.append((args[0] if args else kwargs["hidden_states"]).detach() - clean[-1])
            if trainer.model.training
            else None
        ),
        with_kwargs=True,
    )
    trainer.train()
    ((_, found),) = searches
    policy, benign = added
    assert (benign == 0).all()
    chosen, rejected = policy.chunk(2)
    width = found.deltas[2].shape[1]
    for half in (chosen, rejected):
        assert (half[:, :width] - found.deltas[2] * found.selected[..., None]).abs().max() < 1e-5
        assert (half[:, width:] == 0).all()
    assert found.deltas[2].norm(dim=-1)[found.selected].min() > 0.05


@pytest.mark.parametrize("objective", ["swapped", "targeted", "untargeted", "random", "refusal_direction"])
def test_every_adversary_trains(tmp_path, objective):
    more = {"refusal_direction_prob": 1.0} if objective == "refusal_direction" else {}
    trainer = train(tmp_path, **ATTACK, **more, attack_objective=objective, max_steps=2, benign=benign_data())
    assert all(torch.tensor(losses(trainer)).isfinite())
    assert len(losses(trainer, "sft_loss")) == 2
    if objective in ("swapped", "targeted", "untargeted"):
        for before, after in zip(
            losses(trainer, "attack_loss_before"), losses(trainer, "attack_loss_after"), strict=True
        ):
            assert after < before


@pytest.mark.parametrize("loss", [{}, {"loss_type": "ipo"}, {"loss_type": "robust", "label_smoothing": 0.2}], ids=str)
def test_four_micro_batches_of_one_pair_give_the_update_of_one_batch_of_four(tmp_path, loss):
    settings = {**ATTACK, **SGD, **loss, "dropout": None, "benign": benign_data(), "kl_coef": 0.3}
    start = trained(make(tmp_path, **settings, model=lora(tiny_model())))
    updates = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = train(
            tmp_path,
            **settings,
            model=lora(tiny_model()),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        after = trained(trainer)
        updates.append({name: after[name] - value for name, value in start.items() if ".ref." not in name})
    assert max(update.abs().max() for update in updates[0].values()) > 1e-3
    for update in updates[1:]:
        assert distance(update, updates[0]) < 1e-5


def test_checkpointing_changes_no_bit_of_training_under_attack(tmp_path):
    runs = [train(tmp_path, **ATTACK, max_steps=3, activation_checkpointing=on) for on in (True, False)]
    assert_same(trained(runs[0]), trained(runs[1]))


def test_no_hooks_are_left_or_added_from_step_to_step(tmp_path):
    trainer = make(tmp_path, **ATTACK, max_steps=4)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())

    seen = []
    real = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (seen.append(hooks()), real(*args, **kwargs))[1]
    trainer.train()
    assert len(seen) == 4 and len(set(seen)) == 1 and hooks() == seen[0]


# Resuming


@pytest.mark.parametrize("more", [{}, {"updates_per_attack": 2}, {"attack_init": "warm"}], ids=str)
def test_a_resumed_run_is_the_run_that_was_not_interrupted_bit_for_bit(tmp_path, more):
    settings = {**ATTACK, **more, "max_steps": 5}
    whole = train(tmp_path / "whole", **settings, save_strategy="steps", save_steps=3)
    resumed = make(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(trained(resumed), trained(whole))
    assert losses(resumed)[-2:] == losses(whole)[-2:]


# Quantised weights


def test_qlora_takes_the_4_bit_model_without_its_adapters_as_the_reference(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tiny import lora_config, make_tokenizer
    from transformers import BitsAndBytesConfig

    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "model")
    for precompute in (False, True):
        trainer = lat_dpo.LATDPOTrainer(
            model=str(tmp_path / "model"),
            args=LATDPOConfig(
                str(tmp_path / "run"),
                use_cpu=True,
                bf16=False,
                report_to="none",
                save_strategy="no",
                max_steps=2,
                logging_steps=1,
                learning_rate=1e-2,
                per_device_train_batch_size=4,
                precompute_ref_log_probs=precompute,
                disable_tqdm=True,
                **ATTACK,
            ),
            train_dataset=preference_data(),
            processing_class=make_tokenizer(),
            peft_config=lora_config(),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
        )
        assert trainer.reference.endswith("with its adapters off")
        trainer.train()
        assert losses(trainer, "attack_loss_before")[0] == pytest.approx(math.log(2), abs=1e-3)
        assert all(grad > 0 for grad in losses(trainer, "grad_norm"))


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_smoothing": 0.1}, "`loss_type: sigmoid` does not look at it"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"loss_type": "hinge"}, "Use one of these, or `attack_objective: targeted`"),
        ({"loss_type": ["sigmoid", "sft"]}, "Use one of these, or `attack_objective: targeted`"),
        ({"f_divergence_type": "js_divergence"}, "Use one of these, or `attack_objective: targeted`"),
        ({"ld_alpha": 0.5}, "Use one of these, or `attack_objective: targeted`"),
        ({"sync_ref_model": True}, "`sync_ref_model: false`"),
        ({"truncation_mode": "keep_end"}, "Use `keep_start`"),
        ({"padding_free": True}, "padding_free: false"),
        ({"attack_radius": -1}, "`attack_radius` is -1"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_with_what_to_do(changes, words):
    with pytest.raises(ValueError, match="`") as caught:
        LATDPOConfig("unused", use_cpu=True, bf16=False, **changes)
    assert words in str(caught.value)


def test_other_losses_of_trl_train_under_a_targeted_attack(tmp_path):
    trainer = train(tmp_path, **ATTACK, attack_objective="targeted", loss_type="hinge", max_steps=1)
    assert len(losses(trainer)) == 1


def test_data_without_pairs_is_refused(tmp_path):
    from trl_robust.data import DataError

    with pytest.raises(DataError, match="`chosen` and `rejected`"):
        make(tmp_path, data=preference_data().remove_columns("rejected"))
    long = preference_data(2).map(lambda row: {"prompt": " ".join(["w1"] * 70)})
    with pytest.raises(DataError, match="2 rows"):
        make(tmp_path, data=long)
