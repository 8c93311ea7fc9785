"""Runs a program: a list of operators over a file of registers, each freed after its last use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.ops import Step
from engine.opset import OPERATORS
from engine.program import Program
from executor_svc.kernels.fuse import DEVICE_OPERATORS


@dataclass(frozen=True)
class _Instruction:
    function: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attrs: dict[str, Any]
    uses_step: bool
    single: bool
    dead: tuple[int, ...]  # registers that nothing reads any more


class Interpreter:
    """A program bound to its weights and to an implementation of every operator.

    Args:
        weights: by the program's names, on the device, as the implementations take them.
        implementations: operator name -> function with the signature of its reference in `engine/ops.py`.
    """

    def __init__(
        self, program: Program, weights: dict[str, Any], implementations: dict[str, Callable[..., Any]]
    ) -> None:
        specs = {**OPERATORS, **DEVICE_OPERATORS}
        registers = {name: number for number, name in enumerate((*weights, *program.inputs))}
        self._weights = list(weights.values())
        self._inputs = list(program.inputs)
        last_use = {name: number for number, op in enumerate(program.ops) for name in op.inputs}
        keep = {*weights, *program.outputs}
        self._code = []
        for number, op in enumerate(program.ops):
            for value in op.outputs:
                registers[value.name] = len(registers)
            names = {*op.inputs, *(value.name for value in op.outputs)} - keep - {""}
            self._code.append(
                _Instruction(
                    implementations[op.op],
                    tuple(registers[name] if name else -1 for name in op.inputs),
                    tuple(registers[value.name] for value in op.outputs),
                    dict(op.attrs),
                    uses_step=specs[op.op].uses_step,
                    single=len(specs[op.op].outputs) == 1 and not specs[op.op].variadic,
                    dead=tuple(registers[name] for name in names if last_use.get(name, number) == number),
                )
            )
        self._outputs = [registers[name] for name in program.outputs]
        self._size = len(registers)

    def run(self, inputs: dict[str, Tensor], step: Step) -> list[Tensor]:
        """The program's outputs for its inputs by name; attention reads and writes the step's caches."""
        file: list[Any] = [*self._weights, *(inputs[name] for name in self._inputs)]
        file += [None] * (
            self._size - len(file) + 1
        )  # the last register stays None: an optional input that is left out
        for code in self._code:
            arguments = [file[register] for register in code.inputs]
            result = (
                code.function(*arguments, step=step, **code.attrs)
                if code.uses_step
                else code.function(*arguments, **code.attrs)
            )
            for register, value in zip(code.outputs, (result,) if code.single else result, strict=True):
                file[register] = value
            for register in code.dead:
                file[register] = None
        return [file[register] for register in self._outputs]
