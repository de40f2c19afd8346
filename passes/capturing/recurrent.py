"""Recurrent layers: one node while a model is captured, one node per layer afterwards.

torch.export would trace an LSTM's shapes step by step, which takes minutes for long sequences; its result has a known
shape. Within `shape_only()` the recurrent operators give a tensor of that shape and compute nothing.

A layer needs nothing but the sequence of the layer below, so `split_layers()` makes a place to cut between them:

    x -- lstm(4 layers) -- y    becomes    x -- layer 0 -- y0 -- layer 1 -- y1 -- layer 2 -- y2 -- layer 3 -- y
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from autodecouple.graph import is_free

aten = torch.ops.aten
Tensor = torch.Tensor

OPERATORS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
"""The recurrent operators on padded sequences: f(input, state(s), params, *options) -> (output, *final states)."""

_KEYS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)


@contextlib.contextmanager
def shape_only() -> Iterator[None]:
    """Replace the decompositions of the recurrent operators for a while."""
    before = {target: dict(target.py_kernels) for target in OPERATORS}
    try:
        for target in OPERATORS:
            target.py_kernels.update(dict.fromkeys(_KEYS, _KERNELS[target]))
            target._dispatch_cache.clear()
        yield
    finally:
        for target, saved in before.items():
            target.py_kernels.clear()
            target.py_kernels.update(saved)
            target._dispatch_cache.clear()


def _lstm(x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(N, T, I) or (T, N, I) -> the same with I replaced, and the last hidden and cell state."""
    link = _link(*params, *hx, x)
    return _sequence(x, hx[0], options) + link, torch.empty_like(hx[0]) + link, torch.empty_like(hx[1]) + link


