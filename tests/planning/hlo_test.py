"""Compares counts with sums by hand over small programs, and with programs that XLA compiles."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from musicrl_jax.planning import hlo
from musicrl_jax.planning.chips import CHIPS

HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=16\n\nFileNames\n"
HEAD += '1 "f.py"\n\nFileLocations\n1 {file_name_id=1 line=3}\n\n'
MATRIX = "bf16[1024,512]{1,0:T(8,128)(2,1)}"
IN_MATRIX = 1024 * 512 * 2
FAST = MATRIX[:-1] + "S(1)}"
SCALAR = "s32[]{:T(128)S(6)}"


def config(cycles: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


def program(*lines: str, before: str = "", head: str = HEAD) -> hlo.Program:
    """Reads a program whose entry has these instructions; the last is the root."""
    *most, last = lines
    body = "".join(f"  {line}\n" for line in [*most, f"ROOT {last}"])
    return hlo.read(f"{head}{before}ENTRY %main (p: f32[]) -> f32[] {{\n{body}}}\n")


# --- loops and conditionals ---


def loop(
    start: str = "constant(0)",
    step: str = "add(%i, %one)",
    test: str = "compare(%i.1, %n), direction=LT",
    limit: int = 24,
    body: str = "",
    attributes: str = "",
) -> hlo.Program:
    """Reads a loop over (counter, limit, matrix); %n of its condition is a constant."""
    # The computations: a body, a comparison that a condition may call, and a condition.
    state = f"({SCALAR}, {SCALAR}, {MATRIX})"
    before = f"""%body (s: (s32[], s32[], bf16[1024,512])) -> (s32[], s32[], bf16[1024,512]) {{
  %s = {state} parameter(0)
  %one = {SCALAR} constant(1)
  %i = {SCALAR} get-tuple-element(%s), index=0
  %l = {SCALAR} get-tuple-element(%s), index=1
  %x = {MATRIX} get-tuple-element(%s), index=2
  %next = {SCALAR} {step}
{body}  ROOT %t = {state} tuple(%next, %l, %x)
}}

%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = {SCALAR} parameter(0)
  %b = {SCALAR} parameter(1)
  ROOT %less = pred[]{{:T(512)S(6)}} compare(%a, %b), direction=LT
}}

%condition (s.1: (s32[], s32[], bf16[1024,512])) -> pred[] {{
  %s.1 = {state} parameter(0)
  %n = {SCALAR} constant({limit})
  %i.1 = {SCALAR} get-tuple-element(%s.1), index=0
  %l.1 = {SCALAR} get-tuple-element(%s.1), index=1
  ROOT %goes_on = pred[]{{:T(512)S(6)}} {test}
}}

