"""config.json of a `.keras` archive: which entry describes which group of the weights.

Keras names a group by the snake-cased class of its layer, numbered within the list that holds it
(`layers/multi_head_attention_1`), and config.json has the lists of functional and sequential
models in the same order. In older files only that tells the user's names.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MHA, GQA = "MultiHeadAttention", "GroupQueryAttention"
# The second layer's class, by which Keras names its groups, is not called as it is exported.
CLASSES = {MHA: MHA, GQA: GQA, "GroupedQueryAttention": GQA}
Entry = Mapping[str, Any]


def described_layers(config: Entry | None, groups: Iterable[str]) -> dict[str, Entry]:
    """config.json's entry of every group whose path its lists of layers fix; the model's is ""."""
    groups = set(groups)
    found: dict[str, Entry] = {}
    pending = [] if config is None else [("", config)]
    while pending:
        path, entry = pending.pop()
        found[path] = entry
        inner = entry.get("config")
        if isinstance(inner, Mapping):
            inside = ((f"{path}/{name}".lstrip("/"), child) for name, child in _inside(inner))
            pending += [(path, child) for path, child in inside if path in groups]
    return found


def _inside(config: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    """The layers in a model's list, under Keras's group names; the one in a wrapper or a task."""
    counts: dict[str, int] = {}
    layers = config.get("layers")
    for entry in layers if isinstance(layers, list) else []:
        if _is_layer(entry):
            class_name = entry["class_name"]
            name = _snake_case("GroupedQueryAttention" if class_name == GQA else class_name)
            counts[name] = counts.get(name, -1) + 1
            yield f"layers/{name}" + (f"_{counts[name]}" if counts[name] else ""), entry
    if _is_layer(config.get("layer")):
        yield "layer", config["layer"]
    if _is_layer(config.get("backbone")):  # of KerasHub's tasks: a classifier, a language model
        yield f"layers/{_snake_case(config['backbone']['class_name'])}", config["backbone"]


def _is_layer(entry: Any) -> bool:
    """A functional model's operations (`x + y`) pass too; no layer with weights is called so."""
    return isinstance(entry, Mapping) and isinstance(entry.get("class_name"), str)


def _snake_case(name: str) -> str:
    """As Keras writes a class's name: Conv2DTranspose is conv2_d_transpose."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def name_of(entry: Entry) -> str | None:
    inner = entry.get("config")
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def entry_by_name(root: Entry, name: str, class_name: str) -> Entry | None:
    """The one entry of that name and class in `root`, its own list of layers left out."""
    inner = root.get("config")
    listed = {id(child) for _, child in _inside(inner)} if isinstance(inner, Mapping) else set()
    pending, found = [inner], []
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending += item
        elif isinstance(item, Mapping) and id(item) not in listed:
            pending += item.values()
            found += [item] if name_of(item) == name and kind(item) == class_name else []
    return found[0] if len(found) == 1 else None


def registered(entry: Entry) -> str | None:
    """The name under which KerasHub registers the entry's class; None of another's class."""
    name = entry.get("registered_name")
    package, _, name = name.partition(">") if isinstance(name, str) else ("", "", "")
    return name if package == "keras_hub" else None


def nearest(path: str, described: Mapping[str, Any]) -> str:
    """The longest described path above this one."""
    while (path := path.rpartition("/")[0]) not in described:
        pass
    return path


def kind(entry: Entry) -> str | None:
    """Which of Keras's two layers it is; None for a class of somebody's own, of any name."""
    class_name, module = entry.get("class_name"), entry.get("module")
    if entry.get("registered_name") not in (None, class_name) or not isinstance(module, str):
        return None
    return CLASSES.get(str(class_name)) if module.split(".")[0] == "keras" else None
