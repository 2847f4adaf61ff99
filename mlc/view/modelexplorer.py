"""Stage graphs in the JSON of Google's Model Explorer: one graph per scene, groups as namespaces.

``mlc.draw(plan, "x.graph.json")`` writes it; open the file there (``model-explorer x.graph.json``).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

__all__ = ["graphs_of"]


def graphs_of(data: dict[str, Any]) -> dict[str, Any]:
    """The page's data (:func:`mlc.view.page.content.content`) as a graph collection."""
    graphs = [{"id": s["key"], "nodes": _nodes(s, data), "groupNodeAttributes": _notes(s)} for s in data["scenes"]]
    return {"label": data["title"], "graphs": graphs}


def _nodes(scene: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
    columns, text = scene["columns"], data["strings"]
    spaces = _namespaces(scene["groups"])
    sources: dict[int, list[int]] = defaultdict(list)
    for a, b in zip(scene["edges"][::2], scene["edges"][1::2], strict=True):
        sources[b].append(a)
    out = []
    for i, op in enumerate(columns["op"]):
        edges = [{"sourceNodeId": str(a), "sourceNodeOutputId": "0", "targetNodeInputId": str(k)}
                 for k, a in enumerate(sources[i])]  # fmt: skip
        shape = [{"key": "tensor_shape", "value": text[columns["out"][i]]}]
        out.append({
            "id": str(i), "label": text[op], "namespace": spaces[columns["group"][i]],
            "attrs": [{"key": k, "value": v} for k, v in _attributes(columns, i, data)],
            "incomingEdges": edges, "outputsMetadata": [{"id": "0", "attrs": shape}],
        })  # fmt: skip
    return out


def _notes(scene: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What is known of groups, by their namespaces."""
    named = zip(_namespaces(scene["groups"]), scene["groups"], strict=True)
    return {name: {"note": tip} for name, (_, _, _, tip) in named if tip}


def _namespaces(groups: list[tuple[int, str, str, str]]) -> list[str]:
    """``L0/L1/loss``; a group comes after the one it is in."""
    out: list[str] = []
    for parent, title, _, _ in groups:
        name = title.replace("/", "∕")
        out.append(f"{out[parent]}/{name}" if parent >= 0 else name)
    return out


def _attributes(columns: dict[str, list[Any]], i: int, data: dict[str, Any]) -> list[tuple[str, str]]:
    found = [
        ("bytes", str(columns["bytes"][i])),
        ("flops", str(columns["flops"][i])),
        ("runs", str(columns["times"][i])),
    ]
    if columns["fate"][i] >= 0:
        found.append(("memory", data["fates"][columns["fate"][i]][1]))
    if columns["loc"][i] >= 0:
        file, line, _, source = data["locs"][columns["loc"][i]]
        found += [("line", f"{file}:{line}"), ("source", source)]
    return found
