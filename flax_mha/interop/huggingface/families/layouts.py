"""Layouts of attention modules: names below the module's path."""

from collections.abc import Iterable, Mapping

from flax_mha.interop.layout import Entry
from flax_mha.interop.torch.models import Layout, Packing

_LINEAR = {
    "query": ("(N H) D", "(N H)"),
    "key": ("(K H) C", "(K H)"),
    "value": ("(K V) M", "(K V)"),
    "gate": ("(N V) D", "(N V)"),
    "attention_output": ("E (N V)", "E"),
}
PARTS = ("query", "key", "value", "attention_output")
SELF = ("V=H", "C=D", "M=D", "D=E")  # self-attention between residuals
CROSS = ("V=H", "C=M", "D=E")  # keys and values of another sequence


def linear(
    names: Mapping[str, str], *extras: Entry, foreign: Iterable[str] = (), equal: tuple = SELF
) -> Layout:
    """Separate Linears, the module's own; all else in the module is an extra or foreign."""
    table = [
        Entry((part, leaf), f"{name}.{end}", axes)
        for part, name in names.items()
        for leaf, end, axes in zip(("kernel", "bias"), ("weight", "bias"), _LINEAR[part])
    ]
    return Layout((*table, *extras), owns=("",), foreign=tuple(foreign), equal=equal)


def named(*names: str) -> dict[str, str]:
    """The Linears of query, key, value and output."""
    return dict(zip(PARTS, names, strict=True))


def fused(
    name: str,
    output: str,
    *extras: Entry,
    within: str | None = None,
    transposed: bool = False,
    foreign: Iterable[str] = (),
) -> Layout:
    """Query, key and value in one Linear, or in one Conv1D, which keeps [in, out]."""
    table: list[Entry] = []
    for part in PARTS[:3]:
        kernel, bias = _LINEAR[part]
        table.append(Entry((part, "kernel"), f"{name}.weight[{part}]", _turned(kernel, transposed)))
        table.append(Entry((part, "bias"), f"{name}.bias[{part}]", bias))
    kernel, bias = _LINEAR["attention_output"]
    table.append(
        Entry(("attention_output", "kernel"), f"{output}.weight", _turned(kernel, transposed))
    )
    table.append(Entry(("attention_output", "bias"), f"{output}.bias", bias))
    packed = {
        f"{name}.weight": Packing(int(transposed), within),
        f"{name}.bias": Packing(0, within),
    }
    return Layout((*table, *extras), owns=("",), foreign=tuple(foreign), packed=packed, equal=SELF)


def _turned(axes: str, transposed: bool) -> str:
    """`"(N H) D"` to `"D (N H)"`."""
    if not transposed:
        return axes
    return " ".join(reversed(axes.replace(") ", ")|").replace(" (", "|(").split("|")))


def norms(query: str, key: str, axes: tuple[str, str] = ("H", "H")) -> tuple[Entry, Entry]:
    """The scales of the norms of queries and keys."""
    return (
        Entry(("query_norm", "scale"), f"{query}.weight", axes[0]),
        Entry(("key_norm", "scale"), f"{key}.weight", axes[1]),
    )


def norm_biases(query: str, key: str) -> tuple[Entry, Entry]:
    """Their biases, where a LayerNorm has them."""
    return (
        Entry(("query_norm", "bias"), f"{query}.bias", "H"),
        Entry(("key_norm", "bias"), f"{key}.bias", "H"),
    )


def table(name: str) -> Entry:
    """A table of distances."""
    return Entry(("relative_bias", "embedding"), name, "X N")


def sinks(name: str) -> Entry:
    return Entry(("sinks", "logits"), name, "N")


def gated(names: Mapping[str, str], *extras: Entry) -> Layout:
    """Separate Linears, but each head's query and gate stand in that of the query."""
    plain = linear(names, *extras, foreign=OLD_ROPE)
    query = names["query"]
    rest = [entry for entry in plain.table if entry.place[0] != "query"]
    both = [
        Entry((part, leaf), f"{query}.{end}[{part}]", axes)
        for leaf, end, number in (("kernel", "weight", 0), ("bias", "bias", 1))
        for part, axes in ((part, _LINEAR[part][number]) for part in ("query", "gate"))
    ]
    packed = {f"{query}.{end}": Packing(0, "N") for end in ("weight", "bias")}
    return plain._replace(table=(*both, *rest), packed=packed)


OLD_ROPE = ("rotary_emb.inv_freq",)  # a table, which files of older versions hold
LLAMA = named("q_proj", "k_proj", "v_proj", "o_proj")
OUT = named("q_proj", "k_proj", "v_proj", "out_proj")
