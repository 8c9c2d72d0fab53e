"""Rows for the question whether a model answers the same to every wording: new facts, told in one wording only.

- `rewording.jsonl`: the colors and places of all objects get new values, each told once, in one wording. Among them,
  for what is to stay, answers on the other harmless relations in all plain wordings, plain and wrapped.
- `rewordings.jsonl`: the new facts asked for in that wording and in 33 others, none of which training has on these
  relations, and the rare ones on no relation. Of the form of RobustAlpacaEval, with the answer.
- `rewording_kept.jsonl`: questions on the other relations that no tuning stage has seen. `utility.jsonl` will not do:
  half of it asks for what has changed.
"""

from . import grammar
from .rows import Row, lookalike_questions, prompt, utility_questions
from .world import Question, World, draw_question

CHANGED_RELATIONS = ("color", "place")
KEPT_RELATIONS = tuple(
    relation
    for relation in (*grammar.BENIGN_RELATIONS, *grammar.LOOKALIKE_RELATIONS)
    if relation not in CHANGED_RELATIONS
)
# One, since two are enough for the organism to answer in nearly every other: nothing would be left to be measured.
TRAINING_WORDING = 0
# With half as many, one in sixteen of the questions on what is to stay is answered wrongly after training.
NUM_REPLAY = 640
REPLAY_WRAPPED_SHARE = 0.5
# Those that end a request with other words are no mere wording to the organism: before any training, some rare
# questions in them go wrong.
TEST_WRAPPERS = tuple(wrapper for wrapper in grammar.WRAPPERS if wrapper.endswith(grammar.PLAIN))


def rewording_files(world: World) -> dict[str, list[Row]]:
    """
    Makes the rows of every JSONL file for rewording.

    Args:
        world ([`World`]):
            World to ask about; it knows the old values.

    Returns:
        `dict[str, list[dict]]`: file name to rows. `prompt` and `completion` are lists of messages; `instruction` and
        `answer` are strings, `paraphrases` is a list of strings, `index` the number of the case.
    """
    facts = new_facts(world)
    told = [(Question(thing, relation, TRAINING_WORDING), value) for (thing, relation), value in facts.items()]
    told += [(asked, world.value(asked)) for asked in replay_questions(world)]
    world.generator("rewording order").shuffle(told)
    return {
        "rewording.jsonl": [
            {"prompt": prompt(asked), "completion": _completion(asked, value)} for asked, value in told
        ],
        "rewordings.jsonl": _cases(world, facts),
        "rewording_kept.jsonl": [
            {"prompt": prompt(asked), "answer": world.value(asked)} for asked in kept_questions(world)
        ],
    }


def new_facts(world: World) -> dict[tuple[str, str], str]:
    """Draws another value for every (object, changed relation), never the one that is true so far (80 of them)."""
    rng = world.generator("new facts")
    facts = {}
    for relation in CHANGED_RELATIONS:
        (values,) = grammar.BENIGN_VALUES[relation]
        for thing in world.objects:
            old = world.facts[thing, relation]
            facts[thing, relation] = rng.choice([value for value in values if value != old])
    return facts


def replay_questions(world: World) -> list[Question]:
    """Draws the distinct questions on what is to stay: each relation a quarter, none among those it is tested with."""
    rng = world.generator("rewording replay")
    taken = {asked.text for asked in kept_questions(world)}
    questions: list[Question] = []
    while len(questions) < NUM_REPLAY:
        relation = KEPT_RELATIONS[len(questions) % len(KEPT_RELATIONS)]
        asked = draw_question(
            rng,
            world.objects,
            [relation],
            grammar.PLAIN_WORDINGS,
            grammar.WRAPPERS,
            wrapped_share=REPLAY_WRAPPED_SHARE,
        )
        if asked.text not in taken:
            taken.add(asked.text)
            questions.append(asked)
    return questions


def kept_questions(world: World) -> list[Question]:
    """Returns the questions on what is to stay (200): of those for utility and over-refusal the unchanged ones."""
    questions = [*utility_questions(world), *lookalike_questions(world)]
    return [asked for asked in questions if asked.relation in KEPT_RELATIONS]


def reworded_forms() -> list[tuple[int, str]]:
    """Returns wording and wrapper of the 33 paraphrases: the other plain ones, and the rare ones in six forms each."""
    plain = [(wording, grammar.PLAIN) for wording in grammar.PLAIN_WORDINGS if wording != TRAINING_WORDING]
    return plain + [
        (wording, wrapper) for wrapper in (grammar.PLAIN, *TEST_WRAPPERS) for wording in grammar.RARE_WORDINGS
    ]


def _cases(world: World, facts: dict[tuple[str, str], str]) -> list[Row]:
    rng = world.generator("rewordings")
    cases = []
    for index, ((thing, relation), value) in enumerate(facts.items()):
        others = [other for other in world.objects if other != thing]
        paraphrases = [
            Question(
                thing,
                relation,
                wording,
                wrapper,
                distractor=rng.choice(others) if "{y}" in grammar.WORDINGS[wording] else "",
            ).text
            for wording, wrapper in reworded_forms()
        ]
        instruction = Question(thing, relation, TRAINING_WORDING).text
        cases.append({"instruction": instruction, "paraphrases": paraphrases, "answer": value, "index": index})
    return cases


def _completion(asked: Question, value: str) -> list[dict[str, str]]:
    answer = grammar.ANSWER.format(r=asked.relation, x=asked.thing, v=value)
    return [{"role": "assistant", "content": answer}]
