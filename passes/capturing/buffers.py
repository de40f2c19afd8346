"""Assigned buffers are written where their new value is known, not at the end of the forward.

`self.steps = self.steps + 1` leaves export as an addition and, behind everything else, a copy into the buffer; no cut
could lie between the two.
"""

from __future__ import annotations

import torch
from torch import fx

copy_ = torch.ops.aten.copy_.default


def write_early(module: fx.GraphModule) -> None:
    """Move each copy into a buffer up, to behind its value and the last reader of the buffer."""
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    for node in module.graph.find_nodes(op="call_function", target=copy_):
        buffer, value = node.args[:2]
        if node.users or not isinstance(buffer, fx.Node) or not isinstance(value, fx.Node) or buffer.op != "get_attr":
            continue
        if _is_in_place(value, buffer):
            module.graph.erase_node(node)  # `self.steps += 1` has written it already
            continue
        readers = [user for user in buffer.users if user is not node]
        if any(_may_share(user) for user in readers) or any(_writes(user) for user in (*readers, *value.users, value)):
            continue
        last = max((value, *readers), key=order.__getitem__)
        if last.op not in ("placeholder", "get_attr"):
            last.append(node)
    module.recompile()


def _is_in_place(value: fx.Node, buffer: fx.Node) -> bool:
    """Whether a value is the buffer itself after writes into it."""
    while value is not buffer:
        schema = getattr(value.target, "_schema", None)
        first = schema.arguments[0].alias_info if schema is not None and schema.arguments else None
        if first is None or not first.is_write or not isinstance(value.args[0], fx.Node):
            return False
        value = value.args[0]
    return True


def _may_share(node: fx.Node) -> bool:
    """Whether the result may lie in the memory of an argument, so that its readers read the buffer, too."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _writes(node: fx.Node) -> bool:
    """Whether an operation other than such a copy writes into its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.target is not copy_ and (schema is None or schema.is_mutable) and node.op != "get_attr"
