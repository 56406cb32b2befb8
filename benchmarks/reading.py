"""Weights from disk to tensors in memory: Kindling's reader beside mmap and the well-known streaming libraries.

Each reading is a fresh process on a CPU; readers take turns, with the page cache warm and with the file dropped from
it. A reader is done when it has touched every page of every tensor, so that a lazy mmap pays too. "sequential" reads
the bytes one after the other into memory that keeps them; "one buffer" reads them over and over into 32 MiB, which
is no use to anyone but the least that reading can take. Memory is recycled before each timing, so that readers are
compared and not what a hypervisor takes for fresh memory. Also: how peak memory grows with the bytes read, and the
time to a whole spark pipeline against from_pretrained.
"""

import argparse
import importlib.metadata
import itertools
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report

SPARK = Path(__file__).parent.parent / "handler" / "weights" / "spark"
PART = "transformer/diffusion_pytorch_model.safetensors"
PACK = "transformer/model.flashpack"
BUFFER = 32 << 20
ZEROS = bytes(BUFFER)
LIBRARIES = ("safetensors", "fastsafetensors", "runai-model-streamer", "flashpack")
Imported = Callable[[], None]  # what a reader calls between its imports and its work


def kindling(folder: Path, imported: Imported) -> Any:
    import torch  # noqa: F401

    from handler.model.loading.weights import tensors
    from handler.volume.manifest import checked
    from handler.volume.reader import Reader

    imported()
    with Reader(checked(folder)) as reader:
        return tensors(reader, "transformer")


def kindling_beside(folder: Path, imported: Imported) -> Any:
    from handler.model.loading.weights import tensors
    from handler.volume.manifest import checked
    from handler.volume.reader import Reader

    with Reader(checked(folder)) as reader:
        import torch  # noqa: F401

        imported()
        return tensors(reader, "transformer")


def sequential(folder: Path, imported: Imported) -> Any:
    imported()
    whole = memoryview(bytearray((folder / PART).stat().st_size))
    with (folder / PART).open("rb", buffering=0) as file:
        while whole := whole[file.readinto(whole) :]:
            pass
    return {}


def one_buffer(folder: Path, imported: Imported) -> Any:
    imported()
    buffer = bytearray(BUFFER)
    with (folder / PART).open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return {}


def safetensors_mmap(folder: Path, imported: Imported) -> Any:
    import torch  # noqa: F401
    from safetensors.torch import load_file

    imported()
    return load_file(folder / PART)


def fastsafetensors(folder: Path, imported: Imported) -> Any:
    import torch  # noqa: F401
    from fastsafetensors import fastsafe_open

    imported()
    with fastsafe_open([str(folder / PART)], nogds=True, device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def runai(folder: Path, imported: Imported) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    imported()
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(folder / PART), device="cpu")
        return dict(streamer.get_tensors())


def flashpack(folder: Path, imported: Imported) -> Any:
    os.environ["FLASHPACK_CPU_PARALLEL_READ"] = "1"  # on a CPU it is a lazy mmap otherwise
    from flashpack.deserialization import revert_from_file

    imported()
    return revert_from_file(str(folder / PACK))


def spark_kindling(folder: Path, imported: Imported) -> Any:
    from handler import Settings
    from handler.model.hardware import detect
    from handler.model.loading.weights import load_components
    from handler.volume.manifest import checked
    from handler.volume.reader import Reader

    with Reader(checked(folder)) as reader:
        from diffusers import FluxPipeline

        imported()
        return FluxPipeline(**load_components(reader, detect(Settings(device="cpu")))).transformer.state_dict()


def spark_from_pretrained(folder: Path, imported: Imported) -> Any:
    import torch
    from diffusers import FluxPipeline

    imported()
    return FluxPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True).transformer.state_dict()


