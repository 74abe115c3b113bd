#!/usr/bin/env python3
"""`make image-check`: the Dockerfile's steps in clean Debian roots; do the images answer?

    tools/image_check.py [--target cpu|cuda|sagemaker]... [--build-arg K=V]... [--no-start]

No container engine is needed: roots come from debootstrap, each instruction that writes is a layer
of an overlay file system, and RUN is chroot in namespaces of its own. So it wants Linux, root and
Debian's `debootstrap`. What an engine does and this does not is printed at the end.

Layers are kept under .cache/image and used again while an instruction, all before it and what it
copies are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "image"
MIB = 1 << 20
READY_S = 300
STOP_S = 30
NOBODY = 65534
PORTS = {"cpu": 18080, "cuda": 18081, "sagemaker": 8080}
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Images that are not fetched, what stands in for them, and what that leaves unchecked.
BASES = {"debian:bookworm-slim": "", "rust:1-slim-bookworm": "this machine's Rust toolchain"}
SUITE = "bookworm"
# How this machine reaches package indexes is its own affair: steps are given copies, read-only and
# in no layer.
HOST_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
CERTIFICATES_INSIDE = "/run/certificates.crt"
CERTIFICATE_VARIABLES = (
    "SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "CARGO_HTTP_CAINFO",
)  # fmt: skip
HOST_VARIABLES = re.compile(r"^(PIP_(?!FIND_LINKS)|UV_|.*_proxy$|.*_PROXY$)")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


class CheckError(Exception):
    """Ends the check with its message."""


@dataclass(frozen=True)
class Step:
    """One instruction: its word in capitals and the rest, continuation lines joined."""

    word: str
    rest: str


@dataclass
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    steps: list[Step]


@dataclass
class Image:
    """Layers, lowest first, and what an image says about how it runs."""

    layers: list[Path] = field(default_factory=list)
    key: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)

    def copy(self) -> Image:
        return Image(
            list(self.layers), self.key, dict(self.variables), self.folder, list(self.entrypoint)
        )


def read_dockerfile(text: str) -> list[Stage]:
    """The stages of a Dockerfile.

    Raises:
        CheckError: an instruction outside of a stage.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name.strip(), base.strip(), []))
        elif not stages:
            raise CheckError(f"{word} before FROM")
        else:
            stages[-1].steps.append(Step(word, " ".join(rest.split())))
    return stages


def say(text: str) -> None:
    print(f"\033[1;34m==>\033[0m {text}", flush=True)


