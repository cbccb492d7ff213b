"""The models leave eager PyTorch: torch.compile without graph breaks, torch.export, ONNX; not TorchScript."""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from tests.vision.small_models import create, draw_unit_gain

TWO_STAGES = {
    "embed_dims": (16, 32),
    "depths": (2, 1),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "init_values": (2, 2),
    "heads_ranges": (4, 4),
    "layerscales": (False, True),
}
SMALLER = {
    "vig": {"img_size": 32, "depth": 2},
    "vig_h": {"dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2)},
    "rmt": {**TWO_STAGES, "chunkwise_recurrents": (True, False)},
    "retention": TWO_STAGES,
    "swat": TWO_STAGES,
}


@pytest.fixture(params=SMALLER)
def model(request) -> nn.Module:
    # at the authors' initialisation the mixers' branches would not show
    return draw_unit_gain(create(request.param, num_classes=10, **SMALLER[request.param])).eval()


def test_compiles_without_graph_breaks(model):
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 48, 32)
    output = compiled(images)
    torch.testing.assert_close(output, model(images), atol=1e-5, rtol=1e-4)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(output.square().mean(), parameters.values())
    expected = torch.autograd.grad(model(images).square().mean(), parameters.values())
    for name, gradient, target in zip(parameters, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, target, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vig", "swat"])
def test_compiles_with_inductor(family):
    torch.compiler.reset()  # what other tests compiled counts towards the limit of recompilations
    model = create(family, num_classes=10, **SMALLER[family]).eval()
    images = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-4)
    # Inductor holds the operators to the strides that their fake kernels promise.
    gradients = torch.autograd.grad(compiled(images).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    for gradient, target in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, target, atol=1e-4 * target.abs().max().item(), rtol=1e-3)


def test_exported_program(model):
    images = torch.randn(1, 3, 48, 32)
    program = torch.export.export(model, (images,))
    assert not [node for node in program.graph.nodes if "gated_vision" in str(node.target)]
    other = torch.randn(1, 3, 48, 32)
    torch.testing.assert_close(program.module()(other), model(other), atol=1e-5, rtol=1e-4)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(other), model(other), atol=1e-5, rtol=1e-4)


def test_exported_program_takes_any_batch(model):
    program = torch.export.export(
        model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["as-trained", "fused"])
def test_onnx(model, fused, tmp_path):
    images = torch.randn(1, 3, 48, 32)
    expected = model(images).detach().numpy()
    if fused:
        model.fuse()
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [output] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(output, expected, atol=1e-4, rtol=1e-4)


def test_torchscript_is_refused_in_words(model):
    with pytest.raises(NotImplementedError, match=r"use torch\.export"):
        torch.jit.script(model)
