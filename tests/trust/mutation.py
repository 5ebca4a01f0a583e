"""Plants faults in a copy of the package, one at a time, and shows which test catches each.

    pip install cosmic-ray
    python tests/trust/mutation.py --seed 1 --faults 60
    python tests/trust/mutation.py --known

Which faults is decided by the seed: files are drawn by their number of lines, each at most once;
the kinds of faults take turns over them; of a file's places of a kind each is equally likely.
cosmic-ray's own runner tests every place of every file with one command, here some ten thousand
times as many; so its operators are used and not its runner. The benchmark (`bench`) is left out:
it measures, and there is no right answer to compare.

Tests run in stages, each until the first failure: (1) those that bear the file's name, with the
file's doctests, (2) the slow ones of them, (3) a part of those of its folder and of the files that
import it, (4) all of those, (5) the slow ones of those, (6) all others. At the end those that
caught something run without a fault; what fails there is left out, and its faults are tried anew.
Results are kept in a JSON file, and a second run goes on where the first stopped, be it with more
`--stages` for those that survived. A survivor that changes no result is noted by a person:

    python tests/trust/mutation.py --seed 1 --equivalent 1/12 "only the speed changes"
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from faults import Fault, chosen  # noqa: E402

LEFT_OUT = "flax_mha/bench/"
CAUGHT = re.compile(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", re.MULTILINE)
THIN = 15  # tests/conftest.py: of each function's cases one in so many
NO_TESTS = 5  # what pytest returns where it found none
SILENT_S = 400  # a test that says nothing for so long hangs
# Faults that passed every test once: file, what stood there, what stood there instead.
KNOWN = [
    (
        "flax_mha/attention/blockwise/call.py",
        "slice_at(x_BTNF, (tile.b, tile.t, tile.k * G, 0)",
        "slice_at(x_BTNF, (tile.b, tile.t, tile.k + G, 0)",
    ),
    (
        "flax_mha/attention/blockwise/tiles.py",
        "first = j * tiling.s - highest",
        "first = j * tiling.s + highest",
    ),
    (
        "flax_mha/core/folding.py",
        "max(array.ndim - len(self.sources), 0)",
        "max(array.ndim - len(self.sources), 1)",
    ),
    (
        "flax_mha/core/folding.py",
        "max(array.ndim - len(self.sources), 0)",
        "max(array.ndim + len(self.sources), 0)",
    ),
    ("flax_mha/positions/relative_bias.py", "if number < 4:", "if number < 3:"),
    ("flax_mha/positions/relative_bias.py", "if number < 4:", "if number <= 4:"),
    ("flax_mha/positions/relative_bias.py", "count - 1)", "count)"),
    ("flax_mha/positions/relative_bias.py", "<= self._of_one", "< self._of_one"),
]


def known() -> dict[str, Fault]:
    found = {}
    for i, (file, old, new) in enumerate(KNOWN):
        source = (ROOT / file).read_text()
        line = source[: source.index(old)].count("\n") + 1
        found[f"known/{i}"] = Fault(file, "known", line, old, new, source.replace(old, new, 1))
    return found


def drawn(seed: int, count: int) -> dict[str, Fault]:
    files = sorted((ROOT / "flax_mha").rglob("*.py"))
    names = [file.relative_to(ROOT).as_posix() for file in files]
    sources = {name: (ROOT / name).read_text() for name in names if LEFT_OUT not in name}
    return {f"{seed}/{i}": fault for i, fault in enumerate(chosen(sources, seed, count))}


def copied(to: pathlib.Path) -> pathlib.Path:
    """The tree in `to`, with the cache of compiled programs of this one."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    (cache := ROOT / ".pytest_cache" / "jax").mkdir(parents=True, exist_ok=True)
    (to / ".pytest_cache").mkdir()
    (to / ".pytest_cache" / "jax").symlink_to(cache)
    asked = [sys.executable, "-c", "import flax_mha; print(flax_mha.__file__)"]
    answer = subprocess.check_output(asked, cwd=to, env=environment(to), text=True)
    assert answer.startswith(str(to)), f"not the copy: {answer}"
    return to


def environment(tree: pathlib.Path) -> dict[str, str]:
    """The copy, and in the stages of slow tests each row of every table; see tests/conftest.py."""
    return os.environ | {"PYTHONPATH": str(tree), "EVERY_ROW": "1"}


