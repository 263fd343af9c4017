"""Causal attention under T5's relative positions, as one fused kernel for TPUs (Pallas).

The method is FlashAttention's (arXiv 2205.14135, 2307.08691): scores of a block of queries and a
block of keys exist in on-chip memory only, forward and backward. Neither scores nor the position
bias, nor their gradients, exist in HBM.

T5's bias depends on the distance alone, and is constant from some distance on. Softmax does not
change if all its inputs change by a constant. So that constant is subtracted everywhere, and only
blocks near the diagonal have a bias: a Toeplitz matrix, which the kernel makes from its diagonals.
They also hold the causal mask, which hides what pads the last block, too.

The kernel holds one head of a whole clip in on-chip memory, which limits the length.

Legend: B rows, H heads, E width of a head, S positions, T positions of a block, n blocks of S,
N distances between blocks at which there is a bias, D distances with a bias of their own, K
buckets. In the kernels positions are the last axis, and a block of scores is [T keys, T queries].
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from musicrl_jax.core import sharding
from musicrl_jax.models.attention import NEVER

Ref = Any  # an array in on-chip memory, which a kernel reads and writes

# Sizes of blocks T. Multiples of a TPU's 128 lanes; larger ones need more on-chip memory.
BLOCKS = (128, 256)
# Positions that fit into on-chip memory in float32, as the compiler for v5e says.
MOST_POSITIONS = 7168

# Cores may share the heads. A head's rows and blocks run in order: they share on-chip arrays.
IN_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))
# Contracted axes of two matrices.
ROWS_ROWS, COLUMNS_ROWS, COLUMNS_COLUMNS = ((0,), (0,)), ((1,), (0,)), ((1,), (1,))


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    diagonals: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Computes causal attention, as `attention.attend`: [B, H, S, E] three times -> [B, S, H, E].

    Products are in the dtype of the inputs, sums and softmax in float32. On a mesh each device
    computes its rows and heads.

    Args:
      query: [B, H, S, E], scaled, float32 or bfloat16.
      key: [B, H, S, E].
      value: [B, H, S, E].
      diagonals: f32 [H, N, 2 T], the bias from `bias_diagonals` for S positions.
      interpret: whether to emulate the kernel, on any platform. Slow; for tests.

    Returns:
      [B, S, H, E], in the dtype of `query`. It has gradients for the first four arguments.
    """
    attend = sharding.by_row_and_head(functools.partial(_attend, interpret), arrays=3)
    # XLA makes no copy for this: it lays out the inputs' product accordingly.
    mixed = attend(query.swapaxes(2, 3), key.swapaxes(2, 3), value.swapaxes(2, 3), diagonals)
    return mixed.transpose(0, 3, 1, 2)


def block_size(length: int) -> int:
    """Returns the T that pads `length` positions least; the larger one of equals."""
    return min(BLOCKS, key=lambda block: (-length % block, -block))


