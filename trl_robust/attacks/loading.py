"""A model as it ships: with its adapter or without, merged, in four bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .._compat import keep_4bit_differentiable

Adapter = Literal["on", "off", "merged"]


def load_model(
    path: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False, load_in_4bit: bool, adapter: Adapter
) -> Any:
    """
    Loads a model in evaluation mode; see [`Subject.load`] for the arguments.

    Args:
        path (`str` or `Path`):
            Model or adapter.
        dtype, trust_remote_code, load_in_4bit, adapter (*optional*):
            As in [`Subject.load`].

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`].

    Raises:
        `ValueError`: see [`Subject.load`].
    """
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file

    is_adapter = find_adapter_config_file(str(path)) is not None
    if adapter not in get_args(Adapter):
        raise ValueError(f"adapter={adapter!r} is unknown; choose one of {list(get_args(Adapter))}.")
    if adapter != "on" and not is_adapter:
        raise ValueError(f"{path} holds no adapter, so adapter={adapter!r} has nothing to work on; leave it out.")
    if adapter == "merged" and load_in_4bit:
        raise ValueError(
            "An adapter cannot be merged into 4-bit weights without loss. Merge it, save the model, and load that in "
            "4 bits; or leave one of the two out."
        )
    more: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if load_in_4bit:
        more["quantization_config"] = four_bits(dtype)
    if adapter == "off":
        path = str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    loader: Any = AutoPeftModelForCausalLM if is_adapter and adapter != "off" else AutoModelForCausalLM
    model = loader.from_pretrained(str(path), **more)
    if adapter == "merged":
        model = model.merge_and_unload()
    if not getattr(model, "hf_device_map", None) and torch.cuda.is_available():
        model.to("cuda")
    if model.device.type == "cpu":
        keep_4bit_differentiable(model)
    return model.eval()


def four_bits(dtype: str) -> Any:
    """
    NF4 with double quantisation, as the QLoRA recipes train.

    Args:
        dtype (`str`):
            Weight dtype, in which is computed; `"auto"` is bfloat16 on a GPU and float32 without one.

    Returns:
        [`~transformers.BitsAndBytesConfig`].
    """
    from transformers import BitsAndBytesConfig

    usual = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=usual if dtype == "auto" else getattr(torch, dtype),
    )
