"""Counts the floating-point operations of a traced function; XLA's own count takes a loop once.

Counts a whole computation, before it is sharded: `flops(jax.jit(f).trace(*xs).jaxpr)`. Results that
nothing uses do not count, unless a loop carries them to its end.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

# Primitives that move data or change its type: they compute nothing.
_MOVES = re.compile(
    r"broadcast_in_dim|concatenate|convert_element_type|copy|copy_p|device_put|dynamic_slice|"
    r"dynamic_update_slice|gather|imag|iota|optimization_barrier|pad|pvary|real|reduce_precision|"
    r"reshape|rev|scatter|sharding_constraint|slice|sort|split|squeeze|stack|stop_gradient|tile|"
    r"transpose|unstack"
)
# These call a jaxpr that combines two scalars, but count by the elements that they reduce.
REDUCTIONS = {"argmax", "argmin", "reduce", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a computation.

    Attributes:
      matmul: of matrix products and convolutions; a multiplication and an addition are two.
      other: of everything else that yields floating-point numbers, one for each element.
    """

    matmul: int = 0
    other: int = 0

    def __add__(self, more: "Flops") -> "Flops":
        return Flops(self.matmul + more.matmul, self.other + more.other)

    def times(self, rounds: int) -> "Flops":
        """Returns the operations of so many rounds."""
        return Flops(self.matmul * rounds, self.other * rounds)


def flops(jaxpr: ClosedJaxpr) -> Flops:
    """Counts the operations of a closed jaxpr.

    A matrix product counts 2 M N K, times its batch. A convolution counts 2 for each output, input
    channel of its group and tap of the window. Taps on padding count (XLA leaves them out); taps
    between the elements of a dilated input, as in the gradient of a strided convolution, do not. An
    FFT of n counts 5 n log2 n, a real one half of it. Any other primitive counts one for each
    floating-point element of its output; a reduction of its input; an addition into an array of its
    updates. Moves, comparisons, sorts and integers count nothing. Decompositions (eigh, svd,
    cholesky) are counted far too low.

    A Pallas kernel counts what its author says (`cost_estimate`).

    A scan counts its body `length` times, a `cond` its most expensive branch, a shard_map its body
    for every device. A while loop counts once: its rounds depend on its data, since JAX makes a
    scan of a `fori_loop` whose bounds are constants.
    """
    return _jaxpr_flops(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))


def _size(v: Var | Literal) -> int:
    return math.prod(v.aval.shape)


def _floats(v: Var | Literal) -> int:
    """Returns the number of floating-point elements."""
    return _size(v) if jnp.issubdtype(getattr(v.aval, "dtype", np.int32), jnp.inexact) else 0


def _inner(jaxpr: Jaxpr | ClosedJaxpr, used: list[bool] | None = None) -> Flops:
    """Counts a called jaxpr; `used` says which of its outputs are used, by default all."""
    opened = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    if used is None or len(used) != len(opened.outvars):
        used = [True] * len(opened.outvars)
    return _jaxpr_flops(opened, used)


def _jaxprs(value: Any) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yields the jaxprs in a primitive's parameter."""
    if isinstance(value, (Jaxpr, ClosedJaxpr)):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _jaxprs(part)


def _jaxpr_flops(jaxpr: Jaxpr, used: list[bool]) -> Flops:
    """Counts the operations of the equations that contribute to an output in use.

    It goes backwards, as the compiler drops what nothing uses: for example the value of a function
    of which only the gradient is used.
    """
    total = Flops()
    live = {v for v, use in zip(jaxpr.outvars, used, strict=True) if use and isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        uses = [v in live for v in equation.outvars]
        if any(uses) or equation.effects:
            live.update(v for v in equation.invars if isinstance(v, Var))
            total += _equation_flops(equation, uses)
    return total


def _equation_flops(equation: Any, used: list[bool]) -> Flops:
    """Counts one equation, of whose outputs some are used."""
    name, params, inputs = equation.primitive.name, equation.params, equation.invars
    outputs = equation.outvars
    match name:
        # Matrix products.
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(inputs[0].aval.shape[axis] for axis in contracted)
            return Flops(2 * _size(outputs[0]) * depth)
        case "conv_general_dilated":
            return Flops(_convolution(equation))

        # Control flow.
        case "scan":
            return _inner(params["jaxpr"]).times(params["length"])
        case "while":
            return _inner(params["cond_jaxpr"]) + _inner(params["body_jaxpr"])
        case "cond":
            branches = [_inner(branch) for branch in params["branches"]]
            return max(branches, key=lambda each: (each.matmul, each.other))
        case "shard_map":
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            return _inner(params["jaxpr"]).times(devices)
        case "pallas_call" if (cost := params["cost_estimate"]) is not None:
            return Flops(cost.flops, cost.transcendentals)
    if "dot" in name or "conv_" in name or name == "pallas_call":
        raise ValueError(f"the operations of {name} are not known here: {equation}")

    # Everything else: a function that is called, or one operation for each element.
    if name not in REDUCTIONS and not name.startswith(("scatter", "reduce_window", "select_and")):
        called = [inner for value in params.values() for inner in _jaxprs(value)]
        if called:
            return sum((_inner(inner, used) for inner in called), Flops())
    return Flops(0, _elementwise(equation))


def _elementwise(equation: Any) -> int:
    """Counts the operations of an equation that is no matrix product and calls no function."""
    name, params = equation.primitive.name, equation.params
    inputs, outputs = equation.invars, equation.outvars
    if _MOVES.fullmatch(name):
        return 0
    if name == "fft":
        kind, length = params["fft_type"].name, math.prod(params["fft_lengths"])
        times = _size(outputs[0] if kind == "IRFFT" else inputs[0]) // length
        return round((2.5 if "R" in kind else 5) * length * math.log2(max(length, 2)) * times)
    if name in REDUCTIONS:
        return sum(map(_floats, inputs[: len(outputs)]))
    if name.startswith("scatter"):
        return _floats(inputs[2])
    window = 1
    if name.startswith(("reduce_window", "select_and")):
        window = math.prod(params["window_dimensions"])
    return sum(map(_floats, outputs)) * window


def _convolution(equation: Any) -> int:
    """Counts 2 for each output, input channel and tap that is on an element or on padding."""
    params, kernel, output = equation.params, equation.invars[1], equation.outvars[0]
    numbers = params["dimension_numbers"]
    _, features, *window = (kernel.aval.shape[axis] for axis in numbers.rhs_spec)
    outputs, channels, *places = (output.aval.shape[axis] for axis in numbers.out_spec)
    taps = 1
    for size, place, stride, (low, _), holes, spread in zip(
        window,
        places,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    ):
        # Positions in the dilated input, of whose elements every `holes`-th is one of the input.
        at = np.arange(place)[:, None] * stride + np.arange(size)[None, :] * spread - low
        taps *= int(np.count_nonzero(at % holes == 0))
    return 2 * outputs * channels * features * taps
