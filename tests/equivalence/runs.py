"""Short trainings on the CPU, the same but for what a test changes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from tiny import completion_data, lora_config, make_tokenizer, preference_data, tiny_model
from trl import SFTConfig, SFTTrainer

from trl_robust import LATSFTConfig, LATSFTTrainer

# Every term of the loss and the attack. Relative to the tiny hidden states the attack is strong.
EVERYTHING = {
    "attack_sites": ["embedding", "2"],
    "attack_radius": 0.3,
    "attack_steps": 2,
    "attack_away_coef": 0.5,
    "away_coef": 0.5,
    "sft_coef": 0.7,
    "kl_coef": 0.3,
}
ATTACK = {key: value for key, value in EVERYTHING.items() if key not in ("sft_coef", "kl_coef")}
STOCK = {
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 7,
    "max_length": 64,
    # transformers 5.23 complains about its own alias when it is left unset.
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
}


def make(
    folder: Path | str,
    *,
    model: torch.nn.Module | None = None,
    data: Any = None,
    benign: Any = None,
    dropout: float | None = 0.1,
    stock: bool = False,
    eval_dataset: Any = None,
    callbacks: Any = None,
    **changes: Any,
) -> SFTTrainer:
    """A trainer on the tiny Llama; `dropout=None` trains it whole, a number with LoRA."""
    config, trainer = (SFTConfig, SFTTrainer) if stock else (LATSFTConfig, LATSFTTrainer)
    torch.manual_seed(0)
    extra = {} if stock or benign is None else {"benign_dataset": benign}
    made = trainer(
        model=tiny_model() if model is None else model,
        args=config(str(folder), **{**STOCK, **changes}),
        train_dataset=preference_data() if data is None else data,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=None if dropout is None else lora_config(dropout),
        callbacks=callbacks,
        **extra,
    )
    with contextlib.suppress(ValueError):  # not there when tqdm was never on
        from transformers import PrinterCallback

        made.remove_callback(PrinterCallback)
    return made


def train(folder: Path | str, **changes: Any) -> SFTTrainer:
    trainer = make(folder, **changes)
    trainer.train()
    return trainer


def benign_data(count: int = 8):
    return completion_data(count, seed=5)


def weights(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def trained(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer: SFTTrainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), (name, (tensor - other[name]).abs().max())


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative distance of all values together."""
    assert one.keys() == other.keys()
    apart, size = ((torch.cat([t.flatten().double() for t in part])) for part in (
        [one[name] - other[name] for name in one], [other[name] for name in one]
    ))  # fmt: skip
    return (apart.norm() / size.norm()).item()
