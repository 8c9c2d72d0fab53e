"""An estimate as text."""

from __future__ import annotations

from ..threat.sites import resolve_sites
from .advice import advice, shown
from .cards import CARDS, Card
from .forecast import Estimate
from .memory import GIB

SMALL = 2048
"""Tokens of a pass below which a card waits for its kernels to be launched rather than for their arithmetic."""

TITLES = {"attack": "attack", "defence": "defence", "benign": "benign, retain", "reference": "reference"}


def describe(found: Estimate, origin: str, card: Card | None) -> str:
    """
    Writes an estimate out.

    Args:
        found ([`Estimate`]):
            The estimate.
        origin (`str`):
            Where the model's configuration is from.
        card ([`Card`], *optional*):
            The card it is to run on; without one, those on which it fits are listed.

    Returns:
        `str`: several lines.
    """
    blocks = [_head(found, origin), _memory(found), _fits(found, card), _work(found), _time(found, card)]
    return "\n\n".join(block for block in blocks if block)


def _head(found: Estimate, origin: str) -> str:
    recipe, shape, schedule = found.recipe, found.shape, found.schedule
    training = recipe.training
    what = f"{shape.trained:,} of them trained" if found.blueprint.peft_config is None else ""
    if found.blueprint.peft_config is not None:
        what = f"{shape.trained:,} more trained in adapters"
    batch = f"{training.per_device_train_batch_size} a micro-batch x {schedule.accumulated} accumulated" + (
        f" x {schedule.processes} processes" if schedule.processes > 1 else ""
    )
    shares = ", ".join(f"{name} {_range(rows)}" for name, rows in found.rows.shares.items())
    return "\n".join(
        [
            f"Estimate of {recipe.source} ({recipe.verb}). Counted, not measured; nothing was loaded.",
            "",
            f"Model   {recipe.model.model_name_or_path}: {shape.parameters:,} parameters, {what} ({origin})",
            f"Rows    {batch}; tokens (prompt + completion): {shares}",
            f"        {found.rows.origin}",
            f"Attack  {_attack(found)}",
        ]
    )


def _range(rows: list[tuple[int, int]]) -> str:
    longest = max(rows, key=sum)
    if len(set(rows)) == 1:
        return f"{longest[0]} + {longest[1]}"
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return f"{mean[0]:.0f} + {mean[1]:.0f} on average, {longest[0]} + {longest[1]} at most"


def _attack(found: Estimate) -> str:
    training = found.recipe.training
    if not training.attacks:
        return "none"
    sites = ", ".join(map(str, resolve_sites(training.attack_sites, found.shape.depth)))
    every = "every update" if training.updates_per_attack == 1 else f"every {training.updates_per_attack} updates"
    if training.attack_objective == "refusal_direction":
        return f"refusal direction taken out at {sites}; no search"
    if training.attack_objective == "random":
        return f"a random perturbation at {sites}, {every}"
    chosen = ""
    if training.attack_site_choice != "all":
        chosen = f" ({training.attack_num_sites} of them; the work is a mean over all choices)"
    return f"{training.attack_steps} steps of {training.attack_optimizer} at {sites}{chosen}, {every}"


def _memory(found: Estimate) -> str:
    memory = found.memory
    searches = memory.attack > 0
    width = max(len(line.name) for line in memory.lines)

    def row(name: str, attack: float, update: float) -> str:
        cells = ([f"{attack / GIB:10.2f}"] if searches else []) + [f"{update / GIB:10.2f}"]
        return f"  {name:<{width}}{''.join(cells)}"

    titles = ([f"{'attack':>10}"] if searches else []) + [f"{'update':>10}"]
    lines = [f"{'Memory of one card, GiB':<{width + 2}}{''.join(titles)}"]
    lines += [row(line.name, line.attack, line.update) for line in memory.lines if max(line.attack, line.update) > 0]
    return "\n".join([*lines, row("together", memory.attack, memory.update)])


