"""Everything private to a version of TRL, transformers, PEFT or bitsandbytes that this package leans on.

Two checks, each with one readable error: `check_versions` when `trl_robust` is imported (it reads package metadata
and imports nothing), `check_seams` when a trainer is first imported (it looks at the methods we override and runs a
probe of a few milliseconds). `TRL_ROBUST_ALLOW_UNTESTED=1` turns both errors into warnings.
"""

from __future__ import annotations

import inspect
import os
import warnings
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

TESTED = {
    "trl": ("1.16", "1.17"),
    "transformers": ("5.23", "5.24"),
    "peft": ("0.21", "0.22"),
    "accelerate": ("1.15", "1.16"),
    "bitsandbytes": ("0.50", "0.51"),
}
"""First version tested, and the first one not tested any more. bitsandbytes may be absent."""

OPTIONAL = {"bitsandbytes"}


class IncompatibleVersionError(ImportError):
    """A library is outside the tested range, or lacks something this package leans on."""


def _complain(problems: list[str]) -> None:
    if not problems:
        return
    message = (
        "trl-robust does not fit the libraries installed here:\n- "
        + "\n- ".join(problems)
        + "\nInstall the tested set with `pip install -c constraints.txt trl-robust`, or set "
        "TRL_ROBUST_ALLOW_UNTESTED=1 to go on at your own risk."
    )
    if os.environ.get("TRL_ROBUST_ALLOW_UNTESTED") == "1":
        warnings.warn(message, stacklevel=3)
    else:
        raise IncompatibleVersionError(message)


def check_versions() -> None:
    """
    Compares the installed versions with the tested ranges.

    Raises:
        `IncompatibleVersionError`: naming every library that is missing or outside its range.
    """
    problems = []
    for name, (first, beyond) in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            if name not in OPTIONAL:
                problems.append(f"{name} is not installed; {name}>={first},<{beyond} is needed.")
            continue
        release = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
        if not tuple(map(int, first.split("."))) <= release < tuple(map(int, beyond.split("."))):
            problems.append(f"{name} is {found}; {name}>={first},<{beyond} is needed.")
    _complain(problems)


def _layer_hook_fires_once() -> bool:
    """Whether a pre-hook on a checkpointed layer stays outside the region that is run again in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Layer(GradientCheckpointingLayer):
        # Its own constructor wants a configuration; the probe needs only the checkpointing.
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return (hidden_states * self.weight).tanh()

    from torch.utils.checkpoint import checkpoint

    layer: Any = Layer().train()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda function, *args: checkpoint(function, *args, use_reentrant=False)
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    # The caller's mode must not matter: importing this package inside `torch.no_grad()` is allowed.
    with torch.enable_grad():
        layer(torch.ones(2, requires_grad=True)).sum().backward()
    return len(calls) == 1


def check_seams() -> None:
    """
    Looks for what the trainers override and rely on in TRL and transformers.

    Raises:
        `IncompatibleVersionError`: naming everything that is missing or behaves differently.
    """
    import trl.trainer.utils
    from trl import DPOTrainer, SFTTrainer
    from trl.trainer import add_fused_lm_head
    from trl.trainer.utils import FusedCausalLMOutput

    shared = {
        "training_step": [],  # TRL passes everything on
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
        "_prepare_dataset": ["dataset", "processing_class", "args", "dataset_name"],
        "evaluation_loop": [],
        "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
        "_set_signature_columns_if_needed": [],
        "_save_checkpoint": ["model", "trial"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_get_train_sampler": ["train_dataset"],
        "create_model_card": [],
    }
    own = {
        SFTTrainer: {"_prepare_dataset": ["packing", "formatting_func"]},
        DPOTrainer: {"_precompute_ref_logps": ["dataset", "name", "batch_size"]},
    }
    problems = []
    for trainer, more in own.items():
        for name in shared | more:
            method = getattr(trainer, name, None)
            if method is None:
                problems.append(f"{trainer.__name__}.{name} is gone.")
                continue
            taken = inspect.signature(method).parameters
            if missing := [each for each in (*shared.get(name, ()), *more.get(name, ())) if each not in taken]:
                problems.append(f"{trainer.__name__}.{name} no longer takes {missing}.")
    if not callable(getattr(trl.trainer.utils, "use_adapter", None)):
        problems.append("trl.trainer.utils.use_adapter is gone.")
    fields = getattr(FusedCausalLMOutput, "__dataclass_fields__", {})
    problems += [f"FusedCausalLMOutput has no {name}." for name in ("log_probs", "label_mask") if name not in fields]
    if not callable(add_fused_lm_head):
        problems.append("trl.trainer.add_fused_lm_head is gone.")
    if not _layer_hook_fires_once():
        problems.append("hooks on decoder layers run inside the checkpointed region (transformers before 5.23).")
    _complain(problems)


def keep_4bit_differentiable(model: nn.Module) -> None:
    """
    Stops bitsandbytes from repacking 4-bit weights on the CPU.

    On CPUs with AVX512-BF16 the first forward pass in evaluation mode without gradients repacks every `Linear4bit`
    for inference; from then on no gradient passes through it, without a word (bitsandbytes 0.50). Evaluation, cached
    references and the search for perturbations are all such passes.

    Args:
        model (`nn.Module`):
            Model whose `Linear4bit` layers are to stay differentiable.
    """
    flag = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, flag):
            setattr(module, flag, False)


def use_adapter(model: Any, name: str | None) -> AbstractContextManager[None]:
    """
    Runs a `PeftModel` with another adapter, or with none.

    Args:
        model (`nn.Module`):
            A `PeftModel`.
        name (`str`, *optional*):
            Name of an adapter; all are off if not given.

    Returns:
        A context manager.
    """
    from trl.trainer.utils import use_adapter as use

    return use(model, name)
