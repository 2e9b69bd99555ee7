"""The `unitok` command: one file per subcommand. `--help` must load no torch, so `run()` imports it."""
