"""A headless Chromium, told what to do over a pipe: no driver, no network, no package of Python."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
WAIT_SECONDS_MAX = 30.0


def found() -> str | None:
    """The browser's path, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser. A context manager: leaves no process and no profile behind."""

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        path = found()
        assert path, f"none of {', '.join(NAMES)} is installed"
        self.profile = tempfile.TemporaryDirectory(
            prefix="headrace-browser-", ignore_cleanup_errors=True
        )
        # Chromium reads commands from its descriptor 3 and writes answers to 4.
        read_command, self.commands = os.pipe()
        self.answers, write_answer = os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        flags += ("--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe")
        # Names of its maker are asked for nothing.
        flags += ("--disable-background-networking", "--disable-component-update")
        flags += (f"--user-data-dir={self.profile.name}", "about:blank")
        shell = f'exec 3<&{read_command} 4>&{write_answer}; exec "$0" "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, path, *flags],
            pass_fds=(read_command, write_answer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_command)
        os.close(write_answer)
        self.rest = b""
        self.number = 0
        self.session: str | None = None
        self.requested: list[str] = []
        self.complaints: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.size(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        # Its own processes end with it only when it is asked.
        message = {"id": self.number + 1, "method": "Browser.close"}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        try:
            self.process.wait(WAIT_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()

    def send(self, method: str, **parameters: Any) -> Any:
        """The result of a command of the DevTools protocol; events on the way are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.note(answer)

    def receive(self) -> Any:
        while b"\0" not in self.rest:
            read = os.read(self.answers, 65536)
            assert read, f"the browser ended with {self.process.poll()}"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def note(self, event: Any) -> None:
        """Keeps the addresses that the page asks for, and what it complains of."""
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                # An answer with an error status is told here, too: that is the server's matter.
                if parameters["entry"]["source"] != "network":
                    self.complaints.append(parameters["entry"]["text"])
            case _:
                pass

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": scale},
            mobile=width < 600,
        )

    def theme(self, name: str) -> None:
        """`light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is worth."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, (script, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """What an expression is worth, once it is worth something."""
        give_up = time.monotonic() + WAIT_SECONDS_MAX
        while time.monotonic() < give_up:
            if value := self.value(script):
                return value
            time.sleep(0.02)
        raise AssertionError(f"not so after {WAIT_SECONDS_MAX} s: {script}")

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "", shift: bool = False) -> None:
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        down = {"text": text} if text else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **down)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def enter(self) -> None:
        self.press("Enter", 13, "\r")

    def picture(self, path: Path) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=False)
        path.write_bytes(base64.b64decode(shot["data"]))
