"""Runs a TensorRT plan behind the scheduler that all runners have. Slots of the plan's caches are blocks as long as a sequence.

`engine/tensorrt.py` says what a plan takes. It has run on no GPU yet: tests run it over an engine that evaluates the network.
"""

import ctypes
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import FailedPrecondition, Internal
from engine.manifest import Limits
from engine.program import ROPE_LENGTHS, Program
from engine.tensorrt import DECODE, PREFILL
from executor_svc.core import Batch, Sampled
from executor_svc.group import ALONE, Group
from executor_svc.layout import Layout, StepLayout
from executor_svc.plans import unpack
from executor_svc.rope_lengths import rope_lengths
from executor_svc.runner import KV_SHARE, Capabilities, free_memory
from executor_svc.sampler import answer


@dataclass(frozen=True)
class Launch:
    """One execution of the plan.

    Attributes:
        profile: PREFILL or DECODE.
        first: the slot of the first row.
        inputs: arrays int32 by name.
        rows: of the step's logit_indices, which this launch computes; in the order of the logits that it gives.
    """

    profile: int
    first: int
    inputs: dict[str, np.ndarray]
    rows: np.ndarray


class TensorRTRunner:
    """A step is one launch for all decodes and one for each prompt; one for all where the plan takes packed tokens.

    It shares no prefixes, and takes no tokens that are still being sampled.
    """

    def __init__(
        self,
        program: Program,
        engine: Any,
        limits: Limits,
        *,
        device: str = "cuda",
        kv_memory: int | None = None,
        kv_share: float | None = None,
        group: Group = ALONE,
    ) -> None:
        """Allocates the caches, once.

        Args:
            program: what the plan was made of.
            engine: an ICudaEngine.
            kv_memory, kv_share, group: as `TorchRunner` has them.

        Raises:
            FailedPrecondition: that is too little for one sequence of max_seq_len, or the plan does not fit this machine's ranks.
        """
        self._group, self._device = group, torch.device(device)
        self._types = {value.name: value.type for op in program.ops for value in op.outputs}
        self._vocab_size = int(self._types[program.outputs[0]].shape[1])
        if engine.streamable_weights_size:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        aliases = {name: engine.get_aliased_input_tensor(name) for name in names}
        self._aliases = {output: source for output, source in aliases.items() if source}
        self._packed = "query_lengths" in names
        shapes = {name: tuple(engine.get_tensor_shape(name))[1:] for name in self._aliases.values()}
        dtype = {name: getattr(torch, program.caches[int(name.rpartition(".")[2])].dtype) for name in shapes}
        slot_bytes = sum(int(np.prod(shape)) * dtype[name].itemsize for name, shape in shapes.items())
        share = (kv_share or KV_SHARE) / (group.here if device == "cpu" else 1)
        slots = group.least(_slots(slot_bytes, limits, device, kv_memory, share, capped=kv_share is not None))
        self._caches = {
            name: torch.zeros(slots, *shape, dtype=dtype[name], device=self._device) for name, shape in shapes.items()
        }
        self._inputs = tuple(program.inputs)
        self._written = np.zeros(slots, dtype=np.int32)  # by slot: tokens that its cache holds
        self._layout = Layout(limits.max_batch_size, 1, limits.max_seq_len, rope_lengths=ROPE_LENGTHS in program.inputs)
        self._started: deque[tuple[Batch, int, Tensor]] = deque()
        self._context, self._profile = engine.create_execution_context(), -1
        if group.tp_size > 1 and not self._context.set_communicator(_capsule(group.communicator())):
            raise FailedPrecondition("TensorRT takes no communicator of these ranks", reason="RANKS_UNSUPPORTED")
        self.capabilities = Capabilities(slots, limits.max_seq_len, prefix_cache=False, rope=rope_lengths(program))

    @torch.inference_mode()
    def start(self, batch: Batch) -> None:
        layout = self._layout.lay_out(batch)
        self._group.tell(vars(layout))
        self._started.append((batch, len(layout.logit_indices), self._logits(layout)))

    @torch.inference_mode()
    def finish(self) -> Sampled:
        batch, rows, logits = self._started.popleft()
        return answer(logits[:rows], batch)

    @torch.inference_mode()
    def follow(self, plan: bytes) -> None:
        """Computes this rank's part of a step that rank 0 has started."""
        values = unpack(plan).items()
        self._logits(
            StepLayout(**{name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in values})
        )

    def _logits(self, layout: StepLayout) -> Tensor:
        """[items that sample + prompt_rows of all items, vocab_size], float32."""
        logits = torch.empty(len(layout.logit_indices), self._vocab_size, device=self._device)
        for launch in self._launches(layout):
            made = self._execute(launch)
            if len(launch.rows):
                logits[torch.from_numpy(launch.rows).to(self._device)] = made
        return logits

    def _launches(self, layout: StepLayout) -> Iterator[Launch]:
        counts = np.array(layout.query_lens)
        slots = layout.block_tables.numpy()[:, 0]
        ends = np.cumsum(counts)
        if self._packed:
            yield self._pack(layout, slots, counts, ends)
            return
        decodes = np.flatnonzero(counts == 1)
        if len(decodes):
            yield self._pad(layout, DECODE, 0, slots[decodes], ends[decodes] - 1, 1)
        for number in np.flatnonzero(counts > 1):
            count = int(counts[number])
            yield self._pad(layout, PREFILL, int(slots[number]), slots[[number]], ends[[number]] - count, count)

    def _pad(
        self, layout: StepLayout, profile: int, first: int, slots: np.ndarray, starts: np.ndarray, count: int
    ) -> Launch:
        """Rows of `count` tokens each. Slots between that have none compute one token behind their last, which nobody reads.

        Args:
            first: the slot of the first row.
            slots: of the sequences. starts: where their tokens begin in the step.
        """
        rows = int(slots.max()) - first + 1
        at = slots - first
        known = self._written[first : first + rows].copy()
        places = starts[:, None] + np.arange(count)
        positions = layout.positions.numpy()
        known[at] = positions[starts]
        inputs = {"write_index": known, "kv_lengths": known + np.int32(count)}
        for name in self._inputs:
            if name != "logit_indices":
                filled = (
                    np.repeat(known[:, None], count, 1) if name != "token_ids" else np.zeros((rows, count), np.int32)
                )
                filled[at] = getattr(layout, name).numpy()[places]
                inputs[name] = filled
        flat = np.full(len(layout.token_ids), -1, np.int32)
        flat[places] = at[:, None] * count + np.arange(count)
        self._written[slots] = positions[starts] + count
        return Launch(profile, first, *self._wanted(inputs, flat[layout.logit_indices.numpy()]))

    def _pack(self, layout: StepLayout, slots: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> Launch:
        """All sequences by slot, without padding; slots between have no tokens."""
        rows = int(slots.max()) + 1
        order = np.argsort(slots)
        places = np.concatenate([np.arange(ends[each] - counts[each], ends[each]) for each in order])
        lengths = np.zeros(rows, np.int32)
        lengths[slots] = counts
        borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        known = self._written[:rows].copy()
        known[slots] = layout.positions.numpy()[ends - counts]
        inputs = {"write_index": known, "kv_lengths": known + lengths, "query_lengths": borders}
        inputs |= {name: getattr(layout, name).numpy()[places] for name in self._inputs if name != "logit_indices"}
        flat = np.empty(len(places), np.int32)
        flat[places] = np.arange(len(places))
        self._written[slots] = known[slots] + counts
        profile = DECODE if (counts == 1).all() else PREFILL
        return Launch(profile, 0, *self._wanted(inputs, flat[layout.logit_indices.numpy()]))

    def _wanted(self, inputs: dict[str, np.ndarray], at: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """With the logits that are wanted: `at` is the row of each in this launch, -1 if it is in another one."""
        rows = np.flatnonzero(at >= 0)
        indices = at[rows] if len(rows) else np.zeros(1, np.int32)  # a plan computes at least one
        return inputs | {"logit_indices": indices.astype(np.int32)}, rows

    def _execute(self, launch: Launch) -> Tensor:
        """Logits [logit_indices, vocab_size]; the caches are written in place."""
        context, stream = self._context, self._stream()
        if launch.profile != self._profile:
            if not context.set_optimization_profile_async(launch.profile, stream):
                raise Internal(f"TensorRT does not take profile {launch.profile}", reason="TENSORRT_FAILED")
            self._profile = launch.profile
        held = {name: torch.from_numpy(values).to(self._device) for name, values in launch.inputs.items()}
        count = len(launch.inputs["write_index"])
        bound = held | {name: cache[launch.first : launch.first + count] for name, cache in self._caches.items()}
        logits = torch.empty(len(held["logit_indices"]), self._vocab_size, device=self._device)
        for name, tensor in bound.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise Internal(f"the plan takes no {name} of shape {tuple(tensor.shape)}", reason="TENSORRT_FAILED")
        outputs = {output: bound[source] for output, source in self._aliases.items()}
        for name, tensor in (bound | outputs | {"logits": logits}).items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(stream):
            raise Internal("TensorRT could not execute the plan; the log says why", reason="TENSORRT_FAILED")
        return logits

    def _stream(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream) if self._device.type == "cuda" else 0


def _slots(
    slot_bytes: int, limits: Limits, device: str, kv_memory: int | None, kv_share: float, *, capped: bool
) -> int:
    """How many sequences the caches have room for; arguments as `runner.cache_blocks` has them.

    Raises FailedPrecondition if it is none.
    """
    if kv_memory is None or capped:
        free = int(kv_share * free_memory(device))
        kv_memory = free if kv_memory is None else min(kv_memory, free)
    if kv_memory < slot_bytes:
        raise FailedPrecondition(
            f"{kv_memory >> 20} MiB of KV cache are less than one sequence of {limits.max_seq_len} tokens: start the executor "
            f"with --kv-memory {slot_bytes} or more, or build the engine with a smaller --max-seq-len",
            reason="KV_MEMORY_TOO_SMALL",
        )
    return min(limits.max_batch_size, kv_memory // slot_bytes)


def _capsule(communicator: int) -> Any:
    """An ncclComm_t as TensorRT takes it."""
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(communicator, None, None)
