"""Wrote ``registry-0001.sqlite``, once, with the release whose schema it is. Kept to show what is in it.

Not to be run again: a later release would write another schema.

Run from the repository: ``PYTHONPATH=tests/support python tests/migrations/data/make_registry_0001.py FILE``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from records import EPOCH, attempt, publish

from enginecache.files.fingerprint import Fingerprint
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.registry import Registry
from enginecache.storage.registry.rows import AnswerRecord, InflationStep, LoadRecord
from enginecache.storage.registry.schema import ensure_schema


def main(path: Path) -> None:
    database = Database(path)
    ensure_schema(database, 0o600)
    registry = Registry(database, boot="frozen")
    first = publish(registry, "a", device_name="NVIDIA H100 80GB HBM3", driver_version="580.65.06")
    publish(registry, "b", digest=first.digest, timing_cache_digest="7" * 64, check_json="{}")
    damaged = publish(registry, "c")
    registry.pin(first.key)
    registry.pin(damaged.key)
    registry.forget_blob(damaged.digest, "its size is not the one that was stored")
    registry.start_build(attempt("c", 2))
    registry.fail_build(attempt("c", 2).id, 12.5, "TensorRT refused it", is_lasting=True)
    registry.start_build(attempt("d"))
    registry.record_miss(damaged.key, "differs", first.key, ["options.fp16"])
    registry.record_miss(damaged.key, "corrupt", None, [])
    place = (first.digest, "NVIDIA L4, 58 SMs", "tensorrt-rtx 1.7.1.116", "580.65.06")
    registry.record_load(LoadRecord(*place, "loaded", "", EPOCH, "frozen"))
    registry.remember_answer(
        AnswerRecord("a" * 64, first.key, first.build_id, b"watched", b"said", b"printed", "b" * 64, "c" * 32)
    )
    registry.record_inflation(InflationStep(EPOCH, 612.5), EPOCH)
    registry.remember("blob", Fingerprint(2**64 - 1, 2**64 - 2, 1000, 1, 2, 2**64 - 3), {"digest": first.digest})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
