"""The key: what is in it, what is not, and that its text never changes by accident."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from fakes import H100, TOOLCHAIN, FakeBuilder, fake_place, place_with
from hypothesis import given
from hypothesis import strategies as st
from models import linear, save

from enginecache.files.canonical import key_digest
from enginecache.host.targets import ComputeCapability, DeviceModel, Target
from enginecache.key.key import KEY_VERSION, EngineKey, is_key_form
from enginecache.key.options import BuildOptions, PluginLibrary
from enginecache.key.precision import Conversion
from enginecache.key.profiles import Profile, ShapeRange
from enginecache.model import ModelIdentity
from enginecache.pipeline.request import Request

PROFILE = Profile((("x", ShapeRange((1, 8), (4, 8), (16, 8))),))
KEY = EngineKey(
    model_structure="a" * 64,
    model_weights="b" * 64,
    profiles=(PROFILE,),
    options=BuildOptions(workspace_bytes=1 << 30),
    toolchain=TOOLCHAIN,
    target=Target((ComputeCapability(8, 9),)),
)

# Append only. A change of any line here orphans every stored engine: raise KEY_VERSION and append new lines instead.
TEXTS_1 = {
    "profile, workspace": (
        '{"model":{"structure":"' + "a" * 64 + '","weights":"' + "b" * 64 + '"},'
        '"options":{"optimization_level":3,"workspace_bytes":1073741824},'
        '"profiles":[{"x":{"kind":"shape","max":[16,8],"min":[1,8],"opt":[4,8]}}],'
        '"target":{"compute_capabilities":[[8,9]],"device":null},'
        '"toolchain":{"cpu":"x86_64","cuda_major":13,"flavour":"tensorrt-rtx","os":"linux","version":"1.7.1.116"}}',
        "18b0d22f0ee0b6558e976529f72b57efb396e6bf3b4f1d4c9d01ddc4b7d20fcf",
    ),
    "static, portable": (
        '{"model":{"structure":"' + "a" * 64 + '","weights":"' + "b" * 64 + '"},'
        '"options":{"optimization_level":3,"workspace_bytes":null},"profiles":[],'
        '"target":{"compute_capabilities":"portable","device":null},'
        '"toolchain":{"cpu":"x86_64","cuda_major":13,"flavour":"tensorrt-rtx","os":"linux","version":"1.7.1.116"}}',
        "4529002b3360d3f1068bdbbe57d5131e78c5572d048f6708f14cd13e16893b2b",
    ),
    "tensorrt, device": (
        '{"model":{"structure":"' + "a" * 64 + '","weights":"' + "b" * 64 + '"},'
        '"options":{"optimization_level":3,"workspace_bytes":1073741824},'
        '"profiles":[{"x":{"kind":"shape","max":[16,8],"min":[1,8],"opt":[4,8]}}],'
        '"target":{"compute_capabilities":[[9,0]],"device":{"name":"NVIDIA H100 80GB HBM3","sm_count":132}},'
        '"toolchain":{"cpu":"x86_64","cuda_major":13,"flavour":"tensorrt","os":"linux","version":"10.16.1.11"}}',
        "e101f7a1dfcbdbc9ffa54cbc9c533e8e8dd00f1921796f67c20d5ccec5f61fdb",
    ),
    "shape values": (
        '{"model":{"structure":"' + "a" * 64 + '","weights":"' + "b" * 64 + '"},'
        '"options":{"optimization_level":3,"workspace_bytes":1073741824},'
        '"profiles":[{"x":{"kind":"shape","max":[16,8],"min":[1,8],"opt":[4,8]}},'
        '{"n":{"kind":"values","max":[3],"min":[1],"opt":[2]}}],'
        '"target":{"compute_capabilities":[[8,9]],"device":null},'
        '"toolchain":{"cpu":"x86_64","cuda_major":13,"flavour":"tensorrt-rtx","os":"linux","version":"1.7.1.116"}}',
        "69ff18622fc923d075aa2a2684acf11f8d9386810e4ff9aa5d824d4f218e440e",
    ),
}
"""Canonical texts of version 1, which no request makes any more, and the digests that they had."""

TEXT_2 = (
    '{"conversion":null,"model":{"structure":"' + "a" * 64 + '","weights":"' + "b" * 64 + '"},'
    '"options":{"builder_flags":[],"convert_io":false,"hardware_compatibility":"none","optimization_level":3,'
    '"plugins":[],"precision":[],"strip_plan":false,"version_compatible":false,"workspace_bytes":1073741824},'
    '"profiles":[{"x":{"kind":"shape","max":[16,8],"min":[1,8],"opt":[4,8]}}],'
    '"target":{"and_later":false,"compute_capabilities":[[8,9]],"device":null},'
    '"toolchain":{"cpu":"x86_64","cuda_major":13,"flavour":"tensorrt-rtx","os":"linux","version":"1.7.1.116"}}',
    "31420b7151e4ba9034dd0fbedf33fb23f9dcf1d5440f4a0762a36eb2023cd5e4",
)
"""A canonical text of version 2, without the environment, and the digest that it had."""

EVERYTHING = replace(
    KEY,
    options=BuildOptions(
        precision=("int8", "fp16"),
        convert_io=True,
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        strip_plan=True,
        builder_flags=("TF32=off", "sparse-weights"),
        plugins=(PluginLibrary(Path("p.so"), "d" * 64), PluginLibrary(Path("o.so"), "c" * 64)),
    ),
    target=Target((ComputeCapability(8, 0),), and_later=True),
    conversion=Conversion("fp16", "onnxconverter-common", "1.16.0", "1.23.2", keeps_io=False),
    environment=(("CUDNN_A", ""), ("NVIDIA_TF32_OVERRIDE", "0")),
    model_value_info="c" * 64,
)

GOLDEN_3 = {
    "profile, workspace": (KEY, "ede8d49d88153087d6e11d84321570ee08e7758dda3095abba1b3ea0b9a5fa60"),
    "static, portable": (
        replace(KEY, profiles=(), options=BuildOptions(), target=Target(())),
        "9081a9ed5415873a49768c30a3ec21883c92a02ba2fac4f30efd4fef5c6496c7",
    ),
    "tensorrt, device": (
        replace(
            KEY,
            toolchain=replace(TOOLCHAIN, flavour="tensorrt", version="10.16.1.11"),
            target=Target((ComputeCapability(9, 0),), H100.model),
        ),
        "f33d99f132eb25a99ded049ca8a2dcd3e18e8a7f5606050a5a3a60d1c4226d32",
    ),
    "shape values": (
        replace(KEY, profiles=(PROFILE, Profile((("n", ShapeRange((1,), (2,), (3,), is_values=True)),)))),
        "c61299e087aa299949572340c232aff3248f2c0f75094427eaf7172699a59c4e",
    ),
    "every option": (EVERYTHING, "827eeceb3972cf9fc9106fce4bb31b42b91e8b8504848a70d2218bf90073299b"),
}


@pytest.mark.parametrize("name", TEXTS_1)
def test_texts_of_version_1_have_the_digests_that_they_had(name):
    text, digest = TEXTS_1[name]
    assert key_digest(1, text) == digest


def test_a_text_of_version_2_has_the_digest_that_it_had():
    text, digest = TEXT_2
    assert key_digest(2, text) == digest


@pytest.mark.parametrize("name", GOLDEN_3)
def test_golden_keys_stay(name):
    key, digest = GOLDEN_3[name]
    assert KEY_VERSION == 3
    assert key.digest == digest
    assert is_key_form(json.loads(key.text))


def test_canonical_json_is_written_out():
    assert EVERYTHING.text == (
        '{"conversion":{"converter":"onnxconverter-common","keeps_io":false,"onnx_version":"1.23.2",'
        '"precision":"fp16","version":"1.16.0"},'
        '"environment":{"CUDNN_A":"","NVIDIA_TF32_OVERRIDE":"0"},'
        '"model":{"structure":"' + "a" * 64 + '","value_info":"' + "c" * 64 + '","weights":"' + "b" * 64 + '"},'
        '"options":{"builder_flags":["SPARSE_WEIGHTS","TF32=OFF"],"convert_io":true,'
        '"hardware_compatibility":"ampere_plus","optimization_level":3,'
        '"plugins":["' + "c" * 64 + '","' + "d" * 64 + '"],"precision":["fp16","int8"],"strip_plan":true,'
        '"version_compatible":true,"workspace_bytes":null},'
        '"profiles":[{"x":{"kind":"shape","max":[16,8],"min":[1,8],"opt":[4,8]}}],'
        '"target":{"and_later":true,"compute_capabilities":[[8,0]],"device":null},'
        '"toolchain":{"cpu":"x86_64","cuda_major":13,"flavour":"tensorrt-rtx","os":"linux","version":"1.7.1.116"}}'
    )


CONVERSION = Conversion("fp16", "onnxconverter-common", "1.16.0", "1.23.2", keeps_io=True)

OTHERS = {
    "model.structure": replace(KEY, model_structure="c" * 64),
    "model.weights": replace(KEY, model_weights="c" * 64),
    "model.value_info": replace(KEY, model_value_info="c" * 64),
    "profiles: minimum": replace(KEY, profiles=(Profile((("x", ShapeRange((2, 8), (4, 8), (16, 8))),)),)),
    "profiles: optimum": replace(KEY, profiles=(Profile((("x", ShapeRange((1, 8), (5, 8), (16, 8))),)),)),
    "profiles: maximum": replace(KEY, profiles=(Profile((("x", ShapeRange((1, 8), (4, 8), (17, 8))),)),)),
    "profiles: input name": replace(KEY, profiles=(Profile((("z", ShapeRange((1, 8), (4, 8), (16, 8))),)),)),
    "profiles: values": replace(
        KEY, profiles=(Profile((("x", ShapeRange((1, 8), (4, 8), (16, 8), is_values=True)),)),)
    ),
    "profiles: none": replace(KEY, profiles=()),
    "profiles: twice": replace(KEY, profiles=(PROFILE, PROFILE)),
    "options.workspace_bytes": replace(KEY, options=BuildOptions(workspace_bytes=1 << 29)),
    "options.workspace_bytes: default": replace(KEY, options=BuildOptions()),
    "options.optimization_level": replace(KEY, options=BuildOptions(1 << 30, optimization_level=5)),
    "options.precision": replace(KEY, options=BuildOptions(1 << 30, precision=("fp16",))),
    "options.precision: another": replace(KEY, options=BuildOptions(1 << 30, precision=("bf16",))),
    "options.convert_io": replace(KEY, options=BuildOptions(1 << 30, convert_io=True)),
    "options.hardware_compatibility": replace(
        KEY, options=BuildOptions(1 << 30, hardware_compatibility="same_compute_capability")
    ),
    "options.version_compatible": replace(KEY, options=BuildOptions(1 << 30, version_compatible=True)),
    "options.strip_plan": replace(KEY, options=BuildOptions(1 << 30, strip_plan=True)),
    "options.builder_flags": replace(KEY, options=BuildOptions(1 << 30, builder_flags=("REFIT",))),
    "options.builder_flags: off": replace(KEY, options=BuildOptions(1 << 30, builder_flags=("TF32=OFF",))),
    "options.plugins": replace(KEY, options=BuildOptions(1 << 30, plugins=(PluginLibrary(Path("a"), "e" * 64),))),
    "conversion": replace(KEY, conversion=CONVERSION),
    "conversion.precision": replace(KEY, conversion=replace(CONVERSION, precision="bf16")),
    "conversion.converter": replace(KEY, conversion=replace(CONVERSION, converter="nvidia-modelopt")),
    "conversion.version": replace(KEY, conversion=replace(CONVERSION, version="1.17.0")),
    "conversion.onnx_version": replace(KEY, conversion=replace(CONVERSION, onnx_version="1.24.0")),
    "conversion.keeps_io": replace(KEY, conversion=replace(CONVERSION, keeps_io=False)),
    "environment": replace(KEY, environment=(("NVIDIA_TF32_OVERRIDE", "0"),)),
    "environment: another value": replace(KEY, environment=(("NVIDIA_TF32_OVERRIDE", "1"),)),
    "environment: another name": replace(KEY, environment=(("CUDNN_A", "0"),)),
    "environment: set and empty": replace(KEY, environment=(("NVIDIA_TF32_OVERRIDE", ""),)),
    "target.and_later": replace(KEY, target=Target((ComputeCapability(8, 9),), and_later=True)),
    "toolchain.flavour": replace(KEY, toolchain=replace(TOOLCHAIN, flavour="tensorrt")),
    "toolchain.version: build number": replace(KEY, toolchain=replace(TOOLCHAIN, version="1.7.1.117")),
    "toolchain.cuda_major": replace(KEY, toolchain=replace(TOOLCHAIN, cuda_major=12)),
    "toolchain.os": replace(KEY, toolchain=replace(TOOLCHAIN, os="windows")),
    "toolchain.cpu": replace(KEY, toolchain=replace(TOOLCHAIN, cpu="aarch64")),
    "target: another": replace(KEY, target=Target((ComputeCapability(8, 6),))),
    "target: more": replace(KEY, target=Target((ComputeCapability(8, 6), ComputeCapability(8, 9)))),
    "target: portable": replace(KEY, target=Target(())),
    "target.device": replace(KEY, target=Target((ComputeCapability(8, 9),), DeviceModel("A", 132))),
    "target.device.name": replace(KEY, target=Target((ComputeCapability(8, 9),), DeviceModel("B", 132))),
    "target.device.sm_count": replace(KEY, target=Target((ComputeCapability(8, 9),), DeviceModel("A", 114))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_each_keyed_field_makes_another_key(name):
    assert OTHERS[name].digest != KEY.digest
    assert len({key.digest for key in OTHERS.values()}) == len(OTHERS)


def test_every_keyed_field_has_its_test():
    fields = EVERYTHING.fields().items()
    flat = {f"{group}.{name}" for group, value in fields if isinstance(value, dict) for name in value}
    tested = " ".join(OTHERS)
    for field in flat - {"target.compute_capabilities", "environment.CUDNN_A", "environment.NVIDIA_TF32_OVERRIDE"}:
        assert field in tested, field


def test_order_of_profiles_counts_and_order_of_inputs_does_not():
    other = Profile((("x", ShapeRange((2, 8), (4, 8), (16, 8))),))
    assert replace(KEY, profiles=(PROFILE, other)).digest != replace(KEY, profiles=(other, PROFILE)).digest


def test_order_and_repetition_of_targets_do_not_count():
    one, two = ComputeCapability(8, 6), ComputeCapability(8, 9)
    assert replace(KEY, target=Target((two, one, two))).digest == replace(KEY, target=Target((one, two))).digest


def _key(cache, model, **ask):
    return cache._resolve(Request.of(model, ask)).key.digest


def test_path_name_and_bytes_do_not_count(open_cache, model, tmp_path):
    cache = open_cache()
    key = _key(cache, model, dims={"batch": 4})
    other = tmp_path / "elsewhere" / "other.onnx"
    other.parent.mkdir()
    other.write_bytes(model.read_bytes())
    assert _key(cache, other, dims={"batch": 4}) == key
    assert _key(cache, str(other), dims={"batch": 4}) == key
    assert _key(cache, model.read_bytes(), dims={"batch": 4}) == key


def test_working_folder_and_relative_path_do_not_count(open_cache, model, monkeypatch):
    cache = open_cache()
    key = _key(cache, model, dims={"batch": 4})
    monkeypatch.chdir(model.parent)
    assert _key(cache, Path(model.name), dims={"batch": 4}) == key


def test_none_counts_as_omitted(open_cache, model):
    cache = open_cache()
    nothing = {"workspace_bytes": None, "optimization_level": None, "backend": None, "target": None, "device": None}
    assert _key(cache, model, dims={"batch": 4}, **nothing) == _key(cache, model, dims={"batch": 4})


def test_a_plugins_path_does_not_count():
    one, other = (BuildOptions(plugins=(PluginLibrary(Path(path), "e" * 64),)) for path in ("a.so", "b.so"))
    assert replace(KEY, options=one).digest == replace(KEY, options=other).digest


def test_order_and_repetition_of_precisions_flags_and_plugins_do_not_count():
    one, two = PluginLibrary(Path("a.so"), "e" * 64), PluginLibrary(Path("b.so"), "f" * 64)
    first = BuildOptions(precision=("fp16", "int8"), builder_flags=("REFIT", "TF32=OFF"), plugins=(one, two))
    second = BuildOptions(
        precision=("int8", "fp16", "int8"), builder_flags=("tf32=off", "refit", "REFIT"), plugins=(two, one, two)
    )
    assert replace(KEY, options=first).digest == replace(KEY, options=second).digest


def test_a_default_written_out_counts_as_omitted(open_cache, model):
    cache = open_cache()
    assert _key(cache, model, dims={"batch": 4}, optimization_level=3) == _key(cache, model, dims={"batch": 4})


def test_shapes_and_dims_that_mean_the_same_make_one_key(open_cache, model):
    cache = open_cache()
    by_shapes = _key(cache, model, profiles=[{"x": ((1, 8), (4, 8), (16, 8))}])
    assert _key(cache, model, dims={"batch": (1, 4, 16)}) == by_shapes


def test_order_of_mappings_does_not_count(open_cache, tmp_path):
    from onnx import TensorProto, helper

    second = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["rows", 2])
    two = save(linear(extra_inputs=[second]), tmp_path / "two.onnx")
    cache = open_cache()
    forth = {"batch": (1, 2, 3), "rows": (4, 5, 6)}
    back = dict(reversed(forth.items()))
    assert _key(cache, two, dims=forth) == _key(cache, two, dims=back)


def test_device_ordinal_uuid_memory_and_driver_do_not_count(open_cache, model):
    spare = replace(
        H100, ordinal=3, uuid="GPU-2", memory_bytes=1, driver_version="1.2", cuda_driver_version=(12, 0), pci_bus_id="x"
    )
    keys = {_key(open_cache(place=place_with(device=d)), model, dims={"batch": 4}) for d in (H100, spare)}
    assert len(keys) == 1


def test_cache_settings_do_not_count(open_cache, model, tmp_path):
    builder = FakeBuilder()
    plain = open_cache(builder)
    settings = {"shared": "group", "max_size_bytes": 1, "keep_recent_s": 4.0, "timeout_s": 3.0, "grace_s": 5.0}
    other = open_cache(builder, folder=tmp_path / "other", **settings)
    assert _key(plain, model, dims={"batch": 4}) == _key(other, model, dims={"batch": 4})


def test_a_static_model_has_no_profile_however_it_is_asked(open_cache, tmp_path):
    static = save(linear(4), tmp_path / "static.onnx")
    cache = open_cache()
    resolved = cache._resolve(Request.of(static, {}))
    assert resolved.profiles == ()
    assert _key(cache, static, profiles=[{"x": ((4, 8),) * 3}]) == resolved.key.digest


def test_no_float_reaches_the_canonical_text():
    def walk(value):
        assert not isinstance(value, float)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(json.loads(KEY.text))


shapes = st.integers(1, 3).flatmap(
    lambda rank: st.tuples(*[st.tuples(*[st.integers(0, 9)] * rank)] * 3).map(lambda c: ShapeRange(*c))
)
profiles = st.dictionaries(st.text(max_size=4), shapes, max_size=3).map(lambda d: Profile(tuple(sorted(d.items()))))
keys = st.builds(
    lambda profiles, workspace, level, version, target: EngineKey(
        "a" * 64, "b" * 64, tuple(profiles), BuildOptions(workspace, level), replace(TOOLCHAIN, version=version), target
    ),
    st.lists(profiles, max_size=2),
    st.none() | st.integers(1, 1 << 40),
    st.integers(0, 5),
    st.text(max_size=6),
    st.lists(st.tuples(st.integers(7, 12), st.integers(0, 9)).map(lambda c: ComputeCapability(*c)), max_size=2).map(
        lambda cs: Target(tuple(cs))
    ),
)


@given(keys, keys, st.data())
def test_two_requests_have_one_key_only_if_they_are_equal(one, donor, data):
    """Also where they differ in one field alone."""
    name = data.draw(st.sampled_from([field.name for field in fields(EngineKey)]))
    for other in (donor, replace(one, **{name: getattr(donor, name)})):
        assert (one.digest == other.digest) == (one == other)


def test_fake_place_is_what_the_other_tests_believe():
    assert fake_place().target == Target((ComputeCapability(8, 9),))


@pytest.mark.parametrize(("conversion", "counts"), [(None, False), (CONVERSION, True)])
def test_value_info_counts_only_where_a_converter_reads_it(conversion, counts):
    one = ModelIdentity("a" * 64, "b" * 64, "", (), ())
    other = replace(one, value_info="c" * 64)
    keys = {EngineKey.of(each, (), BuildOptions(), TOOLCHAIN, Target(()), conversion).digest for each in (one, other)}
    assert len(keys) == (2 if counts else 1)
