"""The digits: split without overlap, in batches that follow from seed and step, and predicted."""

import itertools

import jax
import numpy as np
import pytest
from demo_helpers import CONFIGS, TINY

from flax_mha.demo import cli, extras, train
from flax_mha.demo.config_file import read_settings, settings_from
from flax_mha.demo.data import digits
from flax_mha.demo.data.digits import DigitSettings
from flax_mha.demo.settings import DemoError
from flax_mha.demo.tasks import TASKS


def small_task():
    return TASKS["digits"](settings_from(TINY["digits"]))


def test_the_parts_are_all_images_once_and_always_the_same():
    split, again = (digits.load_split(DigitSettings(360, 180)) for _ in range(2))
    assert [len(part.labels_B) for part in split] == [1257, 180, 360]
    jax.tree.map(np.testing.assert_array_equal, split, again)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    ours = np.concatenate([part.images_BXY.reshape(-1, 64) * 16 for part in split])
    labelled = np.column_stack([ours, np.concatenate([part.labels_B for part in split])])
    theirs = np.column_stack([images, labels])
    assert sorted(map(tuple, labelled)) == sorted(map(tuple, theirs))


def test_nothing_left_to_learn_from():
    with pytest.raises(DemoError, match=r"below the number of images, 1797. Received: 1000 \+ 797"):
        digits.load_split(DigitSettings(1000, 797))


def test_a_batch_is_a_function_of_seed_and_step():
    task = small_task()
    batches = list(itertools.islice(task.batches(0), 4))
    later = next(task.batches(3))
    jax.tree.map(np.testing.assert_array_equal, batches[3], later)
    assert (batches[0].images_BXY != batches[1].images_BXY).any()


def test_only_training_images_are_learned_from():
    task = small_task()
    known = {image.tobytes() for image in task.split.train.images_BXY}
    for batch in itertools.islice(task.batches(0), 20):
        assert {image.tobytes() for image in batch.images_BXY} <= known


@pytest.mark.slow
def test_a_run_predicts_held_out_digits(run_of, capsys):
    run = run_of("digits")
    assert cli.main(run.train("--no-plots", "--steps", "3")) == 0
    printed = capsys.readouterr().out
    (result,) = run.records("result")
    assert f"Held-out accuracy: {result['right']} of 40" in printed
    assert result["accuracy"] == result["right"] / 40
    assert "accuracy" in run.records("held_out")[-1]
    assert cli.main(["predict", str(run.out), "7", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    held_out = digits.load_split(DigitSettings(40, 20)).held_out
    assert [line.rstrip() for line in lines[:8]] == [
        line.rstrip() for line in digits.drawing(held_out.images_BXY[7])
    ]
    assert lines[8].startswith("held-out 7: read as ")
    assert f"is {held_out.labels_B[7]}: " in lines[8]
    assert any(line.startswith("held-out 0: ") for line in lines)
    assert cli.main(["predict", str(run.out)]) == 0
    assert capsys.readouterr().out.count("held-out ") == 4
    for wrong in ("40", "x"):
        assert cli.main(["predict", str(run.out), wrong]) == 2
        message = f"named by a number from 0 to 39. Received: {wrong!r}"
        assert message in capsys.readouterr().err


def test_right_and_wrong_are_counted(monkeypatch, capsys):
    from flax_mha.demo.terminal import Screen

    task = small_task()
    labels = task.split.held_out.labels_B
    guessed = np.where(np.arange(40) < 3, (labels + 1) % 10, labels)
    monkeypatch.setattr(
        TASKS["digits"], "_probabilities", lambda self, params, part: np.eye(10)[guessed]
    )
    (result,) = task.judge({}, Screen())
    assert (result["right"], result["accuracy"]) == (37, 37 / 40)
    assert "37 of 40, 92.5%" in capsys.readouterr().out


def test_without_scikit_learn(run_of, capsys, monkeypatch):
    run = run_of("digits")
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    assert cli.main(run.train("--no-plots")) == 2
    remedy = "scikit-learn is needed for the digits. Run `pip install 'flax_mha[demo]'`"
    assert remedy in capsys.readouterr().err
    assert not run.out.exists()


@pytest.mark.slow
def test_a_short_run_of_the_config_reads_nine_in_ten(tmp_path):

    (config,) = (path for path in CONFIGS if path.stem == "digits")
    task = TASKS["digits"](read_settings(config, ["train.steps=400"]))
    *_, (_, state) = train.fit(task, train.initial_state(task))
    assert task.glance(state.params)["accuracy"] >= 0.9
