from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..inner import Change, attack_mode, refusal_directions
from ..inner.observing import observed
from ..objectives import label_logits
from ..threat import ThreatModel, decoder_layers
from ..threat.sites import Site, Stream, base_model
from .linears import all_errored
from .subject import AttackRow, Generation, Subject

LEFT = 1e-5
"""A further direction needs differences longer than this share of the longest; below is rounding."""


@dataclass
class Subspace(Change):
    """
    Removal of several directions from the hidden states of one batch, `h - D^T D h`, or `h - D^T D (h - c)`: the
    component along them is that of a centre.

    Args:
        directions (`dict[Site, torch.Tensor]`):
            For every site orthonormal float32 rows of shape `(k, H)`.
        selected (`torch.Tensor` of shape `(B, P)`):
            Ranks from which they are removed.
        stream (`str`, *optional*, defaults to `"layer"`):
            `"layer"` or `"mlp"`.
        centers (`dict[Site, torch.Tensor]`, *optional*):
            For every site a float32 vector of shape `(H,)`; zero if not given.
    """

    directions: dict[Site, torch.Tensor]
    selected: torch.Tensor
    stream: Stream = "layer"
    centers: dict[Site, torch.Tensor] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.directions)

    def _changed(self, states: torch.Tensor, site: Site, running: Any) -> torch.Tensor:
        rows = self.directions[site].to(states.device)
        exact = states.float()
        center = self.centers[site].to(states.device) if self.centers else 0.0
        removed = exact - (exact - center) @ rows.T @ rows
        return torch.where(running.mask(states), removed.to(states.dtype), states)


