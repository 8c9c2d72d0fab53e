from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar


class CheckedArguments:
    """Mixin before a configuration of TRL: all faults of the settings, TRL's and ours, are told at once."""

    _lists: ClassVar[tuple[str, ...]] = ()
    """Settings that are lists of words, and may be given as one."""

    @abstractmethod
    def faults(self) -> list[str]:
        """Everything that is wrong with the settings, one sentence each, in the words of a recipe."""

    def __post_init__(self) -> None:
        problems = []
        for name in self._lists:
            if isinstance(value := getattr(self, name), str | int | float):
                setattr(self, name, [str(value)])
        try:
            super().__post_init__()  # type: ignore[misc]  # TRL's configuration is the next in line
        except ValueError as error:
            problems.append(str(error))
        problems += self.faults()
        if problems:
            raise ValueError("\n".join(problems))
