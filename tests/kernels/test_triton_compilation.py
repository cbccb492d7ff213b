"""The Triton kernels compiled ahead of time, for GPUs this machine need not have, exactly as they would be launched.

The tests of the interpreter fix `TRITON_INTERPRET` before the kernels are decorated, so the compilation runs in a
process of its own (`python tests/kernels/test_triton_compilation.py <target>`): it calls the operations with every
launch replaced by Triton's own compilation of that launch, and prints what the compilers say about each kernel as JSON.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent.parent
# Shared memory of a block: NVIDIA's opt-in limits of compute capabilities 8.0 and 9.0, and the LDS of CDNA 3.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_INSTRUCTION = {"sm_80": r"mma\.sync", "sm_90": r"mma\.sync|wgmma\.mma_async", "gfx942": r"v_mfma"}
DOT_KERNELS = {
    "chunk_updates_kernel", "chunk_outputs_kernel", "chunk_gradients_kernel",
    "retention_outputs_kernel", "retention_gradients_kernel",
    "linear_states_kernel", "linear_outputs_kernel", "linear_query_gradients_kernel", "linear_key_gradients_kernel",
}  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32)
LINEAR_DIMS = (32, 64, 96)  # of a head: LINA trained on one CPU, and as it was published
OTHER_KERNELS = {
    "carry_states_kernel", "spiking_forward_kernel", "spiking_backward_kernel",
    "hash_forward_kernel", "hash_table_gradient_kernel", "hash_point_gradient_kernel",
    "rendering_forward_kernel", "rendering_backward_kernel",
}  # fmt: skip
SCAN_TOKENS = 196
SCAN_DIMS = ((32, 64), (16, 32))  # key and value, of ViG and of ViG-H
SOFTMAX = {"activation": "softmax"}
SIGMOID = {"activation": "sigmoid", "slopes": (-0.5, 0.5, 0.25)}
RETENTIONS = [  # window, options, dimensions (Gated-SwinRMT has 16 and 32), dtypes
    ((7, 7), SOFTMAX, (16, 32), DTYPES),
    ((8, 8), {**SIGMOID, "signed_slopes": True}, (32, 64), DTYPES),
    ((7, 7), {**SIGMOID, "normalization": "sum"}, (32,), (torch.float32,)),
    ((4, 4), {**SIGMOID, "rotary": False}, (32,), DTYPES),
]
HASH_GRIDS = [  # of a radiance field, its mixture, and every other switch once
    {},
    {"resolutions": ((16, 512), (16, 2048)), "log2_table_size": 12},
    {"features": 4, "interpolation": "smoothstep"},
    {"features": 1, "interpolation": "nearest"},
    {"convention": "nerfstudio"},
    {"dims": 2, "features": 8},
    {"dims": 4, "features": 8, "resolutions": ((16, 512), (16, 2048)), "interpolation": "smoothstep"},
]


def launch_scans() -> None:
    """Both scans, forward and backward, at the sizes of ViG and in its training dtypes."""
    from kernels.gated_scan import triton as scan

    for key_dim, value_dim in SCAN_DIMS:
        for dtype in DTYPES:
            q, k, gf, gb = (torch.empty(2, SCAN_TOKENS, 3, key_dim, dtype=dtype) for _ in range(4))
            v, grad = (torch.empty(2, SCAN_TOKENS, 3, value_dim, dtype=dtype) for _ in range(2))
            scan.bidirectional_forward(q, k, v, gf, gb, 1.0, 16.0)
            scan.bidirectional_backward(grad, q, k, v, gf, gb, 1.0, 16.0)
    # One direction shares the kernels: its switches are compiled at the last of the sizes.
    state = torch.empty(2, 3, key_dim, value_dim)
    scan.scan_forward(q, k, v, gf, state, 1.0, 0.0, True)
    scan.scan_backward(grad, state, q, k, v, gf, state, 1.0, 0.0, True)


def launch_retentions() -> None:
    """Window retention, forward and backward, at the sizes of Gated-SwinRMT."""
    from kernels.window_retention import triton as retention
    from kernels.window_retention.arguments import Settings

    usual = {"slopes": (), "normalization": "clamp", "signed_slopes": False, "rotary": True}
    for window, options, dims, dtypes in RETENTIONS:
        shift = tuple(length // 2 for length in window)
        settings = Settings(log_decay=(-0.3, -0.2, -0.1), window=window, shift=shift, scale=0.25, **(usual | options))
        for dim, dtype in itertools.product(dims, dtypes):
            query, key, value, grad = (torch.empty(2, 56, 56, 3, dim, dtype=dtype) for _ in range(4))
            retention.forward(query, key, value, settings)
            retention.backward(grad, query, key, value, settings)


def launch_linear_attentions() -> None:
    """Linear attention, forward and backward, in the decoder of LINA (gates) and with subtraction."""
    from kernels.linear_attention import triton as linear
    from kernels.linear_attention.arguments import Settings

    for dim, dtype, normalization in itertools.product(LINEAR_DIMS, DTYPES, ("division", "subtraction")):
        settings = Settings("relu", normalization, 1e-6)
        query, grad = (torch.empty(2, 640, 12, dim, dtype=dtype) for _ in range(2))
        key, value = (torch.empty(2, 1280, 12, dim, dtype=dtype) for _ in range(2))
        gates = [torch.empty(12, 1280) if normalization == "division" else None for _ in range(2)]
        _, state, sums = linear.forward(query, key, value, *gates, settings)
        linear.backward(grad, state, sums, query, key, value, *gates, settings)


def launch_spiking_neurons() -> None:
    """Spiking neurons, forward and backward, with every leak, reset and surrogate, with and without states."""
    from kernels.spiking_neuron import triton as neuron
    from kernels.spiking_neuron.arguments import RESETS, SURROGATES, Settings

    leaks = ((None, True), (2.0, True), (2.0, False))
    for dtype, (tau, decay_input), reset in itertools.product(DTYPES, leaks, RESETS):
        current, grad = (torch.empty(4, 8, 64, 16, 16, dtype=dtype) for _ in range(2))
        state = torch.empty(8, 64, 16, 16) if reset == "hard" else None
        for surrogate in SURROGATES:
            settings = Settings(1.0, tau, decay_input, reset, 0.0, surrogate, 2.0, False)
            neuron.backward(grad, state, current, state, settings)
        neuron.forward(current, state, settings, state is not None)


def launch_hash_encodings() -> None:
    """Hash encodings, forward and backward, with and without experts and gates."""
    from kernels.hash_encoding import HashGrid
    from kernels.hash_encoding import triton as encoding

    for settings, dtype in itertools.product(HASH_GRIDS, DTYPES):
        grid = HashGrid(**{"log2_table_size": 14} | settings)
        points, table = torch.empty(4096, grid.dims), torch.empty(grid.entries, grid.features, dtype=dtype)
        mixture = grid.experts > 1
        expert, gate = (torch.zeros(4096, dtype=torch.int64), torch.empty(4096)) if mixture else (None, None)
        encoding.forward(points, table, expert, gate, grid, grid.levels)
        gradient = torch.empty(grid.width, 4096, dtype=dtype).t()
        for of_points in (True, False):
            wanted = (of_points, True, mixture)
            encoding.backward(gradient, points, table, expert, gate, grid, grid.levels, wanted)


def launch_volume_renderings() -> None:
    """Volume rendering, forward and backward, of colours and of features, with and without each gradient."""
    from kernels.volume_rendering import triton as rendering

    for channels, dtype in itertools.product((3, 40), DTYPES):
        density, colour = torch.empty(4096, dtype=dtype), torch.empty(4096, channels, dtype=dtype)
        rays = (density, colour, torch.empty(4096), torch.empty(4096), torch.zeros(65, dtype=torch.int64))
        ray_colour, opacity, depth, weights = rendering.forward(*rays)
        given = (ray_colour, opacity, depth, weights)
        for wanted in (given, (ray_colour, None, None, None), (None, opacity, None, None)):
            rendering.backward(wanted, weights, *rays)


def compile_launches(target_name: str) -> list[dict]:
    """What the compilers say of every launch of all operations on the target."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", target_name, 64) if "gfx" in target_name else GPUTarget("cuda", int(target_name[3:]), 32)

    class Driver:
        def get_current_target(self):
            return target

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    run = triton.JITFunction.run
    reports = []

    def compile_instead(kernel, *arguments, warmup, **options):
        compiled = run(kernel, *arguments, warmup=True, **options)
        label = f"{kernel.__name__} {arguments[0].dtype} {options}"
        reports.append({"kernel": kernel.__name__, "label": label, **describe(compiled, target_name)})

    triton.JITFunction.run = compile_instead
    launch_scans()
    launch_retentions()
    launch_linear_attentions()
    launch_spiking_neurons()
    launch_hash_encodings()
    launch_volume_renderings()
    return reports


