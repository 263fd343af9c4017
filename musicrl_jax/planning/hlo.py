"""What a compiled program does, read from its text (`jax.stages.Compiled.as_text()`): bytes it sends over the network,
bytes it moves to and from HBM, cycles its compiler expects. For TPUs; nothing here needs one, nor JAX.

Everything is for one chip and one call, and counts what runs: from ENTRY, the body of a loop as often as it goes round,
of a conditional the branch of most cycles, a fusion as one instruction.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

# `%name = type opcode(operands), attributes`. A type has no space but in a tuple's; no `) word(` is inside one.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_NAMES = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":\s*"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_PARTITIONS = re.compile(r"\b(num_partitions|replica_count)=(\d+)")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGET = re.compile(r'_xla_megascale_target="?(\{.*?\}x\{[^}]*\}|\{\{.*?\}\})')

BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}  # others: the digits of their names
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Neither read nor write by themselves; a `-done` is part of its `-start`.
FREE = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
    ),
    *(
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
        "domain",
        "async-start",
    ),
    "async-update",
}
PASSED_ON = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier"}


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line: its result's type, operands by name, and all that follows them."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order; `root` is the one whose value it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module.

    Attributes:
      computations: by name.
      entry: the name of the one that is called.
      devices: that run it together; of each slice, if there are several.
      executions: how often each computation runs that is not a part of an instruction, the entry once.
      unknown_loops: the `while` instructions whose rounds the text does not show; their bodies are counted once.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int
    executions: dict[str, int]
    unknown_loops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind.

    Attributes:
      kind: one of COLLECTIVES.
      group: devices that take part, slices where it crosses them; 2 of a permutation.
      crosses: whether it goes from slice to slice, over the data centre's network.
      count: how often.
      bytes: that a chip sends, all times together.
    """

    kind: str
    group: int
    crosses: bool
    count: int
    bytes: int


def read(text: str) -> Program:
    """Parses a module; raises ValueError naming the first line it cannot make sense of."""
    computations, entry, devices = {}, None, 1
    name, instructions, root = None, {}, None
    for line in text.split("\n"):
        if name is not None and line[:1] == "}":
            if root is None:
                raise ValueError(f"{name} has no ROOT")
            computations[name] = Computation(name, instructions, root)
            name = None
        elif name is not None:
            if not line.strip():
                continue
            instruction, is_root = _instruction(line)
            if instruction.opcode != "parameter" and instruction.opcode != "constant":
                for operand in instruction.operands:
                    if operand not in instructions:
                        raise ValueError(f"{operand} is not there: {line.strip()[:200]}")
            instructions[instruction.name] = instruction
            root = instruction if is_root else root
        elif line.endswith("{") and (match := _COMPUTATION.match(line)):
            name, instructions, root = match[2], {}, None
            entry = name if match[1] else entry
        elif line.startswith("HloModule"):
            devices = math.prod(int(n) for _, n in _PARTITIONS.findall(line))
    if name is not None or entry is None:
        raise ValueError("no ENTRY computation" if entry is None else f"{name} does not end")
    executions, unknown = _executions(computations, entry)
    return Program(computations, entry, devices, executions, unknown)


def collectives(program: Program) -> list[Collective]:
    """What goes over the network, the most bytes first.

    A ring moves, for a group of n, (n - 1) / n of an all-gather's output, of a reduce-scatter's or all-to-all's input
    and twice that of an all-reduce's past every chip; a permutation sends its input. An all-reduce that the compiler
    fused with taking one's own shard is a reduce-scatter. An all-gather that it spread over several fusions, to overlap
    them, counts where it starts. Programs of several slices are compiled for one of them: what crosses is `send`s to
    the host that the Megascale runtime completes, each after the part within the slice; they count as rings of slices.
    Bytes are those of the tiled layout, as everywhere here.
    """
    totals = collections.Counter()
    counts = collections.Counter()
    for computation, times in _executed(program):
        for instruction in computation.instructions.values():
            for kind, group, crosses, sent in _sent(program, computation, instruction):
                totals[kind, group, crosses] += sent * times
                counts[kind, group, crosses] += times
    table = (Collective(*key, count=counts[key], bytes=total) for key, total in totals.items())
    return sorted(table, key=lambda c: -c.bytes)


