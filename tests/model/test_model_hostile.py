"""An ONNX file may be anybody's: bounded memory and time, and no exception but ``ModelError``.

Protobuf parses in C: what could make it crash runs in a process of its own here, with a limit on its memory and time.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from small_onnx_models import LIGHT, PLACES, external, identity_of, in_constant, linear, raw, typed
from waiting import LIMIT_S

from enginecache.errors import ModelError
from enginecache.model import ModelIdentity, ModelSource, identify
from enginecache.model import external as external_data
from enginecache.model.reader import MEMORY_FACTOR

SUPPORT = Path(__file__).parent
GIB = 1 << 30

IDENTIFY = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
import numpy, onnx
from enginecache.errors import ModelError
from enginecache.model import ModelSource, identify

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

before, started = peak(), time.process_time()
try:
    print("ok", identify(ModelSource.of(sys.argv[1])).digest)
except ModelError as error:
    print("ModelError", error.what)
print(peak() - before)
"""


def in_own_process(path: Path, *, limit_bytes: int = 4 * GIB) -> tuple[str, int]:
    """Return the result of identifying a file, and the memory that it took; fail if it crashes or takes long."""
    ran = subprocess.run(
        [sys.executable, "-c", IDENTIFY, path, str(limit_bytes)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])
    said, peak = ran.stdout.splitlines()
    return said, int(peak)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field on the wire."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(depth: int) -> bytes:
    """A model whose graph has an If in an If in an If; on the wire, since protobuf itself refuses to write it."""
    graph = linear().graph.SerializeToString()
    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, graph) + bytes([0xA0, 0x01, 5])
        graph = field(1, field(4, b"If") + field(5, attribute)) + field(2, b"g")
    return linear().SerializeToString() + field(7, graph)


@pytest.mark.parametrize("depth", [40, 1_000, 10_000])
def test_deep_nesting_is_refused_without_a_crash(depth, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(nested(depth))
    said, _ = in_own_process(path)
    assert said.startswith("ModelError")


def test_nesting_that_protobuf_reads_is_read():
    assert identify(ModelSource.of(nested(20))).structure != identify(ModelSource.of(nested(21))).structure


# What a small file may claim


@pytest.mark.parametrize("dims", [[1 << 62], [1 << 31, 1 << 31], [1 << 40, 1 << 40, 1 << 40], [-1], [2, -6], [-3, -4]])
def test_external_data_of_an_impossible_shape_is_refused_at_once(tmp_path, dims):
    (tmp_path / "w.bin").write_bytes(bytes(48))
    tensor = external(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims))
    with pytest.raises(ModelError):
        identity_of(linear(tensor), tmp_path)


@pytest.mark.parametrize("dims", [[1 << 62], [1 << 62, 1 << 62], [-1]])
def test_a_shape_that_inline_data_does_not_fill_allocates_nothing(dims):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"1234")
    with pytest.raises(ModelError, match=r"its shape and type ask for|no tensor can have"):
        identity_of(linear(tensor))


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": (1 << 63) - 1},
        {"offset": (1 << 63) - 1, "length": 48},
        {"offset": 1 << 63},
        {"offset": 10**40},
        {"offset": -1},
        {"offset": "0x10"},
        {"offset": "٣"},
        {"length": (1 << 63) - 1},
        {"length": 0},
        {"length": -48},
        {"offset": ""},
    ],
)
def test_ranges_outside_the_file_are_refused(tmp_path, entries):
    (tmp_path / "w.bin").write_bytes(bytes(48))
    with pytest.raises(ModelError):
        identity_of(linear(external(raw(), **entries)), tmp_path)


def test_tensors_may_share_bytes_of_a_file(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(64))
    model = linear(external(raw()))
    for offset in range(16):
        model.graph.initializer.append(external(raw(name=f"w{offset}"), offset=offset))
    assert isinstance(identity_of(model, tmp_path), ModelIdentity)


def test_tensors_that_take_one_file_over_and_over_are_refused_before_they_have(tmp_path):
    """A model of 2 MB could else have 1 GB read 20,000 times."""
    size = GIB // 8
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(size)
    model = linear()
    for index in range(20_000):
        model.graph.initializer.append(external(TensorProto(name=str(index), data_type=TensorProto.UINT8, dims=[size])))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    said, peak = in_own_process(path)
    assert said.startswith("ModelError")
    assert "w.bin has 134217728 bytes, and the tensors up to tensor '16' take 2281701376 from it" in said
    assert peak < 100 << 20


