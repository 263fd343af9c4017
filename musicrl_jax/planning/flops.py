"""Floating-point operations of a traced function, exactly: XLA's own count takes the body of a loop once.

Counted over the whole computation, before anything is sharded, from its jaxpr: `flops(jax.jit(f).trace(*xs).jaxpr)`.
What a jaxpr computes and does not use is left out, but for what a loop carries to its end in vain.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

# Data that moves or changes its type: nothing is computed.
MOVES = {
    *(
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "dynamic_slice",
    ),
    *("dynamic_update_slice", "gather", "imag", "iota", "optimization_barrier", "pad", "pvary"),
    *("real", "reduce_precision", "reshape", "rev", "scatter", "sharding_constraint", "slice"),
    *("sort", "split", "squeeze", "stack", "stop_gradient", "tile", "transpose"),
    *("unstack"),
}
# Their `jaxpr` combines two scalars, so these are counted by what goes in.
REDUCTIONS = {"argmax", "argmin", "reduce", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a computation.

    Attributes:
      matmul: of its matrix products and convolutions: a multiplication and an addition each.
      other: of everything else that yields floating-point numbers, one for each element.
      unknown: its loops whose number of rounds the jaxpr does not show; their bodies are counted once.
    """

    matmul: int = 0
    other: int = 0
    unknown: tuple[str, ...] = ()

    def __add__(self, more: "Flops") -> "Flops":
        return Flops(
            self.matmul + more.matmul, self.other + more.other, self.unknown + more.unknown
        )

    def times(self, rounds: int) -> "Flops":
        return Flops(self.matmul * rounds, self.other * rounds, self.unknown)


def flops(jaxpr: ClosedJaxpr) -> Flops:
    """The operations of a closed jaxpr.

    Matrix products are 2 M N K for each of a batch. Convolutions are 2 for each output, input channel of its group and
    tap of the window; taps that fall on padding count (XLA leaves them out), those that fall between the elements of a
    dilated input, as in the gradient of a strided convolution, do not. An FFT of n is 5 n log2 n, a real one half. Any
    other primitive is one operation for each floating-point element of its output, of its input if it is a reduction,
    of its updates if it adds into an array; moving, comparing, sorting and integers are none. Decompositions (eigh,
    svd, cholesky) are far too low so. A scan counts its body `length` times, a `cond` its dearest branch, a shard_map
    its body for every device, a while loop its body as often as a counter from one constant to another says, and its
    condition once more.
    """
    return _jaxpr_flops(jaxpr.jaxpr, _scalars(jaxpr), [True] * len(jaxpr.jaxpr.outvars))


def _size(v: Var | Literal) -> int:
    return math.prod(v.aval.shape)


def _floating(v: Var | Literal) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", np.int32), jnp.inexact)


def _integer(v: Var | Literal, known: dict[Var, int]) -> int | None:
    """A scalar integer's value, where it is known."""
    if not isinstance(v, Literal):
        return known.get(v)
    return int(v.val) if np.ndim(v.val) == 0 and jnp.issubdtype(v.aval.dtype, jnp.integer) else None


def _scalars(jaxpr: ClosedJaxpr) -> dict[Var, int]:
    """The integers that a closed jaxpr closes over."""
    consts = zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
    scalar = (
        (v, c)
        for v, c in consts
        if v.aval.shape == () and jnp.issubdtype(v.aval.dtype, jnp.integer)
    )
    return {v: int(c) for v, c in scalar}


def _inner(
    jaxpr: Jaxpr | ClosedJaxpr,
    inputs: list[Any],
    known: dict[Var, int],
    used: list[bool] | None = None,
) -> Flops:
    """A called jaxpr's, with the integers known here of its inputs and which of its outputs are used, if not all."""
    opened, passed = (
        (jaxpr.jaxpr, _scalars(jaxpr)) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, {})
    )
    if len(inputs) == len(opened.invars):
        values = ((v, _integer(i, known)) for v, i in zip(opened.invars, inputs, strict=True))
        passed |= {v: value for v, value in values if value is not None}
    if used is None or len(used) != len(opened.outvars):
        used = [True] * len(opened.outvars)
    return _jaxpr_flops(opened, passed, used)


def _jaxprs(value: Any) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Those in a primitive's parameter."""
    if isinstance(value, (Jaxpr, ClosedJaxpr)):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _jaxprs(part)


def _jaxpr_flops(jaxpr: Jaxpr, known: dict[Var, int], used: list[bool]) -> Flops:
    known = dict(known)
    for equation in jaxpr.eqns:
        if (
            equation.primitive.name in ("convert_element_type", "copy")
            and equation.outvars[0].aval.shape == ()
        ):
            value = _integer(equation.invars[0], known)
            if value is not None and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.integer):
                known[equation.outvars[0]] = value
    # Backwards, as the compiler drops what nothing uses: the value of a function of which only the gradient is taken.
    total = Flops()
    live = {
        v for v, use in zip(jaxpr.outvars, used, strict=True) if use and not isinstance(v, Literal)
    }
    for equation in reversed(jaxpr.eqns):
        uses = [v in live for v in equation.outvars]
        if any(uses) or equation.effects:
            live.update(v for v in equation.invars if not isinstance(v, Literal))
            total += _equation_flops(equation, known, uses)
    return total


