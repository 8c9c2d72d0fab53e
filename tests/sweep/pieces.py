"""Pieces of work that need no model, and no import that a new process would have to wait for."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Piece:
    """Work that writes a file, or fails, or takes its whole process down."""

    name: str
    folder: Path
    does: str = "write"

    @property
    def title(self) -> str:
        return self.name

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.txt"

    def run(self, say) -> None:
        say("working")
        if self.does == "die":
            os._exit(9)
        if self.does == "fail":
            raise ValueError("no luck")
        print("written by the work")
        (self.folder / self.name).write_text(str(os.getpid()))
