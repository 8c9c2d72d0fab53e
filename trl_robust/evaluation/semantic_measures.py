"""Measures of whether an answer still means the same, and what a check makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..attacks import AttackRow, Subject
from ..threat import decoder_layers
from .distance import representations
from .judges import exact

Verdict = Literal["pass", "fail", "uninformative", "not measured"]


@dataclass(frozen=True)
class Thresholds:
    """
    What a perturbation has to reach to count as keeping the meaning. All are ours; the paper has none.

    Args:
        token_kl (`float`, *optional*, defaults to `0.1`):
            Most KL divergence of the next-token distributions over the completion, in nats a token.
        agreement (`float`, *optional*, defaults to `0.9`):
            Least share of answers that agree with the clean one.
        similarity (`float`, *optional*, defaults to `0.8`):
            Least mean similarity of answers to the clean one, see [`answer_similarity`].
        entailment (`float`, *optional*, defaults to `0.9`):
            Least share of answers that entail the clean one and are entailed by it.
        feasible (`float`, *optional*, defaults to `0.95`):
            Least share of rows whose loss is within epsilon of the clean one.
        random_quantile (`float`, *optional*, defaults to `0.975`):
            Quantile of a random direction's share of energy in the paraphrases' directions that has to be exceeded.
    """

    token_kl: float = 0.1
    agreement: float = 0.9
    similarity: float = 0.8
    entailment: float = 0.9
    feasible: float = 0.95
    random_quantile: float = 0.975


def principal_directions(differences: torch.Tensor, top_k: int) -> torch.Tensor | None:
    """
    Directions in which real paraphrases differ most.

    Args:
        differences (`torch.Tensor` of shape `(N, H)`):
            Hidden states of paraphrases less those of the originals. Not centred: a shift that all share counts.
        top_k (`int`):
            How many. At most `N`, and at most a quarter of `H`, since in a small space the share would mean little.

    Returns:
        `torch.Tensor` of shape `(H, k)`, orthonormal; `None` where nothing differs.
    """
    count = min(top_k, len(differences), max(differences.shape[1] // 4, 1))
    if count < 1 or not differences.any():
        return None
    _, sizes, directions = torch.linalg.svd(differences.double(), full_matrices=False)
    count = min(count, int((sizes > 1e-9 * sizes[0]).sum()))
    return directions[:count].T


def energy_share(vectors: torch.Tensor, directions: torch.Tensor) -> float | None:
    """
    Share of the vectors' squared length that lies in a subspace.

    Args:
        vectors (`torch.Tensor` of shape `(..., H)`):
            Vectors.
        directions (`torch.Tensor` of shape `(H, k)`):
            Orthonormal directions.

    Returns:
        `float` in [0, 1], or `None` if all vectors are zero.
    """
    exact = vectors.double().to(directions.device)
    total = exact.square().sum().item()
    return (exact @ directions).square().sum().item() / total if total > 0 else None


def random_shares(vectors: torch.Tensor, num_directions: int, *, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """
    Shares that vectors of the same lengths would have in random directions.

    The share of one random vector in `k` of `H` directions is distributed as Beta(k / 2, (H - k) / 2); the vectors'
    shares are averaged with their squared lengths as weights.

    Args:
        vectors (`torch.Tensor` of shape `(..., H)`):
            Vectors, of which only the lengths and `H` are used.
        num_directions (`int`):
            Number of directions, `k`.
        draws (`int`, *optional*, defaults to `2000`):
            Number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `np.ndarray` of `draws` shares.
    """
    hidden = vectors.shape[-1]
    weights = vectors.double().square().sum(-1).flatten().cpu().numpy()
    weights = weights[weights > 0]
    generator = np.random.default_rng(seed)
    if not len(weights) or num_directions >= hidden:
        return np.full(draws, num_directions / hidden)
    drawn = generator.beta(num_directions / 2, (hidden - num_directions) / 2, size=(draws, len(weights)))
    return drawn @ weights / weights.sum()


def agrees(clean: str, other: str, answer: str | None = None) -> bool:
    """
    Whether two answers say the same, word for word or by what they have to state.

    Args:
        clean (`str`):
            The answer to compare with.
        other (`str`):
            The other.
        answer (`str`, *optional*):
            What a right answer states: if both state it, they agree whatever else they say.

    Returns:
        `bool`.
    """
    if answer:
        row = AttackRow("", "", answer=answer)
        if exact(row, clean) and exact(row, other):
            return True
    return normalised(clean) == normalised(other)


def normalised(text: str) -> str:
    """A text in lower case, its white space and the punctuation at its end left out."""
    return " ".join(text.casefold().split()).rstrip(" .!?,;:")


def answer_similarity(subject: Subject, clean: Sequence[str], other: Sequence[str]) -> list[float | None]:
    """
    Similarity of answers by the model's own hidden states: cosine of their means over tokens at the last layer.

    The mean over all clean answers is taken off first. Hidden states share a large common part, so that without this
    any two answers look alike; with it, answers to different questions are about as likely below 0 as above.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        clean, other (sequence of `str`):
            Answers, paired.

    Returns:
        `list[float | None]`: 0 where one of both is empty, 1 where both are; `None` throughout where all clean answers
        are the same, since then there is nothing to compare with.
    """
    last = len(decoder_layers(subject.model)) - 1
    texts = sorted({text for text in (*clean, *other) if subject.encode_opening(text)})
    if not texts:
        return [None] * len(clean)
    tokens = [subject.encode_opening(text) for text in texts]
    found = representations(subject, tokens, [last], spans=[(0, len(row)) for row in tokens]).states[last]
    states = dict(zip(texts, found, strict=True))
    known = [states[text] for text in clean if text in states]
    if not known or len({text for text in clean if text in states}) < 2:
        return [None] * len(clean)
    centre = torch.stack(known).mean(0)
    similar: list[float | None] = []
    for one, two in zip(clean, other, strict=True):
        if one not in states or two not in states:  # an answer that is missing resembles none but another such
            similar.append(float(one not in states and two not in states))
            continue
        first, second = states[one] - centre, states[two] - centre
        similar.append(torch.nn.functional.cosine_similarity(first, second, dim=0).item())
    return similar


@dataclass
class Entailment:
    """
    A natural-language-inference classifier.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A sequence-classification model, one of whose labels is called entailment.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        label (`int`):
            Number of that label.
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs at a time.
    """

    model: Any
    tokenizer: Any
    label: int
    batch_size: int = 16

    @classmethod
    def load(cls, path: str, *, dtype: str = "auto", batch_size: int = 16) -> Entailment:
        """
        Loads a classifier from a folder or the hub.

        Args:
            path (`str`):
                Folder or hub id.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Weight dtype.
            batch_size (`int`, *optional*, defaults to `16`):
                Pairs at a time.

        Returns:
            [`Entailment`].

        Raises:
            `ValueError`: not exactly one of its labels is called entailment.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
        names = {number: str(name).casefold() for number, name in model.config.id2label.items()}
        found = [number for number, name in names.items() if name.startswith("entail")]
        if len(found) != 1:
            raise ValueError(
                f"The labels of the NLI model {path} are {list(model.config.id2label.values())}; exactly one must be "
                "called entailment. Name another model, or write the labels' names into its config.json (`id2label`)."
            )
        if torch.cuda.is_available():
            model.to("cuda")
        return cls(model.eval(), tokenizer, int(found[0]), batch_size)

    @torch.no_grad()
    def probabilities(self, premises: Sequence[str], hypotheses: Sequence[str]) -> list[float]:
        """Probability that each premise entails its hypothesis."""
        found: list[float] = []
        for start in range(0, len(premises), self.batch_size):
            part = slice(start, start + self.batch_size)
            encoded = self.tokenizer(
                list(premises[part]), list(hypotheses[part]), padding=True, truncation=True, return_tensors="pt"
            ).to(self.model.device)
            found += self.model(**encoded).logits.float().softmax(-1)[:, self.label].tolist()
        return found


def verdict(passes: bool | None, control_passes: bool | None) -> Verdict:
    """
    What a check is worth: it proves something only where a change of meaning fails it.

    Args:
        passes (`bool`, *optional*):
            Whether the perturbation meets the threshold; `None` if it was not measured.
        control_passes (`bool`, *optional*):
            Whether edits that change the meaning meet it as well.

    Returns:
        `"pass"`, `"fail"`, `"uninformative"` (the perturbation passes, and so do edits that change the meaning, or
        there were none) or `"not measured"`.
    """
    if passes is None:
        return "not measured"
    if not passes:
        return "fail"
    return "pass" if control_passes is False else "uninformative"
