"""Memory that the ranks of a host share: each rank's part of it is mapped by all of them.

A region is a file in /dev/shm, which is memory. It never has a name, so that nothing is left behind however
and whenever a rank ends: the other ranks open it by way of the first one's /proc/PID/fd. Each rank reserves
its part beforehand, because a full /dev/shm would otherwise show as a crash at the first touch (a container
often has only 64 MB of it).
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distopt.backend import Array

__all__ = ["FOLDER", "Neighbours", "Region", "SharedMemory", "address_of"]

FOLDER = Path("/dev/shm")


class Neighbours(Protocol):
    """The ranks of one host, as far as making memory needs them."""

    @property
    def rank(self) -> int:
        """Number of this rank among them."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the root's value on all of them."""
        ...


@dataclass(frozen=True)
class Region:
    """Memory of which each rank of a host has a part.

    Attributes:
        number: counts the regions of a communicator.
        parts: bytes of each rank's part, by local rank, all of one length. They keep the memory mapped.
        start: address of this rank's own part.
    """

    number: int
    parts: list[Array]
    start: int


class SharedMemory:
    """The regions of one communicator.

    Args:
        neighbours: the ranks of this host.
        agree: given what went wrong here, or None, returns what went wrong anywhere, or None. Collective over
            all ranks that make regions together, on all hosts.

    Attributes:
        rank: number of this rank on its host.
        size: number of ranks on this host.
        problem: why the last region could not be made, or None.
    """

    def __init__(self, neighbours: Neighbours, agree: Callable[[str | None], str | None]) -> None:
        self._neighbours = neighbours
        self._agree = agree
        self.rank = neighbours.rank
        self.size = neighbours.size
        self.problem: str | None = None
        self._regions: list[Region] = []
        self._made = 0

    def make_region(self, part_bytes: int) -> Region | None:
        """Make a zeroed region with a part of at least `part_bytes` for each rank. Collective.

        Returns:
            The region; None on all ranks where it failed on any, with the reason in `problem`. It lives as
            long as the communicator, or as an array in it.
        """
        stride = -(-max(part_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        offered, file, problem = None, -1, None
        if self.rank == 0:
            offered, file, problem = _create(stride * self.size)
        offered = self._neighbours.broadcast_object(offered)
        mapped: mmap.mmap | None = None
        try:
            if self.rank != 0 and offered is not None:
                file, problem = _open(offered)
            if file >= 0:
                # Each rank its own: the pages then lie in the memory next to its cores.
                problem = _reserve(file, self.rank * stride, stride)
            self.problem = self._agree(problem)
            if self.problem is None:
                mapped, problem = _map(file, stride * self.size)
                self.problem = self._agree(problem)
        finally:
            if file >= 0:
                os.close(file)
        if self.problem is not None or mapped is None:
            return None
        parts = [
            np.frombuffer(mapped, np.uint8, stride, neighbour * stride) for neighbour in range(self.size)
        ]
        region = Region(self._made, parts, address_of(parts[self.rank]))
        self._made += 1
        return region

    def allocate(self, size: int, dtype: np.dtype[Any]) -> Array | None:
        """Return this rank's part of a new region, zeroed, [size]; None where that failed. Collective."""
        region = self.make_region(size * dtype.itemsize)
        if region is None:
            return None
        self._regions.append(region)
        return region.parts[self.rank][: size * dtype.itemsize].view(dtype)

    def locate(self, flat: Array) -> tuple[Region, int] | None:
        """Return the region that an array lies in, and how many bytes after its start; None if in none."""
        if not self._regions:
            return None
        address = address_of(flat)
        for region in self._regions:
            offset = address - region.start
            if offset >= 0 and offset + flat.nbytes <= region.parts[0].size:
                return region, offset
        return None

    def views(self, flat: Array) -> list[Array] | None:
        """Return what each rank of the host has at the place of `flat`, or None outside of regions."""
        found = self.locate(flat)
        if found is None:
            return None
        region, offset = found
        return [part[offset : offset + flat.nbytes].view(flat.dtype) for part in region.parts]

    def view(self, rank: int, number: int, offset: int, size: int, dtype: np.dtype[Any]) -> Array:
        """Return what a rank of the host has at a place of a region, [size].

        Args:
            rank: whose, on this host.
            number: of the region.
            offset: in bytes.
            size: number of elements.
            dtype: of the elements.
        """
        region = next(region for region in self._regions if region.number == number)
        return region.parts[rank][offset : offset + size * dtype.itemsize].view(dtype)

    def close(self) -> None:
        """Let go of the regions; arrays in them stay valid as long as they are referred to."""
        self._regions.clear()


def address_of(values: Array) -> int:
    """Return where an array of the host begins."""
    return int(values.__array_interface__["data"][0])


@dataclass(frozen=True)
class _Offered:
    """A file of the first rank: by which way others open it, and what they must find there."""

    path: str
    device: int
    inode: int


def _create(total_bytes: int) -> tuple[_Offered | None, int, str | None]:
    """Return a new file and its descriptor, or what was wrong."""
    if sys.platform != "linux":
        return None, -1, f"shared memory is made by {FOLDER}, which {sys.platform} does not have"
    file = -1
    try:
        file = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.ftruncate(file, total_bytes)
        found = os.fstat(file)
    except OSError as error:
        if file >= 0:
            os.close(file)
        return None, -1, f"{FOLDER}: {error.strerror}"
    return _Offered(f"/proc/{os.getpid()}/fd/{file}", found.st_dev, found.st_ino), file, None


def _open(offered: _Offered) -> tuple[int, str | None]:
    """Open the file that the first rank made; where processes can't be seen, this fails."""
    try:
        file = os.open(offered.path, os.O_RDWR)
    except OSError as error:
        return -1, f"{offered.path} of the first rank of this host can't be opened: {error.strerror}"
    found = os.fstat(file)
    if (found.st_dev, found.st_ino) != (offered.device, offered.inode):  # another container's numbers
        os.close(file)
        return -1, f"{offered.path} is another process's: the ranks of this host don't see each other's"
    return file, None


def _reserve(file: int, start: int, length: int) -> str | None:
    try:
        os.posix_fallocate(file, start, length)
    except OSError as error:
        return f"{FOLDER} has no room for {_size(length)} more: {error.strerror}"
    return None


def _size(length: int) -> str:
    return f"{length / 2**20:.1f} MiB" if length >= 1 << 20 else f"{length / 1024:g} KiB"


def _map(file: int, length: int) -> tuple[mmap.mmap | None, str | None]:
    try:
        return mmap.mmap(file, length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), None
    except (OSError, ValueError) as error:
        return None, f"{_size(length)} of {FOLDER} can't be mapped: {error}"
