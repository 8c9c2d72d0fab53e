"""The settings of attacks as flat arguments: `attack_<setting>`, and `finetune_<setting>` for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..inner.pgd import Optimizer
from ..threat.balls import Ball, Norm
from ..threat.model import RadiusUnit
from ..threat.sites import Stream

ATTACKS = (
    *("direct", "template", "prefill", "many_shot", "best_of_n", "gcg", "pair", "soft_suffix", "embedding", "latent"),
    *("universal", "refusal_direction", "pruning", "finetune"),
)
PREFIXES = ("attack_", "finetune_", "attacker_", "templates")
"""What the names of arguments begin with that belong to some attacks only."""

OBJECTIVES = ("targeted", "wrapper", "target", "refusal", "wanda", "random")


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
    attack_steps: int | None = field(default=None, metadata={"help": "Steps of the search."})
    attack_learning_rate: float | None = field(default=None, metadata={"help": "Step size of the search."})
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
        data = {"templates", "attack_examples", "attack_harmful", "attack_harmless", "finetune_data"}
        return {
            name.split("_", 1)[-1]: value
            for name, value in self.given().items()
            if name not in data and not name.startswith("attacker_")
        }

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

        problems = []
        owners: dict[tuple[str, ...], list[str]] = {}
        for name in self.given():
            owners.setdefault(tuple(_owners(name)), []).append(name)
        for attacks, names in owners.items():
            if attack is not None and attack not in attacks:
                problems.append(f"{names} belong to the attacks {list(attacks)}, not to {attack!r}; remove them.")
        if self.attack_objective is not None and attack in KNOWN:
            allowed = get_type_hints(KNOWN[attack]).get("objective")
            if get_origin(allowed) is Literal and self.attack_objective not in get_args(allowed):
                problems.append(
                    f"`attack_objective` is {self.attack_objective}; for {attack} it must be one of "
                    f"{', '.join(get_args(allowed))}."
                )
        if attack == "finetune" and self.finetune_data is None:
            problems.append("`finetune_data` is missing; name a dataset of `prompt` and `completion` to fine-tune on.")
        needs = {"many_shot": ["attack_examples"], "universal": ["attack_examples"], "pair": ["attacker_model"]}
        if self.attack_objective != "random":
            needs["pruning"] = ["attack_examples"]
            if self.attack_transferred is None:
                needs["refusal_direction"] = ["attack_harmful", "attack_harmless"]
        for name in needs.get(str(attack), []):
            if getattr(self, name) is None:
                problems.append(f"`{name}` is missing; the attack {attack} needs it.")
        at_least = {"finetune_batch_size": 1, "finetune_steps": 0, "attack_steps": 0, "attack_radius": 0}
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        for name in ("attack_learning_rate", "finetune_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be above 0.")
        return problems


def _owners(name: str) -> list[str]:
    """The attacks that an argument is for."""
    from ..evaluation.named import data_fields_of, settings_of

    if name.startswith("attacker_"):
        return ["pair"]
    if name.startswith("finetune_"):
        return ["finetune"]
    setting = name.removeprefix("attack_")
    return [
        attack
        for attack in ATTACKS
        if attack != "finetune" and setting in (*settings_of(attack), *data_fields_of(attack))
    ]
