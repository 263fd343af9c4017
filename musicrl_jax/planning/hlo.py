"""Counts network bytes, HBM bytes and cycles of a compiled program for TPUs, from its HLO text.

Counts are for one call on one chip. A loop counts once for each round, a conditional as its branch
of most cycles, a fusion as one instruction. XLA's own analysis counts each loop once, and its
Python bindings show neither shapes nor attributes, so `Compiled.as_text()` is parsed here.
"""

import collections
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator

# Text with parentheses in pairs, up to four deep, as in operands that have their types.
_BALANCED = r"[^()]*+"
for _ in range(4):
    _BALANCED = rf"(?:[^()]++|\({_BALANCED}\))*+"
# `%name = type opcode(operands), attributes`
_INSTRUCTION = re.compile(
    rf"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(({_BALANCED})\)(.*)"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\s*\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_SCALAR = re.compile(r"(?:pred|[su]\d+)\[\]")
_CALLEE = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_LOOP = re.compile(r"\b(body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([^,]*))")
_KERNEL_FLOPS = re.compile(r'"tpu_custom_call".*"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":\s*"?(\d+)')
_ROUNDS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_LISTED_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_MESH_GROUPS = re.compile(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}")
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_MEGASCALE_TARGET = re.compile(r'_xla_megascale_target="?\{+([^}]*)\}(x\{)?')

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These opcodes move nothing themselves; a `-done` is counted with its `-start`.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|domain|"
    r"partition-id|replica-id|opt-barrier|add-dependency|async-start|async-update|.*-done"
)
SLICES = ("slice", "dynamic-slice", "gather", "slice-start")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update
# These yield the integer of their first operand.
PASSED_ON = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier"}
ARITHMETIC = {"add": operator.add, "subtract": operator.sub}
COMPARISONS = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge}
COMPARISONS |= {"EQ": operator.eq, "NE": operator.ne}
MOST_ROUNDS = 1 << 17  # of a loop; the rounds of a longer one are unknown

# A function from (a parameter's number, an element of its tuple or None) to its value, if known.
Inputs = Callable[[int, int | None], int | None]
State = dict[int, int]  # known integers of the tuple that a loop carries, by element


class _ByName(dict):
    """Instructions or computations by name."""

    def __missing__(self, name: str) -> None:
        raise ValueError(f"the program's text uses {name}, but does not define it")


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line.

    Attributes:
      name: of its result.
      type: of its result, with layout.
      opcode: such as all-gather.
      operands: names; of a constant its literal, of a parameter its number.
      attributes: the rest of the line.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; `root` yields the result."""

    instructions: dict[str, Instruction]
    root: Instruction

    def operand(self, instruction: Instruction, place: int) -> Instruction:
        """Returns the instruction that yields an operand."""
        return self.instructions[instruction.operands[place]]

    def operand_types(self, instruction: Instruction) -> list[str]:
        """Returns the type of each operand."""
        return [self.instructions[name].type for name in instruction.operands]

    @functools.cached_property
    def cycles(self) -> int:
        """Sum of the compiler's cycle estimates of the instructions, without called ones."""
        matches = (_CYCLES.search(each.attributes) for each in self.instructions.values())
        return sum(int(match[1]) for match in matches if match)

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of parameters by number."""
        parameters = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return {int(each.operands[0]): each.name for each in parameters}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Instructions that have a name as an operand, each with the operand's place."""
        users = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for place, name in enumerate(instruction.operands):
                users[name].append((instruction, place))
        return users


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module.

    Attributes:
      computations: by name.
      devices: that run it together, in one slice.
      executions: how often each computation runs that is not part of an instruction.
      unknown_loops: names of loops whose number of rounds the text does not show; counted once.
    """

    computations: dict[str, Computation]
    devices: int
    executions: dict[str, int]
    unknown_loops: tuple[str, ...]

    def callee(self, instruction: Instruction) -> Computation:
        """Returns the computation of a fusion."""
        return self.computations[_callee(instruction)]

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Yields (computation, instruction, how often it runs)."""
        for name, times in self.executions.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times


def read(text: str) -> Program:
    """Parses a module; raises ValueError for the first line that it cannot parse."""
    # Computations, each a head with braces around its instructions, one a line.
    computations, entry = _ByName(), None
    for is_entry, name, body in _COMPUTATION.findall(text):
        instructions, root = _ByName(), None
        for line in filter(str.strip, body.splitlines()):
            instruction, is_root = _instruction(line)
            instructions[instruction.name] = instruction
            root = instruction if is_root else root
        computations[name] = Computation(instructions, root)
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError("the program's text has no ENTRY computation, or ends within it")

    # The module's first line has its attributes.
    sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    executions, unknown = _executions(computations, entry)
    return Program(computations, math.prod(map(int, sizes)), executions, unknown)


