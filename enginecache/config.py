"""Settings of one cache: defaults, then the configuration file, then the environment, then arguments."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs

from enginecache.environment import REPLACED, kind_of
from enginecache.errors import ConfigError, EngineCacheError, OptionError, shown
from enginecache.files.mounts import status_of
from enginecache.files.os_errors import describe_os_error
from enginecache.files.units import DAY_S, LONGEST_S, parse_duration_s, parse_size, shortened

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Backend = Literal["auto", "tensorrt", "tensorrt-rtx"]
Shared = Literal["", "group"]
BACKENDS: tuple[str, ...] = get_args(Backend)
SHARED: tuple[str, ...] = get_args(Shared)
SWITCHES = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}

MAX_COUNT = (1 << 63) - 1
"""The largest number that SQLite has."""

MAX_FILE_BYTES = 1 << 16
"""No configuration file is larger; a device may have no end."""
_MAX_DOTS = 200
"""In a line of it. No setting has a name of parts, and the time that ``tomllib`` takes grows as their square."""

_LOGGER = logging.getLogger("enginecache")

_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Config:
    """Settings of one cache.

    Attributes:
        dir: Root folder of the cache.
        shared: ``group`` lets the folder's group read and write (2770, 0440); empty keeps it private (0700, 0400).
        backend: Which TensorRT flavour builds; ``auto`` chooses.
        timeout_s: Longest wait for another builder, in seconds; None waits as long as it lives.
        max_size_bytes: What the cache is kept under, after each build and by ``prune``; None is no limit.
        keep_recent_s: No eviction takes an engine that was used or published so few seconds ago. 0 protects none, also
            not one whose path was handed out a moment ago.
        grace_s: Age in seconds under which files that no row names are left alone.
        failure_ttl_s: How long in seconds a build that TensorRT refused is not tried again; twice as long after each
            further failure, up to a day. 0 tries every time.
        cuda_major: CUDA major version of a TensorRT whose packages do not tell it.
        pass_environment: Names of further environment variables that the builder is given. What no rule of
            :mod:`enginecache.environment` passes anyway is then part of the key.
        follow_links: Whether external data may be reached through links that leave the model's folder.
        python: The interpreter that runs builders and trials: a path, or a name on PATH; None for this process's own.
        dir_from: Where ``dir`` was named: a variable, a file or an argument; empty for the default folder.
    """

    dir: Path
    shared: Shared = ""
    backend: Backend = "auto"
    timeout_s: float | None = None
    max_size_bytes: int | None = None
    keep_recent_s: float = 600.0
    grace_s: float = DAY_S
    failure_ttl_s: float = 3600.0
    cuda_major: int | None = None
    pass_environment: tuple[str, ...] = ()
    follow_links: bool = False
    python: str | None = None
    dir_from: str = field(default="", compare=False)

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **arguments: Any) -> Config:
        """Read the configuration file and the environment, and let ``arguments`` that are not None win.

        The file is ``ENGINECACHE_CONFIG``, else ``enginecache/config.toml`` in the user's configuration folder. The
        variables are ``ENGINECACHE_`` and a field's name in capitals, without its unit: ``ENGINECACHE_TIMEOUT=30m``.

        Raises:
            ConfigError: The file or a variable cannot be read.
        """
        environ = os.environ if environ is None else environ
        settings = {**_read_file(environ), **_read_environ(environ)}
        settings |= {name: value for name, value in arguments.items() if value is not None}
        if "dir" in arguments and arguments["dir"] is not None:
            settings["dir"] = _parse("dir", _path_text("dir", arguments["dir"]), "the cache folder")[1]
            settings["dir_from"] = "an argument"
        if "dir" not in settings:
            settings["dir"] = _default_dir()
        return cls(**settings)

    def __post_init__(self) -> None:
        # Absolute: the builder runs in another folder.
        object.__setattr__(self, "dir", Path(_path_text("dir", self.dir)).absolute())
        for name, value, choices in (("shared", self.shared, SHARED), ("backend", self.backend, BACKENDS)):
            if value not in choices:
                raise ConfigError(f"{name}: {_choice_error(value, choices)}", "Take one of these.")
        for name in ("timeout_s", "keep_recent_s", "grace_s", "failure_ttl_s"):
            require_seconds(name, getattr(self, name))
        require_count("max_size_bytes", self.max_size_bytes)
        require_count("cuda_major", self.cuda_major)
        if not isinstance(self.follow_links, bool):
            raise ConfigError(f"follow_links is {shown(self.follow_links)}", "Give True or False.")
        names = _parse("pass_environment", _names_text(self.pass_environment), "pass_environment")[1]
        object.__setattr__(self, "pass_environment", names)
        if self.python is not None:
            object.__setattr__(self, "python", _parse("python", _path_text("python", self.python), "python")[1])


class Settings:
    """Settings that are read again when they may have changed. Safe across threads.

    Args:
        arguments: As for :meth:`Config.load`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = dict(arguments)
        self._state = self._look()
        self.config = Config.load(**self._arguments)

    def refresh(self) -> Config:
        """Read the settings again if their file or variables differ.

        The folder stays, how it is shared, and the interpreter.

        Settings that cannot be read change nothing, and are logged: a running program goes on with those that it has.
        """
        state = self._look()
        if state == self._state:
            return self.config
        self._state = state
        try:
            found = Config.load(**self._arguments)
        except EngineCacheError as error:
            _LOGGER.warning("the settings have changed and cannot be read, so the former ones stay: %s", error)
        else:
            self.config = replace(
                found,
                dir=self.config.dir,
                shared=self.config.shared,
                dir_from=self.config.dir_from,
                python=self.config.python,
            )
        return self.config

    def _look(self) -> tuple[object, ...]:
        environ = dict(os.environ)
        path = config_path(environ)
        try:
            found = None if path is None else status_of(path)
        except (OSError, ValueError):
            found = None
        return path, found, sorted(pair for pair in environ.items() if pair[0].startswith("ENGINECACHE_"))


