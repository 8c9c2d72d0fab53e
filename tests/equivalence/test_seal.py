"""The trainer of selectors against TRL's trainers, against itself cut otherwise, and against a computation by hand."""

import math
import warnings

import pytest
import torch
from dpo_runs import make as make_dpo
from lap_runs import make as make_lap
from runs import STOCK, assert_same, distance, trained
from runs import make as make_lat
from seal_runs import AUXILIARY, LEARNS, make, safe_data, train, weights_of
from tiny import completion_data, lora, lora_config, make_tokenizer, preference_data, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from trl_robust import SEALConfig, Selector
from trl_robust.data import DataError, add_row_hashes, row_hash
from trl_robust.objectives import PreferenceLoss


def stock(folder, data, dropout=0.0, **changes):
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(str(folder), **{**STOCK, **changes}),
        train_dataset=data,
        processing_class=make_tokenizer(),
        peft_config=None if dropout is None else lora_config(dropout),
    )
    trainer.train()
    return trainer


class TestModels:
    def test_at_penalty_0_the_model_is_that_of_the_safe_set_whatever_the_data_and_the_selector(self, tmp_path):
        zero = {"penalty_strength": 0.0}
        one = train(tmp_path / "a", **zero, selector_learning_rate=20.0)
        other = train(tmp_path / "b", **zero, selector_learning_rate=5.0, data=completion_data(16, seed=7))
        alone = train(tmp_path / "c", selection_method="safe_loss")
        assert_same(weights_of(one), weights_of(other))
        assert_same(weights_of(one), weights_of(alone))
        assert (one.learner.logits - other.learner.logits).abs().max() > 1e-3

    def test_and_it_is_stock_sft_on_the_rows_that_were_drawn(self, tmp_path):
        # One row an update, where TRL's mean over tokens is the mean over rows.
        single = {"per_device_train_batch_size": 1, "max_steps": 6}
        found = train(tmp_path / "a", **single, penalty_strength=0.0)
        drawn = safe_data().select(found._safe_stream.take(0, 6))
        expected = stock(tmp_path / "b", drawn, **{**single, "train_sampling_strategy": "sequential"})
        start = weights_of(make(tmp_path / "c"))
        moved = [{n: w[n] - start[n] for n in start} for w in (weights_of(found), trained(expected))]
        assert max(update.abs().max() for update in moved[0].values()) > 1e-3
        assert distance(*moved) < 1e-5

    def test_at_penalty_1_both_models_are_one_and_the_selector_stands_still(self, tmp_path):
        trainer = train(tmp_path, **LEARNS, penalty_strength=1.0)
        assert_same(weights_of(trainer), weights_of(trainer, AUXILIARY))
        assert not trainer.learner.logits.any()

    def test_the_auxiliary_model_never_sees_the_safe_set(self, tmp_path):
        # With the weights fixed nothing else couples the two.
        one = train(tmp_path / "a", selection_method="loss_gap")
        other = train(tmp_path / "b", selection_method="loss_gap", safe=completion_data(9, seed=11))
        assert_same(weights_of(one, AUXILIARY), weights_of(other, AUXILIARY))
        assert distance(weights_of(one), weights_of(other)) > 1e-3

    def test_each_gradient_is_clipped_by_its_own_norm(self, tmp_path):
        small = {"selection_method": "loss_gap", "max_grad_norm": 1e-2, "optim": "sgd", "max_steps": 1}
        start = weights_of(make(tmp_path / "0", **small))
        trainer = train(tmp_path / "a", **small)
        for adapter in ("default", AUXILIARY):
            after = weights_of(trainer, adapter)
            norm = math.sqrt(sum((after[name] - start[name]).square().sum().item() for name in start))
            assert norm == pytest.approx(1e-2 * trainer.args.learning_rate, rel=1e-3)

    def test_it_is_the_gradient_of_the_penalised_loss(self, tmp_path):
        trainer = make(
            tmp_path, selection_method="loss_gap", optim="sgd", max_steps=1, penalty_strength=0.3, max_grad_norm=1e9
        )
        before = weights_of(trainer)
        safe = list(trainer._safe_rows)
        order = []
        collate = trainer.data_collator
        trainer.data_collator = lambda batch: (order.append(batch), collate(batch))[1]
        trainer.train()
        given = [row for batch in order for row in batch if "row_number" in row][:4]
        drawn = [safe[number] for number in trainer._safe_stream.take(0, 4)]
        assert len(given) == 4

        fresh = make(tmp_path / "fresh", selection_method="loss_gap")

        def mean_loss(batch):
            total = 0.0
            for row in batch:  # alone, and from the logits
                ids = torch.tensor([row["input_ids"]])
                logp = fresh.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                target = torch.tensor(row["labels"][1:])
                total = total - logp[target != -100].gather(1, target[target != -100, None]).mean()
            return total / len(batch)

        loss = 0.7 * mean_loss(drawn) + 0.3 * mean_loss(given)
        own = {n: p for n, p in fresh.model.named_parameters() if ".default." in n}
        slopes = torch.autograd.grad(loss, list(own.values()))
        expected = {n: before[n] - trainer.args.learning_rate * g for n, g in zip(own, slopes, strict=True)}
        moved = [{n: w[n] - before[n] for n in before} for w in (weights_of(trainer), expected)]
        assert distance(*moved) < 1e-5


