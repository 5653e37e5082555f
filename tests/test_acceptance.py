"""The main road, from the command line to TensorRT-RTX and back; fake is one other TensorRT version alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import blake3
import onnx
import pytest
from fakes import TOOLCHAIN, place_with
from models import DAILY, EXAMPLE, RARE, linear, save
from onnx import TensorProto, helper
from typer.testing import CliRunner

from enginecache.cache import EngineCache
from enginecache.cli.app import app
from enginecache.errors import LoadRefusedError, NoDeviceError
from enginecache.host.devices import find_device

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="probe: no module tensorrt_rtx"),
]

SM_89 = ("--target", "sm_89")
BATCH = ("--dim", "batch=1:32:64")
MODELS = {path.stem: (str(path),) for path in DAILY} | {"cifar": (str(EXAMPLE), *BATCH)}
CONSOLE_SCRIPT = Path(sys.executable).with_name("enginecache")


def run(*arguments: str | Path, folder: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with the cache in ``folder``."""
    command = [sys.executable, "-m", "enginecache", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ENGINECACHE_")}
    environment |= {"ENGINECACHE_DIR": str(folder), "XDG_CONFIG_HOME": str(folder / "no-settings")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def run_here(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line in this process; an exception that it lets through ends up in its standard error."""
    command = [str(argument) for argument in (*arguments, "--dir", folder)]
    done = CliRunner().invoke(app, command)
    traceback = "" if isinstance(done.exception, SystemExit | None) else f"Traceback: {done.exception!r}"
    return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr + traceback)


def record(*arguments: str | Path, folder: Path, run=run_here) -> dict:
    """The JSON record of a command that succeeds."""
    done = run(*arguments, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_refused(done: subprocess.CompletedProcess[str], code: int, what: str, fix: str) -> None:
    """Standard output is empty; standard error says what happened, then what to do."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "Traceback" not in done.stderr
    first, second = done.stderr.splitlines()[:2]
    assert first.startswith("error: ")
    assert what in first
    assert second.startswith("  ")
    assert fix in done.stderr.removeprefix(first)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a cache, which must verify clean when the test ends."""
    folder = tmp_path / "cache"
    yield folder
    with EngineCache.open(dir=folder) as cache:
        found = cache.verify(deep=True, repair=True)
    assert found.is_clean, found
    assert not found.young_orphans, found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of one cache for all tests that add to it or only read."""
    folder = tmp_path_factory.mktemp("shared") / "cache"
    yield folder
    assert run("verify", "--deep", folder=folder).returncode == 0


@pytest.fixture(scope="module")
def served(shared: Path) -> dict[str, tuple[dict, dict]]:
    """Return the records of two gets of every real model, one after the other."""

    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda model: record("get", *model, *SM_89, folder=shared, run=run), MODELS.values()))
    again = [record("get", *model, *SM_89, folder=shared) for model in MODELS.values()]
    return dict(zip(MODELS, zip(built, again, strict=True), strict=True))


@pytest.fixture
def cifar(served) -> dict:
    """The record of the example's engine, which is stored."""
    return served["cifar"][1]


@pytest.mark.parametrize("name", MODELS)
def test_real_model_is_built_once_and_then_served(served, name):
    first, second = served[name]
    assert (first["outcome"], second["outcome"]) == ("built", "hit")
    assert first["build_seconds"] == second["build_seconds"]
    for same in ("key", "digest", "path"):
        assert first[same] == second[same]
    plan = Path(first["path"]).read_bytes()
    assert plan.startswith(b"vtrt")
    assert blake3.blake3(plan).hexdigest() == first["digest"]
    assert len(plan) == first["size_bytes"]


@pytest.mark.parametrize("path", RARE, ids=lambda path: path.stem)
def test_large_real_model_is_built_once_and_then_served(path, folder):
    first, second = (record("get", path, *SM_89, folder=folder) for _ in range(2))
    assert (first["outcome"], second["outcome"], first["digest"]) == ("built", "hit", second["digest"])


def test_real_models_share_no_key_and_no_engine(served):
    assert len({first["key"] for first, _ in served.values()}) == len(MODELS)
    assert len({first["digest"] for first, _ in served.values()}) == len(MODELS)


def test_record_says_what_was_asked_and_what_serves_it(cifar, served):
    assert (cifar["schema"], cifar["backend"], cifar["compute_capabilities"]) == (1, "tensorrt-rtx", ["8.9"])
    assert cifar["device"] is None
    assert cifar["profiles"] == [
        {"images": {"min": [1, 3, 32, 32], "opt": [32, 3, 32, 32], "max": [64, 3, 32, 32]}},
    ]
    assert cifar["model"] == {"path": str(EXAMPLE), "name": "cifar.onnx", "digest": cifar["model"]["digest"]}
    assert [reason["code"] for reason in cifar["reasons"]] == ["exact"]
    assert served["cifar"][0]["created_at"] == cifar["created_at"]
    assert cifar["created_at"].endswith("Z")


def test_standard_output_is_the_path_and_nothing_else(folder, model):
    command = [CONSOLE_SCRIPT, "get", model, *BATCH, *SM_89, "--dir", folder]
    built, hit = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    (line,) = built.stdout.splitlines()
    assert built.stdout == f"{line}\n" == hit.stdout
    assert Path(line).read_bytes().startswith(b"vtrt")
    assert Path(line).is_relative_to(folder)
    assert "built in" in built.stderr
    assert "hit in" in hit.stderr


def test_same_model_elsewhere_and_with_external_data_is_a_hit(shared, cifar, tmp_path):
    copy = save(onnx.load(EXAMPLE), tmp_path / "other" / "renamed.onnx")
    external = save(onnx.load(EXAMPLE), tmp_path / "external" / "model.onnx", external="weights.bin")
    assert (external.parent / "weights.bin").stat().st_size > 0
    for path in (copy, external):
        shown = record("get", path, *BATCH, *SM_89, folder=shared)
        assert (shown["outcome"], shown["key"]) == ("hit", cifar["key"])
        assert shown["model"]["path"] == str(path)


def test_relative_paths_mean_the_current_folder(shared, cifar, tmp_path):
    save(onnx.load(EXAMPLE), shared.parent / "model.onnx")
    command = ["get", "model.onnx", *BATCH, *SM_89, "--offline", "--dir", "cache"]
    assert run(*command, folder=tmp_path / "unused", cwd=shared.parent).stdout == f"{cifar['path']}\n"


def test_external_data_is_found_from_any_current_folder(folder, tmp_path):
    path = save(linear(seed=5), tmp_path / "external" / "model.onnx", external="weights.bin")
    done = run("get", Path("external") / path.name, *BATCH, *SM_89, folder=folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (("--dim", "batch=1:16:64", *SM_89), "profiles[0].images"),
        ((*BATCH, *SM_89, "--workspace", "1GiB"), "options.workspace_bytes"),
        ((*BATCH, *SM_89, "--opt-level", "4"), "options.optimization_level"),
        ((*BATCH, "--target", "sm_120"), "target.compute_capabilities"),
    ],
)
def test_other_request_is_a_miss_that_names_its_field(shared, cifar, asked, field):
    shown = record("explain", EXAMPLE, *asked, folder=shared)
    assert shown["verdict"] == "miss"
    assert shown["candidates"][0]["key"] == cifar["key"]
    assert [difference["field"] for difference in shown["candidates"][0]["differing"]] == [field]
    assert field in shown["reasons"][0]["text"]


