"""The dates: spelled as datetime reads them, held-out days never trained on, decoded by caches."""

import datetime
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demo_helpers import TINY

from flax_mha.demo import cli
from flax_mha.demo.config_file import settings_from
from flax_mha.demo.data import dates, spellings
from flax_mha.demo.data.dates import DateSettings
from flax_mha.demo.data.spellings import SPELLINGS, STYLES, WEEKDAYS, Spelling
from flax_mha.demo.settings import DemoError
from flax_mha.demo.tasks import TASKS
from flax_mha.demo.translate import translate

# What `datetime` is told of each style; endings of ordinals are taken off before it reads.
FORMATS = {
    "1987-03-21": "%Y-%m-%d",
    "19870321": "%Y%m%d",
    "1987/3/21": "%Y/%m/%d",
    "03/21/1987": "%m/%d/%Y",
    "3/21/1987": "%m/%d/%Y",
    "03/21/87": "%m/%d/%y",
    "21.03.1987": "%d.%m.%Y",
    "21.3.87": "%d.%m.%y",
    "21-Mar-87": "%d-%b-%y",
    "21 March 1987": "%d %B %Y",
    "21 Mar '87": "%d %b '%y",
    "21st of March, 1987": "%d of %B, %Y",
    "the 21st of March 1987": "the %d of %B %Y",
    "March 21, 1987": "%B %d, %Y",
    "March 21st, 1987": "%B %d, %Y",
    "Mar 21 1987": "%b %d %Y",
    "March the 21st, 1987": "%B the %d, %Y",
}
PREFIXES = {"": "", "Tue ": "%a ", "Tuesday, ": "%A, "}
EXAMPLE = datetime.date(1987, 3, 21)
SOME_DAYS = [
    datetime.date(2000, 1, 1) + datetime.timedelta(days)
    for days in [*range(366), -18262, -18261, 18261, 18262]
]


def read(text, style, weekday):
    """The day that `datetime` reads, with two-digit years from 1950 on."""
    for number, ending in itertools.product(range(1, 32), ("st", "nd", "rd", "th")):
        text = text.replace(f" {number}{ending}", f" {number}")
        if text.startswith(f"{number}{ending}"):
            text = text.replace(f"{number}{ending}", str(number), 1)
    day = datetime.datetime.strptime(text, PREFIXES[weekday] + FORMATS[style]).date()
    if "%y" in FORMATS[style]:
        day = day.replace(year=1950 + (day.year - 1950) % 100)
    return day


@pytest.mark.parametrize("style", STYLES)
def test_datetime_reads_every_spelling(style):
    for weekday, day in itertools.product(WEEKDAYS, SOME_DAYS):
        text = Spelling(style, weekday).write(day)
        assert read(text, style, weekday) == day
        # %a and %A accept any weekday.
        assert text.startswith(day.strftime(PREFIXES[weekday]))


def test_a_style_is_named_by_what_it_writes():
    assert {style: write(EXAMPLE) for style, write in STYLES.items()} == {s: s for s in STYLES}
    assert {Spelling("1987-03-21", w).write(EXAMPLE)[:-10] for w in WEEKDAYS} == {
        "",
        "Sat ",
        "Saturday, ",
    }


@pytest.mark.parametrize(
    ("day", "ordinal"),
    [
        *[(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th")],
        *[(13, "13th"), (21, "21st"), (22, "22nd"), (23, "23rd"), (30, "30th"), (31, "31st")],
    ],
)
def test_ordinals(day, ordinal):
    text = Spelling("March 21st, 1987").write(datetime.date(1999, 1, day))
    assert text == f"January {ordinal}, 1999"


def test_no_text_means_two_days():
    meanings = {}
    for number in range(0, 36525, 7):
        day = dates.date_of(number)
        for style in STYLES:
            assert meanings.setdefault(Spelling(style).write(day).lower(), day) == day


def test_every_spelling_can_be_encoded_and_the_longest_fits():
    texts = [s.write(day) for s in SPELLINGS for day in SOME_DAYS[:366:2]]
    tokens = dates.encode(texts)
    assert tokens.shape[1] == spellings.LONGEST == max(map(len, texts))
    assert tokens.max() <= len(spellings.CHARACTERS) == dates.SOURCE_TOKENS - 1
    for text, row in zip(texts[::50], tokens[::50]):
        assert "".join(spellings.CHARACTERS[i - 1] for i in row if i) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("3. März 1987", "'ä' in '3. März 1987'"), ("", "Received: 0"), ("1" * 38, "Received: 38")],
)
def test_what_is_no_date_is_refused(text, message):
    with pytest.raises(DemoError, match=message):
        dates.encode([text])


def test_held_out_days_are_trained_on_in_no_spelling():
    split = dates.split_days(DateSettings())
    everything = np.concatenate(split)
    assert sorted(everything.tolist()) == list(range(36525))
    assert dates.date_of(0).isoformat() == "1950-01-01"
    assert dates.date_of(36524).isoformat() == "2049-12-31"
    judged = {dates.date_of(day).isoformat() for day in [*split.held_out, *split.validation]}
    assert len(judged) == 3500
    task = TASKS["dates"](settings_from({"task": {"name": "dates"}, "train": {"batch_size": 64}}))
    for batch in itertools.islice(task.batches(0), 40):
        assert judged.isdisjoint(dates.decode_iso(batch.target_BT))


