"""The memory plan: what each byte of the device is for, before the server says that it is ready.

Everything but the KV pool has a size that is known or was measured while warming up; the pool takes
the rest (R9). Numbers go in, numbers come out: whoever owns the device measures and allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.errors import DeviceError

# Block 0 is scrap, and a sequence needs at least one block of its own.
BLOCKS_MIN = 2

MIB = 1 << 20


@dataclass(frozen=True)
class Room:
    """The device's memory, in bytes, at the moment when everything in `held` is allocated.

    Attributes:
        total: all there is.
        free: what the driver would still give to this process.
        cached: what the process's allocator holds without using it, and will use again.
    """

    total: int
    free: int
    cached: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """How many blocks the pool has, and the table: items in bytes that add up to all there is."""

    blocks: int
    pool_bytes: int
    items: tuple[tuple[str, int], ...]

    def table(self) -> str:
        """A line an item, in MiB."""
        rows = [*self.items, ("total", sum(count for _, count in self.items))]
        return "\n".join(f"{what:<22} {count / MIB:10.1f} MiB" for what, count in rows)


def graph_bytes(taken: list[int], sizes: int) -> int:
    """What the graphs of so many sizes take, by what some took one after the other.

    The largest takes memory to compute in, which others use again. The next does not quite fit into
    the gaps and takes some more. All others take what a graph itself takes, as the smallest shows.

    Args:
        taken: bytes of the largest, the next and the smallest; of all, where there are fewer.
    """
    return sum(taken) + sum(taken[-1:]) * (sizes - len(taken))


def plan_memory(
    room: Room,
    held: Mapping[str, int],
    coming: Mapping[str, int],
    *,
    block_bytes: int,
    fraction: float = 1.0,
    pool_bytes_max: int = 0,
    blocks_max: int = 0,
) -> MemoryPlan:
    """Divides the memory: what is held stays, what is coming is set aside, the pool gets the rest.

    Args:
        held: what is allocated by now, by name (weights, slots, staging, graphs, ...).
        coming: what will be allocated beside the pool, by name (activations, reserve, ...).
        block_bytes: keys and values of one block, all layers, on this rank.
        fraction: of the device's memory that may be in use in the end, by others included.
        pool_bytes_max: upper bound of the pool; 0: none.
        blocks_max: upper bound of the pool in blocks; 0: none.

    Raises:
        DeviceError: not even the smallest pool fits; the sentence has the whole table.
    """
    available = room.free + room.cached
    own = sum(held.values())
    # The driver, its context in this process, and other processes; the kernels' code as well.
    others = max(0, room.total - available - own)
    set_aside = sum(coming.values())
    left_free = int(room.total * (1 - fraction))
    rest = max(0, available - set_aside - left_free)
    bound = min(rest, pool_bytes_max) if pool_bytes_max else rest
    blocks = bound // block_bytes
    if blocks_max:
        blocks = min(blocks, blocks_max)
    pool = blocks * block_bytes
    items = [
        ("driver and others", others),
        *held.items(),
        *coming.items(),
        ("kv pool", pool),
        ("left free", available - set_aside - pool),
    ]
    if blocks < BLOCKS_MIN:
        table = ", ".join(f"{what} {count / MIB:.1f} MiB" for what, count in items)
        raise DeviceError(
            f"the KV pool may take {bound} bytes, which is less than {BLOCKS_MIN} blocks of "
            f"{block_bytes} bytes; of {room.total / MIB:.1f} MiB: {table}"
        )
    return MemoryPlan(blocks, pool, tuple((what, count) for what, count in items if count))
