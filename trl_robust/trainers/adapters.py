"""Two adapters on one frozen base: the model, and the auxiliary model of Algorithm 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AUXILIARY = "auxiliary"


class TwoAdapters:
    """
    Gives a model with one adapter a second one that starts as its copy, and switches between them.

    Args:
        model ([`~peft.PeftModel`]):
            Outside distributed wrappers, with one active adapter.

    Raises:
        `ValueError`: the model has no adapter, or several are active.
    """

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "peft_config"):
            raise ValueError(
                "Algorithm 1 keeps its two models as two adapters on one base, and the model has none. Set "
                "`use_peft: true` (in Python: `peft_config`), or `penalty_algorithm: memory_efficient`."
            )
        active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
        if len(active) != 1 or AUXILIARY in model.peft_config:
            raise ValueError(f"The model has the adapters {sorted(model.peft_config)}; one is needed to start from.")
        self.model, self.name = model, active[0]
        model.add_adapter(AUXILIARY, model.peft_config[self.name])
        self.find()
        if {id(parameter) for parameter in self.main} & {id(parameter) for parameter in self.auxiliary}:
            raise ValueError(
                "Some weights that are trained belong to both adapters. Use an adapter with `bias: none`."
            )
        for parameter, copy in zip(self.main, self.auxiliary, strict=True):
            copy.data = parameter.detach().clone()  # in the same dtype, on the same device

    def find(self) -> None:
        """Looks up the weights of both: PEFT puts new ones in their place when it loads adapters of a 4-bit model."""
        self.model.set_adapter(AUXILIARY)
        self.auxiliary = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.set_adapter(self.name)
        self.main = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.train_both()

    def train_both(self) -> None:
        """Has gradients reach both adapters; PEFT freezes the one that is not active."""
        for parameter in (*self.main, *self.auxiliary):
            parameter.requires_grad_()

    @contextmanager
    def auxiliary_active(self) -> Iterator[None]:
        """Inside this block the model is the auxiliary one; forward and backward pass belong in it together."""
        self.model.set_adapter(AUXILIARY)
        self.train_both()
        try:
            yield
        finally:
            self.model.set_adapter(self.name)
            self.train_both()
