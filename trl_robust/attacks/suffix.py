"""Where the tokens of a suffix lie in an encoded prompt, for any chat template and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from .request import request_of, with_request
from .subject import Prompt, Subject

NEUTRAL = ("!", ".", "x", ",", "?", "the", "a")
"""Words that a suffix starts from: the first that is an ordinary token of its own."""

TRIES = 200
"""How many further words are tried where none of these is."""


class NoSuffix(Exception):
    """A request has no place for a suffix, or nothing to search one for; the message is the reason."""


@dataclass(frozen=True)
class SuffixPlace:
    """
    A prompt with a place for a suffix, behind the request and inside its turn.

    Args:
        subject ([`Subject`]):
            The model that the prompt is encoded for.
        request (`str` or `list[dict]`):
            The prompt without a suffix.
        separator (`str`):
            What stands between request and suffix.
        before (`list[int]`):
            Tokens in front of the suffix.
        after (`list[int]`):
            Tokens behind it.
        start (`list[int]`):
            A suffix of neutral tokens.
    """

    subject: Subject
    request: Prompt
    separator: str
    before: list[int]
    after: list[int]
    start: list[int]

    def prompt(self, suffix: Sequence[int]) -> Prompt:
        """The prompt with the suffix, as text."""
        return with_request(self.request, request_of(self.request) + self.separator + written(self.subject, suffix))

    def tokens(self, suffix: Sequence[int]) -> list[int]:
        """Tokens of the prompt with the suffix."""
        return [*self.before, *suffix, *self.after]

    def readable(self, suffix: Sequence[int]) -> bool:
        """Whether the suffix, written as text and encoded with the whole prompt, gives these tokens again."""
        return self.subject.encode(self.prompt(suffix)) == self.tokens(suffix)


def written(subject: Subject, tokens: Sequence[int]) -> str:
    """Tokens as text, nothing tidied up."""
    return str(subject.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def ordinary_tokens(subject: Subject, ascii_only: bool = True) -> list[int]:
    """
    Tokens that stand for text that can be seen: no special or added ones, no white space, no parts of characters.

    Args:
        subject ([`Subject`]):
            The model.
        ascii_only (`bool`, *optional*, defaults to `True`):
            Whether the text has to be ASCII.

    Returns:
        `list[int]`, in ascending order.
    """
    tokenizer = subject.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    # The embedding may have rows beyond the tokenizer's, and a tokenizer tokens beyond the embedding.
    size = min(len(tokenizer), subject.model.get_input_embeddings().weight.shape[0])
    known = [token for token in range(size) if token not in special]
    texts = tokenizer.batch_decode([[token] for token in known], clean_up_tokenization_spaces=False)
    return [token for token, text in zip(known, texts, strict=True) if _visible(text.strip(), ascii_only)]


def random_words(subject: Subject, count: int, draw: Random, tokens: Sequence[int]) -> str:
    """
    Words that say nothing: ordinary tokens drawn at random, with spaces between them.

    Args:
        subject ([`Subject`]):
            The model.
        count (`int`):
            How many.
        draw (`random.Random`):
            Random numbers.
        tokens (sequence of `int`):
            What [`ordinary_tokens`] gives.

    Returns:
        `str`.
    """
    return " ".join(written(subject, [draw.choice(tokens)]).strip() for _ in range(count))


def _visible(text: str, ascii_only: bool) -> bool:
    return bool(text) and text.isprintable() and "\ufffd" not in text and (text.isascii() or not ascii_only)


def locate_suffix(subject: Subject, prompt: Prompt, length: int, tokens: Sequence[int]) -> SuffixPlace:
    """
    Finds the place of a suffix.

    The prompt is encoded with two suffixes that share no token; what the encodings share at their start and end is
    the rest of the prompt.

    Args:
        subject ([`Subject`]):
            The model.
        prompt (`str` or `list[dict]`):
            The prompt.
        length (`int`):
            Tokens of the suffix.
        tokens (`Sequence[int]`):
            What a suffix may consist of.

    Returns:
        [`SuffixPlace`].

    Raises:
        [`NoSuffix`]: no two words give suffixes of this length, or the prompt does not end with a user turn.
    """
    if not isinstance(prompt, str) and prompt[-1].get("role") != "user":
        raise NoSuffix(f"the conversation ends with a turn of {prompt[-1].get('role')!r}, not of the user")
    allowed = frozenset(tokens)
    first: list[list[int]] = []
    for word in _words(subject, tokens):
        text = " ".join([word] * length)
        encoded = subject.encode(with_request(prompt, f"{request_of(prompt)} {text}"))
        for other in first:
            for pair in ((other, encoded), (encoded, other)):  # earlier words are preferred
                if place := _between(subject, prompt, *pair, length, allowed):
                    return place
        if len(first) < len(NEUTRAL):
            first.append(encoded)
    raise NoSuffix(
        f"no suffix of {length} tokens could be told from the rest of the encoded prompt; the chat template may alter "
        "or cut the text of the request"
    )


def _words(subject: Subject, tokens: Sequence[int]) -> Iterator[str]:
    yield from NEUTRAL
    yield from (written(subject, [token]).strip() for token in islice(tokens, TRIES))


def _between(
    subject: Subject, prompt: Prompt, one: list[int], other: list[int], length: int, allowed: frozenset[int]
) -> SuffixPlace | None:
    """The place between what two encodings share, if the suffix of the first holds there."""
    if len(one) != len(other):
        return None
    differ = [position for position, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    if len(differ) != length or differ[-1] - differ[0] != length - 1:
        return None
    before, start, after = one[: differ[0]], one[differ[0] : differ[-1] + 1], one[differ[-1] + 1 :]
    if not allowed.issuperset(start):
        return None
    for separator in ("", " "):  # tokens of some tokenizers carry the space before a word, and write it
        place = SuffixPlace(subject, prompt, separator, before, after, start)
        if place.readable(start):
            return place
    return None
