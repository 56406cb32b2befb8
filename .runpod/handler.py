"""RunPod's Hub looks for a file of this name; ours is platform/runpod_worker.py, which this becomes.

Running it in this process would put this folder on the path, where this file hides the package `handler`.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    worker = Path(__file__).parents[1] / "platform" / "runpod_worker.py"
    os.execv(sys.executable, [sys.executable, "-u", str(worker), *sys.argv[1:]])  # noqa: S606
