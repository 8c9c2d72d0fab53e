"""The report of the suite `prompts`, from the files that it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .examples import redact, shorten
from .figures import THEMES, encode
from .markup import document, image, pairs, section, table
from .prompt_figures import draw_prompt_ranges
from .reading import read_results
from .tables import markdown_rows, markdown_text
from .values import describe

FIGURE = "prompt_ranges"
MOST_CASES = 20

MEASURES = {
    "original": "original wording",
    "average": "average of the wordings",
    "best": "best wording",
    "worst": "worst wording",
    "worst_3": "mean of the worst three",
    "cvar": "CVaR",
    "std": "standard deviation",
    "gap": "best minus worst",
}

HOW_TO_READ = (
    "Every case is measured over all its wordings, the original among them, and the mean over cases is shown with its "
    "95 % bootstrap interval over cases. Answers without a score are in no mean; they are counted below. The judge "
    "saw the original question whatever wording was answered. Scores of different judges do not compare."
)

NO_NULL = (
    "The same prompt was not sampled, so nothing says how much of the worst wording is luck of decoding: give "
    "`--samples_of_original`, as many as there are wordings. With `--greedy` there is no such luck."
)

NO_JUDGE = (
    "There was no judge: what is shown says whether the answers agree, not whether they are good. A model that always "
    "says the same thing agrees with itself."
)

Value = tuple[float | None, Sequence[float] | None]


def prompts_table(results: Mapping[str, Any]) -> Table:
    """
    Measures of all models for a terminal, a column a model.

    Args:
        results (`Mapping`):
            Content of a `results.json`.

    Returns:
        `rich.table.Table`.
    """
    models = _models(results)
    table = Table(box=None, pad_edge=False, title=Text("Prompt robustness"), title_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(Text(model["name"]), overflow="fold")
    for label, values in _rows(models):
        table.add_row(Text(label), *(Text(_shown(*value)) for value in values))
    return table


def write_prompts_report(folder: str | Path, *, show_generations: bool = False) -> Path:
    """
    Writes `report.html`, `report.md` and `figures/` into a folder that the suite `prompts` wrote.

    The page is one file: it opens offline, asks nothing of the network and needs no script.

    Args:
        folder (`str` or `Path`):
            Folder with `results.json`.
        show_generations (`bool`, *optional*, defaults to `False`):
            Whether to show questions, in place of their length and a marker.

    Returns:
        `Path` of `report.html`.

    Raises:
        `FileNotFoundError`: there is no `results.json`.
        `ValueError`: it has a newer schema, or no prompt robustness.
    """
    folder = Path(folder)
    read_results(folder)  # says what is wrong with the file
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    models = _models(results)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    drawn = {theme: draw_prompt_ranges(models, colours) for theme, colours in THEMES.items()}
    images = {theme: encode(figure, "svg") for theme, figure in drawn.items() if figure is not None}
    for form in ("png", "svg"):
        path = figures / f"{FIGURE}.{form}"
        if (light := drawn["light"]) is None:
            path.unlink(missing_ok=True)  # one from an earlier report would not belong to this one
        else:
            path.write_bytes(images["light"] if form == "svg" else encode(light, "png"))
    questions = _questions(folder)
    (folder / "report.md").write_text(_markdown(results, models, bool(images)), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(results, models, images, questions, show_generations), encoding="utf-8")
    return page


def _models(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = [model for model in results["models"] if model.get("prompts")]
    if not found:
        raise ValueError("These results hold no prompt robustness; build the report with `trl-robust report`.")
    return found


def _rows(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Value]]]:
    """Label and a value a model, for every measure that one of them has."""
    rows: list[tuple[str, list[Value]]] = []

    def add(label: str, *path: str, interval: Sequence[str] | None = None) -> None:
        values = [
            (_at(model["prompts"], path), _at(model["prompts"], interval) if interval else None) for model in models
        ]
        if any(value is not None for value, _ in values):
            rows.append((label, values))

    for name, label in MEASURES.items():
        add(_label(name, label, models), "robustness", name, interval=("robustness", "intervals", name))
    for name in ("worst", "gap"):
        label = f"{MEASURES[name]}, beyond the same prompt"
        add(label, "same_prompt_null", "excess", name, interval=("same_prompt_null", "intervals", name))
    add("PSS", "sensitivity", "pss", interval=("sensitivity", "interval"))
    add("win rate, original (%)", "win_rate", "win_rate")
    add("the same, length-controlled, no difficulty", "length_controlled", "original", "length_controlled_win_rate")
    add("win rate, all wordings (%)", "length_controlled", "all_wordings", "win_rate")
    add(
        "the same, length-controlled, no difficulty", "length_controlled", "all_wordings", "length_controlled_win_rate"
    )
    add("answer agreement", "agreement", "agreement", interval=("agreement", "intervals", "agreement"))
    add("majority share", "agreement", "majority", interval=("agreement", "intervals", "majority"))
    add("POSIX (nats a token)", "posix", "posix", interval=("posix", "interval"))
    add("characters of an answer", "length", "characters_all_wordings")
    return rows


def _label(name: str, label: str, models: Sequence[Mapping[str, Any]]) -> str:
    level = _at(models[0]["prompts"], ("robustness", "cvar_level")) if name == "cvar" else None
    return label if level is None else f"{label} ({100 * level:g} % worst)"


def _differences(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Value]]]:
    compared = [model["prompts"].get("compared") for model in models]
    return [
        (label, [(_at(each, ("differences", name)), _at(each, ("intervals", name))) for each in compared])
        for name, label in MEASURES.items()
    ]


def _at(content: Any, path: Sequence[str]) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _shown(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    digits = 2 if abs(value) >= 10 else 3
    text = f"{value:.{digits}f}"
    return text if interval is None else f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _notes(models: Sequence[Mapping[str, Any]]) -> list[str]:
    prompts = [model["prompts"] for model in models]
    if not any(each.get("judge") for each in prompts):
        return [NO_JUDGE]
    notes = [HOW_TO_READ]
    if not any(each.get("same_prompt_null") for each in prompts):
        notes.append(NO_NULL)
    lost = sum(each["counts"].get("n_errored", 0) + each["counts"].get("n_skipped", 0) for each in prompts)
    if lost:
        notes.append(
            f"{lost} answers errored or were skipped. A case is measured over the wordings that were scored, so its "
            "worst is over fewer and a little too good."
        )
    return notes


def _facts(results: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    facts: dict[str, object] = {"judge": models[0]["prompts"].get("judge") or "none", "seed": results.get("seed")}
    facts |= dict(results.get("generation") or {})
    if agreement := results.get("ranking_agreement"):
        facts["Kendall's W between models"] = _shown(agreement["kendalls_w"], agreement["interval"])
        facts["W by chance"] = agreement["chance"]
    for model in models:
        facts[f"answers of {model['name']}"] = model["prompts"]["counts"]
    return facts


def _questions(folder: Path) -> dict[str, str]:
    """The original question of each case."""
    path = folder / "generations.jsonl"
    if not path.is_file():
        return {}
    found = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # an empty line, or half a line of a run that was killed
                continue
            found[str(row["id"])] = str(row["question"])
    return found


def _worst_cases(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float, float, float]]:
    """Model, case, original, worst and best where these are furthest apart."""
    found = []
    for model in models:
        for case in model["prompts"].get("cases") or []:
            scores = case.get("scores") or []
            scored = [score for score in scores if score is not None]
            if len(scored) >= 2 and scores[0] is not None:
                found.append((model["name"], str(case["id"]), scores[0], min(scored), max(scored)))
    return sorted(found, key=lambda row: row[3] - row[4])[:MOST_CASES]


def _page(
    results: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    images: Mapping[str, bytes],
    questions: Mapping[str, str],
    show: bool,
) -> str:
    names = [model["name"] for model in models]
    title = "Prompt robustness of " + ", ".join(names)
    differences = ""
    if any(model["prompts"].get("compared") for model in models):
        differences = table(
            f"Differences to {names[0]}, paired over cases; above 0 where the model's value is higher",
            ["measure", *names[1:]],
            _cells(_differences(models[1:])),
        )
    worst = [
        (
            "",
            [
                escape(name),
                escape(case),
                *(f"{score:.3f}" for score in scores),
                _question(questions.get(case, ""), show),
            ],
        )
        for name, case, *scores in _worst_cases(models)
    ]
    head = ["model", "case", "original", "worst", "best", "question"]
    evaluated = f"Evaluated {results.get('created', '')}."
    body = [
        f"<header><h1>Prompt robustness</h1><p>{escape(title)}. {escape(evaluated)}</p></header>",
        "<main>",
        section(
            "Results",
            *(f'<p class="note">{escape(note)}</p>' for note in _notes(models)),
            table("Measures with intervals over cases", ["measure", *names], _cells(_rows(models))),
            differences,
        ),
        section("Figure", image(images, _alt(models), "Worst to best wording of every case.") if images else ""),
        section("How it was measured", pairs(_facts(results, models))),
        section("Widest cases", table("Cases whose wordings are furthest apart", head, worst) if worst else ""),
        section("Versions", pairs(results.get("versions") or {})),
        "</main>",
    ]
    return document(title, body)


def _cells(rows: Sequence[tuple[str, Sequence[Value]]]) -> list[tuple[str, list[str]]]:
    return [("", [escape(label), *(escape(_shown(*value)) for value in values)]) for label, values in rows]


def _question(text: str, show: bool) -> str:
    shown = escape(shorten(text)) if show else f'<span class="none">{redact(text)}</span>'
    return f'<div class="text">{shown}</div>'


def _alt(models: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for model in models:
        found = model["prompts"].get("robustness") or {}
        values = ", ".join(f"{name} {_shown(found.get(name), None)}" for name in ("original", "worst", "best"))
        said.append(f"{model['name']}: {values}.")
    return "Range of the scores over the wordings of each case. " + " ".join(said)


def _markdown(results: Mapping[str, Any], models: Sequence[Mapping[str, Any]], drawn: bool) -> str:
    names = [model["name"] for model in models]
    parts = ["# Prompt robustness\n", f"Evaluated {markdown_text(str(results.get('created', '')))}.\n"]
    parts += [f"{note}\n" for note in _notes(models)]
    parts.append(
        markdown_rows(["measure", *names], [[label, *(_shown(*v) for v in row)] for label, row in _rows(models)])
    )
    if any(model["prompts"].get("compared") for model in models):
        rows = [[label, *(_shown(*value) for value in values)] for label, values in _differences(models[1:])]
        parts.append(f"## Differences to {markdown_text(names[0])}\n\n" + markdown_rows(["measure", *names[1:]], rows))
    if drawn:
        parts.append(f"![Range of the scores of every case](figures/{FIGURE}.png)\n")
    facts = [[key, describe(value)] for key, value in _facts(results, models).items()]
    parts.append("## How it was measured\n\n" + markdown_rows(["", "value"], facts))
    versions = [[key, describe(value)] for key, value in (results.get("versions") or {}).items()]
    parts.append("## Versions\n\n" + markdown_rows(["", "version"], versions))
    return "\n".join(parts)