def test_nothing_left_to_learn_from():
    with pytest.raises(DemoError, match=r"below the number of days, 36525. Received: 36525 \+ 500"):
        dates.split_days(DateSettings(held_out=36525))


def test_source_and_target_of_a_batch_belong_together():
    split = dates.split_days(DateSettings())
    written = dates.write(split.train[:20], np.random.default_rng(3))
    for day, style, text in written:
        assert text in {Spelling(style, w, c).write(day) for w in WEEKDAYS for c in spellings.CASES}
    styles = {w.style for w in dates.write(split.train[:2000], np.random.default_rng(0))}
    assert styles == set(STYLES)


@pytest.fixture(scope="module")
def random_model():
    """A small model with uneven predictions, and three sources of different lengths."""
    task = TASKS["dates"](settings_from(TINY["dates"]))
    params = jax.jit(task.model.init)(jax.random.key(0), *task.inputs(task.example()))["params"]
    sources = dates.encode(["Tuesday, the 3rd of March 1987", "21.3.87", "19990101"])
    return task, jax.tree.map(lambda leaf: 2 * leaf, params), sources


@pytest.mark.slow
def test_caches_decode_what_the_whole_model_decodes(random_model):
    task, params, sources = random_model
    whole = jax.jit(lambda before: task.model.apply({"params": params}, sources, before))
    written = np.zeros((3, dates.ISO_LENGTH), np.int32)
    for i in range(dates.ISO_LENGTH):
        before = np.column_stack([np.full(3, dates.START), written[:, :-1]]).astype(np.int32)
        written[:, i] = whole(before)[:, i].argmax(-1)  # causal: the zeros behind are not read
    decoded = np.asarray(translate(task.model, params, sources))
    np.testing.assert_array_equal(decoded, written)
    assert len(set(map(tuple, decoded.tolist()))) == 3


@pytest.mark.slow
def test_padding_of_the_source_means_nothing(random_model):
    task, params, sources = random_model
    target = jnp.ones((1, 10), jnp.int32)
    whole = task.model.apply({"params": params}, jnp.asarray(sources[1:2]), target)
    noisy = jax.tree.map(lambda leaf: leaf, params)
    noisy["source_embed"]["embedding"] = params["source_embed"]["embedding"].at[0].set(1e4)
    changed = task.model.apply({"params": noisy}, jnp.asarray(sources[1:2]), target)
    np.testing.assert_array_equal(whole, changed)


@pytest.mark.slow
def test_the_target_is_read_causally_and_begins_with_the_start(random_model):
    task, params, sources = random_model
    batch = dates.Dates(sources[:1], dates.encode_iso(["1987-03-03"]))
    source, before = task.inputs(batch)
    assert before.tolist() == [[dates.START, *batch.target_BT[0, :-1].tolist()]]
    changed = before.at[0, 6].set(9)
    old, new = (task.model.apply({"params": params}, source, t) for t in (before, changed))
    np.testing.assert_array_equal(old[0, :6], new[0, :6])
    assert (old[0, 6] != new[0, 6]).any()


@pytest.mark.slow
def test_the_order_of_what_was_written_before_counts(random_model):
    """Without positions a causal decoder of one layer sees what was written as a set."""
    task, params, sources = random_model
    before = jnp.asarray([[dates.START, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    turned = before[:, jnp.asarray([0, 2, 1, 4, 3, 5, 6, 7, 8, 9])]
    one, other = (task.model.apply({"params": params}, sources[:1], t) for t in (before, turned))
    assert abs(one[0, 9] - other[0, 9]).max() > 1e-3 * abs(one[0, 9]).max()


@pytest.mark.slow
def test_a_run_predicts_dates(run_of, capsys):
    run = run_of("dates")
    assert cli.main(run.train("--no-plots", "--steps", "3")) == 0
    (result,) = run.records("result")
    assert f"Exact match: {result['right']} of 40" in capsys.readouterr().out
    assert cli.main(["predict", str(run.out), "3rd of March, 1987", "5.5.55"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("3rd of March, 1987  ")
    assert second.startswith("5.5.55              ")
    for line in (first, second):
        iso = line[20:30]
        assert set(iso) <= set(dates.ISO_CHARACTERS)
        try:
            datetime.date.fromisoformat(iso)
        except ValueError:
            assert line.endswith("(no such date)")
        else:
            assert len(line) == 30
    assert cli.main(["predict", str(run.out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    held_out = dates.split_days(DateSettings(40, 20)).held_out[:8]
    assert [line[-14:] for line in lines] == [
        f"  is {dates.date_of(day)}"[-14:] for day in held_out
    ]
    assert cli.main(["predict", str(run.out), "3. März"]) == 2
    assert "a date is written with English letters" in capsys.readouterr().err


def test_exact_match_is_of_whole_dates(monkeypatch, capsys):
    from flax_mha.demo.terminal import Screen

    task = TASKS["dates"](settings_from(TINY["dates"]))
    truth = [dates.date_of(day).isoformat() for day in task.split.held_out]
    almost = [iso[:-1] + str((int(iso[-1]) + 1) % 10) for iso in truth[:4]]
    monkeypatch.setattr(TASKS["dates"], "_translated", lambda *_: almost + truth[4:])
    (result,) = task.judge({}, Screen())
    assert (result["days"], result["right"], result["exact_match"]) == (40, 36, 0.9)
    assert "36 of 40, 90.00%" in capsys.readouterr().out
