"""The rows of a run: which subject each is, and what stands in its way."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers import OURS, PEERS, Peer
from engines.errors import UserError

__all__ = ["Row", "Settings", "bundle_folder", "chosen_peers", "plan_name", "rows_of"]


@dataclass(frozen=True)
class Settings:
    """The options of ``run_trt.py``, checked. ``size`` is in pixels, None for the model's own."""

    source: str
    variants: tuple[str, ...]
    plans: tuple[str, ...]
    engines: tuple[str, ...]
    peers: tuple[str, ...]
    device: str
    precision: str
    size: tuple[int, int] | None
    steps: int
    batch: int
    rounds: int
    threads: int
    work: Path
    prompt: str | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of the table. ``reason`` says why it cannot be measured, and is empty where it can."""

    name: str
    peer: Peer
    variant: str = ""
    engine: str = ""
    plan: str = "full"
    reason: str = field(default="", compare=False)

    @property
    def subject(self) -> tuple[str, str, str]:
        """Rows of one subject share a process."""
        return (self.peer.module, self.variant, self.engine) if self.peer is OURS else (self.name, "", "")

    @property
    def is_base(self) -> bool:
        """Whether other rows of the engine are compared with it."""
        return self.peer is OURS and self.variant == "original" and self.plan == "full"


def rows_of(settings: Settings, missing: dict[str, str]) -> list[Row]:
    """This project's rows, engine by engine, and then the peers.

    Args:
        settings: of the run.
        missing: engines that cannot be had here, and why.
    """
    return [*_ours(settings, missing), *_peers(settings)]


def _ours(settings: Settings, missing: dict[str, str]) -> Iterator[Row]:
    for engine in settings.engines:
        for variant in settings.variants:
            for plan in settings.plans:
                yield Row(f"{variant} {plan_name(plan)}", OURS, variant, engine, plan, missing.get(engine, ""))


def _peers(settings: Settings) -> Iterator[Row]:
    for name in settings.peers:
        peer = PEERS[name]
        reason = ""
        if settings.device not in peer.devices:
            reason = f"not available: it runs on {' and '.join(peer.devices)} only"
        elif peer.missing and not peer.own_environment:
            reason = f"not installed: pip install {peer.hint or ' '.join(peer.missing)}"
        yield Row(name, peer, reason=reason)


def plan_name(plan: str) -> str:
    """What rows call a plan: a preset's text, or a file's name without folder and suffix."""
    return Path(plan).stem if plan.endswith(".json") else plan


def chosen_peers(text: str) -> tuple[str, ...]:
    """The peers that an option names.

    Raises:
        UserError: one is unknown.
    """
    if text in {"all", "none"}:
        return tuple(PEERS) if text == "all" else ()
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PEERS]:
        raise UserError(f"unknown peer {unknown[0]!r}; choose from: all, none, {', '.join(PEERS)}")
    return names


def bundle_folder(settings: Settings, variant: str) -> Path:
    """Where the run's bundle of a variant lies; one holds all engines."""
    name = f"{Path(settings.source).name}-{variant}-{settings.precision}".replace(":", "-")
    return settings.work / "bundles" / name
