"""Training with LAP: stock TRL where nothing is perturbed, and the search's own promises where something is."""

import itertools
import json
import math

import pytest
import torch
from lap_runs import SEARCH, make, train
from runs import assert_same, distance, losses, trained, weights
from tiny import completion_data, lora, make_tokenizer, preference_data, tiny_model

from trl_robust import LAPSFTConfig
from trl_robust.trainers import branch_of_p, paraphraser

KINDS = ["sft", "dpo"]


@pytest.fixture
def searches(monkeypatch):
    """Every search of a training: its batch, its settings and what it found, before a control changes that."""
    made = []
    real = paraphraser.find_paraphrase

    def find(model, batch, **settings):
        found = real(model, batch, **settings)
        made.append((batch, settings, found, {site: delta.clone() for site, delta in found.deltas.items()}))
        return found

    monkeypatch.setattr(paraphraser, "find_paraphrase", find)
    return made


# Nothing perturbed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sft_only", {"lap_branch": "sft_only"}),
        ("no steps", {"lap_steps": 0, "lap_branch": "adv_only"}),
        ("never drawn", {"lap_adv_prob": 0.0}),
        ("full, accumulated", {"lap_branch": "sft_only", "dropout": None, "gradient_accumulation_steps": 2}),
    ],
)
def test_lap_13_10_without_perturbations_training_is_stock_bit_for_bit(tmp_path, kind, name, changes):
    ours = train(kind, tmp_path / "ours", **changes)
    stock_changes = {key: value for key, value in changes.items() if not key.startswith("lap_")}
    stock = train(kind, tmp_path / "stock", stock=True, **stock_changes)
    assert_same(weights(ours), weights(stock))
    assert losses(ours) == losses(stock)
    assert losses(ours, "grad_norm") == losses(stock, "grad_norm")


def test_neftune_is_stock_trls_own_and_can_stand_beside_the_search(tmp_path):
    settings = {"neftune_noise_alpha": 5.0}
    ours = train("sft", tmp_path / "ours", lap_branch="sft_only", **settings)
    stock = train("sft", tmp_path / "stock", stock=True, **settings)
    plain = train("sft", tmp_path / "plain", stock=True)
    assert_same(weights(ours), weights(stock))
    assert distance(trained(ours), trained(plain)) > 1e-4
    both = train("sft", tmp_path / "both", **SEARCH, **settings)
    assert all(math.isfinite(value) for value in losses(both))


# Branches


def test_lap_13_11_the_papers_p_is_translated():
    assert branch_of_p(1) == ("adv_only", 1.0)
    assert branch_of_p(0) == ("both", 1.0)
    assert branch_of_p(0.3) == ("mix", 0.3)
    with pytest.raises(ValueError, match="from 0 to 1"):
        branch_of_p(1.5)


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        ("adv_only", {"perturbed": 5, "plain": 0, "both": 0}),
        ("sft_only", {"perturbed": 0, "plain": 5, "both": 0}),
        ("both", {"perturbed": 0, "plain": 0, "both": 5}),
    ],
)
def test_lap_13_10_branch_counts_are_exact(tmp_path, branch, expected):
    trainer = train("sft", tmp_path, **{**SEARCH, "lap_branch": branch}, gradient_accumulation_steps=2)
    assert trainer.paraphraser.updates == expected


def test_lap_13_10_mixed_branches_come_as_often_as_asked_and_in_no_fixed_order(tmp_path):
    made = make("sft", tmp_path, lap_branch="mix", lap_adv_prob=0.3)
    drawn = [made.paraphraser.branch_at(step) == "perturbed" for step in range(10_000)]
    assert abs(sum(drawn) - 3000) < 4 * math.sqrt(10_000 * 0.3 * 0.7)
    pairs = sum(a and b for a, b in itertools.pairwise(drawn))
    assert abs(pairs - 900) < 4 * math.sqrt(10_000 * 0.09)
    other = make("sft", tmp_path, lap_branch="mix", lap_adv_prob=0.3, seed=8)
    assert [other.paraphraser.branch_at(step) == "perturbed" for step in range(50)] != drawn[:50]