def chosen_settings(
    dir: str | os.PathLike[str] | Config | None,  # noqa: A002  the setting's name
    given: Mapping[str, Any],
) -> Config | Settings:
    """Return the settings that a cache is opened with: a ``Config`` for good, or settings that are read again.

    Args:
        dir: The cache folder or all settings; None takes the file's or the environment's folder.
        given: Settings that win over the file and the environment; None counts as left out.

    Raises:
        TypeError: There is a ``Config`` and another setting.
        ConfigError: The settings cannot be read.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(dir, Config):
        return Settings({**given, "dir": dir})
    if given:
        raise TypeError(f"a Config has all settings; give it alone, or {', '.join(given)} in it")
    return dir


def _default_dir() -> Path:
    path = _user_folder(platformdirs.user_cache_dir)
    if path is None:
        message = f"there is no default cache folder: user {os.getuid()} has no home folder, and HOME names none"
        raise ConfigError(message, "Name the cache folder with --dir or ENGINECACHE_DIR.")
    return path


def config_path(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the path of the configuration file, which need not exist; None for a user without a home folder."""
    named = (os.environ if environ is None else environ).get("ENGINECACHE_CONFIG")
    if named:
        return Path(named)
    folder = _user_folder(platformdirs.user_config_dir)
    return None if folder is None else folder / "config.toml"


def _user_folder(find: Callable[..., str]) -> Path | None:
    try:
        path = Path(find("enginecache", appauthor=False))
    except RuntimeError:
        return None
    return None if path.parts[0].startswith("~") else path  # as releases of platformdirs that raise nothing leave it


