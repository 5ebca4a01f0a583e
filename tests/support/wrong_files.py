"""Files made wrong: of each that a reader takes a sound one, and damages by its kind.

A reader is a function of a folder that holds the sound file, already damaged. What it raises must
name the file, or what in it is wrong.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from wrong_calls import INTERNAL, PACKAGE, REFUSALS, SECONDS, Hang, Outcome, innermost, limit

from flax_mha.demo import checkpoint
from flax_mha.demo.config_file import read_settings
from flax_mha.demo.settings import DemoError
from flax_mha.interop import huggingface, keras
from flax_mha.interop.torch import load_safetensors

NONE = "no such file"


class Reader(NamedTuple):
    """Something that reads the file `file` of a folder; `words` name its other contents."""

    name: str
    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    words: str = ""
    errors: tuple[type[Exception], ...] = (*REFUSALS, OSError)


# --- damages of bytes ---------------------------------------------------------------------------


def of_bytes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What can happen to any file."""
    for part in (0, 1, 3, 7, 8, 9, 20, 100):
        yield f"cut to {part} bytes", data[:part]
    for share in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        yield f"cut to {share:.0%}", data[: int(len(data) * share)]
    yield "without its last byte", data[:-1]
    yield "without its first byte", data[1:]
    yield "another magic", b"XXXX" + data[4:]
    yield "zeros at its beginning", bytes(64) + data[64:]
    yield "ones at its beginning", b"\xff" * 64 + data[64:]
    yield "zeros throughout", bytes(len(data))
    yield "UTF-16", "\ufeffname = 1".encode("utf-16")
    yield "not UTF-8", b"\xc3\x28\xff\xfe"
    yield "NUL", b"\x00" * 16
    yield "a pickle", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00]."
    yield "an archive of nothing", b"PK\x05\x06" + bytes(18)
    yield "HTML", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "a pointer of git", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def of_json(data: bytes) -> Iterator[tuple[str, bytes]]:
    """What a JSON file may say instead."""
    for text in (
        "null",
        "[]",
        "7",
        '"name"',
        "true",
        "{}",
        "NaN",
        "{'a': 1}",
        '{"a": 1,}',
        "[1",
        "",
    ):
        yield f"the JSON {text!r}", text.encode()
    yield "deep lists", b"[" * 100_000 + b"]" * 100_000
    yield "deep dicts", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield "an int of many digits", b'{"a": ' + b"9" * 10_000 + b"}"
    try:
        fields = json.loads(data)
    except ValueError:
        return
    for name, value in fields.items():
        for wrong in (None, -1, 0, 1.5, "x", [], {}, True, 2**40, 1e400, [[1]], value):
            if wrong != value or type(wrong) is not type(value):
                yield f"{name}: {wrong!r}", json.dumps({**fields, name: wrong}).encode()


