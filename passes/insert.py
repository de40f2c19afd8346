"""Put the plan into the graph: detach nodes at the cuts, head branches beside them, what stages compute again, keyed
random numbers.

The result is one runnable graph, forward(*inputs, target, randomness) -> (losses, outputs), in which every node knows
its stage. Its losses are those of the stages; what crosses a detached cut carries no gradient.

    ... h --+-- heads.0(h, target) --> loss 0
            +-- detach --> next stage ...
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from autodecouple.graph import LEAF, Graph, attribute, is_free, module_classes, operations
from autodecouple.passes.capturing.autocast import call_method, called
from autodecouple.passes.capturing.vmaps import BODIES
from autodecouple.plans import Cut, Plan

aten = torch.ops.aten

OURS = "autodecouple"
"""Path of the heads and the criterion in the graph: a model may have `heads` and a `criterion` of its own."""
STAGE = "autodecouple_stage"
"""Key in a node's meta: the index of its stage."""
ROLE = "autodecouple_role"
"""Key in a node's meta: "head" for what belongs to the stage's loss, "target" and "randomness" for the inputs that are
not the model's, else absent."""
ORIGIN = "autodecouple_origin"
"""Key in the meta of a value that was detached, copied or computed again: the name under which the plan knows it."""


def insert_heads(graph: Graph, plan: Plan, heads: Sequence[nn.Module | None], criterion: nn.Module) -> fx.GraphModule:
    """The training graph with the plan in it.

    heads:     one module per hidden stage, None before a coupled cut; forward(*features, *sides, signal, mask=None)
               gives (loss, next signal); an input that it compares with stands before the signal. One that says
               `draws` takes the randomness, too
    criterion: forward(*computed output leaves, target) gives (loss, target)
    """
    work = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    work.graph_copy(graph.train.graph, copies)
    by_name = {old.name: new for old, new in copies.items()}
    _add_output(graph, work, copies)
    stage_of = {name: stage.index for stage in plan.stages for name in stage.nodes}
    for name, index in stage_of.items():
        by_name[name].meta[STAGE] = index
    target, randomness = _add_inputs(work)
    masks = _compute_again(work, plan, by_name)
    losses: list[fx.Node] = []
    signal = target
    for index, cut in enumerate(plan.cuts):
        last = by_name[plan.stages[index].nodes[-1]]
        with work.inserting_before(last.next):
            if heads[index] is not None:
                known = signal if cut.encodes else target
                keyed = randomness if getattr(heads[index], "draws", False) else None
                loss, encoded = _branch(work, index, cut, by_name | masks[index], known, keyed)
                losses.append(loss)
                signal = encoded if cut.encodes else signal
            _cross(work, index, cut, by_name)
    with work.inserting_before(work.output_node()):
        losses.append(_criterion(work, len(plan.cuts), target))
    key_randomness(work, randomness)
    _guard_group_norms(graph, plan, work)
    outputs = work.output_node().args[0]
    work.output_node().args = ((tuple(losses), outputs),)
    root: dict[str, Any] = {str(n.target): attribute(graph.train, n) for n in work.find_nodes(op="get_attr")}
    root |= {f"{OURS}.heads.{index}": head for index, head in enumerate(heads) if head is not None}
    module = fx.GraphModule(root | {f"{OURS}.criterion": criterion}, work, "Decoupled")
    module.graph.lint()
    return module