@dataclass(frozen=True)
class RefusalDirection:
    """
    Removes the directions that tell harmful requests from harmless ones, at every layer (2406.11717).

    The first direction of a layer is the difference of the mean hidden states at the last prompt token; the further
    ones are the leading right singular vectors of what is left, without the first, of the differences pair by pair
    (2504.18872). So `k` directions contain those of any smaller number.

    Args:
        harmful (`list[dict]`, *optional*):
            Rows of `prompt`, harmful requests other than those asked.
        harmless (`list[dict]`, *optional*):
            Rows of `prompt`, harmless ones, best of the same forms; row `i` is paired with row `i` of `harmful`.
        directions (`int`, *optional*, defaults to `1`):
            How many are removed at every layer. 0 removes nothing.
        transferred (`str`, *optional*):
            File of directions that [`save_directions`] wrote of another model with the same hidden size; used instead
            of the model's own.
        replacement (`str`, *optional*, defaults to `"zero"`):
            What the component along a direction becomes: `"zero"`, at every token, the answer's included, or
            `"harmless"`: that of the mean of the harmless requests, at every token of the prompt. The latter is for
            models in which zero still lies on the side of refusal (2411.09003); it ends with the prompt, because the
            component of a last prompt token held through an answer has the model begin it again and again.
        stream (`str`, *optional*, defaults to `"layer"`):
            `"layer"` or `"mlp"`.
        objective (`str`, *optional*, defaults to `"refusal"`):
            `"refusal"`, or `"random"`: as many random orthonormal directions at every layer, the control. It needs
            neither `harmful` nor a file.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the control.

    Raises:
        `ValueError`: no requests to find directions with and no file, or a bad value; when run, a file that does not
            fit the model, or too few requests for so many directions.
    """

    harmful: list[dict[str, Any]] = field(default_factory=list, repr=False)
    harmless: list[dict[str, Any]] = field(default_factory=list, repr=False)
    directions: int = 1
    transferred: str | None = None
    replacement: Literal["zero", "harmless"] = "zero"
    stream: Stream = "layer"
    objective: Literal["refusal", "random"] = "refusal"
    seed: int = 0
    name: ClassVar[str] = "refusal_direction"
    attack_class: ClassVar[str] = "latent"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = "directions"

    def __post_init__(self) -> None:
        if isinstance(self.directions, bool) or not isinstance(self.directions, int) or self.directions < 0:
            raise ValueError(f"`directions` is {self.directions!r}; it must be a whole number of at least 0.")
        for name, choices in (("objective", ("refusal", "random")), ("replacement", ("zero", "harmless"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose `{choices[0]}` or `{choices[1]}`.")
        if self.replacement == "harmless" and not self.harmless:
            raise ValueError("`replacement` is `harmless`, and `harmless` is empty; give it rows of `prompt`.")
        if self.objective == "refusal" and self.transferred is None and not (self.harmful and self.harmless):
            raise ValueError(
                "The refusal-direction attack has nothing to find directions with; give rows of `prompt` in `harmful` "
                "and in `harmless`, or a file in `transferred`."
            )

    def check(self, subject: Subject) -> None:
        """
        Refuses what cannot give so many directions, before anything is asked.

        Args:
            subject ([`Subject`]):
                The model.

        Raises:
            `ValueError`: a file that cannot be read or does not fit the model, or too few requests or numbers for so
                many directions.
        """
        if self.objective == "refusal" and self.transferred is not None:
            self._read(subject)
            return
        hidden = _hidden_size(subject)
        if self.directions > hidden:
            raise ValueError(f"`directions` is {self.directions}, and the hidden states have {hidden} numbers.")
        pairs = min(len(self.harmful), len(self.harmless))
        # Where all requests are paired, the first direction is the mean of the differences, and takes one away.
        most = pairs + (len(self.harmful) != len(self.harmless))
        if self.objective == "refusal" and self.directions > most:
            raise ValueError(_too_few(pairs, most, self.directions))

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the model without the directions; see [`Subject.answer`]."""
        if self.directions == 0:
            return subject.answer(rows, self.name)
        try:
            found, centers = self.found(subject), self._centers(subject)
        except RuntimeError as error:
            return all_errored(rows, error)

        # Any: `Subject.answer` speaks of perturbations, and uses nothing but `installed`.
        def without(batch: Sequence[AttackRow]) -> Any:
            lengths = torch.tensor([len(subject.encode(row.prompt)) for row in batch], device=subject.device)
            width = int(lengths.max()) + (0 if centers else subject.max_new_tokens)
            last = lengths if centers else torch.full_like(lengths, width)
            selected = torch.arange(width, device=subject.device) < last.unsqueeze(-1)
            return Subspace(found, selected, self.stream, centers)

        return subject.answer(rows, self.name, perturb=without)

    def found(self, subject: Subject) -> dict[Site, torch.Tensor]:
        """
        The directions that the attack removes from a model.

        Args:
            subject ([`Subject`]):
                The model.

        Returns:
            `dict[Site, torch.Tensor]`: orthonormal float32 rows of shape `(directions, H)` by layer.

        Raises:
            `ValueError`: a file that does not fit the model, no difference between the two kinds of requests, or
                too few requests for so many directions.
        """
        if self.objective == "refusal" and self.transferred is not None:
            return self._read(subject)
        self.check(subject)
        if self.objective == "refusal":
            return self._own(subject)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (_hidden_size(subject), self.directions)
        return {
            layer: torch.linalg.qr(torch.randn(shape, generator=generator)).Q.T.to(subject.device)
            for layer in range(len(decoder_layers(subject.model)))
        }

    def _everywhere(self, subject: Subject) -> ThreatModel:
        return ThreatModel(tuple(range(len(decoder_layers(subject.model)))), self.stream)

    def _centers(self, subject: Subject) -> dict[Site, torch.Tensor]:
        if self.replacement == "zero":
            return {}
        states = _last_states(subject, _batches(subject, self.harmless), self._everywhere(subject))
        return {site: rows.mean(0) for site, rows in states.items()}

    def _own(self, subject: Subject) -> dict[Site, torch.Tensor]:
        threat = self._everywhere(subject)
        kinds = [_batches(subject, examples) for examples in (self.harmful, self.harmless)]
        first = refusal_directions(subject.model, kinds[0], kinds[1], threat)
        if self.directions == 1:
            return {site: direction.unsqueeze(0) for site, direction in first.items()}
        states = [_last_states(subject, batches, threat) for batches in kinds]
        pairs = min(len(self.harmful), len(self.harmless))
        found = {}
        for site, direction in first.items():
            differences = states[0][site][:pairs] - states[1][site][:pairs]
            found[site] = leading_directions(differences, direction, self.directions)
        return found

    def _read(self, subject: Subject) -> dict[Site, torch.Tensor]:
        depth, hidden = len(decoder_layers(subject.model)), _hidden_size(subject)
        stored = load_directions(str(self.transferred))
        for site, rows in stored.items():
            if site != "embedding" and not 0 <= site < depth:
                raise ValueError(
                    f"{self.transferred} holds directions of layer {site}, and the model has {depth} layers. Use "
                    "directions of a model of the same depth."
                )
            if rows.shape[1] != hidden:
                raise ValueError(
                    f"{self.transferred} holds directions of {rows.shape[1]} numbers, and the model's hidden states "
                    f"have {hidden}. Use directions of a model with the same hidden size."
                )
            if rows.shape[0] < self.directions:
                raise ValueError(
                    f"{self.transferred} holds {rows.shape[0]} directions of layer {site}, and `directions` is "
                    f"{self.directions}. Ask for fewer, or save more."
                )
        return {site: rows[: self.directions].to(subject.device) for site, rows in stored.items()}


def leading_directions(differences: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """
    A first direction and the leading right singular vectors of differences without it.

    Args:
        differences (`torch.Tensor` of shape `(N, H)`):
            Differences, pair by pair.
        first (`torch.Tensor` of shape `(H,)`):
            The first direction, of length 1.
        count (`int`):
            How many in all.

    Returns:
        `torch.Tensor` of shape `(count, H)`, float32: orthonormal rows, the first one first.

    Raises:
        `ValueError`: the differences span too few directions.
    """
    # float64: the later directions are orthogonal to the first to rounding of float32, not of what is left of it.
    exact, unit = differences.double(), first.double()
    unit = unit / torch.linalg.vector_norm(unit)
    left = exact - (exact @ unit).unsqueeze(-1) * unit
    _, sizes, vectors = torch.linalg.svd(left, full_matrices=False)
    usable = int((sizes > LEFT * torch.linalg.matrix_norm(exact)).sum())
    if usable < count - 1:
        raise ValueError(_too_few(len(differences), usable + 1, count))
    return torch.cat([unit.unsqueeze(0), vectors[: count - 1]]).float()


def save_directions(path: str | Path, directions: Mapping[Site, torch.Tensor]) -> None:
    """
    Writes directions to a safetensors file.

    Args:
        path (`str` or `Path`):
            The file.
        directions (`Mapping[Site, torch.Tensor]`):
            As [`RefusalDirection.found`] gives them.
    """
    from safetensors.torch import save_file

    save_file({str(site): rows.detach().cpu().float().contiguous() for site, rows in directions.items()}, str(path))


def load_directions(path: str | Path) -> dict[Site, torch.Tensor]:
    """
    Reads directions of a safetensors file and makes them orthonormal.

    Args:
        path (`str` or `Path`):
            File that [`save_directions`] wrote: for every layer, by its number, a tensor of shape `(k, H)` or `(H,)`.

    Returns:
        `dict[Site, torch.Tensor]`: float32 rows of shape `(k, H)`.

    Raises:
        `ValueError`: no such file, or one that holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} (`transferred`) cannot be read as a safetensors file: {error}.") from error
    found: dict[Site, torch.Tensor] = {}
    for name, tensor in stored.items():
        rows = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
        known = name == "embedding" or name.isdecimal()
        if not known or rows.dim() != 2 or torch.linalg.matrix_rank(rows.double()) < rows.shape[0]:
            raise ValueError(
                f"{path} (`transferred`) holds {name!r} of shape {tuple(tensor.shape)}; independent directions of "
                "shape (k, H) under the number of a layer were expected."
            )
        basis = torch.linalg.qr(rows.double().T).Q.T  # keeps what the first rows span, for any number of them
        found["embedding" if name == "embedding" else int(name)] = basis.float()
    if not found:
        raise ValueError(f"{path} (`transferred`) holds no directions.")
    return found


def _too_few(pairs: int, found: int, wanted: int) -> str:
    return (
        f"{pairs} pairs of requests give {found} directions, and {wanted} are asked for. Give more harmful and "
        "harmless requests, or ask for fewer directions."
    )


def _hidden_size(subject: Subject) -> int:
    return base_model(subject.model).config.get_text_config().hidden_size


def _batches(subject: Subject, examples: Sequence[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Prompts, each followed by one labelled token, which marks where it ends."""
    encoded = [subject.encode(example["prompt"])[-subject.max_prompt_tokens :] for example in examples]
    end = subject.pad_token_id
    return [
        {
            "input_ids": subject.pad([[*row, end] for row in rows], "right"),
            "attention_mask": subject.pad([[1] * (len(row) + 1) for row in rows], "right", 0),
            "labels": subject.pad([[-100] * len(row) + [end] for row in rows], "right", -100),
        }
        for rows in (encoded[i : i + subject.batch_size] for i in range(0, len(encoded), subject.batch_size))
    ]


def _last_states(
    subject: Subject, batches: Sequence[Mapping[str, torch.Tensor]], threat: ThreatModel
) -> dict[Site, torch.Tensor]:
    """Hidden states at the last prompt token, by site, one row a prompt."""
    seen: dict[Site, list[torch.Tensor]] = {site: [] for site in threat.resolve_sites(subject.model)}
    last = torch.zeros(0)

    def keep(site: Site, states: torch.Tensor) -> None:
        rows = torch.arange(states.shape[0], device=states.device)
        seen[site].append(states.detach()[rows, last.to(states.device)].float())

    with observed(subject.model, seen, threat.stream, keep), attack_mode(subject.model), torch.no_grad():
        for batch in batches:
            last = batch["attention_mask"].sum(-1) - 2
            label_logits(subject.model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    return {site: torch.cat(states) for site, states in seen.items()}
