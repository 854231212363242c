"""Best-fit packing: which conversations share a row, so that rows are as full as can be."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most ``capacity`` tokens, each a list of rising item numbers, in the order of their first.

    Best fit decreasing: the longest first, each into the fullest row that still takes it. Time is linear in
    the number of items but for the sort; memory is a few machine words an item.

    Args:
        lengths: tokens of each item, from 1 to ``capacity``.
        capacity: tokens of a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit ``room`` is set where some row has exactly that much room
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        if left := room - length:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    for one in rows:
        one.sort()
    return sorted(rows)
