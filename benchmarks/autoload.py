"""What does our entry point add to `import torch`?

Run: python benchmarks/autoload.py [rounds]. torch loads the entry point and calls it. Each round does the same in a
process of its own that has imported torch without it, and takes the wall clock and the processor's time, which other
processes on the machine disturb less.
"""

import json
import statistics
import subprocess
import sys

CODE = """
import json, os, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
def span(function):
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)
whole = span(lambda: __import__("torch"))
from importlib.metadata import entry_points
[entry] = entry_points(group="torch.backends", name="largescale")
print(json.dumps({"our entry point": span(lambda: entry.load()()), "import torch without it": whole}))
"""


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", CODE], text=True)) for _ in range(rounds)]
    print(f"{rounds} processes, milliseconds: median (min-max)")
    for name in runs[0]:
        for clock, times in zip(("wall", "processor"), zip(*(run[name] for run in runs), strict=True), strict=True):
            print(f"{name}, {clock}: {statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})")


if __name__ == "__main__":
    main()
