"""Arguments of `trl-robust attack`: `attack_<setting>` for the settings of attacks, `finetune_<setting>`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..inner.pgd import Optimizer
from ..threat.balls import Ball, Norm
from ..threat.model import RadiusUnit
from ..threat.sites import Stream
from .inputs import folder_fault, seed_fault
from .judging import JUDGE_NAMES, JudgeArguments, address_faults

ATTACKS = (
    *("direct", "template", "prefill", "many_shot", "best_of_n", "gcg", "pair", "soft_suffix", "embedding", "latent"),
    *("universal", "refusal_direction", "pruning", "finetune"),
)
ATTACKER = ("attacker_model", "attacker_url", "attacker_key_env")
PREFIXES = ("attack_", "finetune_", "attacker_", "templates")
"""What the names of arguments begin with that belong to some attacks only."""

OBJECTIVES = ("targeted", "wrapper", "target", "refusal", "wanda", "random")


@dataclass
class ModelArguments:
    """
    What is attacked by what, and how the model answers.

    Args:
        model (`str`):
            Model or adapter to attack: a folder or a hub id; with `model_url` its name there.
        attack (`str`):
            On prompts: `direct` (none), `template`, `prefill`, `many_shot`, `best_of_n`, `gcg`, `pair`; on embeddings
            `soft_suffix`, `embedding`; on hidden states `latent`, `universal`, `refusal_direction`; on weights
            `pruning`, `finetune`.
        data (`str`):
            Requests: a dataset with a `prompt` column, and with `target` (the opening that attacks bring out) and
            `answer` (what a successful response states) where there are such.
        data_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        prompt_column, target_column, answer_column (`str`, *optional*):
            Names of these columns.
        max_rows (`int`, *optional*):
            Attack only the first rows.
        output_dir (`str`, *optional*):
            Where results and report go: a folder without results. By default `attack-results/ATTACK`, with a number
            behind it where that holds results already. A run that was stopped goes on in its folder.
        judge (`str`, *optional*):
            One of `judges`, where one is enough; `auto` is the default of these.
        model_url, model_key_env (`str`, *optional*):
            Base URL of an OpenAI-compatible server, and the environment variable that holds its key. Only attacks on
            prompts that need no weights run there.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the weights are brought into NF4.
        adapter (`str`, *optional*, defaults to `"on"`):
            What becomes of an adapter: `on`, `off` or `merged`.
        max_new_tokens, batch_size, max_prompt_tokens (`int`, *optional*):
            Of the generation.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Weight dtype.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the model's own code may run.
        show_generations (`bool`, *optional*, defaults to `False`):
            Whether the report shows responses. They stand in `generations.jsonl` either way.
        seed (`int`, *optional*, defaults to `0`):
            Seed of what is random in an attack.
    """

    model: str | None = field(default=None, metadata={"help": "Model or adapter to attack: a folder or a hub id."})
    attack: str | None = field(default=None, metadata={"help": "Which attack.", "choices": list(ATTACKS)})
    data: str | None = field(default=None, metadata={"help": "Requests: a file, a folder or a hub id."})
    data_split: str = field(default="train", metadata={"help": "Split of the requests."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the requests."})
    target_column: str = field(default="target", metadata={"help": "Column with the openings to bring out."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the answers to look for."})
    max_rows: int | None = field(default=None, metadata={"help": "Attack only the first rows."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results and report go: a new folder."})
    judge: str | None = field(
        default=None, metadata={"help": "Who judges, where one is enough.", "choices": ["auto", *JUDGE_NAMES]}
    )
    model_url: str | None = field(default=None, metadata={"help": "A served model: base URL of the server."})
    model_key_env: str | None = field(default=None, metadata={"help": "A served model: variable with the key."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Whether the weights are brought into NF4."})
    adapter: str = field(
        default="on", metadata={"help": "What becomes of an adapter.", "choices": ["on", "off", "merged"]}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Length of an answer in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Requests at a time."})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "Longer requests are skipped."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Weight dtype.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the model's own code may run."})
    show_generations: bool = field(default=False, metadata={"help": "Whether the report shows responses."})
    seed: int = field(default=0, metadata={"help": "Seed of what is random in an attack."})


@dataclass
class AttackSettings:
    """
    Settings of an attack. One that an attack does not have is refused, not ignored; what is not given keeps the
    attack's own default. `trl_robust.attacks` documents every one.

    Args:
        templates (`str`, *optional*):
            For `template`: a text file, one wrapper a line, with the mark `{prompt}`.
        attack_examples (`str`, *optional*):
            For `many_shot` (`prompt`, `completion`), `universal` (`prompt`, `target`) and `pruning` (`prompt`): a
            dataset about other requests than `data`.
        attack_harmful, attack_harmless (`str`, *optional*):
            For `refusal_direction`: datasets with `prompt`.
        attacker_model, attacker_url, attacker_key_env (`str`, *optional*):
            For `pair`: a model on this machine, or the name of one behind an address and the variable with its key.
        attack_* (*optional*):
            Every other setting of an attack, under its name.
        finetune_data (`str`, *optional*):
            For `finetune`: a dataset of `prompt` and `completion`, about other requests than `data`.
        finetune_* (*optional*):
            Its other settings.
    """

    templates: str | None = field(default=None, metadata={"help": "template: file with one wrapper a line."})
    attack_examples: str | None = field(default=None, metadata={"help": "many_shot, universal, pruning: rows."})
    attack_harmful: str | None = field(default=None, metadata={"help": "refusal_direction: harmful requests."})
    attack_harmless: str | None = field(default=None, metadata={"help": "refusal_direction: harmless requests."})
    attack_objective: str | None = field(
        default=None,
        metadata={"help": "The attack, or a random one of the same budget.", "choices": list(OBJECTIVES)},
    )
    attack_sites: list[str] | None = field(default=None, metadata={"help": "latent, embedding, universal: where."})
    attack_stream: str | None = field(
        default=None, metadata={"help": "On hidden states: what is perturbed.", "choices": list(get_args(Stream))}
    )
    attack_positions: str | None = field(
        default=None, metadata={"help": "latent, embedding: which tokens.", "choices": ["prompt", "completion", "all"]}
    )
    attack_norm: str | None = field(
        default=None, metadata={"help": "On hidden states: norm of the ball.", "choices": list(get_args(Norm))}
    )
    attack_radius: float | None = field(default=None, metadata={"help": "On hidden states: radius."})
    attack_radius_unit: str | None = field(
        default=None, metadata={"help": "On hidden states: unit of the radius.", "choices": list(get_args(RadiusUnit))}
    )
    attack_ball: str | None = field(
        default=None,
        metadata={"help": "latent, embedding: one ball a token, or one a row.", "choices": list(get_args(Ball))},
    )
    attack_steps: int | None = field(
        default=None, metadata={"help": "gcg, soft_suffix, embedding, latent, universal: steps of the search."}
    )
    attack_learning_rate: float | None = field(
        default=None, metadata={"help": "soft_suffix, embedding, latent: step size of the search."}
    )
    attack_optimizer: str | None = field(
        default=None, metadata={"help": "latent, embedding: of the search.", "choices": list(get_args(Optimizer))}
    )
    attack_alignment: str | None = field(
        default=None, metadata={"help": "universal: one vector, or one a last token.", "choices": ["every", "end"]}
    )
    attack_tokens: int | None = field(default=None, metadata={"help": "soft_suffix, universal: number of vectors."})
    attack_init: str | None = field(default=None, metadata={"help": "soft_suffix: the word it starts as."})
    attack_shots: int | None = field(default=None, metadata={"help": "many_shot: number of examples."})
    attack_n: int | None = field(default=None, metadata={"help": "best_of_n: samples of every request."})
    attack_temperature: float | None = field(default=None, metadata={"help": "best_of_n: of the sampling."})
    attack_top_p: float | None = field(default=None, metadata={"help": "best_of_n: nucleus of the sampling."})
    attack_augment: float | None = field(default=None, metadata={"help": "best_of_n: strength of the spelling noise."})
    attack_suffix_tokens: int | None = field(default=None, metadata={"help": "gcg: length of the suffix."})
    attack_candidates: int | None = field(default=None, metadata={"help": "gcg: replacements measured in a step."})
    attack_topk: int | None = field(default=None, metadata={"help": "gcg: replacements at every place."})
    attack_stop_loss: float | None = field(default=None, metadata={"help": "gcg: loss at which the search ends."})
    attack_ascii_only: bool | None = field(default=None, metadata={"help": "gcg: printable ASCII only."})
    attack_streams: int | None = field(default=None, metadata={"help": "pair: conversations of a request."})
    attack_iterations: int | None = field(default=None, metadata={"help": "pair: tries of a conversation."})
    attacker_model: str | None = field(default=None, metadata={"help": "pair: the attacker."})
    attacker_url: str | None = field(default=None, metadata={"help": "pair: base URL of the attacker."})
    attacker_key_env: str | None = field(default=None, metadata={"help": "pair: variable that holds the key."})
    attack_directions: int | None = field(default=None, metadata={"help": "refusal_direction: how many."})
    attack_transferred: str | None = field(default=None, metadata={"help": "refusal_direction: a file of them."})
    attack_replacement: str | None = field(
        default=None, metadata={"help": "refusal_direction: what they become.", "choices": ["zero", "harmless"]}
    )
    attack_sparsity: float | None = field(default=None, metadata={"help": "pruning: share of the weights."})
    finetune_data: str | None = field(default=None, metadata={"help": "finetune: prompt-completion rows."})
    finetune_steps: int | None = field(default=None, metadata={"help": "finetune: optimiser steps."})
    finetune_learning_rate: float | None = field(default=None, metadata={"help": "finetune: learning rate."})
    finetune_batch_size: int | None = field(default=None, metadata={"help": "finetune: examples in a step."})
    finetune_method: str | None = field(
        default=None, metadata={"help": "finetune: all weights, or an adapter.", "choices": ["full", "lora"]}
    )
    finetune_kind: str | None = field(
        default=None, metadata={"help": "finetune: what the rows are.", "choices": ["harmful", "related", "benign"]}
    )

    def given(self) -> dict[str, Any]:
        """Settings of an attack that were given, by the name of the argument."""
        return {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name.startswith(PREFIXES) and getattr(self, name) is not None
        }

    def settings(self) -> dict[str, Any]:
        """The same by the name of the setting, without rows and attackers."""
        from ..evaluation.named import DATA_FIELDS

        found = {name.split("_", 1)[-1]: value for name, value in self.given().items() if name not in ATTACKER}
        return {name: value for name, value in found.items() if name not in (*DATA_FIELDS, "data")}

    def settings_faults(self, attack: str | None) -> list[str]:
        """
        What is wrong with these arguments, one sentence each.

        Args:
            attack (`str`, *optional*):
                The attack that is asked for.

        Returns:
            `list[str]`.
        """
        from ..evaluation.named import ATTACKS as KNOWN
        from ..evaluation.named import needed_of

        problems = []
        owners: dict[tuple[str, ...], list[str]] = {}
        for name in self.given():
            owners.setdefault(tuple(_owners(name)), []).append(name)
        for attacks, names in owners.items():
            if attack is not None and attack not in attacks:
                problems.append(f"{names} belong to the attacks {list(attacks)}, not to {attack!r}; remove them.")
        if attack in KNOWN:
            allowed = get_type_hints(KNOWN[attack]).get("objective")
            objective = self.attack_objective
            if objective is not None and get_origin(allowed) is Literal and objective not in get_args(allowed):
                problems.append(
                    f"`attack_objective` is {objective}; for {attack} it must be one of "
                    f"{', '.join(name for name in OBJECTIVES if name in get_args(allowed))}."
                )
            for needed in needed_of(attack, self.settings()):
                key = key_of(attack, needed)
                if getattr(self, key) is None and key == "finetune_data":
                    problems.append(
                        "`finetune_data` is missing; name a dataset of `prompt` and `completion` to fine-tune on."
                    )
                elif getattr(self, key) is None:
                    problems.append(f"`{key}` is missing; the attack {attack} needs it.")
        at_least = {"finetune_batch_size": 1, "finetune_steps": 0, "attack_steps": 0, "attack_radius": 0}
        for name, least in at_least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= least:  # nor NaN
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        for name in ("attack_learning_rate", "finetune_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be above 0.")
        return problems + address_faults(self, "attacker")


def key_of(attack: str, data_field: str) -> str:
    """
    The argument that names the rows, the texts or the other model of an attack.

    Args:
        attack (`str`):
            Name of the attack.
        data_field (`str`):
            One of its fields that are no settings.

    Returns:
        `str`.
    """
    if attack == "finetune":
        return "finetune_data"
    return {"attacker": "attacker_model", "templates": "templates"}.get(data_field, f"attack_{data_field}")


def _owners(name: str) -> list[str]:
    """The attacks that an argument is for."""
    from ..evaluation.named import data_fields_of, settings_of

    if name in ATTACKER:
        return ["pair"]
    if name.startswith("finetune_"):
        return ["finetune"]
    setting = name.removeprefix("attack_")
    return [
        attack
        for attack in ATTACKS
        if attack != "finetune" and setting in (*settings_of(attack), *data_fields_of(attack))
    ]


@dataclass
class AttackArguments(JudgeArguments, AttackSettings, ModelArguments):
    """Arguments of `trl-robust attack`: the model and the attack, the attack's settings, and who judges."""

    def __post_init__(self) -> None:
        if self.judge not in (None, "auto"):
            self.judges = [str(self.judge), *(self.judges or [])]
        if problems := self.faults():
            raise ValueError("\n".join(problems))

    def faults(self) -> list[str]:
        """Everything that is wrong with the arguments, one sentence each."""
        problems = [
            f"`{name}` is missing; {what}."
            for name, what in (
                ("model", "name a model folder or hub id"),
                ("attack", f"choose one of {list(ATTACKS)}"),
                ("data", "name a dataset of requests"),
            )
            if getattr(self, name) is None
        ]
        problems += self.settings_faults(self.attack) + self.judge_faults() + address_faults(self, "model")
        for name in ("max_rows", "max_new_tokens", "batch_size", "max_prompt_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if (fault := seed_fault(self.seed)) is not None:
            problems.append(fault)
        if self.model_url is not None and (self.load_in_4bit or self.adapter != "on"):
            problems.append("`load_in_4bit` and `adapter` are for models on this machine; remove them or `model_url`.")
        folder = self.folder
        if (fault := folder_fault(folder)) is not None:
            problems.append(fault)
        elif (folder / "results.json").exists():
            problems.append(f"`output_dir` {folder} holds results, and nothing is written over. Name another folder.")
        return problems

    @property
    def folder(self) -> Path:
        """`output_dir`, or the first folder of the default's that holds no results."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        folder, number = Path("attack-results") / str(self.attack), 1
        while (folder / "results.json").exists():
            number += 1
            folder = folder.with_name(f"{self.attack}-{number}")
        return folder
