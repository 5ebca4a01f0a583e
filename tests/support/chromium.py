"""A headless Chromium, spoken to over its debugging pipe with the standard library alone."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
]
# Chromium reads commands from descriptor 3 and writes to descriptor 4.
START = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
SECONDS = 120  # for one answer, on a machine that does much else


def find():
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["sh", "-c", START, "sh", find(), *FLAGS, f"--user-data-dir={profile}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as process:
            try:
                yield Browser(process.stdin.fileno(), process.stdout.fileno())
            finally:
                process.stdin.close()  # at which Chromium ends
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()


class Browser:
    """One tab. Commands and events of the DevTools protocol are JSON texts that end in a zero."""

    def __init__(self, commands, messages):
        self.commands, self.messages = commands, messages
        self.ids = itertools.count(1)
        self.unread = b""
        self.events = []
        self.session = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        command = {"id": next(self.ids), "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        answer = self._read_until(lambda message: message.get("id") == command["id"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, url):
        """Loads the page anew, even where only the hash differs, and waits until it has run."""
        for place in ("about:blank", url):
            self.events.clear()
            self.call("Page.navigate", url=place)
            self._read_until(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression):
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def texts(self, selector, field="textContent"):
        return self.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => e.{field})")

    def text(self, selector):
        (one,) = self.texts(selector)
        return one

    def middle(self, selector, across=0.5, down=0.5):
        element = f"document.querySelector('{selector}')"
        box = self.evaluate(f"{element}.getBoundingClientRect().toJSON()")
        return box["x"] + across * box["width"], box["y"] + down * box["height"]

    def eventually(self, expression, expected):
        deadline = time.monotonic() + 20
        while self.evaluate(expression) != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.evaluate(expression) == expected

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def set_theme(self, theme):
        media = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", features=media)

    def key(self, key):
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def pointer(self, x, y, *, click=False):
        self._mouse("mouseMoved", x, y)
        if click:
            self._mouse("mousePressed", x, y, button="left", clickCount=1)
            self._mouse("mouseReleased", x, y, button="left", clickCount=1)

    def _mouse(self, kind, x, y, **how):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **how)

    def _read_until(self, is_wanted):
        while True:
            message = json.loads(self._read())
            if "method" in message:
                self.events.append(message)
            if is_wanted(message):
                return message

    def _read(self):
        while b"\0" not in self.unread:
            if not select.select([self.messages], [], [], SECONDS)[0]:
                raise TimeoutError(f"no word from Chromium in {SECONDS} seconds")
            received = os.read(self.messages, 1 << 16)
            if not received:
                raise RuntimeError("Chromium has ended")
            self.unread += received
        text, self.unread = self.unread.split(b"\0", 1)
        return text
