"""Scores of answers, and the answers: what `diagnose-distance` sets against distances.

Every answer is scored against the *original* wording of its question, whichever wording it was given to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..attacks import AttackRow, Subject
from ..data import DataError
from ..objectives import label_logits, toward
from .judges import exact
from .sampling import Answer, Request, Sampling, sample_answers
from .wordings import Case

Scorer = Literal["exact", "reward", "loglik", "file"]
SCORERS: tuple[Scorer, ...] = get_args(Scorer)
NEEDS_ANSWERS: tuple[Scorer, ...] = ("exact", "reward")
"""Scorers that judge what the model says; the others need no generation."""


def answers_of(subject: Subject, case: Case, *, responses: int, sampling: Sampling) -> list[list[str]]:
    """
    Answers to every wording of a case.

    Each answer has random numbers of its own, so that a run that stopped gives the answers it would have given.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        case ([`~trl_robust.evaluation.wordings.Case`]):
            The case.
        responses (`int`):
            Answers to each wording.
        sampling ([`~trl_robust.evaluation.sampling.Sampling`]):
            How they are drawn.

    Returns:
        `list[list[str]]`: for every wording its answers.

    Raises:
        `RuntimeError`: the model could not answer, out of memory for example.
        `ValueError`: a prompt over the limit.
    """
    keys = [[f"{case.id}/{wording}/{number}" for number in range(responses)] for wording in range(len(case.wordings))]
    requests = [Request(key, text) for text, row in zip(case.wordings, keys, strict=True) for key in row]
    found: dict[str, Answer] = {}
    quiet = replace(subject, progress=False)  # the bar over cases is enough
    sample_answers(quiet, requests, sampling, lambda answers: found.update({a.key: a for a in answers}), "answers")
    for answer in found.values():
        if answer.status == "errored":
            raise RuntimeError(answer.reason)
        if answer.status == "skipped":
            raise ValueError(answer.reason)
    return [[found[key].response or "" for key in row] for row in keys]


def exact_scores(case: Case, answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """
    1 where an answer states what the case says it should, else 0.

    Args:
        case ([`~trl_robust.evaluation.wordings.Case`]):
            A case with an `answer`.
        answers (sequence of sequences of `str`):
            For every wording its answers.

    Returns:
        `list[list[float]]`, of the same form.

    Raises:
        `ValueError`: the case has no answer.
    """
    row = AttackRow(case.id, case.wordings[0], answer=case.answer)
    return [[float(exact(row, text)) for text in texts] for texts in answers]


@torch.no_grad()
def likelihood_scores(subject: Subject, case: Case) -> list[list[float]]:
    """
    Mean log-likelihood a token of the case's reference, given each wording: no judge, and no generation.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        case ([`~trl_robust.evaluation.wordings.Case`]):
            A case with a `reference`, or else an `answer`.

    Returns:
        `list[list[float]]`: one number a wording, in nats a token.

    Raises:
        `ValueError`: the case has no reference, or one without a token.
    """
    reference = case.reference or case.answer
    if not reference:
        raise ValueError("the scorer `loglik` needs a `reference` or an `answer` in the row")
    # Where a chat template does not end on white space of its own, the answer's first word follows it as it stands.
    completion = subject.encode_opening(reference)
    if not completion:
        raise ValueError("the reference has no token")
    prompts = [subject.encode(wording) for wording in case.wordings]
    found: list[float] = []
    for start in range(0, len(prompts), subject.batch_size):
        part = prompts[start : start + subject.batch_size]
        rows = [prompt + completion for prompt in part]
        labels = [[-100] * len(prompt) + completion for prompt in part]
        logits = label_logits(
            subject.model,
            subject.pad(rows, "right"),
            subject.pad([[1] * len(row) for row in rows], "right", 0),
            subject.pad(labels, "right", -100),
        )
        found += (-logits.row_means(toward(logits.logits, logits.targets))).tolist()
    return [[score] for score in found]


@dataclass
class RewardModel:
    """
    A sequence-classification model that says how good an answer to a question is.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, in evaluation mode, with one output, or with a `score` among its outputs.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        batch_size (`int`, *optional*, defaults to `16`):
            Answers at a time.
    """

    model: Any
    tokenizer: Any
    batch_size: int = 16

    @classmethod
    def load(
        cls, path: str, *, dtype: str = "auto", trust_remote_code: bool = False, batch_size: int = 16
    ) -> RewardModel:
        """
        Loads a reward model from a folder or the hub.

        Args:
            path (`str`):
                Folder or hub id.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Weight dtype.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether the model's own code may run, which some reward models need.
            batch_size (`int`, *optional*, defaults to `16`):
                Answers at a time.

        Returns:
            [`RewardModel`].

        Raises:
            `ValueError`: the model has several outputs and no `score` among them.
            `OSError`: there is no such model.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if torch.cuda.is_available() and not getattr(model, "hf_device_map", None):
            model.to("cuda")
        if model.config.num_labels != 1 and not trust_remote_code:
            raise ValueError(
                f"The reward model {path} has {model.config.num_labels} outputs, and which of them is the reward "
                "cannot be known. Name a model with one output, or, where its own code computes a `score`, set "
                "`trust_remote_code`."
            )
        return cls(model.eval(), tokenizer, batch_size)

    @torch.no_grad()
    def rewards(self, query: str, answers: Sequence[str]) -> list[float]:
        """
        Rewards of answers to one question.

        Args:
            query (`str`):
                The question, in its original wording.
            answers (sequence of `str`):
                Answers.

        Returns:
            `list[float]`.

        Raises:
            `ValueError`: a text longer than the model takes, or outputs that hold no single reward.
        """
        encoded = [self._encode(query, answer) for answer in answers]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max((len(row) for row in encoded), default=0)
        if limit is not None and longest > limit:
            raise ValueError(f"question and answer have {longest} tokens; the reward model takes {limit}")
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        filler = next(int(token) for token in known if token is not None)
        if self.model.config.pad_token_id is None:
            # transformers finds the last token by it, and refuses batches of several rows without one.
            self.model.config.pad_token_id = filler
        found: list[float] = []
        for start in range(0, len(encoded), self.batch_size):
            rows = encoded[start : start + self.batch_size]
            width = max(map(len, rows))
            device = self.model.device
            output = self.model(
                input_ids=torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device),
                attention_mask=torch.tensor(
                    [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
                ),
            )
            score = getattr(output, "score", None)
            score = output.logits if score is None else score
            if score.numel() != len(rows):
                raise ValueError(f"the reward model put out {tuple(score.shape)}; one number an answer was expected")
            found += score.reshape(-1).float().tolist()
        return found

    def scores(self, case: Case, answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """Rewards of a case's answers, each against the original wording."""
        flat = iter(self.rewards(case.wordings[0], [text for texts in answers for text in texts]))
        return [[next(flat) for _ in texts] for texts in answers]

    def _encode(self, query: str, answer: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(query, answer)["input_ids"])
        turns = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
        return list(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])


