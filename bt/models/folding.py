"""Attention of rows of states on other states, with its products taken in the order that costs least.

A score is x Wq^T Wk z and what is read is Wo Wv z, for a query's state x and a key's state z. The usual order projects
all x and all z first. Where one side has few rows (a text of 15 tokens, [CLS] alone) and the other many (an image), it
is cheaper to take the few through the other side's weights too, once for each head, and to leave the many as they are:
the same numbers, at 18 tokens and 325 patches for a third of the multiplications.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cheapest(width: int, heads: int, pairs: int, own: tuple[int, int], other: tuple[int, int]) -> str:
    """Which order takes the fewest multiplications: "plain", "few_queries" or "few_keys".

    own, other: (rows, tokens) of the states that queries, and keys and values, are made of; with unique inputs there
    are fewer rows than pairs. Output projections count, as `few_keys` has its own.
    """
    (own_rows, queries), (other_rows, keys) = own, other
    square, products = width * width, 2 * pairs * queries * keys * width
    costs = {
        "plain": (own_rows * queries + 2 * other_rows * keys + pairs * queries) * square + products,
        "few_queries": (own_rows + 3 * pairs) * queries * square + heads * products,
        "few_keys": 4 * other_rows * keys * square + heads * products,
    }
    return min(costs, key=costs.get)


def few_queries(
    q: Tensor, states: Tensor, kv: Tensor, value_bias: Tensor, heads: int, mask: Tensor | None, dropout: float
) -> Tensor:
    """Attention of projected queries q (P, R, D) on the keys and values that the weights kv (2D, D) would make of
    states (P, K, D): (P, R, D). mask: (P, K).

    q . (Wk z + bk) is (Wk^T q) . z, plus q . bk, which is the same for all keys and leaves the softmax as it is; values
    are projected after they have been weighted.
    """
    pairs, tokens, width = q.shape
    of_keys, of_values = kv.view(2, heads, width // heads, -1).unbind(0)
    by_head = q.view(pairs * tokens, heads, -1).transpose(0, 1) / math.sqrt(width // heads)
    scores = torch.bmm(_by_pair(torch.bmm(by_head, of_keys), pairs), states.transpose(1, 2))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    weights = F.dropout(scores.softmax(-1), dropout, dropout > 0)
    read = _by_head(torch.bmm(weights, states), heads)
    context = torch.bmm(read, of_values.transpose(1, 2)).transpose(0, 1).reshape(pairs, tokens, width)
    if dropout > 0:  # the weights that are left do not sum to 1
        total = weights.sum(-1).view(pairs, heads, tokens, 1).transpose(1, 2)
        value_bias = (total * value_bias.view(heads, -1)).flatten(2)
    return context + value_bias


def few_keys(
    own: Tensor,
    kv: Tensor,
    rows: Tensor | None,
    q: nn.Linear,
    out: nn.Linear,
    heads: int,
    mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """out(attention of q(own) (P, R, D) on projected keys and values kv (U, K, 2D)) -> (P, R, D).

    Keys are taken through q's weights and values through those of `out`, on unique rows; rows: (P,), which of them each
    pair has, None where pair p has row p. mask: (P, K).
    """
    unique, tokens, _ = kv.shape
    width = own.shape[-1]
    keys, values = kv.view(unique * tokens, 2, heads, width // heads).permute(1, 2, 0, 3).unbind(0)
    keys = keys / math.sqrt(width // heads)
    folded_keys = _by_pair(torch.bmm(keys, q.weight.view(heads, -1, width)), unique)
    folded_values = _by_pair(torch.bmm(values, out.weight.t().reshape(heads, -1, width)), unique)
    bias = _by_pair(torch.bmm(keys, q.bias.view(heads, -1, 1)), unique).transpose(1, 2)  # (U, 1, heads * K)
    if rows is not None:
        folded_keys, folded_values, bias = (part.index_select(0, rows) for part in (folded_keys, folded_values, bias))
    if mask is not None:
        bias = bias.masked_fill(~mask.repeat(1, heads)[:, None], -torch.inf)
    scores = torch.baddbmm(bias, own, folded_keys.transpose(1, 2)).unflatten(-1, (heads, tokens))
    weights = F.dropout(scores.softmax(-1), dropout, dropout > 0).flatten(2)
    return torch.baddbmm(out.bias, weights, folded_values)


def _by_pair(states: Tensor, pairs: int) -> Tensor:
    """(heads, P * R, D) -> (P, heads * R, D)."""
    return states.unflatten(1, (pairs, -1)).transpose(0, 1).flatten(1, 2)


def _by_head(states: Tensor, heads: int) -> Tensor:
    """(P, heads * R, D) -> (heads, P * R, D)."""
    return states.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
