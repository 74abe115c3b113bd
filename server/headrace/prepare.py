"""From a loaded engine to a runner: warmed, measured, its pool sized, its graphs recorded (R9)."""

from __future__ import annotations

import logging
from dataclasses import replace

from headrace.batch import NO_GRAPHS, GraphSizes
from headrace.engine import Engine, Preparation, Prepared, kv_layout
from headrace.graphs import buckets, token_buckets
from headrace.masks import mask_bytes
from headrace.memory import BLOCKS_MIN, MIB, Room, graph_bytes, plan_memory
from headrace.ops.triton import counting_kernels, settle_keys
from headrace.runner import Runner
from headrace.warm import CROWD, warm_plans

log = logging.getLogger(__name__)


def graph_sizes(engine: Engine, wanted: Preparation) -> GraphSizes:
    """What to record graphs for; nothing where nothing can be recorded."""
    if not (engine.device.graphs and engine.attention.graphs and engine.graph_inputs):
        return NO_GRAPHS
    comm = engine.comm
    if comm.size > 1 and not (comm.recordable and engine.shared_sampling):
        return NO_GRAPHS
    rows = buckets(min(wanted.step_rows_max, wanted.step_tokens_max))
    return GraphSizes(rows, token_buckets(wanted.step_tokens_max))


def prepare_engine(engine: Engine, wanted: Preparation) -> tuple[Runner, Prepared]:
    """Warms up with pools of their own, then sizes the real one by what is free (R9).

    What is allocated later is measured here: graphs first, which are then thrown away; then the
    largest step, whose activations stay with torch's allocator.
    """
    settle_keys()
    with counting_kernels() as kernels:
        prepared = _prepare(engine, wanted)
    if kernels:
        log.info("kernels: %d found compiled, %d compiled", kernels["found"], kernels["compiled"])
    return prepared


def _prepare(engine: Engine, wanted: Preparation) -> tuple[Runner, Prepared]:
    device, phases = engine.device, engine.phases
    engine.comm.reserve(wanted.step_tokens_max * engine.width, engine.dtype)
    sizes = graph_sizes(engine, wanted)
    with phases("graphs measured"):
        graphs = _measure_graphs(engine, wanted, sizes)
    before = device.room()
    with phases("warm up"):
        _warm(engine, wanted)
    after = device.room()
    layout = kv_layout(engine, wanted)
    own = max(0, before.free - after.free)
    coming = {"graphs": graphs, "reserve": device.reserve_bytes}
    budget = device.kv_budget(wanted.memory_fraction, engine.kv_bytes_max, engine.comm.size)
    state_bytes = 4 * wanted.state_slots_max * engine.vocab_size
    masks = mask_bytes(wanted.step_rows_max, engine.vocab_size)
    plan = plan_memory(
        Room(after.total, after.free),
        {"weights": engine.weight_bytes, "activations": own, "group": engine.comm.shared_bytes},
        coming | {"penalty state": state_bytes, "masks": masks},
        block_bytes=layout.bytes_per_block(),
        pool_bytes_max=budget,
        blocks_max=wanted.blocks_max,
    )
    blocks = engine.comm.min_int(plan.blocks)
    with phases("kv pool"):
        runner = Runner(engine, wanted, blocks, sizes)
    free = device.room().free
    with phases("graphs"):
        runner.capture()
    if sizes:
        check_graphs(graphs, free - device.room().free, device.reserve_bytes)
    for line in plan.table().splitlines():
        log.info("%s", line)
    log.info(
        "%d blocks of %d tokens; graphs for %d sizes of decode batches and %d of other steps",
        *(blocks, wanted.block_tokens, len(sizes.rows), len(sizes.tokens)),
    )
    return runner, Prepared(blocks, plan.items)


def _measure_graphs(engine: Engine, wanted: Preparation, sizes: GraphSizes) -> int:
    """Device bytes that these graphs will take, by three of each kind: see `graph_bytes`."""
    if not sizes:
        return 0
    device = engine.device
    device.trim()
    wanted = replace(wanted, state_slots_max=0)
    total = 0
    for kind, of_kind in (("rows", sizes.rows), ("tokens", sizes.tokens)):
        measured = [*of_kind[:-3:-1], *of_kind[:-2][:1]]
        runners: list[Runner] = []
        taken: list[int] = []
        for size in measured:
            runners.append(Runner(engine, wanted, BLOCKS_MIN, GraphSizes(**{kind: (size,)})))
            free = device.room().free
            runners[-1].capture()
            taken.append(max(0, free - device.room().free))
        total += graph_bytes(taken, len(of_kind))
        runners.clear()
        device.trim()
    return total


def check_graphs(planned: int, taken: int, reserve: int) -> None:
    """Tells when graphs took more than was planned and thereby some of the reserve."""
    log.info("graphs took %.1f MiB of the %.1f planned", taken / MIB, planned / MIB)
    if taken > planned + reserve // 2:
        log.warning(
            "graphs took %.1f MiB more than planned, of a reserve of %.1f: memory may run out",
            *((taken - planned) / MIB, reserve / MIB),
        )


def _warm(engine: Engine, wanted: Preparation) -> None:
    """Executes made-up plans of the largest size, so that what is loaded lazily is loaded."""
    where = engine.device.torch_device
    engine.sampling.prepare(engine.vocab_size, engine.logits_dtype, where, engine.logits_stride)
    if engine.shared_sampling is not None:
        engine.shared_sampling.prepare(engine.logits_dtype, engine.vocab_columns, where)
    crowd = CROWD if engine.device.asynchronous else 0
    plans, blocks = warm_plans(wanted, engine.context_tokens_max, crowd)
    runner = Runner(engine, wanted, blocks)
    for plan in plans:
        runner.execute(plan)
