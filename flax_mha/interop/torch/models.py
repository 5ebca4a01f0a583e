"""Where PyTorch models keep the arrays of one attention layer: a layout for each, as data.

`name[query]` in a table is the query's part of the array `name`, which `packed` tells how to part.
`name.{N}.weight` stands for one array a head, which the entry's first axis counts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flax_mha.interop.layout import Entry


class Packing(NamedTuple):
    """How one array holds several parts, which follow one another in the table's order.

    Attributes:
        axis: along which they stand.
        within: None, each part whole; a letter, the parts of each of these heads together: with "K"
            a key head's queries, its key and its value, `[K, G H + H + V]`; with "N" a query head's
            query and gate, `[N, H + V]`.
    """

    axis: int
    within: str | None = None


class Layout(NamedTuple):
    """One layer's arrays below its prefix.

    Attributes:
        table: an entry for each array; a row counts only where the config has its place.
        owns: the beginnings of names that belong to the layer: all such arrays must be used.
        foreign: names among them, of arrays or of modules, that hold no weights of the layer.
        refused: names among them that change what the layer computes, with the reason.
        hints: what to do about names among them that have no place in the config; "" of any.
        packed: arrays that hold several parts of the layer, and how.
        shared_last: arrays whose heads keep last what here stands first, a latent layer's features
            that all heads share.
        equal: products of sizes that are equal in such a model, in axis letters.
        whole_biases: whether such a layer has all biases or none: then one that the config lacks
            leaves as zeros, and comes in only if it is zero.
    """

    table: tuple[Entry, ...]
    owns: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}
    hints: Mapping[str, str] = {}
    packed: Mapping[str, Packing] = {}
    shared_last: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    whole_biases: bool = False


_NORMS = (
    "Are they the scales w of a norm of each head, as in Qwen 3, and not w - 1, as in Gemma 3? "
    "Then pass layout='qwen3' and a config with qk_norm='rms'."
)
_LEARNED_KEY = "add_bias_kv=True appends a learned key and value to every sequence"

_TORCH_BIASES_AND_OUTPUT = (
    Entry(("query", "bias"), "in_proj_bias[query]", "(N H)"),
    Entry(("key", "bias"), "in_proj_bias[key]", "(K H)"),
    Entry(("value", "bias"), "in_proj_bias[value]", "(K V)"),
    Entry(("attention_output", "kernel"), "out_proj.weight", "E (N V)"),
    Entry(("attention_output", "bias"), "out_proj.bias", "E"),
)

# torch.nn.MultiheadAttention with kdim or vdim: three input projections, one bias for the three.
SEPARATE = Layout(
    table=(
        Entry(("query", "kernel"), "q_proj_weight", "(N H) D"),
        Entry(("key", "kernel"), "k_proj_weight", "(K H) C"),
        Entry(("value", "kernel"), "v_proj_weight", "(K V) M"),
        *_TORCH_BIASES_AND_OUTPUT,
    ),
    owns=("",),
    refused={"bias_k": _LEARNED_KEY, "bias_v": _LEARNED_KEY},
    packed={"in_proj_bias": Packing(0)},
    equal=("K=N", "V=H", "NH=D", "D=E"),
    whole_biases=True,
)

# torch.nn.MultiheadAttention where query, key and value have the same features.
PACKED = SEPARATE._replace(
    table=(
        Entry(("query", "kernel"), "in_proj_weight[query]", "(N H) D"),
        Entry(("key", "kernel"), "in_proj_weight[key]", "(K H) C"),
        Entry(("value", "kernel"), "in_proj_weight[value]", "(K V) M"),
        *_TORCH_BIASES_AND_OUTPUT,
    ),
    packed={"in_proj_weight": Packing(0), "in_proj_bias": Packing(0)},
    equal=(*SEPARATE.equal, "C=D", "M=D"),
)

# BERT, RoBERTa, ELECTRA: below "encoder.layer.0."; the LayerNorm stands behind the residual sum.
BERT = Layout(
    table=(
        Entry(("query", "kernel"), "attention.self.query.weight", "(N H) D"),
        Entry(("query", "bias"), "attention.self.query.bias", "(N H)"),
        Entry(("key", "kernel"), "attention.self.key.weight", "(K H) C"),
        Entry(("key", "bias"), "attention.self.key.bias", "(K H)"),
        Entry(("value", "kernel"), "attention.self.value.weight", "(K V) M"),
        Entry(("value", "bias"), "attention.self.value.bias", "(K V)"),
        Entry(("attention_output", "kernel"), "attention.output.dense.weight", "E (N V)"),
        Entry(("attention_output", "bias"), "attention.output.dense.bias", "E"),
    ),
    owns=("attention.",),
    foreign=tuple(
        f"attention.output.LayerNorm.{leaf}" for leaf in ("weight", "bias", "gamma", "beta")
    ),
    equal=("K=N", "V=H", "C=D", "M=D", "D=E"),
)

# Llama, Mistral: below "model.layers.0."; grouped heads; with biases where `attention_bias` is set,
# with sinks in gpt-oss.
LLAMA = Layout(
    table=(
        Entry(("query", "kernel"), "self_attn.q_proj.weight", "(N H) D"),
        Entry(("query", "bias"), "self_attn.q_proj.bias", "(N H)"),
        Entry(("key", "kernel"), "self_attn.k_proj.weight", "(K H) C"),
        Entry(("key", "bias"), "self_attn.k_proj.bias", "(K H)"),
        Entry(("value", "kernel"), "self_attn.v_proj.weight", "(K V) M"),
        Entry(("value", "bias"), "self_attn.v_proj.bias", "(K V)"),
        Entry(("attention_output", "kernel"), "self_attn.o_proj.weight", "E (N V)"),
        Entry(("sinks", "logits"), "self_attn.sinks", "N"),
        Entry(("attention_output", "bias"), "self_attn.o_proj.bias", "E"),
    ),
    owns=("self_attn.",),
    foreign=("self_attn.rotary_emb.inv_freq",),
    hints={
        "self_attn.q_norm.weight": _NORMS,
        "self_attn.k_norm.weight": _NORMS,
        "self_attn.sinks": "Pass a config with `use_sinks=True`.",
    },
    equal=("V=H", "C=D", "M=D", "D=E"),
)

# Qwen2: Llama with biases in query, key and value alone.
QWEN2 = LLAMA._replace(
    table=(*LLAMA.table[:-1], Entry(("attention_output", "bias"), None)),
)

# Qwen3: Llama with a norm of each head of query and key, whose scales are kept as they are.
QWEN3 = LLAMA._replace(
    table=(
        *LLAMA.table,
        Entry(("query_norm", "scale"), "self_attn.q_norm.weight", "H"),
        Entry(("key_norm", "scale"), "self_attn.k_norm.weight", "H"),
    ),
)

# GPT-2: below "h.0."; Conv1D keeps [in, out] where Linear keeps [out, in]; the two foreign arrays
# are the causal mask, which old files hold.
GPT2 = Layout(
    table=(
        Entry(("query", "kernel"), "attn.c_attn.weight[query]", "D (N H)"),
        Entry(("query", "bias"), "attn.c_attn.bias[query]", "(N H)"),
        Entry(("key", "kernel"), "attn.c_attn.weight[key]", "C (K H)"),
        Entry(("key", "bias"), "attn.c_attn.bias[key]", "(K H)"),
        Entry(("value", "kernel"), "attn.c_attn.weight[value]", "M (K V)"),
        Entry(("value", "bias"), "attn.c_attn.bias[value]", "(K V)"),
        Entry(("attention_output", "kernel"), "attn.c_proj.weight", "(N V) E"),
        Entry(("attention_output", "bias"), "attn.c_proj.bias", "E"),
    ),
    owns=("attn.",),
    foreign=("attn.bias", "attn.masked_bias"),
    packed={"attn.c_attn.weight": Packing(1), "attn.c_attn.bias": Packing(0)},
    equal=("K=N", "V=H", "NH=D", "C=D", "M=D", "D=E"),
    whole_biases=True,
)

MODELS = {"bert": BERT, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gpt2": GPT2}

_LINEAR = {
    "query": {"kernel": "(N H) D", "bias": "(N H)"},
    "key": {"kernel": "(K H) C", "bias": "(K H)"},
    "value": {"kernel": "(K V) M", "bias": "(K V)"},
    "gate": {"kernel": "(N V) D", "bias": "(N V)"},
    "attention_output": {"kernel": "E (N V)", "bias": "E"},
}


_BESIDE = (
    "What a call needs is named in `names`, where the config has its place (`qk_norm`, `position`, "
    "`use_sinks`); what is not the attention's, in `ignore`."
)
# What only some layers have: the `weight` of a module, or an array of that name.
EXTRAS = {
    "query_norm": Entry(("query_norm", "scale"), ".weight", "H"),
    "key_norm": Entry(("key_norm", "scale"), ".weight", "H"),
    "relative_bias": Entry(("relative_bias", "embedding"), ".weight", "X N"),
    "sinks": Entry(("sinks", "logits"), "", "N"),
}


def linear_layers(
    names: Mapping[str, str], without_bias: Sequence[str], ignore: Sequence[str]
) -> Layout:
    """The layout of separate `Linear` layers that stand under these names, and of their extras.

    All that stands beside the Linears of query, key, value and gate, in one module with them, is
    the layer's; behind the output's there may be a norm of the block.
    """
    table: list[Entry] = []
    for projection, layer in names.items():
        if projection in EXTRAS:
            place, end, axes = EXTRAS[projection]
            table.append(Entry(place, f"{layer}{end}", axes))
            continue
        bias = None if projection in without_bias else f"{layer}.bias"
        table.append(
            Entry((projection, "kernel"), f"{layer}.weight", _LINEAR[projection]["kernel"])
        )
        table.append(Entry((projection, "bias"), bias, _LINEAR[projection]["bias"]))
    inputs = [layer for projection, layer in names.items() if projection != "attention_output"]
    beside = {layer.rpartition(".")[0] for layer in inputs}
    owns = [f"{module}." if module else "" for module in sorted(beside)]
    owns += [f"{layer}." for layer in names.values()]
    return Layout(tuple(table), owns=tuple(owns), foreign=tuple(ignore), hints={"": _BESIDE})