def test_one_changed_weight_is_a_miss_that_names_the_weights(shared, cifar, tmp_path):
    changed = onnx.load(EXAMPLE)
    raw = bytearray(changed.graph.initializer[0].raw_data)
    raw[0] ^= 1
    changed.graph.initializer[0].raw_data = bytes(raw)
    path = save(changed, tmp_path / "changed.onnx")
    shown = record("explain", path, *BATCH, *SM_89, folder=shared)
    assert [difference["field"] for difference in shown["candidates"][0]["differing"]] == ["model.weights"]
    built = record("get", path, *BATCH, *SM_89, folder=shared)
    assert built["outcome"] == "built"
    assert built["key"] != cifar["key"]
    assert built["digest"] != cifar["digest"]


def test_other_build_number_of_tensorrt_is_a_miss_that_names_the_version(open_cache, model):
    ask = {"dims": {"batch": (1, 32, 64)}}
    before = open_cache().get(model, **ask)
    upgraded = open_cache(place=place_with(toolchain=replace(TOOLCHAIN, version="1.7.1.117")))
    explained = upgraded.explain(model, **ask)
    (difference,) = explained.candidates[0].verdict.differing
    assert (difference.field, difference.asked, difference.stored) == ("toolchain.version", "1.7.1.117", "1.7.1.116")
    assert upgraded.get(model, **ask).key != before.key


