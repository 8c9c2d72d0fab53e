"""AlpacaEval's files, and win rates that do not reward length."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..data.errors import DataError
from .case_scores import as_row

OUTPUTS = "alpaca_eval"
"""Folder of the outputs inside an evaluation's folder."""


class LengthControlled(TypedDict):
    """What [`length_controlled_win_rate`] returns."""

    win_rate: float | None
    length_controlled_win_rate: float | None
    length_coefficient: float | None
    instruction_difficulty: bool
    n: int
    n_missing: int


def write_outputs(
    folder: str | Path, model: str, questions: Sequence[str], responses: Sequence[Sequence[str | None]]
) -> list[Path]:
    """
    Writes a model's answers as AlpacaEval reads them: `FOLDER/MODEL/wording_00.json`, one file a wording.

    Every file is a list of `instruction`, `output` and `generator`. The instruction is the original question in all of
    them, since that is what AlpacaEval shows to its judge and finds the baseline's answer by; this is why the wordings
    cannot share a file. Questions without an answer are left out of the file.

    Args:
        folder (`str` or `Path`):
            Where to.
        model (`str`):
            Name of the model.
        questions (`Sequence[str]`):
            The original question of each case.
        responses (`Sequence[Sequence[str]]`):
            Cases x wordings, `None` where there is no answer.

    Returns:
        `list[Path]`: one file a wording.
    """
    name = re.sub(r"[^\w.-]+", "_", model).strip("_.") or "model"
    place = Path(folder) / name
    place.mkdir(parents=True, exist_ok=True)
    paths = []
    for wording in range(max(map(len, responses))):
        outputs = [
            {"instruction": question, "output": case[wording], "generator": model}
            for question, case in zip(questions, responses, strict=True)
            if wording < len(case) and case[wording] is not None
        ]
        path = place / f"wording_{wording:02d}.json"
        path.write_text(json.dumps(outputs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def read_outputs(path: str | Path) -> dict[str, str]:
    """
    Reads outputs in AlpacaEval's form, such as those of a baseline.

    Args:
        path (`str` or `Path`):
            A JSON file: a list of objects with `instruction` and `output`.

    Returns:
        `dict`: instruction -> output.

    Raises:
        [`DataError`]: no such file, or not of this form.
    """
    found = {}
    for number, row in enumerate(_read(Path(path))):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise DataError(f"{path}, entry {number}, needs `instruction` and `output`, both texts.")
        found[row["instruction"]] = row["output"]
    return found


def read_annotations(path: str | Path) -> tuple[dict[tuple[str, str], float | None], list[str]]:
    """
    Reads annotations that AlpacaEval wrote, of one file or of all `.json` files below a folder.

    Args:
        path (`str` or `Path`):
            A JSON file with a list of objects with `instruction`, `output_2` (the model's answer; `output_1` is the
            baseline's) and `preference`: from 1, the baseline's, to 2, the model's; 0 is a draw in old files, and null
            or NaN was not judged.

    Returns:
        `tuple`: preference in [0, 1], or `None`, by instruction and the model's answer; and the names of the judges.

    Raises:
        [`DataError`]: no such file, not of this form, or a preference that is none.
    """
    place = Path(path)
    files = sorted(place.rglob("*.json")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"{place} holds no .json file; give the folder or file of AlpacaEval's annotations.")
    found: dict[tuple[str, str], float | None] = {}
    annotators: dict[str, None] = {}
    for file in files:
        for number, row in enumerate(_read(file)):
            where = f"{file}, entry {number},"
            if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output_2"), str):
                raise DataError(f"{where} is no annotation: it needs `instruction`, `output_2` and `preference`.")
            key = (row["instruction"], row["output_2"])
            preference = _preference(row.get("preference"), where)
            if found.get(key) is None:  # the same answer may stand in several files, judged in one of them only
                found[key] = preference
            if row.get("annotator"):
                annotators[str(row["annotator"])] = None
    return found, list(annotators)


def _preference(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == 0:
            return 0.5
        if 1 <= value <= 2:
            return float(value) - 1
    raise DataError(f"{where} has preference {value!r}; it must be from 1 to 2, 0 for a draw, or null.")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError(f"{path} must be a list of objects, as AlpacaEval writes it.")
    return content


def length_controlled_win_rate(
    preferences: Sequence[float | None], lengths: Sequence[int], reference_lengths: Sequence[int]
) -> LengthControlled:
    """
    Win rate at equal length, by AlpacaEval 2's regression *without* its instruction difficulty.

    A logistic regression of the preference on an intercept and `tanh(d / sd(d))`, `d` the model's answer minus the
    baseline's in characters, is read at `d = 0`. AlpacaEval's own has a difficulty of each instruction as well, a
    table to be downloaded, and is fitted together with answers made long on purpose; so its figures are others.

    Args:
        preferences (`Sequence[float]`):
            In [0, 1], `None` or NaN where there is none.
        lengths, reference_lengths (`Sequence[int]`):
            Characters of the model's and of the baseline's answers.

    Returns:
        `dict` with `win_rate` and `length_controlled_win_rate` in percent, `length_coefficient` (above 0 where the
        judge favours the longer answer), `instruction_difficulty` (`False`), `n` and `n_missing`.
    """
    values = as_row(preferences, 0)
    differences = np.asarray(lengths, dtype=float) - np.asarray(reference_lengths, dtype=float)
    scored = ~np.isnan(values)
    y, d = values[scored], differences[scored]
    found = LengthControlled(
        win_rate=None,
        length_controlled_win_rate=None,
        length_coefficient=None,
        instruction_difficulty=False,
        n=len(y),
        n_missing=len(values) - len(y),
    )
    if not len(y):
        return found
    found["win_rate"] = found["length_controlled_win_rate"] = 100 * float(y.mean())
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    if spread == 0:  # all differences are equal: nothing tells length from quality
        found["length_controlled_win_rate"] = None if d[0] != 0 else found["win_rate"]
        return found
    weights = _logistic(np.stack([np.ones(len(d)), np.tanh(d / spread)], axis=1), y)
    found["length_coefficient"] = float(weights[1])
    found["length_controlled_win_rate"] = 100 / (1 + math.exp(-float(weights[0])))
    return found


def _logistic(x: np.ndarray, y: np.ndarray, ridge: float = 1e-6) -> np.ndarray:
    """Weights of a logistic regression on soft labels, by Newton's method. The ridge only keeps them finite."""

    def loss(w: np.ndarray) -> float:
        z = x @ w
        return float((np.logaddexp(0, z) - y * z).mean() + ridge / 2 * w @ w)

    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-(x @ w)))
        gradient = x.T @ (p - y) / len(y) + ridge * w
        hessian = (x.T * (p * (1 - p))) @ x / len(y) + ridge * np.eye(x.shape[1])
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) and size > 1e-8:
            size /= 2
        w = w - size * step
        if np.abs(gradient).max() < 1e-10:
            break
    return w