def of_safetensors(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A header that lies: of sizes, shapes, places, types."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    first = next(name for name in header if name != "__metadata__")
    entry = header[first]
    for size in (0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1):
        yield f"a header of {size} bytes", struct.pack("<Q", size) + data[8:]
    lies = {
        "shape": ([2**40, 2**40], [-1], [2**63, 2**63], "x", [1.5], None, [[1]], [0]),
        "data_offsets": ([0, 2**62], [8, 0], [-8, 8], [1], "x", None, [0.5, 1.5]),
        "dtype": ("F33", "", 7, None, "F64", "f32"),
    }
    for field, values in lies.items():
        for wrong in values:
            changed = {**header, first: {**entry, field: wrong}}
            yield f"{field} {wrong!r}", packed(changed, rest)
    yield "an entry that is a list", packed({**header, first: [1]}, rest)
    yield "no entry", packed({}, rest)
    yield "the same bytes twice", packed({**header, "again": entry}, rest)


def packed(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def of_toml(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Settings that are broken, unknown, or of wrong types."""
    lines = {
        "not closed": "[task",
        "no value": "a =",
        "a key twice": "[task]\nname='language'\nname='dates'",
        "no task": "[train]\nsteps = 7",
        "unknown task": "[task]\nname = 'langauge'",
        "unknown section": "[tasks]\nname = 'language'",
        "a list as the task": "[task]\nname = ['language']",
        "a number as a section": "task = 7",
        "deep": "a = " + "[" * 20_000 + "]" * 20_000,
        "an int of many digits": "a = " + "9" * 10_000,
    }
    yield from ((what, text.encode()) for what, text in lines.items())
    for key in (
        "train.steps",
        "train.seed",
        "model.features",
        "attention.num_heads",
        "train.batch",
    ):
        section, name = key.split(".")
        for value in (
            "'7'",
            "-1",
            "1.5",
            "nan",
            "inf",
            "true",
            "[]",
            "{}",
            "1979-05-27",
            "9" * 400,
        ):
            text = f"[task]\nname = 'language'\n[{section}]\n{name} = {value}\n"
            yield f"{key} = {value[:12]}", text.encode()
    for key in ("steps", "features", "num_heads"):
        text = f"[task]\nname = 'language'\n[train]\n{key}x = 1\n"
        yield f"{key}x", text.encode()


# --- damages of a place -------------------------------------------------------------------------


def in_its_place(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A folder, a link out of it, nothing, or what may not be read."""

    def to(make: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (path.unlink(), make())

    outside = path.parent.parent / "outside"
    outside.write_bytes(b"secret")
    yield "a folder", to(path.mkdir)
    yield NONE, path.unlink
    yield "a link to nothing", to(lambda: path.symlink_to(path.parent / "nowhere"))
    yield "a link to itself", to(lambda: path.symlink_to(path))
    yield "a link out of the folder", to(lambda: path.symlink_to(outside))
    if os.geteuid():
        yield "no permission", lambda: path.chmod(0)


# --- the readers --------------------------------------------------------------------------------

STATE = {"params": {"kernel": np.arange(30, dtype="float32").reshape(3, 10)}}
TOML = "[task]\nname = 'language'\n[model]\nfeatures = 24\n[attention]\nnum_heads = 3\n"


def checkpoint_of(folder: Path) -> None:
    checkpoint.save(folder, 5, STATE)


def restored(folder: Path) -> Any:
    return checkpoint.restore(folder, 5, STATE)


def readers(sound: dict[str, Callable[[Path], Any]]) -> list[Reader]:
    """Every reader of the package; `sound` makes the files that need helpers of other tests."""
    h5, archive, folder, tuned = (sound[x] for x in ("weights", "archive", "folder", "adapter"))
    weights, config = "model.safetensors", "config.json"
    one = lambda path: load_safetensors(path / weights)
    listed = huggingface.list_attention
    whole = huggingface.load_attention
    adapter = lambda path: huggingface.load_adapter(path, like=path / "base")
    told = (*REFUSALS, OSError, DemoError)
    return [
        Reader("load_safetensors", weights, folder, one),
        Reader("huggingface.load_attention", weights, folder, whole),
        Reader("huggingface.load_attention", config, folder, whole, "model_type"),
        Reader("huggingface.list_attention", config, folder, listed, "model_type"),
        Reader("huggingface.load_adapter", "adapter_model.safetensors", tuned, adapter),
        Reader("huggingface.load_adapter", "adapter_config.json", tuned, adapter, "adapter"),
        *(
            Reader(f"keras.{read.__name__}", file, make, lambda path, r=read, f=file: r(path / f))
            for file, make in (("model.weights.h5", h5), ("model.keras", archive))
            for read in (keras.load_keras_file, keras.list_keras_layers, keras.read_keras_arrays)
        ),
        Reader("demo.checkpoint", "5.json", checkpoint_of, restored, "checkpoint", told),
        Reader(
            "demo.read_settings",
            "small.toml",
            lambda path: (path / "small.toml").write_text(TOML),
            lambda path: read_settings(path / "small.toml"),
            "settings [task] task:",
            told,
        ),
    ]


def damages(reader: Reader, path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to do to the file at `path`."""
    data = path.read_bytes()
    kinds = {".json": of_json, ".safetensors": of_safetensors, ".toml": of_toml}
    contents = dict(of_bytes(data)) | dict(kinds.get(path.suffix, lambda data: ())(data))
    for what, wrong in contents.items():
        yield what, lambda wrong=wrong: path.write_bytes(wrong)
    yield from in_its_place(path)


def outcome(reader: Reader, folder: Path, what: str) -> Outcome:
    """What the reader makes of the damaged folder."""
    try:
        with limit():
            reader.read(folder)
    except Hang:
        return Outcome("hang", f"took more than {SECONDS} s")
    except BaseException as error:
        return Outcome(type(error).__name__, fault_of(reader, error, what))
    return Outcome("accepted")


def fault_of(reader: Reader, error: BaseException, what: str) -> str:
    first = (str(error).splitlines() or [""])[0]
    shown = f"{type(error).__name__}: {first[:300]}"
    if not isinstance(error, reader.errors) or type(error).__name__ == "JSONDecodeError":
        return f"is no refusal: {shown}"
    if isinstance(error, UnicodeDecodeError) or INTERNAL.search(first):
        return f"is of the inside: {shown}"
    field = re.findall(r"[\w.]+", what)[0]
    named = [reader.file, *reader.words.split(), field, field.rpartition(".")[2]]
    if not any(name in first for name in named) and not re.search(r"`\w", first):
        return f"names neither file nor field: {shown}"
    is_of_files = isinstance(error, OSError)
    if not is_of_files and not (inner := innermost(error)).startswith(PACKAGE):
        return f"comes from {inner}: {shown}"
    return ""
