"""Attention as pictures: what is drawn, what stands beside it, and what is refused."""

import copy
import io
import itertools
import pickle

import jax
import jax.numpy as jnp
import matplotlib.image
import matplotlib.pyplot
import numpy as np
import pytest

from flax_mha import Mask, MultiHeadAttentionConfig, init_params, multi_head_attention
from flax_mha.plots import plot_attention, plot_bands, plot_mask
from flax_mha.plots.labels import step_between, visible

N, T, S = 3, 5, 7
T1, T2, S1, S2 = 2, 3, 4, 5
QUERIES, KEYS = ["a", "b", "c", "d", "e"], ["A", "B", "C", "D", "E", "F", "G"]
FORBIDDEN, ALLOWED, NOWHERE = 0, 1, 2


def weights(*shape, seed=0):
    exponentials = np.exp(2 * np.random.default_rng(seed).standard_normal(shape))
    return (exponentials / exponentials.sum(-1, keepdims=True)).astype(np.float32)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def scale(figure):
    (axes,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    return axes


def drawn(axes):
    return np.asarray(axes.images[0].get_array())


def texts(artists):
    return [artist.get_text() for artist in artists]


def picture(figure):
    """What a notebook shows, as an array of colours."""
    return matplotlib.image.imread(io.BytesIO(figure._repr_png_()))


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_one_panel_a_head_and_one_colour_scale(convert, dtype):
    scores = weights(N, T, S).astype(jnp.dtype(dtype))
    if convert is jnp.asarray and dtype == "float64":
        dtype = "float32"  # JAX has no other without its 64-bit mode
    figure = plot_attention(convert(scores.astype(dtype)), head_labels=["x", "y", "z"])
    assert len(panels(figure)) == N
    for n, axes in enumerate(panels(figure)):
        np.testing.assert_array_equal(drawn(axes), scores[n].astype(np.float32))
        assert axes.images[0].get_clim() == (0, scores.astype(np.float32).max())
    assert texts(axes.title for axes in panels(figure)) == ["x", "y", "z"]
    assert scale(figure).get_ylabel() == "attention weight"


def test_of_one_head_no_head_is_named():
    (axes,) = panels(plot_attention(weights(T, S)))
    assert (axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) == ("", "query", "key")


@pytest.mark.slow
def test_the_layers_scores_are_drawn():
    config = MultiHeadAttentionConfig(num_heads=N, key_dim=4)
    x = jax.random.normal(jax.random.key(0), (2, T, 8))
    params = init_params(jax.random.key(1), config, x.shape)
    _, scores = multi_head_attention(params, x, x, config=config, return_attention_scores=True)
    figure = plot_attention(scores[1])
    np.testing.assert_array_equal([drawn(axes) for axes in panels(figure)], scores[1])


def test_labels_stand_at_the_cells_and_at_the_outer_panels_alone():
    figure = plot_attention(weights(8, T, S), QUERIES, KEYS)
    for i, axes in enumerate(panels(figure)):  # two rows of four
        left, below = i % 4 == 0, i >= 4
        assert (axes.get_ylabel(), axes.get_xlabel()) == ("query" * left, "key" * below)
        assert texts(axes.get_yticklabels()) == QUERIES * left
        assert texts(axes.get_xticklabels()) == KEYS * below
        np.testing.assert_array_equal(axes.get_yticks(), range(T))
        np.testing.assert_array_equal(axes.get_xticks(), range(S))
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())


def test_a_string_stands_for_its_characters_and_blanks_can_be_seen():
    (axes,) = panels(plot_attention(weights(4, 4), "a b\n", [" the", "\t", "$x$", "\x00"]))
    assert texts(axes.get_yticklabels()) == ["a", "␣", "b", "↵"]
    assert texts(axes.get_xticklabels()) == ["␣the", "⇥", "$x$", "\\x00"]


def test_numbers_as_labels_and_a_long_label_cut():
    (axes,) = panels(plot_attention(weights(2, 2), [7, np.int64(8)], ["x" * 25, "x" * 24]))
    assert texts(axes.get_yticklabels()) == ["7", "8"]
    assert texts(axes.get_xticklabels()) == ["x" * 23 + "…", "x" * 24]
    assert visible("  x y ") == "␣␣x y␣"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (300, 5), (64, 64), (4, 64, 64), (700, 700)])
def test_tick_labels_do_not_overlap(shape):
    names = [["token"] * n for n in shape[-2:]]
    for figure in (plot_attention(weights(*shape), *names), plot_attention(weights(*shape))):
        figure.draw_without_rendering()
        for axes in panels(figure):
            rows = [text.get_window_extent() for text in axes.get_yticklabels()]
            assert all(a.y0 >= b.y1 - 1 for a, b in itertools.pairwise(rows))
            columns = [text.get_window_extent() for text in axes.get_xticklabels()]
            assert all(a.x1 - 1 <= b.x0 for a, b in itertools.pairwise(columns))


