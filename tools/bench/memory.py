"""Everything that the memory claims of its speed, in one run: ratios against named baselines, with the bar that each has to meet.

    OMP_NUM_THREADS=2 python tools/bench/memory.py [--quick]        (with streamcl[avalanche], for Avalanche's rows)

The parts can be run alone: memory_index.py (FAISS itself), memory_policies.py (the textbook's herding, Avalanche's buffers) and
memory_statistics.py (LAPACK, torch). --quick leaves out the largest sizes.
"""

from __future__ import annotations

import argparse

import memory_index
import memory_policies
import memory_statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    print("| what | baseline | ratio | bar |\n| --- | --- | --- | --- |")
    for part in (memory_index, memory_policies, memory_statistics):
        for what, baseline, ratio, bar in part.rows(quick):
            print(f"| {what} | {baseline} | {ratio:.2f} | {bar} |", flush=True)


if __name__ == "__main__":
    main()
