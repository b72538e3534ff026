"""Jobs, one file each: a frozen dataclass `Config` and `main(config)`. The command line finds them."""
