"""What a long evaluation keeps on disk while it runs, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Log:
    """
    A file of JSON lines that grows with the run, so that a run that was killed goes on where it was.

    Args:
        path (`Path`):
            The file; it need not be there yet.
    """

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """Its rows. A last line that was cut short is taken out of the file."""
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self.path.write_bytes(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)


def settings_fault(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """
    Whether a folder holds part of another evaluation; if it holds none, these settings are written down.

    Args:
        folder (`Path`):
            Where answers and scores are kept.
        settings (`Mapping`):
            Everything that settles the answers.

    Returns:
        `str`: what differs; `None` where nothing does.
    """
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.partial")
        draft.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    if known == wanted:
        return None
    different = sorted(key for key in known.keys() | wanted.keys() if known.get(key) != wanted.get(key))
    return (
        f"{folder.parent} holds the answers of an evaluation with another {', '.join(different)}. Go on with the "
        "settings that it was started with, or name another folder."
    )


def fingerprint(value: Any) -> str:
    """SHA-256 of a value that can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
