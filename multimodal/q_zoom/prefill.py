"""From a prompt to a cache that stock `generate` goes on from: tap, decide, look closer, read on.

The layers up to the tap read the prompt once. Where the gate stays shut the remaining layers go on from there, which
is the stock model. Where it opens, what the first layers keep of the prompt up to the end of the image is reused,
which causal attention makes exact, and only the regions and what follows the image run through them again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from multimodal.q_zoom.adapters.protocol import BackboneAdapter
from multimodal.q_zoom.heads import RegionProposal, ZoomGate
from multimodal.q_zoom.layers import beginning, causal_mask, last_token, run_layers
from multimodal.q_zoom.prompt import ImageTokens, Prompt, with_regions


@dataclass(frozen=True)
class Tap:
    """A prompt read by the layers up to the tap.

    Args:
        hidden: `[1, S, C]`, what the last of these layers gave.
        cache: keys and values of these layers.
        begun: `[1, S, C]`, output of the first layer that gate and region proposal share, if they do.
    """

    prompt: Prompt
    hidden: Tensor
    cache: DynamicCache
    begun: Tensor | None = None

    @property
    def depth(self) -> int:
        return len(self.cache.layers)


@dataclass(frozen=True)
class Prefilled:
    """A prompt read by all layers.

    Args:
        cache: keys and values of all tokens.
        logits: `[V]` of the last token.
    """

    prompt: Prompt
    cache: DynamicCache
    logits: Tensor


def read_to_tap(adapter: BackboneAdapter, prompt: Prompt, depth: int) -> Tap:
    """Run the first `depth` layers over `prompt`."""
    cache = DynamicCache()
    hidden = run_layers(
        adapter.decoder,
        range(depth),
        prompt.embeddings,
        adapter.rotary(prompt.embeddings, prompt.positions),
        cache,
        visual=prompt.visual,
        deepstack=prompt.deepstack,
    )
    return Tap(prompt, hidden, cache)


def with_shared_layer(adapter: BackboneAdapter, tap: Tap, proposal: RegionProposal, gate: ZoomGate) -> Tap:
    """`tap` with the output of the branches' first layer, if they share one."""
    if not proposal.layers or proposal.layers[0] is not gate.layers[0]:
        return tap
    rotary = adapter.rotary(tap.hidden, tap.prompt.positions)
    mask = causal_mask(adapter.decoder, tap.hidden)
    begun = proposal.layers[0](tap.hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
    return Tap(tap.prompt, tap.hidden, tap.cache, begun)


def gate_probability(adapter: BackboneAdapter, tap: Tap, gate: ZoomGate) -> float:
    """How probable it is that the question needs a closer look."""
    rotary = adapter.rotary(tap.hidden, tap.prompt.positions)
    mask = causal_mask(adapter.decoder, tap.hidden)
    return float(gate.of_last_token(tap.hidden, rotary, mask=mask, begun=tap.begun).float().sigmoid())


def score_map(
    adapter: BackboneAdapter, tap: Tap, proposal: RegionProposal, *, sinks: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits of the image's cells `[rows, columns]`, and which cells are no sinks of the first token, if asked for."""
    prompt = tap.prompt
    rotary = adapter.rotary(tap.hidden, prompt.positions)
    mask = causal_mask(adapter.decoder, tap.hidden)
    image = torch.arange(prompt.image_start, prompt.image_stop, device=tap.hidden.device)[None]
    query = image.new_tensor([prompt.length - 1])
    if not sinks:
        return proposal(tap.hidden, rotary, image, query, mask=mask, begun=tap.begun).view(prompt.grid), None
    scores, kept = proposal.with_sinks(tap.hidden, rotary, image, query, mask=mask, begun=tap.begun)
    return scores.view(prompt.grid), kept.view(prompt.grid)


def fuse(
    adapter: BackboneAdapter,
    prompt: Prompt,
    regions: Sequence[ImageTokens],
    boxes: Sequence[Sequence[int]],
    alignment: str,
) -> Prompt:
    """`prompt` with regions of its image put in; `boxes` are theirs in cells."""
    positions = adapter.fused_positions(prompt, [region.grid for region in regions], boxes, alignment)
    return with_regions(prompt, list(regions), positions, adapter.image_token, marked=adapter.marked)


def reread(adapter: BackboneAdapter, tap: Tap, fused: Prompt, *, reuse: bool = True) -> Tap:
    """The fused prompt read to the tap.

    Args:
        reuse: keep what the first layers made of the prompt up to the image's last token, which is the same; `False`
            reads all again and serves to check that.
    """
    if not reuse:
        return read_to_tap(adapter, fused, tap.depth)
    kept = tap.prompt.image_stop
    rest = fused.after(kept)
    cache = beginning(tap.cache, tap.depth, kept)
    hidden = run_layers(
        adapter.decoder,
        range(tap.depth),
        rest.embeddings,
        adapter.rotary(rest.embeddings, rest.positions),
        cache,
        past=True,
        visual=rest.visual,
        deepstack=rest.deepstack,
    )
    return Tap(fused, torch.cat((tap.hidden[:, :kept], hidden), dim=1), cache)


def read_on(adapter: BackboneAdapter, tap: Tap, *, exact: bool = False) -> Prefilled:
    """Run the layers after the tap, which stays as it is.

    Args:
        exact: run the last layer for all tokens, as the stock model does, whose logits come out bit for bit; otherwise
            it runs for the last token alone and the others give keys and values, which is all that anything needs.
    """
    decoder, count = adapter.decoder, len(adapter.decoder.layers)
    hidden, cache = tap.hidden, beginning(tap.cache, tap.depth, tap.prompt.length)
    rotary = adapter.rotary(hidden, tap.prompt.positions)
    hidden = run_layers(decoder, range(tap.depth, count if exact else count - 1), hidden, rotary, cache)
    if not exact:
        hidden = last_token(decoder.layers[-1], hidden, rotary, cache)
    return Prefilled(tap.prompt, cache, decoder.head(decoder.norm(hidden)[:, -1:])[0, 0])