READERS: dict[str, tuple[Callable[[Path, Imported], Any], str, str]] = {  # function, package it needs, what it checks
    "sequential": (sequential, "", ""),
    "one buffer": (one_buffer, "", ""),
    "kindling": (kindling, "", "CRC-32"),
    "kindling beside import": (kindling_beside, "", "CRC-32"),
    "safetensors mmap": (safetensors_mmap, "safetensors", ""),
    "fastsafetensors": (fastsafetensors, "fastsafetensors", ""),
    "runai streamer": (runai, "runai-model-streamer", ""),
    "flashpack": (flashpack, "flashpack", ""),
}
BESIDE = {"kindling beside import", "spark kindling"}  # these have begun to read when the imports are done
PIPELINES = {"spark kindling": spark_kindling, "spark from_pretrained": spark_from_pretrained}


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="readings of each kind (default: 5)")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[256, 1024, 2048], help="sizes of the file")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/reading.json")
    parser.add_argument("--child", nargs=2, metavar=("READER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(one_reading(options.child[0], Path(options.child[1]))))
        return
    versions = {name: installed(name) or "not installed" for name in LIBRARIES}
    with report.measuring("reading", options.save) as figures:
        figures |= {"rounds": options.rounds, "libraries": versions, "rows": (rows := [])}
        for megabytes in options.megabytes:
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                write(Path(name), megabytes)
                for cache in ("warm", "cold"):
                    found = compare(Path(name), cache, options.rounds)
                    rows += [{"mb": megabytes, "cache": cache, **row} for row in found]
                    print_table(rows[-len(READERS) :])
        for name in PIPELINES:
            figures[name] = medians([child(name, SPARK) for _ in range(options.rounds)])
            print("{}: {read_s:.3f} s after imports, {total_s:.3f} s with them".format(name, **figures[name]))
        slope = growth([row for row in rows if row["reader"] == "kindling" and row["cache"] == "warm"])
        print(f"kindling's peak memory grows by {slope} bytes a byte read")
        figures["peak_growth_per_byte"] = slope


def installed(package: str) -> str:
    """Its version, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write(folder: Path, megabytes: int) -> None:
    """A transformer of random bf16 matrices as large as FLUX's, as `fetch` would leave it; and flashpack's own form."""
    import torch
    from safetensors.torch import save_file

    from handler.volume.manifest import write_manifest

    side = 3072
    found = {
        f"blocks.{number}.weight": torch.randint(-(1 << 15), 1 << 15, (side, side), dtype=torch.int16).view(
            torch.bfloat16
        )
        for number in range(round(megabytes * 1e6 / (2 * side * side)))
    }
    (folder / "transformer").mkdir()
    save_file(found, folder / PART)
    (folder / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]}))
    write_manifest(folder, {"model": "random"})
    if installed("flashpack"):
        from flashpack import pack_to_file

        pack_to_file(found, str(folder / PACK), target_dtype=torch.bfloat16)
    os.sync()


def compare(folder: Path, cache: str, rounds: int) -> list[dict[str, Any]]:
    """One row a reader: medians of its readings, and its seconds over those of the sequential read."""
    able = {name: not package or installed(package) for name, (_, package, _) in READERS.items()}
    readings: dict[str, list[dict[str, float]]] = {name: [] for name in READERS if able[name]}
    for _ in range(rounds):
        for name, found in readings.items():
            drop(folder, keep=cache == "warm")
            found.append(child(name, folder))
    touched = {reading["touched"] for name, found in readings.items() for reading in found if reading["touched"]}
    assert len(touched) == 1, "the readers do not agree on what the file holds"
    least = medians(readings["sequential"])["read_s"]
    rows: list[dict[str, Any]] = []
    for name, (_, _, check) in READERS.items():
        figures = medians(readings[name]) if able[name] else {}
        figures |= {"over_sequential": round(figures["read_s"] / least, 2)} if figures else {}
        rows.append({"reader": name, "checks": check, **figures})
    return rows


def growth(rows: list[dict[str, Any]]) -> list[float]:
    """How peak memory grows from each size to the next: a straight line has equal values."""
    pairs = itertools.pairwise(rows)
    return [round((b["peak_mb"] - a["peak_mb"]) / (b["bytes"] - a["bytes"]) * 1e6, 3) for a, b in pairs]


def drop(folder: Path, keep: bool) -> None:
    """Bring the files into the page cache, or push them out of it."""
    for path in (folder / "transformer").iterdir():
        with path.open("rb", buffering=0) as file:
            if keep:
                while file.read(BUFFER):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(name: str, folder: Path) -> dict[str, float]:
    """One reading in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one_reading(name: str, folder: Path) -> dict[str, float]:
    """Seconds, growth of memory at its peak (imports included), and what the tensors sum up to."""
    size = (folder / PART).stat().st_size
    if name in BESIDE:
        recycle(size)
    before, start, marks = memory("VmRSS"), time.perf_counter(), []

    def imported() -> None:
        marks.append(time.perf_counter())
        if name not in BESIDE:
            recycle(size)
        marks.append(time.perf_counter())

    function = PIPELINES.get(name) or READERS[name][0]
    tensors = function(folder, imported)
    touched = sum(int(touch(tensor)) for tensor in tensors.values())
    end = time.perf_counter()
    return {
        "read_s": end - marks[1],
        "total_s": end - start - (marks[1] - marks[0]),
        "peak_mb": (memory("VmHWM") - before) / 1e6,
        "bytes": size,
        "touched": touched,
    }


def recycle(size: int) -> None:
    """Touch and free memory: where a virtual machine had given it back to its host, that takes seconds a GB."""
    size *= 2  # the page cache wants as much
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, size, BUFFER):
        block[start : start + BUFFER] = ZEROS[: min(BUFFER, size - start)]
    block.close()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here


def touch(tensor: Any) -> Any:
    """A byte of each page, added up."""
    import torch

    return tensor.view(torch.uint8).flatten()[::4096].sum(dtype=torch.int64)


def memory(what: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


def medians(readings: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in readings[0] if name != "touched"]
    return {name: round(statistics.median(reading[name] for reading in readings), 4) for name in names}


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['mb']} MB, page cache {rows[0]['cache']}")
    print(f"{'reader':<24}{'checks':>8}{'read s':>9}{'/ seq.':>8}{'with imports':>14}{'peak MB':>9}")
    for row in rows:
        if "read_s" not in row:
            print(f"{row['reader']:<24}{'not installed':>20}")
            continue
        print(
            "{reader:<24}{checks:>8}{read_s:>9.3f}{over_sequential:>8.2f}{total_s:>14.3f}{peak_mb:>9.0f}".format(**row),
            flush=True,
        )


if __name__ == "__main__":
    main()
