"""Exits: what each of them answers, inference that ends early row by row, and which stages have one."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from graph_strategies import Program, leaves, programs, trains
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stage_builder import build
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from training_tools import compiled, make_batches, sgd

import autodecouple
from autodecouple.decoupled import Decoupled
from autodecouple.errors import InputError, PartitionError, TraceError
from autodecouple.exits import Adaptive, _Chooser
from autodecouple.objectives import Associated, DeInfoReg, EarlyExit
from autodecouple.passes.divide import divide, output_values
from autodecouple.walk import Walk

torch.set_num_threads(1)

CUT_AT = ("1", "3", "4")
EXITING: list[Any] = [
    EarlyExit(hidden=6),
    *(DeInfoReg(ce=ce, alpha=0.5, projector="mlp", widths=(8, 6)) for ce in ("merge", "unmerge", "paper")),
    DeInfoReg(alpha=0.5, projector="identity", batch_norm=False),
]


# ---------------------------------------------------------------- the pieces


CASES: dict[str, Any] = {"program": programs(), "n_stages": st.integers(2, 4), "rows": st.integers(2, 5)}
CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@pytest.mark.timeout(120)
@settings(max_examples=6, deadline=None, suppress_health_check=CHECKS)
@given(**CASES)
def test_the_pieces_are_the_model_in_evaluation_mode(**case: Any) -> None:
    """Law 1 of the evaluation mode: whatever the cuts, the same outputs to the last bit."""
    check_pieces(**case)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=80, deadline=None, suppress_health_check=CHECKS)
@given(**CASES)
def test_the_pieces_are_the_model_at_length(**case: Any) -> None:
    """The same on more models."""
    check_pieces(**case)


def check_pieces(program: Program, n_stages: int, rows: int) -> None:
    assume(trains(program))
    model = program.model()
    try:
        built = build(model, program.inputs(), n_stages)
    except (TraceError, PartitionError, InputError):
        assume(False)
    pieces = divide(built.graph, built.plan)
    assume(pieces is not None)
    names = [node.name for node in built.graph.evaluation.graph.find_nodes(op="placeholder")]  # type: ignore[union-attr]
    values = built.values(program.inputs(rows))
    values = dict(zip(names, values.values(), strict=True))
    with torch.no_grad():
        for piece in pieces:  # type: ignore[union-attr]
            made = piece.body(rows, *(values[name] for name in piece.inputs))
            values |= zip(piece.outputs, made, strict=True)
            values = {name: values[name] for name in piece.sends}
        found = [values[x.name] if isinstance(x, fx.Node) else x for x in output_values(built.graph)]
        output = pytree.tree_unflatten(found, built.graph.evaluation_spec)
        expected = program.call(copy.deepcopy(model).eval(), rows)
    for a, b in zip(leaves(output), leaves(expected), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- one exit, all of them, their mean


def trained(loss: Any, **options: Any) -> tuple[Decoupled, Tensor]:
    """Four stages after a few batches, and inputs that no batch had."""
    decoupled = compiled("dropout", 4, loss, cut_at=CUT_AT, optimizer=sgd, **options)
    for x, y in make_batches("dropout", [8, 8, 8]):
        decoupled.train_step(x, y)
    decoupled.synchronize()
    return decoupled, make_batches("dropout", [9], seed=11)[0][0]


def classifier_by_hand(head: Any, h: Tensor) -> Tensor:
    """The classifier's own layers, the projector's before them where it has one."""
    pooled = head.rows.pool(h)
    if hasattr(head, "projector") and head.objective.ce != "unmerge":
        pooled = head.projector(pooled)
    scores: Tensor = head.classifier(pooled)
    return scores


def exits_by_hand(decoupled: Decoupled, x: Tensor) -> list[Tensor]:
    """With the user's own children, and copies of the heads, in evaluation mode."""
    heads = [copy.deepcopy(stage.code.head).eval() for stage in decoupled.stages[:-1]]  # type: ignore[union-attr]
    h, found = x, []
    with torch.no_grad():
        for name, child in copy.deepcopy(decoupled.model).eval().named_children():
            h = child(h)
            if name in CUT_AT:
                found.append(classifier_by_hand(heads[len(found)], h))
    return [*found, h]


