"""The Triton kernels of the gated scan; `triton.py` launches them and explains the algorithm.

Legend: C tokens of a chunk, K and V the tile of the key and of the value dimension; a comment gives a tile's shape.
Between a query and a key lies a point of reference: the border of two segments of the chunk, or of two chunks. The
query's exponent sums the log decays from there to its token, its own included; the key's those beyond its token up to
there. They are plain sums, never differences of sums: <= 0, and exact beside a decay of -1e4.
"""

import triton
import triton.language as tl

from kernels.gpu.triton import log_sigmoid


@triton.jit
def _place(chunks, tiles, heads, CHUNK: tl.constexpr):
    """This program's chunk, tile, sequence (batch element and head), batch element, head, and tokens [C]."""
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    tile = (program // chunks) % tiles
    sequence = program // chunks // tiles
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    return chunk, tile, sequence, sequence // heads, sequence % heads, tokens


@triton.jit
def _pointers(tensor, strides, batch, head, tokens, dims):
    """Addresses [tokens, dims] in one head of a (B, N, H, D) tensor of any strides."""
    rows = tokens.to(tl.int64)[:, None] * strides[1]
    columns = dims.to(tl.int64)[None, :] * strides[3]
    return tensor + (batch * strides[0] + head * strides[2]) + rows + columns


@triton.jit
def _contiguous_offsets(batch, head, tokens, dims, token_count, heads, dim_count):
    """Offsets [tokens, dims] in one head of a contiguous (B, N, H, D) tensor."""
    rows = ((batch * token_count + tokens) * heads + head) * dim_count
    return rows[:, None] + dims[None, :]


@triton.jit
def _load(tensor, strides, batch, head, tokens, dims, token_count, dim_count):
    inside = (tokens < token_count)[:, None] & (dims < dim_count)[None, :]
    return tl.load(_pointers(tensor, strides, batch, head, tokens, dims), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _log_decays(gate, strides, batch, head, tokens, keep, dims, dim_count, normalizer, LOGITS: tl.constexpr):
    """Log decays [tokens, dims] in float32, 0 where `keep` is false."""
    inside = keep[:, None] & (dims < dim_count)[None, :]
    pointers = _pointers(gate, strides, batch, head, tokens, dims)
    if not LOGITS:
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    logits = tl.load(pointers, mask=inside, other=float("inf")).to(tl.float32)
    return log_sigmoid(logits) / normalizer


@triton.jit
def _first_sums(
    gate_forward, gate_forward_strides, gate_backward, gate_backward_strides,
    batch, head, tokens, dims, token_count, dim_count, normalizer,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Sums [C, K] of log decays in segments of one token: forward query and key, backward query and key."""
    keep = tokens < token_count
    zero = tl.zeros([tokens.shape[0], dims.shape[0]], tl.float32)
    forward, backward = zero, zero
    if FORWARD:
        forward = _log_decays(
            gate_forward, gate_forward_strides, batch, head, tokens, keep, dims, dim_count, normalizer, LOGITS
        )
    if BACKWARD:
        backward = _log_decays(
            gate_backward, gate_backward_strides, batch, head, tokens, keep, dims, dim_count, normalizer, LOGITS
        )
    return forward, zero, backward, zero


@triton.jit
def _merge_halves(
    forward_query, forward_key, backward_query, backward_key, level, FORWARD: tl.constexpr, BACKWARD: tl.constexpr
):
    """From sums in segments of 2 ** level tokens to sums in segments twice as long: add the other half's total.

    A segment's total is its last token's forward query sum and its first token's backward query sum.
    """
    position = tl.arange(0, forward_query.shape[0])[:, None]
    half = 1 << level
    second = ((position >> level) & 1) == 1
    start = (position >> (level + 1)) << (level + 1)
    if FORWARD:
        last = tl.where(second, start + half - 1, start + 2 * half - 1)
        other = tl.gather(forward_query, tl.broadcast_to(last, forward_query.shape), 0)
        forward_query += tl.where(second, other, 0.0)
        forward_key += tl.where(second, 0.0, other)
    if BACKWARD:
        first = tl.where(second, start, start + half)
        other = tl.gather(backward_query, tl.broadcast_to(first, backward_query.shape), 0)
        backward_query += tl.where(second, 0.0, other)
        backward_key += tl.where(second, other, 0.0)
    return forward_query, forward_key, backward_query, backward_key


@triton.jit
def _level_decays(
    forward_query, forward_key, backward_query, backward_key, level, FORWARD: tl.constexpr, BACKWARD: tl.constexpr
):
    """Decays [C, K] of queries and of keys to the middle of their block of 2 ** (level + 1) tokens.

    In a block the forward direction pairs queries of the second half with keys of the first, the backward direction
    queries of the first half with keys of the second: each token has one query and one key decay for both directions.
    """
    second = (((tl.arange(0, forward_query.shape[0]) >> level) & 1) == 1)[:, None]
    nothing = tl.full(forward_query.shape, float("-inf"), tl.float32)
    if not FORWARD:
        forward_query, forward_key = nothing, nothing
    if not BACKWARD:
        backward_query, backward_key = nothing, nothing
    query_decay = tl.exp(tl.where(second, forward_query, backward_query))
    key_decay = tl.exp(tl.where(second, backward_key, forward_key))
    return query_decay, key_decay


@triton.jit
def _level_pairs(CHUNK: tl.constexpr, level):
    """Pairs [C, C] of tokens in the two halves of one block of 2 ** (level + 1) tokens."""
    segment = tl.arange(0, CHUNK) >> level
    return (segment[:, None] ^ segment[None, :]) == 1


@triton.jit
def _state_pointers(
    states, direction, sequences, sequence, chunks, chunk, keys, values, K: tl.constexpr, V: tl.constexpr
):
    """Addresses [keys, values] in the states (direction, sequence, chunk, K, V)."""
    start = ((direction * sequences + sequence) * chunks + chunk) * (K * V)
    return states + start + keys[:, None] * V + values[None, :]


@triton.jit
def chunk_updates_kernel(
    token_side, token_side_strides, value_side, value_side_strides,
    gate_forward, gate_forward_strides, gate_backward, gate_backward_strides,
    updates, decays,
    token_count, chunks, sequences, heads, scale, normalizer,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, LOGITS: tl.constexpr, QUERIES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state that crosses it, and by how much it decays it.

    Keys and values give the states' updates; with QUERIES, queries and output gradients give the state gradients'.
    """
    value_tiles: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    key_tiles: tl.constexpr = (KEY_DIM + BLOCK_K - 1) // BLOCK_K
    chunk, tile, sequence, batch, head, tokens = _place(chunks, key_tiles * value_tiles, heads, CHUNK)
    keys = tile // value_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tile % value_tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _load(token_side, token_side_strides, batch, head, tokens, keys, token_count, KEY_DIM) * scale  # [C, K]
    y = _load(value_side, value_side_strides, batch, head, tokens, values, token_count, VALUE_DIM).to(DOT)  # [C, V]
    inside = (keys < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
    for direction in tl.static_range(2):
        if (direction == 0 and FORWARD) or (direction == 1 and BACKWARD):
            gate = gate_forward if direction == 0 else gate_backward
            strides = gate_forward_strides if direction == 0 else gate_backward_strides
            keep = tokens < token_count
            own = _log_decays(gate, strides, batch, head, tokens, keep, keys, KEY_DIM, normalizer, LOGITS)
            if QUERIES:
                exponent = tl.cumsum(own, 0, reverse=direction == 1)
            else:
                # A key is not decayed by its own token: sum those of the tokens beyond it, inside the chunk.
                beyond = tokens + 1 if direction == 0 else tokens - 1
                keep = (beyond // CHUNK == chunk) & (beyond >= 0) & (beyond < token_count)
                after = _log_decays(gate, strides, batch, head, beyond, keep, keys, KEY_DIM, normalizer, LOGITS)
                exponent = tl.cumsum(after, 0, reverse=direction == 0)
            update = tl.dot(tl.trans((x * tl.exp(exponent)).to(DOT)), y, input_precision=PRECISION)  # [K, V]
            slot = direction if FORWARD else 0
            pointers = _state_pointers(
                updates, slot, sequences, sequence, chunks, chunk, keys, values, KEY_DIM, VALUE_DIM
            )
            tl.store(pointers, update, mask=inside)
            if tile % value_tiles == 0:
                start = ((slot * sequences + sequence) * chunks + chunk) * KEY_DIM
                tl.store(decays + start + keys, tl.exp(tl.sum(own, 0)), mask=keys < KEY_DIM)


@triton.jit
def carry_states_kernel(
    states, decays, initial_state, final_state, chunks, sequences,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr,
    FORWARD: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Replace each chunk's update in `states` by the state that enters the chunk, one chunk after the other.

    A state gradient travels against the state: from the last chunk in the forward direction.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (KEY_DIM * VALUE_DIM + BLOCK - 1) // BLOCK
    row = program // blocks  # direction and sequence
    element = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = element < KEY_DIM * VALUE_DIM
    is_forward = (row < sequences) & FORWARD
    ascending = is_forward != GRADIENT
    step = tl.where(ascending, 1, -1).to(tl.int64)
    chunk = row * chunks + tl.where(ascending, 0, chunks - 1)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_state + row * (KEY_DIM * VALUE_DIM) + element, mask=inside, other=0.0)
    update = tl.load(states + chunk * (KEY_DIM * VALUE_DIM) + element, mask=inside, other=0.0)
    for n in range(chunks):
        # The next update is asked for before this one is used: the loop waits for memory, not for arithmetic.
        following = chunk + step
        ahead = inside & (n + 1 < chunks)
        next_update = tl.load(states + following * (KEY_DIM * VALUE_DIM) + element, mask=ahead, other=0.0)
        decay = tl.load(decays + chunk * KEY_DIM + element // VALUE_DIM, mask=inside, other=0.0)
        tl.store(states + chunk * (KEY_DIM * VALUE_DIM) + element, state, mask=inside)
        state = decay * state + update
        update = next_update
        chunk = following
    if HAS_FINAL:
        tl.store(final_state + row * (KEY_DIM * VALUE_DIM) + element, state, mask=inside)


@triton.jit
def chunk_outputs_kernel(
    query, query_strides, key, key_strides, value_side, value_side_strides,
    gate_forward, gate_forward_strides, gate_backward, gate_backward_strides,
    states, output,
    token_count, chunks, sequences, heads, scale, normalizer,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, LOGITS: tl.constexpr, STATES: tl.constexpr,
    TRANSPOSED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk: one score matrix for both directions, and the states that enter it from either side.

    TRANSPOSED gives the gradient of the values: the transposed scores on output gradients, and keys on the gradients
    of the states that leave.
    """
    value_tiles: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    chunk, tile, sequence, batch, head, tokens = _place(chunks, value_tiles, heads, CHUNK)
    values = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    position = tl.arange(0, CHUNK)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    current = tl.zeros([CHUNK], tl.float32)  # a token's score on itself, undecayed in each direction
    result = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for first_key in range(0, KEY_DIM, BLOCK_K):
        keys = first_key + tl.arange(0, BLOCK_K)
        q = _load(query, query_strides, batch, head, tokens, keys, token_count, KEY_DIM) * scale  # [C, K]
        k = _load(key, key_strides, batch, head, tokens, keys, token_count, KEY_DIM)  # [C, K]
        current += tl.sum(q * k, 1)
        forward_query, forward_key, backward_query, backward_key = _first_sums(
            gate_forward, gate_forward_strides, gate_backward, gate_backward_strides,
            batch, head, tokens, keys, token_count, KEY_DIM, normalizer, FORWARD, BACKWARD, LOGITS,
        )  # fmt: skip
        for level in range(LEVELS):
            query_decay, key_decay = _level_decays(
                forward_query, forward_key, backward_query, backward_key, level, FORWARD, BACKWARD
            )
            decayed_query, decayed_key = (q * query_decay).to(DOT), (k * key_decay).to(DOT)
            if TRANSPOSED:
                level_scores = tl.dot(decayed_key, tl.trans(decayed_query), input_precision=PRECISION)  # [C, C]
            else:
                level_scores = tl.dot(decayed_query, tl.trans(decayed_key), input_precision=PRECISION)  # [C, C]
            scores += tl.where(_level_pairs(CHUNK, level), level_scores, 0.0)
            forward_query, forward_key, backward_query, backward_key = _merge_halves(
                forward_query, forward_key, backward_query, backward_key, level, FORWARD, BACKWARD
            )
        if STATES:
            side = k if TRANSPOSED else q
            inside = (keys < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
            for direction in tl.static_range(2):
                if (direction == 0 and FORWARD) or (direction == 1 and BACKWARD):
                    if TRANSPOSED:
                        exponent = forward_key if direction == 0 else backward_key
                    else:
                        exponent = forward_query if direction == 0 else backward_query
                    slot = direction if FORWARD else 0
                    pointers = _state_pointers(
                        states, slot, sequences, sequence, chunks, chunk, keys, values, KEY_DIM, VALUE_DIM
                    )
                    state = tl.load(pointers, mask=inside, other=0.0).to(DOT)  # [K, V]
                    result = tl.dot((side * tl.exp(exponent)).to(DOT), state, result, input_precision=PRECISION)
    directions: tl.constexpr = 2 if FORWARD and BACKWARD else 1
    scores = tl.where(position[:, None] == position[None, :], directions * current[:, None], scores)
    y = _load(value_side, value_side_strides, batch, head, tokens, values, token_count, VALUE_DIM)  # [C, V]
    result = tl.dot(scores.to(DOT), y.to(DOT), result, input_precision=PRECISION)
    offsets = _contiguous_offsets(batch, head, tokens, values, token_count, heads, VALUE_DIM)
    inside = (tokens < token_count)[:, None] & (values < VALUE_DIM)[None, :]
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def chunk_gradients_kernel(
    query, query_strides, key, key_strides, value, value_strides,
    gate_forward, gate_forward_strides, gate_backward, gate_backward_strides,
    output_gradient, output_gradient_strides, states, state_gradients,
    query_gradient, key_gradient, gate_forward_gradient, gate_backward_gradient,
    token_count, chunks, sequences, heads, scale, normalizer,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, LOGITS: tl.constexpr, STATES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and gates of a chunk.

    A log decay's gradient is the sum over all products that it decays. Products of the chunk's rows with a state are
    summed directly; those of pairs in the chunk as a running sum of (query part - key part) per token, the same
    rounded operands in both parts, so that a pair that lies wholly on one side cancels.
    """
    key_tiles: tl.constexpr = (KEY_DIM + BLOCK_K - 1) // BLOCK_K
    chunk, tile, sequence, batch, head, tokens = _place(chunks, key_tiles, heads, CHUNK)
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    position = tl.arange(0, CHUNK)
    score_gradient = tl.zeros([CHUNK, CHUNK], tl.float32)
    current = tl.zeros([CHUNK], tl.float32)
    for first_value in range(0, VALUE_DIM, BLOCK_V):
        values = first_value + tl.arange(0, BLOCK_V)
        do = _load(output_gradient, output_gradient_strides, batch, head, tokens, values, token_count, VALUE_DIM)
        v = _load(value, value_strides, batch, head, tokens, values, token_count, VALUE_DIM)  # [C, V]
        current += tl.sum(do * v, 1)
        score_gradient = tl.dot(do.to(DOT), tl.trans(v.to(DOT)), score_gradient, input_precision=PRECISION)

    q = _load(query, query_strides, batch, head, tokens, keys, token_count, KEY_DIM) * scale  # [C, K]
    k = _load(key, key_strides, batch, head, tokens, keys, token_count, KEY_DIM)  # [C, K]
    directions: tl.constexpr = 2 if FORWARD and BACKWARD else 1
    dq = directions * current[:, None] * k
    dk = directions * current[:, None] * q
    forward_query, forward_key, backward_query, backward_key = _first_sums(
        gate_forward, gate_forward_strides, gate_backward, gate_backward_strides,
        batch, head, tokens, keys, token_count, KEY_DIM, normalizer, FORWARD, BACKWARD, LOGITS,
    )  # fmt: skip
    # Per token, its part as a query less its part as a key, of the pairs in the chunk.
    forward_flow = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    backward_flow = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for level in range(LEVELS):
        query_decay, key_decay = _level_decays(
            forward_query, forward_key, backward_query, backward_key, level, FORWARD, BACKWARD
        )
        decayed_query, decayed_key = (q * query_decay).to(DOT), (k * key_decay).to(DOT)
        pairs = tl.where(_level_pairs(CHUNK, level), score_gradient, 0.0).to(DOT)
        level_dq = tl.dot(pairs, decayed_key, input_precision=PRECISION)  # [C, K]
        level_dk = tl.dot(tl.trans(pairs), decayed_query, input_precision=PRECISION)  # [C, K]
        dq += level_dq * query_decay
        dk += level_dk * key_decay
        query_part = decayed_query.to(tl.float32) * level_dq
        key_part = decayed_key.to(tl.float32) * level_dk
        second = (((position >> level) & 1) == 1)[:, None]
        forward_flow += tl.where(second, query_part, -key_part)
        backward_flow += tl.where(second, -key_part, query_part)
        forward_query, forward_key, backward_query, backward_key = _merge_halves(
            forward_query, forward_key, backward_query, backward_key, level, FORWARD, BACKWARD
        )

    inside = (tokens < token_count)[:, None] & (keys < KEY_DIM)[None, :]
    offsets = _contiguous_offsets(batch, head, tokens, keys, token_count, heads, KEY_DIM)
    for direction in tl.static_range(2):
        if (direction == 0 and FORWARD) or (direction == 1 and BACKWARD):
            log_decay_gradient = forward_flow if direction == 0 else backward_flow
            through = tl.zeros([BLOCK_K], tl.float32)
            from_keys = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            if STATES:
                edge = (position == (CHUNK - 1 if direction == 0 else 0))[:, None]
                slot = direction if FORWARD else 0
                state_dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
                state_dk = tl.zeros([CHUNK, BLOCK_K], tl.float32)
                for first_value in range(0, VALUE_DIM, BLOCK_V):
                    values = first_value + tl.arange(0, BLOCK_V)
                    state_inside = (keys < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
                    pointers = _state_pointers(
                        states, slot, sequences, sequence, chunks, chunk, keys, values, KEY_DIM, VALUE_DIM
                    )
                    state = tl.load(pointers, mask=state_inside, other=0.0)  # [K, V], enters the chunk
                    pointers = _state_pointers(
                        state_gradients, slot, sequences, sequence, chunks, chunk, keys, values, KEY_DIM, VALUE_DIM
                    )
                    gradient = tl.load(pointers, mask=state_inside, other=0.0)  # [K, V], of the state that leaves
                    through += tl.sum(state * gradient, 1)
                    do = _load(
                        output_gradient, output_gradient_strides, batch, head, tokens, values, token_count, VALUE_DIM
                    ).to(DOT)
                    state_dq = tl.dot(do, tl.trans(state.to(DOT)), state_dq, input_precision=PRECISION)
                    v = _load(value, value_strides, batch, head, tokens, values, token_count, VALUE_DIM).to(DOT)
                    state_dk = tl.dot(v, tl.trans(gradient.to(DOT)), state_dk, input_precision=PRECISION)
                state_dq *= tl.exp(forward_query if direction == 0 else backward_query)
                state_dk *= tl.exp(forward_key if direction == 0 else backward_key)
                dq += state_dq
                dk += state_dk
                log_decay_gradient += q * state_dq
                from_keys = k * state_dk
                through *= tl.exp(tl.sum(tl.where(edge, forward_query if direction == 0 else backward_query, 0.0), 0))
            log_decay_gradient = tl.cumsum(log_decay_gradient, 0, reverse=direction == 0)
            log_decay_gradient += tl.cumsum(from_keys, 0, reverse=direction == 1) - from_keys + through[None, :]
            if FORWARD and BACKWARD:
                # Without an outer state there is nothing that the first token of a direction could decay.
                first = tokens == 0 if direction == 0 else tokens == token_count - 1
                log_decay_gradient = tl.where(first[:, None], 0.0, log_decay_gradient)
            if LOGITS:
                gate = gate_forward if direction == 0 else gate_backward
                strides = gate_forward_strides if direction == 0 else gate_backward_strides
                logits = _load(gate, strides, batch, head, tokens, keys, token_count, KEY_DIM)
                log_decay_gradient *= tl.sigmoid(-logits) / normalizer
            gate_gradient = gate_forward_gradient if direction == 0 else gate_backward_gradient
            tl.store(gate_gradient + offsets, log_decay_gradient.to(gate_gradient.dtype.element_ty), mask=inside)

    tl.store(query_gradient + offsets, (dq * scale).to(query_gradient.dtype.element_ty), mask=inside)
    tl.store(key_gradient + offsets, dk.to(key_gradient.dtype.element_ty), mask=inside)
