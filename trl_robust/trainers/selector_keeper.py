from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..selection.learner import SelectorLearner

STATE_NAME = "selection.json"
LOGITS_NAME = "selector_state.safetensors"


class SelectorKeeper:
    """
    The selector and the cost of a training, as its checkpoints keep them.

    Args:
        learner ([`~trl_robust.selection.learner.SelectorLearner`]):
            The selector.
        processes (`int`):
            Number of processes.
    """

    def __init__(self, learner: SelectorLearner, processes: int) -> None:
        self.learner, self.processes = learner, processes
        self.passes = 0.0

    def off(self) -> AbstractContextManager[None]:
        """Nothing is perturbed here."""
        return nullcontext()

    def save(self, folder: Path, forward_passes: float, main: bool) -> None:
        """
        Writes what a run needs to go on as if it had not stopped. What is drawn of the safe set follows from the
        number of the update, and needs no saving.

        Args:
            folder (`Path`):
                A checkpoint.
            forward_passes (`float`):
                Cost so far, over all processes.
            main (`bool`):
                Whether this process writes.
        """
        if main:
            self.learner.save(folder / LOGITS_NAME)
            state = {"schema": 1, "forward_passes": forward_passes}
            (folder / STATE_NAME).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """
        Reads what [`save`] wrote.

        Args:
            folder (`Path`):
                A checkpoint.

        Raises:
            `ValueError`: it is of another dataset, or of another trainer.
        """
        if not (folder / LOGITS_NAME).is_file():
            raise ValueError(f"The checkpoint {folder} holds no selector ({LOGITS_NAME}); it is of another training.")
        self.learner.load(folder / LOGITS_NAME)
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        self.passes = state["forward_passes"] / self.processes
