"""Processes that work through a list, and what becomes of the work when one of them dies."""

import pytest
from pieces import Piece

from trl_robust.sweep.workers import run_all


def outcomes(works, jobs=1):
    found, stages = {}, set()

    def told(busy):
        stages.update(worker.stage for worker in busy)

    run_all(works, jobs=jobs, threads=1, told=told, ended=lambda work, outcome: found.update({work.name: outcome}))
    return found, stages


def test_a_death_or_a_failure_costs_one_piece_of_work_and_one_process_serves_many(tmp_path):
    works = [
        Piece(name, tmp_path, does) for name, does in (("a", "write"), ("b", "fail"), ("c", "die"), ("d", "write"))
    ]
    found, stages = outcomes(works)
    assert {name: outcome.state for name, outcome in found.items()} == {
        "a": "done", "b": "failed", "c": "failed", "d": "done",
    }  # fmt: skip
    assert found["b"].reason == "ValueError: no luck"
    assert "exit code 9" in found["c"].reason
    assert "working" in stages
    assert "written by the work" in (tmp_path / "a.txt").read_text()
    assert "no luck" in (tmp_path / "error.txt").read_text()
    assert (tmp_path / "a").read_text() != (tmp_path / "d").read_text()  # the one of `a` died with `c`


def test_an_interruption_ends_the_processes_and_is_passed_on(tmp_path):
    seen = []

    def told(busy):
        seen[:] = [worker.process for worker in busy]
        if any(worker.stage for worker in busy):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([Piece("a", tmp_path)] * 2, jobs=1, threads=1, told=told, ended=lambda *_: None)
    assert seen and not any(process.is_alive() for process in seen)
