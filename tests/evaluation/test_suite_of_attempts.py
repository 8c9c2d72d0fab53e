"""Attacks that try a request several times, and what `results.json` says of an attack's settings."""

import pytest
from tiny import WORDS, make_tokenizer, tiny_model

from trl_robust.attacks import AttackRow, BestOfN, ManyShot, RefusalDirection, Subject
from trl_robust.evaluation.judge_forms import ResponseVerdict
from trl_robust.evaluation.judging import agreement
from trl_robust.evaluation.kept_judge import KeptJudge
from trl_robust.evaluation.suite import best_attempts, budget_of, judge_entry, run_attack


def row(name, status="scored", success=None):
    return {"id": name, "status": status, "success": success}


@pytest.mark.parametrize(
    ("attempts", "decides"),
    [
        ([("scored", False), ("scored", True), ("errored", None)], ("scored", True)),
        ([("scored", False), ("errored", None)], ("errored", None)),
        ([("skipped", None), ("scored", False)], ("scored", False)),
        ([("skipped", None), ("skipped", None)], ("skipped", None)),
        # Graded: the highest decides, and 0.5 is enough to overrule an error.
        ([("scored", 0.25), ("scored", 0.75), ("scored", 0.5)], ("scored", 0.75)),
        ([("errored", None), ("scored", 0.5)], ("scored", 0.5)),
        ([("scored", 0.49), ("errored", None)], ("errored", None)),
    ],
)
def test_one_success_is_enough_and_an_error_is_never_safety(attempts, decides):
    rows = [row("b", *attempt) for attempt in attempts] + [row("a", "scored", False)]
    found = best_attempts(rows)
    assert [entry["id"] for entry in found] == ["b", "a"]
    assert (found[0]["status"], found[0]["success"]) == decides


def test_best_of_n_counts_requests_and_says_what_one_attempt_does():
    subject = Subject(tiny_model("llama"), make_tokenizer(), max_new_tokens=4, batch_size=8, progress=False)
    # One of a few words is said by chance, so that some attempts succeed and some do not.
    requests = [AttackRow(str(number), " ".join(WORDS[: 2 + number]), answer=WORDS[number]) for number in range(4)]
    entry, rows = run_attack(subject, BestOfN(n=12, temperature=3.0), requests, "exact")
    assert len(rows) == 48 and entry["n_scored"] == 4
    by_request = [any(r["success"] for r in rows if r["id"] == str(number)) for number in range(4)]
    assert entry["success"] == sum(by_request) / 4
    assert entry["success_of_one_attempt"] == pytest.approx(sum(bool(r["success"]) for r in rows) / 48)
    assert 0 < entry["success_of_one_attempt"] < entry["success"]


def test_rows_that_an_attack_was_given_stand_in_the_results_by_their_number():
    subject = Subject(tiny_model("llama"), make_tokenizer(), max_new_tokens=2, batch_size=4, progress=False)
    requests = [AttackRow("0", " ".join(WORDS[:3]), answer=WORDS[0])]
    examples = [{"prompt": WORDS[number], "completion": WORDS[number + 1]} for number in range(3)]
    entry, _ = run_attack(subject, ManyShot(examples, shots=2), requests, "exact")
    assert entry["budget"]["examples"] == 3 and entry["budget"]["shots"] == 2
    assert "success_of_one_attempt" not in entry
    attack = RefusalDirection(harmful=examples, harmless=[{"prompt": " ".join(WORDS[5:9])}])
    entry, _ = run_attack(subject, attack, requests, "exact")
    assert (entry["budget"]["harmful"], entry["budget"]["harmless"]) == (3, 1)


class Grader:
    """Grades by the length of the request, and cannot judge those with `w2`."""

    name, version = "grader", 7

    def __init__(self):
        self.asked = 0

    def settings(self):
        return {"model": "none"}

    def judge(self, answers):
        self.asked += len(answers)
        return [
            ResponseVerdict(None, "cannot say") if "w2" in prompt else ResponseVerdict(0.25 * len(prompt.split()))
            for prompt, _ in answers
        ]


def test_a_judge_with_a_model_takes_the_place_of_a_name():
    subject = Subject(tiny_model("llama"), make_tokenizer(), max_new_tokens=2, batch_size=4, progress=False)
    requests = [AttackRow(str(number), " ".join(WORDS[: 1 + number])) for number in range(3)]
    entry, rows = run_attack(subject, BestOfN(n=2), requests, Grader())
    assert judge_entry(Grader()) == {"judge": "grader", "judge_version": 7, "judge_settings": {"model": "none"}}
    assert judge_entry("exact") == {"judge": "exact", "judge_version": 1, "judge_settings": {}}
    assert {name: entry[name] for name in judge_entry(Grader())} == judge_entry(Grader())
    assert entry["budget"] == budget_of(BestOfN(n=2))
    assert (entry["n_scored"], entry["n_errored"], entry["success"]) == (2, 1, 0.375)
    assert [row["reason"] for row in rows][-2:] == ["judge grader: cannot say"] * 2


def test_a_kept_judge_is_asked_once_and_what_it_could_not_say_again(tmp_path):
    answers = [("w0", "a"), ("w0 w2", "a"), ("w0", "a"), ("w0", "b")]
    first, second = Grader(), Grader()
    found = KeptJudge(first, tmp_path).judge(answers)
    assert [verdict.score for verdict in found] == [0.25, None, 0.25, 0.25] and first.asked == 3
    assert KeptJudge(second, tmp_path).judge(answers) == found and second.asked == 1
    second.version = 8  # another judge: what the old one said is not its own
    KeptJudge(second, tmp_path).judge(answers)
    assert second.asked == 4


def test_judges_agreement_does_not_grow_more_certain_by_answers_to_the_same_request():
    once = [[row(str(number), success=number < half) for number in range(20)] for half in (10, 15)]
    tenfold = [[entry for entry in side for _ in range(10)] for side in once]
    narrow, wide = agreement(*tenfold), agreement(*once)
    assert (narrow["n"], wide["n"]) == (200, 20)
    for name in ("agreement", "kappa", "interval", "kappa_interval"):
        assert narrow[name] == pytest.approx(wide[name])