def run(command: list[str], **options: object) -> None:
    done = subprocess.run(command, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise CheckError(f"{shlex.join(command)[:200]} ended with {done.returncode}")


class Builder:
    """Executes stages."""

    def __init__(self, stages: list[Stage], arguments: dict[str, str]) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self._arguments = arguments
        self._made: dict[str, Image] = {}
        self.stood_in: set[str] = set()

    def image(self, name: str) -> Image:
        if name in self._made:
            return self._made[name].copy()
        if name not in self._stages:
            return self._base(name)
        stage = self._stages[name]
        image = self.image(stage.base)
        arguments: dict[str, str] = {}
        for step in stage.steps:
            self._execute(image, step, arguments)
        self._made[name] = image
        return image.copy()

    def _base(self, name: str) -> Image:
        if name not in BASES:
            raise CheckError(f"nothing stands in for the image {name}")
        if BASES[name]:
            self.stood_in.add(f"{name}: a Debian root with {BASES[name]}")
        root = CACHE / f"debian-{SUITE}"
        if not (root / "etc/debian_version").exists():
            say(f"debootstrap {SUITE}")
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            run(["debootstrap", "--variant=minbase", SUITE, str(root)], stdout=subprocess.DEVNULL)
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        if name.startswith("rust:"):
            path = f"/usr/local/rust/bin:{path}"
        return Image([root], name, {"PATH": path})

    def _execute(self, image: Image, step: Step, arguments: dict[str, str]) -> None:
        if step.word == "ENV":
            for pair in shlex.split(step.rest):
                name, _, value = pair.partition("=")
                image.variables[name] = expand(value, image.variables)
        elif step.word == "ARG":
            name, _, value = step.rest.partition("=")
            arguments[name] = self._arguments.get(name, value)
        elif step.word == "WORKDIR":
            image.folder = step.rest
        elif step.word == "ENTRYPOINT":
            image.entrypoint = json.loads(step.rest)
        elif step.word in ("RUN", "COPY"):
            self._layer(image, step, arguments)
        else:
            raise CheckError(f"{step.word} is not known here")

    def _layer(self, image: Image, step: Step, arguments: dict[str, str]) -> None:
        sources = self._sources(step) if step.word == "COPY" else []
        told = [image.key, step.word, step.rest, repr(sorted(arguments.items())), image.folder]
        told += [repr(sorted(image.variables.items())), *(digest(s, t) for s, t in sources)]
        image.key = hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]
        layer = CACHE / "layers" / image.key
        if layer.exists():
            say(f"kept  {step.word} {step.rest[:90]}")
        else:
            say(f"{step.word} {step.rest[:100]}")
            began = time.monotonic()
            work = CACHE / "making"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            if step.word == "COPY":
                self._copy(work / "layer", image, step, sources)
            else:
                in_root(image, step.rest, arguments, work / "layer")
            layer.parent.mkdir(parents=True, exist_ok=True)
            (work / "layer").rename(layer)
            print(f"    {time.monotonic() - began:.0f} s, {size(layer) / MIB:.0f} MiB", flush=True)
        image.layers.append(layer)

    def _sources(self, step: Step) -> list[tuple[Path, bool]]:
        """What is copied, and whether it is the build context, of which parts are ignored."""
        words = step.rest.split()
        if words[0].startswith("--from="):
            made = self.image(words[0].removeprefix("--from="))
            name = words[1].lstrip("/")
            found = [layer / name for layer in made.layers if (layer / name).exists()]
            if not found:
                raise CheckError(f"COPY {step.rest}: there is no /{name}")
            return [(found[-1], False)]
        return [(ROOT / word, word == ".") for word in words[:-1]]

    @staticmethod
    def _copy(layer: Path, image: Image, step: Step, sources: list[tuple[Path, bool]]) -> None:
        target = step.rest.split()[-1]
        at = layer / (Path(image.folder) / target).relative_to("/")
        at.parent.mkdir(parents=True, exist_ok=True)
        for source, context in sources:
            if source.is_file():
                shutil.copy2(source, at)
                continue
            for path in context_files(source) if context else files(source):
                to = at / path.relative_to(source)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, to, follow_symlinks=False)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def context_files(folder: Path) -> list[Path]:
    """The build context: everything that .dockerignore does not name."""
    ignored = [line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines()]
    found: list[Path] = []
    for at, folders, names in os.walk(folder):
        here = Path(at).relative_to(folder)

        def kept(name: str, here: Path = here) -> bool:
            path = str(here / name)
            return not any(fnmatch.fnmatch(path, pattern) for pattern in filter(None, ignored))

        folders[:] = sorted(filter(kept, folders))
        found += [Path(at) / name for name in sorted(filter(kept, names))]
    return found


def digest(source: Path, context: bool) -> str:
    total = hashlib.sha256()
    if source.is_file():
        return hashlib.sha256(source.read_bytes()).hexdigest()
    paths = context_files(source) if context else files(source)
    for path in paths:
        total.update(str(path.relative_to(source)).encode() + b"\0")
        total.update(os.readlink(path).encode() if path.is_symlink() else path.read_bytes())
    return total.hexdigest()


def expand(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], ""), text)


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in files(folder))


def host_variables() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if HOST_VARIABLES.match(name)}
    return found | dict.fromkeys(CERTIFICATE_VARIABLES, CERTIFICATES_INSIDE)


