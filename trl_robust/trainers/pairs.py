"""What the trainers on pairs of completions share: the pairs, and a reference that never sees a perturbation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset

from .._compat import keep_4bit_differentiable, use_adapter
from ..data import as_prompt_completion
from ..data.row_weights import refuse_row_weights
from ..inner import attack_mode
from .robust import RobustTrainer

REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


class PairedTrainer(RobustTrainer):
    """Mixin before TRL's DPOTrainer."""

    ref_model: Any
    precompute_ref_logps: bool

    @property
    def reference(self) -> str:
        """Which weights serve as the reference, in words."""
        if self.ref_model is not None or not hasattr(self.model, "peft_config"):
            name = self.model.config._name_or_path or "the model"
            return f"{name} as it was before this training (a second copy of all its weights)"
        name = self.model.get_base_model().config._name_or_path or "the base model"
        if "ref" in self.model.peft_config:
            return f"{name} with the adapter that is trained further, as it was before this training (a frozen copy)"
        return f"{name} with its adapters off"

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # A pass in evaluation mode, before this trainer's own constructor is done: it would spoil a 4-bit model.
        if self.accelerator.device.type == "cpu":
            keep_4bit_differentiable(self.model)
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]

    def _with_references(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with the reference's log-probabilities, computed here unless they were precomputed."""
        if REFERENCES[0] in inputs:
            return inputs
        if self.model.training:
            self.keeper.passes += inputs["input_ids"].shape[0]
        return {**inputs, **dict(zip(REFERENCES, self.reference_log_probs(inputs).chunk(2), strict=True))}

    @torch.no_grad()
    def reference_log_probs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Log-probabilities of completions under the reference, in evaluation mode and without any perturbation.

        Args:
            inputs (`dict`):
                A batch, the chosen completions first.

        Returns:
            `torch.Tensor` of shape `(2 * B,)`: sums over the tokens of each completion.
        """
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        own = self.accelerator.unwrap_model(self.model)
        model = own if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        adapter: Any = nullcontext()
        if self.ref_model is None:
            adapter = use_adapter(own, "ref" if "ref" in own.peft_config else None)
        with self.keeper.off(), attack_mode(model), adapter, self.accelerator.autocast():
            found = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                fused_lm_head=True,
                use_cache=False,
            )
        return found.log_probs.sum(1)

    @contextmanager
    def _references_given(self) -> Iterator[None]:
        """TRL's loss takes the reference's log-probabilities from the batch in this block."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before


def as_pairs(dataset: Dataset, name: str) -> Dataset:
    """
    Checks preference data, and takes the prompt out of completions that hold it.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference data, plain or conversational.
        name (`str`):
            What messages call it.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen` and `rejected`.

    Raises:
        [`~trl_robust.data.DataError`]: as [`~trl_robust.data.as_prompt_completion`].
    """
    refuse_row_weights(dataset, name)
    return as_prompt_completion(dataset, name, needs_rejected=True, needs_prompt=True).rename_column(
        "completion", "chosen"
    )


def halves(inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    The chosen and the rejected half of a batch of TRL's, each with labels.

    Args:
        inputs (`dict`):
            `input_ids`, `attention_mask` and `completion_mask`, the chosen completions first.

    Returns:
        `tuple` of two batches with `input_ids`, `attention_mask` and `labels`.
    """
    parts = zip(*(inputs[key].chunk(2) for key in ("input_ids", "attention_mask", "completion_mask")), strict=True)
    chosen, rejected = (
        {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(completion == 0, -100)}
        for tokens, mask, completion in parts
    )
    return chosen, rejected
