"""Foreign plans in the cache: verified as far as a header goes, marked, and never a hit."""

import functools
import json
from dataclasses import replace

import blake3
import pytest
from fakes import H100, TOOLCHAIN, fake_cache
from foreign_files import H200, ep_context, old_plan, rtx_plan, torch_tensorrt, trt_plan, ultralytics
from models import linear, save
from records import check_of

from enginecache.errors import BackendError, InvalidInputError, NotCachedError
from enginecache.host.toolchain import ToolchainFinding
from enginecache.key.matching import CONFIRMED, judge
from enginecache.pipeline.placement import place

DIMS = {"batch": (1, 32, 64)}
PLAN = rtx_plan(mask=0b1100)


@pytest.fixture
def cache(open_cache):
    return open_cache()


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "foreign.engine"
    path.write_bytes(PLAN)
    return path


def tensorrt_cache(open_cache, version="8.6.0", **changes):
    """A cache on a host with TensorRT and one GPU."""
    findings = (
        ToolchainFinding("tensorrt", replace(TOOLCHAIN, flavour="tensorrt", version=version)),
        ToolchainFinding("tensorrt-rtx", None, "not installed", ""),
    )
    device = replace(H100, **changes)
    return open_cache(place=functools.partial(place, find=lambda _: device, inspect=lambda _: findings))


def test_adopted_plan_is_stored_as_it_is_and_its_file_stays(cache, plan, model):
    adopted = cache.adopt(plan, model, dims=DIMS)
    record = adopted.record
    assert adopted.is_new
    assert record.digest == blake3.blake3(PLAN).hexdigest()
    assert cache.path(record).read_bytes() == PLAN == plan.read_bytes()
    assert record.is_adopted
    assert record.compute_capabilities == ("8.6", "8.9")
    assert record.fields["adopted"]["digest"] == record.digest
    assert set(adopted.verified) == {"size", "tensorrt_version", "compute_capabilities", "input_names"}
    assert {"model", "profiles", "options"} <= set(adopted.unverified)


def test_adopted_plan_is_never_a_hit_only_compatible(cache, plan, model):
    adopted = cache.adopt(plan, model, dims=DIMS)
    with pytest.raises(NotCachedError, match="adopted"):
        cache.get(model, dims=DIMS, offline=True)
    taken = cache.get(model, dims=DIMS, offline=True, accept="compatible")
    assert (taken.outcome, taken.key) == ("compatible", adopted.record.key)
    assert [reason.code for reason in taken.reasons] == ["adopted"]
    assert taken.requested_key != taken.key
    assert taken.to_json()["adopted"] is True
    explained = cache.explain(model, dims=DIMS)
    assert explained.verdict == "miss"
    assert explained.candidates[0].verdict.level == "compatible"
    built = cache.get(model, dims=DIMS, accept="exact")
    assert (built.outcome, built.record.is_adopted) == ("built", False)
    assert cache.get(model, dims=DIMS, accept="compatible").key == built.key


def test_adopted_plan_of_more_gpus_is_no_hit_either(cache, plan, model):
    cache.adopt(plan, model, dims=DIMS, target="sm_89")
    with pytest.raises(NotCachedError):
        cache.get(model, dims=DIMS, target="sm_86", offline=True)
    assert cache.get(model, dims=DIMS, target="sm_86", offline=True, accept="compatible").outcome == "compatible"


def test_engine_that_was_built_is_preferred_to_an_adopted_one(cache, plan, model):
    wider = cache.get(model, dims={"batch": (1, 32, 128)})
    cache.adopt(plan, model, dims=DIMS)
    assert cache.get(model, dims=DIMS, accept="compatible", offline=True).key == wider.key


def test_adopted_plan_that_passed_its_check_serves_as_one_that_was_built(cache, plan, model):
    record = cache.adopt(plan, model, dims=DIMS).record
    asked = {name: value for name, value in record.fields.items() if name != "adopted"}
    verdict = judge(asked, record.reach, record.fields, record.reach, is_confirmed=True)
    assert (verdict.level, verdict.reasons) == ("exact", (CONFIRMED,))
    other = {**asked, "options": {**asked["options"], "optimization_level": 5}}
    assert judge(other, record.reach, record.fields, record.reach, is_confirmed=True).level == "refused"


def test_check_on_a_gpu_that_passed_makes_an_adopted_engine_a_hit(cache, plan, model):
    record = cache.adopt(plan, model, dims=DIMS).record

    def check(**values):
        found = {**check_of(record.digest), **values}
        cache._storage.record_check(cache.find(record.key), json.dumps(found))

    for short in ({"verdict": "failed"}, {"scope": "graph"}, {"digest": "0" * 64}, {"reason": None}):
        check(**short)
        with pytest.raises(NotCachedError):
            cache.get(model, dims=DIMS, offline=True)
    check()
    hit = cache.get(model, dims=DIMS, offline=True)
    assert (hit.outcome, hit.key) == ("hit", record.key)
    assert [reason.code for reason in hit.reasons] == ["adopted"]