def test_the_loss_of_both_is_the_sum_of_the_perturbed_and_the_plain_one(tmp_path):
    # Without dropout: that of the second pass is another one.
    settings = {"max_steps": 1, "dropout": 0.0}
    both, perturbed, plain = (
        losses(train("sft", tmp_path / name, **settings, **changes))[0]
        for name, changes in (
            ("b", {**SEARCH, "lap_branch": "both"}),
            ("a", SEARCH),
            ("p", {"stock": True}),
        )
    )
    assert both == pytest.approx(perturbed + plain, abs=1e-4)
    assert perturbed != plain


# The search inside a training


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_trained_under_what_was_found_and_the_constraint_holds(tmp_path, kind, searches):
    trainer = train(kind, tmp_path, **SEARCH, dropout=0.0)
    assert len(searches) == 5
    for number, (_, settings, found, _) in enumerate(searches):
        assert settings["epsilon"] == 0.1 and settings["layer"] == (1,)
        assert found.feasible.all()
        assert (found.perturbed_losses - found.clean_losses).abs().max() <= 0.1
        if kind == "dpo":
            # A mean over pairs; TRL's SFT loss is one over tokens.
            logged = losses(trainer, "perturbed_loss")[number]
            assert logged == pytest.approx(found.perturbed_losses.mean().item(), abs=2e-4)
    assert losses(trainer, "relative_norm")[0] > 0.05
    assert {"lambda_end", "feasible_end", "cast_lost", "nonfinite", "grad_norm/perturbed", "delta_norm/1"} <= set(
        trainer.state.log_history[0]
    )


def test_the_random_control_has_the_norm_of_the_search_at_every_token_and_another_direction(tmp_path, searches):
    train("sft", tmp_path, **SEARCH, lap_search="random", max_steps=1)
    _, _, found, before = searches[0]
    assert torch.allclose(found.delta.norm(dim=-1), before[1].norm(dim=-1), rtol=1e-4)
    cosine = torch.cosine_similarity(found.delta[found.selected], before[1][found.selected], dim=-1)
    assert cosine.abs().mean() < 0.5 and not torch.allclose(found.delta, before[1])


def test_untargeted_lat_as_a_control_raises_the_loss(tmp_path):
    trainer = train("sft", tmp_path, **SEARCH, lap_search="untargeted", lap_radius=0.2)
    assert all(change > 0 for change in losses(trainer, "loss_change"))


def test_overrides_reach_the_search_and_alpha_0_fixes_the_multiplier(tmp_path, searches):
    trainer = train("sft", tmp_path, **SEARCH, lap_alpha=0.0, lap_lambda_init=0.7, lap_token_cap=0.3)
    assert searches[0][1]["token_cap"] == 0.3
    assert losses(trainer, "lambda_end") == pytest.approx([0.7] * 5)


def test_a_persistent_multiplier_goes_on_where_the_batches_before_have_left_it(tmp_path, searches):
    settings = {**SEARCH, "lap_alpha": 50.0, "lap_max_log_step": 1.0}
    train("sft", tmp_path / "ema", **settings, lap_lambda_persist="ema")
    started = [found.history["lambda"][0] for _, _, found, _ in searches]
    ended = [found.log_lambda.mean().item() for _, _, found, _ in searches]
    assert started[0] == pytest.approx(0.1)
    expected = ended[0]
    for number in range(1, 5):
        assert math.log(started[number]) == pytest.approx(expected, abs=1e-4)
        expected = 0.9 * expected + 0.1 * ended[number]
    searches.clear()
    train("sft", tmp_path / "none", **settings)
    assert [found.history["lambda"][0] for _, _, found, _ in searches] == pytest.approx([0.1] * 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["last_user", "all_user"])
