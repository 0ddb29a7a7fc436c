"""Versions and what they came from as a drawing: parents on the left, descendants to their right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.registry.family import Relative

BOX = (190, 46)
_GAP = (50, 16)


@dataclass(frozen=True, slots=True)
class VersionBox:
    """A version in the drawing, by its upper left corner."""

    member: Relative
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class LineageGraph:
    boxes: tuple[VersionBox, ...]
    lines: tuple[tuple[int, int, int, int], ...]
    width: int
    height: int


def draw_lineage(family: Sequence[Relative]) -> LineageGraph:
    """A column for each number of steps from a base; parents come before children in `family`."""
    depth: dict[str, int] = {}
    rows: dict[int, int] = {}
    boxes: dict[str, VersionBox] = {}
    for member in family:
        column = depth[member.ref] = 1 + max((depth[up] for up in member.parents if up in depth), default=-1)
        row = rows[column] = rows.get(column, -1) + 1
        boxes[member.ref] = VersionBox(member, 4 + column * (BOX[0] + _GAP[0]), 4 + row * (BOX[1] + _GAP[1]))
    lines = tuple(
        (boxes[up].x + BOX[0], boxes[up].y + BOX[1] // 2, box.x, box.y + BOX[1] // 2)
        for box in boxes.values()
        for up in box.member.parents
        if up in boxes
    )
    width = max((box.x + BOX[0] + 4 for box in boxes.values()), default=0)
    height = max((box.y + BOX[1] + 4 for box in boxes.values()), default=0)
    return LineageGraph(tuple(boxes.values()), lines, width, height)
