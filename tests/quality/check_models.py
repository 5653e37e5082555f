"""Small models, good and bad conversions of them, and checks in this process.

A pair is a model and what a converter made of it, in ONNX's text form. The bad ones are known to be wrong.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import builder_models
import numpy as np
import onnx
from onnx import numpy_helper

from enginecache.host.targets import Reach
from enginecache.key.options import BuildOptions
from enginecache.key.precision import Conversion
from enginecache.quality import convert, execute, reference
from enginecache.quality.check import CONVERT, EXECUTE, REFERENCE, Checker, CheckOptions, Subject
from enginecache.quality.result import Check
from enginecache.trt.load.request import LoadRequest

DIGEST = "d" * 64
FP16 = Conversion("fp16", "onnxconverter-common", version("onnxconverter-common"), version("onnx"), keeps_io=True)
HALF = BuildOptions(precision=("fp16",))


def model(text, opset=17, **weights):
    """A model of a graph in ONNX's text form, ``(inputs) => (outputs) { nodes }``, and weights as arrays."""
    graph = onnx.parser.parse_graph(f"g {text}")
    graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def normal(*shape, seed=0, scale=1.0, kind=np.float32):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(kind)


class HereChecker(Checker):
    """Runs what a child process would run, in this one: a tenth of the time."""

    def run_child(self, module, request, device):
        sent = []

        class Collected:
            send = staticmethod(sent.append)

        runs = {REFERENCE: reference.run, CONVERT: convert.run, EXECUTE: execute.run}
        runs[module](request, Collected)
        return sent[-1]


def subject_of(folder: Path, original, converted=None, *, build_options=HALF, conversion=FP16, **changes) -> Subject:
    """A model whose engine, of which there is none, is of FP16; ``converted`` is what the engine was built from."""
    folder.mkdir(parents=True, exist_ok=True)
    build = builder_models.request_for(folder, original, options=build_options, conversion=conversion, **changes)
    path = None
    if converted is not None:
        path = folder / "converted.onnx"
        path.write_bytes(converted.SerializeToString())
    plan = LoadRequest(folder / "plan.engine", DIGEST, "tensorrt-rtx", "1.7.1.116", Reach.from_texts(["8.9"]))
    return Subject(build, plan, None, path)


def check(folder: Path, original, converted=None, *, options=None, **changes) -> Check:
    """Check a conversion; without ``converted`` that of the converter in use."""
    subject = subject_of(folder, original, converted, **changes)
    work = folder / "check"
    work.mkdir()
    return HereChecker().check(subject, options or CheckOptions(), work)


def remainder(constant):
    text = "(int64[4,8] i) => (int64[4,8] y) { a = Add(i, c) y = Mod(a, m) }"
    return model(text, c=np.int64(constant), m=np.int64(997))


ROWS = "(float[4,64] x) => (float[4,64] y)"
SQUARES = "(float[2,8,8] x) => (float[2,8,8] y)"


