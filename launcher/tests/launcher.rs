//! The launcher against fake children, as processes: this test binary starts itself again as the
//! launcher, which starts `fake_child.py` as everybody else.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use headrace_launcher::Programs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Far above what any test here needs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Not a test: the launcher process of the others.
#[test]
#[ignore = "the launcher process that the other tests start"]
fn launcher_process() {
    let folder = PathBuf::from(std::env::var_os("FAKE_DIR").expect("the test names its folder"));
    let args = fs::read_to_string(folder.join("args.json")).expect("the test wrote arguments");
    let args: Vec<String> = serde_json::from_str(&args).expect("arguments are strings");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_child.py");
    let python = std::env::var_os("FAKE_PYTHON").expect("the test names its Python");
    let fake: Vec<OsString> = vec![python, "-S".into(), "-E".into(), script.into()];
    let router = fake.iter().cloned().chain(["router".into()]).collect();
    let words = std::iter::once("headrace".to_owned())
        .chain(args)
        .map(OsString::from);
    let status = headrace_launcher::run(words, || {
        Ok(Programs {
            router,
            server: fake,
        })
    });
    std::process::exit(status.into());
}

/// A launcher with its fake children.
struct World {
    folder: PathBuf,
    launcher: Child,
    stdout: Receiver<String>,
    stderr: thread::JoinHandle<String>,
    seen: String,
}

impl World {
    /// `steps` by role; a download that finds a model is added, and serving shards.
    fn start(args: &[&str], plan: Value) -> Self {
        Self::start_with(args, plan, &[])
    }

    fn start_with(args: &[&str], mut plan: Value, env: &[(&str, &str)]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("hr-test-{}-{n}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder for the test");
        let steps = plan["steps"].as_object_mut().expect("a plan has steps");
        let model = json!([["say", {"event": "model", "path": folder, "sha": "abc"}], ["exit", 0]]);
        steps.entry("download").or_insert(model);
        for rank in 0..2 {
            let serving = json!([["say", {"event": "serving"}]]);
            steps.entry(format!("shard-{rank}")).or_insert(serving);
        }
        fs::write(folder.join("plan.json"), plan.to_string()).expect("the plan is written");
        fs::write(folder.join("args.json"), json!(args).to_string()).expect("and the arguments");
        let mut command = Command::new(std::env::current_exe().expect("tests have a path"));
        command.args(["--exact", "launcher_process", "--ignored", "--nocapture"]);
        for name in ["HOSTNAME", "PORT", "MODEL_ID", "API_KEY", "HF_TOKEN"] {
            command.env_remove(name);
        }
        command
            .env("FAKE_DIR", &folder)
            .env("FAKE_PYTHON", python());
        command.env("TMPDIR", &folder).envs(env.iter().copied());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut launcher = command.spawn().expect("the launcher starts");
        let (lines, stdout) = channel();
        let pipe = launcher.stdout.take().expect("stdout is piped");
        thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                if lines
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    return;
                }
            }
        });
        let mut pipe = launcher.stderr.take().expect("stderr is piped");
        let stderr = thread::spawn(move || {
            let mut text = String::new();
            pipe.read_to_string(&mut text).ok();
            text
        });
        Self {
            folder,
            launcher,
            stdout,
            stderr,
            seen: String::new(),
        }
    }

    /// Reads the log until a line contains `what`.
    fn until(&mut self, what: &str) -> &str {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.stdout.recv_timeout(left) else {
                panic!("no `{what}` in:\n{}\n{}", self.seen, self.events());
            };
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(what) {
                return &self.seen;
            }
        }
    }

    fn events(&self) -> String {
        fs::read_to_string(self.folder.join("events.log")).unwrap_or_default()
    }

    /// Waits for a line of the children's common diary.
    fn until_event(&self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.events().lines().any(|line| line == what) {
            assert!(
                Instant::now() < deadline,
                "no `{what}` in:\n{}",
                self.events()
            );
            pause();
        }
    }

    fn pids(&self) -> Vec<i32> {
        let events = self.events();
        let pids = events.lines().filter_map(|line| line.split_once(" pid "));
        pids.map(|(_, pid)| pid.parse().expect("a pid")).collect()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.launcher.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("the launcher runs");
    }

    /// Status, standard output and standard error of the launcher; and nobody is left.
    fn end(mut self) -> (ExitStatus, String, String) {
        let status = self.launcher.wait().expect("the launcher ends");
        let deadline = Instant::now() + PATIENCE;
        while let Some(pid) = self.pids().into_iter().find(|pid| is_running(*pid)) {
            assert!(
                Instant::now() < deadline,
                "process {pid} is left:\n{}",
                self.events()
            );
            pause();
        }
        let rest: Vec<String> = self.stdout.iter().collect();
        self.seen.push_str(&rest.join("\n"));
        let leftovers: Vec<_> = fs::read_dir(&self.folder)
            .expect("the test's folder")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("headrace-"))
            .collect();
        assert!(
            leftovers.is_empty() || status.code().is_none(),
            "left behind: {leftovers:?}"
        );
        let stderr = self.stderr.join().expect("stderr is read");
        fs::remove_dir_all(&self.folder).expect("the test's folder goes");
        (status, self.seen, stderr)
    }
}