def scheduled_cycles(program: Program) -> int:
    """Cycles of the cores by the compiler's own estimates, one instruction after the other.

    Fusions (with convolutions, so matmuls, inside), copies, slices, reductions, broadcasts and other single
    instructions carry an estimate, which includes the wait for operands in HBM. None have: collectives, asynchronous
    copies, sorts, reduce-windows, concatenations, custom calls (TopK, Pallas kernels) and scalars, which all count 0
    here, and neither does time when a core waits for one of them.
    """
    return sum(_own_cycles(computation) * times for computation, times in _executed(program))


def memory_bytes(program: Program) -> int:
    """Bytes read from and written to HBM.

    Operands and results of every instruction, in their tiled layout, that have no other memory space: S(1) is VMEM. Of
    a slice, dynamic slice or gather what is taken counts, of an update in place what is written, also inside a fusion,
    if that is all that it does with a parameter; a copy or collective of two instructions counts once. A fusion's
    operand counts once, so a matmul's that does not fit into VMEM and is fetched again is too low. Collectives count
    their operands and results, not what a ring keeps in between.
    """
    return sum(
        _moved(program, computation, instruction) * times
        for computation, times in _executed(program)
        for instruction in computation.instructions.values()
    )


# Reading


def _instruction(line: str) -> tuple[Instruction, bool]:
    match = _INSTRUCTION.match(line)
    if match is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:200]}")
    is_root, name, type_, opcode, after = match.groups()
    end = after.find(")")
    if opcode != "constant":  # whose operand is a literal
        opened = after.count("(", 0, end)
        while opened:  # operands with their types, which have parentheses in their layouts
            start, end = end + 1, after.find(")", end + 1)
            opened += after.count("(", start, end) - 1
            if end < 0:
                raise ValueError(f"operands without an end: {line.strip()[:200]}")
    if end < 0:
        raise ValueError(f"operands without an end: {line.strip()[:200]}")
    operands = (
        tuple(_NAMES.findall(after, 0, end))
        if opcode not in ("constant", "parameter")
        else (after[:end],)
    )
    if not operands and after[:end].strip():
        raise ValueError(f"operands without names: {line.strip()[:200]}")
    return Instruction(name, type_, opcode, operands, after[end + 1 :]), is_root is not None


def _called(instruction: Instruction) -> dict[str, str]:
    """Names of the computations an instruction calls, by what they are to it."""
    return dict(_CALLED.findall(instruction.rest))


def _branches(instruction: Instruction) -> list[str]:
    found = [listed or one for listed, one in _BRANCHES.findall(instruction.rest)]
    return [name.strip().lstrip("%") for part in found for name in part.split(",")]


def _executed(program: Program) -> Iterator[tuple[Computation, int]]:
    for name, times in program.executions.items():
        yield program.computations[name], times


def _own_cycles(computation: Computation) -> int:
    found = (_CYCLES.search(i.rest) for i in computation.instructions.values())
    return sum(int(match[1]) for match in found if match)


# Loops. A value is followed to `(element, plus)`: an element of the tuple a loop carries, and what was added to it;
# a constant has the element None. None where it is anything else.

Value = tuple[int | None, int] | None


