from types import SimpleNamespace

import pytest

from trl_robust.estimate.schedule import schedule_of


def training(**changes):
    return SimpleNamespace(
        **{
            "max_steps": -1,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "updates_per_attack": 1,
            "dataloader_drop_last": False,
            "faithful": False,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "rows", "processes", "expected"),
    [
        ({}, 10, 1, (3, 10, 10)),  # 4 + 4 + 2
        ({"dataloader_drop_last": True}, 10, 1, (2, 8, 8)),
        ({"gradient_accumulation_steps": 2}, 10, 1, (2, 10, 10)),  # (4 + 4) + (2)
        ({"num_train_epochs": 1.5}, 10, 1, (5, 18, 18)),  # 4 + 4 + 2 + 4 + 4
        ({"max_steps": 4}, 10, 1, (4, 14, 14)),
        ({"max_steps": 4}, None, 1, (4, 16, 16)),
        ({"updates_per_attack": 3}, 10, 1, (6, 24, 8)),  # two full blocks, three times each
        ({"updates_per_attack": 3, "max_steps": 4}, 10, 1, (4, 16, 8)),
        ({"faithful": True, "gradient_accumulation_steps": 2}, 10, 1, (2, 10, 6)),  # the last of (4, 4) and of (2)
        ({}, 10, 2, (2, 10, 10)),  # five rows each: 4 + 1
        ({"updates_per_attack": 2, "max_steps": 2}, 16, 2, (2, 16, 8)),
        ({"updates_per_attack": 4}, None, 1, (None, 16, 4)),  # of one attack
    ],
)
def test_updates_rows_and_attacked_rows(changes, rows, processes, expected):
    found = schedule_of(training(**changes), rows, processes)
    assert (found.updates, found.rows, found.attacked) == expected
