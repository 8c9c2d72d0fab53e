"""What a trainer or its configuration will not do, with the reason and the way out; and the frozen list of keys."""

import inspect
from dataclasses import MISSING, fields

import pytest
from datasets import Dataset
from runs import ATTACK, STOCK, benign_data, make
from tiny import completion_data, preference_data, tiny_model
from trl import DPOConfig, SFTConfig

from trl_robust import LATDPOConfig, LATRMUConfig, LATSFTConfig
from trl_robust.data import DataError

ATTACK_KEYS = {
    "attack_sites": ["0.25", "0.5", "0.75", "0.94"],
    "attack_site_choice": "all",
    "attack_num_sites": 1,
    "attack_stream": "layer",
    "attack_positions": "prompt",
    "attack_norm": "l2",
    "attack_radius": 1.0,
    "attack_radius_unit": "absolute",
    "attack_ball": "token",
    "attack_steps": 16,
    "attack_learning_rate": 5e-2,
    "attack_optimizer": "adamw",
    "attack_init": "zero",
    "attack_objective": "targeted",
    "attack_toward_coef": 1.0,
    "attack_away_coef": 0.0,
    "refusal_direction_every": 4,
    "refusal_direction_prob": 0.5,
    "updates_per_attack": 1,
    "eval_under_attack": False,
    "trained_layers": [],
    "trained_modules": [],
    "reset_optimizer": False,
    "faithful": False,
}
BENIGN_KEYS = {"sft_coef": 1.0, "kl_coef": 0.0, "kl_form": "mean", "benign_per_example": 1}
KEYS = {
    LATSFTConfig: {
        **ATTACK_KEYS,
        **BENIGN_KEYS,
        "toward_coef": 1.0,
        "away_coef": 0.0,
        "away_loss": "unlikelihood",
        "toward_cutoff": 0.0,
        "away_cutoff": float("inf"),
    },
    LATDPOConfig: {**ATTACK_KEYS, **BENIGN_KEYS, "attack_objective": "swapped"},
    LATRMUConfig: {
        **ATTACK_KEYS,
        "attack_sites": ["0.22"],
        "attack_positions": "all",
        "attack_radius": 2.0,
        "attack_away_coef": 1.0,
        "rmu_layer": "0.25",
        "rmu_steering_coef": 6.5,
        "rmu_retain_coef": 1200.0,
        "trained_modules": ["down_proj"],
    },
}
"""The public keys with their defaults. To change one is to change what a user's recipe means."""
BASES = {LATSFTConfig: SFTConfig, LATDPOConfig: DPOConfig, LATRMUConfig: SFTConfig}


def config(**changes):
    return LATSFTConfig("unused", **{**STOCK, **changes})


@pytest.mark.parametrize("kind", list(KEYS))
def test_the_public_keys_and_their_defaults_are_frozen(kind):
    inherited = {field.name for field in fields(BASES[kind])}
    ours = {field.name: field for field in fields(kind) if field.name not in inherited}
    defaults = {
        name: field.default if field.default is not MISSING else field.default_factory()
        for name, field in ours.items()
    }
    assert defaults == KEYS[kind]
    restated = {name for cls in kind.__mro__ if "trl_robust" in cls.__module__ for name in cls.__annotations__}
    assert not restated & inherited


@pytest.mark.parametrize("kind", list(KEYS))
def test_every_key_is_documented_with_its_default_and_has_a_help_text(kind):
    own = [cls for cls in kind.__mro__ if "trl_robust" in cls.__module__]
    for field in fields(kind):
        if field.name in KEYS[kind]:
            (owner, *_) = [cls for cls in own if field.name in cls.__annotations__]
            assert f"\n{field.name} (`" in inspect.getdoc(owner).replace("    ", ""), field.name
            assert field.metadata["help"] and "%" not in field.metadata["help"].replace("%%", "")


