"""Time `import functrain` beside `import torch`, and the command's help, each in processes of their own.

`python benchmarks/import_time.py [ROUNDS]` prints medians of the seconds of a process, less those of an empty one; the
cases take turns, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CASES = {
    "nothing": "",
    "import torch": "import torch",
    "import functrain": "import functrain",
    "functrain, and every room": "import functrain as ft; [getattr(ft, name) for name in ft.__all__]",
    "functrain --help": "from functrain_command import main; main(['--help'])",
    "functrain train --help": "import sys; from functrain_command import main; main(['train', '--help'])",
}


def seconds(program: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for name in CASES:
        seconds(CASES[name])  # from the disk into memory
    for _ in range(rounds):
        for name, program in CASES.items():
            found[name].append(seconds(program))
    nothing = statistics.median(found["nothing"])
    medians = {name: statistics.median(times) - nothing for name, times in found.items()}
    print(f"Python {sys.version.split()[0]}, medians of {rounds}; an empty process takes {nothing:.3f} s")
    for name, value in medians.items():
        if name != "nothing":
            print(f"{name:28} {value:6.2f} s  {value / medians['import torch']:5.2f} of torch's")


if __name__ == "__main__":
    main()