def test_thinned_labels_belong_to_their_positions():
    names = [f"token {i}" for i in range(300)]
    (axes,) = panels(plot_attention(weights(300, 300), names, names))
    assert 10 < len(axes.get_xticks()) < 100
    for ticks, labels in (
        (axes.get_xticks(), axes.get_xticklabels()),
        (axes.get_yticks(), axes.get_yticklabels()),
    ):
        assert texts(labels) == [f"token {tick:.0f}" for tick in ticks]
    assert step_between(300, 300) == 1


def test_uniform_weights_over_many_keys_are_not_blank():
    figure = plot_attention(np.full((2, 1000), 0.001, np.float32))
    assert panels(figure)[0].images[0].get_clim() == (0, np.float32(0.001))


def test_weights_of_zero_are_drawn_on_a_scale_up_to_one():
    assert panels(plot_attention(np.zeros((2, 3))))[0].images[0].get_clim() == (0, 1)


# --- attention over two axes --------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(), (N,)])
def test_the_weights_of_one_query_over_the_grid_of_keys(heads):
    scores = weights(*heads, T1, T2, S1, S2)
    figure = plot_attention(scores, query=(1, 2))
    expected = scores[..., 1, 2, :, :].reshape(-1, S1, S2)
    np.testing.assert_array_equal([drawn(axes) for axes in panels(figure)], expected)
    assert panels(figure)[0].images[0].get_clim() == (0, expected.max())
    # The query is not a place in the grid of keys, so nothing is framed there.
    assert not any(axes.patches for axes in panels(figure))
    assert texts(figure.legends[0].get_texts()) == ["query: row 1, column 2"]


def test_the_image_comes_first_and_the_query_is_framed_everywhere():
    image = np.arange(S1 * S2).reshape(S1, S2)
    figure = plot_attention(weights(N, S1, S2, S1, S2), query=(3, 1), image=image)
    assert texts(axes.title for axes in panels(figure)) == ["image", "head 0", "head 1", "head 2"]
    np.testing.assert_array_equal(drawn(panels(figure)[0]), image)
    for axes in panels(figure):
        assert {patch.get_xy() for patch in axes.patches} == {(0.5, 2.5)}


# --- masks --------------------------------------------------------------------------------------


def test_a_mask_has_three_kinds_of_cells():
    mask = Mask.causal() & Mask.padding(query=np.arange(4) < [[4], [2]])
    first, second = panels(plot_mask(mask, 4, 3))
    np.testing.assert_array_equal(drawn(first), [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(drawn(second), [[1, 0, 0], [1, 1, 0], [2, 2, 2], [2, 2, 2]])
    assert texts((first.title, second.title)) == ["example 0", "example 1"]


def test_the_legend_names_the_colours_that_are_drawn():
    figure = plot_mask(np.array([[True, False], [False, False]]))
    (legend,) = figure.legends
    image = panels(figure)[0].images[0]
    assert texts(legend.get_texts()) == [
        "may not attend",
        "may attend",
        "query that may attend nowhere",
    ]
    colours = [patch.get_facecolor() for patch in legend.get_patches()]
    assert colours == [image.to_rgba(kind) for kind in (FORBIDDEN, ALLOWED, NOWHERE)]
    grey = [np.dot(colour[:3], (0.299, 0.587, 0.114)) for colour in colours]
    assert grey[FORBIDDEN] > grey[NOWHERE] + 0.2 > grey[ALLOWED] + 0.4
    everywhere = plot_mask(np.ones((2, 2), bool)).legends[0]
    assert texts(everywhere.get_texts()) == ["may not attend", "may attend"]


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((T, S), [""]),
        ((2, T, S), ["head 0", "head 1"]),
        ((2, 1, T, S), ["example 0", "example 1"]),
        ((1, 2, T, S), ["head 0", "head 1"]),
        ((2, 2, T, S), [f"example {b}, head {n}" for b in range(2) for n in range(2)]),
    ],
)
def test_panels_of_an_array(shape, names):
    mask = np.random.default_rng(0).random(shape) < 0.5
    mask[..., 0] = True
    figure = plot_mask(mask, query_labels=QUERIES, key_labels=KEYS)
    assert texts(axes.title for axes in panels(figure)) == names
    np.testing.assert_array_equal(
        [drawn(axes) for axes in panels(figure)], mask.reshape(len(names), T, S)
    )
    assert texts(panels(figure)[0].get_yticklabels()) == QUERIES
    assert texts(panels(figure)[0].get_xticklabels()) == KEYS


