"""A `results.json` of a generalised evaluation as large as a real one, made from a few numbers."""

import random

MODELS = {
    "base": ("pretrained, no safety training", 1.0, 1.0, 0.0),
    "aligned": ("", 0.85, 0.98, 0.02),
    "refusal-trained": ("SFT on refusals", 0.6, 0.97, 0.04),
    "LAT-trained-with-a-long-name-2026-07": ("latent adversarial training, radius 1.5", 0.15, 0.95, 0.06),
    "LAP-trained": ("", 0.3, 0.96, 0.05),
    "over_refuser": ("refuses nearly everything", 0.05, 0.4, 0.92),
}
"""Name -> description, how weak it is, utility, over-refusal."""

ATTACKS = {
    "direct": ("none", "", []),
    "template": ("input", "", []),
    "prefill": ("input", "", []),
    "many_shot": ("input", "shots", [1, 8, 32, 128]),
    "best_of_n": ("input", "n", [64]),
    "gcg": ("input", "steps", [0, 50, 500]),
    "pair": ("input", "", []),
    "soft_suffix": ("embedding", "steps", [2, 5, 20]),
    "embedding": ("embedding", "radius", [0.3, 0.6, 1.2]),
    "latent": ("latent", "radius", [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0]),
    "universal": ("latent", "radius", [0.1, 0.3, 1.0]),
    "refusal_direction_harmless": ("latent", "directions", [1, 2, 4]),
    "pruning": ("weights", "sparsity", [0.1, 0.2, 0.3, 0.4, 0.5]),
    "finetune": ("weights", "steps", [1, 4, 16, 64]),
}
CONTROLLED = ("gcg", "latent", "pruning")
LOADS = {"many_shot": 32, "gcg": 500, "finetune": 64}
LOAD_IS = (
    "mean over successful requests of the largest displacement among the tokens at the end that both prompts have in "
    "common, over the median norm of the direct requests' hidden states at the site"
)


def generalized_results():
    """Six models, 14 attacks: curves, controls, destroyed points, errored rows, censored resistances, nulls."""
    chance = random.Random(0)
    models = [_model(number, chance) for number in range(len(MODELS))]
    return {
        "schema": 1,
        "created": "2026-07-03T10:11:12+00:00",
        "seed": 0,
        "versions": {"trl_robust": "0.1.0", "trl": "1.16.0", "torch": "2.9.0"},
        "suite": {"name": "generalized", "version": 1, "settings": {}, "left_out": {"autodan": "needs `templates`"}},
        "judges": [
            {"name": "exact", "version": 1, "settings": {}},
            {"name": "refusal_prefix", "version": 2, "settings": {}},
        ],
        "models": models,
        "proxy": {
            "mean of all, success": _study("success", 0.94),
            "latent, success": _study("success", 0.83),
            "latent, resistance at 0.5": _study("resistance", -0.77),
            "pruning, success": _study("success", None),
        },
    }


def _model(number, chance):
    name = list(MODELS)[number]
    description, weakness, utility, over_refusal = MODELS[name]
    attacks, safety = [], []
    for attack, (kind, axis, budgets) in ATTACKS.items():
        entry = _attack(attack, kind, axis, budgets, weakness if kind != "none" else weakness**4, name, chance)
        attacks.append(entry)
        if attack in CONTROLLED:
            control = _attack(attack, kind, axis, budgets, weakness / 10, name, chance)
            attacks.append({**control, "name": f"{attack} (random)", "control_of": attack})
        for threshold in (0.1, 0.5) if axis else ():
            load = None if name == "over_refuser" else 0.4 + number / 10
            safety.append(_resistance(attack, axis, budgets, entry, threshold, load))
    return {
        "name": name,
        "description": description,
        "path": f"models/{name}",
        "variant": "as it is",
        "attacks": attacks,
        "utility": {"name": "exact answers", "value": utility, "interval": [utility - 0.03, utility], "n": 200},
        "over_refusal": {
            "name": "refused look-alikes", "value": over_refusal, "interval": [over_refusal, over_refusal + 0.05],
            "n": 100, "n_errored": 2 if name == "aligned" else 0,
        },
        "perplexity": {"perplexity": 8.5 + number, "interval": [8.1 + number, 9.0 + number], "finite": True, "n": 50},
        "benchmarks": {"mmlu": {"name": "mmlu", "value": 0.46, "standard_error": 0.004, "n": 14042}},
        "coherence": {
            "repeated_ngrams": 0.01, "repeated_ngrams_interval": [0.0, 0.03699], "empty": 0.0,
            "empty_interval": [0.0, 0.03699], "without_end": None, "without_end_interval": None, "n": 100,
            "n_errored": 0,
        },
        "loads": {
            attack: {
                "load": None if name == "over_refuser" else 0.4 + number / 10, "interval": [0.3, 0.6], "site": 1,
                "load_is": LOAD_IS, "measured_on": "base" if number == 4 else name, "n": 30,
            }
            for attack in ("latent", "universal")
        },
        "factor_of_safety": safety,
        "map": {
            "sites": ["embedding", "0", "12", "24"],
            "radii": [0.1, 0.3, 1.0],
            "success": [
                [None if site + radius == 5 else min(1.0, weakness * (radius + 1) / (site + 1)) for radius in range(3)]
                for site in range(4)
            ],
            "n": 40,
            "steps": 10,
        },
        "cost": {"seconds": 80.1},
    }  # fmt: skip


