"""Requests to load a plan."""

from __future__ import annotations

import blake3

from enginecache.host.targets import ComputeCapability, Reach
from enginecache.trt.load.request import LoadRequest

ADA = Reach((ComputeCapability(8, 9),))


def request_for(path, **changes):
    """A request for the plan in ``path``, with its true digest."""
    fields = {"digest": "", "flavour": "tensorrt-rtx", "version": "1.7.1.116", "reach": ADA}
    if path.exists():
        fields["digest"] = blake3.blake3(path.read_bytes()).hexdigest()
    return LoadRequest(path, **{**fields, **changes})


def scripted(folder, text, **changes):
    """A request for a plan that the runtime in ``data/tensorrt_rtx.py`` obeys."""
    path = folder / "plan.engine"
    path.write_text(text)
    return request_for(path, **changes)
