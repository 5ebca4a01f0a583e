"""What a reader sees and does: the page of attention maps in a real browser, from disk."""

import re

import chromium
import numpy as np
import pytest
from demo_helpers import random_weights

from flax_mha.demo.page import AttentionMap, visible, write_page

pytestmark = pytest.mark.skipif(
    chromium.find() is None, reason=f"none of {', '.join(chromium.NAMES)} is installed"
)

OWN = "document.title = 'owned'"
HOSTILE = [
    f"</script><script>{OWN}</script>",
    f'<img src=x onerror="{OWN}">',
    "<!--<script>",
    "{{TITLE}}",
    "\u2028\u202e\ud800",
    "\n",
    "",
]
TITLE = f"</title></h1><script>{OWN}</script>{{{{DATA}}}}\ud800"
IMAGE = np.arange(6.0).reshape(2, 3)
PIXELS = [f"{y},{x}" for y in range(2) for x in range(3)]
ZERO_ROW = random_weights(2, 4, 6, seed=1)
ZERO_ROW[1, 2] = 0
MAPS = [
    AttentionMap("layer 0", ZERO_ROW, list("abcd"), ["The", "cat", "sat", "on", "a", "mat"]),
    AttentionMap(f"<b>{HOSTILE[0]}", random_weights(3, 5, 7, seed=2), HOSTILE[:5], HOSTILE),
    AttentionMap("pixels", random_weights(2, 6, 6, seed=3), PIXELS, PIXELS, image=IMAGE),
    AttentionMap("long", random_weights(1, 300, 150, seed=4), ["word"] * 300, ["k"] * 150),
]


@pytest.fixture(scope="module")
def tab():
    with chromium.browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, TITLE, MAPS)
    return path.as_uri()


