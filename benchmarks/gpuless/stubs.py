"""Stub NVIDIA libraries that let a CUDA build of torch be imported where there is no driver: for lowering alone.

    .gpuless/venv/bin/python benchmarks/gpuless/stubs.py

They come to lie in the environment that runs this, where torch looks for NVIDIA's own, and replace those. Every symbol
that torch's libraries want of NVIDIA's becomes an empty function in a library of the right name; the stub libcudart
reports one GPU, of the compute capability in GPULESS_CAPABILITY ("9.0" if unset).
"""

import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

LIBRARIES = (  # what torch 2.11 for CUDA 13 is linked to, besides libcudart and the driver's
    "libcublas.so.13", "libcublasLt.so.13", "libcudnn.so.9", "libcufft.so.12", "libcufile.so.0", "libcupti.so.13",
    "libcurand.so.10", "libcusolver.so.12", "libcusparse.so.12", "libcusparseLt.so.0", "libnccl.so.2",
    "libnvrtc.so.13", "libnvshmem_host.so.3",
)  # fmt: skip
CUDART = "libcudart.so.13"
OWNERS = {"NVSHMEM": "libnvshmem_host.so.3"}  # of symbol versions that are not a library's name
UNVERSIONED = "libnccl.so.2"  # which gets the symbols without a version
NVIDIA = ("cu", "nccl", "pnccl", "nvrtc", "nvshmem")
WORKS, FAILS = 0, 100
COMPILER = (shutil.which("gcc") or "gcc", "-shared", "-fPIC", "-w", "-fno-builtin")
DEVICE = """
#include <stdlib.h>
#include <string.h>
#include "driver_types.h"
static char* capability(void) { char* c = getenv("GPULESS_CAPABILITY"); return c && *c ? c : "9.0"; }
static int major(void) { return atoi(capability()); }
static int minor(void) { return atoi(strchr(capability(), '.') + 1); }
static long handles = 16;
static long binary[2];
"""
ANSWERS = {  # what is said instead of nothing
    "cudnnGetVersion": "unsigned long f(void) { return 91900; }",  # what torch's wheels bring: attention depends on it
    "cudnnGetProperty": "int f(int which, int* value) { *value = which ? which == 1 ? 19 : 0 : 9; return 0; }",
    "__cudaRegisterFatBinary": "void* f(void* p) { return binary; }",
    "cudaGetErrorString": 'const char* f(int e) { return "a stub"; }',
    "cudaGetErrorName": 'const char* f(int e) { return "a stub"; }',
    "cudaMalloc": "int f(void** p, unsigned long n) { *p = malloc(n < 4096 ? 4096 : n); return 0; }",
    "cudaHostAlloc": "int f(void** p, unsigned long n, unsigned x) { *p = malloc(n); return 0; }",
    "cudaMemGetInfo": "int f(unsigned long* a, unsigned long* b) { *a = *b = 150000000000UL; return 0; }",
    "cudaGetDevice": "int f(int* d) { *d = 0; return 0; }",
    "cudaGetDeviceCount": "int f(int* n) { *n = 1; return 0; }",
    "cudaDriverGetVersion": "int f(int* v) { *v = 13000; return 0; }",
    "cudaRuntimeGetVersion": "int f(int* v) { *v = 13000; return 0; }",
    "cudaStreamCreateWithPriority": "int f(void** s, unsigned x, int p) { *s = (void*)(handles += 16); return 0; }",
    "cudaEventCreateWithFlags": "int f(void** e, unsigned x) { *e = (void*)(handles += 16); return 0; }",
    "cudaDeviceGetStreamPriorityRange": "int f(int* a, int* b) { *a = 0; *b = -5; return 0; }",
    "cudaStreamIsCapturing": "int f(void* s, int* c) { *c = 0; return 0; }",
    "cudaGetDeviceProperties": """int f(struct cudaDeviceProp* p, int d) {
        memset(p, 0, sizeof *p);
        strcpy(p->name, "a GPU that is not there");
        p->major = major(); p->minor = minor();
        p->multiProcessorCount = 132; p->warpSize = 32; p->totalGlobalMem = 150000000000UL; p->l2CacheSize = 52428800;
        p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048; p->regsPerMultiprocessor = 65536;
        p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 232448;
        p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
        p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
        return 0;
    }""",
}


