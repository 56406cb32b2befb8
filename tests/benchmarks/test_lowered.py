"""What `make lower` wrote, held: rules that lowered code must keep, predicted times, and the arithmetic behind them."""

import json
import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import sympy
from conftest import ROOT

from handler.catalog.precisions import PRECISIONS, refusal

BENCHMARKS = ROOT / "benchmarks"
LOWERED = json.loads((BENCHMARKS / "results" / "lowered.json").read_text())
ROWS = LOWERED["rows"]
BLOCKS = [row for row in ROWS if row["plan"] == "compiled" and "error" not in row]
T5_BYTES = 6  # for a value in a layer's weights: read, written and read again in 16 bits, and what it multiplies
YET = partial(pytest.mark.xfail, strict=True)  # what does not hold yet, with the present figures
GEMM = "mm float8_e4m3fn 1x4096x12288x3072"


@pytest.fixture(autouse=True)
def gpuless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def row(**differing: Any) -> dict[str, Any]:
    same = {"model": "m", "group": "fp8", "capability": "9.0", "precision": "fp8", "part": "transformer", "name": "b"}
    same |= {"pictures": 1}
    counts = {"count": 1, "calls": 1, "launches": 0, "triton_bytes": 0, "extern_bytes": 0, "casts": 0, "operations": {}}
    return {**same, **counts, "plan": "compiled", "size": [1024, 1024], "weight_bytes": 10**9, **differing}


def predicted(model: str, group: str, card: str, figure: str = "seconds") -> float:
    from gpuless import predict
    from gpuless.cards import CARDS

    found = predict.picture(ROWS, model, group, CARDS[card])
    assert found, f"{model} was not lowered in {group}"
    return found[figure]


def test_nothing_failed_to_lower() -> None:
    assert [f"{row['model']} {row['group']} {row['name']}: {row['error']}" for row in ROWS if "error" in row] == []


def test_all_was_lowered() -> None:
    import lower

    wanted = {(model, capability, group) for model, capability, groups in lower.JOBS for group in groups}
    assert wanted == {(row["model"], row["capability"], row["group"]) for row in ROWS}


@pytest.mark.parametrize("precision", sorted({row["group"] for row in BLOCKS} & PRECISIONS.keys()))
def test_what_is_multiplied_is_what_the_table_says(precision: str) -> None:
    """But for what makes modulations, which is not rounded."""
    lines = [line.split() for row in BLOCKS if row["group"] == precision for line in row["operations"]]
    found = Counter(dtype for kernel, dtype, _ in lines if kernel == "mm")
    row = PRECISIONS[precision]
    assert found.most_common(1)[0][0] == (row.products or row.activations)
    assert found.keys() <= {row.products, row.activations}


@pytest.mark.parametrize("model", sorted({row["model"] for row in BLOCKS if row["casts"]}))
def test_each_activation_is_rounded_once(model: str) -> None:
    counts = {(r["group"], r["name"]): (r["casts"], r["activations"]) for r in BLOCKS if r["model"] == model}
    assert {name: both for name, both in counts.items() if both[0] > both[1]} == {}


def test_t5_in_fp8_moves_little() -> None:
    encoders = [r for r in ROWS if r["name"] == "T5EncoderModel" and r["group"] == "fp8" and r["plan"] == "eager"]
    assert [r["layer_bytes"] for r in encoders if r["layer_bytes"] > T5_BYTES] == []


def test_no_attention_with_heads_too_wide_for_fast_kernels() -> None:
    from gpuless.check import wide

    vaes = [row for row in ROWS if row["part"] == "vae"]
    assert [line for row in vaes for line in row["operations"] if wide(line)] == []


@pytest.mark.parametrize(
    ("model", "group", "seconds"),
    [
        ("flux-schnell", "fp8", 0.365),
        ("flux-schnell", "fp8/cudnn-fp8", 0.33),
        pytest.param("flux-dev", "fp8", 2.1, marks=YET(reason="products and attention alone take 2.0 at these rates")),
        ("flux2-klein", "fp8", 0.25),
        ("z-image-turbo", "fp8", 1.0),
    ],
)
def test_predicted_times_keep_the_bars(model: str, group: str, seconds: float) -> None:
    assert predicted(model, group, "H200") <= seconds