def sent_bytes(program: Program) -> tuple[dict[str, int], int]:
    """Returns (bytes that a chip sends within its slice, by collective; bytes to other slices).

    In a ring of n, a chip sends (n - 1) / n of an all-gather's output, of a reduce-scatter's or
    all-to-all's input, and twice that of an all-reduce's; in a permutation its whole input. Sizes
    are those of tiled layouts.

    Three forms are the TPU compiler's own. An all-reduce fused with taking one's own shard is a
    reduce-scatter. A collective spread over several fusions counts in the first. A program for
    several slices is compiled for one of them, and sends between slices through the host (the
    Megascale runtime): these count as rings of slices.
    """
    within, between = collections.Counter(), 0
    for computation, instruction, times in program.executed():
        if instruction.opcode == "send" and _MEGASCALE.search(instruction.attributes):
            between += _bytes_between_slices(instruction) * times
        for holder, collective, kind in _collectives(program, computation, instruction):
            within[kind] += _bytes_within_slice(program, holder, collective, kind) * times
    return dict(within.most_common()), between


def scheduled_cycles(program: Program) -> int:
    """Returns the cycles of all instructions, one after the other, by the compiler's estimates.

    An estimate includes the wait for operands in HBM. Collectives, asynchronous copies, sorts,
    reduce-windows, concatenations, custom calls (TopK, Pallas kernels) and scalars have none, and
    count 0. Time spent waiting for one of them is not included either.
    """
    return sum(
        program.computations[name].cycles * times for name, times in program.executions.items()
    )


def kernel_flops(program: Program) -> int:
    """Returns the operations of Pallas kernels that say them; the compiler estimates no cycles."""
    total = 0
    for _, instruction, times in program.executed():
        if match := _KERNEL_FLOPS.search(instruction.attributes):
            total += int(match[1]) * times
    return total


def memory_bytes(program: Program) -> int:
    """Returns the bytes read from and written to HBM.

    They are the operands and results of each instruction, in tiled layouts, that are in HBM: S(1)
    is VMEM. A slice or gather reads only its result's size, an update in place writes only the
    update; this holds inside a fusion too, if it uses a parameter in no other way. An asynchronous
    copy or collective counts once. The total is too low where a matmul's operand exceeds VMEM and
    is read again, and for what a ring buffers.
    """
    return sum(
        _instruction_traffic(program, computation, instruction) * times
        for computation, instruction, times in program.executed()
    )


# --- parsing ---


def _instruction(line: str) -> tuple[Instruction, bool]:
    """Parses a line; returns (instruction, whether it is the root)."""
    match = _INSTRUCTION.match(line)
    if match is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:200]}")
    root, name, type_, opcode, inside, attributes = match.groups()
    operands = (inside,)
    if opcode not in ("constant", "parameter"):
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
        if inside.strip() and not operands:
            raise ValueError(f"operands without names: {line.strip()[:200]}")
    return Instruction(name, type_, opcode, operands, attributes), root is not None


def _callee(instruction: Instruction) -> str:
    """Returns the name of the computation that a fusion or call runs."""
    match = _CALLEE.search(instruction.attributes)
    if match is None:
        raise ValueError(f"calls nothing: {instruction}")
    return match[1]


# --- executions ---


