"""One look at a folder instead of one at each of its files: on an object store a request for a thousand of them."""

from functools import cached_property

from pipeline.storage import Root


class Listing:
    """The files of a folder as they were when it was first asked; one that was missing is looked for by its name."""

    def __init__(self, root: Root, folder: str) -> None:
        self._root, self._folder = root, folder

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self._root.sizes(self._folder)

    def has(self, name: str, size: int) -> bool:
        """Whether a file of the folder is there with its size."""
        return self._sizes.get(name) == size or self._root.size(f"{self._folder}/{name}") == size
