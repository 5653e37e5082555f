"""Model identity: what an ONNX model is, whatever it is called and wherever its weights lie."""

from enginecache.model.identity import Dimension, ModelFile, ModelIdentity, ModelInput, ModelSource, has_changed

__all__ = ["Dimension", "ModelFile", "ModelIdentity", "ModelInput", "ModelSource", "has_changed", "identify"]


def identify(source: ModelSource) -> ModelIdentity:
    """Read a model and all its external data, and say what identifies it: see :func:`.reader.identify`.

    Imports nothing heavy before it is called.
    """
    from enginecache.model import reader

    return reader.identify(source)
