import datetime as dt
import json

import pytest
from fakes import H100, TOOLCHAIN, place_with

from enginecache.errors import BuildError
from enginecache.files.units import time_json
from enginecache.key.matching import Reason
from enginecache.key.options import BuildOptions
from enginecache.pipeline.results import reasons_json

FIELDS = {
    "schema": int,
    "outcome": str,
    "key": str,
    "digest": str,
    "path": str,
    "size_bytes": int,
    "backend": str,
    "tensorrt_version": str,
    "compute_capabilities": list,
    "device": (str, type(None)),
    "model": dict,
    "profiles": list,
    "options": dict,
    "conversion": (dict, type(None)),
    "timing_cache": (str, type(None)),
    "adopted": bool,
    "check": (dict, type(None)),
    "asked_key": str,
    "requested_key": str,
    "build_seconds": float,
    "elapsed_seconds": float,
    "created_at": str,
    "reasons": list,
}
BATCH = {"dims": {"batch": (1, 8, 32)}}


@pytest.mark.parametrize("device", [None, H100])
@pytest.mark.parametrize("outcome", ["built", "hit"])
def test_record_has_exactly_its_fields_and_types(open_cache, model, device, outcome):
    cache = open_cache(place=place_with(device=device))
    entry = cache.get(model, **BATCH)
    if outcome == "hit":
        entry = cache.get(model, **BATCH)
    record = entry.to_json()
    assert json.loads(json.dumps(record)) == record
    assert set(record) == set(FIELDS)
    assert all(isinstance(record[name], kind) for name, kind in FIELDS.items())
    assert (record["schema"], record["outcome"]) == (1, outcome)
    assert (record["key"], record["digest"], record["size_bytes"]) == (entry.key, entry.digest, entry.size_bytes)
    assert (record["backend"], record["tensorrt_version"]) == (TOOLCHAIN.flavour, TOOLCHAIN.version)
    assert record["path"] == str(entry.path)
    assert record["compute_capabilities"] == ["8.9"]
    assert record["device"] == (None if device is None else device.name)
    assert record["profiles"] == [{"x": {"min": [1, 8], "opt": [8, 8], "max": [32, 8]}}]
    assert record["options"] == BuildOptions().keyed()
    assert (record["requested_key"], record["conversion"], record["timing_cache"]) == (entry.key, None, None)
    assert set(record["model"]) == {"path", "digest", "name"}
    assert (record["model"]["path"], record["model"]["name"]) == (str(model), "model.onnx")
    assert all(set(reason) == {"code", "text"} for reason in record["reasons"])
    assert record["reasons"][0]["code"] == {"built": "absent", "hit": "exact"}[outcome]
    assert dt.datetime.fromisoformat(record["created_at"].replace("Z", "+00:00")).tzinfo


def test_model_bytes_have_no_path(open_cache, model):
    record = open_cache().get(model.read_bytes(), **BATCH).to_json()
    assert record["model"]["path"] is None
    assert isinstance(record["model"]["name"], str)


EXPLANATION = {
    "schema",
    "verdict",
    "key",
    "requested_key",
    "fields",
    "reasons",
    "digest",
    "check",
    "candidates",
    "last_failure",
    "last_failure_log",
}


def test_explanation_is_plain_json_on_miss_failure_and_hit(open_cache, model):
    cache = open_cache()
    missed = cache.explain(model, **BATCH).to_json()
    assert set(missed) == EXPLANATION
    assert (missed["verdict"], missed["digest"], missed["candidates"], missed["last_failure"]) == (
        "miss",
        None,
        [],
        None,
    )
    assert set(missed["fields"]) == {"model", "profiles", "options", "conversion", "toolchain", "target", "environment"}

    def refuse(_request):
        raise BuildError("no tactic")

    cache._publication._builder.before = refuse
    with pytest.raises(BuildError):
        cache.get(model, **BATCH)
    failed = cache.explain(model, **BATCH).to_json()
    assert failed["last_failure"] == "no tactic"
    assert failed["last_failure_log"].endswith(".log")

    cache._publication._builder.before = None
    entry = cache.get(model, **BATCH, rebuild=True)
    hit = cache.explain(model, **BATCH).to_json()
    assert (hit["verdict"], hit["digest"], hit["key"]) == ("hit", entry.digest, missed["key"])
    near = cache.explain(model, dims={"batch": 2}).to_json()
    assert json.loads(json.dumps(near)) == near
    (candidate,) = near["candidates"]
    assert set(candidate) == {"key", "model", "verdict", "reasons", "differing"}
    assert set(candidate["differing"][0]) == {"field", "asked", "stored"}
    assert [candidate["verdict"] for candidate in hit["candidates"]] == ["exact"]


def test_times_are_rfc_3339_in_utc():
    east = dt.timezone(dt.timedelta(hours=2))
    assert time_json(dt.datetime(2026, 11, 23, 12, 0, 0, 5, tzinfo=east)) == "2026-11-23T10:00:00.000005Z"
    assert time_json(None) is None


def test_reasons_are_codes_and_texts():
    assert reasons_json([Reason("absent", "none is stored")]) == [{"code": "absent", "text": "none is stored"}]