def main() -> None:
    """Write all stubs."""
    site = Path(sysconfig.get_path("purelib"))
    out = site / "nvidia" / "cu13" / "lib"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    files = [*(site / "torch" / "lib").glob("*.so"), *(site / "torch").glob("*.so")]
    wanted = missing(files)
    cudart = wanted.pop(CUDART)
    for library in LIBRARIES:
        versions = {v: names for v, names in wanted.items() if OWNERS.get(v, v or UNVERSIONED) == library}
        build(out, library, versions, FAILS)
    build(out, CUDART, {CUDART: cudart}, WORKS, DEVICE)
    driver = sorted(loaded(files, "cu[A-Z]") | {n for n in wanted.get("", ()) if re.match("cu[A-Z]", n)})
    build(out, "libcuda.so.1", {"": driver}, WORKS)
    build(out, "libnvidia-ml.so.1", {"": loaded(files, "nvml")}, FAILS)
    (out / "libcuda.so").unlink(missing_ok=True)
    (out / "libcuda.so").symlink_to("libcuda.so.1")  # what a linker looks for


def missing(files: Iterable[Path]) -> dict[str, list[str]]:
    """The symbols that torch's libraries want of NVIDIA's, by version ("" for none)."""
    defined = {name.split("@")[0] for file in files for name in symbols(file, "--defined-only")}
    wanted: dict[str, set[str]] = defaultdict(set)
    for file in files:
        for symbol in symbols(file, "--undefined-only"):
            name, _, version = symbol.partition("@")
            if name not in defined and (version == CUDART or name.startswith(NVIDIA)):
                wanted[version].add(name)
    return {version: sorted(names) for version, names in wanted.items()}


def symbols(file: Path, which: str) -> list[str]:
    """Names, with versions, in a library's dynamic table."""
    told = subprocess.run([shutil.which("nm") or "nm", "-D", which, file], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in told.stdout.splitlines()]


def loaded(files: Iterable[Path], start: str) -> set[str]:
    """Names, beginning so, that torch looks up while it runs: they stand in it as text."""
    texts = [file.read_bytes() for file in files if file.name in ("libc10_cuda.so", "libtorch_cuda.so")]
    found = {name.decode() for text in texts for name in re.findall(rf"(?<=\0){start}\w+(?=\0)".encode(), text)}
    return {name for name in found if not re.match("cu(blas|dnn|fft|pti|rand|solver|sparse)", name)}


def function(name: str, result: int) -> str:
    """One that says what `ANSWERS` has, or returns `result`."""
    return re.sub(r"\bf\(", f"{name}(", ANSWERS.get(name, f"int f(void) {{ return {result}; }}"), count=1)


def build(out: Path, library: str, versions: dict[str, Iterable[str]], result: int, head: str = "") -> None:
    """Compile a library of these functions, each under its version."""
    source, script = out / f"{library}.c", out / f"{library}.map"
    names = [name for group in versions.values() for name in sorted(group)]
    source.write_text("\n".join([head, "int gpuless;", *(function(name, result) for name in names)]))
    named = {version: sorted(group) for version, group in versions.items() if version}
    script.write_text("".join(f"{v} {{ global: {' '.join(f'{n};' for n in g)} }};\n" for v, g in named.items()))
    versioned = [f"-Wl,--version-script={script}"] if named else []
    flags = [f"-Wl,-soname,{library}", *versioned, f"-I{out.parent / 'include'}"]
    subprocess.run([*COMPILER, *flags, source, "-o", out / library], check=True)


if __name__ == "__main__":
    main()
