"""What trains when: the model in each stage of a run, the gate over it, and the switch to the next stage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.optim import Optimizer

from trainer.engine import Engine
from trainer.gate import Gate, Verdict
from trainer.model import base_name_of, trained_tensors
from trainer.stages import Stage, stage_at, start_of

Material = tuple[nn.Module, Optimizer]
"""What an engine is made of beside the tensors that train: the loss, and an optimizer over them."""


class Course:
    """A run's way through its stages; most runs have one.

    All blocks of the last stage are wrapped from the beginning, so that adapters have one layout. Those that wait for
    their time are switched off as PEFT does it: they pass rows on as the base model would, draw no dropout, and have no
    gradient.
    """

    def __init__(self, model: PeftModel, stages: Sequence[Stage], *, step: int) -> None:
        """Stand in the stage in which optimizer step `step` was taken; the model's weights are as they start."""
        self._model, self._stages, self._now = model, stages, stage_at(step, stages)
        self._before: list[dict[str, Any]] = []
        self._switch_on()
        self.gate = self._gate({})

    def switch(
        self, engine: Engine, step: int, make: Callable[[], Material]
    ) -> tuple[Gate, tuple[int, ...], tuple[int, ...]] | None:
        """Enter the next stage if it begins after `step` steps; all ranks together.

        What the optimizer remembers of tensors that go on training is kept, by name; those that begin are as they
        were when the run began.

        Args:
            engine: trains the stage before, and from here on the next one.
            step: optimizer steps that are done.
            make: makes loss and optimizer for what trains by then.

        Returns:
            The gate of the new stage, the vision blocks that begin, and all that train; None where none begins.

        Raises:
            GateFailed: a tensor that begins is not as it was.
        """
        if step not in [stage.start for stage in self._stages[self._now + 1 :]]:
            return None
        before = self._stages[self._now].blocks
        moments = engine.let_go()
        self._now += 1
        self._switch_on()
        known = self.gate.hand_over([t.name for t in self.trained if t.start == step], step)
        self._before.append({key: value for key, value in self.gate.report().items() if key != "frozen"})
        self.gate = self._gate(known)
        engine.take_over(*make(), self.trained)
        engine.load_moments(step, lambda tensor, name: moments[tensor.name][name])
        blocks = self._stages[self._now].blocks
        return self.gate, tuple(block for block in blocks if block not in before), blocks

    @property
    def verdict(self) -> Verdict:
        """That of all stages so far."""
        whole = all(report["verdict"] == Verdict.PASSED for report in self._before)
        return self.gate.verdict if whole or self.gate.verdict is Verdict.FAILED else Verdict.OPEN

    def report(self) -> dict[str, Any]:
        """The numbers behind the verdict: of the gate as it is, and of those of the stages before."""
        before = {"stages_before": self._before} if self._before else {}
        return {**self.gate.report(), "verdict": self.verdict.value, **before}

    def state(self) -> dict[str, Any]:
        """What the gates have seen so far, for a resume point; JSON-able."""
        return {**self.gate.state(), "before": self._before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            KeyError, TypeError, ValueError: it is not a state.
        """
        self.gate.restore(state)
        self._before = [dict(report) for report in state.get("before", ())]

    def _switch_on(self) -> None:
        """Let exactly the blocks of the stage train, and all that is outside of vision blocks."""
        started = {stage.start for stage in self._stages[: self._now + 1]}
        for name, module in self._model.named_modules():
            if isinstance(module, LoraLayer | ModulesToSaveWrapper):
                module.enable_adapters(start_of(base_name_of(name) + ".", self._stages) in started)
        self.trained = [
            replace(tensor, start=start_of(tensor.base_name, self._stages)) for tensor in trained_tensors(self._model)
        ]

    def _gate(self, known: Mapping[str, str]) -> Gate:
        stage = self._stages[self._now]
        frozen = {name: p for name, p in self._model.named_parameters() if not p.requires_grad}
        return Gate(self.trained, frozen, last_look=stage.gate_look, first=stage.start, known=known)
