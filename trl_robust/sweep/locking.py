"""One sweep at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..recipes import RecipeError

try:
    import fcntl
except ImportError:  # Windows has other locks; there two sweeps in one folder are the user's to avoid
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """
    Holds a folder while this block runs. The system lets go of it when the process dies, however it dies.

    Args:
        folder (`Path`):
            The folder; made if need be.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RecipeError(
                    [f"Another sweep is running in `output_dir` {folder}. Wait for it, or name another folder."]
                ) from error
        yield