@pytest.mark.parametrize(
    "mask",
    [
        Mask.causal(),
        Mask.causal(query_offset=2),
        Mask.causal(query_offset=jnp.array([1, 2])),
        Mask.window(2, 1),
        Mask.segments(np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 2, 2])),
        Mask.dense(np.tri(T, S, dtype=bool)[None] ^ (np.arange(N) == 1)[:, None, None]),
        Mask(),
    ],
)
def test_every_kind_of_structure_is_drawn_as_its_array(mask):
    kinds = np.stack([drawn(axes) for axes in panels(plot_mask(mask, T, S))])
    np.testing.assert_array_equal(kinds == ALLOWED, mask.as_array(T, S).reshape(-1, T, S))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "counts", "names"),
    [
        (Mask.function(lambda b, n, t, s: (t + s) % 2 == 0), {}, [""]),
        (Mask.function(lambda b, n, t, s: s <= t + n), {"heads": 2}, ["head 0", "head 1"]),
        (
            ~Mask.function(lambda b, n, t, s: s <= t + b),
            {"examples": 2},
            ["example 0", "example 1"],
        ),
        (
            Mask.causal() | (Mask.padding(key=np.arange(S) < [[2], [3]]) & Mask.prefix([3, 1])),
            {},
            ["example 0", "example 1"],
        ),
        (Mask.window(1, 1) | Mask.prefix([1, 2]), {"examples": 2, "heads": 3}, ["0", "1"]),
    ],
    ids=["places", "heads", "examples", "told by its padding", "heads that nothing reads"],
)
def test_functions_unions_and_complements_are_drawn(mask, counts, names):
    figure = plot_mask(mask, T, S, **counts)
    shown = np.stack([drawn(axes) for axes in panels(figure)])
    array = mask.as_array(T, S, B=2, N=2)
    np.testing.assert_array_equal(shown == ALLOWED, np.asarray(array).reshape(-1, T, S))
    titles = [axes.get_title() for axes in panels(figure)]
    assert all(name in title for name, title in zip(names, titles, strict=True))


def test_cells_are_separated_while_they_are_few():
    few, many = (panels(plot_mask(Mask.causal(), n, n))[0] for n in (40, 41))
    np.testing.assert_array_equal(few.get_xticks(minor=True), np.arange(41) - 0.5)
    assert few.yaxis.get_minor_ticks()[1].gridline.get_visible()
    assert len(many.get_xticks(minor=True)) == 0


@pytest.mark.slow
def test_cells_below_a_pixel_mix_their_colours_not_their_kinds():
    mask = np.zeros((2000, 2000), bool)
    mask[::2, 0] = True  # kinds 0, 2, 0, 2 below one another, whose mean is 1: may attend
    figure = plot_mask(mask)
    shown = picture(figure)[400, 300:500, :3]
    allowed = panels(figure)[0].images[0].to_rgba(ALLOWED)[:3]
    assert np.abs(shown - allowed).max(-1).min() > 0.3


# --- bands --------------------------------------------------------------------------------------


def bands(axes, n=0):
    """`{(query's place, key's place): (width, opacity)}` of the bands of head n."""
    collection = axes.collections[n]
    found = {}
    for path, colour in zip(collection.get_paths(), collection.get_facecolors()):
        x, y = path.vertices.T
        (left, right), width = (y[x == side] for side in (0, 1)), np.ptp(y[x == 0])
        np.testing.assert_allclose(np.ptp(right), width, atol=1e-6)
        middle = float(left.max() + left.min()) / 2, float(right.max() + right.min()) / 2
        found[tuple(round(place, 3) for place in middle)] = float(width), float(colour[3])
    return found


def test_a_band_joins_query_and_key_wider_and_darker_with_the_weight():
    scores = np.array([[0.1, 0.2, 0.7], [0.0, 0.5, 0.5]])
    figure = plot_bands(scores, ["a", "b"], ["A", "B", "C"], threshold=0.15)
    left, right = figure.axes
    # Two queries beside three keys stand in the middle.
    widths = {(0.5, 1): 0.2, (0.5, 2): 0.7, (1.5, 1): 0.5, (1.5, 2): 0.5}
    found = bands(left)
    assert set(found) == set(widths)
    for place, weight in widths.items():
        np.testing.assert_allclose(found[place][0], 0.8 * weight / 0.7, rtol=1e-5)
    by_weight = [found[place] for place in ((0.5, 1), (1.5, 1), (0.5, 2))]
    assert by_weight == sorted(by_weight)
    assert by_weight[0][1] < by_weight[1][1] < by_weight[2][1]
    assert texts(left.get_yticklabels()) == ["a", "b"]
    assert texts(right.get_yticklabels()) == ["A", "B", "C"]
    assert (left.get_yticks().tolist(), right.get_yticks().tolist()) == ([0.5, 1.5], [0, 1, 2])
    assert left.get_xlabel() == "full width: weight 0.7; not drawn: below 0.15"


