"""A small case, a small run, and our own layer made wrong on purpose."""

import dataclasses
import json

from flax_mha import multi_head_attention
from flax_mha.bench import cli
from flax_mha.bench.data import config_of
from flax_mha.bench.peers import jax_layers

SMALL = "2x5x21x3"


def run(directory, *arguments):
    """(the exit code, bench.json or None) of two rounds."""
    code = cli.main([*arguments, "--rounds", "2", "--out", str(directory / "out")])
    path = directory / "out" / "bench.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def ours_but(**changes):
    """A builder of our layer, made wrong on purpose."""

    def build(case, data):
        config = config_of(dataclasses.replace(case, dropout=changes.get("rate", case.dropout)))
        causal = case.causal and not changes.get("forgets_the_mask")

        def apply(params, x, key):
            call = dict(config=config, use_causal_mask=causal, dropout_key=key)
            return multi_head_attention(params, x, x, **call) * changes.get("factor", 1)

        convert = changes.get("convert", lambda params: params)
        return jax_layers.contender(jax_layers.Layer(apply, convert), case, data)

    return build
