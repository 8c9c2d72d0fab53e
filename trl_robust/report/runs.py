"""Training runs side by side: what was trained on what, for how long, and where the losses ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .content import Table
from .markup import document, plain_table, section
from .tables import markdown_rows
from .values import describe, mapping_of

MADE = "Every value is as the run wrote it (`run.json`). Losses are those of the last step that was logged."


def write_runs_report(folder: str | Path, runs: Sequence[str | Path]) -> Path:
    """
    Writes `report.html` and `report.md` about training runs into a folder.

    Args:
        folder (`str` or `Path`):
            Folder to write into.
        runs (sequence of `str` or `Path`):
            Folders of runs, with `run.json`.

    Returns:
        `Path` of `report.html`.

    Raises:
        `FileNotFoundError`: a folder without `run.json`.
        `ValueError`: one that cannot be read.
    """
    read = [_read(Path(run)) for run in runs]
    names = _names([Path(run) for run in runs])
    tables = [
        Table("What was run", ["", *names], _rows(read, _what)),
        Table("Cost", ["", *names], _rows(read, _cost)),
        Table("Losses", ["", *names], _rows(read, lambda run: mapping_of(run.get("losses")))),
        Table("Versions", ["", *names], _rows(read, lambda run: mapping_of(run.get("versions"))), folded=True),
    ]
    title = "Runs: " + ", ".join(names)
    body = [
        f"<header><h1>Training runs</h1><p>{escape(title)}.</p></header>",
        "<main>",
        section("Runs", f"<p>{escape(MADE)}</p>", *(plain_table(table) for table in tables if table.rows)),
        "</main>",
    ]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(
        f"## {table.caption}\n\n{markdown_rows(table.head, table.rows)}\n" for table in tables if table.rows
    )
    (folder / "report.md").write_text(f"# Training runs\n\n{MADE}\n\n{text}", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(document(title, body), encoding="utf-8")
    return page


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give the folder of a run.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no run.")
    return content


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _what(run: dict[str, Any]) -> dict[str, object]:
    data = {
        f"{name} data": f"{mapping_of(found).get('name')}, {mapping_of(found).get('rows')} rows"
        for name, found in mapping_of(run.get("datasets")).items()
    }
    return {
        "verb": run.get("verb"),
        "finished": run.get("finished"),
        "model": run.get("model"),
        "seed": run.get("seed"),
        **data,
    }


def _cost(run: dict[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for phase, values in mapping_of(run.get("phases")).items():
        for name, value in mapping_of(values).items():
            found[f"{phase}: {name.replace('_', ' ')}"] = value
    hardware = mapping_of(run.get("hardware"))
    return {**found, **{name: hardware[name] for name in ("gpus", "processes", "machine") if name in hardware}}


def _rows(runs: Sequence[dict[str, Any]], of: Any) -> list[list[str]]:
    found = [of(run) for run in runs]
    keys = list(dict.fromkeys(key for values in found for key in values))
    return [[str(key).replace("_", " "), *(describe(values.get(key)) for values in found)] for key in keys]
