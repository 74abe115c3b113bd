"""Groups: the same calls on a group of one and on two processes."""

import socket

import pytest
import torch
from fake_model import fake_engine, preparation
from planner import Planner, Sequence
from torch import multiprocessing

from headrace.comm import SingleComm, join_group, symmetric
from headrace.device.cpu import CpuDevice
from headrace.errors import GroupError
from headrace.runner import Runner
from headrace.wire import Result, Sampling


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def requests() -> list[Sequence]:
    sampled = Sampling(temperature=1.5, top_p=0.9, frequency_penalty=0.2)
    return [Sequence([i, 3], 6, sampled if i % 2 else Sampling()) for i in range(6)]


def rank_main(rank: int, address: str, out: "multiprocessing.SimpleQueue") -> None:
    torch.set_num_threads(1)
    comm = join_group(CpuDevice(threads=1), rank, 2, address, 30)
    summed = comm.all_reduce(torch.tensor([1.0 + rank, 10.0]))
    gathered = comm.all_gather(torch.tensor([[rank], [rank + 10]]), 1)
    told = comm.broadcast(torch.tensor([rank + 5]))
    runner = Runner(fake_engine(comm=comm), preparation(), blocks=64)
    sequences = requests()
    digests: list[int] = []

    def execute(plan):  # type: ignore[no-untyped-def]
        result: Result = runner.execute(plan)
        digests.append(result.digest)
        # The other rank's results are empty: its planner is told what its own slots hold.
        return result if rank == 0 else seen(runner, plan, result)

    Planner(running_max=4).run(execute, sequences)
    facts = (
        summed.tolist(),
        gathered.tolist(),
        told.tolist(),
        comm.min_int(7 - rank),
        [sequence.tokens for sequence in sequences],
        digests,
    )
    comm.close()
    out.put((rank, facts))


def seen(runner: Runner, plan, result: Result) -> Result:  # type: ignore[no-untyped-def]
    assert result.token_id.size == 0
    rows = (plan.row_flags_S & 1).nonzero()[0]
    slots = torch.from_numpy(plan.row_slot_S[rows].astype("int64"))
    result.token_id = runner.slots.last_tokens(slots).numpy().copy()
    zeros = result.token_id * 0
    result.row_flags, result.top_count, result.logprob = zeros, zeros, zeros
    return result


@pytest.mark.timeout(120)
def test_two_processes_agree_with_one():
    context = multiprocessing.get_context("spawn")
    out, address = context.SimpleQueue(), free_address()
    ranks = [context.Process(target=rank_main, args=(r, address, out)) for r in range(2)]
    for process in ranks:
        process.start()
    facts = dict(out.get() for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    assert facts[0] == facts[1]
    summed, gathered, told, least, tokens, digests = facts[0]
    assert summed == [3.0, 20.0] and gathered == [[0, 1], [10, 11]]
    assert told == [5] and least == 6
    alone = requests()
    runner = Runner(fake_engine(), preparation(), blocks=64)
    results = Planner(running_max=4).run(runner.execute, alone)
    assert tokens == [sequence.tokens for sequence in alone]
    assert digests == [result.digest for result in results]


def test_a_group_of_one_talks_to_nobody():
    comm = join_group(CpuDevice(threads=1), 0, 1, "nowhere:1", 1)
    assert isinstance(comm, SingleComm) and comm.size == 1
    x = torch.tensor([1.0])
    assert comm.all_reduce(x) is x and comm.broadcast(x) is x and comm.all_gather(x, 0) is x
    assert comm.min_int(3) == 3


def test_a_rank_that_stays_alone_says_where_it_waited():
    address = free_address()
    with pytest.raises(GroupError, match=f"rank 0 of 2 could not join its group at {address}"):
        join_group(CpuDevice(threads=1), 0, 2, address, 1)


class Ranks:
    """A group whose other ranks' answers are known."""

    rank, size = 0, 2

    def __init__(self, others: int) -> None:
        self._others = others

    def min_int(self, value: int) -> int:
        return min(value, self._others)


@pytest.mark.parametrize(("fails", "others"), [(True, 1), (False, 0)], ids=["here", "elsewhere"])
def test_ranks_share_memory_only_if_all_of_them_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: bool, others: int
) -> None:
    class Sharing:
        def __init__(self, group: Ranks, device: CpuDevice) -> None:
            if fails:
                raise RuntimeError("no peer access\nand more")

        def share(self, size: int) -> None:
            assert size > 0

    monkeypatch.setattr(symmetric, "SymmetricComm", Sharing)
    group = Ranks(others)
    assert symmetric.share_memory(group, CpuDevice(threads=1)) is group  # type: ignore[arg-type]
    assert ("no peer access" if fails else "another rank") in caplog.text
    assert "and more" not in caplog.text