def read_scores(path: Path, cases: Sequence[Case]) -> dict[str, list[list[float]]]:
    """
    Scores that were given by somebody else.

    Args:
        path (`Path`):
            JSON lines: `index` and `scores`, one entry a wording (the original first), a number or a list of numbers.
        cases (sequence of [`~trl_robust.evaluation.wordings.Case`]):
            The cases they are for.

    Returns:
        `dict`: index -> for every wording its scores.

    Raises:
        [`DataError`]: a line that is not of this form, or a case without scores.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path} (`scores`).")
    widths = {case.id: len(case.wordings) for case in cases}
    found: dict[str, list[list[float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            index = str(row["index"])
            scores = [
                [float(one) for one in (entry if isinstance(entry, list) else [entry])] for entry in row["scores"]
            ]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"Line {number} of {path} is no row of scores ({type(error).__name__}: {error}). Write "
                '{"index": 0, "scores": [...]} with one entry a wording, the original first: a number or a list.'
            ) from error
        if index in widths and len(scores) != widths[index]:
            raise DataError(
                f"Line {number} of {path} has {len(scores)} scores; case {index} has {widths[index]} wordings, the "
                "original among them."
            )
        if not all(scores):
            raise DataError(f"Line {number} of {path} has a wording with an empty list of scores.")
        found[index] = scores
    if missing := [index for index in widths if index not in found]:
        raise DataError(f"{path} has no scores for {len(missing)} of {len(widths)} cases, the first is {missing[0]}.")
    return found
