"""The README is one page, the guides are whole, and each leads to the others."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

import pytest

from flax_mha import __main__ as overview
from flax_mha.guides import pages

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
FILES = {path.stem: path for path in sorted((ROOT / "flax_mha" / "guides").glob("*.md"))}
PAGES = {"README": README, **FILES}
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


# --- pages and links ----------------------------------------------------------------------------


def without_code(page):
    """A page without its blocks of code, whose comments look like headings."""
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """The addresses of a page that lead to files beside it, or into itself."""
    found = re.findall(r"\]\(([^)]+)\)", without_code(page))
    return [link for link in found if not link.startswith("https://")]


def dead_links(path, page):
    """The links of a page that lead to no file, or to no heading of it."""
    dead = []
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        there = target.is_file() and target.is_relative_to(ROOT)
        if there and anchor:
            there = anchor in anchors(page if target == path else target.read_text())
        if not there:
            dead.append(link)
    return dead


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    assert dead_links(PAGES[name], PAGES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("README", "flax_mha/guides/mask.md"),
        ("README", "#masks"),
        ("README", "flax_mha/guides/errors.md#mistakes"),
        ("masks", "flax_mha/guides/dropout.md"),
        ("masks", "#mask-object"),
        ("masks", "../../README.md#masks"),
        ("porting", "#or-load_keras_filemodelkeras-attention"),
    ],
)
def test_a_planted_dead_link_is_found(name, link):
    page = PAGES[name].read_text() + f"\nSee [there]({link}).\n"
    assert dead_links(PAGES[name], page) == [link]


def test_the_links_are_found():
    assert len(links(README.read_text())) > len(FILES)
    assert {"dropout.md", "masks.md"} <= {
        link for f in FILES.values() for link in links(f.read_text())
    }


def test_the_readme_is_one_page():
    assert README.read_text().count("\n") <= 280


def test_the_readme_leads_to_every_guide():
    found = re.findall(r"\]\(flax_mha/guides/(\w+)\.md\)", README.read_text())
    assert sorted(found) == sorted(FILES)


def test_the_docstrings_lead_to_every_guide():
    sources = [path.read_text() for path in (ROOT / "flax_mha").rglob("*.py")]
    lines = [line for text in sources for line in text.splitlines() if "flax_mha guide " in line]
    named = set(re.findall(r"\b[a-z_]+\b", " ".join(line.partition("guide ")[2] for line in lines)))
    assert named >= set(FILES)
    told = re.findall(r"flax_mha guide ([a-z_]+)", "\n".join(lines))
    assert set(told) <= set(FILES)


# --- what a page looks like ---------------------------------------------------------------------


@pytest.mark.parametrize("topic", FILES)
def test_a_page_starts_with_its_title_and_one_sentence(topic):
    title, first = FILES[topic].read_text().split("\n\n")[:2]
    assert re.fullmatch(r"# [^\n]+", title)
    assert pages.topics()[topic] == first.replace("\n", " ")
    assert re.fullmatch(r"[A-Z](?:[^.]|\.(?=\w))*\.", pages.topics()[topic])  # one full stop


@pytest.mark.parametrize("topic", FILES)
def test_a_page_fits_a_terminal(topic):
    page = FILES[topic].read_text()
    assert page.isascii()
    code = [line for block in PYTHON.findall(page) for line in block.splitlines()]
    assert [line for line in code if len(line) > 78] == []  # rich pads them by one on each side
    assert page.count("\n") < 300


# --- the command --------------------------------------------------------------------------------


def test_every_topic_is_listed(capsys):
    assert list(pages.topics()) == list(FILES)
    assert overview.main(["guide"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    listed = " ".join(out.split())
    for topic, sentence in pages.topics().items():
        assert f"{topic} {sentence}" in listed
    assert out.strip() in "\n".join(overview.overview())


BARE = """
import runpy, sys
import flax  # which needs rich today
sys.modules["rich"] = None  # importing it fails now
sys.argv = ["flax_mha", "guide", "masks"]
runpy.run_module("flax_mha", run_name="__main__")
"""


@pytest.mark.slow
def test_a_page_is_printed_as_it_is_without_rich():
    result = subprocess.run(
        [sys.executable, "-c", BARE],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == FILES["masks"].read_text()


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self):
        return True


def in_terminal(topic, monkeypatch, columns=80):
    """What a terminal of so many columns is sent."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with contextlib.redirect_stdout(Terminal()) as stdout:
        assert overview.main(["guide", topic]) == 0
    return stdout.getvalue()


def seen(sent):
    """The lines without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", sent).splitlines()


def test_a_terminal_without_rich_gets_the_page_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert in_terminal("masks", monkeypatch) == FILES["masks"].read_text()


def test_what_is_no_terminal_gets_the_page_as_it_is(capsys):
    assert overview.main(["guide", "masks"]) == 0
    assert capsys.readouterr().out == FILES["masks"].read_text()


@pytest.mark.parametrize("topic", FILES)
def test_a_terminal_gets_the_page_set_by_rich(topic, monkeypatch):
    sent = in_terminal(topic, monkeypatch)
    assert "\x1b[" in sent
    lines = seen(sent)
    assert lines[0].strip() == FILES[topic].read_text().splitlines()[0].removeprefix("# ")
    assert [line for line in lines if len(line) > 80] == []
    cut, raw = "\N{HORIZONTAL ELLIPSIS}", ("```", "|--")
    assert [line for line in lines if any(mark in line for mark in (cut, *raw))] == []


def test_a_wide_terminal_gets_no_wide_lines(monkeypatch):
    assert 80 < max(map(len, seen(in_terminal("masks", monkeypatch, columns=200)))) <= 100


@pytest.mark.parametrize("name", ["long-context", "long_context"])
def test_hyphens_count_as_underscores(name, capsys):
    assert overview.main(["guide", name]) == 0
    assert capsys.readouterr().out == FILES["long_context"].read_text()


@pytest.mark.parametrize(
    ("topic", "remedy"),
    [
        ("mask", "Did you mean 'masks'?"),
        ("Long-Contxt", "Did you mean 'long_context'?"),
        ("zzz", ""),
    ],
)
def test_an_unknown_topic_is_refused(topic, remedy, capsys):
    with pytest.raises(SystemExit) as exit_:
        overview.main(["guide", topic])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    name = topic.replace("-", "_")
    rule = f"The topic of a guide must be among {list(FILES)}."
    message = f"{rule} Received: {name!r}. {remedy}".strip()
    assert out == ""
    assert err.endswith(f"error: {message}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        pages.text(topic)
