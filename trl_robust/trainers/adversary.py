"""The adversary of a training run: it finds, keeps and counts the changes that the model is trained against."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from ..inner import Ablation, Change, Perturbation, find_perturbation, median_norms, refusal_directions
from ..objectives import PreferenceLoss
from ..threat import ThreatModel, selected_ranks
from ..threat.sites import Site
from .held import load_held, save_held
from .lat_arguments import FAITHFUL_WEIGHT_DECAY, AttackArguments

STATE_NAME = "lat_state.json"
HELD_NAME = "perturbations-{}.safetensors"
MEMORY_NAME = "adversary-{}.safetensors"
CALIBRATION_ROWS, DIRECTION_ROWS = 64, 32

Batch = Mapping[str, Any]


class Adversary:
    """
    Finds the perturbation of every micro-batch, applies it, and remembers what a resumed run needs.

    Args:
        args ([`AttackArguments`]):
            Settings of the run.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
        model (`nn.Module`):
            The model, outside distributed wrappers.
        sample (`Callable[[int], Sequence[Batch]]`):
            Gives so many rows of the training data as batches with `input_ids`, `attention_mask`, `labels` and, where
            there are benign rows, `benign`.
        record (`Callable[[str, float], None]`):
            Takes what is to be logged.
        preference ([`~trl_robust.objectives.PreferenceLoss`], *optional*):
            What a swapped attack minimises.

    Raises:
        `ValueError`: a site that the model does not have.
    """

    def __init__(
        self,
        args: AttackArguments,
        accelerator: Accelerator,
        model: nn.Module,
        sample: Callable[[int], Sequence[Batch]],
        record: Callable[[str, float], None],
        preference: PreferenceLoss | None = None,
    ) -> None:
        self.args, self.accelerator, self.model = args, accelerator, model
        self.sample, self.record, self.preference = sample, record, preference
        self.threat: ThreatModel = args.threat
        self.candidates = self.threat.resolve_sites(model)  # an unknown layer stops here, before anything is trained
        self.passes = 0.0  # of this process, training only
        self.median_norms: dict[Site, float] = {}  # what a relative radius is relative to
        self.current: Change | None = None  # of the micro-batch in hand
        self.held: list[Perturbation] = []  # of the micro-batches of this attack
        self.directions: dict[Site, torch.Tensor] = {}
        self._sums: dict[Site, torch.Tensor] = {}  # of this attack's perturbations, for a warm start of the next
        self._counts: dict[Site, torch.Tensor] = {}
        self._start: dict[Site, torch.Tensor] = {}
        self._step, self._micro_batch, self._eval_batch, self._measured = -1, 0, 0, -1

    # Applying

    @contextmanager
    def attacking(self, batch: Batch, step: int, micro_batches: int, *, copies: int = 1) -> Iterator[None]:
        """
        Training on a micro-batch: under its perturbation, searched for or kept from the first update on the batch.

        Args:
            batch (`Mapping`):
                As [`~trl_robust.find_perturbation`] takes it.
            step (`int`):
                Updates made so far.
            micro_batches (`int`):
                Micro-batches of this update.
            copies (`int`, *optional*, defaults to `1`):
                As in [`~trl_robust.inner.Change.installed`].
        """
        with self._under(self._for_step(batch, step, micro_batches), copies):
            yield

    @contextmanager
    def evaluating(self, batch: Batch, *, copies: int = 1) -> Iterator[None]:
        """Evaluation on a batch under its own perturbation, the same in every evaluation; as [`attacking`]."""
        number, self._eval_batch = self._eval_batch, self._eval_batch + 1
        with self._under(self._find(batch, ("evaluation", number), 0), copies):
            yield

    def start_evaluation(self) -> None:
        """The next batch is the first of an evaluation, whose random draws are always the same."""
        self._eval_batch = 0

    @contextmanager
    def off(self) -> Iterator[None]:
        """Forward passes in this block run without the perturbation, and may be of other rows."""
        with self.current.disabled() if self.current is not None else nullcontext():
            yield

    @contextmanager
    def _under(self, change: Change | None, copies: int) -> Iterator[None]:
        self.current = change
        try:
            # Open until the backward pass is done: with checkpointing, part of the forward pass runs again there.
            with change.installed(self.model, copies=copies) if change is not None else nullcontext():
                yield
        finally:
            self.current = None

    # Finding

    def starts_attack(self, step: int) -> bool:
        """Whether the next micro-batch is the first of a new attack."""
        return step != self._step and step % self.args.updates_per_attack == 0

    def _for_step(self, batch: Batch, step: int, micro_batches: int) -> Change | None:
        if not self.args.attacks:
            return None
        if self.starts_attack(step):
            self._start = self._next_start()
            self._sums, self._counts = {}, {}
        if step != self._step:
            self._step, self._micro_batch = step, 0
        number, self._micro_batch = self._micro_batch, self._micro_batch + 1
        if self.args.faithful and number < micro_batches - 1:
            return None  # defect D1: the hooks of all micro-batches but the last are gone when the model is trained
        if self.args.attack_objective == "refusal_direction":
            return self._find(batch, (step, number), step)
        if step % self.args.updates_per_attack != 0:
            return self.held[0 if self.args.faithful else number]
        found = self._find(batch, (step, number), step)
        assert isinstance(found, Perturbation)
        if self.args.updates_per_attack > 1:
            self.held = [*(self.held if number and not self.args.faithful else []), found]
        self._remember(found)
        return found

    def _find(self, batch: Batch, draw: tuple[int | str, int], step: int) -> Change | None:
        """The change of a batch; `draw` names the batch, for the seed of what is random in it."""
        args = self.args
        generator = self._generator(*draw, self.accelerator.process_index)
        if args.attack_objective == "refusal_direction":
            # Drawn before the measuring, which must be the same on all processes.
            ablated = torch.rand((), generator=generator).item() < args.refusal_direction_prob
            self._measure_directions(step)
            return self._ablation(batch, draw[0]) if ablated else None
        if self.threat.radius_unit == "relative":
            self._calibrate()
        toward, away = args.attack_weights
        targeted = args.attack_objective == "targeted"
        with self.accelerator.autocast():
            found = find_perturbation(
                self.model,
                {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)},
                self._threat_now(draw[0]),
                objective=args.attack_objective,
                steps=args.attack_steps,
                learning_rate=args.attack_learning_rate,
                optimizer=args.attack_optimizer,
                toward_coef=toward if targeted else 1.0,
                away_coef=away if targeted else 0.0,
                init=args.attack_init,
                weight_decay=FAITHFUL_WEIGHT_DECAY if args.faithful else 0.0,
                generator=generator,
                preference=self.preference,
                start=self._start if self.model.training else {},  # every evaluation is the same
                num_sites=args.attack_num_sites if args.attack_site_choice == "gradient" else None,
            )
        if self.model.training:
            self.passes += found.forward_passes
        self.record("attack_loss_before", found.losses[0])
        self.record("attack_loss_after", found.losses[-1])
        self.record("boundary_fraction", sum(found.boundary_fraction.values()) / len(found.boundary_fraction))
        # Every candidate, chosen or not: all processes must record the same names.
        for site in self.candidates:
            self.record(f"delta_norm/{site}", found.norms.get(site, 0.0))
            if args.attack_site_choice != "all":
                self.record(f"site_share/{site}", float(site in found.deltas))
        return found

    def _generator(self, *draw: int | str) -> torch.Generator:
        seed = zlib.crc32(repr((self.args.seed, *draw)).encode())  # type: ignore[attr-defined]
        return torch.Generator().manual_seed(seed)

    def _threat_now(self, step: int | str) -> ThreatModel:
        """The threat at the sites that this step uses, the same for all of its micro-batches and processes."""
        if self.args.attack_site_choice != "random":
            return self.threat
        generator = self._generator("sites", step)
        chosen = torch.randperm(len(self.candidates), generator=generator)[: self.args.attack_num_sites].tolist()
        return replace(self.threat, sites=[self.candidates[number] for number in chosen])

    def _calibrate(self) -> None:
        """Measures, once, what a relative radius is relative to."""
        batches = self.sample(CALIBRATION_ROWS)
        with self.accelerator.autocast():
            self.median_norms = median_norms(self.model, batches, self.threat)
        self.threat = self.threat.calibrated(self.median_norms)
        self.passes += sum(batch["input_ids"].shape[0] for batch in batches)

    def _measure_directions(self, step: int) -> None:
        """Measures the refusal direction, once in every so many updates."""
        due = self.model.training and step % self.args.refusal_direction_every == 0 and step != self._measured
        if self.directions and not due:
            return
        self._measured = step
        harmful = self.sample(DIRECTION_ROWS)
        harmless = [batch["benign"] for batch in harmful]
        with self.accelerator.autocast():
            self.directions = refusal_directions(self.model, harmful, harmless, self.threat)
        self.passes += sum(batch["input_ids"].shape[0] for batch in (*harmful, *harmless))

    def _ablation(self, batch: Batch, step: int | str) -> Ablation:
        sites = self._threat_now(step).resolve_sites(self.model)
        selected = selected_ranks(batch, self.threat.positions)
        directions = {site: self.directions[site] for site in sites if site in self.directions}
        return Ablation(directions, selected, self.threat.stream)

    # Remembering

    def _remember(self, found: Perturbation) -> None:
        """Adds a perturbation to the mean that a warm start starts from."""
        if self.args.attack_init != "warm":
            return
        counts = found.selected.sum(0).float()
        for site, delta in found.deltas.items():
            for kept, value in ((self._sums, delta.sum(0)), (self._counts, counts)):
                before = kept.get(site, value.new_zeros(0, *value.shape[1:]))
                wide, narrow = (value, before) if value.shape[0] >= before.shape[0] else (before, value)
                kept[site] = wide.clone()
                kept[site][: narrow.shape[0]] += narrow

    def _next_start(self) -> dict[Site, torch.Tensor]:
        """Where the next attack starts: the mean over rows of the last one's perturbations, by rank."""
        means = {site: total / self._counts[site].clamp(min=1).unsqueeze(-1) for site, total in self._sums.items()}
        return {**self._start, **means}

    def save(self, folder: Path, forward_passes: float, main: bool) -> None:
        """
        Writes what a run needs to go on as if it had not stopped.

        Args:
            folder (`Path`):
                A checkpoint.
            forward_passes (`float`):
                Cost so far, over all processes.
            main (`bool`):
                Whether this process writes what all share.
        """
        if main:
            # Sites as strings, since JSON has no other keys.
            norms = {str(site): norm for site, norm in self.median_norms.items()}
            state = {"schema": 1, "forward_passes": forward_passes, "median_norms": norms}
            (folder / STATE_NAME).write_text(json.dumps(state, indent=2))
        rank = self.accelerator.process_index
        if self.held and (self._step + 1) % self.args.updates_per_attack != 0:
            # Stopped between two updates against the same perturbations: the next one needs them.
            save_held(self.held, folder / HELD_NAME.format(rank))
        memory = {f"start/{site}": mean.contiguous() for site, mean in self._next_start().items()}
        memory |= {f"direction/{site}": direction.contiguous() for site, direction in self.directions.items()}
        if memory:
            save_file(memory, folder / MEMORY_NAME.format(rank))

    def load(self, folder: Path) -> None:
        """
        Reads what [`save`] wrote.

        Args:
            folder (`Path`):
                A checkpoint.
        """
        if (folder / STATE_NAME).is_file():
            state = json.loads((folder / STATE_NAME).read_text())
            self.passes = state["forward_passes"] / self.accelerator.num_processes
            if norms := state["median_norms"]:
                self.median_norms = {site: norms[str(site)] for site in self.candidates}
                self.threat = self.args.threat.calibrated(self.median_norms)
        rank, device = self.accelerator.process_index, self.accelerator.device
        self.held = load_held(folder / HELD_NAME.format(rank), self.args.attack_stream, device)
        self._sums, self._counts, self._start, self.directions = {}, {}, {}, {}
        path = folder / MEMORY_NAME.format(rank)
        for key, tensor in (load_file(path) if path.is_file() else {}).items():
            kind, name = key.split("/")
            kept = self._start if kind == "start" else self.directions
            kept["embedding" if name == "embedding" else int(name)] = tensor.to(device)