def describe(compiled, target_name: str) -> dict:
    if "cubin" in compiled.asm:
        assembly, spilled = compiled.asm["ptx"], nvidia_local_memory(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        spilled = sum(
            int(re.search(rf"\.{field}:\s*(\d+)", assembly)[1])
            for field in ("vgpr_spill_count", "private_segment_fixed_size")
        )
    matrix = len(re.findall(MATRIX_INSTRUCTION[target_name], assembly))
    return {"spilled": spilled, "shared": compiled.metadata.shared, "matrix_instructions": matrix}


def nvidia_local_memory(cubin: bytes) -> int:
    """Bytes of stack and local memory of a kernel: where spilled registers go."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    return int(stack) + int(local)


@cache
def reports(target_name: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, target_name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("target_name", SHARED_MEMORY)
def test_kernels_fit_the_device(target_name):
    compiled = reports(target_name)
    assert {report["kernel"] for report in compiled} == DOT_KERNELS | OTHER_KERNELS
    spilling = [(report["label"], report["spilled"]) for report in compiled if report["spilled"]]
    assert not spilling
    too_large = [report["label"] for report in compiled if report["shared"] > SHARED_MEMORY[target_name]]
    assert not too_large
    without = [r["label"] for r in compiled if r["kernel"] in DOT_KERNELS and not r["matrix_instructions"]]
    assert not without, "products that do not run on tensor cores"


if __name__ == "__main__":
    json.dump(compile_launches(sys.argv[1]), sys.stdout)
