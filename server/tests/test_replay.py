"""A record executed again gives its tokens again, and says where it does not."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel, fake_engine, preparation
from planner import Planner, Sequence

from headrace.errors import ConfigError
from headrace.record import PREPARE, RESULT, TO_SHARD, read_records
from headrace.replay import replay
from headrace.runner import Runner
from headrace.wire import Plan, Result, Sampling, decode, encode_plan, encode_result, messages

BLOCKS = 64


def record(tokens: int = 6) -> list[tuple[int, bytes]]:
    """What a router with two plans in flight would have written."""
    wanted = preparation(slots_max=16)
    runner = Runner(fake_engine(), wanted, BLOCKS)
    fields = {name: getattr(wanted, name) for name in vars(wanted)}
    request = messages().PrepareRequest(**fields | {"blocks_max": BLOCKS})
    records = [(4, b"unknown kinds are skipped"), (PREPARE, request.SerializeToString())]

    def execute(plan: Plan) -> Result:
        data = encode_plan(plan)
        sent = decode(data)
        assert isinstance(sent, Plan)
        result = runner.execute(sent)
        records.append((TO_SHARD, data))
        results.append((RESULT, encode_result(result)))
        if len(results) > 1:
            records.append(results.pop(0))
        return result

    results: list[tuple[int, bytes]] = []
    sampled = Sampling(temperature=1.2, top_p=0.9, repetition_penalty=1.2, seed=4)
    sequences = [Sequence([i, 5, 6], tokens, sampled if i % 2 else Sampling()) for i in range(5)]
    Planner(blocks=BLOCKS, running_max=4).run(execute, sequences)
    return records + results


def write(path: Path, records: list[tuple[int, bytes]], version: int = 1) -> Path:
    data = b"HEADRACE" + struct.pack("<I", version)
    data += b"".join(struct.pack("<BI", kind, len(body)) + body for kind, body in records)
    path.write_bytes(data)
    return path


def test_a_record_gives_its_tokens_again(tmp_path: Path):
    records = record()
    read = list(read_records(write(tmp_path / "run.plans", records)))
    assert read == records
    summary = replay(fake_engine(), read)
    assert summary.steps == sum(kind == TO_SHARD for kind, _ in records)
    assert (summary.tokens_differ, summary.digests_differ, summary.unanswered) == (0, 0, 0)
    assert summary.tokens >= 30 and summary.logprob_error < 1e-6
    text = io.StringIO()
    summary.write(text)
    assert f"tokens     {summary.tokens}, 0 of them differ" in text.getvalue()


def test_a_difference_is_told_once_and_hides_nothing():
    records = record()
    at = next(i for i, (kind, _) in enumerate(records) if kind == RESULT)
    result = messages().StepResult.FromString(records[at][1])
    tokens = np.frombuffer(result.token_id_i32le, "<i4").copy()
    wrong = int(tokens[0])
    tokens[0] = (wrong + 1) % 97
    result.token_id_i32le = tokens.tobytes()
    records[at] = (RESULT, result.SerializeToString())
    summary = replay(fake_engine(), records)
    # The row goes on from what was recorded, so its later tokens may differ; other rows do not.
    assert summary.tokens_differ >= 1 and summary.digests_differ == 0
    assert f"step 0, row 0, slot 0, position 3: token {wrong}" in summary.differences[0]


def test_another_model_is_noticed():
    class Other(FakeModel):
        def _logits(self, prefix: list[int]):  # type: ignore[no-untyped-def]
            return super()._logits([0, *prefix])

    assert replay(fake_engine(Other()), record()).tokens_differ > 10


def test_a_group_that_was_lost_starts_anew():
    records = record(3)
    plans = [i for i, (kind, _) in enumerate(records) if kind == TO_SHARD]
    cut = records[: plans[1] + 1]  # Its last plan was never answered.
    summary = replay(fake_engine(), cut + records)
    assert summary.unanswered == 2 and summary.tokens_differ == 0


def test_a_record_that_was_cut_short_is_read_to_its_last_whole_record(tmp_path: Path):
    path = write(tmp_path / "run.plans", [(PREPARE, b"abc"), (TO_SHARD, b"defg")])
    path.write_bytes(path.read_bytes()[:-1])
    assert list(read_records(path)) == [(PREPARE, b"abc")]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"GGUF\0\0\0\0\0\0\0\0", "not a record of plans"),
        (b"HEADRACE", "not a record of plans"),
        (b"HEADRACE\x09\0\0\0", "has version 9"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, sentence: str):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=sentence):
        list(read_records(path))
    with pytest.raises(ConfigError, match="No such file"):
        list(read_records(tmp_path / "nothing"))


def test_plans_before_a_prepare_are_refused():
    with pytest.raises(ConfigError, match="before its first Prepare"):
        replay(fake_engine(), record()[2:])
