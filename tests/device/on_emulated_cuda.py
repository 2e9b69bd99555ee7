"""Run Python on the emulated CUDA device.

    python tests/device/on_emulated_cuda.py [--devices N] SCRIPT|-m MODULE|-c CODE ...

The process and its children have `devices` CUDA devices. A script reads what was counted:

    from emulated_cuda import LOG
    LOG.clear(); model.cuda()(x.cuda()); print(LOG.waits, LOG.report())
"""

import os
import sys

import guard


def main() -> None:
    arguments = sys.argv[1:]
    devices = 1
    if arguments[:1] == ["--devices"]:
        devices, arguments = int(arguments[1]), arguments[2:]
    try:
        environment = guard.environment(devices)
    except guard.NoCompilerError as error:
        sys.exit(str(error))
    os.execve(sys.executable, [sys.executable, *arguments], environment)


if __name__ == "__main__":
    main()
