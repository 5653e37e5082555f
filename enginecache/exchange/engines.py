"""The engines of one cache folder as files: inspect one, export some, import some."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from enginecache.maintenance.inspect import Stored, StoredEngines

if TYPE_CHECKING:
    from enginecache.config import Config
    from enginecache.exchange.inspection import Inspection
    from enginecache.exchange.loads_here import Host
    from enginecache.exchange.transfer import Exported, Imported
    from enginecache.storage.registry.rows import EntryRecord


class PortableEngines(StoredEngines):
    """The engines in one cache folder, with what carries them elsewhere. Safe from threads and processes."""

    def inspect(
        self, path: str | os.PathLike[str], *, with_digest: bool = True, host: Host | None = None
    ) -> Inspection:
        """Find out what an engine file is, whether it is stored here, and whether it would load here.

        Reads a few pages of it, and all of it for the digest. Needs no TensorRT, CUDA or GPU, unpickles nothing, and
        changes nothing. Headers refuse and explain: only a load on record is a ``yes``.

        Args:
            path: The file, of any program.
            with_digest: Read all of it; without, no entry is found.
            host: What it would be loaded with; None looks at this host.
        """
        from enginecache.exchange.inspection import inspect_file
        from enginecache.exchange.loads_here import Host

        storage = self._storage if self.root.is_made else None
        return inspect_file(path, host or Host.here(self.config.cuda_major), storage, with_digest=with_digest)

    def export(self, engines: Iterable[Stored], path: str | os.PathLike[str]) -> Exported:
        """Write engines with their records to one tar file, a bundle; the same engines give the same bytes.

        Complete and durable under its name, or not there. Each plan is compared with its digest on the way.

        Args:
            engines: Entries, rows or keys.
            path: The file; one that is there is replaced only if it is a bundle, or empty.

        Raises:
            NotCachedError: An engine is not stored.
            IntegrityError: A plan is damaged; it was set aside.
            OptionError: There is nothing to export, or the file must not be replaced.
            StoreError: The file cannot be written.
        """
        from enginecache.exchange.transfer import export_bundle

        return export_bundle(self._storage, [self._record(engine) for engine in engines], Path(path))

    def import_bundle(self, path: str | os.PathLike[str]) -> Imported:
        """Take all engines of a bundle, after all of it was verified; replace none that is stored.

        Atomic: a death at any moment leaves all of its engines or none, and a valid cache. Only for a bundle whose
        maker is trusted: to load an engine is to run code.

        Raises:
            InvalidInputError: It is no bundle, or cannot be read.
            BundleError: It is cut off, damaged or edited; nothing was taken.
            StoreError: The cache cannot be written, or has no room.
            RegistryError: The registry cannot be written.
        """
        from enginecache.exchange.transfer import import_bundle

        result = import_bundle(self._storage, Path(path), self.make)
        return result if not result.taken else replace(result, warnings=self._shrink(self.config, result.taken[-1]))

    def _shrink(self, config: Config, record: EntryRecord) -> tuple[str, ...]:
        """Keep the cache under its limit after this engine was stored; return warnings."""
        return self._removal.enforce_limit(config.max_size_bytes, config.keep_recent_s, built=record.digest)
