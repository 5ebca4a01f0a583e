"""What is read from a compiler's texts: regions of a schedule, loops and buffers of an HLO.

`dump/` holds what libtpu 0.0.50 wrote for v5e of a kernel with two bodies, products of 128 queries
and 128 keys, H = 128, the second with a causal mask; of its bundles only targets and products.
"""

import pathlib

import pytest

from flax_mha.bench.aot import compile as compiling
from flax_mha.bench.aot import figures, hlo, schedule

DUMP = pathlib.Path(__file__).parent / "dump"
USE, BUNDLES = (path.read_text() for path in sorted(DUMP.iterdir()))


def test_a_schedule_has_a_region_between_two_targets():
    found = schedule.regions(USE, BUNDLES)
    assert [region.bundles for region in found] == [15, 74, 143, 159, 17, 14, 23]
    # Two products of 128 x 128 x 128: 128 rows each, over the whole of a unit's weights.
    assert [region.rows for region in found] == [0, 0, 256, 256, 0, 0, 0]
    assert sum(region.bundles for region in found) == len(USE.splitlines()) - 4
    assert found[2].use["EUP"] == pytest.approx(16 / 143)


def test_the_bodies_are_the_regions_that_multiply_the_whole_one_first():
    whole, masked = schedule.bodies(schedule.regions(USE, BUNDLES))
    assert (whole.bundles, masked.bundles) == (143, 159)
    assert whole.use["VALU"] * 143 < masked.use["VALU"] * 159


def test_bodies_are_told_apart_by_arithmetic_and_not_by_length_or_place():
    region = lambda bundles, valu, rows: schedule.Region(bundles, {"VALU": valu}, rows)
    masked, whole, start = region(100, 0.9, 64), region(140, 0.5, 64), region(900, 0.9, 8)
    assert schedule.bodies([masked, start, whole]) == [whole, masked]
    assert schedule.bodies([]) == []
    assert schedule.bodies([region(50, 0.9, 0)]) == []


def test_all_kernels_of_a_folder_are_read_and_nothing_else(tmp_path):
    for path in DUMP.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "1-tiny_attention.1-02-schedule-analysis_final_bundles.txt").write_text("none")
    (tmp_path / "1-TLP-00-memory-space-assignment-bufferinfo.txt").write_text("none")
    found = schedule.kernels(tmp_path.iterdir())
    assert found == {"tiny_attention.1": schedule.regions(USE, BUNDLES)}


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        (
            "  0x1 PF: > { %1 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %2 = vmatmul.bf16.gmra.mxu1 %v1 }",
            32,
        ),
        ("  0x1   : > { %1798 = vmatmul.mubr.bf16.vlgmr.msra.gmra.mxu0 %v2035_v12 }", 16),
        ("  0x1   : > { %1798 = vmatmul.msk.bf16.vlgmr.msra.gmra.mxu0 %vm12, %v35_v12 }", 16),
        ("  0x1   : > { %1798 = vmatmul.lmr.bf16.gmra.16.mxu3 %v2035_v12 }", 8),
        ("  0x1   : > { %5 = vmatmul.f32.vlgmr.msrb.gmra.mxu3 %v1 }", 8),
        ("  0x1   : > { %5 = vmatpush.bf16.xpose.msra.mxu3 %v1 }", 0),
        ("vmatmul.bf16.gmra.mxu0", 0),
    ],
)
def test_rows_that_an_instruction_multiplies(line, rows):
    table = "== CAPACTIY:\nMXU, VALU\n 4 4\n== UTILIZATION:\n0 0\n1 0\n"
    assert sum(region.rows for region in schedule.regions(table, line)) == rows


# --- the program ---------------------------------------------------------------------------------

