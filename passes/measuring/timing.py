"""How long blocks and heads take on a real device.

The model runs once from its inputs to its end, block by block, so that every block is timed on values that it would
meet. Of what was computed only that is kept which later blocks use: no activations of the whole model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError
from autodecouple.graph import Graph
from autodecouple.objectives.criterion import Criterion
from autodecouple.objectives.gather import gathered_head
from autodecouple.objectives.heads import full_precision
from autodecouple.objectives.objective import Objective, Signal, input_of, price_key
from autodecouple.passes.codegen import rehome_graph
from autodecouple.passes.measure import HeadCost, head_cost
from autodecouple.passes.measuring import blocks
from autodecouple.passes.measuring.blocks import Block
from autodecouple.passes.measuring.charges import Amount
from autodecouple.passes.measuring.clock import Clock, medians
from autodecouple.passes.measuring.entering import entering, random_like
from autodecouple.passes.verifying.snapshot import preserved, seeded
from autodecouple.plans import TensorSpec
from autodecouple.randomness import Randomness


@dataclasses.dataclass(frozen=True)
class Bench:
    """A device, with the CPU threads that a lane has there."""

    device: torch.device
    num_threads: int

    @contextlib.contextmanager
    def entered(self) -> Iterator[Clock]:
        """Run as a lane would, on random numbers of one's own; threads and random states come back."""
        if self.device.type == "cuda":
            torch.cuda.init()  # else its generators would keep our seed
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(self.num_threads)
            with seeded(), torch.inference_mode(False), torch.enable_grad():
                yield Clock(self.device)
        finally:
            torch.set_num_threads(threads)


def time_nodes(graph: Graph, ends: Sequence[int], bench: Bench, example: Sequence[Any] = ()) -> dict[str, Amount]:
    """Nanoseconds of each block, written to the account of its last node.

    ends:    positions after which a cut is legal: a block lies between two of them
    example: flat inputs, used where they are real; () for random ones
    Of a backward, the gradients of weights and of inputs have shares as their FLOPs, by the thresholds of `Measure`.
    The model, its buffers and gradients, and all random states are as before, when this is done. Raises InputError for
    a model without weights; what the model raises on random inputs says so in a note.
    """
    if any(tensor.is_meta for tensor in (*graph.model.parameters(), *graph.model.buffers())):
        raise InputError('cost="measured" runs the model, but its weights are on the meta device: give it real ones')
    with preserved(graph.model), bench.entered() as clock:
        try:
            return _Walk(graph, bench, clock, example).run(ends)
        except Exception as error:
            error.add_note('cost="measured" ran the model: on random inputs, where it had no real example_inputs')
            raise


class _Walk:
    """One run of the model, block by block."""

    def __init__(self, graph: Graph, bench: Bench, clock: Clock, example: Sequence[Any]) -> None:
        self.graph = graph
        self.device = bench.device
        self.clock = clock
        self.values = entering(graph, bench.device, example)
        positions = {node: position for position, node in enumerate(graph.operations)}
        self.last_use = {n: max((positions.get(u, -1) for u in n.users), default=-1) for n in graph.train.graph.nodes}
        self.known: dict[str, tuple[int, int]] = {}  # by the signature of the block

    def run(self, ends: Sequence[int]) -> dict[str, Amount]:
        overhead = self._overhead()
        amounts: dict[str, Amount] = {}
        for block in blocks.split(self.graph, ends):
            forward, backward = (max(0, a - b) for a, b in zip(self._block(block), overhead, strict=True))
            amounts[block.nodes[-1].name] = forward, apportion(self.graph, block, backward)
        return amounts

    def _overhead(self) -> tuple[int, int]:
        """What a block costs that does nothing: calling it, and starting autograd."""
        work = fx.Graph()
        source = work.placeholder("x")
        work.output((work.call_method("view_as", (source, source)),))
        return self._time(fx.GraphModule(nn.Module(), work), [torch.zeros(1, device=self.device)], [True], [False])

    def _block(self, block: Block) -> tuple[int, int]:
        """Time a block, unless one like it is known, and go on to the next one's inputs."""
        received = [self.values[node] for node in block.inputs]
        key = blocks.signature(self.graph, block, received)
        with on_device(blocks.tensors_of(self.graph, block), self.device):
            module = blocks.assemble(self.graph, block, self.device)
            given = [*received, Randomness(0)] if block.draws else received
            found = self.known.get(key) if key is not None else None
            if found is None:
                carries, writes = blocks.gradient_inputs(self.graph, block), blocks.written_inputs(self.graph, block)
                more = [False] * (len(given) - len(received))
                found = self._time(module, given, [*carries, *more], [*writes, *more])
            free = [_leaf(value, False) for value in given]  # in the same memory: what is written there stays
            self.values |= zip(block.outputs, pytree.tree_map(_free, module.forward(*free)), strict=True)
            rehome_graph(module.graph, self.graph.device)  # of graphs within, which the capture has, too
        if key is not None:
            self.known[key] = found
        self._forget(block)
        return found

    def _forget(self, block: Block) -> None:
        """Drop what nothing behind the block uses."""
        position = self.graph.measures[block.nodes[-1].name].position
        self.values = {node: value for node, value in self.values.items() if self.last_use[node] > position}

    def _time(
        self, module: fx.GraphModule, given: Sequence[Any], carries: Sequence[bool], writes: Sequence[bool]
    ) -> tuple[int, int]:
        """Nanoseconds of forward and backward; the inputs stay as they are."""
        parameters = list(module.parameters())

        def sample() -> tuple[int, ...]:
            leaves = [_leaf(value, needs) for value, needs in zip(given, carries, strict=True)]
            inputs = [leaf.clone() if write else leaf for leaf, write in zip(leaves, writes, strict=True)]
            start = self.clock.mark()
            outputs = module.forward(*inputs)
            stop = self.clock.mark()
            del inputs
            backward = self._backward(outputs)
            for tensor in parameters:
                tensor.grad = None
            return self.clock.between(start, stop), backward

        forward, backward = medians(sample)
        return forward, backward

    def _backward(self, outputs: Any) -> int:
        ends = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if not ends:
            return 0
        gradients = [torch.ones_like(end) for end in ends]
        with full_precision(ends[0]):
            start = self.clock.mark()
            torch.autograd.backward(ends, gradients)
            return self.clock.between(start, self.clock.mark())