def bad_pairs():
    """By name: a model, and a conversion of it that computes something else; None for that of the converter in use."""
    return {
        "overflow of a product": (
            model(f"{ROWS} {{ a = Mul(x, big) y = Mul(a, small) }}", big=np.float32(1e5), small=np.float32(1e-5)),
            half(
                f"{ROWS} {{ h = Cast<to=10>(x) a = Mul(h, big) b = Mul(a, small) y = Cast<to=1>(b) }}",
                big=np.float16(6e4),
                small=np.float16(1.6e-5),
            ),
        ),
        "overflow of a square, by the converter": (
            model(
                f"{ROWS} {{ b = Mul(x, s) q = Mul(b, b) n = ReduceSum(q, axis) r = Sqrt(n) y = Div(b, r) }}",
                s=np.float32(300),
                axis=np.array([1]),
            ),
            None,
        ),
        "weights of 1e-8 that become 0": (
            model(f"{ROWS} {{ a = MatMul(x, w) y = Mul(a, s) }}", w=normal(64, 64, scale=1e-8), s=np.float32(1e8)),
            half(
                f"{ROWS} {{ h = Cast<to=10>(x) a = MatMul(h, w) f = Cast<to=1>(a) y = Mul(f, s) }}",
                w=normal(64, 64, scale=1e-8, kind=np.float16),
                s=np.float32(1e8),
            ),
        ),
        "weights of 1e-8, by the converter": (
            model(f"{ROWS} {{ y = MatMul(x, w) }}", w=normal(64, 64, scale=1e-8)),
            None,
        ),
        "indices of 2049 and more in FP16": (
            model("(int64[4,8] i) => (float[4,8,4] y) { y = Gather(table, i) }", table=normal(6000, 4)),
            half(
                "(int64[4,8] i) => (float[4,8,4] y)"
                "{ h = Cast<to=10>(i) m = Cast<to=7>(h) n = Clip(m, low, high)"
                " t = Gather(table, n) y = Cast<to=1>(t) }",
                table=normal(6000, 4, kind=np.float16),
                low=np.int64(0),
                high=np.int64(5999),
            ),
        ),
        "a constant of 64 bits cut to 32": (
            remainder(10**12 + 7),
            remainder(2**31 - 1),
        ),
        "a Softmax over another axis": (
            model(f"{SQUARES} {{ y = Softmax<axis=-1>(x) }}"),
            half(f"{SQUARES} {{ h = Cast<to=10>(x) s = Softmax<axis=1>(h) y = Cast<to=1>(s) }}"),
        ),
        "a Transpose left out of a square": (
            model(f"{SQUARES} {{ t = Transpose<perm=[0,2,1]>(x) y = MatMul(t, w) }}", w=normal(8, 8)),
            half(
                f"{SQUARES} {{ h = Cast<to=10>(x) m = MatMul(h, w) y = Cast<to=1>(m) }}",
                w=normal(8, 8, kind=np.float16),
            ),
        ),
        "the scale of attention lost": (
            model(
                "(float[2,8,16] x) => (float[2,8,16] y)"
                "{ t = Transpose<perm=[0,2,1]>(x) s = MatMul(x, t) d = Mul(s, c) p = Softmax<axis=-1>(d)"
                " y = MatMul(p, x) }",
                c=np.float32(0.25),
            ),
            half(
                "(float[2,8,16] x) => (float[2,8,16] y) { h = Cast<to=10>(x) t = Transpose<perm=[0,2,1]>(h)"
                " s = MatMul(h, t) p = Softmax<axis=-1>(s) m = MatMul(p, h) y = Cast<to=1>(m) }"
            ),
        ),
        "the scale of a quantized weight lost": (
            model(
                f"{ROWS} {{ f = DequantizeLinear(w, s) y = MatMul(x, f) }}",
                w=np.arange(-128, 128, dtype=np.int8).repeat(16).reshape(64, 64),
                s=np.float32(0.02),
            ),
            half(
                f"{ROWS} {{ h = Cast<to=10>(x) f = Cast<to=10>(w) m = MatMul(h, f) y = Cast<to=1>(m) }}",
                w=np.arange(-128, 128, dtype=np.int8).repeat(16).reshape(64, 64),
            ),
        ),
    }


half = model
"""A conversion, written by hand."""