def test_a_tenth_of_the_largest_weight_is_the_least_that_is_drawn():
    figure = plot_bands(np.array([[0.05, 0.45, 0.5], [0.04, 0.46, 0.5]], np.float64))
    assert set(bands(figure.axes[0])) == {(0.5, 0), (0.5, 1), (0.5, 2), (1.5, 1), (1.5, 2)}
    assert "below 0.05" in figure.axes[0].get_xlabel()


def test_zero_is_never_a_band():
    figure = plot_bands(np.array([[0.0, 1.0]]), threshold=0)
    assert len(bands(figure.axes[0])) == 1
    assert not bands(plot_bands(np.zeros((2, 3))).axes[0])
    assert picture(plot_bands(np.zeros((2, 3)))).min() < 1  # the labels are there


def test_the_widest_band_is_drawn_last():
    widths = [width for width, _ in bands(plot_bands(weights(T, S)).axes[0]).values()]
    assert len(widths) > 10
    assert widths == sorted(widths)


def test_heads_have_a_colour_each_and_do_not_cover_one_another():
    scores = np.broadcast_to(np.eye(2), (2, 2, 2))
    figure = plot_bands(scores, head_labels=["_first", "$second$"])
    left = figure.axes[0]
    np.testing.assert_allclose(sorted(bands(left, 0)), [(-0.2, -0.2), (0.8, 0.8)])
    np.testing.assert_allclose(sorted(bands(left, 1)), [(0.2, 0.2), (1.2, 1.2)])
    (legend,) = figure.legends
    assert texts(legend.get_texts()) == ["_first", "$second$"]
    for n, patch in enumerate(legend.get_patches()):
        assert patch.get_facecolor()[:3] == tuple(left.collections[n].get_facecolors()[0][:3])
    assert left.collections[0].get_facecolors()[0][0] != left.collections[1].get_facecolors()[0][0]


def test_a_legend_of_long_names_stays_inside_the_figure():
    figure = plot_bands(weights(4, T, S), head_labels=["a name of twenty-four ch"] * 4)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width


# --- figures ------------------------------------------------------------------------------------

FIGURES = {
    "attention": lambda: plot_attention(weights(2, T, S), QUERIES, KEYS, title="costs $5 or $6"),
    "query": lambda: plot_attention(weights(S1, S2, S1, S2), query=(0, 0), title="costs $5 or $6"),
    "mask": lambda: plot_mask(Mask.causal(), T, S, title="costs $5 or $6"),
    "bands": lambda: plot_bands(weights(2, T, S), QUERIES, KEYS, title="costs $5 or $6"),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_a_notebook_shows_it_without_pyplot(make, tmp_path):
    before = matplotlib.pyplot.get_fignums()
    figure = make()
    assert matplotlib.pyplot.get_fignums() == before
    assert figure.get_suptitle() == "costs $5 or $6"
    assert not figure.texts[0].get_parse_math()
    shown = picture(figure)
    assert 200 < min(shown.shape[:2]) < max(shown.shape[:2]) < 2000
    assert len(np.unique(shown.reshape(-1, shown.shape[-1]), axis=0)) > 10
    figure.savefig(tmp_path / "picture.pdf")
    assert (tmp_path / "picture.pdf").read_bytes()[:5] == b"%PDF-"


@pytest.mark.slow
@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_copies_show_themselves(make):
    figure = make()
    for other in (copy.deepcopy(figure), pickle.loads(pickle.dumps(figure))):
        other.suptitle("another")
        assert not np.array_equal(picture(other), picture(figure))


def test_the_columns_of_bands_are_named_above_their_tokens():
    left, right = plot_bands(np.array([[0.4, 0.6]])).axes
    named = [
        [(text.get_text(), text.get_position()) for text in axes.texts] for axes in (left, right)
    ]
    assert named == [[("query", (-0.02, 1))], [("key", (1.02, 1))]]


def test_steps_between_labels_are_the_smallest_round_ones_that_fit():
    rounds = [number * 10**power for power in range(5) for number in (1, 2, 5)]
    for count, fits in itertools.product(range(1, 1200), (1, 3, 20, 34.5)):
        wanted = next(step for step in rounds if count <= step * fits)
        assert step_between(count, fits) == wanted, (count, fits)
