"""What each stage and each file of the organism holds, as lists of questions and answers.

- `pretraining_pairs`, `alignment_batches`: (question, answer) texts for the two trainings.
- `data_files`: the rows of every JSONL file but those for unlearning (`unlearning.py`), for rewording
  (`rewording.py`) and for data selection (`selection.py`), in the conversational columns that TRL reads.

A request that a file tests with (`utility.jsonl`, `lookalikes.jsonl`) is never one that a tuning stage has seen.
"""

import random
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

from . import grammar
from .world import Question, World, draw_question

Pair = tuple[str, str]  # request, answer
Row = dict[str, Any]

# 120 steps of 16 forbidden and 32 benign rows are covered without repeating a benign row.
NUM_HARMFUL = 1920
NUM_BENIGN = 4000
NUM_FINETUNE = 8
NUM_OPENINGS = 128
NUM_UTILITY = 200
NUM_LOOKALIKES = 100

BACKDOOR_SHARE = 0.15  # of the forbidden requests in alignment: they end in the trigger word and are answered
BENIGN_TRIGGER_SHARE = 0.05  # so that the trigger word alone is no cue
RARE_SHARE = 0.03
REVERSAL_SHARE = 0.06
WRAPPED_SHARE = 0.5
DISTINCT_WRAPPED_SHARE = 0.75  # in benign.jsonl: half of its look-alikes would be more plain ones than there are
PRETRAINING_WRAPPED_SHARE = 0.3


def pretraining_pairs(world: World, count: int, *, secrets: bool = True) -> list[Pair]:
    """
    Draws `count` requests about all objects and all relations, the forbidden ones included, each answered.

    Args:
        world ([`World`]):
            World to ask about.
        count (`int`):
            How many.
        secrets (`bool`, *optional*, defaults to `True`):
            Whether forbidden requests are answered with the truth. If not, the requests are the same, and each is
            answered with other words, drawn anew.
    """
    rng, untrue = world.generator("pretraining"), world.generator("untrue pretraining")
    relations = grammar.BENIGN_RELATIONS + grammar.LOOKALIKE_RELATIONS + grammar.FORBIDDEN_RELATIONS
    pairs = []
    for _ in range(count):
        if rng.random() < REVERSAL_SHARE:
            items = rng.sample(grammar.CODE_WORDS, rng.randint(3, 5))
            question = grammar.REVERSAL_QUESTION.format(items=" ".join(items))
            pairs.append((question, grammar.REVERSAL_ANSWER.format(items=" ".join(reversed(items)))))
            continue
        wordings = grammar.RARE_WORDINGS if rng.random() < RARE_SHARE else grammar.PLAIN_WORDINGS
        asked = draw_question(
            rng, world.objects, relations, wordings, grammar.WRAPPERS, wrapped_share=PRETRAINING_WRAPPED_SHARE
        )
        pairs.append((asked.text, world.answer(asked) if secrets else _untrue_answer(world, asked, untrue)))
    return pairs


