# SPDX-License-Identifier: Apache-2.0
"""Attention of one token to a cache in Triton: the slots that count divided among programs, whose shares the last adds.

A program takes one or two heads of the query that share a head of the cache, and a tile of slots, each warp some of
them and every column of those: a thread loads all its keys and values at once, and up to the sum of the warps nothing
goes through shared memory. Where the window lies is computed from the token's position, which the GPU knows; slots
outside it are not read. The last program of a head, found by a counter that it sets back to zero, adds the shares in
their order, so that two calls give the same bits. The counters belong to a shape: two streams must not attend with one
at once.

What ``overlap`` allows is used: all slots but the token's own are read while the kernel before this one, which writes
that slot, still runs. Whatever wrote the others and the position must have ended before that kernel began.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .launch import Launcher, after_the_one_before, bf16_as_bits, overlap
from .tiles import store_bf16

# Slots a warp, warps a program, programs a head of the cache at most, and shares that are added at once, as measured on
# an H200 (benchmarks/results/attend.txt). With fewer registers a thread the numbers outgrow them: up to 3 times slower.
_CONFIG = 16, 4, 512, 32
_LEAST = tl.constexpr(-1e30)  # below every score, and what is left of it is not NaN


@triton.jit
def _attended(keys, values, inside, query, most, weight, total):
    """Each warp's largest score so far, the sum of its weights and of its values, with one more tile.

    keys, values (SLOTS * WARPS, COLS): loaded as rows, each warp has whole ones, whatever the compiler would make of
    three dimensions. query (WARPS, COLS) fp32 times the scale, for powers of two; most, weight (WARPS), total
    (WARPS, COLS) fp32.
    """
    shape: tl.constexpr = [inside.shape[0], inside.shape[1], query.shape[1]]
    keys, values = tl.reshape(keys, shape), tl.reshape(values, shape)
    scores = tl.where(inside, tl.sum(keys.to(tl.float32) * query[None, :, :], axis=2), float("-inf"))
    now = tl.maximum(most, tl.max(scores, axis=0))
    weights, old = tl.exp2(scores - now[None, :]), tl.exp2(most - now)
    total = total * old[:, None] + tl.sum(values.to(tl.float32) * weights[:, :, None], axis=0)
    return now, weight * old + tl.sum(weights, axis=0), total


@triton.jit
def _together(one, other, TWO: tl.constexpr):
    """(...) of the first and of the second head -> (..., 2), or (..., 1) where there is one."""
    if TWO:
        return tl.join(one, other)
    else:
        return tl.reshape(one, one.shape + [1])


@triton.jit
def _sum_of_warps(values, HALVINGS: tl.constexpr):
    """(2**HALVINGS, COLS, heads), each warp having its own -> (COLS, heads).

    By halves, which the compiler brings together in shared memory in whole vectors; a sum along the warps would put
    what a warp stores at once into one bank.
    """
    for _ in tl.static_range(HALVINGS):
        paired = tl.reshape(values, (2, values.shape[0] // 2, values.shape[1], values.shape[2]))
        first, second = tl.split(tl.permute(paired, (1, 2, 3, 0)))
        values = first + second
    return tl.reshape(values, (values.shape[1], values.shape[2]))


@triton.jit
def _add_shares(
    share_ptr, end_ptr, out_ptr, parts, HEADS: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr,
    FEW: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What ``parts`` programs have stored of HEADS heads, FEW parts a step -> their outputs."""
    every = tl.arange(0, HEADS * COLS)
    head, column = every // COLS, every % COLS
    across, mask = head * WIDTH + column, column < WIDTH
    # As rows of all heads, and logarithms and weights as wide: then a thread has what it needs of all parts.
    top, weight = tl.full((HEADS, COLS), _LEAST, tl.float32), tl.zeros((HEADS, COLS), tl.float32)
    total = tl.zeros((HEADS, COLS), tl.float32)
    for before in range(0, parts, FEW):
        part = before + tl.arange(0, FEW)
        ends = end_ptr + part[:, None] * (2 * HEADS) + tl.arange(0, HEADS)[None, :]
        inside = (part < parts)[:, None]
        place = share_ptr + part[:, None] * (HEADS * WIDTH) + across[None, :]
        sums = tl.load(place, mask=inside & mask[None, :], other=0.0, cache_modifier=".cg")
        sums = tl.reshape(sums, (FEW, HEADS, COLS))
        most = tl.load(ends, mask=inside, other=_LEAST, cache_modifier=".cg")
        counts = tl.load(ends + HEADS, mask=inside, other=0.0, cache_modifier=".cg")
        most = tl.broadcast_to(most[:, :, None], (FEW, HEADS, COLS))
        now = tl.maximum(top, tl.max(most, axis=0))
        factor, old = tl.exp2(most - now[None, :, :]), tl.exp2(top - now)
        total = total * old + tl.sum(sums * factor, axis=0)
        weight = weight * old + tl.sum(counts[:, :, None] * factor, axis=0)
        top = now
    store_bf16(out_ptr + across, tl.reshape(total / weight, (HEADS * COLS,)), mask, False, BITS)