def host_files(copies: Path) -> dict[str, Path]:
    """Copies of what tells how to reach package indexes, by where a step finds them."""
    found: dict[str, Path] = {}
    for name in (*HOST_FILES, CERTIFICATES):
        if Path(name).exists():
            copy = copies / Path(name).name
            shutil.copyfile(name, copy)
            found[CERTIFICATES_INSIDE if name == CERTIFICATES else name] = copy
    return found


def toolchain() -> dict[str, str]:
    """Folders of this machine's Rust, by where `rust:1` has them."""
    cargo = subprocess.run(
        ["rustup", "which", "cargo"], stdout=subprocess.PIPE, text=True, check=True
    )
    home = os.environ.get("CARGO_HOME", str(Path.home() / ".cargo"))
    return {"/usr/local/rust": str(Path(cargo.stdout.strip()).parents[1]), "/root/.cargo": home}


def overlay(lower: str, scratch: Path, target: str) -> str:
    """A shell line that mounts folders one over another, with `scratch` for what is written."""
    upper, work = scratch / "upper", scratch / "work"
    return (
        f"mkdir -p {upper} {work} {target} && mount -t overlay overlay "
        f"-o lowerdir={lower},upperdir={upper},workdir={work} {target}"
    )


def mounts(image: Image, root: str, scratch: Path) -> list[str]:
    """Shell lines that mount an image and what a step finds beside it: nothing of this machine's
    can be written."""
    lines = [
        overlay(":".join(map(str, reversed(image.layers))), scratch / "image", root),
        f"mkdir -p {root}/proc {root}/dev {root}/tmp {root}/run",
        f"mount -t proc proc {root}/proc",
        f"mount -t tmpfs tmpfs {root}/tmp -o mode=1777",
        f"mount -t tmpfs tmpfs {root}/run -o mode=755",
        f"mount -t tmpfs tmpfs {root}/dev -o mode=755",
        f"mkdir -m 1777 {root}/dev/shm && mount -t tmpfs tmpfs {root}/dev/shm -o mode=1777",
    ]
    for name in DEVICES:
        to = f"{root}/dev/{name}"
        lines.append(f"touch {to} && mount --bind /dev/{name} {to}")
    for to, copy in host_files(scratch).items():
        lines.append(f"touch {root}{to} && mount --bind {copy} {root}{to}")
        lines.append(f"mount -o remount,ro,bind {root}{to}")
    if "/usr/local/rust/bin" in image.variables["PATH"]:
        for to, source in toolchain().items():
            lines.append(overlay(source, scratch / to.replace("/", "-"), f"{root}{to}"))
    return lines


@contextlib.contextmanager
def mounted(
    image: Image, variables: dict[str, str], user: int = 0
) -> Iterator[tuple[list[str], dict[str, str], Path]]:
    """The start of a command line that runs in an image, its environment, and what it writes."""
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        scratch = Path(temporary)
        root = f"{temporary}/root"
        inside = f'cd {image.folder} && exec "$@"'
        enter = (
            f'exec chroot --userspec={user}:{user} {root} /bin/sh -c {shlex.quote(inside)} sh "$@"'
        )
        script = [*mounts(image, root, scratch), f"mkdir -p {root}{image.folder}", enter]
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-ec"]
        written = scratch / "image" / "upper"
        yield [*command, "\n".join(script), "sh"], {"HOME": "/root"} | variables, written


def forget_mount_points(written: Path, image: Image) -> None:
    """Removes empty files and folders that were made to be mounted on."""
    for name in ("/proc", "/dev", "/run", "/tmp", "/usr/local/rust", "/root/.cargo", *HOST_FILES):
        path = written / name.lstrip("/")
        below = [layer / name.lstrip("/") for layer in image.layers]
        if path.is_file() and path.stat().st_size == 0 and not any(p.exists() for p in below):
            path.unlink()
        elif path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def in_root(image: Image, line: str, arguments: dict[str, str], layer: Path) -> None:
    """Executes a RUN; what it wrote becomes `layer`."""
    variables = image.variables | arguments | host_variables()
    with mounted(image, variables) as (enter, environment, written):
        log = CACHE / "log"
        with log.open("wb") as out:
            done = subprocess.run(
                [*enter, "/bin/sh", "-c", line],
                env=environment,
                stdout=out,
                stderr=out,
                check=False,
            )
        if done.returncode != 0:
            tail = log.read_text(errors="replace").splitlines()[-30:]
            raise CheckError("\n".join([f"RUN {line}: status {done.returncode}", *tail]))
        forget_mount_points(written, image)
        written.rename(layer)