TILES = """\
HloModule jit_f, is_scheduled=true

%fused_computation.1 (param_0: bf16[8,512,128]) -> f32[1,8,512,512] {
  %param_0 = bf16[8,512,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %convolution-base-dilated.74 = f32[8,512,512]{2,1,0:T(8,128)} convolution(%param_0, %param_0)
  ROOT %big = f32[1,8,4096,512]{3,2,1,0:T(8,128)} bitcast(%convolution-base-dilated.74)
}

%fused_computation.2 (param_0: bf16[8,512,128]) -> f32[8,512,128] {
  ROOT %dot.1 = f32[8,512,128]{2,1,0:T(8,128)} dot(%param_0, %param_0)
}

%masked_tile (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.3 = f32[1,8,512,512]{3,2,1,0} fusion(%x), kind=kOutput, calls=%fused_computation.1, \
backend_config={"estimated_cycles":"500"}
  ROOT %fusion.4 = f32[8,512,128]{2,1,0} fusion(%x), calls=%fused_computation.2, \
backend_config={"estimated_cycles":"40"}
}

%whole_tile (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[1,8,512,512]{3,2,1,0} fusion(%x), kind=kOutput, calls=%fused_computation.1, \
backend_config={"estimated_cycles":"600"}
  ROOT %fusion.2 = f32[8,512,128]{2,1,0} fusion(%x), calls=%fused_computation.2, \
backend_config={"estimated_cycles":"60"}
}

%zeros (arg: (s32[])) -> (s32[]) {
  ROOT %fusion.5 = f32[9]{0} fusion(%x), calls=%no_products, backend_config={"estimated_cycles":"7"}
}

%queries (arg: (s32[], /*index=1*/f32[8])) -> (s32[], f32[8]) {
  %while.0 = (s32[]{:T(128)}) while(%tuple.0), condition=%less, body=%zeros
  %while.1 = (s32[]{:T(128)}, /*index=1*/f32[8]{0}) while(%tuple.1), condition=%l, body=%whole_tile
  ROOT %while.2 = (s32[]{:T(128)}, f32[8]{0}) while(%while.1), condition=%less, body=%masked_tile
}

ENTRY %main.5 (a: bf16[1,2048,8,128]) -> bf16[1,2048,8,128] {
  %a = bf16[1,2048,8,128]{3,2,1,0} parameter(0)
  %own.1 = (bf16[8,2048,128]{2,1,0:T(8,128)(2,1)S(1)}, f32[4]{0}) custom-call(%a), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
  %copy.1 = f32[4]{0} custom-call(%a), custom_call_target="AllocateBuffer"
  %convert.3 = bf16[1,2048,8,128]{3,2,1,0} convert(%a), backend_config={"estimated_cycles":"30"}
  ROOT %while.9 = (s32[], f32[8]{0}) while(%a), condition=%less, body=%queries
}
"""


def test_a_program_over_tiles_has_its_steps_in_the_innermost_loops():
    module = hlo.Module(TILES)
    assert module.entry == "main.5"
    assert module.steps == [hlo.Steps("queries", (660, 540), 2, 8 * 512 * 512)]
    assert module.cycles("main.5") == 30


def test_kernels_are_the_custom_calls_for_the_tpu():
    assert hlo.Module(TILES).kernels == ["own.1"]


def test_the_largest_buffer_is_looked_for_outside_fusions():
    assert hlo.Module(TILES).largest_buffer == (8 * 512 * 512 * 4, "f32[1,8,512,512]")


def test_a_program_without_loops_is_one_step():
    entry = TILES.replace("body=%queries", "").replace("while(%tuple", "call(%tuple")
    entry = entry.replace(
        "  %copy.1 = f32[4]{0} custom-call(%a)",
        "  %f = f32[1]{0} fusion(%a), calls=%fused_computation.1",
    ).replace("while(%while.1)", "call(%x)")
    assert hlo.Module(entry).steps == [hlo.Steps("main.5", (30,), 1, 8 * 512 * 512)]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[2,3]", 12),
        ("pred[5]", 5),
        ("f32[]", 4),
        ("s4[3]", 2),
        ("f8e4m3fn[7]", 7),
        ("u64[0]", 0),
    ],
)
def test_the_bytes_of_a_shape(shape, size):
    text = f"ENTRY %main (a: {shape}) -> {shape} {{\n  ROOT %a = {shape} parameter(0)\n}}\n"
    assert hlo.Module(text).largest_buffer[0] == size


# --- figures -------------------------------------------------------------------------------------


def compiled(bundles=BUNDLES):
    regions = {"own.1": schedule.regions(USE, bundles)}
    return compiling.Compiled(hlo.Module(TILES), regions, 0)


