"""What the definition of window retention must satisfy, by other means than its own; its errors; the runs of tokens."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.window_retention import reference, tables, window_retention
from kernels.window_retention.arguments import Settings
from tests.kernels.retention_cases import (
    OPTIONS,
    Case,
    arguments,
    compare,
    log_decays,
    make_inputs,
)

BACKENDS = ("reference", "torch", "native")
SHIFTED = Case((14, 14), (7, 7), (3, 3), 2, 3, 16, 16)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def softmax_settings(case: Case) -> Settings:
    return Settings(tuple(log_decays(case.heads)), (), case.window, case.shift, "softmax", "clamp", False, True, 0.25)


def meet(a: int, b: int, length: int, window: int, shift: int) -> bool:
    """Whether places of an axis, rolled by -shift, are in one window and on one side of the wrap-around."""
    rolled = [(place - shift) % length for place in (a, b)]
    return len({(place // window, place >= length - shift) for place in rolled}) == 1


@pytest.mark.parametrize("length", range(1, 21))
def test_runs_hold_exactly_what_may_meet(length):
    for window in range(1, min(length, 8) + 1):
        for shift in range(window):
            runs = tables.runs(length, window, shift)
            run_of = [i for i, (start, stop) in enumerate(runs) for _ in range(start, stop)]
            assert [place for start, stop in runs for place in range(start, stop)] == list(range(length))
            for a in range(length):
                met = [run_of[a] == run_of[b] for b in range(length)]
                assert met == [meet(a, b, length, window, shift) for b in range(length)], (window, shift)


def direct_weights(scores: list[complex], steps: list[int], decay: float, slope: float | None, options: dict) -> list:
    """Weights of one token's keys, from plain numbers."""
    if options.get("activation") != "sigmoid":
        exponentials = [math.exp(score.real + abs(n) * decay) for score, n in zip(scores, steps, strict=True)]
        return [e / sum(exponentials) for e in exponentials]
    weights = []
    for score, n in zip(scores, steps, strict=True):
        bias = 0 if slope is None else slope * (n if options.get("signed_slopes") else abs(n))
        weights.append(math.exp(abs(n) * decay) / (1 + math.exp(-(score.real + bias))))
    total = {"clamp": max(sum(weights), 1.0), "sum": sum(weights), "none": 1.0}[options.get("normalization", "clamp")]
    return [weight / total for weight in weights]


def direct_head(query: Tensor, key: Tensor, value: Tensor, decay: float, slope: float | None, options: dict) -> Tensor:
    """One head (H, W, D or V), token by token over the runs; a pair of channels is one complex number."""
    runs = [tables.runs(*axis) for axis in zip(query.shape[:2], options["window"], options["shift"], strict=True)]
    pairs = query.shape[2] // 2
    speeds = torch.tensor([10000 ** (-m / max(pairs - 1, 1)) for m in range(pairs)], dtype=torch.float64)

    def rotated(x: Tensor, place: int) -> Tensor:
        return torch.complex(*x.unflatten(-1, (-1, 2)).unbind(-1)) * torch.exp(1j * place * speeds)

    def attend(token: tuple[int, int], met: list[tuple[int, int]], corner: tuple[int, int], values: dict) -> Tensor:
        def place(t: tuple[int, int]) -> int:
            return (t[0] - corner[0]) * options["window"][1] + t[1] - corner[1]

        q = rotated(query[token], place(token)).conj()
        scores = [query.shape[2] ** -0.5 * (q * rotated(key[other], place(other))).sum().item() for other in met]
        steps = [token[0] - other[0] + token[1] - other[1] for other in met]
        weights = direct_weights(scores, steps, decay, slope, options)
        return sum(weight * values[other] for weight, other in zip(weights, met, strict=True))

    output = torch.empty_like(value)
    for top, bottom in runs[0]:
        for left, right in runs[1]:
            tokens = [(h, w) for h in range(top, bottom) for w in range(left, right)]
            values = {token: value[token] for token in tokens}
            for axis in (0, 1):  # tokens of one row, then tokens of one column
                values = {
                    token: attend(token, [t for t in tokens if t[axis] == token[axis]], (top, left), values)
                    for token in tokens
                }
            for token in tokens:
                output[token] = values[token]
    return output


