"""Does the suite notice? One fsync, rename, check or fence is taken out at a time; some test must fail each time.

    python -m tests.faults.mutations [--only NAME]

A mutation is one piece of text of one file, and what stands there instead. Each is made in a copy of the checkout, in
which a quick part of the suite runs until something fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
COPIED = ("pipeline", "tests", "pyproject.toml", "README.md")
SECONDS = 300
"""A run that takes longer counts as failed: what never ends is noticed too."""
TESTS = tuple(f"tests/test_{name}.py" for name in ("storage", "ledger", "store", "stopping", "merge"))
NEXT_TO = {
    "storage.py": "storage",
    "merge.py": "merge",
    "lock.py": "storage",
    "ledger.py": "ledger",
    "stopping.py": "stopping",
}
"""Whose tests are asked first."""
SCHEDULES = ("-m", "tests.faults.schedules", "--count", "400")
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line")


@dataclass(frozen=True)
class Mutation:
    """A text that occurs once in a file of the package, and the one in its place."""

    name: str
    file: str
    old: str
    new: str


STORAGE = [
    # fsync
    ("a draft is not synced", "self.disk.sync(draft)  # a failed", "pass  # a failed"),
    (
        "write does not sync the folder",
        "        self.disk.sync_folder(target.parent)\n\n    def create(",
        "\n    def create(",
    ),
    (
        "create does not sync the folder",
        "        self.disk.sync_folder(target.parent)\n        return made",
        "        return made",
    ),
    (
        "adopt does not sync the folder",
        "        self.disk.replace(draft, target)\n        self.disk.sync_folder(target.parent)",
        "        self.disk.replace(draft, target)",
    ),
    (
        "set_aside does not sync the folder",
        "        self.disk.sync_folder((self / name).parent)\n",
        "",
    ),
    ("keep does not sync what another wrote", "self.disk.sync_folder(self / KEPT)", "pass"),
    ("keep_file does not sync", "        self.disk.sync(draft)\n        digest = sha256", "        digest = sha256"),
    (
        "a new folder's name is not synced",
        "        Path(folder).mkdir(exist_ok=True)\n        _fsync(folder.parent)",
        "        Path(folder).mkdir(exist_ok=True)",
    ),
    (
        "sync does nothing",
        '"""Bring a file\'s bytes to disk."""\n        _fsync(path)',
        '"""Bring a file\'s bytes to disk."""',
    ),
    (
        "sync_folder does nothing",
        '"""Bring a folder\'s names to disk."""\n        _fsync(folder)',
        '"""Bring a folder\'s names to disk."""',
    ),
    # rename and link
    (
        "write without a draft",
        "self.disk.replace(self._draft(data), target)",
        "self.disk.put(target, data); self.disk.sync(target)",
    ),
    ("create replaces", "self.disk.link(draft, target)", "self.disk.replace(draft, target)"),
    ("create without a draft", "self.disk.link(draft, target)", "self.disk.put(target, data); self.disk.sync(target)"),
    ("link replaces", "        os.link(source, target)", "        Path(source).replace(target)"),
    (
        "adopt copies",
        "        self.disk.replace(draft, target)\n",
        "        self.disk.put(target, self.disk.get(draft))\n",
    ),
    (
        "a failed draft is left",
        "        except OSError:\n            self.disk.delete(draft)\n            raise",
        "        except OSError:\n            raise",
    ),
    (
        "create leaves its draft",
        "        finally:\n            self.disk.delete(draft)\n        self",
        "        finally:\n            pass\n        self",
    ),
    (
        "whoever has no number loses its draft",
        "                if self.fence:\n                    raise\n",
        "                raise\n",
    ),
    # checks
    (
        "the checksum of a signed value is not compared",
        'whole = _unsigned_digest(data, value["checksum"]) == value["checksum"]',
        'whole = isinstance(value["checksum"], str)',
    ),
    (
        "a signed value is compared as a value",
        'whole = _unsigned_digest(data, value["checksum"]) == value["checksum"]',
        "whole = value == signed(value)",
    ),
    (
        "kept bytes are not compared",
        "if data is None or hashlib.sha256(data).hexdigest() != digest:",
        "if data is None:",
    ),
    (
        "has only looks for the name",
        "return self.disk.digest(self / kept_name(digest)) == digest",
        "return self.size(kept_name(digest)) is not None",
    ),
    ("keep trusts the name", "if self.has(digest):", "if self.size(kept_name(digest)) is not None:"),
    ("names may go up", 'part in ("", ".", "..")', 'part in ("", ".")'),
    ("names may be absolute", 'part in ("", ".", "..")', 'part in (".", "..")'),
    ("names may have drives", 'c in name for c in "\\\\\\0:"', 'c in name for c in "\\\\\\0"'),
    ("delete follows links", "if not path.parent.resolve().is_relative_to(self.path.resolve()):", "if False:"),
    (
        "drafts of others are dropped",
        'folder = self / f"{DRAFTS}/{fence}"\n        if fence:',
        "folder = self / DRAFTS\n        if fence:",
    ),
]
LOCK = [
    (
        "another job's later claim is not seen",
        " or highest(root) != held.fence:\n        raise _refused(root, _owner",
        ":\n        raise _refused(root, _owner",
    ),
    (
        "a claim may be made twice",
        "if not _claimed(root, held.fence, to_json(signed(claim))) or",
        "_claimed(root, held.fence, to_json(signed(claim)))\n    if",
    ),
    (
        "a process number tells a process",
        "return _started(self.process) == self.started",
        "return _started(self.process) is not None",
    ),
    ("a dead process that is not reaped lives", 'None if fields[0] in "ZX" else fields[19]', "fields[19]"),
    (
        "a dead holder is not taken over",
        "dead = owner is None or (not owner.is_alive() if",
        "dead = owner is None or (False if",
    ),
    ("a living holder is taken over", "    if not dead:\n        raise _refused(root, owner)\n", ""),
    (
        "a holder elsewhere is judged by this host's processes",
        "not owner.is_alive() if owner.is_here() else _stands_still(root, last, owner)",
        "not owner.is_alive()",
    ),
    ("a moving counter is not seen", "root.read(_beat(fence)) != seen or root.size", "root.size"),
    (
        "an ended holder is waited for",
        "root.read(_beat(fence)) != seen or root.size(_ended(fence)) is not None:",
        "root.read(_beat(fence)) != seen:",
    ),
    (
        "a presumed death is not noted",
        '"presumed_dead": owner is not None and not owner.is_here()',
        '"presumed_dead": False',
    ),
    ("check sees no other", "    if highest(held) != held.fence:\n", "    if False:\n"),
    ("earlier claims stay", "for name in (_beat(fence), _ended(fence), _claim(fence)):", "for name in ():"),
    ("the highest claim goes", "        if fence < held.fence:\n", "        if fence <= held.fence:\n"),
    ("a released lock is not free", "    held.create(_ended(held.fence), to_json(signed({})))\n", ""),
    ("drafts outlive the holder", "    held.drop_drafts(held.fence)\n", ""),
    ("nothing beats", "            beat_once(held, count)", "            pass"),
]
LEDGER = [
    (
        "the last record wins",
        "if self.root.create(name, data):",
        "if self.root.write(name, data) is None:",
    ),
    (
        "add tells its own record",
        "        found = self.read(slot)\n        assert found is not None\n        return found",
        "        return record",
    ),
    (
        "a damaged record's name opens again",
        '            log.warning("ledger redo=%s because=%s", name, error)\n'
        "            return Slot(_edition(name, edition + 1))",
        "            return Slot(_edition(name, edition))",
    ),
    (
        "an unsound record's name opens again",
        'gone or damaged", name)\n            return Slot(_edition(name, edition + 1))',
        'gone or damaged", name)\n            return Slot(_edition(name, edition))',
    ),
    ("an unsound record is done", "        if not is_sound(record):\n", "        if False:\n"),
    ("newest knows no editions", "int(edition or 0))\n", "0)\n"),
    ("begun reads one copy", "    return read_signed(root, JOB_COPY)\n", "    return None\n"),
    ("a lost copy is not restored", "for name in (JOB_COPY, JOB):", "for name in (JOB,):"),
    (
        "begin replaces",
        "root.create(JOB_COPY, to_json(signed(wanted)))",
        "root.write(JOB_COPY, to_json(signed(wanted))); root.write(JOB, to_json(signed(wanted)))",
    ),
    (
        "other settings are not refused",
        "    refuse_changes(root, standing, wanted)\n    return standing",
        "    return standing",
    ),
    ("a lower fence is the newest", 'found["fence"] >= newest["fence"]', "True"),
    ("an equal fence is void", 'found["fence"] >= newest["fence"]', 'found["fence"] > newest["fence"]'),
    ("publish without a fence", '"fence": held.fence', '"fence": 0'),
    (
        "publish replaces",
        'if held.create(f"{GENERATIONS}/{number}.json", data):',
        'if held.write(f"{GENERATIONS}/{number}.json", data) is None:',
    ),
    (
        "publish does not ask who was first",
        'if held.create(f"{GENERATIONS}/{number}.json", data):',
        'if held.create(f"{GENERATIONS}/{number}.json", data) is not None:',
    ),
    (
        "settle looks once",
        "        root.write(MANIFEST, manifest)",
        "        root.write(MANIFEST, manifest)\n        return",
    ),
    (
        "settle does not look at copies again",
        "if root.read(MANIFEST) == manifest and not changed:",
        "if root.read(MANIFEST) == manifest:",
    ),
    ("settle trusts what is there", "if root.read(name) != root.kept(digest)]", "if root.size(name) is None]"),
]
STORE = [
    ("data files are not synced", '        root.disk.sync(draft / "data" / path)\n', ""),
    ("a commit is not synced", "    sync_table(root, table)\n    return version", "    return version"),
    ("sync_table syncs no file", "            root.disk.sync(Path(below, name))", "            pass"),
    ("sync_table syncs no folder", "        root.disk.sync_folder(Path(below))", "        pass"),
    (
        "no note of data files",
        '    root.create(f"{MOVES}/{root.fence}-{root.disk.unique()}.json", to_json(signed(note)))\n',
        "",
    ),
    (
        "a note after its files",
        '    root.create(f"{MOVES}/{root.fence}-{root.disk.unique()}.json", to_json(signed(note)))\n'
        "    for path in files:\n"
        '        root.disk.sync(draft / "data" / path)\n'
        '        root.adopt(draft / "data" / path, data_name(table, path))\n',
        "    for path in files:\n"
        '        root.disk.sync(draft / "data" / path)\n'
        '        root.adopt(draft / "data" / path, data_name(table, path))\n'
        '    root.create(f"{MOVES}/{root.fence}-{root.disk.unique()}.json", to_json(signed(note)))\n',
    ),
    ("a short write of Lance is not seen", "    if written != data.num_rows:\n", "    if False:\n"),
    (
        "leftovers are not deleted for sure",
        "            root.disk.sync_folder(root / f\"{table_name(note['table'])}/data\")",
        "            pass",
    ),
    (
        "a note goes before its record is there for sure",
        "        root.disk.sync_folder(folder)  # the record",
        "        pass  # the record",
    ),
    ("a note goes without its file", "if len(there) == len(leftover):", "if True:"),
    (
        "what has no record yet is dropped",
        "        if note is None or record is None:\n            continue\n",
        '        record = record or {"files": []}\n',
    ),
    (
        "what a record names is dropped",
        'set(note["files"]) - set(record["files"])',
        'set(note["files"])',
    ),
    ("leftovers stay", "            root.delete(path)\n        if there", "            pass\n        if there"),
    ("a commit of lost files", "        if not is_whole(root, table, fragments):\n", "        if False:\n"),
    (
        "a file that is there is whole",
        'there.has(file["path"], file["file_size_bytes"])',
        'root.size(data_name(table, file["path"])) is not None',
    ),
    ("any version has landed", "int(current.version) if _is_just(current, wanted) else None", "int(current.version)"),
    ("no version has landed", "version = None if afresh else _landed(uri, fragments)", "version = None"),
    (
        "a lost reply is an error",
        "            version = _landed(uri, fragments)  # the",
        "            version = None  # the",
    ),
    (
        "afresh does nothing",
        "version = None if afresh else _landed(uri, fragments)",
        "version = _landed(uri, fragments)",
    ),
    (
        "any version holds",
        "    return _is_just(open_table(table_uri(root, table), version), fragments)",
        "    return True",
    ),
    ("other files are not seen", " and [file.path for one in held for file in one.files] == paths", ""),
    ("deleted rows are not seen", "return not any(one.deletion_file for one in held) and [", "return ["),
    (
        "data files are not compared",
        "        if found != digest:\n            root.set_aside(name)\n            raise DamageError(f",
        "        if False:\n            raise DamageError(f",
    ),
    (
        "a damaged data file is not set aside",
        "            root.set_aside(name)\n            raise DamageError(f",
        "            raise DamageError(f",
    ),
]
OTHERS = [
    ("indexes of documents are not synced", "index.py", "    store.sync_table(root, DOCUMENTS)\n", ""),
    ("indexes of prefix tables are not synced", "index.py", "        store.sync_table(root, prefix.table)\n", ""),
    (
        "what is published is not compared with its records",
        "run.py",
        " and not store.holds(self.root, name, at.version, fragments[name]):",
        " and False:",
    ),
    ("an overtaken job publishes", "run.py", "        lock.check(self.root)\n", ""),
    ("nothing is published after a takeover", "run.py", " or lock.took_from_elsewhere(self.root):", ":"),
    ("a rerun publishes again", "run.py", "if newest is None or not _same(newest, candidate) or", "if True or"),
    ("nothing is settled", "run.py", "        ledger.settle(self.root)\n", ""),
    ("nothing is repaired", "run.py", "afresh = repair.run(root)", "afresh: set[str] = set()"),
    (
        "vectors are not compared before they are cut",
        "derive.py",
        "        store.check_files(root, DOCUMENTS, parent.files)\n",
        "",
    ),
    (
        "vectors are not compared before they are learned from",
        "fit.py",
        "        store.check_files(self._root, DOCUMENTS, self.parent.files)\n",
        "",
    ),
    (
        "published files are not compared",
        "repair.py",
        "if name not in seen or sha256(root / name) != digest:",
        "if name not in seen:",
    ),
    (
        "damaged files stay in place",
        "repair.py",
        "            if name in seen:\n                _set_aside(root, name)",
        "            pass",
    ),
    (
        "signed files are not compared",
        "repair.py",
        "if seen[name] != known.get(name) and not _is_whole(root, name):",
        "if False:",
    ),
    (
        "a changed file is trusted",
        "repair.py",
        "if name in seen and seen[name] == known.get(name):\n            continue",
        "if name in seen and name in known:\n            continue",
    ),
    ("a shard's rows are not counted", "embedder.py", "        if seen != shard.rows:\n", "        if False:\n"),
    ("a done shard is done again", "embedder.py", "if standing is None else standing", "if True else standing"),
    (
        "shards that are done are not looked at",
        "embed.py",
        "        slots = book.slots(names, _wholeness(root), _tally)\n",
        "        slots = [Slot(slot.name) for slot in book.slots(names, _wholeness(root))]\n",
    ),
]
MERGE = [
    ("merged shards stay", '        root.delete(f"{DATA}/{path}")\n', "        pass\n"),
    (
        "merged shards go before the merge is there for sure",
        "    root.disk.sync_folder(root / _book(root).folder)\n",
        "",
    ),
    ("merged shards do not go for sure", "    root.disk.sync_folder(root / DATA)\n", ""),
    (
        "shards of an earlier merge stay",
        "        _drop_shards(root, left)\n",
        "        pass\n",
    ),
    ("a done merge is done again", "if found is None else found", "if True else found"),
    ("shards are not compared before they are merged", "        store.check_files(self._root, DOCUMENTS, files)\n", ""),
    (
        "a lost fragment is whole",
        "slots(names, store.wholeness(root, DOCUMENTS), kept)",
        "slots(names, keep=kept)",
    ),
    ("a merge is taken for another group's", 'return f"{first}-{last}" if self.is_joint else first', "return first"),
    ("no group ends", "if not found or rows + shard.rows > store.FRAGMENT_ROWS:", "if not found:"),
]
STOPPING = [
    ("the first signal stops nothing", "    if not _state.patient:\n        raise Stopped(number)\n", ""),
    ("patience is interrupted", "    if not _state.patient:\n        raise", "    if True:\n        raise"),
    ("patience forgets the signal", "    if _state.number is not None and not _state.patient:\n", "    if False:\n"),
    ("an inner patience ends the outer one", "is not None and not _state.patient:\n", "is not None:\n"),
    ("no limit", "        reader.settimeout(LIMIT)\n", ""),
    (
        "the second signal is not seen",
        "        second = _next_signal(reader)",
        "        second = time.sleep(LIMIT) or 0",
    ),
    ("no last words", "    last_words(first)\n", ""),
    ("any signal counts", "        if received[0] in SIGNALS:\n", "        if True:\n"),
    ("handlers stay", "            signal.signal(number, handler)\n        writer", "            pass\n        writer"),
    ("a signal is remembered", "    _state.number, _state.patient = None, 0\n", ""),
]
MUTATIONS = [
    *(Mutation(name, "storage.py", old, new) for name, old, new in STORAGE),
    *(Mutation(name, "lock.py", old, new) for name, old, new in LOCK),
    *(Mutation(name, "ledger.py", old, new) for name, old, new in LEDGER),
    *(Mutation(name, "store.py", old, new) for name, old, new in STORE),
    *(Mutation(name, "merge.py", old, new) for name, old, new in MERGE),
    *(Mutation(name, "stopping.py", old, new) for name, old, new in STOPPING),
    *(Mutation(name, file, old, new) for name, file, old, new in OTHERS),
]