/// A process that is neither gone nor a zombie that somebody else has to wait for.
fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

fn pause() {
    thread::park_timeout(Duration::from_millis(10));
}

/// The interpreter itself: a shim in front of it would cost every child a second process.
fn python() -> PathBuf {
    static PATH: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    PATH.get_or_init(|| {
        let output = Command::new("python3")
            .args(["-c", "import sys; print(sys.executable)"])
            .output()
            .expect("python3 is on the path");
        Path::new(String::from_utf8_lossy(&output.stdout).trim()).to_owned()
    })
    .clone()
}

/// The router's steps up to readiness.
fn ready(mut after: Vec<Value>) -> Value {
    let mut steps = vec![
        json!(["say", {"event": "listening", "port": 23001}]),
        json!(["say", {"event": "ready", "model": "m", "device": "cpu", "dtype": "float32"}]),
    ];
    steps.append(&mut after);
    steps.into()
}

#[test]
fn a_server_starts_says_so_and_stops_in_order() {
    let plan = json!({"steps": {"router": ready(vec![])}, "on_term": {"router": 0.2}});
    let args = ["--num-shard", "2", "--port", "23000", "--api-key", "sesame"];
    let mut world = World::start_with(&args, plan, &[("HF_TOKEN", "hub"), ("PORT", "1")]);
    let log = world.until("Ctrl-C stops").to_owned();
    for part in [
        "m is ready at http://127.0.0.1:23001",
        "cpu, float32, 2 shards",
    ] {
        assert!(log.contains(part), "no `{part}` in {log}");
    }
    assert!(log.contains("Arguments: Serve {"), "{log}");
    assert!(log.contains("api_key: Some(\"(hidden)\")"), "{log}");
    assert!(!log.contains("sesame"), "{log}");
    let serve = fs::read_to_string(world.folder.join("serve.json")).expect("children saw it");
    let serve: Value = serde_json::from_str(&serve).expect("json");
    assert_eq!(serve["http"]["port"], 23000);
    assert_eq!(serve["http"]["api_key"], "sesame");
    assert_eq!(serve["model"]["sha"], "abc");
    assert_eq!(serve["shards"].as_array().map(Vec::len), Some(2));
    world.until_event("shard-1 mode 600");
    world.signal(Signal::SIGTERM);
    let events = {
        let status = world.launcher.wait().expect("the launcher ends");
        assert_eq!(status.code(), Some(0));
        world.events()
    };
    let at = |what: &str| {
        let at = events.lines().position(|line| line == what);
        at.unwrap_or_else(|| panic!("no `{what}` in:\n{events}"))
    };
    assert!(at("router term") < at("router end"));
    assert!(at("router end") < at("shard-0 term") && at("router end") < at("shard-1 term"));
    for role in ["router", "shard-0", "shard-1"] {
        at(&format!("{role} secrets "));
    }
    at("download secrets HF_TOKEN=hub");
    let (status, _, stderr) = world.end();
    assert!(status.success());
    assert!(!stderr.contains("Error"), "{stderr}");
}

#[test]
fn a_shard_that_dies_while_loading_ends_the_start_with_its_reason() {
    let plan = json!({"steps": {
        "router": [["say", {"event": "listening", "port": 23001}]],
        "shard-0": [["say", {"event": "fatal", "message": "9 heads do not divide by 2"}], ["exit", 1]],
    }});
    let (status, _, stderr) = World::start(&[], plan).end();
    assert_eq!(status.code(), Some(1));
    let expected = "Error: ShardCannotStart: shard-0: 9 heads do not divide by 2";
    assert!(stderr.contains(expected), "{stderr}");
}