@pytest.mark.parametrize("loss", EXITING, ids=repr)
def test_every_exit_is_its_classifier_on_the_evaluated_stages(loss: Any) -> None:
    """Dropout off, running statistics of BatchNorm in stages and heads; afterwards the heads train on as before."""
    decoupled, x = trained(loss)
    with decoupled:
        modes = [m.training for stage in decoupled.stages for m in stage.code.head.modules()]  # type: ignore[union-attr]
        expected, found = exits_by_hand(decoupled, x), decoupled.exits.all(x)
        assert tuple(found) == decoupled.exits.stages == (0, 1, 2, 3)
        for stage, scores in found.items():
            assert torch.equal(scores, expected[stage]), stage
            assert torch.equal(decoupled.exits.predict(x, stage), scores) and not scores.requires_grad
        assert torch.equal(found[3], decoupled(x))
        assert modes == [m.training for stage in decoupled.stages for m in stage.code.head.modules()]  # type: ignore[union-attr]


def test_an_exit_computes_its_stages_only() -> None:
    decoupled, x = trained("early_exit")
    with decoupled, mock.patch.object(Walk, "advance", autospec=True, side_effect=Walk.advance) as advance:
        decoupled.exits.predict(x, 1)
        assert advance.call_count == 2


def test_exits_see_all_batches_so_far() -> None:
    """One that was asked for early reads the weights of now, not of then."""
    decoupled, x = trained("early_exit")
    with decoupled:
        exits = decoupled.exits
        before = exits.predict(x, 0)
        ((more, y),) = make_batches("dropout", [8], seed=4)
        decoupled.train_step(more, y)
        after = exits.predict(x, 0)
        assert not torch.equal(before, after) and torch.equal(after, exits_by_hand(decoupled, x)[0])


@pytest.mark.timeout(60)
def test_exits_know_what_was_trained_in_other_processes_and_outlive_the_workers() -> None:
    """Stages and heads are trained in forked workers; after `close` inference goes on."""
    decoupled, x = trained("early_exit", executor="processes")
    found = decoupled.exits.all(x)
    decoupled.close()
    again, _ = trained("early_exit", executor="inline")  # the same model, which begins anew
    with again:
        for stage, scores in again.exits.all(x).items():
            assert torch.equal(scores, found[stage]), stage
            assert torch.equal(decoupled.exits.predict(x, stage), scores)


def test_the_ensemble_is_the_mean_of_the_probabilities() -> None:
    decoupled, x = trained("early_exit")
    with decoupled:
        probabilities = [scores.softmax(1) for scores in exits_by_hand(decoupled, x)]
        mean = sum(probabilities[1:], probabilities[0]) / 4
        torch.testing.assert_close(decoupled.exits.ensemble(x).exp(), mean)
        pair = (probabilities[1] + probabilities[3]) / 2
        torch.testing.assert_close(decoupled.exits.ensemble(x, [1, 3]).exp(), pair)


# ---------------------------------------------------------------- adaptive inference


