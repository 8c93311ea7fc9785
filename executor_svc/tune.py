"""Measures which kernel multiplies fastest: python -m executor_svc.tune PROGRAM.json --limits JSON --out FILE

A tool for builders with a GPU of the kind that an engine is for; `executor_svc.compile` takes its table.
"""

import argparse
import sys
from pathlib import Path

import msgspec

from engine.manifest import Limits
from engine.program import Program
from executor_svc.cuda_runner import CudaRunner
from executor_svc.kernels.fuse import fuse
from executor_svc.kernels.tactics import RULE, to_json
from executor_svc.kernels.tuning import tune


def main() -> int:
    """The tool."""
    parser = argparse.ArgumentParser(prog="executor_svc.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("program", type=Path, help="program.json of the engine")
    parser.add_argument("--limits", required=True, help="the engine's limits, as in its manifest")
    parser.add_argument("--out", type=Path, required=True, help="the table, JSON")
    arguments = parser.parse_args()
    program = Program.from_json(arguments.program.read_bytes())
    limits = msgspec.json.decode(arguments.limits, type=Limits)
    table = tune(fuse(program), limits) if CudaRunner.takes(program) else RULE
    arguments.out.write_bytes(to_json(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