def _executions(
    computations: dict[str, Computation], entry: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    counts, unknown = collections.Counter(), {}

    def visit(name: str, times: int, known: dict[int, int]) -> int:
        """Adds a computation's executions; returns the cycles of one."""
        if name not in computations:
            raise ValueError(f"{name} is called and not there")
        computation = computations[name]
        counts[name] += times
        cycles = _own_cycles(computation)
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                parts = _called(instruction)
                trips, inside = _loop(computations, computation, instruction, known)
                if trips is None:
                    unknown[instruction.name] = trips = 1
                cycles += visit(parts["body"], times * trips, inside) * trips
                cycles += visit(parts["condition"], times * (trips + 1), inside) * (trips + 1)
            elif opcode == "conditional":
                before = counts.copy()
                tried = []
                for branch in _branches(instruction):
                    counts.clear()
                    tried.append((visit(branch, times, {}), len(tried), counts.copy()))
                most, _, added = max(tried)
                cycles += most
                counts.clear()
                counts.update(before + added)
            elif opcode == "call" or opcode == "async-start":
                parts = _called(instruction)
                cycles += visit(parts.get("to_apply") or parts["calls"], times, {})
        return cycles

    visit(entry, 1, {})
    return dict(counts), tuple(unknown)


def _loop(
    computations: dict[str, Computation],
    outside: Computation,
    loop: Instruction,
    known: dict[int, int],
) -> tuple[int | None, dict[int, int]]:
    """How often a loop goes round, and the elements of its tuple that are the same known number in every round."""
    parts = _called(loop)
    if parts.get("body") not in computations or parts.get("condition") not in computations:
        raise ValueError(f"not a loop: {loop}")
    body, condition = computations[parts["body"]], computations[parts["condition"]]
    carried = outside.instructions[loop.operands[0]]

    while carried.opcode in PASSED_ON:
        carried = outside.instructions[carried.operands[0]]

    def first(element: int) -> int | None:
        if carried.opcode == "parameter":
            return known.get(element)
        if carried.opcode != "tuple":
            return None
        value = _follow(computations, outside, carried.operands[element], _nothing)
        if value is None:
            return None
        return value[1] if value[0] is None else _plus(known.get(value[0]), value[1])

    steps = {}
    if body.root.opcode == "tuple":
        for element, operand in enumerate(body.root.operands):
            if _scalar_integer(body.instructions[operand].type):
                steps[element] = _follow(computations, body, operand, _nothing)
    same = {element: first(element) for element, step in steps.items() if step == (element, 0)}
    inside = {element: n for element, n in same.items() if n is not None}
    if match := _TRIPS.search(loop.rest):
        return int(match[1]), inside
    test = _comparison(computations, condition)
    if test is None:
        return None, inside
    (left, right), direction = test
    fixed = {None: 0, **inside}
    sign = {"LT": 1, "LE": 1, "GT": -1, "GE": -1, "NE": 0}.get(direction)
    if sign is None or left is None or right is None:
        return None, inside
    if left[0] in fixed:
        left, right, sign = right, left, -sign
    if right[0] not in fixed or left[0] in fixed:
        return None, inside
    start, step, limit = first(left[0]), steps.get(left[0]), fixed[right[0]] + right[1] - left[1]
    # A body that adds a number the loop carries along is followed to that number's element, not to the counter's.
    if start is None or step is None or step[0] != left[0] or not step[1]:
        return None, inside
    if direction == "NE":
        whole = (limit - start) % step[1] == 0 and (limit - start) // step[1] >= 0
        return ((limit - start) // step[1] if whole else None), inside
    if step[1] * sign < 0:
        return None, inside
    return max(
        -(-((limit - start) * sign + (direction in ("LE", "GE"))) // abs(step[1])), 0
    ), inside


def _nothing(place: int) -> Value:
    """Of an unfused computation's parameters."""
    return None


def _plus(number: int | None, more: int) -> int | None:
    return None if number is None else number + more


def _scalar_integer(type_: str) -> bool:
    return re.match(r"[su]\d+\[\]", type_) is not None


def _comparison(
    computations: dict[str, Computation], condition: Computation
) -> tuple[tuple[Value, Value], str] | None:
    """What a loop's condition compares, and how; None where it is not one comparison."""
    computation, root, bound = condition, condition.root, _nothing
    while root.opcode in ("fusion", "call", *PASSED_ON):
        if root.opcode in PASSED_ON:
            root = computation.instructions[root.operands[0]]
            continue
        values = [_follow(computations, computation, operand, bound) for operand in root.operands]
        parts = _called(root)
        computation, bound = (
            computations[parts.get("calls") or parts["to_apply"]],
            dict(enumerate(values)).get,
        )
        root = computation.root
    if root.opcode != "compare":
        return None
    left, right = (_follow(computations, computation, operand, bound) for operand in root.operands)
    return (left, right), re.search(r"direction=(\w+)", root.rest)[1]


def _follow(
    computations: dict[str, Computation],
    computation: Computation,
    name: str,
    bound: Callable[[int], Value],
) -> Value:
    """A scalar integer back to where it comes from. `bound`: the values of a fused computation's parameters."""
    instruction = computation.instructions[name]
    operands = instruction.operands
    match instruction.opcode:
        case "constant":
            return (None, int(operands[0])) if re.fullmatch(r"-?\d+", operands[0]) else None
        case "parameter":
            return bound(int(operands[0]))
        case "get-tuple-element":
            source = computation.instructions[operands[0]]
            element = int(re.search(r"index=(\d+)", instruction.rest)[1])
            if source.opcode == "parameter":
                return (element, 0)
            if source.opcode == "tuple":
                return _follow(computations, computation, source.operands[element], bound)
            if source.opcode == "fusion":
                return _follow_into(computations, computation, source, element, bound)
            return None
        case "add" | "subtract":
            left, right = (
                _follow(computations, computation, operand, bound) for operand in operands
            )
            sign = 1 if instruction.opcode == "add" else -1
            if (
                left is None
                or right is None
                or (right[0] is not None and (left[0] is not None or sign < 0))
            ):
                return None
            return (left[0] if left[0] is not None else right[0], left[1] + sign * right[1])
        case "fusion":
            return _follow_into(computations, computation, instruction, None, bound)
        case opcode if opcode in PASSED_ON:
            return _follow(computations, computation, operands[0], bound)
    return None


def _follow_into(
    computations: dict[str, Computation],
    computation: Computation,
    fusion: Instruction,
    element: int | None,
    bound: Callable[[int], Value],
) -> Value:
    fused = computations[_called(fusion)["calls"]]

    @functools.cache
    def value(place: int) -> Value:
        operand = fusion.operands[place]
        if not _scalar_integer(computation.instructions[operand].type):
            return None
        return _follow(computations, computation, operand, bound)

    if element is not None and fused.root.opcode != "tuple":
        return None
    result = fused.root.name if element is None else fused.root.operands[element]
    return _follow(computations, fused, result, value)


# Shapes


@functools.lru_cache(maxsize=1 << 16)
def _arrays(type_: str) -> tuple[tuple[int, bool], ...]:
    """The bytes of each array in a type, padded to its tiles, and whether it is in HBM."""
    return tuple(_array(*part) for part in _ARRAY.findall(type_))


def _array(element: str, dimensions: str, layout: str) -> tuple[int, bool]:
    bits = BITS.get(element)
    if bits is None:
        digits = re.match(r"[a-z]+(\d+)", element)
        if digits is None:
            raise ValueError(f"an unknown type: {element}[{dimensions}]")
        bits = int(digits[1])
    try:
        sizes = [int(size.strip("<= ")) for size in dimensions.split(",") if size]
    except ValueError:
        raise ValueError(f"an unknown shape: {element}[{dimensions}]") from None
    order, _, rest = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", rest)
    if tile:
        tiles = [int(t) for t in tile[1].split(",")]
        minor = [int(d) for d in order.split(",") if d]
        sizes = [sizes[d] for d in reversed(minor)] if minor else sizes
        sizes = [1] * (len(tiles) - len(sizes)) + sizes
        for place, size in enumerate(tiles, len(sizes) - len(tiles)):
            sizes[place] = -(-sizes[place] // size) * size
    space = re.search(r"S\((\d+)\)", rest)
    return -(-math.prod(sizes) * bits // 8), space is None or space[1] == "0"


def _bytes(type_: str) -> int:
    return sum(size for size, _ in _arrays(type_))


def _in_memory(type_: str) -> int:
    return sum(size for size, here in _arrays(type_) if here)


@functools.lru_cache(maxsize=1 << 16)
def _elements(type_: str) -> tuple[str, ...]:
    """A tuple type's, outermost; an array's type alone."""
    if type_[0] != "(":
        return (type_,)
    parts, depth, start = [], 0, 1
    for place, letter in enumerate(type_):
        depth += letter in "({["
        depth -= letter in ")}]"
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(type_[start:place])
            start = place + 1
            if depth == 0:
                break
    return tuple(part.split("*/")[-1].strip() for part in parts)


# Network


def _sent(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[str, int, bool, int]]:
    """The (kind, group, crosses, bytes) of an instruction's communication: of itself, or of what a fusion holds."""
    if instruction.opcode == "send" and (match := _MEGASCALE.search(instruction.rest)):
        yield _sent_by_host(match[1], instruction)
    elif instruction.opcode == "fusion":
        fused = program.computations.get(_called(instruction).get("calls"))
        if fused is None:
            raise ValueError(f"a fusion of nothing: {instruction}")
        inner = [i for i in fused.instructions.values() if i.opcode in COLLECTIVES]
        if not inner or _chained(fused) in ("middle", "done"):
            return
        for collective in inner:
            scattered = collective.opcode == "all-reduce" and fused.root.opcode == "dynamic-slice"
            yield _ring(
                program, fused, collective, "reduce-scatter" if scattered else collective.opcode
            )
    else:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            yield _ring(program, computation, instruction, kind)
        elif kind in ("ragged-all-to-all", "collective-broadcast"):
            raise ValueError(f"bytes that {kind} sends are not known here: {instruction}")


def _chained(fused: Computation) -> str | None:
    """Which part of a collective spread over fusions one is: 'start', 'middle' or 'done'; None of any other fusion."""
    chained = False
    for instruction in fused.instructions.values():
        if instruction.opcode == "custom-call" and "AsyncCollective" in instruction.rest:
            return "start" if '"AsyncCollectiveStart"' in instruction.rest else "done"
        chained |= instruction.opcode in COLLECTIVES and "chain_id=" in instruction.rest
    return "middle" if chained else None


def _ring(
    program: Program, computation: Computation, instruction: Instruction, kind: str
) -> tuple[str, int, bool, int]:
    if kind == "collective-permute":
        if not _PAIRS.search(instruction.rest):
            raise ValueError(f"a permutation without pairs: {instruction}")
        return kind, 2, False, _operand_bytes(computation, instruction)
    n = _group(instruction, program.devices)
    if kind == "all-gather":
        return kind, n, False, _bytes(_result(instruction)) * (n - 1) // n
    whole = _operand_bytes(computation, instruction)
    return kind, n, False, whole * (n - 1) * (2 if kind == "all-reduce" else 1) // n


def _operand_bytes(computation: Computation, instruction: Instruction) -> int:
    return sum(_bytes(computation.instructions[operand].type) for operand in instruction.operands)


def _result(instruction: Instruction) -> str:
    """The type of what comes out, of a `-start` too: its tuple is of operands, results and flags."""
    elements = _elements(instruction.type)
    if instruction.opcode == "copy-start":  # the one that has its result first
        return elements[0]
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return elements[1]
    return elements[0] if instruction.opcode == "recv" else instruction.type


def _numbers(listed: str) -> list[int]:
    return [int(n) for n in listed.split(",") if n]


def _group(instruction: Instruction, devices: int) -> int:
    """How many devices a collective has in a group; raises ValueError where groups differ or are not understood."""
    rest = instruction.rest
    if match := _IOTA.search(rest):
        groups, size = _numbers(match[1])
        if groups * size != math.prod(_numbers(match[2])):
            raise ValueError(f"groups that do not divide the devices: {instruction}")
        return size
    if match := _LISTED.search(rest):
        sizes = {len(_numbers(group)) for group in re.findall(r"\{([\d,]*)\}", match[1])} or {
            devices
        }
        if len(sizes) != 1:
            raise ValueError(f"groups of several sizes: {instruction}")
        return sizes.pop()
    if match := _MESH.search(rest):
        axes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", match[1])}
        names = [name.strip(" '\"") for name in match[3].split(",")]
        if axes.keys() >= set(names):
            return math.prod(axes[name] for name in names)
    raise ValueError(f"groups that are not understood: {instruction}")


def _sent_by_host(transfer: str, instruction: Instruction) -> tuple[str, int, bool, int]:
    target = _TARGET.search(instruction.rest)
    if target is None:
        raise ValueError(f"slices that are not understood: {instruction}")
    whole = _bytes(_elements(instruction.type)[0])
    if transfer == "ONE_TO_ONE":
        return "collective-permute", 2, True, whole
    first = re.match(r"\{+([^}]*)\}", target[1])[1].split(",")
    if "x{" in target[1]:  # {slices}x{devices of each}
        bounds = [[int(n) for n in part.split(":")] for part in first]
        slices = sum(part[-1] - part[0] + 1 for part in bounds)
    else:  # of a group, the device's number and its slice's in the hundred thousands
        slices = len({int(n) // 100_000 for n in first})
    kind = transfer.lower().replace("_", "-")
    if kind == "all-gather":  # each slice's shard goes past all others
        return kind, slices, True, whole * (slices - 1)
    if kind not in ("all-reduce", "reduce-scatter", "all-to-all"):
        raise ValueError(f"a transfer that is not understood: {instruction}")
    return kind, slices, True, whole * (slices - 1) * (2 if kind == "all-reduce" else 1) // slices


# Memory


def _moved(program: Program, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and re.search(
        'custom_call_target="(AllocateBuffer|ConcatBitcast)"', instruction.rest
    ):
        return 0
    types = [computation.instructions[operand].type for operand in instruction.operands]
    if opcode == "fusion":
        return _moved_by_fusion(program, instruction, types)
    written = 0 if opcode == "send" else _in_memory(_result(instruction))
    if opcode in ("slice", "dynamic-slice", "gather", "slice-start"):
        taken = _bytes(_result(instruction)) if _in_memory(types[0]) else 0
        return taken + written + sum(map(_in_memory, types[1:]))
    if opcode == "dynamic-update-slice":
        return (_bytes(types[1]) if _in_memory(types[0]) else 0) + sum(map(_in_memory, types[1:]))
    if opcode == "scatter":  # reads what it adds to
        return (2 * _bytes(types[2]) if _in_memory(types[0]) else 0) + sum(
            map(_in_memory, types[1:])
        )
    return written + sum(map(_in_memory, types))


def _moved_by_fusion(program: Program, fusion: Instruction, types: list[str]) -> int:
    fused = program.computations[_called(fusion)["calls"]]
    chained = _chained(fused)
    if chained == "done":
        return 0
    results, passed = list(_elements(fusion.type)), set()
    if chained:  # buffers that go from fusion to fusion and no further; the first reads the shard
        for out, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", fusion.rest):
            results[int(out or 0)] = "()"
            passed |= {int(operand)} if chained == "middle" else set()
    read_, in_place = _parameters(program, fused)
    total = 0
    for place, type_ in enumerate(types):
        if place not in passed and _in_memory(type_):
            taken = read_.get(place)
            total += _in_memory(type_) if taken is None else min(taken, _in_memory(type_))
    for place, type_ in enumerate(results):
        if _in_memory(type_):
            total += in_place.get(place, _in_memory(type_))
    return total


def _parameters(program: Program, fused: Computation) -> tuple[dict[int, int], dict[int, int]]:
    """Of a fused computation, the bytes read of each parameter of which only slices are, and the bytes written of each
    result that is a parameter updated in place.
    """
    users = collections.defaultdict(list)
    for instruction in fused.instructions.values():
        if instruction.opcode not in ("parameter", "constant"):
            for place, operand in enumerate(instruction.operands):
                users[operand].append((instruction, place))

    def taken(name: str) -> int | None:
        """Bytes read of a value; None for all of it, and for what leaves the computation."""
        if name == fused.root.name:
            return None
        total = 0
        for user, place in users[name]:
            part = None
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                part = _bytes(user.type)
            elif user.opcode == "dynamic-update-slice" and place == 0:
                part = 0
            elif user.opcode == "scatter" and place == 0:
                part = _bytes(fused.instructions[user.operands[2]].type)
            elif user.opcode == "bitcast":
                part = taken(user.name)
            elif user.opcode == "fusion":
                part = _parameters(program, program.computations[_called(user)["calls"]])[0].get(
                    place
                )
            if part is None:
                return None
            total += part
        return total

    read_ = {}
    for instruction in fused.instructions.values():
        if instruction.opcode == "parameter" and (bytes_ := taken(instruction.name)) is not None:
            read_[int(instruction.operands[0])] = bytes_
    root = fused.root
    in_place = {}
    for place, name in enumerate(root.operands if root.opcode == "tuple" else (root.name,)):
        instruction, written = fused.instructions[name], None
        while instruction.opcode in ("bitcast", "dynamic-update-slice", "scatter"):
            if instruction.opcode != "bitcast":
                update = fused.instructions[
                    instruction.operands[1 if instruction.opcode != "scatter" else 2]
                ]
                written = (written or 0) + _bytes(update.type)
            instruction = fused.instructions[instruction.operands[0]]
        if instruction.opcode == "fusion" and written is None:
            written = _parameters(program, program.computations[_called(instruction)["calls"]])[
                1
            ].get(0)
        elif instruction.opcode != "parameter":  # a new array, all of which is written
            written = None
        if written is not None:
            in_place[place] = written
    return read_, in_place