def alone(scores: list[Tensor], threshold: float, patience: int) -> tuple[int, Tensor]:
    """One row through the exits (C,), in plain Python: where it leaves, with what."""
    agreed = 0
    for stage in range(1, len(scores)):
        a, b = scores[stage - 1], scores[stage]
        length = float(a.norm() * b.norm())
        same = int(a.argmax()) == int(b.argmax()) and float(a @ b) > threshold * max(length, 1e-8)
        agreed = agreed + 1 if same else 0
        if agreed >= patience:
            return stage, b
    return len(scores) - 1, scores[-1]


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 6),
    num_exits=st.integers(1, 7),
    patience=st.integers(1, 3),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.79]),
    stays=st.lists(st.booleans(), min_size=7, max_size=7),
    seed=st.integers(0, 2**16),
)
def test_every_row_leaves_as_if_it_were_alone(
    rows: int, num_exits: int, patience: int, threshold: float, stays: list[bool], seed: int
) -> None:
    """For any scores, and whether rows that are done leave the batch at an exit or stay in it."""
    generator = torch.Generator().manual_seed(seed)
    scores = list(torch.randint(0, 4, (num_exits, rows, 2), generator=generator).double())
    chooser, present = _Chooser(rows, threshold, patience), torch.arange(rows)
    for stage, given_scores in enumerate(scores):
        chooser.see(stage, given_scores[present], is_last=stage == num_exits - 1)
        if chooser.is_done:
            break
        if not stays[stage]:
            present = present[chooser.stay()]
    found = chooser.result()
    for row in range(rows):
        stage, expected = alone([each[row] for each in scores], threshold, patience)
        assert int(found.stages[row]) == stage and torch.equal(found.scores[row], expected)


@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("loss", ["early_exit", "associated", ["early_exit", "supcon", "deinforeg"]])
def test_a_batch_gives_what_its_rows_give(loss: Any, patience: int) -> None:
    """The released rule holds for one row only; here each row has its own exit, and the scores of that exit."""
    decoupled, x = trained(loss)
    with decoupled:
        whole: Adaptive = decoupled.exits.adaptive(x, patience=patience)
        everything = list(decoupled.exits.all(x).items())
        for row in range(len(x)):
            single = decoupled.exits.adaptive(x[row : row + 1], patience=patience)
            at, expected = alone([scores[row] for _, scores in everything], 0.8, patience)
            assert whole.stages[row] == single.stages[0] == everything[at][0]
            torch.testing.assert_close(whole.scores[row], expected)
            torch.testing.assert_close(single.scores[0], expected)