def runtime_folder() -> Path | None:
    """Return the user's folder for what need not outlive the boot, whether it is there or not; None if none is safe.

    ``$XDG_RUNTIME_DIR``, else ``/run/user``, else a folder among the temporary files that may be anybody's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns of the last of these
        try:
            return Path(platformdirs.user_runtime_dir("enginecache", appauthor=False))
        except OSError:
            return None


def _path_text(name: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(text, str):
        raise ConfigError(f"{name} is {shown(value)}, which is not a path", "Give a path, as a str or a Path.")
    return text


def _names_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        value = (value,)
    names = tuple(value)
    if not all(isinstance(name, str) for name in names):
        message = f"pass_environment is {shown(value)}, which are not names"
        raise ConfigError(message, "Give a sequence of names of environment variables.")
    return " ".join(names)


def _parse_dir(text: str) -> Path:
    if not text:
        raise ValueError("an empty path")
    if "\0" in text:
        raise ValueError("a path with a NUL character")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("a path with characters that no file's name can have") from None
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError("the home of a user that is not known, or who has none") from error


def _parse_choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(_choice_error(text, choices))
        return text

    return parse


def _choice_error(value: object, choices: Iterable[str]) -> str:
    return f"{shown(value)} is not one of {', '.join(repr(choice) for choice in choices)}"


def _parse_switch(text: str) -> bool:
    if text.lower() not in SWITCHES:
        raise ValueError("neither yes nor no")
    return SWITCHES[text.lower()]


def _parse_major(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and int(text)):
        raise ValueError("not a major version, such as 13")
    return int(text)


def _parse_program(text: str) -> str:
    """Read the path of an interpreter. A bare name stays as it is, and is searched on PATH when it is started."""
    return text if text and os.sep not in text else str(_parse_dir(text))


def _parse_names(text: str) -> tuple[str, ...]:
    names = sorted(set(re.split(r"[,\s]+", text.strip(", \t\n")))) if text.strip(", \t\n") else []
    for name in names:
        if _VARIABLE.fullmatch(name) is None:
            raise ValueError(f"{name!r} is not the name of an environment variable")
        if kind_of(name) == REPLACED:
            raise ValueError(f"{name!r} cannot be passed on: the builder is given another value of it")
    return tuple(names)


def require_seconds(name: str, value: Any) -> None:
    """Refuse a value that is neither None nor a number of seconds between 0 and a hundred years.

    Raises:
        OptionError: If it is something else.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= LONGEST_S):
        message = f"{name} is {shown(value)}, which is not a number of seconds up to a hundred years"
        raise OptionError(message, "Give a number of seconds, such as 1800.")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        OptionError: If it is not.
    """
    if value not in choices:
        raise OptionError(f"{name}: {shown(value)} is not one of {', '.join(choices)}", "Take one of these.")


def require_count(name: str, value: Any) -> None:
    """Refuse a value that is neither None nor a whole number from 0 to 2**63 - 1.

    Raises:
        OptionError: If it is something else.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT):
        return
    raise OptionError(f"{name} is {shown(value)}, which is not a whole number of 0 or more", "Give one.")


_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "dir": ("dir", _parse_dir),
    "shared": ("shared", _parse_choice(*SHARED)),
    "backend": ("backend", _parse_choice(*BACKENDS)),
    "timeout": ("timeout_s", parse_duration_s),
    "max_size": ("max_size_bytes", parse_size),
    "keep_recent": ("keep_recent_s", parse_duration_s),
    "grace": ("grace_s", parse_duration_s),
    "failure_ttl": ("failure_ttl_s", parse_duration_s),
    "cuda_major": ("cuda_major", _parse_major),
    "pass_environment": ("pass_environment", _parse_names),
    "follow_links": ("follow_links", _parse_switch),
    "python": ("python", _parse_program),
}
"""From the name in the file and the environment to the field and the reader of its text."""


def _read_file(environ: Mapping[str, str]) -> dict[str, Any]:
    path = config_path(environ)
    if path is None or (not environ.get("ENGINECACHE_CONFIG") and not _is_reachable(path)):
        return {}
    try:
        table = tomllib.loads(_text_of(path))
    except FileNotFoundError:
        message = f"the configuration file {path} does not exist"
        raise ConfigError(message, "Correct or unset ENGINECACHE_CONFIG.") from None
    except RecursionError as error:
        message = f"the configuration file {path} cannot be read: its values are nested too deeply"
        raise ConfigError(message, "Write one line per setting, such as max_size = '20GiB'.") from error
    except OSError as error:
        what, fix = describe_os_error(error, f"the configuration file {path} cannot be read", path, otherwise="")
        raise ConfigError(what, "\n".join(filter(None, (fix, "Name another with ENGINECACHE_CONFIG.")))) from error
    except ValueError as error:
        message = f"the configuration file {path} cannot be read: {error}"
        raise ConfigError(message, "Correct the file, or name another with ENGINECACHE_CONFIG.") from error
    settings = dict(_parse(name, _as_text(name, value, path), f"{name} in {path}") for name, value in table.items())
    return {**settings, "dir_from": f"dir in {path}"} if "dir" in settings else settings


