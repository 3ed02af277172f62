"""The readers behind benchmarks/cuda_static.py, on small texts with known answers."""

import pytest

from benchmarks import cuda_static, sass

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4stepi' for 'sm_90'
ptxas info    : Function properties for _Z4stepi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Function properties for _Z6helperv
    64 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function '_Z4keysi' for 'sm_90'
ptxas info    : Function properties for _Z4keysi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""

# A loop with a slow side way (20 more instructions), a way without noise, and a tail.
SASS = """\
//--------------------- .text._Z4stepi ------
_Z4stepi:
        /*0000*/                   S2R R10, SR_TID.X ;
        /*0010*/              @!P0 EXIT ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   IMAD.WIDE.U32 R8, R4, -0x2daee0ad, RZ ;
        /*0050*/                   LOP3.LUT R5, R9, R5, R6, 0x96, !PT ;
        /*0060*/                   I2F.U32 R6, R5 ;
        /*0070*/                   MUFU.RSQ R7, R6 ;
        /*0080*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0090*/                   CALL.REL.NOINC `($slow) ;
.L_x_1:
        /*00a0*/                   FFMA R7, R7, R6, 1 ;
        /*00b0*/                   IMAD.MOV.U32 R8, RZ, RZ, R7 ;
.L_x_2:
        /*00c0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00e0*/               @P2 BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
.L_x_3:
        /*0100*/                   BRA `(.L_x_3);
//--------------------- .nv.shared ------
        /*0000*/                   MUFU.RSQ R7, R6 ;
"""


def test_ptxas() -> None:
    kernels = cuda_static.parse_ptxas(PTXAS)
    assert kernels == {
        "_Z4stepi": cuda_static.Resources(40, 16, 8, 12, 2048, 1),
        "_Z4keysi": cuda_static.Resources(255),
    }


def test_names_are_written_without_arguments() -> None:
    names = {
        "_ZN3sbm12_GLOBAL__N_14fillILNS_9NoiseKindE3EEEvNS_10TensorViewENS0_5CoverEPKmjj": (
            "fill<(NoiseKind)3>"
        ),
        "_ZN3sbm4stepIfNS_3DryELb1EEEvNS_8StepArgsIT_EE": "step<float, Dry, true>",
    }
    assert cuda_static.readable(names) == names


def test_block_sizes() -> None:
    elf = (
        ".nv.info._Z4stepi\n\t<0x3>\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n"
        "\tValue:\t0x100 0x1 0x1 \n.nv.info._Z4keysi\n\tAttribute:\tEIATTR_REGCOUNT\n"
    )
    assert cuda_static.parse_max_threads(elf) == {"_Z4stepi": 256}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "blocks"),
    [
        ("sm_90", 32, 0, 8),  # all 64 warps
        ("sm_90", 40, 0, 6),  # 1280 registers a warp, 51 warps, six blocks of eight
        ("sm_90", 41, 0, 5),  # rounded up to 48 by the unit of allocation
        ("sm_80", 64, 0, 4),
        ("sm_80", 255, 0, 1),
        ("sm_80", 32, 81 * 1024, 2),  # 82 KiB with the system's own, of 164
        ("sm_80", 32, 82 * 1024, 1),
        ("sm_80", 32, 164 * 1024, 0),  # more than a block may have
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, blocks: int) -> None:
    by = cuda_static.blocks_per_multiprocessor(cuda_static.LIMITS[arch], 256, registers, shared)
    assert min(by.values()) == blocks


def test_the_cheapest_way_that_does_the_work() -> None:
    code = sass.functions(SASS)
    assert list(code) == ["_Z4stepi"]
    found = sass.hot_way(code["_Z4stepi"], {"MUFU.RSQ": 1, "LDG.E.128": 1})
    assert found is not None and found[1]
    way = [i.opcode for i in found[0]]
    assert "CALL.REL.NOINC" not in way and way[0] == "LDG.E.128" and len(way) == 12
    assert sass.by_class(found[0]) == {
        "FP32": 1, "XU": 2, "control": 3, "integer": 2, "memory": 2, "uniform": 1,
        "wide multiply": 1,
    }  # fmt: skip
    without = sass.hot_way(code["_Z4stepi"], {"STG.E.128": 1})
    assert without is not None and len(without[0]) == 5
    assert sass.hot_way(code["_Z4stepi"], {"MUFU.RSQ": 2}) is None


def test_predictions() -> None:
    clocks = 132 * 1.755e9
    light = cuda_static.predict({"FP32": 40, "XU": 4, "memory": 3}, 4, 12)
    assert light["limited_by"] == "memory"
    assert light["elements_per_second"]["memory"] == pytest.approx(4.3e12 / 12, rel=0.01)
    heavy = cuda_static.predict({"XU": 16, "multiply": 10, "wide multiply": 80}, 4, 12)
    assert heavy["elements_per_second"]["XU"] == pytest.approx(clocks * 16 * 4 / 16, rel=0.01)
    assert heavy["elements_per_second"]["multiply"] == pytest.approx(
        clocks * 64 * 4 / 170, rel=0.01
    )
    assert heavy["limited_by"] == "multiply"


def test_the_record_says_what_it_is() -> None:
    assert "not run on a GPU" in cuda_static.CLAIM
