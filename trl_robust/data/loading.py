"""Rows from wherever a recipe says they are: a file, a folder, or the hub.

Everything that can be wrong with a name is one `DataError` that says what was looked for and what to write instead.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .cells import check_cells
from .errors import DataError
from .preference import prompt_inside, take_prompt_out

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File endings that are read, and what `datasets` calls their format."""


def is_local(name: str) -> bool:
    """
    Whether a dataset or model name means something on this machine rather than on the hub.

    Args:
        name (`str`):
            Name as a recipe gives it.

    Returns:
        `bool`: `True` if it exists here, and also if it can only be a path (`./x`, `/x`, `a/b/c`, `x.jsonl`).
    """
    path = Path(name).expanduser()
    return (
        path.exists()
        or name.startswith((".", "~"))
        or path.is_absolute()
        or "\\" in name
        or name.count("/") > 1
        or path.suffix in BUILDERS
    )


def where_looked(name: str) -> str:
    """
    The place that a relative path stands for, for messages.

    Args:
        name (`str`):
            Path as given.

    Returns:
        `str`: a phrase that ends a sentence.
    """
    path = Path(name).expanduser()
    if path.is_absolute():
        return f"{path} does not exist."
    return f"{path.absolute()} does not exist (a relative path starts from the current directory)."


def load_rows(name: str, *, config: str | None = None, split: str = "train") -> Dataset:
    """
    Loads a dataset from a `.jsonl`, `.json`, `.csv` or `.parquet` file, a local folder, or the hub.

    A dataset with `prompt` and `response` but no `completion` has the response renamed, and a `refusal` beside it
    dropped, since LLM-LAT/benign-dataset, the published benign data, is of that form.

    Args:
        name (`str`):
            Path of a file, of a folder (of such files, or as `save_to_disk` writes it), or a hub id.
        config (`str`, *optional*):
            Name of a configuration, for hub ids and folders that have several.
        split (`str`, *optional*, defaults to `"train"`):
            Which split. A single file has one, `train`. Slices such as `train[:100]` are allowed, except for what
            `save_to_disk` wrote.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        [`DataError`]: nothing there, no such split, not readable, or no rows.

    Example:

    ```python
    >>> from trl_robust.data import load_rows

    >>> rows = load_rows("runs/organism/data/harmful_preferences.jsonl")
    >>> rows.column_names
    ['prompt', 'chosen', 'rejected']
    ```
    """
    path = Path(name).expanduser()
    if path.is_file():
        rows = _from_file(path, split)
    elif path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        rows = _from_saved(path, split)
    elif path.is_dir():
        rows = _load(str(path), f"Folder {name}", split=split, name=config)
    elif is_local(name):
        raise DataError(f"There is no dataset {name}: {where_looked(name)} Correct the path, or give a hub id.")
    else:
        rows = _load(name, f"Dataset {name}", split=split, name=config)
    if len(rows) == 0:
        raise DataError(f"Dataset {name} has no rows in split {split!r}.")
    columns = set(rows.column_names)
    if {"prompt", "response"} <= columns and "completion" not in columns:
        rows = rows.rename_column("response", "completion")
        rows = rows.remove_columns([column for column in ("refusal",) if column in columns])
    return rows


def _from_file(path: Path, split: str) -> Dataset:
    if path.suffix not in BUILDERS:
        raise DataError(f"{path} is not a dataset: its name must end in one of {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. A dataset needs at least one row.")
    if path.suffix == ".jsonl" and (fault := _first_bad_line(path)):
        raise DataError(f"{path} cannot be read: {fault}")
    return _load(BUILDERS[path.suffix], f"File {path}", split=split, data_files=str(path))


def _first_bad_line(path: Path) -> str | None:
    """What is wrong with a JSON-lines file, by line; `datasets` reports a row of the block it was reading."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8 text. Save the file as UTF-8."
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg} at column {error.colno}). Correct or remove the line."
            if not isinstance(row, dict):
                return f"line {number} is not an object with columns, as {{'prompt': ...}} is."
    return None


def _from_saved(path: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise DataError(f"Folder {path} looks like a saved dataset, but cannot be read: {_reason(error)}") from error
    if isinstance(saved, Dataset):
        own = str(saved.split) if saved.split is not None else "train"
        saved = DatasetDict({own: saved, "train": saved})
    if split not in saved:
        raise DataError(f"Dataset {path} has no split {split!r}; it has {sorted(saved)}.")
    return saved[split]


def _load(source: str, shown: str, *, split: str, **options: str | None) -> Dataset:
    """`load_dataset`, with what a user can get wrong turned into one message."""
    try:
        return load_dataset(source, split=split, **options)
    except StopIteration as error:  # what `datasets` 5 raises for a file without a row
        raise DataError(f"{shown} has no rows.") from error
    except (DatasetsError, OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        message = _reason(error)
        if "corresponds to no data" in message:  # a file of column names alone
            raise DataError(f"{shown} has no rows.") from error
        if "Unknown split" in message:
            allowed = message.partition("Should be one of ")[2]
            raise DataError(f"{shown} has no split {split!r}; it has {allowed}") from error
        if isinstance(error, ConnectionError) or "Hub" in message:
            raise DataError(
                f"{shown} is neither a file nor a folder here ({Path(source).absolute()}), and the hub did not give "
                f"it: {message}"
            ) from error
        raise DataError(f"{shown} cannot be read: {message}") from error


def _reason(error: BaseException) -> str:
    """The first line of what was wrong; `datasets` keeps it in the cause."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return " ".join(str(cause).split()) or type(cause).__name__


def as_conversation(dataset: Dataset, system_prompt: str | None = None, *, name: str = "training") -> Dataset:
    """
    Turns plain strings into user and assistant messages, so that the model's chat template is applied to them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prompt-completion or preference data, or conversational data, which is left as it is.
        system_prompt (`str`, *optional*):
            System message put before every conversation that has none.
        name (`str`, *optional*, defaults to `"training"`):
            What messages call the dataset.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        [`DataError`]: the columns hold no prompts, or what is neither text nor messages.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_robust.data import as_conversation

    >>> as_conversation(Dataset.from_dict({"prompt": ["Hi"], "completion": ["Hello"]}))[0]["prompt"]
    [{'content': 'Hi', 'role': 'user'}]
    ```
    """
    if prompt_inside(dataset):
        dataset = take_prompt_out(dataset, name)
    opening = next((column for column in ("prompt", "messages") if column in dataset.column_names), None)
    if opening is None:
        raise DataError(
            f"The {name} dataset has the columns {dataset.column_names}; `chat_format` and `system_prompt` need a "
            "`prompt`. Rename its columns, or leave both out."
        )
    answers = [column for column in ("completion", "chosen", "rejected") if column in dataset.column_names]
    check_cells(dataset, name, (opening, *answers), one_kind=False)
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []

    def wrap(row: dict) -> dict:
        prompt = row[opening]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        # What is null or has no turns stays so, to be refused as a row without a prompt.
        if system and turns and turns[0]["role"] != "system":
            turns = system + turns
        wrapped = {opening: turns}
        for column in answers:
            answer = row[column]
            wrapped[column] = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        return wrapped

    return dataset.map(wrap, desc=f"Making conversations of the {name} dataset")


def content_hash(dataset: Dataset) -> str:
    """
    A fingerprint of the rows themselves: the same rows in the same order give the same value on every machine.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset. (Its own `_fingerprint` depends on paths and on the version of `datasets`.)

    Returns:
        `str`: SHA-256, hexadecimal.
    """
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8"))
        digest.update(b"\n")
    return digest.hexdigest()