def _is_reachable(path: Path) -> bool:
    """Return whether the default file exists; one in a folder that is closed to this user is another user's.

    HOME keeps the value of the user before under ``docker run --user``, ``sudo -E`` and some job schedulers.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EACCES}:
            return False
    return True  # any other error is reported when the file is read


def _text_of(path: Path) -> str:
    """Read the file, which must be a regular one: a pipe would wait for a writer, and a device may have no end.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a regular file, too large, or not UTF-8.
    """
    if _is_null(os.stat(path)):
        return ""
    _require_regular(os.stat(path))  # before it is opened: opening some devices has effects
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _require_regular(os.fstat(file.fileno()))
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16, and must be UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: see byte {error.start + 1}") from error
    if any(line.count(".") > _MAX_DOTS for line in text.split("\n") if not line.lstrip().startswith("#")):
        raise ValueError(f"a line of it has more than {_MAX_DOTS} dots")
    return text


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "special file")
        raise ValueError(f"it is a {kind}, not a regular file")


_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def _as_text(name: str, value: Any, path: Path) -> str:
    if name == "pass_environment" and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    is_switch = name in _SETTINGS and _SETTINGS[name][1] is _parse_switch
    if name in _SETTINGS and (isinstance(value, bool) > is_switch or not isinstance(value, str | int | float)):
        message = f"{name} in {path}: {value!r} is neither a string nor a number"
        raise ConfigError(message, f'Write a string, such as {name} = "...".')
    return str(value)


def _read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _SETTINGS:
        variable = f"{_PREFIX}{name.upper()}"
        if environ.get(variable):
            key, value = _parse(name, environ[variable], variable)
            found[key] = value
    return {**found, "dir_from": f"{_PREFIX}DIR"} if "dir" in found else found


_PREFIX = "ENGINECACHE_"
_SERVICE = re.compile(
    r"ENGINECACHE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)", re.ASCII
)
"""Variables that Kubernetes sets in every pod for a service whose name begins with ``enginecache``.

Source: Kubernetes, "Service", Discovering services, Environment variables.
"""


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Warn of each variable that begins with ``ENGINECACHE_`` and sets nothing, naming the nearest that does.

    Returns:
        One line for each, in the order of their names; empty variables count as unset.
    """
    environ = os.environ if environ is None else environ
    known = [*(f"{_PREFIX}{name.upper()}" for name in _SETTINGS), f"{_PREFIX}CONFIG"]
    unknown = [name for name, value in environ.items() if value and name.startswith(_PREFIX) and name not in known]
    return [
        f"{name} is not a variable of enginecache and has no effect. {_nearest(name, known, 'variables')}"
        for name in sorted(unknown)
        if _SERVICE.fullmatch(name) is None
    ]


def _nearest(name: str, known: Iterable[str], kind: str) -> str:
    import difflib  # only a mistake needs it

    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"The {kind} are {', '.join(known)}."


def _parse(name: str, text: str, where: str) -> tuple[str, Any]:
    if name not in _SETTINGS:
        raise ConfigError(f"{where}: there is no such setting", _nearest(name, _SETTINGS, "settings"))
    key, parse = _SETTINGS[name]
    try:
        return key, parse(text)
    except EngineCacheError as error:
        raise ConfigError(f"{where}: {error.what}", error.fix) from error
    except ValueError as error:
        what = str(error) if shortened(text) in str(error) else f"{shortened(text)} is {error}"
        raise ConfigError(f"{where}: {what}", "Correct the value, or take it out.") from error
