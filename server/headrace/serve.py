"""The gRPC service of one rank: bytes in, bytes out. It computes nothing itself.

The event loop runs in the main thread, the executor in its own. Plans and results pass through
as bytes: the service neither reads nor writes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from headrace.config import Serve
from headrace.engine import Engine, Preparation
from headrace.errors import HeadraceError
from headrace.executor import Executor
from headrace.kv import KvLayout
from headrace.load import load_engine
from headrace.startup import Phases
from headrace.tracing import start_tracing
from headrace.wire import SERVICE, messages

log = logging.getLogger(__name__)

# A plan's size is bounded by the tokens of a step and the histories of its bindings.
MESSAGE_BYTES_MAX = 64 << 20

# Results that may wait for the router to read them: it sends no plan more than it has in flight.
OUTBOX_MAX = 64

# Block sizes that the attention backends support, best first.
BLOCK_TOKENS = (16, 32, 64, 128, 8, 4, 2, 1)

OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]


class ShardService:
    """Describe, Prepare and Execute over one executor."""

    def __init__(
        self, serve: Serve, rank: int, phases: Phases, kernels: Callable[[], None] | None = None
    ) -> None:
        self._rank = rank
        self._phases = phases
        self._ranks = len(serve.shards)
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[bytes | str] | None = None
        self.tracer = start_tracing(serve, rank)
        self._executor = Executor(
            lambda: load_engine(serve, rank, phases, kernels),
            self.tracer,
            self._post,
            self._post,
            serve.engine.mask_ms_max / 1000,
        )
        self._engine: Engine | None = None

    async def load(self) -> None:
        """Loads the model; raises what went wrong."""
        self._engine = await asyncio.wrap_future(self._executor.start())

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service's methods; Execute's bytes are left as they are."""
        kinds = messages()
        methods = {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe,
                request_deserializer=kinds.DescribeRequest.FromString,
                response_serializer=kinds.DescribeReply.SerializeToString,
            ),
            "Prepare": grpc.unary_unary_rpc_method_handler(
                self._prepare,
                request_deserializer=kinds.PrepareRequest.FromString,
                response_serializer=kinds.PrepareReply.SerializeToString,
            ),
            "Execute": grpc.stream_stream_rpc_method_handler(self._execute),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _describe(self, request: Any, context: Any) -> Any:
        del request, context
        engine = self._engine
        assert engine is not None, "serving before loaded"
        layout = KvLayout(
            engine.layers, engine.kv_heads, engine.head_dim, 1, engine.kv_dtype or engine.dtype
        )
        return messages().DescribeReply(
            architecture=engine.architecture,
            device=engine.device.kind,
            dtype=str(engine.dtype).removeprefix("torch."),
            rank=self._rank,
            ranks=self._ranks,
            context_tokens_max=engine.context_tokens_max,
            vocab_size=engine.vocab_size,
            kv_bytes_per_token=layout.bytes_per_token(),
            block_tokens_supported=BLOCK_TOKENS,
            kv_written_in_attention=False,
        )

    async def _prepare(self, request: Any, context: Any) -> Any:
        try:
            wanted = Preparation.of(request)
            prepared = await asyncio.wrap_future(self._executor.prepare(wanted))
        except Exception as error:
            if not isinstance(error, HeadraceError):
                log.exception("Prepare failed")
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, _sentence(error))
            raise
        for line in self._phases.tell():
            log.info("%s", line)
        kinds = messages()
        memory = [kinds.MemoryItem(what=what, bytes=count) for what, count in prepared.memory]
        return kinds.PrepareReply(blocks=prepared.blocks, memory=memory)

    async def _execute(self, plans: AsyncIterator[bytes], context: Any) -> None:
        """Runs until the router ends the stream or a step fails."""
        outbox: asyncio.Queue[bytes | str] = asyncio.Queue(OUTBOX_MAX)
        self._outbox = outbox  # A new stream replaces one whose router is gone.
        reader = asyncio.ensure_future(self._read(plans, outbox))
        try:
            while True:
                item = await outbox.get()
                if isinstance(item, str):
                    if item:
                        await context.abort(grpc.StatusCode.INTERNAL, item)
                    return
                await context.write(item)
        finally:
            reader.cancel()
            if self._outbox is outbox:
                self._outbox = None

    async def _read(self, plans: AsyncIterator[bytes], outbox: asyncio.Queue[bytes | str]) -> None:
        """Hands plans to the executor; ends the stream when the router does."""
        end = ""
        try:
            async for data in plans:
                self._executor.submit(data)
        except HeadraceError as error:
            end = str(error)
        await outbox.put(end)

    def _post(self, item: bytes | str) -> None:
        """Takes a result or an error sentence from the executor's thread to the stream."""
        if isinstance(item, str):
            log.error("%s", item)
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            self._loop.call_soon_threadsafe(self._deliver, item)

    def _deliver(self, item: bytes | str) -> None:
        if self._outbox is None:
            return
        try:
            self._outbox.put_nowait(item)
        except asyncio.QueueFull:
            log.error("the router does not read results; %d wait", OUTBOX_MAX)


def run_shard(
    serve: Serve, rank: int, phases: Phases, kernels: Callable[[], None] | None = None
) -> int:
    """Serves one rank until the lifeline ends or a signal comes; returns the exit status.

    Args:
        kernels: as for `load_engine`.
    """
    _watch_lifeline()
    try:
        asyncio.run(_serve(serve, rank, phases, kernels))
    except Exception as error:
        if not isinstance(error, HeadraceError):
            log.exception("the shard failed")
        control({"event": "fatal", "message": f"shard {rank}: {_sentence(error)}"})
        return 1
    return 0


async def _serve(
    serve: Serve, rank: int, phases: Phases, kernels: Callable[[], None] | None
) -> None:
    service = ShardService(serve, rank, phases, kernels)
    await service.load()
    socket = serve.shard(rank).socket
    socket.unlink(missing_ok=True)
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((service.handlers(),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    control({"event": "serving"})
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    await server.stop(grace=None)
    socket.unlink(missing_ok=True)
    service.tracer.stop()


def control(message: dict[str, Any]) -> None:
    """Tells the launcher something: one JSON object on a line of stdout."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _watch_lifeline() -> None:
    """Exits at once when the launcher's end of the pipe on stdin is closed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no message"
    return text if isinstance(error, HeadraceError) else f"{type(error).__name__}: {text}"