def put(tree: pathlib.Path, file: str, source: str) -> None:
    """Writes a module, and drops what was compiled of it: its time may seem the same."""
    (tree / file).write_text(source)
    pathlib.Path(importlib.util.cache_from_source(tree / file)).unlink(missing_ok=True)


def stem_words(path: str) -> set[str]:
    words = re.split(r"[_/]", path.removesuffix(".py").removesuffix("/__init__"))
    return {word.removesuffix("s") for word in words} - {"", "test", "flax", "mha"}


def importers(names: set[str], sources: dict[str, str]) -> set[str]:
    """The files of `sources` that import one of these modules or packages by name."""
    wanted = [rf"from {re.escape(name)} import" for name in names]
    wanted += [rf"from {re.escape(a)} import .*\b{b}\b" for a, _, b in map(parted, names)]
    pattern = re.compile("|".join(wanted))
    return {file for file, source in sources.items() if pattern.search(source)}


def parted(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def order(tests: dict[str, str], source: str) -> list[str]:
    """Tests by the words that they share with a source; rare words count more."""
    words = {name: set(re.findall(r"[A-Za-z_]{4,}", text)) for name, text in tests.items()}
    known_by = collections.Counter(word for found in words.values() for word in found)
    wanted = set(re.findall(r"[A-Za-z_]{4,}", source))
    shared = {name: sum(1 / known_by[word] for word in words[name] & wanted) for name in words}
    return sorted(shared, key=shared.__getitem__, reverse=True)


def stages(tree: pathlib.Path, file: str) -> list[list[str]]:
    """What to ask pytest for in turn; see the module's docstring."""
    tests, package = (
        {path.relative_to(tree).as_posix(): path.read_text() for path in sorted(tree.glob(files))}
        for files in ("tests/**/test_*.py", "flax_mha/**/*.py")
    )
    inner = pathlib.PurePosixPath(file).relative_to("flax_mha")
    folders = [f"tests/{parent}/" for parent in inner.parents if str(parent) != "."]
    folder = next((f for f in folders if any(name.startswith(f) for name in tests)), None)
    users = importers({module_name(file)}, package)
    near = {name for name in tests if folder and name.startswith(folder)}
    near |= importers({module_name(user) for user in users} | {module_name(file)}, tests)
    in_order = order(tests, package[file])
    in_order.sort(key=lambda name: name.startswith("tests/trust/"))  # of everything, and dear
    named = stem_words(inner.name if inner.name != "__init__.py" else str(inner.parent))
    own = [name for name in in_order if stem_words(pathlib.PurePath(name).name) & named]
    own = [name for name in own if not name.startswith("tests/trust/")]
    own.sort(key=lambda name: len(stem_words(pathlib.PurePath(name).name) ^ named))
    own = [*[name for name in own if folder and name.startswith(folder)], *own][:4]
    near = [name for name in in_order if name in near and name not in own]
    others = [name for name in in_order if name not in {*own, *near}]
    own = [*dict.fromkeys(own), file] if own else []
    slow = [[*names, "-m", "slow"] if names else [] for names in (own, near)]
    thinned = [file, *near, f"--thin={THIN}"]
    return [own, slow[0], thinned, [file, *near], slow[1], [*others, "flax_mha"]]


def pytest(tree: pathlib.Path, *arguments: str, until: float = math.inf) -> tuple[int, str]:
    """What pytest returned and said; -SIGKILL where it was silent for too long, or late."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rfE", "--color=no", *arguments]
    log = tree / ".pytest_cache" / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=tree, env=environment(tree), stdout=out, stderr=out, start_new_session=True
        )
        size, since = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            if size != (size := log.stat().st_size):
                since = time.monotonic()
            if time.monotonic() > min(until, since + SILENT_S):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode, log.read_text()


def tried(
    tree: pathlib.Path, fault: Fault, which: slice, left_out: set[str], limit: float
) -> tuple[str, str]:
    """What became of a fault, one of OUTCOMES, and the test that said so."""
    until = time.monotonic() + limit
    original = (tree / fault.file).read_text()
    put(tree, fault.file, fault.source)
    try:
        for tests in filter(None, stages(tree, fault.file)[which]):
            less = [f"--deselect={name}" for name in left_out]
            code, text = pytest(tree, "-x", *tests, *less, until=until)
            if code == -signal.SIGKILL:
                outcome = "unfinished" if time.monotonic() > until else "hung"
                return outcome, f"{len(text.split('[')[0])} characters said"
            if code not in (0, NO_TESTS):
                said = [*CAUGHT.findall(text), f"pytest ended with {code}"]
                return "caught", said[0]
    finally:
        put(tree, fault.file, original)
    return "survived", ""


def broken(tree: pathlib.Path, results: dict[str, dict]) -> set[str]:
    """Those of the tests that caught something which fail without a fault, too."""
    by = {x["by"] for x in results.values() if x["outcome"] == "caught" and "::" in x["by"]}
    return set(CAUGHT.findall(pytest(tree, "-m", "", *sorted(by))[1])) & by if by else set()


def shown(results: dict[str, dict]) -> str:
    lines = ["| fault | file:line | kind | was | is | outcome | by | s |", "|" + " --- |" * 8]
    for key, x in results.items():
        was, new = (x[name].replace("|", "\\|") for name in ("old", "new"))
        place = f"{x['file']}:{x['line']}"
        lines.append(
            f"| {key} | {place} | {x['kind']} | `{was}` | `{new}` | {x['outcome']} | {x['by']}"
            f" | {x['seconds']:.0f} |"
        )
    counts = [f"{sum(x['outcome'] == o for x in results.values())} {o}" for o in OUTCOMES]
    return "\n".join([*lines, "", f"{len(results)} faults: {', '.join(counts)}."])


OUTCOMES = ("caught", "hung", "survived", "unfinished", "equivalent")


def same(result: dict | None, fault: Fault) -> bool:
    """Whether a kept result is of this very fault: the package may have changed since."""
    names = ("file", "old", "new")
    return result is not None and all(result[name] == getattr(fault, name) for name in names)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--known", action="store_true", help="faults that once passed every test")
    parser.add_argument("--stages", type=int, default=5, choices=range(1, 7))
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for each fault")
    parser.add_argument("--again", action="store_true", help="survivors meet all stages once more")
    parser.add_argument("--list", action="store_true", help="says which faults, and runs nothing")
    parser.add_argument("--equivalent", nargs=2, metavar=("FAULT", "WHY"))
    parser.add_argument("--results", type=pathlib.Path, help="default: .pytest_cache/mutation.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    path = args.results or ROOT / ".pytest_cache" / "mutation.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if args.equivalent:
        key, why = args.equivalent
        kept[key] |= {"outcome": "equivalent", "by": why}
        path.write_text(json.dumps(kept, indent=1))
    faults = known() if args.known else drawn(args.seed, args.faults)
    if args.list:
        return print(*(f"{key} {fault}" for key, fault in faults.items()), sep="\n")
    met = {key: 0 for key in faults}  # how many stages it survived
    for key in [key for key in faults if same(kept.get(key), faults[key])]:
        survived = kept[key]["outcome"] == "survived"
        met[key] = (0 if args.again else kept[key]["stages"]) if survived else args.stages
        met[key] = 0 if kept[key]["outcome"] == "unfinished" else met[key]
    left, left_out = [key for key in faults if met[key] < args.stages], set()
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(pathlib.Path(folder)) if left else pathlib.Path(folder)
        while left:
            for key in left:
                start = time.monotonic()
                which = slice(met[key], args.stages)
                outcome, by = tried(tree, faults[key], which, left_out, args.limit)
                told = dataclasses.asdict(faults[key]) | {"outcome": outcome, "by": by}
                told |= {"stages": args.stages, "seconds": time.monotonic() - start}
                kept[key] = {name: x for name, x in told.items() if name != "source"}
                path.write_text(json.dumps(kept, indent=1))
                print(key, f"{told['file']}:{told['line']}", outcome, by, flush=True)
            left_out |= (wrong := broken(tree, {key: kept[key] for key in faults}))
            left = [key for key in faults if kept[key]["by"] in wrong]
            met |= dict.fromkeys(left, 0)
    print(shown({key: kept[key] for key in faults if key in kept}))


if __name__ == "__main__":
    main()
