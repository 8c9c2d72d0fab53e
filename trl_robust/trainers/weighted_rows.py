from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..data.row_weights import WEIGHT


class WeightedRows:
    """
    Mixin right before TRL's SFTTrainer: a column `weight` of the training data multiplies the loss of its row.

    The loss is TRL's, a mean over tokens, with every token's term multiplied by its row's weight; it is not divided by
    the weights, so that a mean weight other than 1 changes its scale. Weights of 1 train bit for bit as without the
    column. Evaluation is not weighted.
    """

    model: Any
    _signature_columns: Any

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if WEIGHT not in self._signature_columns:
            self._signature_columns += [WEIGHT]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        weight = inputs.get(WEIGHT)
        if weight is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        inputs = {key: value for key, value in inputs.items() if key != WEIGHT}
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

        def weighted(**given: Any) -> Any:
            outputs = model(**given)
            outputs.log_probs = outputs.log_probs * weight.to(outputs.log_probs).unsqueeze(1)
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
