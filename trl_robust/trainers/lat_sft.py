"""Latent adversarial training on supervised fine-tuning.

What is different from TRL's SFTTrainer, in the order of a step:
- the batch carries the rejected completions and benign rows beside the wanted completions (`_prepare_dataset`);
- before the forward pass, the worst perturbation of the batch is searched for (`_attack`);
- the forward and backward pass run under it, with the away, benign and KL terms added (`compute_loss`);
- several updates may be made against one perturbation (`updates_per_attack`).
Without an attack and without extra terms, training is that of SFTTrainer bit for bit.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import SFTTrainer

from .._compat import keep_4bit_differentiable
from ..data import DataError, LATDataCollator, as_prompt_completion, check_none_lost, join_benign, last_user_span
from ..inner import Perturbation, attack_mode, find_perturbation, median_norms
from ..objectives import LabelLogits, away, kl_divergence, label_logits, toward
from ..threat import ThreatModel
from .held import load_held, save_held
from .lat_sft_config import LATSFTConfig
from .refusals import check_distribution, check_model
from .repeat_sampler import RepeatedBlockSampler
from .threat_card import threat_section

STATE_NAME = "lat_state.json"
HELD_NAME = "perturbations-{}.safetensors"
CALIBRATION_ROWS = 64


class LATSFTTrainer(SFTTrainer):
    """
    Trainer for latent adversarial training (LAT) on supervised fine-tuning.

    An inner loop searches bounded perturbations of the hidden states that bring out unwanted behaviour; the outer
    step trains the model to behave well under them ([2407.15549](https://huggingface.co/papers/2407.15549), targeted;
    [2403.05030](https://huggingface.co/papers/2403.05030), untargeted):

    `toward_coef * CE(chosen | delta) + away_coef * W(rejected | delta) + sft_coef * CE(benign) + kl_coef * KL(benign)`

    Differs from the reference code: every micro-batch of an accumulated step is attacked, coefficients are not
    normalised, and the KL term is a plain mean over tokens.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.SFTTrainer`].
        args ([`LATSFTConfig`], *optional*):
            Settings.
        data_collator (`Callable`, *optional*):
            Collates rows of `input_ids` and `labels`; it is used for every share of the batch.
        train_dataset ([`~datasets.Dataset`]):
            Preference data (`prompt`, `chosen`, `rejected`) for a targeted attack or an away term, prompt-completion
            data otherwise; plain or conversational.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        benign_dataset ([`~datasets.Dataset`], *optional*):
            Prompt-completion data on which the model is to stay as useful as it is; never attacked.
        **kwargs:
            Everything else that [`~trl.SFTTrainer`] takes.

    Raises:
        [`~trl_robust.data.DataError`]: data that cannot be used, naming the rows.
        `ValueError`: settings that cannot be honoured.

    Example:

    ```python
    from datasets import load_dataset
    from trl_robust import LATSFTConfig, LATSFTTrainer

    trainer = LATSFTTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=LATSFTConfig(attack_radius=0.1, attack_radius_unit="relative", away_coef=0.5),
        train_dataset=load_dataset("LLM-LAT/harmful-dataset", split="train"),
        benign_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```
    """

    args: LATSFTConfig
    model: Any  # the base classes allow None and streams here, before and where we do not
    train_dataset: Any
    _signature_columns: Any

    _tag_names = ["trl", "trl-robust", "lat", "sft"]
    _name = "LAT-SFT"
    _paper = {
        "title": "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs",
        "id": "2407.15549",
    }

    def __init__(
        self,
        model: Any,
        args: LATSFTConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        *,
        benign_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = LATSFTConfig(f"{name.split('/')[-1]}-LAT-SFT")
        if not isinstance(args, LATSFTConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; LATSFTTrainer takes a LATSFTConfig.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` would replace the loss under attack. Subclass LATSFTTrainer instead."
            )
        if not isinstance(model, str):
            check_model(model, args)
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        if args.kl_coef and benign_dataset is None:
            raise ValueError(
                "`kl_coef` is a weight on benign data, and no `benign_dataset` is given. Give one, or set it to 0."
            )
        # `SFTTrainer.__init__` calls `_prepare_dataset`, so what that needs stands here.
        train_dataset = as_prompt_completion(
            train_dataset, "training", needs_rejected=args.needs_rejected, needs_prompt=args.needs_prompt
        )
        uses_benign = benign_dataset is not None and (args.sft_coef or args.kl_coef)
        if not (args.toward_coef or args.away_coef or uses_benign):
            raise ValueError(
                "`toward_coef` and `away_coef` are 0 and no `benign_dataset` is given; there is nothing to train. "
                "Give one, or set one of the two above 0."
            )
        if uses_benign and "input_ids" in train_dataset.column_names:
            raise DataError(
                "The training dataset is tokenised, and benign rows are joined to text only. Pass the text, or leave "
                "`benign_dataset` out."
            )
        self._training_rows = train_dataset
        self._benign_dataset = as_prompt_completion(benign_dataset, "benign") if uses_benign else None

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        check_model(self.model, args)
        check_distribution(self.accelerator)
        if self.accelerator.device.type == "cpu":
            keep_4bit_differentiable(self.model)
        self.data_collator = LATDataCollator(self.data_collator)
        self.threat: ThreatModel = args.threat
        self.threat.resolve_sites(self.model)  # an unknown layer stops here, before anything is trained
        self.ref_model: nn.Module | None = None
        if args.kl_coef and not hasattr(self.model, "disable_adapter"):
            self.ref_model = copy.deepcopy(self.model).eval().requires_grad_(False)
            # TRL's fused head shadows `forward` with a closure over the original model, which the copy would run.
            self.ref_model.__dict__.pop("forward", None)
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)

        self._passes = 0.0  # of this process, training only
        self._perturbation: Perturbation | None = None  # of the micro-batch in hand
        self._median_norms: dict[Any, float] = {}  # by site, what a relative radius is relative to
        self._held: list[Perturbation] = []  # of the micro-batches of this attack
        self._term_tokens: dict[str, torch.Tensor] = {}
        self._step, self._micro_batch, self._eval_batch = -1, 0, 0

    # Data

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset:
        def prepare(rows: Dataset, name: str) -> Dataset:
            numbered = rows.add_column("row", list(range(len(rows))))
            prepare_rows = super(LATSFTTrainer, self)._prepare_dataset
            prepared = prepare_rows(numbered, processing_class, args, packing, formatting_func, dataset_name)
            check_none_lost(numbered, prepared, name, args.max_length)
            return prepared.remove_columns("row")

        is_training = dataset is self._training_rows
        if not is_training:  # the evaluation datasets, at construction or given to `evaluate`
            # Without rejected completions a targeted attack would draw the model to the wanted ones.
            attacked = args.eval_under_attack and args.attacks
            name = "evaluation" if dataset_name == "eval" else dataset_name
            dataset = as_prompt_completion(
                dataset,
                name,
                needs_rejected=attacked and args.attack_objective == "targeted",
                needs_prompt=attacked and args.needs_prompt,
            )
        if "input_ids" in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        wanted = dataset.remove_columns("rejected") if "rejected" in dataset.column_names else dataset
        prepared = prepare(wanted, f"{dataset_name} (chosen)" if wanted is not dataset else dataset_name)
        if args.attack_positions == "last_user":
            template = {"chat_template": self.chat_template} if self.chat_template else {}
            prepared = prepared.map(
                lambda row: {"last_user_span": last_user_span(processing_class, row["prompt"], **template)},
                desc=f"Locating last user turns in {dataset_name} dataset",
            )
        if wanted is not dataset and args.needs_rejected:
            rejected = dataset.remove_columns("completion").rename_column("rejected", "completion")
            # TRL shuffles both shares with the same seed, and none lost a row: row i of both is the same.
            unwanted = prepare(rejected, f"{dataset_name} (rejected)")
            for column in ("input_ids", "labels"):
                prepared = prepared.add_column(f"away_{column}", unwanted[column][:])
        if is_training and self._benign_dataset is not None:
            benign = prepare(self._benign_dataset, "benign")
            prepared = join_benign(prepared, benign, args.benign_per_example, args.seed)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = ["away_input_ids", "away_labels", "benign_input_ids", "benign_labels", "last_user_span"]
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        if self.args.updates_per_attack == 1:
            return super()._get_train_sampler(train_dataset)
        block = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedBlockSampler(rows, block, self.args.updates_per_attack, seed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        # TRL counts the labels of the wanted completions; the other terms need counts of their own.
        shares = {
            "away": [batch["away_labels"] for batch in batches if "away_labels" in batch],
            "benign": [batch["benign"]["labels"] for batch in batches if "benign" in batch],
        }
        for name, labels in shares.items():
            count = torch.tensor(sum(int((part[:, 1:] != -100).sum()) for part in labels), device=device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
            self._term_tokens[name] = count
        return batches, num_items_in_batch

    # The step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._perturbation = self._perturbation_for_step(inputs)
        try:
            # Open until the backward pass is done: with checkpointing, part of the forward pass runs again there.
            with self._installed():
                return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._perturbation = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_batch = 0  # every evaluation draws the same random starts
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple:
        if not (self.args.eval_under_attack and self.args.attacks):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        self._perturbation = self._attack(inputs, "evaluation", self._eval_batch)
        self._eval_batch += 1
        try:
            with self._installed():
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._perturbation = None

    def _installed(self) -> Any:
        if self._perturbation is None:
            return nullcontext()
        return self._perturbation.installed(self.accelerator.unwrap_model(self.model))

    def _perturbation_for_step(self, inputs: dict[str, Any]) -> Perturbation | None:
        """The perturbation of a micro-batch: searched for, or kept from the first update on the same batch."""
        if not self.args.attacks:
            return None
        if self.state.global_step != self._step:
            self._step, self._micro_batch = self.state.global_step, 0
        number, self._micro_batch = self._micro_batch, self._micro_batch + 1
        if self._step % self.args.updates_per_attack != 0:
            return self._held[number]
        found = self._attack(inputs, self._step, number)
        if self.args.updates_per_attack > 1:
            self._held = [*(self._held if number else []), found]
        return found

    def _attack(self, inputs: dict[str, Any], *draw: int | str) -> Perturbation:
        """Searches the perturbation of a batch; `draw` names the batch, for the seed of what is random in it."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        if self.threat.radius_unit == "relative":
            self._calibrate(model)
        batch = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        if args.attack_objective != "untargeted" and "away_labels" in batch:
            # The attack wants what the defence does not: the roles of the two completions change places.
            batch = {
                **{key: batch[f"away_{key}"] for key in ("input_ids", "attention_mask", "labels")},
                **{f"away_{key}": batch[key] for key in ("input_ids", "attention_mask", "labels")},
                **({"last_user_span": batch["last_user_span"]} if "last_user_span" in batch else {}),
            }
        targeted = args.attack_objective == "targeted"
        if targeted and "away_labels" not in batch:
            raise DataError("A targeted attack met a batch without rejected completions. Give preference data.")
        seed = zlib.crc32(repr((args.seed, *draw, self.accelerator.process_index)).encode())
        with self.accelerator.autocast():
            found = find_perturbation(
                model,
                batch,
                self.threat,
                objective=args.attack_objective,
                steps=args.attack_steps,
                learning_rate=args.attack_learning_rate,
                optimizer=args.attack_optimizer,
                toward_coef=args.attack_toward_coef if targeted else 1.0,
                away_coef=args.attack_away_coef if targeted else 0.0,
                init=args.attack_init,
                generator=torch.Generator().manual_seed(seed),
            )
        if self.model.training:
            self._passes += found.forward_passes
        self._record("attack_loss_before", found.losses[0])
        self._record("attack_loss_after", found.losses[-1])
        self._record("boundary_fraction", sum(found.boundary_fraction.values()) / len(found.boundary_fraction))
        for site, length in found.norms.items():
            self._record(f"delta_norm/{site}", length)
        return found

    def _calibrate(self, model: nn.Module) -> None:
        """Measures, once, what a relative radius is relative to."""
        count = min(CALIBRATION_ROWS, len(self.train_dataset))
        stride = len(self.train_dataset) // count
        rows = [self.train_dataset[number * stride] for number in range(count)]
        size = self.args.per_device_train_batch_size
        batches = [
            self._prepare_inputs(self.data_collator(rows[start : start + size])) for start in range(0, count, size)
        ]
        with self.accelerator.autocast():
            self._median_norms = median_norms(model, batches, self.threat)
        self.threat = self.threat.calibrated(self._median_norms)
        self._passes += count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        args = self.args
        inputs = dict(inputs)  # TRL writes into it
        inputs.pop("last_user_span", None)
        benign = inputs.pop("benign", None)
        rejected = {key: inputs.pop(f"away_{key}", None) for key in ("input_ids", "attention_mask", "labels")}
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        rows, terms = inputs["input_ids"].shape[0], []
        if args.toward_coef:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self._passes += 3 * rows  # forward, backward to the activations, backward to the weights
            count = (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
            shares = 1.0 if num_items_in_batch is None else num_items_in_batch / count / self._loss_scale
            self._record("toward_loss", loss.detach() * shares)
            terms.append(args.toward_coef * loss)
        if args.away_coef:
            found = label_logits(model, **rejected)
            self._passes += 3 * rows
            terms.append(args.away_coef * self._token_mean("away", found, away, num_items_in_batch))
        if benign is not None:
            with self._perturbation.disabled() if self._perturbation is not None else nullcontext():
                terms += self._benign_terms(model, benign, num_items_in_batch)
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    def _benign_terms(self, model: nn.Module, benign: dict[str, Any], num_items_in_batch: Any) -> list[torch.Tensor]:
        found = label_logits(model, benign["input_ids"], benign["attention_mask"], benign["labels"])
        rows = benign["input_ids"].shape[0]
        self._passes += 3 * rows
        terms = []
        if self.args.sft_coef:
            terms.append(self.args.sft_coef * self._token_mean("sft", found, toward, num_items_in_batch))
        if self.args.kl_coef:
            reference = self._reference_logits(benign)
            self._passes += rows

            def divergence(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                return kl_divergence(logits, reference)

            terms.append(self.args.kl_coef * self._token_mean("kl", found, divergence, num_items_in_batch))
        return terms

    @torch.no_grad()
    def _reference_logits(self, benign: dict[str, Any]) -> torch.Tensor:
        """Logits of the starting model, in evaluation mode: the copy, or the model with its adapters off."""
        batch = (benign["input_ids"], benign["attention_mask"], benign["labels"])
        with self.accelerator.autocast():
            if self.ref_model is not None:
                return label_logits(self.ref_model, *batch).logits
            model = self.accelerator.unwrap_model(self.model)
            with attack_mode(model), model.disable_adapter():
                return label_logits(model, *batch).logits

    @property
    def _loss_scale(self) -> int:
        # DDP averages gradients over processes; a sum over the tokens of all of them divided by their number wants
        # the sum instead. TRL scales its own term in the same way.
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _token_mean(
        self,
        name: str,
        found: LabelLogits,
        term: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        num_items_in_batch: Any,
    ) -> torch.Tensor:
        """A term's share of its mean over the tokens of the accumulated batch; its own mean goes to the log."""
        total = term(found.logits, found.targets).sum()
        own = max(len(found.targets), 1)
        self._record(f"{name}_loss", total.detach() / own)
        if num_items_in_batch is None:  # the Trainer divides by the accumulation steps itself
            return total / own
        count = self._term_tokens["away" if name == "away" else "benign"]
        return total / count.clamp(min=1) * self._loss_scale

    # What a person watches, and what is kept

    @property
    def forward_passes(self) -> float:
        """
        Cost of the training so far, in forward passes of one row through the whole model, over all processes.

        A backward pass to the activations counts as one more, a training pass as three. Every process must ask.
        """
        own = torch.tensor(self._passes, dtype=torch.float64, device="cpu")
        if self.accelerator.num_processes == 1:
            return own.item()
        return self.accelerator.gather(own.float().to(self.accelerator.device)).sum().item()

    def _record(self, name: str, value: float | torch.Tensor) -> None:
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(tensor).mean().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.attacks and self.model.training:
            self._metrics["train"]["forward_passes"] = [self.forward_passes]
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        # Sites as strings, since JSON has no other keys.
        norms = {str(site): norm for site, norm in self._median_norms.items()}
        state = {"schema": 1, "forward_passes": self.forward_passes, "median_norms": norms}
        if self.is_world_process_zero():
            (folder / STATE_NAME).write_text(json.dumps(state, indent=2))
        if self._held and self.state.global_step % self.args.updates_per_attack != 0:
            # Stopped between two updates against the same perturbations: the next one needs them.
            save_held(self._held, folder / HELD_NAME.format(self.accelerator.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT loads the bfloat16 adapters that TRL gives a 4-bit model as float32: another precision than before.
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])
        folder = Path(resume_from_checkpoint)
        if (folder / STATE_NAME).is_file():
            state = json.loads((folder / STATE_NAME).read_text())
            self._passes = state["forward_passes"] / self.accelerator.num_processes
            if norms := state["median_norms"]:
                self._median_norms = {site: norms[str(site)] for site in self.args.threat.resolve_sites(self.model)}
                self.threat = self.args.threat.calibrated(self._median_norms)
        path = folder / HELD_NAME.format(self.accelerator.process_index)
        self._held = load_held(path, self.args.attack_stream, self.args.device)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            card.write_text(
                card.read_text(encoding="utf-8") + threat_section(self.args, self.threat), encoding="utf-8"
            )
