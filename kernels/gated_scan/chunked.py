"""The gated scan in chunks, in plain PyTorch: the portable and the exportable form.

Inside a chunk of C tokens every pair (i, j <= i) has its decay exp(sum of log_decay over j+1..i); between chunks the
state is carried. Every exponent is a plain sum of log decays, never a difference of sums, so it is <= 0 and keeps its
precision however strong a gate is. Formulas: ViG's scan (arXiv 2405.18425) in the chunked form of gated linear
attention (arXiv 2312.06635, section 4).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8  # tokens; the (C, C, K) tensor of pair decays dominates, so short chunks win on CPU
NO_DECAY_BELOW = -1000.0  # exp of it is 0 in float32 and float64; keeps -inf out of products with 0


def gated_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    scale: float,
    reverse: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One direction. Shapes as in `kernels.gated_scan.gated_scan`; every argument has the same dtype."""
    batch, tokens, heads, key_dim = query.shape
    state = initial_state
    if state is None:
        state = value.new_zeros(batch, heads, key_dim, value.shape[-1])
    if tokens == 0:
        return value.clone(), state
    if reverse:
        query, key, value, log_decay = (x.flip(1) for x in (query, key, value, log_decay))

    chunks = -(-tokens // CHUNK)
    padding = (0, 0, 0, 0, 0, chunks * CHUNK - tokens)  # zero keys and zero log decays leave the state as it is

    def in_chunks(x: Tensor) -> Tensor:
        return F.pad(x, padding).unflatten(1, (chunks, CHUNK)).transpose(2, 3)  # (B, n, H, C, D)

    query, key, value, log_decay = (in_chunks(x) for x in (query * scale, key, value, log_decay))
    log_decay = log_decay.clamp(min=NO_DECAY_BELOW)

    # between[i, j] = sum of log_decay over j+1..i, as one product with a matrix of zeros and ones; 0 where j > i.
    i, j, r = torch.meshgrid(*[torch.arange(CHUNK, device=query.device)] * 3, indexing="ij")
    contains = ((j < r) & (r <= i)).to(log_decay.dtype)  # (i, j, r)
    between = (contains.flatten(0, 1) @ log_decay).unflatten(-2, (CHUNK, CHUNK))  # (B, n, H, i, j, K)
    scores = ((between.exp() * key[..., None, :, :]) @ query[..., None]).squeeze(-1).tril()  # (B, n, H, i, j)
    output = scores @ value  # (B, n, H, C, V)

    from_start = (log_decay[..., :1, :] + between[..., :, 0, :]).exp()  # the state before the chunk, seen by token i
    to_end = between[..., -1, :, :].exp()  # the update of token j, seen after the chunk
    updates = (key * to_end).transpose(-1, -2) @ value  # (B, n, H, K, V)
    carry = _carry_in_log_steps if torch.compiler.is_exporting() else _carry_in_turn
    incoming, state = carry(state, from_start[..., -1, :, None], updates)
    output = output + (query * from_start) @ incoming

    output = output.transpose(2, 3).flatten(1, 2)[:, :tokens]
    return (output.flip(1) if reverse else output), state


def _carry_in_turn(state: Tensor, decays: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B, n, H, K, V) and after the last: a loop over chunks.

    Args:
        state: (B, H, K, V) before the first chunk.
        decays: (B, n, H, K, 1), each chunk's total decay.
        updates: (B, n, H, K, V), each chunk's state from zero.
    """
    incoming = []
    for decay, update in zip(decays.unbind(1), updates.unbind(1), strict=True):
        incoming.append(state)
        state = decay * state + update
    return torch.stack(incoming, dim=1), state


def _carry_in_log_steps(state: Tensor, decays: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """The same as a prefix scan (Hillis and Steele): more arithmetic, but a graph of log2(n) steps instead of n."""
    states = torch.cat((state[:, None], updates), dim=1)  # (B, n + 1, H, K, V), the first one before any chunk
    decays = torch.cat((torch.ones_like(decays[:, :1]), decays), dim=1)
    reach = 1
    while reach < states.shape[1]:
        states = torch.cat((states[:, :reach], states[:, reach:] + decays[:, reach:] * states[:, :-reach]), dim=1)
        decays = torch.cat((decays[:, :reach], decays[:, reach:] * decays[:, :-reach]), dim=1)
        reach *= 2
    return states[:, :-1], states[:, -1]


def bidirectional_gated_scan(
    query: Tensor, key: Tensor, value: Tensor, log_decay_forward: Tensor, log_decay_backward: Tensor, scale: float
) -> Tensor:
    """Mean of both directions; shapes as in `kernels.gated_scan.bidirectional_gated_scan`."""
    forward, _ = gated_scan(query, key, value, log_decay_forward, scale, False, None)
    backward, _ = gated_scan(query, key, value, log_decay_backward, scale, True, None)
    return (forward + backward) / 2
