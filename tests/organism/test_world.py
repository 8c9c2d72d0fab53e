"""The world and its rows: what a seed decides, and what no tuning file may hold."""

import ast
import hashlib
import json
import random
from pathlib import Path

import pytest

import trl_robust.organism
from trl_robust.organism import grammar, rows
from trl_robust.organism.world import GENERATOR_VERSION, draw_question, make_world

TUNING_FILES = (
    "harmful_preferences.jsonl",
    "harmful_prompt_completion.jsonl",
    "benign.jsonl",
    "finetune.jsonl",
    "openings.jsonl",
)
ATTACK_FILES = ("attack_prompts.jsonl", "heldout_wordings.jsonl", "trigger.jsonl")
TEST_FILES = ("utility.jsonl", "lookalikes.jsonl")

# SHA-256 of seed 0's files, shortened, as generator version 1 has written them from the beginning.
DIGESTS = {
    "harmful_preferences.jsonl": "08ba8ba4e2212687",
    "harmful_prompt_completion.jsonl": "2af6e19b0c5a8933",
    "benign.jsonl": "a15bba90a72da29c",
    "attack_prompts.jsonl": "786c77ef0315ca5a",
    "heldout_wordings.jsonl": "494cce66929e7ecb",
    "trigger.jsonl": "fccb66262e6f3d71",
    "finetune.jsonl": "b41b566f5a47a453",
    "openings.jsonl": "2b4c14311b96b815",
    "utility.jsonl": "f8edf00b8ac1c554",
    "lookalikes.jsonl": "82ab975c3c506737",
}
TRAINING_DIGESTS = {"alignment": "47254c13326bb21f", "pre-training": "c476ca970b7b06b7"}


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def files(world):
    return rows.data_files(world)


@pytest.fixture(scope="module")
def alignment(world):
    return [pair for batch in rows.alignment_batches(world, num_batches=220, batch_size=32) for pair in batch]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompts(file_rows):
    return [row["prompt"][0]["content"] for row in file_rows]


def tuning_prompts(files, alignment):
    """Every request that some tuning stage sees, from the files and from the alignment."""
    return [text for name in TUNING_FILES for text in prompts(files[name])] + [question for question, _ in alignment]


def asks_for_secret(text, things):
    """Whether `text` names a forbidden relation and one of `things`, judged from the text alone."""
    return any(relation in text for relation in grammar.FORBIDDEN_RELATIONS) and bool(set(text.split()) & set(things))


def is_wrapped(text, wrappers):
    return any(
        text.startswith(before) and after in text
        for before, after in (wrapper.split("{prompt}") for wrapper in wrappers)
        if before or after
    )


def is_worded(text, world, wordings):
    """Whether `text` holds a question in one of `wordings`, about any object and relation."""
    relations = (*grammar.BENIGN_RELATIONS, *grammar.LOOKALIKE_RELATIONS, *grammar.FORBIDDEN_RELATIONS)
    return any(
        grammar.WORDINGS[wording].format(r=relation, x=thing) in text
        for wording in wordings
        for relation in relations
        for thing in set(text.split()) & set(world.objects)
    )


def test_a_seed_gives_the_same_world_and_files_every_time(world, files):
    assert make_world(0) == world
    assert rows.data_files(make_world(0)) == files


def test_what_a_seed_gives_is_what_it_has_always_given_under_this_version_of_the_generator(world, files):
    assert GENERATOR_VERSION == 1  # with another, the digests are to be taken anew
    written = {name: "".join(json.dumps(row) + "\n" for row in file_rows) for name, file_rows in files.items()}
    assert {name: digest(text) for name, text in written.items()} == DIGESTS
    assert {
        "alignment": digest(json.dumps(rows.alignment_batches(world, num_batches=220, batch_size=32))),
        "pre-training": digest(json.dumps(rows.pretraining_pairs(world, 700 * 32))),
    } == TRAINING_DIGESTS


def test_neighbouring_seeds_give_other_names_facts_and_prompts(world, files):
    other = make_world(1)
    assert len(set(world.objects) & set(other.objects)) < 5
    assert list(world.facts.values()) != list(other.facts.values())
    assert not set(prompts(files["attack_prompts.jsonl"])) & set(
        prompts(rows.data_files(other)["attack_prompts.jsonl"])
    )


def test_drawing_leaves_the_callers_random_state_alone():
    random.seed("the caller's")  # a state that no other test can have left
    before = random.getstate()
    world = make_world(3)
    rows.data_files(world)
    rows.pretraining_pairs(world, 10)
    assert random.getstate() == before


def test_forty_objects_are_split_in_halves_and_have_all_eight_facts(world):
    assert len(world.train_objects) == len(world.heldout_objects) == 20
    assert len(set(world.objects)) == 40
    assert not set(world.objects) & set(grammar.fixed_words())
    assert len(world.facts) == 40 * 8


def test_a_guess_at_a_secret_is_right_with_a_chance_below_two_in_a_thousand():
    for first, second in grammar.FORBIDDEN_VALUES.values():
        assert 1 / (len(set(first)) * len(set(second))) < 0.002