def mutated(mutation: Mutation, original: Path, folder: Path) -> None:
    """A copy of the original with one mutation."""
    shutil.copytree(original, folder, dirs_exist_ok=True)
    path = folder / "pipeline" / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.name}: {text.count(mutation.old)} places in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new))


def python(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a Python that sees the copy alone."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    try:
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 124, "no end"
    return ended.returncode, ended.stdout + ended.stderr


def killer(mutation: Mutation, original: Path) -> str | None:
    """The first test that notices; None where none does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mutated(mutation, original, folder)
        tests = sorted(TESTS, key=lambda test: not test.endswith(f"_{NEXT_TO.get(mutation.file, 'store')}.py"))
        code, told = python(folder, *PYTEST, *tests)
        if code:
            return str((re.findall(r"(?:FAILED|ERROR) (tests/\S+)", told) or [told.strip()[-200:]])[0])
        code, told = python(folder, *SCHEDULES)
        if code:
            found = re.findall(r'"seed": (\d+), "what": "([^"]*)', told)
            return f"tests/faults/schedules.py, seed {': '.join(found[0])}" if found else told.strip()[-200:]
    return None


def snapshot(folder: Path) -> None:
    """What is mutated: the checkout as it is now. Fails where the suite does, or where Python sees another one."""
    for name in COPIED:
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / name, folder / name)
    _, where = python(folder, "-c", "import pipeline.storage, tests; print(pipeline.storage.__file__, tests.__file__)")
    assert where.split() == [str(folder / "pipeline/storage.py"), str(folder / "tests/__init__.py")], where
    seen = killer(Mutation("none", "storage.py", STORAGE[0][1], STORAGE[0][1]), folder)
    assert seen is None, f"without any mutation: {seen}"


def run(only: Sequence[str] = ()) -> dict[str, Any]:
    """Figures of all mutations, or of those that are named."""
    start = time.monotonic()
    by: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as name:
        snapshot(Path(name))
        for mutation in MUTATIONS:
            if not only or mutation.name in only:
                by[mutation.name] = killer(mutation, Path(name))
                print(f"{mutation.file}: {mutation.name}: {by[mutation.name]}", file=sys.stderr, flush=True)
    survived = [name for name, test in by.items() if test is None]
    return {
        "suite": "mutations",
        "count": len(by),
        "killed": len(by) - len(survived),
        "survived": survived,
        "by": by,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """One line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("--only", nargs="+", default=(), metavar="NAME", choices=[one.name for one in MUTATIONS])
    asked = options.parse_args()
    result = run(asked.only)
    print(json.dumps(result))
    sys.exit(bool(result["survived"]))


if __name__ == "__main__":
    main()