@pytest.mark.parametrize("name", ["softmax", "sigmoid-clamp-slopes", "sigmoid-sum-signed", "sigmoid-none-signed"])
def test_reference_is_a_plain_loop_over_tokens(name):
    case = Case((5, 7), (3, 4), (2, 1), 1, 2, 6, 3)
    options = arguments(case, OPTIONS[name])
    inputs = [x.double() for x in make_inputs(case)]
    slopes = options.get("slopes", [None] * case.heads)
    heads = [
        direct_head(*(x[0, :, :, head] for x in inputs), options["log_decay"][head], slopes[head], options)
        for head in range(case.heads)
    ]
    compare([window_retention(*inputs, backend="reference", **options)], [torch.stack(heads, 2)[None]], (1e-13, 0))


@each_backend
@pytest.mark.parametrize("name", ["softmax", "sigmoid-clamp"])
def test_nothing_crosses_the_seam(name, backend):
    """The last window holds the map's end and, rolled beside it, its beginning."""
    inputs = [x.requires_grad_() for x in make_inputs(SHIFTED)]
    output = window_retention(*inputs, backend=backend, **arguments(SHIFTED, OPTIONS[name]))
    gradients = torch.autograd.grad(output[:, :3].sum() + output[:, 3:, :3].sum(), inputs)
    for gradient in gradients:
        assert gradient[:, :3].any()
        assert gradient[:, 3:, :3].any()
        assert not gradient[:, 3:, 3:].any()


@each_backend
def test_one_window_on_the_map_is_attention_along_rows_and_columns(backend):
    case = Case((9, 12), (9, 12), (0, 0), 2, 3, 16, 8)
    query, key, value = make_inputs(case)
    expected = value
    for axis in (2, 1):
        q, k, v = (x.movedim(axis, -2) for x in (query, key, expected))  # (B, lines, heads, tokens, channels)
        places = torch.arange(case.size[axis - 1])
        bias = (places[:, None] - places).abs() * torch.tensor(log_decays(case.heads))[:, None, None]
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).movedim(-2, axis)
    output = window_retention(query, key, value, rotary=False, backend=backend, **arguments(case, {}))
    compare([output], [expected], (2e-6, 0))


