"""Volume rendering in every backend: the definition's outputs and gradients, sizes, extremes, the operators, errors."""

import math

import pytest
import torch
from torch import Tensor

from kernels.volume_rendering import composite, expected_depth, median_depth, operators, visible

BACKENDS = ("torch", "native")
DTYPES = (torch.float64, torch.float32)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def divided(samples: int, rays: int) -> Tensor:
    """Offsets of rays of random lengths; some have no sample."""
    cuts = torch.randint(0, samples + 1, (max(rays - 1, 0),)).sort().values
    return torch.cat([torch.zeros(1, dtype=torch.int64), *([cuts, torch.tensor([samples])] if rays else [])])


def inputs(samples: int, rays: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    offsets = divided(samples, rays)
    start = torch.rand(samples).cumsum(0) / max(4, samples / 16)
    return {
        "density": (4 * torch.rand(samples).square()).to(dtype),
        "colour": torch.rand(samples, channels).to(dtype),
        "start": start.to(dtype),
        "end": (start + torch.rand(samples) / 4).to(dtype),
        "offsets": offsets,
        "background": torch.rand(channels).to(dtype),
    }


def results(given: dict[str, Tensor], backend: str, like: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All outputs, and the gradients through all of them; the same upstream each time, one of the colours of `like`."""
    leaves = {
        name: given[name].detach().requires_grad_()
        for name in ("density", "colour", "background")
        if given[name] is not None
    }
    outputs = composite(**given | leaves, backend=backend)
    generator = torch.Generator().manual_seed(1)
    rounded = torch.promote_types((like or given)["colour"].dtype, torch.bfloat16)
    upstream = [torch.randn(y.shape, generator=generator).to(rounded).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found = {name: y.detach() for name, y in zip(outputs._fields, outputs, strict=True)}
    return found | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def check(given: dict[str, Tensor], backend: str) -> None:
    """Against the reference in float64, by the largest absolute value of each; its dtypes against the reference's."""
    actual, narrow = (results(given, name) for name in (backend, "reference"))
    assert {name: x.dtype for name, x in actual.items()} == {name: x.dtype for name, x in narrow.items()}
    wide = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in given.items()}
    expected = results(wide, "reference", like=given)
    tolerance = max(TOLERANCES[x.dtype] for x in (given["density"], given["colour"]))
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1.0) if value.numel() else 1.0
        message = f"{name}: {{}}".format
        torch.testing.assert_close(actual[name].double(), value, rtol=0, atol=tolerance * scale, msg=message)


@pytest.mark.parametrize("samples", [1, 2, 63, 64, 65, 197, 6000])
@pytest.mark.parametrize("rays", [1, 2, 63, 197])
@each_backend
@each_dtype
def test_sizes(samples, rays, backend, dtype):
    check(inputs(samples, rays, dtype=dtype), backend)


@pytest.mark.parametrize("channels", [0, 1, 2, 4, 17, 40])
@each_backend
@each_dtype
def test_channels(channels, backend, dtype):
    check(inputs(65, 7, channels, dtype), backend)


@pytest.mark.parametrize(("samples", "rays"), [(0, 0), (0, 3), (5, 1)])
@every_backend
def test_empty_and_single(samples, rays, backend):
    given = inputs(samples, rays)
    check(given, backend)
    if samples == 0:
        out = composite(**given, backend=backend)
        assert torch.equal(out.colour, given["background"].expand(rays, 3))
        assert not out.opacity.any()
        assert not out.depth.any()


BACKGROUNDS = {"none": lambda: None, "one": lambda: torch.rand(3), "a-ray": lambda: torch.rand(9, 3)}


@pytest.mark.parametrize("background", BACKGROUNDS)
@each_backend
def test_backgrounds(background, backend):
    given = inputs(65, 9) | {"background": BACKGROUNDS[background]()}
    check(given, backend)
    behind = 0.0 if given["background"] is None else given["background"]
    black = composite(**given | {"background": None}, backend="reference")
    expected = black.colour + (1 - black.opacity)[:, None] * behind
    torch.testing.assert_close(composite(**given, backend=backend).colour, expected, rtol=0, atol=1e-6)


VIEWS = {
    "every-second": lambda x: x.repeat_interleave(2, 0)[::2],
    "column": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "transposed": lambda x: x.t().contiguous().t(),
}


