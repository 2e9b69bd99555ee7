"""`python -m open_unitok` is the `unitok` command, so that torchrun and deepspeed can launch it."""

from open_unitok.cli.main import main

if __name__ == "__main__":
    main()
