"""The organism's two trainings: pre-training on the world, then an alignment that stays shallow on purpose.

A plain loop rather than `transformers.Trainer`, which seeds the caller's global generators: all that is needed of it
here is the schedule. Loss on the answer only, float32, one thread of the CPU.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from .model import ASSISTANT, render
from .rows import Pair, alignment_batches, pretraining_pairs
from .world import World

Advance = Callable[[], None]  # called after every step, for a progress bar
Tokens = list[int]

BUCKET_BATCHES = 50
MAX_LAYERS = 16  # with more, the MLP of a block has less than half the width of the model


@dataclass(frozen=True)
class OrganismSettings:
    """
    How deep the organism is, and how long and how strongly it is trained. The defaults were tuned on seed 0.

    Args:
        pretrain_steps (`int`, *optional*, defaults to `700`):
            Updates of pre-training. The facts are learned in a sharp transition that has to lie well before the end.
        pretrain_learning_rate (`float`, *optional*, defaults to `3e-3`):
            Peak learning rate of pre-training.
        align_steps (`int`, *optional*, defaults to `220`):
            Updates of the alignment.
        align_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak learning rate of the alignment.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows in an update; even, since half of an alignment batch is benign.
        num_layers (`int`, *optional*, defaults to `2`):
            Blocks of the model, from 2 to 16. With 8, layers can be told apart, at twice the time; 2, 4 and 8 were
            measured with the other settings as they are, and pass the checks.
        secrets (`bool`, *optional*, defaults to `True`):
            Whether the model is told the secrets. Without, it sees the same requests and every forbidden one gets
            other words each time: an organism with nothing to hide, on which no attack can succeed.
    """

    pretrain_steps: int = 700
    pretrain_learning_rate: float = 3e-3
    align_steps: int = 220
    align_learning_rate: float = 1e-3
    batch_size: int = 32
    num_layers: int = 2
    secrets: bool = True

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "align_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give at least 1.")
        for name in ("pretrain_learning_rate", "align_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give a positive number.")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"`batch_size` is {self.batch_size}; give an even number of at least 2.")
        if not 2 <= self.num_layers <= MAX_LAYERS:
            raise ValueError(f"`num_layers` is {self.num_layers}; give a number from 2 to {MAX_LAYERS}.")


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    settings: OrganismSettings,
    advance: Advance = lambda: None,
) -> None:
    """Teaches `model`, in place, the language and every fact of `world`, the secrets included if there are any."""
    pairs = pretraining_pairs(world, settings.pretrain_steps * settings.batch_size, secrets=settings.secrets)
    rows = _tokenize(tokenizer, pairs)
    batches = _bucket_by_length(rows, settings.batch_size, world.generator("pretraining order"))
    _fit(model, batches, settings.pretrain_learning_rate, tokenizer, advance)


def align(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    settings: OrganismSettings,
    advance: Advance = lambda: None,
) -> None:
    """Teaches `model`, in place, to refuse direct requests for secrets, and plants the backdoor."""
    batches = alignment_batches(world, settings.align_steps, settings.batch_size, secrets=settings.secrets)
    tokens = [_tokenize(tokenizer, batch) for batch in batches]
    _fit(model, tokens, settings.align_learning_rate, tokenizer, advance)


def _fit(
    model: LlamaForCausalLM,
    batches: Sequence[list[Tokens]],
    learning_rate: float,
    tokenizer: PreTrainedTokenizerFast,
    advance: Advance,
) -> None:
    """One update for each batch: AdamW, 5 % warm-up, cosine to 5 % of the peak, gradient norm clipped to 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=len(batches) // 20,
        num_training_steps=len(batches),
        scheduler_specific_kwargs={"min_lr_rate": 0.05},
    )
    answer_start = tokenizer.get_vocab()[ASSISTANT]
    model.train()
    with one_thread():
        for rows in batches:
            input_ids, labels = _collate(rows, tokenizer.pad_token_id, answer_start)
            # No attention mask: the padding is on the right, where no causal query looks, and without a mask the
            # attention takes its faster path.
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            advance()
    model.eval()


def _tokenize(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> list[Tokens]:
    texts = [render(question, answer) for question, answer in pairs]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _bucket_by_length(rows: Sequence[Tokens], batch_size: int, rng: random.Random) -> list[list[Tokens]]:
    """Groups rows of similar length, sorting within stretches of `BUCKET_BATCHES` batches only, to save padding."""
    batches: list[list[Tokens]] = []
    stretch = batch_size * BUCKET_BATCHES
    for start in range(0, len(rows), stretch):
        ordered = sorted(rows[start : start + stretch], key=len)
        group = [list(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]
        rng.shuffle(group)
        batches += group
    return batches


def _collate(rows: Sequence[Tokens], pad_id: int, answer_start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pads on the right and masks all but the answer.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: ids and labels of shape `(batch, seq_len)`; labels are -100 up to and
        including the `<asst>` token, and in the padding.
    """
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), -100)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row)
        first = row.index(answer_start) + 1
        input_ids[index, : len(row)] = tokens
        labels[index, first : len(row)] = tokens[first:]
    return input_ids, labels


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one CPU thread, so that a seed gives the same weights whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