def apportion(graph: Graph, block: Block, backward: int) -> tuple[tuple[int, int], ...]:
    """The backward of a block as pairs (threshold, nanoseconds) with shares as the FLOPs have; their sum is exact.

    A block without FLOPs has its backward wherever a gradient comes through it.
    """
    flops: dict[int, int] = {}
    for node in block.nodes:
        for threshold, amount in graph.measures[node.name].backward_flops:
            flops[threshold] = flops.get(threshold, 0) + amount
    if not any(flops.values()):
        flops = {max(graph.measures[node.name].depends for node in block.nodes): 1}
    total, spent, pairs = sum(flops.values()), 0, []
    given = 0
    for threshold, amount in sorted(flops.items(), reverse=True):
        spent += amount
        pairs.append((threshold, backward * spent // total - given))
        given = backward * spent // total
    return tuple(pairs) if backward else ()


class HeadTimes:
    """Nanoseconds of heads, timed when they are first asked for: `HeadPrice`.

    per_byte: of their parameters, what the optimizer takes
    """

    def __init__(self, bench: Bench, per_byte: float = 0.0) -> None:
        self._bench = bench
        self._per_byte = per_byte
        self._known: dict[Any, int] = {}

    def __call__(self, objective: Objective, features: Sequence[TensorSpec], signal: Signal) -> HeadCost:
        counted = head_cost(objective, features, signal)
        key = (price_key(objective), *features, signal)
        if key not in self._known:
            with self._bench.entered() as clock:
                head = gathered_head(objective, features, signal).to(self._bench.device)
                self._known[key] = time_loss(head, features, signal, clock, input_of(objective))
        update = round(counted.parameter_bytes * self._per_byte)
        return dataclasses.replace(counted, flops=self._known[key] + update)


def time_criterion(graph: Graph, bench: Bench) -> int:
    """Nanoseconds of cross-entropy on the logits, 0 where the model has none: the criterion of the last stage."""
    if graph.logits is None or graph.signal.dtype != "int64":
        return 0
    with bench.entered() as clock:
        return time_loss(Criterion(None, pytree.tree_structure(0)), [graph.logits], graph.signal, clock)


def time_loss(
    module: nn.Module,
    features: Sequence[TensorSpec],
    signal: Signal,
    clock: Clock,
    input: TensorSpec | None = None,
) -> int:
    """Nanoseconds of forward and backward of a module (*features, [input,] signal) -> (loss, ...)."""
    read = [random_like(spec).to(clock.device) for spec in features]
    compared = [signal] if input is None else [input, signal]
    given = pytree.tree_map(lambda spec: random_like(spec, spec.num_classes or 2).to(clock.device), compared)

    def sample() -> tuple[int, ...]:
        module.zero_grad(set_to_none=True)
        leaves = [_leaf(value, value.is_floating_point() or value.is_complex()) for value in read]
        start = clock.mark()
        loss = module(*leaves, *given)[0]
        with full_precision(loss):
            loss.backward()
        return (clock.between(start, clock.mark()),)

    return medians(sample)[0]


@contextlib.contextmanager
def on_device(tensors: Sequence[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Let the user's own tensors lie on a device for a while; where that is their own, nothing moves."""
    away = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    try:
        for tensor, data in away:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in away:
            tensor.grad = None  # it lies on the other device
            tensor.data = data


def _free(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _leaf(value: Any, carries: bool) -> Any:
    """The value as a stage receives it: a leaf of autograd where it carries a gradient."""
    return value.detach().requires_grad_(carries) if isinstance(value, torch.Tensor) else value
