"""Processes that work through a list: imports are paid once a process, and a death costs one piece of work.

Not `concurrent.futures`, whose pool is broken as a whole when one of its processes is killed, as for want of memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import Any

from .serving import TRAINING, Outcome, Work, serve

GRACE_SECONDS = 60.0
"""How long a training that is told to stop has for its step and its checkpoint."""
LEAVING_SECONDS = 5.0
"""How long a process without work has to end by itself."""


class Worker:
    """A process and the two ends of what is said to it and by it."""

    def __init__(self, threads: int | None, gpu: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.work: Any = None
        self.stage = ""
        self.process = context.Process(target=serve, args=(other, threads), daemon=True)
        with _environment("CUDA_VISIBLE_DEVICES", gpu):
            self.process.start()
        other.close()  # so that the death of the process is the end of the connection

    def send(self, work: Work | None) -> None:
        self.work, self.stage = work, ""
        self.connection.send(work)

    def receive(self) -> Outcome | None:
        """What has come: an outcome, or nothing but a new stage."""
        try:
            said = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return Outcome("failed", f"its process ended with {how}; a killed process may have lacked memory")
        if isinstance(said, Outcome):
            return said
        self.stage = said
        return None

    def leave(self, idle: bool) -> None:
        """Ends the process: an idle one by itself, so that it tidies up after itself, another at once."""
        if idle:
            with suppress(BrokenPipeError):
                self.connection.send(None)
            self.process.join(LEAVING_SECONDS)
        self.process.kill()
        self.process.join()

    def ask_to_stop(self) -> None:
        """Has a training finish its step and save a checkpoint; outside of trainings the signal is ignored."""
        if self.stage == TRAINING and self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)

    def wait_for_checkpoint(self) -> None:
        """Waits until a training that was asked to stop has done so."""
        while self.stage == TRAINING and self.connection.poll(GRACE_SECONDS):
            if self.receive() is not None:
                return


def run_all(
    works: Sequence[Work],
    *,
    jobs: int,
    threads: int | None,
    gpus: Sequence[str] = (),
    told: Callable[[Sequence[Worker]], None],
    ended: Callable[[Any, Outcome], None],
) -> None:
    """
    Works through a list with several processes.

    Args:
        works (sequence of [`Work`]):
            What is to be done, in this order.
        jobs (`int`):
            Processes.
        threads (`int`, *optional*):
            Threads of torch in each; torch's own number if not given.
        gpus (sequence of `str`, *optional*):
            Devices to share out among the processes, as `CUDA_VISIBLE_DEVICES` names them.
        told (`Callable`):
            Is given the busy workers whenever one of them has begun something.
        ended (`Callable`):
            Is given each piece of work and its [`Outcome`].

    Raises:
        `KeyboardInterrupt`: the caller was interrupted; the processes are stopped by then.
    """
    waiting, workers, busy = deque(works), [], []  # type: ignore[var-annotated]
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                free = next((worker for worker in workers if worker not in busy), None)
                if free is None:
                    gpu = gpus[len(workers) % len(gpus)] if gpus else None
                    workers.append(free := Worker(threads, gpu))
                free.send(waiting.popleft())
                busy.append(free)
            told(busy)
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                outcome = worker.receive()
                if outcome is None:
                    continue
                busy.remove(worker)
                if not worker.process.is_alive():
                    workers.remove(worker)
                ended(worker.work, outcome)
    except KeyboardInterrupt:  # a second one ends this as well
        for worker in busy:
            worker.ask_to_stop()
        for worker in busy:
            worker.wait_for_checkpoint()
        raise
    finally:
        for worker in workers:
            worker.leave(worker not in busy)


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Sets an environment variable for processes that are started inside."""
    if value is None:
        yield
        return
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