def _recurrent(x: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    link = _link(*params, hx, x)
    return _sequence(x, hx, options) + link, torch.empty_like(hx) + link


def _sequence(x: Tensor, hidden: Tensor, options: Sequence[Any]) -> Tensor:
    """options: has_biases, num_layers, dropout, train, bidirectional, batch_first."""
    directions = 2 if options[4] else 1
    return x.new_empty((*x.shape[:-1], directions * hidden.shape[-1]))


def _link(*sources: Tensor) -> Tensor:
    """A zero that needs a gradient if a source does."""
    zero = sources[0].new_zeros(())
    trained = next((source for source in sources if source.requires_grad), None)
    return zero if trained is None else zero + trained.reshape(-1)[:1].sum() * 0


_KERNELS: dict[Any, Callable[..., Any]] = dict.fromkeys(OPERATORS, _recurrent) | {aten.lstm.input: _lstm}


def draws_as_fused(model: torch.nn.Module) -> bool:
    """Whether layers that stand apart draw the dropout masks of the fused kernel, so that a comparison shows the same.

    Those of the CPU do; cuDNN draws inside its kernel.
    """
    return all(parameter.device.type != "cuda" for parameter in model.parameters())


def split_layers(module: fx.GraphModule) -> None:
    """Rewrite, in place, every recurrent node of several layers as one node per layer, with the same result.

    Parameters, gradients and, on the CPU, the masks of the dropout between the layers stay the same to the last bit.
    Of the final states only those layers' are kept that are read: `h_n[-1]` reads the last layer's own. Initial states
    of zeros are made by each layer itself, so that nothing but the sequence crosses a cut between two layers.
    """
    nodes = [node for node in module.graph.nodes if node.target in OPERATORS and _Recurrence.of(node).num_layers > 1]
    with torch.inference_mode(False), torch.enable_grad():
        for node in nodes:
            _split(node)
    if nodes:
        module.graph.lint()
        module.recompile()


@dataclass(frozen=True)
class _Recurrence:
    """The arguments of a recurrent operator; `states` is (h,) or (h, c), each (layers * directions, N, width)."""

    x: fx.Node
    states: tuple[fx.Node, ...]
    params: tuple[fx.Node, ...]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @staticmethod
    def of(node: fx.Node) -> _Recurrence:
        x, states, params, *options = node.args
        states = (states,) if isinstance(states, fx.Node) else tuple(states)  # type: ignore[arg-type]
        return _Recurrence(x, states, tuple(params), *options)  # type: ignore[arg-type]

    @property
    def num_rows(self) -> int:
        """Rows that a layer has in a state: one per direction."""
        return 2 if self.bidirectional else 1

    def layer_params(self, layer: int) -> list[fx.Node]:
        count = len(self.params) // self.num_layers
        return list(self.params[layer * count : (layer + 1) * count])


def _split(node: fx.Node) -> None:
    """Write the layers in front of the node and let its users read them."""
    whole, write = _Recurrence.of(node), _Writer(node)
    items = list(node.users)
    finals = [item for item in items if item.args[1:] != (0,) and item.users]
    kept = {item: _layers_read(item, whole) for item in finals}
    gathered: dict[fx.Node, fx.Node] = {}
    x = whole.x
    for layer in range(whole.num_layers):
        if layer and whole.dropout:
            x = _dropout(write, x, whole, f"{node.name}_layer{layer}")
        run = _layer(write, x, whole, layer)
        x = write(f"{run.name}_output", operator.getitem, run, 0)
        for item in finals:
            if layer in kept[item]:
                gathered[item] = _gather(write, gathered.get(item), run, item)
    for item in finals:
        _read_gathered(item, gathered[item], kept[item], whole)
    for item in items:
        item.replace_all_uses_with(x)  # the output: nothing reads the final states here any more
    for dead in (*items, node, *([] if x.users else [x])):
        node.graph.erase_node(dead)
    for state in dict.fromkeys(whole.states):
        _drop(state)


def _layer(write: _Writer, x: fx.Node, whole: _Recurrence, layer: int) -> fx.Node:
    target, name = write.node.target, f"{write.node.name}_layer{layer}"
    hx = _initial_states(write, x, whole, layer)
    options = (whole.has_biases, 1, 0.0, whole.train, whole.bidirectional, whole.batch_first)
    return write(name, target, x, hx if target is aten.lstm.input else hx[0], whole.layer_params(layer), *options)


def _dropout(write: _Writer, x: fx.Node, whole: _Recurrence, name: str) -> fx.Node:
    """Dropout over (T, N, width), as the kernels lay a sequence out: their masks come out the same."""
    if whole.batch_first:
        x = write(f"{name}_swapped", aten.transpose.int, x, 0, 1)
    x = write(f"{name}_dropout", aten.dropout.default, x, whole.dropout, whole.train)
    return write(f"{name}_input", aten.transpose.int, x, 0, 1) if whole.batch_first else x


def _initial_states(write: _Writer, x: fx.Node, whole: _Recurrence, layer: int) -> list[fx.Node]:
    """A layer's share of the initial states: zeros of its own, or its rows of what is given."""
    name, first, last = f"{write.node.name}_layer{layer}", layer * whole.num_rows, (layer + 1) * whole.num_rows
    batch: fx.Node | int | None = None
    states = []
    for letter, state in zip("hc", whole.states, strict=False):
        if _is_zeros(state):
            batch = _batch_size(write, x, whole, f"{name}_batch") if batch is None else batch
            sizes = [whole.num_rows, batch, int(state.meta["val"].shape[-1])]
            states.append(write(f"{name}_{letter}0", aten.new_zeros.default, x, sizes))
        else:
            states.append(write(f"{name}_{letter}0", aten.slice.Tensor, state, 0, first, last))
    return states


def _batch_size(write: _Writer, x: fx.Node, whole: _Recurrence, name: str) -> fx.Node | int:
    dim = 0 if whole.batch_first else 1
    size = x.meta["val"].shape[dim]
    return write(name, aten.sym_size.int, x, dim) if is_free(size) else int(size)


_ZEROS = (aten.zeros, aten.new_zeros, aten.zeros_like)
_COPIES = (aten.detach, aten.alias, aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.expand, aten.repeat)
_CHECK = aten._assert_tensor_metadata.default


def _is_zeros(state: fx.Node) -> bool:
    """Whether the node gives zeros that nothing but recurrent layers read, so that nothing can have written there."""
    readers: tuple[Any, ...] = OPERATORS
    while all(user.target in readers or user.target is _CHECK for user in state.users):
        packet = getattr(state.target, "overloadpacket", None)
        if packet not in _COPIES:
            return packet in _ZEROS
        readers, state = (state.target,), state.all_input_nodes[0]
    return False


def _drop(node: fx.Node) -> None:
    """Erase what made an initial state and is not read any more."""
    checks = [user for user in node.users if user.target is _CHECK]
    packet = getattr(node.target, "overloadpacket", None)
    if len(checks) < len(node.users) or packet not in (*_ZEROS, *_COPIES, aten.sym_size):
        return
    sources = node.all_input_nodes
    for dead in (*checks, node):
        node.graph.erase_node(dead)
    for source in sources:
        _drop(source)


def _gather(write: _Writer, before: fx.Node | None, run: fx.Node, item: fx.Node) -> fx.Node:
    """The final state of a layer behind those of the layers before it, of which `item` takes h or c.

    Joined layer by layer: one tensor crosses a cut here, however many layers lie before it.
    """
    index = item.args[1]
    assert isinstance(index, int)
    state = write(f"{run.name}_{'_hc'[index]}", operator.getitem, run, index)
    return state if before is None else write(f"{state.name}_joined", aten.cat.default, [before, state])


def _layers_read(item: fx.Node, whole: _Recurrence) -> list[int]:
    """The layers whose final state is read: those of constant rows, or all."""
    rows = [_rows_read(user, whole.num_layers * whole.num_rows) for user in item.users]
    if not all(rows):
        return list(range(whole.num_layers))
    return sorted({row // whole.num_rows for taken in rows for row in taken})


def _rows_read(user: fx.Node, num_rows: int) -> range:
    """The rows of a state that a constant `select` or `slice` takes; empty for any other use."""
    arguments: list[Any] = [*user.args[1:], None, None, None, None]
    dim, start, stop, step = arguments[:4]
    if user.target not in (aten.select.int, aten.slice.Tensor) or dim not in (0, -3) or step not in (None, 1):
        return range(0)
    if isinstance(start, fx.Node) or isinstance(stop, fx.Node):
        return range(0)
    rows = range(num_rows)
    return rows[start:stop] if user.target is aten.slice.Tensor else range(rows[start], rows[start] + 1)


def _read_gathered(item: fx.Node, gathered: fx.Node, layers: list[int], whole: _Recurrence) -> None:
    """Let the users of a final state read the layers that were kept, at the rows where these now lie."""
    kept = [layer * whole.num_rows + row for layer in layers for row in range(whole.num_rows)]
    if len(layers) < whole.num_layers:
        for user in list(item.users):
            rows = _rows_read(user, whole.num_layers * whole.num_rows)
            first, last = kept.index(rows[0]), kept.index(rows[-1])
            user.args = (item, 0, first) if user.target is aten.select.int else (item, 0, first, last + 1)
    item.replace_all_uses_with(gathered)


class _Writer:
    """Writes operations in front of a node; they get its place in the user's code, and fake values of their own."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.mode = _Recurrence.of(node).x.meta["val"].fake_mode

    def __call__(self, name: str, target: Any, *args: Any) -> fx.Node:
        graph = self.node.graph
        with graph.inserting_before(self.node):
            new = graph.create_node("call_function", target, args, name=name)
        new.meta = {key: self.node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in self.node.meta}
        new.meta["val"] = self._value(target, fx.node.map_arg(args, lambda node: node.meta["val"]))
        return new

    def _value(self, target: Any, args: Any) -> Any:
        """A fake result; cut off from autograd's graph, as those of the capture are."""
        with self.mode:
            value = _KERNELS.get(target, target)(*args)
            return pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), value)
