"""What every spec is made of: sections, their common types, and how a whole one comes from a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.errors import SpecError
from pipeline.sentences import explain, secret
from pipeline.values import parse, put

Auto = Literal["auto"]
MAX_SPEC_BYTES = 2**20
"""Bytes of a spec."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Word = Annotated[str, Field(min_length=1)]
Names = Annotated[
    tuple[Word, ...],
    BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...]),
]


class Section(BaseModel):
    """A part of a spec: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Loaded(Section):
    """A whole spec, which comes from a file."""

    noun: ClassVar[str] = "job spec"

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply `path.to.field=value` overrides, check everything.

        Raises SpecError, which names the file, the field, what was given and what is allowed.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_SPEC_BYTES + 1)
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
            raise SpecError(f"cannot read the {cls.noun} {path}: {reason}") from None
        if len(data) > MAX_SPEC_BYTES:
            raise SpecError(f"cannot read the {cls.noun} {path}: it is larger than {MAX_SPEC_BYTES:,} bytes")
        values = parse(text, str(path))
        if not isinstance(values, dict):
            raise SpecError(f"{path}: a {cls.noun} is a mapping that begins with `name:`, not {type(values).__name__}")
        for override in overrides:
            put(values, override)
        return cls.of(values, str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], origin: str = "spec") -> Self:
        """Check plain values; SpecError begins with `origin`."""
        if (url := secret(values)) is not None:
            raise SpecError(f"{origin}: {url}: keep credentials out of the spec; set them in the environment")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SpecError(f"{origin}: {explain(cls, error)}") from None
