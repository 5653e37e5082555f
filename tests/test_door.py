"""The door gives an answer again only while the full path would give the same; else it lets that answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import FakeBuilder, fake_place
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import gather, linear, save
from mounts import Image
from waiting import LIMIT_S

from enginecache.cache import EngineCache
from enginecache.cli import fast_path, streams
from enginecache.cli.app import app
from enginecache.config import Config
from enginecache.files import fingerprint, mounts
from enginecache.host import evidence

ELAPSED = re.compile(rb'(?<=hit in )[\d.]+|(?<="elapsed_seconds": )[\d.e-]+')
SETTLE_NS = 50_000_000
SUPPORT = Path(__file__).parent / "support"
SETTLED_S = SETTLE_NS / 1e9 + 0.05


class Desk:
    """A cache with models, and both ways in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cache"
        self.inline = save(linear(seed=1), folder / "inline.onnx")
        self.other = save(linear(seed=2), folder / "other.onnx")
        (folder / "split").mkdir()
        self.split = save(linear(seed=3), folder / "split" / "split.onnx", external="weights.data")
        self.builder = FakeBuilder()

    def open(self, config: Config | None = None, **arguments) -> EngineCache:
        return EngineCache(config or Config.load(**arguments), builder=self.builder, place=fake_place)


def fully(capfdbinary, arguments: list[str]) -> tuple[int, bytes, bytes]:
    """Return the result of the full path."""
    capfdbinary.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["enginecache", *arguments])
        with pytest.raises(SystemExit) as ended:
            app(prog_name="enginecache")
    out, err = capfdbinary.readouterr()
    return int(ended.value.code or 0), out, err


def by_the_door(capfdbinary, arguments: list[str]) -> tuple[int, bytes, bytes] | None:
    """Return the answer of the fast path; None if it leaves it to the full path."""
    capfdbinary.readouterr()
    try:
        is_answered = fast_path.answer(arguments, os.environ)
    except Exception:  # noqa: BLE001  as main does
        is_answered = False
    out, err = capfdbinary.readouterr()
    assert is_answered or (out, err) == (b"", b"")
    return (0, out, err) if is_answered else None


def timeless(said: tuple[int, bytes, bytes]) -> tuple[int, bytes, bytes]:
    code, out, err = said
    return code, ELAPSED.sub(b"T", out), ELAPSED.sub(b"T", err)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("door"))


