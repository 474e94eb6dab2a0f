# SPDX-License-Identifier: Apache-2.0
"""Attention of one token to a cache in Triton: the cache divided among programs, their shares added by the last.

A program takes SLOTS slots of one head of the cache, for all heads of the query that share it; slots that do not count
are not read where all of a program's do not. The last program of a head, found by a counter that it sets back to
zero, adds the shares in their order, so that two calls give the same bits. The counters belong to a shape: two streams
must not attend with one at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .launch import Launcher, after_the_one_before, bf16_as_bits, overlap
from .norm_rows import store_bf16

_SLOTS = 32
_WARPS = 4


@triton.jit
def _attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    out_ptr,
    share_ptr,
    counter_ptr,
    slots,
    groups,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (g, s): head g of the cache, slots from s * SLOTS on.

    ``share_ptr`` (groups, programs s, HEADS, WIDTH + 2) fp32: sums of values, then their weights' sum and the logarithm
    to which these refer. ``scale`` has the logarithm of 2's inverse in it.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    slot, column = part * SLOTS + tl.arange(0, SLOTS), tl.arange(0, COLS)
    inside, across = slot < slots, column < WIDTH
    after_the_one_before(OVERLAP)
    bias = tl.load(bias_ptr + slot, mask=inside, other=float("-inf"))
    mine = share_ptr + (group * tl.num_programs(1) + part) * (HEADS * (WIDTH + 2))
    counted = bias > float("-inf")
    if tl.max(counted.to(tl.int32), axis=0) > 0:
        # Slots that do not count are not read: 0 times what lies there is NaN if that is.
        mask = counted[:, None] & across[None, :]
        place = (slot.to(tl.int64) * groups + group)[:, None] * WIDTH + column[None, :]
        keys = tl.load(key_ptr + place, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(value_ptr + place, mask=mask, other=0.0).to(tl.float32)
        for head in tl.static_range(HEADS):
            query = tl.load(query_ptr + (group * HEADS + head) * WIDTH + column, mask=across, other=0.0)
            scores = tl.sum(keys * query.to(tl.float32)[None, :], axis=1) * scale + bias
            most = tl.max(scores, axis=0)
            weights = tl.exp2(scores - most)
            to = mine + head * (WIDTH + 2)
            tl.store(to + column, tl.sum(values * weights[:, None], axis=0), mask=across)
            tl.store(to + WIDTH, tl.sum(weights, axis=0))
            tl.store(to + WIDTH + 1, most)
    else:
        for head in tl.static_range(HEADS):
            to = mine + head * (WIDTH + 2)
            tl.store(to + column, tl.zeros((COLS,), tl.float32), mask=across)
            tl.store(to + WIDTH, 0.0)
            tl.store(to + WIDTH + 1, float("-inf"))
    tl.debug_barrier()  # all of the program's stores come before its first thread's counting
    finished = tl.atomic_add(counter_ptr + group, 1, sem="acq_rel")
    if finished == tl.num_programs(1) - 1:
        shares = share_ptr + group * tl.num_programs(1) * (HEADS * (WIDTH + 2))
        number, few = tl.arange(0, PARTS), tl.arange(0, 16)
        for head in tl.static_range(HEADS):
            share = shares + head * (WIDTH + 2)
            ends = share + number * (HEADS * (WIDTH + 2)) + WIDTH
            exists = number < tl.num_programs(1)
            all_most = tl.load(ends + 1, mask=exists, other=float("-inf"), cache_modifier=".cg")
            most = tl.max(all_most, axis=0)
            shared = tl.load(ends, mask=exists, other=0.0, cache_modifier=".cg")
            weight = tl.sum(shared * tl.exp2(all_most - most), axis=0)
            total = tl.zeros((COLS,), tl.float32)
            for first in range(0, tl.num_programs(1), 16):
                one = share + (first + few) * (HEADS * (WIDTH + 2))
                is_there = first + few < tl.num_programs(1)
                its_most = tl.load(one + WIDTH + 1, mask=is_there, other=float("-inf"), cache_modifier=".cg")
                place = one[:, None] + column[None, :]
                summed = tl.load(place, mask=is_there[:, None] & across[None, :], other=0.0, cache_modifier=".cg")
                total += tl.sum(summed * tl.exp2(its_most - most)[:, None], axis=0)
            out = out_ptr + (group * HEADS + head) * WIDTH + column
            store_bf16(out, tl.div_rn(total, tl.zeros_like(total) + weight), across, False, BITS)
        tl.store(counter_ptr + group, 0)


@functools.lru_cache(maxsize=64)
def prepare(
    heads: int, cache: tuple[int, int, int], scale: float, device: torch.device
) -> Callable[..., torch.Tensor]:
    """Heads of the query, (slots, G, D) of the cache -> ``one_token.attend`` but for the scale, in one kernel."""
    slots, groups, width = cache
    parts, columns = triton.cdiv(slots, _SLOTS), triton.next_power_of_2(width)
    bits = bf16_as_bits(torch.bfloat16, device)
    tile = heads // groups, width, columns, _SLOTS, triton.next_power_of_2(parts), bits, bool(overlap(device))
    arguments = slots, groups, scale * math.log2(math.e), *tile
    launch = Launcher(_attend_kernel, (groups, parts), arguments, device, num_warps=_WARPS, **overlap(device))
    shape = groups, parts, heads // groups, width + 2
    counters = torch.zeros(groups, dtype=torch.int32, device=device)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out = torch.empty((heads, width), dtype=torch.bfloat16, device=device)
        shares = torch.empty(shape, dtype=torch.float32, device=device)
        launch(query, key, value, bias, out.view(torch.int16) if bits else out, shares, counters)
        return out

    return run
