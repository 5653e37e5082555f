"""Files of other programs: what is said of each, and what is never done with them."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import blake3
import pytest
from foreign_files import (
    ep_context,
    model_connect,
    rtx_plan,
    running_pickle,
    tensoracle,
    timing_cache,
    torch_tensorrt,
    trt_plan,
    ultralytics,
)

from enginecache.errors import InvalidInputError
from enginecache.exchange.foreign import examine, examine_file
from enginecache.exchange.loads_here import strip_command

PLAN = rtx_plan()


def looked_at(data, name="file.engine"):
    return examine(data, Path(name))


def codes(found):
    return [note.code for note in found.notes]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("ultralytics", ultralytics(PLAN)),
        ("tensoracle", tensoracle(PLAN)),
        ("torch_tensorrt", torch_tensorrt(PLAN)),
        ("torch_tensorrt", torch_tensorrt(PLAN, protocol=5)),
        ("torch_tensorrt", torch_tensorrt(rtx_plan(size=3 << 20))),
        ("unknown", b"some header of nobody's\n" + PLAN),
        ("unknown", bytes(4096) + trt_plan()),
    ],
)
def test_plan_in_a_wrapper_is_found_and_can_be_taken_out(name, data, tmp_path):
    file = tmp_path / "it's wrapped.engine"
    file.write_bytes(data)
    found = examine_file(file)
    assert (found.kind, found.wrapper.name, found.is_complete) == ("plan", name, True)
    subprocess.run(strip_command(found), shell=True, cwd=tmp_path, check=True)
    stripped = examine_file(tmp_path / "stripped.plan")
    assert (stripped.wrapper, stripped.is_complete, stripped.header) == (None, True, found.header)
    assert stripped.digest == found.plan_digest != found.digest


@pytest.mark.parametrize("wrap", [ultralytics, tensoracle, torch_tensorrt])
def test_every_truncation_of_a_wrapped_plan_is_found(wrap):
    data = wrap(PLAN)
    begins = data.index(PLAN[:4])
    assert looked_at(data).is_complete is True
    for size in range(begins, len(data)):
        assert looked_at(data[:size]).is_damaged, size


def test_wrapper_facts_are_short_plain_values():
    found = looked_at(ultralytics(PLAN, task="detect", author="x" * 5000, date={"a": 1}))
    assert found.wrapper.facts == {"description": "a model", "task": "detect", "stride": 32}


@pytest.mark.parametrize("length", [-1, 0, 1, 1 << 20, 2**31 - 1])
def test_lying_length_of_a_json_header_is_no_wrapper_and_no_crash(length):
    data = length.to_bytes(4, "little", signed=True) + b'{"a": 1}' + PLAN
    assert looked_at(data).kind in {"unknown", "plan"}


def test_model_connect_bundle_is_named_with_what_it_says():
    found = looked_at(model_connect())
    assert found.wrapper.name == "model_connect"
    assert found.wrapper.facts == {"trt_version": "10.3.0", "gpu_name": "NVIDIA L4"}
    assert strip_command(found) == ""


def test_pickle_is_never_loaded(monkeypatch):
    data = running_pickle()

    def refuse(*_):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(os, "system", refuse)
    found = looked_at(data)
    assert (found.kind, found.wrapper.name, found.header) == ("unknown", "pickle", None)


def test_pickle_with_a_lying_length_reads_nothing_into_memory():
    whole = torch_tensorrt(rtx_plan(size=3 << 20))
    at = whole.index(b"vtrt")
    lying = whole[: at - 4] + (2**31).to_bytes(4, "little") + whole[at:]
    found = looked_at(lying)
    assert (found.kind, found.is_complete, found.is_damaged) == ("plan", False, True)


@pytest.mark.parametrize(
    ("data", "code", "is_damaged"),
    [
        (b"", "empty", True),
        (bytes(100_000), "zeros", True),
        (b"PK\x03\x04rest", "known", False),
        (b"enginecache-bundle.json\0\0", "known", False),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "known", False),
        (b"just text", "unknown", False),
    ],
)
def test_other_files_are_named(data, code, is_damaged):
    found = looked_at(data)
    assert (found.kind, codes(found), found.is_damaged) == ("unknown", [code], is_damaged)


def test_names_of_onnx_runtimes_cache_are_read():
    name = "TensorrtExecutionProvider_TRTKernel_graph_main_graph_1234567890_0_0_fp16_int8_sm89.engine"
    found = looked_at_named(PLAN, name)
    assert codes(found) == ["ort_cache"]
    assert "sm_89, fp16, int8" in found.notes[0].text
    timing = looked_at_named(timing_cache(), "TensorrtExecutionProvider_cache_sm89.timing")
    assert codes(timing) == ["timing_cache", "ort_cache"]
    other = looked_at_named(PLAN, name.replace("sm89", "sm75"))
    assert codes(other) == ["ort_cache", "name"]


def looked_at_named(data, name):
    from enginecache.exchange.foreign import _named

    return _named(looked_at(data, name))


# EPContext


def test_embedded_context_is_looked_into():
    found = looked_at(ep_context(PLAN, hardware_architecture="89"))
    assert (found.kind, found.is_complete, found.header.tensorrt_version) == ("ep_context", True, "1.7.1.116")
    (context,) = found.contexts
    assert (context.path, context.size_bytes) == (None, len(PLAN))
    assert context.context.attributes["hardware_architecture"] == "89"


def test_context_next_to_the_model_is_looked_into(tmp_path):
    (tmp_path / "m_ctx.onnx").write_bytes(ep_context("net.engine", embedded=False))
    missing = examine_file(tmp_path / "m_ctx.onnx")
    assert (missing.kind, missing.contexts[0].path, missing.header) == ("ep_context", "net.engine", None)
    assert "net.engine" in missing.notes[0].text
    (tmp_path / "net.engine").write_bytes(PLAN[:-1])
    cut = examine_file(tmp_path / "m_ctx.onnx")
    assert (cut.is_complete, cut.is_damaged) == (False, True)
    (tmp_path / "net.engine").write_bytes(PLAN)
    whole = examine_file(tmp_path / "m_ctx.onnx")
    assert (whole.is_complete, whole.notes) == (True, ())


@pytest.mark.parametrize("path", ["../net.engine", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_path_that_leads_elsewhere_is_not_followed(path, tmp_path):
    (tmp_path / "net.engine").write_bytes(PLAN)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "m.onnx").write_bytes(ep_context(path, embedded=False))
    found = examine_file(inner / "m.onnx")
    assert found.header is None
    assert codes(found) == ["context"]


def test_pipe_that_a_context_names_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "net.engine")
    (tmp_path / "m.onnx").write_bytes(ep_context("net.engine", embedded=False))
    assert "pipe" in examine_file(tmp_path / "m.onnx").notes[0].text


def test_plain_model_is_onnx_and_a_cut_one_is_damaged(model):
    data = model.read_bytes()
    assert (looked_at(data).kind, looked_at(data).is_complete) == ("onnx", True)
    # Everything after the IR version and the producer: the graph is there, and not whole.
    at = data.index(b"batch")
    assert looked_at(data[:at]).is_damaged


# Files


def test_digest_is_that_of_the_cache_and_can_be_left_out(tmp_path):
    file = tmp_path / "x.plan"
    file.write_bytes(PLAN)
    assert examine_file(file).digest == examine_file(file).plan_digest == blake3.blake3(PLAN).hexdigest()
    assert examine_file(file, with_digest=False).digest is None


def test_flipped_bit_in_a_file_that_is_named_by_its_digest_is_found(tmp_path):
    file = tmp_path / f"{blake3.blake3(PLAN).hexdigest()}.engine"
    file.write_bytes(PLAN)
    assert not examine_file(file).is_damaged
    file.write_bytes(PLAN[:-1] + b"?")
    assert codes(examine_file(file)) == ["digest"]


def test_huge_file_without_its_digest_costs_a_few_pages(tmp_path):
    file = tmp_path / "huge.plan"
    file.write_bytes(rtx_plan(size=400)[:64])
    os.truncate(file, 20 << 30)  # sparse
    script = (
        "import re, sys; from enginecache.exchange.foreign import examine_file;"
        "print(examine_file(sys.argv[1], with_digest=False).notes[0].code);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    out = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=True, timeout=30)
    code, memory_kb = out.stdout.split()
    assert code == "longer"
    assert int(memory_kb) < 200_000


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("missing")
    for name, words in {"pipe": "pipe", "link": "link", "": "folder", "none": "no such", "a\0b": "name"}.items():
        with pytest.raises(InvalidInputError, match="(?i)" + words):
            examine_file(tmp_path / name)
    with pytest.raises(InvalidInputError, match="device"):
        examine_file("/dev/zero")


def test_name_that_is_not_utf_8_is_no_obstacle(tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.plan"))
    file.write_bytes(PLAN)
    assert examine_file(file).is_complete is True


def test_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from enginecache.exchange import foreign

    file = tmp_path / "x.plan"
    file.write_bytes(PLAN)
    real = foreign.StreamDigest.read_from

    def shrink(self, opened, size):
        os.truncate(file, 10)
        return real(self, opened, size)

    monkeypatch.setattr(foreign.StreamDigest, "read_from", shrink)
    with pytest.raises(InvalidInputError, match="changed while"):
        examine_file(file)


def test_nothing_heavy_is_imported(tmp_path):
    file = tmp_path / "x.plan"
    file.write_bytes(PLAN)
    script = (
        "import sys; from enginecache.exchange.foreign import examine_file; examine_file(sys.argv[1]);"
        "heavy = {'onnx', 'numpy', 'tensorrt', 'tensorrt_rtx', 'pynvml', 'pycuda', 'sqlalchemy', 'typer', 'google'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_synthetic_files_hold_nothing_of_a_real_plan():
    for data in (rtx_plan(), trt_plan(), timing_cache()):
        assert len(data) < 5000
    assert hashlib.sha256(PLAN[64:]).digest() == hashlib.sha256((bytes(range(256)) * 2)[: len(PLAN) - 64]).digest()
