"""One YAML per run; `unitok train` takes a path, or such a name: configs/demo/tokenizer.yaml."""
