"""The datasets of the suite `generalized`, and its attacks made of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from ..attacks import AttackRow
    from ..evaluation.lines import Line
    from .generalized_arguments import GeneralizedArguments

SETS = {"examples": "examples_data", "openings": "openings_data", "benign": "benign_data"}
"""Names under which an attack's entry finds the suite's own datasets."""

STAND_INS = 1024
"""Rows in place of datasets that are not there when a file is checked."""

DIRECTION_ROWS = 256
"""Prompts of each kind that the refusal direction is taken from unless its entry says otherwise."""


def requests_of(args: GeneralizedArguments, data: str | None, *, answers: bool = False) -> list[AttackRow]:
    """
    Requests or questions of a dataset.

    Args:
        args ([`GeneralizedArguments`]):
            Names of the columns.
        data (`str`, *optional*):
            The dataset.
        answers (`bool`, *optional*, defaults to `False`):
            Whether every row needs an answer.

    Returns:
        `list` of [`~trl_robust.attacks.AttackRow`]; empty without a dataset.

    Raises:
        [`~trl_robust.data.DataError`]: a dataset that is not there or lacks a column.
    """
    from ..data import DataError, load_rows
    from .attack import attack_rows

    if data is None:
        return []
    main = data == args.data
    rows = attack_rows(
        load_rows(data, split=args.data_split if main else "train"),
        data,
        # The names of the columns are those of the requests; the other datasets have the usual ones.
        {"prompt": args.prompt_column, "target": args.target_column, "answer": args.answer_column} if main else None,
        args.max_rows if main else None,
    )
    if answers and (without := [row.id for row in rows if not row.answer]):
        raise DataError(f"{data} has questions without an `answer` ({len(without)}, the first is row {without[0]}).")
    return rows


def texts_of(data: str | None) -> list[str]:
    """
    Texts for the perplexity.

    Args:
        data (`str`, *optional*):
            A dataset with a column `text`.

    Returns:
        `list[str]`; empty without a dataset.

    Raises:
        [`~trl_robust.data.DataError`]: a dataset that is not there or has no `text`.
    """
    from ..data import DataError, load_rows

    if data is None:
        return []
    rows = load_rows(data)
    if "text" not in rows.column_names:
        raise DataError(f"{data} has no column 'text' but {rows.column_names}.")
    return [text for text in rows["text"] if isinstance(text, str) and text.strip()]


def lines_of(args: GeneralizedArguments) -> tuple[list[Line], dict[str, str]]:
    """
    The attacks that the arguments describe, with their rows.

    Args:
        args ([`GeneralizedArguments`]):
            Arguments.

    Returns:
        `tuple`: [`~trl_robust.evaluation.lines.Line`]s, each followed by its random control; and the attacks that are
        left out because no rows were given for them, with the arguments that would name some.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: listing every fault of the attacks.
    """
    from ..recipes import RecipeError

    @cache
    def rows_of(kind: str, field: str, named: str | None, limit: int | None) -> Any:
        return _rows_of(args, kind, field, named, limit)

    lines, missing, faults = _read(args, rows_of)
    if not lines and not faults:
        faults = ["There are no rows for any of the attacks; name some, see `examples_data` and the like."]
    if faults:
        raise RecipeError(faults)
    left_out = {}
    for name, fields in missing.items():
        kind = str((dict(args.attacks or {})[name] or {}).get("attack", name))  # type: ignore[arg-type]
        left_out[name] = f"needs {' and '.join(f'`{argument_for(kind, field)}`' for field in fields)}"
    return lines, left_out


def checked_lines(args: GeneralizedArguments) -> tuple[list[Line], list[str]]:
    """
    The attacks that the arguments describe, with stand-ins for rows, before any dataset is read.

    Args:
        args ([`GeneralizedArguments`]):
            Arguments.

    Returns:
        `tuple`: the lines, and a sentence for every fault.
    """
    row = {"prompt": "a request", "completion": "an answer", "target": "an opening"}

    def rows_of(kind: str, field: str, named: str | None, limit: int | None) -> Any:
        return {"templates": None, "attacker": object()}.get(field, [row] * STAND_INS)

    lines, _, faults = _read(args, rows_of)
    return lines, faults


def _read(
    args: GeneralizedArguments, rows_of: Callable[[str, str, str | None, int | None], Any]
) -> tuple[list[Line], dict[str, list[str]], list[str]]:
    """What [`~trl_robust.evaluation.lines.read_lines`] gives, with values brought into the types of the settings."""
    from ..evaluation.lines import KEYS, read_lines
    from ..evaluation.named import ATTACKS, settings_of
    from ..recipes.values import UnfitError, fit

    faults: list[str] = []
    entries: dict[str, Any] = {}
    chosen = {name: entry for name, entry in dict(args.attacks or {}).items() if not args.only or name in args.only}  # type: ignore[arg-type]
    for name, given in chosen.items():
        entry = dict(given) if isinstance(given, dict) else given
        kind = entry.get("attack", name) if isinstance(entry, dict) else name
        if isinstance(entry, dict) and kind in ATTACKS:
            hints = get_type_hints(ATTACKS[kind])
            axis = ATTACKS[kind].budget_axis  # type: ignore[attr-defined]
            for key in settings_of(kind):
                if key not in entry or key in KEYS:
                    continue
                hint = list[str] if key == "sites" else hints[key]
                if key == axis and isinstance(entry[key], list):
                    hint = list[hint]  # type: ignore[valid-type]
                try:
                    entry[key] = fit(entry[key], hint)
                except UnfitError as error:
                    faults.append(f"`{key}` of the attack `{name}` is {entry[key]!r}; {error}.")
                    del entry[key]
        entries[name] = entry
    lines, missing, found = read_lines(entries, rows_of, controls=args.controls, seed=args.seed)
    return lines, missing, faults + found


def argument_for(kind: str, field: str) -> str:
    """
    The argument that names the rows for a field of an attack.

    Args:
        kind (`str`):
            Name of the attack.
        field (`str`):
            The field.

    Returns:
        `str`.
    """
    if field == "attacker":
        return "attacker_model"
    return SETS[_usual_set(kind, field)]


def _usual_set(kind: str, field: str) -> str:
    usual = "openings" if kind == "universal" else "examples"
    return {"harmful": "openings", "harmless": "benign"}.get(field, usual)


def _rows_of(args: GeneralizedArguments, kind: str, field: str, named: str | None, limit: int | None) -> Any:
    """Rows for a field of an attack; `None` where there is no dataset for it."""
    from .attack import read_templates

    if field == "templates":
        path = named or args.templates
        return read_templates(path) if path else None
    if field == "attacker":
        return attacker_of(args)
    path = dataset_of(args, named or _usual_set(kind, field))
    if path is None:
        return None
    if field in ("harmful", "harmless") and limit is None:
        limit = DIRECTION_ROWS
    return rows_for(kind, path, limit)


def rows_for(kind: str, path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """
    Rows that an attack works with.

    Args:
        kind (`str`):
            Name of the attack.
        path (`str`):
            The dataset.
        limit (`int`, *optional*):
            Only the first rows.

    Returns:
        `list[dict]`.

    Raises:
        [`~trl_robust.data.DataError`]: a dataset that is not there or lacks a column.
    """
    from ..data import DataError, as_prompt_completion, load_rows
    from .attack import is_request

    rows = load_rows(path)
    if kind in ("many_shot", "finetune"):
        rows = as_prompt_completion(rows, "fine-tuning" if kind == "finetune" else "many-shot")
    needed = {"many_shot": ["completion"], "finetune": ["completion"], "universal": ["target"]}.get(kind, [])
    if lacking := [column for column in ("prompt", *needed) if column not in rows.column_names]:
        raise DataError(f"{path} has {rows.column_names}; {' and '.join(f'`{one}`' for one in lacking)} are needed.")
    if wrong := [number for number, prompt in enumerate(rows["prompt"]) if not is_request(prompt)]:
        raise DataError(f"{path} has rows without a request ({len(wrong)}, the first is row {wrong[0]}); fill them.")
    return list(rows.select(range(min(limit or len(rows), len(rows)))))


def check_file(path: str) -> list[Line]:
    """
    Checks a file of this suite without its models and datasets.

    Args:
        path (`str`):
            The file.

    Returns:
        `list` of [`~trl_robust.evaluation.lines.Line`]: its attacks.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: listing every fault.
    """
    from ..recipes.flat import load_arguments
    from ..recipes.reading import read_yaml
    from .generalized_arguments import GeneralizedArguments

    given, _ = read_yaml(Path(path).expanduser())  # what is wrong with the file is said below
    argv = ["--config", path]
    for name, stand_in in (("model", "model"), ("data", "data.jsonl"), ("output_dir", "not-there")):
        if name not in given:
            argv += [f"--{name}", stand_in]
    args: GeneralizedArguments = load_arguments(GeneralizedArguments, argv, prog="trl-robust evaluate")
    return checked_lines(args)[0]


def dataset_of(args: GeneralizedArguments, named: str) -> str | None:
    """The dataset behind a name in an attack's entry: one of the suite's own, a file of the organism, or any other."""
    if named in SETS:
        return getattr(args, SETS[named])
    inside = Path(args.organism) / "data" / named if args.organism is not None else None
    return str(inside) if inside is not None and inside.is_file() else named


def attacker_of(args: Any) -> Any:
    """The attacker of `pair`, as the arguments have it; `None` without one."""
    from ..attacks import EndpointAttacker, LocalAttacker, Subject

    if args.attacker_model is None:
        return None
    if args.attacker_url is not None:
        return EndpointAttacker(args.attacker_url, args.attacker_model, key_variable=args.attacker_key_env)
    return LocalAttacker(
        Subject.load(
            args.attacker_model,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            max_new_tokens=400,
            batch_size=args.batch_size,
        ),
        seed=args.seed,
    )