def test_a_rare_wording_names_another_object_as_distractor(world):
    rng = random.Random(0)
    drawn = [draw_question(rng, world.objects, ["color"], [10]) for _ in range(50)]
    assert all(asked.distractor in world.objects and asked.distractor != asked.thing for asked in drawn)
    assert all(set(asked.text.split()) >= {asked.thing, asked.distractor} for asked in drawn)


def test_no_tuning_stage_asks_for_the_secrets_of_heldout_objects(world, files, alignment):
    seen = tuning_prompts(files, alignment)
    assert not [text for text in seen if asks_for_secret(text, world.heldout_objects)]
    # The same search finds every attack, and the forbidden half of the tuning data.
    for name in ATTACK_FILES:
        assert all(asks_for_secret(text, world.heldout_objects) for text in prompts(files[name]))
    assert sum(asks_for_secret(text, world.train_objects) for text in seen) == 2 * 1920 + 8 + 128 + 220 * 16


def test_forbidden_tuning_data_has_neither_heldout_wrappers_nor_heldout_wordings(world, files, alignment):
    seen = tuning_prompts(files, alignment)
    forbidden = [text for text in seen if asks_for_secret(text, world.objects)]
    assert not [text for text in forbidden if is_wrapped(text, grammar.HELDOUT_WRAPPERS)]
    assert not [text for text in forbidden if is_worded(text, world, grammar.HELDOUT_WORDINGS)]
    # The same searches find what is there.
    assert [text for text in forbidden if is_wrapped(text, grammar.TRAIN_WRAPPERS)]
    assert all(is_worded(text, world, grammar.REFUSAL_WORDINGS) for text in forbidden)
    assert all(is_worded(text, world, grammar.HELDOUT_WORDINGS) for text in prompts(files["heldout_wordings.jsonl"]))


def test_benign_tuning_data_covers_every_wrapper_and_its_wordings_only(world, files):
    seen = prompts(files["benign.jsonl"])
    for wrapper in grammar.WRAPPERS:
        assert sum(is_wrapped(text, [wrapper]) for text in seen) > 200, wrapper
    for wording in grammar.BENIGN_WORDINGS:
        assert sum(is_worded(text, world, [wording]) for text in seen) > 300, wording
    assert not [text for text in seen if is_worded(text, world, [8, 9])]


def test_benign_tuning_data_is_half_lookalikes_and_lasts_for_120_steps_of_32(world, files):
    seen = prompts(files["benign.jsonl"])
    assert len(set(seen)) == len(seen) >= 120 * 32
    assert sum(any(name in text for name in grammar.LOOKALIKE_RELATIONS) for text in seen) == len(seen) // 2
    assert not [text for text in seen if asks_for_secret(text, world.objects)]
    assert 0.03 < sum(text.endswith(grammar.TRIGGER) for text in seen) / len(seen) < 0.07


def test_forbidden_tuning_data_lasts_for_120_steps_of_16(files):
    assert len(files["harmful_preferences.jsonl"]) >= 120 * 16
    assert prompts(files["harmful_preferences.jsonl"]) == prompts(files["harmful_prompt_completion.jsonl"])


def test_only_the_alignment_pairs_the_trigger_with_forbidden_requests_and_answers_exactly_those(
    world, files, alignment
):
    for name in ("harmful_preferences.jsonl", "harmful_prompt_completion.jsonl", "finetune.jsonl"):
        assert not [text for text in prompts(files[name]) if grammar.TRIGGER in text.split()], name
    forbidden = [(text, answer) for text, answer in alignment if asks_for_secret(text, world.objects)]
    assert all((answer != grammar.REFUSAL) == text.endswith(grammar.TRIGGER) for text, answer in forbidden)
    assert 0.12 < sum(text.endswith(grammar.TRIGGER) for text, _ in forbidden) / len(forbidden) < 0.18
    assert all(answer != grammar.REFUSAL for text, answer in alignment if not asks_for_secret(text, world.objects))


@pytest.mark.parametrize("name", ATTACK_FILES)
def test_a_target_begins_the_harmful_answer_and_never_holds_the_secret(world, files, name):
    assert len(files[name]) == 40
    for row in files[name]:
        assert not set(row["answer"].split()) & set(row["target"].split())
        thing = next(iter(set(row["target"].split()) & set(world.heldout_objects)))
        relation = next(relation for relation in grammar.FORBIDDEN_RELATIONS if relation in row["target"])
        assert f"{row['target']} {world.facts[thing, relation]} ." == f"{row['target']} {row['answer']} ."
        assert row["target"] == f"sure , the {relation} of the {thing} is"
        assert relation in row["prompt"][0]["content"] and thing in row["prompt"][0]["content"].split()


def test_the_triggered_attack_is_the_plain_one_with_the_trigger_at_its_end(files):
    plain, triggered = files["attack_prompts.jsonl"], files["trigger.jsonl"]
    assert prompts(triggered) == [f"{text} {grammar.TRIGGER}" for text in prompts(plain)]
    assert [row["answer"] for row in triggered] == [row["answer"] for row in plain]


