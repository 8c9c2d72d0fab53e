"""Short trainings of pairs on the CPU, the same but for what a test changes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from runs import STOCK
from tiny import lora_config, make_tokenizer, preference_data, tiny_model
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from trl_robust import LATDPOConfig, LATDPOTrainer

# Relative to the tiny hidden states the attack is strong.
ATTACK = {"attack_sites": ["embedding", "2"], "attack_radius": 0.3, "attack_steps": 2}


def make(
    folder: Path | str,
    *,
    model: Any = None,
    data: Any = None,
    benign: Any = None,
    dropout: float | None = 0.1,
    stock: bool = False,
    eval_dataset: Any = None,
    ref_model: Any = None,
    **changes: Any,
) -> DPOTrainer:
    """A trainer on the tiny Llama; `dropout=None` trains it whole (with a second model as reference), else LoRA."""
    config, trainer = (DPOConfig, DPOTrainer) if stock else (LATDPOConfig, LATDPOTrainer)
    torch.manual_seed(0)
    whole = dropout is None and not hasattr(model, "peft_config") and ref_model is None
    precompute = {"precompute_ref_log_probs": True} if whole else {}  # or TRL would look for the model on the hub
    made = trainer(
        model=tiny_model() if model is None else model,
        ref_model=ref_model,
        args=config(str(folder), **{**STOCK, **precompute, **changes}),
        train_dataset=preference_data() if data is None else data,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=None if dropout is None else lora_config(dropout),
        **({} if stock or benign is None else {"benign_dataset": benign}),
    )
    with contextlib.suppress(ValueError):  # not there when tqdm was never on
        made.remove_callback(PrinterCallback)
    return made


def train(folder: Path | str, **changes: Any) -> DPOTrainer:
    trainer = make(folder, **changes)
    trainer.train()
    return trainer