def bias_diagonals(
    table: jax.Array, buckets: np.ndarray, length: int, block: int | None = None
) -> jax.Array:
    """Returns the bias of every block near the diagonal by its diagonals, f32 [H, N, 2 T].

    The block of queries that comes d blocks after its keys has the bias of distance d T + o at
    [:, d, o mod 2 T], for offsets o of query minus key in -T + 1 .. T - 1. The bias of the last
    bucket is subtracted from all. The future gets NEVER.

    Args:
      table: f32 [H, K], bias of each head and bucket.
      buckets: int [D], bucket of the distances 0 .. D - 1; later ones have that of D - 1.
      length: positions S.
      block: T; by default `block_size(length)`.
    """
    block = block or block_size(length)
    blocks = -(-length // block)
    last = len(buckets) - 1
    # At block distance d, the least distance is (d - 1) T + 1.
    near = min(blocks, -(-(last - 1) // block) + 1)
    offset = np.arange(2 * block)
    offset = np.where(offset < block, offset, offset - 2 * block)
    distance = np.arange(near)[:, None] * block + offset
    bucket = buckets[np.clip(distance, 0, last)]

    # A product with a one-hot matrix equals a lookup to the bit, and its gradient is no scatter.
    one_hot = jax.nn.one_hot(bucket, table.shape[1], dtype=jnp.float32)
    relative = table.astype(jnp.float32) - table[:, buckets[last], None].astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    diagonals = jnp.einsum("hk,nok->hno", relative, one_hot, precision=highest)
    return jnp.where((distance >= 0)[None], diagonals, NEVER)


# --- the function and its gradient ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    interpret: bool, query: jax.Array, key: jax.Array, value: jax.Array, diagonals: jax.Array
) -> jax.Array:
    """Computes attention on one device, [B, H, E, S] three times -> [B, H, E, S]."""
    return _forward(interpret, query, key, value, diagonals)[0]


def _forward(
    interpret: bool, query: jax.Array, key: jax.Array, value: jax.Array, diagonals: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the output, and what the gradient needs: inputs, output, log of softmax's sums."""
    batch, heads, width, length = query.shape
    near, block = diagonals.shape[1], diagonals.shape[2] // 2
    blocks = -(-length // block)
    of_block, of_row, of_head = _specs(block, blocks, near)
    statistics = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    output, log_sums = pl.pallas_call(
        functools.partial(_forward_kernel, length),
        grid=(heads, batch, blocks),
        in_specs=[of_block(width), of_row(width), of_row(width), of_head],
        out_specs=[of_block(width), of_block(1)],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), statistics],
        scratch_shapes=[pltpu.VMEM((near, block, block), jnp.float32)],
        compiler_params=IN_ORDER,
        cost_estimate=_cost(query, block, products=2, arrays=4),
        interpret=interpret,
        name="attention",
    )(query, key, value, diagonals)
    return output, (query, key, value, diagonals, output, log_sums)


def _backward(
    interpret: bool, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the gradients of query, key, value and diagonals."""
    query, key, value, diagonals, output, log_sums = saved
    batch, heads, width, length = query.shape
    near, block = diagonals.shape[1], diagonals.shape[2] // 2
    blocks = -(-length // block)
    of_block, of_row, of_head = _specs(block, blocks, near)
    # The gradient of a score is its weight times (the gradient of the weight - this).
    mean = jnp.sum(output.astype(jnp.float32) * gradient.astype(jnp.float32), 2, keepdims=True)
    tiles = pltpu.VMEM((near, block, block), jnp.float32)
    shape = jax.ShapeDtypeStruct(query.shape, query.dtype)
    return pl.pallas_call(
        functools.partial(_backward_kernel, length),
        grid=(heads, batch, blocks),
        in_specs=[
            of_row(width),
            of_block(width),
            of_block(width),
            of_head,
            of_row(width),
            of_row(1),
            of_row(1),
        ],
        out_specs=[of_row(width), of_block(width), of_block(width), of_head],
        out_shape=[shape, shape, shape, jax.ShapeDtypeStruct(diagonals.shape, jnp.float32)],
        scratch_shapes=[tiles, tiles, pltpu.VMEM((width, blocks * block), jnp.float32)],
        compiler_params=IN_ORDER,
        cost_estimate=_cost(query, block, products=5, arrays=7),
        interpret=interpret,
        name="attention_gradient",
    )(query, key, value, diagonals, gradient, log_sums, mean)


_attend.defvjp(_forward, _backward)


def _specs(block: int, blocks: int, near: int) -> tuple[Any, Any, pl.BlockSpec]:
    """Returns the parts of arrays that a step of the grid (head, row, block) uses.

    The last block may extend past the arrays' end. What is read there is undefined.
    """

    def of_block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, width, block), lambda head, row, place: (row, head, 0, place))

    def of_row(width: int) -> pl.BlockSpec:
        whole = (1, 1, width, blocks * block)
        return pl.BlockSpec(whole, lambda head, row, place: (row, head, 0, 0))

    of_head = pl.BlockSpec((1, near, 2 * block), lambda head, row, place: (head, 0, 0))
    return of_block, of_row, of_head


def _cost(query: jax.Array, block: int, products: int, arrays: int) -> pl.CostEstimate:
    """Returns the work of a kernel of so many products and arrays [B, H, E, S]."""
    batch, heads, width, length = query.shape
    blocks = -(-length // block)
    scores = batch * heads * blocks * (blocks + 1) // 2 * block**2
    return pl.CostEstimate(
        flops=2 * products * scores * width,
        bytes_accessed=arrays * math.prod(query.shape) * query.dtype.itemsize,
        transcendentals=scores,
    )


# --- the kernels ---


def _forward_kernel(
    length: int,
    query_ref: Ref,
    key_ref: Ref,
    value_ref: Ref,
    diagonals_ref: Ref,
    output_ref: Ref,
    log_sums_ref: Ref,
    tiles_ref: Ref,
) -> None:
    """Computes one block of queries of one row and head."""
    near, block, _ = tiles_ref.shape
    row, place = pl.program_id(1), pl.program_id(2)
    read = functools.partial(_read, length, block)

    @pl.when((row == 0) & (place == 0))
    def _() -> None:
        _make_tiles(diagonals_ref, tiles_ref)

    query = query_ref[0, 0]

    def scores(at: jax.Array) -> jax.Array:
        return _product(read(key_ref, at), query, ROWS_ROWS)

    def mix(at: jax.Array, weights: jax.Array) -> jax.Array:
        value = read(value_ref, at)
        return _product(value, weights.astype(value.dtype), COLUMNS_ROWS)

    def add(at: jax.Array, new: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Adds the keys of a block, with these scores, to (maximum, sum, output)."""
        maximum, total, mixed = carry
        larger = jnp.maximum(maximum, new.max(axis=0, keepdims=True))
        weights, old = jnp.exp(new - larger), jnp.exp(maximum - larger)
        total = old * total + weights.sum(axis=0, keepdims=True)
        return larger, total, old * mixed + mix(at, weights)

    # The diagonal block, which has at least one key for every query; then near ones and far ones.
    new = scores(place) + tiles_ref[0]
    maximum = new.max(axis=0, keepdims=True)
    weights = jnp.exp(new - maximum)
    carry = maximum, weights.sum(axis=0, keepdims=True), mix(place, weights)
    first = jnp.maximum(place - near + 1, 0)
    carry = jax.lax.fori_loop(
        first, place, lambda at, carry: add(at, scores(at) + tiles_ref[place - at], carry), carry
    )
    carry = jax.lax.fori_loop(0, first, lambda at, carry: add(at, scores(at), carry), carry)

    maximum, total, mixed = carry
    output_ref[0, 0] = (mixed / total).astype(output_ref.dtype)
    log_sums_ref[0, 0] = maximum + jnp.log(total)


def _backward_kernel(length: int, *refs: Ref) -> None:
    """Computes the gradients of one block of keys, and adds its part of the others.

    The queries' gradient is complete after a row's last block, that of the bias after the last row.
    """
    query_ref, key_ref, value_ref, diagonals_ref, gradient_ref, log_sums_ref, mean_ref = refs[:7]
    d_query_ref, d_key_ref, d_value_ref, d_diagonals_ref = refs[7:11]
    tiles_ref, d_tiles_ref, d_query_sum_ref = refs[11:]

    # Sums start at 0: the bias's in a head's first step, the queries' in a row's first.
    near, block, _ = tiles_ref.shape
    row, place = pl.program_id(1), pl.program_id(2)
    rows, blocks = pl.num_programs(1), pl.num_programs(2)

    @pl.when((row == 0) & (place == 0))
    def _() -> None:
        _make_tiles(diagonals_ref, tiles_ref)
        d_tiles_ref[...] = jnp.zeros_like(d_tiles_ref)

    @pl.when(place == 0)
    def _() -> None:
        d_query_sum_ref[...] = jnp.zeros_like(d_query_sum_ref)

    # Add the part of each block of queries that attends to these keys.
    read = functools.partial(_read, length, block)
    key, value = (_clear(length, place, ref[0, 0]) for ref in (key_ref, value_ref))

    def add(
        at: jax.Array, carry: tuple[jax.Array, jax.Array], is_near: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Adds the part of a block of queries to the gradients of (key, value)."""
        d_key, d_value = carry
        query, gradient = read(query_ref, at), read(gradient_ref, at)
        scores = _product(key, query, ROWS_ROWS)
        if is_near:
            scores += tiles_ref[at - place]
        weights = jnp.exp(scores - read(log_sums_ref, at))
        d_value += _product(gradient, weights.astype(gradient.dtype), COLUMNS_COLUMNS)
        d_scores = _product(value, gradient, ROWS_ROWS) - read(mean_ref, at)
        d_scores *= weights
        if is_near:
            d_tiles_ref[at - place] += d_scores
        d_scores = d_scores.astype(query.dtype)
        d_query_sum_ref[:, _part(at, block)] += _product(key, d_scores, COLUMNS_ROWS)
        return d_key + _product(query, d_scores, COLUMNS_COLUMNS), d_value

    end = jnp.minimum(place + near, blocks)
    zeros = jnp.zeros(key.shape, jnp.float32)
    carry = zeros, zeros
    carry = jax.lax.fori_loop(place, end, functools.partial(add, is_near=True), carry)
    carry = jax.lax.fori_loop(end, blocks, functools.partial(add, is_near=False), carry)

    # Write what is complete.
    d_key_ref[0, 0] = carry[0].astype(d_key_ref.dtype)
    d_value_ref[0, 0] = carry[1].astype(d_value_ref.dtype)

    @pl.when(place == blocks - 1)
    def _() -> None:
        d_query_ref[0, 0] = d_query_sum_ref[...].astype(d_query_ref.dtype)

    @pl.when((row == rows - 1) & (place == blocks - 1))
    def _() -> None:
        for distance in range(near):
            d_diagonals_ref[0, distance] = _sum_diagonals(d_tiles_ref[distance])


def _product(a: jax.Array, b: jax.Array, axes: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Returns the product of two matrices in float32."""
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def _part(place: jax.Array, block: int) -> pl.Slice:
    """Returns the slice of a block."""
    return pl.ds(pl.multiple_of(place * block, block), block)


def _read(length: int, block: int, ref: Ref, place: jax.Array) -> jax.Array:
    """Returns a block of a row, with 0 after its end."""
    return _clear(length, place, ref[0, 0, :, _part(place, block)])


def _clear(length: int, place: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the block x [E, T] with 0 at positions from `length` on, where it is undefined.

    A weight of 0 does not hide an undefined value, which may be no number.
    """
    block = x.shape[1]
    if length % block == 0:
        return x
    position = place * block + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(position < length, x, jnp.zeros_like(x))


def _make_tiles(diagonals_ref: Ref, tiles_ref: Ref) -> None:
    """Writes a head's bias for each near block, [N, T keys, T queries], from its diagonals."""
    near, block, _ = tiles_ref.shape
    for distance in range(near):
        # Key k of a block has the offsets -k .. T - 1 - k, so row k is the diagonals rolled by k.
        group = jnp.broadcast_to(diagonals_ref[0, distance][None], (_group(block), 2 * block))
        group = _roll_rows(group, 1)
        for start in range(0, block, len(group)):
            rolled = pltpu.roll(group, start, 1) if start else group
            tiles_ref[distance, start : start + len(group)] = rolled[:, :block]


def _sum_diagonals(tile: jax.Array) -> jax.Array:
    """Sums each diagonal of [T, T] -> [2 T]: the gradient of `_make_tiles`."""
    block, size = len(tile), _group(len(tile))
    wide = jnp.concatenate([tile, jnp.zeros_like(tile)], axis=1)
    total = wide[:size]
    for start in range(size, block, size):
        total += pltpu.roll(wide[start : start + size], 2 * block - start, 1)
    return _roll_rows(total, -1).sum(axis=0)


def _group(block: int) -> int:
    """Returns the number of rows that are rolled together: those of a TPU's vector register."""
    return math.gcd(block, 8)


def _roll_rows(x: jax.Array, step: int) -> jax.Array:
    """Rolls row k of [R, C] by `step` k columns, in log2 R rolls of the rows that need each."""
    rows, columns = x.shape
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in range((rows - 1).bit_length()):
        rolled = pltpu.roll(x, (step << bit) % columns, 1)
        x = jnp.where((row >> bit) % 2 == 1, rolled, x)
    return x
