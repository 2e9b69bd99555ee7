"""Run scenarios on the emulated CUDA device and print their results as JSON, one line each.

    python tests/device/on_emulated_cuda.py --devices 2 tests/device/run.py generation [NAME ...]

A scenario is a function of `scenarios/FILE.py` whose name starts with `scenario_`; it returns JSON. Without
arguments, the names of files are read from standard input.
"""

import gc
import importlib
import json
import sys
import traceback
import warnings

import torch
from emulated_cuda import LOG


def main(file: str, *names: str) -> None:
    module = importlib.import_module(f"scenarios.{file}")
    for name in names or [name[9:] for name in vars(module) if name.startswith("scenario_")]:
        gc.collect()  # models of earlier scenarios, and what is kept for them
        torch.cuda.set_stream(torch.cuda.default_stream(0))  # also makes cuda:0 the current device
        LOG.clear()
        try:
            result = {"result": getattr(module, f"scenario_{name}")()}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-8)}
        print(json.dumps({"scenario": name, **result}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        for line in sys.stdin:
            main(line.strip())
            print('{"done": true}', flush=True)
