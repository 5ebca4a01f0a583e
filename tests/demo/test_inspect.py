"""Attention maps of every task: the weights are the layers' own, and the files appear."""

import numpy as np
import pytest
from demo_helpers import TINY

from flax_mha.demo import cli
from flax_mha.demo.run import opened

NAMES = {
    "language": ["layer 0 self-attention"],
    "digits": ["layer 0 attention over both axes"],
    "dates": [
        f"{part}-attention"
        for part in ("encoder layer 0 self", "decoder layer 0 self", "decoder layer 0 cross")
    ],
}
INPUTS = {"language": "def f(x)", "digits": "3", "dates": "3rd of March, 1987"}
BAD_INPUTS = {
    "language": ("x" * 17, "the text must have 1 to model.context = 16 bytes. Received: 17"),
    "digits": ("40", "a held-out digit is named by a number from 0 to 39. Received: '40'"),
    "dates": ("3. März", "a date is written with English letters"),
}


@pytest.fixture
def trained(run_of, capsys):
    def train(task, *changes):
        run = run_of(task)
        assert cli.main(run.train("--steps", "2", "--no-plots", *changes)) == 0
        capsys.readouterr()
        return run

    return train


@pytest.mark.slow
@pytest.mark.parametrize("task", TINY)
def test_inspect_writes_a_page_and_pictures(trained, capsys, task):
    run = trained(task)
    before = {path.name for path in run.out.iterdir()}
    assert cli.main(["inspect", str(run.out), INPUTS[task]]) == 0
    expected = ["attention.html", *(f"attention-{n.replace(' ', '-')}.png" for n in NAMES[task])]
    assert capsys.readouterr().out.splitlines() == [str(run.out / name) for name in expected]
    assert {path.name for path in run.out.iterdir()} - before == set(expected)
    for name in expected[1:]:
        assert (run.out / name).read_bytes().startswith(b"\x89PNG")
        (run.out / name).unlink()
    assert cli.main(["inspect", str(run.out), "--no-plots"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(run.out / "attention.html")]
    text, message = BAD_INPUTS[task]
    assert cli.main(["inspect", str(run.out), text]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", TINY)
def test_maps_are_weights_of_the_queries_over_the_keys(trained, task):
    run = trained(task, "--set", "attention.dropout=0.5")
    opened_task, params, _ = opened(run.out)
    maps = opened_task.maps(params, INPUTS[task])
    assert [one_map.name for one_map in maps] == NAMES[task]
    for one_map in maps:
        np.testing.assert_allclose(one_map.scores_NTS.sum(-1), 1, rtol=1e-5)
        assert len(one_map.scores_NTS) == 2
        causal = task == "language" or one_map.name.startswith("decoder layer 0 self")
        is_lower = bool((one_map.scores_NTS == np.tril(one_map.scores_NTS)).all())
        assert is_lower == causal


@pytest.mark.slow
def test_labels(trained):
    run = trained("language")
    task, params, _ = opened(run.out)
    (one_map,) = task.maps(params, "aé\n")
    assert one_map.query_labels == ["a", "c3", "a9", "\n"]
    run = trained("dates", "--overwrite")
    task, params, _ = opened(run.out)
    encoder, own, cross = task.maps(params, "3.3.87")
    assert encoder.query_labels == encoder.key_labels == cross.key_labels == list("3.3.87")
    assert own.query_labels == cross.query_labels
    assert own.key_labels == ["start", *own.query_labels[:-1]]


@pytest.mark.slow
def test_pixels_are_flattened_row_by_row(trained):
    run = trained("digits")
    task, params, _ = opened(run.out)
    (one_map,) = task.maps(params, "5")
    image = task.split.held_out.images_BXY[5]
    np.testing.assert_array_equal(one_map.image, image)
    assert one_map.key_labels[11] == "1,3"
    (scores,) = task.scores(params, image[None])
    np.testing.assert_array_equal(one_map.scores_NTS[:, 11, 20], scores[:, 1, 3, 2, 4])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "command", "message"),
    [
        (
            "language",
            "predict",
            "the task 'language' does not predict. Use `generate RUN --prompt TEXT`",
        ),
        ("digits", "generate", "the task 'digits' does not generate text. Use `predict RUN`"),
        ("dates", "generate", "the task 'dates' does not generate text. Use `predict RUN`"),
    ],
)
def test_a_command_that_the_task_has_not_points_to_the_other(
    trained, capsys, task, command, message
):
    run = trained(task)
    assert cli.main([command, str(run.out)]) == 2
    assert message in capsys.readouterr().err
