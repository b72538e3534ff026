"""The scripts here make the numbers; they are run by hand, and need libraries that the tests do not."""

collect_ignore_glob = ["make_*.py"]
