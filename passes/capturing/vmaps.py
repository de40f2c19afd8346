"""What runs under `torch.vmap` stays whole: one call of a graph of its own.

torch.export writes a vmap down as operations that enter and leave a level of batching, and between them operations on
tensors that mean nothing outside it, nor on another thread.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

BODIES = "autodecouple_bodies"
"""Key in the meta of a node that calls graphs of its own (vmap, `torch.cond`): those fx.GraphModules."""


def call_whole(body: Callable[..., Any], /, *args: Any) -> Any:
    """Call what stays in one piece: no cut lies within."""
    return body(*args)


def fold_vmaps(module: fx.GraphModule) -> None:
    """Let each vmap of an exported graph, with all that is within it, be one node that calls `call_whole`."""
    for span in list(_vmaps(module.graph)):
        _fold(module, span)


def _vmaps(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The operations of each outermost vmap, with those that enter and leave it."""
    span: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        step = _step(node)
        if node.op == "call_function" and (span or step is not None):
            span.append(node)
        depth += step or 0
        if step == -1 and depth == 0:
            yield span
            span = []


def _step(node: fx.Node) -> int | None:
    """How an operation of functorch changes the level: 1, 0 or -1; None for any other operation."""
    if getattr(node.target, "__module__", "") != "torch._functorch.predispatch":
        return None
    name = str(getattr(node.target, "__name__", ""))
    return ("increment" in name or "enter" in name) - ("decrement" in name or "exit" in name)


def _fold(module: fx.GraphModule, span: list[fx.Node]) -> None:
    inside = set(span)
    operands = dict.fromkeys(source for node in span for source in node.all_input_nodes if source not in inside)
    results = [node for node in span if any(user not in inside for user in node.users)]
    body = _body(span, list(operands), results)
    graph = module.graph
    with graph.inserting_after(span[-1]):
        attr = graph.create_node("get_attr", "", name="vmap_body")
    attr.target = attr.name
    setattr(module, attr.name, body)
    with graph.inserting_after(attr):
        call = graph.create_node("call_function", call_whole, (attr, *operands), name="vmap")
    call.meta = {key: results[-1].meta[key] for key in ("nn_module_stack", "stack_trace") if key in results[-1].meta}
    call.meta |= {BODIES: (body,), "val": tuple(node.meta.get("val") for node in results)}
    _replace(results, call)
    for node in reversed(span):
        graph.erase_node(node)


def _body(span: list[fx.Node], operands: list[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {operand: graph.placeholder(operand.name) for operand in operands}
    for node in span:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(nn.Module(), graph, "Vmap")


def _replace(results: list[fx.Node], call: fx.Node) -> None:
    """Let what used the results use the items of the call."""
    last = call
    for index, node in enumerate(results):
        with call.graph.inserting_after(last):
            last = call.graph.call_function(operator.getitem, (call, index))
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
