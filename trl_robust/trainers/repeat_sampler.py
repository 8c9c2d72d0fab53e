from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RepeatedBlockSampler(Sampler[int]):
    """
    Yields every block of examples several times in a row, so that several updates are made on the same batch.

    The order is a permutation seeded by seed and epoch. A last block that is not full is left out, since repeating
    it would put examples into other batches the second time.

    Args:
        num_examples (`int`):
            Size of the dataset.
        block (`int`):
            Examples in one optimiser update, over all processes.
        repeats (`int`):
            How often a block comes.
        seed (`int`):
            Seed of the order.

    Raises:
        `ValueError`: the dataset does not fill one block.
    """

    def __init__(self, num_examples: int, block: int, repeats: int, seed: int) -> None:
        if num_examples < block:
            raise ValueError(
                f"The training dataset has {num_examples} rows, and one update takes {block} (batch size x gradient "
                "accumulation x processes). With `updates_per_attack` above 1 a batch must be full: lower one of "
                "these, or add rows."
            )
        self.num_examples, self.block, self.repeats, self.seed = num_examples, block, repeats, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_examples, generator=generator).tolist()
        for start in range(0, self.num_examples - self.block + 1, self.block):
            for _ in range(self.repeats):
                yield from order[start : start + self.block]

    def __len__(self) -> int:
        return self.num_examples // self.block * self.block * self.repeats