def test_all_faults_of_a_configuration_are_named_in_one_message_with_their_keys():
    with pytest.raises(ValueError) as caught:
        config(
            attack_sites=["layer 3", "1.5"],
            attack_stream="attention",
            attack_positions="user",
            attack_norm="l3",
            attack_radius=-1.0,
            attack_radius_unit="percent",
            attack_ball="row",
            attack_steps=-1,
            attack_learning_rate=0.0,
            attack_optimizer="sgd",
            attack_init="ones",
            attack_objective="target",
            attack_site_choice="best",
            attack_num_sites=0,
            refusal_direction_every=0,
            refusal_direction_prob=1.5,
            trained_layers=["embedding"],
            away_coef=-0.5,
            away_loss="ascent",
            toward_cutoff=-1.0,
            away_cutoff=-1.0,
            kl_coef=float("nan"),
            kl_form="max",
            benign_per_example=0,
            updates_per_attack=0,
            packing=True,
            torch_compile=True,
        )
    message = str(caught.value)
    sound = {"attack_sites", "attack_toward_coef", "attack_away_coef", "toward_coef", "sft_coef", "eval_under_attack"}
    sound |= {"trained_modules", "reset_optimizer", "faithful"}
    for key in [*sorted(set(KEYS[LATSFTConfig]) - sound), "packing", "torch_compile"]:
        assert f"`{key}`" in message, key
    assert "attack_sites: Site 'layer 3' is unknown" in message
    assert "attack_sites: Site 1.5 is a fraction" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True}, r"`packing` puts several examples into one row.*Set `packing: false`"),
        ({"eval_packing": True}, r"`packing` puts several"),
        ({"padding_free": True}, r"`padding_free` puts several examples into one row. Set `padding_free: false`"),
        ({"torch_compile": True}, r"`torch_compile` ignores hooks.*Set `torch_compile: false`"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": True}},
            r"`activation_checkpointing_kwargs: \{use_reentrant: true\}` cannot give .* Set `use_reentrant: false`",
        ),
        ({"truncation_mode": "keep_end"}, r"`truncation_mode: keep_end` cuts the prompts that are attacked"),
        ({"loss_type": "dft"}, r"`loss_type: dft` changes only one of the losses"),
        (
            {"updates_per_attack": 2, "train_sampling_strategy": "sequential"},
            r"`train_sampling_strategy: sequential` cannot repeat batches",
        ),
        ({"updates_per_attack": 2, "ignore_data_skip": True}, r"`ignore_data_skip` would go on with other rows"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor` changes only one of the losses"),
        (
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            r"`skip_prepare_dataset` would leave rejected and benign",
        ),
        (
            {"attack_stream": "mlp"},
            r"`attack_stream: mlp` perturbs inside the region.*`activation_checkpointing: false`",
        ),
        ({"attack_toward_coef": 0.0}, r"`attack_toward_coef` and `attack_away_coef` are both 0"),
        (
            {"toward_coef": 0.0, "sft_coef": 0.0},
            r"`toward_coef`, `away_coef`, `sft_coef` and `kl_coef` are all 0; there is nothing to train",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_a_setting_that_would_change_or_remove_the_attack_is_refused_with_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_the_mlp_stream_is_allowed_without_checkpointing_and_without_an_attack():
    config(attack_stream="mlp", activation_checkpointing=False)
    config(attack_stream="mlp", attack_radius=0.0)


def test_a_prompt_learning_adapter_is_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"'default' is a prompt-learning adapter \(.*\): its virtual tokens shift"):
        make(tmp_path, model=model, dropout=None)


def test_an_unknown_layer_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="Layer 4 does not exist: the model has 4 layers, numbered 0 to 3"):
        make(tmp_path, attack_sites=["4"])


def test_a_weight_on_benign_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`kl_coef` is a weight on benign data, and no `benign_dataset` is given"):
        make(tmp_path, kl_coef=0.1)


def test_terms_that_all_need_data_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to train"):
        make(tmp_path, toward_coef=0.0)  # `sft_coef` is 1, but without benign data it has no effect


def test_another_configuration_class_and_a_loss_function_of_ones_own_are_refused(tmp_path):
    from trl_robust import LATSFTTrainer

    with pytest.raises(TypeError, match="`args` is a SFTConfig; LATSFTTrainer takes a LATSFTConfig"):
        LATSFTTrainer(tiny_model(), SFTConfig(str(tmp_path), **STOCK), train_dataset=preference_data())
    with pytest.raises(ValueError, match="`compute_loss_func` would replace the loss under attack"):
        LATSFTTrainer(tiny_model(), config(), train_dataset=preference_data(), compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        LATSFTTrainer(tiny_model(), config())


# Data


def changed(data, column, rows, value):
    return Dataset.from_list([{**row, column: value if i in rows else row[column]} for i, row in enumerate(data)])


def test_a_targeted_attack_without_rejected_completions_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"training dataset has the columns .* need preference data .* or use"):
        make(tmp_path, data=completion_data())
    with pytest.raises(DataError, match="need preference data"):
        make(tmp_path, data=completion_data(), attack_objective="untargeted", away_coef=0.5)


def test_a_targeted_evaluation_under_attack_without_rejected_completions_is_refused(tmp_path):
    """With none, the attack would draw the model to the wanted completion: help, counted as an attack."""
    with pytest.raises(DataError, match=r"evaluation dataset has the columns .* need preference data"):
        make(tmp_path, **ATTACK, eval_dataset=completion_data(), eval_under_attack=True)
    make(tmp_path, **ATTACK, eval_dataset=completion_data())


def test_tokens_in_place_of_text_are_refused_where_rejected_or_benign_rows_are_needed(tmp_path):
    """Their shares could not be prepared, and the attack would draw the model to the wanted completion."""
    tokens = Dataset.from_list([{"input_ids": [7, 8, 9, 10], "labels": [-100, -100, 9, 10]}] * 4)
    with pytest.raises(DataError, match="is tokenised"):
        make(tmp_path, data=tokens)
    with pytest.raises(DataError, match="is tokenised"):
        make(tmp_path, data=tokens, attack_objective="untargeted", benign=benign_data())
    make(tmp_path, data=tokens, attack_objective="untargeted")


@pytest.mark.parametrize("column", ["chosen", "rejected", "prompt"])
@pytest.mark.parametrize("value", ["", "  \n"])
def test_empty_text_is_refused_with_the_numbers_of_its_rows(tmp_path, column, value):
    with pytest.raises(DataError, match=rf"training dataset has an empty `.*{column}.*` in 2 rows \(3, 11\)"):
        make(tmp_path, data=changed(preference_data(), column, {3, 11}, value))


def test_an_empty_completion_of_a_conversation_is_refused_although_other_turns_are_full(tmp_path):
    data = preference_data(conversational=True)
    empty = [{"role": "assistant", "content": " "}]
    with pytest.raises(DataError, match="an empty `rejected` in row 5"):
        make(tmp_path, data=changed(data, "rejected", {5}, empty))
    with pytest.raises(DataError, match="an empty `prompt` in row 1"):
        make(tmp_path, data=changed(data, "prompt", {1}, [*data[1]["prompt"][:-1], {"role": "user", "content": ""}]))


@pytest.mark.parametrize("share", ["train", "benign", "eval"])
def test_a_prompt_longer_than_the_limit_is_refused_with_the_numbers_of_its_rows(tmp_path, share):
    long = " ".join(["w3"] * 30)
    data, benign, rows = preference_data(), benign_data(), preference_data(4)
    if share == "train":
        data = changed(data, "prompt", {2, 7}, long)
    elif share == "benign":
        benign = changed(benign, "prompt", {2, 7}, long)
    else:
        rows = changed(preference_data(8), "prompt", {2, 7}, long)
    with pytest.raises(
        DataError, match=rf"{share}.* has a prompt longer than the limit in 2 rows \(2, 7\): 20 tokens"
    ):
        make(tmp_path, data=data, benign=benign, eval_dataset=rows, max_length=20)


def test_a_completion_longer_than_the_limit_is_cut_and_no_error(tmp_path):
    data = changed(preference_data(), "chosen", {2}, " " + " ".join(["w3"] * 30))
    trainer = make(tmp_path, data=data, max_length=20)
    assert max(len(row) for row in trainer.train_dataset["input_ids"]) == 20


def test_a_stream_and_a_dataset_without_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a IterableDataset; a map-style"):
        make(tmp_path, data=preference_data().to_iterable_dataset())
    with pytest.raises(DataError, match="has no rows"):
        make(tmp_path, data=preference_data().select([]))


def test_a_launcher_that_shards_or_compiles_is_refused():
    from types import SimpleNamespace

    from accelerate.utils import DistributedType, DynamoBackend

    from trl_robust.trainers.refusals import check_distribution

    def launched(kind=DistributedType.NO, backend=DynamoBackend.NO):
        state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
        return SimpleNamespace(distributed_type=kind, state=state)

    for kind in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        check_distribution(launched(kind))
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        with pytest.raises(ValueError, match="not supported"):
            check_distribution(launched(kind))
    with pytest.raises(ValueError, match="compilation"):
        check_distribution(launched(backend=DynamoBackend.INDUCTOR))


def test_a_model_that_checkpoints_by_itself_is_refused_with_mlp_perturbations(tmp_path):
    model = tiny_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="attack_stream: mlp"):
        make(tmp_path, model=model, **ATTACK, attack_stream="mlp", activation_checkpointing=False)