def test_rows_that_are_done_are_not_computed_on() -> None:
    """At a threshold that half of the rows pass, the third stage sees the others only; at -1 and one class none."""
    decoupled, x = trained("early_exit")
    with decoupled:
        for seen_before, _ in make_batches("dropout", [8] * 12):  # one class alone: all exits come to answer it
            decoupled.train_step(seen_before, torch.ones(8, dtype=torch.int64))
        everything = decoupled.exits.all(x)
        agree = everything[0].argmax(1) == everything[1].argmax(1)
        cosines = F.cosine_similarity(everything[0], everything[1])[agree].sort().values
        threshold = float(cosines[len(cosines) // 2])
        seen: list[int] = []
        advance = Walk.advance

        def spy(walk: Walk) -> None:
            advance(walk)
            seen.append(walk.num_rows)
            assert all(walk.values[name].shape[0] == walk.num_rows for name in walk.piece.outputs)

        with mock.patch.object(Walk, "advance", spy):
            found = decoupled.exits.adaptive(x, threshold=threshold)
        left = int((found.stages == 1).sum())
        assert 0 < left < len(x) and seen[:3] == [len(x), len(x), len(x) - left]


class Flattened(nn.Module):
    """Beside what heads read, a value crosses all cuts in which three rows lie for each of the batch's, (N * 3, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.classify = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        flat = self.first(x.reshape(rows * 3, 4)).tanh()
        h = flat.reshape(rows, 12)
        for block in self.blocks:
            h = block(h).tanh()
        y: Tensor = self.classify(flat + h.reshape(rows * 3, 4)).reshape(rows, 3)
        return y


class Sized(nn.Module):
    """Uses the batch's size, which it asked for at its beginning, behind every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.classify = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        double = rows * 2
        h = x.reshape(rows, 12)
        for block in self.blocks:
            h = block(h).reshape(double, 6).tanh().reshape(rows, 12)
        y: Tensor = self.classify(h)
        return y


@pytest.mark.parametrize(("kind", "may_leave"), [(Sized, True), (Flattened, False)])
def test_sizes_follow_the_rows_that_are_left(kind: type[nn.Module], may_leave: bool) -> None:
    """A size from the model's beginning is that of the rows which are still there; where no rows can be told apart,
    all stay, with the same answers."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 4), torch.arange(8) % 3
    options: dict[str, Any] = {"example_inputs": (x,), "devices": ["cpu"]}
    with autodecouple.compile(kind(), 3, "early_exit", **options) as decoupled:
        assert [piece.rows_may_leave for piece in decoupled._pieces or ()] == [may_leave, may_leave, True]
        for _ in range(3):
            decoupled.train_step(x, y)
        whole = decoupled.exits.adaptive(x, threshold=0.0)
        assert len(set(whole.stages.tolist())) > 1
        everything = decoupled.exits.all(x)
        torch.testing.assert_close(everything[2], decoupled(x))
        for row in range(8):
            at, expected = alone([scores[row] for scores in everything.values()], 0.0, 1)
            assert whole.stages[row] == at
            torch.testing.assert_close(whole.scores[row], expected)


# ---------------------------------------------------------------- masks, positions, several devices' worth of detail


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.classify = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        y: Tensor = self.classify(h[:, 0])
        return y


def test_padding_does_not_count_at_an_exit() -> None:
    """The mask that crosses is the head's: the features of padded tokens do not matter."""
    torch.manual_seed(0)
    x, y = torch.randint(1, 9, (6, 5)), torch.arange(6) % 3
    x[::2, 3:] = 0
    options: dict[str, Any] = {"example_inputs": (x,), "devices": ["cpu"], "cut_at": ["encoder.layers.0"]}
    with autodecouple.compile(Masked(), 2, EarlyExit(hidden=None), **options) as decoupled:
        decoupled.train_step(x, y)
        assert decoupled.plan.cuts[0].mask is not None
        model, head = copy.deepcopy(decoupled.model).eval(), decoupled.stages[0].code.head
        with torch.no_grad():
            h = model.encoder.layers[0](model.embed(x), src_key_padding_mask=x == 0)  # type: ignore[union-attr, operator, index]
            pooled = torch.stack([row[keep].mean(0) for row, keep in zip(h, x != 0, strict=True)])
            expected = head.classifier(pooled)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(decoupled.exits.predict(x, 0), expected)
        torch.testing.assert_close(decoupled.exits.predict(x, 1), decoupled(x))


def test_labels_per_position_give_scores_per_position() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.ConvTranspose2d(4, 3, 2, 2))
    x, y = torch.randn(4, 1, 8, 8), torch.randint(3, (4, 8, 8))
    with autodecouple.compile(model, 2, "early_exit", example_inputs=(x,), devices=["cpu"], cut_at=["0"]) as decoupled:
        decoupled.train_step(x, y)
        assert decoupled.exits.predict(x, 0).shape == (4, 3, 4, 4)
        assert decoupled.exits.predict(x, 1).shape == (4, 3, 8, 8)
        with pytest.raises(InputError, match=r"stage 0 gives scores \(4, 3, 4, 4\), not \(N, C\)"):
            decoupled.exits.adaptive(x)
        with pytest.raises(InputError, match="no mean of these"):
            decoupled.exits.ensemble(x)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(4, 6)
        self.join = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x).tanh(), self.right(x).sigmoid()
        y: Tensor = self.join(torch.cat([a, b], 1))
        return y


