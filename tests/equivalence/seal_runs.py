"""Short trainings of selectors on the CPU, the same but for what a test changes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from runs import STOCK
from tiny import completion_data, lora_config, make_tokenizer, tiny_model
from transformers import PrinterCallback

from trl_robust import SEALConfig, SEALTrainer

LEARNS = {"selector_learning_rate": 20.0, "max_steps": -1, "num_train_epochs": 3}
AUXILIARY = "auxiliary"


def safe_data(count: int = 6) -> Any:
    return completion_data(count, seed=5)


def make(
    folder: Path | str,
    *,
    data: Any = None,
    safe: Any = None,
    dropout: float | None = 0.0,
    model: Any = None,
    eval_data: Any = None,
    **changes: Any,
) -> SEALTrainer:
    """A trainer on the tiny Llama; `dropout=None` trains it whole. `safe=False` gives it no safe set."""
    torch.manual_seed(0)
    made = SEALTrainer(
        model=tiny_model() if model is None else model,
        args=SEALConfig(str(folder), **{**STOCK, **changes}),
        train_dataset=completion_data() if data is None else data,
        eval_dataset=eval_data,
        safe_dataset=None if safe is False else safe_data() if safe is None else safe,
        processing_class=make_tokenizer(),
        peft_config=None if dropout is None else lora_config(dropout),
    )
    with contextlib.suppress(ValueError):  # not there when tqdm was never on
        made.remove_callback(PrinterCallback)
    return made


def train(folder: Path | str, **changes: Any) -> SEALTrainer:
    trainer = make(folder, **changes)
    trainer.train()
    return trainer


def weights_of(trainer: SEALTrainer, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Weights of one of the adapters, by the names of the main one."""
    return {
        name.replace(f".{adapter}.", ".default."): parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if f".{adapter}." in name
    }