@pytest.fixture
def opened(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("ENGINECACHE_DIR", str(desk.folder))
    monkeypatch.setattr(EngineCache, "open", desk.open)
    # Files come to rest within a moment: here no two changes fall into one tick of the clock.
    monkeypatch.setattr(fingerprint, "SETTLE_NS", SETTLE_NS)
    return desk


def known(capfdbinary, arguments: list[str]) -> None:
    """Have a command line answered until it is remembered."""
    fully(capfdbinary, arguments)
    deadline = time.monotonic() + LIMIT_S
    while by_the_door(capfdbinary, arguments) is None:
        assert time.monotonic() < deadline, "it is not remembered"
        time.sleep(SETTLED_S)
        fully(capfdbinary, arguments)


OPTIONS = [
    [],
    ["-q"],
    ["--json"],
    ["--dim", "batch=1:2:4"],
    ["--dim=batch=1:2:4"],
    ["--dim", "batch=1:2:8"],
    ["--opt-level", "2"],
    ["--offline"],
    ["--target", "sm_89"],
    ["--accept", "compatible"],
    ["--timeout", "5m"],
]

LINES = st.lists(st.sampled_from(OPTIONS), max_size=3).map(lambda parts: [word for part in parts for word in part])


def test_what_was_asked_before_is_answered_with_the_same_words(opened, capfdbinary):
    for options in (["--dim", "batch=1:2:4"], ["--json", "--dim", "batch=1:2:4"], ["-q", "--dim=batch=1:2:4"]):
        arguments = ["get", str(opened.inline), *options]
        assert by_the_door(capfdbinary, arguments) is None
        known(capfdbinary, arguments)
        said = by_the_door(capfdbinary, arguments)
        assert timeless(said) == timeless(fully(capfdbinary, arguments))
        assert said[0] == 0
        assert str(opened.folder).encode() in said[1]


@pytest.mark.parametrize("extra", [[], ["--quiet"]])
def test_an_unknown_variable_is_warned_of_by_a_remembered_answer_too(opened, capfdbinary, monkeypatch, extra):
    monkeypatch.setenv("ENGINECACHE_MAXSIZE", "1GiB")
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4", *extra]
    known(capfdbinary, arguments)
    said = by_the_door(capfdbinary, arguments)
    assert b"warning: ENGINECACHE_MAXSIZE is not a variable of enginecache" in said[2]
    assert timeless(said) == timeless(fully(capfdbinary, arguments))


def test_library_folders_are_looked_at_for_the_driver_alone(opened, capfdbinary, monkeypatch, tmp_path):
    # The times of files under /sys say nothing, as those of the images that bring the driver to a container.
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/sys:{tmp_path}")
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    (tmp_path / "libsomething.so").touch()
    assert by_the_door(capfdbinary, arguments) is not None
    (tmp_path / "libnvidia-ml.so.1").touch()
    assert by_the_door(capfdbinary, arguments) is None


def bytes_read() -> int:
    """By this process since it began, also from the page cache."""
    return int(re.search(r"^rchar: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


@pytest.mark.parametrize("weights_bytes", [1 << 30, pytest.param(5 << 30, marks=pytest.mark.reliability)])
def test_a_hit_on_a_large_model_reads_none_of_it(opened, capfdbinary, tmp_path, weights_bytes):
    model = gather(tmp_path / "large.onnx", rows=weights_bytes >> 10)
    time.sleep(SETTLED_S)
    arguments = ["get", str(model), "--dim", "batch=1:2:4"]
    started = bytes_read()
    fully(capfdbinary, arguments)
    assert bytes_read() - started > weights_bytes  # so what is read is seen here

    known(capfdbinary, arguments)
    started = bytes_read()
    assert by_the_door(capfdbinary, arguments)[0] == 0
    by_door = bytes_read() - started
    assert fully(capfdbinary, arguments)[0] == 0
    by_the_full_path = bytes_read() - started - by_door
    cache = EngineCache.open(dir=opened.folder)
    again = [cache.get(model, dims={"batch": (1, 2, 4)}).outcome for _ in range(3)]
    in_process = bytes_read() - started - by_door - by_the_full_path
    assert again == ["hit"] * 3
    # Rows of the registry, and files of /proc.
    assert max(by_door, by_the_full_path, in_process) < 2 << 20


def test_a_record_is_json_with_the_seconds_of_this_answer(opened, capfdbinary):
    arguments = ["get", str(opened.inline), "--json", "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    started = time.monotonic()
    record = json.loads(by_the_door(capfdbinary, arguments)[1])
    assert record["outcome"] == "hit"
    assert 0 <= record["elapsed_seconds"] <= time.monotonic() - started


def rewrite(path: Path) -> None:
    """Other bytes of the same size, in place."""
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def replaced(path: Path, other: Path) -> None:
    content = other.read_bytes()
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.rename(path)


@contextlib.contextmanager
def kept(*paths: Path) -> Iterator[None]:
    """Put files back as they were, and let them come to rest."""
    saved = [(path, path.read_bytes(), path.stat().st_mode) for path in paths]
    try:
        yield
    finally:
        for path, content, mode in saved:
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            path.chmod(mode)


def change_model(desk: Desk, monkeypatch) -> None:
    replaced(desk.inline, desk.other)


def change_weights_inside(desk: Desk, monkeypatch) -> None:
    rewrite(desk.inline)


def touch_model(desk: Desk, monkeypatch) -> None:
    os.utime(desk.inline)


def change_variable(desk: Desk, monkeypatch) -> None:
    monkeypatch.setenv("ENGINECACHE_BACKEND", "tensorrt-rtx")


def hide_gpus(desk: Desk, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def go_elsewhere(desk: Desk, monkeypatch) -> None:
    monkeypatch.chdir(desk.inline.parent)


def other_locale(desk: Desk, monkeypatch) -> None:
    monkeypatch.setenv("LC_ALL", "POSIX")


def forbid_tf32(desk: Desk, monkeypatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


def set_a_switch_of_the_compiler(desk: Desk, monkeypatch) -> None:
    monkeypatch.setenv("__ANY_SWITCH_NOWUD", "")


def install_something(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(evidence, "LOOKS", {**evidence.LOOKS, "stat": lambda path: b"newer" + evidence._stat(path)})


def other_gpu(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(evidence, "LOOKS", {**evidence.LOOKS, "names": lambda path: b"0000:01:00.0"})


def other_release(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr("enginecache.__version__", "99")


def other_interpreter(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/elsewhere")


def other_module_path(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", ["/elsewhere", *sys.path])


def open_registry_to_all(desk: Desk, monkeypatch) -> None:
    (desk.folder / "registry.sqlite").chmod(0o666)


def spoil_the_answer(desk: Desk, monkeypatch) -> None:
    with contextlib.closing(sqlite3.connect(desk.folder / "registry.sqlite")) as connection, connection:
        connection.execute("UPDATE answers SET printed = CAST(replace(printed, 'engine', 'engin3') AS BLOB)")


CHANGES = [
    *(change_model, change_weights_inside, touch_model, change_variable, hide_gpus, go_elsewhere, other_locale),
    *(install_something, other_gpu, other_release, other_interpreter, other_module_path, open_registry_to_all),
    *(spoil_the_answer, forbid_tf32, set_a_switch_of_the_compiler),
]


def test_a_variable_that_the_settings_pass_to_the_builder_is_watched(opened, capfdbinary, monkeypatch, tmp_path):
    settings_file = tmp_path / "config.toml"
    settings_file.write_text("pass_environment = ['MINE']", encoding="utf-8")
    monkeypatch.setenv("ENGINECACHE_CONFIG", str(settings_file))
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    monkeypatch.setenv("NOT_MINE", "1")
    assert by_the_door(capfdbinary, arguments) is not None
    monkeypatch.setenv("MINE", "")
    assert by_the_door(capfdbinary, arguments) is None


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_anything_that_it_rests_on_leaves_it_to_the_full_path(opened, capfdbinary, monkeypatch, change):
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    with kept(opened.inline):
        change(opened, monkeypatch)
        assert by_the_door(capfdbinary, arguments) is None
    monkeypatch.undo()
    (opened.folder / "registry.sqlite").chmod(0o600)


def test_a_change_of_external_data_leaves_it_to_the_full_path(opened, capfdbinary):
    arguments = ["get", str(opened.split), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    (data,) = (path for path in opened.split.parent.iterdir() if path != opened.split)
    with kept(data):
        rewrite(data)
        assert by_the_door(capfdbinary, arguments) is None


def test_a_settings_file_that_appears_leaves_it_to_the_full_path(opened, capfdbinary, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    (tmp_path / "enginecache").mkdir()
    known(capfdbinary, arguments)
    (tmp_path / "enginecache" / "config.toml").write_text('backend = "tensorrt-rtx"\n', encoding="utf-8")
    assert by_the_door(capfdbinary, arguments) is None


def test_another_image_in_the_models_place_leaves_it_to_the_full_path(opened, capfdbinary, tmp_path):
    (tmp_path / "image").mkdir()
    image = Image("overlay on squashfs", tmp_path / "image")
    try:
        model = image.replace("model.onnx", linear(seed=1).SerializeToString())
        arguments = ["get", str(model), "--dim", "batch=1:2:4"]
        known(capfdbinary, arguments)
        first = by_the_door(capfdbinary, arguments)
        image.replace("model.onnx", linear(seed=2).SerializeToString())
        assert by_the_door(capfdbinary, arguments) is None
        assert timeless(fully(capfdbinary, arguments))[1] != timeless(first)[1]
    finally:
        image.detach()


@pytest.mark.parametrize("name", ["boot_id", "status_of"])
def test_another_boot_or_root_is_another_command_line(opened, capfdbinary, monkeypatch, name):
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    there = {"boot_id": lambda: "the next", "status_of": lambda path: (*mounts.status_of(path)[:5], 7, 0)}
    monkeypatch.setattr(evidence, name, there[name])
    assert by_the_door(capfdbinary, arguments) is None


def engine_of(desk: Desk, arguments: list[str], capfdbinary) -> Path:
    return Path(os.fsdecode(fully(capfdbinary, arguments)[1].strip()))


HARMS: list[Callable[[EngineCache, Path], object]] = [
    lambda _cache, path: path.unlink(),
    lambda _cache, path: rewrite(path),
    lambda cache, _path: [cache.remove(used.record) for used in cache.entries()],
]


@pytest.mark.parametrize("harm", HARMS, ids=["deleted", "damaged", "removed"])
def test_an_engine_that_is_gone_or_damaged_is_not_handed_out(opened, capfdbinary, harm):
    arguments = ["get", str(opened.other), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    harm(opened.open(), engine_of(opened, arguments, capfdbinary))
    assert by_the_door(capfdbinary, arguments) is None
    assert fully(capfdbinary, arguments)[0] == 0


@pytest.mark.parametrize("name", ["registry.sqlite", "registry.sqlite-journal"])
def test_a_pipe_in_the_registrys_place_is_not_waited_for(opened, name):
    registry, kept = opened.folder / name, opened.folder.parent / "kept"
    registry.rename(kept)
    os.mkfifo(registry, 0o600)
    try:
        assert not fast_path.answer(["get", str(opened.inline), "--dir", str(opened.folder)], {})
    finally:
        kept.rename(registry)


def test_a_rebuild_is_another_answer(opened, capfdbinary):
    arguments = ["get", str(opened.other), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    fully(capfdbinary, [*arguments, "--rebuild"])
    assert by_the_door(capfdbinary, arguments) is None


@pytest.mark.parametrize(
    "extra", [["--rebuild"], ["-o", "copy.engine"], ["--verify-model"]], ids=["rebuild", "copy", "verify"]
)
def test_what_does_more_than_answer_is_never_remembered(opened, capfdbinary, monkeypatch, tmp_path, extra):
    monkeypatch.chdir(tmp_path)
    plain = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    known(capfdbinary, plain)
    for _ in range(2):
        fully(capfdbinary, [*plain, *extra])
        assert by_the_door(capfdbinary, [*plain, *extra]) is None


def test_a_use_is_noted_so_that_eviction_knows_of_it(opened, capfdbinary):
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    (used, *_) = [u for u in opened.open().entries() if u.record.model_name == "inline.onnx"]
    note = opened.folder / "uses" / used.record.key
    os.utime(note, (1, 1))
    assert by_the_door(capfdbinary, arguments) is not None
    assert note.stat().st_mtime > 1


def test_a_model_that_is_young_is_not_remembered(opened, capfdbinary, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 60_000_000_000)
    model = save(linear(seed=8), tmp_path / "young.onnx")
    arguments = ["get", str(model), "--dim", "batch=1:2:4"]
    fully(capfdbinary, arguments)
    fully(capfdbinary, arguments)
    assert by_the_door(capfdbinary, arguments) is None


def test_nothing_is_remembered_where_ctime_is_data(opened, capfdbinary, monkeypatch):
    monkeypatch.setattr("enginecache.host.surroundings.has_kernel_times", lambda _fingerprint: False)
    arguments = ["get", str(opened.inline), "--dim", "batch=1:3:5"]
    time.sleep(SETTLED_S)
    fully(capfdbinary, arguments)
    fully(capfdbinary, arguments)
    assert by_the_door(capfdbinary, arguments) is None


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(line=LINES, model=st.sampled_from(["inline", "other", "split"]), changes=st.lists(st.integers(0, 6), max_size=2))
def test_the_door_never_answers_differently_from_the_full_path(opened, capfdbinary, line, model, changes):
    """Whatever was asked, in whatever words, and whatever changed since."""
    arguments = ["get", str(getattr(opened, model)), *line]
    fully(capfdbinary, arguments)
    fully(capfdbinary, arguments)
    for number in changes:
        with pytest.MonkeyPatch.context() as patch, kept(opened.inline):
            CHANGES[number](opened, patch)
            _compare(capfdbinary, arguments)
    _compare(capfdbinary, arguments)


def _compare(capfdbinary, arguments: list[str]) -> None:
    said = by_the_door(capfdbinary, arguments)
    if said is not None:
        assert timeless(said) == timeless(fully(capfdbinary, arguments))


BANNED = {
    *("sqlalchemy", "typer", "rich", "numpy", "onnx", "asyncio", "tensorrt", "tensorrt_rtx", "pycuda", "dataclasses"),
    *("tomllib", "tomli", "importlib.metadata", "argparse", "logging", "pathlib", "typing", "re", "json", "contextlib"),
}
WARM = """
import sys
before = set(sys.modules)
sys.argv = ["enginecache", *sys.argv[1:]]
from enginecache.cli.fast_path import main
main()
print(*sorted(set(sys.modules) - before), file=sys.stderr)
"""


PROGRAM = f"""
import sys
sys.argv[0] = "enginecache"
sys.path.insert(0, {str(SUPPORT)!r})
import enginecache.cli.main, enginecache.cli.fast_path, enginecache.files.fingerprint
from enginecache.cache import EngineCache
from enginecache.config import Config
from fakes import FakeBuilder, fake_place
enginecache.files.fingerprint.SETTLE_NS = {SETTLE_NS}
def open_cache(config=None, **arguments):
    return EngineCache(config or Config.load(**arguments), builder=FakeBuilder(), place=fake_place)
EngineCache.open = open_cache
way = sys.argv.pop(1)
if way == "door":
    enginecache.cli.main.main = None  # no way past the fast path
    enginecache.cli.fast_path.main()
else:
    enginecache.cli.main.main()
"""


def way(name: str, arguments: list[str], output: int) -> tuple[int, bytes]:
    """One of the two ways as a program, with this standard output: exit code and standard error."""
    command = [sys.executable, "-c", PROGRAM, name, *arguments]
    ran = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, check=False, timeout=LIMIT_S)
    return ran.returncode, ELAPSED.sub(b"T", ran.stderr)


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def file_opened_for_reading() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def test_an_answer_that_cannot_be_written_is_the_same_error_on_both_ways(opened):
    """And only one: the full path does not say again what the door has said."""
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    deadline = time.monotonic() + LIMIT_S
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        while way("door", arguments, nowhere.fileno())[0]:
            assert time.monotonic() < deadline, "it is not remembered"
            time.sleep(SETTLED_S)
            way("full", arguments, nowhere.fileno())
    for make in (full_disk, unread_pipe, file_opened_for_reading):
        output = make()
        door_said, full_said = (way(name, arguments, output) for name in ("door", "full"))
        os.close(output)
        assert door_said == full_said
        code, text = door_said
        assert code == 1
        assert text.count(b"hit in") == text.count(b"error: standard output") == 1
        assert text.count(b"\n") == 3


def test_standard_error_that_cannot_be_written_is_nobody_to_talk_to(opened, monkeypatch, capfdbinary):
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4"]
    known(capfdbinary, arguments)
    write_all = fast_path.write_all

    def fail(descriptor, data):
        if descriptor == 2:
            raise streams.UnwrittenError(0, BrokenPipeError())
        write_all(descriptor, data)

    monkeypatch.setattr(fast_path, "write_all", fail)
    code, out, err = by_the_door(capfdbinary, arguments)
    assert (code, err) == (0, b"")
    assert out.startswith(str(opened.folder).encode())


@pytest.mark.rtx
def test_a_warm_hit_loads_next_to_nothing(tmp_path):
    model = save(linear(), tmp_path / "model.onnx")
    command = [sys.executable, "-c", WARM, "get", str(model), "--dim", "batch=1:2:4", "--target", "sm_89", "-q"]
    environ = {**os.environ, "ENGINECACHE_DIR": str(tmp_path / "cache")}
    loaded: set[str] = set()
    for _ in range(30):
        done = subprocess.run(command, check=True, env=environ, capture_output=True, text=True)
        loaded = set(done.stderr.split())
        if loaded and "typer" not in loaded:
            break
        time.sleep(0.4)
    assert "enginecache.cli.fast_path" in loaded
    assert not loaded & BANNED


def test_an_engine_of_a_wider_reach_is_given_again_until_another_of_the_model_is_there(opened, capfdbinary):
    stored = opened.open().get(opened.inline, dims={"batch": (1, 2, 4)}, target=["sm_86", "sm_89"])
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:4", "--target", "sm_86", "--json"]
    known(capfdbinary, arguments)
    said = by_the_door(capfdbinary, arguments)
    assert timeless(said) == timeless(fully(capfdbinary, arguments))
    record = json.loads(said[1])
    assert (record["key"], record["reasons"][0]["code"]) == (stored.key, "wider_reach")
    own = opened.open().get(opened.inline, dims={"batch": (1, 2, 4)}, target="sm_86", rebuild=True)
    assert by_the_door(capfdbinary, arguments) is None
    assert json.loads(fully(capfdbinary, arguments)[1])["key"] == own.key
    known(capfdbinary, arguments)
    assert json.loads(by_the_door(capfdbinary, arguments)[1])["key"] == own.key


def test_an_engine_of_a_wider_reach_that_was_removed_is_not_given_again(opened, capfdbinary):
    cache = opened.open()
    stored = cache.get(opened.inline, dims={"batch": (1, 2, 6)}, target=["sm_86", "sm_89"])
    arguments = ["get", str(opened.inline), "--dim", "batch=1:2:6", "--target", "sm_86", "--offline"]
    known(capfdbinary, arguments)
    cache.remove(stored.record)
    assert by_the_door(capfdbinary, arguments) is None
    assert fully(capfdbinary, arguments)[0] == 3
