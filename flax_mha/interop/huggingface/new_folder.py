"""A folder that is whole or not there: made beside its place, then moved."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from flax_mha.core import checks


def expect_free(target: pathlib.Path) -> None:
    """Nothing that stands there is written over."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        rule = "`directory` must not exist, or be an empty folder."
        checks.fail(ValueError, rule, f"{str(target)!r}, which holds something")
    if files := [above for above in target.parents if above.is_file()]:
        rule = "`directory` must lie in a folder."
        checks.fail(ValueError, rule, f"{str(target)!r}, and {str(files[0])!r} is a file")


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write; a crash half way leaves nothing that looks whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield made
        if target.exists():
            target.rmdir()
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
