from __future__ import annotations

import torch


class CyclingStream:
    """
    The numbers 0 to n - 1 in random order, again and again, each round in a new order.

    A position of the stream says all: nothing has to be remembered to go on after an interruption, and every process
    can work out what the others draw.

    Args:
        rows (`int`):
            n.
        seed (`int`):
            Seed of the orders.

    Example:

    ```python
    >>> stream = CyclingStream(rows=4, seed=0)
    >>> sorted(stream.take(0, 4)), stream.take(2, 4) == stream.take(0, 6)[2:]
    ([0, 1, 2, 3], True)
    ```
    """

    def __init__(self, rows: int, seed: int) -> None:
        if rows < 1:
            raise ValueError("A stream needs at least one row to draw from.")
        self.rows, self.seed = rows, seed
        self._round, self._order = -1, [0]

    def take(self, start: int, count: int) -> list[int]:
        """
        A stretch of the stream.

        Args:
            start (`int`):
                Position of its first number.
            count (`int`):
                Its length.

        Returns:
            `list[int]`.
        """
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> int:
        number, place = divmod(position, self.rows)
        if number != self._round:
            # Both go in, mixed: with their sum, round 1 of seed 0 would be round 0 of seed 1.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            self._round, self._order = number, torch.randperm(self.rows, generator=generator).tolist()
        return self._order[place]