def along_lines(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Both passes as scaled dot-product attention with a bias, along the lines of each window."""
    size, decays = query.shape[1:3], torch.tensor(settings.log_decay)[:, None, None, None]
    query, key, value = (reference.partition(x, settings) for x in (query, key, value))
    query, key = (reference.rotate(x, settings.window) for x in (query, key))
    # (B, down, along, heads, window height, window width, channels)
    for axis in (1, 0):
        if axis == 0:
            query, key, value = (x.transpose(-3, -2) for x in (query, key, value))
        length, shift, places = settings.window[axis], settings.shift[axis], torch.arange(settings.window[axis])
        allowed = tables.allowed(size[axis], length, shift)
        allowed = allowed[:, None, None] if axis == 1 else allowed[:, None, None, None]
        bias = ((places[:, None] - places).abs() * decays).masked_fill(~allowed, -math.inf)
        value = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=settings.scale)
    return reference.merge(value.transpose(-3, -2), size, settings)


def dense_windows(
    query: Tensor, key: Tensor, value: Tensor, settings: Settings
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Queries, keys (rotated) and values of all T tokens of each window, (B, down, along, heads, T, channels), and by
    axis the bias of all its pairs of tokens: minus infinity between those of different lines."""
    size, decays = query.shape[1:3], torch.tensor(settings.log_decay)[:, None, None]
    query, key, value = (reference.partition(x, settings) for x in (query, key, value))
    query, key = (reference.rotate(x, settings.window) for x in (query, key))
    places = torch.cartesian_prod(*map(torch.arange, settings.window))
    steps, biases = places[:, None] - places, {}
    for axis in (1, 0):
        allowed = tables.allowed(size[axis], settings.window[axis], settings.shift[axis])
        allowed = allowed[:, places[:, None, axis], places[:, axis]] & (steps[..., 1 - axis] == 0)
        allowed = allowed[:, None] if axis == 1 else allowed[:, None, None]
        biases[axis] = (steps[..., axis].abs() * decays).masked_fill(~allowed, -math.inf)
    return [x.flatten(-3, -2) for x in (query, key, value)], biases


def in_dense_windows(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Both passes as scaled dot-product attention over all tokens of a window."""
    size = query.shape[1:3]
    (query, key, value), biases = dense_windows(query, key, value, settings)
    for bias in biases.values():
        value = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=settings.scale)
    return reference.merge(value.unflatten(-2, settings.window), size, settings)


def by_shared_scores(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
    """Both passes from one matrix of the scores of all pairs of tokens of a window."""
    size = query.shape[1:3]
    (query, key, value), biases = dense_windows(query, key, value, settings)
    scores = query @ key.transpose(-1, -2) * settings.scale
    for bias in biases.values():
        value = (scores + bias).softmax(-1) @ value
    return reference.merge(value.unflatten(-2, settings.window), size, settings)


@pytest.mark.parametrize(
    "case",
    [SHIFTED, Case((14, 14), (7, 7), (0, 0), 1, 3), Case((17, 9), (7, 4), (3, 2), 1, 2)],
    ids=str,
)
def test_all_forms_of_the_softmax_agree(case):
    inputs = make_inputs(case)
    settings = softmax_settings(case)
    grad = torch.randn(inputs[2].shape)

    def results(form, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = form(*leaves)
        return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]

    expected = results(partial(reference.window_retention, settings=settings), torch.float64)
    options = arguments(case, {"scale": settings.scale})
    forms = [partial(form, settings=settings) for form in (along_lines, in_dense_windows, by_shared_scores)]
    forms += [partial(window_retention, backend=backend, **options) for backend in BACKENDS]
    for form in forms:
        for actual, target in zip(results(form, torch.float32), expected, strict=True):
            assert (actual - target).abs().max() < 1e-5, form


def test_clamped_sigmoids_are_a_softmax_scaled_down():
    """softmax(logsigmoid(z) + |i - j| log gamma) * min(exp(logsumexp), 1), which a flash attention can give."""
    scores = 3 * torch.randn(4, 5, 5, dtype=torch.float64) - 2
    log_decay = -torch.rand(4, 5, 5, dtype=torch.float64)
    mask = torch.rand(4, 5, 5) < 0.7
    mask.diagonal(dim1=-2, dim2=-1).fill_(True)
    bias = log_decay.masked_fill(~mask, -math.inf)
    settings = Settings((), (), (5, 5), (0, 0), "sigmoid", "clamp", False, False, 1.0)
    logits = F.logsigmoid(scores) + bias
    sums = logits.logsumexp(-1, keepdim=True).exp()
    assert (sums < 1).any()
    assert (sums > 1).any()
    expected = logits.softmax(-1) * sums.clamp(max=1)
    compare([reference.normalized_weights(scores, bias, None, settings)], [expected], (1e-14, 0))


@each_backend
def test_without_decay_rotation_and_slopes_places_in_a_line_do_not_matter(backend):
    case = Case((4, 12), (2, 6), batch=1, heads=2)
    options = arguments(case, {"log_decay": [0.0, 0.0], "rotary": False, "backend": backend})
    inputs = make_inputs(case)
    order = torch.tensor([3, 1, 5, 0, 4, 2, *range(6, 12)])  # within the first window
    compare(
        [window_retention(*(x[:, :, order] for x in inputs), **options)],
        [window_retention(*inputs, **options)[:, :, order]],
        (1e-6, 0),
    )


def test_windows_of_one_token_return_the_values():
    inputs = make_inputs(SHIFTED)
    options = {"log_decay": log_decays(3), "window": (1, 1)}
    for backend in BACKENDS:
        assert torch.equal(window_retention(*inputs, backend=backend, **options), inputs[2])
        output = window_retention(*inputs, backend=backend, activation="sigmoid", **options)
        weight = torch.sigmoid((inputs[0] * inputs[1]).sum(-1, keepdim=True) / 4)
        compare([output], [inputs[2] * weight**2], (2e-6, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": (2, 4, 6, 8)},
            r"query has shape \(2, 4, 6, 8\); it must be \(batch, height, width, heads, head_dim\)",
        ),
        ({"value": (2, 4, 6, 8)}, r"value has shape \(2, 4, 6, 8\); it must be"),
        ({"key": (1, 4, 6, 2, 4)}, r"key has shape \(1, 4, 6, 2, 4\).*it must be \(1, 4, 6, 2, 8\)"),
        ({"value": (1, 4, 6, 3, 8)}, r"value has shape \(1, 4, 6, 3, 8\).*it must be \(1, 4, 6, 2, 8\)"),
        ({"query": (1, 4, 6, 2, 7), "key": (1, 4, 6, 2, 7)}, "head_dim 7; rotary turns channels in pairs"),
        ({"window": (5, 3)}, r"window is \(5, 3\), but the map has 4 rows; valid are 1 to 4"),
        ({"window": (2, 7)}, r"window is \(2, 7\), but the map has 6 columns; valid are 1 to 6"),
        ({"window": (0, 3)}, r"window is \(0, 3\)"),
        ({"window": (2, 3, 1)}, r"window is \(2, 3, 1\).*it is a pair of integers"),
        ({"shift": (1,)}, r"shift is \(1,\); it is a pair of integers"),
        ({"shift": (2, 0)}, r"shift is \(2, 0\) with window \(2, 3\); valid are 0 to 1"),
        ({"shift": (0, -1)}, r"shift is \(0, -1\) with window \(2, 3\); valid are 0 to 2"),
        ({"activation": "relu"}, "activation is 'relu'; valid are 'softmax', 'sigmoid'"),
        ({"normalization": "mean"}, "normalization is 'mean'; valid are 'clamp', 'sum', 'none'"),
        ({"slopes": [0.5, 0.5]}, "slopes are given with activation 'softmax'"),
        ({"slopes": [0.5], "activation": "sigmoid"}, "slopes has 1 entries; query has 2 heads"),
        ({"slopes": [0.5, math.inf], "activation": "sigmoid"}, "slopes is .*inf.*must be finite"),
        ({"log_decay": [-0.1]}, "log_decay has 1 entries; query has 2 heads"),
        ({"log_decay": [-0.1, 0.1]}, "log_decay holds 0.1; natural logarithms of decays are finite and <= 0"),
        ({"log_decay": [-0.1, math.nan]}, "log_decay holds nan"),
        ({"log_decay": [-math.inf, -0.1]}, "log_decay holds -inf"),
        ({"scale": math.nan}, "scale is .*nan.*must be finite"),
        ({"backend": "cuda"}, "backend is 'cuda'; valid backends are reference, torch, native, triton"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changes, message):
    kept = {name: (1, 4, 6, 2, 8) for name in ("query", "key", "value")}
    made = kept | {"log_decay": [-0.1, -0.2], "window": (2, 3)} | changes
    for name in kept:
        made[name] = torch.randn(made[name])
    with pytest.raises(ValueError, match=message):
        window_retention(**made)


def test_devices_and_dtypes_must_fit():
    query, key, value = make_inputs(SHIFTED)
    options = arguments(SHIFTED, {})
    with pytest.raises(ValueError, match="value is on meta and query on cpu"):
        window_retention(query, key, value.to("meta"), **options)
    with pytest.raises(ValueError, match=r"key has dtype torch\.int64; it must be a floating-point tensor"):
        window_retention(query, key.long(), value, **options)