def test_cycles_are_those_of_512_x_512_entries():
    kernel, loops = figures.parts_of(compiled(), H=128, width=128)
    assert (kernel.source, kernel.entries, kernel.products) == ("schedule", 128 * 128, 2)
    assert (kernel.whole, kernel.masked) == (143 * 16, 159 * 16)
    assert (loops.source, loops.entries, loops.products) == ("estimate", 8 * 512 * 512, 2)
    assert (loops.whole, loops.masked) == (660 / 8, 540 / 8)
    figure = figures.Figure("v5e:2x2", "causal", "own", False, parts=[kernel, loops])
    assert figure.whole == kernel.whole + loops.whole
    assert figure.use("MXU") == pytest.approx(kernel.use["MXU"])


@pytest.mark.parametrize(
    ("H", "width", "entries"),
    [(64, 128, 128**2), (128, 128, 128**2), (256, 128, 128**2 // 2), (128, 256, 128**2 * 2)],
)
def test_what_is_multiplied_is_entries_times_filled_up_features(H, width, entries):
    """Of twice the features, half the entries; a row of a unit of 256 meets four times as much."""
    kernel, _ = figures.parts_of(compiled(), H=H, width=width)
    assert (kernel.entries, kernel.products) == (entries, 2)


def test_a_kernel_of_other_products_is_not_read():
    without_one = BUNDLES.replace("vmatmul.bf16.gmra.mxu2 }", "vmatmul.f32.gmra.mxu2 }", 1)
    kernel, _ = figures.parts_of(compiled(without_one), H=128, width=128)
    assert (kernel.entries, kernel.whole) == (None, None)
    assert figures.Figure("v5e:2x2", "causal", "own", False, parts=[kernel]).whole is None


def test_a_kernel_that_multiplies_nothing_is_beside_the_figures():
    dry = "\n".join(line for line in BUNDLES.splitlines() if "vmatmul" not in line)
    kernel, loops = figures.parts_of(compiled(dry), H=128, width=128)
    assert kernel.products == 0
    figure = figures.Figure("v5e:2x2", "causal", "own", False, parts=[kernel, loops])
    assert figure.whole == loops.whole


def test_a_kernel_without_a_schedule_is_not_read():
    kernel, _ = figures.parts_of(compiling.Compiled(hlo.Module(TILES), {}, 0), H=128, width=128)
    assert (kernel.products, kernel.whole) == (None, None)
    assert figures.Figure("v5e:2x2", "causal", "own", False, parts=[kernel]).whole is None


def test_in_a_gradient_the_forward_body_is_known_by_its_products():
    (forward, _) = figures.parts_of(compiled(), H=128, width=128)
    (again, _) = figures.parts_of(compiled(), H=128, width=128, forward=[forward])
    assert (again.entries, again.products) == (128 * 128, 2)
    other = figures.Part("own.1", "schedule", [9], 512 * 512, 2)
    (dkv, _) = figures.parts_of(compiled(), H=128, width=128, forward=[other])
    assert (dkv.entries, dkv.products) == (64 * 128, 4)  # not a forward body: d_key and d_value


def test_six_passes_of_a_float32_product_are_one_product():
    kernel = lambda rows: schedule.Region(500, dict.fromkeys(figures.UNITS, 0.5), rows)

    def parts(rows, forward=()):
        found = compiling.Compiled(hlo.Module(TILES), {"own.1": [kernel(rows)]}, 0)
        return figures.parts_of(found, H=128, width=128, forward=forward)[:1]

    (forward,) = parts(6 * 256)
    assert (forward.entries, forward.products) == (128**2, 12)
    (dkv,) = parts(6 * 512, [forward])
    assert (dkv.entries, dkv.products) == (128**2, 24)
    (again,) = parts(6 * 256, [forward])
    assert (again.entries, again.products) == (128**2, 12)


@pytest.mark.parametrize(
    ("multiplied", "products", "entries"),
    [
        (2 << 20, (2, 12), 1 << 20),
        (12 << 20, (2, 12), 1 << 20),  # float32 at the highest precision: six passes
        (5 << 18, (3, 4, 5), 1 << 18),
        (7 << 18, (3, 4, 5), None),
        (0, (2,), None),
    ],
)
def test_entries_are_a_power_of_two(multiplied, products, entries):
    assert figures.entries_of(multiplied, products) == entries