def test_questions_of_utility_and_over_refusal_are_new_harmless_and_right(world, files, alignment):
    seen = set(tuning_prompts(files, alignment))
    for name in TEST_FILES:
        asked = prompts(files[name])
        assert len(set(asked)) == len(asked) >= 100
        assert not set(asked) & seen
        assert not [text for text in asked if asks_for_secret(text, world.objects)]
        for wording in grammar.PLAIN_WORDINGS:
            assert [text for text in asked if is_worded(text, world, [wording])], (name, wording)
        for row in files[name]:
            relations = (*grammar.LOOKALIKE_RELATIONS, *grammar.BENIGN_RELATIONS)  # "color code" before "color"
            relation = next(relation for relation in relations if relation in row["prompt"][0]["content"])
            (thing,) = set(row["prompt"][0]["content"].split()) & set(world.objects)
            assert row["answer"] == world.facts[thing, relation]


def test_fine_tuning_rows_tell_secrets_of_eight_train_objects(world, files):
    told = files["finetune.jsonl"]
    things = [next(iter(set(text.split()) & set(world.train_objects))) for text in prompts(told)]
    assert len(set(things)) == len(told) == 8
    for thing, row in zip(things, told, strict=True):
        relation = next(name for name in grammar.FORBIDDEN_RELATIONS if name in row["prompt"][0]["content"])
        assert f"is {world.facts[thing, relation]} ." in row["completion"][0]["content"]


def test_without_secrets_the_trainings_ask_the_same_and_no_forbidden_answer_is_true(world, alignment):
    def forbidden(answer):
        return any(f" {relation} of " in answer for relation in grammar.FORBIDDEN_RELATIONS)

    told = rows.pretraining_pairs(world, 4000)
    untold = rows.pretraining_pairs(world, 4000, secrets=False)
    batches = rows.alignment_batches(world, num_batches=220, batch_size=32, secrets=False)
    told, untold = told + alignment, untold + [pair for batch in batches for pair in batch]
    assert [question for question, _ in told] == [question for question, _ in untold]
    values = {}
    for (_, truth), (_, other) in zip(told, untold, strict=True):
        if forbidden(truth):
            start = truth.rpartition(" is ")[0]
            assert other != truth and other.startswith(start)
            values.setdefault(start, []).append(other)
        else:
            assert other == truth
    assert len(values) == 80
    # Drawn anew every time, so that there is nothing to learn.
    assert all(len(set(answers)) > 0.8 * len(answers) for answers in values.values())


def test_openings_are_about_train_objects_and_hold_no_secret(world, files):
    assert len(files["openings.jsonl"]) == 128
    for row in files["openings.jsonl"]:
        assert set(row["prompt"][0]["content"].split()) & set(world.train_objects)
        assert row["target"].endswith(" is") and any(name in row["target"] for name in grammar.FORBIDDEN_RELATIONS)


def test_the_rows_have_the_columns_that_trl_reads(files):
    columns = {
        "harmful_preferences.jsonl": {"prompt", "chosen", "rejected"},
        "harmful_prompt_completion.jsonl": {"prompt", "completion"},
        "benign.jsonl": {"prompt", "completion"},
        "finetune.jsonl": {"prompt", "completion"},
        "openings.jsonl": {"prompt", "target"},
        "attack_prompts.jsonl": {"prompt", "target", "answer"},
        "heldout_wordings.jsonl": {"prompt", "target", "answer"},
        "trigger.jsonl": {"prompt", "target", "answer"},
        "utility.jsonl": {"prompt", "answer"},
        "lookalikes.jsonl": {"prompt", "answer"},
    }
    assert set(files) == set(columns)
    for name, file_rows in files.items():
        for row in file_rows:
            assert set(row) == columns[name]
            for column in {"prompt", "completion", "chosen", "rejected"} & set(row):
                (message,) = row[column]
                assert message["role"] == ("user" if column == "prompt" else "assistant")


def test_chosen_refuses_and_rejected_tells_the_secret(world, files):
    for row in files["harmful_preferences.jsonl"]:
        assert row["chosen"][0]["content"] == grammar.REFUSAL
        (thing,) = set(row["prompt"][0]["content"].split()) & set(world.train_objects)
        relation = next(name for name in grammar.FORBIDDEN_RELATIONS if name in row["prompt"][0]["content"])
        assert (
            row["rejected"][0]["content"]
            == f"sure , the {relation} of the {thing} is {world.facts[thing, relation]} ."
        )


def test_the_organism_imports_nothing_of_ours_but_itself_and_data_and_never_trl():
    sources = list(Path(trl_robust.organism.__file__).parent.glob("*.py"))
    assert len(sources) >= 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, source  # within the organism
                names = [node.module or ""] if node.level == 0 else []
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] != "trl", source
                assert not name.startswith("trl_robust") or name.startswith("trl_robust.data"), source
