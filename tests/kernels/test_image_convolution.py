"""The convolution added to the end of a sequence: against its definition, in place, and where it must not be."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_layers import add_image_convolution, native, operators

GRID = (5, 9)


def inputs(channels: int = 16, before: int = 3, kernel: int = 5, batch: int = 2) -> list[Tensor]:
    """Tokens, x, weight, bias."""
    tokens = before + GRID[0] * GRID[1]
    sequences = (torch.randn(batch, tokens, channels) for _ in range(2))
    return [*sequences, torch.randn(channels, 1, kernel, kernel) / kernel, torch.randn(channels)]


def defined(tokens: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    before = tokens.shape[1] - GRID[0] * GRID[1]
    image = x[:, before:].unflatten(1, GRID).permute(0, 3, 1, 2)
    local = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return tokens + F.pad(local.flatten(2).transpose(1, 2), (0, 0, before, 0))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("channels", [16, 7, 65])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_values_and_gradients(backend, before, channels, bias):
    leaves = [x.double().requires_grad_() for x in inputs(channels, before)[: 4 if bias else 3]]
    grad = torch.randn(leaves[0].shape, dtype=torch.float64)
    expected = defined(*leaves, *([] if bias else [None]))
    exact = [expected, *torch.autograd.grad(expected, leaves, grad)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        given = [x.detach().to(dtype).requires_grad_() for x in leaves]
        output = add_image_convolution(*given, grid=GRID, backend=backend)
        assert output.dtype == dtype
        actual = [output, *torch.autograd.grad(output, given, grad.to(dtype))]
        for a, e in zip(actual, exact, strict=True):
            assert (a.double() - e).abs().max() < tolerance * e.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_in_place(backend, dtype):
    tokens, *rest = (x.to(dtype) for x in inputs())
    given = tokens.clone()
    with torch.no_grad():
        expected = add_image_convolution(given, *rest, grid=GRID, backend=backend)
        output = add_image_convolution(given, *rest, grid=GRID, overwrite=True, backend=backend)
    assert output is given
    assert torch.equal(output[:, :3], tokens[:, :3])
    torch.testing.assert_close(output, expected)


def test_views_are_written_and_read_where_they_lie():
    tokens, x, *rest = inputs()
    wide = [torch.randn(2, tokens.shape[1] + 2, 24) for _ in range(2)]
    views = [t[:, 1:-1, 4:20].copy_(source) for t, source in zip(wide, (tokens, x), strict=True)]
    around = wide[0].clone()
    expected = add_image_convolution(tokens, x, *rest, grid=GRID, backend="native")
    assert torch.equal(add_image_convolution(*views, *rest, grid=GRID, backend="native"), expected)
    add_image_convolution(*views, *rest, grid=GRID, overwrite=True, backend="native")
    around[:, 1:-1, 4:20] = expected
    assert torch.equal(wide[0], around)
    scattered = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    add_image_convolution(scattered, x, *rest, grid=GRID, overwrite=True, backend="native")
    assert torch.equal(scattered, expected)


SHARED = {  # tokens and x as views of one tensor (2, 60, 32)
    "the same": lambda memory: (memory[:, :48, :16].contiguous(),) * 2,
    "x a token later": lambda memory: (memory[:, :48], memory[:, 1:49]),
    "x a token earlier": lambda memory: (memory[:, 1:49], memory[:, :48]),
    "next image": lambda memory: (memory[:1, :48], memory.flatten(0, 1)[None, 40:88]),
    "one x for both images": lambda memory: (memory[:, :48], memory[:, :48].as_strided((2, 48, 32), (0, 32, 1))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("views", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_in_place_where_x_shares_the_memory(backend, views, dtype):
    tokens, x = views(torch.randn(2, 60, 32, dtype=dtype))
    weight, bias = (t.to(dtype) for t in inputs(tokens.shape[2])[2:])
    expected = add_image_convolution(tokens.clone(), x.clone(), weight, bias, grid=GRID, backend=backend)
    output = add_image_convolution(tokens, x, weight, bias, grid=GRID, overwrite=True, backend=backend)
    assert output is tokens
    torch.testing.assert_close(output, expected)


def test_only_an_x_that_may_overlap_is_copied():
    memory = torch.zeros(4, 10)
    assert native._may_overlap(memory, memory[3:, 9:])
    assert not native._may_overlap(memory[:2], memory[2:])
    assert not native._may_overlap(memory[2:, 1:], memory[:2])
    assert not native._may_overlap(memory, memory.clone())
    assert not native._may_overlap(memory, memory[:0])


def test_nothing_but_x_and_the_weight_is_kept():
    tokens, x, weight, bias = (t.requires_grad_() for t in inputs())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        add_image_convolution(tokens, x, weight, bias, grid=GRID, backend="native")
    assert kept == [x.data_ptr(), weight.data_ptr(), bias.data_ptr()]


def test_dtypes_may_differ():
    tokens, *rest = inputs()
    expected = add_image_convolution(tokens.bfloat16().float(), *rest, grid=GRID, backend="native")
    actual = add_image_convolution(tokens.bfloat16(), *rest, grid=GRID, backend="native")
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_convolve(batch):
    tokens, x, weight, bias = (t.requires_grad_() for t in inputs(batch=batch))
    grid = (0, 4) if batch else GRID
    output = add_image_convolution(tokens, x, weight, bias, grid=grid, backend="native")
    assert torch.equal(output, tokens)
    output.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (x, weight, bias))


def test_opcheck():
    leaves = tuple(x.requires_grad_() for x in inputs(5))
    torch.library.opcheck(operators.add_image_convolution, (*leaves, *GRID))
    torch.library.opcheck(operators.add_image_convolution_, (*inputs(5), *GRID))


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    given = inputs(8)

    def function(*tensors: Tensor) -> Tensor:
        return add_image_convolution(*tensors, grid=GRID, backend="native", overwrite=not torch.is_grad_enabled())

    expected = add_image_convolution(*given, grid=GRID, backend="native")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(given[0].clone(), *given[1:]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, x, w, b: (t, x[:, :9], w, b), r"with \(5, 9\) tokens at least"),
        (lambda t, x, w, b: (t[:, :9], x, w, b), r"tokens has shape \(2, 9, 16\)"),
        (lambda t, x, w, b: (t, x, w[..., :4, :4], b), "with K odd"),
        (lambda t, x, w, b: (t, x, w, b[:3]), r"bias has shape \(3,\)"),
    ],
    ids=["x", "tokens", "weight", "bias"],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        add_image_convolution(*change(*inputs()), grid=GRID)


def test_no_overwriting_where_a_gradient_is_wanted():
    tokens, x, weight, bias = inputs()
    with pytest.raises(ValueError, match="overwrite is True, and a gradient is wanted"):
        add_image_convolution(tokens, x, weight.requires_grad_(), bias, grid=GRID, overwrite=True)
