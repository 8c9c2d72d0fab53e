"""Attacks that try a request several times, and what `results.json` says of an attack's settings."""

import pytest
from tiny import WORDS, make_tokenizer, tiny_model

from trl_robust.attacks import AttackRow, BestOfN, ManyShot, RefusalDirection, Subject
from trl_robust.evaluation.suite import best_attempts, run_attack


def row(name, status="scored", success=None):
    return {"id": name, "status": status, "success": success}


@pytest.mark.parametrize(
    ("attempts", "decides"),
    [
        ([("scored", False), ("scored", True), ("errored", None)], ("scored", True)),
        ([("scored", False), ("errored", None)], ("errored", None)),
        ([("skipped", None), ("scored", False)], ("scored", False)),
        ([("skipped", None), ("skipped", None)], ("skipped", None)),
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
