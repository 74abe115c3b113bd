"""A download, a router or a shard that does what the test wrote down, and nothing else.

The folder FAKE_DIR holds `plan.json`: role -> list of steps. Every child appends what happens to
it to `events.log`. Steps, in order:
    ["say", {...}]            a control line
    ["out"|"err", "text"]     a line of the log
    ["long", size]            a line of that many bytes on standard error
    ["touch"|"await", "name"] makes or waits for a file in FAKE_DIR
    ["exit", status], ["kill", signal]
    ["orphan"]                starts a process of its own in the same group
After the last step the child waits for SIGTERM or the end of its lifeline.
"on_term": "role" -> seconds it takes to end after SIGTERM (never, if negative).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

FOLDER = os.environ["FAKE_DIR"]


def note(event: str) -> None:
    with open(f"{FOLDER}/events.log", "a") as log:
        log.write(f"{ROLE} {event}\n")


def lifeline() -> None:
    while os.read(0, 1024):
        pass
    note("lifeline")
    os._exit(0)


def on_term(*_: object) -> None:
    note("term")
    seconds = PLAN.get("on_term", {}).get(ROLE, 0)
    if seconds >= 0:
        time.sleep(seconds)
        note("end")
        os._exit(0)


def step(kind: str, value: object = None) -> None:
    if kind == "say":
        print(json.dumps(value), flush=True)
    elif kind == "out":
        print(value, flush=True)
    elif kind == "err":
        print(value, file=sys.stderr, flush=True)
    elif kind == "long":
        print("<" + "x" * (int(value) - 2) + ">", file=sys.stderr, flush=True)
    elif kind == "touch":
        open(f"{FOLDER}/{value}", "w").close()
    elif kind == "await":
        while not os.path.exists(f"{FOLDER}/{value}"):
            time.sleep(0.01)
    elif kind == "exit":
        sys.stdout.flush()
        os._exit(int(value))
    elif kind == "kill":
        os.kill(os.getpid(), int(value))
    elif kind == "orphan":
        child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
        note(f"pid {child.pid}")
    else:
        raise ValueError(kind)


command, args = sys.argv[1], sys.argv[2:]
ROLE = f"shard-{args[args.index('--rank') + 1]}" if command == "shard" else command
with open(f"{FOLDER}/plan.json") as file:
    PLAN = json.load(file)
signal.signal(signal.SIGTERM, on_term)
note(f"pid {os.getpid()}")
note(f"args {' '.join(args)}")
secrets = ("API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN")
note(f"secrets {','.join(f'{name}={os.environ[name]}' for name in secrets if name in os.environ)}")
if "--config" in args:
    path = args[args.index("--config") + 1]
    note(f"mode {os.stat(path).st_mode & 0o777:o}")
    # Whole or not at all: its brothers copy it, too, while the test reads.
    copy = f"{FOLDER}/serve.json.{os.getpid()}"
    with open(path) as source, open(copy, "w") as target:
        target.write(source.read())
    os.replace(copy, f"{FOLDER}/serve.json")
threading.Thread(target=lifeline, daemon=True).start()
for entry in PLAN["steps"].get(ROLE, []):
    step(*entry)
while True:
    time.sleep(60)