#[test]
fn a_shard_that_dies_while_serving_ends_the_server_with_its_last_lines() {
    let plan = json!({"steps": {
        "router": ready(vec![json!(["touch", "ready"])]),
        "shard-0": [
            ["say", {"event": "serving"}],
            ["await", "ready"],
            ["err", "Traceback (most recent call last):"],
            ["err", "MemoryError: 42"],
            ["exit", 3],
        ],
    }});
    let (status, stdout, stderr) = World::start(&[], plan).end();
    assert_eq!(status.code(), Some(1));
    let expected = "Error: ShardFailed: shard-0 exited with status 3; its last lines:\n    \
                    Traceback (most recent call last):\n    MemoryError: 42";
    assert!(stderr.contains(expected), "{stderr}");
    assert!(stdout.contains("shard-0 | MemoryError: 42"), "{stdout}");
}

#[test]
fn secrets_stand_in_no_log_and_in_no_error_whoever_brings_them_up() {
    let plan = json!({"steps": {
        "router": ready(vec![json!(["touch", "ready"])]),
        "shard-0": [
            ["say", {"event": "serving"}],
            ["err", "asking with hf_sEcReT-tOkEn"],
            ["await", "ready"],
            ["err", "KeyError: open sesame"],
            ["exit", 3],
        ],
    }});
    let args = ["--api-key", "open sesame"];
    let variables = [("HF_TOKEN", "hf_sEcReT-tOkEn")];
    let (status, stdout, stderr) = World::start_with(&args, plan, &variables).end();
    assert_eq!(status.code(), Some(1));
    assert!(
        stdout.contains("shard-0 | asking with [redacted]"),
        "{stdout}"
    );
    assert!(
        stdout.contains("shard-0 | KeyError: [redacted]"),
        "{stdout}"
    );
    assert!(stderr.contains("    KeyError: [redacted]"), "{stderr}");
    for text in [stdout, stderr] {
        assert!(
            !text.contains("sesame") && !text.contains("sEcReT"),
            "{text}"
        );
    }
}

#[test]
fn the_shard_is_blamed_when_the_router_complains_first() {
    let plan = json!({"steps": {
        "router": ready(vec![
            json!(["touch", "ready"]),
            json!(["say", {"event": "fatal", "message": "rank 0 is gone"}]),
            json!(["touch", "complained"]),
            json!(["exit", 1]),
        ]),
        "shard-0": [["say", {"event": "serving"}], ["await", "complained"], ["kill", 9]],
    }});
    let (status, _, stderr) = World::start(&[], plan).end();
    assert_eq!(status.code(), Some(1));
    assert!(
        stderr.contains("Error: ShardFailed: shard-0 was killed by signal 9"),
        "{stderr}"
    );
}

#[test]
fn a_router_that_cannot_bind_says_why() {
    let plan = json!({"steps": {
        "router": [["say", {"event": "fatal", "message": "port 23000 is in use"}], ["exit", 1]],
    }});
    let (status, _, stderr) = World::start(&[], plan).end();
    assert_eq!(status.code(), Some(1));
    let expected = "Error: WebserverCannotStart: router: port 23000 is in use";
    assert!(stderr.contains(expected), "{stderr}");
}

#[test]
fn a_router_that_dies_while_serving_ends_the_server() {
    let plan = json!({"steps": {"router": ready(vec![json!(["kill", 6])])}});
    let (status, _, stderr) = World::start(&[], plan).end();
    assert_eq!(status.code(), Some(1));
    assert!(
        stderr.contains("Error: WebserverFailed: router was killed by signal 6"),
        "{stderr}"
    );
}

#[test]
fn a_model_that_cannot_be_had_gives_one_clear_line() {
    let plan = json!({"steps": {
        "download": [["say", {"event": "fatal", "message": "no such model: x/y"}], ["exit", 1]],
    }});
    let world = World::start(&["--model-id", "x/y", "--revision", "main"], plan);
    world.until_event("download args --lifeline --model-id x/y --revision main");
    let (status, _, stderr) = world.end();
    assert_eq!(status.code(), Some(1));
    assert!(
        stderr.contains("Error: DownloadError: download: no such model: x/y"),
        "{stderr}"
    );
}

#[test]
fn a_signal_during_the_download_stops_it() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let plan = json!({"steps": {"download": [["touch", "started"]]}});
        let world = World::start(&[], plan);
        world.until_event("download args --lifeline");
        world.signal(signal);
        let (status, ..) = world.end();
        assert_eq!(status.code(), Some(0), "{signal}");
    }
}

