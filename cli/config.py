"""Defaults of options from files: ``kvtune.toml``, ``[tool.kvtune]`` of pyproject, the user's own.

::

    gpu = "4090"                  # for every command that has --gpu
    mem = "16GB"

    [estimate]                    # for one command
    context = ["8k", "32k"]

What stands on the command line wins, then ``kvtune.toml`` of the current folder, then its
``pyproject.toml``, then ``kvtune.toml`` in the user's configuration folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtune.common.errors import KvtuneError, nearest
from kvtune.common.stored import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "kvtune.toml"
_NEVER = ("help", "version", "install_completion", "show_completion")
_HINT = 'keys are options without their dashes: gpu = "4090"; kvtune COMMAND --help lists them.'


@dataclass(frozen=True)
class Defaults:
    """What the files say.

    Args:
        values: by parameter's name, commands' own below the command's name.
        origins: file and key of each, by command and parameter.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[tuple[str, str], str] = field(default_factory=dict)

    def told(self, command: str, names: Iterator[str]) -> list[str]:
        """File, key and value of those parameters of a command that a file gave."""
        return [found for name in names if (found := self.origins.get((command, name)))]


def user_file() -> Path:
    """The user's own file, which need not be there."""
    import platformdirs

    return platformdirs.user_config_path("kvtune") / FILE


def read_defaults(build: Callable[[], Any], folder: Path | None = None) -> Defaults:
    """The defaults that files give to an application's options.

    Args:
        build: makes the whole command line, which is asked for only where there is a file.
        folder: where ``kvtune.toml`` and ``pyproject.toml`` may lie; None for the current one.

    Raises:
        KvtuneError: a file is no TOML, names an unknown command or option, or gives what is no
            value of an option.
    """
    here, found = folder or Path(), Defaults()
    for path, section in (
        (user_file(), ()), (here / "pyproject.toml", ("tool", "kvtune")), (here / FILE, ()),
    ):  # fmt: skip
        if path.is_file():
            content = _section(_parsed(path), section, path)
            _Reader(path, ".".join(section), found).group(build(), content)
    return found


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path, most=_LARGEST))
    except tomllib.TOMLDecodeError as error:
        raise KvtuneError(f"this is no TOML: {error}", where=str(path)) from error


_LARGEST = 2**20


def _section(content: dict[str, Any], names: tuple[str, ...], path: Path) -> dict[str, Any]:
    for name in names:
        content = content.get(name, {})
        if not isinstance(content, dict):
            raise KvtuneError("is no table", where=f"{path}: {name}")
    return content


@dataclass(frozen=True)
class _Reader:
    """One file, read into what earlier ones said."""

    path: Path
    section: str
    found: Defaults

    def group(self, group: Any, content: Mapping[str, Any], above: tuple[str, ...] = ()) -> None:
        """Tables are commands; other keys are options of every command that has them."""
        for key, value in content.items():
            command = group.commands.get(key)
            if isinstance(value, dict):
                if command is None:
                    self.refuse((*above, key), f"no command {key!r}", list(group.commands))
                elif hasattr(command, "commands"):
                    self.group(command, value, (*above, key))
                else:
                    for option, given in value.items():
                        self.option(command, (*above, key), option, given)
            else:
                self.everywhere(group, key, value, above)

    def everywhere(self, group: Any, key: str, value: Any, above: tuple[str, ...]) -> None:
        """An option of all commands of a group that have it."""
        having = [(path, c) for path, c in _commands(group, above) if key in _options(c)]
        if not having:
            known = {name for _, command in _commands(group, above) for name in _options(command)}
            self.refuse((*above, key), f"no command has an option --{key}", sorted(known))
        suited = [(p, c) for p, c in having if _options(c)[key].is_flag is isinstance(value, bool)]
        for path, command in suited or having:  # --gpu is a name for most, a switch for one
            self.option(command, path, key, value, (*above, key))

    def option(
        self,
        command: Any,
        path: tuple[str, ...],
        key: str,
        value: Any,
        written: tuple[str, ...] | None = None,
    ) -> None:
        """One command's option; its value is read with those of the command line."""
        where, options = written or (*path, key), _options(command)
        if key not in options:
            said = f"kvtune {' '.join(path)} has no option --{key}"
            self.refuse(where, said, sorted(options))
        param, place = options[key], self.found.values
        for name in path:
            place = place.setdefault(name, {})
        place[param.name] = self.checked(param, value, where)
        origin = f"{self.place(where)} = {value!r}"
        self.found.origins[" ".join(path), param.name] = origin

    def checked(self, param: Any, value: Any, where: tuple[str, ...]) -> Any:
        """The value, if an option could take it; a list is as words with commas."""
        simple = (str, int, float, bool)
        if isinstance(value, list) and all(isinstance(each, simple) for each in value):
            value = value if param.multiple else ",".join(map(str, value))
        elif not isinstance(value, simple):
            raise KvtuneError(
                "is neither text, a number, true or false, nor a list of them",
                where=self.place(where),
            )
        if isinstance(value, bool) != bool(param.is_flag):
            kind = "true or false" if param.is_flag else "text or a number"
            raise KvtuneError(f"takes {kind}", where=self.place(where))
        return value

    def place(self, where: tuple[str, ...]) -> str:
        """Name the file and the key of an entry, as error messages do."""
        return f"{self.path}: {'.'.join(filter(None, (self.section, *where)))}"

    def refuse(self, where: tuple[str, ...], message: str, known: list[str]) -> None:
        """Say what is not known, and what is near."""
        raise KvtuneError(
            f"{message}. {nearest(where[-1], known)}", where=self.place(where), hint=_HINT
        )


def _commands(group: Any, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*above, name))
        else:
            yield (*above, name), command


def _options(command: Any) -> dict[str, Any]:
    """Options by what follows their dashes."""
    return {
        name[2:]: param
        for param in command.params
        if param.param_type_name == "option" and param.name not in _NEVER
        for name in param.opts
        if name.startswith("--")
    }