def _equation_flops(equation: Any, known: dict[Var, int], used: list[bool]) -> Flops:
    name, params, inputs = equation.primitive.name, equation.params, equation.invars
    output = equation.outvars[0] if equation.outvars else None
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            return Flops(2 * _size(output) * math.prod(inputs[0].aval.shape[d] for d in contracted))
        case "conv_general_dilated":
            return Flops(_convolution(equation))
        case "scan":
            return _inner(params["jaxpr"], [], known).times(params["length"])
        case "while":
            return _while(equation, known)
        case "cond":
            branches = [_inner(branch, inputs[1:], known) for branch in params["branches"]]
            return max(branches, key=lambda f: (f.matmul, f.other))
        case "shard_map":
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            return _inner(params["jaxpr"], inputs, known).times(devices)
        case "fft":
            kind, n = params["fft_type"].name, math.prod(params["fft_lengths"])
            times = _size(output if kind == "IRFFT" else inputs[0]) // n
            return Flops(0, round((2.5 if "R" in kind else 5) * n * math.log2(max(n, 2)) * times))
    if name in MOVES:
        return Flops()
    if name in REDUCTIONS:
        return Flops(0, sum(_size(v) for v in inputs[: len(equation.outvars)] if _floating(v)))
    if name.startswith("scatter"):
        return Flops(0, _size(inputs[2]) if _floating(inputs[2]) else 0)
    if name.startswith(("reduce_window", "select_and")):
        window = math.prod(params["window_dimensions"])
        return Flops(0, sum(_size(v) * window for v in equation.outvars if _floating(v)))
    if "dot" in name or "conv_" in name or name == "pallas_call":
        raise ValueError(f"the operations of {name} are not known here: {equation}")
    called = [inner for value in params.values() for inner in _jaxprs(value)]
    if called:
        return sum((_inner(inner, inputs, known, used) for inner in called), Flops())
    return Flops(0, sum(_size(v) for v in equation.outvars if _floating(v)))


def _convolution(equation: Any) -> int:
    """2 for each output, input channel of its group and tap on an element of the input or its padding."""
    params, right, out = equation.params, equation.invars[1], equation.outvars[0]
    numbers = params["dimension_numbers"]
    _, features, *window = (right.aval.shape[d] for d in numbers.rhs_spec)
    outputs, channels, *places = (out.aval.shape[d] for d in numbers.out_spec)
    pairs = 1
    for size, place, stride, (low, _), holes, spread in zip(
        window,
        places,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    ):
        where = np.arange(place)[:, None] * stride + np.arange(size)[None, :] * spread - low
        pairs *= int(np.count_nonzero(where % holes == 0))
    return 2 * outputs * channels * features * pairs


def _while(equation: Any, known: dict[Var, int]) -> Flops:
    params = equation.params
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    of_condition = _inner(condition, [], known)
    of_body = _inner(body, [], known)
    rounds = _rounds(
        condition, body, params["cond_nconsts"], params["body_nconsts"], equation.invars, known
    )
    if rounds is None:
        where = str(equation.source_info.name_stack) or "while"
        return of_condition + of_body + Flops(unknown=(where,))
    return of_condition.times(rounds + 1) + of_body.times(rounds)


def _rounds(
    condition: ClosedJaxpr,
    body: ClosedJaxpr,
    of_condition: int,
    of_body: int,
    inputs: list[Any],
    known: dict[Var, int],
) -> int | None:
    """Of a loop `while counter < limit: counter += step`, all three known; None of any other."""
    if not condition.eqns or condition.jaxpr.outvars[0] not in condition.eqns[-1].outvars:
        return None
    test = condition.eqns[-1]
    if test.primitive.name not in ("lt", "le", "gt", "ge"):
        return None
    here = _scalars(condition)
    # Constants and whatever the body hands on as it came in.
    handed_on = zip(body.jaxpr.invars[of_body:], body.jaxpr.outvars, strict=True)
    same = [True] * of_condition + [into is out for into, out in handed_on]
    values = [
        _integer(i, known) for i in [*inputs[:of_condition], *inputs[of_condition + of_body :]]
    ]
    here |= {
        v: n
        for v, n, keeps in zip(condition.jaxpr.invars, values, same, strict=True)
        if keeps and n is not None
    }
    sign = {"lt": 1, "le": 1, "gt": -1, "ge": -1}[test.primitive.name]
    counter, limit = test.invars
    if _integer(counter, here) is not None:
        counter, limit, sign = limit, counter, -sign
    end = _integer(limit, here)
    places = {v: place for place, v in enumerate(condition.jaxpr.invars)}
    if (
        end is None
        or isinstance(counter, Literal)
        or counter not in places
        or places[counter] < of_condition
    ):
        return None
    place = places[counter] - of_condition
    start, step = values[places[counter]], _step(body, of_body + place, place)
    if start is None or not step or step * sign < 0:
        return None
    distance = (end - start) * sign + (test.primitive.name in ("le", "ge"))
    return max(-(-distance // abs(step)), 0)


def _step(body: ClosedJaxpr, into: int, out: int) -> int | None:
    """What a loop's body adds to one of the numbers it carries; None where that is not a constant."""
    known, counter, result = _scalars(body), body.jaxpr.invars[into], body.jaxpr.outvars[out]
    made = next((e for e in body.eqns if result in e.outvars), None)
    if made is None or made.primitive.name not in ("add", "sub"):
        return None
    left, right = made.invars
    if made.primitive.name == "add" and right is counter:
        left, right = right, left
    step = _integer(right, known)
    if left is not counter or step is None:
        return None
    return step if made.primitive.name == "add" else -step
