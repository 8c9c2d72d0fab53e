"""What was written: the keys of a YAML file with their lines, and those of a command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Given:
    """
    A value as it was written.

    Args:
        value (`Any`):
            From YAML: what YAML makes of it. From a command line: the list of its words.
        place (`str`):
            Where, for messages.
        from_command_line (`bool`, *optional*, defaults to `False`):
            Whether it is a list of words.
    """

    value: Any
    place: str
    from_command_line: bool = False


def read_yaml(path: Path) -> tuple[dict[str, Given], list[str]]:
    """
    Reads a recipe's file.

    Args:
        path (`Path`):
            The file.

    Returns:
        `tuple`: the top-level keys in their order, and what is wrong with the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, [f"There is no recipe at {path.absolute()}. Correct the path given to `--config`."]
    except UnicodeDecodeError:
        return {}, ["The file is not UTF-8 text. Save it as UTF-8."]
    except OSError as error:
        return {}, [f"The file cannot be read: {error.strerror}."]
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        return {}, [_syntax(error)]
    finally:
        loader.dispose()
    if not isinstance(node, yaml.MappingNode) or not isinstance(data, dict):
        kind = "empty" if data is None else f"a {'list' if isinstance(data, list) else 'single value'}"
        return {}, [f"The file is {kind}; a recipe is a mapping, with lines such as `learning_rate: 2e-5`."]

    faults = _repeated_keys(node)
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
    given = {}
    for key, value in data.items():
        if isinstance(key, str):
            given[key] = Given(value, f"line {lines.get(key, '?')}")
        else:
            faults.append(f"{key!r} is not a key (YAML reads on, off, yes, no and numbers as values). Remove it.")
    return given, faults


def _syntax(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"The file is not valid YAML: {' '.join(str(error).split())}"
    mark, problem = error.problem_mark, error.problem or "syntax error"
    return (
        f"Line {mark.line + 1}, column {mark.column + 1} is not valid YAML: {problem}. Check the indentation, the "
        "quotes and the colons there."
    )


def _repeated_keys(node: yaml.Node) -> list[str]:
    """Keys that stand twice in one mapping; YAML itself keeps the last one without a word."""
    faults = []
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in seen:
                    faults.append(f"`{key.value}` is given twice, in lines {seen[key.value]} and {line}. Keep one.")
                seen[key.value] = line
            faults += _repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            faults += _repeated_keys(item)
    return faults


def split_command_line(argv: list[str]) -> tuple[dict[str, Given], list[str]]:
    """
    Splits `--key value`, `--key=value`, `--key one two` and `--switch` into keys and words.

    Args:
        argv (`list[str]`):
            The command line after the verb.

    Returns:
        `tuple`: keys (with underscores) and their words, the last of a repeated key; and what is wrong.
    """
    given: dict[str, Given] = {}
    faults = []
    words: list[str] | None = None
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            words = [value] if equals else []
            given[name.replace("-", "_")] = Given(words, "command line", from_command_line=True)
        elif words is None:
            faults.append(f"`{token}` stands alone on the command line; settings are written `--key value`.")
        else:
            words.append(token)
    return given, faults


def without(argv: list[str], names: set[str]) -> list[str]:
    """
    A command line without some of its keys and their words.

    Args:
        argv (`list[str]`):
            The command line.
        names (`set[str]`):
            Keys, with underscores.

    Returns:
        `list[str]`.
    """
    kept, keep = [], True
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            keep = token[2:].partition("=")[0].replace("-", "_") not in names
        if keep:
            kept.append(token)
    return kept