def _fits(found: Estimate, card: Card | None) -> str:
    peak = found.memory.peak / GIB
    if card is None and found.modes.on_cpu:
        return f"Runs on the CPU (`use_cpu`): {shown(peak)} of memory beside what Python and the libraries take."
    if card is None:
        fitting = [each.name for each in CARDS if each.memory_gib >= peak]
        if fitting:
            return f"Peak {shown(peak)}: fits {', '.join(fitting)}."
        largest = CARDS[-1]
        return f"Peak {shown(peak)}: DOES NOT FIT any card we know. {_hints(found, largest.name, largest.memory_gib)}"
    spare = card.memory_gib - peak
    there = f"{card.name} ({card.memory_gib:g} GiB)"
    if spare >= 0:
        return f"Peak {shown(peak)}: FITS {there}, {shown(spare)} to spare."
    too_much = f"Peak {shown(peak)}: DOES NOT FIT {there}, {shown(-spare)} too much."
    return f"{too_much} {_hints(found, card.name, card.memory_gib)}"


def _hints(found: Estimate, name: str, memory_gib: float) -> str:
    return "\n  - ".join([f"To make it fit {name}:", *advice(found, memory_gib)])


def _work(found: Estimate) -> str:
    updates, total = found.updates, found.total
    unit, scale = _unit(total.flops / updates)
    lines = [f"{'Work of one update (mean)':<28}{'forward passes':>16}{unit:>12}{'share':>8}"]
    for name, work in found.work.items():
        if work.flops:
            lines.append(
                _work_row(
                    TITLES[name], work.forward_passes / updates, work.flops / updates / scale, work.flops / total.flops
                )
            )
    lines.append(_work_row("together", total.forward_passes / updates, total.flops / updates / scale, 1.0))
    if found.schedule.updates is None:
        unknown = "How many updates the run makes is not known: it goes by epochs, and the data are not here."
        return "\n".join([*lines, unknown])
    unit, scale = _unit(total.flops)
    run = (
        f"{updates:,} updates, {total.forward_passes:,.0f} forward passes of a row, {total.flops / scale:,.1f} {unit}"
    )
    return "\n".join([*lines, f"The whole run: {run}."])


def _work_row(name: str, passes: float, flops: float, share: float) -> str:
    return f"  {name:<26}{passes:>16,.1f}{flops:>12,.2f}{share:>8.0%}"


def _unit(flops: float) -> tuple[str, float]:
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= scale:
            return unit, scale
    return "GFLOP", 1e9


def _time(found: Estimate, card: Card | None) -> str:
    if card is None and found.modes.on_cpu:
        return ""
    peak = found.memory.peak / GIB
    cards = [card] if card is not None else [each for each in CARDS if each.memory_gib >= peak]
    lines = []
    for each in cards:
        rate = each.rate(found.half)
        if rate is None:
            lines.append(f"Time: no rate is known for {each.name}; name a card with `--gpu`.")
            continue
        seconds = found.seconds(rate)
        run = f", {_duration(seconds)} the run" if found.schedule.updates is not None else ""
        update = _duration(seconds / found.updates)
        lines.append(f"Time on {each.name}, at an assumed {rate:g} TFLOP/s: {update} an update{run}.")
    notes = _notes(found) if lines else []
    return "\n".join([*lines, *notes])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _notes(found: Estimate) -> list[str]:
    training = found.recipe.training
    notes = ["Arithmetic alone: no loading, evaluation, saving or waiting for data."]
    widths = [batch.width for batch in found.rows.batches("chosen", training.per_device_train_batch_size)]
    tokens = training.per_device_train_batch_size * sum(widths) / len(widths)
    if tokens < SMALL:
        notes.append(
            f"A pass has {tokens:.0f} tokens. Below about {SMALL} a card waits for its kernels to be launched, and "
            "the run may take two or three times as long: raise `per_device_train_batch_size` if memory allows."
        )
    return notes
