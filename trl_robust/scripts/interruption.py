"""Ctrl-C and SIGTERM: the step is finished, a checkpoint is saved, and training ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; the message says what is left and how to go on."""


class StopAtSignal(TrainerCallback):
    """
    Ends training in good order at the first SIGINT or SIGTERM; a second one ends it at once.

    To be used as a context manager around `train()`, which puts the handlers of before back.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopAtSignal:
        # Only the main thread may set handlers; elsewhere signals stay with whoever runs the thread.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for a checkpoint and for the end, if a signal came during the step."""
        asked = self._asked
        if args.world_size > 1:
            # A signal reaches the processes at different moments; all must save after the same step.
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        if asked:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control
