"""One YAML per run; `unitok train` takes a path or a shipped config by name: configs/demo/tokenizer.yaml."""
