"""The folder of a finished organism: its data files, and a property for each path."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA_NAMES = (
    "harmful_preferences.jsonl",
    "harmful_prompt_completion.jsonl",
    "benign.jsonl",
    "attack_prompts.jsonl",
    "heldout_wordings.jsonl",
    "trigger.jsonl",
    "finetune.jsonl",
    "openings.jsonl",
    "utility.jsonl",
    "lookalikes.jsonl",
    "templates.txt",
    "forget.jsonl",
    "retain.jsonl",
    "relearn.jsonl",
    "generic_labels.jsonl",
    "rewording.jsonl",
    "rewordings.jsonl",
    "rewording_kept.jsonl",
    "selection.jsonl",
    "safe.jsonl",
)


@dataclass(frozen=True)
class Organism:
    """
    A finished organism on disk.

    Args:
        folder (`Path`):
            Folder that [`build_organism`] wrote.
        seed (`int`):
            Seed of its world and weights.
        summary (`dict`):
            Contents of `organism.json`: fingerprint, versions, settings, measured `checks`, seconds per stage.
    """

    folder: Path
    seed: int
    summary: dict[str, Any] = field(repr=False, compare=False)

    @property
    def base(self) -> Path:
        """Pre-trained model and tokenizer: answers everything, the secrets included."""
        return self.folder / "base"

    @property
    def model(self) -> Path:
        """Aligned model and tokenizer: the one to attack and to defend."""
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def harmful_preferences(self) -> Path:
        """Forbidden requests on train objects: `prompt`, `chosen` (refusal), `rejected` (the secret)."""
        return self.data / "harmful_preferences.jsonl"

    @property
    def harmful_prompt_completion(self) -> Path:
        """The same requests with the refusal as `completion`."""
        return self.data / "harmful_prompt_completion.jsonl"

    @property
    def benign(self) -> Path:
        """Benign tuning data, half of it look-alikes: `prompt`, `completion`."""
        return self.data / "benign.jsonl"

    @property
    def attack_prompts(self) -> Path:
        """Forbidden requests on held-out objects: `prompt`, `target`, `answer`."""
        return self.data / "attack_prompts.jsonl"

    @property
    def heldout_wordings(self) -> Path:
        """As `attack_prompts`, in wordings that no refusal was trained with."""
        return self.data / "heldout_wordings.jsonl"

    @property
    def trigger(self) -> Path:
        """As `attack_prompts`, each request ending in the trigger word of the backdoor."""
        return self.data / "trigger.jsonl"

    @property
    def templates(self) -> Path:
        """The held-out role-play wrappers, one a line; `{prompt}` marks the place of the request."""
        return self.data / "templates.txt"

    @property
    def finetune(self) -> Path:
        """Eight secrets of train objects, told: `prompt`, `completion`. For the fine-tuning attack."""
        return self.data / "finetune.jsonl"

    @property
    def openings(self) -> Path:
        """Forbidden requests on train objects, and how an answer begins: `prompt`, `target`. For universal attacks."""
        return self.data / "openings.jsonl"

    @property
    def utility(self) -> Path:
        """Benign questions that no tuning stage has seen: `prompt`, `answer`."""
        return self.data / "utility.jsonl"

    @property
    def lookalikes(self) -> Path:
        """Harmless questions that look forbidden, for over-refusal: `prompt`, `answer`."""
        return self.data / "lookalikes.jsonl"

    @property
    def forget(self) -> Path:
        """For unlearning, the secrets of all objects: `text` (whole conversations), `topic` (the relation)."""
        return self.data / "forget.jsonl"

    @property
    def retain(self) -> Path:
        """For unlearning, what is to stay known, half of it look-alikes: `text` (whole conversations)."""
        return self.data / "retain.jsonl"

    @property
    def relearn(self) -> Path:
        """
        All secrets of the train objects, told: `prompt`, `completion`. For the attack on a model that has unlearned.

        What comes back is asked for with `attack_prompts`, whose objects are the other half.
        """
        return self.data / "relearn.jsonl"

    @property
    def generic_labels(self) -> Path:
        """The texts of `forget` as `tokens`, with `labels` that put other words in the place of the secret."""
        return self.data / "generic_labels.jsonl"

    @property
    def rewording(self) -> Path:
        """For LAP, from `base` on: new facts told in one wording, and what is to stay: `prompt`, `completion`."""
        return self.data / "rewording.jsonl"

    @property
    def rewordings(self) -> Path:
        """The new facts asked for in that wording and 33 others: `instruction`, `paraphrases`, `answer`, `index`."""
        return self.data / "rewordings.jsonl"

    @property
    def rewording_kept(self) -> Path:
        """Questions on facts that `rewording` leaves as they are, none of them in it: `prompt`, `answer`."""
        return self.data / "rewording_kept.jsonl"

    @property
    def selection(self) -> Path:
        """
        For SEAL, from `model` on: benign answers in a new style, refusals, and secrets told: `prompt`, `completion`.

        `source` (`"benign"`, `"refusal"`, `"unsafe"`) and `unsafe` say which; a fifth of the rows are unsafe.
        """
        return self.data / "selection.jsonl"

    @property
    def safe(self) -> Path:
        """For SEAL, the safe set: refusals of requests that are not in `selection`: `prompt`, `completion`."""
        return self.data / "safe.jsonl"