def _add_output(graph: Graph, work: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
    leaves = tuple(copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in graph.outputs)
    work.output(leaves)


def _add_inputs(work: fx.Graph) -> tuple[fx.Node, fx.Node]:
    """Placeholders for the target and the randomness, after the model's own, which may have the same names."""
    last = list(work.find_nodes(op="placeholder"))[-1]
    added = []
    for name in ("target", "randomness"):
        with work.inserting_after(last):
            last = work.placeholder(name)
        last.target = last.name
        last.meta[ROLE] = name
        added.append(last)
    target, randomness = added
    return target, randomness


def _compute_again(work: fx.Graph, plan: Plan, by_name: dict[str, fx.Node]) -> list[dict[str, fx.Node]]:
    """Let every stage compute what it uses of earlier ones and is not sent; the masks of its cuts, where they are so.

    A stage begins with the copies for its head; all others stand before the first operation that reads them.
    """
    again, masks = _Again(work, plan), list[dict[str, fx.Node]]()
    for index, cut in enumerate(plan.cuts):
        with work.inserting_before(by_name[plan.stages[index].nodes[0]]):
            names = [cut.mask] if cut.mask in cut.recomputed else []
            masks.append({name: again.value(by_name[name], index) for name in names if name is not None})
    nodes = [node for node in work.nodes if node.op == "output" or STAGE in node.meta]
    # From the last stage on: what is copied still reads what it read in the captured graph.
    for node in sorted(nodes, key=again.stage, reverse=True):
        with work.inserting_before(node):
            for source in node.all_input_nodes:
                if (value := again.value(source, again.stage(node))) is not source:
                    node.replace_input_with(source, value)
    return masks


class _Again:
    """The copies of operations that later stages run again, one of each in a stage."""

    def __init__(self, work: fx.Graph, plan: Plan) -> None:
        self.work = work
        self.order = {node: index for index, node in enumerate(work.nodes)}
        self.sent = [set[str](), *({spec.name for spec in cut.crossing} for cut in plan.cuts)]
        self.made: dict[tuple[fx.Node, int], fx.Node] = {}

    def stage(self, node: fx.Node) -> int:
        return int(node.meta.get(STAGE, len(self.sent) - 1))

    def value(self, node: fx.Node, stage: int) -> fx.Node:
        """A value as a stage has it: itself where the stage makes it or is sent it, else computed again."""
        for missing in self._missing(node, stage):
            made = self.work.node_copy(missing, lambda source: self.made.get((source, stage), source))
            made.meta |= {STAGE: stage, ORIGIN: missing.name}
            self.made[missing, stage] = made
        return self.made.get((node, stage), node)

    def _missing(self, node: fx.Node, stage: int) -> list[fx.Node]:
        """What the stage has to run again for a value, in execution order."""
        found: dict[fx.Node, None] = {}
        waiting = [node]
        while waiting:
            now = waiting.pop()
            had = now.meta.get(STAGE, stage) == stage or now.name in self.sent[stage] or (now, stage) in self.made
            if not had and now not in found:
                found[now] = None
                waiting += now.all_input_nodes
        return sorted(found, key=lambda missing: self.order[missing])


def _branch(
    work: fx.Graph,
    index: int,
    cut: Cut,
    by_name: dict[str, fx.Node],
    signal: fx.Node,
    randomness: fx.Node | None,
) -> tuple[fx.Node, fx.Node]:
    """The head beside the cut: (loss, the signal it passes on)."""
    mask = _token_mask(work, index, cut, by_name)
    kwargs: dict[str, Any] = {} if mask is None else {"mask": mask}
    kwargs |= {} if randomness is None else {"randomness": randomness}
    read = [by_name[name] for name in (*cut.features, *cut.sides, *([cut.input] if cut.input is not None else []))]
    head = work.call_module(f"{OURS}.heads.{index}", (*read, signal), kwargs)
    loss = work.call_function(operator.getitem, (head, 0))
    encoded = work.call_function(operator.getitem, (head, 1))
    for node in (head, loss, encoded):
        node.meta |= {STAGE: index, ROLE: "head"}
    loss._rename(f"loss_{index}")
    encoded._rename(f"signal_{index}")
    return loss, encoded


def _token_mask(work: fx.Graph, index: int, cut: Cut, by_name: dict[str, fx.Node]) -> fx.Node | None:
    """The crossing mask as the heads want it: bool (N, T), True where a token counts."""
    if cut.mask is None:
        return None
    flat = work.call_function(aten.flatten.using_ints, (by_name[cut.mask], 1))
    keep = {"additive": aten.ge.Scalar, "keep": aten.ne.Scalar, "ignore": aten.eq.Scalar}[cut.mask_meaning]
    node = work.call_function(keep, (flat, 0))
    for made in (flat, node):
        made.meta[STAGE] = index
    return node


def _cross(work: fx.Graph, index: int, cut: Cut, by_name: dict[str, fx.Node]) -> None:
    """Detach and copy what crosses; the later stages use the result.

    Where a gradient comes back values are copied by the next stage: what it receives is a leaf, which nothing may write
    into. That it comes no further than one stage where a cut overlaps is the stages' doing, not this graph's.
    """
    for spec in cut.crossing:
        coupled = spec.name in cut.carrying and cut.attached
        steps = [aten.detach.default] if spec.name in cut.carrying and not cut.attached else []
        steps += [aten.clone.default] if spec.name in cut.copied else []
        old = by_name[spec.name]
        later = [user for user in old.users if user.op == "output" or user.meta[STAGE] > index]
        for step in steps:
            new = work.call_function(step, (by_name[spec.name],))
            new.meta |= {STAGE: index + coupled, ORIGIN: spec.name}
            by_name[spec.name] = new
        if steps:
            by_name[spec.name]._rename(f"{spec.name}_cut")
            for user in later:
                user.replace_input_with(old, by_name[spec.name])


def _criterion(work: fx.Graph, index: int, signal: fx.Node) -> fx.Node:
    (outputs,) = work.output_node().args
    assert isinstance(outputs, tuple)
    computed = [leaf for leaf in outputs if isinstance(leaf, fx.Node)]  # the criterion knows the constants
    compared = work.call_module(f"{OURS}.criterion", (*computed, signal))
    loss = work.call_function(operator.getitem, (compared, 0))
    for node in (compared, loss):
        node.meta |= {STAGE: index, ROLE: "head"}
    loss._rename(f"loss_{index}")
    return loss


def key_randomness(work: fx.Graph, randomness: fx.Node) -> None:
    """Let every operation that draws random numbers draw keyed ones, and synchronised norms know their replicas."""
    symbols = batch_symbols(work)
    for node in operations(work):
        if is_synced(node):
            call_method(node, "batch_norm", (randomness, *called(node)[1]))
        if not draws(node):
            continue
        operation, args = (node.args[0], node.args[1:]) if LEAF in node.meta else called(node)
        dim = _rows_dim(node, symbols)
        if operation is aten.dropout.default:
            call_method(node, "dropout", (randomness, *args[:2], node.name, *([dim] if dim != 0 else [])))
        elif operation is aten.scaled_dot_product_attention.default:
            call_method(node, "attention", (randomness, node.name, *args))
            node.kwargs = {**node.kwargs, **({"rows": dim} if dim != 0 else {})}
        else:
            method = "seeded" if dim is None else "seeded_rows"
            call_method(node, method, (randomness, operation, node.name, *args))


def is_synced(node: fx.Node) -> bool:
    """Whether an operation is the training forward of a SyncBatchNorm."""
    operation, args = called(node)
    if operation is not aten.batch_norm.default or args[5] is not True:
        return False
    return any(kind == "SyncBatchNorm" for _, kind in module_classes(node)[-1:])


def batch_symbols(work: fx.Graph) -> set[str]:
    """What stands for the number of rows in the shapes of a capture."""
    inputs = [node.meta.get("val") for node in work.find_nodes(op="placeholder")]
    sizes = [value.shape[0] for value in inputs if isinstance(value, torch.Tensor) and value.ndim]
    return set[str]().union(*map(_symbols, sizes))


def _symbols(size: Any) -> set[str]:
    """The free names in a size of the capture."""
    return {str(symbol) for symbol in size.node.expr.free_symbols} if is_free(size) else set()


def _rows_dim(node: fx.Node, symbols: set[str]) -> int | None:
    """The dimension of the batch, alone or folded with others; 0 where the shape is not known, None for none."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not symbols:
        return 0
    return next((dim for dim, size in enumerate(value.shape) if _symbols(size) & symbols), None)


def _guard_group_norms(graph: Graph, plan: Plan, work: fx.Graph) -> None:
    """Hand group norms plain memory where their input needs no gradient: behind a cut, or at the model's input.

    torch 2.13 crashes on a CPU in the backward of one whose input is channels_last and needs none.
    """
    starts = [graph.measures[stage.nodes[0]].position for stage in plan.stages]
    for node in operations(work):
        operation, args = called(node)
        if operation is not aten.group_norm.default or not isinstance(args[0], fx.Node):
            continue
        source = graph.measures[args[0].meta.get(ORIGIN, args[0].name)]
        if source.depends < starts[node.meta[STAGE]]:
            with work.inserting_before(node):
                plain = work.call_function(plain_memory, (args[0],))
            plain.meta[STAGE] = node.meta[STAGE]
            node.replace_input_with(args[0], plain)


def plain_memory(x: torch.Tensor) -> torch.Tensor:
    """On a CPU the same values in memory that is contiguous; elsewhere the tensor itself."""
    return x.contiguous() if x.device.type == "cpu" else x


def draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers with the arguments it has here."""
    if LEAF in node.meta:
        return bool(node.meta[LEAF].sight.draws)
    if BODIES in node.meta:
        return any(draws(inner) for body in node.meta[BODIES] for inner in operations(body.graph))
    operation, args = called(node)
    if not isinstance(operation, torch._ops.OpOverload) or not _is_random(operation):
        return False
    names = [argument.name for argument in operation._schema.arguments]
    defaults = {a.name: a.default_value for a in operation._schema.arguments if a.has_default_value()}
    given = defaults | dict(zip(names, args, strict=False)) | dict(node.kwargs)
    probability = next((given[name] for name in ("p", "dropout", "dropout_p") if name in given), 1.0)
    training = next((given[name] for name in ("train", "training") if name in given), True)
    return probability != 0 and training is not False


@functools.cache
def _is_random(operation: torch._ops.OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in operation.tags


def drawn_in_kernels(graph: fx.Graph) -> list[fx.Node]:
    """Operations that draw from the default generator inside their kernel: one stage at a time may do so."""
    keyed = (aten.dropout.default, aten.scaled_dot_product_attention.default)
    return [node for node in operations(graph) if draws(node) and called(node)[0] not in keyed]
