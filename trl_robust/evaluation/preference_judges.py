"""Judges of answers with one signature: exact, reward model, and annotations that AlpacaEval made.

A judge always sees the original question, whatever wording was answered: another wording may ask for something else,
and the answer to the original is what counts. What a judge cannot score is errored, never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from ..attacks import AttackRow
from .judges import JUDGE_VERSIONS, exact


@dataclass(frozen=True)
class JudgedAnswer:
    """
    What a judge sees.

    Args:
        question (`str`):
            The original question.
        response (`str`):
            The model's answer.
        answer (`str`, *optional*):
            What a right response states.
        reference (`str`, *optional*):
            The baseline's answer to the original question.
    """

    question: str
    response: str
    answer: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Verdict:
    """
    What a judge says.

    Args:
        score (`float`, *optional*):
            In [0, 1], higher is better; `None` unless scored.
        reason (`str`, *optional*):
            Why there is no score.
    """

    score: float | None
    reason: str | None = None

    @property
    def status(self) -> Literal["scored", "errored"]:
        """Whether there is a score."""
        return "errored" if self.score is None else "scored"


class PreferenceJudge(Protocol):
    """Every judge: a name, a version that rises with every change of behaviour, its settings, and `judge`."""

    name: ClassVar[str]
    version: ClassVar[int]
    needs: ClassVar[Literal["answer", "reference"] | None]

    def settings(self) -> dict[str, Any]:
        """What settles the scores besides the version; written into the results."""

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[Verdict]:
        """One verdict an answer, in their order."""


@dataclass(frozen=True)
class ExactJudge:
    """Whether the response states the case's answer, word for word: 1 or 0."""

    name: ClassVar[str] = "exact"
    version: ClassVar[int] = JUDGE_VERSIONS["exact"]
    needs: ClassVar[Literal["answer", "reference"] | None] = "answer"

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[Verdict]:
        """One verdict an answer."""
        return [self._verdict(answer) for answer in answers]

    def _verdict(self, answer: JudgedAnswer) -> Verdict:
        if not answer.answer:
            return Verdict(None, "the case has no `answer`")
        return Verdict(float(exact(AttackRow("", answer.question, answer=answer.answer), answer.response)))