def ask(url: str, body: dict[str, object] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def try_image(name: str, image: Image, user: int) -> float:
    """Starts an image, asks it for tokens, stops it as `docker stop` does.

    Returns: seconds from its start to the first healthy answer.
    """
    port = PORTS[name]
    arguments = [] if name == "sagemaker" else ["--model-id", MODEL]
    told = {"HF_MODEL_ID": MODEL} if name == "sagemaker" else {"PORT": str(port)}
    variables = image.variables | told | host_variables()
    with mounted(image, variables, user) as (enter, environment, _):
        began = time.monotonic()
        log = (CACHE / f"{name}.log").open("wb")
        server = subprocess.Popen(
            [*enter, *image.entrypoint, *arguments], env=environment, stdout=log, stderr=log
        )
        try:
            ready = wait_ready(server, f"http://127.0.0.1:{port}/health", CACHE / f"{name}.log")
            route = "/invocations" if name == "sagemaker" else "/generate"
            body: dict[str, object] = {
                "inputs": "What is deep learning?",
                "parameters": {"max_new_tokens": 5},
            }
            answer = json.loads(ask(f"http://127.0.0.1:{port}{route}", body))
            first = answer[0] if isinstance(answer, list) else answer
            if not first["generated_text"]:
                raise CheckError(f"{name}: no text in {answer}")
        finally:
            stop(server)
    return ready - began


def wait_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> float:
    until = time.monotonic() + READY_S
    while time.monotonic() < until and server.poll() is None:
        try:
            ask(url)
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return time.monotonic()
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise CheckError(f"not ready after {READY_S} s, status {server.poll()}\n{tail}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM to what has process id 1 inside; it must end by itself."""
    children = subprocess.run(
        ["pgrep", "-P", str(server.pid)], stdout=subprocess.PIPE, text=True, check=False
    )
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGTERM)
    try:
        status = server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise CheckError(f"the server did not end within {STOP_S} s of SIGTERM") from None
    if status != 0:
        raise CheckError(f"the server ended with {status} after SIGTERM")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", action="append", choices=sorted(PORTS), help="[default: cpu]")
    parser.add_argument("--build-arg", action="append", default=[], metavar="K=V")
    parser.add_argument("--no-start", action="store_true", help="build only")
    args = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        print(
            "image-check wants root and debootstrap (Debian's package of that name)",
            file=sys.stderr,
        )
        return 2
    CACHE.mkdir(parents=True, exist_ok=True)
    builder = Builder(
        read_dockerfile((ROOT / "Dockerfile").read_text()),
        dict(pair.split("=", 1) for pair in args.build_arg),
    )
    rows: list[str] = []
    try:
        for name in args.target or ["cpu"]:
            image = builder.image(name)
            mib = sum(size(layer) for layer in image.layers) / MIB
            row = f"| {name} | {mib:.0f} | {len(image.layers)} |"
            for user in (0, NOBODY):
                row += " - |" if args.no_start else f" {try_image(name, image, user):.1f} |"
            rows.append(row)
    except CheckError as error:
        print(f"\033[1;31merror:\033[0m {error}", file=sys.stderr)
        return 1
    print(
        "\n| image | MiB | layers | s to ready as root | as another user |\n|---|---|---|---|---|"
    )
    print("\n".join(rows))
    print(
        "\nNot executed here: fetching base images"
        + "".join(f"; {what}" for what in sorted(builder.stood_in))
        + f"; build arguments {args.build_arg or 'none'}; CUDA (no device); compression and upload."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
