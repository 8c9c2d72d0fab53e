"""Settings of TRL that a perturbed training step cannot honour. Each is refused with what to do instead."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from trl import SFTConfig


def unsupported_settings(args: Any) -> list[str]:
    """
    Settings that would silently change or remove the attack.

    Args:
        args ([`~trl.SFTConfig`] or [`~trl.DPOConfig`]):
            Training arguments.

    Returns:
        `list[str]`: one sentence for each such setting.
    """
    problems = []
    if getattr(args, "packing", False) or getattr(args, "eval_packing", False):
        problems.append(
            "`packing` puts several examples into one row, so a perturbation could not tell whose prompt it changes. "
            "Set `packing: false`."
        )
    if args.padding_free:
        problems.append("`padding_free` puts several examples into one row. Set `padding_free: false`.")
    if args.torch_compile:
        problems.append(
            "`torch_compile` ignores hooks that are added after the first call, and with them every perturbation. "
            "Set `torch_compile: false`."
        )
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if isinstance(given := getattr(args, name, None), dict) and given.get("use_reentrant"):
            problems.append(
                f"`{name}: {{use_reentrant: true}}` cannot give the gradient of a perturbation (torch refuses "
                "`autograd.grad` there). Set `use_reentrant: false`."
            )
            break
    if args.use_liger_kernel:
        problems.append("`use_liger_kernel` replaces the loss that the attack uses. Set `use_liger_kernel: false`.")
    if args.truncation_mode == "keep_end":
        problems.append("`truncation_mode: keep_end` cuts the prompts that are attacked. Use `keep_start`.")
    if args.deepspeed:
        problems.append("`deepspeed` is not supported. Use one GPU, or several with `accelerate launch` (DDP).")
    if args.fsdp:
        problems.append("`fsdp` is not supported. Use one GPU, or several with `accelerate launch` (DDP).")
    if isinstance(args, SFTConfig) and args.loss_type != "nll":
        problems.append(f"`loss_type: {args.loss_type}` changes only one of the losses. Set `loss_type: nll`.")
    if args.label_smoothing_factor:
        problems.append("`label_smoothing_factor` changes only one of the losses. Set it to 0.")
    if isinstance(kwargs := getattr(args, "dataset_kwargs", None), dict) and kwargs.get("skip_prepare_dataset"):
        problems.append("`skip_prepare_dataset` would leave rejected and benign rows out. Remove it.")
    return problems


MLP_AND_CHECKPOINTING = (
    "`attack_stream: mlp` perturbs inside the region that activation checkpointing runs again, where a second forward "
    "pass of the same step would change what is recomputed. Set `activation_checkpointing: false` and "
    "`gradient_checkpointing: false`, or use `attack_stream: layer`."
)


def check_model(model: nn.Module, args: Any) -> None:
    """
    Refuses adapters that shift the positions of tokens, and MLP perturbations on a model that checkpoints.

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers.
        args ([`AttackArguments`] or [`ParaphraseArguments`]):
            Training arguments.

    Raises:
        `ValueError`: the model has a prompt-learning adapter, or checkpoints activations that an attack would change.
    """
    if (
        getattr(args, "attack_stream", "layer") == "mlp"
        and args.attacks
        and getattr(model, "is_gradient_checkpointing", False)
    ):
        raise ValueError(MLP_AND_CHECKPOINTING)
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"Adapter {name!r} is a prompt-learning adapter ({config.peft_type}): its virtual tokens shift the "
                "positions that an attack perturbs. Use LoRA or another adapter that keeps positions."
            )


def check_distribution(accelerator: Accelerator) -> None:
    """
    Refuses what a launcher, and not the training arguments, may have switched on.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.

    Raises:
        `ValueError`: anything but one process or DDP, or compilation.
    """
    kind = accelerator.distributed_type
    # By name: accelerate has a type for every kind of device that DDP runs on.
    if kind != DistributedType.NO and not str(kind.value).startswith("MULTI_"):
        raise ValueError(
            f"The launcher started {kind.value}, which is not supported. Use one GPU, or several with DDP "
            "(`accelerate launch --multi_gpu`)."
        )
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        raise ValueError(
            "The launcher switched on compilation (dynamo), which ignores hooks that are added later, and with them "
            "every perturbation. Set `dynamo_backend: no`."
        )
