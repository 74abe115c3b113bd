"""The shard's configuration: `serve.json`, as the launcher wrote it, in frozen dataclasses.

Mirrors `launcher/config/src/lib.rs`. An unknown key is an error, so that a typing mistake or a
launcher of another version never goes unnoticed. Nothing else reads files of knobs or the
environment.
"""

import ctypes
import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from headrace.errors import ConfigError

# How long an idle OpenMP thread spins before it sleeps. The runtime's default is milliseconds,
# which starves the router on a machine where both share two cores; a thread that sleeps at once
# costs a wake-up in every parallel loop.
OMP_SPIN_COUNT = 10_000

# Numbers of malloc.h, and how much freed memory is kept at most.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
KEPT_BYTES = 1 << 30

# Compiled kernels that an image brings, if it does; in the package, so that no volume hides them.
SHIPPED_KERNELS = Path(__file__).parent / "_triton"

Section = TypeVar("Section")


@dataclass(frozen=True)
class Model:
    """What is served."""

    id: str
    revision: str | None
    sha: str | None
    path: Path
    load_format: str
    quantize: str
    quantize_activations: bool
    tokenizer_config_path: Path | None
    tool_call_parser: str


@dataclass(frozen=True)
class DeviceConfig:
    """What it runs on and in which precision. Zeros and empty strings are "the default"."""

    kind: str
    dtype: str
    kv_dtype: str
    memory_fraction: float
    kv_bytes_max: int
    threads: int
    reference_ops: bool
    graphs: bool


@dataclass(frozen=True)
class Requests:
    """What requests may ask for. Read by the router; here only for completeness."""

    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    max_client_batch_size: int
    payload_limit: int
    validation_workers: int
    disable_grammar_support: bool
    timeout_ms: int | None


@dataclass(frozen=True)
class Engine:
    """How steps are made."""

    block_tokens: int
    blocks_max: int
    running_max: int
    step_tokens_max: int
    prefill_tokens_max: int
    itl_target_ms: int
    pipeline_depth: int
    prefix_caching: bool
    record: Path | None
    mask_ms_max: int
    step_deadline_ms: int
    prepare_deadline_ms: int


@dataclass(frozen=True)
class Watermark:
    """What watermarks are made of, of the requests that ask for one."""

    gamma: float
    delta: float


@dataclass(frozen=True)
class Http:
    """Where HTTP listens. Read by the router."""

    hostname: str
    port: int
    prometheus_port: int | None
    api_key: str | None
    cors_allow_origin: list[str]
    compute_type: str | None
    predict_route: str | None
    health_route: str | None
    v1_dialect: str
    drain_deadline_ms: int


@dataclass(frozen=True)
class Shard:
    """One rank."""

    rank: int
    socket: Path
    device_index: int
    rendezvous: str


@dataclass(frozen=True)
class Pair:
    """A name and what it stands for."""

    name: str
    value: str = field(repr=False)


@dataclass(frozen=True)
class ClientCertificate:
    """A certificate of the server's own and its private key: files of PEM."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Tls:
    """TLS to the collector: a file of PEM with the roots that are trusted, and what it is shown."""

    roots: Path
    client: ClientCertificate | None


@dataclass(frozen=True)
class Traces:
    """Which requests are traced and how their spans travel."""

    protocol: str
    tls: Tls | None
    headers: list[Pair]
    resource: list[Pair]
    sampler: str
    sampler_ratio: float
    timeout_ms: int
    queue_max: int
    batch_max: int
    delay_ms: int


@dataclass(frozen=True)
class Telemetry:
    """Logs, metrics and traces."""

    log_level: str
    json_output: bool
    otlp_endpoint: str | None
    otlp_service_name: str
    traces: Traces


@dataclass(frozen=True)
class Serve:
    """Everything a server needs to know, resolved."""

    model: Model
    device: DeviceConfig
    requests: Requests
    engine: Engine
    watermark: Watermark
    http: Http
    shards: list[Shard]
    telemetry: Telemetry

    @staticmethod
    def load(path: Path) -> "Serve":
        """Reads `serve.json`; raises `ConfigError` naming the key that is wrong."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        return Serve.parse(data)

    @staticmethod
    def parse(data: Any) -> "Serve":
        """Checks decoded JSON; raises `ConfigError` naming the key that is wrong."""
        serve = _section(Serve, data, "serve.json")
        ranks = [shard.rank for shard in serve.shards]
        if not ranks or ranks != list(range(len(ranks))):
            raise ConfigError(f"shards must be listed in rank order from 0, not {ranks}")
        return serve

    def shard(self, rank: int) -> Shard:
        """The entry of one rank."""
        if not 0 <= rank < len(self.shards):
            raise ConfigError(f"rank {rank} is not one of the {len(self.shards)} shards")
        return self.shards[rank]


