"""The `unitok` command: one file per subcommand; `--help` of each loads no torch."""