def test_a_picture_is_decoded_in_thirty_milliseconds() -> None:
    assert predicted("flux-schnell", "fp8", "H200", "decode_ms") <= 30


@pytest.mark.parametrize(
    ("told", "model", "precision", "card"),
    [
        ("3.17, fp8", "flux-schnell", "fp8", "L4"),
        ("6.59, int8", "flux-schnell", "int8", "A10G"),
        ("1.07, fp8", "flux-schnell", "fp8", "L40S"),
        ("1.51, bf16", "flux-schnell", "bf16", "A100-40GB"),
        ("0.38, fp8", "flux-schnell", "fp8", "H100"),
        ("0.36, fp8", "flux-schnell", "fp8", "H200"),
        ("[schnell] in bf16 | 0.50 ", "flux-schnell", "bf16", "H200"),
        ("with `cudnn-fp8` | 0.33 ", "flux-schnell", "fp8/cudnn-fp8", "H200"),
        ("in fp8, 512×512 | 0.10 ", "flux-schnell", "fp8/512", "H200"),
        ("would take 0.34 s", "flux-schnell", "fp8/512x4", "H200"),
        ("28 steps, in fp8 | 2.37 ", "flux-dev", "fp8", "H200"),
        ("with `cudnn-fp8` | 2.15 ", "flux-dev", "fp8/cudnn-fp8", "H200"),
        ("28 steps, in bf16 | 3.46 ", "flux-dev", "bf16", "H200"),
        ("[klein], 4 steps, in fp8 | 0.20 ", "flux2-klein", "fp8", "H200"),
        ("8 steps, in fp8 | 0.58 ", "z-image-turbo", "fp8", "H200"),
        ("SD3.5 Large in fp8 | 2.12 ", "sd3.5-large", "fp8", "H200"),
        ("Chroma in fp8 | 6.69 ", "chroma", "fp8", "H200"),
        ("FLUX.2 [dev] in fp8 | 7.69 ", "flux2-dev", "fp8", "H200"),
        ("Qwen-Image in fp8 | 9.27 ", "qwen-image", "fp8", "H200"),
    ],
)
def test_the_guide_says_what_was_predicted(told: str, model: str, precision: str, card: str) -> None:
    assert told in (ROOT / "docs/benchmarks.md").read_text()
    assert abs(predicted(model, precision, card) - float(re.findall(r"\d\.\d\d", told)[0])) <= 0.0051


def test_predictions_follow_from_the_rows() -> None:
    from gpuless import predict

    assert LOWERED["predictions"] == predict.all_of(ROWS)


def test_arithmetic_and_bytes_of_an_operation() -> None:
    from gpuless import work

    assert work.flop(GEMM) == 2 * 4096 * 12288 * 3072
    assert work.moved(GEMM) == 4096 * 3072 + 12288 * 3072 + 2 * 4096 * 12288
    assert work.flop("cudnn bfloat16 1x24x4352x4352x128") == 4 * 24 * 4352**2 * 128
    assert work.moved("cudnn bfloat16 1x24x4352x4352x128") == 4 * 2 * 24 * 4352 * 128
    assert work.flop("conv bfloat16 1x3x128x9x1048576") == 2 * 3 * 128 * 9 * 2**20


def test_a_region_inside_another_is_not_moved_again() -> None:
    from gpuless import work

    assert work.values({(0, 64), (64, 64)}) == 128  # side by side
    assert work.values({(0, 64), (0, 32), (1, 32)}) == 64  # as a whole, and its even and odd values
    assert work.values({(7, 32), (8, 32)}) == 64  # both halves, and nothing else
    assert work.values({(0, 64), (64, 32), (65, 32)}) == 128  # the halves of another
    looked_up = sympy.Symbol("tmp0")
    assert work.values({(looked_up, 64), (0, 128)}) == 192


