"""A Keras file on disk, opened with suspicion: its HDF5 file and, of an archive, its config.json.

Nothing is extracted under a name that the archive gives, nothing is read whose declared size the
file's own size does not account for, and damaged bytes are one kind of error.
"""

import contextlib
import io
import json
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from flax_mha.core import checks, file_checks

WEIGHTS, CONFIG = "model.weights.h5", "config.json"
HDF5_MAGIC, ZIP_MAGIC = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"
MAX_CONFIG_BYTES = 2**24
# Keras stores archive members uncompressed; somebody may have compressed them again since.
MAX_EXPANSION, EXPANSION_FLOOR_BYTES = 20, 2**26
# What h5py and zipfile raise where the bytes make no sense.
DAMAGE = (
    OSError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


class KerasFile(NamedTuple):
    """An open file: the HDF5 file, its size in bytes, and config.json (None: weights alone)."""

    h5: Any
    size: int
    config: dict[str, Any] | None


@contextlib.contextmanager
def intact(what: str) -> Iterator[None]:
    """Turns what damaged bytes raise into one ValueError; only a library's calls go in here."""
    try:
        yield
    except DAMAGE as error:
        rule = f"{what} must be whole and undamaged."
        evidence = f"{type(error).__name__}: {error}".rstrip(".")
        checks.fail(ValueError, rule, evidence, "Copy or save the file again.")


def import_h5py() -> Any:
    """h5py, or an error that says how to get it."""
    try:
        import h5py
    except ImportError as error:
        rule = "Keras files are read and written through h5py."
        checks.fail(ImportError, rule, str(error), "Run `pip install 'flax_mha[keras]'`.")
    return h5py


@contextlib.contextmanager
def open_keras_file(path: str | os.PathLike[str], name: str = "path") -> Iterator[KerasFile]:
    """The file, known by its first bytes and not by its name; or KerasHub's folder of a model."""
    path = file_checks.path(name, path)
    h5py = import_h5py()
    with contextlib.ExitStack() as stack:
        config = _of_a_folder(path) if os.path.isdir(path) else None
        path = weights_of(path)
        file: IO[bytes] = stack.enter_context(open(path, "rb"))
        if config is None and file.read(4) == ZIP_MAGIC:
            config, file = stack.enter_context(_parts(file, os.path.basename(os.fspath(path))))
        file.seek(0)
        if file.read(8) != HDF5_MAGIC:
            _unknown_format(path, file)
        size = file.seek(0, os.SEEK_END)
        with intact(f"{os.path.basename(os.fspath(path))!r}: the HDF5 file"):
            h5 = stack.enter_context(h5py.File(file, "r"))
        _not_legacy(h5)
        yield KerasFile(h5, size, config)


def weights_of(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file of the weights: of a folder, the one in it."""
    return os.path.join(path, WEIGHTS) if os.path.isdir(path) else path


def _of_a_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a folder as KerasHub's `save_to_preset` writes it."""
    if not all(os.path.isfile(os.path.join(path, name)) for name in (CONFIG, WEIGHTS)):
        rule = (
            f"A Keras model must be one file, or KerasHub's folder of {CONFIG!r} and {WEIGHTS!r}."
        )
        remedy = "Save it with `zipped=True`; weights in several files, again in one."
        checks.fail(ValueError, rule, f"the directory {path!r}", remedy)
    with open(os.path.join(path, CONFIG), "rb") as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        rule = f"The folder's {CONFIG!r} must be of at most {MAX_CONFIG_BYTES} bytes."
        checks.fail(ValueError, rule, "more")
    return _parsed(text)


def _unknown_format(path: str | os.PathLike[str], file: IO[bytes]) -> None:
    file.seek(0)
    rule = "A Keras file must be a `.keras` archive (zip) or a `.weights.h5` file (HDF5)."
    remedy = "Sharded weights (`.weights.json`) are to be saved again in one file."
    checks.fail(ValueError, rule, f"{path!r} that begins with {file.read(8)!r}", remedy)


def _not_legacy(h5: Any) -> None:
    """Keras 2 wrote another tree, under names in attributes."""
    with intact("The HDF5 file"):
        legacy = [name for name in ("layer_names", "model_config") if name in h5.attrs]
    if legacy:
        rule = "The HDF5 file must have Keras 3's layout."
        remedy = "Load it in Keras, and save it as `.keras`."
        checks.fail(ValueError, rule, f"Keras 2's attribute {legacy[0]!r}", remedy)


# --- the archive --------------------------------------------------------------------------------


@contextlib.contextmanager
def _parts(file: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], IO[bytes]]]:
    """(config.json, the weights in a nameless temporary file) of a `.keras` archive."""
    with open_archive(file, name) as archive, tempfile.TemporaryFile() as weights:
        text = io.BytesIO()
        copy_member(archive, CONFIG, text, MAX_CONFIG_BYTES)
        copy_member(archive, WEIGHTS, weights)
        yield _parsed(text.getvalue()), weights


@contextlib.contextmanager
def open_archive(file: IO[bytes], name: str) -> Iterator[zipfile.ZipFile]:
    """The archive, if its list of members is one that Keras could have written."""
    with intact(f"{name!r}: the archive"):
        archive = zipfile.ZipFile(file)
    with archive:
        names = archive.namelist()
        for member in names:
            if re.match(r"/|[A-Za-z]:", member) or "\\" in member or ".." in member.split("/"):
                rule = "The archive's members must have relative paths inside it."
                checks.fail(ValueError, rule, repr(member), "Keras never writes such a name.")
        if len(set(names)) != len(names):
            double = next(name for name in names if names.count(name) > 1)
            checks.fail(ValueError, "The archive's members must differ in name.", repr(double))
        if not {WEIGHTS, CONFIG} <= set(names):
            rule = f"The archive must hold {CONFIG!r} and {WEIGHTS!r}."
            remedy = "Weights saved as npz are to be saved again as HDF5."
            checks.fail(ValueError, rule, f"{names[:10]}", remedy)
        yield archive


def copy_member(
    archive: zipfile.ZipFile, name: str, target: IO[bytes], limit: int | None = None
) -> None:
    """The member's bytes into an open file: as many as declared, and no more than plausible."""
    info = archive.getinfo(name)
    _plausible_size(archive, info, limit)
    copied = 0
    with intact(f"The archive's member {name!r}"), archive.open(info) as source:
        while block := source.read(2**20):
            copied += len(block)
            target.write(block)
    if copied != info.file_size:
        rule = f"The archive's member {name!r} must have its declared {info.file_size} bytes."
        checks.fail(ValueError, rule, f"{copied} bytes", "Copy or save the file again.")


def _plausible_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int | None) -> None:
    assert archive.fp is not None
    stored = min(info.compress_size, os.fstat(archive.fp.fileno()).st_size)
    most = MAX_EXPANSION * stored + EXPANSION_FLOOR_BYTES if limit is None else limit
    if info.file_size > most:
        rule = f"The archive's member {info.filename!r} must be of at most {most} bytes."
        evidence = f"{info.file_size} bytes declared, {stored} stored"
        remedy = "Keras does not compress its archives: this one may be a decompression bomb."
        checks.fail(ValueError, rule, evidence, remedy)


def _parsed(text: bytes) -> dict[str, Any]:
    rule = f"{CONFIG!r} must hold one JSON object, as Keras writes it."
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        checks.fail(ValueError, rule, f"{type(error).__name__}: {error}".rstrip("."))
    if not isinstance(config, dict):
        checks.fail(ValueError, rule, f"JSON of type {type(config).__name__}")
    return config
