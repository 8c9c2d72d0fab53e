"""What subjects of attacks have in common: progress bars, and a memory of what is done."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")

WRITING = threading.Lock()
"""One writer at a time: a served model is asked from several threads."""


class Journaled:
    """
    Progress bars, and a journal in which what is done stands under a key.

    An attack that was stopped and is run again with the same journal asks no prompt twice and gives the same answers.
    """

    progress: bool
    journal: MutableMapping[str, Any] | None

    def track(self, steps: Sequence[int], description: str) -> Iterable[int]:
        """`steps` with a progress bar on the terminal; without one when the output goes into a file."""
        console = Console(stderr=True)
        hidden = not (self.progress and console.is_terminal)
        return track(steps, description, console=console, disable=hidden, transient=True)

    def remembered(self, what: Any, do: Callable[[], T]) -> T:
        """
        What stands in the journal, or else what is done now, and then stands there.

        Args:
            what (`Any`):
                What tells it from everything else under this journal; can be written as JSON.
            do (`Callable`):
                Does it; what it gives can be written as JSON.

        Returns:
            What `do` gives, now or then.
        """
        if self.journal is None:
            return do()
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        if key not in self.journal:
            done = do()
            with WRITING:
                self.journal[key] = done
        return self.journal[key]
