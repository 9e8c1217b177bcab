"""Object stores in a folder's place: `root: s3://bucket/name`; gs:// and az:// by the same code.

A file is one object and appears by one PUT; put-if-absent is a PUT under a condition (If-None-Match), which a run tries
before it relies on it. Nothing is renamed: drafts are bytes in memory, or files of this machine that are sent when they
are whole. Lance reads and writes its tables by itself; it and this module take address and credentials from the
environment, and nothing else.
"""

import hashlib
import logging
import random
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pipeline import storage
from pipeline.cloud import BACKOFF, MAX_BACKOFF, RETRIES, SECONDS, environment, options
from pipeline.errors import PipelineError, SpecError
from pipeline.seam import Location, Stamp
from pipeline.sentences import masked
from pipeline.storage import KEPT, STATE, Disk, Root, sha256

log = logging.getLogger(__name__)
T = TypeVar("T")

STORES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
PART = re.compile(r"[A-Za-z0-9_.=+,-]+")
"""Other characters have more than one spelling in URLs and keys."""
TRIES = RETRIES
"""Of a call that the library must not repeat by itself (a delete, a PUT under a condition), in SECONDS at most."""
UPLOAD_BYTES, UPLOADS = 16 * 2**20, 4
"""Part of a large file, and how many are on the way at once: 64 MiB of memory."""
ABSENT = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist")
ELSEWHERE = re.compile(
    r"LanceError\(IO\)|object.?store|Generic (S3|GCS|MicrosoftAzure) error|error sending request", re.I
)
"""What Lance says where the store failed it."""


class StoreError(PipelineError, OSError):
    """The store cannot be reached, or fails for longer than it is asked again; run again."""


class RefusedError(SpecError, OSError):
    """The store refuses: credentials, permission, a bucket that is not there."""


def located(root: str | Path) -> Root:
    """The root of a spec: an object store where a URL is given, else a folder. SpecError for a URL of another kind."""
    if "://" not in str(root):
        return Root(Path(root))
    shown = masked(str(root))
    scheme, _, rest = str(root).partition("://")
    parts = [part for part in rest.split("/") if part]
    if scheme not in STORES or not parts:
        raise SpecError(
            f"root {shown}: name a folder or an object store: {', '.join(f'{one}://bucket' for one in STORES)}"
        )
    for part in parts:
        if not PART.fullmatch(part) or part in (".", ".."):
            raise SpecError(f"root {shown}: its parts may have letters, digits and _ . = + , - only")
    return Root(Location(f"{scheme}://{'/'.join(parts)}"), disk=Bucket())


def prepare(root: Root) -> None:
    """Make a root ready to be written; SpecError where it cannot be, or where put-if-absent replaces."""
    storage.prepare(root)
    if isinstance(root.disk, Bucket):
        root.disk.probe(root / f"{STATE}/probe-{root.disk.unique()}")


@contextmanager
def reaching(root: Root) -> Iterator[None]:
    """What Lance raises where the store fails becomes one StoreError."""
    try:
        yield
    except PipelineError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if not isinstance(root.path, Location) or not is_of_a_store(error):
            raise
        raise StoreError(f"{root.path}: {_reason(error)}; run again, what is finished is kept") from error


def insisting(root: Root, call: Callable[[], T]) -> T:
    """Call Lance, and again where a store failed it: it does not repeat a PUT under a condition by itself.

    The call has to look first at what is done, since the reply may be lost where the work is not.
    """
    until, tries = time.monotonic() + SECONDS, 1
    while True:
        try:
            return call()
        except PipelineError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            in_bucket = isinstance(root.path, Location) and (is_of_a_store(error) or "conflict" in str(error))
            if not in_bucket or tries == TRIES or time.monotonic() > until:
                raise
            log.warning("bucket tries again after try=%d: %s", tries, _reason(error))
        root.disk.sleep(_pause(tries))
        tries += 1


def is_of_a_store(error: BaseException) -> bool:
    """Whether an error of Lance is one of reaching an object store."""
    return ELSEWHERE.search(str(error)) is not None


