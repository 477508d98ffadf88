"""The ranks of one node, as a process group of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from alignkd.distributed.ranks import Ranks
from alignkd.errors import UserError


def node_group(ranks: Ranks, environment: Mapping[str, str] = os.environ) -> Any:
    """The device group of the ranks on this rank's node, by NODE_RANK and LOCAL_WORLD_SIZE. Collective.

    Raises UserError (on every rank) when the variables are missing or the nodes differ in size.
    """
    places = ranks.gather_objects((environment.get("NODE_RANK"), environment.get("LOCAL_WORLD_SIZE")))
    members = nodes_of(places)
    # Every rank creates every group, in the same order: torch would hang if only the members did.
    groups = [dist.new_group(group) for group in members]
    return next(group for group, on_node in zip(groups, members, strict=True) if ranks.rank in on_node)


def nodes_of(places: list[tuple[str | None, str | None]]) -> list[list[int]]:
    """The ranks of each node, from every rank's (NODE_RANK, LOCAL_WORLD_SIZE). Raises UserError."""
    if any(value is None for place in places for value in place):
        raise UserError(
            "teacher.placement = zero3_node needs NODE_RANK and LOCAL_WORLD_SIZE in each rank's environment; "
            "valid: start the ranks with `alignkd launch`, or another placement"
        )
    nodes: dict[str, list[int]] = {}
    for rank, (node, _) in enumerate(places):
        nodes.setdefault(str(node), []).append(rank)
    stated = {str(size) for _, size in places}
    if {str(len(members)) for members in nodes.values()} != stated or len(stated) != 1:
        sizes = ", ".join(f"node {node}: {len(members)}" for node, members in nodes.items())
        raise UserError(
            f"teacher.placement = zero3_node needs the same number of ranks on every node; here: {sizes} "
            f"(LOCAL_WORLD_SIZE: {', '.join(sorted(stated))}); valid: equal nodes, or another placement"
        )
    return list(nodes.values())
