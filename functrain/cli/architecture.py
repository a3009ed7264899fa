"""`--model.architecture` of a command: taken before the other options, since it decides which of them there are."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

from functrain.cli.options import UsageError
from functrain.recipes import toml
from functrain.recipes.config import Config


def chosen(config: Config, words: Sequence[str]) -> tuple[Config, list[str]]:
    """Return a config of the architecture that the words name, with the options that both have, and the other words.

    Raises: UsageError for an architecture that there is not, and an option of another one.
    """
    hint, rest = typing.get_type_hints(Config)["model"], list(words)
    for i, word in enumerate(rest):
        option, equals, value = word.partition("=")
        if _field(option) != "architecture":
            continue
        name = value if equals else next(iter(rest[i + 1 :]), "")
        if name not in toml.kinds(hint):
            raise UsageError(f"{option}: expected one of {', '.join(toml.kinds(hint))}, came {name or 'nothing'}")
        try:
            config = dataclasses.replace(config, model=toml.of_kind(hint, config.model, name))
        except ValueError as error:
            raise UsageError(str(error)) from None
        del rest[i : i + (1 if equals else 2)]
        break
    for word in rest:
        field = _field(word.partition("=")[0])
        owners = toml.owners(hint, field) or toml.owners(hint, field.removeprefix("no_"))
        if owners and config.model.architecture not in owners:
            raise UsageError(
                f"{word.partition('=')[0]}: a {config.model.architecture} has no such option; it is one of "
                f"--model.architecture {' and '.join(owners)}"
            )
    return config, rest


def _field(option: str) -> str:
    """Return the field of the model that an option means, or nothing."""
    name = option.replace("_", "-")
    return name.removeprefix("--model.").replace("-", "_") if name.startswith("--model.") else ""