@pytest.fixture
def visit(tab, url):
    """Opens the page at a hash; afterwards, nothing was asked of a network or complained of."""

    def visit(hash="", *, width=1280, theme="light"):
        tab.resize(width, 1100)
        tab.set_theme(theme)
        tab.pointer(0, 0)
        tab.open(url + hash)
        return tab

    yield visit
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in tab.events if event["method"] in complaints] == []
    requests = [e["params"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert {request["request"]["url"] for request in requests} == {url}


def shown_row(tab):
    """The weights that the keys show: those of the query that is chosen or pointed at."""
    return np.array([float(title.split(": ")[1]) for title in tab.texts("#keys span", "title")])


def assert_row(tab, layer, head, query):
    exact = MAPS[layer].scores_NTS[head, query]
    assert (abs(shown_row(tab) - exact) <= np.sqrt(exact) / 255 + 6e-4).all()


def chosen(tab):
    """(map, head, query) as the page marks them for its readers."""
    (head,) = tab.texts("#heads [aria-pressed=true]")
    (query,) = tab.texts("#queries [aria-selected=true]", "id")
    place = [tab.evaluate("at('map').value"), head, query]
    return tuple(int(re.search(r"\d+", name)[0]) for name in place)


@pytest.mark.slow
@pytest.mark.parametrize("place", [(0, 0, 0), (0, 1, 3), (1, 2, 4), (1, 0, 1), (2, 1, 5)])
def test_the_hash_chooses_map_head_and_query(visit, place):
    tab = visit("#map={}&head={}&query={}".format(*place))
    assert chosen(tab) == place
    assert_row(tab, *place)
    layer, head, query = place
    best = int(MAPS[layer].scores_NTS[head, query].argmax())
    named = f"“{visible(MAPS[layer].key_labels[best])}” ({best})"
    assert f"attends most to {named}" in tab.text("#most")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hash", "place"),
    [
        ("", (0, 0, 0)),
        ("#map=9&head=9&query=9", (3, 0, 9)),
        ("#map=0&head=-1&query=99", (0, 0, 3)),
        ("#map=one&head=NaN&query=Infinity&__proto__=x", (0, 0, 3)),
        ("#" + "%3Cb%3E" * 9, (0, 0, 0)),
    ],
)
def test_a_hash_that_names_no_place_goes_to_the_nearest(visit, hash, place):
    tab = visit(hash)
    assert chosen(tab) == place
    assert_row(tab, *place)


@pytest.mark.slow
def test_a_new_hash_in_the_same_page_moves_there(visit):
    tab = visit("#map=0&head=1&query=3&scale=linear")
    assert tab.evaluate("at('scale').value") == "linear"
    tab.evaluate("location.hash = '#map=1&head=2&query=1'")
    tab.eventually("at('map').value", "1")
    assert chosen(tab) == (1, 2, 1)
    assert_row(tab, 1, 2, 1)
    assert tab.evaluate("at('scale').value") == "root"


def test_hostile_text_stays_text(visit):
    tab = visit("#map=1")
    assert tab.texts("#keys span") == [visible(label) for label in HOSTILE]
    assert tab.texts("#map option")[1] == MAPS[1].name
    assert tab.text("h1") == tab.evaluate("document.title") == TITLE.replace("\ud800", "\ufffd")
    assert tab.evaluate("document.querySelectorAll('script').length") == 3
    assert tab.evaluate("document.querySelectorAll('img, b').length") == 0


POINT = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="  # an image that loads elsewhere


def test_the_policy_lets_nothing_else_run_or_load(tab, url):
    tab.open(url)
    tab.evaluate(
        f"at('most').append(Object.assign(document.createElement('script'), {{ text: `{OWN}` }}))"
    )
    assert tab.evaluate("document.title") != "owned"
    assert tab.evaluate("fetch('data:,x').then(() => 'loaded', () => 'refused')") == "refused"
    outcomes = "onload: () => done('loaded'), onerror: () => done('refused')"
    loading = f"Object.assign(new Image(), {{ src: '{POINT}', {outcomes} }})"
    assert tab.evaluate(f"new Promise(done => {loading})") == "refused"


def test_keys_move_the_query_and_the_head(visit):
    tab = visit("#map=0&head=0&query=2")
    for key, place in [
        ("ArrowRight", (0, 0, 3)),
        ("ArrowDown", (0, 0, 3)),  # the last
        ("ArrowUp", (0, 0, 2)),
        ("]", (0, 1, 2)),
        ("]", (0, 1, 2)),  # the last
        ("ArrowLeft", (0, 1, 1)),
    ]:
        tab.key(key)
        assert chosen(tab) == place
        assert_row(tab, *place)
    tab.eventually("location.hash", "#map=0&head=1&query=1")
    tab.key("[")
    assert chosen(tab) == (0, 0, 1)


def test_up_and_down_go_by_rows_of_an_image(visit):
    tab = visit("#map=2&query=1")
    tab.key("ArrowDown")
    assert chosen(tab) == (2, 0, 4)
    tab.key("ArrowRight")
    tab.key("ArrowUp")
    assert chosen(tab) == (2, 0, 2)
    tab.key("ArrowUp")
    assert chosen(tab) == (2, 0, 2)


def test_pointing_shows_a_query_for_a_while_and_a_click_keeps_it(visit):
    tab = visit("#map=0&head=1&query=0")
    tab.pointer(*tab.middle("#queries-3"))
    assert_row(tab, 0, 1, 3)
    assert chosen(tab) == (0, 1, 0)
    tab.pointer(0, 0)
    assert_row(tab, 0, 1, 0)
    tab.pointer(*tab.middle("#queries-3"), click=True)
    tab.pointer(0, 0)
    assert chosen(tab) == (0, 1, 3)
    assert_row(tab, 0, 1, 3)
    tab.pointer(*tab.middle("#queries-0"))
    tab.key("ArrowLeft")
    assert_row(tab, 0, 1, 2)
    tab.key("ArrowRight")
    tab.pointer(*tab.middle("#keys-5"))
    assert tab.text("#readout").startswith("… to “mat” (5) 0.")
    assert float(tab.text("#readout").split()[-1]) == shown_row(tab)[5]


def test_the_head_and_the_map_are_chosen_by_hand_too(visit):
    tab = visit("#map=0&head=0&query=3")
    tab.pointer(*tab.middle("#heads button:last-child"), click=True)
    assert chosen(tab) == (0, 1, 3)
    tab.evaluate("at('map').value = 2, at('map').dispatchEvent(new Event('change'))")
    assert chosen(tab) == (2, 1, 3)
    assert_row(tab, 2, 1, 3)


def test_a_cell_of_the_matrix_has_its_weight_and_its_colour(visit):
    tab = visit("#map=0&head=1&query=0")
    left, top, size = tab.evaluate("[cells.left, cells.top, cells.size]")
    x, y = tab.middle("#matrix", 0, 0)
    tab.pointer(x + left + 4.5 * size, y + top + 1.5 * size, click=True)
    assert chosen(tab) == (0, 1, 1)
    assert "“a” (4)" in tab.text("#readout")
    data = tab.evaluate("[...picture.getContext('2d').getImageData(0, 0, 6, 4).data]")
    colours = np.array(data).reshape(4, 6, 4)[..., :3]
    ramp = np.array(tab.evaluate("ramp"))
    share = np.sqrt(MAPS[0].scores_NTS[1] / MAPS[0].scores_NTS.max())
    assert abs(colours - ramp[np.rint(255 * share).astype(int)]).max() <= 4  # one step of the ramp


def test_a_pixel_of_the_image_is_chosen_by_a_click(visit):
    tab = visit("#map=2&head=1")
    tab.pointer(*tab.middle("#image", 5 / 6, 3 / 4), click=True)
    assert chosen(tab) == (2, 1, 5)
    assert_row(tab, 2, 1, 5)
    tab.pointer(*tab.middle("#heat", 1 / 6, 1 / 4))
    assert "“0,0” (0)" in tab.text("#readout")
    corner = "at('heat').getContext('2d').getImageData(2, 2, 1, 1).data.slice(0, 3)"
    assert tab.evaluate(f"[...{corner}]") == tab.evaluate("color(row()[0])")


def test_pictures_are_there_for_images_alone(visit):
    tab = visit("#map=2")
    assert tab.evaluate("at('image').clientWidth") > 100
    tab.evaluate("choose({ map: 0 })")
    assert tab.evaluate("at('image').clientWidth") == 0
    assert tab.evaluate("at('text').open") is True


def test_another_map_forgets_what_was_pointed_at(visit):
    tab = visit("#map=3&query=299")
    tab.evaluate("point({ query: 200, key: 8 })")
    tab.evaluate("choose({ map: 0 })")
    assert chosen(tab) == (0, 0, 3)
    assert_row(tab, 0, 0, 3)
    assert tab.text("#readout") == ""


def test_a_query_that_attends_nowhere_says_so(visit):
    tab = visit("#map=0&head=1&query=2")
    assert tab.text("#most").endswith("attends to no key")
    assert shown_row(tab).tolist() == [0.0] * 6


@pytest.mark.parametrize("hash", ["#map=3&query=298", "#map=3&query=1"])
def test_the_chosen_query_is_scrolled_to(visit, hash):
    tab = visit(hash)
    assert_query_in_view(tab)
    tab.evaluate("choose({ query: 299 - state.query })")
    assert_query_in_view(tab)


def assert_query_in_view(tab):
    ids = "['queries', `queries-${state.query}`]"
    boxes = f"{ids}.map(id => at(id).getBoundingClientRect().toJSON())"
    list_box, box = tab.evaluate(boxes)
    assert list_box["top"] <= box["top"] < box["bottom"] <= list_box["bottom"]


@pytest.mark.parametrize("place", range(len(MAPS)))
def test_no_map_is_wider_than_a_phone(visit, place):
    tab = visit(f"#map={place}", width=360)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.evaluate("innerWidth") == 360  # a page that is too wide would be zoomed out


def oklab(colours):
    """sRGB, 0 to 255, in OKLab."""
    x = np.asarray(colours) / 255
    light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_lms = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.cbrt(light @ np.transpose(to_lms)) @ np.transpose(to_lab)


@pytest.mark.parametrize(("theme", "towards"), [("light", -1), ("dark", 1)])
def test_equal_steps_of_the_scale_look_equal(visit, theme, towards):
    lab = oklab(visit(theme=theme).evaluate("ramp"))[::15]
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert steps.std() < 0.06 * steps.mean()
    assert (towards * np.diff(lab[:, 0]) > 0).all()


def test_the_theme_may_change_while_the_page_is_open(visit):
    tab = visit(theme="light")
    assert tab.evaluate("ramp[0]") == [255, 255, 255]
    tab.set_theme("dark")
    tab.eventually("ramp[0].every(part => part < 40)", True)
    assert tab.evaluate("getComputedStyle(at('keys-0')).color") == "rgb(255, 255, 255)"


def test_the_scale_has_numbers(visit):
    tab = visit("#map=0")
    greatest = MAPS[0].scores_NTS.max()
    for scale, shares in [
        ("root", [0, 1 / 16, 1 / 4, 9 / 16, 1]),
        ("linear", [0, 1 / 4, 1 / 2, 3 / 4, 1]),
    ]:
        tab.evaluate(f"choose({{ scale: '{scale}' }})")
        ticks = [float(tick) for tick in tab.texts("#ticks span")]
        assert ticks == pytest.approx(greatest * np.array(shares), abs=0.005)
    tab.eventually("location.hash", "#map=0&head=0&query=0&scale=linear")
    assert "within 0.004 at 1" in tab.text("#legend figcaption")
