"""What settings are made of: kinds, bounds beside the fields, one `validate` for each class."""

import enum
import math
import struct
from collections.abc import Mapping
from dataclasses import Field, field, fields, replace
from typing import Any, ClassVar, TypeVar, cast, get_args, get_type_hints

Config = TypeVar("Config", bound="Settings")


class ConfigError(ValueError):
    """A value that cannot work; the message names the field, the value and what is valid."""


class Kind(enum.Enum):
    """What a setting is to a run that has been trained."""

    LEARNED = "learned"  # what it learned under: its checkpoints' identity
    MEASURED = "measured"  # what it is measured with: free to change
    HOST = "host"  # the machine's affairs: free to change


# What is compiled counts in 32 bits; environment steps are counted in rounds there.
LARGEST_INT = 2**31 - 1
LARGEST_SEED = 2**32 - 1
LARGEST_FLOAT = 1e6


def bounded(default: Any, low: float, high: float, *, above: bool = False, **metadata: Any) -> Any:
    """Returns a field whose values, or the members of whose tuples, have bounds.

    Args:
        default: its default.
        low: the lowest value.
        high: the highest.
        above: `low` itself is not valid.
        metadata: `kind`, where it is not that of the class; `shapes`, whether shapes, or weights
            at the beginning, follow from the value, which is a fraction.
    """
    return field(default=default, metadata={"bounds": (low, high, above)} | metadata)


def count(default: Any, low: int = 1, **metadata: Any) -> Any:
    """A field of whole numbers from `low` on."""
    return bounded(default, low, LARGEST_INT, **metadata)


def positive(default: float) -> Any:
    """A field of numbers above 0."""
    return bounded(default, 0, LARGEST_FLOAT, above=True)


def not_negative(default: float) -> Any:
    """A field of numbers from 0 on."""
    return bounded(default, 0, LARGEST_FLOAT)


class Settings:
    """What the configuration of a component can do."""

    kind: ClassVar[Kind]

    def items(self) -> tuple[Field[Any], ...]:
        """Returns the fields of a configuration, which is a dataclass."""
        return fields(cast(Any, self))

    def validate(self, prefix: str = "") -> None:
        """Raises ConfigError, with one line that names the field, if a value cannot work.

        Args:
            prefix: of the names, such as `td3.`.
        """
        for item in self.items():
            value = getattr(self, item.name)
            if isinstance(value, Settings):
                value.validate(f"{prefix}{item.name}.")
            elif isinstance(value, str) and "bounds" in item.metadata:
                _check_word(prefix + item.name, value, get_type_hints(type(self))[item.name])
            elif "bounds" in item.metadata:
                _check(prefix + item.name, value, *item.metadata["bounds"])


def _check_word(name: str, value: str, hint: Any) -> None:
    """Refuses what is none of the words that may stand in a number's place."""
    words = [word for part in get_args(hint) for word in get_args(part)]
    if value not in words:
        raise ConfigError(f"{name} is {value!r}; valid: {', '.join(words)}, or a number")


def _check(name: str, value: Any, low: float, high: float, above: bool) -> None:
    for member in value if isinstance(value, tuple) else (value,):
        if isinstance(member, float):
            member = _in_32_bits(member)
        if not low <= member <= high or (above and member == low):
            bound = f"{'above' if above else 'at least'} {low}"
            raise ConfigError(f"{name} is {value}; it must be {bound} and at most {high:,}")


def _in_32_bits(value: float) -> float:
    """Returns a number as it is computed with. NumPy would take a second to import."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def flatten(config: Settings, kind: Kind | None = None, prefix: str = "") -> dict[str, Any]:
    """Returns settings by their dotted names, such as `td3.tau`: all, or those of one kind."""
    flat: dict[str, Any] = {}
    for item in config.items():
        value = getattr(config, item.name)
        if isinstance(value, Settings):
            flat |= flatten(value, kind, f"{prefix}{item.name}.")
        elif kind is None or item.metadata.get("kind", config.kind) is kind:
            flat[prefix + item.name] = value
    return flat


def numbers(config: Settings, prefix: str = "") -> dict[str, float]:
    """Returns the settings that a compiled program can take as values, by their dotted names:
    all fractions of the algorithm but those that shapes follow from.
    """
    found: dict[str, float] = {}
    for item in config.items():
        value = getattr(config, item.name)
        if isinstance(value, Settings):
            found |= numbers(value, f"{prefix}{item.name}.")
        elif (
            isinstance(value, float)
            and item.metadata.get("kind", config.kind) is not Kind.HOST
            and not item.metadata.get("shapes")
        ):
            found[prefix + item.name] = value
    return found


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a configuration in which settings, by their dotted names, have other values."""
    new = {name: value for name, value in values.items() if "." not in name}
    for item in config.items():
        inner = {
            name.removeprefix(f"{item.name}."): value
            for name, value in values.items()
            if name.startswith(f"{item.name}.")
        }
        if inner:
            new[item.name] = replaced(getattr(config, item.name), inner)
    return cast(Config, replace(cast(Any, config), **new))