def test_an_operation_takes_what_limits_it() -> None:
    from gpuless import cards, predict, work

    h200, vector = cards.CARDS["H200"], "mm bfloat16 1x1x18432x3072"
    rate = 1979 * cards.PRODUCTS["float8_e4m3fn"] * 1e9  # in a millisecond
    assert predict.operation_ms(GEMM, h200) == pytest.approx(work.flop(GEMM) / rate)
    bandwidth = 4.8 * cards.MEMORY * 1e9
    assert predict.operation_ms(vector, h200) == pytest.approx(work.moved(vector) / bandwidth)


def test_old_cards_have_no_cudnn_attention() -> None:
    from gpuless import cards, predict

    flux = "bfloat16 1x24x4352x4352x128"
    for name, same in (("A100-40GB", True), ("L4", True), ("H100", False), ("B200", False)):
        times = [predict.operation_ms(f"{kernel} {flux}", cards.CARDS[name]) for kernel in ("cudnn", "flash")]
        assert (times[0] == times[1]) is same


def test_stages_of_a_picture() -> None:
    from gpuless import predict, work
    from gpuless.cards import CARDS, EAGER_US

    prompt = row(part="text_encoder", plan="eager", launches=3000)
    vae = row(part="vae", group="vae")  # compiled, so what it would do eagerly is of no account
    blocks = row(count=19, calls=4, operations={GEMM: 2}, extern_bytes=2 * work.moved(GEMM))
    rows = [blocks, prompt, vae, row(part="vae", plan="eager", group="vae", launches=10**9)]
    found = predict.picture(rows, "m", "fp8", CARDS["H100"])
    assert found
    assert found["encode_ms"] == 3000 * EAGER_US / 1000  # a CPU's
    assert found["denoise_ms"] == pytest.approx(19 * 4 * 2 * predict.operation_ms(GEMM, CARDS["H100"]), abs=0.1)
    assert found["decode_ms"] == 0
    assert found["seconds"] == pytest.approx(
        sum(ms for name, ms in found.items() if name != "seconds") / 1000, abs=1e-3
    )


@pytest.mark.parametrize(
    ("card", "differing"),
    [
        ("A100-40GB", {}),
        ("L4", {"weight_bytes": 23 * 10**9}),
        ("H100", {"error": "RuntimeError: no"}),
        ("H100", {"capability": "8.9"}),
    ],
)
def test_no_prediction_for_what_cannot_run(card: str, differing: dict[str, Any]) -> None:
    from gpuless import predict
    from gpuless.cards import CARDS

    others = [row(part=part, plan="eager", group=group) for part, group in (("text_encoder", "fp8"), ("vae", "vae"))]
    assert predict.picture([row(**differing), *others], "m", "fp8", CARDS[card]) is None
    assert predict.picture([row(), *others], "m", "fp8", CARDS["H100"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_prediction_where_a_worker_refuses(precision: str) -> None:
    from gpuless import predict
    from gpuless.cards import CARDS

    for card in CARDS.values():
        major, minor = map(int, card.capability.split("."))
        refused = refusal(PRECISIONS[precision], "cuda", card.name, (major, minor))
        assert predict.able([], precision, card) is not bool(refused), card.name


def test_the_check_tells_what_is_worse() -> None:
    from gpuless import check

    before = [row(launches=100, triton_bytes=1000, operations={"cudnn bfloat16 1x24x9x9x128": 1})]
    assert check.worse(before, before) == []
    assert check.worse(before, [{**before[0], "launches": 101, "triton_bytes": 900}]) == []
    assert "launches was 100, is 102" in check.worse(before, [{**before[0], "launches": 102}])[0]
    assert "casts was 0, is 1" in check.worse(before, [{**before[0], "casts": 1}])[0]
    wide = {"efficient bfloat16 1x1x16384x16384x512": 1}
    assert "efficient bfloat16 of wide heads is new" in check.worse(before, [{**before[0], "operations": wide}])[0]
    assert "not in the file" in check.worse([], before)[0]
    assert "no such kernel" in check.worse(before, [{**before[0], "error": "no such kernel"}])[0]


def test_every_rate_names_a_type_of_torchs() -> None:
    from gpuless.cards import CARDS

    assert all(re.fullmatch(r"b?float\d+\w*|int8", dtype) for card in CARDS.values() for dtype in card.promised)
