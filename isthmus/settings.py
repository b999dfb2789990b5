"""Settings from a file and from flags, checked by a pydantic model.

Knows YAML and validation errors; knows no command.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from isthmus.errors import UsageError

Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(model: type[Settings], file: Path | None, flags: dict[str, Any]) -> Settings:
    """Settings of type `model`: the file's, overridden by every flag that was given (is not None).

    Raises:
        UsageError: the file is unreadable, a key is unknown, a value does not fit, or values contradict each other.
    """
    settings = read_yaml(file) if file is not None else {}
    settings |= {name: value for name, value in flags.items() if value is not None}
    return validated(model, settings, file)


def validated(model: type[Settings], settings: dict[str, Any], file: Path | None = None) -> Settings:
    """Settings of type `model`; `file` is named where a key of it is unknown.

    Raises:
        UsageError: in one line, for the first thing that is wrong.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UsageError(_in_words(error, model, file)) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UsageError: it does not, or cannot be read.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{file} must hold `name: value` lines")
    return content


def _in_words(error: ValidationError, model: type[BaseModel], file: Path | None) -> str:
    problems = error.errors()
    # A misspelt name is why another one is missing.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    place = ".".join(map(str, first["loc"]))
    where = f"{file}: " if file is not None and first["type"] == "extra_forbidden" else ""
    if first["type"] == "extra_forbidden":
        return f"{where}no setting {place!r}; known are {', '.join(model.model_fields)}"
    if first["type"] == "missing":
        return f"--{place.replace('_', '-')} is needed"
    message = first["msg"].removeprefix("Value error, ")
    return f"--{place.replace('_', '-')}: {message}" if place else message