def test_a_file_of_holes_does_not_make_a_model_of_terabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(external_data, "MAX_READ_BYTES", 1 << 20)
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(700_000)
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[700_000])
    identity_of(linear(external(tensor, "a")), tmp_path)
    model = linear(external(tensor, "a"))
    model.graph.initializer.append(external(tensor, "b"))
    with pytest.raises(ModelError, match="take more than 1048576 bytes"):
        identity_of(model, tmp_path)


# What a location may lead to


def test_a_location_that_names_the_model_itself_is_read_once_and_as_it_is(tmp_path):
    tensor = external(TensorProto(name="w", data_type=TensorProto.UINT8, dims=[20]), "m.onnx")
    path = tmp_path / "m.onnx"
    path.write_bytes(linear(tensor).SerializeToString())
    assert [file.location for file in identify(ModelSource.of(path)).files] == [""]


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize("what", ["folder", "fifo", "zero", "socket", "loop"])
def test_what_is_no_file_is_refused_without_blocking(tmp_path, what, through_link):
    target = tmp_path / ("real" if through_link else "w.bin")
    match what:
        case "folder":
            target.mkdir()
        case "fifo":
            os.mkfifo(target)
        case "zero":
            target.symlink_to("/dev/zero")
        case "socket":
            import socket

            with socket.socket(socket.AF_UNIX) as listener:
                here = Path.cwd()
                os.chdir(tmp_path)  # the path of a socket is short
                listener.bind(target.name)
                os.chdir(here)
        case "loop":
            target.symlink_to(target.name)
    if through_link:
        (tmp_path / "w.bin").symlink_to("real")
    with pytest.raises(ModelError):
        identity_of(linear(external(raw())), tmp_path)
    with pytest.raises(ModelError):
        identify(ModelSource.of(tmp_path / "w.bin"))


@pytest.mark.parametrize("location", ["w\0.bin", "\0", "w.bin\0/../x", "a" * 5000, "\udcff", "\n", " "])
def test_odd_locations_are_refused(tmp_path, location):
    (tmp_path / "w.bin").write_bytes(bytes(48))
    tensor = external(raw())
    if location == "\udcff":
        data = linear(tensor).SerializeToString().replace(b"w.bin", b"w\xff\xfe\xffn")
        with pytest.raises(ModelError):
            identify(ModelSource.of(data, tmp_path))
        return
    tensor.external_data[0].value = location
    with pytest.raises(ModelError):
        identity_of(linear(tensor), tmp_path)


# Text, types and size


@pytest.mark.parametrize("text", [b"MatMul", b"matmul", b"graph", b"batch"])
def test_names_that_are_not_utf_8_give_an_identity_or_an_error(text):
    data = linear().SerializeToString()
    assert text in data
    try:
        identify(ModelSource.of(data.replace(text, b"\xff" * len(text))))
    except ModelError as error:
        str(error).encode()  # it can be printed


def test_string_tensors_of_any_bytes_are_read():
    def of(*strings: bytes) -> ModelIdentity:
        tensor = TensorProto(name="w", data_type=TensorProto.STRING, dims=[len(strings)], string_data=strings)
        return identity_of(linear(tensor))

    assert (
        len({of(*strings).digest for strings in ([b""], [b"\0"], [b"\xff\0"], [b"", b""], [b"a", b"b"], [b"ab"])}) == 6
    )


def test_a_file_above_two_gibibytes_is_refused_unread(tmp_path):
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.write(linear().SerializeToString())
        file.truncate(3 * GIB)
    said, peak = in_own_process(path, limit_bytes=2 * GIB)
    assert "a protobuf message has less than 2 GiB" in said
    assert peak < 16 << 20


def test_a_file_that_grows_while_it_is_read_is_read_to_its_first_size_and_refused(tmp_path, monkeypatch):
    """A log that somebody writes to has no end."""
    path = tmp_path / "m.onnx"
    path.write_bytes(linear().SerializeToString())
    sizes = []
    parse = onnx.ModelProto.FromString

    def grow_and_parse(data):
        sizes.append(len(data))
        with path.open("ab") as file:
            file.write(bytes(1000))
        return parse(data)

    before = path.stat().st_size
    monkeypatch.setattr(onnx, "ModelProto", type("ModelProto", (), {"FromString": staticmethod(grow_and_parse)}))
    with pytest.raises(ModelError, match=r"being written|cannot parse|changed"):
        identify(ModelSource.of(path))
    assert sizes[0] == before


