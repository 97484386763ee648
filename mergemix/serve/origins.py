"""Where the operands of a family have a tensor, and how they differ in it."""

from __future__ import annotations

from mergemix.checkpoints.family import Family
from mergemix.serve.lazy import Origin
from mergemix.serve.view_reader import ViewReader


def origin_of(family: Family, name: str, reader: ViewReader) -> Origin:
    """What tensor `name` is merged from: operands are the family's members.

    Nothing is read but what it takes to see which of them are bitwise equal. Raises CheckpointError when a file cannot
    be read.
    """
    holders = family.holders(name)
    own = [family.members[position].tensors[name] for position in holders]
    # An adapter stands for the base where it brings nothing; the base is the first member then.
    positions = [holders.index(k) if k in holders else 0 for k in range(len(family.members))]
    found = reader.equality_classes(own)
    classes = tuple(holders[found[position]] for position in positions)
    return Origin(name, tuple(own[k] for k in positions), classes, holders, tuple(family.deltas(name)))


def family_bytes(family: Family) -> int:
    """Of all whole tensors together."""
    return sum(tensor.nbytes for member in family.members for tensor in member.tensors.values())
