"""The wheel, installed in a fresh environment outside the tree, and the editable install."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import enginecache
from enginecache.storage.registry.schema import HEAD

ROOT = Path(__file__).parents[1]


def run(*command, cwd="/", **environ):
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(
        [*map(str, command)], env={**kept, **environ}, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def must(*command, cwd="/", **environ):
    ran = run(*command, cwd=cwd, **environ)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def pip(*arguments, **environ):
    return must(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments, **environ)


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """Environment with the build backend that pyproject.toml asks for, fetched once where it is missing."""
    try:
        if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
            return {}
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = tmp_path_factory.mktemp("backend")
    pip("install", "--target", folder, "setuptools>=77")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, since a build leaves files in it. Its folder has the package's name, as a clone has."""
    folder = tmp_path_factory.mktemp("source") / "enginecache"
    for name in ("enginecache", "migrations", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, backend, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, **backend)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def editable(source, backend, tmp_path_factory):
    python = make_environment(tmp_path_factory.mktemp("editable"))
    arguments = ("install", "--no-deps", "--no-build-isolation", "--force-reinstall")
    pip("--python", python, *arguments, "-e", source, **backend)
    return python


def packages_of(python):
    base = str(python.parents[1])
    return Path(sysconfig.get_path("purelib", vars={"base": base, "platbase": base}))


def make_environment(folder):
    """A fresh environment that borrows the dependencies, and nothing else, of this one."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    # A line of a path alone: .pth files in there, such as an editable install's, are not read.
    (packages_of(python) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    python = make_environment(tmp_path_factory.mktemp("installed"))
    pip("--python", python, "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    return python


def test_wheel_holds_the_package_the_migrations_and_the_licence_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.startswith("enginecache/")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "enginecache").rglob("*.py")}
    modules |= {f"enginecache/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "migrations").rglob("*.py")}
    assert packed == modules | {"enginecache/py.typed", "enginecache/migrations/script.py.mako"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"enginecache"}
    assert wheel.name.endswith("-py3-none-any.whl")


def test_metadata_names_the_extras_and_what_they_bring(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("enginecache", enginecache.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"tensorrt", "cuda", "rtx", "modelopt", "check", "test"}
    required = metadata.get_all("Requires-Dist")
    base = {line for line in required if "extra ==" not in line}
    assert all(">=" in line for line in base)
    brought = {
        extra: sorted(
            line.split(";")[0].strip() for line in required if f"extra == '{extra}'" in line.replace('"', "'")
        )
        for extra in ("tensorrt", "cuda", "rtx", "modelopt")
    }
    assert brought == {
        "tensorrt": ["nvidia-ml-py", "onnxconverter-common>=1.16", "tensorrt"],
        "cuda": ["pycuda"],
        "rtx": ["nvidia-ml-py", "onnxconverter-common>=1.16", "tensorrt-rtx-cu13"],
        "modelopt": ["nvidia-modelopt[onnx]"],
    }
    assert not any(name in line for line in base for name in ("tensorrt", "pycuda", "nvidia"))


def test_installed_wheel_runs_from_anywhere(installed, tmp_path):
    where = must(installed, "-c", "import enginecache.migrations as m; print(m.__file__)").strip()
    assert Path(where).is_relative_to(installed.parents[1])
    script = installed.with_name("enginecache")
    folder = {"ENGINECACHE_DIR": str(tmp_path / "cache")}
    assert must(installed, "-m", "enginecache", "--version") == f"enginecache {enginecache.__version__}\n"
    must(script, "db", "upgrade", **folder)
    must(script, "db", "check", **folder)
    assert must(script, "db", "current", **folder) == f"{HEAD}\n"
    assert f"ok\tregistry\tschema {HEAD}" in must(script, "doctor", **folder)


def test_source_distribution_holds_the_migrations_where_the_wheel_has_them(source, backend, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    must(sys.executable, "-c", code, cwd=source, **backend)
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers() if not member.isdir()}
    assert {"enginecache/migrations/script.py.mako", "enginecache/migrations/versions/0001_first_schema.py"} <= {
        *members
    }
    assert not any(member.issym() for member in members.values())


def test_editable_install_finds_package_and_migrations(source, editable, tmp_path):
    for module in ("enginecache", "enginecache.migrations.versions"):
        where = must(editable, "-c", f"import {module} as m; print(m.__path__[0])").strip()
        assert Path(where).is_relative_to(source)
    must(editable, "-m", "enginecache", "db", "upgrade", ENGINECACHE_DIR=str(tmp_path / "cache"))


def test_editable_install_is_a_path_that_editors_read_and_no_import_hook(source, editable):
    installed = [path for path in packages_of(editable).iterdir() if "enginecache" in path.name]
    assert sorted(path.suffix for path in installed) == [".dist-info", ".pth"]
    (path,) = [path for path in installed if path.suffix == ".pth"]
    assert path.read_text(encoding="utf-8").split() == [str(source)]


def test_editable_install_is_imported_from_the_folder_that_holds_the_checkout(source, editable):
    assert source.name == "enginecache"
    code = "import enginecache; print(enginecache.EngineCache.__name__)"
    assert must(editable, "-c", code, cwd=source.parent) == "EngineCache\n"


CLIENT = """
    from enginecache import EngineCache

    with EngineCache.open() as cache:
        entry = cache.get("model.onnx", dims={"batch": (1, 32, 64)})
        size: int = entry.size_bytes
        wrong: str = entry.size_bytes
        cache.pin(entry)
        open(entry, "rb").close()
        cache.get("model.onnx", dim={"batch": 1})
    EngineCache.open(directory="/cache")
    EngineCache("/cache", backend="cuda")
"""


def test_type_checker_sees_the_types_of_an_editable_install(editable, tmp_path):
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(CLIENT))
    arguments = ("--strict", "--cache-dir", tmp_path / "mypy", "--python-executable", editable)
    ran = run(sys.executable, "-m", "mypy", *arguments, script, cwd=tmp_path)
    errors = [line.partition("error: ")[2] for line in ran.stdout.splitlines() if "error:" in line]
    assert [error[:60] for error in errors] == [
        'Incompatible types in assignment (expression has type "int", '[:60],
        'Unexpected keyword argument "dim" for "get" of "EngineCache"; did you mean'[:60],
        'Unexpected keyword argument "directory" for "open" of "StoredEngines"'[:60],
        'Argument "backend" to "EngineCache" has incompatible type "Literal'[:60],
    ]
