"""A worker process: what it does with a piece of work, whatever that is.

Nothing heavy is imported with this module: a new process has to watch over its parent and to hush the libraries before
they are loaded.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, Protocol

TRAINING = "training"
"""The stage in which a piece of work may be asked to stop in good order."""
ERROR = "error.txt"
"""Why a piece of work failed, beside its log."""

Say = Callable[[str], None]


class Work(Protocol):
    """A piece of work that a process can be sent."""

    @property
    def title(self) -> str: ...
    @property
    def log(self) -> Path: ...
    def run(self, say: Say) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """
    How a piece of work ended.

    Args:
        state (`str`):
            `"done"`, `"failed"` or `"stopped"`.
        reason (`str`, *optional*):
            Why it failed.
    """

    state: Literal["done", "failed", "stopped"]
    reason: str = ""


def serve(connection: Connection, threads: int | None) -> None:
    """
    A worker's life: take a piece of work, say what came of it, until there is none.

    Args:
        connection (`multiprocessing.connection.Connection`):
            To the parent.
        threads (`int`, *optional*):
            Threads of torch; its own number if not given.
    """
    # Ctrl-C goes to all processes of a terminal; the parent decides, and a training sets a handler of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # as the command line does
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with suppress(EOFError):
        while (work := connection.recv()) is not None:
            connection.send(_attempt(work, connection.send))


def _die_with_parent() -> None:
    """A parent that was killed leaves nobody to tell, and a new sweep in the same folder may have begun."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _attempt(work: Work, say: Say) -> Outcome:
    with _output_to(work.log):
        try:
            work.run(say)
        except KeyboardInterrupt as stop:  # a training's, after its checkpoint
            print(stop, file=sys.stderr)
            return Outcome("stopped")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            (work.log.parent / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
            return Outcome("failed", _reason(error))
    return Outcome("done")


def _reason(error: BaseException) -> str:
    """Why a piece of work failed, in a line: our own faults as they are, others with their kind."""
    from ..data import DataError
    from ..recipes import RecipeError

    if isinstance(error, RecipeError):
        return " ".join(error.faults)
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, DataError) else f"{type(error).__name__}: {text}"


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends what is printed, from C as well, into a file: several processes would tear one another's lines apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("a", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
