"""cuBLASLt's algorithms beside PyTorch's products: finds the fastest and writes the table.

    PYTHONPATH=server python3 bench/gpu/cublaslt.py [--seconds 50] [--ranks 2] [--out FILE]
    ... --rows 576 640 --add --out FILE      entries for sizes that steps are padded to

For the products of Llama-3.1-8B, weights cold: the library's candidates by its own estimate, under
several limits (split sums allowed or not, little or much scratch, operands either way round), then,
while time is left, those of other numbers of rows and variants of the best (other splits and
clusters). Each is timed briefly; the fastest few race with PyTorch in turns. The winner must be as
exact as PyTorch's product against float32, and give the same bits twice. An entry of the table
holds for all numbers of rows down to the next one measured if it also wins in the middle.

Products that add to a residual are compared with a product and a sum after it.

Compare whole steps before and after (`step.py`): under a step's power the fastest alone can lose,
as those of long prompts did on an H100, whose table therefore ends at 512 rows (`--rows`).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import byref, c_int32, c_size_t, c_uint16, c_uint32
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from measure import BYTES_PER_SECOND, copies_for
from torch import Tensor

from headrace.ops.matmul.cublaslt import WORKSPACE_BYTES, Algo, CublasLt, Problem
from headrace.ops.matmul.cublaslt_abi import REDUCE_ANY, REDUCE_COMPUTE_TYPE, SUCCESS, AlgoBytes

FLOPS_PER_SECOND = 790e12


def shapes(ranks: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a rank's share of each weight."""
    return {
        "gate_up": (28672 // ranks, 4096),
        "down": (4096, 14336 // ranks),
        "qkv": (6144 // ranks, 4096),
        "o": (4096, 4096 // ranks),
        "head": (128256 // ranks, 4096),
    }


SHAPES = shapes(1)  # `--ranks` puts a rank's in their place
ADDED = ("o", "down")  # what is added to the residual stream
# Those that graphs are recorded for, from where our own kernels end, then prompts.
ROWS = (
    *(8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512),
    *(2048, 8192),
)
FIRST_ROWS = (256, 64, 128, 512, 192, 96, 384, 2048)  # measured first
ROWS_HEAD = 512  # logits are computed for rows that are sampled
EAGER_FROM = 513
RESIDUAL_ROWS = (16, 32, 64, 128, 256, 512, 2048)

ASKED = 8  # algorithms of each kind of question
CANDIDATES = 20  # that are timed
FINALISTS = 4
QUICK_US, RACE_US = 500.0, 4000.0  # of each
GAIN = 1.02  # below which PyTorch's product stays
CHECKED_ROWS = 256
EXACT = 1.25  # times the error of rounding, or of PyTorch's product
# CUBLASLT_ALGO_CONFIG_*: number, type.
CONFIG: dict[str, tuple[int, Any]] = {
    "id": (0, c_int32),
    "tile": (1, c_uint32),
    "split": (2, c_int32),
    "reduction": (3, c_uint32),
    "swizzle": (4, c_uint32),
    "custom": (5, c_uint32),
    "stages": (6, c_uint32),
    "inner": (7, c_uint16),
    "cluster": (8, c_uint16),
}
SPLITS = (1, 2, 3, 4, 5, 6, 8)
CLUSTERS = range(2, 9)  # 1x1, 2x1, 4x1, 1x2, 2x2, 4x2, 1x4

Launch = Callable[[], object]
Result = TypeVar("Result")


@dataclass
class Point:
    """A product, and what was found."""

    name: str
    rows: int
    residual: bool
    torch_us: float = 0.0
    best_us: float = 0.0
    best: Algo | None = None
    origin: str = "-"
    candidates: int = 0
    noted: dict[str, float] = field(default_factory=dict)
    seen: set[Algo] = field(default_factory=set)

    @property
    def ratio(self) -> float:
        return self.torch_us / self.best_us if self.best_us else 0.0

    @property
    def limit_us(self) -> float:
        outputs, inputs = SHAPES[self.name]
        work = 2 * self.rows * outputs * inputs / FLOPS_PER_SECOND
        moved = 2 * (outputs * inputs + self.rows * (outputs + inputs)) / BYTES_PER_SECOND
        return max(work, moved) * 1e6


class Timed:
    """Launches as one graph."""

    def __init__(self, launches: Sequence[Launch], rounds: int) -> None:
        launches[0]()  # loads its kernels
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._count = rounds * len(launches)
        self._graph.capture_begin()
        try:
            for _ in range(rounds):
                for launch in launches:
                    launch()
        finally:
            self._graph.capture_end()

    def events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        return start, end

    def us(self, events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
        """The median, a launch; the events are complete."""
        times = sorted(start.elapsed_time(end) for start, end in events)
        return times[len(times) // 2] * 1e3 / self._count


class Bench:
    """Weights on the device, and what is measured with them."""

    def __init__(self, seconds: float, dtype: torch.dtype) -> None:
        self.deadline = time.monotonic() + seconds
        self.dtype = dtype
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.lt = CublasLt(self.device)
        self.weights: dict[str, list[Tensor]] = {}
        for name, (outputs, inputs) in SHAPES.items():
            copies = 1 if name == "head" else max(2, copies_for(2 * outputs * inputs, 4))
            self.weights[name] = [self.random(outputs, inputs) / inputs**0.5 for _ in range(copies)]
        self.failures: dict[str, int] = {}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    # === candidates ===

    def problem(self, point: Point) -> Problem:
        outputs, inputs = SHAPES[point.name]
        rows, residual = point.rows, point.residual
        return Problem(rows, outputs, inputs, inputs, self.dtype, bias=False, residual=residual)

    def asked(self, point: Point) -> dict[Algo, str]:
        """The library's candidates: the best of each kind of question first; and their rank."""
        problem = self.problem(point)
        kinds: list[tuple[str, list[Algo]]] = []
        for flip in (False, True):
            side = "flip " if flip else ""
            for label, workspace_bytes, reductions in (
                ("", WORKSPACE_BYTES, REDUCE_ANY),
                ("no split ", WORKSPACE_BYTES, 0),
                ("float32 ", WORKSPACE_BYTES, REDUCE_COMPUTE_TYPE),
                ("no scratch ", 0, REDUCE_ANY),
                ("4 MiB ", 4 << 20, REDUCE_ANY),
            ):
                found = self.lt.choices(problem, ASKED, workspace_bytes, reductions, flip)
                kinds.append((side + label, found))
        made: dict[Algo, str] = {}
        for rank in range(ASKED):
            for label, found in kinds:
                if rank < len(found):
                    made.setdefault(found[rank], f"{label}{rank + 1}")
        return made

    def config(self, algo: Algo) -> dict[str, int]:
        held = AlgoBytes.from_buffer_copy(algo.data)
        read: dict[str, int] = {}
        for name, (number, kind) in CONFIG.items():
            value, written = kind(), c_size_t()
            function = "cublasLtMatmulAlgoConfigGetAttribute"
            size = 2 if kind is c_uint16 else 4
            arguments = (byref(held), number, byref(value), size, byref(written))
            if self.lt.library.status(function, *arguments) == SUCCESS:
                read[name] = value.value
        return read

    def changed(self, algo: Algo, **values: int) -> Algo | None:
        held = AlgoBytes.from_buffer_copy(algo.data)
        for name, value in values.items():
            number, kind = CONFIG[name]
            size = 2 if kind is c_uint16 else 4
            arguments = (byref(held), number, byref(kind(value)), size)
            function = "cublasLtMatmulAlgoConfigSetAttribute"
            if self.lt.library.status(function, *arguments) != SUCCESS:
                return None
        return Algo(bytes(held), algo.flip)

    def variants(self, point: Point, others: Sequence[Point]) -> dict[Algo, str]:
        """The best of other numbers of rows, then changes of this one's."""
        made: dict[Algo, str] = {}
        near = sorted(others, key=lambda other: abs(other.rows - point.rows))
        for other in near:
            if other.best is not None and other is not point:
                made.setdefault(other.best, f"of {other.rows}")
        if point.best is not None:
            config = self.config(point.best)
            for split in SPLITS:
                reduction = REDUCE_COMPUTE_TYPE if split > 1 else 0
                altered = self.changed(point.best, split=split, reduction=reduction)
                if altered is not None and config.get("split") != split:
                    made.setdefault(altered, f"split {split}")
            for cluster in CLUSTERS:
                altered = self.changed(point.best, cluster=cluster)
                if altered is not None:
                    made.setdefault(altered, f"cluster {cluster}")
            altered = self.changed(point.best, swizzle=1 - config.get("swizzle", 0))
            if altered is not None:
                made.setdefault(altered, "swizzle")
        problem = self.problem(point)
        return {
            algo: origin
            for algo, origin in made.items()
            if algo not in point.seen and self.lt.accepts(problem, algo)
        }

    # === launches ===

    def launches(self, point: Point, operands: Operands, algo: Algo | None) -> list[Launch]:
        """One a copy of the weight; None is PyTorch."""
        x, y, r = operands.x, operands.y, operands.residual

        def linear(w: Tensor) -> None:
            y_new = F.linear(x, w)
            if r is not None:
                r.add_(y_new)

        weights = self.weights[point.name]
        if algo is None:
            return [lambda w=w: linear(w) for w in weights]
        out = y if r is None else r
        return [
            lambda w=w: self.lt.product_with(algo, x, w, out_MN=out, residual_MN=r) for w in weights
        ]

    def timed(self, launches: Sequence[Launch], est_us: float, target_us: float) -> Timed:
        rounds = max(1, round(target_us / (est_us * len(launches))))
        return Timed(launches, min(rounds, 8))

    def quick(self, point: Point, operands: Operands, algo: Algo) -> float | None:
        def measured() -> float:
            graph = self.timed(self.launches(point, operands, algo), point.limit_us, QUICK_US / 4)
            events = [graph.events() for _ in range(3)]
            torch.cuda.synchronize()
            return graph.us(events)

        return self.tried(measured)

    def tried(self, work: Callable[[], Result]) -> Result | None:
        """None if it fails, which is counted; raises what leaves the device unusable."""
        try:
            return work()
        except (RuntimeError, ValueError) as error:
            if "CUDA error" in str(error):
                raise
            text = str(error)[-60:]
            self.failures[text] = self.failures.get(text, 0) + 1
            return None

    def race(self, graphs: Sequence[Timed], est_us: float) -> list[float]:
        """Replays in turns, so that all see the same clocks."""
        count = int(max(5, min(40, RACE_US / max(est_us, 1.0) / 8)))
        events = [[graph.events() for graph in graphs] for _ in range(count)]
        torch.cuda.synchronize()
        return [graph.us([turn[i] for turn in events]) for i, graph in enumerate(graphs)]

    # === correctness ===

    def exact(self, point: Point, operands: Operands, algo: Algo) -> bool:
        """Whether the same bits come twice, over poison, and are as near as PyTorch's."""
        weight = self.weights[point.name][0]
        x, r = operands.x, operands.fresh_residual
        ys = [torch.full_like(operands.y, float("nan")) for _ in range(2)]
        for y in ys:
            self.lt.product_with(algo, x, weight, out_MN=y, residual_MN=r)
        if not torch.equal(*ys):
            return False
        if r is not None:
            in_place = r.clone()
            self.lt.product_with(algo, x, weight, out_MN=in_place, residual_MN=in_place)
            if not torch.equal(in_place, ys[0]):
                return False
        if operands.error_max == 0.0:
            picked = operands.picked
            expected = x[picked].float() @ weight.float().T
            torchs = F.linear(x[picked], weight)
            if r is not None:
                expected += r[picked].float()
                torchs = torchs + r[picked]
            operands.expected = expected
            errors = [off(expected.to(self.dtype), expected), off(torchs, expected)]
            operands.error_max = EXACT * max(errors)
        assert operands.expected is not None
        return off(ys[0][operands.picked], operands.expected) <= operands.error_max

    # === a point ===

    def measure(self, point: Point, candidates: dict[Algo, str]) -> None:
        """Races the fastest of the candidates and the best so far with PyTorch."""
        operands = Operands(self, point)
        wanted = dict(list(candidates.items())[:CANDIDATES])
        point.seen |= set(wanted)
        point.candidates += len(wanted)
        timed = [(self.quick(point, operands, algo), algo) for algo in wanted]
        ranked = [a for us, a in sorted(((us, a) for us, a in timed if us), key=lambda p: p[0])]
        finalists = ranked[:FINALISTS]
        if point.best is not None:
            finalists.append(point.best)
            wanted[point.best] = point.origin
        finalists = [algo for algo in finalists if self.exact(point, operands, algo)]
        est = point.limit_us
        graphs = [
            self.timed(self.launches(point, operands, algo), est, QUICK_US / 2)
            for algo in (None, *finalists)
        ]
        point.torch_us, *times = self.race(graphs, est)
        if times:
            point.best_us, point.best = min(zip(times, finalists, strict=True), key=lambda p: p[0])
            point.origin = wanted[point.best]
        if point.residual:
            self.compare_residual(point, operands)

    def compare_residual(self, point: Point, operands: Operands) -> None:
        """Other ways to the same: PyTorch's product into the sum, and products without a sum."""
        r, weights, x = operands.residual, self.weights[point.name], operands.x
        assert r is not None
        ways: dict[str, list[Launch]] = {
            "addmm_": [lambda w=w: r.addmm_(x, w.T) for w in weights],
            "linear alone": [lambda w=w: F.linear(x, w) for w in weights],
        }
        graphs = [self.timed(ls, point.limit_us, QUICK_US / 2) for ls in ways.values()]
        point.noted = dict(zip(ways, self.race(graphs, point.limit_us), strict=True))

    def wins(self, point: Point, rows: int) -> bool:
        """Whether a point's algorithm beats PyTorch with another number of rows, too."""
        middle = Point(point.name, rows, point.residual)
        if point.best is None or not self.lt.accepts(self.problem(middle), point.best):
            return False
        operands = Operands(self, middle)
        if not self.exact(middle, operands, point.best):
            return False
        graphs = [
            self.timed(self.launches(middle, operands, algo), middle.limit_us, QUICK_US / 2)
            for algo in (None, point.best)
        ]
        torch_us, best_us = self.race(graphs, middle.limit_us)
        return torch_us > GAIN * best_us


class Operands:
    """Fresh random inputs of a point, and what its product is."""

    def __init__(self, bench: Bench, point: Point) -> None:
        outputs, inputs = SHAPES[point.name]
        self.x = bench.random(point.rows, inputs)
        self.y = torch.empty((point.rows, outputs), device=bench.device, dtype=bench.dtype)
        self.residual = bench.random(point.rows, outputs) if point.residual else None
        self.fresh_residual = None if self.residual is None else self.residual.clone()
        checked = min(point.rows, CHECKED_ROWS)
        self.picked = torch.randperm(point.rows, device=bench.device)[:checked]
        self.expected: Tensor | None = None
        self.error_max = 0.0


def off(actual: Tensor, expected: Tensor) -> float:
    """Root of the mean square of errors, relative."""
    error = torch.linalg.vector_norm(actual.float() - expected)
    return float(error / torch.linalg.vector_norm(expected))


def points(rows_all: Sequence[int]) -> Iterator[Point]:
    """What matters most first."""
    ordered = [r for r in FIRST_ROWS if r in rows_all]
    ordered += [r for r in rows_all if r not in FIRST_ROWS]
    for rows in ordered:
        for name in SHAPES:
            if name != "head" or rows <= ROWS_HEAD:
                yield Point(name, rows, residual=False)
    for name in ADDED:
        yield from (Point(name, r, residual=True) for r in RESIDUAL_ROWS if r in rows_all)


Table = dict[str, Any]  # of one GPU, version and dtype, as `cublaslt.json` holds it


def table(bench: Bench, done: Sequence[Point], ranges: bool) -> Table:
    """What was found, without what PyTorch does as well.

    Args:
        ranges: whether to measure in the middle of ranges; else an entry is of one number of rows.
    """
    products = []
    kept = sorted(done, key=lambda p: (p.name, p.residual, p.rows))
    for i, point in enumerate(kept):
        if point.ratio <= GAIN or point.best is None:
            continue
        before = kept[i - 1] if i else None
        same = before is not None and (before.name, before.residual) == (
            point.name,
            point.residual,
        )
        lowest = before.rows + 1 if same and before is not None else point.rows
        # Prompts are of all lengths: those that are longer than the largest batch share an entry.
        lowest = max(lowest, EAGER_FROM) if point.rows >= EAGER_FROM else lowest
        middle = (lowest + point.rows) // 2
        holds = lowest < point.rows and ranges
        if not (holds and bench.tried(lambda p=point, m=middle: bench.wins(p, m))):
            lowest = point.rows
        outputs, inputs = SHAPES[point.name]
        products.append(
            {
                "rows": [lowest, point.rows],
                "outputs": outputs,
                "inputs": inputs,
                "residual": point.residual,
                "flip": point.best.flip,
                "algo": point.best.data.hex(),
                "us": round(point.best_us, 1),
                "torch_us": round(point.torch_us, 1),
            }
        )
    return {
        "gpu": torch.cuda.get_device_name(bench.device),
        "cublaslt": bench.lt.library.version,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "products": products,
    }


def written(tables: Sequence[Table]) -> str:
    """Tables as text, a product a line."""
    sections = []
    for section in tables:
        head = json.dumps({key: section[key] for key in ("gpu", "cublaslt", "dtype")})
        lines = ",\n".join(f"      {json.dumps(product)}" for product in section["products"])
        sections.append(f'  {head[:-1]}, "products": [\n{lines}\n  ]}}')
    return '{"tables": [\n' + ",\n".join(sections) + "\n]}\n"


def merged(tables: Sequence[Table], made: Table, done: Sequence[Point], rows: bool) -> list[Table]:
    """The tables with `made` in place of what they say of the same GPU and what was measured.

    Args:
        rows: whether that is some numbers of rows, not all that a shape has; what the tables say
            of one of them alone stays where it was further ahead of PyTorch.
    """
    named = tuple(made[key] for key in ("gpu", "cublaslt", "dtype"))
    rest = []
    products = list(made["products"])
    for section in tables:
        if tuple(section[key] for key in ("gpu", "cublaslt", "dtype")) != named:
            rest.append(section)
            continue
        for p in section["products"]:
            of_shape = [q for q in done if SHAPES[q.name] == (p["outputs"], p["inputs"])]
            if of_shape and not rows:
                continue
            measured = [q.rows for q in of_shape if q.residual == p["residual"]]
            first, last = p["rows"]
            if first == last and first in measured:
                rival = next((q for q in made["products"] if _of(q) == _of(p)), None)
                if rival is None or _gain(p) > _gain(rival):
                    products = [p, *(q for q in products if q is not rival)]
                continue
            # What lies between the rows that were measured.
            edges = [first - 1, *sorted(r for r in measured if first <= r <= last), last + 1]
            for before, after in pairwise(edges):
                if before + 1 < after:
                    products.append(p | {"rows": [before + 1, after - 1]})
    return [*rest, made | {"products": sorted(products, key=_of)}]


def _of(product: dict[str, Any]) -> tuple[Any, ...]:
    return product["outputs"], product["inputs"], product["residual"], product["rows"]


def _gain(product: dict[str, Any]) -> float:
    return product["torch_us"] / product["us"]


def report(bench: Bench, done: Sequence[Point]) -> None:
    print("\nproduct    rows  limit  PyTorch   best  ratio  of limit  found as (of)  configuration")
    for p in sorted(done, key=lambda p: (p.residual, list(SHAPES).index(p.name), p.rows)):
        config = bench.config(p.best) if p.best is not None else {}
        side = "flip " if p.best is not None and p.best.flip else ""
        shown = " ".join(f"{key}{value}" for key, value in config.items())
        noted = "".join(f"; {way} {us:.1f}" for way, us in p.noted.items())
        share = p.limit_us / p.best_us if p.best_us else 0.0
        print(
            f"{p.name + (' +' if p.residual else ''):9} {p.rows:5} {p.limit_us:6.1f}"
            f" {p.torch_us:8.1f} {p.best_us:6.1f}  {p.ratio:5.3f}  {share:8.2f}"
            f"  {p.origin} ({p.candidates})  {side}{shown}{noted}"
        )
    for text, count in bench.failures.items():
        print(f"failed {count} times: {text}")


def search(bench: Bench, rows_all: Sequence[int], done: list[Point], share: float) -> None:
    """Measures points in order of weight; then variants, where most is lost."""
    start, total = time.monotonic(), bench.deadline - time.monotonic()
    waiting = list(points(rows_all))
    for point in waiting:
        if time.monotonic() - start > share * total:
            break
        bench.tried(lambda p=point: bench.measure(p, bench.asked(p)))
        done.append(point)
    print(f"{len(done)} of {len(waiting)} products in {time.monotonic() - start:.1f} s", flush=True)
    by_loss = sorted(
        (p for p in done if p.name != "head" and p.rows >= 48),
        key=lambda p: (p.residual, p.rows > ROWS_HEAD, p.limit_us - p.best_us),
    )
    varied = 0
    for point in by_loss:
        if time.monotonic() - start > total * 0.9:
            break
        others = [p for p in done if (p.name, p.residual) == (point.name, point.residual)]
        candidates = bench.variants(point, others)
        if candidates:
            bench.tried(lambda p=point, c=candidates: bench.measure(p, c))
        varied += 1
    print(f"variants of {varied}, {time.monotonic() - start:.1f} s", flush=True)


def host_us(bench: Bench) -> list[float]:
    """What launching a small product takes of the host: PyTorch's, and ours."""
    x, weight, calls = bench.random(8, SHAPES["o"][1]), bench.weights["o"][0], 50
    taken = []
    for launch in (lambda: F.linear(x, weight), lambda: bench.lt.product(x, weight)):
        launch()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):  # few enough to be queued
            launch()
        taken.append((time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=48.0, help="to measure")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--ranks", type=int, default=1, help="whose share of the weights to take")
    parser.add_argument(
        "--add", action="store_true", help="entries for exactly these rows, beside the table's"
    )
    parser.add_argument("--out", type=Path, help="the file of tables to write, or to add to")
    args = parser.parse_args()
    SHAPES.update(shapes(args.ranks))
    torch.manual_seed(0)
    gc.disable()
    torch.cuda.set_stream(torch.cuda.Stream())
    bench = Bench(args.seconds, getattr(torch, args.dtype))
    print(f"cuBLASLt {bench.lt.library.version}, PyTorch {torch.__version__}", flush=True)
    done: list[Point] = []
    ranges = not args.add
    try:
        search(bench, sorted(args.rows), done, share=0.7)
        print("host us a launch: PyTorch {:.1f}, ours {:.1f}".format(*host_us(bench)))
    except RuntimeError as error:  # what was found before it counts
        print(f"stopped: {error}")
        ranges = False
    made = table(bench, done, ranges)
    if args.out is not None:
        tables = json.loads(args.out.read_text())["tables"] if args.out.exists() else []
        args.out.write_text(written(merged(tables, made, done, args.add)))
    report(bench, done)


if __name__ == "__main__":
    main()
