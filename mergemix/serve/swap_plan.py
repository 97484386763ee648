"""The swap plan of one rank: what a swap to another mixture must write, and the writing of it.

Made by `Recording` while vLLM loads the model for the first time. Work per tensor is done once for each structure of
layer groups; a swap then looks at arrays, and on a GPU starts launches that are kept ready.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from mergemix import __version__
from mergemix.checkpoints.adapter import fingerprint
from mergemix.checkpoints.family import Family
from mergemix.merge.delta_cache import TIERS
from mergemix.mixture import Mixture, tensor_groups
from mergemix.serve.coefficients import check_weights, group_mixtures
from mergemix.serve.copies import Copy, Makeup, Numbers, numbers_of, used_operands
from mergemix.serve.cpu_sums import Slot, Sum
from mergemix.serve.folded_sums import Placed
from mergemix.serve.gpu_sums import Empty, GpuSums
from mergemix.serve.operand_cache import CacheSizes, OperandCache
from mergemix.serve.reference_check import differs
from mergemix.serve.sample_check import Part, Sampler, differing, part_count
from mergemix.serve.sums import Sums

MAX_STRUCTURES = 16
MAX_VALUES = 1 << 12
# Parts of destinations that a sample looks at, of those that were written and of the others.
SAMPLED_WRITTEN, SAMPLED_REST = 64, 16
UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Write:
    """Destinations (positions in SwapPlan.moving) that get the same numbers from one tier."""

    copies: np.ndarray
    numbers: Numbers

    @property
    def weights(self) -> tuple[float, ...]:
        return self.numbers.weights


@dataclass(frozen=True, eq=False)
class Change:
    """What makes the live weights those of `mixture`. skipped: how many destinations hold them already."""

    mixture: Mixture
    writes: tuple[Write, ...]
    skipped: int


@dataclass(frozen=True, eq=False)
class _Structure:
    """What mixtures with the same patterns of groups share.

    groups: of each tensor of the family. group: of each copy. kinds: what tells copies apart, (group, makeup); kind: of
    each copy, as a position in kinds.
    """

    groups: Sequence[int]
    group: np.ndarray
    kinds: Sequence[tuple[int, Makeup]]
    kind: np.ndarray


class SwapPlan:
    """Replays a load with other weights.

    copies: all that was recorded; moving: those that a mixture can change, in plan order. mixture: what is live.
    unreplayable: why the plan must not be replayed; empty when it may be. nbytes: what a swap of everything writes.
    """

    def __init__(
        self,
        family: Family,
        mixture: Mixture,
        copies: Sequence[Copy],
        sums: Sums,
        sizes: CacheSizes,
        unreplayable: Sequence[str],
    ) -> None:
        """Of a load of `mixture`. Raises ConfigError where the memory of the cache is not to be had."""
        self._family, self._sums = family, sums
        self.copies = list(copies)
        self.unreplayable = list(unreplayable)
        self.moving = [copy for copy in copies if not copy.is_static]
        self._statics = [copy for copy in copies if copy.is_static]
        self.nbytes = sum(copy.nbytes for copy in self.moving)
        self.cache = OperandCache(self.moving, sizes, _device(self.moving), _contents(family, sizes))
        self._storage = _array(copy.storage for copy in self.moving)
        self._nbytes = _array(copy.nbytes for copy in self.moving)
        self._operand_bytes = _array(copy.operand_bytes for copy in self.moving)
        self._tier = _array(TIERS.index(tier) for tier in self.cache.tiers)
        classes = [c.origin.classes for c in self.moving]
        self._sources = np.array(classes, np.int64).reshape(len(classes), len(family.members))
        ways = [
            (c.destination.device, c.is_floating, c.is_direct, t)
            for c, t in zip(self.moving, self._tier, strict=True)
        ]
        numbers = {way: i for i, way in enumerate(dict.fromkeys(ways))}
        self._way = _array(numbers[way] for way in ways)
        makeups: dict[Makeup, Makeup] = {}
        self._makeups = [makeups.setdefault(c.makeup, c.makeup) for c in self.moving]
        self._structures: OrderedDict[tuple[tuple[str, ...], ...], _Structure] = OrderedDict()
        self._values: dict[Numbers, int] = {}
        self._next_value = count()
        self._together: list[tuple[np.ndarray, np.ndarray]] = []
        self._verified = np.zeros(len(self.moving), bool)
        self._intact = np.ones(len(self.moving), bool)
        self._volatile = np.zeros(len(self.moving), bool)
        self._statics_verified = False
        self._written = np.zeros(0, np.int64)
        parts = [part_count(copy.view) for copy in (*self.moving, *self._statics)]
        self._samplers = Sampler(parts), Sampler(parts)
        self._live = self._wanted(mixture)[0]

    @property
    def factor_bytes(self) -> int:
        """Memory of adapters' factors, which copies share."""
        kept = {id(copy.folded): copy.folded for copy in self.moving if copy.folded is not None}
        return sum(folded.factors.nbytes for folded in kept.values())

    def bytes_by_storage(self) -> dict[int, int]:
        """Bytes that a swap may write, by the address of the storage."""
        written: dict[int, int] = {}
        for copy in self.moving:
            written[copy.storage] = written.get(copy.storage, 0) + copy.nbytes
        return written

    def write_together(self, read: Set[int], lost: Set[int]) -> None:
        """Whenever a storage in `read` is written, all in `lost` are, too: their raw contents do not last."""
        members, volatile = (np.isin(self._storage, list(some)) for some in (read | lost, lost))
        if volatile.any():
            self._together.append((np.flatnonzero(members), np.flatnonzero(volatile)))
            self._volatile |= volatile
            self._intact[volatile] = False

    def change_to(self, mixture: Mixture) -> Change:
        """What must be written. Raises ConfigError for a mixture that the family cannot give; nothing is touched."""
        wanted, group = self._wanted(mixture)
        changed = wanted != self._live
        self._follow(changed)
        rows = np.flatnonzero(changed)
        numbers = {value: key for key, value in self._values.items()}
        alike = np.stack([group[rows], wanted[rows], self._way[rows]])
        _, first, which = np.unique(alike, axis=1, return_index=True, return_inverse=True)
        which = which.reshape(-1)
        writes = [Write(rows[which == i], numbers[int(wanted[rows[at]])]) for i, at in enumerate(first)]
        return Change(mixture, tuple(writes), len(self.moving) - len(rows))

    def write(self, change: Change) -> dict[str, int]:
        """Write what `change` says; returns the bytes of operands that were read, by tier.

        When it raises, what was to be written counts as unknown: the next change writes it again.
        """
        rows = np.concatenate([write.copies for write in change.writes] or [np.zeros(0, np.int64)])
        self._written = rows
        self._live[rows] = UNKNOWN
        self._verified[rows] = False
        self._intact[self._volatile] = False
        self.cache.refresh()
        read: dict[str, int] = dict.fromkeys([*TIERS], 0)
        filled = np.zeros_like(self.cache.filled)
        sums: list[Sum] = []
        for write in change.writes:
            used = self._used_slots(write)
            self._count(write, used, read)
            filled[write.copies] |= used
            gpu = self._sums.gpu(self.moving[write.copies[0]].destination.device)
            if gpu is None:
                sums += (Sum(self.moving[i], write.numbers, self._slots(i)) for i in write.copies)
            else:
                self._write_on_gpu(gpu, write, used)
        self._sums.cpu.write(sums)
        if read["disk"]:
            self._sums.reader.check_unchanged()  # before other engines may use what was read
            self._sums.reader.let_go()  # between swaps the system may take the page cache for itself
        self.cache.mark_filled(filled & (self._tier != TIERS.index("disk"))[:, None])
        for write in change.writes:
            self._live[write.copies] = self._value(write.numbers)
        self._intact[rows] = True
        return read

    def bytes_written(self, change: Change) -> int:
        return sum(int(self._nbytes[write.copies].sum()) for write in change.writes)

    def storages(self, change: Change) -> set[int]:
        """Addresses of the storages that the change writes into."""
        return {int(address) for write in change.writes for address in np.unique(self._storage[write.copies])}

    def mismatches(self, *, sample: bool) -> list[str]:
        """Tensors whose destinations do not hold, bit for bit, what the reference makes of the original files.

        Looks at all that was not found right since it was written. With `sample` at parts, of bounded number and size,
        of what was written last and of what was left as it was: others each time, so that in the end all are looked
        at (see Sampler). A fault in few elements may then be missed.
        """
        if sample:
            return self._sampled_mismatches()
        numbers = {value: key for key, value in self._values.items()}
        bad = []
        for i in np.flatnonzero(~self._verified & self._intact):
            copy = self.moving[i]
            if differs(copy, numbers[int(self._live[i])], self._sums.reader):
                bad.append(copy.origin.name)
            else:
                self._verified[i] = True
        if not self._statics_verified:
            wrong = [c.origin.name for c in self._statics if differs(c, _one_hot(c), self._sums.reader)]
            bad += wrong
            self._statics_verified = not wrong
        return bad

    def forget(self) -> None:
        """Nothing is known of the destinations any more: the next change writes them all."""
        self._live[:] = UNKNOWN

    def close(self) -> None:
        """Free the cache and close the files; safe to call twice. The plan is not used any more."""
        self.cache.close()
        self._sums.close()

    def _sampled_mismatches(self) -> list[str]:
        left = self._intact & (self._live != UNKNOWN)
        left[self._written] = False
        statics = np.arange(len(self._statics)) + len(self.moving)
        of_written, of_rest = self._samplers
        chosen = of_written.choose(self._written, SAMPLED_WRITTEN)
        chosen += of_rest.choose(np.concatenate([np.flatnonzero(left), statics]), SAMPLED_REST)
        numbers = {value: key for key, value in self._values.items()}
        parts = []
        for i, part in chosen:
            static = i >= len(self.moving)
            copy = self._statics[i - len(self.moving)] if static else self.moving[i]
            parts.append(Part(copy, _one_hot(copy) if static else numbers[int(self._live[i])], part))
        return differing(parts, self._sums.reader)

    def _follow(self, changed: np.ndarray) -> None:
        """Add the destinations that must be written because others are."""
        before = UNKNOWN
        while before != changed.sum():
            before = changed.sum()
            for members, volatile in self._together:
                changed[volatile] |= changed[members].any()

    def _wanted(self, mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
        """For each destination the position in _values of what it should have, and its group."""
        if len(self._values) > MAX_VALUES:
            live = set(self._live.tolist())
            self._values = {key: value for key, value in self._values.items() if value in live}
        structure = self._structure(mixture.patterns)
        mixtures = group_mixtures(self._family, mixture, structure.groups)
        check_weights(self._family, mixtures, structure.groups)
        values = [
            self._value(numbers_of(self._family, mixtures[group], makeup))
            for group, makeup in structure.kinds
        ]
        return _array(values)[structure.kind], structure.group

    def _structure(self, patterns: tuple[tuple[str, ...], ...]) -> _Structure:
        found = self._structures.pop(patterns, None)
        if found is None:
            tensors = tuple(self._family.template.tensors)
            groups = tensor_groups(patterns, tensors)
            by_name = dict(zip(tensors, groups, strict=True))
            group = _array(by_name[copy.origin.name] for copy in self.moving)
            pairs = list(zip(group.tolist(), self._makeups, strict=True))
            kinds = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
            found = _Structure(groups, group, list(kinds), _array(kinds[pair] for pair in pairs))
        self._structures[patterns] = found
        if len(self._structures) > MAX_STRUCTURES:
            self._structures.popitem(last=False)
        return found

    def _value(self, numbers: Numbers) -> int:
        """What stands for these numbers in arrays."""
        if numbers not in self._values:
            self._values[numbers] = next(self._next_value)
        return self._values[numbers]

    def _used_slots(self, write: Write) -> np.ndarray:
        """bool (destinations of the write, operands): which operands are read, each by the first one equal to it."""
        sources = self._sources[write.copies]
        used = np.zeros(sources.shape, bool)
        used[np.arange(len(sources))[:, None], sources[:, used_operands(write.weights)]] = True
        return used

    def _count(self, write: Write, used: np.ndarray, read: dict[str, int]) -> None:
        tier = TIERS[self._tier[write.copies[0]]]
        kept = used & self.cache.filled[write.copies] & (tier != "disk")
        nbytes = self._operand_bytes[write.copies]
        read[tier] += int(kept.sum(1) @ nbytes)
        read["disk"] += int((used & ~kept).sum(1) @ nbytes)
        if scales := write.numbers.scales:
            folded = [copy for i in write.copies if (copy := self.moving[i]).folded is not None]
            at = "host" if folded[0].destination.device.type == "cpu" else "device"
            read[at] += sum(copy.folded.factors.used_bytes(scales) for copy in folded if copy.folded)

    def _slots(self, copy: int) -> dict[int, Slot]:
        found = {k: self.cache.slot(copy, k) for k in np.unique(self._sources[copy]).tolist()}
        return {
            k: Slot(slot, bool(self.cache.filled[copy, k])) for k, slot in found.items() if slot is not None
        }

    def _write_on_gpu(self, gpu: GpuSums, write: Write, used: np.ndarray) -> None:
        in_cache = self._tier[write.copies[0]] != TIERS.index("disk")
        empty = np.argwhere(used & ~self.cache.filled[write.copies]).tolist() if in_cache else []
        if empty:
            gpu.fill([self._empty(int(write.copies[row]), k) for row, k in empty])
        gpu.write(write.copies.tobytes(), lambda: [self._placed(int(i)) for i in write.copies], write.numbers)

    def _empty(self, i: int, k: int) -> Empty:
        slot = self.cache.slot(i, k)
        assert slot is not None
        return Empty(self.moving[i], k, slot)

    def _placed(self, i: int) -> Placed:
        copy = self.moving[i]
        slots = [self.cache.slot(i, k) for k in range(len(copy.origin.classes))]
        return Placed(copy, tuple(copy.view if slot is None else slot for slot in slots))


def _device(copies: Sequence[Copy]) -> torch.device:
    """Where most of the parameters are."""
    nbytes: dict[torch.device, int] = {}
    for copy in copies:
        nbytes[copy.destination.device] = nbytes.get(copy.destination.device, 0) + copy.nbytes
    return max(nbytes, key=nbytes.__getitem__) if nbytes else torch.device("cpu")


def _contents(family: Family, sizes: CacheSizes) -> list[str]:
    """Of each operand what its files hold, as far as can be told without reading them, and which files these are."""
    if not sizes.host:
        return []
    contents = [__version__]  # another one may lay slots out differently
    for member in family.members:
        files = {(str(tensor.path), str(tensor.file)) for tensor in member.tensors.values()}
        contents += [f"operand {fingerprint(member)}", *map(str, sorted(files))]
    return contents


def _one_hot(copy: Copy) -> Numbers:
    return Numbers((1.0,) + (0.0,) * (len(copy.origin.classes) - 1))


def _array(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), np.int64)
