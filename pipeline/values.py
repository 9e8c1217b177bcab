"""Plain values from the YAML of a spec: safe, without aliases, bounded; and single values put over them."""

import math
import re
import sys
from typing import Any

import yaml

from pipeline.errors import SpecError
from pipeline.limits import MAX_DEPTH
from pipeline.sentences import masked

MAX_NODES = 10_000
"""Values in a spec, keys and lists counted too."""
MAX_DIGITS = 100
"""Characters of a number."""

UNITS = {"": 1, "b": 1} | {
    f"{letter}{infix}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for infix, base in (("", 1_000), ("i", 1_024))
}
"""Bytes."""


def parse(text: str, origin: str) -> Any:
    """The values of a YAML text; SpecError, which begins with `origin`, where it is none or holds too much."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError(f"{origin}: not valid YAML{where}: {problem}") from None


def put(values: dict[str, Any], override: str) -> None:
    """Apply `path.to.field=value` in place; SpecError where the path leads nowhere."""
    path, equals, text = override.partition("=")
    shown = f"--set {masked(override)[:200]!r}"
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise SpecError(f"{shown}: write path.to.field=value, for example --set workers.count=2")
    target: Any = values
    for key in keys[:-1]:
        if isinstance(target, list) and _place(key) < len(target):
            target = target[_place(key)]
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
            if target is None:
                raise SpecError(f"{shown}: {key} is null in the spec")
        else:
            raise SpecError(f"{shown}: there is nothing below {key!r}")
    value = parse(text, shown)
    if isinstance(target, list) and _place(keys[-1]) < len(target):
        target[_place(keys[-1])] = value
    elif isinstance(target, list) and keys[-1] == str(len(target)):
        target.append(value)
    elif isinstance(target, dict):
        target[keys[-1]] = value
    else:
        raise SpecError(f"{shown}: there is no field {keys[-1]!r} in {'.'.join(keys[:-1])}")


def size(value: Any) -> Any:
    """Bytes of a text like "4GB" or "512 MiB"; what is no such text stays as it is. ValueError for another unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", value) if isinstance(value, str) else None
    if not found:
        return value
    unit = found[2].lower()
    if unit not in UNITS:
        raise ValueError(f"{value!r} has an unknown unit; use kB, MB, GB, TB, KiB, MiB, GiB, TiB or plain bytes")
    return int(float(found[1]) * UNITS[unit])


def _place(key: str) -> int:
    """A key as a place in a list; beyond every list where it is none."""
    return int(key) if re.fullmatch("[0-9]{1,9}", key) else sys.maxsize


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases; what is too deep, too much, repeated or no finite number is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise _problem("an alias (*name) is not allowed; write the value out", mark)
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > MAX_DEPTH:
            raise _problem(f"nested deeper than {MAX_DEPTH} levels", mark)
        if self._nodes > MAX_NODES:
            raise _problem(f"more than {MAX_NODES:,} values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _problem(f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number of a sensible length, since YAML's 1:1:1:… grows without bound."""
        is_whole = node.tag.endswith(":int")
        if len(node.value) > MAX_DIGITS:
            raise _problem(f"a number of {len(node.value):,} characters", node.start_mark)
        try:
            number = self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
        except ValueError:
            raise _problem(f"{node.value!r} is no number", node.start_mark) from None
        if not math.isfinite(number):
            raise _problem(f"{node.value} is not a finite number", node.start_mark)
        return number


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _problem(what: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, mark)
