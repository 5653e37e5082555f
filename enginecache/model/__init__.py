"""Model identity: digests of an ONNX model, independent of its file name and of where its weights are stored."""

from enginecache.model.identity import Dimension, ModelFile, ModelIdentity, ModelInput, ModelSource, has_changed

__all__ = ["Dimension", "ModelFile", "ModelIdentity", "ModelInput", "ModelSource", "has_changed", "identify"]


def identify(source: ModelSource) -> ModelIdentity:
    """Read a model and all its external data, and return its identity: see :func:`.reader.identify`.

    Imports nothing heavy before it is called.
    """
    from enginecache.model import reader

    return reader.identify(source)