def prepare_process(serve: Serve) -> None:
    """Sets what libraries read when they are loaded; call before torch and before any thread.

    Values that the user has set in the environment win.
    """
    if serve.device.kind != "cuda" and "MALLOC_ARENA_MAX" not in os.environ:
        _keep_freed_memory()
    os.environ.setdefault("GOMP_SPINCOUNT", str(OMP_SPIN_COUNT))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_kernels()
    host = serve.shards[0].rendezvous.rpartition(":")[0]
    if host in ("127.0.0.1", "localhost"):
        # A host name that does not resolve would otherwise end gloo's start.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def keep_kernels(folder: Path | None = None) -> None:
    """Says where Triton finds compiled kernels, and where it puts new ones.

    Args:
        folder: the only one; None: those that an image brings, then the user's.
    """
    if folder is not None:
        os.environ["TRITON_CACHE_DIR"] = str(folder)
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "headrace"
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    os.environ.setdefault("HUMMING_CACHE_DIR", str(cache / "humming"))
    os.environ.setdefault("HUMMING_TMP_DIR", str(cache / "humming" / "tmp"))
    # Its wheel has what two processes would otherwise look for, each for seconds. (How many kernels
    # it compiles at a time, which this decides as well, is said where it is imported.)
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    if SHIPPED_KERNELS.is_dir():
        os.environ.setdefault("TRITON_CACHE_MANAGER", "headrace.ahead.shipped:ShippedFirst")


def kernel_caches() -> list[Path]:
    """Where compiled kernels are looked for, after `keep_kernels`; the last is written to."""
    own = Path(os.environ["TRITON_CACHE_DIR"])
    return [SHIPPED_KERNELS, own] if "TRITON_CACHE_MANAGER" in os.environ else [own]


def _keep_freed_memory() -> None:
    """Has the C library keep what a step frees for the next step.

    Otherwise every tensor of some megabytes is new pages from the kernel, each zeroed and mapped
    by a fault: half the time of a sampler that makes a few of them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # Not glibc.
        return
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def _section(kind: type[Section], data: Any, where: str) -> Section:
    """Builds a dataclass from a JSON object, checking every key and every type."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object, not {_name(data)}")
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{where} has unknown keys: {', '.join(unknown)}")
    values = {}
    for name in fields:
        optional = type(None) in typing.get_args(hints[name])
        if name not in data and not optional:
            raise ConfigError(f"{where} lacks `{name}`")
        values[name] = _value(hints[name], data.get(name), f"{where}: {name}")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """Checks one value against its declared type."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, not {_name(value)}")
        (item,) = typing.get_args(hint)
        return [_value(item, entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    accepts = {Path: str, float: (int, float)}.get(hint, hint)
    # bool is an int to Python, but not to serve.json.
    if not isinstance(value, accepts) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be {hint.__name__}, not {_name(value)}")
    if hint is int and value < 0:
        raise ConfigError(f"{where} must not be negative, but is {value}")
    return hint(value)


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