def test_output_file_is_a_copy_that_leaves_the_stored_engine_alone(shared, cifar, tmp_path):
    target = tmp_path / "model.plan"
    stored = Path(cifar["path"])
    target.write_bytes(stored.read_bytes()[:64])  # a plan of before, as far as its header tells
    done = run_here("get", EXAMPLE, *BATCH, *SM_89, "-o", target, folder=shared)
    assert done.stdout == f"{stored}\n"
    assert target.read_bytes() == stored.read_bytes()
    assert not target.samefile(stored)
    assert (target.stat().st_nlink, stored.stat().st_nlink) == (1, 1)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_output_that_cannot_be_written_is_refused_before_anything_is_built(folder, model, tmp_path):
    done = run_here("get", model, *BATCH, *SM_89, "-o", tmp_path / "no-folder" / "plan", folder=folder)
    assert_refused(done, 2, "no-folder", "mkdir -p")
    done = run_here("get", model, *BATCH, *SM_89, "-o", f"{tmp_path}/plans/", folder=folder)
    assert_refused(done, 2, "plans/ names a folder, and there is none", "plans.plan")
    with EngineCache.open(dir=folder) as cache:
        assert cache.builds() == []


@pytest.mark.parametrize("name", ["~", "a b", "-x", "$HOME"])
def test_the_command_that_makes_the_folder_of_an_output_file_makes_it(folder, model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    command = ["get", model, *BATCH, *SM_89, "--offline", f"--output={name}/x.plan"]
    assert_refused(refused := run_here(*command, folder=folder), 2, f"there is no folder {name}", "Make it")
    subprocess.run(["sh", "-c", refused.stderr.split("Make it: ")[1]], check=True)
    assert_refused(run_here(*command, folder=folder), 3, "no stored engine serves", "Leave --offline out")


# Bad input. Each makes its arguments in a folder of its own.

Maker = Callable[[Path], list[str | Path]]


def _bytes_named_onnx(data: bytes) -> Maker:
    def make(here: Path) -> list[str | Path]:
        (here / "bad.onnx").write_bytes(data)
        return [here / "bad.onnx"]

    return make


def _missing_external_data(here: Path) -> list[str | Path]:
    path = save(linear(), here / "bad.onnx", external="weights.bin")
    (here / "weights.bin").unlink()
    return [path, *BATCH]


def _external_data_outside(here: Path) -> list[str | Path]:
    path = save(linear(), here / "model" / "bad.onnx", external="weights.bin")
    (path.parent / "weights.bin").rename(here / "x")
    outside = onnx.load(path, load_external_data=False)
    for tensor in outside.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../x" if entry.key == "location" else entry.value
    return [save(outside, path), *BATCH]


def _small(*asked: str) -> Maker:
    return lambda here: [save(linear(), here / "model.onnx"), *asked]


SHAPE_FLAGS = "--min-shapes x:1x8 --opt-shapes x:8x8 --max-shapes x:32x8"
BAD_INPUT: dict[str, tuple[Maker, str, str]] = {
    "truncated": (_bytes_named_onnx(DAILY[0].read_bytes()[:1000]), "is not an ONNX model", "model again"),
    "text": (_bytes_named_onnx(b"not a model at all\n" * 9), "it is text", "model again"),
    "empty": (_bytes_named_onnx(b""), "bad.onnx is empty", "model again"),
    "folder": (lambda here: [here], "is a folder", "Name the file inside it."),
    "no such file": (lambda here: [here / "no.onnx"], "no.onnx", "path"),
    "no external data": (_missing_external_data, "weights.bin", "external data belongs in the ONNX file's folder"),
    "external data outside": (_external_data_outside, "'../x'", "Put the data next to the model"),
    "unknown dimension": (_small("--dim", "rows=1:2:4"), "no dynamic dimension 'rows'", "--dim batch=1:8:32"),
    "no profile": (_small(), "'x' has dynamic dimensions and no shapes", SHAPE_FLAGS),
    "minimum above optimum": (_small("--dim", "batch=4:2:8"), "not in order", "minimum <= optimum <= maximum"),
    "wrong rank": (_small("--opt-shapes", "x:1x8x1"), "has rank 2", "Give 2 sizes."),
    "unknown input": (_small("--opt-shapes", "z:1x8"), "no input 'z'", SHAPE_FLAGS),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_reported_with_its_fix(name, tmp_path):
    make, what, fix = BAD_INPUT[name]
    arguments = ("get", *SM_89, *make(tmp_path), "--json")
    assert_refused(run_here(*arguments, folder=tmp_path / "cache"), 2, what, fix)


def test_bad_input_leaves_no_traceback_in_a_process_of_its_own(tmp_path):
    make, what, fix = BAD_INPUT["truncated"]
    assert_refused(run("get", *SM_89, *make(tmp_path), folder=tmp_path / "cache"), 2, what, fix)


# Other ends


def _has_gpu() -> bool:
    try:
        find_device(None)
    except NoDeviceError:
        return False
    return True


no_gpu = pytest.mark.skipif(_has_gpu(), reason="probe: find_device finds a GPU")


@no_gpu
def test_loading_without_a_gpu_is_an_error_with_tensorrts_reason_and_keeps_the_engine(shared, cifar):
    with EngineCache.open(dir=shared) as cache:
        with pytest.raises(LoadRefusedError, match=r"no usable GPU .*INVALID; cudaError 35: CUDA driver"):
            cache.load(EXAMPLE, dims={"batch": (1, 32, 64)}, target="sm_89", offline=True)
        assert cache.find(cifar["key"]).digest == cifar["digest"]


@no_gpu
def test_missing_shapes_and_a_missing_gpu_are_reported_in_one_round(tmp_path):
    done = run_here("get", save(linear(), tmp_path / "model.onnx"), folder=tmp_path / "cache")
    assert done.returncode == 2
    assert "'x' has dynamic dimensions and no shapes" in done.stderr
    assert "--dim batch=1:8:32" in done.stderr
    assert "Then: " in done.stderr
    assert "Name what to build for, such as --target sm_89" in done.stderr


def test_model_that_tensorrt_refuses_leaves_a_reason_and_a_log(folder, tmp_path):
    node = helper.make_node("Frobnicate", ["x"], ["y"], "frob", domain="my.ops")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)]
    graph = helper.make_graph([node], "graph", value[:1], value[1:])
    path = save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "odd.onnx")

    done = run("get", path, *SM_89, "--json", folder=folder)

    assert done.returncode == 7
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["exit_code"]) == ("build", 7)
    assert "Frobnicate" in error["message"]
    assert "Frobnicate" in done.stderr
    assert "Traceback" not in done.stderr
    log = Path(done.stderr.partition("The builder's log: ")[2].splitlines()[0])
    assert "odd.onnx" in log.read_text()
    with EngineCache.open(dir=folder) as cache:
        assert cache.entries() == []
        (build,) = cache.builds()
        assert (build.state, cache.log_path(build)) == ("failed", log)
        assert "Frobnicate" in build.reason
        assert cache.stats().builds_failed == 1
    shown = record("explain", path, *SM_89, folder=folder)
    assert (shown["last_failure"], shown["last_failure_log"]) == (build.reason, str(log))
    assert run_here("verify", folder=folder).returncode == 0


