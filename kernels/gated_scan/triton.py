"""The gated scan on GPUs: chunks of up to 64 tokens, all of them and both directions in parallel.

A pass is three launches; with a single chunk and no outer states only the last one is needed:

1. `chunk_updates`: each chunk's update of the state that crosses it, (K, V) a direction, and its decay, (K,).
2. `carry_states`: the states that enter each chunk, by a scan over chunks. Its loop is N / 64 steps long and reads and
   writes each state once; as a launch of its own it runs over all (direction, batch, head, K, V) elements in parallel,
   which inside launch 1 would cost either a wait between programs or the parallelism over chunks.
3. `chunk_outputs`: one (C, C) score matrix for both directions, applied to the values, plus the two states' terms.

The scores of a chunk are a sum over levels: at level h, queries and keys in the two halves of a block of 2h tokens meet
in the middle of their block. The query's decay up to the middle and the key's decay from it are both <= 1, so the level
is one product of decayed queries and decayed keys on tensor cores, for both directions at once: forward pairs fill the
lower left of each block, backward pairs its upper right. h = 1, 2, .., C / 2 covers every pair of distinct tokens once.
(Gated linear attention, arXiv 2312.06635 section 4.3, splits a chunk at two levels and needs (16, 16, K) elementwise
work on the diagonal; splitting at every level needs none.) The token itself is added undecayed.

The backward pass stores nothing but its inputs: it repeats launches 1 and 2, runs them on queries and output gradients
for the gradients of the states, and ends with launch 3 transposed (gradient of the values) and `chunk_gradients`
(queries, keys, gates). Every sum has a fixed order and nothing is accumulated by atomics: the same bits every time.

Precision: sums and states are float32. The tensor-core operands are bfloat16 if query, key and value are; float32
inputs are split in three TF32 products on NVIDIA GPUs and multiplied in float32 on AMD GPUs; float16 inputs use TF32,
which has their precision without their range.

Floor, a prediction and not a measurement. T tokens, one head, both directions, s bytes an element, chunks of C: the
tensors are T (4K + 2V) s bytes, the states 32 K V T / C more (float32, written, carried and read), the arithmetic is
2 T (4KV + C (K + V)) flop of which the levels repeat the score part log2(C) times. ViG-T at 1024 x 1024 pixels
(T = 4096, 3 heads, K = 32, V = 64, bfloat16): 6.3 + 12.6 MB, 2.1 + 4.2 us at the 3.0 TB/s of an H100 (the states stay
in its 50 MB of L2), and 0.35 GFLOP, under 1 us: three launches of some 5 us decide.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gated_scan.triton_kernels import (
    carry_states_kernel,
    chunk_gradients_kernel,
    chunk_outputs_kernel,
    chunk_updates_kernel,
)
from kernels.gpu.triton import are_narrow, dot_operands, launch, refuse_float64, tile_size, with_strides


@dataclass(frozen=True)
class Tiles:
    """Launch configuration of one kernel; a smaller dimension takes a smaller tile."""

    key: int
    value: int
    warps: int

    def options(self, key_dim: int, value_dim: int) -> dict[str, int]:
        tiles = {"BLOCK_K": tile_size(key_dim, self.key), "BLOCK_V": tile_size(value_dim, self.value)}
        return {**tiles, "num_warps": self.warps, "num_stages": 1}


@dataclass(frozen=True)
class Configuration:
    """Tokens of a chunk (a power of two) and each kernel's tiles.

    Chosen ahead of time among those that spill no register on sm_80, sm_90 and gfx942, not by timing;
    tests/kernels/test_triton_compilation.py holds them to it.
    """

    chunk: int
    updates: Tiles
    outputs: Tiles
    gradients: Tiles


# By the width of the products' operands. Operands of three TF32 products take twice the registers of a float32 tile.
NARROW = Configuration(chunk=64, updates=Tiles(32, 64, 4), outputs=Tiles(32, 64, 8), gradients=Tiles(16, 64, 8))
WIDE = Configuration(chunk=32, updates=Tiles(32, 64, 4), outputs=Tiles(32, 64, 4), gradients=Tiles(16, 16, 8))
CARRY_BLOCK = 512  # state elements of one program of `carry_states_kernel`


def bidirectional_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_forward: Tensor,
    gate_backward: Tensor,
    scale: float,
    logit_normalizer: float,
) -> Tensor:
    """Output (B, N, H, V); arguments as in `operators.bidirectional_gated_scan`."""
    scan = _Scan(query, key, value, gate_forward, gate_backward, scale / 2, logit_normalizer)
    return scan.outputs(scan.states()[0] if scan.chunks > 1 else None)


def bidirectional_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_forward: Tensor,
    gate_backward: Tensor,
    scale: float,
    logit_normalizer: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five tensors, each in its tensor's dtype."""
    scan = _Scan(query, key, value, gate_forward, gate_backward, scale / 2, logit_normalizer)
    several = scan.chunks > 1
    states = scan.states()[0] if several else None
    state_gradients = scan.state_gradients(grad_output)[0] if several else None
    gradients = scan.gradients(grad_output, states, state_gradients)
    return gradients[0], gradients[1], scan.value_gradient(grad_output, state_gradients), gradients[2], gradients[3]


