# SPDX-License-Identifier: Apache-2.0
"""Attention of one token to a cache in Triton: the cache divided among programs, their shares added by the last.

A program takes a part of the slots of one head of the cache, for all heads of the query that share it, with the tensor
cores: these heads are the rows of a tile of 16. The weights of the values are rounded to BF16, as the host's are. The
last program of a head, found by a counter that it sets back to zero, adds the shares in their order, so that two calls
give the same bits. The counters belong to a shape: two streams must not attend with one at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .launch import Launcher, after_the_one_before, bf16_as_bits, overlap
from .norm_rows import as_bf16, store_bf16

# Slots a step, programs a head of the cache, warps a program and steps that are loaded ahead, as measured on an H200.
_SLOTS, _PARTS, _WARPS, _STAGES = 32, 16, 4, 2
_LEAST = tl.constexpr(-1e30)  # below every score, and what is left of it is not NaN


@triton.jit
def _attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    out_ptr,
    share_ptr,
    end_ptr,
    counter_ptr,
    slots,
    groups,
    steps,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (g, p): head g of the cache, ``steps`` times SLOTS slots from p * steps * SLOTS on.

    ``share_ptr`` (groups, PARTS, HEADS, WIDTH) fp32: sums of values; ``end_ptr`` (groups, PARTS, HEADS, 2): the sum of
    their weights, and the logarithm of 2 to which all refer. ``scale`` is for that logarithm.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    head, column, few = tl.arange(0, 16), tl.arange(0, COLS), tl.arange(0, SLOTS)
    is_head, across = head < HEADS, column < WIDTH
    after_the_one_before(OVERLAP)
    asked = (group * HEADS + head)[:, None] * WIDTH + column[None, :]
    query = tl.load(query_ptr + asked, mask=is_head[:, None] & across[None, :], other=0.0)
    if BITS:  # Triton's interpreter multiplies no BF16
        query = query.to(tl.float32)
    total = tl.zeros((16, COLS), tl.float32)
    weight, most = tl.zeros((16,), tl.float32), tl.full((16,), _LEAST, tl.float32)
    for step in range(steps):
        slot = (part * steps + step) * SLOTS + few
        inside = slot < slots
        place = (slot.to(tl.int64) * groups + group)[:, None] * WIDTH + column[None, :]
        mask = inside[:, None] & across[None, :]
        keys = tl.load(key_ptr + place, mask=mask, other=0.0).to(query.dtype)
        values = tl.load(value_ptr + place, mask=mask, other=0.0).to(query.dtype)
        bias = tl.load(bias_ptr + slot, mask=inside, other=float("-inf"))
        scores = tl.dot(query, tl.trans(keys)) * scale + bias[None, :]
        now = tl.maximum(most, tl.max(scores, axis=1))
        weights, old = tl.exp2(scores - now[:, None]), tl.exp2(most - now)
        weight = weight * old + tl.sum(weights, axis=1)
        total = tl.dot(as_bf16(weights, BITS).to(query.dtype), values, total * old[:, None])
        most = now
    mine = (group * PARTS + part) * HEADS + head
    tl.store(share_ptr + mine[:, None] * WIDTH + column[None, :], total, mask=is_head[:, None] & across[None, :])
    tl.store(end_ptr + mine * 2, weight, mask=is_head)
    tl.store(end_ptr + mine * 2 + 1, most, mask=is_head)
    tl.debug_barrier()  # all of the program's stores come before its first thread's counting
    finished = tl.atomic_add(counter_ptr + group, 1, sem="acq_rel")
    if finished == PARTS - 1:
        for number in tl.static_range(HEADS):
            share = (group * PARTS + tl.arange(0, PARTS)) * HEADS + number
            logarithm = tl.load(end_ptr + share * 2 + 1, cache_modifier=".cg")
            count = tl.load(end_ptr + share * 2, cache_modifier=".cg")
            every = share[:, None] * WIDTH + column[None, :]
            sums = tl.load(share_ptr + every, mask=across[None, :], other=0.0, cache_modifier=".cg")
            factor = tl.exp2(logarithm - tl.max(logarithm, axis=0))
            found = tl.sum(sums * factor[:, None], axis=0) / tl.sum(count * factor, axis=0)
            store_bf16(out_ptr + (group * HEADS + number) * WIDTH + column, found, across, False, BITS)
        tl.store(counter_ptr + group, 0)


@functools.lru_cache(maxsize=64)
def prepare(
    heads: int, cache: tuple[int, int, int], scale: float, device: torch.device
) -> Callable[..., torch.Tensor] | None:
    """Heads of the query, (slots, G, D) of the cache -> ``one_token.attend`` but for the scale, in one kernel.

    None where more than 16 heads share one of the cache.
    """
    slots, groups, width = cache
    shared, bits, options = heads // groups, bf16_as_bits(torch.bfloat16, device), overlap(device)
    if shared > 16:
        return None
    tile = shared, width, max(16, triton.next_power_of_2(width)), _SLOTS, _PARTS, bits, bool(options)
    arguments = slots, groups, triton.cdiv(slots, _SLOTS * _PARTS), scale * math.log2(math.e), *tile
    options |= {"num_warps": _WARPS, "num_stages": _STAGES}
    launch = Launcher(_attend_kernel, (groups, _PARTS), arguments, device, **options)
    counters = torch.zeros(groups, dtype=torch.int32, device=device)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out = torch.empty((heads, width), dtype=torch.bfloat16, device=device)
        shares = torch.empty((groups, _PARTS, shared, width), dtype=torch.float32, device=device)
        ends = torch.empty((groups, _PARTS, shared, 2), dtype=torch.float32, device=device)
        launch(query, key, value, bias, out.view(torch.int16) if bits else out, shares, ends, counters)
        return out

    return run
