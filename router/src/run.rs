//! The process: bind, load, tell the launcher, serve, drain.

use std::io::{Read, Write, stdin, stdout};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::serve::ListenerExt;
use headrace_config::{Serve, without_secrets};
use headrace_engine::{
    EngineConfig, EngineError, EngineHandle, EngineState, Record, TokenId, start as start_engine,
};
use headrace_otlp::TargetError;
use headrace_text::{ChatTemplate, EncodePool, Tokenizer, ToolFormat, ToolStyle};
use prometheus::Registry;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::app::{App, Ready, Text, metrics_router, router};
use crate::backend::Backend;
use crate::metrics::Metrics;
use crate::telemetry;
use crate::trace::Tracing;

/// Connections that may wait to be accepted; the kernel's own limit is usually this.
const BACKLOG: u32 = 4096;

/// What clients of a lost group have to read their last event.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why the process ends other than by a signal.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("the runtime cannot be started: {0}")]
    Runtime(std::io::Error),
    #[error("port {address} cannot be listened on: {source}")]
    Bind {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("signals cannot be listened to: {0}")]
    Signal(std::io::Error),
    #[error("{0}")]
    Tokenizer(#[from] headrace_text::LoadError),
    #[error("{0}")]
    Template(#[from] headrace_text::TemplateError),
    #[error("{0}")]
    ToolParser(#[from] headrace_text::UnknownParser),
    #[error("loading the tokenizer panicked")]
    LoadPanicked,
    #[error("--otlp-endpoint: {0}")]
    Collector(#[from] TargetError),
    #[error("{0}")]
    Engine(#[from] EngineError),
    #[error("the engine stopped")]
    EngineStopped,
}

/// What ends the wait for requests.
enum End {
    /// SIGTERM or SIGINT.
    Stop,
    /// The engine ended by itself, with or without an error.
    Engine(Result<(), RunError>),
}

/// Runs the router until it is told to stop; the exit code of the process.
pub fn run(serve: Serve) -> ExitCode {
    watch_lifeline();
    if let Err(error) = telemetry::start(&serve.telemetry) {
        return fail(&error.to_string());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let result = runtime.map_err(RunError::Runtime).and_then(|runtime| {
        let result = runtime.block_on(serve_until_stopped(serve));
        // Encoding that still runs is not waited for.
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

async fn serve_until_stopped(serve: Serve) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signal)?;
    let address = SocketAddr::new(hostname(&serve), serve.http.port);
    let listener = listen_on(address).map_err(|source| RunError::Bind { address, source })?;
    let port = listener
        .local_addr()
        .map_or(serve.http.port, |address| address.port());
    control(&serde_json::json!({"event": "listening", "port": port}));

    let registry = Registry::new();
    let metrics = Arc::new(Metrics::new(registry.clone()));
    let (engine, driver) = start_engine(engine_config(&serve, registry));
    let patience = Duration::from_millis(serve.http.drain_deadline_ms);
    let (tracing, worker) = Tracing::new(&serve)?;
    let worker = worker.map(|worker| tokio::spawn(worker.run()));
    let app = App::new(serve, Backend::Engine(engine.clone()), metrics).traced(tracing);
    let app = Arc::new(app);
    let closing = CancellationToken::new();
    let http = tokio::spawn(listen(listener, Arc::clone(&app), closing.clone()));
    serve_metrics(&app, address.ip());

    let end = tokio::select! {
        biased;
        _ = terminate.recv() => End::Stop,
        _ = interrupt.recv() => End::Stop,
        result = live(Arc::clone(&app), engine.clone(), driver) => End::Engine(result),
    };
    let (result, patience) = match end {
        End::Stop => {
            tracing::info!(patience = ?patience, "Stopping: no new requests, running ones end");
            let started = tokio::time::Instant::now();
            engine.drain(patience).await;
            (
                Ok(()),
                patience.saturating_sub(started.elapsed()).max(FAREWELL),
            )
        }
        End::Engine(result) => (result, FAREWELL),
    };
    closing.cancel();
    if timeout(patience, http).await.is_err() {
        tracing::warn!("Some clients had not read their answer when the time was over");
    }
    app.tracing.flush(worker).await;
    result
}

/// Loads, says so, and stays until the engine ends.
async fn live(
    app: Arc<App>,
    engine: EngineHandle,
    driver: JoinHandle<Result<(), EngineError>>,
) -> Result<(), RunError> {
    let loading = Arc::clone(&app);
    let loaded = tokio::task::spawn_blocking(move || load_text(&loading.serve));
    let text = Arc::new(loaded.await.map_err(|_| RunError::LoadPanicked)??);
    if app.text.set(Arc::clone(&text)).is_err() {
        tracing::error!("The tokenizer was loaded twice; this is a router bug");
    }
    let mut state = engine.watch();
    let settled = state
        .wait_for(|state| !matches!(state, EngineState::Loading))
        .await;
    let facts = match settled.as_deref() {
        Ok(EngineState::Ready(facts)) => Some(Arc::clone(facts)),
        _ => None,
    };
    drop(settled);
    if let Some(facts) = facts {
        let describe = facts.describe.clone();
        let ready = Ready::new(&app.serve, facts, text);
        app.metrics.set_limits(ready.input_max, ready.total_max);
        for shortfall in ready.shortfalls(&app.serve) {
            tracing::warn!("{shortfall}");
        }
        tracing::info!(
            model = app.serve.model.id,
            device = describe.device,
            dtype = describe.dtype,
            max_input_tokens = ready.input_max,
            max_total_tokens = ready.total_max,
            "Connected"
        );
        control(&serde_json::json!({
            "event": "ready",
            "model": app.serve.model.id,
            "device": describe.device,
            "dtype": describe.dtype,
        }));
    }
    match driver.await {
        Ok(Ok(())) | Err(_) => Err(RunError::EngineStopped),
        Ok(Err(error)) => Err(error.into()),
    }
}

fn load_text(serve: &Serve) -> Result<Text, RunError> {
    let model = &serve.model;
    let tokenizer = Arc::new(Tokenizer::load(&model.path)?);
    let template = ChatTemplate::load(&model.path, model.tokenizer_config_path.as_deref())?;
    let asked = model.tool_call_parser.parse()?;
    let tools = ToolStyle::decide(template.as_ref(), &tokenizer, asked);
    tracing::info!(
        parser = tools.format.map_or("none", ToolFormat::name),
        template_shows_tools = tools.shows_tools,
        earlier_calls = ?tools.calls,
        "Tools"
    );
    let requests = &serve.requests;
    let queue_max = requests.max_concurrent_requests.max(1);
    Ok(Text {
        template,
        tools,
        pool: EncodePool::new(
            Arc::clone(&tokenizer),
            requests.validation_workers,
            queue_max,
        ),
        ending: tokenizer
            .ending_ids()
            .iter()
            .copied()
            .map(TokenId)
            .collect(),
        tokens_max: tokenizer.tokens_max(),
        grammars: OnceLock::new(),
        tokenizer,
    })
}

/// What the engine is told of a server; whoever drives shards without HTTP tells it the same.
pub fn engine_config(serve: &Serve, metrics: Registry) -> EngineConfig {
    let (engine, device) = (&serve.engine, &serve.device);
    EngineConfig {
        sockets: serve
            .shards
            .iter()
            .map(|shard| shard.socket.clone())
            .collect(),
        block_tokens: engine.block_tokens,
        blocks_max: engine.blocks_max,
        running_max: engine.running_max,
        step_tokens_max: engine.step_tokens_max,
        prefill_tokens_max: engine.prefill_tokens_max,
        itl_target: (engine.itl_target_ms > 0)
            .then(|| Duration::from_millis(engine.itl_target_ms.into())),
        depth: engine.pipeline_depth,
        prefix_caching: engine.prefix_caching,
        // Permits bound the sequences, so that the queue is never what refuses one.
        queue_max: serve.requests.max_concurrent_requests.max(1),
        context_tokens_max: serve.requests.max_total_tokens,
        kv_dtype: device.kv_dtype.clone(),
        memory_fraction: device.memory_fraction,
        record: engine.record.as_ref().map(|path| Record {
            path: path.clone(),
            serve: without_secrets(serve).into(),
        }),
        step_deadline: Duration::from_millis(engine.step_deadline_ms),
        mask_max: Duration::from_millis(engine.mask_ms_max.into()),
        mask_threads: serve.requests.validation_workers,
        prepare_deadline: Duration::from_millis(engine.prepare_deadline_ms),
        metrics,
    }
}

/// Serves the metrics on their own port as well, where one is asked for. One that is taken stops
/// nobody.
fn serve_metrics(app: &Arc<App>, ip: IpAddr) {
    let Some(port) = app.serve.http.prometheus_port else {
        return;
    };
    let address = SocketAddr::new(ip, port);
    match listen_on(address) {
        Ok(listener) => {
            let routes = metrics_router(Arc::clone(app));
            tokio::spawn(async move {
                if let Err(error) = axum::serve(listener, routes).await {
                    tracing::error!(%error, "The metrics' own port is closed");
                }
            });
        }
        Err(error) => tracing::warn!(
            %address, %error,
            "--prometheus-port cannot be listened on; /metrics of --port has the same"
        ),
    }
}

async fn listen(listener: TcpListener, app: Arc<App>, closing: CancellationToken) {
    // A token is a small write that must not wait for the next.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "A connection keeps Nagle's algorithm");
        }
    });
    let serving = axum::serve(listener, router(app))
        .with_graceful_shutdown(async move { closing.cancelled().await });
    if let Err(error) = serving.await {
        tracing::error!(%error, "The HTTP server ended");
    }
}

// === free functions ===

/// Listens with room for a burst of connections: the standard library's 128 make the kernel drop
/// the rest, and a client tries again only after a second.
fn listen_on(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The address to bind; a name that is none (containers export theirs) means every address.
fn hostname(serve: &Serve) -> IpAddr {
    serve.http.hostname.parse().unwrap_or_else(|_| {
        tracing::warn!(
            hostname = serve.http.hostname,
            "Not an address; listening on 0.0.0.0"
        );
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    })
}

/// Ends the process when the launcher is gone: then stdin, a pipe it holds, ends.
fn watch_lifeline() {
    let watch = || {
        let mut buffer = [0; 64];
        loop {
            match stdin().lock().read(&mut buffer) {
                Ok(0) => std::process::exit(1),
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    std::process::exit(1)
                }
                Ok(_) | Err(_) => {}
            }
        }
    };
    std::thread::Builder::new()
        .name("lifeline".to_owned())
        .spawn(watch)
        .expect("the system starts one thread; its thread limit is too low");
}

/// Writes a line for the launcher.
fn control(line: &serde_json::Value) {
    let mut out = stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        // The launcher is gone; the lifeline ends this process.
        tracing::debug!("A control line had no reader");
    }
}

fn fail(message: &str) -> ExitCode {
    tracing::error!("{message}");
    control(&serde_json::json!({"event": "fatal", "message": message}));
    ExitCode::FAILURE
}
