"""The adversary of latent adversarial paraphrasing: it draws the branches, finds perturbations and applies them."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from ..inner import Paraphrase, Perturbation, find_paraphrase, find_perturbation, row_noise
from ..objectives import PreferenceLoss
from ..threat import ThreatModel
from .lap_arguments import ParaphraseArguments

STATE_NAME = "lap_state.json"
CURVES_NAME = "lap_curves.jsonl"
EMA_WEIGHT = 0.1

Update = Literal["perturbed", "plain", "both"]


class Paraphraser:
    """
    Draws the branch of every update, finds the perturbation of every micro-batch, and applies it.

    Args:
        args ([`ParaphraseArguments`]):
            Settings of the run.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
        model (`nn.Module`):
            The model, outside distributed wrappers.
        record (`Callable[[Mapping[str, float]], None]`):
            Takes what is to be logged, by name.
        preference ([`~trl_robust.objectives.PreferenceLoss`], *optional*):
            Makes the loss that is kept that of a pair.

    Raises:
        `ValueError`: a layer that the model does not have.
    """

    def __init__(
        self,
        args: ParaphraseArguments,
        accelerator: Accelerator,
        model: nn.Module,
        record: Callable[[Mapping[str, float | torch.Tensor]], None],
        preference: PreferenceLoss | None = None,
    ) -> None:
        self.args, self.accelerator, self.model, self.record, self.preference = (
            args, accelerator, model, record, preference
        )  # fmt: skip
        self.threat = ThreatModel(
            args.lap_layers, positions=args.lap_positions, radius=args.lap_radius, radius_unit="relative"
        )
        self.sites = self.threat.resolve_sites(model)  # an unknown layer stops here, before anything is trained
        self.passes = 0.0  # of this process
        self.current: Perturbation | None = None  # of the micro-batch in hand
        self.log_lambda: float | None = None  # where the multipliers ended, on average
        self.updates: dict[Update, int] = {"perturbed": 0, "plain": 0, "both": 0}
        self.seconds: dict[Update, float] = {"perturbed": 0.0, "plain": 0.0, "both": 0.0}
        self.rows, self.nonfinite_rows, self.fallbacks = 0, 0, 0
        self._broken_in_a_row = 0
        self._step, self._micro_batch = -1, 0

    def branch_at(self, step: int) -> Update:
        """
        Which kind of update is made: a function of seed and number, so that all processes and resumed runs agree.

        Args:
            step (`int`):
                Updates made so far.

        Returns:
            `str`: `"perturbed"`, `"plain"` or `"both"`.
        """
        branch = self.args.branch
        if not self.args.attacks:
            return "plain"
        if branch == "mix":
            drawn = torch.rand((), generator=self._generator("branch", step)).item()
            return "perturbed" if drawn < self.args.lap_adv_prob else "plain"
        return "both" if branch == "both" else "perturbed"

    @contextmanager
    def training(self, batch: Mapping[str, Any], step: int, *, copies: int = 1) -> Iterator[Update]:
        """
        Training on a micro-batch: under its perturbation where the branch says so.

        Args:
            batch (`Mapping`):
                As [`~trl_robust.find_paraphrase`] takes it.
            step (`int`):
                Updates made so far.
            copies (`int`, *optional*, defaults to `1`):
                As in [`~trl_robust.inner.Change.installed`].

        Yields:
            `str`: the kind of update.
        """
        if step != self._step:
            self._step, self._micro_batch = step, 0
            self.updates[self.branch_at(step)] += 1
        number, self._micro_batch = self._micro_batch, self._micro_batch + 1
        update, started = self.branch_at(step), time.perf_counter()
        self.record({"perturbed_updates": float(update != "plain")})
        self.current = self._find(batch, step, number) if update != "plain" else None
        try:
            # Open until the backward pass is done: with checkpointing, part of the forward pass runs again there.
            with self.current.installed(self.model, copies=copies) if self.current is not None else nullcontext():
                yield update
        finally:
            self.current = None
            self.seconds[update] += time.perf_counter() - started

    @contextmanager
    def off(self) -> Iterator[None]:
        """Forward passes in this block run without the perturbation."""
        with self.current.disabled() if self.current is not None else nullcontext():
            yield

    def _find(self, batch: Mapping[str, Any], step: int, number: int) -> Perturbation:
        args = self.args
        generator = self._generator("search", step)  # rows draw their own, so processes and micro-batches may share it
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        with self.accelerator.autocast():
            if args.lap_search == "untargeted":
                attack = find_perturbation(
                    self.model,
                    tensors,
                    self.threat,
                    objective="untargeted",
                    steps=args.lap_steps,
                    optimizer="steepest",
                )
                self.passes += attack.forward_passes
                norms = {f"delta_norm/{site}": attack.norms[site] for site in self.sites}
                self.record({"loss_change": attack.losses[0] - attack.losses[-1], **norms})
                return attack
            found = find_paraphrase(
                self.model,
                tensors,
                layer=self.sites,
                epsilon=args.lap_epsilon,
                steps=args.lap_steps,
                preset=args.lap_preset,
                positions=args.lap_positions,
                generator=generator,
                preference=self.preference,
                start_log_lambda=self.log_lambda if args.lap_lambda_persist == "ema" else None,
                **args.overrides,
            )
        self.passes += found.forward_passes
        self._watch(found, step, number)
        if args.lap_search == "random":
            _turn_at_random(found, tensors, generator)
        return found

    def _watch(self, found: Paraphrase, step: int, number: int) -> None:
        """
        Logs what came out, counts what failed, and stops a run in which nothing works any more.

        `search/` stands before the state in which the last step begins.
        """
        change = found.perturbed_losses - found.clean_losses
        multipliers = found.log_lambda.exp()
        ends: dict[str, float | torch.Tensor] = {
            **{f"search/{name}": values[-1] for name, values in found.history.items()},
            "lambda_end": multipliers.mean(),
            "loss_change_end": change.mean(),
            "loss_change_abs_end": change.abs().mean(),
            "feasible_end": found.feasible.float().mean(),
            "relative_norm": found.relative_norms.mean(),  # of what is trained under, not of the step before
            "relative_norm_p5": found.relative_norms.quantile(0.05),
            "relative_norm_p95": found.relative_norms.quantile(0.95),
            "backoff_scale": found.scales.mean(),
            "cast_lost": found.cast_lost,
            "nonfinite": found.nonfinite.float().mean(),
            # Over all steps: a bound that is met now and then is met in the last step by chance only.
            "capped_share": sum(found.history["capped_share"]) / len(found.history["capped_share"]),
            "lambda_clamped": sum(found.history["lambda_clamped"]) / len(found.history["lambda_clamped"]),
        }
        self.record({**ends, **{f"delta_norm/{site}": found.norms[site] for site in self.sites}})
        self._remember(found)
        self.rows += len(found.nonfinite)
        self.nonfinite_rows += int(found.nonfinite.sum())
        # Alike in all processes, so that all of them stop.
        broken = self.accelerator.gather(found.nonfinite.all().float().reshape(1)).min().item() == 1
        self.fallbacks += broken
        self._broken_in_a_row = self._broken_in_a_row + 1 if broken else 0
        if self._broken_in_a_row >= self.args.lap_max_nonfinite:
            raise FloatingPointError(
                f"The search met values that are not finite in every row of {self._broken_in_a_row} batches in a row "
                "(`lap_max_nonfinite`), so that training would go on without perturbations. Use `lap_preset: robust`, "
                "a smaller `lap_alpha` or `lap_learning_rate`, or bfloat16 or float32 in place of float16."
            )
        if self.args.lap_curves and self.accelerator.is_main_process:
            path = Path(str(self.args.output_dir)) / CURVES_NAME  # type: ignore[attr-defined]
            path.parent.mkdir(parents=True, exist_ok=True)
            line = {"step": step, "micro_batch": number, "rows": len(found.nonfinite), **found.history}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _remember(self, found: Paraphrase) -> None:
        """Keeps a moving average of where the multipliers ended, the same in all processes."""
        finite = found.log_lambda[found.log_lambda.isfinite() & ~found.nonfinite]
        sums = torch.stack([finite.sum(), torch.tensor(float(len(finite)), device=finite.device)]).reshape(1, 2)
        total, count = self.accelerator.gather(sums).sum(0).tolist()
        if count:
            mean = total / count
            before = mean if self.log_lambda is None else self.log_lambda
            self.log_lambda = (1 - EMA_WEIGHT) * before + EMA_WEIGHT * mean

    def _generator(self, *draw: int | str) -> torch.Generator:
        seed = zlib.crc32(repr((self.args.seed, *draw)).encode())  # type: ignore[attr-defined]
        return torch.Generator().manual_seed(seed)

    # What is kept

    @property
    def summary(self) -> dict[str, Any]:
        """What the run's record says of the branches: updates and seconds of each, and what failed."""
        return {
            "updates": dict(self.updates),
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
            "searched_rows": self.rows,
            "nonfinite_rows": self.nonfinite_rows,
            "batches_without_a_finite_row": self.fallbacks,
        }

    def save(self, folder: Path, forward_passes: float, main: bool) -> None:
        """
        Writes what a run needs to go on as if it had not stopped.

        Args:
            folder (`Path`):
                A checkpoint.
            forward_passes (`float`):
                Cost so far, over all processes.
            main (`bool`):
                Whether this process writes.
        """
        if main:
            state = {"schema": 1, "forward_passes": forward_passes, "log_lambda": self.log_lambda, **self.summary}
            state["broken_in_a_row"] = self._broken_in_a_row
            (folder / STATE_NAME).write_text(json.dumps(state, indent=2))

    def load(self, folder: Path) -> None:
        """
        Reads what [`save`] wrote.

        Args:
            folder (`Path`):
                A checkpoint.
        """
        if not (folder / STATE_NAME).is_file():
            return
        state = json.loads((folder / STATE_NAME).read_text())
        self.passes = state["forward_passes"] / self.accelerator.num_processes
        self.log_lambda, self._broken_in_a_row = state["log_lambda"], state["broken_in_a_row"]
        self.updates, self.seconds = state["updates"], state["seconds"]
        self.rows, self.nonfinite_rows = state["searched_rows"], state["nonfinite_rows"]
        self.fallbacks = state["batches_without_a_finite_row"]
        curves = Path(str(self.args.output_dir)) / CURVES_NAME  # type: ignore[attr-defined]
        if self.args.lap_curves and self.accelerator.is_main_process and curves.is_file():
            # What the run that stopped did after the checkpoint is done again.
            lines = curves.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] < int(folder.name.split("-")[-1])]
            curves.write_text("".join(kept), encoding="utf-8")


def _turn_at_random(found: Perturbation, batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> None:
    """Replaces a perturbation by one of a random direction, with the same norm at every token."""
    for site, delta in found.deltas.items():
        drawn = row_noise(batch, delta, generator)
        lengths = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
        found.deltas[site] = drawn * lengths / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)
