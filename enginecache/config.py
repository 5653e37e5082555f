"""Settings of one cache: defaults, then the configuration file, then the environment, then arguments."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs

from enginecache.errors import ConfigError, EngineCacheError, OptionError
from enginecache.options import parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Backend = Literal["auto", "tensorrt", "tensorrt-rtx"]
Shared = Literal["", "group"]
BACKENDS: tuple[str, ...] = get_args(Backend)
SHARED: tuple[str, ...] = get_args(Shared)
DAY_S = 86400.0

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d|)", re.ASCII | re.IGNORECASE)
_DURATION_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}


@dataclass(frozen=True)
class Config:
    """Settings of one cache.

    Attributes:
        dir: Root folder of the cache.
        shared: ``group`` lets the folder's group read and write (2770, 0440); empty keeps it private (0700, 0400).
        backend: Which TensorRT flavour builds; ``auto`` chooses.
        timeout_s: Longest wait for another builder, in seconds; None waits as long as it lives.
        max_size_bytes: What the cache is kept under, after each build and by ``prune``; None is no limit.
        grace_s: Age in seconds under which files that no row names are left alone.
        failure_ttl_s: How long in seconds a build that TensorRT refused is not tried again; twice as long after each
            further failure, up to a day. 0 tries every time.
        cuda_major: CUDA major version of a TensorRT whose packages do not tell it.
    """

    dir: Path
    shared: Shared = ""
    backend: Backend = "auto"
    timeout_s: float | None = None
    max_size_bytes: int | None = None
    grace_s: float = DAY_S
    failure_ttl_s: float = 3600.0
    cuda_major: int | None = None

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **arguments: Any) -> Config:
        """Read the configuration file and the environment, and let ``arguments`` that are not None win.

        The file is ``ENGINECACHE_CONFIG``, else ``enginecache/config.toml`` in the user's configuration folder. The
        variables are ``ENGINECACHE_`` and a field's name in capitals, without its unit: ``ENGINECACHE_TIMEOUT=30m``.

        Raises:
            ConfigError: The file or a variable cannot be read.
        """
        environ = os.environ if environ is None else environ
        config = cls(dir=Path(platformdirs.user_cache_dir("enginecache", appauthor=False)))
        config = replace(config, **_read_file(environ))
        config = replace(config, **_read_environ(environ))
        given = {name: value for name, value in arguments.items() if value is not None}
        if "dir" in given:
            given["dir"] = _parse("dir", os.fspath(given["dir"]), "the cache folder")[1]
        return replace(config, **given)

    def __post_init__(self) -> None:
        # Absolute: the builder runs in another folder.
        object.__setattr__(self, "dir", Path(self.dir).absolute())
        for name, value, choices in (("shared", self.shared, SHARED), ("backend", self.backend, BACKENDS)):
            if value not in choices:
                raise ConfigError(f"{name}: {_choice_error(value, choices)}", "Take one of these.")


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """The configuration file, whether it is there or not."""
    named = (os.environ if environ is None else environ).get("ENGINECACHE_CONFIG")
    if named:
        return Path(named)
    return Path(platformdirs.user_config_dir("enginecache", appauthor=False)) / "config.toml"


def _parse_dir(text: str) -> Path:
    if not text:
        raise ValueError("an empty path")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError("there is no such user, or none with a home") from error


def _parse_choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(_choice_error(text, choices))
        return text

    return parse


def _choice_error(value: object, choices: Iterable[str]) -> str:
    return f"{value!r} is not one of {', '.join(repr(choice) for choice in choices)}"


def _parse_major(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError("not a major version, such as 13")
    return int(text)


def parse_duration_s(text: str) -> float:
    """Read ``30m``, ``45s``, ``2h``, ``30d`` or a number of seconds.

    Raises:
        OptionError: The text is not a duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"{text!r} is not a duration", "Write it as 30m, 45s, 2h, 30d or a number of seconds.")
    return float(match["number"]) * _DURATION_UNITS[match["unit"].lower()]


_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "dir": ("dir", _parse_dir),
    "shared": ("shared", _parse_choice(*SHARED)),
    "backend": ("backend", _parse_choice(*BACKENDS)),
    "timeout": ("timeout_s", parse_duration_s),
    "max_size": ("max_size_bytes", parse_size),
    "grace": ("grace_s", parse_duration_s),
    "failure_ttl": ("failure_ttl_s", parse_duration_s),
    "cuda_major": ("cuda_major", _parse_major),
}
"""From the name in the file and the environment to the field and the reader of its text."""


def _read_file(environ: Mapping[str, str]) -> dict[str, Any]:
    path = config_path(environ)
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        if environ.get("ENGINECACHE_CONFIG"):
            message = f"the configuration file {path} does not exist"
            raise ConfigError(message, "Mend or unset ENGINECACHE_CONFIG.") from None
        return {}
    except (OSError, ValueError) as error:
        message = f"the configuration file {path} cannot be read: {error}"
        raise ConfigError(message, "Mend the file, or name another with ENGINECACHE_CONFIG.") from error
    return dict(_parse(name, _as_text(name, value, path), f"{name} in {path}") for name, value in table.items())


def _as_text(name: str, value: Any, path: Path) -> str:
    if name in _SETTINGS and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        message = f"{name} in {path}: {value!r} is neither a text nor a number"
        raise ConfigError(message, f'Write a text, such as {name} = "...".')
    return str(value)


def _read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name in _SETTINGS:
        variable = f"ENGINECACHE_{name.upper()}"
        if environ.get(variable):
            field, value = _parse(name, environ[variable], variable)
            found[field] = value
    return found


def _parse(name: str, text: str, where: str) -> tuple[str, Any]:
    if name not in _SETTINGS:
        message = f"{where}: there is no such setting"
        raise ConfigError(message, f"The settings are {', '.join(_SETTINGS)}.")
    field, parse = _SETTINGS[name]
    try:
        return field, parse(text)
    except EngineCacheError as error:
        raise ConfigError(f"{where}: {error.what}", error.fix) from error
    except ValueError as error:
        what = str(error) if repr(text) in str(error) else f"{text!r} is {error}"
        raise ConfigError(f"{where}: {what}", "Mend the value, or take it out.") from error
