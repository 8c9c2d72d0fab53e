"""Who may import whom (the house rules), read off the source and off a running interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "trl_robust"
MODULES = sorted(ROOT.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports anywhere, also inside functions and for type checkers."""
    package = ["trl_robust", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def offenders(rooms: set[str] | None, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    """`file -> module` for every import of a forbidden module in these rooms (None: in all)."""

    def within(name: str, modules: tuple[str, ...]) -> bool:
        return any(name == module or name.startswith(f"{module}.") for module in modules)

    return [
        f"{path.relative_to(ROOT)} -> {name}"
        for path in MODULES
        if rooms is None or room_of(path) in rooms
        for name in sorted(imports_of(path))
        if within(name, forbidden) and not within(name, allowed)
    ]


def test_the_source_is_found_and_relative_imports_are_read():
    assert {"threat", "inner", "objectives", "trainers", "data", "attacks", "report"} <= {room_of(p) for p in MODULES}
    assert "trl_robust.threat.balls" in imports_of(ROOT / "inner" / "search.py")
    assert "trl.SFTTrainer" in imports_of(ROOT / "trainers" / "lat_sft.py")
    assert "trl_robust._compat" in imports_of(ROOT / "trainers" / "__init__.py")
    assert offenders({"trainers"}, ("trl",)) and not offenders({"trainers"}, ("tr",))


def test_only_compat_trainers_data_scripts_and_recipes_import_trl():
    rooms = {room_of(path) for path in MODULES} - {"_compat", "trainers", "data", "scripts", "recipes"}
    assert offenders(rooms, ("trl",)) == []


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("threat", ("threat",)),
        ("objectives", ("objectives",)),
        ("inner", ("inner", "threat", "objectives")),
        ("data", ("data", "threat", "_compat")),
        ("report", ("report",)),
        ("selection", ("selection", "data", "objectives", "_compat")),
        ("trainers", ("trainers", "inner", "threat", "objectives", "data", "selection", "_compat")),
        ("attacks", ("attacks", "inner", "threat", "objectives", "data", "_compat")),
        ("evaluation", ("evaluation", "attacks", "inner", "threat", "objectives", "data", "_compat")),
        ("organism", ("organism", "data", "inner", "threat", "objectives", "_compat")),
        (
            # It runs a verb: of the scripts it takes what a run consists of.
            "sweep",
            (
                *("sweep", "evaluation", "attacks", "recipes", "report", "organism", "inner", "threat", "data"),
                *("estimate.shapes", "scripts.training", "scripts.run_folder", "scripts.seal"),
                *("scripts.interruption", "scripts.inputs", "scripts.quiet"),
            ),
        ),
    ],
)
def test_a_room_imports_only_from_the_rooms_below_it(room, allowed):
    assert any(room_of(path) == room for path in MODULES)
    # A plain `from . import name` also names the package itself, which is no room.
    found = offenders({room}, ("trl_robust",), tuple(f"trl_robust.{name}" for name in allowed))
    assert [line for line in found if not line.endswith("-> trl_robust")] == []


def test_only_scripts_import_sweep():
    rooms = {room_of(path) for path in MODULES} - {"scripts", "sweep"}
    assert offenders(rooms, ("trl_robust.sweep",)) == []


def test_trainers_and_attacks_never_import_each_other():
    assert offenders({"trainers"}, ("trl_robust.attacks",)) == []
    assert offenders({"attacks"}, ("trl_robust.trainers",)) == []


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_threat_inner_and_objectives_run_without_trl_or_transformers_being_loaded():
    code = (
        "import sys, trl_robust.threat, trl_robust.inner, trl_robust.objectives\n"
        "from trl_robust import ThreatModel, find_perturbation\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'trl', 'transformers', 'datasets', 'peft'}))"
    )
    assert run(code) == "[]"


def test_the_public_names_are_there_and_an_unknown_one_is_refused_by_name():
    import trl_robust

    for name in ("ThreatModel", "find_perturbation", "LATSFTConfig", "LATSFTTrainer"):
        assert getattr(trl_robust, name).__name__ == name
        assert name in dir(trl_robust)
    with pytest.raises(AttributeError, match="has no attribute 'LATSFT'"):
        trl_robust.LATSFT  # noqa: B018
