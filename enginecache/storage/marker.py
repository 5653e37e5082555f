"""The marker of a cache folder: ``CACHEDIR.TAG``.

Its first line is the standard one, for which backup tools skip the folder. Its second line is enginecache's own, with
the format of what is in the folder. Without it, a folder is used only where it is empty, and nothing in it is touched.

Source: Bryan Ford, "Cache Directory Tagging Specification", 0.6.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

from enginecache.errors import StoreError
from enginecache.files.os_errors import shell_path
from enginecache.storage.durable import read_regular, rename_to_new, sync_folder
from enginecache.storage.names import TEMPORARY_PREFIX, is_staged

NAME = "CACHEDIR.TAG"
SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"
FORMAT = 1
"""Of the folder: its files and their names. Raised only where an older release must not use the folder any more; the
registry has versions of its own."""

TEXT = f"{SIGNATURE}\n# enginecache cache folder, format {FORMAT}\n"

_OWN_LINE = re.compile(r"# enginecache cache folder, format ([1-9]\d{0,8})")
_EMPTY_VOLUMES = frozenset({"lost+found", ".snapshot"})
"""In new volumes: made by ``mkfs.ext4``, and shown by NetApp's file servers."""

_CACHE_NAMES = frozenset({"engines", "registry.sqlite"})
_MAX_BYTES = 4096
_NAMES_SHOWN = 3


def is_marked(folder: Path) -> bool:
    """Return whether a folder is a cache; False where it is as good as empty, and may become one. Makes nothing.

    Raises:
        StoreError: It holds something else, or a later release's cache.
        OSError: It cannot be looked at.
    """
    text = _read(folder / NAME)
    if text is None:
        names = _names_in(folder)
        if not names:
            return False
        text = _read(folder / NAME)  # again: another process may have made the cache while the names were listed
        if text is None:
            raise _not_a_cache(folder, names)
    first, own, *_ = [*text.split("\n"), "", ""]
    found = _OWN_LINE.fullmatch(own)
    if first != SIGNATURE or found is None:
        raise _not_a_cache(folder, _names_in(folder))
    if int(found[1]) > FORMAT:
        message = f"{folder} is a cache of format {found[1]}, made by a newer enginecache; this one knows {FORMAT}"
        raise StoreError(message, "Upgrade enginecache, or name another folder with --dir or ENGINECACHE_DIR.")
    return True


def write_marker(folder: Path, mode: int) -> bool:
    """Mark an empty folder as a cache, durably and at once; return whether this call did. Safe across processes.

    Args:
        folder: The folder.
        mode: The marker's mode.

    Raises:
        OSError: It cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(TEXT)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        rename_to_new(Path(name), folder / NAME)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        if isinstance(error, FileExistsError):
            return False
        raise
    sync_folder(folder)
    return True


def _read(path: Path) -> str | None:
    """Return the marker's text; None where there is no marker, an empty string where it is no small regular file."""
    try:
        return (read_regular(path, _MAX_BYTES) or b"").decode("ascii", "replace")
    except FileNotFoundError:
        return None
    except OSError:
        if path.is_symlink():
            return ""
        raise


def _names_in(folder: Path) -> list[str]:
    """Return the names in a folder, without those of an empty volume and of a cache whose making was interrupted."""
    return sorted(name for name in os.listdir(folder) if name not in _EMPTY_VOLUMES and not is_staged(name))  # noqa: PTH208


def _not_a_cache(folder: Path, names: list[str]) -> StoreError:
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
    message = f"{folder} is not a cache of enginecache's and is not empty (it has {shown}): nothing in it is touched"
    new = shell_path(folder / "enginecache")
    fix = f"Name an empty folder, or a new one such as {new}, with --dir or ENGINECACHE_DIR."
    if set(names) >= _CACHE_NAMES:
        text = TEXT.replace("\n", "\\n")
        fix += (
            f"\nIf enginecache made it, and {NAME} was lost or damaged, write that again: "
            f"printf '{text}' > {shell_path(folder / NAME)}"
        )
    return StoreError(message, fix)
