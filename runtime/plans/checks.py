"""Whether segments can run a schedule exactly: nothing inherited may be computed inside a segment that runs."""

from collections.abc import Iterator

from engines.bundle.names import TEXT
from runtime.errors import PartitionError
from runtime.plans.demand import demand
from runtime.plans.schedule import Schedule

__all__ = ["check_runs"]

_Kind = tuple[str, frozenset[str], frozenset[str]]


def check_runs(schedule: Schedule) -> None:
    """Check that the segments can run a schedule exactly.

    An inherited or kept feature must leave its segment, and what reads an inherited feature must be in another segment than what
    makes it: inside a segment it would be computed afresh.

    Args:
        schedule: a plan laid out over the UNets of bundles.

    Raises:
        PartitionError: names the feature, and has the UNet whose bundle should be partitioned for the plan.
    """
    for kind in sorted(_kinds(schedule), key=repr):
        _check_borders(schedule, *kind)
    for index in range(schedule.steps):
        _check_decided_first(schedule, index)


def _kinds(schedule: Schedule) -> set[_Kind]:
    """UNet, wanted and inherited features of all that may run."""
    steps = (step for changed in (False, True) for step in schedule.all_steps(changed))
    return {(step.unet, step.wanted, step.inherited) for step in steps} | schedule.probes()


def _check_borders(schedule: Schedule, unet: str, wanted: frozenset[str], inherited: frozenset[str]) -> None:
    manifest = schedule.unets[unet]
    home = {name: segment.name for segment in manifest.segments for name in segment.units}
    given_out = {name for segment in manifest.segments for name in segment.outputs}
    for name in sorted(wanted - given_out):
        raise _cannot_run(schedule, unet, name, "a later step", home.get(name, "none"))
    for feature, reader in _inherited_reads(schedule, unet, wanted, inherited):
        if home[feature] == home[reader] or feature not in given_out:
            raise _cannot_run(schedule, unet, feature, reader, home[feature])


def _inherited_reads(
    schedule: Schedule, unet: str, wanted: frozenset[str], inherited: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """Inherited features and the units that read them."""
    for unit in demand(schedule.unets[unet].units, wanted, inherited | {TEXT}):
        yield from ((feature, unit.name) for feature in unit.inputs if feature in inherited)


def _check_decided_first(schedule: Schedule, index: int) -> None:
    """The segments that decide a step must not already compute what the step then makes from inherited features."""
    threshold, less = schedule.pending_threshold(index), schedule.resolve(index, changed=False)
    if threshold is None:
        return
    early = {name: segment.name for segment in schedule.probe(index, threshold).segments for name in segment.units}
    decided = less.inherited - schedule.resolve(index, changed=True).inherited
    for feature, reader in _inherited_reads(schedule, less.unet, less.wanted, less.inherited):
        if feature in decided and reader in early:
            raise PartitionError(
                f"plan {schedule.plan.name} compares {threshold.feature} before it decides whether to inherit {feature}, but "
                f"in this bundle segment {early[reader]}, which must run for that, already computes {reader} from {feature}",
                less.unet,
            )


def _cannot_run(schedule: Schedule, unet: str, feature: str, reader: str, segment: str) -> PartitionError:
    return PartitionError(
        f"plan {schedule.plan.name} inherits {feature}, but this bundle computes it and its reader {reader} in one segment "
        f"({segment})",
        unet,
    )
