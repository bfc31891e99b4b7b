"""What a comparison was asked for: arms, seeds, policy; and which of it makes two comparisons the same."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.checkpoint import file_sha256
from trainer.compare.arms import Arm, Entered
from trainer.compare.jobs import Room, room_for
from trainer.config.resolved import Resolved
from trainer.runs import FREE

FULL, HALVING = "full", "halving"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be compared, and how."""

    arms: tuple[Entered, ...]
    seeds: tuple[int, ...]
    profile: str | None
    common: Mapping[str, str]
    """Dotted key -> value, of all arms."""
    output_dir: Path
    policy: str = FULL
    """full: every run to its end; halving: arms are ended early where that is safe."""
    tune: int = 0
    """Learning rates that are tried out for every arm before; 0: they are as the files say."""
    margin: float = 0.01
    """Of halving: share of the best loss that counts as no difference."""
    error: float = 0.05
    """Of halving: chance of a wrong decision, over all of them."""
    jobs: int | None = None
    """Runs at once; None: as many as there is room for."""
    gpus: tuple[str, ...] = ()
    """That may be dealt out."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arms."""
        return tuple(entered.arm.name for entered in self.arms)

    def identity(self) -> dict[str, str]:
        """What makes two comparisons the same: all but how many run at once, and where their folders lie."""
        of_halving = {"margin": f"{self.margin:g}", "error": f"{self.error:g}"} if self.policy == HALVING else {}
        return {
            "strategies": ",".join(_written(entered.arm) for entered in self.arms),
            "seeds": ",".join(map(str, self.seeds)),
            "profile": self.profile or "",
            "policy": self.policy,
            "tune": str(self.tune),
            "configuration": self._digest(),
            **of_halving,
            **dict(sorted(self.common.items())),
        }

    def _digest(self) -> str:
        """Of all that files say: where one was edited since, the same words ask for another comparison."""
        told = {entered.arm.name: _decides(entered.resolved) for entered in self.arms}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def room(self, runs: int, threads_before: int | None = None) -> Room:
        """What this machine has room for.

        Args:
            runs: that are to do.
            threads_before: of each run, when the comparison began; another number may change the last bits of sums.

        Raises:
            ConfigError: more is asked for than there is.
        """
        room = room_for(self.jobs, ranks=max(e.ranks for e in self.arms), gpus=self.gpus, runs=runs)
        return replace(room, threads=threads_before or room.threads)


def _decides(resolved: Resolved) -> dict[str, str]:
    """Every setting that may change a number, and what is in the files of records that it names."""
    custom = resolved.config.custom
    files = [path for path in (custom.train_jsonl, custom.val_jsonl, custom.ood_jsonl, custom.taxonomy) if path]
    settings = {k: v for k, v in resolved.params().items() if k not in FREE and not k.startswith("launch.")}
    return settings | {path: file_sha256(Path(path)) for path in files if Path(path).is_file()}


def _written(arm: Arm) -> str:
    return f"{arm.name}={arm.strategy}" + "".join(f"+{key}={value}" for key, value in arm.settings.items())