class TestSelector:
    def test_accumulation_changes_neither_models_nor_selector(self, tmp_path):
        runs = []
        for size, steps in ((8, 1), (2, 4)):
            changes = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": steps,
                "learning_rate": 1e-3,
            }
            runs.append(train(tmp_path / str(size), **LEARNS, **changes))
        assert runs[0].learner.logits.std() > 1e-2
        assert torch.allclose(runs[0].learner.logits, runs[1].learner.logits, atol=1e-5)
        for adapter in ("default", AUXILIARY):
            assert distance(weights_of(runs[0], adapter), weights_of(runs[1], adapter)) < 1e-5

    def test_a_last_batch_that_is_not_full_is_a_mean_over_its_own_rows(self, tmp_path):
        changes = {"data": completion_data(10), "learning_rate": 1e-3}
        one = train(tmp_path / "a", **LEARNS, **changes, per_device_train_batch_size=4)
        other = train(
            tmp_path / "b", **LEARNS, **changes, per_device_train_batch_size=1, gradient_accumulation_steps=4
        )
        assert torch.allclose(one.learner.logits, other.learner.logits, atol=1e-5)
        assert distance(weights_of(one), weights_of(other)) < 1e-5

    def test_every_row_is_visited_once_an_epoch_however_small_the_safe_set(self, tmp_path):
        trainer = train(tmp_path, **LEARNS, safe=safe_data(1), data=completion_data(13))
        assert trainer.selector.statistics["visits"].tolist() == [3] * 13
        assert trainer.run_summary["selection"]["visits"] == {"3": 13}
        assert trainer.state.log_history[-2]["selector/fewest_visits"] == 3

    def test_full_batches_permuting_rows_permutes_the_selector_and_copies_are_equal(self, tmp_path):
        data = completion_data(7)
        data = data.select([*range(7), 2])
        whole = {**LEARNS, "per_device_train_batch_size": 8, "num_train_epochs": 4, "learning_rate": 1e-3}
        one = train(tmp_path / "a", data=data, **whole).learner.logits
        order = [5, 7, 0, 2, 1, 6, 4, 3]
        other = train(tmp_path / "b", data=data.select(order), **whole).learner.logits
        assert one.std() > 1e-3
        assert torch.allclose(other, one[order], atol=1e-5)
        assert torch.allclose(one[2], one[7], atol=1e-12)

    def test_rows_are_remembered_with_their_losses_before_the_update(self, tmp_path):
        trainer = train(tmp_path, **{**LEARNS, "num_train_epochs": 1}, per_device_train_batch_size=16)
        fresh = make(tmp_path / "fresh")
        expected = torch.zeros(16, dtype=torch.float64)
        with torch.no_grad():
            for row in fresh.train_dataset:
                batch = fresh.data_collator([row])
                expected[row["row_number"]] = fresh._row_losses(batch, None).item()
        found = trainer.selector.statistics
        assert torch.allclose(found["first_loss"], expected, atol=1e-5)
        assert torch.allclose(found["ema_loss_aux"], expected, atol=1e-5)  # both start as one
        assert not trainer.learner.logits.any()  # so that there is no gap yet
        assert found["length"].tolist() == [
            sum(label != -100 for label in row["labels"])
            for row in sorted(fresh.train_dataset, key=lambda row: row["row_number"])
        ]

    @pytest.mark.parametrize("function", ["softmax", "sigmoid", "relu", "tanh"])
    def test_weights_have_mean_1_and_are_not_negative_at_every_step(self, tmp_path, function):
        trainer = make(tmp_path, **LEARNS, selector_function=function)
        seen = []
        move = trainer.learner.step
        trainer.learner.step = lambda *given: (move(*given), seen.append(trainer.learner.weights()))
        assert torch.equal(trainer.learner.weights(), torch.ones(16, dtype=torch.float64))
        trainer.train()
        assert len(seen) == 12 and seen[-1].std() > 1e-3
        for weights in seen:
            assert weights.mean() == pytest.approx(1, abs=1e-9) and weights.min() >= 0

    def test_the_baselines_rank_by_loss_and_by_gap(self, tmp_path):
        for method in ("safe_loss", "loss_gap"):
            trainer = train(tmp_path / method, selection_method=method)
            expected = torch.zeros(16, dtype=torch.float64)
            with torch.no_grad():
                trainer.model.eval()
                for row in trainer.train_dataset:
                    batch = trainer.data_collator([row])
                    expected[row["row_number"]] = -trainer._row_losses(batch, None).item()
                    if method == "loss_gap":
                        with trainer.adapters.auxiliary_active():
                            expected[row["row_number"]] += trainer._row_losses(batch, None).item()
            assert torch.allclose(trainer.selector.scores, expected, atol=1e-5), method
            assert trainer.selector.settings["method"] == method
            assert trainer.selector.statistics["visits"].min() >= 1

    def test_what_is_saved_is_the_selector_and_no_model(self, tmp_path):
        trainer = train(tmp_path / "run", **LEARNS)
        trainer.save_model(tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "rows.parquet",
            "selector.json",
            "selector.safetensors",
        ]
        loaded = Selector.load(tmp_path / "out")
        assert torch.equal(loaded.scores, trainer.selector.scores)
        assert loaded.row_hashes == [row_hash(row) for row in completion_data()]
        assert loaded.settings["penalty_strength"] == 0.5 and loaded.settings["updates"] == 12

    def test_averaging_is_over_the_updates_of_the_last_epoch(self, tmp_path):
        trainer = make(tmp_path, **LEARNS, selector_average=True)
        seen = []
        move = trainer.learner.step
        trainer.learner.step = lambda *given: (move(*given), seen.append(trainer.learner.logits.clone()))
        trainer.train()
        assert torch.allclose(trainer.learner.result, torch.stack(seen[-4:]).mean(0), atol=1e-12)
        last = train(tmp_path / "last", **LEARNS)
        assert torch.equal(last.selector.logits, seen[-1])


