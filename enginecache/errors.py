"""Errors that enginecache raises on purpose.

::

    EngineCacheError                      exit 1   (Exception)
    ├── InvalidInputError                 exit 2   (ValueError)
    │   ├── ModelError                             not an ONNX model, or one that must not be read
    │   ├── ModelChangedError                      the files changed while the engine was being built
    │   ├── ProfileError                           shapes that do not fit the model
    │   ├── OptionError                            a builder option or target that cannot be read
    │   ├── ConfigError                            configuration file or environment
    │   ├── AmbiguousKeyError                      a prefix that several keys share
    │   └── ConfirmationError                      a destructive command without --yes
    ├── NotCachedError                    exit 3   (LookupError)
    ├── IntegrityError                    exit 4   (RuntimeError)
    │   ├── BundleError                            a bundle that is cut off, damaged or edited
    │   └── LoadError                              TensorRT refused a plan that should run here, or crashed on it
    ├── LockTimeoutError                  exit 5   (TimeoutError)
    ├── RegistryError                     exit 6   (RuntimeError)
    │   └── SchemaError                            registry written by a release that is not compatible
    ├── BuildError                        exit 7   (RuntimeError)
    │   └── BuilderCrashError                      the builder process died
    │       └── BuilderKilledError        exit 1   (RuntimeError) killed from outside: not the model's fault
    ├── BackendError                      exit 8   (RuntimeError)
    │   ├── NoDeviceError                          no GPU, and none was named
    │   ├── InterpreterError                       no Python interpreter that can run a builder
    │   ├── ToolchainError                         no TensorRT, or another one than the key names
    │   ├── TargetError                            this TensorRT cannot build for that GPU
    │   ├── UnsupportedOptionError                 this TensorRT or this GPU does not support an option
    │   ├── LoadRefusedError                       a good plan that cannot be loaded here and now
    │   └── CheckUnavailableError                  a package that a check needs is not installed
    ├── CheckError                        exit 9   (RuntimeError)
    ├── StoreError                        exit 1   (OSError)
    ├── ResourceError                     exit 1   (OSError)
    ├── OutOfMemoryError                  exit 1   (MemoryError)
    └── UnexpectedError                   exit 1   (RuntimeError)

Each takes ``what`` (what happened and why, one line) and ``fix`` (the command or flag that fixes it). The fields are
positional, so that an error survives pickling between processes. ``code`` is the class's name without ``Error``, in
lower case with underscores: stable, for programs.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, ClassVar

from enginecache.keywords import in_python

_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories that are escaped: controls, lone surrogates (undecodable bytes), line and paragraph separators."""
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Controls of the writing direction, which can disguise a string as another. Source: Unicode, UAX #9, section 2."""
MAX_SHOWN = 200
"""Characters of a value in a message."""
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: object) -> str:
    r"""Return ``text`` on one line, safe for a terminal and a table: control characters are escaped.

    ``ESC`` becomes ``\x1b``, a newline ``\n``, a byte of a file name that is not UTF-8 ``\xff``. Backslashes stay as
    they are: the result is for reading, not for decoding. For strings from a model, a file name, TensorRT or a user.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_printable_character, text))


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message, cut if it is long; if ``repr`` fails, the value's type.

    ``repr`` fails for an integer of more than 4300 digits, and for anything that contains one.
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  any object's own error, which would hide that of the request
        return f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _printable_character(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    if unicodedata.category(character) not in _ESCAPED and character not in _BIDI:
        return character
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # surrogateescape: a byte of a file name
        number -= 0xDC00
    return f"\\x{number:02x}" if number <= 0xFF else f"\\u{number:04x}"


class EngineCacheError(Exception):
    """Base of all errors raised on purpose.

    Its text is safe to print, since control characters in it are escaped, and names the keywords of
    :meth:`enginecache.EngineCache.get`. ``what`` and ``fix`` are as they were given, with flags.

    Attributes:
        what: What happened and why.
        fix: What to do about it; may be several lines, may be empty.
        exit_code: The exit status of the command line for this error.
        code: Name of the kind for programs, such as ``model_changed``; stable.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "error"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__.removesuffix("Error")).lower()

    def __init__(self, what: str, fix: str = "") -> None:
        # All fields go to args: BaseException.__reduce__ calls the class with them.
        super().__init__(what, fix)
        self.args = (what, fix)
        if isinstance(self, OSError):
            _clear_errno(self, what)
        self.what = what
        self.fix = fix

    def lines(self) -> list[str]:
        """Return the text as the command line prints it, with flags."""
        return [printable(line) for line in (self.what, *self.fix.split("\n")) if line]

    def __str__(self) -> str:
        return in_python("\n".join(self.lines()))