@pytest.mark.parametrize("loss", [EarlyExit(hidden=None), Associated(width=4, hidden=None)], ids=repr)
def test_an_exit_may_read_several_tensors(loss: Any) -> None:
    """Joined as they are for the loss: each pooled, then side by side."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    options: dict[str, Any] = {"example_inputs": (x,), "devices": ["cpu"], "cut_at": ["sigmoid"]}
    with autodecouple.compile(Fork(), 2, loss, **options) as decoupled:
        decoupled.train_step(x, y)
        model, joint = decoupled.model, decoupled.stages[0].code.head
        with torch.no_grad():
            values = {"tanh": model.left(x).tanh(), "sigmoid": model.right(x).sigmoid()}  # type: ignore[operator]
            joined = torch.cat([values[name] for name in decoupled.plan.cuts[0].features], 1)
            head: Any = joint.head  # type: ignore[union-attr]
            expected = head.classifier(joined) if loss.name == "early_exit" else head.decoder(head.bridge(joined))
        assert joined.shape == (6, 11) and torch.equal(decoupled.exits.predict(x, 0), expected)


class Shifted(nn.Module):
    """Its training mode has more additions than its evaluation mode, so that names of nodes do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1
        return x + self.linear(x).tanh()


def test_exits_read_the_same_value_where_the_modes_differ() -> None:
    """`add_1` of the training mode is `add` of the evaluation mode, whose own `add_1` is in the next block."""
    torch.manual_seed(0)
    x, y, model = torch.randn(6, 4), torch.arange(6) % 3, nn.Sequential(*(Shifted() for _ in range(3)), nn.Linear(4, 3))
    options: dict[str, Any] = {"example_inputs": (x,), "devices": ["cpu"], "cut_at": ["0", "1"]}
    with autodecouple.compile(model, 3, EarlyExit(hidden=None), **options) as decoupled:
        decoupled.train_step(x, y)
        assert [cut.after for cut in decoupled.plan.cuts] == ["add_1", "add_3"]
        assert decoupled.exits.stages == (0, 1, 2)
        h, found = x, decoupled.exits.all(x)
        evaluated = copy.deepcopy(decoupled.model).eval()
        with torch.no_grad():
            for stage in range(2):
                h = evaluated[stage](h)  # type: ignore[index]
                assert torch.equal(found[stage], decoupled.stages[stage].code.head.classifier(h))  # type: ignore[union-attr, operator]
        assert torch.equal(found[2], decoupled(x))


# ---------------------------------------------------------------- which stages have one, and mistakes


def test_stages_without_a_classifier_have_no_exit() -> None:
    decoupled, x = trained(["supcon", DeInfoReg(alpha=0, widths=(8, 6)), "bp"])
    with decoupled:
        assert decoupled.exits.stages == (3,)
        for stage, why in ((0, "'supcon' has no classifier"), (1, "'deinforeg' has no classifier"), (2, "'bp'")):
            with pytest.raises(
                InputError, match=rf"stage {stage} has no exit, since .*{why}.*; exits are at the stages 3"
            ):
                decoupled.exits.predict(x, stage)
        with pytest.raises(InputError, match="there is no stage 4"):
            decoupled.exits.predict(x, 4)
        assert torch.equal(decoupled.exits.adaptive(x).scores, decoupled(x))


def test_without_the_evaluation_mode_there_are_no_exits() -> None:
    decoupled, x = trained("early_exit")
    with decoupled, mock.patch.object(Decoupled, "_pieces", None):
        assert decoupled.exits.stages == ()
        for ask in (decoupled.exits.all, decoupled.exits.adaptive, decoupled.exits.ensemble):
            with pytest.raises(InputError, match="evaluation mode could not be captured"):
                ask(x)
        with pytest.raises(InputError, match="evaluation mode could not be captured"):
            decoupled.exits.predict(x, 3)


def test_mistakes_are_named() -> None:
    decoupled, x = trained("early_exit")
    with decoupled:
        for wrong in ({"threshold": 1.5}, {"patience": 0}):
            with pytest.raises(InputError, match=next(iter(wrong))):
                decoupled.exits.adaptive(x, **wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="stages is empty"):
            decoupled.exits.ensemble(x, [])
        with pytest.raises(InputError, match="must have|shape|dimension|sizes"):
            decoupled.exits.predict(x[:, 0], 0)
