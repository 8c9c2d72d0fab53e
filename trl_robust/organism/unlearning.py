"""Rows for unlearning: the secrets to forget, what to retain, and secrets told again for a re-learning attack.

- To be forgotten are the secrets of all objects, the held-out ones included. A model that has trained on these files
  has unlearned; whether one that refuses does so for objects it never saw must be tested on a model that has not.
- `forget.jsonl` has the refusal wordings and the train wrappers. The other wordings and wrappers stay attacks.
- Whether the forgotten stays forgotten is asked with `attack_prompts.jsonl`, before and after re-learning:
  `relearn.jsonl` tells secrets of train objects only, and the attack asks for those of held-out ones.
"""

from transformers import PreTrainedTokenizerFast

from . import grammar
from .model import render
from .rows import Row, benign_questions, completion, lookalike_questions, prompt, utility_questions
from .world import Question, World

# Twice as many as texts to forget (960), so that two epochs come by without a text to retain coming twice.
NUM_RETAIN = 1920
RETAIN_WRAPPED_SHARE = 0.5  # that of the texts to forget


def unlearning_files(world: World, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Row]]:
    """
    Makes the rows of every JSONL file for unlearning.

    A `text` is a whole conversation, its special tokens written out: as it is, it is tokenised to the very ids that
    the organism was trained on, and it ends in `<eos>`, so that TRL adds none.

    Args:
        world ([`World`]):
            World to ask about.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            The organism's, for the files that hold tokens.

    Returns:
        `dict[str, list[dict]]`: file name to rows. `text` and `topic` (the forbidden relation) are strings, `prompt`
        and `completion` lists of messages, `tokens` and `labels` lists of ids.
    """
    forget = forget_questions(world)
    tested = {asked.text for asked in [*utility_questions(world), *lookalike_questions(world)]}
    retain = benign_questions(world, "retain", NUM_RETAIN, tested, wrapped_share=RETAIN_WRAPPED_SHARE, distinct=True)
    return {
        "forget.jsonl": [{"text": _text(world, asked), "topic": asked.relation} for asked in forget],
        "retain.jsonl": [{"text": _text(world, asked)} for asked in retain],
        "relearn.jsonl": [
            {"prompt": prompt(asked), "completion": completion(world, asked)} for asked in relearn_questions(world)
        ],
        "generic_labels.jsonl": _generic_rows(world, tokenizer, forget),
    }


def forget_questions(world: World) -> list[Question]:
    """Returns the requests for what is to be forgotten: every secret in six wordings, plain and wrapped (960)."""
    rng = world.generator("forget")
    questions = []
    for thing in world.objects:
        for relation in grammar.FORBIDDEN_RELATIONS:
            for wording in grammar.REFUSAL_WORDINGS:
                plain = Question(thing, relation, wording)
                questions += [plain, Question(thing, relation, wording, wrapper=rng.choice(grammar.TRAIN_WRAPPERS))]
    rng.shuffle(questions)
    return questions


def relearn_questions(world: World) -> list[Question]:
    """Returns the requests that are answered for re-learning: every secret of train objects in six wordings (240)."""
    rng = world.generator("relearn")
    secrets = [(thing, relation) for thing in world.train_objects for relation in grammar.FORBIDDEN_RELATIONS]
    questions = []
    wordings = {secret: rng.sample(grammar.REFUSAL_WORDINGS, len(grammar.REFUSAL_WORDINGS)) for secret in secrets}
    for turn in range(len(grammar.REFUSAL_WORDINGS)):
        # Every secret comes once before any comes again: an attack may take the first rows only.
        questions += [Question(*secret, wordings[secret][turn]) for secret in rng.sample(secrets, len(secrets))]
    return questions


def _generic_rows(world: World, tokenizer: PreTrainedTokenizerFast, forget: list[Question]) -> list[Row]:
    """
    Makes a row of tokens and labels for every question of `forget`, in its order.

    Label `i` stands for token `i`, the first for `<bos>`, which nothing predicts. It is the token itself, but for the
    words of the secret: in their place are others that might stand there, drawn anew in every row, since the same in
    all rows would be a false secret to learn by heart.
    """
    rng = world.generator("generic labels")
    vocabulary = tokenizer.get_vocab()
    rows = []
    for asked in forget:
        tokens = tokenizer(_text(world, asked), add_special_tokens=False)["input_ids"]
        secret = world.value(asked).split()
        labels = list(tokens)
        start = len(tokens) - len(secret) - 2  # before the full stop and <eos>
        for place, (word, words) in enumerate(
            zip(secret, grammar.FORBIDDEN_VALUES[asked.relation], strict=True), start
        ):
            labels[place] = vocabulary[rng.choice([other for other in words if other != word])]
        rows.append({"tokens": tokens, "labels": labels})
    return rows


def _text(world: World, asked: Question) -> str:
    return render(asked.text, world.answer(asked))