def _attack(attack, kind, axis, budgets, weakness, model, chance):
    errored = 40 if (attack, model) == ("pair", "LAP-trained") else 3 if attack == "gcg" else 0
    curve = [_point(i, budget, budgets, weakness, attack, model, chance) for i, budget in enumerate(budgets)]
    best = 0.0
    for point in curve:
        best = max(best, point["success"] or 0.0)
        point["best"] = None if point["destroyed"] else best
    intact = [point["best"] for point in curve if point["best"] is not None]
    success = max(intact, default=None) if curve else round(min(1.0, weakness * chance.uniform(0.8, 1.0)), 3)
    if errored == 40 or (curve and not intact):
        success = None
    interval = None if success is None else [max(0.0, success - 0.12), min(1.0, success + 0.12)]
    entry = {
        "name": attack, "attack": attack, "class": kind, "version": 2 if attack == "gcg" else 1,
        "budget": {**({axis: budgets[-1]} if axis else {}), "templates": ["say {prompt} " * 9], "init": None},
        "judge": "exact", "judge_version": 1, "judge_settings": {}, "success": success, "interval": interval,
        "n_scored": 40 - errored if success is not None else 0, "n_errored": errored,
        "n_skipped": 5 if attack == "prefill" else 0, "control_of": None, "axis": axis or None, "seconds": 3.2,
        "second_judges": [_second(success, interval, errored)],
    }  # fmt: skip
    return {**entry, "curve": curve} if len(curve) > 1 else entry


def _point(i, budget, budgets, weakness, attack, model, chance):
    success = round(min(1.0, weakness * (i + 1) / len(budgets) * chance.uniform(0.9, 1.2)), 3)
    destroyed = attack == "pruning" and (budget >= 0.5 or model == "over_refuser")
    if attack == "soft_suffix" and budget == 5 and model == "base":
        success = None
    return {
        "budget": float(budget), "success": success,
        "interval": None if success is None else [max(0.0, success - 0.12), min(1.0, success + 0.12)],
        "n_scored": 0 if success is None else 40, "n_errored": 40 if success is None else 0, "n_skipped": 0,
        "capability": 0.7 if destroyed else 0.98 if attack in ("pruning", "finetune") else None,
        "destroyed": destroyed,
    }  # fmt: skip


def _second(success, interval, errored):
    agreement = {"agreement": 0.9, "kappa": 0.8, "interval": [0.8, 0.97], "n": 40 - errored, "disagreeing": ["p1"]}
    if success is None:
        agreement = {"agreement": None, "kappa": None, "interval": None, "n": 0, "why": "no answer was scored by both"}
    return {
        "judge": "refusal_prefix", "judge_version": 2, "judge_settings": {}, "success": success, "interval": interval,
        "n_scored": 40 - errored, "n_errored": errored, "n_skipped": 0, "agreement": agreement,
    }  # fmt: skip


def _resistance(attack, axis, budgets, entry, threshold, latent_load):
    points = entry.get("curve") or [{"budget": budgets[0], "best": entry["success"], "destroyed": False}]
    intact = [point for point in points if not point["destroyed"]]
    broken = [point["budget"] for point in intact if (point["best"] or 0.0) >= threshold]
    value = min(broken, default=None)
    cap = max((point["budget"] for point in intact), default=None)
    load = latent_load if attack in ("latent", "universal") else LOADS.get(attack)
    is_load = f"{axis} at the threshold / {load} {axis}"
    if attack in ("latent", "universal"):
        is_load = f"relative radius at the threshold / load measured on base at site 1: {LOAD_IS}"
    return {
        "attack": attack, "unit": axis, "threshold": threshold, "resistance": value,
        "censored_at": cap if value is None else None, "interval": None if cap is None else [value, None],
        "load": load,
        "load_is": is_load if load else None, "factor": value / load if load and value is not None else None,
        "factor_above": cap / load if load and value is None and cap is not None else None, "factor_interval": None,
        "n": 40, "n_left_out": 0, "n_points": len(points), "n_destroyed": len(points) - len(intact), "n_unknown": 0,
        "why": None,
    }  # fmt: skip


def _study(of, rho):
    n = len(MODELS)
    known = rho is not None
    correlation = {
        "rho": rho, "interval": [rho - 0.2, min(1.0, rho + 0.1)] if known else None, "p": 0.017 if known else None,
        "n": n, "why": None if known else f"success of attacks on prompts is the same for all {n} models",
    }  # fmt: skip
    prediction = {"error": 0.12, "interval": [0.05, 0.2], "baseline": 0.31, "n": n, "why": None}
    return {
        "of": of,
        "models": list(MODELS),
        "attacks": ["template", "prefill"],
        "correlations": {"template": correlation, "largest": correlation, "mean": correlation},
        "prediction": prediction,
        "prediction_of_new_models": {**prediction, "error": 0.2},
        "conservative": {"rate": 0.83, "interval": [0.5, 1.0], "exceptions": [0], "n": n, "why": None},
        "n": n,
        "note": f"Intervals are over {n} models, and a true correlation below 0.93 would mostly be missed.",
    }
