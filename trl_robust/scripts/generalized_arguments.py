"""Arguments of the suite `generalized` of `trl-robust evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .inputs import folder_fault, seed_fault
from .judging import JudgeArguments, address_faults

VARIANTS = ("as_is", "adapter_off", "merged", "4bit")

ORGANISM_FILES = {
    "data": "attack_prompts.jsonl",
    "harmless_data": "lookalikes.jsonl",
    "utility_data": "utility.jsonl",
    "examples_data": "finetune.jsonl",
    "openings_data": "openings.jsonl",
    "benign_data": "benign.jsonl",
    "templates": "templates.txt",
}
"""Where an organism's folder holds what these arguments name."""


@dataclass
class GeneralizedArguments(JudgeArguments):
    """
    Arguments of the suite `generalized`: attacks on prompts, hidden states and weights, at several budgets, on one
    model or several. `recipes/eval/` has files of them.

    Args:
        suite (`str`, *optional*, defaults to `"generalized"`):
            This suite. `--suite quick`, `input` and `unlearning` are it as well, with other settings.
        model (`list[str]`):
            Models or adapters: folders or hub ids, each with a name of its own if wanted: `aligned=runs/aligned`.
        variants (`list[str]`, *optional*, defaults to `["as_is"]`):
            As what each model is attacked: `as_is`, `adapter_off` (the model below the adapter), `merged` (the adapter
            merged into it), `4bit` (its weights in NF4).
        model_url (`str`, *optional*):
            Base URL of an OpenAI-compatible server; the models are then names there, and only attacks on prompts run.
        model_key_env (`str`, *optional*):
            Environment variable that holds its API key.
        organism (`str`, *optional*):
            Folder of an organism; all data that is not given is its own, and names of datasets are looked up there.
        data (`str`):
            Requests: a dataset with a `prompt` column, and with `target` and `answer` where there are such.
        data_split, prompt_column, target_column, answer_column, max_rows (*optional*):
            Its split, the names of the columns, and how many rows are taken.
        harmless_data (`str`, *optional*):
            Harmless requests (`prompt`), best those that look like the others: over-refusal and coherence.
        utility_data (`str`, *optional*):
            Harmless questions (`prompt`, `answer`): utility, and what an attack on the model costs it.
        perplexity_data (`str`, *optional*):
            Texts (`text`): perplexity; without `utility_data` also what an attack on weights costs.
        capability_rows (`int`, *optional*, defaults to `100`):
            How many of them are asked again at every budget of an attack that changes the model.
        examples_data (`str`, *optional*):
            Unwanted answers to other requests (`prompt`, `completion`): many-shot, pruning, fine-tuning.
        openings_data (`str`, *optional*):
            Other requests with the opening of an answer (`prompt`, `target`): the universal perturbation and the
            refusal direction.
        benign_data (`str`, *optional*):
            Harmless rows (`prompt`, `completion`): benign fine-tuning and the refusal direction.
        templates (`str`, *optional*):
            A text file, one wrapper a line, with the mark `{prompt}`.
        attacks (`dict`):
            The attacks: a mapping from names to settings. A list in place of an attack's budget makes a curve.
        only (`list[str]`, *optional*):
            Run only these of them.
        controls (`bool`, *optional*, defaults to `True`):
            Whether every attack that has a random control is run beside it.
        attacker_model, attacker_url, attacker_key_env (`str`, *optional*):
            For `pair`: a model on this machine, or the name of one behind an address.
        thresholds (`list[float]`, *optional*):
            Shares of requests at which resistance is read; 0.1, 0.2, 0.3 and 0.5 by default.
        map_sites (`list[str]`, *optional*):
            Sites of the heat map: a latent attack at each of them alone, at every radius of `map_radii`.
        map_radii (`list[float]`, *optional*):
            Its relative radii.
        map_steps (`int`, *optional*, defaults to `10`):
            Steps of its searches.
        benchmarks (`list[str]`, *optional*):
            Tasks of lm-eval, such as `mmlu`.
        benchmark_limit (`int`, *optional*):
            Only so many rows of every task.
        unlearning_of (`str`, *optional*):
            Name of the model before unlearning, among `model`: the others get an unlearning score.
        forget_chance, utility_chance (`float`, *optional*, defaults to `0.0`):
            What guessing gives on `data` and on `utility_data`, for that score: 0.25 for four choices.
        output_dir (`str`, *optional*, defaults to `"evaluation-results/SUITE"`):
            Where results and report go: a folder without results. A run that was stopped goes on in its folder.
        max_new_tokens, batch_size, max_prompt_tokens (`int`, *optional*):
            Of the generation.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Weight dtype.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the models' own code may run.
        show_generations (`bool`, *optional*, defaults to `False`):
            Whether the report shows requests and answers. They stand in `generations.jsonl` either way.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the attacks and of the bootstrap.
    """

    suite: str = field(default="generalized", metadata={"help": "This suite."})
    model: list[str] | None = field(default=None, metadata={"help": "Models, each as PATH or NAME=PATH."})
    variants: list[str] = field(
        default_factory=lambda: ["as_is"], metadata={"help": f"As what each is attacked: {', '.join(VARIANTS)}."}
    )
    model_url: str | None = field(default=None, metadata={"help": "Served models: base URL of the server."})
    model_key_env: str | None = field(default=None, metadata={"help": "Served models: variable that holds the key."})
    organism: str | None = field(default=None, metadata={"help": "Folder of an organism, for its data."})
    data: str | None = field(default=None, metadata={"help": "Requests: a file, a folder or a hub id."})
    data_split: str = field(default="train", metadata={"help": "Split of the requests."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the requests."})
    target_column: str = field(default="target", metadata={"help": "Column with the openings to bring out."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the answers to look for."})
    max_rows: int | None = field(default=None, metadata={"help": "Attack only the first rows."})
    harmless_data: str | None = field(default=None, metadata={"help": "Harmless requests: over-refusal, coherence."})
    utility_data: str | None = field(default=None, metadata={"help": "Harmless questions with answers."})
    perplexity_data: str | None = field(default=None, metadata={"help": "Texts for the perplexity."})
    capability_rows: int = field(default=100, metadata={"help": "Questions asked again of a changed model."})
    examples_data: str | None = field(default=None, metadata={"help": "Unwanted answers to other requests."})
    openings_data: str | None = field(default=None, metadata={"help": "Other requests with openings of answers."})
    benign_data: str | None = field(default=None, metadata={"help": "Harmless prompts and completions."})
    templates: str | None = field(default=None, metadata={"help": "template: file with one wrapper a line."})
    attacks: dict[str, Any] | str | None = field(default=None, metadata={"help": "Attacks with settings, a mapping."})
    only: list[str] | None = field(default=None, metadata={"help": "Run only these of the attacks."})
    controls: bool = field(default=True, metadata={"help": "Whether random controls run beside the attacks."})
    attacker_model: str | None = field(default=None, metadata={"help": "pair: the attacker."})
    attacker_url: str | None = field(default=None, metadata={"help": "pair: base URL of the attacker."})
    attacker_key_env: str | None = field(default=None, metadata={"help": "pair: variable that holds the key."})
    thresholds: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.5], metadata={"help": "Shares at which resistance is read."}
    )
    map_sites: list[str] | None = field(default=None, metadata={"help": "Heat map: its sites."})
    map_radii: list[float] | None = field(default=None, metadata={"help": "Heat map: its relative radii."})
    map_steps: int = field(default=10, metadata={"help": "Heat map: steps of every search."})
    benchmarks: list[str] | None = field(default=None, metadata={"help": "Tasks of lm-eval."})
    benchmark_limit: int | None = field(default=None, metadata={"help": "Only so many rows of every task."})
    unlearning_of: str | None = field(default=None, metadata={"help": "The model before unlearning."})
    forget_chance: float = field(default=0.0, metadata={"help": "What guessing gives on the requests."})
    utility_chance: float = field(default=0.0, metadata={"help": "What guessing gives on the questions."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results and report go."})
    max_new_tokens: int = field(default=128, metadata={"help": "Length of an answer in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Requests at a time."})
    max_prompt_tokens: int = field(default=2048, metadata={"help": "Longer prompts are skipped."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Weight dtype.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the models' own code may run."})
    show_generations: bool = field(default=False, metadata={"help": "Whether the report shows the texts."})
    seed: int = field(default=0, metadata={"help": "Seed of the attacks and of the bootstrap."})

    def __post_init__(self) -> None:
        if self.organism is not None:
            for name, file in ORGANISM_FILES.items():
                if getattr(self, name) is None:
                    setattr(self, name, str(Path(self.organism).expanduser() / "data" / file))
        if problems := self.faults():
            raise ValueError("\n".join(problems))

    @property
    def models(self) -> list[tuple[str, str]]:
        """Name and path of every model."""
        found = []
        for given in self.model or []:
            name, equals, path = given.partition("=")
            found.append((name, path) if equals and name and path else (given, given))
        return found

    @property
    def folder(self) -> Path:
        """`output_dir`, or the suite's own."""
        return Path(self.output_dir) if self.output_dir is not None else Path("evaluation-results") / self.suite

    def faults(self) -> list[str]:
        """Everything that is wrong with the arguments, one sentence each."""
        problems = self._model_faults() + self._organism_faults() + self.judge_faults()
        if self.data is None:
            problems.append("`data` is missing; name a dataset of requests.")
        if not isinstance(self.attacks, dict) or not self.attacks:
            problems.append("`attacks` is missing; write them into the file given to `--config`, see recipes/eval.")
        else:
            from .generalized_data import checked_lines  # needs torch, which `--help` does not

            if unknown := [name for name in self.only or [] if name not in self.attacks]:
                problems.append(f"`only` names {unknown}, and the attacks are {list(self.attacks)}.")
            problems += checked_lines(self)[1]
        if (self.map_sites is None) != (self.map_radii is None):
            problems.append("`map_sites` and `map_radii` make the heat map together; give both or none.")
        at_least = dict.fromkeys(
            ("max_rows", "max_new_tokens", "batch_size", "max_prompt_tokens", "capability_rows", "benchmark_limit"), 1
        )
        at_least["map_steps"] = 0
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if not self.thresholds or any(not 0 < value <= 1 for value in self.thresholds):
            problems.append(f"`thresholds` is {self.thresholds}; they must be above 0 and at most 1.")
        for name in ("forget_chance", "utility_chance"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be from 0 to below 1.")
        if self.unlearning_of is not None and self.unlearning_of not in [name for name, _ in self.models]:
            problems.append(f"`unlearning_of` is {self.unlearning_of}, which is no name of a model.")
        problems += address_faults(self, "model", "attacker")
        if (fault := seed_fault(self.seed)) is not None:
            problems.append(fault)
        if (fault := folder_fault(self.folder)) is not None:
            problems.append(fault)
        elif (self.folder / "results.json").exists():
            problems.append(
                f"`output_dir` {self.folder} holds results, and nothing is written over. Name another folder; or "
                "remove its results.json to judge the answers that it holds again."
            )
        return problems

    def _organism_faults(self) -> list[str]:
        if self.organism is None:
            return []
        data = Path(self.organism).expanduser() / "data"
        if not data.is_dir():
            return [f"`organism` {self.organism} holds no organism; `trl-robust organism --output_dir` builds one."]
        used = {Path(str(getattr(self, name))) for name in ORGANISM_FILES}
        missing = [file for file in ORGANISM_FILES.values() if data / file in used and not (data / file).is_file()]
        if not missing:
            return []
        return [
            f"`organism` {self.organism} lacks {', '.join(missing)}; `trl-robust organism --output_dir "
            f"{self.organism}` completes it."
        ]

    def _model_faults(self) -> list[str]:
        problems = []
        names = [name for name, _ in self.models]
        if not names:
            problems.append("`model` is missing; name one model folder or hub id, or several.")
        elif len(set(names)) < len(names):
            problems.append("`model` names a model twice; give each a name of its own, as NAME=PATH.")
        if unknown := [variant for variant in self.variants if variant not in VARIANTS]:
            problems.append(f"`variants` names {unknown}; choose among {', '.join(VARIANTS)}.")
        if self.model_url is not None:
            given = [name for name in ("map_sites", "benchmarks", "perplexity_data") if getattr(self, name)]
            if self.variants != ["as_is"]:
                given.append("variants")
            if given:
                problems.append(f"{given} need a model on this machine, and `model_url` is given; remove them.")
        if self.attacker_url is not None and self.attacker_model is None:
            problems.append("`attacker_model` is missing; name the attacker behind `attacker_url`.")
        return problems
