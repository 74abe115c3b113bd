"""Devices: one file each, chosen once by name."""

from headrace.device.base import Device, Download, DtypeChoice, Graph, Recorder, Staging, Timer
from headrace.device.peers import Peers, Share
from headrace.errors import ConfigError

__all__ = [
    "Device",
    "Download",
    "DtypeChoice",
    "Graph",
    "Peers",
    "Recorder",
    "Share",
    "Staging",
    "Timer",
    "open_device",
]


def open_device(kind: str, index: int = 0, threads: int = 0, ranks: int = 1) -> Device:
    """Opens the device that `kind` names.

    Args:
        kind: `auto`, `cpu` or `cuda`; `auto` takes CUDA where there is one.
        index: which one, where there are several.
        threads: threads an operation may use; 0 shares the machine's cores among the ranks.
        ranks: ranks of the group, all on this machine.
    """
    if kind not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device `{kind}` is unknown; auto, cpu and cuda exist")
    if kind != "cpu":
        from headrace.device.cuda import CudaDevice

        why_not = CudaDevice.missing(index)
        if why_not is None:
            return CudaDevice(index)
        if kind == "cuda":
            raise ConfigError(f"device `cuda` was asked for, but {why_not}")
    from headrace.device.cpu import CpuDevice

    return CpuDevice(threads, ranks)
