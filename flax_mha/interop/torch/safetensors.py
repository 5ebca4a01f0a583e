"""Arrays from a `.safetensors` file, only those that are wanted; no pickle is ever loaded."""

import contextlib
import difflib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_mha.core import checks, file_checks

# The first bytes of what torch.save writes (a zip file since 1.6, before that a pickle), and names.
_PICKLES = {b"PK\x03\x04": "a zip file", b"\x80": "a pickle"}
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_FLOATS = ["F64", "F32", "F16", "BF16"]
_OTHERS = ["I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"]
_NO_PICKLE = (
    "Convert it once, where the file is trusted: `safetensors.torch.save_file("
    "torch.load(path, weights_only=True), 'model.safetensors')`."
)


def load_safetensors(
    path: str | os.PathLike[str], names: Iterable[str] | None = None, *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Arrays of a `.safetensors` file by their names; neither torch nor a pickle is involved.

    Memory: the arrays returned. The file's others are not read.

    Args:
        path: a `.safetensors` file.
        names: the arrays wanted; None = all whose names begin with `prefix`.
        prefix: the beginning of the names wanted, such as "encoder.layer.0."; names stay whole.

    Returns:
        `{name: NumPy array}`; bfloat16 is `ml_dtypes.bfloat16`, as JAX has it.

    Raises:
        ValueError: a file that is cut short or corrupt, or holds a pickle; a name that it has not.
        TypeError: an array of a dtype that needs decoding first (8-bit floats and smaller).
        ImportError: without the safetensors package.

    Example:
        >>> import numpy as np, safetensors.numpy, tempfile
        >>> from flax_mha.interop.torch import load_safetensors
        >>> arrays = {"h.0.attn.c_proj.bias": np.zeros(4, "float32"), "wpe": np.ones(2, "float32")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.numpy.save_file(arrays, folder + "/model.safetensors")
        ...     load_safetensors(folder + "/model.safetensors", prefix="h.0.")
        {'h.0.attn.c_proj.bias': array([0., 0., 0., 0.], dtype=float32)}
    """
    with _opened(file_checks.path("path", path)) as file:
        wanted = _wanted(list(file.keys()), names, prefix)
        return {name: _read(file, name) for name in wanted}


class Header(NamedTuple):
    """What a file says of an array."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(path: pathlib.Path) -> dict[str, Header]:
    """Dtype and shape of each array of a `.safetensors` file, whose data are not read."""
    with _opened(path) as file:
        views = {name: file.get_slice(name) for name in list(file.keys())}
        return {name: Header(x.get_dtype(), tuple(x.get_shape())) for name, x in views.items()}


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    _refuse_pickle(path)
    safetensors = _library()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except safetensors.SafetensorError as error:
        rule = f"{path.name!r} must be a whole .safetensors file."
        evidence = f"{path.stat().st_size} bytes: {error}"
        checks.fail(ValueError, rule, evidence, "Was it cut short? Fetch it again.")


def _library() -> Any:
    try:
        import safetensors
    except ImportError:
        remedy = "Run `pip install 'flax_mha[safetensors]'`."
        rule = "`load_safetensors` needs the safetensors package."
        checks.fail(ImportError, rule, "no such package", remedy)
    return safetensors


def _refuse_pickle(path: pathlib.Path) -> None:
    """A pickle runs whatever its author wrote; it is known by its content, whatever its name."""
    with path.open("rb") as file:
        start = file.read(10)
    kinds = [kind for magic, kind in _PICKLES.items() if start.startswith(magic)]
    kinds += [f"a {path.suffix} file"] if path.suffix in _SUFFIXES else []
    # a header's length may begin with such bytes too, but then its first brace follows
    if kinds and start[8:9] != b"{":
        rule = "`path` must be a .safetensors file: to load a pickle is to run the code in it."
        checks.fail(ValueError, rule, f"{path.name!r}, {kinds[0]}", _NO_PICKLE)
    if start.lstrip().startswith(b"{") and path.suffix == ".json":
        remedy = 'Its "weight_map" says which file holds an array: load that one.'
        checks.fail(ValueError, "`path` must be a .safetensors file.", f"{path.name!r}", remedy)


def _wanted(present: Sequence[str], names: Iterable[str] | None, prefix: str) -> list[str]:
    if names is None:
        found = [name for name in present if name.startswith(prefix)]
        if prefix and not found:
            rule = f"The file must hold arrays under prefix={prefix!r}."
            checks.fail(ValueError, rule, f"names such as {present[:5]}")
        return found
    if prefix or isinstance(names, str):
        rule = "`names` must be a collection of whole names, and comes without `prefix`."
        checks.fail(ValueError, rule, f"names={names!r}, prefix={prefix!r}")
    for name in (names := list(names)):
        if name not in set(present):
            close = difflib.get_close_matches(str(name), present, n=1) or present[:5]
            checks.fail(ValueError, f"The file must hold {name!r}.", f"names such as {close}")
    return names


def _read(file: Any, name: str) -> np.ndarray:
    """One array. Its dtype is looked at before its data: the library fails on what NumPy lacks."""
    view = file.get_slice(name)
    dtype, shape = view.get_dtype(), tuple(view.get_shape())
    if dtype not in _FLOATS + _OTHERS:
        rule = f"`{name}` must have one of the dtypes {_FLOATS + _OTHERS}."
        remedy = "Quantised weights must be decoded with their scales first."
        checks.fail(TypeError, rule, f"dtype {dtype}", remedy)
    if any(size >= 2**48 for size in shape):  # possible where another size is 0
        checks.fail(ValueError, f"`{name}` must have a sensible shape.", f"shape {shape}")
    return file.get_tensor(name)