#[test]
fn streams_that_outlast_the_drain_are_cut_off() {
    let plan = json!({"steps": {"router": ready(vec![])}, "on_term": {"router": -1}});
    let mut world = World::start(&["--graceful-termination-timeout", "0"], plan);
    world.until("is ready at");
    let asked = Instant::now();
    world.signal(Signal::SIGTERM);
    world.until("cut off");
    let (status, stdout, _) = world.end();
    assert_eq!(status.code(), Some(0), "{stdout}");
    // The grace is four seconds beyond the deadline of none.
    assert!(asked.elapsed() >= Duration::from_secs(4));
}

#[test]
fn a_second_signal_hurries() {
    let plan =
        json!({"steps": {"router": ready(vec![])}, "on_term": {"router": -1, "shard-0": -1}});
    let mut world = World::start(&[], plan);
    world.until("is ready at");
    world.signal(Signal::SIGTERM);
    world.until_event("router term");
    world.signal(Signal::SIGTERM);
    // One that comes at once counts as the same: `timeout` and terminals send two.
    world.signal(Signal::SIGTERM);
    let deadline = Instant::now() + PATIENCE;
    while matches!(world.launcher.try_wait(), Ok(None)) {
        assert!(Instant::now() < deadline, "{}", world.events());
        thread::park_timeout(Duration::from_millis(200));
        world.signal(Signal::SIGTERM);
    }
    let (status, ..) = world.end();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn nobody_survives_a_launcher_that_is_killed() {
    let up = |name| json!([["say", {"event": "serving"}], ["touch", name]]);
    let mut router = vec![json!(["await", "up-0"]), json!(["await", "up-1"])];
    router.extend(ready(vec![]).as_array().cloned().unwrap_or_default());
    let plan = json!({"steps": {"router": router, "shard-0": up("up-0"), "shard-1": up("up-1")}});
    let mut world = World::start(&["--num-shard", "2"], plan);
    world.until("is ready at");
    world.signal(Signal::SIGKILL);
    for role in ["router", "shard-0", "shard-1"] {
        world.until_event(&format!("{role} lifeline"));
    }
    let (status, ..) = world.end();
    assert_eq!(status.code(), None);
}

#[test]
fn what_a_child_started_goes_with_it() {
    let plan = json!({"steps": {
        "router": ready(vec![]),
        "shard-0": [["orphan"], ["say", {"event": "serving"}], ["exit", 1]],
    }});
    let (status, _, stderr) = World::start(&[], plan).end();
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("shard-0 exited with status 1"), "{stderr}");
}

#[test]
fn a_log_line_of_a_megabyte_comes_through_whole() {
    let plan = json!({"steps": {
        "router": ready(vec![]),
        "shard-0": [["long", 1_000_000], ["out", "{\"not\": \"control\"}"], ["err", "after"]],
    }});
    let mut world = World::start(&[], plan);
    world.until("shard-0 | after");
    world.signal(Signal::SIGTERM);
    let (status, stdout, _) = world.end();
    assert_eq!(status.code(), Some(0));
    let line = stdout
        .lines()
        .find(|line| line.starts_with("shard-0 | <"))
        .expect("the line");
    assert_eq!(line.len(), "shard-0 | ".len() + 1_000_000);
    assert!(line.ends_with("x>"));
    assert!(stdout.contains("shard-0 | {\"not\": \"control\"}"));
}

#[test]
fn a_start_that_takes_too_long_names_who_is_late() {
    let plan = json!({"steps": {"router": [["say", {"event": "listening", "port": 23001}]]}});
    let (status, _, stderr) = World::start(&["--startup-timeout", "1"], plan).end();
    assert_eq!(status.code(), Some(1));
    let expected = "Error: ShardCannotStart: not ready after 1 s (--startup-timeout); still \
                    waiting for router";
    assert!(stderr.contains(expected), "{stderr}");
}

#[test]
fn exit_statuses_are_those_of_a_good_citizen() {
    let table: [(&[&str], i32, &str); 4] = [
        (&["--port", "many"], 2, "invalid value 'many' for '--port"),
        (
            &["--max-best-of", "0"],
            1,
            "Error: ArgumentValidation: --max-best-of must be at least 1",
        ),
        (
            &["--log-level", "a=b=c"],
            1,
            "Error: ArgumentValidation: --log-level",
        ),
        (
            &["--device", "cuda", "--num-shard", "64"],
            1,
            "Error: NotEnoughCUDADevices: 64 CUDA devices are needed",
        ),
    ];
    for (args, code, text) in table {
        let (status, _, stderr) = World::start(args, json!({"steps": {}})).end();
        assert_eq!(status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(text), "{stderr}");
    }
}
