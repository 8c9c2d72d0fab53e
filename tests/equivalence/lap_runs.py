"""Short trainings with LAP on the CPU, the same but for what a test changes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from runs import STOCK
from tiny import completion_data, lora_config, make_tokenizer, preference_data, tiny_model
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_robust import LAPDPOConfig, LAPDPOTrainer, LAPSFTConfig, LAPSFTTrainer

SEARCH = {"lap_layers": ["1"], "lap_steps": 3, "lap_branch": "adv_only", "lap_epsilon": 0.1}


def make(
    kind: str,
    folder: Path | str,
    *,
    data: Any = None,
    dropout: float | None = 0.1,
    stock: bool = False,
    model: Any = None,
    **changes: Any,
) -> Any:
    """A trainer on the tiny Llama, `kind` "sft" or "dpo"; `dropout=None` trains it whole, a number with LoRA."""
    config, trainer, rows = {
        "sft": ((SFTConfig, SFTTrainer) if stock else (LAPSFTConfig, LAPSFTTrainer)) + (completion_data,),
        "dpo": ((DPOConfig, DPOTrainer) if stock else (LAPDPOConfig, LAPDPOTrainer)) + (preference_data,),
    }[kind]
    torch.manual_seed(0)
    whole = kind == "dpo" and dropout is None and not hasattr(model, "peft_config")
    precompute = {"precompute_ref_log_probs": True} if whole else {}  # or TRL would look for the model on the hub
    made = trainer(
        model=tiny_model() if model is None else model,
        args=config(str(folder), **{**STOCK, **precompute, **changes}),
        train_dataset=rows() if data is None else data,
        processing_class=make_tokenizer(),
        peft_config=None if dropout is None else lora_config(dropout),
    )
    with contextlib.suppress(ValueError):  # not there when tqdm was never on
        made.remove_callback(PrinterCallback)
    return made


def train(kind: str, folder: Path | str, **changes: Any) -> Any:
    trainer = make(kind, folder, **changes)
    trainer.train()
    return trainer