def _clear_errno(error: OSError, what: str) -> None:
    """Undo the reading of two arguments as an errno and its text, which OSError does."""
    error.errno, error.strerror = None, what


class InvalidInputError(EngineCacheError, ValueError):
    """Usage, or bad input."""

    exit_code = 2


class ModelError(InvalidInputError):
    """The model is missing, is not ONNX, or must not be read."""


class ModelChangedError(InvalidInputError):
    """The model's files, or a plugin library, changed while the engine was being built; nothing was published."""


class ProfileError(InvalidInputError):
    """The optimization profiles do not fit the model's inputs."""


class OptionError(InvalidInputError):
    """A builder option or a target that cannot be read or is out of range."""


class ConfigError(InvalidInputError):
    """The configuration file or an environment variable cannot be read."""


class AmbiguousKeyError(InvalidInputError):
    """A key prefix that several entries share."""


class ConfirmationError(InvalidInputError):
    """A destructive command was not confirmed."""


class NotCachedError(EngineCacheError, LookupError):
    """No stored engine serves the request, and building was not allowed."""

    exit_code = 3


class IntegrityError(EngineCacheError, RuntimeError):
    """Stored bytes or rows are damaged."""

    exit_code = 4


class BundleError(IntegrityError):
    """A bundle is cut off, damaged or edited. Nothing was taken from it."""


class LoadError(IntegrityError):
    """TensorRT refused a plan that should run here, or crashed on it. The plan is set aside."""


class LockTimeoutError(EngineCacheError, TimeoutError):
    """Another process was still building when the time to wait ran out."""

    exit_code = 5


class RegistryError(EngineCacheError, RuntimeError):
    """The registry cannot be opened, read or written."""

    exit_code = 6


class SchemaError(RegistryError):
    """This release cannot use the registry's schema."""


class BuildError(EngineCacheError, RuntimeError):
    """TensorRT refused the model or failed to build it.

    Attributes:
        log_path: The builder's log; empty if there is none.
    """

    exit_code = 7

    def __init__(self, what: str, fix: str = "", log_path: str = "") -> None:
        super().__init__(what, fix)
        self.args = (what, fix, log_path)
        self.log_path = log_path

    def lines(self) -> list[str]:
        """Return the text as the command line prints it, with flags."""
        return [*super().lines(), *([f"The builder's log: {printable(self.log_path)}"] if self.log_path else [])]


class BuilderCrashError(BuildError):
    """The builder process died, was killed or ran out of memory."""


class BuilderKilledError(BuilderCrashError):
    """The builder was killed from outside, ran out of memory, or ended itself: the next try may succeed."""

    exit_code = 1  # 7 is TensorRT's verdict on the model


class BackendError(EngineCacheError, RuntimeError):
    """No usable TensorRT or GPU for what was asked."""

    exit_code = 8


class NoDeviceError(BackendError):
    """No GPU was found, and no target was named."""


class InterpreterError(BackendError):
    """No Python interpreter is known that can run a child process, or the configured one cannot."""


class ToolchainError(BackendError):
    """No TensorRT is installed, or the loaded one is not the one in the key."""


class TargetError(BackendError):
    """The chosen TensorRT cannot build for the asked compute capability."""


class UnsupportedOptionError(BackendError):
    """The chosen TensorRT, or the GPU, does not support an option."""


class LoadRefusedError(BackendError):
    """TensorRT did not load a plan because of the GPU, driver, version, memory or a plugin. The plan stays."""


class CheckUnavailableError(BackendError):
    """A package that a check of the numbers needs is not installed, or cannot compute the model."""


class CheckError(EngineCacheError, RuntimeError):
    """The engine failed its check, or nothing showed that it is right where that was asked for.

    Attributes:
        check: The check's record, plain JSON values: the numbers and the outputs concerned.
    """

    exit_code = 9

    def __init__(self, what: str, fix: str = "", check: dict[str, Any] | None = None) -> None:
        super().__init__(what, fix)
        self.args = (what, fix, check)
        self.check = check


class StoreError(EngineCacheError, OSError):
    """The cache folder cannot be used: unsafe, full, read-only or failing."""


class ResourceError(EngineCacheError, OSError):
    """The process has reached a limit of the operating system: open files, processes or threads."""


class OutOfMemoryError(EngineCacheError, MemoryError):
    """This process ran out of memory."""


class UnexpectedError(EngineCacheError, RuntimeError):
    """An unforeseen exception: a bug in enginecache, or a Python package that cannot be imported."""
