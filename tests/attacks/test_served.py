"""A model behind an address under attack: a server in a thread."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import get_args

import pytest

from trl_robust.attacks import (
    GCG,
    PAIR,
    Attack,
    AttackRow,
    BestOfN,
    Direct,
    Embedding,
    Finetune,
    Latent,
    ManyShot,
    Prefill,
    Pruning,
    RefusalDirection,
    Served,
    SoftSuffix,
    Template,
    Universal,
)
from trl_robust.attacks.endpoint import Endpoint
from trl_robust.attacks.served import CHUNK, served_fault
from trl_robust.evaluation import run_attack

TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "goal two"}]
ROWS = [AttackRow("a", "goal one", "sure", "code 7"), AttackRow("b", TALK, "sure", "code 8"), AttackRow("c", "goal 3")]
EXAMPLES = [{"prompt": f"other {i}", "completion": f"told {i}", "target": "sure"} for i in range(3)]


@pytest.fixture
def server():
    """Its address, the bodies and keys that it saw, and what it says to a body: a text, a status, or other content."""
    seen: list[tuple[dict, str | None]] = []
    says = {"reply": lambda body: f"code 7 to {body['messages'][-1]['content']}, {body.get('seed')}"}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((body, self.headers.get("Authorization")))
            said = says["reply"](body)
            status, text = said if isinstance(said, tuple) else (200, said)
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen, says
    server.shutdown()
    server.server_close()
    thread.join()


def _served(url: str, **settings) -> Served:
    return Served(url, "m", **{"max_new_tokens": 9, "retries": 0, "pause": 0.0, "progress": False, **settings})


def _bodies(seen) -> list[dict]:
    """In the order of their text: a few are on their way at a time."""
    return sorted((body for body, _ in seen), key=lambda body: json.dumps(body["messages"]))


def _shown(found) -> list[dict]:
    return [vars(generation) for generation in found]


def test_requests_are_asked_as_they_are_and_greedily(server):
    url, seen, _ = server
    found = Direct().run(_served(url), ROWS)
    assert [generation.row for generation in found] == ROWS
    assert [generation.prompt for generation in found] == ["goal one", "goal two", "goal 3"]
    assert [generation.status for generation in found] == ["generated"] * 3
    assert found[1].response == found[1].continuation == "code 7 to goal two, None"
    messages = [[{"role": "user", "content": "goal 3"}], [{"role": "user", "content": "goal one"}], TALK]
    assert _bodies(seen) == [
        {"model": "m", "messages": asked, "max_tokens": 9, "temperature": 0.0}
        for asked in sorted(messages, key=json.dumps)
    ]


def test_many_requests_come_back_in_their_order(server):
    rows = [AttackRow(str(number), f"goal {number}") for number in range(2 * CHUNK + 3)]
    found = Direct().run(_served(server[0]), rows)
    assert [it.response for it in found] == [f"code 7 to goal {number}, None" for number in range(len(rows))]


def test_wrappers_and_dialogues_are_texts_and_turns(server):
    url, seen, _ = server
    Template(("say {prompt} now",)).run(_served(url), ROWS[:1])
    assert seen[0][0]["messages"] == [{"role": "user", "content": "say goal one now"}]
    ManyShot(EXAMPLES, shots=2).run(_served(url), ROWS[1:2])
    asked = seen[1][0]["messages"]
    assert [turn["role"] for turn in asked] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert (asked[0], asked[-1]) == tuple(TALK)


def test_samples_carry_their_own_seeds_and_come_out_the_same_again(server):
    url, seen, _ = server
    attack = BestOfN(n=3, temperature=0.7, top_p=0.9, augment=0.0)
    first = _shown(attack.run(_served(url), ROWS))
    bodies = [body for body, _ in seen]
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in bodies} == {(0.7, 0.9, 9)}
    seeds = [body["seed"] for body in bodies]
    assert len(set(seeds)) == len(seeds) == 9 and all(0 <= seed < 2**31 for seed in seeds)
    assert _shown(attack.run(_served(url), ROWS)) == first
    assert _shown(BestOfN(n=3, temperature=0.7, top_p=0.9, augment=0.0, seed=1).run(_served(url), ROWS)) != first


def test_an_attacker_rewrites_until_the_served_model_answers(server):
    url, _, says = server
    says["reply"] = lambda body: "fine" if body["messages"][-1]["content"] == "try 3" else "Sorry, no"

    class Scripted:
        def reply(self, messages):
            return [f"<request>try {len(conversation)}</request>" for conversation in messages]

    found = PAIR(Scripted(), streams=1, iterations=3).run(_served(url), ROWS)
    assert [(it.status, it.prompt, it.response) for it in found[:2]] == [("generated", "try 3", "fine")] * 2
    assert (found[2].status, found[2].reason) == ("skipped", "the row has no target")


def test_the_beginning_of_an_answer_cannot_be_given_and_is_skipped(server):
    url, seen, _ = server
    found = Prefill().run(_served(url), ROWS)
    assert [it.status for it in found] == ["skipped"] * 3 and not seen
    assert "takes no beginning" in found[0].reason and "no target" in found[2].reason


def test_calls_that_fail_are_errored_with_the_reason_and_never_safe(server):
    url, seen, says = server

    def reply(body):
        text = body["messages"][-1]["content"]
        return {"goal one": (400, "bad"), "goal two": (200, None)}.get(text, "code 9")

    says["reply"] = reply
    entry, answers = run_attack(
        _served(url, retries=2), Direct(), [*ROWS[:2], AttackRow("c", "goal 3", None, "x")], "exact"
    )
    assert (entry["n_scored"], entry["n_errored"], entry["n_skipped"]) == (1, 2, 0)
    assert [answer["success"] for answer in answers] == [None, None, False]
    assert answers[0]["reason"].startswith("endpoint: HTTP 400")
    assert answers[1]["reason"].startswith("endpoint: the reply holds no text")
    # A refusal to take the request is final; a reply without text may be a hitch.
    assert Counter(body["messages"][-1]["content"] for body, _ in seen) == {"goal one": 1, "goal two": 3, "goal 3": 1}


def test_a_server_that_is_not_there_leaves_every_request_errored():
    found = Direct().run(_served("http://127.0.0.1:1/v1", timeout=2.0), ROWS)
    assert [it.status for it in found] == ["errored"] * 3 and "URLError" in found[0].reason


def test_a_server_that_comes_back_is_asked_again(server):
    url, seen, says = server
    says["reply"] = lambda body: (503, "busy") if len(seen) == 1 else "fine"
    (found,) = Direct().run(_served(url, retries=1), ROWS[:1])
    assert (found.status, found.response, len(seen)) == ("generated", "fine", 2)


def test_the_key_goes_to_the_server_and_nowhere_else(server, monkeypatch):
    url, seen, says = server
    monkeypatch.setenv("MODEL_KEY", "k-123")
    says["reply"] = lambda body: (401, "no such key: k-123")
    served = _served(url, key_variable="MODEL_KEY", journal={})
    found = Direct().run(served, ROWS)
    assert {key for _, key in seen} == {"Bearer k-123"}
    assert "[key]" in found[0].reason
    assert "k-123" not in repr(served) + repr(found) + json.dumps([body for body, _ in seen]) + json.dumps(
        served.journal
    )
    assert url not in repr(served)
    with pytest.raises(ValueError, match="environment variable") as error:
        _served(url, key_variable="k-123")
    assert "k-123" not in str(error.value)


def test_half_a_surrogate_pair_can_be_kept_in_a_file(server):
    url, _, says = server
    says["reply"] = lambda body: "odd \ud83d end"
    (found,) = Direct().run(_served(url), ROWS[:1])
    assert found.response == "odd ? end"


class Killed(BaseException):
    """The process ends."""


@pytest.mark.parametrize("attack", [Direct(), BestOfN(n=2, augment=0.0)], ids=["direct", "best_of_n"])
def test_a_stopped_attack_goes_on_and_no_call_is_made_twice(attack, server, monkeypatch):
    url, seen, _ = server
    rows = [AttackRow(str(number), f"goal {number}") for number in range(CHUNK + 4)]
    whole = _shown(attack.run(_served(url), rows))
    every = Counter(json.dumps(body, sort_keys=True) for body, _ in seen)
    seen.clear()
    ask, calls, lock = Endpoint.ask, [], threading.Lock()

    def dying(self, *args, **settings):
        with lock:
            calls.append(1)
            if len(calls) == 7:
                raise Killed
        return ask(self, *args, **settings)

    journal: dict = {}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Endpoint, "ask", dying)
        attack.run(_served(url, journal=journal), rows)
    # What was on its way when it ended is kept as well; what waited was not sent.
    assert 6 <= len(journal) == len(seen) < CHUNK
    journal = json.loads(json.dumps(journal))
    assert _shown(attack.run(_served(url, journal=journal), rows)) == whole
    assert Counter(json.dumps(body, sort_keys=True) for body, _ in seen) == every


def test_a_call_that_failed_stays_failed_for_this_journal(server, monkeypatch):
    url, seen, says = server
    says["reply"] = lambda body: (400, "bad")
    served = _served(url, journal={})
    first = _shown(Direct().run(served, ROWS))
    says["reply"] = lambda body: "fine"
    assert _shown(Direct().run(served, ROWS)) == first and len(seen) == 3


def test_which_attacks_a_served_model_can_be_put_to():
    class Attacker:
        def reply(self, messages):
            return [None] * len(messages)

    faults: list[tuple[Attack, str | None]] = [
        (Direct(), None),
        (Template(), None),
        (Template(objective="random"), "tokenizer"),
        (Prefill(), "begins the model's answer"),
        (ManyShot(EXAMPLES, shots=1), None),
        (BestOfN(), None),
        (PAIR(Attacker()), None),
        (GCG(), "weights"),
        (SoftSuffix(), "weights"),
        (Embedding(), "weights"),
        (Latent(), "weights"),
        (Universal(EXAMPLES), "weights"),
        (RefusalDirection(objective="random"), "weights"),
        (Pruning(EXAMPLES), "weights"),
        (Finetune(EXAMPLES), "weights"),
    ]
    assert {attack.name for attack, _ in faults} == {attack.name for attack in get_args(Attack)}
    for attack, said in faults:
        found = served_fault(attack)
        assert found is None if said is None else said in found, attack.name
