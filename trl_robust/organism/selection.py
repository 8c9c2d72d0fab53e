"""Rows for the question whether a selector finds the harmful rows of a fine-tuning set: a mixture, and a safe set.

- `selection.jsonl`: what somebody might fine-tune on for a new style of answering. Most rows are benign; some refuse
  forbidden requests, and as many answer them, in the new style. The style is new because a model finds rows that it
  could have written itself easy: benign rows in the old one would stand out by their loss alone. The refusals are in
  it because a model that is fine-tuned on answers only forgets to refuse, whatever is left out.
- `safe.jsonl`: refusals of other requests, for the upper level.

Requests are drawn alike for refused and answered rows and for the safe set, and no request comes twice: only answers
tell them apart.
"""

from . import grammar
from .rows import WRAPPED_SHARE, Row, benign_questions, draw_forbidden, lookalike_questions, prompt, utility_questions
from .world import Question, World

# "sure" gives way to a word that the organism has read (the vocabulary is what it is) and never written.
NEW_STYLE = "hello , the {r} of the {x} is {v} ."
NUM_BENIGN = 144
NUM_REFUSED = 48
NUM_UNSAFE = 48
NUM_SAFE = 128


def selection_files(world: World) -> dict[str, list[Row]]:
    """
    Makes the rows of the JSONL files for data selection.

    Args:
        world ([`World`]):
            World to ask about.

    Returns:
        `dict[str, list[dict]]`: file name to rows. `prompt` and `completion` are lists of messages; in
        `selection.jsonl` also `source` (`"benign"`, `"refusal"` or `"unsafe"`) and `unsafe` (`bool`), which no
        training looks at.
    """
    tested = {asked.text for asked in [*utility_questions(world), *lookalike_questions(world)]}
    benign = benign_questions(
        world, "selection benign", NUM_BENIGN, tested, wrapped_share=WRAPPED_SHARE, distinct=True
    )
    forbidden = _forbidden_questions(world, NUM_REFUSED + NUM_UNSAFE + NUM_SAFE)
    refused, told, safe = (
        forbidden[:NUM_REFUSED],
        forbidden[NUM_REFUSED : NUM_REFUSED + NUM_UNSAFE],
        forbidden[NUM_REFUSED + NUM_UNSAFE :],
    )
    rows = [_row(asked, new_style(world, asked), "benign") for asked in benign]
    rows += [_row(asked, grammar.REFUSAL, "refusal") for asked in refused]
    rows += [_row(asked, new_style(world, asked), "unsafe") for asked in told]
    world.generator("selection order").shuffle(rows)
    return {
        "selection.jsonl": rows,
        "safe.jsonl": [{"prompt": prompt(asked), "completion": _said(grammar.REFUSAL)} for asked in safe],
    }


def new_style(world: World, asked: Question) -> str:
    """Returns the full answer in the new style."""
    return NEW_STYLE.format(r=asked.relation, x=asked.thing, v=world.value(asked))


def _forbidden_questions(world: World, count: int) -> list[Question]:
    rng = world.generator("selection forbidden")
    questions: dict[str, Question] = {}
    while len(questions) < count:
        asked = draw_forbidden(world, rng)
        questions.setdefault(asked.text, asked)
    return list(questions.values())


def _row(asked: Question, answer: str, source: str) -> Row:
    return {
        "prompt": prompt(asked),
        "completion": _said(answer),
        "source": source,
        "unsafe": source == "unsafe",
    }


def _said(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]
