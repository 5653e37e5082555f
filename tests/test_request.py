from collections.abc import Mapping
from pathlib import Path

import pytest

from enginecache.errors import InvalidInputError, ModelError, OptionError, ProfileError
from enginecache.host.targets import ComputeCapability, Target
from enginecache.key.options import BuildOptions
from enginecache.pipeline.request import Request

SHAPES = ((1, 8), (4, 8), (32, 8))


def test_nothing_asked_is_all_defaults():
    request = Request.of("model.onnx", {})
    assert (request.options, request.backend, request.target, request.device) == (BuildOptions(), None, None, None)
    assert (request.shapes.shapes, dict(request.shapes.dims)) == ((), {})


def test_none_is_the_same_as_not_asked():
    asked = dict.fromkeys(
        ("base_dir", "profiles", "dims", "workspace_bytes", "optimization_level", "backend", "target", "device")
    )
    assert Request.of("model.onnx", asked) == Request.of("model.onnx", {})


def test_path_may_be_text_or_path_and_bytes_are_the_model():
    assert Request.of("model.onnx", {}) == Request.of(Path("model.onnx"), {})
    assert Request.of(b"bytes", {}).source.path is None


def test_lists_and_tuples_are_the_same_shapes():
    lists = [{"x": [list(shape) for shape in SHAPES]}]
    assert Request.of("m", {"profiles": lists}) == Request.of("m", {"profiles": [{"x": SHAPES}]})


def test_one_size_is_a_fixed_dimension():
    assert Request.of("m", {"dims": {"batch": 8}}) == Request.of("m", {"dims": {"batch": (8, 8, 8)}})


@pytest.mark.parametrize("target", ["sm_89", ["8.9"], ("89", "sm_89")])
def test_target_is_one_text_or_several(target):
    assert Request.of("m", {"target": target}).target == Target((ComputeCapability(8, 9),))


@pytest.mark.parametrize("target", [[], ()])
def test_no_targets_leave_it_to_the_device(target):
    assert Request.of("m", {"target": target}).target is None


def test_level_0_is_not_the_default():
    assert Request.of("m", {"optimization_level": 0}).options.optimization_level == 0


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"dims": {"batch": (1, 2)}}, ProfileError),
        ({"dims": {"batch": (1.0, 2, 3)}}, ProfileError),
        ({"dims": {"batch": "12"}}, ProfileError),
        ({"profiles": [{"x": SHAPES[:2]}]}, ProfileError),
        ({"profiles": [{"x": ((1,), (1, 2), (1,))}]}, ProfileError),
        ({"profiles": [{"x": (1, 2, 3)}]}, ProfileError),
        ({"profiles": [{"x": (("a",), ("b",), ("c",))}]}, ProfileError),
        ({"target": ["portable", "sm_89"]}, OptionError),
        ({"target": ""}, OptionError),
        ({"target": "sm_90a"}, OptionError),
        ({"optimization_level": 6}, OptionError),
        ({"workspace_bytes": 0}, OptionError),
    ],
)
def test_bad_values_are_errors_with_a_way_out(asked, error):
    with pytest.raises(error) as caught:
        Request.of("m", asked)
    assert isinstance(caught.value, InvalidInputError)
    assert caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("keyword", ["ofline", "workspace", "optimisation_level", "fp16"])
def test_a_keyword_that_does_not_exist_is_an_error_and_not_ignored(keyword):
    with pytest.raises(TypeError, match=keyword):
        Request.of("model.onnx", {keyword: 1})


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        ({"target": 89}, OptionError),
        ({"target": [None]}, OptionError),
        ({"target": (8, 9)}, OptionError),
        ({"profiles": {"x": ((1,), (2,), (3,))}}, ProfileError),
        ({"profiles": [None]}, ProfileError),
        ({"profiles": [{"x": ((1.5,), (2,), (3,))}]}, ProfileError),
        ({"dims": ["batch"]}, ProfileError),
        ({"dims": "batch=1"}, ProfileError),
        ({"backend": "TensorRT"}, OptionError),
        ({"workspace_bytes": "1GiB"}, OptionError),
    ],
)
def test_a_value_of_another_type_is_an_error_of_ours(ask, kind):
    with pytest.raises(kind) as caught:
        Request.of("model.onnx", ask)
    assert caught.value.fix


@pytest.mark.parametrize("model", [None, 5, object()])
def test_what_is_no_model_is_a_model_error(model):
    with pytest.raises(ModelError, match="the model must be a path or bytes, not "):
        Request.of(model, {})


class Changing(Mapping):
    """A mapping whose owner adds to it, or takes from it, while it is read."""

    def __init__(self, *, grows):
        self._grows = grows
        self._values = {"batch": 1, "width": 2}

    def __getitem__(self, name):
        return self._values[name]

    def __iter__(self):
        for name in self._values:
            if self._grows:
                self._values[f"name {len(self._values)}"] = 3
            yield name
        self._values.clear()

    def __len__(self):
        return len(self._values)


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("name", ["dims", "profiles"])
def test_mapping_that_changes_while_it_is_read_is_an_error_of_ours(name, grows):
    changing = Changing(grows=grows)
    with pytest.raises(ProfileError, match=rf"{name} cannot be read: .*\nGive a copy that no other thread changes"):
        Request.of("model.onnx", {name: changing if name == "dims" else [changing]})


@pytest.mark.parametrize("name", ["dims", "profiles"])
def test_dict_that_grows_while_it_is_read_is_taken_as_it_was(name):
    values = {}

    class Size(int):
        def __index__(self):
            values[f"name {len(values)}"] = 1
            return int(self)

    values["x"] = ((Size(1),), (2,), (3,)) if name == "profiles" else Size(1)
    request = Request.of("model.onnx", {name: values if name == "dims" else [values]})
    assert list(request.shapes.dims if name == "dims" else request.shapes.shapes[0]) == ["x"]