def _executions(
    computations: dict[str, Computation], entry: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns (how often each computation runs, names of loops of unknown length)."""
    unknown: dict[str, None] = {}

    def runs(name: str, inputs: Inputs = lambda *_: None) -> dict[str, int]:
        """Returns how often each computation runs in one call of `name`."""
        counts = collections.Counter({name: 1})

        def add(called: dict[str, int], times: int = 1) -> None:
            for each, count in called.items():
                counts[each] += count * times

        for instruction in computations[name].instructions.values():
            match instruction.opcode:
                case "while":
                    rounds, known = _loop(computations, computations[name], instruction, inputs)
                    if rounds is None:
                        unknown[instruction.name], rounds = None, 1
                    # A nested loop may count up to a number that this one carries along.
                    for part, callee in _LOOP.findall(instruction.attributes):
                        times = rounds + (part == "condition")
                        add(runs(callee, lambda _, each, known=known: known.get(each)), times)
                case "conditional":
                    branches = [runs(branch) for branch in _branches(instruction)]
                    branches.reverse()  # of two with equal cycles the later counts
                    add(max(branches, key=cycles))
                case "call" | "async-start":
                    add(runs(_callee(instruction)))
        return counts

    def cycles(counts: dict[str, int]) -> int:
        return sum(computations[name].cycles * times for name, times in counts.items())

    return dict(runs(entry)), tuple(unknown)


def _branches(instruction: Instruction) -> list[str]:
    """Returns the names of a conditional's branches."""
    matches = _BRANCHES.findall(instruction.attributes)
    return re.findall(r"[\w.\-]+", ",".join(many or one for many, one in matches))


# --- loops ---


def _loop(
    computations: dict[str, Computation],
    computation: Computation,
    loop: Instruction,
    inputs: Inputs,
) -> tuple[int | None, State]:
    """Returns (rounds of a loop, or None if unknown; integers that are the same in each round).

    It runs the loop's counter, since the TPU compiler's text lacks the rounds that XLA knew.
    """
    parts = dict(_LOOP.findall(loop.attributes))
    condition, body = computations[parts["condition"]], computations[parts["body"]]

    def result(part: Computation, state: State, element: int | None = None) -> int | None:
        def carried(_: str, each: int) -> int | None:
            return state.get(each)

        return _value(computations, part, part.root.name, carried, element)

    def advance(state: State) -> State:
        values = {element: result(body, state, element) for element in state}
        return {element: value for element, value in values.items() if value is not None}

    # The known integers that the loop starts from.
    start: State = {}
    for element in range(len(body.root.operands) if body.root.opcode == "tuple" else 0):
        value = _value(computations, computation, loop.operands[0], inputs, element)
        if value is not None:
            start[element] = value

    # Drops what changes, until a round changes nothing.
    constants, after = start, advance(start)
    while constants != after:
        constants = {each: n for each, n in constants.items() if after.get(each) == n}
        after = advance(constants)

    # The rounds, which the CPU compiler writes down.
    if match := _ROUNDS.search(loop.attributes):
        return int(match[1]), constants
    state = start
    for rounds in range(MOST_ROUNDS):
        goes_on = result(condition, state)
        if not goes_on:
            return None if goes_on is None else rounds, constants
        state = advance(state)
    return None, constants


def _value(
    computations: dict[str, Computation],
    computation: Computation,
    name: str,
    inputs: Inputs,
    element: int | None = None,
) -> int | None:
    """Evaluates an integer, or an element of a tuple; returns None if it is not known."""
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands

    def operand(place: int, element: int | None = None) -> int | None:
        return _value(computations, computation, operands[place], inputs, element)

    # Instructions that pass a value on, take it out of a tuple or compute it in a fusion.
    if opcode in PASSED_ON:
        return operand(0, element)
    if element is None and not _SCALAR.match(instruction.type):
        return None
    match opcode:
        case "parameter":
            return inputs(int(operands[0]), element)
        case "get-tuple-element" if element is None:
            return operand(0, int(re.search(r"index=(\d+)", instruction.attributes)[1]))
        case "tuple":
            return operand(element)
        case "fusion" | "call":
            fused = computations[_callee(instruction)]
            return _value(computations, fused, fused.root.name, operand, element)

    # Constants and arithmetic.
    if opcode == "constant":
        return int(operands[0]) if re.fullmatch(r"-?\d+", operands[0]) else None
    function = ARITHMETIC.get(opcode)
    if opcode == "compare":
        function = COMPARISONS[re.search(r"direction=(\w+)", instruction.attributes)[1]]
    terms = [operand(0), operand(1)] if function else [None]
    return None if None in terms else int(function(*terms))


# --- sizes ---


@functools.lru_cache(maxsize=1 << 16)
def _arrays(type_: str) -> tuple[tuple[int, bool], ...]:
    """Returns (bytes padded to tiles, whether it is in HBM) of each array in a type."""
    return tuple(_array(*part) for part in _ARRAY.findall(type_))


def _array(element: str, dimensions: str, layout: str) -> tuple[int, bool]:
    """Returns (bytes padded to tiles, whether it is in HBM) of an array type."""
    try:  # a bounded dynamic dimension is written <=9
        bits = BITS[element] if element in BITS else int(re.match(r"[a-z]+(\d+)", element)[1])
        sizes = [int(size.strip("<= ")) for size in dimensions.split(",") if size]
    except (TypeError, ValueError):
        raise ValueError(f"an unknown type: {element}[{dimensions}]") from None

    # The layout is minor_to_major:T(tile)...S(memory space).
    order, _, rest = layout.partition(":")
    if tile := re.search(r"T\(([\d,]+)\)", rest):
        tiles = [int(size) for size in tile[1].split(",")]
        sizes = [sizes[int(each)] for each in reversed(order.split(","))] if order else sizes
        sizes = [1] * (len(tiles) - len(sizes)) + sizes
        for place, size in enumerate(tiles, len(sizes) - len(tiles)):
            sizes[place] = -(-sizes[place] // size) * size
    space = re.search(r"S\((\d+)\)", rest)
    return -(-math.prod(sizes) * bits // 8), space is None or space[1] == "0"


def _bytes(type_: str) -> int:
    return sum(size for size, _ in _arrays(type_))


def _hbm_bytes(type_: str) -> int:
    return sum(size for size, in_hbm in _arrays(type_) if in_hbm)


@functools.lru_cache(maxsize=1 << 16)
def _elements(type_: str) -> tuple[str, ...]:
    """Returns the elements of a tuple type; an array type alone."""
    if type_[0] != "(":
        return (type_,)
    parts, depth = [""], 0
    for letter in type_[1:-1]:
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.split("*/")[-1].strip() for part in parts)  # without /*index=5*/


def _result(instruction: Instruction) -> str:
    """Returns the result's type; the tuple of a `-start` has operands and flags beside it."""
    elements = _elements(instruction.type)
    if instruction.opcode in ("copy-start", "recv"):
        return elements[0]
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return elements[1]
    return instruction.type


# --- network ---


def _collectives(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction, str]]:
    """Yields (computation, collective, kind) of an instruction: itself, or those in a fusion."""
    if instruction.opcode != "fusion":
        kind = instruction.opcode.removesuffix("-start")
        if kind in ("ragged-all-to-all", "collective-broadcast"):
            raise ValueError(f"bytes that {kind} sends are unknown: {instruction}")
        if kind in COLLECTIVES:
            yield computation, instruction, kind
        return
    # In a chain of fusions, each one repeats the same collective. Count it in the first only.
    fused = program.callee(instruction)
    if _chain_part(fused) in ("middle", "done"):
        return
    for inner in fused.instructions.values():
        # Every chip takes its shard of the sum, so the compiler sends no more than that.
        if inner.opcode == "all-reduce" and fused.root.opcode == "dynamic-slice":
            yield fused, inner, "reduce-scatter"
        elif inner.opcode in COLLECTIVES:
            yield fused, inner, inner.opcode


def _chain_part(fused: Computation) -> str | None:
    """Returns the part of a collective spread over fusions: start, middle or done; else None."""
    part = None
    for instruction in fused.instructions.values():
        if instruction.opcode == "custom-call" and "AsyncCollective" in instruction.attributes:
            return "start" if '"AsyncCollectiveStart"' in instruction.attributes else "done"
        if instruction.opcode in COLLECTIVES and "chain_id=" in instruction.attributes:
            part = "middle"
    return part


def _bytes_within_slice(
    program: Program, computation: Computation, collective: Instruction, kind: str
) -> int:
    """Returns the bytes that a chip sends for a collective."""
    whole = sum(map(_bytes, computation.operand_types(collective)))
    if kind == "collective-permute":
        return whole
    if kind == "all-gather":
        whole = _bytes(_result(collective))
    return _ring_bytes(kind, whole, _group_size(collective, program.devices))


def _ring_bytes(kind: str, whole: int, size: int) -> int:
    return whole * (size - 1) * (2 if kind == "all-reduce" else 1) // size


def _group_size(collective: Instruction, devices: int) -> int:
    """Returns how many devices a group has; raises ValueError if groups differ or are unknown."""
    if match := _IOTA_GROUPS.search(collective.attributes):
        return int(match[1])
    if match := _LISTED_GROUPS.search(collective.attributes):
        sizes = {group.count(",") + 1 for group in re.findall(r"\{[\d,]+\}", match[1])}
        if len(sizes) > 1:
            raise ValueError(f"groups of several sizes: {collective}")
        return sizes.pop() if sizes else devices
    if match := _MESH_GROUPS.search(collective.attributes):
        axes = dict(re.findall(r"'?([\w.\-]+)'?=(\d+)", match[1]))
        names = [name.strip(" '\"") for name in match[2].split(",")]
        if axes.keys() >= set(names):
            return math.prod(int(axes[name]) for name in names)
    raise ValueError(f"groups in an unknown notation: {collective}")


def _bytes_between_slices(send: Instruction) -> int:
    """Returns the bytes that a chip sends to other slices by one Megascale `send`."""
    transfer = _MEGASCALE.search(send.attributes)[1]
    target = _MEGASCALE_TARGET.search(send.attributes)
    kind, whole = transfer.lower().replace("_", "-"), _bytes(_elements(send.type)[0])
    if target is None or kind not in (*COLLECTIVES, "one-to-one"):
        raise ValueError(f"a transfer between slices in an unknown notation: {send}")
    if kind == "one-to-one":
        return whole

    # A ring of slices, written {slices}x{devices of each}, or as a group of numbers of devices,
    # each its slice's in the hundred thousands.
    if target[2]:
        slices = 0
        for part in target[1].split(","):
            low, _, high = part.partition(":")
            slices += int(high or low) - int(low) + 1
    else:
        slices = len({int(number) // 100_000 for number in target[1].split(",")})
    return _ring_bytes(kind, whole * slices if kind == "all-gather" else whole, slices)


# --- memory ---


def _instruction_traffic(
    program: Program, computation: Computation, instruction: Instruction
) -> int:
    """Returns the HBM bytes that an instruction reads and writes."""
    opcode, attributes = instruction.opcode, instruction.attributes
    if _FREE.fullmatch(opcode):
        return 0
    # These two reserve memory or rename it.
    if re.search('custom_call_target="(AllocateBuffer|ConcatBitcast)"', attributes):
        return 0
    types = computation.operand_types(instruction)
    if opcode == "fusion":
        return _fusion_traffic(program, instruction, types)

    # Operands, then results.
    traffic = 0
    for place, type_ in enumerate(types):
        part = _part_read(computation, instruction, place)
        in_hbm = _hbm_bytes(type_)
        traffic += in_hbm if part is None else part * bool(in_hbm)
    if opcode in UPDATES:
        return traffic + _bytes(types[UPDATES[opcode]]) * bool(_hbm_bytes(types[0]))
    return traffic + (0 if opcode == "send" else _hbm_bytes(_result(instruction)))


def _fusion_traffic(program: Program, fusion: Instruction, types: list[str]) -> int:
    """Returns the HBM bytes of a fusion, whose operands have these types."""
    fused = program.callee(fusion)
    part = _chain_part(fused)
    if part == "done":
        return 0

    # Buffers of a collective that pass from fusion to fusion; the first reads the shard.
    passed_operands, passed_results = set(), set()
    if part is not None:
        for result, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", fusion.attributes):
            passed_results.add(int(result or 0))
            if part == "middle":
                passed_operands.add(int(operand))

    # All others.
    traffic = 0
    for place, type_ in enumerate(types):
        if place not in passed_operands and (in_hbm := _hbm_bytes(type_)):
            read_ = _bytes_read(program, fused, fused.parameters[place])
            traffic += in_hbm if read_ is None else min(read_, in_hbm)
    results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
    for place, type_ in enumerate(_elements(fusion.type)):
        if place not in passed_results and (in_hbm := _hbm_bytes(type_)):
            written = (
                _bytes_updated(program, fused, results[place]) if place < len(results) else None
            )
            traffic += in_hbm if written is None else written
    return traffic


def _part_read(computation: Computation, user: Instruction, place: int) -> int | None:
    """Returns the bytes that an instruction reads of an operand; None for all of it."""
    if place == 0 and user.opcode in SLICES:
        return _bytes(_result(user))
    if place == 0 and user.opcode in UPDATES:  # a scatter reads what it adds to
        return _bytes(computation.operand(user, 2).type) if user.opcode == "scatter" else 0
    return None


def _bytes_read(program: Program, fused: Computation, name: str) -> int | None:
    """Returns the bytes that a fusion reads of a value; None for all of it."""
    if name == fused.root.name:  # it leaves the fusion whole
        return None
    total = 0
    for user, place in fused.users[name]:
        match user.opcode:
            case "bitcast":
                part = _bytes_read(program, fused, user.name)
            case "fusion":
                inner = program.callee(user)
                part = _bytes_read(program, inner, inner.parameters[place])
            case _:
                part = _part_read(fused, user, place)
        if part is None:
            return None
        total += part
    return total


def _bytes_updated(program: Program, fused: Computation, name: str) -> int | None:
    """Returns the bytes written of a result that updates a parameter in place; None for all."""
    # Several updates of one array may follow each other; each writes only its own part.
    instruction, written = fused.instructions[name], None
    while instruction.opcode == "bitcast" or instruction.opcode in UPDATES:
        if instruction.opcode in UPDATES:
            update = fused.operand(instruction, UPDATES[instruction.opcode])
            written = (written or 0) + _bytes(update.type)
        instruction = fused.operand(instruction, 0)
    if instruction.opcode == "parameter":
        return written
    if instruction.opcode == "fusion" and written is None:
        inner = program.callee(instruction)
        return _bytes_updated(program, inner, inner.root.name)
    return None  # a new array, all of which is written
