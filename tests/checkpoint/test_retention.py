from __future__ import annotations

import pytest

from alignkd.checkpoint.retention import expired_steps


@pytest.mark.parametrize(
    ("committed", "verified", "protected", "keep_last", "keep_every", "expected"),
    [
        ([10, 20, 30, 40], {10, 20, 30, 40}, set(), 2, None, [10, 20]),
        ([10, 20, 30, 40], {10, 20, 30, 40}, set(), None, None, []),
        ([10, 20, 30, 40], {10, 20, 30, 40}, {10}, 2, None, [20]),  # the one resumed from
        ([10, 20, 30, 40], {10, 20, 30, 40}, set(), 1, 20, [10, 30]),
        ([10, 20, 30, 40], {40}, set(), 2, None, []),  # one verified checkpoint is not two
        ([10, 20, 30, 40], {20, 40}, set(), 2, None, [10]),  # 30 is not verified: it neither counts nor goes
        ([10, 20], {10, 20, 30}, set(), 1, None, [10]),  # 30 was removed by hand
        ([], set(), set(), 1, None, []),
    ],
)
def test_only_what_is_older_than_enough_verified_checkpoints_expires(
    committed, verified, protected, keep_last, keep_every, expected
) -> None:
    assert expired_steps(committed, verified, protected, keep_last, keep_every) == expected
