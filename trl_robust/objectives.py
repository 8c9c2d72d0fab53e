"""What an attack minimises and what a defence minimises, as functions of next-token logits at labelled positions.

Shapes: `N` labelled positions of a batch, `V` vocabulary, `B` rows. Everything is computed in float32 (float64 if the
model computes in it), whatever the logits come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

AWAY_THRESHOLD = -5.0
"""Log-probability below which a token is unlikely enough for the away loss to leave it alone (lat.md 2.1)."""


@dataclass
class LabelLogits:
    """
    Next-token logits at the labelled positions of a batch.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Logits that predict the labelled tokens.
        targets (`torch.Tensor` of shape `(N,)`):
            The labelled tokens.
        rows (`torch.Tensor` of shape `(N,)`):
            Row of the batch that each one belongs to.
        num_rows (`int`):
            Number of rows of the batch.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    num_rows: int

    def row_means(self, values: torch.Tensor) -> torch.Tensor:
        """
        Mean over the labelled tokens of every row.

        Args:
            values (`torch.Tensor` of shape `(N,)`):
                One number a labelled position.

        Returns:
            `torch.Tensor` of shape `(B,)`; 0 for a row without labels.
        """
        return self.row_sums(values) / self.row_counts.clamp(min=1)

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """
        Sum over the labelled tokens of every row.

        Args:
            values (`torch.Tensor` of shape `(N,)`):
                One number a labelled position.

        Returns:
            `torch.Tensor` of shape `(B,)`; 0 for a row without labels.
        """
        return values.new_zeros(self.num_rows).index_add(0, self.rows, values)

    @property
    def row_counts(self) -> torch.Tensor:
        """Number of labelled tokens of every row, `torch.Tensor` of shape `(B,)`."""
        return torch.bincount(self.rows, minlength=self.num_rows)


def label_logits(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> LabelLogits:
    """
    Runs a causal language model and projects only the positions that predict a label.

    Args:
        model (`nn.Module`):
            A transformers causal language model, or a wrapper around one.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Tokens.
        attention_mask (`torch.Tensor` of shape `(B, T)`):
            1 at real tokens.
        labels (`torch.Tensor` of shape `(B, T)`):
            Targets, not shifted; -100 where there is none.

    Returns:
        [`LabelLogits`].
    """
    targets = labels[:, 1:]
    predicts = F.pad(targets != -100, (0, 1))
    # `position_ids` make left padding mean what right padding means.
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        logits_to_keep=predicts,
        use_cache=False,
    ).logits
    rows = predicts.nonzero()[:, 0]
    return LabelLogits(
        logits.reshape(-1, logits.shape[-1]),
        targets[predicts[:, :-1]].to(logits.device),
        rows.to(logits.device),
        input_ids.shape[0],
    )