def good_models():
    """By name: models that the converter in use converts to FP16 as it should."""
    return {
        "a product of matrices": model(f"{ROWS} {{ a = MatMul(x, w) y = Add(a, b) }}", w=normal(64, 64), b=normal(64)),
        "a convolution with a batch norm": model(
            "(float[2,3,16,16] x) => (float[2,8,16,16] y)"
            "{ c = Conv<pads=[1,1,1,1]>(x, w) n = BatchNormalization(c, s, b, m, v) y = Relu(n) }",
            w=normal(8, 3, 3, 3),
            s=normal(8),
            b=normal(8),
            m=normal(8),
            v=np.abs(normal(8)) + 0.1,
        ),
        "attention": model(
            "(float[2,8,16] x) => (float[2,8,16] y)"
            "{ q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t) d = Mul(s, c)"
            " p = Softmax<axis=-1>(d) v = MatMul(x, wv) y = MatMul(p, v) }",
            wq=normal(16, 16, scale=0.25),
            wk=normal(16, 16, seed=1, scale=0.25),
            wv=normal(16, 16, seed=2, scale=0.25),
            c=np.float32(0.25),
        ),
        "a layer norm": model(
            f"{ROWS} {{ y = LayerNormalization<axis=-1>(x, s, b) }}", s=normal(64), b=normal(64, seed=1)
        ),
        "a GELU by Erf": model(
            f"{ROWS} {{ a = Div(x, r) e = Erf(a) f = Add(e, one) g = Mul(x, f) y = Mul(g, h) }}",
            r=np.float32(2**0.5),
            one=np.float32(1),
            h=np.float32(0.5),
        ),
        "an embedding": model(
            "(int64[2,12] i) => (float[2,12,8] y) { e = Gather(t, i) y = Tanh(e) }", t=normal(3000, 8)
        ),
        "a mask": model(
            "(float[4,8] x, bool[4,8] m) => (float[4,8] y) { z = Where(m, x, c) y = Softmax<axis=-1>(z) }",
            c=np.float32(-1e4),
        ),
        "an LSTM": model(
            "(float[6,2,8] x) => (float[6,1,2,8] y) { y = LSTM<hidden_size=8>(x, w, r) }",
            w=normal(1, 32, 8, scale=0.3),
            r=normal(1, 32, 8, seed=1, scale=0.3),
        ),
        "a GRU": model(
            "(float[6,2,8] x) => (float[6,1,2,8] y) { y = GRU<hidden_size=8>(x, w, r) }",
            w=normal(1, 24, 8, scale=0.3),
            r=normal(1, 24, 8, seed=1, scale=0.3),
        ),
        "an upsampling": model(
            '(float[1,3,8,8] x) => (float[1,3,16,16] y) { y = Resize<mode="linear">(x, , s) }',
            s=np.array([1, 1, 2, 2], np.float32),
        ),
        "pools": model(
            "(float[2,3,16,16] x) => (float[2,3,1,1] y)"
            "{ p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(x) y = GlobalAveragePool(p) }"
        ),
        "a branch": model(
            "(float[4,8] x) => (float[4,8] y)"
            "{ s = ReduceSum<keepdims=0>(x) c = Greater(s, zero)"
            " y = If<then_branch = t () => (float[4,8] a) { a = Mul(x, two) },"
            " else_branch = e () => (float[4,8] b) { b = Sub(x, two) }>(c) }",
            zero=np.float32(0),
            two=np.float32(2),
        ),
        "a loop": model(
            "(float[4,8] x) => (float[4,8] y)"
            "{ y = Loop<body = l (int64 i, bool c, float[4,8] a) => (bool d, float[4,8] b)"
            " { d = Identity(c) h = Mul(a, w) b = Add(h, x) }>(n, go, x) }",
            n=np.int64(5),
            go=np.ones((), bool),
            w=np.float32(0.5),
        ),
        "quantized weights": model(
            f"{ROWS} {{ f = DequantizeLinear(w, s) y = MatMul(x, f) }}",
            w=np.random.default_rng(0).integers(-127, 128, (64, 64), np.int8),
            s=np.float32(0.01),
        ),
        "a convolution transposed": model(
            "(float[1,4,6,6] x) => (float[1,3,12,12] y) { y = ConvTranspose<strides=[2,2],kernel_shape=[2,2]>(x, w) }",
            w=normal(4, 3, 2, 2),
        ),
        "exponents and logarithms": model(
            f"{ROWS} {{ e = Exp(x) s = ReduceSum<keepdims=1>(e) l = Log(s) y = Sub(x, l) }}"
        ),
        "pieces put together again": model(
            f"{ROWS} {{ a, b = Split<axis=1>(x, n) c = Concat<axis=1>(b, a) y = Sigmoid(c) }}", n=np.array([32, 32])
        ),
        "a padded picture": model(
            '(float[1,3,8,8] x) => (float[1,3,10,10] y) { y = Pad<mode="reflect">(x, p) }',
            p=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        ),
        "two outputs, one of integers": model(
            "(float[4,64] x) => (float[4,64] y, int64[4,1] k) { y = Mul(x, s) k = ArgMax<axis=1>(x) }", s=np.float32(3)
        ),
        "a picture of bytes": model(
            "(uint8[1,8,8,3] x) => (float[1,3,8,8] y)"
            "{ f = Cast<to=1>(x) t = Transpose<perm=[0,3,1,2]>(f) c = Sub(t, m) y = Div(c, s) }",
            m=np.array([123, 117, 104], np.float32).reshape(1, 3, 1, 1),
            s=np.float32(58),
        ),
    }
