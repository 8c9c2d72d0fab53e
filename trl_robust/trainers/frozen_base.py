from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..inner import attack_mode


class FrozenBase:
    """
    The model as it was, without a second one: with its adapters off, or with copies of the weights that are trained.

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers, before the first update.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        trained = [] if hasattr(model, "disable_adapter") else [p for p in model.parameters() if p.requires_grad]
        self.copies = [(parameter, parameter.detach().clone()) for parameter in trained]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """
        Inside this block the model is what it was, in evaluation mode and without gradients.

        Graphs that were built before stay valid: they hold the parameters, whose storage comes back.
        """
        trained = [parameter.data for parameter, _ in self.copies]
        try:
            for parameter, copy in self.copies:
                parameter.data = copy
            with attack_mode(self.model), torch.no_grad():
                if hasattr(self.model, "disable_adapter"):
                    with self.model.disable_adapter():
                        yield
                else:
                    yield
        finally:
            for (parameter, _), data in zip(self.copies, trained, strict=True):
                parameter.data = data