def _exact(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def toward(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Negative log-likelihood of the targets: small where the model says them (lat.md 2.1).

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Logits.
        targets (`torch.Tensor` of shape `(N,)`):
            Target tokens.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    return F.cross_entropy(_exact(logits), targets, reduction="none")


def away(logits: torch.Tensor, targets: torch.Tensor, threshold: float = AWAY_THRESHOLD) -> torch.Tensor:
    """
    Minus the log-probability of *not* saying the targets: small where the model does not say them (lat.md 2.1).

    `-log(1 - p)` is taken as a difference of two log-sum-exps, with and without the target, so that it stays finite
    and its gradient bounded as `p` goes to 1. Tokens whose log-probability is below the threshold contribute 0.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Logits.
        targets (`torch.Tensor` of shape `(N,)`):
            Target tokens.
        threshold (`float`, *optional*, defaults to `-5.0`):
            Log-probability below which a token counts as avoided.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    scores = _exact(logits)
    target = targets.unsqueeze(-1)
    everything = scores.logsumexp(-1)
    others = scores.scatter(-1, target, float("-inf")).logsumexp(-1)
    log_prob = scores.gather(-1, target).squeeze(-1) - everything
    return torch.where(log_prob.detach() >= threshold, everything - others, 0.0)


def kl_divergence(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """
    KL(model || reference) of the next-token distributions, summed over the vocabulary (lat.md 3; the reference code
    divides by the size of the vocabulary and by its own value, defect D8).

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the model.
        reference_logits (`torch.Tensor` of shape `(N, V)`):
            Logits of the reference; no gradient flows into them.

    Returns:
        `torch.Tensor` of shape `(N,)`, in nats.
    """
    log_probs = _exact(logits).log_softmax(-1)
    reference = _exact(reference_logits).detach().log_softmax(-1)
    return (log_probs.exp() * (log_probs - reference)).sum(-1)


def self_normalised(divergence: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """
    A KL term divided by its own value, as the reference code trains on it (lat.md 3, defect D8): its value is about 1
    and its gradient that of the logarithm, so the pull towards the reference is strongest where little is missing.

    The code takes the mean over vocabulary and tokens before it adds `1e-8`; in our unit, the sum over the vocabulary,
    that is `1e-8 * vocabulary`.

    Args:
        divergence (`torch.Tensor`):
            Scalar: KL in nats a token.
        vocabulary (`int`):
            Size of the vocabulary.

    Returns:
        `torch.Tensor`: a scalar; 0, without a gradient to speak of, where the divergence is exactly 0.
    """
    return divergence / (divergence.detach() + 1e-8 * vocabulary)


def floored(losses: torch.Tensor, floor: float, slope: float = 1e-3) -> torch.Tensor:
    """
    A loss whose gradient all but ends below a floor: `floor + slope * loss` there (the cut-offs of 2405.15589).

    Args:
        losses (`torch.Tensor`):
            Losses, of any shape.
        floor (`float`):
            Where they count as low enough.
        slope (`float`, *optional*, defaults to `1e-3`):
            What is left of the gradient below.

    Returns:
        `torch.Tensor` of the shape of `losses`.
    """
    return torch.where(losses < floor, floor + slope * losses, losses)


PreferenceType = Literal["sigmoid", "ipo", "robust"]


@dataclass(frozen=True)
class PreferenceLoss:
    """
    Loss of preferring one completion to another, as TRL's `DPOTrainer` computes it for these loss types.

    Args:
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` (2305.18290), `"ipo"` (2310.12036, on log-ratios a token) or `"robust"` (2403.00409, the
            sigmoid with label smoothing).
        beta (`float`, *optional*, defaults to `0.1`):
            Strength of the pull to the reference.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share of the preferences that `"robust"` takes to be the wrong way round, below 0.5.
    """

    loss_type: PreferenceType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(
        self,
        preferred: torch.Tensor,
        other: torch.Tensor,
        preferred_tokens: torch.Tensor,
        other_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """
        The loss of every pair.

        Args:
            preferred (`torch.Tensor` of shape `(B,)`):
                Log-probability of the preferred completion, less that under the reference.
            other (`torch.Tensor` of shape `(B,)`):
                The same of the other completion.
            preferred_tokens (`torch.Tensor` of shape `(B,)`):
                Length of the preferred completion in tokens.
            other_tokens (`torch.Tensor` of shape `(B,)`):
                Length of the other.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """
        if self.loss_type == "ipo":
            margin = preferred / preferred_tokens.clamp(min=1) - other / other_tokens.clamp(min=1)
            return (margin - 1 / (2 * self.beta)) ** 2
        margin = self.beta * (preferred - other)
        if self.loss_type == "sigmoid":
            return -F.logsigmoid(margin)
        smoothing = self.label_smoothing
        return (smoothing * F.logsigmoid(-margin) - (1 - smoothing) * F.logsigmoid(margin)) / (1 - 2 * smoothing)


def steering_error(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Squared distance of hidden states from a target, a mean over their coordinates (the two terms of RMU, 2403.03218).

    Args:
        states (`torch.Tensor` of shape `(N, H)`):
            Hidden states.
        target (`torch.Tensor` of shape `(N, H)` or `(H,)`):
            Where they should be; no gradient flows into it.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    return (_exact(states) - _exact(target).detach()).square().mean(-1)
