"""Model identity: what an ONNX model is, whatever it is called and wherever its weights lie."""

from enginecache.model.identity import Dimension, ModelFile, ModelIdentity, ModelInput, ModelSource, has_changed

__all__ = ["Dimension", "ModelFile", "ModelIdentity", "ModelInput", "ModelSource", "has_changed"]
