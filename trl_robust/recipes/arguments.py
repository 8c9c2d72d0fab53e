"""What a recipe consists of once it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from ..trainers import LAPDPOConfig, LAPSFTConfig, LATDPOConfig, LATRMUConfig, LATSFTConfig, SEALConfig

VERBS: dict[str, Any] = {
    "lat-sft": LATSFTConfig,
    "lat-dpo": LATDPOConfig,
    "lat-rmu": LATRMUConfig,
    "lap-sft": LAPSFTConfig,
    "lap-dpo": LAPDPOConfig,
    "seal": SEALConfig,
}
"""Training verbs, and the class of their settings."""


class RecipeError(ValueError):
    """
    The user's settings cannot be run. The message lists every fault, one a line.

    Args:
        faults (`list[str]`):
            One sentence or two each: what is given, why it cannot be, what to do.
        source (`str`, *optional*, defaults to `"The command line"`):
            What has the faults.
    """

    def __init__(self, faults: list[str], source: str = "The command line") -> None:
        self.faults = faults
        self.source = source
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n- ".join([f"{source} has {count}:", *faults]))


@dataclass
class BenignArguments:
    """
    Data beside the training data, and how plain rows meet the model's chat template.

    Parameters:
        benign_dataset_name (`str`, *optional*):
            Path or hub id of the benign dataset (`prompt` and `completion`).
        benign_dataset_config (`str`, *optional*):
            Its configuration, where it has several.
        benign_dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        benign_datasets (`list[DatasetConfig]`, *optional*):
            Several benign datasets, written as TRL's `datasets:`. In place of `benign_dataset_name`.
        retain_dataset_name (`str`, *optional*):
            For unlearning: path or hub id of a corpus to retain (`text`). `dataset_name` is then the corpus to forget
            (`text`, and `topic` if there are several), and every text of it gets one to retain beside it.
        retain_dataset_config (`str`, *optional*):
            Its configuration, where it has several.
        retain_dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        safe_dataset_name (`str`, *optional*):
            For seal: path or hub id of the rows that the model must serve (`prompt` and `completion`, or pairs).
        safe_dataset_config (`str`, *optional*):
            Its configuration, where it has several.
        safe_dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        safe_datasets (`list[DatasetConfig]`, *optional*):
            Several such datasets, written as TRL's `datasets:`. In place of `safe_dataset_name`.
        chat_format (`bool`, *optional*, defaults to `False`):
            Whether plain prompts and completions become user and assistant messages, so that the model's chat
            template is applied. Conversational rows are left as they are.
        system_prompt (`str`, *optional*):
            System message put before every conversation that has none. Plain rows need `chat_format` with it.
        drop_long (`bool`, *optional*, defaults to `False`):
            Whether rows whose prompt leaves no room for a completion in `max_length` tokens are left out, with a note
            that counts them. Otherwise they stop the run.
    """

    benign_dataset_name: str | None = field(
        default=None, metadata={"help": "Path or hub id of the benign dataset (prompt and completion)."}
    )
    benign_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the benign dataset, where it has several."}
    )
    benign_dataset_split: str = field(default="train", metadata={"help": "Split of the benign dataset."})
    benign_datasets: list[DatasetConfig] = field(
        default_factory=list, metadata={"help": "Several benign datasets, written as `datasets:`."}
    )
    retain_dataset_name: str | None = field(
        default=None, metadata={"help": "Unlearning: path or hub id of a corpus to retain (text)."}
    )
    retain_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the corpus to retain, where it has several."}
    )
    retain_dataset_split: str = field(default="train", metadata={"help": "Split of the corpus to retain."})
    safe_dataset_name: str | None = field(
        default=None, metadata={"help": "seal: path or hub id of the rows that the model must serve."}
    )
    safe_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the safe dataset, where it has several."}
    )
    safe_dataset_split: str = field(default="train", metadata={"help": "Split of the safe dataset."})
    safe_datasets: list[DatasetConfig] = field(
        default_factory=list, metadata={"help": "Several safe datasets, written as `datasets:`."}
    )
    chat_format: bool = field(
        default=False, metadata={"help": "Make user and assistant messages of plain prompts and completions."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before every conversation that has none."}
    )
    drop_long: bool = field(
        default=False, metadata={"help": "Leave out rows whose prompt fills max_length, in place of stopping."}
    )


@dataclass
class Recipe:
    """
    Settings of one run.

    Args:
        verb (`str`):
            Which training they are for.
        path (`Path`, *optional*):
            The YAML file, if there is one.
        script ([`~trl.ScriptArguments`]):
            The training dataset.
        training ([`~trl.SFTConfig`] or [`~trl.DPOConfig`]):
            Training, attack and defence: of the class in `VERBS`.
        model ([`~trl.ModelConfig`]):
            Model, adapters, quantisation.
        mixture ([`~trl.DatasetMixtureConfig`]):
            Several training datasets, in place of one.
        benign ([`BenignArguments`]):
            Further data and the form of the rows.
        given (`dict`):
            Every key that was given, with its value in the type of its field.
        launch (`dict`):
            Options for `accelerate launch`.
        environment (`dict`):
            Environment variables of the `env:` block.
        argv (`list[str]`):
            The command line without options for `accelerate launch`.
        notes (`list[str]`):
            What could not be checked, and settings that have no effect.
        loaded (`dict`):
            Datasets that are loaded already, by `train`, `evaluation`, `benign`, `retain`, `safe`.
    """

    verb: str
    path: Path | None
    script: ScriptArguments
    training: Any
    model: ModelConfig
    mixture: DatasetMixtureConfig
    benign: BenignArguments
    given: dict[str, Any]
    launch: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    argv: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loaded: dict[str, Dataset] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """What messages call the recipe."""
        return str(self.path) if self.path is not None else "The command line"


PARTS: dict[str, Callable[[str], type]] = {
    "script": lambda verb: ScriptArguments,
    "training": lambda verb: VERBS[verb],
    "model": lambda verb: ModelConfig,
    "mixture": lambda verb: DatasetMixtureConfig,
    "benign": lambda verb: BenignArguments,
}
"""The dataclass of every part of a [`Recipe`], for a verb. Their field names are disjoint."""