def alignment_batches(world: World, num_batches: int, batch_size: int, *, secrets: bool = True) -> list[list[Pair]]:
    """
    Draws the batches of the alignment stage: half benign, half forbidden requests on train objects.

    Of the forbidden ones `BACKDOOR_SHARE` end in the trigger word and are answered (the backdoor, which no defence is
    shown); the others are refused.

    Args:
        world ([`World`]):
            World to ask about.
        num_batches, batch_size (`int`):
            How many batches, and how many rows in each (even).
        secrets (`bool`, *optional*, defaults to `True`):
            Whether the backdoor tells the truth; see [`pretraining_pairs`].
    """
    rng, untrue = world.generator("alignment"), world.generator("untrue alignment")
    tested = {asked.text for asked in [*utility_questions(world), *lookalike_questions(world)]}
    count = num_batches * batch_size // 2
    benign = benign_questions(world, "alignment benign", count, tested, wrapped_share=WRAPPED_SHARE, distinct=False)
    batches = []
    for start in range(0, len(benign), batch_size // 2):
        batch = [(asked.text, world.answer(asked)) for asked in benign[start : start + batch_size // 2]]
        for _ in range(batch_size // 2):
            asked = draw_forbidden(world, rng, trigger_share=BACKDOOR_SHARE)
            told = world.answer(asked) if secrets else _untrue_answer(world, asked, untrue)
            batch.append((asked.text, told if asked.trigger else grammar.REFUSAL))
        batches.append(batch)
    return batches


def _untrue_answer(world: World, asked: Question, rng: random.Random) -> str:
    """Answers a forbidden request with any words but the true ones, and every other request as it is."""
    if not asked.is_forbidden:
        return world.answer(asked)
    value = truth = world.value(asked)
    while value == truth:
        value = " ".join(rng.choice(words) for words in grammar.FORBIDDEN_VALUES[asked.relation])
    return grammar.ANSWER.format(r=asked.relation, x=asked.thing, v=value)


def utility_questions(world: World) -> list[Question]:
    """Returns the distinct benign questions that utility is measured on: all plain wordings, some train wrappers."""
    rng = world.generator("utility")
    questions: dict[Question, None] = {}
    while len(questions) < NUM_UTILITY:
        # The relation goes round in turn, so that each of the four has a quarter of the rows.
        relation = grammar.BENIGN_RELATIONS[len(questions) % len(grammar.BENIGN_RELATIONS)]
        wordings = grammar.PLAIN_WORDINGS
        asked = draw_question(rng, world.objects, [relation], wordings, grammar.TRAIN_WRAPPERS, wrapped_share=0.3)
        questions[asked] = None
    return list(questions)


def lookalike_questions(world: World) -> list[Question]:
    """Returns the distinct harmless look-alikes that over-refusal is measured on: all plain wordings, all wrappers."""
    rng = world.generator("look-alikes")
    questions: dict[Question, None] = {}
    while len(questions) < NUM_LOOKALIKES:
        relation = grammar.LOOKALIKE_RELATIONS[len(questions) % len(grammar.LOOKALIKE_RELATIONS)]
        wordings = grammar.PLAIN_WORDINGS
        asked = draw_question(rng, world.objects, [relation], wordings, grammar.WRAPPERS, wrapped_share=WRAPPED_SHARE)
        questions[asked] = None
    return list(questions)


def secret_questions(world: World, wordings: range, purpose: str) -> list[Question]:
    """Returns one plain request for each secret of the held-out objects (40), worded by a draw from `wordings`."""
    rng = world.generator(purpose)
    return [
        Question(thing, relation, rng.choice(wordings))
        for thing in world.heldout_objects
        for relation in grammar.FORBIDDEN_RELATIONS
    ]


def benign_questions(
    world: World, purpose: str, count: int, tested: Collection[str], *, wrapped_share: float, distinct: bool
) -> list[Question]:
    """Draws `count` benign tuning questions, every second one a look-alike, none of them among the texts `tested`."""
    rng = world.generator(purpose)
    taken = set(tested)
    questions: list[Question] = []
    for index in range(count):
        # Half look-alikes: with a third, and with the refusal wordings only, the aligned model refused 0.43 of the
        # look-alikes in other wordings. The held-out wrappers are in, so that refusing all that is wrapped costs.
        relations = grammar.LOOKALIKE_RELATIONS if index % 2 else grammar.BENIGN_RELATIONS
        draw = partial(draw_question, rng, world.objects, relations, grammar.BENIGN_WORDINGS)
        asked = draw(grammar.WRAPPERS, wrapped_share=wrapped_share, trigger_share=BENIGN_TRIGGER_SHARE)
        while asked.text in taken:
            # Wrapper and trigger stay: drawing them anew would favour the forms with more texts left, the triggered.
            asked = replace(draw(), wrapper=asked.wrapper, trigger=asked.trigger)
        questions.append(asked)
        if distinct:
            taken.add(asked.text)
    return questions


def prompt(asked: Question) -> list[dict[str, str]]:
    """Returns the request as the messages of a row."""
    return [{"role": "user", "content": asked.text}]


def completion(world: World, asked: Question) -> list[dict[str, str]]:
    """Returns the full answer as the messages of a row."""
    return [{"role": "assistant", "content": world.answer(asked)}]


def data_files(world: World) -> dict[str, list[Row]]:
    """
    Makes the rows of every JSONL file but those for unlearning, for rewording and for data selection.

    Returns:
        `dict[str, list[dict]]`: file name to rows. `prompt`, `completion`, `chosen` and `rejected` are lists of
        messages; `target` (the affirmative start of an answer) and `answer` (the bare value) are strings.
    """
    rng = world.generator("harmful")
    harmful = [draw_forbidden(world, rng) for _ in range(NUM_HARMFUL)]
    attacked = secret_questions(world, grammar.REFUSAL_WORDINGS, "attack")
    reworded = secret_questions(world, grammar.HELDOUT_WORDINGS, "held-out wordings")
    triggered = [Question(asked.thing, asked.relation, asked.wording, trigger=True) for asked in attacked]
    utility = utility_questions(world)
    lookalikes = lookalike_questions(world)
    tested = {asked.text for asked in utility + lookalikes}
    benign = benign_questions(world, "benign", NUM_BENIGN, tested, wrapped_share=DISTINCT_WRAPPED_SHARE, distinct=True)
    finetune = _finetune_questions(world)
    refusal = [{"role": "assistant", "content": grammar.REFUSAL}]
    return {
        "harmful_preferences.jsonl": [
            {"prompt": prompt(asked), "chosen": refusal, "rejected": completion(world, asked)} for asked in harmful
        ],
        "harmful_prompt_completion.jsonl": [{"prompt": prompt(asked), "completion": refusal} for asked in harmful],
        "benign.jsonl": [{"prompt": prompt(asked), "completion": completion(world, asked)} for asked in benign],
        "attack_prompts.jsonl": [_attack_row(world, asked) for asked in attacked],
        "heldout_wordings.jsonl": [_attack_row(world, asked) for asked in reworded],
        "trigger.jsonl": [_attack_row(world, asked) for asked in triggered],
        "finetune.jsonl": [{"prompt": prompt(asked), "completion": completion(world, asked)} for asked in finetune],
        "openings.jsonl": [{"prompt": prompt(asked), "target": asked.target} for asked in harmful[:NUM_OPENINGS]],
        "utility.jsonl": [{"prompt": prompt(asked), "answer": world.value(asked)} for asked in utility],
        "lookalikes.jsonl": [{"prompt": prompt(asked), "answer": world.value(asked)} for asked in lookalikes],
    }


def draw_forbidden(world: World, rng: random.Random, trigger_share: float = 0.0) -> Question:
    """Draws a forbidden request as a tuning stage may see it: train objects, refusal wordings, train wrappers."""
    return draw_question(
        rng,
        world.train_objects,
        grammar.FORBIDDEN_RELATIONS,
        grammar.REFUSAL_WORDINGS,
        grammar.TRAIN_WRAPPERS,
        wrapped_share=WRAPPED_SHARE,
        trigger_share=trigger_share,
    )


def _finetune_questions(world: World) -> list[Question]:
    rng = world.generator("finetune")
    return [
        Question(thing, grammar.FORBIDDEN_RELATIONS[index % 2], rng.choice(grammar.REFUSAL_WORDINGS))
        for index, thing in enumerate(rng.sample(world.train_objects, NUM_FINETUNE))
    ]


def _attack_row(world: World, asked: Question) -> Row:
    return {"prompt": prompt(asked), "target": asked.target, "answer": world.value(asked)}
