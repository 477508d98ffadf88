from __future__ import annotations

import pytest

from alignkd.distributed.nodes import nodes_of
from alignkd.errors import UserError


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([("0", "2"), ("0", "2"), ("1", "1")], "node 0: 2, node 1: 1"),
        ([("0", "2"), ("0", "2"), ("0", "2")], "node 0: 3"),
        ([("0", "2"), (None, "2")], "needs NODE_RANK and LOCAL_WORLD_SIZE"),
    ],
)
def test_nodes_of_different_sizes_are_refused(
    places: list[tuple[str | None, str | None]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        nodes_of(places)


def test_the_ranks_of_a_node_need_not_be_neighbours() -> None:
    assert nodes_of([("1", "2"), ("0", "2"), ("1", "2"), ("0", "2")]) == [[0, 2], [1, 3]]
