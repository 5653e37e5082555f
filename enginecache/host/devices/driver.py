"""Check that the driver is new enough for a CUDA version."""

from __future__ import annotations

from enginecache.host.devices.device import Device, version_text


def driver_problem(device: Device, cuda_major: int) -> str:
    """Return why the driver cannot run programs built for a CUDA major version; empty if it can.

    Within a major version an older driver runs programs built for a newer CUDA; a later driver runs everything older.
    The level is that of the ``libcuda.so.1`` which the loader finds: a ``cuda-compat`` package raises it.

    Source: NVIDIA, "CUDA Compatibility", "Minor Version Compatibility" and "Forward Compatibility".
    """
    if device.cuda_driver_version[0] >= cuda_major:
        return ""
    driver = f"driver {device.driver_version}" if device.driver_version else "the NVIDIA driver"
    return f"{driver} is for CUDA {version_text(device.cuda_driver_version)}, and CUDA {cuda_major} is needed"