def test_same_plan_is_adopted_once_and_another_one_beside_it(cache, plan, model, tmp_path):
    first = cache.adopt(plan, model, dims=DIMS)
    again = cache.adopt(plan, model, dims=DIMS)
    assert (again.is_new, again.record) == (False, first.record)
    other = tmp_path / "other.engine"
    other.write_bytes(rtx_plan(size=900))
    assert cache.adopt(other, model, dims=DIMS).record.key != first.record.key
    assert len(cache.entries()) == 2


def test_copy_of_the_engine_that_was_built_is_known(cache, tmp_path, model):
    built = cache.get(model, dims=DIMS)
    copy = tmp_path / "copy.engine"
    copy.write_bytes(rtx_plan())
    record = replace(built.record, digest=blake3.blake3(rtx_plan()).hexdigest(), size_bytes=400, seal=None)
    cache.remove(built)
    cache._storage.admit({record.digest: cache._storage.blobs.stage(copy)}, [record])
    adopted = cache.adopt(copy, model, dims=DIMS)
    assert (adopted.is_new, adopted.record.key, adopted.record.is_adopted) == (False, built.key, False)
    assert adopted.unverified == ()


def test_adopted_plan_stays_marked_in_a_bundle(cache, plan, model, tmp_path):
    record = cache.adopt(plan, model, dims=DIMS).record
    cache.export([record], tmp_path / "b.tar")
    other = fake_cache(tmp_path / "other")
    assert other.import_bundle(tmp_path / "b.tar").taken == (record,)
    assert other.find(record.key).is_adopted


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (PLAN[:-1], InvalidInputError, "cut off"),
        (PLAN + b"\0", InvalidInputError, "follow"),
        (b"", InvalidInputError, "empty"),
        (b"text", InvalidInputError, "not a plan"),
        (rtx_plan("1.6.1.120", mask=0b1000), BackendError, "built by TensorRT-RTX 1.6.1.120, and 1.7.1.116 is"),
        (rtx_plan(mask=0b100), InvalidInputError, "its header says 8.6, and 8.9 is asked"),
        (trt_plan(), BackendError, "a plan of TensorRT, and TensorRT-RTX was chosen"),
        (rtx_plan(layout=7), InvalidInputError, "newer"),
        (old_plan(), InvalidInputError, "before TensorRT 8.6"),
        (ep_context(PLAN), InvalidInputError, "context model"),
        (b"\x80\x04}.", InvalidInputError, "pickle"),
    ],
)
def test_plan_that_contradicts_the_request_is_refused_with_what_to_do(data, error, words, tmp_path, model):
    path = tmp_path / "foreign.engine"
    path.write_bytes(data)
    cache = fake_cache(tmp_path / "none")
    with pytest.raises(error, match=words) as refused:
        cache.adopt(path, model, dims=DIMS)
    assert refused.value.fix
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("wrap", [ultralytics, torch_tensorrt])
def test_wrapped_plan_is_refused_with_a_command_that_takes_it_out(wrap, cache, tmp_path, model):
    import subprocess

    path = tmp_path / "foreign.engine"
    path.write_bytes(wrap(PLAN))
    with pytest.raises(InvalidInputError, match="is not a plan, but a file of") as refused:
        cache.adopt(path, model, dims=DIMS)
    command = refused.value.fix.splitlines()[0].removeprefix("Take the plan out: ")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert cache.adopt(tmp_path / "stripped.plan", model, dims=DIMS).record.digest == blake3.blake3(PLAN).hexdigest()


def test_plan_without_the_models_inputs_is_refused(cache, plan, tmp_path):
    other = save(linear(name="images_of_another_model"), tmp_path / "other.onnx")
    with pytest.raises(InvalidInputError, match="a plan of another model"):
        cache.adopt(plan, other, dims=DIMS)
    assert cache.entries() == []
    assert list(cache.root.tmp.iterdir()) == []


def test_tensorrt_plan_is_compared_with_the_gpu_here(open_cache, tmp_path, model):
    path = tmp_path / "foreign.engine"
    path.write_bytes(trt_plan())
    cache = tensorrt_cache(open_cache)
    adopted = cache.adopt(path, model, dims=DIMS)
    assert "gpu" in adopted.verified
    assert adopted.record.device_name is None
    path.write_bytes(trt_plan(device=(*H200[:10], 114, *H200[11:])))
    with pytest.raises(InvalidInputError, match="114 SMs"):
        cache.adopt(path, model, dims=DIMS)
    path.write_bytes(trt_plan(device=(8, 9, *H200[2:])))
    with pytest.raises(InvalidInputError, match=r"its header says 8\.9, and 9\.0 is asked"):
        cache.adopt(path, model, dims=DIMS)


def test_gpu_that_the_header_does_not_show_is_not_verified(open_cache, tmp_path, model):
    data = bytearray(trt_plan("10.3.0.26"))
    data[80:84] = b"\xff" * 4
    path = tmp_path / "foreign.engine"
    path.write_bytes(data)
    adopted = tensorrt_cache(open_cache, "10.3.0.26").adopt(path, model, dims=DIMS)
    assert {"gpu", "compute_capabilities"} <= set(adopted.unverified)
