"""How the ranks of a group talk: alone, through `torch.distributed`, or through shared memory."""

from headrace.comm.base import Comm
from headrace.comm.place import Place
from headrace.comm.single import SingleComm
from headrace.device import Device

__all__ = ["Comm", "Place", "SingleComm", "join_group"]


def join_group(device: Device, rank: int, size: int, rendezvous: str, timeout_s: float) -> Comm:
    """Joins the group; waits for the other ranks.

    Args:
        rendezvous: `host:port` where rank 0 listens; unused by a group of one.
        timeout_s: how long to wait for the others.
    """
    if size == 1:
        return SingleComm()
    from headrace.comm.dist import DistComm
    from headrace.comm.symmetric import share_memory

    group = DistComm(device, rank, size, rendezvous, timeout_s)
    return group if device.kind == "cpu" else share_memory(group, device)
