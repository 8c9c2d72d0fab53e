"""What is wrong with a folder to write to or a seed, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

LARGEST_SEED = 2**32 - 1
"""What NumPy takes."""


def folder_fault(folder: Path) -> str | None:
    """
    Why a folder cannot be made.

    Args:
        folder (`Path`):
            Value of `output_dir`.

    Returns:
        `str`: one sentence or two if it is a file or below one; `None` otherwise.
    """
    # Upwards, to the first that exists: `exists` below a file is false.
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if there is None or there.is_dir():
        return None
    if there == folder:
        return f"`output_dir` is {folder}, which is a file. Name a folder."
    return f"`output_dir` is {folder}, and {there} is a file, which holds no folders. Name another folder."


def seed_fault(seed: int) -> str | None:
    """
    Why a seed cannot be used.

    Args:
        seed (`int`):
            Value of `seed`.

    Returns:
        `str`: one sentence if it is out of range; `None` otherwise.
    """
    return None if 0 <= seed <= LARGEST_SEED else f"`seed` is {seed}; it must be from 0 to {LARGEST_SEED}."
