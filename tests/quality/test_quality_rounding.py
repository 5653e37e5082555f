import check_models as models
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

from enginecache.quality.rounding import BFLOAT16, FLOAT16, round_every_value, round_to

KINDS = {FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}


def run(model, **feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("kind", KINDS)
def test_number_is_rounded_as_by_the_type_itself(kind):
    known = [0, -0.0, 1, 65504, 65519, 65520, 1e5, -1e5, 6e-8, 2.9e-8, 1e-8, 1e-40, 3.4e38, np.inf, -np.inf, np.nan]
    any_bits = np.random.default_rng(0).integers(0, 2**32, 10000, np.uint32).view(np.float32)
    values = np.concatenate([np.array(known, np.float32), any_bits])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(KINDS[kind]).astype(np.float32)
    assert np.array_equal(round_to(values, kind), expected, equal_nan=True)


def test_onnxruntime_alone_hides_an_overflow():
    text = "(float16[2] x) => (float16[2] y) { a = Mul(x, c) y = Div(a, c) }"
    model = models.model(text, c=np.float16(6e4))
    (found,) = run(model, x=np.array([2, 3], np.float16))
    assert np.isfinite(found).all()
    (rounded,) = run(round_every_value(model), x=np.array([2, 3], np.float32))
    assert np.isinf(rounded).all()


@pytest.mark.parametrize("number", KINDS)
def test_every_value_is_rounded_as_if_computed_in_the_type(number):
    kind = KINDS[number]
    text = (
        f"(float[64] x) => (float[64] y) {{ h = Cast<to={number}>(x) a = Mul(h, h) b = Add(a, h) y = Cast<to=1>(b) }}"
    )
    x = models.normal(64)
    (found,) = run(round_every_value(models.model(text)), x=x)
    h = x.astype(kind)
    a = (h.astype(np.float32) * h.astype(np.float32)).astype(kind)
    expected = (a.astype(np.float32) + h.astype(np.float32)).astype(kind).astype(np.float32)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("form", ["initializer", "Constant", "ConstantOfShape"])
def test_constant_of_fp16_is_the_same_number(form):
    constant = onnx.numpy_helper.from_array(np.array([0.1], np.float16), "c")
    if form == "initializer":
        model = models.model("(float[1] x) => (float[1] y) { h = Cast<to=10>(x) a = Add(h, c) y = Cast<to=1>(a) }")
        model.graph.initializer.append(constant)
    else:
        model = models.model(
            "(float[1] x) => (float[1] y) { h = Cast<to=10>(x) a = Add(h, c) y = Cast<to=1>(a) }",
            shape=np.array([1]),
        )
        given = ["shape"] if form == "ConstantOfShape" else []
        model.graph.node.insert(0, onnx.helper.make_node(form, given, ["c"], value=constant))
    (found,) = run(round_every_value(model), x=np.zeros(1, np.float32))
    assert found[0] == np.float32(np.float16(0.1))


IF = (
    "(float[2] x) => (float[2] y) { h = Cast<to=10>(x) s = ReduceMax<keepdims=0>(x) c = Greater(s, zero)"
    " z = If<then_branch = t () => (float16[2] o) { a = Mul(h, k) o = Div(a, k) },"
    " else_branch = e () => (float16[2] p) { p = Identity(h) }>(c) y = Cast<to=1>(z) }"
)
LOOP = (
    "(float[2] x) => (float[2] y) { h = Cast<to=10>(x) n = Constant<value_int=1>()"
    " z = Loop<body = l (int64 i, bool c, float16[2] v) => (bool d, float16[2] o)"
    " { d = Identity(c) a = Mul(v, k) o = Div(a, k) }>(n, , h) y = Cast<to=1>(z) }"
)


@pytest.mark.parametrize("text", [IF, LOOP], ids=["If", "Loop"])
def test_overflow_inside_a_node_is_seen(text):
    model = models.model(text, k=np.float16(6e4), zero=np.float32(0))
    (found,) = run(round_every_value(model), x=np.array([2, 3], np.float32))
    assert np.isinf(found).all()


def test_what_stays_in_fp32_is_not_rounded():
    text = "(float[2] x) => (float[2] y, float[2] z) { y = Mul(x, k) h = Cast<to=10>(x) z = Cast<to=1>(h) }"
    model = models.model(text, k=np.float32(1e6))
    wide, narrow = run(round_every_value(model), x=np.array([1.0001, 3], np.float32))
    assert wide[0] == np.float32(1.0001) * np.float32(1e6)
    assert narrow[0] == np.float32(np.float16(1.0001))


def test_outputs_keep_their_names_and_order():
    model = models.model(
        "(float16[2] x) => (float16[2] a, float16[2] b, int64[1] k) { a = Neg(x) b = Abs(a) k = Shape(b) }"
    )
    rounded = round_every_value(model)
    onnx.checker.check_model(rounded, full_check=True)
    assert [value.name for value in rounded.graph.output] == ["a", "b", "k"]
