"""One YAML per run; a name such as `demo/tokenizer` or a path is accepted wherever a config is asked for."""