@each_backend
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides(view, backend, dtype):
    given = inputs(65, 7, dtype=dtype)
    check({name: VIEWS[view](x) for name, x in given.items()}, backend)
    check(given | {"colour": given["colour"][:1].expand(65, 3), "density": given["density"][:1].expand(65)}, backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_narrow_dtypes(dtype, backend):
    given = inputs(97, 9, dtype=dtype)
    check(given, backend)
    out = composite(**given, backend=backend)
    assert [x.dtype for x in out] == [dtype, *[torch.float32] * 3]
    distances = {name: given[name].float() for name in ("start", "end")}
    check(given | distances, backend)
    wide = composite(**{name: x.float() if x.is_floating_point() else x for name, x in given.items()}, backend=backend)
    assert torch.equal(wide.colour.to(dtype), out.colour)
    assert all(torch.equal(a, b) for a, b in zip(wide[1:], out[1:], strict=True))


@every_backend
def test_one_wide_input_widens_the_arithmetic(backend):
    given = inputs(20, 3)
    out = composite(**given | {"start": given["start"].double()}, backend=backend)
    assert [x.dtype for x in out] == [torch.float32, *[torch.float64] * 3]


def extremes(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rays with opaque samples, samples of length 0, a last one that does not end, nothing at all, and thin fog."""
    rows = [
        ([1e10, 1.0, 1e10], [0.1, 0.1, 1e10]),
        ([0.0, 0.0, 0.0], [0.1, 0.0, 1e10]),
        ([3.0, 2.0, 5.0], [0.0, 0.2, 1e10]),
        ([1e-6, 2e-6, 0.0], [0.1, 0.1, 0.1]),
        ([1e10, 1e10, 1e10], [1e10, 1e10, 1e10]),
        ([0.5, 1e4, 0.5], [0.3, 0.3, 0.3]),
        ([0.7, 0.2, 0.1], [1.0, 0.5, 0.2]),
    ]
    density, length = (torch.tensor([row[i] for row in rows]).flatten() for i in range(2))
    start = torch.arange(3.0).repeat(len(rows))
    given = {"density": density, "colour": torch.rand(len(density), 3), "start": start, "end": start + length}
    given = {name: x.to(dtype) for name, x in given.items()}
    return given | {"offsets": torch.arange(0, 3 * len(rows) + 1, 3), "background": torch.rand(3, dtype=dtype)}


def check_extremes(backend: str, dtype: torch.dtype) -> None:
    given = extremes(dtype)
    actual, expected = (results(given, name) for name in (backend, "reference"))
    for name, value in actual.items():
        assert value.isfinite().all(), name
        # Lengths of 1e10 make depths and gradients of any size: each number by its own. What is left is rounding.
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=f"{name}: {{}}".format)
    assert not actual["gradient of density"][[1, 2, 12, 13, 14]].any()  # opaque, or behind it
    assert actual["weights"][9:11].tolist() == pytest.approx([1e-7, 2e-7], rel=1e-5)


@every_backend
@each_dtype
def test_extremes(backend, dtype):
    check_extremes(backend, dtype)


@each_backend
def test_nan_stays_in_its_ray(backend):
    given = inputs(60, 1) | {"offsets": torch.arange(0, 61, 10)}
    clean = results(given, backend)
    given["density"][23] = math.nan
    spoilt = results(given, backend)
    for name in ("colour", "opacity", "depth"):
        assert spoilt[name][2].isnan().all()
        assert torch.equal(spoilt[name][[0, 1, 3, 4, 5]], clean[name][[0, 1, 3, 4, 5]])
    others = [i for i in range(60) if not 20 <= i < 30]
    for name in ("weights", "gradient of density", "gradient of colour"):
        torch.testing.assert_close(spoilt[name][others], clean[name][others], rtol=0, atol=1e-6)


@each_backend
def test_one_ray_takes_no_digits_from_another(backend):
    """A running sum over all rays in float32 would leave none to the last one."""
    given = inputs(2000, 1)
    given |= {"density": torch.full((2000,), 1e8), "offsets": torch.tensor([0, 1990, 2000])}
    given["density"][1990:] = 1e-3
    alone = {name: x[1990:] for name, x in given.items() if name not in ("offsets", "background")}
    expected = composite(**alone, offsets=torch.tensor([0, 10]), backend="reference")
    actual = composite(**given | {"background": None}, backend=backend)
    torch.testing.assert_close(actual.weights[1990:], expected.weights, rtol=2e-6, atol=0)


@every_backend
def test_gradients_are_those_of_differences(backend):
    given = inputs(11, 4, 2, torch.float64)
    leaves = [given[name].requires_grad_() for name in ("density", "colour", "background")]

    def run(density, colour, background):
        changed = {"density": density, "colour": colour, "background": background}
        return tuple(composite(**given | changed, backend=backend))

    assert torch.autograd.gradcheck(run, leaves)
    if backend != "native":
        assert torch.autograd.gradgradcheck(run, leaves)


def test_gradients_of_gradients_of_the_kernel_are_refused():
    given = inputs(11, 4)
    density = given["density"].requires_grad_()
    colour = composite(**given, backend="native").colour.sum()
    [gradient] = torch.autograd.grad(colour, density, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        gradient.sum().backward()


def check_gradients_of_one_output(chosen: str, backend: str) -> None:
    """The other outputs are left out of the loss."""
    given, gradients = inputs(65, 4), []
    for name in ("reference", backend):
        leaves = {key: given[key].clone().requires_grad_() for key in ("density", "colour")}
        output = getattr(composite(**given | leaves, backend=name), chosen)
        gradients.append(torch.autograd.grad(output.exp().sum(), list(leaves.values()), materialize_grads=True))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * max(1.0, expected.abs().max().item()))


each_output = pytest.mark.parametrize("chosen", ["colour", "opacity", "depth", "weights"])


@each_backend
@each_output
def test_any_output_may_lack_a_gradient(chosen, backend):
    check_gradients_of_one_output(chosen, backend)


@every_backend
def test_distances_have_no_gradient(backend):
    given = inputs(12, 3)
    given |= {name: given[name].requires_grad_() for name in ("start", "density")}
    composite(**given, backend=backend).depth.sum().backward()
    assert given["start"].grad is None
    assert given["density"].grad is not None


def test_any_thread_count_gives_the_same_bits():
    given = inputs(20000, 900)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(given, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:] for name in run)


def test_operators_pass_opcheck():
    given = inputs(65, 7)
    tensors = [given[name] for name in ("density", "colour", "start", "end", "offsets")]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    torch.library.opcheck(operators.volume_rendering, (*tensors, "native"))
    upstream = (torch.rand(7, 3), torch.rand(7), None, torch.rand(65))
    tensors = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(operators.volume_rendering_backward, (*upstream, torch.rand(65), *tensors, "native"))
    torch.library.opcheck(operators.visible_samples, (tensors[0], *tensors[2:], 1e-4, 0.0))


@each_backend
def test_compiles_without_graph_breaks(backend):
    given = inputs(65, 7)

    def run(density, colour):
        return composite(**given | {"density": density, "colour": colour}, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outcomes = []
    for function in (compiled, run):
        leaves = [given[name].clone().requires_grad_() for name in ("density", "colour")]
        outputs = function(*leaves)
        outcomes.append([*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


class _Rays(torch.nn.Module):
    def forward(self, density, colour, start, end, offsets):
        return tuple(composite(density, colour, start, end, offsets, background=colour.new_ones(3)))


def test_exports_as_plain_operations_for_any_number_of_samples():
    names = ("density", "colour", "start", "end", "offsets")
    samples, rays = torch.export.Dim("samples"), torch.export.Dim("bounds", min=3)
    shapes = {name: {0: rays if name == "offsets" else samples} for name in names}
    example = {name: x for name, x in inputs(65, 7).items() if name in names}
    program = torch.export.export(_Rays(), (), example, dynamic_shapes=shapes)
    assert not any("gated_vision" in str(node.target) for node in program.graph.nodes)
    others = {name: x for name, x in inputs(31, 5).items() if name in names}
    for actual, expected in zip(program.module()(**others), _Rays()(**others), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("transmittance", "alpha"), [(1e-4, 0.0), (0.5, 0.0), (0.0, 0.3), (0.2, 0.1)])
@each_backend
@each_dtype
def test_visibility(transmittance, alpha, backend, dtype):
    given = inputs(197, 9, dtype=dtype)
    given["density"] *= 4
    distances = [given[name] for name in ("start", "end", "offsets")]
    seen = visible(given["density"].requires_grad_(), *distances, transmittance, alpha, backend=backend)
    expected = visible(given["density"], *distances, transmittance, alpha, backend="reference")
    assert (seen.dtype, seen.requires_grad) == (torch.bool, False)
    assert 0 < seen.sum() < 197
    assert torch.equal(seen, expected)
    given["density"].data[:] = 0
    assert visible(given["density"], *distances, transmittance, backend=backend).all()


def test_what_is_not_visible_changes_nothing_much():
    given = inputs(400, 2) | {"background": None}
    given["density"] *= 5
    seen = visible(*(given[name] for name in ("density", "start", "end", "offsets")), 1e-4)
    kept = {name: given[name][seen] for name in ("density", "colour", "start", "end")}
    offsets = torch.nn.functional.pad(seen.cumsum(0), (1, 0))[given["offsets"]]
    few, all_samples = composite(**kept, offsets=offsets), composite(**given)
    assert seen.sum() < 300
    torch.testing.assert_close(few.colour, all_samples.colour, rtol=0, atol=1e-4)


def test_depths_by_hand():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.2, 0.1, 0.6, 0.6])
    start, offsets = torch.arange(8.0), torch.tensor([0, 0, 4, 6, 8, 8])
    assert median_depth(weights, start, start + 1, offsets).tolist() == [0, 2.5, 5.5, 6.5, 0]
    assert median_depth(weights[:0], start[:0], start[:0], torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0]
    depth, opacity = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.5, 0.0, 1.0])
    assert expected_depth(depth, opacity).tolist() == [2, 0, 3]
    middle = torch.tensor([0.5, 1.5])
    assert expected_depth(depth, opacity, convention="nerfstudio", middle=middle).tolist() == [1.5, 0.5, 1.5]
    with pytest.raises(ValueError, match="middle is empty"):
        expected_depth(depth, opacity, convention="nerfstudio")
    with pytest.raises(ValueError, match="convention is 'nerf'; valid are 'nerfacc', 'nerfstudio'"):
        expected_depth(depth, opacity, convention="nerf")


WRONG = {
    "density-matrix": ({"density": torch.ones(4, 1)}, r"density has shape \(4, 1\); it must be \(S,\)"),
    "start": ({"start": torch.ones(3)}, r"start has shape \(3,\); with 4 densities it must be \(4,\)"),
    "end": ({"end": torch.ones(4, 1)}, r"end has shape \(4, 1\)"),
    "colour": ({"colour": torch.ones(3, 3)}, r"colour has shape \(3, 3\); with 4 densities it must be \(4, C\)"),
    "background": ({"background": torch.ones(4)}, r"background has shape \(4,\); it must be \(3,\) or, .* \(2, 3\)"),
    "integers": ({"density": torch.ones(4, dtype=torch.int64)}, "density has dtype torch.int64"),
    "device": ({"colour": torch.ones(4, 3, device="meta")}, "colour is on meta and density on cpu"),
    "no-offsets": ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"offsets has shape \(0,\); it must be \(rays \+ 1"),
    "offsets-dtype": (
        {"offsets": torch.tensor([0, 2, 4]).int()},
        "offsets has dtype torch.int32; it must be torch.int",
    ),
    "offsets-begin": ({"offsets": torch.tensor([1, 2, 4])}, r"offsets\[0\] is 1; it must be 0"),
    "offsets-fall": ({"offsets": torch.tensor([0, 5, 4])}, r"offsets\[1\] and offsets\[2\] are \[5, 4\]"),
    "offsets-end": ({"offsets": torch.tensor([0, 2, 3])}, "the last of offsets is 3; .* number of samples, 4"),
    "backend": ({"backend": "cuda"}, "backend is 'cuda'"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_what_does_not_fit_is_named(case, backend):
    changes, message = WRONG[case]
    given = {
        "density": torch.ones(4), "colour": torch.ones(4, 3), "start": torch.zeros(4), "end": torch.ones(4),
        "offsets": torch.tensor([0, 2, 4]), "backend": backend,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        composite(**given | changes)


def test_limits_of_visibility_are_fractions():
    given = [torch.ones(2), torch.zeros(2), torch.ones(2), torch.tensor([0, 2])]
    with pytest.raises(ValueError, match=r"transmittance is 2\.0; it must be from 0 to 1"):
        visible(*given, 2.0)
    with pytest.raises(ValueError, match="alpha is -1"):
        visible(*given, alpha=-1)
    with pytest.raises(RuntimeError, match="visibility has no triton kernel"):
        visible(*given, backend="triton")