def test_user_turns_of_conversations_are_perturbed_and_nothing_else(tmp_path, kind, positions, searches):
    data = preference_data(conversational=True)
    tokenizer = make_tokenizer()
    if kind == "sft":
        data = data.remove_columns("rejected").rename_column("chosen", "completion")
    train(kind, tmp_path, **SEARCH, lap_positions=positions, data=data, max_steps=2)
    texts = set()
    for batch, _, found, _ in searches:
        for row in range(len(found.selected)):
            real = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            chosen = found.selected[row].nonzero().flatten()
            texts.add(tokenizer.decode(real[chosen]))
    last = {row["prompt"][-1]["content"] for row in data}
    earlier = {f"w2 w3 w4 {row['prompt'][-1]['content']}" for row in data if len(row["prompt"]) > 1}
    assert texts <= last | earlier
    assert texts <= last if positions == "last_user" else texts & earlier


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{"lap_branch": "both"}, {"lap_search": "random"}])
def test_splitting_a_batch_changes_nothing_but_rounding(tmp_path, kind, changes):
    settings = {**SEARCH, **changes, "dropout": 0.0, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    whole = train(kind, tmp_path / "whole", **settings)
    split = train(kind, tmp_path / "split", **settings, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    start = trained(make(kind, tmp_path / "start", **settings))
    moved = {name: value - start[name] for name, value in trained(whole).items()}
    moved_split = {name: value - start[name] for name, value in trained(split).items()}
    assert distance(moved_split, moved) < 1e-4


def test_a_search_that_always_fails_stops_the_run_and_is_counted_until_then(tmp_path, monkeypatch):
    real = paraphraser.find_paraphrase

    def fail(model, batch, **settings):
        found = real(model, batch, **settings)
        found.nonfinite[:] = True
        return found

    monkeypatch.setattr(paraphraser, "find_paraphrase", fail)
    trainer = make("sft", tmp_path, **SEARCH, lap_max_nonfinite=3)
    with pytest.raises(FloatingPointError, match="3 batches in a row"):
        trainer.train()
    assert trainer.paraphraser.summary["batches_without_a_finite_row"] == 3


# Resuming, cost, files


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sft", {"lap_branch": "mix"}),
        ("sft", {"lap_branch": "both", "lap_lambda_persist": "ema", "lap_alpha": 50.0}),
        ("sft", {"lap_search": "random", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("dpo", {"lap_branch": "mix"}),
    ],
)
def test_lap_13_10_a_resumed_run_repeats_branches_losses_and_weights(tmp_path, kind, changes):
    settings = {**SEARCH, "max_steps": 6, **changes}
    whole = train(kind, tmp_path / "whole", **settings, save_strategy="steps", save_steps=3)
    resumed = make(kind, tmp_path / "resumed", **settings)
    torch.rand(99)  # what the process that resumes has drawn by then must not matter
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(resumed), weights(whole))
    for key in ("loss", "perturbed_updates", "lambda_end", "forward_passes"):
        assert losses(resumed, key) == losses(whole, key), key
    assert resumed.paraphraser.updates == whole.paraphraser.updates
    if settings["lap_branch"] == "mix":
        assert 0 < sum(losses(whole, "perturbed_updates")) < 6


def test_curves_are_written_a_line_a_batch_and_not_twice_after_a_resume(tmp_path):
    settings = {**SEARCH, "lap_curves": True, "lap_preset": "paper_rms", "save_strategy": "steps", "save_steps": 3}
    train("sft", tmp_path, **settings)
    resumed = make("sft", tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    lines = [json.loads(line) for line in (tmp_path / "lap_curves.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(len(line["lambda"]) == 3 and line["rows"] == 4 for line in lines)


@pytest.mark.parametrize(("kind", "plain"), [("sft", 3), ("dpo", 4)])
def test_the_control_for_compute_makes_as_many_forward_passes(tmp_path, kind, plain):
    settings = {**SEARCH, "lap_branch": "mix", "lap_adv_prob": 0.5, "lap_backoff": False, "max_steps": 8}
    control = make(kind, tmp_path / "control", **settings, lap_match_compute=True)
    perturbed = 1 + (2 * 3 - 1) * 0.5 + plain
    assert control.args.max_steps == round(8 * (0.5 * perturbed + 0.5 * plain) / plain)
    control.train()
    lap = train(kind, tmp_path / "lap", **settings)
    share = lap.paraphraser.updates["perturbed"] / 8
    expected = lap.forward_passes * (0.5 * perturbed + 0.5 * plain) / (share * perturbed + (1 - share) * plain)
    # But for passes of whole updates, and what the draw of the branches came to.
    assert control.forward_passes == pytest.approx(expected, rel=0.06)
    assert control.state.global_step == control.args.max_steps
    stock = train(kind, tmp_path / "stock", stock=True, max_steps=control.args.max_steps)
    assert_same(weights(control), weights(stock))


def test_the_card_says_what_the_model_was_trained_under(tmp_path):
    trainer = train("sft", tmp_path, **SEARCH, lap_search="random")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "## Latent adversarial paraphrasing" in card and "a control" in card and "`1`" in card
    joint = train("dpo", tmp_path / "dpo", **SEARCH)
    joint.create_model_card()
    assert "the joint form, of trl-robust" in (tmp_path / "dpo" / "README.md").read_text()


def test_a_pair_is_searched_under_its_dpo_loss_and_the_reference_never_perturbed(tmp_path, searches):
    settings = {**SEARCH, "lap_learning_rate": 0.5, "lap_epsilon": 2.0, "max_steps": 1}
    trainer = make("dpo", tmp_path, **settings, dropout=0.0)
    asked = []
    real = trainer.reference_log_probs

    def ask(inputs):
        asked.append(real(inputs))
        return asked[-1]

    trainer.reference_log_probs = ask
    trainer.train()
    batch, _, found, _ = searches[0]
    assert len(asked) == 1
    assert torch.equal(torch.cat([batch["ref_log_probs"], batch["away_ref_log_probs"]]), asked[0])
    # At the start policy and reference are the same: the clean loss is log 2.
    assert torch.allclose(found.clean_losses, torch.full((4,), math.log(2)), atol=1e-4)
    assert found.relative_norms.min() > 0.05


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lap_branch": "sometimes"}, "`lap_branch` is 'sometimes'"),
        ({"lap_epsilon": 0.0}, "`lap_epsilon` is 0.0"),
        ({"lap_adv_prob": 1.2}, "`lap_adv_prob` is 1.2"),
        ({"lap_learning_rate": -1.0}, "`lap_learning_rate` is -1.0"),
        ({"lap_lambda_min": 5.0, "lap_lambda_max": 1.0}, "`lap_lambda_min` is 5.0, above `lap_lambda_max` 1.0"),
        ({"lap_layers": []}, "`lap_layers` is empty"),
        ({"lap_layers": ["everywhere"]}, "lap_layers: "),
        ({"packing": True}, "`packing`"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_the_names_of_their_keys(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        LAPSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **changes)


def test_all_faults_are_named_at_once(tmp_path):
    with pytest.raises(ValueError) as caught:
        LAPSFTConfig(str(tmp_path), use_cpu=True, bf16=False, lap_epsilon=-1.0, lap_steps=-1, lap_alpha=-1.0)
    assert all(name in str(caught.value) for name in ("lap_epsilon", "lap_steps", "lap_alpha"))


def test_completions_of_a_pair_cannot_share_a_perturbation(tmp_path):
    with pytest.raises(ValueError, match="which share a perturbation"):
        make("dpo", tmp_path, **SEARCH, lap_positions="all")


def test_rows_without_prompts_are_refused_with_what_to_do(tmp_path):
    data = completion_data().map(lambda row: {"text": row["prompt"] + row["completion"]})
    with pytest.raises(ValueError, match="prompt"):
        make("sft", tmp_path, **SEARCH, data=data.select_columns(["text"]))


def test_an_adapter_under_training_is_perturbed_as_well(tmp_path):
    trainer = train("sft", tmp_path, **SEARCH, model=lora(tiny_model()), dropout=None)
    assert losses(trainer, "feasible_end") == [1.0] * 5


def test_of_pairs_the_chosen_completions_are_trained_on(tmp_path):
    pairs = train("sft", tmp_path / "pairs", **SEARCH, data=preference_data(seed=1))
    rows = train("sft", tmp_path / "rows", **SEARCH)
    assert_same(weights(pairs), weights(rows))