"""

    # The entry.
    return program(
        f"%c = {SCALAR} {start}",
        f"%from = {SCALAR} copy(%c)",
        f"%limit = {SCALAR} constant(30)",
        f"%p = {MATRIX} parameter(0)",
        f"%init = {state} tuple(%from, %limit, %p)",
        f"%while = {state} while(%init), condition=%condition, body=%body{attributes}",
        before=before,
    )


DOWN = "compare(%i.1, %n), direction=GE"
KNOWN_ROUNDS = ', backend_config={"known_trip_count":{"n":"7"}}'


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [
        ({}, 24),
        ({"start": "constant(2)"}, 22),
        ({"step": "add(%one, %i)", "test": "compare(%i.1, %n), direction=LE"}, 25),
        ({"test": "compare(%n, %i.1), direction=GT"}, 24),
        ({"start": "constant(24)", "step": "subtract(%i, %one)", "test": DOWN, "limit": 3}, 22),
        ({"test": "compare(%i.1, %n), direction=NE"}, 24),
        ({"test": "compare(%i.1, %l.1), direction=LT"}, 30),
        ({"test": "fusion(%i.1, %n), kind=kLoop, calls=%compared"}, 24),
        ({"start": "constant(24)"}, 0),
        ({"step": "multiply(%i, %i)", "attributes": KNOWN_ROUNDS}, 7),
        ({"step": "multiply(%i, %i)"}, None),
        ({"start": "parameter(1)"}, None),
        ({"step": "subtract(%i, %one)"}, None),
    ],
)
def test_a_loop_runs_as_often_as_its_counter_says(changes, rounds, monkeypatch):
    monkeypatch.setattr(hlo, "MOST_ROUNDS", 100)  # the last loop does not end
    module = loop(**changes)
    assert module.unknown_loops == (("while",) if rounds is None else ())
    rounds = 1 if rounds is None else rounds
    assert module.executions == {"main": 1, "body": rounds, "condition": rounds + 1}


def test_a_loop_body_counts_once_for_each_round():
    axes = "mesh['a'=1,'b'=2,'c'=2,'d'=4], device_ids=([4,4]T(1,0)) {'b','c'}"
    gathered = "bf16[4096,512]{1,0:T(8,128)(2,1)}"
    module = loop(
        body=f"  %g = {gathered} all-gather(%x), replica_groups={axes}, dimensions={{0}}\n"
        f"  %d = {FAST} copy(%x), {config(500)}\n"
    )
    assert hlo.sent_bytes(module) == ({"all-gather": 24 * 3 * IN_MATRIX}, 0)
    assert hlo.scheduled_cycles(module) == 24 * 500
    assert hlo.memory_bytes(module) == 24 * (5 * IN_MATRIX + IN_MATRIX)


def test_a_conditional_counts_as_its_branch_of_most_cycles():
    before = "".join(
        f"%{name} (p: bf16[1024,512]) -> bf16[1024,512] {{\n  %p = {MATRIX} parameter(0)\n"
        f"  ROOT %c = {MATRIX} copy(%p), {config(cycles)}\n}}\n\n"
        for name, cycles in (("one", 10), ("two", 30), ("three", 20))
    )
    module = program(
        f"%p = {MATRIX} parameter(0)",
        f"%i = {SCALAR} parameter(1)",
        f"%c = {MATRIX} conditional(%i, %p, %p, %p), branch_computations={{%one, %two, %three}}",
        f"%d = {MATRIX} conditional(%i, %p, %p), true_computation=%one, false_computation=%three",
        before=before,
    )
    assert module.executions == {"main": 1, "two": 1, "three": 1}
    assert hlo.scheduled_cycles(module) == 50


def test_a_kernel_counts_the_operations_that_its_author_says():
    cost = '"cost_estimate":{"flops":"70","transcendentals":"5"}'
    kernel = f'backend_config={{"custom_call_config":{{"body":"TUz+/==",{cost}}}}}'
    module = program(
        f"%p = {MATRIX} parameter(0)",
        f'%k = {MATRIX} custom-call(%p), custom_call_target="tpu_custom_call", {kernel}',
        f'%t = {MATRIX} custom-call(%k), custom_call_target="TopK", {kernel}',
    )
    assert hlo.kernel_flops(module) == 70 and hlo.scheduled_cycles(module) == 0
    assert hlo.memory_bytes(module) == 4 * IN_MATRIX


# --- network ---


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2},{4,6},{1,3},{5,7}}", 2),
        ("{}", 16),
        ("[2,8]<=[16]", 8),
        ("[8,2]<=[4,2,2]T(0,2,1)", 2),
        ("mesh['data'=4,'fsdp'=2,'tensor'=2] {'data','fsdp'}", 8),
        ("mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_1'}", 2),
    ],
)
@pytest.mark.parametrize(
    ("kind", "moved"),
    [("all-reduce", 2), ("reduce-scatter", 1), ("all-to-all", 1), ("all-gather", 1)],
)
def test_a_ring_sends_the_share_of_its_collective(groups, size, kind, moved):
    out = MATRIX if kind != "reduce-scatter" else f"bf16[{1024 // size},512]{{1,0:T(8,128)(2,1)}}"
    module = program(
        f"%p = {MATRIX} parameter(0)",
        f"%r = {out} {kind}(%p), replica_groups={groups}, dimensions={{0}}, to_apply=%add",
    )
    expected = moved * IN_MATRIX * (size - 1) // size
    assert hlo.sent_bytes(module) == ({kind: expected}, 0)


def test_a_start_and_its_done_count_once():
    flags, pairs = "u32[]{:S(2)}", "source_target_pairs={{0,2},{2,0}}"
    quarter = "bf16[256,512]{1,0:T(8,128)(2,1)S(1)}"
    double = "bf16[2048,512]{1,0:T(8,128)(2,1)}"
    module = program(
        f"%p = {MATRIX} parameter(0)",
        f"%s = ({MATRIX}, {FAST}, {flags}, {flags}) collective-permute-start(%p), {pairs}",
        f"%d = {FAST} collective-permute-done(%s)",
        f"%g = ({MATRIX}, {double}) all-gather-start(%p), replica_groups=[8,2]<=[16]",
        f"%e = {double} all-gather-done(%g)",
        f"%c = ({FAST}, {MATRIX}, {flags}) copy-start(%p)",
        f"%f = {FAST} copy-done(%c)",
        f"%a = (({MATRIX}), {quarter}, {flags}) slice-start(%p), slice={{[0:256], [0:512]}}",
        f"%z = {quarter} slice-done(%a)",
    )
    sent = {"collective-permute": IN_MATRIX, "all-gather": IN_MATRIX}
    assert hlo.sent_bytes(module) == (sent, 0)
    assert hlo.memory_bytes(module) == IN_MATRIX + 3 * IN_MATRIX + IN_MATRIX + IN_MATRIX // 4


def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
    """The fusion is libtpu's: two halves, with 48 rows of padding."""
    before = """%all-reduce-scatter (input: f32[4096,2048]) -> f32[2072,2048] {
  %input = f32[4096,2048]{1,0:T(8,128)} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[4144,2048]{1,0:T(8,128)} pad(%input, %zero), padding=0_48x0_0
  %sum = f32[4144,2048]{1,0:T(8,128)} all-reduce(%pad), replica_groups={{0,2},{1,3}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %shard = f32[2072,2048]{1,0:T(8,128)S(1)} dynamic-slice(%sum, %id, %id)
}

"""
    module = program(
        "%p = f32[4096,2048]{1,0:T(8,128)} parameter(0)",
        "%f = f32[2072,2048]{1,0:T(8,128)S(1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter",
        before=before,
    )
    assert hlo.sent_bytes(module) == ({"reduce-scatter": 4144 * 2048 * 4 // 2}, 0)
    assert hlo.memory_bytes(module) == 4096 * 2048 * 4


def test_an_all_gather_spread_over_fusions_counts_where_it_starts():
    # The three fusions: the first starts it, the second computes meanwhile, the third ends it.
    gather = 'all-gather(%x), replica_groups=[8,2]<=[16], frontend_attributes={chain_id="0"}'
    whole, alias = "bf16[2048,512]{1,0:T(8,128)(2,1)S(1)}", "output_to_operand_aliasing"
    before = f"""%starts (x: bf16[1024,512]) -> (bf16[1024,512], bf16[2048,512]) {{
  %x = {MATRIX} parameter(0)
  %g = bf16[2048,512]{{1,0:T(8,128)(2,1)}} {gather}
  ROOT %c = ({MATRIX}, {whole}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%computes (x: bf16[1024,512], y: bf16[2048,512], z: bf16[1024,512]) -> (bf16[1024,512]) {{
  %x = {MATRIX} parameter(0)
  %y = {whole} parameter(1)
  %z = {MATRIX} parameter(2)
  %g = {whole} {gather}
  %n = {MATRIX} negate(%z)
  ROOT %t = ({MATRIX}, {MATRIX}, {whole}) tuple(%n, %x, %g)
}}

%ends (x: bf16[1024,512], y: bf16[2048,512]) -> bf16[2048,512] {{
  %x = {MATRIX} parameter(0)
  %y = {whole} parameter(1)
  %g = {whole} {gather}
  ROOT %c = {whole} custom-call(%x, %y, %g), custom_call_target="AsyncCollectiveDone"
}}

"""

    # The entry hands the shard and the buffer from fusion to fusion.
    module = program(
        f"%p = {MATRIX} parameter(0)",
        f"%z = {MATRIX} parameter(1)",
        f"%s = ({MATRIX}, {whole}) fusion(%p), {alias}={{{{0}}: (0, {{}})}}, calls=%starts",
        f"%s.0 = {MATRIX} get-tuple-element(%s), index=0",
        f"%s.1 = {whole} get-tuple-element(%s), index=1",
        f"%m = ({MATRIX}, {MATRIX}, {whole}) fusion(%s.0, %s.1, %z), kind=kLoop, "
        f"{alias}={{{{1}}: (0, {{}}), {{2}}: (1, {{}})}}, calls=%computes, {config(70)}",
        f"%m.0 = {MATRIX} get-tuple-element(%m), index=1",
        f"%m.1 = {whole} get-tuple-element(%m), index=2",
        f"%d = {whole} fusion(%m.0, %m.1), {alias}={{{{}}: (1, {{}})}}, calls=%ends",
        before=before,
    )
    assert hlo.sent_bytes(module) == ({"all-gather": IN_MATRIX}, 0)
    assert hlo.scheduled_cycles(module) == 70
    assert hlo.memory_bytes(module) == IN_MATRIX + 2 * IN_MATRIX  # the shard, and %computes


@pytest.mark.parametrize(
    ("transfer", "target", "sent"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:7}"', IN_MATRIX),
        ("ALL_REDUCE", '"{1:4}x{0:7}"', IN_MATRIX * 3 // 2),
        ("ALL_GATHER", '"{1,2,3,4}x{0:3}"', 3 * IN_MATRIX),
        ("REDUCE_SCATTER", '"{1,2,3,4}x{0:3}"', IN_MATRIX * 3 // 4),
        ("ALL_TO_ALL", "{{100000,100004,200000,200004},{100001,200001}}", IN_MATRIX // 2),
        ("ONE_TO_ONE", "{{100004->200000},{200004->100000}}", IN_MATRIX),
    ],
)
def test_a_host_send_counts_as_bytes_between_slices(transfer, target, sent):
    how = f"is_host_transfer=true, frontend_attributes={{_xla_megascale_target={target},"
    how += f'_xla_megascale_transfer_type="{transfer}"}}'
    module = program(
        f"%p = {MATRIX} parameter(0)",
        "%token = token[] after-all()",
        f"%s = ({MATRIX}, u32[], token[]) send(%p, %token), channel_id=2, {how}",
        f"%r = ({MATRIX}, u32[], token[]) recv(%token), channel_id=1, {how}",
        "%e = token[] send-done(%s), channel_id=2, is_host_transfer=true",
        f"%d = ({MATRIX}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true",
    )
    assert hlo.sent_bytes(module) == ({}, sent)
    assert hlo.memory_bytes(module) == 2 * IN_MATRIX


# --- memory ---


def test_an_update_of_a_new_array_writes_all_of_it():
    before = f"""%fused (x: bf16[256,512], i: s32[]) -> bf16[1024,512] {{
  %x = bf16[256,512]{{1,0:T(8,128)(2,1)}} parameter(0)
  %i = {SCALAR} parameter(1)
  %zero = bf16[]{{:T(256)}} constant(0)
  %zeros = {MATRIX} broadcast(%zero), dimensions={{}}
  ROOT %put = {MATRIX} dynamic-update-slice(%zeros, %x, %i, %i)
}}

"""
    module = program(
        "%x = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)",
        f"%i = {SCALAR} parameter(1)",
        f"%f = {MATRIX} fusion(%x, %i), kind=kLoop, calls=%fused",
        before=before,
    )
    assert hlo.memory_bytes(module) == IN_MATRIX // 4 + IN_MATRIX


def test_a_fusion_reads_only_its_slice_and_writes_only_its_update():
    many, one = "bf16[24,1024,512]{2,1,0:T(8,128)(2,1)}", "bf16[1,1024,512]{2,1,0:T(8,128)(2,1)}"
    before = f"""%inner (a: bf16[24,1024,512], i: s32[]) -> bf16[1024,512] {{
  %a = {many} parameter(0)
  %i = {SCALAR} parameter(1)
  %s = {one} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={{1,1024,512}}
  ROOT %b = {MATRIX} bitcast(%s)
}}

%outer (a: bf16[24,1024,512], b: bf16[24,1024,512], x: bf16[1024,512]) -> (bf16[24,1024,512]) {{
  %a = {many} parameter(0)
  %b = {many} parameter(1)
  %x = {MATRIX} parameter(2)
  %i = {SCALAR} parameter(3)
  %one = {MATRIX} fusion(%a, %i), kind=kLoop, calls=%inner
  %sum = {MATRIX} add(%one, %x)
  %row = {one} bitcast(%sum)
  %put = {many} dynamic-update-slice(%b, %row, %i, %i, %i)
  ROOT %t = ({many}, {FAST}) tuple(%put, %sum)
}}

"""
    module = program(
        f"%a = {many} parameter(0)",
        f"%b = {many} parameter(1)",
        f"%x = {MATRIX} parameter(2)",
        f"%i = {SCALAR} parameter(3)",
        f"%f = ({many}, {FAST}) fusion(%a, %b, %x, %i), kind=kLoop, calls=%outer, {config(9)}",
        before=before,
    )
    assert hlo.memory_bytes(module) == 3 * IN_MATRIX  # a's slice, x, and b's update
    assert hlo.scheduled_cycles(module) == 9
    module = program(
        f"%a = {many} parameter(0)",
        f"%x = {one} parameter(1)",
        f"%i = {SCALAR} parameter(2)",
        f"%s = {one} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={{1,1024,512}}",
        f"%u = {many} dynamic-update-slice(%a, %x, %i, %i, %i)",
    )
    assert hlo.memory_bytes(module) == 4 * IN_MATRIX


@pytest.mark.parametrize(
    ("type_", "size"),
    [
        ("bf16[3,130]{1,0:T(8,128)(2,1)}", 8 * 256 * 2),
        ("f32[3,130]{0,1:T(8,128)}", 136 * 128 * 4),
        ("f32[5,3,130]{2,1,0:T(8,128)}", 5 * 8 * 256 * 4),
        ("s4[16,128]{1,0:T(8,128)E(4)}", 16 * 128 // 2),
        ("f8e4m3fn[7]{0}", 7),
        ("pred[]", 1),
        ("bf16[<=9,4]{1,0}", 72),
        ("f32[2,2]{1,0:S(1)}", 0),
        ("(c64[3]{0}, (f32[2]{0}, token[]))", 32),
    ],
)
def test_arrays_are_padded_to_their_tiles(type_, size):
    module = program(
        f"%p = {type_} parameter(0)", f"%n = {SCALAR} custom-call(%p), custom_call_target='X'"
    )
    assert hlo.memory_bytes(module) == size


# --- refusals ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%q == nonsense", "%q == nonsense"),
        ("%q = f32[2]{0} copy(%x)", "uses x, but does not define it"),
        ("%q = f32[2]{0} copy(p)", "without names"),
        ("%q = f32[2]{0} call(%p), to_apply=%gone", "uses gone"),
        ("%q = f32[2]{0} while(%p), condition=%gone, body=%gone", "uses gone"),
        ("%q = f32[2]{0} all-reduce(%p), replica_groups=odd", "unknown notation"),
        ("%q = f32[2]{0} all-reduce(%p), replica_groups={{0,1},{2}}", "several sizes"),
        ("%q = what[2]{0} copy(%p)", "unknown type"),
    ],
)
def test_text_that_cannot_be_read_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        module = program("%p = f32[2]{0} parameter(0)", line)
        hlo.sent_bytes(module)
        hlo.memory_bytes(module)


def test_a_text_without_a_whole_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read(HEAD)
    with pytest.raises(ValueError, match="ENTRY computation"):
        hlo.read(HEAD + "ENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n")


# --- compiled programs ---


def test_a_program_compiled_for_cpus_is_read():
    """It scans three times over 24 weights that are sharded over 4, and gathers them one by one."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    def layer(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct(
        (24, 128, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
    )

    def layers(x, w):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(layer, x, w)[0], None), x, length=3)[0]

    module = hlo.read(jax.jit(layers).lower(x, w).compile().as_text())
    assert module.unknown_loops == () and module.devices == 8
    assert hlo.sent_bytes(module) == ({"all-gather": 72 * 128 * 128 * 4 * 3 // 4}, 0)
    assert hlo.memory_bytes(module) > 72 * 128 * 128 * 4


FOR_TPU = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from musicrl_jax.planning import hlo, slices

mesh = slices.describe("v5e:4x4", 1)[0](4, 1)

def array(shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes)))

def layer(x, w):
    return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None

def measured(function, *arrays):
    compiled = jax.jit(function).trace(*arrays).lower().compile()
    program = hlo.read(compiled.as_text())
    return {
        "unknown": program.unknown_loops,
        "sent": hlo.sent_bytes(program),
        "cycles": hlo.scheduled_cycles(program),
        "moved": hlo.memory_bytes(program),
        "by_xla": compiled.cost_analysis()["bytes accessed"],
    }

weights = array((24, 1024, 1024), None, "fsdp")
scan = measured(lambda x, w: jax.lax.scan(layer, x, w)[0], array((8192, 1024), "data"), weights)
large = measured(lambda x, w: x @ w, array((8192, 8192)), array((8192, 8192)))
print(json.dumps([scan, large]))
"""


def test_a_program_compiled_for_tpus_is_read(processes):
    """One scans over 24 gathered weights, with 2048 rows a chip; one is a matmul of 8192 cubed."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", FOR_TPU]
    done = processes.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    scan, large = json.loads(done.stdout.splitlines()[-1])
    assert scan["unknown"] == []
    assert scan["sent"] == [{"all-gather": 24 * 1024 * 1024 * 2 * 3 // 4}, 0]
    a_cycle = 4 * 128 * 128 * 2  # operations of a v5e's matrix units
    least = 24 * 2 * 2048 * 1024 * 1024 / a_cycle
    assert least < scan["cycles"] < 4 * least  # the compiler transposes the gathered weights
    assert scan["moved"] >= 24 * 1024 * 1024 * 2 / 4 + 2 * 2048 * 1024 * 2
    assert large["moved"] == large["by_xla"] == 3 * 8192 * 8192 * 2
    clock = CHIPS["v5e"].flops / a_cycle
    assert CHIPS["v5e"].clock == pytest.approx(clock) and clock == pytest.approx(1.5e9, rel=0.01)
    least = 2 * math.pow(8192, 3) / a_cycle
    assert least < large["cycles"] < 1.25 * least
