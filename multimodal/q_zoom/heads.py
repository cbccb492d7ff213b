"""The two branches of Q-Zoom: where to look (region proposal) and whether to (gate).

Both start as copies of the decoder layers after the tap, read the hidden states of the whole prompt there, and leave
the model's cache alone.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from multimodal.q_zoom.layers import Rotary, heads, last_token, rotate

SINK_PROBABILITY = 0.75  # from which on a cell is a sink to the first token (Qwen3-VL)


class RegionProposal(nn.Module):
    """Scores every cell of the image by the prompt's last token (SD-RPN, arXiv 2509.16944).

    All but the last layer run as they are; of the last only its norm and the projections to queries and keys are
    used, and the score is the mean of the heads' scaled products, a logit.

    Args:
        layers: decoder layers of transformers, at least one; they become the module's own.
        rotary: rotate the last layer's queries and keys.
        norm: a norm before the last layer (LLaVA), or none.
    """

    def __init__(self, layers: Sequence[nn.Module], *, rotary: bool = True, norm: nn.Module | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers[:-1])
        self.norm = norm
        self.input_layernorm = layers[-1].input_layernorm
        attention = layers[-1].self_attn
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim = attention.head_dim
        self.rotary = rotary

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary,
        image: Tensor,
        query: Tensor,
        *,
        mask: Tensor | None,
        begun: Tensor | None = None,
    ) -> Tensor:
        """Scores of the image's cells, as logits, `[B, N]`.

        Args:
            hidden: `[B, S, C]` at the tap.
            rotary: of all tokens, `[B, S, D]` each.
            image: `[B, N]`, indices of the image's tokens.
            query: `[B]`, index of the prompt's last token.
            mask: attention mask of the layers, as of `layers.causal_mask`.
            begun: output of the first layer, where another branch has run it.
        """
        queries, keys = self.queries_and_keys(hidden, rotary, image, query[:, None], mask=mask, begun=begun)
        return mean_products(queries, keys)[:, 0]

    def with_sinks(
        self,
        hidden: Tensor,
        rotary: Rotary,
        image: Tensor,
        query: Tensor,
        *,
        mask: Tensor | None,
        begun: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores as of `forward`, and which cells are no sinks: `[B, N]` bool.

        A cell is a sink where the first token's query in the first head, with the mean of all heads' keys, gives a
        probability of at least 0.75 (as the authors' code for Qwen3-VL broadcasts it).
        """
        tokens = torch.stack((query, torch.zeros_like(query)), dim=1)
        queries, keys = self.queries_and_keys(hidden, rotary, image, tokens, mask=mask, begun=begun)
        first = (queries[:, 0, 1:] @ keys.mean(dim=1).mT)[:, 0] * self.head_dim**-0.5
        return mean_products(queries[:, :, :1], keys)[:, 0], first.sigmoid() < SINK_PROBABILITY

    def queries_and_keys(
        self,
        hidden: Tensor,
        rotary: Rotary,
        image: Tensor,
        tokens: Tensor,
        *,
        mask: Tensor | None,
        begun: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries of `tokens` `[B, Q]` and keys of the image, `[B, H, Q, D]` and `[B, Hk, N, D]`."""
        for index, layer in enumerate(self.layers):
            if index == 0 and begun is not None:
                hidden = begun
            else:
                hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
        states = []
        for projection, chosen in (("q", tokens), ("k", image)):
            rows = self.input_layernorm(self._normed(rows_of(hidden, chosen)))
            turned = heads(self, projection, rows)
            if self.rotary:
                turned = rotate(turned, tuple(rows_of(part.expand(len(chosen), -1, -1), chosen) for part in rotary))
            states.append(turned)
        return states[0], states[1]

    def _normed(self, rows: Tensor) -> Tensor:
        return rows if self.norm is None else self.norm(rows)


class ZoomGate(nn.Module):
    """Whether a question needs a closer look: a logit for the prompt's last token (dynamic gating network).

    Args:
        layers: decoder layers of transformers, at least one; they become the module's own.
        width: of the hidden states.
    """

    def __init__(self, layers: Sequence[nn.Module], width: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 1)

    def forward(self, hidden: Tensor, rotary: Rotary, query: Tensor, *, mask: Tensor | None) -> Tensor:
        """Logits `[B]` of a batch, for training; arguments as of `RegionProposal.forward`."""
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
        return self.head(rows_of(hidden, query[:, None])[:, 0])[:, 0]

    def of_last_token(
        self, hidden: Tensor, rotary: Rotary, *, mask: Tensor | None, begun: Tensor | None = None
    ) -> Tensor:
        """The logit `[1]` of one prompt `[1, S, C]`; the last layer runs for the last token alone."""
        for index, layer in enumerate(self.layers[:-1]):
            if index == 0 and begun is not None:
                hidden = begun
            else:
                hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
        if begun is not None and len(self.layers) == 1:
            last = begun[:, -1:]
        else:
            last = last_token(self.layers[-1], hidden, rotary)
        return self.head(last[:, -1])[:, 0]


def rows_of(hidden: Tensor, tokens: Tensor) -> Tensor:
    """`[B, Q, C]`: the rows of `hidden` `[B, S, C]` that `tokens` `[B, Q]` names."""
    return hidden.gather(1, tokens[..., None].expand(-1, -1, hidden.shape[-1]))


def mean_products(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean over heads of the scaled products, `[B, Q, N]`; keys may be shared by heads."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    return (queries @ keys.mT).mean(dim=1) * queries.shape[-1] ** -0.5


def copies_of_layers(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies that share nothing with a decoder's layers, each of which takes the first slot of a cache of its own."""
    copied = [copy.deepcopy(layer) for layer in layers]
    for layer in copied:
        layer.self_attn.layer_idx = 0
    return copied
