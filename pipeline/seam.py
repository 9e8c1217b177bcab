"""What storage must do, and how a place in it is called: a folder's path, or an object's URL."""

from collections.abc import Collection, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Protocol, TypeAlias


class Location(PurePosixPath):
    """Where an object lies: `s3://bucket/name`. It has no method that would take it for a file of this machine."""

    def __str__(self) -> str:
        """The URL."""
        return super().__str__().replace(":/", "://", 1)

    def resolve(self) -> "Location":
        """The same: object stores have no links."""
        return self


Place: TypeAlias = Path | Location
Stamp: TypeAlias = list[Any]
"""Changes when a file does: its size, and its time in nanoseconds or the store's ETag."""


class Backend(Protocol):
    """What storage must do. Each call is one step, which may fail by itself with OSError."""

    at_once: int
    """Files that are read side by side where there are many: as many as hide the waiting."""

    def put(self, path: PurePath, data: bytes) -> None:
        """Make a file of these bytes, not yet durable."""

    def sync(self, path: PurePath) -> None:
        """Bring a file's bytes to disk."""

    def replace(self, source: PurePath, target: PurePath) -> None:
        """Rename; a target that exists is replaced."""

    def link(self, source: PurePath, target: PurePath) -> None:
        """Give a file a second name; FileExistsError where the name is taken."""

    def make_folder(self, folder: PurePath) -> None:
        """Make a folder and those above it, durable; no error where it exists."""

    def sync_folder(self, folder: PurePath) -> None:
        """Bring a folder's names to disk."""

    def get(self, path: PurePath) -> bytes:
        """A file's bytes; FileNotFoundError."""

    def digest(self, path: PurePath) -> str | None:
        """sha256 of a file's bytes, in hex; None where there is no file."""

    def names(self, folder: PurePath) -> list[str]:
        """Names in a folder; none where there is no folder."""

    def sizes(self, folder: PurePath) -> dict[str, int]:
        """Bytes of each file in a folder, by name, at one look; none where there is no folder."""

    def size(self, path: PurePath) -> int | None:
        """A file's bytes counted; None where there is no file."""

    def delete(self, path: PurePath) -> None:
        """Remove a file; no error where there is none."""

    def remove_folder(self, folder: PurePath) -> None:
        """Remove a folder and what is in it; no error where there is none."""

    def free(self, folder: PurePath) -> int:
        """Bytes that may still be written."""

    def draft_folder(self, folder: PurePath) -> Path:
        """Make a folder of this machine for drafts, that one or one in its place."""

    def local(self, path: PurePath) -> Path:
        """A file as one of this machine: itself, or a copy; FileNotFoundError."""

    def stamps(self, folder: PurePath, leave_out: Collection[str]) -> Mapping[str, Stamp]:
        """A stamp of every file below a folder, by its name there; none below the folders that are left out."""

    def unique(self) -> str:
        """A name that was never given before."""

    def clock(self) -> float:
        """Monotonic seconds."""

    def sleep(self, seconds: float) -> None:
        """Wait."""
