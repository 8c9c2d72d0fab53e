"""Arguments of a verb that does not train: one dataclass, from a command line and, if wanted, a YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from trl import TrlParser

from .arguments import RecipeError
from .loading import fit_word, shown, unknown
from .reading import Given, read_yaml, split_command_line
from .values import UnfitError, fit

T = TypeVar("T")


def load_arguments(cls: type[T], argv: list[str], *, prog: str) -> T:
    """
    Reads and checks the arguments of a verb; `--help` prints them and leaves.

    Args:
        cls (`type`):
            Dataclass of the arguments.
        argv (`list[str]`):
            `--key value` words, and `--config FILE.yaml` for a file of them, which may say which verb it is for. The
            command line beats the file.
        prog (`str`):
            What the help calls the program.

    Returns:
        An instance of `cls`.

    Raises:
        [`RecipeError`]: listing every fault.
    """
    if {"-h", "--help"} & set(argv):
        TrlParser([cls], prog=prog).parse_args(["--help"])  # type: ignore[list-item]
    words, faults = split_command_line(argv)
    given: dict[str, Given] = {}
    source = "The command line"
    if (config := words.pop("config", None)) is not None:
        source = " ".join(config.value)
        given, found = read_yaml(Path(source).expanduser())
        faults += found
        verb = given.pop("verb", None)
        if verb is not None and verb.value != prog.split()[1]:
            faults.append(f"`verb` ({verb.place}) is {shown(verb)}; this is `trl-robust {prog.split()[1]}`.")
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values = {}
    for name, item in (given | words).items():
        if name not in fields:
            faults.append(unknown(name, item, list(fields)))
            continue
        try:
            values[name] = fit(fit_word(item, hints[name]), hints[name], fields[name].metadata.get("choices"))
        except UnfitError as error:
            faults.append(f"`{name}` ({item.place}) is {shown(item)}; {error}.")
    try:
        arguments = cls(**values)
    except ValueError as error:
        faults += [line for line in str(error).splitlines() if line.strip()]
    if faults:
        raise RecipeError(faults, source)
    return arguments
