"""Headers of TensorRT plans that the GPU of this host builds, compared with what CUDA says. Needs no pytest.

    python tests/gpu/gpu_headers.py OUT

Builds the example with each kind of reach, inspects the plans and the timing cache, loads, adopts and checks one (which
needs the extra `[check]`), and writes
``OUT/headers.jsonl``: what was read, the first 512 bytes in hex, and the fields in which the plan and the GPU differ.
The bytes of a plan are NVIDIA's: keep them out of the repository.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # an installed enginecache comes first; a bare checkout will do

from enginecache.cache import EngineCache  # noqa: E402
from enginecache.errors import EngineCacheError  # noqa: E402
from enginecache.exchange.inspection import Inspection  # noqa: E402
from enginecache.host.devices import find_device  # noqa: E402

MODEL = ROOT / "examples/cifar.onnx"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"precision": "fp16"},
    "version_compatible": {"version_compatible": True},
    "same_compute_capability": {"hardware_compatibility": "same_compute_capability"},
    "ampere_plus": {"hardware_compatibility": "ampere_plus"},
    "strip_plan": {"strip_plan": True},
}


def row_of(name: str, found: Inspection, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(512).hex()
    return {"name": name, "read": found.to_json(None), "differs": differences(found), "head": head}


def differences(found: Inspection) -> list[str]:
    """The fields in which a plan's header and this GPU differ."""
    device = find_device()
    built = None if found.file is None or found.file.header is None else found.file.header.built_on
    if built is None:
        return ["the GPU is not in the header as it is known"]
    return [
        field
        for field, one, other in (
            ("compute_capability", built.compute_capability, device.compute_capability),
            ("sm_count", built.sm_count, device.sm_count),
            ("l2_bytes", built.l2_bytes, device.l2_bytes or built.l2_bytes),
        )
        if one != other
    ]


def adopted(plan: Path, folder: Path, ask: dict[str, Any]) -> list[str]:
    """Adopt a plan into another cache, and check it there: the verified facts, the verdict, and what it serves as."""
    with EngineCache(folder) as cache:
        found = cache.adopt(plan, MODEL, **ask)
        verdict = cache.check(found.record, MODEL).verdict
        return [*found.verified, verdict, cache.get(MODEL, **ask, accept="compatible", offline=True).outcome]


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        EngineCache(folder) as cache,
        (out / "headers.jsonl").open("w", encoding="utf-8") as file,
    ):
        ask: dict[str, Any] = {"dims": {"batch": (1, 4, 8)}, "backend": "tensorrt"}
        for name, kind in KINDS.items():
            row: dict[str, Any]
            try:
                entry = cache.get(MODEL, **ask, **kind)
                row = row_of(name, cache.inspect(entry.path), entry.path)
                if name == "plain":
                    entry.load()
                    row["after_load"] = cache.inspect(entry.path).loads_here.verdict  # "yes": it is on record
                    row["adopted"] = adopted(entry.path, Path(folder) / "other", ask)
            except EngineCacheError as error:
                row = {"name": name, "error": str(error)}
            print(json.dumps(row), file=file, flush=True)
            print(name, row.get("differs", row.get("error")), row.get("after_load", ""), row.get("adopted", ""))
        for path in cache.root.path.glob("timing-caches/*"):
            row = row_of("timing cache", cache.inspect(path), path)
            print(json.dumps(row), file=file)
            print("timing cache", row["read"]["kind"], row["read"]["is_complete"], row["head"][:96])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
