"""The decoding benchmark: both layers agree, a wrong one is not timed, the table names them."""

import dataclasses

import pytest

from flax_mha.bench.decoding import Size, check, flax_linen, main, ours

SMALL = Size(2, D=16, N=2, S=64)


@pytest.mark.slow
def test_both_layers_read_the_same(peers_promote):
    assert check({"flax_mha": ours(SMALL), "linen": flax_linen(SMALL)}, SMALL) < 1e-5


def test_a_wrong_layer_is_not_timed(peers_promote):
    decoder = ours(SMALL)
    wrong = dataclasses.replace(
        decoder, step=lambda x, cache: (decoder.step(x, cache)[0] + 1e-3, decoder.at(1))
    )
    with pytest.raises(ValueError, match=r"differ by .*: nothing is timed"):
        check({"flax_mha": ours(SMALL), "wrong": wrong}, SMALL)


@pytest.mark.slow
def test_the_table(peers_promote, capsys):
    main(["--batch", "2", "--capacity", "128", "--rounds", "1"])
    printed = capsys.readouterr().out
    for words in (
        "position     4  flax_mha",
        "position    64  linen",
        "times as long as the first",
    ):
        assert words in printed