def sorts_of_bomb() -> dict[str, bytes]:
    """Models of a million empty messages, each with how it goes on after a good model."""
    many = 500_000
    constant = field(4, b"Constant")
    return {
        "nodes": field(7, field(1, b"") * many),
        "attributes": field(7, field(1, constant + field(5, b"") * many)),
        "metadata": field(14, b"") * many,
        "graph metadata": field(7, field(16, b"") * many),
        "value infos": field(7, field(13, b"") * many),
        "opsets": field(8, b"") * many,
        "functions": field(25, b"") * many,
        "numbers": field(7, field(1, field(5, field(8, b"\1" * 2 * many)))),
        "names": field(7, field(1, field(1, b"") * many)),
        "strings": field(7, field(5, b"\x10\x08" + field(6, b"") * many)),
        "unknown": field(1000, b"") * many,
        "external entries": field(7, field(5, b"\x10\x01" + field(13, b"") * many + b"\x70\x01")),
    }


BOMBS = sorts_of_bomb()


@pytest.mark.parametrize("sort", ["attributes", "metadata", "nodes"])
def test_a_file_of_empty_messages_takes_no_more_memory_than_is_promised(sort, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(linear().SerializeToString() + BOMBS[sort])
    _, peak = in_own_process(path)
    assert peak < MEMORY_FACTOR * path.stat().st_size


@pytest.mark.reliability
@pytest.mark.parametrize("sort", sorted(BOMBS))
def test_a_larger_file_of_empty_messages_takes_no_more_memory_than_is_promised(sort, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(linear().SerializeToString() + BOMBS[sort] * 8)
    _, peak = in_own_process(path, limit_bytes=8 * GIB)
    assert peak < MEMORY_FACTOR * path.stat().st_size


@pytest.mark.parametrize("sort", ["metadata", "nodes"])
def test_where_memory_is_short_it_is_an_error_and_no_crash(sort, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(linear().SerializeToString() + BOMBS[sort] * 20)
    said, _ = in_own_process(path, limit_bytes=700 << 20)
    assert said.startswith("ModelError")


# Mutations of real models

SEEDS = [path.read_bytes() for path in LIGHT]
SEEDS += [place(tensor).SerializeToString() for place in PLACES for tensor in (raw(), typed(), external(raw()))]
WEIGHTS = [max(1, 200_000 // len(seed)) for seed in SEEDS]
"""Small ones are mutated more often: in the large ones, most bytes are weights."""


def mutated(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 1, 1, 2, 4])):
        at = dice.randrange(len(out))
        match dice.choice("bbbffffdipxc"):
            case "b":
                out[at] = dice.randrange(256)
            case "f":
                out[at] ^= 1 << dice.randrange(8)
            case "d":
                del out[at : at + dice.choice([1, 1, 2, 5, 50])]
            case "i":
                out[at:at] = dice.randbytes(dice.choice([1, 2, 9]))
            case "p":
                out[at:at] = out[dice.randrange(len(out)) :][: dice.choice([2, 10, 100])]
            case "x":
                out[at : at + 10] = varint((1 << 64) - 1)
            case "c":
                del out[at:]
        out = out or bytearray(b"\0")
    return bytes(out)


def outcomes(seed: int, count: int, folder: Path) -> dict[str, int]:
    """Count the mutations that gave an identity and an error; any other exception fails the test."""
    dice = random.Random(seed)
    counts = {"identity": 0, "error": 0}
    for _ in range(count):
        (data,) = dice.choices(SEEDS, WEIGHTS)
        try:
            found = identify(ModelSource.of(mutated(data, dice), folder))
        except ModelError as error:
            str(error).encode()  # it can be printed
            counts["error"] += 1
        else:
            assert len(found.digest) == 64
            counts["identity"] += 1
    return counts


@pytest.mark.parametrize("seed", range(2))
def test_a_mutated_model_gives_an_identity_or_a_model_error(seed, tmp_path):
    (tmp_path / "w.bin").write_bytes(np.arange(12, dtype=np.float32).tobytes())
    counts = outcomes(seed, 200, tmp_path)
    assert min(counts.values()) > 10, counts


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(100, 104))
def test_ten_thousand_mutated_models_give_an_identity_or_a_model_error(seed, tmp_path):
    (tmp_path / "w.bin").write_bytes(np.arange(12, dtype=np.float32).tobytes())
    counts = outcomes(seed, 10_000, tmp_path)
    assert min(counts.values()) > 500, counts


def test_one_byte_changed_in_a_weight_changes_the_identity_wherever_it_is():
    """The mutations must be able to show something: no byte of a weight is dead."""
    data = in_constant(raw()).SerializeToString()
    at = data.index(raw().raw_data)
    known = identify(ModelSource.of(data)).weights
    for index in range(at, at + len(raw().raw_data)):
        changed = bytes((*data[:index], data[index] ^ 1, *data[index + 1 :]))
        assert identify(ModelSource.of(changed)).weights != known