class TestResuming:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {
                "selector_optimizer": "adam",
                "selector_average": True,
                "selector_function": "relu",
                "selector_learning_rate": 0.05,
            },
            {"penalty_algorithm": "memory_efficient", "penalty_increment": 0.2, "gradient_accumulation_steps": 2},
            {"pairs": True, "selector_optimizer": "exponentiated_gradient", "selector_learning_rate": 0.5},
            {"selection_method": "safe_loss"},
        ],
        ids=["sgd", "adam", "memory_efficient", "pairs", "safe_loss"],
    )
    @pytest.mark.filterwarnings("ignore:.*memory_efficient.*")
    def test_a_run_that_goes_on_from_any_checkpoint_has_the_same_selector_to_the_last_bit(self, tmp_path, changes):
        changes = dict(changes)
        data = {"data": preference_data(), "safe": preference_data(5, seed=3)} if changes.pop("pairs", False) else {}
        settings = {**LEARNS, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, **changes, **data}
        whole = train(tmp_path, **settings, dropout=0.1)
        assert whole.selector.logits.std() > 1e-4
        updates = whole.state.max_steps
        for step in (1, updates // 2, updates - 1):
            again = make(tmp_path, **settings, dropout=0.1)
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert torch.equal(again.selector.logits, whole.selector.logits), step
            for name, values in whole.selector.statistics.items():
                assert torch.equal(again.selector.statistics[name].nan_to_num(-7), values.nan_to_num(-7)), name
            assert_same(weights_of(again), weights_of(whole))
            assert again.forward_passes >= whole.forward_passes  # references are computed again

    def test_a_checkpoint_of_another_dataset_is_refused(self, tmp_path):
        train(tmp_path, **LEARNS, save_strategy="steps", save_steps=2)
        other = make(tmp_path, **LEARNS, data=completion_data(12))
        with pytest.raises(ValueError, match=r"16 rows.*12"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class TestAdapters:
    def test_a_four_bit_base_carries_both_and_its_run_goes_on_bit_for_bit(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "model")
        settings = {**LEARNS, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}

        def quantized():
            plan = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            return AutoModelForCausalLM.from_pretrained(
                tmp_path / "model", quantization_config=plan, dtype=torch.bfloat16
            )

        whole = train(tmp_path / "run", model=quantized(), **settings)
        both = [weights_of(whole, adapter) for adapter in ("default", AUXILIARY)]
        assert {w.dtype for part in both for w in part.values()} == {torch.bfloat16}
        assert distance(*({n: w.float() for n, w in part.items()} for part in both)) > 1e-3
        assert whole.learner.logits.std() > 1e-4
        again = make(tmp_path / "run", model=quantized(), **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert torch.equal(again.learner.logits, whole.learner.logits)
        assert_same(weights_of(again), weights_of(whole))
        assert_same(weights_of(again, AUXILIARY), weights_of(whole, AUXILIARY))

    def test_it_starts_as_a_copy_of_an_adapter_that_is_trained_further(self, tmp_path):
        trainer = make(tmp_path, model=lora(tiny_model()), dropout=None)
        assert_same(weights_of(trainer), weights_of(trainer, AUXILIARY))
        assert any(weights.abs().max() > 0 for name, weights in weights_of(trainer).items() if "lora_B" in name)
        count = sum(parameter.requires_grad for parameter in trainer.model.parameters())
        with trainer.adapters.auxiliary_active():
            assert trainer.model.active_adapter == AUXILIARY
            assert sum(parameter.requires_grad for parameter in trainer.model.parameters()) == count
        assert trainer.model.active_adapter == "default" and count == 2 * len(weights_of(trainer))

    def test_an_adapter_that_trains_weights_of_the_base_is_refused(self, tmp_path):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(tiny_model("qwen2"), LoraConfig(target_modules=["q_proj"], bias="all"))
        with pytest.raises(ValueError, match="bias"):
            make(tmp_path, model=model, dropout=None)


@pytest.mark.filterwarnings("ignore:.*memory_efficient.*")
@pytest.mark.parametrize("rate", [0.0, 20.0])
def test_what_belongs_to_the_trainer_does_not_reach_the_model_in_training_and_evaluation(tmp_path, rate):
    model, given = tiny_model(), set()
    model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    settings = {"selector_learning_rate": rate, "penalty_algorithm": "memory_efficient", "eval_strategy": "steps"}
    trainer = train(
        tmp_path,
        model=model,
        dropout=None,
        eval_data=completion_data(4, seed=9),
        eval_steps=1,
        max_steps=2,
        **settings,
    )
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2 and found[0] != found[1]
    assert "input_ids" in given and not {"row_number", "row_hash", "weight"} & given


class TestPairs:
    def test_the_loss_of_a_pair_is_that_of_trls_dpo(self, tmp_path):
        data = preference_data()
        trainer = train(tmp_path / "a", **LEARNS, data=data, safe=preference_data(5, seed=3), learning_rate=1e-1)
        assert trainer.selector.statistics["first_loss"].min() < math.log(2) - 1e-3
        references = trainer._references
        with torch.no_grad():
            trainer.model.eval()
            for row in list(trainer.train_dataset)[:3]:
                sums = []
                for ids, labels in ((row["input_ids"], row["labels"]), (row["away_input_ids"], row["away_labels"])):
                    logp = trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                    target = torch.tensor(labels[1:])
                    sums.append(logp[target != -100].gather(1, target[target != -100, None]).sum())
                base = references[row["row_number"]]
                margin = 0.1 * ((sums[0] - base[0]) - (sums[1] - base[1]))
                expected = -torch.nn.functional.logsigmoid(margin)
                found = trainer._row_losses(trainer.data_collator([row]), references[[row["row_number"]]])
                assert found.item() == pytest.approx(expected.item(), abs=1e-5)

    def test_the_reference_is_the_model_before_training_and_every_pair_starts_at_ln_2(self, tmp_path):
        trainer = train(tmp_path, data=preference_data(), safe=safe_data(), max_steps=1)
        seen = trainer.selector.statistics["first_loss"]
        assert torch.allclose(seen[~seen.isnan()], torch.tensor(math.log(2), dtype=torch.float64), atol=1e-6)

    def test_pairs_above_and_rows_below(self, tmp_path):
        trainer = train(tmp_path, **LEARNS, safe=preference_data(5, seed=3))
        assert trainer._references is None and trainer._safe_references.shape == (5, 2)
        assert trainer.learner.logits.std() > 1e-3

    def test_the_losses_differ_by_type(self):
        config = SEALConfig("x", use_cpu=True, bf16=False, preference_loss="ipo", preference_beta=0.3)
        assert config.preference == PreferenceLoss("ipo", 0.3, 0.0)


class TestRowWeights:
    """A column `weight` in SFT, without a selector."""

    makers = {
        "seal": lambda folder, data: make(folder, data=data, safe=False, selector_learning_rate=0.0, dropout=0.1),
        "lap": lambda folder, data: make_lap("sft", folder, data=data, lap_branch="sft_only"),
        "lat": lambda folder, data: make_lat(folder, data=data, attack_steps=0),
    }

    @pytest.mark.parametrize("kind", list(makers))
    def test_weights_of_1_train_as_stock_trl_bit_for_bit(self, tmp_path, kind):
        data = completion_data()
        ones = self.makers[kind](tmp_path / "a", data.add_column("weight", [1.0] * len(data)))
        ones.train()
        assert_same(trained(ones), trained(stock(tmp_path / "b", data, dropout=0.1)))

    @pytest.mark.parametrize("kind", list(makers))
    def test_a_weight_multiplies_the_loss_of_its_row(self, tmp_path, kind):
        data = completion_data(4)
        logged = {}
        for name, weights in {"all": [1] * 4, "double": [2] * 4, "one": [1, 0, 0, 0], "others": [0, 1, 1, 1]}.items():
            trainer = self.makers[kind](tmp_path / name, data.add_column("weight", weights))
            trainer.args.max_steps = 1
            trainer.train()
            logged[name] = trainer.state.log_history[0]["loss"]
        assert logged["double"] == pytest.approx(2 * logged["all"], rel=1e-5)
        assert logged["one"] + logged["others"] == pytest.approx(logged["all"], rel=1e-5)
        assert 0 < logged["one"] < logged["all"]

    def test_they_weigh_the_terms_of_an_attacked_step(self, tmp_path):
        data = preference_data(4)
        for changes in ({}, {"away_loss": "gradient_ascent", "away_cutoff": 9.0}, {"toward_cutoff": 0.1}):
            logged = {}
            for name, weights in {"all": [1] * 4, "one": [1, 0, 0, 0], "others": [0, 1, 1, 1]}.items():
                settings = {
                    "attack_sites": ["1"],
                    "attack_radius": 0.2,
                    "attack_steps": 1,
                    "away_coef": 0.5,
                    "max_steps": 1,
                }
                trainer = make_lat(tmp_path / name, data=data.add_column("weight", weights), **settings, **changes)
                trainer.train()
                logged[name] = trainer.state.log_history[0]["loss"]
            assert logged["one"] + logged["others"] == pytest.approx(logged["all"], rel=1e-4), changes

    def test_ids_and_weights_stay_with_their_rows(self, tmp_path):
        data = completion_data(12)
        data = add_row_hashes(data.add_column("weight", [float(number) for number in range(12)]))
        trainer = make(tmp_path, data=data, safe=False, selector_learning_rate=0.0, max_length=9, shuffle_dataset=True)
        rows = trainer.train_dataset
        assert rows["row_number"][:] != list(range(12))
        assert rows["weight"][:] == [float(number) for number in rows["row_number"]]
        assert rows["row_hash"][:] == [data[number]["row_hash"] for number in rows["row_number"]]
        batch = trainer.data_collator([rows[3], rows[0]])
        assert batch["weight"].tolist() == [rows[3]["weight"], rows[0]["weight"]]

    def test_weights_that_cannot_be_are_refused_by_row(self, tmp_path):
        data = completion_data(4)
        for weights, said in (
            ([1.0, -1.0, 1.0, 1.0], "row 1"),
            ([1.0, 1.0, float("nan"), 1.0], "row 2"),
            ([0.0] * 4, "every row"),
        ):
            with pytest.raises(DataError, match=said):
                make_lap("sft", tmp_path, data=data.add_column("weight", weights))
        with pytest.raises(DataError, match="only lat-sft"):
            make_dpo(tmp_path, data=preference_data(4).add_column("weight", [1.0] * 4))
        with pytest.raises(DataError, match="weights are what is learned"):
            make(tmp_path, data=data.add_column("weight", [1.0] * 4))


class TestRefusals:
    def test_of_settings(self, tmp_path):
        with pytest.raises(ValueError) as raised:
            make(
                tmp_path,
                packing=True,
                selector_function="raw_tanh",
                penalty_strength=1.5,
                keep_fraction=0.0,
                selector_learning_rate=-1.0,
                preference_beta=0.0,
                push_to_hub=True,
            )
        said = str(raised.value)
        for part in (
            "packing",
            "no lower bound",
            "penalty_strength",
            "keep_fraction",
            "selector_learning_rate",
            "beta",
            "push",
        ):
            assert part in said, part
        assert len(said.splitlines()) == 7

    def test_algorithm_1_needs_an_adapter_and_algorithm_2_warns(self, tmp_path):
        with pytest.raises(ValueError, match="use_peft"):
            make(tmp_path, dropout=None)
        with pytest.warns(UserWarning, match="ranked by their loss"):
            train(tmp_path, dropout=None, penalty_algorithm="memory_efficient", max_steps=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "(?s).*memory_efficient.*")
            make(tmp_path / "one")

    def test_of_data(self, tmp_path):
        with pytest.raises(ValueError, match="safe_dataset"):
            make(tmp_path, safe=False)
        with pytest.raises(DataError, match="tokenised"):
            make(tmp_path, data=make(tmp_path).train_dataset.select_columns(["input_ids", "labels"]))
        with pytest.raises(ValueError, match="trains no model"):
            make(tmp_path, selection_method="random")
