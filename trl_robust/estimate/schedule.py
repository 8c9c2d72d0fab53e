"""How many rows a run trains on and attacks, micro-batch by micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """
    What a run adds up to.

    Args:
        updates (`int`, *optional*):
            Optimiser updates; `None` if the run goes by epochs and the number of rows is not known. The other numbers
            are then those of as many updates as one attack serves.
        rows (`int`):
            Rows trained on, over all updates and processes, a row that comes twice twice.
        attacked (`int`):
            Rows for which a perturbation is searched.
        accumulated (`int`):
            Micro-batches of an update.
        processes (`int`):
            Processes.
    """

    updates: int | None
    rows: int
    attacked: int
    accumulated: int
    processes: int


def schedule_of(training: Any, rows: int | None, processes: int) -> Schedule:
    """
    Follows the data loader and the Trainer through a run.

    Args:
        training ([`~trl_robust.trainers.lat_arguments.AttackArguments`]):
            Settings.
        rows (`int`, *optional*):
            Rows of the training data; with `None` every batch is taken to be full.
        processes (`int`):
            Processes, each with a batch of its own.

    Returns:
        [`Schedule`].
    """
    updates: int | None = training.max_steps if training.max_steps > 0 else None
    every = training.updates_per_attack
    if updates is None and rows is not None:
        in_epoch = sum(1 for _ in _epoch(training, rows, processes))
        updates = math.ceil(training.num_train_epochs * in_epoch)
    trained = attacked = 0
    for number, sizes in enumerate(islice(_updates(training, rows, processes), updates or every)):
        trained += sum(sizes)
        if number % every == 0:
            attacked += sizes[-1] if training.faithful else sum(sizes)  # defect D1
    return Schedule(
        updates, trained * processes, attacked * processes, training.gradient_accumulation_steps, processes
    )


def _updates(training: Any, rows: int | None, processes: int) -> Iterator[list[int]]:
    """Sizes of the micro-batches of every update, on one process, without end."""
    if rows is None:
        while True:
            yield [training.per_device_train_batch_size] * training.gradient_accumulation_steps
    while True:
        found = False
        for sizes in _epoch(training, rows, processes):
            found = True
            yield sizes
        if not found:
            return


def _epoch(training: Any, rows: int, processes: int) -> Iterator[list[int]]:
    """Sizes of the micro-batches of every update of an epoch, on one process."""
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    block = size * accumulated * processes
    if training.updates_per_attack > 1:
        for _ in range(rows // block * training.updates_per_attack):
            yield [size] * accumulated
        return
    # Processes are given the same number of rows; the last of them may see some a second time.
    own = math.ceil(rows / processes)
    batches = [size] * (own // size)
    if own % size and not training.dataloader_drop_last:
        batches.append(own % size)
    for start in range(0, len(batches), accumulated):
        yield batches[start : start + accumulated]