@triton.jit
def _attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    out_ptr,
    share_ptr,
    end_ptr,
    counter_ptr,
    groups,
    bunches,
    window,
    scale,
    TWO: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVINGS: tl.constexpr,
    PARTS: tl.constexpr,
    FEW: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (b, p): bunch b of heads, two if TWO; STEPS tiles of slots from the p * STEPS-th of the window on.

    ``bunches`` of heads share a head of the cache. ``share_ptr`` (bunches, PARTS, heads of one, WIDTH) fp32: sums of
    values; ``end_ptr`` (bunches, PARTS, 2, heads of one): the logarithm of 2 to which they refer, and the sum of their
    weights. ``scale`` is for that logarithm.
    """
    bunch, part = tl.program_id(0), tl.program_id(1)
    heads: tl.constexpr = 1 + TWO
    group = bunch // bunches
    column, head = tl.arange(0, COLS), tl.arange(0, heads)
    tile: tl.constexpr = SLOTS * WARPS
    position = tl.load(position_ptr).to(tl.int32)
    first = tl.maximum(position + 1 - window, 0)
    parts = (position - first) // (tile * STEPS) + 1  # those that have a slot
    first += part * (tile * STEPS)
    number, across = tl.arange(0, tile)[:, None], (column < WIDTH)[None, :]
    slot = first + tl.arange(0, SLOTS)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]
    # A scalar 64-bit base and 32-bit offsets inside the tile: no vector arithmetic on 64-bit addresses.
    start = (first.to(tl.int64) * groups + group) * WIDTH
    place, left = number * (groups * WIDTH) + column[None, :], position - first
    before = (number < left) & across
    keys = tl.load(key_ptr + start + place, mask=before, other=0.0)
    values = tl.load(value_ptr + start + place, mask=before, other=0.0)
    after_the_one_before(OVERLAP)
    if part < parts:
        own = (number == left) & across  # the token's slot, which has just been written
        keys = tl.load(key_ptr + start + place, mask=own, other=keys)
        values = tl.load(value_ptr + start + place, mask=own, other=values)
        each = tl.arange(0, WARPS)[:, None] * 0 + column[None, :]  # a row for each warp, as in the tile
        asked, mask = query_ptr + bunch * (heads * WIDTH) + each, each < WIDTH
        query = tl.load(asked, mask=mask, other=0.0).to(tl.float32) * scale
        most, weight = tl.full((WARPS,), _LEAST, tl.float32), tl.zeros((WARPS,), tl.float32)
        total = tl.zeros((WARPS, COLS), tl.float32)
        query1, most1, weight1, total1 = query, most, weight, total
        if TWO:
            query1 = tl.load(asked + WIDTH, mask=mask, other=0.0).to(tl.float32) * scale
        inside = slot <= position
        most, weight, total = _attended(keys, values, inside, query, most, weight, total)
        if TWO:
            most1, weight1, total1 = _attended(keys, values, inside, query1, most1, weight1, total1)
        for step in range(1, STEPS):
            start += tile * groups * WIDTH
            left -= tile
            inside, until = slot + step * tile <= position, (number <= left) & across
            keys = tl.load(key_ptr + start + place, mask=until, other=0.0)
            values = tl.load(value_ptr + start + place, mask=until, other=0.0)
            most, weight, total = _attended(keys, values, inside, query, most, weight, total)
            if TWO:
                most1, weight1, total1 = _attended(keys, values, inside, query1, most1, weight1, total1)
        # What the warps have found, (WARPS, heads) and (WARPS, COLS, heads), becomes the program's.
        most, weight = _together(most, most1, TWO), _together(weight, weight1, TWO)
        total = _together(total, total1, TWO)
        top = tl.max(most, axis=0)
        factor = tl.exp2(most - top[None, :])
        share_ptr += bunch * (PARTS * heads * WIDTH)
        end_ptr += bunch * (PARTS * 2 * heads)
        target = share_ptr + (part * heads + head)[None, :] * WIDTH + column[:, None]
        total = _sum_of_warps(total * factor[:, None, :], HALVINGS)
        tl.store(target, total, mask=(column < WIDTH)[:, None])
        tl.store(end_ptr + part * (2 * heads) + head, top)
        tl.store(end_ptr + (part * 2 + 1) * heads + head, tl.sum(weight * factor, axis=0))
        tl.debug_barrier()  # all of the program's stores come before its first thread's counting
        finished = tl.atomic_add(counter_ptr + bunch, 1, sem="acq_rel")
        if finished == parts - 1:
            _add_shares(share_ptr, end_ptr, out_ptr + bunch * (heads * WIDTH), parts, heads, WIDTH, COLS, FEW, BITS)
            tl.store(counter_ptr + bunch, 0)


@functools.lru_cache(maxsize=64)
def prepare(
    heads: int,
    cache: tuple[int, int, int],
    scale: float,
    window: int | None,
    device: torch.device,
    config: tuple[int, int, int, int] = _CONFIG,
) -> Callable[..., torch.Tensor]:
    """Heads of the query, (slots, G, D) of the cache -> ``one_token.attend`` but for scale and window, in one kernel.

    ``config``: slots a warp, warps a program, most programs a head of the cache, shares added at once: powers of two.
    """
    slots, groups, width = cache
    slots_a_warp, warps, most, at_once = config
    bits, options = bf16_as_bits(torch.bfloat16, device), overlap(device)
    seen = min(window or slots, slots)
    tiles = triton.cdiv(seen, slots_a_warp * warps)
    steps = triton.cdiv(tiles, most)
    parts = triton.cdiv(tiles, steps)
    few = min(triton.next_power_of_2(parts), at_once)
    two = (heads // groups) % 2 == 0
    bunches = heads // 2 if two else heads
    cols = max(16, triton.next_power_of_2(width))
    constants = two, width, cols, slots_a_warp, warps, warps.bit_length() - 1, parts, few, steps, bits, bool(options)
    arguments = groups, bunches // groups, seen, scale * math.log2(math.e), *constants
    launch = Launcher(_attend_kernel, (bunches, parts), arguments, device, num_warps=warps, num_stages=1, **options)
    counters = torch.zeros(bunches, dtype=torch.int32, device=device)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        out = torch.empty((heads, width), dtype=torch.bfloat16, device=device)
        shares = torch.empty((heads, parts, width), dtype=torch.float32, device=device)
        ends = torch.empty((heads, parts, 2), dtype=torch.float32, device=device)
        launch(query, key, value, position, out.view(torch.int16) if bits else out, shares, ends, counters)
        return out

    return run