class RewardJudge:
    """
    Preference by a reward model: `sigmoid((r(question, response) - r(question, reference)) / tau)`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A sequence-classification model with one label, or whose output has a `score`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. With a chat template, question and response are a user and an assistant turn; without one,
            they are a pair of texts.
        tau (`float`, *optional*, defaults to `1.0`):
            Difference of rewards that counts as much as one logit. Rewards have no common unit, so a win rate is only
            comparable under the same model and `tau`.
        batch_size (`int`, *optional*, defaults to `8`):
            Answers at a time.
        source (`str`, *optional*):
            What the results call the model.

    Raises:
        `ValueError`: `tau` is not above 0, or the model has several labels.
    """

    name: ClassVar[str] = "reward"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["answer", "reference"] | None] = "reference"

    def __init__(self, model: Any, tokenizer: Any, *, tau: float = 1.0, batch_size: int = 8, source: str = "") -> None:
        if not (tau > 0 and math.isfinite(tau)):
            raise ValueError(f"tau={tau} must be above 0.")
        self.model, self.tokenizer, self.tau, self.batch_size, self.source = model, tokenizer, tau, batch_size, source
        self._known: dict[tuple[str, str], float | str] = {}
        if model.config.pad_token_id is None:
            # The reward is read at the last token that is not padding, so the model must know which that is.
            model.config.pad_token_id = self._pad_token_id

    @classmethod
    def load(
        cls, path: str, *, tau: float = 1.0, batch_size: int = 8, dtype: str = "auto", trust_remote_code: bool = False
    ) -> RewardJudge:
        """
        Loads a reward model from a folder or the hub.

        Args:
            path (`str`):
                The model.
            tau, batch_size (*optional*):
                As above.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Weight dtype.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether the model's own code may run. ArmoRM needs it.

        Returns:
            [`RewardJudge`].

        Raises:
            `ValueError`: the model has several labels and no `score`.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if config.num_labels != 1 and not (trust_remote_code and getattr(config, "auto_map", None)):
            raise ValueError(
                f"{path} has {config.num_labels} labels and is no reward model, which has one. Name another model."
            )
        model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if torch.cuda.is_available():
            model.to("cuda")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        return cls(model.eval(), tokenizer, tau=tau, batch_size=batch_size, source=path)

    def settings(self) -> dict[str, Any]:
        """Model and tau."""
        return {"model": self.source, "tau": self.tau}

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[Verdict]:
        """One verdict an answer; the reward of a case's reference is computed once."""
        self._score([(answer.question, answer.response) for answer in answers])
        self._score([(answer.question, answer.reference) for answer in answers if answer.reference])
        return [self._verdict(answer) for answer in answers]

    def _verdict(self, answer: JudgedAnswer) -> Verdict:
        if not answer.reference:
            return Verdict(None, "the case has no `reference` answer")
        rewards = [self._known[answer.question, text] for text in (answer.response, answer.reference)]
        if faults := [reward for reward in rewards if isinstance(reward, str)]:
            return Verdict(None, f"reward model: {faults[0]}")
        difference = (float(rewards[0]) - float(rewards[1])) / self.tau
        return Verdict(float(torch.tensor(difference, dtype=torch.float64).sigmoid()))

    def _score(self, pairs: list[tuple[str, str]]) -> None:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        tokens = {pair: self._encode(*pair) for pair in new}
        limit = self._max_length
        for pair, row in tokens.items():
            if len(row["input_ids"]) > limit:
                self._known[pair] = f"{len(row['input_ids'])} tokens are over its limit of {limit}"
        waiting = [pair for pair in new if pair not in self._known]
        for start in range(0, len(waiting), self.batch_size):
            batch = waiting[start : start + self.batch_size]
            try:
                rewards = self._rewards([tokens[pair] for pair in batch])
            except RuntimeError as error:  # out of memory
                self._known |= dict.fromkeys(batch, f"{type(error).__name__}: {error}")
                continue
            for pair, reward in zip(batch, rewards, strict=True):
                self._known[pair] = reward if math.isfinite(reward) else f"gave {reward}"

    @torch.no_grad()
    def _rewards(self, rows: list[dict[str, list[int]]]) -> list[float]:
        width = max(len(row["input_ids"]) for row in rows)
        fillers = {"input_ids": self._pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        output = self.model(
            **{
                key: torch.tensor(
                    [row[key] + [filler] * (width - len(row[key])) for row in rows], device=self.model.device
                )
                for key, filler in fillers.items()
                if key in rows[0]
            }
        )
        score = getattr(output, "score", None)
        score = output.logits if score is None else score
        if score.numel() != len(rows):
            raise ValueError(
                f"The model {self.source} gives {score.numel() // len(rows)} numbers an answer; a reward model gives "
                "one. Name another model."
            )
        return score.reshape(-1).float().tolist()

    def _encode(self, question: str, response: str) -> dict[str, list[int]]:
        if not self.tokenizer.chat_template:
            return dict(self.tokenizer(question, response))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        return dict(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True))

    @property
    def _pad_token_id(self) -> int:
        known = (self.tokenizer.pad_token_id, self.model.config.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in known if token is not None)

    @property
    def _max_length(self) -> int:
        limits = (self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None))
        return int(min(limit for limit in limits if limit is not None))


class AnnotationsJudge:
    """
    Preferences that AlpacaEval wrote for outputs of ours; see [`~trl_robust.evaluation.alpaca.read_annotations`].

    Args:
        annotations (`Mapping[tuple[str, str], float]`):
            Preference in [0, 1] by original question and the model's answer.
        source (`str`, *optional*):
            What the results call the files.
        annotators (sequence of `str`, *optional*):
            Judges that are named in them.
    """

    name: ClassVar[str] = "annotations"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["answer", "reference"] | None] = None

    def __init__(
        self, annotations: Mapping[tuple[str, str], float | None], *, source: str = "", annotators: Sequence[str] = ()
    ) -> None:
        self.annotations, self.source, self.annotators = annotations, source, list(annotators)

    def settings(self) -> dict[str, Any]:
        """Files and the judges named in them."""
        return {"annotations": self.source, "annotators": self.annotators}

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[Verdict]:
        """One verdict an answer; errored where the files have none."""
        return [self._verdict(answer) for answer in answers]

    def _verdict(self, answer: JudgedAnswer) -> Verdict:
        key = (answer.question, answer.response)
        if key not in self.annotations:
            return Verdict(None, "the annotations have no line for this question and answer")
        preference = self.annotations[key]
        return Verdict(preference, None if preference is not None else "the annotation has no preference")