def test_offline_miss_says_why_and_how_to_build(folder, model):
    done = run_here("get", model, *BATCH, *SM_89, "--offline", "--json", folder=folder)
    assert_refused(done, 3, "no engine of this model is stored", "Leave --offline out to build it")
    assert not folder.exists()


def test_timeout_ends_the_wait_for_another_builder_and_names_it(folder, model):
    with EngineCache.open(dir=folder) as cache:
        cache.make()
        key = cache.explain(model, dims={"batch": (1, 32, 64)}, target="sm_89").key
        with cache._storage.locks.hold(key, None):
            done = run_here("get", model, *BATCH, *SM_89, "--timeout", "300ms", "-q", folder=folder)
        assert cache.builds() == []
    assert_refused(done, 5, f"timed out after 0.3 s of waiting for process {os.getpid()} on ", "--timeout")


def test_hit_waits_for_no_lock(shared, cifar):
    with (
        EngineCache.open(dir=shared) as cache,
        cache._storage.locks.hold(cifar["key"], None),
        cache._storage.locks.hold("store", None),
    ):
        shown = record("get", EXAMPLE, *BATCH, *SM_89, "--timeout", "0", folder=shared)
    assert shown["outcome"] == "hit"


@no_gpu
def test_no_gpu_and_no_target_says_to_name_one(folder, model):
    done = run_here("get", model, *BATCH, folder=folder)
    assert_refused(done, 8, "no TensorRT here can do this", "--target sm_89")


def test_target_that_tensorrt_rtx_lacks_names_those_that_it_has(folder, model):
    done = run_here("get", model, *BATCH, "--target", "sm_90", folder=folder)
    assert_refused(done, 8, "cannot build for sm_90", "Name one of these")


def test_option_that_rtx_has_not_is_refused_with_what_it_has(folder, model):
    done = run_here("get", model, *BATCH, *SM_89, "--hardware-compatibility", "ampere_plus", folder=folder)
    assert_refused(done, 8, "TensorRT-RTX has no hardware compatibility", "--target portable")
    with EngineCache.open(dir=folder) as cache:
        assert cache.builds() == []


def test_fp16_is_another_engine_smaller_and_names_its_converter(folder):
    plain = record("get", EXAMPLE, *BATCH, *SM_89, folder=folder)
    half = record("get", EXAMPLE, *BATCH, *SM_89, "--fp16", folder=folder)
    assert half["key"] != plain["key"]
    assert half["size_bytes"] < plain["size_bytes"]
    assert half["conversion"]["converter"] == "onnxconverter-common"
    assert half["conversion"]["version"] == importlib.metadata.version("onnxconverter-common")
    assert record("get", EXAMPLE, *BATCH, *SM_89, "--fp16", folder=folder)["outcome"] == "hit"