def scan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    logit_normalizer: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, V) and final state (B, H, K, V) in float32; arguments as in `operators.gated_scan`."""
    gates = (None, gate) if reverse else (gate, None)
    scan = _Scan(query, key, value, *gates, scale, logit_normalizer)
    states, final_state = scan.states(initial_state)
    return scan.outputs(states), final_state


def scan_backward(
    grad_output: Tensor,
    grad_final_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    initial_state: Tensor | None,
    scale: float,
    logit_normalizer: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, gate and of the initial state (of a zero one if it is None)."""
    gates = (None, gate) if reverse else (gate, None)
    scan = _Scan(query, key, value, *gates, scale, logit_normalizer)
    states, _ = scan.states(initial_state)
    state_gradients, grad_initial_state = scan.state_gradients(grad_output, grad_final_state)
    gradients = scan.gradients(grad_output, states, state_gradients)
    grad_gate = gradients[3] if reverse else gradients[2]
    state_dtype = grad_final_state.dtype if initial_state is None else initial_state.dtype
    grad_value = scan.value_gradient(grad_output, state_gradients)
    return gradients[0], gradients[1], grad_value, grad_gate, grad_initial_state.to(state_dtype)


class _Scan:
    """One scan's launches; a gate that is None leaves its direction out.

    States are (directions, B * H, chunks, K, V), what enters each chunk; outer states are (B, H, K, V); all float32.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate_forward: Tensor | None,
        gate_backward: Tensor | None,
        scale: float,
        logit_normalizer: float,
    ):
        refuse_float64(query=query, key=key, value=value, gate_forward=gate_forward, gate_backward=gate_backward)
        self.query, self.key, self.value = query, key, value
        self.gate_forward, self.gate_backward = gate_forward, gate_backward
        self.scale, self.normalizer = scale, logit_normalizer
        self.batch, self.tokens, self.heads, self.key_dim = query.shape
        self.value_dim = value.shape[3]
        self.sequences = self.batch * self.heads
        dtypes = (query.dtype, key.dtype, value.dtype)
        self.configuration = NARROW if are_narrow(*dtypes) else WIDE
        self.chunk = tile_size(self.tokens, self.configuration.chunk)
        self.chunks = triton.cdiv(self.tokens, self.chunk)
        self.directions = (gate_forward is not None) + (gate_backward is not None)
        self.empty = 0 in (*query.shape, *value.shape)
        dot, precision = dot_operands(*dtypes)
        self.switches = {
            "FORWARD": gate_forward is not None,
            "BACKWARD": gate_backward is not None,
            "LOGITS": logit_normalizer != 0.0,
            "DOT": dot,
            "PRECISION": precision,
        }

    def states(self, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States that enter each chunk, and the final state."""
        return self._states(self.key, self.value, 1.0, initial_state, gradient=False)

    def state_gradients(self, grad_output: Tensor, grad_final_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradients of the states that leave each chunk, and of the initial state."""
        return self._states(self.query, grad_output, self.scale, grad_final_state, gradient=True)

    def _states(
        self, token_side: Tensor, value_side: Tensor, scale: float, first: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        outer_shape = (self.batch, self.heads, self.key_dim, self.value_dim)
        first = None if first is None else first.to(torch.float32).contiguous()
        states_shape = (self.directions, self.sequences, self.chunks, self.key_dim, self.value_dim)
        states = self.query.new_empty(states_shape, dtype=torch.float32)
        if self.empty:
            return states, states.new_zeros(outer_shape) if first is None else first.clone()
        decays = states.new_empty(states_shape[:-1])
        # In both directions at once there are no outer states.
        last = states.new_empty(outer_shape) if self.directions == 1 else None
        options = self.configuration.updates.options(self.key_dim, self.value_dim)
        tiles = triton.cdiv(self.key_dim, options["BLOCK_K"]) * triton.cdiv(self.value_dim, options["BLOCK_V"])
        launch(
            self.query,
            chunk_updates_kernel,
            self.chunks * tiles * self.sequences,
            *with_strides(token_side, value_side, self.gate_forward, self.gate_backward),
            states,
            decays,
            *self._sizes(scale),
            **self._constants(options),
            QUERIES=gradient,
        )
        blocks = triton.cdiv(self.key_dim * self.value_dim, CARRY_BLOCK)
        launch(
            self.query,
            carry_states_kernel,
            self.directions * self.sequences * blocks,
            *(states, decays, first, last, self.chunks, self.sequences),
            KEY_DIM=self.key_dim,
            VALUE_DIM=self.value_dim,
            FORWARD=self.gate_forward is not None,
            GRADIENT=gradient,
            HAS_INITIAL=first is not None,
            HAS_FINAL=last is not None,
            BLOCK=CARRY_BLOCK,
            num_warps=4,
        )
        return states, last

    def outputs(self, states: Tensor | None) -> Tensor:
        """Output (B, N, H, V) of the chunks, given the states that enter them (None: all zero)."""
        return self._outputs(self.value, states, transposed=False)

    def value_gradient(self, grad_output: Tensor, state_gradients: Tensor | None) -> Tensor:
        """Gradient (B, N, H, V) of the values, given the gradients of the states that leave the chunks."""
        return self._outputs(grad_output, state_gradients, transposed=True)

    def _outputs(self, value_side: Tensor, states: Tensor | None, transposed: bool) -> Tensor:
        output = self.value.new_empty(self.value.shape)
        if self.empty:
            return output.zero_()
        options = self.configuration.outputs.options(self.key_dim, self.value_dim)
        launch(
            self.query,
            chunk_outputs_kernel,
            self.chunks * triton.cdiv(self.value_dim, options["BLOCK_V"]) * self.sequences,
            *with_strides(self.query, self.key, value_side, self.gate_forward, self.gate_backward),
            *(states, output),
            *self._sizes(self.scale),
            **self._constants(options),
            LEVELS=self.chunk.bit_length() - 1,
            STATES=states is not None,
            TRANSPOSED=transposed,
        )
        return output

    def gradients(
        self, grad_output: Tensor, states: Tensor | None, state_gradients: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of query, key, forward gate and backward gate; None for a gate that is None."""
        inputs = (self.query, self.key, self.gate_forward, self.gate_backward)
        gradients = [None if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs]
        if self.empty:
            return [None if gradient is None else gradient.zero_() for gradient in gradients]
        options = self.configuration.gradients.options(self.key_dim, self.value_dim)
        launch(
            self.query,
            chunk_gradients_kernel,
            self.chunks * triton.cdiv(self.key_dim, options["BLOCK_K"]) * self.sequences,
            *with_strides(self.query, self.key, self.value, self.gate_forward, self.gate_backward, grad_output),
            *(states, state_gradients, *gradients),
            *self._sizes(self.scale),
            **self._constants(options),
            LEVELS=self.chunk.bit_length() - 1,
            STATES=states is not None,
        )
        return gradients

    def _sizes(self, scale: float) -> tuple[Any, ...]:
        return self.tokens, self.chunks, self.sequences, self.heads, scale, self.normalizer

    def _constants(self, options: dict[str, int]) -> dict[str, Any]:
        return {"KEY_DIM": self.key_dim, "VALUE_DIM": self.value_dim, "CHUNK": self.chunk, **self.switches, **options}