class Bucket(Disk):
    """An object store's storage. Places are `Location`s; paths are drafts and copies on this machine.

    Drafts of our own are held in memory until they get their name. A copy in another process begins empty.
    """

    at_once = 32

    def __init__(self) -> None:
        self._stores: dict[str, Any] = {}
        self._drafts: dict[PurePath, bytes] = {}
        self._scratch: Path | None = None

    def __reduce__(self) -> tuple[type["Bucket"], tuple[()]]:
        """Nothing of it goes to another process."""
        return Bucket, ()

    def probe(self, path: PurePath) -> None:
        """Write an object twice, put-if-absent; SpecError where the second does not fail."""
        where = f"root {path.parent.parent}"
        try:
            self._create(path, b"first")
            try:
                self._create(path, b"second")
            finally:
                self.delete(path)
        except FileExistsError:
            return
        except StoreError as error:
            if "NotImplemented" not in str(error):
                raise
        raise RefusedError(
            f"{where}: this endpoint does not keep the condition of a PUT (If-None-Match: *), by which one job at a "
            "time holds a root; use a store that does, or a folder"
        )

    def put(self, path: PurePath, data: bytes) -> None:
        """Hold the bytes of a draft."""
        self._drafts[path] = data

    def sync(self, path: PurePath) -> None:
        """Nothing: what was sent is durable, and what was not need not be."""

    def sync_folder(self, folder: PurePath) -> None:
        """Nothing: a store lists what it has."""

    def make_folder(self, folder: PurePath) -> None:
        """Nothing: folders of a store are only names."""

    def replace(self, source: PurePath, target: PurePath) -> None:
        """Send a draft, or a file of this machine, which is gone then; copy an object and delete it."""
        if source in self._drafts:
            self._put(target, self._drafts.pop(source))
        elif isinstance(source, Location):
            self._ask(target, lambda store: _library().copy(store, _key(source), _key(target)))
            self.delete(source)
        else:
            self._put(target, Path(source))
            Path(source).unlink()

    def link(self, source: PurePath, target: PurePath) -> None:
        """Make an object of a draft's bytes; FileExistsError where the name is taken by others."""
        self._create(target, self._drafts[source])

    def get(self, path: PurePath) -> bytes:
        """An object's bytes, or a file's; FileNotFoundError."""
        if not isinstance(path, Location):
            return super().get(path)
        return self._ask(path, lambda store: bytes(_library().get(store, _key(path)).bytes()))

    def digest(self, path: PurePath) -> str | None:
        """sha256 of an object's bytes, or of a file's; None where there is none."""
        if not isinstance(path, Location):
            return super().digest(path)
        try:
            return self._ask(path, lambda store: _hashed(_library().get(store, _key(path))))
        except FileNotFoundError:
            return None

    def names(self, folder: PurePath) -> list[str]:
        """Names right below a folder."""
        found = self._ask(folder, lambda store: _library().list_with_delimiter(store, _key(folder)))
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return [str(path).rstrip("/").rpartition("/")[2] for path in paths]

    def sizes(self, folder: PurePath) -> dict[str, int]:
        """Bytes of each object right below a folder, by name."""
        found = self._ask(folder, lambda store: _library().list_with_delimiter(store, _key(folder)))
        return {one["path"].rpartition("/")[2]: int(one["size"]) for one in found["objects"]}

    def size(self, path: PurePath) -> int | None:
        """An object's bytes counted, or a file's; None where there is none."""
        if not isinstance(path, Location):
            return super().size(path)
        try:
            return int(self._ask(path, lambda store: _library().head(store, _key(path)))["size"])
        except FileNotFoundError:
            return None

    def delete(self, path: PurePath) -> None:
        """Remove an object, or a draft; no error where there is none."""
        if not isinstance(path, Location):
            super().delete(path)
        elif self._drafts.pop(path, None) is None:
            with suppress(FileNotFoundError):
                self._ask(path, lambda store: _library().delete(store, _key(path)))

    def remove_folder(self, folder: PurePath) -> None:
        """Remove what lies below, and drafts on this machine that stand for it."""
        if not isinstance(folder, Location):
            super().remove_folder(folder)
            return
        for name in self.stamps(folder, ()):
            self.delete(folder / name)
        if self._scratch is not None:
            super().remove_folder(self._beside(folder))

    def free(self, folder: PurePath) -> int:
        """As much as anyone can count."""
        return 2**63 - 1

    def draft_folder(self, folder: PurePath) -> Path:
        """A folder of this machine; gone with the process at the latest."""
        made = self._beside(folder)
        made.mkdir(parents=True)
        return made

    def local(self, path: PurePath) -> Path:
        """A copy on this machine, gone with the process; one of an object that is named by its sha256 is used again."""
        is_kept = path.parent.name == PurePath(KEPT).name
        copy = self._beside(path if is_kept else path / self.unique())
        if is_kept and copy.is_file() and sha256(copy) == path.name:
            return copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        draft = copy.with_name(self.unique())
        self._ask(path, lambda store: _saved(_library().get(store, _key(path)), draft))
        return draft.rename(copy)

    def stamps(self, folder: PurePath, leave_out: Collection[str]) -> Mapping[str, Stamp]:
        """Size and ETag of every object below a folder, hidden ones apart."""
        chunks = self._ask(folder, lambda store: list(_library().list(store, _key(folder), chunk_size=1000)))
        skipped = len(_key(folder) + "/") if _key(folder) else 0
        found = {one["path"][skipped:]: [one["size"], one["e_tag"]] for chunk in chunks for one in chunk}
        hidden = re.compile("|".join([r"(.*/)?\.[^/]*", *(f"{re.escape(name)}/.*" for name in leave_out)]))
        return {name: found[name] for name in sorted(found) if not hidden.fullmatch(name)}

    def _put(self, target: PurePath, data: bytes | Path) -> None:
        sent = {"chunk_size": UPLOAD_BYTES, "max_concurrency": UPLOADS}
        self._ask(target, lambda store: _library().put(store, _key(target), data, **sent), writes=True)

    def _create(self, target: PurePath, data: bytes) -> None:
        """PUT under the condition that there is nothing; FileExistsError where other bytes stand.

        Where our own stand, a reply was lost on the way and the PUT had been done.
        """
        taken = _library().exceptions.AlreadyExistsError
        try:
            self._ask(target, lambda store: _library().put(store, _key(target), data, mode="create"), writes=True)
        except taken:
            if self.get(target) != data:
                raise FileExistsError(str(target)) from None

    def _ask(self, path: PurePath, call: Callable[[Any], T], writes: bool = False) -> T:
        """One call, tried again where that may help. FileNotFoundError, RefusedError, StoreError."""
        errors = _library().exceptions
        until, tries = time.monotonic() + SECONDS, 0
        while True:
            tries += 1
            try:
                return call(self._store(path))
            except (errors.AlreadyExistsError, PipelineError):
                raise
            except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
                raise RefusedError(f"{path}: the store refuses these credentials: {_reason(error)}") from None
            except (errors.BaseError, OSError, ValueError) as error:
                if any(word in str(error) for word in ABSENT) or (writes and isinstance(error, FileNotFoundError)):
                    raise RefusedError(
                        f"{path}: there is no bucket {path.parts[1]}; make it, or name another"
                    ) from None
                if isinstance(error, FileNotFoundError):
                    raise
                is_spent = f"after {RETRIES} retries" in str(error) or time.monotonic() > until
                if tries == TRIES or is_spent:
                    told = f"{path}: the store fails: {_reason(error)}; run again, what is finished is kept"
                    raise StoreError(told) from error
            self.sleep(_pause(tries))

    def _store(self, path: PurePath) -> Any:
        scheme, bucket = path.parts[0].rstrip(":"), path.parts[1]
        if f"{scheme}:{bucket}" not in self._stores:
            self._stores[f"{scheme}:{bucket}"] = _opened(scheme, bucket)
        return self._stores[f"{scheme}:{bucket}"]

    def _beside(self, path: PurePath) -> Path:
        """Where this machine holds what stands for a place."""
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="matryoshka-"))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        return self._scratch.joinpath(*path.parts[1:])


