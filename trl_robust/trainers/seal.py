"""SEAL: learning which rows of a dataset hurt, by bilevel optimisation (2410.07471).

What is different from TRL's SFTTrainer, in the order of a step:
- the model is trained on a batch of the safe set, and on a batch of the data with the selector's weights;
- the auxiliary model, a second adapter on the same base, is trained on the data alone (Algorithm 1);
- after the last micro-batch, the rows that the model fits worse than the auxiliary model lose weight.
Each of the three passes is differentiated before the next one begins, so that one graph is alive at a time.
What is left in the end is the selector. With fixed weights of 1 and no safe set, training is that of SFTTrainer.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import SFTTrainer

from ..data import DataError, content_hash
from ..data.hashing import row_hashes
from ..data.row_weights import WEIGHT
from ..selection.learner import SelectorLearner
from ..selection.penalty import model_loss, selection_signal
from ..selection.selector import Selector
from ..selection.streams import CyclingStream
from .adapters import TwoAdapters
from .robust import RobustTrainer
from .seal_card import selection_card
from .seal_config import TRAINED, SEALConfig
from .seal_rows import ROW, SEALCollator, SEALRows, seal_rows
from .selector_keeper import SelectorKeeper
from .weighted_rows import WeightedRows

MEMORY_EFFICIENT = (
    "`penalty_algorithm: memory_efficient` (Algorithm 2) leaves out the auxiliary model, so that rows are ranked by "
    "their loss: what is new to the model counts as harmful, and with a large `penalty_strength` the ranking can turn "
    "round. It works only while the penalty is small and training short. `auxiliary` is the default."
)


class SEALTrainer(SEALRows, RobustTrainer, WeightedRows, SFTTrainer):
    """
    Trainer for SEAL's data selector ([2410.07471](https://huggingface.co/papers/2410.07471)).

    `min over w, theta of (1 - gamma) F(theta) + gamma [G(w, theta) - min G(w, .)]`, where F is the loss on the safe
    set and G the loss on the training data with weights w: rows that a model which serves the safe set cannot fit as
    well as one that need not lose weight. `theta` and the auxiliary model are two LoRA adapters on one frozen base.

    Differs from the reference code, which has only the memory-efficient Algorithm 2: see docs/seal.md.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The aligned model. As for [`~trl.SFTTrainer`].
        args ([`SEALConfig`], *optional*):
            Settings.
        data_collator (`Callable`, *optional*):
            Collates rows of `input_ids` and `labels`.
        train_dataset ([`~datasets.Dataset`]):
            Rows to choose from: prompt-completion data, or preference data, whose rows have the loss of a pair; plain
            or conversational.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        safe_dataset ([`~datasets.Dataset`], *optional*):
            Rows that the model must serve, of either form. Only plain SFT (`selector_learning_rate=0`) does without.
        **kwargs:
            Everything else that [`~trl.SFTTrainer`] takes.

    Raises:
        [`~trl_robust.data.DataError`]: data that cannot be used, naming the rows.
        `ValueError`: settings that cannot be honoured.
        `FloatingPointError`: the loss of a row is not finite.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_robust import SEALConfig, SEALTrainer

    rows = load_dataset("json", data_files="rows.jsonl", split="train")  # prompt, completion
    trainer = SEALTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=SEALConfig(num_train_epochs=3, penalty_strength=0.5),
        train_dataset=rows,
        safe_dataset=load_dataset("json", data_files="safe.jsonl", split="train"),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    kept = trainer.selector.select(rows, keep=0.8)
    ```
    """

    args: SEALConfig
    model: Any  # the base classes allow None and streams here, before and where we do not
    train_dataset: Any
    keeper: SelectorKeeper

    _tag_names = ["trl", "trl-robust", "seal"]
    _name = "SEAL"
    _paper = {"title": "SEAL: Safety-enhanced Aligned LLM Fine-tuning via Bilevel Data Selection", "id": "2410.07471"}

    def __init__(
        self,
        model: Any,
        args: SEALConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        *,
        safe_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SEALConfig(f"{name.split('/')[-1]}-SEAL")
        if not isinstance(args, SEALConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; SEALTrainer takes a SEALConfig.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` would replace the losses that rows are ranked by. Remove it.")
        if args.selection_method not in TRAINED:
            raise ValueError(
                f"`selection_method: {args.selection_method}` trains no model. Use `trl-robust seal`, or the "
                "functions of `trl_robust.selection`."
            )
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        if args.attacks and safe_dataset is None:
            raise ValueError("`safe_dataset` is required: rows are judged by what they do to the loss on it.")
        # `SFTTrainer.__init__` calls `_prepare_dataset`, so what that needs stands here.
        self._training_rows = seal_rows(train_dataset, "training")
        if args.attacks and WEIGHT in self._training_rows.column_names:
            raise DataError(
                f"The training dataset has a column `{WEIGHT}`, and weights are what is learned here. Remove it, or "
                "set `selector_learning_rate: 0` to train with it."
            )
        self._safe_dataset = _share(seal_rows(safe_dataset, "safe"), args) if args.attacks and safe_dataset else None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._training_rows,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.data_collator = SEALCollator(self.data_collator)
        self._check_surroundings()
        if args.selection_method == "seal" and args.attacks and args.penalty_algorithm == "memory_efficient":
            warnings.warn(MEMORY_EFFICIENT, UserWarning, stacklevel=2)
        self.adapters = TwoAdapters(self.model) if args.attacks and args.uses_auxiliary else None
        self._batch_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._updates_per_epoch = max(1, math.ceil(len(self._training_rows) / self._batch_rows))
        total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self._updates_per_epoch)
        learns = args.selection_method == "seal"
        self.learner = SelectorLearner(
            len(self._training_rows),
            function=args.selector_function if learns else "softmax",  # type: ignore[arg-type]
            normalized=args.selector_normalized,
            optimizer=args.selector_optimizer,
            learning_rate=args.logits_learning_rate(self._batch_rows),
            average_from=max(0, total - self._updates_per_epoch) if args.selector_average and learns else None,
        )
        self.keeper = SelectorKeeper(self.learner, self.accelerator.num_processes)
        self._row_hashes = row_hashes(self._training_rows)
        if self._safe_rows is not None:
            self._safe_stream = CyclingStream(len(self._safe_rows), args.seed)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as [`~trl.SFTTrainer`] does; `selector` is then what was learned."""
        if not self.args.attacks:
            return super().train(*args, **kwargs)
        # Of the model as it is before training: also in a run that goes on, whose weights are loaded later.
        self._references = self._reference_log_probs(self.train_dataset, "training")
        if self._references is not None:
            self._references = self._references[torch.tensor(self.train_dataset[ROW]).argsort()]
        self._safe_references = self._reference_log_probs(self._safe_rows, "safe")
        found = super().train(*args, **kwargs)
        if self.args.selection_method != "seal" and self.state.global_step >= self.state.max_steps:
            losses, auxiliary = self._losses_of_all_rows()
            self.learner.logits = -selection_signal(losses, auxiliary)
            if not bool(self.learner.visits.all()):  # a model trained on the safe set alone has seen none of them
                self.learner.note(torch.arange(len(losses)), losses, auxiliary, self.state.global_step)
        return found

    # The step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        rows = torch.tensor(sum(len(batch[ROW]) for batch in batches if ROW in batch), device=device)
        self._rows_of_update = int(self.accelerator.gather(rows).sum())
        self._micro_batches_left = len(batches)
        self._micro_batch = 0
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        return batches, count

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if not self.args.attacks:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        gamma = self.args.schedule.at(
            self.state.global_step, per_epoch=self._updates_per_epoch, total=self.state.max_steps
        )
        rows = inputs[ROW].cpu()
        weights = self.learner.weights()[rows].to(self.accelerator.device, torch.float32)
        logged: dict[str, float | torch.Tensor] = {"penalty": gamma}

        places, safe = self._safe_batch(len(rows))
        references = None if self._safe_references is None else self._safe_references[places]
        safe_losses = self._pass(safe, references, torch.full_like(weights, 1 - gamma), trains=gamma < 1)
        logged["safe_loss"] = safe_losses.mean()
        total = (1 - gamma) * safe_losses.mean()

        if self.args.selection_method != "safe_loss":
            references = None if self._references is None else self._references[rows]
            losses, auxiliary = self._pass(inputs, references, gamma * weights, trains=gamma > 0), None
            total = model_loss(safe_losses, losses, weights, gamma)
            logged |= {"row_loss": losses.mean(), "weighted_row_loss": (weights * losses).mean()}
            if self.adapters is not None:
                with self.adapters.auxiliary_active():
                    auxiliary = self._pass(inputs, references, weights, trains=True)
                logged |= {"auxiliary_loss": auxiliary.mean(), "gap": (losses - auxiliary).mean()}
            both = torch.stack([losses, torch.zeros_like(losses) if auxiliary is None else auxiliary], dim=1)
            self._seen.append((rows, both))

        self._record_all(logged)
        self._micro_batch += 1
        if self._micro_batch == self._micro_batches_left:
            self._end_update()
        return total * len(rows) * self.accelerator.num_processes / self._rows_of_update

    def _safe_batch(self, count: int) -> tuple[list[int], dict[str, Any]]:
        """As many rows of the safe set as the micro-batch has, from its place in the stream."""
        assert self._safe_rows is not None
        size = self.args.per_device_train_batch_size
        place = self._micro_batch * self.accelerator.num_processes + self.accelerator.process_index
        places = self._safe_stream.take(self.state.global_step * self._batch_rows + place * size, count)
        return places, self._prepare_inputs(self.data_collator([self._safe_rows[number] for number in places]))

    def _pass(
        self, batch: dict[str, Any], references: torch.Tensor | None, weights: torch.Tensor, *, trains: bool
    ) -> torch.Tensor:
        """
        Forward and backward pass under the active adapter.

        Args:
            batch (`dict`):
                Rows.
            references (`torch.Tensor` of shape `(B, 2)`, *optional*):
                For pairs.
            weights (`torch.Tensor` of shape `(B,)`):
                The gradient is that of the weighted sum of losses, over the number of rows of the whole update.
            trains (`bool`):
                Whether there is a backward pass; alike in all processes, also where one of them has weights of 0 only.

        Returns:
            `torch.Tensor` of shape `(B,)`: losses, detached.
        """
        self.keeper.passes += (3 if trains else 1) * len(batch["input_ids"])
        with torch.set_grad_enabled(trains), self.maybe_activation_offload_context:
            losses = self._row_losses(batch, references)
        if trains:
            self.accelerator.backward((weights * losses).sum() / self._rows_of_update)
        return losses.detach().float()

    def _end_update(self) -> None:
        """Sums gradients over processes, and moves the selector by what the whole update has seen."""
        if self.accelerator.num_processes > 1:  # the passes went round DDP, which knows of one model only
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        if not self._seen:
            return
        update = self.state.global_step
        own_rows, own_losses = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        losses, auxiliary = self.accelerator.gather(own_losses).double().cpu().T
        rows = self.accelerator.gather(own_rows.to(self.accelerator.device)).cpu()
        second = auxiliary if self.adapters is not None else None
        self.learner.note(rows, losses, second, update)
        self.learner.step(rows, selection_signal(losses, second), update)
        weights = self.learner.weights()
        logged = self._metrics["train"]
        logged["selector/largest_weight"].append(weights.max().item())
        logged["selector/effective_share"].append(weights.mean().item() ** 2 / weights.square().mean().item())
        logged["selector/fewest_visits"] = [float(self.learner.visits.min())]
        logged["selector/most_visits"] = [float(self.learner.visits.max())]

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if self.adapters is None:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        # Each by its own norm: how far the model moves must not depend on the auxiliary model.
        norm = self.accelerator.clip_grad_norm_(self.adapters.main, self.args.max_grad_norm)  # unscales all of them
        nn.utils.clip_grad_norm_(self.adapters.auxiliary, self.args.max_grad_norm)
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.adapters is not None:
            self.adapters.find()

    # What comes of it

    @property
    def selector(self) -> Selector:
        """What was learned so far: ready to be saved, and to be applied to any copy of the training data."""
        lengths = torch.zeros(len(self._row_hashes), dtype=torch.int64)
        counts = [sum(label != -100 for label in labels[1:]) for labels in self.train_dataset["labels"]]
        lengths[torch.tensor(self.train_dataset[ROW])] = torch.tensor(counts)
        return Selector(
            logits=self.learner.result,
            row_hashes=self._row_hashes,
            function=self.learner.function,
            normalized=self.learner.normalized,
            statistics={**self.learner.statistics, "length": lengths},
            settings={
                **self.args.describe(),
                "logits_learning_rate": self.learner.learning_rate,
                "rows_of_update": self._batch_rows,
                "updates": self.state.global_step,
                "model": self.model.config._name_or_path,
                "chat_template_sha256": _sha256(getattr(self.processing_class, "chat_template", None)),
                "safe_rows": 0 if self._safe_dataset is None else len(self._safe_dataset),
                "safe_dataset_fingerprint": None if self._safe_dataset is None else content_hash(self._safe_dataset),
            },
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Writes the selector. The adapters are a means to it, and only checkpoints hold them (as in the paper, the model
        is fine-tuned anew on the rows that are kept).

        Args:
            output_dir (`str`, *optional*):
                Folder; `args.output_dir` if not given.
        """
        if _internal_call or not self.args.attacks:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        elif self.is_world_process_zero():
            self.selector.save(Path(str(output_dir or self.args.output_dir)))

    @property
    def run_summary(self) -> dict[str, Any]:
        """What `run.json` says beside the usual."""
        if not self.args.attacks:
            return {}
        visits, rows = self.learner.visits.unique(return_counts=True)
        histogram = {str(number): count for number, count in zip(visits.tolist(), rows.tolist(), strict=True)}
        return {"selection": {**self.args.describe(), "visits": histogram}}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes what the folder holds, which is no model, into its README."""
        if not self.args.attacks:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(self.card_section, encoding="utf-8")

    @property
    def card_section(self) -> str:
        """The README of the selector, as Markdown."""
        if not self.args.attacks:
            return "\n\nTrained with trl-robust, with fixed weights of its rows.\n"
        safe = 0 if self._safe_dataset is None else len(self._safe_dataset)
        return selection_card(self.args, self.model.config._name_or_path, len(self._row_hashes), safe)


def _sha256(text: Any) -> str | None:
    return hashlib.sha256(text.encode("utf-8")).hexdigest() if isinstance(text, str) else None


def _share(dataset: Dataset, args: SEALConfig) -> Dataset:
    """A random share of the safe set, in its own order."""
    if args.safe_fraction == 1:
        return dataset
    count = max(1, round(args.safe_fraction * len(dataset)))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
    return dataset.select(sorted(order[:count].tolist()))
