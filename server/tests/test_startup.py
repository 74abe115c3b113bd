"""The stopwatch of a start, and the memory plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import DeviceError
from headrace.memory import MIB, Room, graph_bytes, plan_memory
from headrace.prepare import check_graphs
from headrace.startup import Phases, open_driver, process_age, read_ahead

GIB = 1 << 30


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("headrace.startup.time.monotonic", lambda: now[0])
    return now


def test_an_inner_phase_does_not_count_for_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    phases = Phases(age_s=0.5)
    with phases("weights"):
        now[0] += 1
        with phases("pack"):
            now[0] += 2
        now[0] += 3
    with phases("pack"):
        now[0] += 4
    assert phases.seconds() == {"interpreter": 0.5, "weights": 4, "pack": 6}
    now[0] += 1.5
    assert phases.total() == 12


def test_a_phase_that_fails_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    phases = Phases()
    with pytest.raises(ValueError, match="no"), phases("weights"):
        now[0] += 2
        raise ValueError("no")
    assert phases.seconds() == {"weights": 2}


def test_the_table_adds_up_and_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    phases = Phases()
    with phases("weights"):
        now[0] += 3
    now[0] += 1
    phases.beside("weights, in threads", 2.5)
    assert phases.tell() == [
        "start to ready",
        "weights                   3.00 s   75 %",
        "elsewhere                 1.00 s   25 %",
        "total                     4.00 s  100 %",
        "weights, in threads       2.50 s  meanwhile",
    ]
    assert phases.tell() == []


def test_the_process_has_an_age() -> None:
    first = process_age()
    assert first == 0 or first <= process_age() <= first + 60
    assert process_age() >= 0


def test_reading_ahead_never_fails(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    for folder in (tmp_path, tmp_path / "absent"):
        thread = read_ahead(folder)
        if thread is not None:
            thread.join(10)
            assert not thread.is_alive()


def test_a_driver_that_is_missing_does_not_matter() -> None:
    thread = open_driver(0)
    thread.join(60)
    assert not thread.is_alive()


def test_the_items_of_a_plan_add_up_to_the_device() -> None:
    plan = plan_memory(
        Room(total=80 * GIB, free=60 * GIB, cached=2 * GIB),
        {"weights": 16 * GIB, "slots": 10 * MIB},
        {"activations": 2 * GIB, "reserve": GIB},
        block_bytes=2 * MIB,
    )
    items = dict(plan.items)
    assert sum(items.values()) == 80 * GIB
    assert items["driver and others"] == 80 * GIB - 62 * GIB - 16 * GIB - 10 * MIB
    assert plan.pool_bytes == plan.blocks * 2 * MIB == 59 * GIB
    assert plan.table().splitlines()[-1].split() == ["total", "81920.0", "MiB"]


@pytest.mark.parametrize(
    ("bounds", "blocks"),
    [
        ({}, 10 * 1024),
        ({"blocks_max": 7}, 7),
        ({"pool_bytes_max": GIB + 5}, 1024),
        ({"fraction": 0.75}, 5 * 1024),  # 5 of 20 GiB are left to others
        ({"fraction": 0.75, "blocks_max": 9000}, 5 * 1024),
    ],
)
def test_bounds_hold(bounds: dict[str, float], blocks: int) -> None:
    room = Room(total=20 * GIB, free=11 * GIB)
    plan = plan_memory(room, {"weights": 8 * GIB}, {"reserve": GIB}, block_bytes=MIB, **bounds)  # pyright: ignore[reportArgumentType]
    assert plan.blocks == blocks
    assert sum(count for _, count in plan.items) == 20 * GIB


def test_graphs_are_planned_by_the_smallest_and_told_when_they_take_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert graph_bytes([300, 170, 2], 57) == 300 + 170 + 55 * 2
    assert graph_bytes([300, 170], 2) == 470
    assert graph_bytes([300], 1) == 300
    assert graph_bytes([], 0) == 0
    check_graphs(100 * MIB, 140 * MIB, 80 * MIB)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    check_graphs(100 * MIB, 141 * MIB, 80 * MIB)
    assert "41.0 MiB more than planned, of a reserve of 80.0" in caplog.text


def test_a_device_that_is_too_small_is_refused_with_the_table() -> None:
    with pytest.raises(DeviceError, match=r"less than 2 blocks of 1048576 bytes.*weights 8192.0"):
        plan_memory(
            Room(10 * GIB, 2 * GIB), {"weights": 8 * GIB}, {"activations": 2 * GIB}, block_bytes=MIB
        )
