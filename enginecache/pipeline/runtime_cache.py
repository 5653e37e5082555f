"""TensorRT-RTX's runtime caches: the kernels that it compiles for one GPU when a context is created and first used.

Kept here, they are compiled once for a blob, device and driver, and not at each start of a program. TensorRT-RTX checks
what it is given (its own version, the GPU, the operating system, the driver) and refuses what does not fit; a refused
one is replaced. It cannot merge two: of two programs that keep one at a time, the last one's is kept.

This has never run on a GPU. The calls and their answers are those of the bindings of TensorRT-RTX 1.7.1, which the
tests compare; what they do is NVIDIA's word.

Source: docstrings of ``IRuntimeCache`` and ``IRuntimeConfig``, TensorRT-RTX 1.7.1.116; NVIDIA, TensorRT-RTX
documentation, "Working with Runtime Cache", 2026-11.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from enginecache.errors import LoadRefusedError, StoreError
from enginecache.files.digest import digest_of
from enginecache.host.devices import Device
from enginecache.storage.folder import Root
from enginecache.storage.registry.rows import EntryRecord
from enginecache.storage.side_caches import Artefacts

if TYPE_CHECKING:
    from typing_extensions import Self


class RuntimeCaches:
    """Runtime caches between programs. Safe across threads and processes.

    Args:
        root: The cache folder.
    """

    def __init__(self, root: Root) -> None:
        self._artefacts = Artefacts(root, "runtime-caches")

    def of(self, engine: Any, record: EntryRecord, device: Device) -> EngineRuntimeCache:
        """Return the runtime cache of a loaded engine, with the kernels that were kept for it.

        Of an engine that has none (TensorRT's, which has no such thing) it does nothing and keeps nothing.

        Args:
            engine: The ``ICudaEngine``; its GPU is the current CUDA device, with a context.
            record: Its entry.
            device: Its GPU.
        """
        fields = {
            "blob": record.digest,
            "toolchain": {"flavour": record.backend, "version": record.tensorrt_version},
            "device": {
                "name": device.name,
                "sm_count": device.sm_count,
                "compute_capability": list(device.compute_capability),
            },
            "driver": {"version": device.driver_version, "cuda": list(device.cuda_driver_version)},
        }
        return EngineRuntimeCache(engine, self._artefacts, self._artefacts.slot(fields))


class EngineRuntimeCache:
    """The runtime cache of one engine in this process.

    It must live as long as the contexts that it made. Not safe for use by two threads at a time.

    Example:
        >>> with cache.runtime_cache(engine, entry) as kernels:        # doctest: +SKIP
        ...     context = kernels.create_context()
        ...     context.execute_async_v3(stream)                       # compiles what is new
        ...     kernels.keep()                                         # a server: now, and not only when it ends

    Attributes:
        config: The ``IRuntimeConfig``, for a caller who sets more on it; None where the engine has no runtime cache.
        is_warm: Whether kernels that were kept are in it.
    """

    def __init__(self, engine: Any, artefacts: Artefacts, slot: str) -> None:
        self._engine = engine
        self._artefacts = artefacts
        self._slot = slot
        self._kernels: Any = None
        self._kept_digest = ""
        self.config: Any = None
        self.is_warm = False
        # TensorRT has runtime configurations from 10.16 on, without runtime caches.
        config = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        if hasattr(config, "create_runtime_cache"):
            self.config = config
            self._fill()

    def _fill(self) -> None:
        kernels = self.config.create_runtime_cache()
        if kernels is None:
            return
        kept = self._artefacts.read(self._slot)
        # False also for a driver that was updated, and where no CUDA context is current; it is empty then.
        if kept is not None and kernels.deserialize(kept.data):
            self.is_warm = True
            self._kept_digest = kept.digest
        if self.config.set_runtime_cache(kernels):
            self._kernels = kernels
        else:
            self.is_warm = False

    def create_context(self) -> Any:
        """Create an ``IExecutionContext`` that uses the kept kernels, and adds to them.

        Raises:
            LoadRefusedError: TensorRT created none.
        """
        arguments = () if self.config is None else (self.config,)
        context = self._engine.create_execution_context(*arguments)
        if context is None:
            message = "TensorRT created no execution context for the engine"
            raise LoadRefusedError(message, "Is enough of the GPU's memory free? TensorRT's own log says more.")
        return context

    def keep(self) -> tuple[str, ...]:
        """Keep the kernels compiled so far. Does nothing where there are no new ones.

        Call it when no context of the engine is busy: whether TensorRT-RTX allows it then is not documented.

        Returns:
            Why they were not kept, for the user; nothing where they were.
        """
        if self._kernels is None:
            return ()
        memory = self._kernels.serialize()
        if memory is None:
            return ("TensorRT gave no runtime cache, so the next start compiles its kernels again",)
        data = bytes(memoryview(memory))
        if digest_of(data) == self._kept_digest:
            return ()
        try:
            self._kept_digest = self._artefacts.replace(self._slot, data)
        except StoreError as error:
            return (f"the compiled kernels were not kept, so the next start compiles them again: {error.what}",)
        return ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Keep the kernels, unless an error ended the block: CUDA may be unusable then. Ctrl-C and exits are none."""
        if kind is None or not issubclass(kind, Exception):
            self.keep()
