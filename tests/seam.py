"""What the tests of the storage seam share: a root in memory, one flipped bit, a job that is quicker."""

from pathlib import Path

from pipeline.storage import Disk, Root
from tests.faults.simulated import Odds, SimDisk, World


def simulated(fence=1):
    """A root in memory, on which nothing goes wrong by itself."""
    return Root(Path("/root"), fence, SimDisk(World(0, Odds(0, 0, 0, 0))))


def flipped(data, bit):
    """The bytes with one bit changed."""
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


class Quicker(Disk):
    """Just before a file is made, another job was there."""

    def __init__(self, act):
        self.act = act

    def link(self, source, target):
        act, self.act = self.act, lambda: None
        act()
        super().link(source, target)
