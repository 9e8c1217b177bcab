"""What is wrong with a spec, in one sentence: the field, what was given, what is allowed, the nearest name."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

URL = re.compile(r"\s*[\w+.-]+://\S+\s*$")
IDENTITY = re.compile(r"(:/{1,2})(?:[^/\s]*|\S*:\S*)@")
"""User info of a URL; a secret key may hold slashes."""
QUERY = re.compile(r"([?&;](?!(?:region|scheme|endpoint_override)=)[\w.%-]+=)[^\s&;]+")
"""A value in the query of a URL: a signature or a key, except for those that pyarrow takes for S3."""

SECRET_NAMES = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|KEY|SAS|SIGNATURE", re.IGNORECASE)
"""Environment variables whose values are told nowhere; also those that PASSED lists."""
PASSED = "MATRYOSHKA_PASSED"
MIN_SECRET = 6
"""Characters; a shorter value is in every text."""


def masked(text: str) -> str:
    """A sentence without the secrets that a URL in it may carry."""
    return QUERY.sub(r"\1…", IDENTITY.sub(r"\1…@", text))


def redacted(text: str) -> str:
    """The same without the values of secret variables of this process' environment."""
    passed = os.environ.get(PASSED, "").split(",")
    values = {value for name, value in os.environ.items() if name in passed or SECRET_NAMES.search(name)}
    return masked(without(text, values))


def without(text: str, values: Iterable[str]) -> str:
    """A text in which an ellipsis stands for each of these values, but the shortest."""
    for value in sorted((value for value in values if len(value) >= MIN_SECRET), key=len, reverse=True):
        text = text.replace(value, "…")
    return text


def secret(values: Any) -> str | None:
    """A URL somewhere in plain values that carries a secret, masked; None where there is none."""
    seen: set[int] = set()  # YAML values may hold themselves
    waiting = [values]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting += [*one, *(one.values() if isinstance(one, Mapping) else ())]
        elif isinstance(one, str) and URL.match(one) and masked(one) != one:
            return masked(one)
    return None


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first problem in one sentence, and how many more there are."""
    # pydantic also calls a list too short when one of its items is wrong.
    problems = [p for p in error.errors(include_url=False) if not (p["type"] == "too_short" and p["input"])]
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")  # a misspelt field is also a missing one
    # A union reports one problem per member; the path up to the member is the field.
    places = {_path(problem) for problem in problems}
    first = _sentence(model, problems[0], [p for p in problems if _path(p) == _path(problems[0])])
    more = len(places) - 1
    return first + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _path(problem: ErrorDetails) -> str:
    parts = [
        part for part in problem["loc"] if not (isinstance(part, str) and re.search(r"[\[\]-]|^int$|^float$", part))
    ]
    while parts and parts[-1] in ("auto",):
        parts.pop()
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _sentence(model: type[BaseModel], problem: ErrorDetails, same: Sequence[ErrorDetails]) -> str:
    path, given = _path(problem), problem["input"]
    if problem["type"] == "extra_forbidden":
        known = _fields(model, problem["loc"][:-1])
        name = str(problem["loc"][-1])
        return f"unknown field {path}{nearest(name, known)}; allowed here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"the field {path} is missing"
    if problem["type"] == "value_error":
        return (f"{path}: " if path else "") + problem["msg"].removeprefix("Value error, ")
    wanted = " or ".join(dict.fromkeys(_wanted(one) for one in same))
    choices = [choice for one in same for choice in re.findall(r"'([^']+)'", one.get("ctx", {}).get("expected", ""))]
    return f"{path}: {wanted}, given {_shown(given)}{nearest(str(given), choices)}"


def _wanted(problem: ErrorDetails) -> str:
    plain = re.sub(r"^(Input|Tuple|String|Value) should", "must", problem["msg"].replace(" after validation", ""))
    return re.sub("valid dictionary.*", "mapping", plain).replace("valid tuple", "list")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known name that looks most like this one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _fields(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Names of the fields of the section at `path`."""
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            found = _section(model.model_fields[part].annotation)
            model = found or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (found := _section(inner)) is not None:
            return found
    return None
