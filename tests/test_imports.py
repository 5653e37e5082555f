"""Lazy imports: a program that imports enginecache, or hits, pays for nothing that it does not use."""

import json
import subprocess
import sys

import pytest
from models import EXAMPLE

HEAVY = {
    "alembic",
    "blake3",
    "filelock",
    "google.protobuf",
    "modelopt",
    "numpy",
    "onnx",
    "onnxconverter_common",
    "platformdirs",
    "pycuda",
    "pynvml",
    "rich",
    "sqlalchemy",
    "tensorrt",
    "tensorrt_rtx",
    "typer",
}


def loaded_by(code, **environ):
    """Return the heavy modules that a program has loaded at its end."""
    code += f"\nimport json, sys; print(json.dumps(sorted({HEAVY!r} & sys.modules.keys())))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import enginecache; enginecache.__version__") == set()


def test_importing_the_errors_loads_nothing_heavy():
    assert loaded_by("import enginecache.errors") == set()


@pytest.mark.parametrize(
    "module",
    [
        "cache",
        "cli.app",
        "maintenance.doctor",
        "pipeline.load",
        "trt.build.process",
        "pipeline.placement",
        "config",
    ],
)
def test_no_module_loads_a_gpu_library_a_model_library_or_the_migrations(module):
    assert not loaded_by(f"import enginecache.{module}") & {
        "alembic",
        "google.protobuf",
        "numpy",
        "onnx",
        "pycuda",
        "pynvml",
        "tensorrt",
        "tensorrt_rtx",
    }


@pytest.mark.rtx
def test_hit_loads_no_database_library_no_locks_and_nothing_that_builds(tmp_path):
    code = (
        "from enginecache import EngineCache\n"
        f"with EngineCache.open(dir={str(tmp_path / 'cache')!r}) as cache:\n"
        f"    print(cache.get({str(EXAMPLE)!r}, dims={{'batch': 4}}, target='sm_89').outcome)\n"
    )
    built = loaded_by(code)
    assert "tensorrt_rtx" not in built  # the builder is a process of its own
    hit = loaded_by(code)
    assert hit <= {"blake3", "platformdirs"}


def test_public_names_are_there_and_others_are_not():
    code = "import enginecache as e\nassert all(getattr(e, name) for name in e.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)
    ran = subprocess.run(
        [sys.executable, "-c", "import enginecache; enginecache.none"], capture_output=True, text=True, check=False
    )
    assert "module 'enginecache' has no attribute 'none'" in ran.stderr
