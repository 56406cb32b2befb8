"""SGLang's benchmark of pictures, as it is published: it runs, and each row of its report has a number."""

import os
import re
import subprocess
import sys

BENCH = "sglang/sglang/multimodal_gen/benchmarks/bench_serving.py"
ASKED = ("--backend", "sglang-image", "--dataset", "random", "--task", "t2v", "--num-prompts", "3")
SIZED = ("--max-concurrency", "1", "--width", "256", "--height", "256", "--base-url", os.environ["URL"])
ROWS = (
    "Benchmark duration (s)", "Request throughput (req/s)", "Latency Mean (s)", "Latency Median (s)", "Latency P99 (s)",
    "Peak Memory Max (MB)", "Peak Memory Mean (MB)", "Peak Memory Median (MB)",
)  # fmt: skip

words = [sys.executable, BENCH, *ASKED, *SIZED]
told = subprocess.run(words, capture_output=True, check=True, text=True, timeout=300).stdout
assert re.search(r"Successful requests: +3/3", told), told
for row in ROWS:
    found = re.search(rf"{re.escape(row)}: +([0-9.]+)", told)
    assert found, row
    assert float(found[1]) > 0, row
