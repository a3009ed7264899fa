"""Laws of transformations put together: chains, masks, groups."""

from __future__ import annotations

from collections.abc import Sequence

from functrain import optim, tree
from functrain.testing.law import Law, Subject, Trial, check_close, check_equal
from functrain.tree import Tree


def neutral(subject: Subject, trial: Trial) -> None:
    """`chain(identity(), tx)`, `chain(tx, identity())` and `chain(tx)` are `tx`."""
    params, grads = trial.params, subject.grads(trial)
    plain = subject.run(subject.build(), params, grads)
    before = subject.run(optim.chain(optim.identity(), subject.build()), params, grads)
    after = subject.run(optim.chain(subject.build(), optim.identity()), params, grads)
    for run, state in ((before, before.state[1]), (after, after.state[0])):
        check_equal(run._replace(state=state), plain)
    alone = subject.run(optim.chain(subject.build()), params, grads)
    check_equal(alone._replace(state=alone.state[0]), plain)


def associative(subject: Subject, trial: Trial) -> None:
    """`chain(chain(tx, tx), after)` and `chain(tx, chain(tx, after))` are all steps of `tx`, then all steps of `tx`,
    then all of `after`: each has a state of its own."""
    params, grads, after = trial.params, subject.grads(trial), optim.with_extra_args_support(optim.trace(0.9))

    def outputs(tx: optim.GradientTransformation, inputs: Sequence[optim.Updates]) -> list[optim.Updates]:
        state, made = tx.init(params), []
        for step, updates in enumerate(inputs):
            updates, state = subject.update(tx, updates, state, params, step)
            made.append(updates)
        return made

    tx = subject.build()
    one_by_one = outputs(after, outputs(tx, outputs(tx, grads)))
    check_equal(outputs(optim.chain(optim.chain(tx, tx), after), grads), one_by_one, "chained from the left: ")
    check_equal(outputs(optim.chain(tx, optim.chain(tx, after)), grads), one_by_one, "chained from the right: ")


def masked_everywhere(subject: Subject, trial: Trial) -> None:
    """`masked(tx, True)` is `tx`."""
    grads = subject.grads(trial)
    plain = subject.run(subject.build(), trial.params, grads)
    everywhere = tree.map(lambda _: True, trial.params)
    run = subject.run(optim.masked(subject.build(), everywhere), trial.params, grads)
    check_equal(run._replace(state=run.state.inner_state), plain)


def masked_nowhere(subject: Subject, trial: Trial) -> None:
    """`masked(tx, False)` is `identity()`: `tx` gets a tree without leaves."""
    nowhere = tree.map(lambda _: False, trial.params)
    tx = optim.masked(subject.build(), nowhere)
    (grads,) = subject.grads(trial, 1)
    updates, _ = subject.update(tx, grads, tx.init(trial.params), trial.params)
    check_equal(updates, grads)


def partitioned(subject: Subject, trial: Trial) -> None:
    """`partition` into groups is each group run alone, to rounding."""
    params, grads = trial.params, subject.grads(trial)
    leaves, structure = tree.flatten(params)
    labels = ["odd" if i % 2 else "even" for i in range(len(leaves))]
    groups = {"even": subject.build(), "odd": subject.build()}
    together = subject.run(optim.partition(groups, tree.unflatten(structure, labels)), params, grads)
    for group in groups:
        only = _Only([label == group for label in labels])
        alone = subject.run(subject.build(), only(params), [only(g) for g in grads])
        check_close(only(together.updates), alone.updates, subject.rtol, f"updates of the group {group!r}: ")
        check_close(only(together.params), alone.params, subject.rtol, f"params of the group {group!r}: ")


def uncounted(subject: Subject, trial: Trial) -> None:
    """An update depends neither on a leaf's position nor on the number of leaves: the others' are the same, to
    rounding, beside an empty leaf and where it is masked."""
    leaves, structure = tree.flatten(trial.params)
    ends = {0, len(leaves) - 1} if len(leaves) > 1 else set()  # those before a leaf are counted, or those after it
    for end in sorted(ends):
        emptied = [leaf.new_zeros(0, *leaf.shape[1:]) if i == end else leaf for i, leaf in enumerate(leaves)]
        params = tree.unflatten(structure, emptied)
        grads = subject.grads(trial._replace(params=params))
        others = _Only([i != end for i in range(len(leaves))])
        beside = subject.run(subject.build(), params, grads)
        alone = subject.run(subject.build(), others(params), [others(g) for g in grads])
        what = f"beside an empty leaf {tree.paths(params)[end]}, against where it is masked: "
        check_close(others(beside.updates), alone.updates, subject.rtol, f"updates {what}")
        check_close(others(beside.params), alone.params, subject.rtol, f"params {what}")


def leafwise(subject: Subject, trial: Trial) -> None:
    """Each leaf is treated as if it were alone, to rounding: numbers for all leaves are made in the longest of their
    dtypes (declared)."""
    params, grads = trial.params, subject.grads(trial)
    together = subject.run(subject.build(), params, grads)
    count = len(tree.leaves(params))
    for i in range(count):
        only = _Only([i == other for other in range(count)])
        alone = subject.run(subject.build(), only(params), [only(g) for g in grads])
        check_close(only(together.updates), alone.updates, subject.rtol, "updates, against those of this leaf alone: ")


class _Only:
    """Puts nodes without leaves in place of the leaves that are not chosen, as a mask does."""

    def __init__(self, chosen: Sequence[bool]) -> None:
        self.chosen = chosen

    def __call__(self, values: Tree) -> Tree:
        leaves, structure = tree.flatten(values)
        rows = zip(leaves, self.chosen, strict=True)
        return tree.unflatten(structure, [leaf if chosen else optim.MaskedNode() for leaf, chosen in rows])


LAWS = [
    Law(neutral, "let update depend on its arguments alone, and neither on where nor on how often it is used"),
    Law(associative, "keep what changes in the state: one transformation may stand in a chain twice"),
    Law(masked_everywhere, "walk trees with ft.tree, so that any node may stand in them"),
    Law(masked_nowhere, "let init and update pass a tree without leaves: torch.stack([]) is an error"),
    Law(partitioned, "let init and update see the leaves that they are given, and no others"),
    Law(uncounted, "go by a leaf's path where leaves differ; what draws by leaf number says without=['uncounted']"),
]
LEAFWISE = Law(leafwise, "let nothing of one leaf reach another, or do not declare leafwise=True")