def _library() -> Any:
    try:
        import obstore  # takes time, and only object stores need it
        import obstore.exceptions
    except ModuleNotFoundError:
        told = "object stores need the package obstore: pip install 'matryoshka-pipeline[cloud]'"
        raise SpecError(told) from None
    return obstore


def _opened(scheme: str, bucket: str) -> Any:
    from datetime import timedelta

    import obstore.store

    environment(scheme)
    backoff = {"init_backoff": timedelta(seconds=BACKOFF), "max_backoff": timedelta(seconds=MAX_BACKOFF), "base": 2}
    retry = {"backoff": backoff, "max_retries": RETRIES, "retry_timeout": timedelta(seconds=SECONDS)}
    return getattr(obstore.store, STORES[scheme])(bucket, retry_config=retry, client_options=options(scheme))


def _pause(tries: int) -> float:
    """Seconds before the next try, drawn at random, so that not all come at once."""
    return random.uniform(0, min(MAX_BACKOFF, BACKOFF * 2.0**tries))  # noqa: S311 - nothing secret


def _key(path: PurePath) -> str:
    return "/".join(path.parts[2:])


def _hashed(found: Any) -> str:
    digest = hashlib.sha256()
    for block in found.stream():
        digest.update(block)
    return digest.hexdigest()


def _saved(found: Any, path: Path) -> None:
    with path.open("wb") as file:
        for block in found.stream():
            file.write(block)


def _reason(error: BaseException) -> str:
    """The first line of a library's error, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
